"""Does bfloat16 cost quality? Teacher and student of a preset, trained in float32 and in bfloat16 with the same steps,
images and noise, scored alike (samples drawn in float32): Fréchet distances for each seed, and processor seconds.

    python benchmarks/precision.py --seeds 0 1 2

Writes nbs/results/speed/precision.json after every run; what is there already is kept.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed" / "precision.json"
QUIET = "gan.steps=0 run.save_every=1000000 run.sample_every=1000000 run.log_every=1000000 run.track=none"


def trained(preset, words, folder):
    "Distances of every sampler by its name, and processor seconds of each stage."
    t, seconds = Trainer(make_config(preset, words), folder), {}
    while t.step < t.total:
        stage, started = t.stage, time.process_time()
        t.train_step()
        seconds[stage] = seconds.get(stage, 0.) + time.process_time() - started
    t.save()
    names = {(how["solver"], how["steps"]): name for name, (_, how) in t.samplers().items()}
    rows = [r for r in t.evaluate() if r["metric"] == "frechet_distance" and r["sampler"]]
    return {names[r["sampler"]["solver"], r["sampler"]["steps"]]: round(r["value"], 3) for r in rows}, seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="digits")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--set", nargs="*", default=[], dest="words", help="further settings")
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for seed in a.seeds:
        for precision in ("fp32", "bf16"):
            key = {"preset": a.preset, "set": a.words, "seed": seed, "precision": precision}
            if any(key.items() <= r.items() for r in rows): continue
            words = [*QUIET.split(), *a.words, f"run.seed={seed}", f"run.precision={precision}"]
            with tempfile.TemporaryDirectory() as d: distances, seconds = trained(a.preset, words, Path(d) / "run")
            rows.append({**key, "distance": distances, "seconds": {k: round(v, 1) for k, v in seconds.items()}})
            print(rows[-1], flush=True)
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
