"""Quality against evaluations, as in Fig. 7 of the CTM paper: the student for several gamma, the teacher's solvers,
one measure.

    python benchmarks/tradeoff.py RUN [RUN ...]        finished runs of the digits preset, each its own training seed
    python benchmarks/tradeoff.py --train 0 1 2        train the preset with these seeds first, into a temporary folder

Every row is the Frechet distance of the same number of samples to the held-out digits, in the features of one
classifier (seed 0). Each way of drawing is measured with several noises on each run. Rows are written to
nbs/results/digits/tradeoff.json one by one; what is there is not measured again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits" / "tradeoff.json"
STUDENT, GAMMAS = (1, 2, 4, 8, 16, 32), (0.0, 0.2, 0.5, 1.0)
TEACHER = {
    "euler": (1, 2, 4, 8, 16, 32),
    "heun": (1, 2, 4, 8, 16),
    "dpm": (1, 2, 4, 8, 16, 32),
    "dpm3": (1, 2, 4, 8, 16, 32),
}


def ways():
    "Every way of drawing, the cheap ones first; with one jump gamma has no meaning."
    student = [("ctm", dict(solver="ctm", steps=n, gamma=g)) for g in GAMMAS for n in STUDENT if n > 1 or g == 0]
    return sorted(
        student + [("teacher", dict(solver=s, steps=n, gamma=0.0)) for s, steps in TEACHER.items() for n in steps],
        key=lambda w: w[1]["steps"],
    )


def measure(run, noise_seeds, n, rows, save):
    "All ways of one run; `rows` grows, and `save` is called after each."
    import torch

    from ctm_nb.data.images import digits
    from ctm_nb.checkpoints.models import find_checkpoint, load
    from ctm_nb.evaluation.evaluate import run_evaluator
    from ctm_nb.evaluation.reference import image_samples
    from ctm_nb.method.sampling import default_times, evaluations, sample

    torch.set_flush_denormal(True)
    seed = json.loads((Path(run) / "config.json").read_text())["run"]["seed"]
    models = {which: load(run, which=which) for which in ("ctm", "teacher")}
    data, held_out = digits("train"), digits("held_out")
    evaluator = run_evaluator({"train": data, "held_out": held_out})
    about = {"features": evaluator.extractor.features_id, "reference": evaluator.reference.sha256}
    scores = lambda x, y: evaluator.score(evaluator.collect(image_samples(x, y)))
    y = data.labels[torch.arange(n) * len(data) // n]
    floor = {"run_seed": None, "noise_seed": None, "model": "training images", "n_samples": len(data), **about}
    if not any(floor.items() <= row.items() for row in rows):
        rows.append({**floor, **scores(data.images, data.labels)})
        save()
    for noise_seed in noise_seeds:
        for which, way in ways():
            key = {"run_seed": seed, "noise_seed": noise_seed, "model": which, **way, "n_samples": n, **about}
            if any(key.items() <= row.items() for row in rows):
                continue
            m = models[which]
            x = sample(m, n, y=y, seed=noise_seed, batch_size=500, **way)
            cost = evaluations(way["solver"], default_times(m, way["steps"], way["solver"]))
            rows.append({**key, "evaluations": cost, "checkpoint": find_checkpoint(run).name, **scores(x, y)})
            save()
            print(
                f"run {seed}, noise {noise_seed}, {which} {way['solver']} {way['steps']:2} gamma {way['gamma']:g}: "
                f"{rows[-1]['frechet_distance']:.3f}",
                flush=True,
            )


def train(seed, folder):
    "A run of the preset."
    subprocess.run(
        [
            str(Path(sys.executable).with_name("ctm_nb_train")),
            "--runs",
            folder,
            "--name",
            f"digits{seed}",
            "--set",
            f"run.seed={seed}",
        ],
        check=True,
    )
    return Path(folder) / f"digits{seed}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path)
    p.add_argument("--train", type=int, nargs="+", default=[], metavar="SEED", help="train these seeds first")
    p.add_argument("--noise-seeds", type=int, nargs="+", default=[1000, 1001], help="of the samples")
    p.add_argument("-n", type=int, default=1352, help="samples (default: as many as the training run scores)")
    p.add_argument("--out", type=Path, default=RESULTS)
    a = p.parse_args()
    if not a.runs and not a.train:
        p.error("give finished runs, or --train SEED")
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    a.out.parent.mkdir(parents=True, exist_ok=True)
    save = lambda: a.out.write_text(json.dumps(rows, indent=1) + "\n")
    for run in a.runs:
        measure(run, a.noise_seeds, a.n, rows, save)
    with tempfile.TemporaryDirectory() as d:
        for seed in a.train:
            measure(train(seed, d), a.noise_seeds, a.n, rows, save)


if __name__ == "__main__":
    main()
