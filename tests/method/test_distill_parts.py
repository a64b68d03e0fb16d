"""One batch, four micro-batches, two processes, a loss scaler, dropout: the same step."""
import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctm_nb.method.distill import (GradientSets, adaptive_weight, add_ctm_dsm, average, balance, bends, ctm_dsm_objective, ctm_loss, ctm_pair, ctm_target, draw_stretch, dsm_loss,
    l2, make_distance, move, project, pseudo_huber, stretch_times, teacher_jump)
from ctm_nb.method.flow import grid_time
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import DDPMpp, MLP
from ctm_nb.method.trajectory import student_from

GEN = lambda seed=0: torch.Generator().manual_seed(seed)


def models(dropout=0., dtype=torch.float64, n_classes=10, channels=1):
    "Teacher, student and average with weights that say something."
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(8, channels, n_classes, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,), dropout=dropout)).eval().requires_grad_(False)
    for p in teacher.parameters(): p.add_(.1 * torch.randn_like(p))
    student = student_from(teacher).eval()
    for p in student.parameters(): p.data.add_(.03 * torch.randn_like(p))
    target = copy.deepcopy(student).requires_grad_(False)
    for p in target.parameters(): p.add_(.01 * torch.randn_like(p))
    return tuple(m.to(dtype) for m in (teacher, student, target))


def example(B=8, dtype=torch.float64, labelled=True, channels=1, matching="soft"):
    i, k, j = draw_stretch(B, 18, 17, GEN(3), matching)
    t, u, s = (grid_time(v, 18).to(dtype) for v in (i, i + k, j))
    picture = lambda seed: torch.randn(B, channels, 8, 8, generator=GEN(seed), dtype=dtype)
    level = lambda v: v.view(-1, 1, 1, 1)
    return dict(x_t=picture(1) * (1 + level(t)), x_u=picture(2) * (1 + level(u)), t=t, u=u, s=s, x0=picture(4).tanh(), sigma=torch.linspace(.1, 20, B, dtype=dtype), eps=picture(5),
                y=torch.arange(B) % 10 if labelled else None)


def rows(e, part): return {k: None if v is None else v[part] for k, v in e.items()}


def grads(m): return torch.cat([p.grad.flatten() for p in m.parameters()])


def relative(a, b): return float((a - b).norm() / b.norm())


def whole_step(student, target, e, **kw):
    student.zero_grad(set_to_none=True)
    out = ctm_dsm_objective(student, target, **e, **kw)
    out.pop("objective").backward()
    return out, grads(student)


def step_in_parts(student, target, e, m, **kw):
    sets, B = GradientSets(student.parameters(), student.net.last_layer), len(e["x_t"])
    for part in torch.arange(B).tensor_split(m): add_ctm_dsm(sets, student, target, **rows(e, part), share=len(part) / B, **kw)
    return sets.combine(kw.get("scale", 1.)), grads(student)


@pytest.mark.parametrize("m, compare_at, distance, labelled", [(1, "end", l2, True), (4, "end", pseudo_huber, True), (3, "s", pseudo_huber, False), (8, "end", l2, False)])
def test_parts_make_the_whole(m, compare_at, distance, labelled):
    _, student, target = models(n_classes=10 * labelled)
    e = example(labelled=labelled)
    out, g = whole_step(student, target, e, distance=distance, compare_at=compare_at)
    parts, h = step_in_parts(student, target, e, m, distance=distance, compare_at=compare_at)
    assert out.keys() == parts.keys() == {"loss_ctm", "loss_dsm", "lambda_dsm"}
    for k in out: assert abs(parts[k] / out[k] - 1) < 1e-9, k
    assert relative(h, g) < 1e-9
    separate = torch.stack([whole_step(student, target, rows(e, [n]), distance=distance, compare_at=compare_at)[0]["lambda_dsm"] for n in range(8)]).mean()
    assert abs(separate / out["lambda_dsm"] - 1) > 1e-3  # the mean of norms would be something else


