"""One batch, four micro-batches, two ranks, half precision, dropout: the same gradient."""
import pytest
import torch
from test_distill import GEN, example, models, relative, rows, teacher_jump
from warm import ranks

from ctm_nb.method.balance import BalancedGradients, average, average_gradients, balance  # noqa: F401
from ctm_nb.method.distances import l2, make_distance, pseudo_huber
from ctm_nb.method.distill import dsm_loss, step_losses
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.unet import MLP

from formulas import adaptive_weight


def grads(m): return torch.cat([p.grad.flatten() for p in m.parameters()])


def plain(student, target, e, **options):
    "Losses, weight and gradient as the formula has them: the whole batch, one backward pass."
    losses, w = step_losses(student, target, **e, **options), student.net.last_layer
    lam = adaptive_weight(losses["ctm"], losses["dsm"], w)
    student.zero_grad(set_to_none=True)
    (losses["ctm"] + lam * losses["dsm"]).backward()
    numbers = {f"loss_{k}": v.detach() for k, v in losses.items()} | {"lambda_dsm": lam}
    for p in student.parameters(): p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return numbers, grads(student)


def step(student, target, e, m=1, **options):
    "The same from m micro-batches."
    gradients, B = BalancedGradients(student.parameters(), student.net.last_layer), len(e["x_t"])
    for part in torch.arange(B).tensor_split(m):
        gradients.add(step_losses(student, target, **rows(e, part), **options), len(part) / B)
    return gradients.combine(), grads(student)


CASES = [(1, "end", l2, True), (4, "end", pseudo_huber, True), (3, "s", pseudo_huber, False), (8, "end", l2, False)]


@pytest.mark.parametrize("m, compare_at, distance, labelled", CASES)
def test_micro_batches_make_the_whole(m, compare_at, distance, labelled):
    _, student, target = models(n_classes=10 * labelled)
    e, options = example(labelled=labelled), dict(distance=distance, compare_at=compare_at)
    expected, g = plain(student, target, e, **options)
    numbers, h = step(student, target, e, m, **options)
    assert numbers.keys() == expected.keys() == {"loss_ctm", "loss_dsm", "lambda_dsm"}
    for k in expected: assert abs(numbers[k] / expected[k] - 1) < 1e-9, k
    assert relative(h, g) < 1e-9
    separate = [plain(student, target, rows(e, [n]), **options)[0]["lambda_dsm"] for n in range(8)]
    assert abs(torch.stack(separate).mean() / expected["lambda_dsm"] - 1) > 1e-3  # the mean of norms is something else


def test_a_third_loss_has_its_own_bounds():
    w = torch.nn.Parameter(torch.tensor([1., 2.]))
    gradients = BalancedGradients([w], w, gan=(.01, 10.))
    gradients.add({"ctm": 3 * w[0], "dsm": w[1] * 6, "gan": w[1] * 1e-3})
    out = gradients.combine()
    torch.testing.assert_close(w.grad, torch.tensor([3., 6 * float(out["lambda_dsm"]) + .01]), atol=1e-5, rtol=1e-4)
    assert out["lambda_gan"] == 10. and abs(out["lambda_dsm"] - .5) < 1e-4
    gradients.add({"ctm": 3 * w[0]})
    gradients.combine()
    torch.testing.assert_close(w.grad, torch.tensor([3., 0.]))  # nothing is left over


def test_one_loss_needs_no_last_layer_and_several_do():
    w, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    gradients = BalancedGradients([w])
    gradients.add({"edm": (w ** 2).sum()}, .5)
    gradients.add({"edm": (w ** 2).sum()}, .5)
    assert gradients.combine() == {"loss_edm": 2.} and torch.equal(w.grad, torch.tensor([2., 2.]))
    gradients.add({"a": w.sum(), "b": w.sum()})
    with pytest.raises(ValueError, match="last_layer must be given to balance a, b"): gradients.combine()
    with pytest.raises(ValueError, match="last_layer must be one of params"): BalancedGradients([w], other)


def test_losses_may_share_their_graph():
    w = torch.nn.Parameter(torch.tensor([1., 2.]))
    shared = w.square().exp()
    gradients = BalancedGradients([w], w)
    gradients.add({"a": shared.sum(), "b": shared.sin().sum(), "c": shared.square().sum()})
    numbers = gradients.combine()
    again = w.square().exp()
    of = (lambda v: v, torch.sin, torch.square)
    parts = [torch.autograd.grad(f(again).sum(), w, retain_graph=True)[0] for f in of]
    expected = parts[0] + numbers["lambda_b"] * parts[1] + numbers["lambda_c"] * parts[2]
    torch.testing.assert_close(w.grad, expected)


