"""Kill the trainer at random moments, continue it, and compare every bit with a run that was left alone.

    python benchmarks/crash.py                        200 kills, into nbs/results/crash/
    python benchmarks/crash.py --kills 20 --out -     fewer; the record goes to standard output

A small run with all three stages saves every four steps. It is killed (SIGKILL) in three ways: after a random time;
before a random change to the disk (fsync, rename, mkdir, ...); in the middle of a random file of a checkpoint, of
which a random part has been written. After each kill the newest checkpoint must be whole and equal to that of the
undisturbed run at the same step; a run that came to its end must have the same weights, averages, optimizers,
generators and log. Then the next run begins, until there were enough kills. One process imports torch and forks the
others, so that a life costs a second.
"""

import argparse
import atexit
import gc
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from ctm_nb.checkpoints import store as state
from ctm_nb.commands.flags import Pulse
from ctm_nb.commands.train import _train, train_parser
from ctm_nb.data.files import file_hash
from ctm_nb.training.trainer import resume_point
from ctm_nb.checkpoints.store import CheckpointError, load_checkpoint, versions

WORDS = [
    "teacher.steps=12",
    "distill.steps=9",
    "gan.steps=9",
    "teacher.batch=8",
    "distill.batch=8",
    "gan.batch=8",
    "run.save_every=4",
    "run.log_every=3",
    "run.sample_every=10",
    "evaluate.n=0",
    "teacher.profiles=.05,.1",
    "distill.profiles=.1",
    "run.snapshots=3",
]
CLOCKS = ("seconds", "images_per_sec", "peak_memory_mb")
CHANGES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def warm_up():
    "Do here, once, what every child would have to do: imports, fonts, and counting what a step of the run needs."
    from io import BytesIO

    import filelock  # noqa: F401
    import jinja2  # noqa: F401
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import ctm_nb.training.trainer  # noqa: F401
    from ctm_nb.data.images import digits
    from ctm_nb.training.config import make_config
    from ctm_nb.training.costs import memory

    memory(make_config("tiny", WORDS), digits())
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    figure = Figure()
    figure.text(0, 0, "warm")
    figure.savefig(BytesIO(), format="png")
    gc.freeze()  # nor need a child look through all this for garbage
    atexit.register(gc.unfreeze)  # or libraries would report leaks


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind, at, share):
    "Count disk changes and checkpoint files; kill this process before change number `at`, or in file number `at`."
    count, real_write = {"disk": 0, "write": 0}, state.write_synced

    def trap(real):
        def call(*args, **kw):
            if kind == "disk" and count["disk"] == at:
                die()
            count["disk"] += 1
            return real(*args, **kw)

        return call

    def torn(path, write):
        if kind == "write" and count["write"] == at:
            write(whole := io.BytesIO())
            with open(path, "xb") as f:
                f.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
            die()
        count["write"] += 1
        real_write(path, write)

    for name in CHANGES:
        setattr(os, name, trap(getattr(os, name)))
    state.write_synced = torn
    return count


def live(folder, words, kind="none", at=0, share=0.0):
    "One life of the trainer in a process of its own: (exit status, seconds); a killed one has status -9."
    started = time.monotonic()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            out = os.open(folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            count = arm(kind, at, share)
            line = ["--preset", "tiny", "--stage", "all", "--runs", str(folder.parent), "--name", folder.name]
            _train(train_parser().parse_args([*line, "--set", *words]), time.perf_counter(), Pulse("crash"))
            (folder.parent / "counts.json").write_text(json.dumps(count))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    if kind == "time":
        while time.monotonic() - started < at:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), time.monotonic() - started
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - started


