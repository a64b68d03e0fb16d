"""The teacher: bad input, older preconditionings, classes."""
import pytest
import torch

from ctm_nb.method.flow import toy_mixture
from ctm_nb.method.teacher import Denoiser, Model, edm_loss, preconditioning
from ctm_nb.method.trajectory import CTM
from ctm_nb.networks.families import build_network
from ctm_nb.networks.unet import MLP, DDPMpp

SMALL = dict(model_channels=8, channel_mult=(1, 2), n_blocks=1, attention=(4,))


def lively(net):
    "Zero-initialised last layers hide mistakes: give every layer random weights."
    torch.manual_seed(0)
    for p in net.parameters(): p.data.add_(.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("args, message", [
    (lambda x, t: (x[:, :1], t), "x must be \\(B, 3, 8, 8\\)"),
    (lambda x, t: (x, 0.), "t must be > 0"),
    (lambda x, t: (x, t, 10), "y must be in 0..9"),
    (lambda x, t: (x, t, torch.tensor([0, -2])), "got -2"),
    (lambda x, t: (x, t, torch.tensor([10, 0])), "got 10"),
    (lambda x, t: (x, t, torch.zeros(2, 10)), "2 class indices"),
    (lambda x, t: (x, t, torch.zeros(3, dtype=torch.int64)), "2 class indices")])
def test_what_is_given_to_a_model_is_checked(args, message):
    m = Denoiser(lively(DDPMpp(8, 3, 10, **SMALL)))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1., 2.])
    for f in (m.D, m.features):
        with pytest.raises(ValueError, match=message): f(*args(x, t))
    assert torch.equal(m.D(x, t, 3), m.D(x, t, torch.tensor([3, 3])))
    for a, b in zip(m.features(x, t, 3), m.features(x, t, [3, 3])): assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["edm", "vp", "ve"])
def test_every_preconditioning_is_a_formula_around_the_network(kind):
    m = Denoiser(lively(MLP(2)), kind=kind)
    x, t = torch.randn(4, 2), torch.tensor([.002, .5, 3., 80.])
    c_skip, c_out, c_in = (c[:, None] for c in preconditioning(t, kind=kind))
    torch.testing.assert_close(m.D(x, t), c_skip * x + c_out * m.net(c_in * x, m.c_noise(t, x)))


def test_models_have_what_the_protocol_names():
    for m in (Denoiser(MLP(2, n_classes=2), classes=("cat", "dog")), toy_mixture()):
        assert all(hasattr(m, name) for name in Model.__annotations__) and callable(m.D)
        assert isinstance(m.classes, list) and isinstance(m.data_shape, tuple)


def test_the_loss_has_one_value_for_each_sample_and_takes_labels():
    seen = []

    def D(x, t, y):
        seen.append(y)
        return x
    x0, sigma, y = torch.zeros(3, 1, 2, 2), torch.tensor([.5, 1., 2.]), torch.arange(3)
    loss = edm_loss(D, x0, sigma, torch.ones(3, 1, 2, 2), y)
    torch.testing.assert_close(loss, sigma ** 2 * (sigma ** 2 + .25) / (.5 * sigma) ** 2)
    assert seen[0] is y


def test_indices_of_any_whole_type_are_the_same_classes():
    "An unsigned type has no -1 to be compared with: every class was out of range."
    m, x = Denoiser(lively(DDPMpp(8, 3, 10, **SMALL))), torch.randn(2, 3, 8, 8)
    expected = m.D(x, 1., torch.tensor([3, 9]))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(m.D(x, 1., torch.tensor([3, 9], dtype=dtype)), expected)
    with pytest.raises(ValueError, match="y must hold class indices, got 'three'"): m.D(x, 1., "three")


@pytest.mark.parametrize("family", ["ddpmpp", "edm2", "mlp"])
def test_a_batch_of_nothing_is_answered_by_nothing(family):
    "What a mask has selected may be empty; gradients or not, labels or not."
    m = CTM(build_network(family, **(dict(n_classes=10) if family == "mlp" else dict(
        image_size=8, channels=3, n_classes=10, **SMALL)), s_branch=True))
    x = torch.zeros(0, *m.data_shape)
    for y in (None, [], 3, torch.zeros(0, dtype=torch.int64)):
        for on in (False, True):
            with torch.set_grad_enabled(on): assert m.G(x, 2., .1, y).shape == x.shape == m.D(x, 2., y).shape


@pytest.mark.parametrize("family", ["ddpmpp", "edm2"])
def test_a_jump_is_one_graph_for_a_compiler(family):
    "With numbers or tensors for times: nothing in it is read or computed beside the graph."
    m = CTM(lively(build_network(family, image_size=8, channels=1, n_classes=10, s_branch=True, model_channels=8,
                                 channel_mult=(1, 1), n_blocks=1, attention=()))).requires_grad_(False)
    x = torch.randn(2, *m.data_shape)
    for jump in (lambda x: m.G(x, 80., .002, 3),
                 lambda x: m.G(x, torch.tensor([80., 2.]), torch.tensor([.5, .002]), torch.tensor([3, -1]))):
        torch._dynamo.reset()
        whole = torch.compile(jump, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x), jump(x), rtol=1e-4, atol=1e-5)
