"""Killed, told to stop, out of disk, damaged, other settings: a run ends as it would have ended, or says why not."""
import json
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ONE_LEVEL, TRAIN, assert_same, command, compute_alike, newest
from warm import Python, python

import ctm_nb.training.trainer as training
from ctm_nb.checkpoints.store import CheckpointError, save_checkpoint
from ctm_nb.training.config import make_config
from ctm_nb.training.runtime import Signals
from ctm_nb.training.trainer import Trainer, _changes

ROOT = Path(__file__).resolve().parents[2]
TINY = [ONE_LEVEL, "teacher.steps=8", "distill.steps=6", "teacher.batch=8", "distill.batch=8", "run.save_every=4",
        "run.log_every=3", "run.sample_every=100", "evaluate.n=0"]


def start(folder, *more): return Trainer(make_config("tiny", [*TINY, *more]), folder)


def walk(trainer, step):
    "Steps without pictures, which take longer than training; saved at the end."
    while trainer.step < step:
        trainer.train_step()
        if trainer.step % 3 == 0: trainer.log_window()
    trainer.save()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The undisturbed run, 14 steps, saved after 8 and 14."
    compute_alike()
    folder = tmp_path_factory.mktemp("runs") / "whole"
    walk(walk(start(folder), 8), 14)
    return folder


# ---- killed

def test_killed_at_random_moments_not_a_bit_differs():
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    words = ROOT / "benchmarks" / "crash.py", "--kills", "5", "--seed", "1", "--out", "-", "--set", ONE_LEVEL
    done = python(run, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads(done.stdout)
    assert (record["mismatches"], record["kills"], set(record["by kind"])) == (0, 5, {"time", "disk", "write"})
    assert record["runs to their end"] >= 1


# ---- told to stop

@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path, name, code):
    endless = ["teacher.steps=100000", "run.save_every=100000", "run.log_every=1"]
    p = Python(*TRAIN, "--runs", tmp_path, "--name", "r", "--set", *TINY, *endless)
    log, waited = tmp_path / "r" / "metrics.jsonl", time.monotonic()
    while not (log.exists() and log.stat().st_size) and time.monotonic() - waited < 200 and p.process.is_alive():
        time.sleep(.05)
    os.kill(p.process.pid, getattr(signal, name))
    done = p.end()
    err = done.stderr
    assert done.returncode == code, err
    step = newest(tmp_path / "r").step
    assert 0 < step < 100000 and "Traceback" not in err
    assert f"{name}: step {step} is saved; the same command continues" in err
    assert (tmp_path / "r" / "report.html").exists()
    again = Trainer(make_config("tiny", [*TINY, "teacher.steps=100000"]), tmp_path / "r")
    assert again.step == step and len(again.log.read()) == step


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals: signal.raise_signal(signal.SIGHUP)
        assert not signals.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


def test_an_odd_configuration_is_one_line(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text('{"run": 3}')
    done = command("--runs", tmp_path, "--name", "r")
    assert done.returncode == 2 and "has a config.json with run=3" in done.stderr and "Traceback" not in done.stderr


# ---- no room

def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(whole, tmp_path):
    "A limit on the size of files stands in for a disk without room; small files still fit."
    walk(start(tmp_path / "r"), 8)
    done = command("--runs", tmp_path, "--name", "r", "--set", *TINY, largest_file=20_000)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "File too large while step 12 was being saved; the checkpoints before it are whole" in line
    assert ".safetensors" in line
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_00000008"]
    walk(start(tmp_path / "r"), 14)  # room again
    assert_same(tmp_path / "r", whole)


# ---- damaged

def test_damage_is_named_and_the_previous_one_used_only_if_it_is_moved_away(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "d")
    part = tmp_path / "d" / "checkpoints" / "step_00000014" / "model.safetensors"
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    message = r"step_00000014/model.safetensors: expected sha256 .* move the folder step_00000014 away"
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path / "d")
    part.parent.rename(part.parent.with_name("damaged"))
    again = start(tmp_path / "d")
    assert again.step == 8
    walk(again, 14)
    assert_same(tmp_path / "d", whole)


