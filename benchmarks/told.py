"""Students whose network is told a lower noise level on long jumps, beside those that are told the truth.

    python benchmarks/told.py mnist --data MNIST --teacher runs/mnist --ref classifier6.npz --seconds 60 --seeds 0 1 2
    python benchmarks/told.py cifar --data CIFAR10 --teacher runs/cifar --seconds 60 --seeds 0 1 --told 0

Teachers, references, seconds and steps are those of benchmarks/recipe.py, whose recipe "trajectories, then soft;
features" is used, with batches of 16 below two minutes. `--told` is the power of the rule (page 9.5), 0 the published
model. Rows are added to nbs/results/objectives/told.json; what is there is not computed again.
"""
import argparse
import json
import sys
from pathlib import Path

import recipe
from ctm_nb.method.flow import expand
from ctm_nb.method.trajectory import CTM

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "objectives" / "told.json"
LOWEST = 2.  # no level is told to be below it
IMAGES = {"mnist": ["-n", "3000"],
          "cifar": ["-n", "1000", "--set", "data.image_size=16", "network.attention=4", "network.model_channels=24",
                    "data.flip=true"]}


def told_level(t, s, power):
    "The level that the network hears of: between t and where the jump lands, in powers."
    return t * (s.clamp(min=LOWEST) / t).clamp(max=1) ** power


def lower(power):
    "What a CTM computes if its network is told a lower level, and shown x as it would be there."
    def forward(self, x, t, s, y=None):
        t, s = (expand(v, x).flatten().expand(len(x)) for v in (t, s))
        told = told_level(t, s, power)
        return self.precondition(expand(told / t, x) * x, told, s, y)
    return forward


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", choices=list(IMAGES))
    for name in ("--data", "--teacher"): p.add_argument(name, required=True)
    p.add_argument("--ref", help="a reference with its classifier, for MNIST")
    p.add_argument("--seconds", type=int, default=60)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--told", type=float, nargs="+", default=[0, .75], metavar="POWER")
    a = p.parse_args()
    what, as_it_is = "trajectories, then soft; features" + "; batch 16" * (a.seconds < 120), CTM.forward
    shared = ["--preset", "mnist", "--data", a.data, "--teacher", a.teacher, "--seconds", str(a.seconds)]
    shared += [*IMAGES[a.images], *(["--ref", a.ref] if a.ref else [])]
    for power in a.told:
        CTM.forward = lower(power) if power else as_it_is
        for seed in a.seeds:
            rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
            key = dict(images=a.images, asked=a.seconds, told=power, seed=seed)
            if any(key.items() <= row.items() for row in rows): continue
            recipe.RESULT = RESULT.with_name(f".told-{a.images}-{a.seconds}-{power}-{seed}.json")
            sys.argv = ["recipe.py", *shared, "--seeds", str(seed), "--only", what]
            recipe.main()
            row = json.loads(recipe.RESULT.read_text())[-1]
            recipe.RESULT.unlink()
            rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
            RESULT.write_text(json.dumps([*rows, row | key], indent=1) + "\n")


if __name__ == "__main__": main()
