"""Odd but valid files and odd surroundings end in one line that names the file."""
import hashlib
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ctm_nb.checkpoints.models import load
from ctm_nb.checkpoints.store import CheckpointError, _seal, load_checkpoint
from ctm_nb.commands.flags import one_line_errors
from ctm_nb.commands.train import _place
from ctm_nb.data.images import digits
from ctm_nb.evaluation.draw import _warn_unsuited
from ctm_nb.evaluation.reference import FORMAT, is_reference_file, pick_device, read_reference
from ctm_nb.evaluation.search import stored_times
from ctm_nb.training.config import make_config

Z = np.zeros(3)
REFERENCES = {
    "words": dict(mu=np.array(["a"]), sigma=np.eye(1)), "complex": dict(mu=np.zeros(4, complex), sigma=np.eye(3)),
    "objects": dict(mu=np.array([None]), sigma=np.eye(1)), "half a JSON": dict(meta="[", mean=Z),
    "empty": dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "not finite": dict(mu=np.full(2, np.nan), sigma=np.eye(2)),
    "a number": dict(meta="3", mean=Z), "only its format": dict(meta=json.dumps({"format": FORMAT}), mean=Z),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_references(tmp_path, kind):
    np.savez(tmp_path / "r.npz", **REFERENCES[kind])
    with pytest.raises(ValueError, match="r.npz") as e: read_reference(tmp_path / "r.npz")
    assert "\n" not in str(e.value)


def test_references_whose_zip_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as z: z.writestr("mu.npy", b"zzz")
    with pytest.raises(ValueError, match="r.npz"): read_reference(tmp_path / "r.npz")
    data = (tmp_path / "r.npz").read_bytes()
    for at in range(len(data)):
        (tmp_path / "x.npz").write_bytes(data[:at] + b"\xff" + data[at + 1:])
        is_reference_file(tmp_path / "x.npz")


@pytest.mark.parametrize("text", ["[", "3", "[]", '{"1": 3}', '{"1": {"times": "x"}}', "null",
                                  '{"1": {"times": [1, 2], "gamma": 0}}', '{"1": {"times": ["a"], "gamma": 0}}',
                                  '{"1": {"times": [2, 1], "gamma": "a"}}'])
def test_stored_times(tmp_path, text):
    (tmp_path / "m.times.json").write_text(text)
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match="times"): stored_times(tmp_path / "m.safetensors", 1)


@pytest.mark.parametrize("key, odd", [("meta", 3), ("meta", {"models": []}), ("meta", {"models": {"teacher": 3}}),
                                      ("meta", {"models": {"teacher": {}}}), ("files", 3), ("versions", 3),
                                      ("meta", {"config": [3]}), ("files", {"teacher.safetensors": 3}), ("step", "x")])
def test_manifests(tmp_path, untrained_run, key, odd):
    run = untrained_run(tmp_path / "run", 1, ["a"])
    file = next(run.glob("checkpoints/*/checkpoint.json"))
    body = json.loads(file.read_bytes())
    del body["seal"]
    file.write_bytes(_seal({**body, key: odd}))
    with pytest.raises((CheckpointError, ValueError), match="step_") as e: load(file.parent)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["teacher.safetensors", "state.pt"])
def test_parts_that_are_damaged_though_the_manifest_knows_them(tmp_path, untrained_run, name):
    run = untrained_run(tmp_path / "run", 1, ["a"])
    file = next(run.glob("checkpoints/*/checkpoint.json"))
    body, data = json.loads(file.read_bytes()), b"\x10\0\0\0\0\0\0\0{" + bytes(90)
    del body["seal"]
    body["files"][name] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    file.with_name(name).write_bytes(data)
    file.write_bytes(_seal(body))
    with pytest.raises(ValueError, match=f"step_.*{name} can't be read"): load_checkpoint(file.parent)


def test_a_plan_beside_a_damaged_manifest(tmp_path, untrained_run):
    run = untrained_run(tmp_path / "run", 1, ["a"])
    (run / "config.json").write_text('{"run": {"seed": 0}}')
    file = next(run.glob("checkpoints/*/checkpoint.json"))
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "step": "x"}))
    assert "refused: " in (said := _place(make_config("tiny"), run, digits("train"))) and str(run) in said


@pytest.mark.parametrize("text", ["[", '{"label_dropout": 0}', '{"ctm": 3, "teacher": 3, "distill": 3}', "3", "\xff"])
def test_a_configuration_beside_guidance(tmp_path, untrained_run, text):
    run = untrained_run(tmp_path / "run", 1, ["a", "b"])
    (run / "config.json").write_bytes(text.encode("latin-1"))
    if "label" in text: return _warn_unsuited(load(run), 2., None, run)
    with pytest.raises(ValueError, match="config.json can't be read"): _warn_unsuited(load(run), 2., None, run)


def test_devices_that_are_not_here():
    with pytest.raises(ValueError, match="device mps: none is here"): pick_device("mps")
    with pytest.raises(ValueError, match="device must be cpu, cuda or mps, got 'xpu'"): pick_device("xpu")


def test_a_process_that_is_left_alone_says_so(capsys):
    with pytest.raises(SystemExit) as e, one_line_errors("ctm_nb_train"):
        raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
    err = capsys.readouterr().err
    assert e.value.code == 3 and "another process of this run is gone; the same command continues" in err
    assert "reset by peer" in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="other"), one_line_errors("ctm_nb_train"): raise RuntimeError("other")


def test_memory_has_words(capsys):
    with pytest.raises(SystemExit), one_line_errors("command"): raise MemoryError
    assert capsys.readouterr().err == "command: out of memory\n"


def test_warnings_as_errors_and_an_ascii_python(tmp_path):
    env = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    words = [sys.executable, "-c", "from ctm_nb.commands.data import ctm_nb_data; ctm_nb_data()", "inspect"]
    for path, code in (("digits", 0), ("кот", 2)):
        done = subprocess.run([*words, path, "--workers", "0"], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
