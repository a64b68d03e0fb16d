"""What a step of distillation costs in forward passes: time of a whole step by that of one forward pass of its batch.

    python benchmarks/forwards.py --presets digits mnist --data MNIST

Phases and the solving of stored trajectories are timed by themselves (median of `--steps` steps, of a quarter as many
solves) and spread over the run as its shares and `distill.reuse` say. The forward pass is the student's, without
gradient, of the same batch, timed in turn with them. One thread, processor seconds. Written to
nbs/results/speed/forwards.json.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from recipe import EIGHT

from ctm_nb.training.config import make_config, phases
from ctm_nb.training.trainer import Trainer

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed" / "forwards.json"
PUBLISHED = ("distill.phases= distill.matching=soft distill.solver=heun distill.max_evals=none distill.N=18 "
             "distill.K=17 distill.k_power=1 distill.distance=pseudo_huber distill.anchor_rows=none").split()
QUIET = ["gan.steps=0", "run.save_every=1000000", "run.sample_every=1000000", "run.log_every=1000000"]


def spent(work, *args) -> float:
    started = time.process_time()
    work(*args)
    return time.process_time() - started


def forwards(preset: str, words: list, steps: int) -> dict:
    "Cost of each phase and of the whole, in forward passes."
    config = make_config(preset, [*QUIET, *words])
    d = config.distill
    shares = {p.name: (p.end - p.first) / 10 ** 6 for p in phases(d, 10 ** 6)}
    d.phases, found, reuse = "", {}, d.reuse
    d.reuse = d.steps = 4 * steps  # trajectories are solved in the first step alone
    for name in shares:
        d.matching = name
        with tempfile.TemporaryDirectory() as folder:
            config.teacher.steps = 1
            t = Trainer(config, Path(folder) / "run")
            for _ in range(3): t.train_step()
            m, x = t.parts["model"], torch.randn(d.batch, *t.now.shape)
            y = t.data.labels[:d.batch] if m.n_classes else None
            u, s = torch.full((d.batch,), 2.), torch.full((d.batch,), .5)
            def forward(m=m, x=x, u=u, s=s, y=y):
                with torch.no_grad(): m.G(x, u, s, y)
            def step(t=t):  # with what is made of it, in this thread
                t.ahead.forget()
                t.train_step()
            t.ahead.end = 0  # nothing is made ahead of time, beside what is timed
            times = [(spent(forward), spent(step)) for _ in range(steps)]
            one, whole = (median(v) for v in zip(*times))
            found[name] = whole / one
            if name == "trajectories":
                def solved(t=t):
                    t.now.paths.clear()
                    t.example_of(t.step - 1)
                solves = [(spent(forward), spent(solved)) for _ in range(max(3, steps // 4))]
                one, whole = (median(v) for v in zip(*solves))
                found["solving, for a step"] = whole / one / reuse
    solving = found.get("solving, for a step", 0.) * shares.get("trajectories", 0.)
    return found | {"all in all": sum(shares[k] * found[k] for k in shares) + solving}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["digits"])
    parser.add_argument("--data", help="the images of preset mnist")
    parser.add_argument("--steps", type=int, default=20, help="of each phase")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for preset in a.presets:
        words = [f"data.source={a.data}"] if preset == "mnist" else []
        rows = {preset: [], f"{preset}, published objective": PUBLISHED}
        if preset == "mnist": rows[f"{preset}, a fifth of soft"] = EIGHT.split()
        for name, more in rows.items():
            found[name] = {k: round(v, 2) for k, v in forwards(preset, [*words, *more], a.steps).items()}
            print(name, found[name], flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
