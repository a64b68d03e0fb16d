"""Distances: zero between equal pictures, gradient to the estimate, small and grey pictures, and bad requests."""
import pytest
import torch
import torch.nn.functional as F

from ctm_nb.method.distances import DISTANCES, FeatureDistance, feature_gap, l2, make_distance, pseudo_huber, unit
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import MLP, DDPMpp


def teacher(channels=1, size=8, n_classes=0):
    torch.manual_seed(0)
    net = DDPMpp(size, channels, n_classes, model_channels=8, channel_mult=(1, 2), n_blocks=1, attention=())
    D = Denoiser(net).eval().requires_grad_(False)
    for p in D.parameters(): p.add_(.1 * torch.randn_like(p))
    return D


def check(d, channels, size, B):
    "What every distance must be."
    a, b = torch.randn(2, B, channels, size, size, generator=torch.Generator().manual_seed(0)).tanh()
    a.requires_grad_()
    out = d(a, b)
    assert out.shape == (B,) and (out > 0).all() and out.dtype == torch.float32
    torch.testing.assert_close(out, d(b, a))
    torch.testing.assert_close(d(a, a), torch.zeros(B), atol=1e-6, rtol=0)
    grad, = torch.autograd.grad(out.sum(), a)
    assert torch.isfinite(grad).all() and all(g.abs().max() > 0 for g in grad)
    step = 1e-2 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad(): assert (d(a - step, b) < out).all()
    torch.testing.assert_close(d(a[:1], b[:1])[0], out[0], rtol=1e-3, atol=1e-6)  # rows do not mix
    black = torch.full_like(a, -1.).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(d(black, black.detach()).sum(), black)[0]).all()


@pytest.mark.parametrize("channels, size, B", [(1, 8, 3), (3, 16, 1)])
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_is_one(name, channels, size, B):
    check(make_distance(name, teacher(channels, size)), channels, size, B)


def test_features_are_the_teachers_at_the_levels_given():
    t = teacher()
    a, b = torch.randn(2, 4, 1, 8, 8).tanh()
    gap = lambda level: feature_gap(t.features(a, level), t.features(b, level))
    both = FeatureDistance(t, (.1, 1.), weight=2., c=.1)(a, b)
    torch.testing.assert_close(both, pseudo_huber(a, b, .1) + gap(.1) + gap(1.))
    assert not torch.allclose(gap(.1), gap(1.), rtol=1e-3)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    other = [torch.randn_like(m) for m in maps]
    by_angle = sum((2 - 2 * F.cosine_similarity(p, q)).flatten(1).mean(1) for p, q in zip(maps, other))
    torch.testing.assert_close(feature_gap(maps, other), by_angle, rtol=1e-4, atol=1e-5)


def test_a_conditional_teacher_needs_no_labels():
    d = make_distance("features", teacher(n_classes=10))
    assert torch.isfinite(d(torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    a, b = torch.full((2, 1, 8, 8), 300., dtype=dtype), torch.full((2, 1, 8, 8), -300., dtype=dtype)
    assert (l2(a, b) == 360000.).all() if dtype == torch.float16 else torch.isfinite(l2(a, b)).all()
    assert torch.isfinite(pseudo_huber(a, b)).all()
    assert torch.isfinite(unit(1000 * torch.ones(1, 4, 2, 2, dtype=dtype))).all()
    features = make_distance("features", teacher())
    with torch.autocast("cpu", dtype=dtype): assert torch.isfinite(features(a.float(), b.float())).all()


BAD = [("l3", f"{', '.join(DISTANCES)}, got 'l3'"), ("features", "needs a teacher of pictures, got None")]


@pytest.mark.parametrize("name, message", BAD)
def test_bad_requests(name, message):
    with pytest.raises(ValueError, match=message): make_distance(name)


def test_features_need_pictures_and_levels():
    plane = Denoiser(MLP(2, width=16, n_blocks=1))
    with pytest.raises(ValueError, match="a teacher of pictures, got data of shape"): make_distance("features", plane)
    with pytest.raises(ValueError, match="levels must be"): FeatureDistance(teacher(), levels=(0.,))


def test_a_callable_is_handed_on():
    a, b = torch.randn(2, 3, 1, 8, 8)
    assert torch.equal(make_distance("l2")(a, b), l2(a, b)) and make_distance(pseudo_huber) is pseudo_huber


def test_a_pixel_of_zeros_has_a_finite_gradient():
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    gap = feature_gap([f], [torch.ones(1, 4, 2, 2)]).sum()
    assert torch.isfinite(torch.autograd.grad(gap, f)[0]).all()


def test_a_distance_of_one_s_own_is_an_entry_of_the_table(monkeypatch):
    "CONTRIBUTING.md: a function, or a class that is made with the teacher."
    class Mine:
        def __init__(self, teacher): self.teacher = teacher
    monkeypatch.setitem(DISTANCES, "mine", Mine)
    monkeypatch.setitem(DISTANCES, "plain", pseudo_huber)
    assert make_distance("mine", "the teacher").teacher == "the teacher" and make_distance("plain") is pseudo_huber
