"""What the length of an average and a worse model as guide do to the digits: distances over both.

    python benchmarks/averages.py --seeds 0 1 2

Each seed trains the preset's teacher and a student by soft matching alone with two profiles beside them, then draws
from averages of other lengths, guides the teacher by an early snapshot of its own, and distils students of guided
teachers. Results are kept in nbs/results/digits/averages.json as they come, runs under --runs; what is there is not
computed again.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch
from digits import SOFT

from ctm_nb.checkpoints.averages import average, snapshots_of
from ctm_nb.checkpoints.models import load
from ctm_nb.data.files import atomic_write
from ctm_nb.evaluation.evaluate import drawn_samples, run_evaluator
from ctm_nb.method.guidance import autoguide
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer, open_images

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits" / "averages.json"
WORDS = [*SOFT, "gan.steps=0", "evaluate.n=0", "teacher.profiles=.05,.1", "distill.profiles=.05,.1",
         "run.sample_every=100000",
         "run.log_every=100"]
LENGTHS = (.02, .04, .06, .09, .13, .2)
SCALES = (1.5, 2., 3.)
STUDENTS = {"w = 2": ["distill.guidance=2"], "w = 2, no denoising loss": ["distill.guidance=2", "distill.dsm=false"],
            "w = 1, no denoising loss": ["distill.dsm=false"]}
TEACHER = dict(solver="dpmpp_2m", steps=12)
STUDENT = {n: dict(solver="ctm", steps=n) for n in (1, 2)}
DRAWN: dict[str, dict] = {"teacher": {12: TEACHER}, "ctm": STUDENT}


def trained(folder, *words):
    "A run to its end, or on from where it is: processor seconds of this time."
    started, t = time.process_time(), Trainer(make_config("digits", words), folder)
    t.run()
    return time.process_time() - started


def lengths(base, own):
    "Name of each result and a function that computes it: model and sampler, or what is known at once."
    yield "train", lambda: dict(seconds=trained(base, *own))
    for who, ways in DRAWN.items():
        for n, how in ways.items():
            yield f"{who}, {n} evaluations, fixed rate", lambda: (load(base, which=who), how)
            for s in LENGTHS:
                yield f"{who}, {n} evaluations, length {s}", lambda: (average(base, s, who), how)


def guided(base, own):
    "The teacher, guided by an early snapshot, and the students of such teachers."
    early = lambda: snapshots_of(base, "teacher")[7][0]  # the fourth of sixteen, two averages each
    for w in SCALES:
        yield f"teacher guided, w = {w:g}", lambda: (autoguide(load(base, which="teacher"), load(early()), w), TEACHER)
    yield "guide alone", lambda: (load(early()), TEACHER)
    for name, words in STUDENTS.items():
        run = base.with_name(f"{base.name}-{name.replace(' ', '').replace(',', '-')}")
        guide = lambda: [f"distill.guide={early()}"] if "distill.guidance" in str(words) else []
        source = [*own, "distill.profiles=", f"teacher.source={base}", *words]
        yield f"student, {name}, train", lambda: dict(seconds=trained(run, *source, *guide()))
        for n, how in STUDENT.items(): yield f"student, {name}, {n} evaluations", lambda: (load(run, which="ctm"), how)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--runs", type=Path, default=Path("runs/averages"), help="folder of the runs")
    p.add_argument("-n", type=int, default=2000, help="samples a distance")
    p.add_argument("--set", nargs="+", default=[], help="settings for a trial, e.g. teacher.steps=16")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    done, evaluator = {(r["name"], r["seed"]) for r in rows}, None
    for units, seed in product((lengths, guided), a.seeds):
        for name, work in units(a.runs / f"seed{seed}", [*WORDS, f"run.seed={seed}", *a.set]):
            if (name, seed) in done: continue
            found = work()
            if not isinstance(found, dict):
                m, how = found
                evaluator = evaluator or run_evaluator(open_images(make_config("digits")), keep=True)
                evaluator.metrics = ["fid"]
                got = evaluator.collect(drawn_samples(m, a.n, how, evaluator.reference.label_counts, seed + 1))
                found = dict(value=evaluator.score(got)["frechet_distance"], n=a.n)
            rows.append({"name": name, "seed": seed, **found})
            print(rows[-1], flush=True)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(a.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__": main()
