"""Several jumps from one solver interval of the teacher, on the mixture whose flow is known.

    python benchmarks/pairs.py --seeds 0 1 2 --seconds 30

measures the error of the student's jumps after equal processor seconds and writes nbs/results/oracle/pairs.json after
every run; runs already there are kept. nbs/9_experiments/03_speed.ipynb reads the result. Intervals have at most eight
evaluations of 2M, even in ln t; a jump starts at the beginning of its interval or at one of the solver's timesteps.
"""
import argparse
import json
import time
from pathlib import Path

import oracle
import torch
from spacings import spaced_times

from ctm_nb.method.distill import draw_interval, dsm_sigma
from ctm_nb.method.flow import grid_time, perturb, toy_mixture
from ctm_nb.method.solvers import solve

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "oracle" / "pairs.json"


def example_with(m):
    "`oracle.toy_example` with m jumps of each interval."
    def example(toy, x0, matching, gen, N=18):
        draw, B = lambda *shape: torch.randn(*shape, generator=gen), len(x0)
        i, k, j = draw_interval(B // m, N, N - 1, gen, matching)
        times = spaced_times(i, k, N, "dpmpp_2m", 8, "log").float()  # (steps+1, B/m)
        lead = x0[::m]
        seen = [perturb(lead, times[0], draw(*lead.shape))]
        solve(toy.D, seen[0], times, None, "dpmpp_2m", lambda n, x: seen.append(x))
        steps, nth, row = len(times) - 1, torch.arange(B) % m, torch.arange(B) // m
        after = steps * (nth + torch.rand(B, generator=gen) * (nth > 0)) / m  # the solver's step at which a jump starts
        after = after.long().clamp(max=steps - 1)
        u, s = (grid_time(v, N).float()[row] for v in (i + k, j))
        sigma = dsm_sigma(draw(B), torch.rand(B, generator=gen))
        jumps = dict(x_t=torch.stack(seen)[after, row], x_u=seen[-1][row], t=times[after, row], u=u, s=s)
        return dict(**jumps, x0=lead[row], sigma=sigma, eps=draw(*x0.shape)), steps / m
    return example


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--seconds", type=float, default=30., help="of the processor, one thread, for each run")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--out", type=Path, default=RESULT)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    toy, x_T = toy_mixture(), 80 * torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    end = toy.flow(x_T.double(), 80., .002)
    runs = json.loads(a.out.read_text())["runs"] if a.out.exists() else []
    for seed, m in ((seed, m) for seed in a.seeds for m in (1, 2, 4)):
        if any((r["pairs"], r["seed"], r["asked"]) == (m, seed, a.seconds) for r in runs): continue

        def train(steps, seed=seed, m=m):
            started = time.process_time()
            student, nfe = oracle.train_on(toy, "soft", True, seed, steps, a.batch, example=example_with(m))
            return student, nfe, time.process_time() - started
        train(20)
        each = train(200)[2] / 200
        steps = round(a.seconds / each)
        student, nfe, spent = train(steps)
        samples = {n: oracle.sample_error(student, x_T, end, n) for n in (1, 2, 4, 18)}
        runs.append({"pairs": m, "seed": seed, "asked": a.seconds, "seconds": spent, "steps": steps, "batch": a.batch,
                     "teacher_evals": nfe, "samples": samples})
        print(runs[-1], flush=True)
        about = {"command": "python benchmarks/pairs.py", "torch": torch.__version__, "runs": runs}
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__": main()
