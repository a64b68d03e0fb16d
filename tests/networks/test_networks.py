"""What the notebook does not show: odd batches, odd labels, odd shapes, wrong arguments."""
import pytest
import torch

from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import ADM, DDPMpp, MLP, NCSNpp, OpenAIUNet, build_network, network_config, openai_names
from ctm_nb.method.trajectory import student_from

SMALL = dict(model_channels=8, channel_mult=(1, 2), n_blocks=1, attention=(4,))
IMAGE_FAMILIES = [DDPMpp, NCSNpp, ADM, OpenAIUNet]
WIDE = dict(model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,), channels_per_head=8)


def lively(net):
    "Zero-initialised last layers hide mistakes: give every layer random weights."
    torch.manual_seed(0)
    for p in net.parameters(): p.data.add_(.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n_classes", [0, 10])
def test_batch_of_one_equals_row_of_batch(channels, n_classes):
    net = lively(DDPMpp(8, channels, n_classes, s_branch=True, **SMALL))
    x, c = torch.randn(5, channels, 8, 8), torch.linspace(-1.5, 1, 5)
    y = torch.arange(5) if n_classes else None
    with torch.no_grad():
        whole = net(x, c, c - .2, y)
        one = net(x[2:3], c[2:3], c[2:3] - .2, None if y is None else y[2:3])
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: DDPMpp(8, 1, 10, **SMALL), lambda: MLP(2, n_classes=10, width=16)])
def test_no_label_is_minus_one_is_none(make):
    net = lively(make())
    x = torch.randn(3, *((1, 8, 8) if isinstance(net, DDPMpp) else (2,)))
    c = torch.zeros(3)
    with torch.no_grad():
        assert torch.equal(net(x, c, y=None), net(x, c, y=torch.full((3,), -1)))
        assert (net(x, c, y=torch.tensor([1, 2, 3])) - net(x, c)).abs().max() > 1e-4


def test_label_reaches_both_branches():
    net = lively(DDPMpp(8, 1, 10, s_branch=True, **SMALL))
    c, y = torch.zeros(2), torch.tensor([1, 2])
    assert (net.embed(c, y, "_s") - net.embed(c, None, "_s")).abs().max() > 1e-4
    assert (net.embed(c, y) - net.embed(c, None)).abs().max() > 1e-4


@pytest.mark.parametrize("size, mult, attention", [(8, (1, 1), ()), (16, (1, 2, 2), (8, 4)), (32, (1, 1, 1), (8,))])
def test_shapes(size, mult, attention):
    net = DDPMpp(size, 3, model_channels=8, channel_mult=mult, n_blocks=2, attention=attention)
    assert net(torch.randn(2, 3, size, size), torch.zeros(2)).shape == (2, 3, size, size)


