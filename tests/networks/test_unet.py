"""What the notebook does not show: odd batches, odd labels, odd shapes, wrong arguments."""
import pytest
import torch

from ctm_nb.networks.blocks import pixel_attention
from ctm_nb.networks.families import build_network
from ctm_nb.networks.unet import ADM, DDPMpp, MLP, NCSNpp, OpenAIUNet, openai_names

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


def test_last_layer_sees_every_gradient():
    net = lively(DDPMpp(8, 1, **SMALL))
    net(torch.randn(2, 1, 8, 8), torch.zeros(2)).square().sum().backward()
    assert net.last_layer is dict(net.named_parameters())["dec.8x8_aux_conv.weight"]
    assert net.last_layer.grad.abs().max() > 0


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


@pytest.mark.parametrize("channels, gradient", [(16, False), (32, True)])
def test_blocks_keep_the_order_of_the_numbers(channels, gradient):
    net, orders = DDPMpp(8, 3, model_channels=channels, channel_mult=(1, 2), n_blocks=1, attention=(4,)), []
    for block in (m for m in net.modules() if isinstance(m, net.block)):
        block.register_forward_hook(lambda _, args, out: orders.append(out.is_contiguous()))
    with torch.set_grad_enabled(gradient): net(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert len(orders) == 10 and all(orders)


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


def test_openai_names_are_distinct_and_complete():
    net = OpenAIUNet(16, 3, 10, s_branch=True, model_channels=16, channel_mult=(1, 2, 2), n_blocks=2, attention=(8, 4),
                     channels_per_head=8)
    names = openai_names(net)
    assert len(set(names.values())) == len(names) == sum(not k.endswith("resample_filter") for k in net.state_dict())
    assert names["dec.8x8_up.conv0.weight"] == "output_blocks.2.2.in_layers.2.weight"  # behind attention
    assert names["dec.16x16_up.conv0.weight"] == "output_blocks.5.2.in_layers.2.weight"


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("bf16", .03)])
def test_without_gradient_another_order_of_the_numbers_and_the_same_result(precision, most):
    "Channels side by side, sums in place, a normalisation and an attention of its own: maps of 16 x 16 and 8 x 8."
    torch.manual_seed(0)
    net = DDPMpp(16, 3, 4, model_channels=32, channel_mult=(1, 2), n_blocks=1, attention=(8,)).eval()
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.2)
    x, t, y = 2 * torch.randn(4, 3, 16, 16) + 1, torch.linspace(-1, 1, 4), torch.arange(4)
    given = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = net(x, t, y=y).detach().float()
        with torch.no_grad(): got = net(x, t, y=y).float()
    assert torch.equal(x, given) and not torch.equal(got, expected)  # another order indeed
    assert float((got - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("side", [4, 16, 17])
def test_attention_in_bfloat16_is_that_in_float32_and_keeps_no_more_than_pays(side):
    "With its gradient; the weights of every pixel for every pixel are kept up to 16 x 16."
    qkv, kept = torch.randn(2, 3 * 64, side, side), []
    def keep(t):
        kept.append(t.numel())
        return t
    def both(x):
        x = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = pixel_attention(x, heads=2)
        return out.detach().float(), torch.autograd.grad(out.float().square().sum(), x)[0].float()
    exact = both(qkv)
    kept.clear()
    for a, b in zip(both(qkv.bfloat16()), exact): assert (a - b).norm() < .02 * b.norm()
    assert (max(kept) >= 2 * 2 * side ** 4) == (side <= 16)
