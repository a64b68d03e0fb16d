"""The state of a run: damage, kills, a full disk, the closed form of the EMA."""
import os
import random
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ctm_nb.checkpoints.store import (
    EMA,
    CheckpointError,
    MetricsLog,
    _seal,
    atomic_write,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def save(folder, step, mark=0, **kw):
    "A small checkpoint that carries `mark` in every part."
    models = dict(
        ema=dict(w=torch.full((3, 4), float(mark)), b=torch.arange(5)), student=dict(w=torch.full((2,), float(mark)))
    )
    return save_checkpoint(
        folder,
        step,
        models,
        dict(mark=mark, opt=dict(state={0: dict(m=torch.ones(2))}, betas=(0.9, 0.99), fused=None)),
        dict(mark=mark),
        **kw,
    )


def mark_of(folder):
    "The mark of the latest checkpoint, after checking that its parts belong together."
    ck = load_checkpoint(latest_checkpoint(folder))
    marks = {ck.meta["mark"], ck.state["mark"], int(ck.models["ema"]["w"][0, 0]), int(ck.models["student"]["w"][0])}
    assert len(marks) == 1, marks
    return marks.pop()


# ---- EMA

@pytest.mark.parametrize("rate", [0., 0.5, 0.99])
@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_closed_form(rate, warmup):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    series = [model.weight.detach().clone()]
    ema = EMA(model, rate, warmup)
    for _ in range(40):
        with torch.no_grad(): model.weight.copy_(torch.randn(2, 3))
        series.append(model.weight.detach().clone())
        ema.update(model)
    mu = [min(rate, (1 + n)/(10 + n)) if warmup else rate for n in range(40)]
    weights = [np.prod(mu)] + [(1 - mu[i])*np.prod(mu[i + 1:]) for i in range(40)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w*s for w, s in zip(weights, series))
    torch.testing.assert_close(ema.module.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_ema_leaves_the_model_alone_and_passes_gradients_to_its_input():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    ema = EMA(model, 0.9)
    ema.update(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    x = torch.randn(2, 3, requires_grad=True)
    ema.module(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in ema.module.parameters())


# ---- damage

def test_round_trip_of_awkward_tensors(tmp_path):
    base = torch.randn(4, 6)
    tied = dict(
        a=base,
        b=base,
        row=base[1],
        t=base.T,
        wide=torch.ones(1, 1).expand(3, 3),
        half=torch.ones(2, dtype=torch.bfloat16),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(3),
        grad=torch.nn.Parameter(torch.ones(2)),
    )
    models = load_checkpoint(save_checkpoint(tmp_path, 0, dict(net=tied), {}, {})).models
    for k, v in tied.items():
        assert models["net"][k].dtype == v.dtype and torch.equal(models["net"][k], v.detach()), k


@pytest.mark.parametrize("name", ["checkpoint.json", "ema.safetensors", "student.safetensors", "state.pt"])
def test_every_damage_is_noticed_and_named(tmp_path, name):
    path = save(tmp_path, 7, 3)
    file, good, gen = path/name, (path/name).read_bytes(), random.Random(name)
    cuts = {0, 1, len(good) - 1, *(gen.randrange(len(good)) for _ in range(20))}
    flips = [(gen.randrange(len(good)), gen.randrange(8)) for _ in range(150)]
    damaged = (
        [good[:n] for n in cuts]
        + [good[:i] + bytes([good[i] ^ 1 << b]) + good[i + 1 :] for i, b in flips]
        + [good + b"\0", bytes(len(good))]
    )
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=rf"{name}: expected .*, found "): load_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: expected a readable file, found"): load_checkpoint(path)
    assert latest_checkpoint(tmp_path) is None
    file.write_bytes(good)
    assert mark_of(tmp_path) == 3


def test_a_part_is_read_alone(tmp_path):
    path = save(tmp_path, 7, 3)
    for other in ("state.pt", "student.safetensors"): (path/other).write_bytes(b"damaged")
    ck = load_checkpoint(path, parts=["ema"])
    assert list(ck.models) == ["ema"] and ck.state == {} and ck.meta == dict(mark=3)
    with pytest.raises(ValueError, match="no part 'emma'"): load_checkpoint(path, parts=["emma"])


@pytest.mark.parametrize("bad", [object(), np.float64(1), np.ones(2), {1, 2}, torch.Size([1]), {(1, 2): 3}])
def test_unreadable_state_is_refused_before_the_disk_is_touched(tmp_path, bad):
    with pytest.raises(ValueError, match=r"state\['a'\]\[0\]"):
        save_checkpoint(tmp_path / "new", 1, {}, dict(a=[bad]), {})
    assert not (tmp_path/"new").exists()


def test_meta_that_is_not_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError): save_checkpoint(tmp_path, 1, {}, {}, dict(a=object()))
    assert not list(tmp_path.iterdir())


# ---- crashes

class PowerCut(BaseException): "Raised by every disk operation once the power has failed."


@contextmanager
def power_cut(folder, at, lazy_names):
    "Die before change `at`; tear files that were not fsynced; with `lazy_names` undo renames in folders not fsynced."
    calls, safe, renamed = [], {p.stat().st_ino for p in folder.rglob("*")}, []
    real_rename = os.rename

    def counted(name, real):
        def call(*args, **kw):
            if len(calls) == at: raise PowerCut(name)
            calls.append(name)
            if name == "fsync":
                st = os.fstat(args[0])
                safe.add(st.st_ino)
                if stat.S_ISDIR(st.st_mode): renamed.clear()
            if name == "rename": renamed.append(args)
            return real(*args, **kw)
        return call
    try:
        names = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
        with patch.multiple(os, **{n: counted(n, getattr(os, n)) for n in names}): yield calls
    except PowerCut: pass
    for src, dst in reversed(renamed if lazy_names else []):
        if os.path.exists(dst) and not os.path.exists(src): real_rename(dst, src)
    for p in folder.rglob("*"):
        if p.is_file() and p.stat().st_ino not in safe: os.truncate(p, p.stat().st_size//2)


def next_step(f):
    save(f, 2, 2)
    prune_checkpoints(f, 1)


def same_step(f): save(f, 1, 2)


def two_steps(f):
    save(f, 2, 2)
    save(f, 2, 2)
    prune_checkpoints(f, 1)


@pytest.mark.parametrize("lazy_names", [False, True])
@pytest.mark.parametrize("work", [next_step, same_step, two_steps])
def test_a_power_cut_anywhere_leaves_a_whole_checkpoint(tmp_path, work, lazy_names):
    at, found = 0, []
    while True:
        f = tmp_path/str(at)
        save(f, 1, 1)
        with power_cut(f, at, lazy_names) as calls: work(f)
        found.append(mark_of(f))
        save(f, 3, 3)                                    # life goes on
        assert mark_of(f) == 3
        prune_checkpoints(f, 1)
        assert [p.name for p in f.iterdir()] == ["step_00000003"]
        if len(calls) < at: break
        at += 1
    assert found[0] == 1 and found[-1] == 2 and found == sorted(found)   # old, then new, never back


def test_atomic_write_survives_a_cut_anywhere(tmp_path):
    for at in range(6):
        (tmp_path/"f").write_bytes(b"old"*9)
        with power_cut(tmp_path, at, False): atomic_write(tmp_path/"f", b"new"*9)
        assert (tmp_path/"f").read_bytes() in (b"old"*9, b"new"*9)


def test_a_checkpoint_of_a_newer_format_says_so(tmp_path):
    "And is found for that: it is no reason to continue from an older one."
    save(tmp_path, 1)
    with patch("ctm_nb.checkpoints.store._seal", lambda body: _seal({**body, "format": 2})): save(tmp_path, 2)
    found = latest_checkpoint(tmp_path)
    assert found.name == "step_00000002"
    with pytest.raises(CheckpointError, match=r"step_00000002/checkpoint.json: format 2, of a newer ctm_nb than this"):
        load_checkpoint(found)


def latest_step(folder): return int(path.name[-8:]) if (path := latest_checkpoint(folder)) else 0


# One process imports torch (seconds) and forks a saving child (milliseconds) for each line it reads.
SAVER = """
import os, sys, torch
from pathlib import Path
from ctm_nb.checkpoints.store import save_checkpoint, prune_checkpoints
folder = Path(sys.argv[1])
def forever(step):
    while True:
        step += 1
        mark = step % 97
        models = dict(ema=dict(w=torch.full((3, 4), float(mark))), student=dict(w=torch.full((20_000,), float(mark))))
        save_checkpoint(folder, step - step % 3, models, dict(mark=mark), dict(mark=mark))
        prune_checkpoints(folder, 2)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        try: forever(int(line))
        finally: os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_sigkill_at_random_moments(tmp_path):
    gen, step = random.Random(0), 0
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    ) as p:
        for _ in range(12):
            print(step, file=p.stdin, flush=True)
            pid, deadline = int(p.stdout.readline()), time.time() + 60
            try:
                while latest_step(tmp_path) <= step and time.time() < deadline: time.sleep(0.002)
                time.sleep(gen.uniform(0, 0.03))
            finally: os.kill(pid, signal.SIGKILL)
            assert int(p.stdout.readline()) == -signal.SIGKILL, "the saving process failed by itself"
            mark_of(tmp_path)
            for folder in tmp_path.glob("step_*"):
                load_checkpoint(folder)  # every visible one is whole, not only the newest
            found = latest_step(tmp_path)
            assert found >= step, "a kill lost a checkpoint that was there"
            step = found
        p.stdin.close()


def test_a_full_disk_keeps_the_old_one(tmp_path):
    real = os.fsync
    for n in range(8):
        f, left = tmp_path/str(n), [None]*n
        save(f, 1, 1)

        def fsync(fd):
            if not left: raise OSError(28, "No space left on device")
            left.pop()
            real(fd)
        with patch("os.fsync", fsync):
            try: save(f, 1, 2)
            except OSError as e: assert e.errno == 28
        assert mark_of(f) in (1, 2) and not list(f.glob(".tmp-step*"))
        prune_checkpoints(f, 1)
        assert [p.name for p in f.iterdir()] == ["step_00000001"] and mark_of(f) in (1, 2)


# ---- choosing and pruning

def test_latest_and_prune(tmp_path, caplog):
    assert latest_checkpoint(tmp_path/"none") is None
    for step in (900, 1000, 20, 123456789): save(tmp_path, step, step % 50)
    assert latest_checkpoint(tmp_path).name == "step_123456789"
    (tmp_path/"step_123456789"/"state.pt").write_bytes(b"x")
    (tmp_path/".tmp-step_00009999-0").mkdir()
    assert latest_checkpoint(tmp_path).name == "step_00001000" and "step_123456789 is not a complete" in caplog.text
    assert [p.name for p in prune_checkpoints(tmp_path, 2)] == ["step_00000020"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000900", "step_00001000", "step_123456789"]


# ---- log

def test_log_rewinds_from_every_torn_length(tmp_path):
    path = tmp_path/"m.jsonl"
    log = MetricsLog(path)
    for step in range(5): log.append(step=step, loss=torch.tensor(0.5), note="a\nb\u2028c", bad=float("inf"))
    whole = path.read_bytes()
    rows = log.read()
    assert rows[2] == dict(step=2, loss=0.5, note="a\nb\u2028c", bad=None) and log.mark() == 5
    for n in range(0, len(whole) + 1, 2):
        path.write_bytes(whole[:n])
        complete = whole[:n].count(b"\n")
        log = MetricsLog(path)
        assert log.read() == rows[:complete]
        if complete < 3:
            with pytest.raises(CheckpointError, match="expected at least 3 complete lines"): log.rewind(3)
        else: log.rewind(3)
        for step in range(min(complete, 3), 5): log.append(step=step, loss=0.5, note="a\nb\u2028c", bad=float("nan"))
        assert path.read_bytes() == whole
