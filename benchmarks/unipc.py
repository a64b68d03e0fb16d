"""Correctors for the multistep solvers (UniPC, Zhao et al. 2023) as they were measured; no preset uses them.

    solve_unipc(D, x, times, y, points=2)    # as `ctm_nb.method.solvers.solve`
    python benchmarks/unipc.py               # errors on the exact mixture

A multistep method predicts: it has not seen the end of a step when it takes it. The next step begins with an evaluation
at exactly that place, and its result says how the step that led there should have gone. So that step is taken again,
from the same point, with a prediction that has seen both ends; the corrected point replaces the predicted one, the
evaluation is kept and not repeated. No evaluation more; only the last point stays as predicted. `unipc2` corrects 2M
with the mean of both ends, `unipc3` 3M with the parabola through three points. nbs/9_experiments/03_speed.ipynb tells
the rest.
"""
import argparse

import torch

from ctm_nb.method.flow import expand, rho_grid, toy_mixture
from ctm_nb.method.solvers import extrapolate, jump, moments, solve


def parabola_back(past, times):
    "The mean, over a step, of the parabola through its end, its beginning and the point before.  # UniPC, three points"
    end, start, before = past
    h1, h = (times[:-1] / times[1:]).log()
    a1, a2 = moments(h)
    c = (a2 - a1 * h) / (h1 + h)
    c1, c2 = expand((a1 + c) / h, start), expand(c / h1, start)
    return start + c1 * (end - start) - c2 * (start - before)


def corrected(past, times):
    "The x_0-prediction for a step whose end has been seen: D at its end, its beginning, and for a parabola before it."
    return (past[0] + past[1]) / 2 if len(past) == 2 else parabola_back(past, times)


def solve_unipc(D, x, times, y=None, points=2, callback=None):
    "Integrate the ODE with a predictor and a corrector of `points` points each; callback(i, x) sees corrected points."
    times, past, before = times.to(x), [], x
    for i, (t, u) in enumerate(zip(times[:-1], times[1:])):
        past = [D(x, t, y), *past][:points]
        if i:
            x = jump(before, times[i - 1], t, corrected(past, times[i + 1 - len(past):i + 1]))
            if callback: callback(i - 1, x)
        before, x = x, jump(x, t, u, extrapolate(past, times[i + 1 - len(past):i + 2]))
    if callback: callback(len(times) - 2, x)
    return x


SOLVERS = {"unipc2": 2, "unipc3": 3}  # name in the measurements -> points


def solve_any(D, x, times, y, method):
    "`solve`, or one of these."
    if method in SOLVERS: return solve_unipc(D, x, times, y, SOLVERS[method])
    return solve(D, x, times, y, method, above_zero=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-n", type=int, default=400, help="points")
    a = p.parse_args()
    toy = toy_mixture()
    x_T = 80 * torch.randn(a.n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = toy.flow(x_T, 80., .002)
    for method in ("dpmpp_2m", "unipc2", "dpmpp_3m", "unipc3"):
        ends = [solve_any(toy.D, x_T, rho_grid(n + 1), None, method) for n in (16, 32, 64, 128)]
        print(method, " ".join(f"{float((x - exact).norm(dim=1).median()):.2e}" for x in ends))


if __name__ == "__main__": main()
