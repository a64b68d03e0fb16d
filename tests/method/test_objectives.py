"""Stored trajectories and the Eulerian loss against the exact flow of the mixture.

`tests/golden/objectives.npz` holds points with the derivative of the exact g along the exact trajectory, a
difference of the flow itself in float64 (`python tests/method/test_objectives.py` makes it again)."""
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.distances import l2, pseudo_huber
from ctm_nb.method.eulerian import along_teacher, draw_times, eulerian_loss, ramp
from ctm_nb.method.flow import grid_time, perturb, rho_grid, toy_mixture
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectories import anchor_loss, draw_pair, stored_batch, trajectories_loss, trajectory
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.unet import MLP

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "objectives.npz"
TOY = toy_mixture()


def GEN(seed=0): return torch.Generator().manual_seed(seed)


def points(n=40, h=1e-3):
    "Points, times, and dg/dln t along the exact trajectory; the difference twice, extrapolated to h = 0."
    gen = GEN(7)
    t = grid_time(.1 + .6 * torch.rand(n, generator=gen), 2)
    s, top = t * torch.rand(n, generator=gen) * .8, t * np.exp(2 * h)
    x = perturb(TOY.sample(n, seed=3).double(), top, torch.randn(n, 2, generator=gen, dtype=torch.float64))
    at = {2: x}
    for k, below in ((2, 1), (1, 0), (0, -1), (-1, -2)):
        at[below] = TOY.flow(at[k], t * np.exp(k * h), t * np.exp(below * h), tol=3e-14)
    g = {k: TOY.g(v, t * np.exp(k * h), s) for k, v in at.items()}
    fine, coarse = (g[1] - g[-1]) / (2 * h), (g[2] - g[-2]) / (4 * h)
    return dict(x_t=at[0], t=t, s=s, slope=fine + (fine - coarse) / 3)


@pytest.fixture(scope="module")
def golden(): return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN).items()}


class Scaled(torch.nn.Module):
    "The exact map with a prediction too large by a factor that learns."
    sigma_data, sigma_min = TOY.sigma_data, TOY.sigma_min

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def g(self, x, t, s, y=None): return self.factor * TOY.g(x, t, s)
    def G(self, x, t, s, y=None): return TOY.G(x, t, s) + (self.factor - 1) * (1 - s / t)[:, None] * TOY.g(x, t, s)
    def D(self, x, t, y=None): return self.factor * TOY.D(x, t)


# ---- the Eulerian loss

def test_the_derivative_is_that_of_the_exact_flow(golden):
    x_t, t, s, slope = (golden[k] for k in ("x_t", "t", "s", "slope"))
    found = along_teacher(TOY, x_t, t, s, TOY.D(x_t, t))
    assert float((found - slope).norm() / slope.norm()) < 1e-3


def test_on_the_exact_flow_nothing_is_left_of_dG_dt(golden):
    x_t, t, s, slope = (golden[k] for k in ("x_t", "t", "s", "slope"))
    r, g, D = (s / t)[:, None], TOY.g(x_t, t, s), TOY.D(x_t, t)
    assert (r * (g - D) + (1 - r) * slope).abs().max() < 1e-5
    right, wrong = (eulerian_loss(m, x_t, t, s, D) for m in (TOY, Scaled(1.2)))
    assert right.max() < 1e-3 and right.mean() < .01 * wrong.mean()


@pytest.mark.parametrize("factor, sign", [(.9, -1), (1.1, 1)])
def test_the_gradient_leads_back_to_the_exact_map(golden, factor, sign):
    x_t, t, s, m = *(golden[k] for k in ("x_t", "t", "s")), Scaled(factor)
    eulerian_loss(m, x_t, t, s, TOY.D(x_t, t)).mean().backward()
    assert sign * float(m.factor.grad) > .003


def test_without_the_derivative_it_is_the_teachers_prediction(golden):
    x_t, t = golden["x_t"], golden["t"]
    student = student_from(Denoiser(MLP(2, width=16, n_blocks=1))).double()
    D_x, last = TOY.D(x_t, t), student.net.last_layer
    mine, = torch.autograd.grad(eulerian_loss(student, x_t, t, t, D_x, r=0., c=1e7).mean() * 1e7, last)
    plain, = torch.autograd.grad((student.D(x_t, t) - D_x).square().mean(), last)
    assert float((mine - plain).norm() / plain.norm()) < 1e-4


