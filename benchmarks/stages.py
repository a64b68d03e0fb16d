"""What each term of CTM's objective does for the digits: CTM, CTM + DSM, CTM + DSM + GAN, the same teacher and
number of student updates, several seeds.

    python benchmarks/stages.py --seeds 0 1 2
        writes nbs/results/digits/stages.json, a row for each student as soon as it is scored; rows that are
        there are kept
    python benchmarks/stages.py time --seed 0
        writes nbs/results/digits/all.json: the wall-clock time of `ctm_nb_train --stage all` (nothing else
        should run meanwhile)

Two regimes: a fine teacher, which answers with up to 5 evaluations, as in the preset, and a coarse one with at most 2,
whose mistakes an adversary could repair. The adversary is compared with its own control: the same student, number of
updates and learning rates, without adversary. The tries are further games of the same students; where rows are
added to a file, the student that they start from is scored again and must be the stored one. One thread a process;
the scores don't depend on the load of the machine, the seconds do.
"""

import argparse
import copy
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from digits import SOFT

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits" / "stages.json"
REGIMES = {"fine teacher": SOFT, "coarse teacher": [*SOFT, "distill.max_evals=2"]}
STEPS = (1, 2, 4, 18)
ADVERSARIES = {
    "CTM + DSM + GAN": [],
    "GAN, softplus": ["gan.loss=softplus"],
    "GAN, rate x 4": ["gan.lr=4e-4"],
}
TRIES = {
    "GAN, weight <= 0.1": ["gan.high=.1"],
    "GAN, published looks": ["gan.levels=.1,.3,1", "gan.strength=1"],
    "GAN, 3 x longer": ["gan.steps=800"],
}
CONTROLS = {
    "CTM + DSM, longer": [],
    "CTM + DSM, 3 x longer": ["gan.steps=800"],
}  # of the adversary, and of the longer one
OBJECTIVES = ["training images", "teacher", "CTM", "CTM + DSM", *CONTROLS, *ADVERSARIES, *TRIES]


def file_of(steps):
    "Where rows go: a trial with other values of the configuration must not mix with the results."
    return Path(tempfile.gettempdir()) / "ctm_nb-stages-trial.json" if steps else RESULTS


def rows_of(path):
    "All rows measured so far."
    return json.loads(path.read_text()) if path.exists() else []


