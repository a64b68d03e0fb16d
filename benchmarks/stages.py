"""What each term of CTM's objective does for the digits: CTM, CTM + DSM, CTM + DSM + GAN, the same teacher and number of student updates, several seeds.

    python benchmarks/stages.py --seeds 0 1 2        writes nbs/results/digits/stages.json, a row for each student as soon as it is scored, and keeps other seeds' rows

Two regimes: the preset, whose teacher answers with up to 5 evaluations, and a coarse teacher with at most 2, whose mistakes an adversary could repair. The adversary is compared
with its own control: the same student, number of updates and learning rates, without adversary. One thread a process; the scores don't depend on the load of the machine, the seconds do.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits" / "stages.json"
REGIMES = {"preset": [], "coarse teacher": ["distill.max_evals=2"]}
STEPS = (1, 2, 4, 18)
ADVERSARIES = {"CTM + DSM + GAN": [], "GAN, softplus": ["gan.loss=softplus"], "GAN, R1": ["gan.r1=0.1"], "GAN, rate x 4": ["gan.lr=4e-4"]}


def scores_of(model, data, reference, n, seed, ways):
    "The four scores for each way of drawing."
    import torch

    from ctm_nb.metrics import score_samples
    from ctm_nb.sampling import sample
    y = data.labels[torch.arange(n) * len(data) // n]
    return {name: score_samples(reference, sample(model, n, y=y, seed=seed + 1, batch_size=500, **way), y) for name, way in ways.items()}


def finish(config, folder, parts):
    "An adversarial stage from a given student to its end; the trainer, and the means of the last logged numbers."
    from ctm_nb.config import stage_steps
    from ctm_nb.training import Trainer
    t = Trainer(config, folder)
    t.step = t.total - stage_steps(config)["ctm_dsm_gan"]
    t.begin("ctm_dsm_gan", parts)
    rows = []
    while t.step < t.total: rows.append(t.train_step())
    last = rows[-len(rows) // 4:]
    mean = lambda k: sum(v) / len(v) if (v := [r[k] for r in last if k in r]) else None
    return t, {"loss_d": mean("loss_d"), "lambda_gan": mean("lambda_gan"), "updates": sum("loss_ctm" in r for r in rows), "more_seconds": t.seconds}


def one(regime, seed, steps, n, out):
    "All students of one regime and seed, rows to a file as they come."
    import torch

    from ctm_nb.config import make_config
    from ctm_nb.data import load_data
    from ctm_nb.metrics import make_reference, score_samples, train_classifier
    from ctm_nb.training import Trainer
    torch.set_flush_denormal(True)
    words, ways = [f"run.seed={seed}", *REGIMES[regime], *steps], {str(k): dict(steps=k) for k in STEPS}
    with tempfile.TemporaryDirectory() as d:
        t = Trainer(make_config("digits", words), Path(d) / "run")
        held_out = load_data("digits", "held_out")
        reference = make_reference(train_classifier(t.data, seed=0), held_out)

        def write(objective, scores, **more):
            with out.open("a") as f: f.write(json.dumps({"regime": regime, "objective": objective, "seed": seed, "n": n, "classifier_accuracy": reference.accuracy, "scores": scores, **more}) + "\n")

        def student(objective, model, **more): write(objective, scores_of(model, t.data, reference, n, seed, ways), **more)

        write("training images", {"floor": score_samples(reference, t.data.images, t.data.labels)})
        while t.stage == "teacher": t.train_step()
        teacher, before = t.parts["teacher"], t.seconds
        write("teacher", scores_of(teacher, t.data, reference, n, seed, {"heun 18": dict(solver="heun", steps=18)}))
        while t.step < t.ends["ctm_dsm"]: t.train_step()
        student("CTM + DSM", t.parts["ctm"], updates=t.config.distill.steps, seconds=t.seconds - before)

        alone = Trainer(make_config("digits", [*words, "distill.dsm=false"]), Path(d) / "alone")
        alone.step = alone.config.teacher.steps
        alone.begin("ctm_dsm", {"teacher": teacher})
        while alone.step < alone.ends["ctm_dsm"]: alone.train_step()
        student("CTM", alone.parts["ctm"], updates=alone.config.distill.steps, seconds=alone.seconds)

        given, gan = {"teacher": teacher, "ctm": t.parts["ctm"]}, t.config.gan
        updates = (gan.steps - gan.start - gan.head_start) // 2
        longer = [f"gan.steps={updates}", f"gan.start={updates}", "gan.head_start=0"]
        for objective, extra in {"CTM + DSM, longer": longer, **ADVERSARIES}.items():
            s, more = finish(make_config("digits", [*words, *extra]), Path(d) / objective.replace(" ", ""), copy.deepcopy(given))
            student(objective, s.parts["ctm"], **more)


def main(seeds, workers, steps, n, regimes):
    "All regimes and seeds, each in a process."
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as d, ThreadPoolExecutor(workers) as pool:
        def go(job):
            out = Path(d) / f"{job[0].replace(' ', '')}{job[1]}.jsonl"
            subprocess.run([sys.executable, __file__, "one", *map(str, job), str(n), str(out), *steps], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            return [json.loads(l) for l in out.read_text().splitlines()]
        for new in pool.map(go, [(r, s) for s in seeds for r in regimes]):
            which = lambda r: (r["regime"], r["seed"])
            rows = [r for r in rows if which(r) != which(new[0])] + new
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(sorted(rows, key=which), indent=1) + "\n")
            for r in new: print(r["regime"], r["seed"], r["objective"], {k: round(v["frechet_distance"], 3) for k, v in r["scores"].items()}, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]: one(sys.argv[2], int(sys.argv[3]), sys.argv[6:], int(sys.argv[4]), Path(sys.argv[5])); sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="steps", help="values of the configuration, for a trial")
    p.add_argument("-n", type=int, default=5000, help="samples for each score")
    p.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    a = p.parse_args()
    main(a.seeds, a.workers, a.steps, a.n, a.regimes)
