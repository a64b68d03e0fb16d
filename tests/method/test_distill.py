"""The CTM loss: its times, its gradient, its limits, and the published step number by number."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.balance import BalancedGradients
from ctm_nb.method.distances import l2, pseudo_huber
from ctm_nb.method.distill import (
    MovingRows,
    ctm_loss,
    ctm_pair,
    draw_indices,
    draw_interval,
    draw_k,
    dsm_loss,
    dsm_sigma,
    interval_times,
    solve_interval,
    step_losses,
)
from ctm_nb.method.flow import grid_time, rho_grid, toy_mixture
from ctm_nb.method.solvers import SOLVERS, solve
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import CTM, student_from
from ctm_nb.networks.unet import DDPMpp

from formulas import adaptive_weight

SIDES = ("x_t", "x_u", "t", "u", "s", "y")  # arguments of `ctm_pair`


def GEN(seed=0): return torch.Generator().manual_seed(seed)


def teacher_jump(D, x_t, i, k, N, y=None, method="heun", max_evals=None):
    "The teacher's solution and its NFE."
    times = interval_times(i, k, N, method, max_evals)
    return solve_interval(D, x_t, times, y, method), (len(times) - 1) * SOLVERS[method]


def models(dropout=0., dtype=torch.float64, n_classes=10, channels=1):
    "Teacher, student and EMA, none of them trivial."
    torch.manual_seed(0)
    small = dict(model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,))
    net = DDPMpp(8, channels, n_classes, dropout=dropout, **small)
    teacher = Denoiser(net).eval().requires_grad_(False)
    for p in teacher.parameters(): p.add_(.1 * torch.randn_like(p))
    student = student_from(teacher).eval()
    for p in student.parameters(): p.data.add_(.03 * torch.randn_like(p))
    target = copy.deepcopy(student).requires_grad_(False)
    for p in target.parameters(): p.add_(.01 * torch.randn_like(p))
    return tuple(m.to(dtype) for m in (teacher, student, target))


def example(B=8, dtype=torch.float64, labelled=True, channels=1, matching="soft"):
    "Arguments of `step_losses`."
    i, k, j = draw_interval(B, 18, 17, GEN(3), matching)
    t, u, s = (grid_time(v, 18).to(dtype) for v in (i, i + k, j))
    picture = lambda seed: torch.randn(B, channels, 8, 8, generator=GEN(seed), dtype=dtype)
    level = lambda v: v.view(-1, 1, 1, 1)
    x_t, x_u, x0 = picture(1) * (1 + level(t)), picture(2) * (1 + level(u)), picture(4).tanh()
    y, sigma = torch.arange(B) % 10 if labelled else None, torch.linspace(.1, 20, B, dtype=dtype)
    return dict(x_t=x_t, x_u=x_u, t=t, u=u, s=s, x0=x0, sigma=sigma, eps=picture(5), y=y)


def rows(e, part): return {k: None if v is None else v[part] for k, v in e.items()}


def sides(e): return [e[k] for k in SIDES]


def relative(a, b): return float((a - b).detach().norm() / b.detach().norm())


# ---- times

@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("N", [18, 40])
def test_indices_cover_their_range_and_no_more(k, N):
    i, j = draw_indices(20000, k, N, GEN())
    assert i.min() == 0 and i.max() == N - 1 - k and (j >= i + k).all() and j.max() == N - 1
    first = j[i == i.max()]
    assert (first == N - 1).all()  # one choice left


def test_k_is_drawn_in_proportion():
    gen = GEN()
    counts = torch.bincount(torch.tensor([draw_k(4, gen) for _ in range(6000)]), minlength=5)[1:] / 6000
    torch.testing.assert_close(counts, torch.tensor([.1, .2, .3, .4]), atol=.02, rtol=0)


def test_grid_matches_and_last_time_is_the_smallest():
    torch.testing.assert_close(grid_time(torch.arange(40), 40), rho_grid(40), rtol=1e-10, atol=0)
    assert grid_time(torch.tensor(17), 18).float() >= .002 * (1 - 1e-6)


@pytest.mark.parametrize("matching", ["soft", "local", "global"])
def test_matching_places_u(matching):
    for seed in range(20):
        i, k, j = draw_interval(64, 18, 17, GEN(seed), matching)
        k = torch.as_tensor(k)
        assert (i + k <= j).all() and (i >= 0).all() and (j < 18).all() and (k >= 1).all()
        if matching == "local": assert (k == 1).all()
        if matching == "global": assert torch.equal(i + k, j)
    soft, whole = (draw_interval(64, 18, 17, GEN(1), m) for m in ("soft", "global"))
    assert torch.equal(soft[0], whole[0]) and torch.equal(soft[2], whole[2])  # the same pairs (t, s)


# ---- the teacher's solver interval

COUNTS = [("heun", None, 12), ("heun", 4, 4), ("heun", 1, 2), ("dpmpp_2m", None, 6), ("dpmpp_2m", 4, 4),
          ("dpmpp_2m", 1, 1)]


@pytest.mark.parametrize("method, max_evals, expected", COUNTS)
def test_evaluations_are_counted_as_made(method, max_evals, expected):
    calls, e, i = [], example(4), torch.arange(4)
    teacher = models()[0]
    def D(x, t, y): return calls.append(1) or teacher.D(x, t, y)
    x_u, n = teacher_jump(D, e["x_t"], i, 6, 18, e["y"], method, max_evals)
    assert n == len(calls) == expected and not x_u.requires_grad


def test_finer_intervals_come_closer_to_the_flow():
    toy = toy_mixture()
    i = torch.full((300,), 6)
    t, u = grid_time(i, 18), grid_time(i + 6, 18)
    x_t = toy.sample(300, seed=0).double() + t[:, None] * torch.randn(300, 2, generator=GEN(), dtype=torch.float64)
    exact = toy.flow(x_t, t, u)
    gap = lambda m, n: float((teacher_jump(toy.D, x_t, i, 6, 18, None, m, n)[0] - exact).norm(dim=1).median())
    assert gap("dpmpp_2m", None) < gap("dpmpp_2m", 3) < gap("dpmpp_2m", 1)
    assert gap("heun", None) < gap("heun", 4) < gap("heun", 2)


def test_solver_rows_are_independent():
    teacher = models(dtype=torch.float32)[0]
    x, times = 5 * torch.randn(3, 1, 8, 8), torch.tensor([[5., 3., 1.], [2., 1., .5], [.5, .2, .01]])
    y = torch.arange(3)
    for method in ("euler", "heun", "dpmpp_2m"):
        whole, one = solve(teacher.D, x, times, y, method), solve(teacher.D, x[1:2], times[:, 1], y[1:2], method)
        torch.testing.assert_close(whole[1:2], one, rtol=1e-4, atol=1e-4)


def test_global_target_is_the_teachers_answer():
    teacher, student, target = models()
    i, k, j = draw_interval(8, 18, 17, GEN(5), "global")
    e = example(matching="global")
    x_u, n = teacher_jump(teacher.D, e["x_t"], i, k, 18, e["y"], "dpmpp_2m")
    assert n == k.max()
    u = grid_time(j, 18)
    torch.testing.assert_close(ctm_pair(student, target, e["x_t"], x_u, e["t"], u, u, e["y"], "s")[1], x_u)
    way = torch.linspace(0, 1, int(k.max()) + 1, dtype=torch.float64)
    for b in range(3):  # every row as if it were alone, with the same number of steps
        alone = solve(teacher.D, e["x_t"][b:b + 1], grid_time(i[b] + way * k[b], 18), e["y"][b:b + 1], "dpmpp_2m")
        torch.testing.assert_close(x_u[b:b + 1], alone, rtol=1e-8, atol=1e-10)


# ---- the loss and its gradient

@pytest.mark.parametrize("B", [1, 4])
def test_gradient_flows_through_the_frozen_map_only(B):
    teacher, student, target = models()
    e = example(B)
    estimate, goal = ctm_pair(student, target, *sides(e))
    assert estimate.requires_grad and not goal.requires_grad
    ctm_loss(student, target, *sides(e)).mean().backward()
    assert all(p.grad is None for p in [*target.parameters(), *teacher.parameters()])
    assert student.net.last_layer.grad.abs().max() > 0


def test_gradient_is_that_of_the_whole_estimate():
    "Through the frozen map, not around it: compared with a finite difference."
    _, student, target = models()
    e, w, h = example(), student.net.last_layer, 1e-5
    d = torch.randn(w.shape, generator=GEN(3), dtype=w.dtype)
    goal = ctm_pair(student, target, *sides(e))[1]
    loss = lambda: (ctm_pair(student, target, *sides(e))[0] - goal).square().mean()  # the target stands still
    slope = (torch.autograd.grad(loss(), w)[0] * d).sum()
    def moved(step):
        with torch.no_grad():
            w.add_(step * d)
            value = loss()
            w.sub_(step * d)
        return value
    torch.testing.assert_close(slope, (moved(h) - moved(-h)) / (2 * h), rtol=1e-4, atol=0)


def test_no_grad_around_the_frozen_map_would_teach_nothing():
    _, student, target = models()
    e = example()
    x_s = student.G(e["x_t"], e["t"], e["s"], e["y"])
    with torch.no_grad(): cut = target.G(x_s, e["s"], torch.full_like(e["s"], .002), e["y"])
    assert not cut.requires_grad  # the classical mistake: nothing flows
    estimate, goal = ctm_pair(student, target, *sides(e))
    torch.testing.assert_close(cut, estimate.detach())  # the same numbers
    (estimate - goal).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in student.net.dec.parameters())
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("compare_at", ["end", "s"])
def test_the_gradient_is_that_of_a_constant_target(compare_at):
    "Were the target's branch differentiated too, as by a deleted `no_grad`, the gradient would be another one."
    _, student, target = models()
    e = example()
    estimate, goal = ctm_pair(student, target, *sides(e), compare_at)
    assert estimate.requires_grad and not goal.requires_grad and goal.grad_fn is None
    loss = ctm_loss(student, target, *sides(e), compare_at=compare_at).sum()
    mine, = torch.autograd.grad(loss, student.net.last_layer)
    constant, = torch.autograd.grad(l2(estimate, goal.clone()).sum(), student.net.last_layer, retain_graph=True)
    leaking = student.G(e["x_u"], e["u"], e["s"], e["y"])
    if compare_at == "end": leaking = target.G(leaking, e["s"], torch.full_like(e["s"], .002), e["y"])
    torch.testing.assert_close(leaking.detach(), goal)
    both, = torch.autograd.grad(l2(estimate, leaking).sum(), student.net.last_layer)
    assert relative(mine, constant) < 1e-9 and relative(both, constant) > 1e-3


def test_compare_at_s_leaves_the_ema_out():
    _, student, target = models()
    e = example()
    a = ctm_loss(student, target, *sides(e), compare_at="s")
    for p in target.parameters(): p.mul_(2.)
    assert torch.equal(a, ctm_loss(student, target, *sides(e), compare_at="s"))
    assert not torch.equal(a, ctm_loss(student, target, *sides(e)))
    estimate = student.G(e["x_t"], e["t"], e["s"], e["y"])
    torch.testing.assert_close(a, l2(estimate, student.G(e["x_u"], e["u"], e["s"], e["y"])))
    with pytest.raises(ValueError, match="compare_at must be end or s, got 'u'"):
        ctm_loss(student, target, *sides(e), compare_at="u")


def test_s_equal_t_gives_the_denoiser():
    teacher, other, _ = models()
    student, e = student_from(teacher).double(), example()
    x, t, y = (e[k] for k in ("x_t", "t", "y"))
    torch.testing.assert_close(student.g(x, t, t, y), teacher.D(x, t, y))
    assert torch.equal(other.D(x, t, y), other.g(x, t, t, y))  # one that is conditioned on s already
    assert relative(other.g(x, t, t / 2, y), other.D(x, t, y)) > 1e-4
    assert torch.equal(student.G(x, t, t, y), x)


def test_no_overflow_at_the_ends():
    _, student, _ = models(dtype=torch.float32)
    x = 80 * torch.randn(4, 1, 8, 8)
    for t, s in ((80., 80.), (80., .002), (80., 0.), (.002, .002), (.002, 0.)):
        assert torch.isfinite(student.G(x, t, s, torch.arange(4))).all()


# ---- rows that stay, and dropout

@pytest.mark.parametrize("still", [[], [1, 4, 6], list(range(8))])
def test_the_network_is_evaluated_in_moving_rows_only(still, monkeypatch):
    _, _, target = models()
    e, seen = example(), []
    stays = torch.isin(torch.arange(8), torch.tensor(still, dtype=torch.int64))
    e["t"] = torch.where(stays, e["s"], e["t"] * 1.5)
    x, z = (e["x_t"].clone().requires_grad_() for _ in range(2))
    expect, G = target.G(x, e["t"], e["s"], e["y"]), target.G
    monkeypatch.setattr(target, "G", lambda x, *a: seen.append(len(x)) or G(x, *a))
    got = MovingRows(target).G(z, e["t"], e["s"], e["y"])
    torch.testing.assert_close(got, expect)
    assert seen == ([8 - len(still)] if len(still) < 8 else []) and torch.equal(got[still], z[still])
    weights = torch.linspace(1, 2, 8, dtype=x.dtype).view(-1, 1, 1, 1)
    for v in (expect, got): (v * weights).sin().sum().backward()
    torch.testing.assert_close(z.grad, x.grad)


def test_half_of_the_second_jumps_are_not_made():
    _, student, target = models()
    seen = {"student": 0, "target": 0}
    def count(name): return lambda net, args: seen.__setitem__(name, seen[name] + len(args[0]))
    for name, m in (("student", student), ("target", target)): m.net.register_forward_pre_hook(count(name))
    e = example()
    losses = step_losses(student, target, **e, dsm=False)
    again, moves = int((e["u"] > e["s"]).sum()), int((e["s"] > .0020001).sum())
    assert seen == {"student": 8 + again, "target": 2 * moves} and 0 < again < 8 and 0 < moves < 8
    torch.testing.assert_close(losses["ctm"], step_losses(student, target, **e, dsm=False, skip=False)["ctm"])


@pytest.mark.parametrize("labelled", [True, False])
def test_denoising_of_one_row_in_two(labelled):
    "It sees those rows and their labels; the jumps are those of the whole batch."
    _, student, target = models(n_classes=10 if labelled else 0)
    e = example(labelled=labelled)
    few, whole, part = (step_losses(student, target, **v, dsm_rows=k) for v, k in
                        ((e, 2), (e, 1), (rows(e, slice(None, None, 2)), 1)))
    torch.testing.assert_close(few["dsm"], part["dsm"])
    assert torch.equal(few["ctm"], whole["ctm"]) and relative(few["dsm"], whole["dsm"]) > 1e-3


def test_each_side_draws_its_own_dropout():
    "With u = t and x_u = x_t the two sides are one function of one input, but for the units that they drop."
    _, student, target = models(dropout=.5)
    e = example()
    e["x_u"], e["u"] = e["x_t"], e["t"]
    assert ctm_loss(student, target, *sides(e)).detach().abs().max() < 1e-20
    for m in (student, target):  # the jump of either is enough to tell them apart
        m.train()
        assert ctm_loss(student, target, *sides(e)).detach().max() > 1e-6
        m.eval()
    denoised = lambda: dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"])
    assert torch.equal(denoised(), denoised())
    student.train()
    assert (denoised() != denoised()).all()


# ---- DSM

def test_dsm_is_the_teachers_loss_at_the_start():
    teacher, *_ = models(dtype=torch.float32)
    student = student_from(teacher)
    sigma = dsm_sigma(torch.randn(6, generator=GEN()), torch.rand(6, generator=GEN()))
    inputs = torch.rand(6, 1, 8, 8) * 2 - 1, sigma, torch.randn(6, 1, 8, 8), torch.arange(6)
    torch.testing.assert_close(dsm_loss(student, *inputs), dsm_loss(teacher, *inputs), rtol=1e-4, atol=1e-6)


# ---- one step of the reference implementation, number by number

@pytest.fixture(scope="module")
def golden():
    "Networks, inputs and outputs of the file."
    z = np.load(Path(__file__).parents[1] / "golden" / "ctm_dsm_step_8.npz")
    def model(prefix, cls, **kw):
        m = cls(DDPMpp(8, 3, 10, model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,), **kw)).eval()
        names = {k: k.removeprefix(f"{prefix}.model.") for k in z.files if k.startswith(prefix + ".")}
        m.net.load_state_dict({name: torch.from_numpy(z[k]).float() for k, name in names.items()})
        return m.requires_grad_(prefix == "student")
    io = {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("io.")}
    norms = {k.removeprefix("gradnorm.model."): float(z[k]) for k in z.files if k.startswith("gradnorm.")}
    student, target = (model(name, CTM, s_branch=True) for name in ("student", "target"))
    return model("teacher", Denoiser, augment_dim=9), student, target, io, norms


def off(a, b): return float((a.detach() - b).norm() / b.norm())


def golden_example(teacher, io):
    k, i = int(io["num_heun_steps"]), io["t_index"]
    t, u, s = (grid_time(v, 18).float() for v in (i, i + k, io["s_index"]))
    x_t = io["x0"] + t.view(-1, 1, 1, 1) * io["noise"]
    x_u, n = teacher_jump(teacher.D, x_t, i, k, 18, io["y"])
    assert n == 2 * k
    return dict(x_t=x_t, x_u=x_u, t=t, u=u, s=s, x0=io["x0"], sigma=io["dsm_sigma"], eps=io["dsm_noise"], y=io["y"])


def test_golden_numbers_of_the_step(golden):
    teacher, student, target, io, _ = golden
    e = golden_example(teacher, io)
    estimate, goal = ctm_pair(student, target, *sides(e))
    assert off(e["x_u"], io["x_u"]) < 1e-4 and off(estimate, io["estimate"]) < 1e-4 and off(goal, io["target"]) < 1e-4
    ctm, dsm = l2(estimate, goal), dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"])
    assert float((ctm.detach() / io["ctm_loss_l2"] - 1).abs().max()) < 1e-4  # each row
    assert off(dsm, io["dsm_loss"]) < 1e-4
    assert off(adaptive_weight(ctm.mean(), dsm.mean(), student.net.last_layer), io["adaptive_weight_dsm"]) < 1e-3


@pytest.mark.parametrize("micro_batches", [None, 1, 3])
def test_golden_norm_of_every_gradient(golden, micro_batches):
    "None: the formula as it stands, without `BalancedGradients`."
    teacher, student, target, io, norms = golden
    e = golden_example(teacher, io)
    student.zero_grad(set_to_none=True)
    if micro_batches is None:
        ctm = ctm_loss(student, target, *sides(e)).mean()
        dsm = dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"]).mean()
        (ctm + adaptive_weight(ctm, dsm, student.net.last_layer) * dsm).backward()
    else:
        gradients, B = BalancedGradients(student.parameters(), student.net.last_layer), len(e["y"])
        for part in torch.arange(B).tensor_split(micro_batches):
            gradients.add(step_losses(student, target, **rows(e, part)), len(part) / B)
        numbers = gradients.combine()
        assert off(numbers["lambda_dsm"], io["adaptive_weight_dsm"]) < 1e-3
    mine = {n: float(p.grad.norm()) for n, p in student.net.named_parameters() if p.grad is not None}
    assert norms.keys() == mine.keys() and len(norms) > 100
    for name, norm in norms.items(): assert abs(mine[name] - norm) < 1e-3 * norm + 1e-7, (name, mine[name], norm)


def test_distances_agree_on_which_side_is_wrong():
    "A student off by 5 % is found out by every distance at both places."
    toy = toy_mixture()
    i, j = draw_indices(100, 6, 18, GEN(2))
    t, u, s = grid_time(i, 18), grid_time(i + 6, 18), grid_time(j, 18)
    x_t = toy.sample(100, seed=5) + t[:, None] * torch.randn(100, 2, generator=GEN(), dtype=torch.float64)
    x_u = toy.flow(x_t, t, u)
    class Wrong:
        def G(self, x, t, s, y=None): return toy.G(x, t, s) + .05 * (1 - s / t)[:, None] * toy.g(x, t, s)
    for compare_at in ("end", "s"):
        for d in (l2, pseudo_huber):
            right = ctm_loss(toy, toy, x_t, x_u, t, u, s, None, d, compare_at).mean()
            assert right < 1e-10 and ctm_loss(Wrong(), toy, x_t, x_u, t, u, s, None, d, compare_at).mean() > 1e-5
