"""The sampling command: interrupted, in several processes, refused; the same samples every time."""
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from warm import Python, python

from ctm_nb.evaluation import draw
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.evaluation.draw import (Drawer, _draw_parts, draw_samples, _drawer_of, make_recipe, _missing_parts,
                                    _open_parts, _with_parts)
from ctm_nb.checkpoints.models import load
from ctm_nb.evaluation.reference import Ranks
from ctm_nb.evaluation.search import store_times

CODE = "from ctm_nb.commands.sample import ctm_nb_sample; ctm_nb_sample()"
WORDS = ["-n", "78", "--which", "teacher", "--solver", "heun", "--steps", "8", "--classes", "dog,cat", "--device",
         "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained_run): return untrained_run(tmp_path_factory.mktemp("run"), 3, ["cat", "dog", "cow"])


def images_of(path):
    with zipfile.ZipFile(path) as z:
        listed = json.loads(z.read("dataset.json"))["labels"]
        return np.stack([np.array(Image.open(io.BytesIO(z.read(k)))) for k, _ in listed]), [y for _, y in listed]


def test_help_imports_nothing_heavy():
    code = ("import ctm_nb.commands.sample as c, sys; c.sample_parser().format_help(); "
            "print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_killed_command_continues(run, tmp_path, monkeypatch, capsys):
    out, parts = tmp_path / "x.zip", tmp_path / "x.zip.parts"
    p = Python(CODE, run, *WORDS, "--out", out)
    while p.process.is_alive() and not list(parts.glob("part_*")): time.sleep(.005)
    p.process.kill()
    p.end()
    kept = {f: f.stat().st_mtime_ns for f in parts.glob("part_*")}
    assert 0 < len(kept) < 10 and not out.exists()
    seen, publish = {}, draw.publish
    monkeypatch.setattr(draw, "publish", lambda *a: seen.update({f: f.stat().st_mtime_ns for f in parts.glob("part_*")})
                        or publish(*a))
    ctm_nb_sample([str(run), *WORDS, "--out", str(out), "--batch-size", "3"])
    assert len(seen) == 10 and seen.items() >= kept.items()  # what was finished was not drawn again
    assert not parts.exists() and not list(tmp_path.glob(".tmp*")) and "78 samples" in capsys.readouterr().out
    images, labels = images_of(out)
    assert images.shape == (78, 8, 8, 3) and labels == [1, 0] * 39
    ctm_nb_sample([str(run), *WORDS, "--out", str(tmp_path / "y.npz")])
    with np.load(tmp_path / "y.npz") as z:
        assert (np.abs(z["arr_0"].astype(int) - images) <= 1).all() and z["arr_1"].tolist() == labels
        assert json.loads(str(z["sampler"]))["seed"] == 0


def test_half_precision_is_part_of_the_recipe(run, tmp_path, capsys):
    drawn = {}
    for p in ("fp32", "bf16"):
        ctm_nb_sample([str(run), *WORDS, "--out", str(tmp_path / f"{p}.npz"), "--precision", p])
        with np.load(tmp_path / f"{p}.npz") as z: drawn[p] = z["arr_0"].astype(int)
    apart = np.abs(drawn["fp32"] - drawn["bf16"])
    assert 0 < apart.mean() < 4
    with pytest.raises(SystemExit): ctm_nb_sample([str(run), *WORDS, "--out", str(tmp_path / "bf16.npz")])
    with pytest.raises(SystemExit):
        ctm_nb_sample([str(run), "--edit", "denoise", "x.png", "--out", str(tmp_path / "e"), "--precision", "bf16"])
    said = capsys.readouterr().err
    assert "bf16.npz exists" in said and "--precision has no meaning to --edit" in said
    m = load(run)
    with pytest.raises(ValueError, match="fp32 or bf16, got 'fp16'"): make_recipe(m, str(run), 70, precision="fp16")
    plans = {p: _with_parts(make_recipe(m, str(run), 70, precision=p), m) for p in ("fp32", "bf16")}
    file = _open_parts(tmp_path / "z.npz", plans["fp32"]) / "recipe.json"
    file.write_text(json.dumps({k: v for k, v in plans["fp32"].items() if k != "precision"}))  # of an earlier version
    assert _open_parts(tmp_path / "z.npz", plans["fp32"]) == file.parent
    with pytest.raises(ValueError, match="precision: fp32 -> bf16"): _open_parts(tmp_path / "z.npz", plans["bf16"])


@pytest.mark.parametrize("has", [True, False])
def test_a_device_without_half_precision_is_named(run, tmp_path, monkeypatch, caplog, has):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    for p in ("fp32", "bf16"):
        ctm_nb_sample([str(run), "-n", "2", "--device", "cpu", "--out", str(tmp_path / f"{p}.npz"), "--precision", p])
        assert ("no instructions for bf16" in caplog.text) == (p == "bf16" and not has)


def test_torchrun_is_killed_and_continued(run, tmp_path):
    out, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    torchrun = "import os; os.setsid(); from torch.distributed.run import main; main()"
    words, env = ["sample", run, *WORDS, "--out", out], {**os.environ, "OMP_NUM_THREADS": "1"}
    (script := tmp_path / "command.py").write_text("from ctm_nb.commands.main import main; main()")
    forks = "--standalone", "--nproc_per_node", "2", "--start-method", "fork", "--run-path", script
    p = Python(torchrun, *forks, *words, env=env)  # whom it starts to be killed need not be two new Pythons
    while p.process.is_alive() and not list(parts.glob("part_*")): time.sleep(.005)
    os.killpg(p.process.pid, signal.SIGKILL)
    p.end()
    left = len(list(parts.glob("part_*")))
    assert 0 < left < 10 and not out.exists()
    p = python(torchrun, "--standalone", "--nproc_per_node", "2", "-m", "ctm_nb", *words, env=env)
    assert p.returncode == 0 and p.stdout.count("78 samples") == 1 and not parts.exists(), p.stderr
    ctm_nb_sample([str(run), *WORDS, "--out", str(tmp_path / "y.npz"), "--batch-size", "7"])
    with np.load(out) as a, np.load(tmp_path / "y.npz") as b:
        assert a["arr_0"].shape == (78, 8, 8, 3) and (np.abs(a["arr_0"].astype(int) - b["arr_0"]) <= 1).all()
        assert (a["arr_1"] == b["arr_1"]).all()


def test_ranks_of_torchrun_share_the_work(run, tmp_path):
    m = load(run)
    plan = _with_parts(make_recipe(m, run, 70, gamma=.2, times="80,1"), m)
    folder = _open_parts(tmp_path / "z", plan)
    _draw_parts(_drawer_of(m, plan), plan, folder, Ranks(1, 2))
    assert _missing_parts(folder, plan) == [0, 2, 4, 6, 8]
    draw_samples(run, tmp_path / "z", 70, device="cpu", gamma=.2, times="80,1")
    assert not folder.exists() and {p.parent.name for p in (tmp_path / "z").rglob("*.png")} == {"cat", "dog", "cow"}
    assert len(list((tmp_path / "z").rglob("*.png"))) == 70


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gamma", "1.1"], "--gamma must be >= 0 and <= 1, got 1.1"),
        (["--times", "3,5"], "times must be decreasing numbers, got 3,5\n"),
        (["--times", "90,5"], "range [0.002, 80], got 90\n"),
        (["--times", "80,.001"], "range [0.002, 80], got 0.001\n"),
        (["--times", "80,.5", "--steps", "7"], "times 80,.5 are 2 steps, got steps=7\n"),
        (["--classes", "dgo"], "nearest is 'dog'"),
        (["--classes", "3"], "0..2"),
        (["--times", "auto", "--steps", "7"], "no times are stored"),
        *((["--out", f"x.{end}"], f"or be a folder, got x.{end}\n")
          for end in ("tar", "gif", "JPG", "webp", "tif", "qoi", "mp4", "csv", "pt")),
        (["--seed", "9" * 20], f"seed must be a whole number in [0, 2**64), got seed={'9' * 20}\n"),
        (["--classes", "cat,"], "with one comma between two, got nothing beside one\n"),
        (["--device", "cuda:77"], "cuda:77"),
        (["-n", "0"], "-n must be >= 1, got 0"),
        (["--batch-size", "none"], "--batch-size must be a whole number, got 'none'"),
        (["--seed", "-4"], "--seed must be >= 0, got -4"),
        (["--guidance", "-2"], "scale=-2"),
        (["--out", "no/such/x.zip"], "no folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: ctm_nb_sample([str(run), "--out", "o.npz", *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.strip().count("\n") == 0 and not list(tmp_path.iterdir())


def test_a_folder_may_have_a_dot_in_its_name(run, tmp_path):
    for name in ("v1.2", "of.tuesday"):
        ctm_nb_sample([str(run), "-n", "3", "--device", "cpu", "--out", str(tmp_path / name)])
        assert len(list((tmp_path / name).rglob("*.png"))) == 3


def test_where_names_are_numbers_an_index_is_refused(untrained_run, tmp_path, capsys):
    run = untrained_run(tmp_path / "run", 1, ["1", "10", "2"])
    words = [str(run), "-n", "2", "--device", "cpu", "--out", str(tmp_path / "x.npz"), "--classes"]
    with pytest.raises(SystemExit): ctm_nb_sample([*words, "0"])
    assert "class 0 is out of range: expected 1, 10, 2\n" in capsys.readouterr().err
    ctm_nb_sample([*words, "2,1"])
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [2, 0]


def test_times_auto_takes_what_is_stored(run, tmp_path):
    store_times(run, {"steps": 2, "times": [80., 1.5, .002], "gamma": .4, "score": 1., "score_default": 2.,
                      "curve": [1.]})
    plan = make_recipe(load(run), run, 3, times="auto")
    assert (plan["times"], plan["gamma"]) == ([80., 1.5, .002], .4)
    assert make_recipe(load(run), run, 3, times="auto", gamma=0.)["gamma"] == 0.
    assert make_recipe(load(run), run / "checkpoints" / "step_00000001", 3, steps=2, times="auto")["gamma"] == .4
    with pytest.raises(ValueError, match="no times"): make_recipe(load(run), tmp_path, 3, times="auto")
    assert make_recipe(load(run), run, 3, times="auto", solver="heun")["gamma"] == 0.  # what is stored is of jumps


def test_nothing_is_overwritten_unasked(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="mine"): draw_samples(run, tmp_path / "mine", 3, device="cpu")
    assert (tmp_path / "mine" / "a.txt").exists() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError, match="is no folder of samples, a.txt"):
        draw_samples(run, tmp_path / "mine", 3, device="cpu", overwrite=True)
    (tmp_path / "mine" / "a.txt").rename(tmp_path / "mine" / "a.png")  # a picture is no less precious
    with pytest.raises(FileExistsError, match="is no folder of samples, a.png"):
        draw_samples(run, tmp_path / "mine", 3, device="cpu", overwrite=True)
    assert (tmp_path / "mine" / "a.png").read_text() == "precious"
    (tmp_path / "mine" / "a.png").unlink()
    for n in (5, 3): draw_samples(run, tmp_path / "mine", n, device="cpu", overwrite=True)  # samples of before
    assert len(list((tmp_path / "mine").rglob("*.png"))) == 3 and [p.name for p in tmp_path.iterdir()] == ["mine"]
    plan, stamp = draw_samples(run, tmp_path / "mine", 3, device="cpu"), (tmp_path / "mine").stat().st_mtime_ns
    assert (tmp_path / "mine").stat().st_mtime_ns == stamp and plan["n"] == 3


def test_other_samples_do_not_continue_a_plan(run, tmp_path):
    m = load(run)
    _open_parts(tmp_path / "w.npz", _with_parts(make_recipe(m, run, 80, seed=1), m))
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        draw_samples(run, tmp_path / "w.npz", 80, device="cpu", seed=2)
    with pytest.raises(ValueError, match="weights"):
        draw_samples(run, tmp_path / "w.npz", 80, device="cpu", seed=1, which="teacher", solver="euler")


@pytest.mark.parametrize("n", [5, 70])
def test_whatever_else_is_in_the_folder_of_parts_stays(run, tmp_path, n):
    "A person's folder may have its name: nothing there is deleted that was not written there."
    (mine := tmp_path / "w.npz.parts").mkdir()
    (mine / "engine.txt").write_text("precious")
    for seed in (0, 1): draw_samples(run, tmp_path / "w.npz", n, device="cpu", seed=seed, overwrite=True)
    assert [f.name for f in mine.iterdir()] == ["engine.txt"] and len(np.load(tmp_path / "w.npz")["arr_0"]) == n


@pytest.mark.parametrize("name", ["x.npz", "x.zip", "x.png", "x"])
def test_a_file_of_one_s_own_is_replaced_only_when_asked(run, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=f"{name} exists; choose another name or pass --overwrite"):
        draw_samples(run, tmp_path / name, 3, device="cpu")
    assert (tmp_path / name).read_text() == "precious" and len(list(tmp_path.iterdir())) == 1
    made = draw_samples(run, tmp_path / name, 3, device="cpu", overwrite=True)
    assert draw_samples(run, tmp_path / name, 3, device="cpu") == made and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("words", [
    ["--solver", "heun"], ["--which", "teacher"], ["--guide", "{run}", "--guidance", "2"],
    ["--solver", "edm", "--steps", "3"], ["--solver", "heun", "--times", "80,1"]])
def test_gamma_without_jumps_is_refused_and_its_default_is_not(run, tmp_path, capsys, words):
    words = [str(run), "--out", str(tmp_path / "x.npz"), "-n", "2", *(w.format(run=run) for w in words)]
    with pytest.raises(SystemExit) as e: ctm_nb_sample([*words, "--gamma", ".3"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and "gamma=0.3 has no meaning to solver '" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    ctm_nb_sample(words)
    ctm_nb_sample([*words, "--gamma", "0"])  # the same samples
    assert json.loads(str(np.load(tmp_path / "x.npz")["sampler"]))["gamma"] == 0.


def test_batches_back_off_when_memory_is_full():
    def f(ids):
        if len(ids) > 5: raise torch.OutOfMemoryError("full")
        return ids
    b = Drawer(f, 64)
    assert b(torch.arange(23)).tolist() == list(range(23)) and 2 <= b.size <= 5
    with pytest.raises(RuntimeError, match="a bug"):
        Drawer(lambda ids: (_ for _ in ()).throw(RuntimeError("a bug")), 4)(torch.arange(3))
    with pytest.raises(torch.OutOfMemoryError):
        Drawer(lambda ids: (_ for _ in ()).throw(torch.OutOfMemoryError("full")), 4)(torch.arange(3))


def test_not_finite_output_is_named(run, tmp_path, monkeypatch):
    def broken(*a):
        m = load(*a)
        m.net.out_layers[1].bias.data.fill_(float("nan"))
        return m
    monkeypatch.setattr(draw, "load", broken)
    with pytest.raises(FloatingPointError, match="nan in sample 0"):
        draw_samples(run, tmp_path / "n.npz", 3, device="cpu")
    assert not (tmp_path / "n.npz").exists()