def differences(a, b, where=""):
    "Names of the values in which two nested structures differ, clocks left out."
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            []
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
            else [where]
        )
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a if k not in (*CLOCKS, "logged_at") for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return (
            [f"{where}: {len(a)} and {len(b)} items"]
            if len(a) != len(b)
            else [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
        )
    return [] if a == b and type(a) is type(b) else [where]


def compare(folder, reference):
    "What is wrong with the newest checkpoint of a run: (its step, differences)."
    try:
        found = resume_point(folder / "checkpoints")
    except CheckpointError as e:
        return None, [str(e)]
    if found is None:
        return 0, []
    mine = load_checkpoint(reference / "checkpoints" / f"step_{found.step:08d}")
    wrong = [
        *differences(found.models, mine.models, "models"),
        *differences(found.state, mine.state, "state"),
        *differences(found.meta["models"], mine.meta["models"], "meta"),
    ]
    return found.step, wrong


def log_of(folder):
    return [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]


def averages_of(folder):
    "What a run has kept of its averages, as hashes."
    return {str(p.relative_to(folder)): file_hash(p) for p in (folder / "averages").rglob("*") if p.is_file()}


def campaign(kills, seed, home, progress=None):
    "Kill until there were enough kills; the record of all of them."
    rng, reference = random.Random(seed), home / "reference"
    kinds = itertools.cycle(["write", "time", "disk", "time"])
    code, whole = live(reference, [*WORDS, "run.keep=1000"])
    if code:
        sys.exit(f"the undisturbed run failed: {(home / 'output.txt').read_text()[-2000:]}")
    count = json.loads((home / "counts.json").read_text())
    record, runs, wrong, folder, step = [], 0, [], home / "run", 0
    while len(record) < kills:
        kind, left = next(kinds), 1 - (step or 0) / 30  # of the run
        at = (
            rng.uniform(0, whole * (left + 0.4)) if kind == "time" else rng.randrange(int(count[kind] * (left + 0.4)))
        )  # often too late, so that some come to their end
        share = rng.random()
        code, seconds = live(folder, WORDS, kind, at, share)
        if code not in (0, -9):
            sys.exit(f"the run failed instead of being killed: {(home / 'output.txt').read_text()[-2000:]}")
        step, bad = compare(folder, reference)
        if code == 0:
            runs += 1
            bad += differences(log_of(folder), log_of(reference), "metrics.jsonl")
            bad += differences(averages_of(folder), averages_of(reference), "averages")
            if step != 30:
                bad.append(f"ended at step {step}")
            shutil.rmtree(folder)
            step = 0
        else:
            record.append({"kind": kind, "at": round(at, 3), "after": step, "wrong": bad})
        wrong += bad
        if progress:
            progress(
                f"{len(record)} of {kills} kills, {runs} runs came to their end, {len(wrong)} mismatches "
                f"(now {kind} {at:.4g}, step {step})"
            )
    code, _ = live(folder, WORDS)  # the last one is allowed to finish
    step, bad = compare(folder, reference)
    wrong += (
        bad
        + differences(log_of(folder), log_of(reference), "metrics.jsonl")
        + differences(averages_of(folder), averages_of(reference), "averages")
        + ([f"exit code {code}"] if code else [])
    )
    return {
        "kills": len(record),
        "by kind": dict(Counter(r["kind"] for r in record)),
        "runs to their end": runs + 1,
        "mismatches": len(wrong),
        "wrong": wrong,
        "seed": seed,
        "newest checkpoint at the kill": dict(
            sorted(Counter(str(r["after"]) for r in record).items(), key=lambda kv: int(kv[0]))
        ),
        "versions": versions(),
        "settings": WORDS,
        "moments": record,
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of the runs")
    p.add_argument("--out", default="nbs/results/crash/crash.json", help="- for standard output")
    a = p.parse_args()
    WORDS.extend(a.set)
    torch.set_num_threads(1)
    warm_up()
    say = (lambda text: None) if a.out == "-" else lambda text: sys.stderr.write(text + "\n")
    with tempfile.TemporaryDirectory() as home:
        result = campaign(a.kills, a.seed, Path(home), say)
    text = (
        json.dumps({k: v for k, v in result.items() if k != "moments"}, indent=1)[:-2]
        + ',\n "moments": [\n  '
        + ",\n  ".join(map(json.dumps, result["moments"]))
        + "\n ]\n}\n"
    )
    if a.out == "-":
        sys.stdout.write(text)
    else:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(text)
    sys.exit(1 if result["mismatches"] else 0)


if __name__ == "__main__":
    main()
