"""Two processes, several micro-batches, a killed process, another number of processes: the same training."""
import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from runs import ONE_LEVEL, compute_alike
from warm import Python, ranks

from ctm_nb.checkpoints.models import load
from ctm_nb.checkpoints.store import load_checkpoint
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.data.images import digits
from ctm_nb.evaluation.reference import NO_HALF
from ctm_nb.training.config import make_config
from ctm_nb.training.costs import memory
from ctm_nb.training.runtime import autocast, told_precision
from ctm_nb.training.shard import weights_of
from ctm_nb.training.stages import take
from ctm_nb.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "tests" / "training"), os.environ.get("PYTHONPATH")]
PATH = os.pathsep.join(p for p in PATHS if p)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": PATH}
TORCHRUN = "from torch.distributed.run import main; main()"
# RAdam's first steps are plain momentum: differences of rounding stay what they are; Adam would make steps of them
SHORT = ["teacher.steps=2", "teacher.batch=12", "teacher.label_dropout=.3", "teacher.optimizer=radam", "teacher.lr=.05",
         "distill.steps=2", "distill.batch=12", "distill.label_dropout=.3", "distill.optimizer=radam", "distill.lr=.02",
         "gan.steps=4", "gan.batch=12", "gan.optimizer=radam", "gan.lr=.03", "evaluate.n=0",
         "network.augment_dim=9", "teacher.augment=.12", ONE_LEVEL, "distill.sigma_init=auto",
         "run.seed=4"]  # with which the weight of no loss is clamped
FEW = ["teacher.steps=1", "distill.steps=1", "gan.steps=2", "network.augment_dim=0", "teacher.augment=0",
       "distill.sigma_init=published"]
SHARED = {"whole": [], "micro-batches": ["run.micro_batch=4"], "sharded": ["run.shard=true"],
          "adm": [*FEW, "network.family=adm", "run.shard=true"],
          "edm2": [*FEW, "network.family=edm2", "teacher.weighting=uncertainty", "teacher.lr=2", "distill.lr=1",
                   "gan.lr=1", "run.shard=true"],
          "one pass": [*FEW, "gan.steps=0", "distill.steps=2", "distill.matching=trajectories", "distill.N=5",
                       "distill.K=4", "distill.batch=16", "run.shard=false"]}


def follow(words, folder, spoil=None):
    "Every number of every step, and the networks at the end of every stage."
    trainer, log, ends = Trainer(make_config("tiny", words), folder), [], {}
    if spoil: spoil(trainer)
    while trainer.step < trainer.total:
        log.append({k: float(v) for k, v in trainer.train_step().items() if k != "stage"})
        if trainer.step not in trainer.ends.values(): continue
        networks = trainer.parts.items()
        ends[trainer.now.name] = {p: {k: v.clone() for k, v in weights_of(m).items()} for p, m in networks}
    return log, ends


def assert_close(a, b, at=1e-6, weights=1e-6):
    "Losses within `at`, weights of every part at the end of every stage within `weights`."
    (log_a, ends_a), (log_b, ends_b) = a, b
    for n, (x, y) in enumerate(zip(log_a, log_b, strict=True)):
        assert x.keys() == y.keys()
        for k in x: assert abs(x[k] - y[k]) <= at * max(1, abs(x[k])), (n, k, x[k], y[k])
    for stage in ends_a:
        for part in ends_a[stage]:
            for k, v in ends_a[stage][part].items():
                apart = float((v - ends_b[stage][part][k]).abs().max())
                assert apart <= weights * max(1, float(v.abs().max())), (stage, part, k)


WORKER = """
import sys, torch
from runs import compute_alike
from test_processes import SHARED, SHORT, follow
from ctm_nb.training.runtime import join, leave
here, found = join("cpu"), {}
compute_alike()
for name, more in SHARED.items(): found[name] = follow([*SHORT, *more], f"{sys.argv[1]}/{name}")
torch.save(found, f"{sys.argv[1]}/{here.rank}.pt")
leave()
"""


