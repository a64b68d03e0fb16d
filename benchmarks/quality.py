"""Distance of samples against seconds of training: the published recipe and others on the same teachers.
nbs/9_experiments/03_speed.ipynb reads the results.

    python benchmarks/quality.py --teachers runs/digits0 runs/digits1 runs/digits2
        writes nbs/results/speed/quality.json after every run; what is there already is kept

One thread a pass and two processes at a time. With `--seeds` several students of each teacher, else one with the
teacher's seed. Seconds are processor seconds of distillation (the thread in which the teacher works ahead counts
too; scores don't), so that they mean the same on a busy machine. The published recipe has a constant learning rate:
one run, scored on its way. The others end with their rate at zero: a run for each point. With `--only` some
recipes; `--data` where the images are now. The search around `soft`, soft matching with the preset's numbers, a
change at a time, each for the last but one of the `--seconds`:

    python benchmarks/quality.py --teachers runs/digits0 runs/digits1 runs/digits2 --seconds 100 150 --only search
        writes nbs/results/speed/search.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from digits import PUBLISHED, SOFT, hardware

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed" / "quality.json"
# results in the file beside these, even in log t and with several jumps an interval, are of settings that have gone
RECIPES = {"published": PUBLISHED, "soft": [], "soft, 11 evaluations": ["distill.max_evals=11"]}
CHANGES = {
    "none, another seed": "max_evals=5 run.seed=100",
    "none, a third seed": "max_evals=5 run.seed=200",  # 5 is the preset's own: how much do runs scatter?
    "3 evaluations": "max_evals=3",
    "8 evaluations": "max_evals=8",
    "3M": "solver=dpm3",
    "Heun, full grid": "solver=heun distill.max_evals=none",
    "L2": "distance=l2",
    "RAdam": "optimizer=radam",
    "constant rate": "decay=constant",
    "lr 4e-4": "lr=4e-4",
    "lr 3.2e-3": "lr=3.2e-3",
    "no warm-up": "warmup=0",
    "batch 32": "batch=32",
    "batch 128": "batch=128",
    "averages .9": "ema=.9 distill.target_ema=.9",
    "averages .999": "ema=.999 distill.target_ema=.999",
    "averages not warmed up": "max_evals=5",
    "target average .9": "target_ema=.9",
    "N = 18": "N=18 distill.K=17",
    "K = 6": "K=6",
    "k uniform": "k_power=0",
    "k as published": "k_power=1",
    "random s-branch": "init=random",
    "global matching": "matching=global",
    "compared at s": "compare_at=s",
}
RECIPES |= {f"soft, {k}": f"distill.{v}".split() for k, v in CHANGES.items()}


def distances(trainer, evaluator, seed, n):
    "Frechet distances of one, two and four steps."
    from dataclasses import replace

    import torch

    from ctm_nb.evaluation.reference import image_samples
    from ctm_nb.method.sampling import sample

    y, fid = trainer.data.labels[torch.arange(n) * len(trainer.data) // n], replace(evaluator, metrics=["fid"])

    def distance(steps):
        x = sample(trainer.parts["ctm"], n, y=y, steps=steps, seed=seed + 1, batch_size=500)
        return fid.score(fid.collect(image_samples(x, y)))["frechet_distance"]

    return {str(k): distance(k) for k in (1, 2, 4)}


def one(recipe, teacher, seed, seconds, n, data, out):
    "One recipe on one teacher."
    import torch

    from ctm_nb.training import stages
    from ctm_nb.training.config import make_config
    from ctm_nb.checkpoints.models import load
    from ctm_nb.evaluation.evaluate import run_evaluator
    from ctm_nb.training.trainer import Trainer

    torch.set_flush_denormal(True)
    if recipe.endswith("not warmed up"):
        stages.EMA = partial(stages.EMA, warmup=False)  # no setting does this
    about = json.loads((Path(teacher) / "config.json").read_text())
    preset = "digits" if about["data"]["source"] == "digits" else "mnist"
    words = [f"run.seed={seed}", f"data.source={data or about['data']['source']}", "evaluate.n=0", *SOFT,
             *RECIPES[recipe]]

    def begin(folder, steps):
        t = Trainer(make_config(preset, [*words, f"distill.steps={steps}"]), folder)
        t.state.step = t.config.teacher.steps
        t.begin("ctm_dsm", {"teacher": load(teacher, which="teacher")})
        return t

    def write(t, spent, steps):
        row = dict(
            recipe=recipe,
            assignments=RECIPES[recipe],
            teacher=Path(teacher).name,
            seed=seed,
            steps=steps,
            images=steps * t.config.distill.batch,
            seconds=spent,
            n=n,
            distances=distances(t, evaluator, seed, n),
            hardware=hardware(),
        )
        with out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(recipe, Path(teacher).name, steps, f"{spent:.0f} s", row["distances"], flush=True)

    with tempfile.TemporaryDirectory() as d:
        t = begin(Path(d) / "probe", 1000)
        kept = (
            Path(tempfile.gettempdir()) / f"evaluator-{t.data_sha256[:16]}.pt"
        )  # a classifier of 60,000 images takes minutes: one for all runs
        if not kept.exists():
            torch.save(run_evaluator(t.splits), part := out.with_suffix(".pt"))
            part.rename(kept)
        evaluator = torch.load(kept, weights_only=False)
        if recipe == "published":
            marks, spent, done = [m * max(seconds) for m in (0.0625, 0.125, 0.25, 0.5, 1.0)], 0.0, 0
            while marks:
                started = time.process_time()
                t.train_step()
                spent += time.process_time() - started
                done += 1
                if spent >= marks[0]:
                    marks.pop(0)
                    write(t, spent, done)
            return
        for _ in range(2):
            t.train_step()
        started = time.process_time()
        for _ in range(12):
            t.train_step()
        each = (time.process_time() - started) / 12
        for i, budget in enumerate(seconds):
            t = begin(Path(d) / f"run{i}", steps := max(20, round(budget / each)))
            started = time.process_time()
            while t.step < t.ends["ctm_dsm"]:
                t.train_step()
            write(t, time.process_time() - started, steps)


def main(a):
    results = RESULTS.with_name("search.json") if a.only == ["search"] else RESULTS
    rows = json.loads(results.read_text()) if results.exists() else []
    seeds = {t: a.seeds or [json.loads((Path(t) / "config.json").read_text())["run"]["seed"]] for t in a.teachers}
    only = ["soft", *(f"soft, {k}" for k in CHANGES)] if a.only == ["search"] else a.only
    jobs = [
        (r, t, s)
        for t in a.teachers
        for s in seeds[t]
        for r in only or RECIPES
        if not any((row["recipe"], row["teacher"], row["seed"]) == (r, Path(t).name, s) for row in rows)
    ]
    with tempfile.TemporaryDirectory() as d, ThreadPoolExecutor(a.workers) as pool:

        def go(job):
            out = Path(d) / f"{jobs.index(job)}.jsonl"
            times = {
                "published": a.seconds[-1:],
                "soft": a.seconds[:-1] if a.only != ["search"] else a.seconds[-2:-1],
            }.get(job[0], a.seconds[-2:-1])
            subprocess.run(
                [sys.executable, __file__, "one", *map(str, job), json.dumps(times), str(a.n), a.data or "", str(out)],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            return [json.loads(l) for l in out.read_text().splitlines()]

        for new in pool.map(go, jobs):
            rows += new
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(
            sys.argv[2],
            sys.argv[3],
            int(sys.argv[4]),
            json.loads(sys.argv[5]),
            int(sys.argv[6]),
            sys.argv[7],
            Path(sys.argv[8]),
        )
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teachers", nargs="+", required=True, help="folders of runs that have a teacher")
    p.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        default=[15, 30, 60, 150],
        help="processor seconds of distillation: the published recipe gets the last, soft the others, "
        "variants of soft the last but one",
    )
    p.add_argument("--only", nargs="*", help="recipes, or the word search")
    p.add_argument("--seeds", type=int, nargs="*", help="of the students (default: the teacher's)")
    p.add_argument("--data", help="where the images are now")
    p.add_argument("-n", type=int, default=5000, help="samples for each score")
    p.add_argument("--workers", type=int, default=os.cpu_count())
    main(p.parse_args())