def test_the_derivative_is_made_in_float32_whatever_the_precision(golden):
    student = student_from(Denoiser(MLP(2, width=16, n_blocks=1)))
    for p in student.parameters(): p.data.add_(.05 * torch.randn_like(p))
    x_t, t, s = (golden[k].float() for k in ("x_t", "t", "s"))
    plain = along_teacher(student, x_t, t, s, 0 * x_t)
    with torch.autocast("cpu", torch.bfloat16): half = along_teacher(student, x_t, t, s, 0 * x_t)
    assert plain.dtype == half.dtype == torch.float32 and torch.equal(plain, half)


def test_times_are_ordered_and_the_ramp_ends():
    t, s = draw_times(5000, GEN())
    assert (s <= t).all() and .0019 < s.min() and t.max() <= 80 and float((s > 1).double().mean()) > .1
    assert [ramp(v) for v in (0., .2, .25, 1.)] == [0., .8, 1., 1.]


# ---- stored trajectories

def test_a_trajectory_has_the_flow_at_all_its_points():
    times, x_T = rho_grid(40), 80 * torch.randn(20, 2, generator=GEN(), dtype=torch.float64)
    path = trajectory(TOY.D, x_T, times)
    assert path.shape == (20, 40, 2) and torch.equal(path[:, 0], x_T)
    for k in (5, 20, 39): assert float((path[:, k] - TOY.flow(x_T, 80., times[k])).norm(dim=1).median()) < .05


@pytest.mark.parametrize("distance", [l2, pseudo_huber])
def test_its_gradient_is_a_finite_difference(distance):
    times = rho_grid(12)
    path = trajectory(TOY.D, 80 * torch.randn(30, 2, generator=GEN(), dtype=torch.float64), times)
    i, j = draw_pair(30, 12, GEN(1))
    m = Scaled(1.05)
    trajectories_loss(m, path, times, i, j, distance=distance).mean().backward()
    at = [trajectories_loss(Scaled(1.05 + e), path, times, i, j, distance=distance).mean() for e in (1e-5, -1e-5)]
    assert abs(float(m.factor.grad) - float(at[0] - at[1]) / 2e-5) < 1e-6


@pytest.mark.parametrize("N", [2, 3, 18])
def test_pairs_are_ordered_and_half_of_them_end(N):
    i, j = draw_pair(20000, N, GEN())
    assert i.min() == 0 and i.max() == N - 2 and (i < j).all() and j.max() == N - 1
    assert float((j == N - 1).double().mean()) >= .48


def test_the_anchor_is_zero_at_the_teacher_and_weighs_levels_alike():
    t = torch.tensor([.01, .5, 20.], dtype=torch.float64)
    x_t = perturb(TOY.sample(3).double(), t, torch.randn(3, 2, generator=GEN(), dtype=torch.float64))
    D_x = TOY.D(x_t, t)
    assert anchor_loss(Scaled(1.), x_t, t, D_x).max() == 0
    w = (t**2 + TOY.sigma_data**2) / (t * TOY.sigma_data) ** 2
    expected = w * (.1 * D_x).square().mean(1)
    assert torch.allclose(anchor_loss(Scaled(1.1), x_t, t, D_x), expected)


@pytest.mark.parametrize("steps, most, reuse", [(12, 100, 3), (12, 2, 3), (5, 100, 10), (13, 4, 3)])
def test_every_batch_is_used_as_often_as_was_asked(steps, most, reuse):
    used = [stored_batch(n, steps, most, reuse) for n in range(steps)]
    seen, places = {}, {}
    for number, place, fresh in used:
        assert fresh == (number not in seen) and place < max(1, most)
        if fresh: places[place] = number
        assert places[place] == number  # what the memory holds is what the step is told
        seen[number] = seen.get(number, 0) + 1
    assert max(seen.values()) <= reuse


if __name__ == "__main__": np.savez_compressed(GOLDEN, **{k: v.numpy() for k, v in points().items()})