def sharing(code, start):
    """Two processes at work on a copy of a folder, once more if one died by a signal; that copy.

    That happens in about one of a hundred such runs, and the peer then reports a lost connection. A core dump had the
    thread of gloo in gloo::allgather, at the allocator's list of free pieces, cut short as if one was freed twice.
    """
    for again in (True, False):
        shutil.copytree(start, folder := start.with_name(f"{start.name}-{again}"))
        done = ranks(code, folder)
        if not again or all(d.returncode not in (-signal.SIGABRT, -signal.SIGSEGV) for d in done): break
        warnings.warn("a process died by a signal: " + "; ".join(d.stderr[-200:] for d in done), stacklevel=2)
    assert not any(d.returncode for d in done), "\n".join(f"{d.returncode}: {d.stderr[-2000:]}" for d in done)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    compute_alike()
    return follow(SHORT, tmp_path_factory.mktemp("alone"))


def test_two_processes_are_one_in_every_stage(alone, tmp_path):
    (tmp_path / "both").mkdir()
    found = sharing(WORKER, tmp_path / "both")
    first, second = (torch.load(found / f"{r}.pt") for r in range(2))
    for name, more in SHARED.items():
        assert_close(first[name], second[name], at=0, weights=0)  # the processes hold the same bits
        one = follow([*SHORT, *more[:-1]], tmp_path / f"{name}, alone") if FEW[0] in more else alone
        assert_close(one, first[name])
        for n in first[name][0]:  # not zero, as gradients of what is not in a graph would be
            assert all(v > 0 for k, v in n.items() if k.startswith(("lambda", "grad_norm"))), (name, n)


# ---- sharded

SHARDED = """
import sys
from runs import compute_alike
from test_processes import RAW
from ctm_nb.training.config import make_config
from ctm_nb.training.runtime import leave
from ctm_nb.training.shard import local
from ctm_nb.training.trainer import Trainer
Trainer(make_config("tiny", [*RAW, "run.shard=true"]), f"{sys.argv[1]}-new").run("teacher")
t = Trainer(make_config("tiny", [*RAW, "run.shard=true"]), sys.argv[1])
compute_alike()
assert t.step == 3
t.run("ctm_dsm")
while t.step < 6: t.train_step()
for name in t.now.sharded:
    held, every = (sum(f(p).numel() for p in t.parts[name].parameters()) for f in (local, lambda p: p))
    assert held < .7 * every, (name, held, every)
assert {"model", "ctm"} <= {*t.now.sharded}
t.save()
leave()
"""
RAW = [*SHORT, "gan.init=raw", "gan.first=student", "run.device=cpu", "run.sample_every=4"]