def test_channels_last_changes_nothing():
    net = lively(DDPMpp(8, 3, **SMALL))
    x, c = torch.randn(4, 3, 8, 8), torch.zeros(4)
    with torch.no_grad():
        a = net(x, c)
        b = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), c)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="image_size must be divisible by 4"): DDPMpp(6, channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match="init must be"): DDPMpp(8, 1, **SMALL).with_s_branch("zeros")
    student = DDPMpp(8, 1, s_branch=True, **SMALL)
    with pytest.raises(ValueError, match="has an s-branch"): student(torch.randn(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="family"): build_network("unet")


def test_student_keeps_teacher_and_config():
    teacher = Denoiser(lively(DDPMpp(8, 1, 10, **SMALL)), sigma_data=.7, sigma_min=.01, sigma_max=50.)
    student = student_from(teacher)
    assert (student.sigma_data, student.sigma_min, student.sigma_max) == (.7, .01, 50.)
    assert network_config(student.net) == {**network_config(teacher.net), "s_branch": True}
    x, t, y = 10 * torch.randn(6, 1, 8, 8), torch.tensor([80., 20., 5., 1., .1, .01]).clamp(max=50), torch.arange(6)
    with torch.no_grad():
        D = teacher.D(x, t, y)
        for f in (0., .5, 1.): torch.testing.assert_close(student.g(x, t, f * t, y), D, rtol=1e-5, atol=1e-6)


def test_last_layer_sees_every_gradient():
    net = lively(DDPMpp(8, 1, **SMALL))
    net(torch.randn(2, 1, 8, 8), torch.zeros(2)).square().sum().backward()
    assert net.last_layer is dict(net.named_parameters())["dec.8x8_aux_conv.weight"]
    assert net.last_layer.grad.abs().max() > 0


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize("n_classes", [0, 10])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_student_of_every_family_starts_as_its_teacher(family, n_classes, init):
    teacher = Denoiser(lively(family(8, 3, n_classes, **WIDE)))
    student = student_from(teacher, init).eval()
    x, t = torch.randn(6, 3, 8, 8), torch.tensor([80., 20., 5., 1., .1, .002])
    y = torch.arange(6) if n_classes else None
    x = x * (1 + t[:, None, None, None])
    with torch.no_grad():
        D = teacher.D(x, t, y)
        far = [float((student.g(x, t, f * t, y) - D).norm() / D.norm()) for f in (0., .3, 1.)]
    assert max(far) < 1e-6 if init == "teacher" else min(far) > 1e-4


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_channels_last_changes_no_gradient(family):
    net = lively(family(8, 3, 10, s_branch=True, **WIDE)).train()
    x, c, y = torch.randn(3, 3, 8, 8), torch.tensor([-1., 0., 1.]), torch.tensor([1, -1, 9])

    def gradients(x):
        net.zero_grad()
        net(x, c, c - .2, y).square().mean().backward()
        return {k: p.grad.clone() for k, p in net.named_parameters()}
    plain = gradients(x)
    net.to(memory_format=torch.channels_last)
    for name, g in gradients(x.to(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(g, plain[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_dropout_only_in_training(family):
    net = lively(family(8, 3, dropout=.5, **WIDE))
    x, c = torch.randn(3, 3, 8, 8), torch.zeros(3)
    assert torch.equal(net(x, c), net(x, c))
    net.train()
    assert not torch.equal(net(x, c), net(x, c))


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_label_in_the_embedding_of_s(family):
    net = lively(family(8, 3, 10, s_branch=True, **WIDE))
    c, y = torch.zeros(2), torch.tensor([1, 2])
    assert (net.embed(c, y) - net.embed(c, None)).abs().max() > 1e-4
    assert torch.equal(net.embed(c, y, "_s"), net.embed(c, None, "_s")) == (family is OpenAIUNet)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_bfloat16_autocast_is_finite_at_both_ends(family):
    m = student_from(Denoiser(lively(family(8, 3, **WIDE))), "random").eval()
    t = torch.tensor([80., .002])
    x = torch.randn(2, 3, 8, 8) * t[:, None, None, None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): out = m.g(x, t, torch.zeros(2))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("dtype, least", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_weights_stay_near_float32(family, dtype, least):
    m = student_from(Denoiser(lively(family(8, 3, 10, **WIDE))), "random").eval()
    t, s, y = torch.tensor([80., 1., .002]), torch.tensor([.5, .01, .002]), torch.tensor([1, 2, 3])
    x = torch.randn(3, 3, 8, 8) * (1 + t[:, None, None, None])
    with torch.no_grad():
        exact = m.g(x.to(dtype).float(), t, s, y)
        half = m.to(dtype).g(x.to(dtype), t, s, y)
    assert half.dtype == dtype and (half.float() - exact).norm() < least * exact.norm()


@pytest.mark.parametrize("args, message", [
    (lambda x, t: (x[:, :1], t), "x must be \\(B, 3, 8, 8\\)"),
    (lambda x, t: (x, 0.), "t must be > 0"),
    (lambda x, t: (x, t, 10), "y must be in 0..9"),
    (lambda x, t: (x, t, torch.tensor([0, -2])), "got -2"),
    (lambda x, t: (x, t, torch.zeros(2, 10)), "2 class indices"),
    (lambda x, t: (x, t, torch.zeros(3, dtype=torch.int64)), "2 class indices")])
def test_what_is_given_to_a_model_is_checked(args, message):
    m = Denoiser(lively(DDPMpp(8, 3, 10, **SMALL)))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1., 2.])
    with pytest.raises(ValueError, match=message): m.D(*args(x, t))
    assert torch.equal(m.D(x, t, 3), m.D(x, t, torch.tensor([3, 3])))


def test_a_student_is_no_teacher():
    with pytest.raises(ValueError, match="must have no s-branch"): DDPMpp(8, 1, s_branch=True, **SMALL).with_s_branch()


def test_openai_names_are_distinct_and_complete():
    net = OpenAIUNet(16, 3, 10, s_branch=True, model_channels=16, channel_mult=(1, 2, 2), n_blocks=2, attention=(8, 4),
                     channels_per_head=8)
    names = openai_names(net)
    assert len(set(names.values())) == len(names) == sum(not k.endswith("resample_filter") for k in net.state_dict())
    assert names["dec.8x8_up.conv0.weight"] == "output_blocks.2.2.in_layers.2.weight"  # behind attention
    assert names["dec.16x16_up.conv0.weight"] == "output_blocks.5.2.in_layers.2.weight"