def keep(row, path):
    "Add a row to the file, in the place of an older one of the same case; several processes may do so."
    which = lambda r: (r["regime"], r["seed"], OBJECTIVES.index(r["objective"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(Path(tempfile.gettempdir()) / "ctm_nb-stages.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = sorted([r for r in rows_of(path) if which(r) != which(row)] + [row], key=which)
        (new := path.with_suffix(".new")).write_text(json.dumps(rows, indent=1) + "\n")
        new.replace(path)
    print(
        row["regime"],
        row["seed"],
        row["objective"],
        {k: round(v["frechet_distance"], 3) for k, v in row["scores"].items()},
        flush=True,
    )


def scores_of(model, data, evaluator, n, seed, ways):
    "The four scores for each way of drawing."
    import torch

    from ctm_nb.evaluation.reference import image_samples
    from ctm_nb.method.sampling import sample

    y = data.labels[torch.arange(n) * len(data) // n]

    def scores(way):
        x = sample(model, n, y=y, seed=seed + 1, batch_size=500, **way)
        return evaluator.score(evaluator.collect(image_samples(x, y)))

    return {name: scores(way) for name, way in ways.items()}


def finish(config, folder, parts):
    "An adversarial stage from a given student to its end; the trainer, and the means of the last logged numbers."
    from ctm_nb.training.trainer import Trainer

    t = Trainer(config, folder)
    t.state.step = t.plan["ctm_dsm_gan"].first
    t.begin("ctm_dsm_gan", parts)
    rows = []
    while t.step < t.total:
        rows.append(t.train_step())
    last = rows[-len(rows) // 4 :]
    mean = lambda k: sum(v) / len(v) if (v := [r[k] for r in last if k in r]) else None
    return t, {
        "loss_d": mean("loss_d"),
        "lambda_gan": mean("lambda_gan"),
        "updates": sum("loss_ctm" in r for r in rows),
        "more_seconds": t.state.seconds,
    }


def one(regime, seed, n, wanted, steps):
    "Students of one regime and seed: those wanted, and those that they need."
    import torch

    from ctm_nb.training.config import make_config
    from ctm_nb.data.batches import load_data
    from ctm_nb.evaluation.evaluate import run_evaluator
    from ctm_nb.training.trainer import Trainer

    torch.set_flush_denormal(True)
    path, words, ways = (
        file_of(steps),
        [f"run.seed={seed}", *REGIMES[regime], *steps],
        {str(k): dict(steps=k) for k in STEPS},
    )
    stored = {r["objective"]: r for r in rows_of(path) if (r["regime"], r["seed"], r["n"]) == (regime, seed, n)}
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(make_config("digits", words), Path(d) / "run")
        held_out = load_data("digits", "held_out")
        splits = {"train": t.data, "held_out": held_out}
        evaluator = run_evaluator(splits)
        accuracy, *floor = [(r["metric"], r["value"]) for r in evaluator.floor(splits)]

        def write(objective, scores, **more):
            if objective in wanted:
                keep(
                    {
                        "regime": regime,
                        "objective": objective,
                        "seed": seed,
                        "n": n,
                        "classifier_accuracy": accuracy[1],
                        "scores": scores,
                        **more,
                    },
                    path,
                )

        def student(objective, model, **more):
            write(objective, scores_of(model, t.data, evaluator, n, seed, ways), **more)

        write("training images", {"floor": dict(floor)})
        while t.stage == "teacher":
            t.train_step()
        teacher, before = t.parts["teacher"], t.state.seconds
        if "teacher" in wanted:
            write("teacher", scores_of(teacher, t.data, evaluator, n, seed, {"heun 18": dict(solver="heun", steps=18)}))
        while t.step < t.ends["ctm_dsm"]:
            t.train_step()
        if "CTM + DSM" in wanted:
            student("CTM + DSM", t.parts["ctm"], updates=t.config.distill.steps, seconds=t.state.seconds - before)
        elif "CTM + DSM" in stored:
            found, before = (
                r["1"]["frechet_distance"]
                for r in (
                    scores_of(t.parts["ctm"], t.data, evaluator, n, seed, {"1": ways["1"]}),
                    stored["CTM + DSM"]["scores"],
                )
            )
            if abs(found / before - 1) > 0.01:
                raise SystemExit(
                    f"{regime}, seed {seed}: the student's distance is {found:.4f}, in the file {before:.4f}; "
                        "measure all again (--again)"
                )
            print(f"{regime} {seed}: the stored student, {found:.5f} now and {before:.5f} then", flush=True)

        if "CTM" in wanted:
            alone = Trainer(make_config("digits", [*words, "distill.dsm=false"]), Path(d) / "alone")
            alone.state.step = alone.config.teacher.steps
            alone.begin("ctm_dsm", {"teacher": teacher})
            while alone.step < alone.ends["ctm_dsm"]:
                alone.train_step()
            student("CTM", alone.parts["ctm"], updates=alone.config.distill.steps, seconds=alone.state.seconds)

        given = {"teacher": teacher, "ctm": t.parts["ctm"]}

        def control(extra):  # as many updates as the game has for the student
            gan = make_config("digits", [*words, *extra]).gan
            updates = (gan.steps - gan.start - gan.head_start) // 2
            return [f"gan.steps={updates}", f"gan.start={updates}", "gan.head_start=0"]

        for objective, extra in {**{k: control(v) for k, v in CONTROLS.items()}, **ADVERSARIES, **TRIES}.items():
            if objective not in wanted:
                continue
            s, more = finish(
                make_config("digits", [*words, *extra]), Path(d) / objective.replace(" ", ""), copy.deepcopy(given)
            )
            student(objective, s.parts["ctm"], **more)


def main(seeds, workers, steps, n, regimes, objectives, again):
    "All regimes and seeds, each in a process."
    with ThreadPoolExecutor(workers) as pool:

        def go(job):
            regime, seed = job
            there = {
                r["objective"] for r in rows_of(file_of(steps)) if (r["regime"], r["seed"], r["n"]) == (regime, seed, n)
            }
            wanted = [o for o in objectives if again or o not in there]
            if not wanted:
                return
            subprocess.run(
                [sys.executable, __file__, "one", regime, str(seed), str(n), json.dumps(wanted), *steps],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

        list(pool.map(go, [(r, s) for s in seeds for r in regimes]))


def whole(seed):
    "The command with the adversary, in an empty folder, timed from outside."
    from digits import hardware
    import torch

    command = ["ctm_nb_train", "--stage", "all", "--set", f"run.seed={seed}"]
    with tempfile.TemporaryDirectory() as d:
        started = time.perf_counter()
        subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), "--runs", d, "--name", "digits", *command[1:]], check=True
        )
        minutes = (time.perf_counter() - started) / 60
        scores = json.loads((Path(d) / "digits" / "scores.json").read_text())
        stages = [json.loads(l) for l in (Path(d) / "digits" / "metrics.jsonl").read_text().splitlines()]
    ends = {l["stage"]: {"step": l["step"], "seconds": l["seconds"]} for l in stages}
    (out := RESULTS.with_name("all.json")).write_text(
        json.dumps(
            {
                "command": " ".join(command),
                "minutes": minutes,
                "hardware": hardware(),
                "torch": torch.__version__,
                "ends": ends,
                "scores": scores,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"{minutes:.2f} minutes; {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]), sys.argv[6:])
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["ablation", "time"], default="ablation")
    p.add_argument("--seed", type=int, default=0, help="of `time`")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="steps",
        help="values of the configuration, for a trial, which goes to a temporary file of its own",
    )
    p.add_argument("-n", type=int, default=5000, help="samples for each score")
    p.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    p.add_argument(
        "--objectives",
        nargs="+",
        default=OBJECTIVES,
        choices=OBJECTIVES,
        metavar="NAME",
        help=f"which: {'; '.join(OBJECTIVES)}",
    )
    p.add_argument("--again", action="store_true", help="measure what is in the file already")
    a = p.parse_args()
    if a.what == "time":
        whole(a.seed)
    else:
        main(a.seeds, a.workers, a.steps, a.n, a.regimes, a.objectives, a.again)
