"""Two writers, or a writer and a reader, of the same thing, at moments drawn by chance:
python tests/system/two_at_once.py [TIMES] [SEED] [FILE] [KIND ...]

It adds its counts to FILE, nbs/results/data/two_at_once.json say. Of two trainers or samplers one does the work,
the other says who does it and leaves with 3; a killed one holds nothing; a closed terminal stops a run that is saved.
Where the one must have begun, its log or its lock is waited for, and not a time. What went wrong is told and counted.
"""
import atexit
import gc
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import filelock  # noqa: F401  # imported here, once for all children
import jinja2  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import numpy as np
import torch
import torch._dynamo  # noqa: F401  # the first step of an optimizer needs it
import torch.utils.tensorboard  # noqa: F401
from fuzz import ended

from ctm_nb.checkpoints.models import describe, find_checkpoint, load
from ctm_nb.checkpoints.store import load_checkpoint, prune_checkpoints, save_checkpoint
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.data.images import digits
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.families import build_network
from ctm_nb.training import budget, trainer  # noqa: F401  # imported here, once for all children
from ctm_nb.training.config import make_config
from ctm_nb.training.costs import memory

TINY = ["network.channel_mult=1", "teacher.steps=6", "distill.steps=4", "teacher.batch=8", "distill.batch=8",
        "run.save_every=2", "run.keep=1", "run.log_every=1", "run.sample_every=100", "evaluate.n=0"]
HELD = r"is being written by process (\d+) on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait for it"


class Child:
    "A function in another process; `end` waits and gives its exit code and words."
    def __init__(self, f, *args):
        self.out = tempfile.TemporaryFile()
        self.pid = os.fork()
        if self.pid: return
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
        for fd in (1, 2): os.dup2(self.out.fileno(), fd)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        ended(f, args)

    def end(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.out.seek(0)
        return code, self.out.read().decode()


def train(runs): ctm_nb_train(["--preset", "tiny", "--runs", str(runs), "--name", "r", "--set", *TINY])
def draw(run, out): ctm_nb_sample([str(run), "-n", "70", "--out", str(out), "--steps", "2", "--batch-size", "8"])


def until(sign):
    "Wait for what another process leaves in its folder."
    began = time.time()
    while not sign():
        if time.time() - began > 120: raise AssertionError("the other process shows no sign of itself")
        time.sleep(.001)


def under_way(run, rng):
    "Wait for a step that the run has logged, one of the first six of its ten, and half of the times for the next save."
    log, steps, saving = run / "metrics.jsonl", rng.randrange(1, 7), rng.random() < .5
    until(lambda: log.exists() and log.read_bytes().count(b"\n") >= steps)
    if saving: until(lambda: any((run / "checkpoints").glob(".tmp-*")))


def one_of(first, second):
    "Whether of two children one did the work, and the other came when it was done or said who was doing it."
    pids = {first.pid: second, second.pid: first}
    ends = {pid: child.end() for pid, child in ((first.pid, first), (second.pid, second))}
    codes = [code for code, _ in ends.values()]
    assert sorted(codes) in ([0, 0], [0, 3]), ends
    for pid, (code, said) in ends.items():
        if code != 3: continue
        held = re.search(HELD, said)
        assert held and held[1] == str(pids[pid].pid) and "Traceback" not in said, said
    return 3 in codes


def sound(run):
    "A finished run, none of whose steps was logged twice."
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11)), steps
    assert load_checkpoint(find_checkpoint(run)).step == 10 and not list(run.glob(".lock*")), list(run.iterdir())


def two_trainers(folder, rng, longest):
    a = Child(train, folder)
    time.sleep(rng.uniform(0, .3 * longest))
    refused = one_of(a, Child(train, folder))
    sound(folder / "r")
    return refused


def two_samplers(folder, rng, longest):
    run, out = folder.parent / "r", folder / "x.npz"
    if not run.exists(): assert Child(train, folder.parent).end()[0] == 0
    a = Child(draw, run, out)
    if rng.random() < .5: until(lambda: any(folder.glob(".*lock*")))
    else: time.sleep(rng.uniform(0, .3 * longest))
    refused = one_of(a, Child(draw, run, out))
    assert np.load(out)["arr_0"].shape == (70, 8, 8, 1) and list(folder.iterdir()) == [out]
    return refused


def killed(folder, rng, longest):
    a = Child(train, folder)
    under_way(folder / "r", rng)
    os.kill(a.pid, signal.SIGKILL)
    died = a.end()[0] == -signal.SIGKILL
    code, said = Child(train, folder).end()
    assert code == 0, said
    sound(folder / "r")
    return died


def hung_up(folder, rng, longest):
    "A terminal that is closed stops a run after a step that is saved; the same command goes on."
    a = Child(train, folder)
    under_way(folder / "r", rng)
    os.kill(a.pid, signal.SIGHUP)
    code, said = a.end()
    assert code in (0, 75) and "Traceback" not in said, (code, said)
    if code == 75: assert re.search(r"step \d+ is saved", said), said
    again, said = Child(train, folder).end()
    assert again == 0 and (code != 75 or "resumed" in said), said
    sound(folder / "r")
    return code == 75


def reading(folder, rng, longest):
    "A run saves and prunes while it is loaded, again and again."
    with torch.device("cpu"): m = Denoiser(build_network("ddpmpp", image_size=8, channels=1, model_channels=8))
    about = {"models": {"teacher": {"part": "teacher", "description": describe(m, [])}}}
    def write():
        for step in range(1, 40):
            save_checkpoint(folder / "r" / "checkpoints", step, {"teacher": m.state_dict()}, {}, about)
            prune_checkpoints(folder / "r" / "checkpoints", 1)
    save_checkpoint(folder / "r" / "checkpoints", 0, {"teacher": m.state_dict()}, {}, about)
    writer, n = Child(write), 0
    while os.waitpid(writer.pid, os.WNOHANG) == (0, 0): n += load(folder / "r") is not None
    return n > 0


KINDS = {"two trainers": two_trainers, "two samplers": two_samplers, "killed": killed, "hung up": hung_up,
         "read while saved": reading}


def main(times=20, seed=0, out=None, *names):
    found = json.loads(Path(out).read_text()) if out and Path(out).exists() else {}
    torch.set_num_threads(1)
    memory(make_config("tiny", TINY), digits())  # counted once for all children, and remembered
    gc.freeze()  # nor need they look through all this for garbage
    atexit.register(gc.unfreeze)  # or libraries would report leaks
    trainer.write_report = lambda folder: None  # takes longer than all the rest
    rng, began, all_wrong = random.Random(int(seed)), time.time(), 0
    for name, trial in ((k, KINDS[k]) for k in names or KINDS):
        with tempfile.TemporaryDirectory() as d:
            met, wrong, longest = 0, 0, 0.
            for k in range(int(times)):
                folder, start = Path(d) / str(k), time.time()
                folder.mkdir()
                try: met += trial(folder, rng, longest)
                except AssertionError as e:
                    wrong += 1
                    print(f"{name}, trial {k}: {e}", flush=True)
                longest = max(longest, time.time() - start)
        print(f"{name}: {times} trials, in {met} of them the two met", flush=True)
        found[name] = {"trials": int(times), "met": met, "wrong": wrong}
        all_wrong += wrong
        if out: Path(out).write_text(json.dumps(found, indent=1) + "\n")
    if all_wrong: sys.exit(f"{all_wrong} went wrong")
    print(f"all as it should be, {time.time() - began:.0f} s")


if __name__ == "__main__": main(*sys.argv[1:])
