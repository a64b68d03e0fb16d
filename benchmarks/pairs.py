"""Several jumps from one stretch of the teacher, on the mixture whose flow is known: error of the student's jumps after equal processor seconds. nbs/9_experiments/03_speed.ipynb reads the result.

    python benchmarks/pairs.py --seeds 0 1 2 --seconds 30        writes nbs/results/oracle/pairs.json after every run; runs already there are kept

Stretches have at most eight evaluations of 2M, even in ln t; a jump starts at the beginning of its stretch or at one of the solver's stops, as in a training run with `distill.pairs`.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import oracle
from spacings import stretch_times

from ctm_nb.method.distill import draw_interval, dsm_sigma
from ctm_nb.method.flow import grid_time, perturb, toy_mixture
from ctm_nb.method.solvers import solve

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "oracle" / "pairs.json"


def example_with(m):
    "`toy_example` with m jumps of each stretch."
    def example(toy, x0, matching, gen, N=18):
        draw, B = lambda *shape: torch.randn(*shape, generator=gen), len(x0)
        i, k, j = draw_interval(B // m, N, N - 1, gen, matching)
        times = stretch_times(i, k, N, "dpmpp_2m", 8, "log").float()
        lead = x0[::m]
        seen = [perturb(lead, times[0], draw(*lead.shape))]
        solve(toy.D, seen[0], times, None, "dpm", lambda n, x: seen.append(x))
        steps, nth, row = len(times) - 1, torch.arange(B) % m, torch.arange(B) // m
        after = (steps * (nth + torch.rand(B, generator=gen) * (nth > 0)) / m).long().clamp(max=steps - 1)
        u, s = (grid_time(v, N).float()[row] for v in (i + k, j))
        sigma = dsm_sigma(draw(B), torch.rand(B, generator=gen))
        return dict(x_t=torch.stack(seen)[after, row], x_u=seen[-1][row], t=times[after, row], u=u, s=s, x0=lead[row], sigma=sigma, eps=draw(*x0.shape)), steps / m
    return example


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--seconds", type=float, default=30., help="of the processor, one thread, for each run")
    p.add_argument("--batch", type=int, default=128)
    a = p.parse_args()
    torch.set_num_threads(1); torch.set_flush_denormal(True)
    toy, x_T = toy_mixture(), 80 * torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    end = toy.flow(x_T.double(), 80., .002)
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    for seed in a.seeds:
        for m in (1, 2, 4):
            if any((r["pairs"], r["seed"], r["asked"]) == (m, seed, a.seconds) for r in runs): continue
            oracle.toy_example = example_with(m)
            def train(steps):
                started = time.process_time()
                return *oracle.train_on(toy, "soft", True, seed, steps, a.batch), time.process_time() - started
            train(20); each = train(200)[2] / 200
            student, evals, spent = train(steps := round(a.seconds / each))
            runs.append({"pairs": m, "seed": seed, "asked": a.seconds, "seconds": spent, "steps": steps, "batch": a.batch, "teacher_evals": evals, "samples": {n: oracle.sample_error(student, x_T, end, n) for n in (1, 2, 4, 18)}})
            print(runs[-1], flush=True)
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps({"command": "python benchmarks/pairs.py", "torch": torch.__version__, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__": main()
