"""The traps of the distillation step."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.distill import GradientSets, adaptive_weight, add_ctm_dsm, ctm_dsm_objective, ctm_loss, ctm_pair, draw_indices, draw_k, dsm_loss, dsm_sigma, l2, pseudo_huber, teacher_jump
from ctm_nb.method.flow import grid_time
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.solvers import solve
from ctm_nb.method.flow import rho_grid, toy_mixture
from ctm_nb.networks.unet import DDPMpp
from ctm_nb.method.trajectory import CTM, student_from

GEN = lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def trio():
    "Teacher, student and average with weights that say something."
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(8, 1, 10, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,)))
    for p in teacher.parameters(): p.data.add_(.1 * torch.randn_like(p))
    student = student_from(teacher)
    for p in student.parameters(): p.data.add_(.02 * torch.randn_like(p))
    return teacher.requires_grad_(False), student, copy.deepcopy(student).requires_grad_(False)


def example(B=4, k=5, N=18):
    i, j = draw_indices(B, k, N, GEN())
    t, u, s = (grid_time(v, N).float() for v in (i, i + k, j))
    return torch.randn(B, 1, 8, 8, generator=GEN(1)) * (1 + t.view(-1, 1, 1, 1)), i, k, t, u, s, torch.arange(B) % 10


@pytest.mark.parametrize("B", [1, 4])
def test_gradient_flows_through_the_frozen_map_only(trio, B):
    teacher, student, target = trio
    x_t, i, k, t, u, s, y = example(B)
    x_u, n = teacher_jump(teacher.D, x_t, i, k, 18, y)
    assert n == 2 * k and not x_u.requires_grad
    estimate, goal = ctm_pair(student, target, x_t, x_u, t, u, s, y)
    assert estimate.requires_grad and not goal.requires_grad
    ctm_loss(student, target, x_t, x_u, t, u, s, y).mean().backward()
    assert all(p.grad is None for p in [*target.parameters(), *teacher.parameters()])
    assert student.net.last_layer.grad.abs().max() > 0


def test_gradient_is_that_of_the_whole_estimate(trio):
    "Through the frozen map, not around it: compared with a finite difference."
    _, student, target = (m.double() for m in trio)
    x_t, i, k, t, u, s, y = example()
    x_t, t, u, s = (v.double() for v in (x_t, t, u, s))
    w, h = student.net.last_layer, 1e-5
    d = torch.randn(w.shape, generator=GEN(3), dtype=w.dtype)
    estimate, goal = ctm_pair(student, target, x_t, .9 * x_t, t, u, s, y)
    slope = (torch.autograd.grad((estimate - goal).square().mean(), w)[0] * d).sum()
    def loss(step):
        with torch.no_grad():
            w.add_(step * d)
            e, _ = ctm_pair(student, target, x_t, .9 * x_t, t, u, s, y)
            w.sub_(step * d)
        return (e - goal).square().mean()
    torch.testing.assert_close(slope, (loss(h) - loss(-h)) / (2 * h), rtol=1e-4, atol=0)


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("distance", [l2, pseudo_huber])
def test_the_cheap_step_has_the_plain_steps_gradient(B, labelled, distance):
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(8, 1, 10 * labelled, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,)))
    for p in teacher.parameters(): p.data.add_(.1 * torch.randn_like(p))
    student = student_from(teacher)
    target = copy.deepcopy(student).requires_grad_(False)
    x_t, i, k, t, u, s, y = example(B)
    y = y if labelled else None
    x0, sigma, eps, x_u = torch.rand(B, 1, 8, 8), torch.linspace(.1, 5, B), torch.randn(B, 1, 8, 8), .9 * x_t
    ctm, dsm = ctm_loss(student, target, x_t, x_u, t, u, s, y, distance).mean(), dsm_loss(student, x0, sigma, eps, y).mean()
    lam = adaptive_weight(ctm, dsm, student.net.last_layer)
    plain = torch.autograd.grad(ctm + lam * dsm, list(student.parameters()))
    out = ctm_dsm_objective(student, target, x_t, x_u, t, u, s, x0, sigma, eps, y, distance)
    cheap = torch.autograd.grad(out["objective"], list(student.parameters()))
    torch.testing.assert_close(torch.stack([out["loss_ctm"], out["loss_dsm"], out["lambda_dsm"]]), torch.stack([ctm, dsm, lam]).detach(), rtol=1e-3, atol=1e-6)
    scale = torch.cat([g.flatten() for g in plain]).abs().max()
    for a, b in zip(cheap, plain): torch.testing.assert_close(a / scale, b / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("N", [18, 40])
def test_indices_cover_their_range_and_no_more(k, N):
    i, j = draw_indices(20000, k, N, GEN())
    assert i.min() == 0 and i.max() == N - 1 - k and (j >= i + k).all() and j.max() == N - 1
    first = j[i == i.max()]
    assert (first == N - 1).all()  # one choice left


def test_k_is_drawn_in_proportion():
    gen = GEN()
    counts = torch.bincount(torch.tensor([draw_k(4, gen) for _ in range(20000)]), minlength=5)[1:] / 20000
    torch.testing.assert_close(counts, torch.tensor([.1, .2, .3, .4]), atol=.015, rtol=0)


def test_grid_matches_and_last_time_is_the_smallest():
    torch.testing.assert_close(grid_time(torch.arange(40), 40), rho_grid(40), rtol=1e-10, atol=0)
    assert grid_time(torch.tensor(17), 18).float() >= .002 * (1 - 1e-6)


@pytest.mark.parametrize("method, max_evals, expected", [("heun", None, 12), ("dpmpp_2m", None, 6), ("dpmpp_2m", 4, 4), ("heun", 4, 4), ("dpmpp_2m", 1, 1), ("heun", 1, 2)])
def test_evaluations_are_counted_as_made(trio, method, max_evals, expected):
    calls, (teacher, *_) = [], trio
    x_t, i, k, *_, y = example(k=6)
    def D(x, t, y): calls.append(1); return teacher.D(x, t, y)
    _, n = teacher_jump(D, x_t, i, k, 18, y, method, max_evals)
    assert n == len(calls) == expected


def test_finer_stretches_come_closer_to_the_flow():
    toy = toy_mixture()
    i = torch.full((300,), 6)
    t, u = grid_time(i, 18), grid_time(i + 6, 18)
    x_t = toy.sample(300, seed=0).double() + t[:, None] * torch.randn(300, 2, generator=GEN(), dtype=torch.float64)
    exact = toy.flow(x_t, t, u)
    gap = lambda m, n: float((teacher_jump(toy.D, x_t, i, 6, 18, None, m, n)[0] - exact).norm(dim=1).median())
    assert gap("dpmpp_2m", None) < gap("dpmpp_2m", 3) < gap("dpmpp_2m", 1) and gap("heun", None) < gap("heun", 4) < gap("heun", 2)


def test_dsm_is_the_teachers_loss_at_the_start(trio):
    teacher, *_ = trio
    student = student_from(teacher)
    x0, sigma = torch.rand(6, 1, 8, 8) * 2 - 1, dsm_sigma(torch.randn(6, generator=GEN()), torch.rand(6, generator=GEN()))
    eps, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    torch.testing.assert_close(dsm_loss(student, x0, sigma, eps, y), dsm_loss(teacher, x0, sigma, eps, y), rtol=1e-4, atol=1e-6)


def test_weight_balances_the_last_layer(trio):
    teacher, student, target = trio
    x_t, i, k, t, u, s, y = example()
    x_u, _ = teacher_jump(teacher.D, x_t, i, k, 18, y)
    a = ctm_loss(student, target, x_t, x_u, t, u, s, y, pseudo_huber).mean()
    b = dsm_loss(student, torch.rand(4, 1, 8, 8), torch.full((4,), .5), torch.randn(4, 1, 8, 8), y).mean()
    lam, w = adaptive_weight(a, b, student.net.last_layer), student.net.last_layer
    norm = lambda loss: torch.autograd.grad(loss, w, retain_graph=True)[0].norm()
    torch.testing.assert_close(norm(lam * b), norm(a), rtol=1e-2, atol=0)


def test_no_overflow_at_the_ends(trio):
    _, student, _ = trio
    x = 80 * torch.randn(4, 1, 8, 8)
    for t, s in ((80., 80.), (80., .002), (80., 0.), (.002, .002), (.002, 0.)):
        assert torch.isfinite(student.G(x, t, s, torch.arange(4))).all()


def test_solver_rows_are_independent(trio):
    teacher, *_ = trio
    x, times = 5 * torch.randn(3, 1, 8, 8), torch.tensor([[5., 3., 1.], [2., 1., .5], [.5, .2, .01]])
    y = torch.arange(3)
    for method in ("euler", "heun", "dpmpp_2m"):
        whole, one = solve(teacher.D, x, times, y, method), solve(teacher.D, x[1:2], times[:, 1], y[1:2], method)
        torch.testing.assert_close(whole[1:2], one, rtol=1e-4, atol=1e-4)


# ---- one step of the reference implementation, number by number

@pytest.fixture(scope="module")
def golden():
    "Networks, inputs and outputs of the file."
    z = np.load(Path(__file__).parents[1] / "golden" / "ctm_dsm_step_8.npz")
    def model(prefix, cls, **kw):
        m = cls(DDPMpp(8, 3, 10, model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,), **kw)).eval()
        m.net.load_state_dict({k.removeprefix(f"{prefix}.model."): torch.from_numpy(z[k]).float() for k in z.files if k.startswith(prefix + ".")})
        return m.requires_grad_(prefix == "student")
    io = {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("io.")}
    norms = {k.removeprefix("gradnorm.model."): float(z[k]) for k in z.files if k.startswith("gradnorm.")}
    return model("teacher", Denoiser, augment_dim=9), model("student", CTM, s_branch=True), model("target", CTM, s_branch=True), io, norms


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
    estimate, goal = ctm_pair(student, target, *(e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")))
    assert off(e["x_u"], io["x_u"]) < 1e-4 and off(estimate, io["estimate"]) < 1e-4 and off(goal, io["target"]) < 1e-4
    ctm, dsm = l2(estimate, goal), dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"])
    assert float((ctm.detach() / io["ctm_loss_l2"] - 1).abs().max()) < 1e-4 and off(dsm, io["dsm_loss"]) < 1e-4  # each sample
    assert off(adaptive_weight(ctm.mean(), dsm.mean(), student.net.last_layer), io["adaptive_weight_dsm"]) < 1e-3


@pytest.mark.parametrize("way", ["plain", "at once", "in parts"])
def test_golden_norm_of_every_gradient(golden, way):
    teacher, student, target, io, norms = golden
    e = golden_example(teacher, io)
    student.zero_grad(set_to_none=True)
    if way == "plain":
        ctm, dsm = ctm_loss(student, target, *(e[k] for k in ("x_t", "x_u", "t", "u", "s", "y"))).mean(), dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"]).mean()
        (ctm + adaptive_weight(ctm, dsm, student.net.last_layer) * dsm).backward()
    elif way == "at once": ctm_dsm_objective(student, target, **e)["objective"].backward()
    else:
        sets, B = GradientSets(student.parameters(), student.net.last_layer), len(e["y"])
        for rows in torch.arange(B).tensor_split(3): add_ctm_dsm(sets, student, target, **{k: v[rows] for k, v in e.items()}, share=len(rows) / B)
        sets.combine()
    mine = {n: float(p.grad.norm()) for n, p in student.net.named_parameters() if p.grad is not None}
    assert norms.keys() == mine.keys() and len(norms) > 100
    for name, norm in norms.items(): assert abs(mine[name] - norm) < 1e-3 * norm + 1e-7, (name, mine[name], norm)
