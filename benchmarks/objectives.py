"""Objectives and optimizers at equal seconds of a processor, on the digits.

    python benchmarks/objectives.py --seconds 60 --seeds 0 1 2

trains a teacher with each optimizer, and from one of them a student with each objective and each optimizer. A stage
gets as many steps as fit into the seconds, by the time of a short trial; its schedule ends where they do. Seconds are
those of the process (`time.process_time`, one thread), which other programs on the machine lengthen little, not
those of a clock.
What is in nbs/results/objectives/digits.json is kept; nbs/9_experiments/05_objectives.ipynb reads it.
"""
import argparse
import json
import logging
import shutil
import time
from pathlib import Path

import torch
from digits import SOFT

from ctm_nb.checkpoints.store import atomic_write
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "objectives" / "digits.json"
OPTIMIZERS = {"adamw": {"teacher": "lr=4e-3", "distill": "lr=1.6e-3"},
              "muon": {"teacher": "lr=.02", "distill": "lr=.02"}}
OBJECTIVES = {
    "soft": "matching=soft",
    "trajectories": "matching=trajectories",
    "trajectories, anchored by the teacher": "matching=trajectories anchor=teacher",
    "eulerian": "matching=eulerian",
    "trajectories, then soft": "phases=trajectories:.6,soft:.4",
}
KEPT: dict = {}  # the classifier is trained once
TRIAL = 30  # steps of a stage that is timed: five rounds of stored trajectories


def settings(section, optimizer, steps, words=""):
    "Assignments of one stage; the first tenth of it warms up."
    own = f"optimizer={optimizer} {OPTIMIZERS[optimizer][section]} steps={steps} warmup={steps // 10} {words}"
    return [f"{section}.{w}" for w in own.split()]


def seconds_a_step(assignments, folder):
    "Of the process, for a step of a short stage."
    t = Trainer(make_config("digits", [*SOFT, *assignments]), folder)
    start = time.process_time()
    for _ in range(TRIAL): t.train_step()
    spent = (time.process_time() - start) / TRIAL
    t.ahead.forget()
    shutil.rmtree(folder)
    return spent


def train(section, optimizer, seconds, folder, shared, words="", n=2000):
    "Train one stage for so long, score it; returns what is written."
    def plan(steps): return [*shared, *settings(section, optimizer, steps, words)]
    if not (folder / "config.json").exists():
        each = seconds_a_step(plan(TRIAL), folder.with_name("trial"))
        steps = max(20, round(seconds / each))
    else: steps = json.loads((folder / "config.json").read_text())[section]["steps"]
    t = Trainer(make_config("digits", [*SOFT, *plan(steps), f"evaluate.n={n}"]), folder)
    start = time.process_time()
    while t.step < t.total: t.train_step()
    spent = time.process_time() - start
    t.save()
    t.evaluator = KEPT.get("evaluator")
    found = [r for r in t.evaluate() if r["metric"] == "frechet_distance" and r["sampler"]]
    KEPT["evaluator"] = t.evaluator
    name = lambda s: f"{s['steps']}" if s["solver"] == "ctm" else "teacher"
    return {"optimizer": optimizer, "steps": steps, "seconds": round(spent, 1),
            "distance": {name(r["sampler"]): round(r["value"], 3) for r in found}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of the process, for a stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher", choices=list(OPTIMIZERS), default="muon", help="the students' teacher")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.basicConfig(level=logging.ERROR)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    def once(what, seed, optimizer, make):
        key = dict(what=what, seed=seed, optimizer=optimizer, budget=a.seconds)
        if any(all(r[k] == v for k, v in key.items()) for r in rows): return
        rows.append(key | make())
        atomic_write(a.out, json.dumps(rows, indent=1).encode())
        print(rows[-1], flush=True)

    common = ["gan.steps=0", "evaluate.teacher_steps=9", "run.save_every=1000000", "run.log_every=1000000"]
    for seed in a.seeds:
        place, shared = a.runs / f"{a.seconds:g}-{seed}", [*common, f"run.seed={seed}"]
        for o in OPTIMIZERS:
            once("teacher", seed, o, lambda o=o: train("teacher", o, a.seconds, place / f"teacher-{o}",
                                                       [*shared, "distill.steps=0"]))
        given = [*shared, f"teacher.source={place / f'teacher-{a.teacher}'}"]
        for what in a.objectives:
            for o in OPTIMIZERS:
                folder = place / f"{what.replace(',', '').replace(' ', '-')}-{o}"
                once(what, seed, o, lambda what=what, o=o, folder=folder: train("distill", o, a.seconds, folder, given,
                                                                                OBJECTIVES[what]))


if __name__ == "__main__": main()