def test_a_sharded_run_goes_on_alone_and_the_other_way_round(tmp_path, capsys):
    "One process to step 3, two that share the student into the third stage, one to the end; all read what they left."
    straight = follow(RAW, tmp_path / "straight")
    t = Trainer(make_config("tiny", RAW), tmp_path / "r")
    while t.step < 3: t.train_step()
    t.save()
    r = sharing(SHARDED, tmp_path / "r")
    assert {p.name for p in (r / "samples").iterdir()} == {"step_00000004.png", "final.png"}
    teacher = load_checkpoint(Path(f"{r}-new") / "checkpoints" / "step_00000002").models["teacher"]
    for k, v in straight[1]["teacher"]["teacher"].items(): assert float((v - teacher[k]).abs().max()) <= 1e-6, k
    assert load(r).D(torch.zeros(1, 1, 8, 8), 1., 0).isfinite().all()
    ctm_nb_sample([str(r), "-n", "2", "--out", str(tmp_path / "out")])
    assert any((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="run.shard=true needs several processes .*; one has all"):
        Trainer(make_config("tiny", [*RAW, "run.shard=true"]), r)
    log, ends = follow(RAW, r)
    assert len(log) == 2
    assert_close((straight[0][6:], {"ctm_dsm_gan": straight[1]["ctm_dsm_gan"]}), (log, ends))


@pytest.mark.parametrize("word", ["teacher.optimizer=muon", "distill.balance_rows=4", "teacher.profiles=.1",
                                  "run.compile=true", "teacher.source=none distill.matching=dsm"])
def test_what_needs_whole_networks_is_not_sharded(word):
    words = ["run.shard=true", *word.split()]
    with pytest.raises(ValueError, match="run.shard must be false .*, got True"): make_config("tiny", words)


ROOMS = """
import sys
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.evaluation.reference import launched
from ctm_nb.training import costs
costs.available_memory = lambda: int(sys.argv[2 + launched()[0]])
ctm_nb_train(["--preset", "tiny", "--runs", sys.argv[1], "--name", "r", "--set", "teacher.steps=1", "distill.steps=2",
              "teacher.batch=12", "distill.batch=12", "evaluate.n=0", "run.device=cpu", "run.precision=fp32",
              "network.attention=4,2", "distill.phases=trajectories:.5,soft:.5"])
"""


def test_two_processes_with_little_memory_take_as_many_images_as_the_poorer_one_can(tmp_path):
    config = make_config("tiny", ["teacher.steps=1", "distill.steps=2", "teacher.batch=12", "distill.batch=12",
                                  "distill.phases=trajectories:.5,soft:.5"])
    need = lambda n: max(memory(config, digits(), n, world=2).values())
    rooms = [str(int((need(n) + need(n + 1)) / 2 / .8)) for n in (4, 3)]
    done = ranks(ROOMS, tmp_path, *rooms)
    assert all(d.returncode == 0 for d in done), done
    for line in (" are free for each process: 3 images at a time", "network.attention=2: the network has no such side"):
        assert sum(d.stderr.count(line) for d in done) == 1, done
    assert json.loads((tmp_path / "r" / "config.json").read_text())["run"]["micro_batch"] == "3"


def test_the_weights_have_moved(alone):
    "What agrees above must be worth agreeing on."
    played = [n for n in alone[0] if "lambda_gan" in n]
    unclamped = lambda n: .01 < n["lambda_gan"] < 10 and 0 < n["lambda_dsm"] < 1e4  # a clamp would agree anyway
    assert played and all(map(unclamped, played))
    _, ends = alone
    far = lambda a, b: float(torch.cat([(v - b[k]).flatten() for k, v in a.items()]).norm())
    before, after = ends["ctm_dsm"], ends["ctm_dsm_gan"]
    assert far(before["model"], after["model"]) > .03 and far(before["model"], before["target"]) > .003


def test_micro_batches_are_the_whole_in_every_stage(alone, tmp_path):
    assert_close(alone, follow([*SHORT, "run.micro_batch=5"], tmp_path))


def test_blocks_computed_again_give_the_same_bits(alone, tmp_path):
    calls, block = [], type(Trainer(make_config("tiny", SHORT), tmp_path / "n").parts["model"].net).block
    forward = block.forward
    def counted(self, *args):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "forward", counted)
        for folder, word in (("plain", "false"), ("again", "true")):
            t = Trainer(make_config("tiny", [*SHORT, f"run.recompute={word}"]), tmp_path / folder)
            t.train_step()
            calls.append(folder)
    plain, again = calls.index("plain"), calls.index("again") - calls.index("plain") - 1
    assert again == 2 * plain  # a teacher's step: each block once forward, and once more backward
    assert_close(alone, follow([*SHORT, "run.recompute=true"], tmp_path / "r"), at=0, weights=0)


def test_micro_batches_of_a_stage_without_denoising_and_with_intervals_of_all_lengths(tmp_path):
    "In global matching the solver's steps depend on the longest interval of the whole batch."
    words = ["teacher.steps=1", "distill.steps=3", "distill.dsm=false", "distill.matching=global",
             "distill.max_evals=none", "distill.optimizer=radam", "evaluate.n=0"]
    assert_close(follow(words, tmp_path / "a"), follow([*words, "run.micro_batch=7"], tmp_path / "b"))


def compare(whole, part, where):
    "Rows 3 to 7 of the whole, and what a micro-batch of these rows was given."
    if torch.is_tensor(whole):
        at = 1e-5 if where.endswith("x_u") else 0
        torch.testing.assert_close(whole[3:8], part, atol=at, rtol=at)
    elif isinstance(whole, dict):
        for k in whole: compare(whole[k], part[k], f"{where}.{k}")
    elif isinstance(whole, list):
        for u, v in zip(whole, part, strict=True): compare(u, v, where)
    else: assert whole == part, where