@pytest.mark.parametrize("name", ["checkpoint.json", "ctm.safetensors", "state.pt"])
def test_a_missing_part_is_named_and_nothing_starts_over(whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "l")
    for p in (tmp_path / "l" / "checkpoints").glob("step_*"): (p / name).unlink(missing_ok=True)
    log = (tmp_path / "l" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=f"step_00000014/{name}: expected a readable file"):
        start(tmp_path / "l")
    assert (tmp_path / "l" / "metrics.jsonl").read_text() == log
    (tmp_path / "l" / "checkpoints" / "step_00000014").rename(tmp_path / "l" / "away")
    if name == "ctm.safetensors": assert start(tmp_path / "l").step == 8  # the teacher's checkpoint has no such part
    else:
        with pytest.raises(CheckpointError, match=f"step_00000008/{name}: expected a readable file"):
            start(tmp_path / "l")


def test_scores_without_checkpoints_are_not_trained_over(tmp_path):
    t = start(tmp_path / "n")
    (tmp_path / "n" / "scores.json").write_text("[]")
    with pytest.raises(CheckpointError, match="has been trained"): start(tmp_path / "n")
    assert t.step == 0


# ---- other settings

SAFE_CASES = [  # words of the first part, its steps, words of the second: must equal the second from the start
    ((), 6, ("teacher.steps=11",)),                          # longer, while the teacher is in training
    (("teacher.steps=11",), 6, ("teacher.steps=8",)),        # shorter, not below what is done
    ((), 8, ("teacher.steps=11",)),                          # longer, at its end
    ((), 6, ("distill.lr=.002", "distill.N=9", "distill.K=5")),  # of a stage that has not begun
    ((), 8, ("distill.steps=3", "distill.decay=linear")),
    ((), 11, ("distill.steps=9",)),
    ((), 11, ("gan.steps=4", "gan.batch=8")),                # a stage more
    ((), 5, ("run.log_every=1", "run.keep=5", "evaluate.teacher_steps=2")),
]


@pytest.mark.parametrize("before, step, after", SAFE_CASES,
                         ids=lambda v: " ".join(v) if isinstance(v, tuple) else str(v))
def test_a_safe_change_ends_as_if_it_had_been_there_from_the_start(tmp_path, before, step, after):
    walk(start(tmp_path / "a", *before), step)
    changed = start(tmp_path / "a", *after)
    assert changed.step == step and len(changed.changes) == 1 and changed.changes[0]["step"] == step
    straight = start(tmp_path / "b", *after)
    walk(changed, changed.total), walk(straight, straight.total)
    assert_same(tmp_path / "a", tmp_path / "b")
    a, b = newest(tmp_path / "a").meta, newest(tmp_path / "b").meta
    assert a["changes"] == changed.changes and b["changes"] == []
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == b["config"]


@pytest.mark.parametrize("step, word", [
    (6, "teacher.lr=.1"), (6, "teacher.steps=5"), (6, "network.model_channels=16"), (6, "run.seed=1"),
    (6, "data.flip=true"), (6, "teacher.decay=linear"), (11, "teacher.steps=9"), (11, "distill.lr=.1"),
    (11, "distill.steps=2"), (11, "distill.K=3")])
def test_an_unsafe_change_is_refused_by_name_and_changes_nothing(tmp_path, step, word):
    walk(start(tmp_path / "a"), step)
    config = (tmp_path / "a" / "config.json").read_text()
    with pytest.raises(ValueError, match=word.split("=")[0].replace(".", r"\.") + ": .* -> "):
        start(tmp_path / "a", word)
    assert (tmp_path / "a" / "config.json").read_text() == config and start(tmp_path / "a").step == step


def test_steps_of_a_decaying_rate_are_refused(tmp_path):
    walk(start(tmp_path / "a", "teacher.decay=cosine"), 6)
    with pytest.raises(ValueError, match="teacher.steps: 8 -> 12.*decay is constant"):
        start(tmp_path / "a", "teacher.decay=cosine", "teacher.steps=12")


def test_pictures_that_moved_are_the_same_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / "p" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8))
        picture.save(tmp_path / "p" / "ab"[i % 2] / f"{i}.png")
    walk(start(tmp_path / "r", f"data.source={tmp_path / 'p'}"), 3)
    (tmp_path / "p").rename(tmp_path / "q")
    assert start(tmp_path / "r", f"data.source={tmp_path / 'q'}").step == 3
    next((tmp_path / "q").rglob("*.png")).unlink()
    ways = "other images .* give another --name to begin anew, with --finetune .*r from these"
    with pytest.raises(ValueError, match=ways): start(tmp_path / "r", f"data.source={tmp_path / 'q'}")