WORKER = """
import sys, torch, torch.distributed as dist
from test_balance import *
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
_, student, target = models()
mine = rows(example(), torch.arange(8).tensor_split(2)[rank])
numbers, _ = plain(student, target, mine, distance=pseudo_huber)
average_gradients(student.parameters())
own = torch.stack([numbers["loss_ctm"], numbers["loss_dsm"]])
numbers |= dict(zip(("loss_ctm", "loss_dsm"), average(own)[0]))
found = {"plain": (numbers, grads(student))}
found |= {m: step(student, target, mine, m, distance=pseudo_huber) for m in (1, 2)}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_are_one(tmp_path):
    "2 ranks x 4 rows (and x 2 micro-batches of 2) against 1 rank x 8."
    _, student, target = models()
    expected, g = plain(student, target, example(), distance=pseudo_huber)
    done = ranks(WORKER, tmp_path)
    assert all(d.returncode == 0 for d in done), done
    for rank in range(2):
        for way, (numbers, h) in torch.load(tmp_path / f"{rank}.pt").items():
            for k in expected: assert abs(numbers[k] / expected[k] - 1) < 1e-6, (rank, way, k)
            assert relative(h, g) < 1e-6, (rank, way)


def test_average_is_nothing_on_one_rank():
    a, b = torch.randn(3), torch.randn(2, 2)
    assert all(x is y for x, y in zip(average(a, b), (a, b)))


def test_each_loss_is_differentiated_once():
    "The balance costs no backward pass of its own: activations of the first block see one gradient for each loss."
    _, student, target = models()
    seen, block = [], list(student.net.enc.values())[1]
    def watch(module, inputs, out):
        if out.requires_grad: out.register_hook(lambda g: seen.append(len(g)))
    hook = block.register_forward_hook(watch)
    step(student, target, example())
    hook.remove()
    assert seen == [8, 8]


# ---- half precision

def test_autocast_finds_the_same_balance():
    _, student, target = models(dtype=torch.float32)
    e = example(dtype=torch.float32)
    expected, g = plain(student, target, e)
    for m in (1, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16): numbers, h = step(student, target, e, m)
        for k in expected: assert abs(numbers[k] / expected[k] - 1) < .1, k
        assert relative(h, g) < .3 and numbers["lambda_dsm"].dtype == torch.float32


def test_weight_of_tiny_gradients():
    w = torch.nn.Parameter(torch.ones(4))
    gradients = BalancedGradients([w], w)
    gradients.add({"ctm": (2e-5 * w).sum(), "dsm": (1e-5 * w).sum()})
    torch.testing.assert_close(gradients.combine()["lambda_dsm"], torch.tensor(4e-5 / (2e-5 + 1e-4)))


def test_small_gradients_survive_the_frozen_map_in_float16():
    _, student, target = models(dtype=torch.float32)
    e, w = example(dtype=torch.float32), student.net.last_layer
    def gradient(scale, half=True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = step_losses(student, target, **e, distance=lambda a, b: 1e-7 * l2(a, b), dsm=False)["ctm"]
        return torch.autograd.grad(loss * scale, w)[0] / scale
    exact = gradient(1., half=False)
    assert relative(gradient(2. ** 20), exact) < .03 < .1 < relative(gradient(1.), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_stay_finite_at_80(dtype):
    teacher, student, target = models(dtype=torch.float32)
    e, sign = example(dtype=torch.float32), torch.tensor([1., -1.]).repeat(4).view(-1, 1, 1, 1)
    e["t"][:], e["u"][:], e["s"][:] = 80., 80., 80. * torch.linspace(.000025, 1, 8)
    e["x_t"], e["x_u"] = 320 * torch.ones(8, 1, 8, 8) * sign, -320 * torch.ones(8, 1, 8, 8)
    e["sigma"] = torch.tensor([.002, 80.] * 4)
    for m in (teacher, student, target): m.to(dtype)
    x = e["x_t"].to(dtype)
    for t, s in ((80., 80.), (80., .002), (80., 0.), (.002, .002)):
        assert torch.isfinite(student.G(x, t, s, e["y"])).all() and torch.isfinite(student.D(x, t, e["y"])).all()
    x_u, _ = teacher_jump(teacher.D, x, torch.zeros(8, dtype=torch.long), 17, 18, e["y"])
    assert torch.isfinite(x_u).all()
    halves = {k: v.to(dtype) if v.is_floating_point() and k != "sigma" else v for k, v in e.items()}
    for compare_at in ("end", "s"):
        numbers, _ = step(student, target, halves, compare_at=compare_at)
        assert all(torch.isfinite(v) for v in numbers.values()), (compare_at, numbers)
        assert numbers["loss_ctm"].dtype == torch.float32
    assert float(l2(halves["x_t"], halves["x_u"]).max()) == 640. ** 2


# ---- small batches, other data

@pytest.mark.parametrize("B, labelled, channels", [(1, True, 1), (1, False, 3), (5, False, 1)])
@pytest.mark.parametrize("name", ["pseudo_huber", "features"])
def test_small_batches_no_labels_one_channel(B, labelled, channels, name):
    teacher, student, target = models(n_classes=10 * labelled, channels=channels)
    e, distance = example(B, labelled=labelled, channels=channels), make_distance(name, teacher)
    expected, g = plain(student, target, e, distance=distance)
    numbers, h = step(student, target, e, distance=distance)
    assert all(torch.isfinite(v) for v in numbers.values()) and numbers["loss_ctm"] > 0 and g.norm() > 0
    assert relative(h, g) < 1e-9


def test_vectors_have_a_last_layer_too():
    student = student_from(Denoiser(MLP(2, width=16, n_blocks=1)))
    x = torch.randn(6, 2, generator=GEN())
    ctm, dsm = student.G(x, 2., 1.).square().sum(), dsm_loss(student, x, torch.ones(6), torch.randn(6, 2)).mean()
    a, b = (torch.autograd.grad(v, student.net.last_layer, retain_graph=True)[0] for v in (ctm, dsm))
    gradients = BalancedGradients(student.parameters(), student.net.last_layer)
    gradients.add({"ctm": ctm, "dsm": dsm})
    torch.testing.assert_close(gradients.combine()["lambda_dsm"], balance(a, b).detach())