def test_a_third_loss_is_one_more_set_with_its_own_bounds():
    w = torch.nn.Parameter(torch.tensor([1., 2.]))
    sets = GradientSets([w], w)
    sets.add("ctm", 3 * w[0]); sets.add("dsm", w[1] * 6); sets.add("gan", w[1] * 1e-3)
    out = sets.combine(gan=(.01, 10.))
    torch.testing.assert_close(w.grad, torch.tensor([3., 6 * float(out["lambda_dsm"]) + .01]), atol=1e-5, rtol=1e-4)
    assert out["lambda_gan"] == 10. and abs(out["lambda_dsm"] - .5) < 1e-4
    sets.add("ctm", 3 * w[0]); sets.combine()
    torch.testing.assert_close(w.grad, torch.tensor([3., 0.]))  # nothing is left over


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_distill_parts import *
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
from ctm_nb.method.distill import average_gradients
_, student, target = models()
mine = rows(example(), torch.arange(8).tensor_split(2)[rank])
at_once, _ = whole_step(student, target, mine, distance=pseudo_huber)
average_gradients(student.parameters())
found = {"at_once": (at_once, grads(student)), "in_parts": step_in_parts(student, target, mine, 2, distance=pseudo_huber)}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    "2 processes x 4 samples (and x 2 micro-batches of 2) against 1 process x 8."
    _, student, target = models()
    out, g = whole_step(student, target, example(), distance=pseudo_huber)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    here = os.path.dirname(os.path.abspath(__file__))
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, here, str(r), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for w in workers: assert w.wait(120) == 0, w.stderr.read()
    for rank in range(2):
        for way, (numbers, h) in torch.load(tmp_path / f"{rank}.pt").items():
            for k in out: assert abs(numbers[k] / out[k] - 1) < 1e-6, (rank, way, k)
            assert relative(h, g) < 1e-6, (rank, way)


