"""Students whose network is told a lower noise level on long jumps, beside those that are told the truth.

    python benchmarks/told.py mnist --data MNIST --teacher runs/mnist --ref classifier6.npz --seconds 60 --seeds 0 1 2
    python benchmarks/told.py cifar --data CIFAR10 --teacher runs/cifar --seconds 60 --seeds 0 1 --told published auto

    ctm_nb_train --preset emoji --image-size 16 --stage teacher --name emoji16 \
        --set teacher.steps=4000 network.channel_mult=1,2,2 evaluate.n=0
    python benchmarks/told.py emoji --data emoji --teacher runs/emoji16 --seconds 120

Teachers, references, seconds and steps are those of benchmarks/recipe.py, whose recipe "trajectories, then soft;
features" is used, with batches of 16 below two minutes. `--told` are values of distill.sigma_init: 5.03 is the level
that lets a line bend at 2. Rows are added to nbs/results/objectives/told.json; what is there is not computed again.
"""
import argparse
import json
import sys
from pathlib import Path

import recipe

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "objectives" / "told.json"
IMAGES = {"mnist": ["-n", "3000"],
          "cifar": ["-n", "1000", "--set", "data.image_size=16", "network.attention=4", "network.model_channels=24",
                    "data.flip=true"],
          "emoji": ["-n", "1000", "--set", "data.image_size=16"]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", choices=list(IMAGES))
    for name in ("--data", "--teacher"): p.add_argument(name, required=True)
    p.add_argument("--ref", help="a reference with its classifier, for MNIST")
    p.add_argument("--seconds", type=int, default=60)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--told", nargs="+", default=["published", "auto"], metavar="SIGMA_INIT")
    a = p.parse_args()
    what = "trajectories, then soft; features" + "; batch 16" * (a.seconds < 120)
    shared = ["--preset", "mnist", "--data", a.data, "--teacher", a.teacher, "--seconds", str(a.seconds)]
    own = IMAGES[a.images] if "--set" in IMAGES[a.images] else [*IMAGES[a.images], "--set"]
    for told in a.told:
        for seed in a.seeds:
            rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
            key = dict(images=a.images, asked=a.seconds, told=told, seed=seed)
            if any(key.items() <= row.items() for row in rows): continue
            recipe.RESULT = RESULT.with_name(f".told-{a.images}-{a.seconds}-{told}-{seed}.json")
            recipe.RESULT.unlink(missing_ok=True)
            sys.argv = ["recipe.py", *shared, *(["--ref", a.ref] if a.ref else []), *own, f"distill.sigma_init={told}",
                        "--seeds", str(seed), "--only", what]
            recipe.main()
            row = json.loads(recipe.RESULT.read_text())[-1]
            recipe.RESULT.unlink()
            rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
            RESULT.write_text(json.dumps([*rows, row | key], indent=1) + "\n")


if __name__ == "__main__": main()
