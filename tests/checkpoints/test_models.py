"""Every checkpoint people have: there and back bit for bit, the wrong ones refused, the full-size networks for real."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.training.config import make_config
from ctm_nb.data.images import ImageData
from ctm_nb.method.teacher import Denoiser
from ctm_nb.checkpoints.models import (
    _foreign_state, _from_state, _infer_network, describe, load, save_model)
from ctm_nb.networks.unet import FAMILIES, build_network, network_config
from ctm_nb.checkpoints.store import save_checkpoint
from ctm_nb.method.trajectory import CTM, student_from
from ctm_nb.training.stages import make_network

sys.path.insert(0, str(Path(__file__).parent))
GOLDEN = Path(__file__).parents[1] / "golden"
KNOWN = {"unet_cond10_16": dict(image_size=16, channels_per_head=16)}
NETWORKS = ["ddpmpp_uncond_8", "ddpmpp_cond10_8", "ncsnpp_cond10_8", "adm_cond10_16", "unet_cond10_16"]


def states(name):
    "prefix -> state dict, of every network in a golden file."
    z = np.load(GOLDEN / f"{name}.npz")
    prefixes = [p for p in ("state", "teacher", "student", "target") if any(k.startswith(f"{p}.") for k in z.files)]
    return {
        p: {k.removeprefix(f"{p}."): torch.from_numpy(z[k]).float() for k in z.files if k.startswith(f"{p}.")}
        for p in prefixes
    }, z


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_through_every_format(tmp_path, name, suffix):
    found, z = states(name)
    torch.save(found["state"], tmp_path / "foreign.bin")  # the suffix must not matter
    m = load(tmp_path / "foreign.bin", which="ctm", **KNOWN.get(name, {}))
    m = load(save_model(m, tmp_path / f"again{suffix}"), **({} if suffix == ".safetensors" else KNOWN.get(name, {})))
    x, t, s = (torch.from_numpy(z[f"io.{k}"]) for k in "xts")
    y = torch.from_numpy(z["io.y"]) if m.n_classes else None
    for k, f in (("g", m.g), ("G", m.G)):
        expected = torch.from_numpy(z[f"io.{k}"])
        assert (f(x, t, s, y) - expected).norm() < 1e-5 * expected.norm()
    back = _foreign_state(m)
    assert set(back) == set(found["state"]) and all(torch.equal(back[k], v) for k, v in found["state"].items())


def test_the_three_networks_of_the_golden_training_step():
    found, _ = states("ctm_dsm_step_8")
    kinds = {p: _from_state(s) for p, s in found.items()}
    assert {p: type(m) for p, m in kinds.items()} == {"teacher": Denoiser, "student": CTM, "target": CTM}
    for p, m in kinds.items(): assert all(torch.equal(v, found[p][k]) for k, v in _foreign_state(m).items())


def test_teacher_without_augmentation_label_input_draws_the_same():
    "The augmentation label is zero in use, so its layer must not matter."
    found, z = states("ctm_dsm_step_8")
    with_it, without = (
        _from_state(found["teacher"]).eval(),
        _from_state({k: v for k, v in found["teacher"].items() if "map_augment" not in k}).eval(),
    )
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([80., 1., .01])
    assert torch.equal(with_it.D(x, t), without.D(x, t))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_built_from_a_foreign_teacher_is_that_teacher(name):
    found, z = states(name)
    teacher = _from_state({k: v for k, v in found["state"].items() if "_s." not in k}, **KNOWN.get(name, {})).eval()
    assert isinstance(teacher, Denoiser)
    student, x, t = student_from(teacher).eval(), torch.from_numpy(z["io.x"]), torch.from_numpy(z["io.t"])
    y = torch.from_numpy(z["io.y"]) if teacher.n_classes else None
    with torch.no_grad():
        for f in (0.0, 0.4, 1.0):
            assert (student.g(x, t, f * t, y) - teacher.D(x, t, y)).norm() < 1e-6 * teacher.D(x, t, y).norm()


def small(kind=CTM, **config):
    torch.manual_seed(0)
    return kind(
        build_network(
            **{
                **dict(
                    family="ddpmpp",
                    image_size=8,
                    channels=1,
                    n_classes=3,
                    s_branch=kind is CTM,
                    model_channels=8,
                    channel_mult=(1, 2),
                    n_blocks=1,
                    attention=(4,),
                ),
                **config,
            }
        )
    ).eval()


def test_half_precision_weights_come_back_as_float32(tmp_path):
    m = small()
    torch.save({k: v.half() for k, v in _foreign_state(m).items()}, tmp_path / "half.pt")
    assert all(v.dtype == torch.float32 for v in load(tmp_path / "half.pt").state_dict().values())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {k: v for k, v in s.items() if "enc.8x8_block0.norm1" not in k},
            "needs what the file lacks 'net.enc.8x8_block0.norm1.bias' and 1 more",
        ),
        (lambda s: {**s, "model.extra.weight": torch.zeros(1)}, "no place for 'net.extra.weight'"),
        (
            lambda s: {**s, "model.map_layer1.bias": torch.zeros(7)},
            "'net.map_layer1.bias' must have shape (32,), the file has (7,)",
        ),
        (
            lambda s: {**s, "model.map_layer1.bias": torch.full((32,), torch.nan)},
            "'net.map_layer1.bias' must be finite",
        ),
        (
            lambda s: {**s, "model.enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)},
            "must be the filter (1, 1)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "_s." not in k},
            "not a CTM: it has no second time embedding",
        ),
        (lambda s: {}, "found names like none at all"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(tmp_path, change, message):
    torch.save(change(_foreign_state(small())), tmp_path / "x.pt")
    with pytest.raises(ValueError) as e: load(tmp_path / "x.pt", which="ctm")
    assert str(e.value).startswith(str(tmp_path / "x.pt")) and "\n" not in str(e.value)
    if change(_foreign_state(small())): assert message in str(e.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(image_size=16), "image_size is 8 in the file, got image_size=16"),
        (dict(heads=3), "heads"),
        (dict(channels_per_head=5), "channels_per_head must divide"),
    ],
)
def test_what_the_caller_says_is_checked(tmp_path, given, message):
    save_model(small(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message): load(tmp_path / "x.pt", **given)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("out.2.weight", torch.zeros(6, 16, 3, 3), "learned variance"),
        ("middle_block.0.emb_layers.1.weight", torch.zeros(16, 64), "use_scale_shift_norm"),
        ("input_blocks.2.0.op.weight", torch.zeros(16, 16, 3, 3), "resblock_updown=False"),
    ],
)
def test_other_guided_diffusion_networks_are_named(key, value, message):
    m = small(family="openai", model_channels=16, channels_per_head=8)
    with pytest.raises(ValueError, match=message):
        _from_state({**_foreign_state(m), key: value}, image_size=8, channels_per_head=8)


def test_attention_weights_of_one_dimensional_convolutions():
    m = small(family="openai", model_channels=16, channels_per_head=8)
    old = {
        k: v[..., 0] if v.ndim == 4 and v.shape[-1] == 1 and ("qkv" in k or "proj_out" in k) else v
        for k, v in _foreign_state(m).items()
    }
    again = _from_state(old, image_size=8, channels_per_head=8)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), m.state_dict().values(), strict=True))


def test_our_file_carries_everything(tmp_path):
    m = small()
    m.classes, m.sigma_max = ["a", "b", "c"], 40.
    again = load(save_model(m, tmp_path / "m.safetensors", config={"run": {"seed": 5}}))
    assert describe(again) == describe(m) and again.classes == ["a", "b", "c"] and again.sigma_max == 40.
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert json.loads(f.metadata()["ctm_nb"])["config"] == {"run": {"seed": 5}}
    with pytest.raises(ValueError, match="this is a ctm checkpoint, expected a teacher"):
        load(tmp_path / "m.safetensors", which="teacher")


def test_writing_never_replaces_unasked_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    m, path = small(), tmp_path / "m.pt"
    save_model(m, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists"): save_model(m, path)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): save_model(m, path, overwrite=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_safetensors_file_of_someone_else(tmp_path):
    from safetensors.torch import save_file
    m = small()
    save_file({k: v.contiguous() for k, v in _foreign_state(m).items()}, tmp_path / "x.safetensors")
    assert torch.equal(load(tmp_path / "x.safetensors").net.last_layer, m.net.last_layer)


def test_what_a_state_dict_cannot_hold_is_refused(tmp_path):
    for key, value in (("kind", "vp"), ("sigma_data", .7), ("sigma_min", .01), ("sigma_max", 40.)):
        m = small()
        setattr(m, key, value)
        with pytest.raises(ValueError, match="write a .safetensors file"): save_model(m, tmp_path / "x.pt")
        again = load(save_model(m, tmp_path / f"{key}.safetensors"))
        assert getattr(again, key) == value
    assert not (tmp_path / "x.pt").exists()
    with pytest.raises(ValueError, match="sigma_data, nonsense can't be given"):
        load(tmp_path / "kind.safetensors", sigma_data=0.7, nonsense=3)


@pytest.mark.parametrize("heads, per_head", [(lambda c: c // 16, 16), (lambda c: 2, 16), (lambda c: 1, None)])
def test_heads_of_an_edm_pickle_are_those_of_its_blocks(tmp_path, heads, per_head):
    import foreign_files as ff

    m = small(
        Denoiser,
        family="adm",
        channels=3,
        image_size=16,
        model_channels=32,
        channel_mult=(1, 1),
        attention=(8,),
        channels_per_head=per_head or 32,
    )
    got = load(
        ff.make_edm_pickle(tmp_path / "x.pkl", _foreign_state(m), "EDMPrecond", "DhariwalUNet", num_heads=heads(32))
    )
    assert got.net.config["channels_per_head"] == (per_head or 32)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1., 2.])
    assert (got.D(x, t) - m.D(x, t)).abs().max() < 1e-6


def test_an_edm_pickle_whose_blocks_compute_something_else_is_refused(tmp_path):
    from dataclasses import replace
    import foreign_files as ff
    from ctm_nb.checkpoints.foreign import read_edm_pickle
    from ctm_nb.checkpoints.models import _from_edm

    n = read_edm_pickle(
        ff.make_edm_pickle(tmp_path / "x.pkl", _foreign_state(small(Denoiser)), "EDMPrecond", "SongUNet")
    )
    for key, value in (("skip_scale", 1.), ("adaptive_scale", True)):
        modules = {k: {**v, key: value} for k, v in n.config["modules"].items() if "block" in k}
        with pytest.raises(ValueError, match=key): _from_edm(replace(n, config={**n.config, "modules": modules}))


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "[]",
        "nonsense",
        '{"description": 3}',
        '{"description": {"kind": "ctm"}}',
        '{"description": {"kind": "ctm", "classes": [], "network": {"family": "ddpmpp", "image_size": "big"}}}',
    ],
)
def test_a_header_that_describes_nothing_is_one_line(tmp_path, header):
    from safetensors.torch import save_file
    save_file({"net.x": torch.zeros(1)}, tmp_path / "x.safetensors", {"ctm_nb": header})
    with pytest.raises(ValueError) as e: load(tmp_path / "x.safetensors")
    assert str(e.value).startswith(str(tmp_path)) and "\n" not in str(e.value)


def test_an_edm_pickle_without_a_network_is_one_line(tmp_path):
    import foreign_files as ff

    path = ff.make_edm_pickle(
        tmp_path / "x.pkl", {"model.map_layer0.weight": torch.zeros(2, 2)}, "EDMPrecond", "SongUNet"
    )
    with pytest.raises(ValueError, match="incomplete"): load(path)


def test_public_names_that_cannot_be_loaded_are_refused_before_any_download(monkeypatch):
    monkeypatch.setattr("ctm_nb.checkpoints.models.fetch", lambda *a, **k: pytest.fail("fetched"))
    for name, which, message in (
        ("inception-2015-12-05", None, "can't be loaded: TorchScript"),
        ("cd-imagenet64-lpips", "ctm", "consistency model, not a ctm"),
        ("edm-cifar10-32x32-cond-vp", "ctm", "is a teacher, not a ctm"),
        ("baseline-imagenet-64x64-cond-adm", None, "can't be loaded: not loadable here"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name, which=which)


def test_runs_of_before_the_preconditioning_was_recorded(tmp_path):
    m = small()
    about = describe(m)
    del about["preconditioning"], about["network"]["channels_per_head"]
    save_checkpoint(
        tmp_path / "run" / "checkpoints",
        1,
        {"ctm": m.state_dict()},
        {},
        {"models": {"ctm": {"part": "ctm", "description": about}}},
    )
    assert describe(load(tmp_path / "run")) == describe(m)
    with pytest.raises(ValueError, match="can't be given"): load(tmp_path / "run", image_size=8)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mlp"])
@pytest.mark.parametrize("s_branch", [False, True])
@pytest.mark.parametrize("n_classes", [0, 5])
@pytest.mark.parametrize(
    "mult, n_blocks, attention", [((1, 2), 1, (8,)), ((1, 2, 2), 2, (8, 4)), ((2,), 3, ()), ((1, 1, 2), 1, (16, 8, 4))]
)
def test_every_shape_is_read_off_the_weights(family, s_branch, n_classes, mult, n_blocks, attention):
    m = small(
        CTM if s_branch else Denoiser,
        family=family,
        image_size=16,
        n_classes=n_classes,
        model_channels=8,
        channel_mult=mult,
        n_blocks=n_blocks,
        attention=attention,
        channels_per_head=4,
    )
    found, _ = _infer_network(
        _foreign_state(m), channels_per_head=4, **({"image_size": 16} if family == "openai" else {})
    )
    assert network_config(build_network(**found)) == network_config(m.net)


@pytest.mark.parametrize(
    "preset, side, n_classes, published, teacher, student",
    [
        ("cifar10", 32, 0, 56, 55_733_891, 60_396_419),
        ("cifar10-cond", 32, 10, 56, 55_735_299, 60_397_827),
        ("imagenet64", 64, 1000, 296, 295_899_267, 324_100_611),
    ],
)
def test_full_size_networks_build_and_run(preset, side, n_classes, published, teacher, student):
    "EDM's paper gives rounded counts (56 M, 296 M); the exact ones are this package's, pinned."
    data = ImageData(
        torch.zeros(1, 3, side, side, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64) if n_classes else None,
        [str(i) for i in range(n_classes)],
        "empty",
    )
    with torch.device("meta"): net = make_network(make_config(preset, ["data.source=x"]), data).eval()
    count = lambda net: sum(p.numel() for p in net.parameters())
    with torch.device("meta"): with_s = build_network(**{**network_config(net), "s_branch": True})
    assert (count(net), count(with_s)) == (teacher, student) and round(count(net) / 1e6) == published
    net.to_empty(device="cpu")
    torch.manual_seed(0)
    for k, v in net.state_dict().items():
        v.fill_(0.25 if k.endswith("filter") else 0.0) if v.ndim < 2 or k.endswith("filter") else v.normal_(std=0.02)
    with torch.no_grad():
        out = Denoiser(net).D(torch.randn(1, 3, side, side), 1.0, torch.tensor([3]) if n_classes else None)
    assert out.shape == (1, 3, side, side) and torch.isfinite(out).all() and out.std() > 0
