"""EDM2's network against the reference's numbers, row by row, and what the notebook does not show."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.distill import step_losses
from ctm_nb.method.guidance import autoguide
from ctm_nb.method.sampling import sample
from ctm_nb.method.solvers import solve
from ctm_nb.method.teacher import Denoiser, edm_loss, lognormal_sigma, uncertainty_loss
from ctm_nb.method.flow import rho_grid
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.edm2 import EDM2, UnitBlock, UnitLayer, mp_cat, mp_sum, unit
from ctm_nb.networks.families import build_network

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("edm2_cond10_16", "edm2_uncond_16")
SMALL = dict(model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,), channels_per_head=16)


def golden(name):
    "The numbers of a file, and a teacher with its weights."
    z = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    net = EDM2(16, 3, 10 if "io.labels" in z else 0, model_channels=32, channel_mult=(1, 2), n_blocks=1, attention=(8,),
               channels_per_head=16, logvar_channels=32)
    net.load_state_dict({k[6:].removeprefix("unet."): v.float() for k, v in z.items() if k.startswith("state.")})
    return {k[3:]: v for k, v in z.items() if k.startswith("io.")}, Denoiser(net).eval()


def off(a, b): return float((a - b).detach().norm() / b.norm())


def D(m, x, sigma, labels=None):
    "The denoiser with the weights of classes that the files have, which are not only indices."
    m = copy.copy(m)
    m.check = lambda x, t, y=None: y
    return m.D(x, sigma, labels)


def lively(net):
    "Gains that start at 0 hide mistakes."
    for k, p in net.named_parameters():
        if p.ndim == 0 and not k.startswith("balance"): p.data.fill_(.7)
    return net.eval()


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    z, m = golden(name)
    x, sigma, y, net = z["x"], z["sigma"], z.get("labels"), m.net
    x_in, c, row = x / (sigma ** 2 + .25).sqrt().view(-1, 1, 1, 1), sigma.log() / 4, slice(3, 4)
    y_row, blocks = None if y is None else y[row], []
    with torch.no_grad():
        assert off(D(m, x, sigma, y), z["D"]) < 1e-5
        assert off(net(x_in, c, y=y), z["F"]) < 1e-5 and off(net.logvar(c), z["logvar"]) < 1e-5
        if y is not None:
            assert off(m.D(x, sigma), z["D_nolabel"]) < 1e-5 and off(net(x_in, c), z["F_nolabel"]) < 1e-5
        assert off(net.embed(c[row], y=y_row), z["emb_row3"]) < 1e-5
        for b in (*net.enc.values(), *net.dec.values()): b.register_forward_hook(lambda m, i, o: blocks.append(o))
        net(x_in[row], c[row], y=y_row)
        assert off(torch.stack([h.square().mean().sqrt() for h in blocks]), z["block_rms_row3"]) < 1e-5
        assert off(torch.stack([h[0, :4, 1, 2] for h in blocks]), z["block_first_row3"]) < 1e-5
        net.enc["8x8_block0"].emb_gain.fill_(2000)
        assert off(net(x_in, c, y=y), z["clip_F"]) < 1e-5


def gradients(m, z, prefix):
    "The largest distance of a gradient from the file's."
    ours = {k if k.startswith("logvar") else f"unet.{k}": p.grad for k, p in m.net.named_parameters()}
    each = {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}
    assert len(each) > 2
    return max(off(ours[k], v) for k, v in each.items())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_forced_normalisation(name):
    z, m = golden(name)
    D(m, z["x"], z["sigma"], z.get("labels")).mean().backward()
    assert gradients(m, z, "grad_eval.") < 1e-5
    m = golden(name)[1]
    m.net.normalise_weights()
    out = D(m, z["x"], z["sigma"], z.get("labels"))
    assert off(out, z["train_D"]) < 1e-5
    out.mean().backward()
    assert gradients(m, z, "grad_train.") < 1e-5
    state = m.net.state_dict()
    for k, v in z.items():
        if k.startswith("train_after."): assert off(state[k.removeprefix("train_after.unet.")], v) < 1e-5
    sizes = [v.square().mean().sqrt() for k, v in state.items() if k.endswith("weight") and "logvar" not in k]
    assert off(torch.stack(sizes), z["train_after_rms_mean"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_uncertainty_loss(name):
    z, m = golden(name)
    m.net.normalise_weights()
    sigma = lognormal_sigma(z["loss_normal"], -.8, 1.6)
    assert off(sigma, z["loss_sigma"]) < 1e-5
    loss = edm_loss(lambda x, t, y: D(m, x, t, y), z["loss_x0"], sigma, z["loss_noise"], z.get("labels"))
    loss = uncertainty_loss(loss, m.net.logvar(sigma.log() / 4))
    assert off(loss, z["loss_per_sample"]) < 1e-5
    (loss * z["loss_x0"][0].numel()).mean().backward()  # the file's loss is a sum over the elements
    assert gradients(m, z, "grad_loss.") < 1e-5


@torch.no_grad()
def test_heun_and_guidance():
    z, m = golden("edm2_cond10_16")
    reference, y = golden("edm2_uncond_16")[1], z["heun_labels"]
    times = torch.cat([rho_grid(8), torch.zeros(1)])
    guided = lambda x, t, y: reference.D(x, t) + 1.7 * (D(m, x, t, y) - reference.D(x, t))
    for denoiser, name in ((lambda x, t, y: D(m, x, t, y), "heun_8"), (guided, "heun_8_guided")):
        x = solve(denoiser, 80 * z["heun_noise"], times.float(), y, "heun")
        assert off(x, z[name]) < 1e-5
    for model, name in ((m, "heun_8"), (autoguide(m, reference, 1.7), "heun_8_guided")):
        drawn = sample(model, 3, steps=8, solver="heun", y=y.argmax(1), noise_fn=lambda i, shape: z["heun_noise"])
        assert off(drawn, z[name]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
def test_half_precision(name, dtype, most):
    z, m = golden(name)
    with torch.no_grad(), torch.autocast("cpu", dtype): out = D(m, z["x"], z["sigma"], z.get("labels"))
    assert out.isfinite().all() and off(out, z["D"]) < most
    seen = []
    m.net.enc["8x8_block0"].conv_res0.register_forward_hook(lambda m, i, o: seen.append((i[0].dtype, o.dtype)))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        D(m, z["x"], z["sigma"], z.get("labels"))
        e = m.net.embed(z["sigma"].log() / 4, y=z.get("labels"))
    assert seen == [(dtype, dtype)] and e.dtype == torch.float32  # activations are halves, the embedding is not


def test_the_student_starts_as_its_teacher_and_can_leave():
    z, teacher = golden("edm2_cond10_16")
    x, t, y = z["x"], z["sigma"], torch.arange(8)
    student = student_from(teacher)
    with torch.no_grad():
        for f in (0., .3, 1.): assert torch.equal(student.g(x, t, f * t, y), teacher.D(x, t, y))
    losses = step_losses(student, student_from(teacher), x, .9 * x, t, .7 * t, .2 * t, x, t, torch.randn_like(x), y)
    losses["ctm"].backward()
    assert student.net.balance_s.grad.abs() > 0 and student.net.emb_noise_s.weight.grad.abs().max() == 0
    student.net.balance_s.data.fill_(.3)
    student.g(x, t, .2 * t, y).square().sum().backward()
    assert student.net.emb_noise_s.weight.grad.abs().max() > 0
    assert (student.g(x, t, .2 * t, y) - student.g(x, t, .9 * t, y)).abs().max() > 1e-3
    disturbed = student_from(teacher, "random")
    assert disturbed.net.balance_s == .5 and off(disturbed.g(x, t, .2 * t, y), teacher.D(x, t, y)) > 1e-4
    assert not torch.equal(student.net.emb_noise_s.weight, teacher.net.emb_noise.weight)


def test_the_size_of_weights_does_not_matter():
    torch.manual_seed(0)
    net = lively(EDM2(8, 3, 10, **SMALL))
    x, c, y = torch.randn(4, 3, 8, 8), torch.linspace(-1, 1, 4), torch.arange(4)
    before = net(x, c, y=y)
    for p in net.parameters():
        if p.ndim > 1: p.data *= 7
    torch.testing.assert_close(net(x, c, y=y), before, rtol=1e-2, atol=1e-3)
    net.normalise_weights()
    kept = copy.deepcopy(net.state_dict())
    net.normalise_weights()
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, kept[k], rtol=2e-4, atol=1e-6)


def test_primitives_keep_magnitudes():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 96, 16, 16), torch.randn(4, 32, 16, 16)
    size = lambda x: float(x.square().mean().sqrt())
    for t in (0., .3, .5, 1.): assert abs(size(mp_sum(a[0], a[1], t)) - 1) < .02
    both = mp_cat(a[0], b)
    assert abs(size(both) - 1) < .02 and abs(both[:, :96].norm() / both[:, 96:].norm() - 1) < .02
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert (unit(3e4 * torch.ones(1, 4096).half()) - 1).abs().max() < .01  # their squares do not fit into float16
    layer = UnitLayer(64, 32)
    assert abs(size(layer(torch.randn(4096, 64))) - 1) < .05


@pytest.mark.parametrize("how, side", [(None, 8), ("down", 4), ("up", 16)])
@pytest.mark.parametrize("encoder", [True, False])
def test_blocks_clip_and_resample(encoder, how, side):
    block = UnitBlock(16, 32, 8, encoder, how, heads=2)
    assert block(torch.randn(2, 16, 8, 8), torch.randn(2, 8)).shape == (2, 32, side, side)
    block.emb_gain.data.fill_(1e6)
    assert block(torch.randn(2, 16, 8, 8), torch.randn(2, 8)).abs().max() == 256


def test_dropout_only_in_training():
    net = lively(EDM2(8, 1, dropout=.5, **SMALL))
    x, c = torch.randn(3, 1, 8, 8), torch.zeros(3)
    assert torch.equal(net(x, c), net(x, c))
    assert not torch.equal(net.train()(x, c), net(x, c))
    net.set_dropout(0.)
    assert torch.equal(net(x, c), net(x, c)) and net.config["dropout"] == 0


def test_odd_arguments():
    with pytest.raises(ValueError, match="augment_dim must be 0"): build_network("edm2", image_size=8, augment_dim=9)
    with pytest.raises(ValueError, match="divisible by 8"): build_network("edm2", image_size=12)
    with pytest.raises(ValueError, match="equal heads"): EDM2(8, **{**SMALL, "channels_per_head": 10})
    student = EDM2(8, 1, s_branch=True, **SMALL)
    with pytest.raises(ValueError, match="has an s-branch"): student(torch.randn(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="has no s-branch"):
        EDM2(8, 1, **SMALL)(torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="must have no s-branch"): student.with_s_branch()


@pytest.mark.parametrize("size, mult, attention", [(8, (1, 1), ()), (16, (1, 2, 2), (8, 4)), (28, (1, 2, 2), (7,))])
def test_shapes_and_features(size, mult, attention):
    net = lively(EDM2(size, 1, 3, model_channels=8, channel_mult=mult, n_blocks=2, attention=attention))
    x, c = torch.randn(2, 1, size, size), torch.zeros(2)
    assert net(x, c, y=torch.tensor([0, -1])).shape == x.shape
    assert [h.shape[-1] for h in net.features(x, c)] == [size >> n for n in range(len(mult))]
    assert torch.equal(net(x, c), net(x, c, y=torch.full((2,), -1)))
    torch.testing.assert_close(net(x, c)[1:], net(x[1:], c[1:]), rtol=1e-4, atol=1e-5)
    assert net.last_layer is net.out_conv.weight


@pytest.mark.parametrize("width, n", [(128, 124_710_949), (192, 280_209_381), (256, 497_803_173), (320, 777_492_325),
                                      (384, 1_119_276_837)])
def test_published_sizes(width, n):
    with torch.device("meta"): net = EDM2(64, 3, 1000, model_channels=width)
    assert sum(p.numel() for p in net.parameters()) == n
