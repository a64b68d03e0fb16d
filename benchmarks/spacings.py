"""Timesteps of the teacher's solver interval as they were measured; no preset uses them, so the package does not.

    spaced_times(i, k, N, method, max_evals, "log")                           # even in ln t
    spaced_times(i, k, N, method, max_evals, "curved", curvature(teacher))    # curvature-adapted steps

Where a method's error in a step of length h (in -ln t) is C h^p, a fixed number of steps has the smallest sum of errors
with h proportional to C^(-1/p). `curvature` measures C by the fourth differences of the teacher's x_0-predictions along
a few trajectories (p = 5), never below a quarter of the largest density. nbs/9_experiments/03_speed.ipynb tells the
rest.
"""
import math

import numpy as np
import torch

from ctm_nb.method.distill import interval_times
from ctm_nb.method.flow import grid_time
from ctm_nb.method.solvers import SOLVERS, solve


def interpolate(x, xs, ys):
    "Read off a piecewise linear function."
    return torch.as_tensor(np.interp(x.cpu(), xs, ys), device=x.device)


def curvature(m, n=16, points=65, order=4, seed=0):
    "(2, points): -ln t, and the share of the curvature behind it, 0 to 1; both increase."
    lam = torch.linspace(-math.log(m.sigma_max), -math.log(m.sigma_min), points, dtype=torch.float64)
    x = m.sigma_max * torch.randn(n, *m.data_shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(m, torch.nn.Module): x = x.to(next(m.parameters()).device)
    y, seen = torch.arange(n, device=x.device) % m.n_classes if m.n_classes else None, []
    def D(*args):
        seen.append(m.D(*args))
        return seen[-1]
    with torch.no_grad(): solve(D, x, (-lam).exp(), y, "dpmpp_2m", above_zero=True)
    differences = torch.stack(seen).flatten(2).diff(n=order, dim=0)  # (points - 1 - order, n, d)
    size = differences.square().mean(2).sqrt().mean(1).double().cpu() ** (1 / (order + 1))
    density = torch.nn.functional.interpolate(size[None, None], points, mode="linear")[0, 0]
    density = density.clamp(min=.25 * float(density.max())) if density.max() > 0 else torch.ones_like(lam)
    way = torch.cat([torch.zeros(1, dtype=torch.float64), ((density[1:] + density[:-1]) / 2).cumsum(0)])
    return torch.stack([lam, way / way[-1]])


def spaced_times(i, k, N, method="heun", max_evals=None, spacing="grid", curve=None, **grid):
    "As `interval_times`, with `spacing` grid, log or curved."
    if spacing == "grid": return interval_times(i, k, N, method, max_evals, **grid)
    longest = int(torch.as_tensor(k).max())
    steps = longest if max_evals is None else max(1, min(longest, max_evals // SOLVERS[method]))
    way = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    t, u = grid_time(i, N, **grid), grid_time(i + k, N, **grid)
    if spacing == "log": return t * (u / t) ** way
    a, b = (interpolate(-v.log(), *curve) for v in (t, u))
    inner = interpolate(a + way[1:-1] * (b - a), curve[1], curve[0])
    return torch.cat([t[None], (-inner).exp(), u[None]])