def test_numbers_of_an_image_do_not_depend_on_the_others(tmp_path):
    "A micro-batch is given what the whole would give it: every draw of every kind of step, and the teacher's solution."
    t = Trainer(make_config("tiny", SHORT), tmp_path)
    for stage, step in (("teacher", 0), ("ctm_dsm", 2), ("ctm_dsm_gan", 4), ("ctm_dsm_gan", 5)):
        if t.now.name != stage: t.begin(stage, t.parts)
        compare(t.example_of(step), t.example_of(step, take(t.material_of(step), slice(3, 8))), stage)


def test_teacher_and_emas_hold_no_gradients_and_no_optimizer(tmp_path):
    t, learners = Trainer(make_config("tiny", SHORT), tmp_path), ("model", "discriminator")
    while t.step < t.total:
        t.train_step()
        learns = {id(p) for k in learners if k in t.parts for p in t.parts[k].parameters()}
        for o in t.now.optimizers.values():
            assert {id(p) for g in o.param_groups for p in g["params"]} | {id(p) for p in o.state} <= learns
        for name, m in t.parts.items():
            if name in learners: continue
            assert not any(p.requires_grad or p.grad is not None for p in m.parameters()), (t.now.name, name)


# ---- memory

def greedy(trainer, most, seen=None):
    "A device on which more than `most` images at a time do not fit."
    def limit(stage):
        real = stage.losses
        def losses(e, n):
            if seen is not None: seen.append(len(e["x0"]))
            if len(e["x0"]) > most: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(e, n)
        stage.losses = losses
    begin = trainer.begin
    def begin_and_limit(stage, parts):
        begin(stage, parts)
        limit(trainer.now)
    trainer.begin = begin_and_limit
    limit(trainer.now)


def test_out_of_memory_takes_fewer_at_a_time_and_changes_nothing_else(alone, tmp_path, caplog):
    seen = []
    assert_close(alone, follow(SHORT, tmp_path, lambda t: greedy(t, 4, seen)))
    assert {12, 6, 3} <= set(seen) and sum("images at a time" in r.message for r in caplog.records) == 2 * 3


@pytest.mark.parametrize("words, most, message",
                         [(["run.micro_batch=6"], 4, "run.micro_batch=3"), ([], 0, "smaller network")])
def test_out_of_memory_ends_with_advice(tmp_path, words, most, message):
    t = Trainer(make_config("tiny", [*SHORT, *words]), tmp_path)
    greedy(t, most)
    before = {k: v.clone() for k, v in t.parts["model"].state_dict().items()}
    with pytest.raises(MemoryError, match=message): t.train_step()
    assert all(torch.equal(v, before[k]) for k, v in t.parts["model"].state_dict().items()) and t.step == 0


def test_rehearsal_finds_what_fits_and_leaves_no_trace(tmp_path):
    t, seen = Trainer(make_config("tiny", SHORT), tmp_path), []
    for _ in range(4): t.train_step()
    t.begin("ctm_dsm_gan", t.parts)
    before = {p: {k: v.clone() for k, v in m.state_dict().items()} for p, m in t.parts.items()}
    greedy(t, 5, seen)
    t.wait = False  # as on a GPU
    t.choose_micro()
    assert t.micro == 3 and {12, 6, 3} <= set(seen)
    for p, m in t.parts.items():
        for k, v in m.state_dict().items(): assert torch.equal(v, before[p][k]), (p, k)
    assert all(p.grad is None for p in t.parts["model"].parameters())


# ---- precision and guards

@pytest.mark.parametrize("has", [True, False])
def test_a_processor_without_bf16_is_named(tmp_path, monkeypatch, caplog, has):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    for p in ("fp32", "bf16"): Trainer(make_config("tiny", [*SHORT, f"run.precision={p}"]), tmp_path / p)
    said = [r.getMessage() for r in caplog.records if "no instructions" in r.getMessage()]
    assert said == ([] if has else [f"run.precision=bf16: {NO_HALF}"])
    assert told_precision(make_config("tiny", ["run.precision=bf16"]).run) == ("bf16" if has else f"bf16; {NO_HALF}")


def test_half_precision_learns_and_resumes(tmp_path):
    words = ["teacher.steps=8", "distill.steps=4", "evaluate.n=0", "run.precision=bf16", "run.micro_batch=20"]
    def weights(name, stops):
        for stop in stops:
            t = Trainer(make_config("tiny", words), tmp_path / name)
            while t.step < stop: t.train_step()
            t.save()
        return t, torch.cat([v.flatten() for v in t.parts["model"].state_dict().values()])
    (_, a), (_, b) = weights("straight", [12]), weights("broken", [5, 12])
    assert torch.equal(a, b) and a.isfinite().all() and a.dtype == torch.float32


