"""Local, global and soft matching, with and without DSM, against the exact flow of a Gaussian mixture: the numbers behind nbs/1_method/07_oracle.ipynb.

    python benchmarks/oracle.py --seeds 0 1 2 --steps 1000        writes nbs/results/oracle/runs.json after each of the 21 runs; runs already there are kept

Three of each of the six variants with the same number of steps, and global matching with DSM once more for as many steps as make the teacher's work that of soft matching.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from ctm_nb.method.distill import MATCHING
from ctm_nb.method.flow import toy_mixture
from ctm_nb.method.oracle import LEVELS, denoiser_error, exact_maps, map_error, sample_error, train_on

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "oracle" / "runs.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    a = parser.parse_args()
    torch.set_num_threads(1); torch.set_flush_denormal(True)
    toy, levels = toy_mixture(), torch.logspace(torch.tensor(.002).log10(), torch.tensor(80.).log10(), 16)
    maps, x_T = exact_maps(toy), 80 * torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    end = toy.flow(x_T.double(), 80., .002)
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    for matching, dsm, seed, equal_work in [*((m, d, s, False) for s in a.seeds for m in MATCHING for d in (True, False)), *(("global", True, s, True) for s in a.seeds)]:
        evals = {m: sum(r["teacher_evals"] for r in runs if r["matching"] == m and r["steps"] == a.steps) for m in ("soft", "global")}
        key = dict(matching=matching, dsm=dsm, seed=seed, steps=round(a.steps * evals["soft"] / evals["global"]) if equal_work else a.steps, batch=a.batch)
        if any(all(r[k] == v for k, v in key.items()) for r in runs): continue
        started = time.process_time()
        student, evals = train_on(toy, matching, dsm, seed, key["steps"], a.batch)
        error = [[None if v != v else v for v in row] for row in map_error(student, maps).tolist()]
        runs.append({**key, "teacher_evals": evals, "cpu_seconds": time.process_time() - started, "map": error, "denoiser": denoiser_error(student, toy, levels).tolist(),
                     "samples": {n: sample_error(student, x_T, end, n) for n in (1, 2, 4, 18)}})
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps({"command": "python benchmarks/oracle.py", "torch": torch.__version__, "levels": LEVELS, "denoiser_levels": levels.tolist(), "runs": runs}) + "\n")


if __name__ == "__main__": main()
