"""Solvers: what must hold whatever the notebook shows. Explanations are tested in its cells."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.flow import GaussianMixture
from ctm_nb.method.solvers import OLD_NAMES, RULES, SOLVERS, extrapolate, jump, nfe, solve, solver_name

ROOT = Path(__file__).resolve().parents[2]
GAUSS = GaussianMixture(torch.zeros(1, 2), torch.tensor([.5]), torch.ones(1))
f64 = torch.float64


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_3m", 3)])
def test_solver_orders(solver, order):
    "The slope of the error over the steps; from t = 80, where D hardly moves, so that 3M's first steps cost nothing."
    x, counts = 80 * torch.randn(1, 2, dtype=f64), (64, 128, 256, 512)
    exact = x * ((.1 ** 2 + .25) / (80 ** 2 + .25)) ** .5

    def error(n):
        times = torch.logspace(np.log10(80), -1, n + 1, dtype=f64)
        return float((solve(GAUSS.D, x, times, method=solver) - exact).norm())
    slope = -np.polyfit(np.log(counts), np.log([error(n) for n in counts]), 1)[0]
    assert order - .2 < slope < order + .5


def test_a_jump_by_numbers_is_the_one_by_tensors():
    x, x0 = torch.randn(2, 3, 4)
    for t, u in ((3., 2.), (80., .002), (.5, .5), (1., 0.)):
        by_rows = jump(x, torch.full((3,), t), torch.full((3,), u), x0)
        torch.testing.assert_close(jump(x, t, u, x0), by_rows, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(jump(x, t, torch.full((3,), u), x0), by_rows, rtol=1e-6, atol=1e-6)


def test_3m_is_exact_for_parabolas():
    D = lambda x, t, y=None: torch.full_like(x, 1.) * (2 - t.log() + .3 * t.log() ** 2)
    times = torch.tensor([3., 2.5, 1.4, 1.1, .8, .4, .3, .1, .04], dtype=f64)  # steps of different lengths
    x0 = torch.zeros(1, 1, dtype=f64)

    def fine(n):
        between = torch.logspace(float(times[0].log10()), float(times[n].log10()), 3001, dtype=f64)
        return solve(D, x0, between, method="dpmpp_2m")
    x, D_at = fine(2), [D(x0, t) for t in times]
    for i in range(2, 8):
        past = [D_at[i], D_at[i - 1], D_at[i - 2]]
        x = jump(x, times[i], times[i + 1], extrapolate(past, times[i - 2:i + 2]))
    assert torch.allclose(x, fine(8), atol=1e-5)


def test_a_solver_follows_the_rules_of_its_own_name(monkeypatch):
    "CONTRIBUTING.md: a name in SOLVERS, its rules in RULES, and nothing else."
    asked = []

    def middle(past, times):
        asked.append(len(times))
        return (past[0] + past[1]) / 2
    monkeypatch.setitem(SOLVERS, "mine", 1)
    monkeypatch.setitem(RULES, "mine", (RULES["euler"][0], middle))
    x, times = torch.randn(3, 2, dtype=f64), torch.tensor([5., 2., 1., .3], dtype=f64)
    got, expected, past = solve(GAUSS.D, x, times, method="mine"), x, []
    for i in range(3):
        past = [GAUSS.D(expected, times[i]), *past][:2]
        expected = jump(expected, times[i], times[i + 1], sum(past) / len(past))
    assert torch.equal(got, expected) and asked == [3, 3]
    assert not torch.equal(got, solve(GAUSS.D, x, times, method="dpmpp_2m"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("end", [0., .002])
def test_nfe_counts_the_evaluations(solver, end):
    calls, times = [], torch.tensor([80., 5., 1., .1, end])

    def D(x, t, y=None):
        calls.append(t)
        return GAUSS.D(x, t)
    assert torch.isfinite(solve(D, 80 * torch.randn(3, 2), times, method=solver)).all()
    assert nfe(solver, times) == len(calls)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_with_times_of_their_own_are_solved_as_if_alone(solver):
    x = torch.randn(3, 2, dtype=f64)
    times = torch.tensor([[5., 3., 2.], [1., 2., 1.5], [.5, .1, 1.], [.1, .05, .9]], dtype=f64)
    together = solve(GAUSS.D, x, times, method=solver, above_zero=True)
    for b in range(3):
        alone = solve(GAUSS.D, x[b:b + 1], times[:, b], method=solver)
        torch.testing.assert_close(together[b:b + 1], alone)


def test_names_of_0_1_are_accepted_and_unknown_ones_refused():
    x, times = torch.randn(3, 2), torch.tensor([5., 2., 1., .3, .1])
    for old, new in OLD_NAMES.items():
        assert solver_name(old) == new
        assert torch.equal(solve(GAUSS.D, x, times, method=old), solve(GAUSS.D, x, times, method=new))
    for bad in ("unipc2", "rk4", None):
        with pytest.raises(ValueError, match=f"must be one of ctm, {', '.join(SOLVERS)}, got {bad!r}"):
            solver_name(bad, also=("ctm",))


def test_correctors_against_their_definition(monkeypatch):
    "benchmarks/unipc.py: every point but the last is corrected with what was seen there, no evaluation is repeated."
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from unipc import solve_unipc
    times, evaluated = torch.tensor([3., 2.5, 1.4, 1.1, .8, .4], dtype=f64), []

    def D(x, t, y=None):
        evaluated.append(float(t))
        return GAUSS.D(x, t)
    x0 = torch.randn(1, 2, dtype=f64, generator=torch.Generator().manual_seed(0))
    for points in (2, 3):
        evaluated.clear()
        stops, expected = [], []
        got = solve_unipc(D, x0, times, points=points, callback=lambda i, x: stops.append((i, x)))
        assert evaluated == times[:-1].tolist()
        x, before, past = x0, None, []
        for i in range(5):
            past = [GAUSS.D(x, times[i]), *past][:points]
            if i:
                x = jump(before, times[i - 1], times[i], mean_over_step(past, -times.log(), i))
                expected.append(x)
            before, x = x, jump(x, times[i], times[i + 1], extrapolate(past, times[i + 1 - len(past):i + 2]))
        assert torch.allclose(got, x, atol=1e-6) and [i for i, _ in stops] == list(range(5))
        assert torch.allclose(torch.stack([v for _, v in stops]), torch.stack([*expected, x]), atol=1e-6)


def mean_over_step(past, lam, i):
    "Of the polynomial through the last points, over step i - 1, by quadrature; of two points the middle."
    n = len(past)
    if n < 3: return (past[0] + past[1]) / 2
    tau = torch.linspace(float(lam[i - 1]), float(lam[i]), 4001, dtype=f64)
    nodes = lam[i + 1 - n:i + 1].flip(0)

    def basis(a):
        return torch.stack([(tau - nodes[b]) / (nodes[a] - nodes[b]) for b in range(n) if b != a]).prod(0)
    total = torch.trapezoid(tau.exp(), tau)
    return sum(torch.trapezoid(basis(a) * tau.exp(), tau) / total * past[a] for a in range(n))