def test_half_precision_does_not_depend_on_what_another_thread_does_meanwhile(tmp_path):
    "torch keeps rounded weights for all threads and drops them when one leaves autocast: here, before a forward pass."
    from threading import Thread
    def enter_and_leave():
        with autocast("bf16", torch.device("cpu")): pass
    def hook(*_):
        thread = Thread(target=enter_and_leave)
        thread.start()
        thread.join()
    def disturb(trainer):
        begin = trainer.begin
        def begin_disturbed(stage, parts):
            begin(stage, parts)
            trainer.parts["model"].net.register_forward_pre_hook(hook)
        trainer.begin = begin_disturbed
    words = [*SHORT, "run.micro_batch=5", "run.precision=bf16"]  # several forward passes of the student a step
    assert_close(follow(words, tmp_path / "a"), follow(words, tmp_path / "b", disturb), at=0, weights=0)


def with_optimizer(name):
    "SHORT with another optimizer and the preset's learning rates."
    return [w.replace("radam", name) for w in SHORT if ".lr" not in w]


@pytest.mark.parametrize("optimizer", ["adamw", "radam", "muon"])
def test_running_ahead_computes_the_same(tmp_path, optimizer):
    "What a GPU does, on a CPU: the program does not wait for the guard. The same to the bit."
    def ahead(trainer): trainer.wait = False
    words = with_optimizer(optimizer)
    assert_close(follow(words, tmp_path / "a"), follow(words, tmp_path / "b", ahead), at=0, weights=0)


def test_running_ahead_stops_at_the_same(tmp_path):
    "A program that does not wait names the broken step, however many it made after it; none of them is saved."
    words = [*SHORT, "gan.steps=6", "run.log_every=1000"]
    for wait in (True, False):
        t = Trainer(make_config("tiny", words), tmp_path / str(wait))
        while t.step < 6: t.train_step()
        t.save()
        good, t.wait = t.material_of, wait
        t.material_of = lambda n, good=good: {**(m := good(n)), "x0": m["x0"] * (float("nan") if n == 7 else 1)}
        with pytest.raises(FloatingPointError, match="step 7 "):
            while t.step < t.total: t.train_step()
        assert t.step == 7
        with pytest.raises(FloatingPointError, match="step 7 "): t.save()
        again = Trainer(make_config("tiny", words), tmp_path / str(wait))
        assert again.step == 6 and all(p.isfinite().all() for m in again.parts.values() for p in m.parameters())


def test_a_batch_that_cannot_be_shared_is_refused_at_the_start(tmp_path, monkeypatch):
    import ctm_nb.training.trainer as training
    from ctm_nb.training.runtime import Here
    monkeypatch.setattr(training, "join", lambda device: Here(1, 5))
    with pytest.raises(ValueError, match="12 can't be shared evenly by 5"):
        Trainer(make_config("tiny", SHORT), tmp_path / "r")


# ---- the command

TRAIN = ["--standalone", "--nproc_per_node", "2", "-m", "ctm_nb", "train", "--preset", "tiny", "--stage", "all",
         "--set", *SHORT, "run.save_every=1", "run.log_every=1", "run.sample_every=100"]


