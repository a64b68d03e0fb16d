"""Students of one teacher by several recipes, of equal processor seconds: what `--minutes` is to do with its time.

    python benchmarks/recipe.py --preset mnist --data MNIST --teacher runs/mnist --ref classifier6.npz --seconds 300
    python benchmarks/recipe.py --teacher runs/digits --seconds 45 --seeds 0 1 --only "trajectories; features"

    ctm_nb_train --preset mnist --data CIFAR10 --image-size 16 --name cifar --set network.attention=4 \
        network.model_channels=24 data.flip=true teacher.steps=1200 distill.steps=0 evaluate.n=0
    python benchmarks/recipe.py --preset mnist --data CIFAR10 --set data.image_size=16 network.attention=4 \
        network.model_channels=24 data.flip=true --teacher runs/cifar -n 1000 --seconds 600 --told auto

    ctm_nb_train --preset emoji --image-size 16 --stage teacher --name emoji16 --set teacher.steps=4000 \
        network.channel_mult=1,2,2 evaluate.n=0  # its checkpoint of step 1,606 was used
    python benchmarks/recipe.py --preset mnist --data emoji --set data.image_size=16 --teacher runs/emoji16 -n 1000 \
        --seconds 120 --told auto

A recipe gets as many steps as fit into the seconds, by the time of thirty; its schedule ends where they do. `--told`
is distill.sigma_init, what the network hears of long jumps. One thread; samples are scored in the features of the
classifier in --ref (benchmarks/mnist.py keeps such a file in its --work folder), else of the run's own; pictures of
16 x 16 in lite0's. Rows are added to nbs/results/budget/tried.json.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from edm2 import Meter

from ctm_nb.evaluation.draw import weights_hash
from ctm_nb.training.budget import MUON
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "budget" / "tried.json"
MIXED = "distill.phases=trajectories:.6,soft:.4"
RELEASED = ("distill.phases= distill.matching=soft distill.solver=heun distill.max_evals=none distill.N=18 "
            "distill.K=17 distill.k_power=1 distill.distance=features distill.anchor_rows=none")
EIGHT = "distill.phases=trajectories:.8,soft:.2 distill.distance=features distill.anchor_rows=4"
RECIPES = {
    "trajectories, then soft; pseudo_huber": f"{MIXED} distill.distance=pseudo_huber",
    "trajectories, then soft; features": f"{MIXED} distill.distance=features",
    "trajectories, then soft; pseudo_huber; batch 128": f"{MIXED} distill.distance=pseudo_huber distill.batch=128",
    "trajectories; pseudo_huber": "distill.phases= distill.matching=trajectories distill.distance=pseudo_huber",
    "trajectories, then soft; features; batch 16": f"{MIXED} distill.distance=features distill.batch=16",
    "trajectories, then soft; features; batch 32": f"{MIXED} distill.distance=features distill.batch=32",
    "trajectories, then soft; features; bf16": f"{MIXED} distill.distance=features run.precision=bf16",
    "trajectories, then soft; features; one denoising row in four":
        f"{MIXED} distill.distance=features distill.anchor_rows=4",
    "trajectories, then soft; features; one denoising row in four, compared at s":
        f"{MIXED} distill.distance=features distill.anchor_rows=4 distill.compare_at=s",
    "trajectories:.7, then soft; features; one denoising row in four, compared at s":
        "distill.phases=trajectories:.7,soft:.3 distill.distance=features distill.anchor_rows=4 distill.compare_at=s",
    "trajectories, then soft; features; one denoising row in four, three evaluations, reuse 12":
        f"{MIXED} distill.distance=features distill.anchor_rows=4 distill.max_evals=3 distill.reuse=12",
    "trajectories:.75, then soft; features; one denoising row in four, three evaluations":
        "distill.phases=trajectories:.75,soft:.25 distill.distance=features distill.anchor_rows=4 distill.max_evals=3",
    "trajectories:.8, then soft; features; one denoising row in four": EIGHT,
    "trajectories:.8, then soft; features; one denoising row in four; batch 16": f"{EIGHT} distill.batch=16",
    "released loss; features": RELEASED,
    "released loss; features; batch 16": f"{RELEASED} distill.batch=16",
    "trajectories; features": "distill.phases= distill.matching=trajectories distill.distance=features",
}
QUIET = ["gan.steps=0", "run.save_every=1000000", "run.sample_every=1000000", "run.log_every=1000000"]


def trained(words, folder):
    "A run to its end, and processor seconds of a step."
    t, started = Trainer(make_config(*words), folder), time.process_time()
    while t.step < t.total: t.train_step()
    return t, (time.process_time() - started) / t.total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="digits")
    p.add_argument("--data", help="images of a preset that has none")
    p.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="more settings of the runs")
    p.add_argument("--teacher", required=True, help="a run")
    p.add_argument("--told", default="published", metavar="SIGMA_INIT", help="distill.sigma_init")
    p.add_argument("--ref", type=Path, help="a reference with its classifier")
    p.add_argument("--seconds", type=float, default=45)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("-n", type=int, default=5000, help="samples a distance")
    p.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    meter = None
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    given = [*QUIET, *MUON.split(), f"distill.sigma_init={a.told}", f"teacher.source={a.teacher}",
             "distill.anchor_rows=none",
             *([f"data.source={a.data}"] if a.data else []), *a.set]
    for seed in a.seeds:
        for what in a.only:
            with tempfile.TemporaryDirectory() as d:
                words = [*given, f"run.seed={seed}", *RECIPES[what].split()]
                each = trained((a.preset, [*words, "distill.steps=30", "distill.stored=256"]), Path(d) / "trial")[1]
                steps = max(30, round(a.seconds / each))
                rate = round(1 - 10 / steps, 5)
                rates = f"distill.ema={rate} distill.target_ema={min(.99, rate)} distill.warmup={min(50, steps // 10)} "
                rates += f"distill.stored={64 * min(47, max(4, steps // 40))}"  # as --minutes does
                t, each = trained((a.preset, [*words, f"distill.steps={steps}", *rates.split()]), Path(d) / "run")
                meter, student = meter or Meter(t.config, a.n, a.ref), t.parts["ctm"].eval()
                with torch.no_grad():
                    found = [round(meter(student, dict(solver="ctm", steps=k), seed), 3) for k in (1, 2, 4)]
            rows.append({"images": Path(a.data or a.preset).name, "asked": a.seconds, "seconds": round(each * steps),
                         "steps": steps, "what": what, "told": a.told, "seed": seed, "distance": found,
                         "teacher": weights_hash(t.parts["teacher"])[:6]})
            print(rows[-1], flush=True)
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
