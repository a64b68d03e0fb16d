"""Distances: zero between equal pictures, gradient to the estimate, small and grey pictures, and what happens when something is missing."""
import time

import pytest
import torch
import torch.nn.functional as F

from ctm_nb.method.distances import DISTANCES, FeatureDistance, LPIPSDistance, backbone_file, feature_gap, l2, make_distance, pseudo_huber, unit
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import DDPMpp, MLP


def teacher(channels=1, size=8, n_classes=0):
    torch.manual_seed(0)
    D = Denoiser(DDPMpp(size, channels, n_classes, model_channels=8, channel_mult=(1, 2), n_blocks=1, attention=())).eval().requires_grad_(False)
    for p in D.parameters(): p.add_(.1 * torch.randn_like(p))
    return D


def build(name, channels=1, size=8, n_classes=0):
    return make_distance(name, teacher(channels, size, n_classes), **({"net": "squeeze", "random": True, "size": 48} if name == "lpips" else {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels, size, B", [(1, 8, 3), (3, 16, 1)])
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_is_one(name, channels, size, B):
    d, gen = build(name, channels, size), torch.Generator().manual_seed(0)
    a, b = torch.randn(2, B, channels, size, size, generator=gen).tanh()
    a.requires_grad_()
    out = d(a, b)
    assert out.shape == (B,) and (out > 0).all() and out.dtype == torch.float32
    torch.testing.assert_close(out, d(b, a)); torch.testing.assert_close(d(a, a), torch.zeros(B), atol=1e-6, rtol=0)
    grad, = torch.autograd.grad(out.sum(), a)
    assert torch.isfinite(grad).all() and all(g.abs().max() > 0 for g in grad)
    with torch.no_grad(): assert (d(a - 1e-2 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1), b) < out).all()
    torch.testing.assert_close(d(a[:1], b[:1])[0], out[0], rtol=1e-3, atol=1e-6)  # rows do not mix
    black = torch.full_like(a, -1.).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(d(black, black.detach()).sum(), black)[0]).all()


def test_features_see_through_the_teacher_at_the_levels_asked_for():
    t = teacher()
    a, b = torch.randn(2, 4, 1, 8, 8).tanh()
    gap = lambda level: feature_gap(t.features(a, level), t.features(b, level))
    torch.testing.assert_close(FeatureDistance(t, (.1, 1.), weight=2., c=.1)(a, b), pseudo_huber(a, b, .1) + gap(.1) + gap(1.))
    assert not torch.allclose(gap(.1), gap(1.), rtol=1e-3)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    other = [torch.randn_like(m) for m in maps]
    by_angle = sum((2 - 2 * F.cosine_similarity(p, q)).flatten(1).mean(1) for p, q in zip(maps, other))
    torch.testing.assert_close(feature_gap(maps, other), by_angle, rtol=1e-4, atol=1e-5)


def test_a_conditional_teacher_needs_no_labels():
    d = build("features", n_classes=10)
    assert torch.isfinite(d(torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    a, b = torch.full((2, 1, 8, 8), 300., dtype=dtype), torch.full((2, 1, 8, 8), -300., dtype=dtype)
    assert (l2(a, b) == 360000.).all() if dtype == torch.float16 else torch.isfinite(l2(a, b)).all()
    assert torch.isfinite(pseudo_huber(a, b)).all() and torch.isfinite(unit(1000 * torch.ones(1, 4, 2, 2, dtype=dtype))).all()
    with torch.autocast("cpu", dtype=dtype): assert torch.isfinite(build("features")(a.float(), b.float())).all()


@pytest.mark.filterwarnings("ignore")
def test_lpips_reads_torchvisions_file_and_is_the_packages_number(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1
    torch.manual_seed(1)
    state = squeezenet1_1(weights=None).state_dict()
    torch.save(state, tmp_path / "squeezenet1_1-b8a52dc0.pth")
    d = LPIPSDistance(tmp_path, net="squeeze", size=64)
    assert torch.equal(d.net.net.slice1[0].weight, state["features.0.weight"]) and torch.equal(dict(d.net.net.named_parameters())["slice7.12.expand3x3.weight"], state["features.12.expand3x3.weight"])
    monkeypatch.setenv("CTM_NB_LPIPS", str(tmp_path))
    a, b = torch.randn(2, 2, 3, 16, 16).tanh()
    big = lambda x: F.interpolate(x, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(make_distance("lpips", net="squeeze", size=64)(a, b), d.net(big(a), big(b)).flatten(), rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in d.net.parameters())
    seen = []
    d.net.net.register_forward_pre_hook(lambda m, i: seen.append(tuple(i[0].shape)))
    d.size = 24; d(a, b)
    assert seen == [(2, 3, 24, 24)] * 2


@pytest.mark.filterwarnings("ignore")
def test_published_lpips_from_a_folder_is_the_packages_number(tmp_path):
    "VGG-16 at 224 pixels: the package's own network with random weights, written as torchvision writes them, read from the folder by name."
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(2)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    torch.save({"features." + k.split(".", 1)[1]: v for k, v in theirs.net.state_dict().items()}, tmp_path / "vgg16-397923af.pth")
    d = make_distance("lpips", folder=tmp_path)
    for channels, size in ((3, 32), (1, 8)):
        a, b = torch.randn(2, 1, channels, size, size, generator=torch.Generator().manual_seed(3)).tanh()
        big = lambda x: F.interpolate(x.expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear")
        with torch.no_grad(): torch.testing.assert_close(d(a, b), theirs(big(a), big(b)).flatten(), rtol=1e-4, atol=1e-6)
    assert float(d(a, b).detach()) > 1e-3


def test_what_is_missing_is_said_at_once(tmp_path, monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("tried to reach the network"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path)); monkeypatch.delenv("CTM_NB_LPIPS", raising=False)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^distance 'lpips' needs torchvision's vgg16-\*\.pth, and [^\n]*checkpoints has none[^\n]*$"): make_distance("lpips")
    monkeypatch.setenv("CTM_NB_LPIPS", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="mine has none"): make_distance("lpips")
    assert time.monotonic() - started < 5
    (tmp_path / "vgg16-x.pth").touch()
    assert backbone_file("vgg", tmp_path).name == "vgg16-x.pth"
    import ctm_nb.method.distances as module
    def absent(name): raise ImportError(f"No module named {name!r}")
    monkeypatch.setattr(module.importlib, "import_module", absent)
    with pytest.raises(ValueError, match="needs the package lpips"): make_distance("lpips", random=True)


@pytest.mark.parametrize("name, options, message", [("l3", {}, "l2, pseudo_huber, lpips, features"), ("l2", {"c": 1}, "no option 'c'"), ("features", {}, "needs a teacher"),
    ("lpips", {"net": "resnet"}, "vgg, alex, squeeze"), ("pseudo_huber", {"levels": (1,)}, "no option 'levels'")])
def test_bad_requests(name, options, message):
    with pytest.raises(ValueError, match=message): make_distance(name, **options)
    with pytest.raises(ValueError, match="needs a teacher"): make_distance("features", Denoiser(MLP(2, width=16, n_blocks=1)))
    with pytest.raises(ValueError, match="levels must be"): make_distance("features", teacher(), levels=(0.,))


def test_options_arrive():
    a, b = torch.randn(2, 3, 1, 8, 8)
    assert torch.equal(make_distance("pseudo_huber", c=.5)(a, b), pseudo_huber(a, b, .5)) and torch.equal(make_distance("l2")(a, b), l2(a, b))


def test_a_silent_pixel_has_a_finite_gradient():
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(feature_gap([f], [torch.ones(1, 4, 2, 2)]).sum(), f)[0]).all()