def test_a_killed_process_ends_the_others_and_any_number_continues(alone, tmp_path):
    "SIGKILL to one of two processes; one process goes on for a step, then two with the same command: all agree."
    (tmp_path / "r").mkdir()
    words = [*TRAIN, "--runs", tmp_path, "--name", "r"]
    p = Python(TORCHRUN, *words, env=ENV, cwd=tmp_path)
    (tmp_path / "r").rmdir()
    checkpoints, deadline = tmp_path / "r" / "checkpoints", time.monotonic() + 200
    while not list(checkpoints.glob("step_*")) and time.monotonic() < deadline and p.process.is_alive():
        time.sleep(.02)
    pid = p.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 2, p.end()
    os.kill(int(children[1]), signal.SIGKILL)
    done = p.end()
    assert done.returncode and not any(Path(f"/proc/{c}").exists() for c in children)
    assert "RuntimeError" not in done.stderr and "closing signal SIGTERM" in done.stderr
    t = Trainer(make_config("tiny", [*SHORT, "run.save_every=1", "run.log_every=1"]), tmp_path / "r")
    assert 0 < t.step < t.total
    t.train_step(), t.log_window(), t.save()
    again = ranks("from ctm_nb.commands.main import main; main()", *words[words.index("train"):], cwd=tmp_path)
    assert all(d.returncode == 0 for d in again), again
    c = load_checkpoint(checkpoints / "step_00000008")
    for part, state in alone[1]["ctm_dsm_gan"].items():
        for k, v in state.items():
            apart = float((v - c.models[part][k]).abs().max())
            assert apart <= 1e-6 * max(1, float(v.abs().max())), (part, k)
    lines = [json.loads(l) for l in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines] == list(range(1, 9))
    for l, numbers in zip(lines, alone[0]):
        for k in ("loss_edm", "loss_ctm", "loss_dsm", "loss_gan", "loss_d"):
            if k in numbers: assert abs(l[k] - numbers[k]) <= 1e-6 * max(1, abs(numbers[k]))


TOLD = """
import os, signal, sys, torch
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer
torch.set_num_threads(1)
t = Trainer(make_config("tiny", sys.argv[2:]), sys.argv[1])
step = t.train_step
def told():
    if (t.here.rank, t.step) == (1, 5): os.kill(os.getpid(), signal.SIGTERM)
    return step()
t.train_step = told
try: t.run()
except SystemExit as e: open(f"{sys.argv[1]}-{t.here.rank}", "w").write(f"{e.code} {t.step}")
"""


def test_a_signal_to_one_of_two_stops_both_after_the_same_step(tmp_path):
    "However seldom the run logs."
    seldom = ["run.log_every=1000", "run.save_every=1000", "run.sample_every=100000"]
    done = ranks(TOLD, tmp_path / "r", "teacher.steps=100000", "evaluate.n=0", *seldom)
    assert [(tmp_path / f"r-{r}").read_text() for r in range(2)] == ["75 6"] * 2, done
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "step_00000006").step == 6


# ---- a GPU, where there is one

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@gpu
@pytest.mark.parametrize("optimizer", ["adamw", "radam", "muon"])
def test_gpu_nobody_waits_within_a_step(tmp_path, optimizer):
    "Between two looks, whatever makes the program wait for the device raises."
    longer = ["teacher.steps=8", "distill.steps=8", "gan.steps=16", "run.log_every=1000", "run.device=cuda"]
    t = Trainer(make_config("tiny", [w.replace("radam", optimizer) for w in SHORT] + longer), tmp_path)
    for _ in range(3):
        for _ in range(3): t.train_step()  # cuDNN tries its kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4): t.train_step()
        finally: torch.cuda.set_sync_debug_mode("default")
        while t.step < t.ends[t.now.name]: t.train_step()
        t.look()
        assert all(isinstance(v, (int, float, str)) for w in t.state.window for v in w.values())
        if t.step < t.total: t.begin(t.stage, t.parts)


@gpu
@pytest.mark.parametrize("words", ["run.precision=fp32", "run.precision=bf16",
                                   "run.precision=bf16 run.micro_batch=5", "run.compile=true"])
def test_gpu_learns_in_every_precision(tmp_path, words):
    short = ["teacher.steps=30", "distill.steps=6", "gan.steps=6", "gan.batch=16", "evaluate.n=0"]
    log, ends = follow([*short, *words.split()], tmp_path)
    assert log[29]["loss_edm"] < log[0]["loss_edm"]
    assert all(v.isfinite().all() for part in ends["ctm_dsm_gan"].values() for v in part.values())


@gpu
def test_gpu_stops_before_a_broken_step(tmp_path):
    t = Trainer(make_config("tiny", ["run.log_every=5"]), tmp_path)
    good = t.material_of
    def spoiled(step):
        m = good(step)
        if step == 6: m["x0"] = torch.full_like(m["x0"], float("nan"))
        return m
    t.material_of = spoiled
    with pytest.raises(FloatingPointError, match="step 6"):
        for _ in range(10): t.train_step()
    assert t.step == 6
