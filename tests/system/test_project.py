"""The project around the code: one version, commands that exist, nobody's machine in the text."""
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
parser = ConfigParser(delimiters=["="])
parser.read(ROOT/"settings.ini", encoding="utf-8")
CFG = parser["DEFAULT"]
SCRIPTS = dict(s.split("=") for s in CFG["console_scripts"].split())


def tracked():
    "Files of the project: what git knows or would add, else everything outside hidden folders."
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    names = (
        done.stdout.split("\0")[:-1]
        if done.returncode == 0
        else [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*")]
    )
    return [ROOT/n for n in names if (ROOT/n).is_file() and not n.startswith((".venv/", ".git/", "runs/"))]


def test_one_version():
    import ctm_nb
    assert ctm_nb.__version__ == CFG["version"] == metadata.version(CFG["lib_name"])
    assert "version = " not in (ROOT/"pyproject.toml").read_text()


def test_setup_translates_settings():
    "What setup.py hands to setuptools, caught by a stand-in for `setup`."
    code = ("import setuptools, json; setuptools.setup = lambda **kw: print(json.dumps(kw)); "
            "exec(open('setup.py').read(), {'__file__': 'setup.py'})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    import json
    kw = json.loads(done.stdout)
    assert (kw["name"], kw["version"]) == (CFG["lib_name"], CFG["version"])
    assert (
        kw["install_requires"] == CFG["requirements"].split()
        and kw["extras_require"]["dev"] == CFG["dev_requirements"].split() + CFG["optional_requirements"].split()
    )
    assert kw["python_requires"] == ">=" + CFG["min_python"] and {
        CFG["lib_path"],
        "ctm_nb.method",
        "ctm_nb.training",
    } <= set(kw["packages"])
    assert kw["entry_points"]["console_scripts"] == CFG["console_scripts"].split()


def test_requirements_cover_the_imports():
    """Each module of ours imports the standard library, ourselves and declared requirements, nothing else; optional
    ones only inside functions."""
    names = {
        k: {re.split(r"[<>=!~\[]", r)[0] for r in CFG[k].split()} for k in ("requirements", "optional_requirements")
    }
    allowed = (
        {dict(pillow="PIL").get(n, n).replace("scikit-learn", "sklearn") for n in names["requirements"]}
        | set(sys.stdlib_module_names)
        | {CFG["lib_path"]}
    )
    optional = names["optional_requirements"] | {"IPython"}  # comes with ipywidgets
    for path in (ROOT/CFG["lib_path"]).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            here = allowed if node in tree.body else allowed | optional
            for name in found:
                assert name.split(".")[0] in here, f"{path.name} imports {name}, which settings.ini does not require"


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_resolve(script):
    module, _, function = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert shutil.which(script, path=os.path.dirname(sys.executable)), (
        f"{script} is not installed beside {sys.executable}"
    )


def test_no_path_of_a_machine():
    path = re.compile(r"""(?:^|[\s"'(=`\[])(?:/(?:home|Users|root|work|mnt|opt)/\w[^\s"')]*|[A-Z]:\\+Users\\)""", re.M)
    for file in tracked():
        try: text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        assert not (m := path.search(text)), f"{file.relative_to(ROOT)} names {m[0].strip()}"


def test_ci_can_be_run():
    run = ROOT/".ci"/"run"
    assert os.access(run, os.X_OK)
    subprocess.run(["bash", "-n", run], check=True)


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/".ci")
    return importlib.import_module("check")


def test_a_line_in_a_fenced_block_that_a_window_cuts_off_is_found(rules, tmp_path):
    wide, note = "x" * 113, "````md\n```\n" + "x" * 112 + "\n```\n"
    (tmp_path/"nbs").mkdir()
    (tmp_path/"README.md").write_text(f"{wide}\n```sh\n{wide}\n```\n{wide}\n")
    cells = [dict(cell_type="code", source=f"'''```\n{wide}\n'''"),
             dict(cell_type="markdown", source=[note, wide + "\n````\n", wide])]
    (tmp_path/"nbs"/"a.ipynb").write_text(json.dumps({"cells": cells}))
    assert rules.cut_off(tmp_path, "nbs") == [
        "README.md, line 3: 113 columns in a fenced block, at most 112",
        "nbs/a.ipynb, cell 1, line 5: 113 columns in a fenced block, at most 112"]


def test_a_statement_behind_a_colon_that_goes_on_is_found(rules):
    fine = "if a: b()\nfor c in (\n    1,\n): d()\nwith e:\n    f(\n    )\ntry: g()\nfinally: h()\n"
    assert rules.goes_on(fine) == []
    assert rules.goes_on("def é(): return i(\n)\nif j: pass\nelse: k(\n)\ntry: l()\nfinally: m(\n)\n") == [1, 4, 7]


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    "A script beside the clone finds the package, and not the clone's folder (see `options` in setup.py)."
    (tmp_path / "ctm_nb").mkdir()
    r = subprocess.run(
        [sys.executable, "-c", "from ctm_nb import __version__; print(__version__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert r.returncode == 0 and r.stdout.strip(), r.stderr