def test_average_is_nothing_in_one_process():
    a, b = torch.randn(3), torch.randn(2, 2)
    assert all(x is y for x, y in zip(average(a, b), (a, b)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_finds_the_same_balance(dtype):
    "With the scaler's factor the half step agrees with the full one; float16 without it loses its gradients."
    _, student, target = models(dtype=torch.float32)
    e = example(dtype=torch.float32)
    out, g = whole_step(student, target, e, distance=l2)
    def half(scale, way=whole_step):
        with torch.autocast("cpu", dtype=dtype):
            student.zero_grad(set_to_none=True)
            o = ctm_dsm_objective(student, target, **e, distance=l2, scale=scale)
        (o.pop("objective") * scale).backward()
        return o, grads(student) / scale
    o, h = half(torch.tensor(2. ** 14))
    close = .02 if dtype == torch.float16 else .1
    for k in out: assert abs(o[k] / out[k] - 1) < close, k
    assert relative(h, g) < 3 * close and o["lambda_dsm"].dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype): numbers, parts = step_in_parts(student, target, e, 2, distance=l2, scale=2. ** 14)
    assert abs(numbers["lambda_dsm"] / out["lambda_dsm"] - 1) < close and relative(parts / 2 ** 14, g) < 3 * close


def test_scale_changes_nothing_but_the_scale():
    _, student, target = models()
    e = example()
    (a, g), (b, h) = (step_in_parts(student, target, e, 2, scale=s) for s in (1., 1024.))
    assert all(abs(a[k] / b[k] - 1) < 1e-9 for k in a) and relative(h / 1024, g) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_stay_finite_at_80(dtype):
    teacher, student, target = models(dtype=torch.float32)
    e = example(dtype=torch.float32)
    e["t"][:], e["u"][:], e["s"][:] = 80., 80., 80. * torch.linspace(.000025, 1, 8)
    e["x_t"], e["x_u"], e["sigma"] = (80 * 4 * torch.ones(8, 1, 8, 8) * torch.tensor([1., -1.]).repeat(4).view(-1, 1, 1, 1)), -320 * torch.ones(8, 1, 8, 8), torch.tensor([.002, 80.] * 4)
    for m in (teacher, student, target): m.to(dtype)
    x = e["x_t"].to(dtype)
    for t, s in ((80., 80.), (80., .002), (80., 0.), (.002, .002)):
        assert torch.isfinite(student.G(x, t, s, e["y"])).all() and torch.isfinite(student.D(x, t, e["y"])).all()
    assert torch.isfinite(teacher_jump(teacher.D, x, torch.zeros(8, dtype=torch.long), 17, 18, e["y"])[0]).all()
    halves = {k: v.to(dtype) if v.is_floating_point() and k not in ("sigma",) else v for k, v in e.items()}
    for compare_at in ("end", "s"):
        out, g = whole_step(student, target, halves, compare_at=compare_at, scale=.01)
        assert all(torch.isfinite(v) for v in out.values()), (compare_at, out)
        assert out["loss_ctm"].dtype == torch.float32
    assert float(l2(halves["x_t"], halves["x_u"]).max()) == 640. ** 2


def test_dropout_is_the_same_in_both_student_passes():
    "With u = t and x_u = x_t the two sides are one function of one input, if the same units are dropped."
    _, student, target = models(dropout=.5)
    e = example()
    e["x_u"], e["u"] = e["x_t"], e["t"]
    student.train()
    args = [e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")]
    for _ in range(3): assert ctm_loss(student, target, *args).detach().abs().max() < 1e-20
    out, _ = whole_step(student, target, e)
    assert out["loss_ctm"] < 1e-20 and out["loss_dsm"] > 0
    numbers, _ = step_in_parts(student, target, e, 2)
    assert numbers["loss_ctm"] < 1e-20
    first, second = (student.G(e["x_t"], e["t"], e["s"], e["y"]) for _ in range(2))
    assert relative(first, second) > 1e-3  # dropout is on, and the passes of two steps do differ


def test_dropout_must_be_off_in_teacher_and_average():
    teacher, student, target = models(dropout=.5)
    e = example()
    with pytest.raises(ValueError, match="target must be in eval mode.*dropout 0.5"): ctm_dsm_objective(student, target.train(), **e)
    with pytest.raises(ValueError, match="teacher must be in eval mode"): teacher_jump(teacher.train().D, e["x_t"], torch.zeros(8, dtype=torch.long), 2, 18, e["y"])
    student.train(); target.eval()
    a, b = (ctm_target(target, target, e["x_u"], e["u"], e["s"], e["y"]) for _ in range(2))
    assert torch.equal(a, b)


def test_the_random_state_is_left_where_it_was():
    _, student, target = models(dropout=.5)
    e = example()
    student.train(); torch.manual_seed(7); expected = torch.rand(3); torch.manual_seed(7)
    ctm_target(student, target, e["x_u"], e["u"], e["s"], e["y"])
    assert torch.equal(torch.rand(3), expected)


def test_no_grad_around_the_frozen_map_would_teach_nothing():
    _, student, target = models()
    e = example()
    x_s = student.G(e["x_t"], e["t"], e["s"], e["y"])
    with torch.no_grad(): cut = target.G(x_s, e["s"], torch.full_like(e["s"], .002), e["y"])
    assert not cut.requires_grad  # the classical mistake: nothing flows
    estimate, goal = ctm_pair(student, target, *(e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")))
    torch.testing.assert_close(cut, estimate.detach())  # the same numbers
    (estimate - goal).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in student.net.dec.parameters()) and all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("compare_at", ["end", "s"])
def test_target_and_estimate_share_nothing_that_needs_grad(compare_at):
    _, student, target = models()
    e = example()
    args = [e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")]
    estimate, goal = ctm_pair(student, target, *args, compare_at)
    assert estimate.requires_grad and not goal.requires_grad and goal.grad_fn is None
    for p in student.parameters(): assert p.grad is None
    (goal.sum() + 0 * estimate.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_each_network_is_walked_back_once():
    "The balance costs the last layer and no more: activations of the first block see one gradient."
    _, student, target = models()
    seen, block = [], list(student.net.enc.values())[1]
    def watch(module, inputs, out):
        if out.requires_grad: out.register_hook(lambda g: seen.append(len(g)))
    hook = block.register_forward_hook(watch)
    whole_step(student, target, example())
    hook.remove()
    assert seen == [16]  # both losses in one pass, 2 B rows


@pytest.mark.parametrize("matching", ["soft", "local", "global"])
def test_matching_places_u(matching):
    for seed in range(20):
        i, k, j = draw_stretch(64, 18, 17, GEN(seed), matching)
        k = torch.as_tensor(k)
        assert (i + k <= j).all() and (i >= 0).all() and (j < 18).all() and (k >= 1).all()
        if matching == "local": assert (k == 1).all()
        if matching == "global": assert torch.equal(i + k, j)
    soft, glob = (draw_stretch(64, 18, 17, GEN(1), m) for m in ("soft", "global"))
    assert torch.equal(soft[0], glob[0]) and torch.equal(soft[2], glob[2])  # the same pairs (t, s)


def test_global_target_is_the_teachers_answer():
    teacher, student, target = models()
    i, k, j = draw_stretch(8, 18, 17, GEN(5), "global")
    e = example(matching="global")
    x_u, n = teacher_jump(teacher.D, e["x_t"], i, k, 18, e["y"], "dpmpp_2m")
    assert n == k.max()
    u = grid_time(j, 18)
    torch.testing.assert_close(ctm_target(student, target, x_u, u, u, e["y"], "s"), x_u)
    for b in range(3):  # every row as if it were alone, with the same number of steps
        steps = int(k.max())
        from ctm_nb.method.solvers import solve
        alone = solve(teacher.D, e["x_t"][b:b + 1], grid_time(i[b] + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * k[b], 18), e["y"][b:b + 1], "dpmpp_2m")
        torch.testing.assert_close(x_u[b:b + 1], alone, rtol=1e-8, atol=1e-10)


def test_compare_at_s_leaves_the_average_out():
    _, student, target = models()
    e = example()
    args = [e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")]
    a = ctm_loss(student, target, *args, compare_at="s")
    for p in target.parameters(): p.mul_(2.)
    assert torch.equal(a, ctm_loss(student, target, *args, compare_at="s"))
    assert not torch.equal(a, ctm_loss(student, target, *args))
    estimate = student.G(e["x_t"], e["t"], e["s"], e["y"])
    torch.testing.assert_close(a, l2(estimate, student.G(e["x_u"], e["u"], e["s"], e["y"])))


def test_s_equal_t_gives_the_denoiser():
    teacher, *_ = models()
    student, e = student_from(teacher).double(), example()
    D = teacher.D(e["x_t"], e["t"], e["y"])
    torch.testing.assert_close(student.g(e["x_t"], e["t"], e["t"], e["y"]), D)
    _, other, _ = models()  # for whom s means something already
    assert torch.equal(other.D(e["x_t"], e["t"], e["y"]), other.g(e["x_t"], e["t"], e["t"], e["y"])) and relative(other.g(e["x_t"], e["t"], e["t"] / 2, e["y"]), other.D(e["x_t"], e["t"], e["y"])) > 1e-4
    assert torch.equal(student.G(e["x_t"], e["t"], e["t"], e["y"]), e["x_t"])


@pytest.mark.parametrize("B, labelled, channels", [(1, True, 1), (1, False, 3), (5, False, 1)])
@pytest.mark.parametrize("name", ["pseudo_huber", "features"])
def test_small_batches_no_labels_one_channel(B, labelled, channels, name):
    teacher, student, target = models(n_classes=10 * labelled, channels=channels)
    e = example(B, labelled=labelled, channels=channels)
    out, g = whole_step(student, target, e, distance=make_distance(name, teacher))
    numbers, h = step_in_parts(student, target, e, 1, distance=make_distance(name, teacher))
    assert all(torch.isfinite(v) for v in out.values()) and relative(h, g) < 1e-9 and out["loss_ctm"] > 0 and g.norm() > 0


def test_vectors_have_a_last_layer_too():
    student = student_from(Denoiser(MLP(2, width=16, n_blocks=1)))
    x = torch.randn(6, 2)
    ctm, dsm = student.G(x, 2., 1.).square().sum(), dsm_loss(student, x, torch.ones(6), torch.randn(6, 2)).mean()
    a, b = (torch.autograd.grad(v, student.net.last_layer, retain_graph=True)[0] for v in (ctm, dsm))
    assert adaptive_weight(ctm, dsm, student.net.last_layer) == balance(a, b)


def test_weight_of_tiny_gradients_does_not_see_the_scale():
    w = torch.nn.Parameter(torch.ones(4))
    a, b = (adaptive_weight((2e-5 * w).sum(), (1e-5 * w).sum(), w, scale=s) for s in (1., 2. ** 16))
    torch.testing.assert_close(a, b); torch.testing.assert_close(a, torch.tensor(4e-5 / (2e-5 + 1e-4)))
    sets = GradientSets([w], w)
    sets.add("ctm", (2e-5 * w).sum(), scale=2. ** 16); sets.add("dsm", (1e-5 * w).sum(), scale=2. ** 16)
    torch.testing.assert_close(sets.combine(2. ** 16)["lambda_dsm"], a)


def test_small_gradients_survive_the_frozen_map_in_float16():
    _, student, target = models(dtype=torch.float32)
    e = example(dtype=torch.float32)
    x_s, s, goal = e["eps"].requires_grad_(), torch.ones(8), torch.zeros(8, 1, 8, 8)
    def gradient(scale, half=True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            projected, _ = project(x_s, goal, target, s, e["y"], lambda a, b: 1e-7 * l2(a, b), scale=scale)
        return torch.autograd.grad(projected, x_s)[0]
    exact = gradient(1., half=False)
    assert relative(gradient(2. ** 20), exact) < .03 < .1 < relative(gradient(1.), exact)


# ---- jumps that lead nowhere, and where the teacher is asked

@pytest.mark.parametrize("still", [[], [1, 4, 6], list(range(8))])
def test_rows_that_stay_ask_no_network(still, monkeypatch):
    _, _, target = models()
    e, seen = example(), []
    e["t"] = torch.where(torch.isin(torch.arange(8), torch.tensor(still, dtype=torch.int64)), e["s"], e["t"] * 1.5)
    x, z = (e["x_t"].clone().requires_grad_() for _ in range(2))
    expect = target.G(x, e["t"], e["s"], e["y"])
    G = target.G
    monkeypatch.setattr(target, "G", lambda x, *a: seen.append(len(x)) or G(x, *a))
    got = move(target, z, e["t"], e["s"], e["y"])
    torch.testing.assert_close(got, expect)
    assert seen == ([8 - len(still)] if len(still) < 8 else []) and torch.equal(got[still], z[still])
    for v in (expect, got): (v * torch.linspace(1, 2, 8, dtype=v.dtype).view(-1, 1, 1, 1)).sin().sum().backward()
    torch.testing.assert_close(z.grad, x.grad)


def test_half_of_the_second_jumps_are_not_made():
    _, student, target = models()
    seen = {"student": 0, "target": 0}
    for name, m in (("student", student), ("target", target)):
        m.net.register_forward_pre_hook(lambda net, args, name=name: seen.__setitem__(name, seen[name] + len(args[0])))
    e = example()
    ctm_target(student, target, e["x_u"], e["u"], e["s"], e["y"])
    assert seen == {"student": int((e["u"] > e["s"]).sum()), "target": int((e["s"] > .0020001).sum())} and 0 < seen["student"] < 8


@pytest.mark.parametrize("method, bound", [("dpmpp_2m", 1.), ("dpmpp_3m", 1.5)])
def test_even_steps_in_the_logarithm_keep_the_published_error(method, bound):
    "On the mixture: eleven evaluations of a multistep method against Heun on the full grid, twenty-three in the mean."
    from ctm_nb.method.flow import toy_mixture
    toy, gen, error = toy_mixture(), GEN(), {}
    for _ in range(12):
        i, k, _ = draw_stretch(64, 18, 17, gen)
        t = grid_time(i, 18)
        x_t = toy.sample(64, seed=int(k)) + t[:, None] * torch.randn(64, 2, generator=gen, dtype=torch.float64)
        exact = teacher_jump(toy.D, x_t, i * 16, k * 16, 17 * 16 + 1, method="dpmpp_2m")[0]
        for name, plan in {"published": ("heun", None), "log": (method, 11, "log"), "grid": (method, 11, "grid")}.items():
            error[name] = error.get(name, 0.) + float((teacher_jump(toy.D, x_t, i, k, 18, None, *plan)[0] - exact).norm(dim=1).mean())
    assert error["log"] < bound * error["published"] and error["log"] < .8 * error["grid"], error


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="spacing must be one of grid, log, curved, got 'even'"): stretch_times(torch.tensor([0]), 4, 18, spacing="even")
    with pytest.raises(ValueError, match="needs the curve of its teacher"): stretch_times(torch.tensor([0]), 4, 18, spacing="curved")


def test_curved_stretches_share_the_bends_evenly():
    from ctm_nb.method.flow import toy_mixture
    curve, i, k = bends(toy_mixture()), torch.tensor([0, 5, 12]), torch.tensor([17, 4, 1])
    assert torch.equal(curve, bends(toy_mixture())) and (curve.diff(dim=1) > 0).all() and curve[1, 0] == 0 and curve[1, -1] == 1
    still = SimpleNamespace(D=lambda x, t, y: torch.zeros_like(x), data_shape=(2,), n_classes=0, sigma_min=.002, sigma_max=80.)
    torch.testing.assert_close(bends(still)[1], torch.linspace(0, 1, 65, dtype=torch.float64))  # a guess that never bends is walked evenly
    bump = SimpleNamespace(**{**vars(still), "D": lambda x, t, y: torch.ones_like(x) * torch.tanh(4 * (t.log() - .5))})  # all bends are near ln t = .5
    lam, way = bends(bump)
    dense = lam[:-1][way.diff() > .9 * way.diff().max()]
    assert (-dense - .5).abs().max() < .8
    times = stretch_times(i, k, 18, "dpmpp_2m", 8, "curved", curve)
    torch.testing.assert_close(times[[0, -1]], torch.stack([grid_time(i, 18), grid_time(i + k, 18)]))
    shares = torch.from_numpy(np.interp((-times.log()).numpy(), *curve.numpy())).diff(dim=0)
    torch.testing.assert_close(shares, shares[:1].expand_as(shares), rtol=1e-6, atol=1e-9)
    assert shares.min() > 0 and (times.log().diff(dim=0)[:, 0].max() - times.log().diff(dim=0)[:, 0].min()).abs() > .1  # not those of "log"
