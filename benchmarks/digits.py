"""Measurements behind the digits preset. Results are JSON files that the notebooks read.

    python benchmarks/digits.py seeds --seeds 0 1 2
        the command itself, timed, once for each seed (nothing else should run meanwhile); --runs keeps them
    python benchmarks/digits.py ablation --seeds 0
        one change at a time from soft matching alone, same teacher, same number of steps

Both write under nbs/results/digits/ and keep what is already there for other seeds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits"
# one phase, from the start to the end, told the truth: what one change at a time is compared with, here and elsewhere
SOFT = ["distill.phases=", "distill.anchor_rows=none", "distill.sigma_init=published"]
PUBLISHED = [
    "distill.solver=heun",
    "distill.max_evals=none",
    "distill.distance=l2",
    "distill.optimizer=radam",
    "distill.lr=4e-4",
    "distill.warmup=0",
    "distill.decay=constant",
    "distill.beta2=.999",
    "distill.ema=.999",
    "distill.target_ema=.999",
    "distill.init=random",
    "distill.k_power=1",
    "distill.N=18",
    "distill.K=17",
]
VARIANTS = {
    "soft matching": [],
    "as the preset": ["distill.phases=trajectories:.8,soft:.2", "distill.anchor_rows=4", "distill.sigma_init=auto"],
    "Heun on the full grid": ["distill.solver=heun", "distill.max_evals=none"],
    "2M on the full grid": ["distill.max_evals=none"],
    "2M, at most 2 evaluations": ["distill.max_evals=2"],
    "2M, at most 3 evaluations": ["distill.max_evals=3"],
    "18 grid points": ["distill.N=18", "distill.K=17"],
    "P(k) proportional to k": ["distill.k_power=1"],
    "L2 distance": ["distill.distance=l2"],
    "RAdam 4e-4, constant": [
        "distill.optimizer=radam",
        "distill.lr=4e-4",
        "distill.warmup=0",
        "distill.decay=constant",
        "distill.beta2=.999",
    ],
    "s-branch at random": ["distill.init=random"],
    "without DSM": ["distill.dsm=false"],
    "all as published": PUBLISHED,
}


def hardware():
    "Processor and cores, as a reader would want to know them."
    names = (
        [l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, {gpu}"


def run_seed(seed, runs):
    "The whole command in an empty folder, or a new one of `runs`; its scores, log and wall-clock time are kept."
    import torch

    with tempfile.TemporaryDirectory() as empty:
        d, name = (runs, f"digits{seed}") if runs else (empty, "digits")
        started = time.perf_counter()
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ctm_nb_train")),
                "--runs",
                d,
                "--name",
                name,
                "--set",
                f"run.seed={seed}",
            ],
            check=True,
        )
        minutes = (time.perf_counter() - started) / 60
        out, run = RESULTS / f"seed{seed}", Path(d) / name
        out.mkdir(parents=True, exist_ok=True)
        for name in ("scores.json", "metrics.jsonl", "config.json"):
            shutil.copy(run / name, out / name)
        shutil.copy(run / "samples" / "final.png", out / "final.png")
        about = {
            "minutes": minutes,
            "hardware": hardware(),
            "torch": torch.__version__,
            "command": f"ctm_nb_train --set run.seed={seed}",
        }
        (out / "run.json").write_text(json.dumps(about, indent=1) + "\n")


def one_variant(name, seed, teacher, out):
    "Distil the given teacher under one variant and score it; runs in a process of its own."
    import torch

    from ctm_nb.training.config import make_config
    from ctm_nb.data.batches import load_data
    from ctm_nb.evaluation.evaluate import run_evaluator
    from ctm_nb.evaluation.reference import image_samples
    from ctm_nb.method.sampling import sample
    from ctm_nb.training.trainer import Trainer

    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(make_config("digits", [f"run.seed={seed}", *SOFT, *VARIANTS[name]]), Path(d) / "run")
        if teacher.exists():
            t.parts["teacher"].load_state_dict(torch.load(teacher))
            t.state.step = t.config.teacher.steps
        while t.stage == "teacher":
            t.train_step()
        if not teacher.exists():
            torch.save(t.parts["teacher"].state_dict(), teacher)
        evals, started = [], time.process_time()
        while t.step < t.ends["ctm_dsm"]:
            evals.append(t.train_step()["teacher_evals"])
        spent = time.process_time() - started
        evaluator = run_evaluator({"train": t.data, "held_out": load_data("digits", "held_out")})
        n = t.config.evaluate.n
        y = t.data.labels[torch.arange(n) * len(t.data) // n]
        scores = {}
        for drawn, (m, kw) in t.samplers().items():
            x = sample(m, len(y), y=y, seed=seed + 1, batch_size=500, **kw)
            scores[drawn] = evaluator.score(evaluator.collect(image_samples(x, y)))
        out.write_text(
            json.dumps(
                {
                    "variant": name,
                    "assignments": VARIANTS[name],
                    "seed": seed,
                    "steps": len(evals),
                    "seconds": spent,
                    "teacher_evals": sum(evals) / len(evals),
                    "scores": scores,
                }
            )
        )


def ablation(seeds, workers, only):
    "All variants for all seeds, single-threaded, several at a time; seconds are those of the process."
    path = RESULTS / "ablation.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as d, ThreadPoolExecutor(workers) as pool:

        def go(job):
            i, (name, seed) = job
            out = Path(d) / f"{i}.json"
            subprocess.run(
                [sys.executable, __file__, "one", name, str(seed), str(Path(d) / f"teacher{seed}.pt"), str(out)],
                check=True,
                env=env,
            )
            return json.loads(out.read_text())

        first, *rest = [n for n in VARIANTS if not only or n in only]
        jobs = [
            [(first, s) for s in seeds],
            [(n, s) for s in seeds for n in rest],
        ]  # the first of each seed also trains its teacher
        for i, batch in enumerate(jobs):
            for row in pool.map(go, [(f"{i}_{k}", j) for k, j in enumerate(batch)]):
                rows = [r for r in rows if (r["variant"], r["seed"]) != (row["variant"], row["seed"])] + [
                    {**row, "hardware": hardware()}
                ]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(
                    row["variant"],
                    row["seed"],
                    f"{row['seconds']:.0f} s",
                    {k: round(v["frechet_distance"], 2) for k, v in row["scores"].items()},
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one_variant(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["seeds", "ablation"])
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the ablation")
    p.add_argument("--runs", help="folder in which the runs of `seeds` stay, as digits0, digits1, ...")
    p.add_argument("--only", nargs="*", help="variants to run")
    a = p.parse_args()
    if a.what == "seeds":
        for s in a.seeds:
            run_seed(s, a.runs)
    else:
        ablation(a.seeds, a.workers, a.only)
