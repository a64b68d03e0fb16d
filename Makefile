# Everything here needs only python3 (3.10 or newer), git and make. The first target that needs it creates $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := settings.ini setup.py pyproject.toml
export PATH := $(abspath $(BIN)):$(PATH)
# Empty: compiled modules are kept. Where the caller's environment forbids it, every process would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test browser check types rules nbtest pytest export readme docs docker clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## install, then train, sample and score the digits preset into runs/digits
	$(BIN)/ctm_nb_train

test: $(VENV)/.dev ## install, then check, nbtest and pytest
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory nbtest
	@$(MAKE) --no-print-directory pytest

browser: $(VENV)/.browser ## the explorer and the pages in a real browser, after installing one (apt as root, else the driver's own)
	CTM_BROWSER=1 $(BIN)/python -m pytest tests/system/test_browser.py tests/system/test_page.py tests/system/test_serve.py

check: $(VENV)/.dev ## would export change a file? style, types, the order of the rooms, figures
	@$(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) types rules

types: $(VENV)/.dev
	$(BIN)/python .ci/typecheck.py

rules: $(VENV)/.dev
	$(BIN)/python .ci/check.py
	$(BIN)/ruff check ctm_nb tests benchmarks docs .ci setup.py
	$(BIN)/ruff check --isolated --line-length 120 --select E501,E702 nbs
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/house.py

nbtest: $(VENV)/.dev ## run the notebooks, two at a time with one thread each
	$(BIN)/python .ci/nbtest.py

# Two processes with one thread each are faster than one with two, and three no faster. A file's tests stay together: they share fixtures. Long files come first.
pytest: $(VENV)/.dev ## run tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

export: $(VENV)/.dev ## write ctm_nb/ from the notebooks, clean them, make README.md
	$(BIN)/python .ci/export.py

readme: $(VENV)/.dev ## make README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: $(VENV)/.docs ## build the documentation site in _docs and check it (see CONTRIBUTING.md)
	@mkdir -p build
	-$(BIN)/ctm_nb_convert nbs/results/emoji/student.safetensors --web build/page --overwrite # if make test was there
	$(BIN)/python docs/build.py

docker: ## build and try both images with buildah, on a Debian base that mmdebstrap makes (docker/README.md)
	docker/build.sh cpu cuda

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) _proc _docs build dist *.egg-info .pytest_cache
	find ctm_nb nbs tests .ci -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 10) and sys.exit("ctm_nb needs Python 3.10 or newer, $(PYTHON) is %d.%d" % v[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "creating $(VENV) failed (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# uv installs in a fraction of pip's time; where it can't be had, or can't reach the index that pip is configured for, pip does it.
define install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "no uv, using pip" >&2
	@if [ -x $(BIN)/uv ] && $(BIN)/uv pip install --python $(BIN)/python -e "$(1)"; then :; else $(BIN)/python -m pip install -e "$(1)"; fi
endef

# What settings.ini lists under a name, without the package itself and its torch.
define install_listed
	@wanted=$$($(BIN)/python -c "import configparser as c; p = c.ConfigParser(delimiters=['=']); p.read('settings.ini'); print(p['DEFAULT']['$(1)'])") && \
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv && $(BIN)/uv pip install --python $(BIN)/python $$wanted; then :; else $(BIN)/python -m pip install $$wanted; fi
endef

$(VENV)/.docs: settings.ini | $(BIN)/python
	$(call install_listed,docs_requirements)
	@touch $@

# A browser that is there will do; else Debian's and Ubuntu's by apt where we may, else the one that comes with the driver.
$(VENV)/.browser: settings.ini | $(VENV)/.dev
	$(call install_listed,browser_requirements)
	@if command -v chromium || command -v google-chrome || command -v chromium-browser; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else $(BIN)/python -m playwright install chromium; fi
	@touch $@

$(VENV)/.demo: $(SETUP) | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/.dev: $(SETUP) | $(BIN)/python
	$(call install,.[dev])
	@touch $(VENV)/.demo $@