def test_the_precision_stays_and_its_word_may_change(tmp_path):
    walk(start(tmp_path / "a"), 3)
    message = "was trained in fp32, and run.precision=bf16 means bf16 here; --set run.precision=fp32 continues it"
    with pytest.raises(ValueError, match=message): start(tmp_path / "a", "run.precision=bf16")
    assert (t := start(tmp_path / "a", "run.precision=fp32")).step == 3
    from ctm_nb.commands.train import _place
    how = [make_config("tiny", [*TINY, f"run.precision={p}"]) for p in ("bf16", "fp32")]
    said = [_place(c, tmp_path / "a", t.data) for c in how]
    assert said[0].startswith("refused") and "trained in fp32" in said[0]
    assert said[1].startswith("continues the run there from step 3")


def test_a_setting_that_a_new_version_adds_counts_as_its_default():
    new, old = (asdict(make_config("tiny", TINY)) for _ in range(2))
    del old["data"]["use_labels"], old["distill"]["label_dropout"]
    assert _changes(old, new, 20) == ([], [])
    labels = {**new, "data": {**new["data"], "use_labels": False}}
    assert _changes(old, labels, 20)[1] == ["data.use_labels: True -> False"]


def test_a_run_of_another_version_goes_on_without_the_settings_that_are_gone(tmp_path, caplog):
    "As its config.json and checkpoint.json have them: settings that are no longer there, a solver's former name."
    new = asdict(make_config("tiny", TINY))
    gone = {"distill": dict(solver="dpm", pairs=4, spacing="curved"), "gan": dict(r1=.5), "run": dict(score_every=10)}
    older = {k: {**v, **gone.get(k, {})} for k, v in new.items()}
    said = "no longer a setting, ignored: distill.pairs=4, distill.spacing=curved, gan.r1=0.5, run.score_every=10"
    assert new["distill"]["solver"] == "dpmpp_2m" and _changes(older, new, 11) == ([said], [])
    straight, old = walk(start(tmp_path / "b"), 14), start(tmp_path / "a")
    walk(old, 11)
    c = newest(tmp_path / "a")
    save_checkpoint(c.path.parent, 11, c.models, c.state, {**c.meta, "config": older})
    (config := tmp_path / "a" / "config.json").write_text(json.dumps(older))
    again = start(tmp_path / "a")
    assert again.step == 11 and f"from step 11 on: {said}" in caplog.text
    assert json.loads(config.read_text()) == json.loads(json.dumps(new))
    walk(again, 14), straight.save()
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_state_that_lacks_something_is_refused(tmp_path):
    t = walk(start(tmp_path / "a"), 11)
    for what, find in (("state", lambda c: c.state), ("networks", lambda c: c.models),
                       ("optimizers", lambda c: c.state["optimizers"]), ("emas", lambda c: c.state["emas"])):
        c = newest(tmp_path / "a")
        find(c).popitem()
        with pytest.raises(CheckpointError, match=f"step_00000011: expected the {what}"): t.state.load(c)


def test_other_libraries_are_remembered(tmp_path, monkeypatch):
    walk(start(tmp_path / "a"), 3)
    monkeypatch.setattr(training, "versions", lambda: {"torch": "99.0"})
    t = walk(start(tmp_path / "a"), 4)
    expected = [{"step": 3, "what": [f"torch: {torch.__version__} -> 99.0"]}]
    assert t.changes == expected == newest(tmp_path / "a").meta["changes"]


# ---- what an older version wrote

def test_the_states_of_generators_and_of_a_scaler_are_not_read(tmp_path):
    t = start(tmp_path / "a")
    walk(t, 2)
    kept = t.state.state_dict
    t.state.state_dict = lambda *a: {**kept(*a), "random": {"torch": torch.get_rng_state()}, "scaler": {}}
    t.save()
    found = training.resume_point(tmp_path / "a" / "checkpoints").state
    assert {"random", "scaler"} <= found.keys() and start(tmp_path / "a").step == 2


def test_a_run_in_fp16_is_not_gone_on_with(tmp_path):
    t = walk(start(tmp_path / "a"), 2)
    c = newest(tmp_path / "a")
    older = {**c.meta["config"], "run": {**c.meta["config"]["run"], "precision": "fp16"}}
    save_checkpoint(c.path.parent, t.step, c.models, c.state, {**c.meta, "config": older, "precision": "fp16"})
    with pytest.raises(ValueError, match="was trained in fp16, and run.precision=auto means fp32 here; nothing trains"):
        start(tmp_path / "a")
