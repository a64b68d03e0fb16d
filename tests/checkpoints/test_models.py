"""Every checkpoint people have: there and back bit for bit, the wrong ones refused, the full-size networks for real."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.training.config import make_config
from ctm_nb.data.images import ImageData
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.sampling import sample
from ctm_nb.checkpoints.models import (
    _foreign_state, _from_state, _infer_network, describe, load, save_model)
from ctm_nb.networks.families import FAMILIES, build_network, network_config
from ctm_nb.checkpoints.store import save_checkpoint
from ctm_nb.method.trajectory import CTM, student_from
from ctm_nb.networks.unet import DDPMpp
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
    m.classes, m.sigma_max, m.sigma_init = ["a", "b", "c"], 40., 5.
    again = load(save_model(m, tmp_path / "m.safetensors", config={"run": {"seed": 5}}))
    assert describe(again) == describe(m) and again.classes == ["a", "b", "c"]
    assert (again.sigma_max, again.sigma_init) == (40., 5.)
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
    for key, value in (("kind", "vp"), ("sigma_data", .7), ("sigma_min", .01), ("sigma_max", 40.), ("sigma_init", 5.)):
        m = small()
        setattr(m, key, value)
        with pytest.raises(ValueError, match="write a .safetensors file"): save_model(m, tmp_path / "x.pt")
        again = load(save_model(m, tmp_path / f"{key}.safetensors"))
        assert getattr(again, key) == value
    assert not (tmp_path / "x.pt").exists()
    with pytest.raises(ValueError, match="sigma_data, nonsense can't be given"):
        load(tmp_path / "kind.safetensors", sigma_data=0.7, nonsense=3)


def test_a_family_of_one_s_own_has_no_state_dict_of_others(tmp_path, monkeypatch):
    "It would be read again as the family whose names it has, and compute something else."
    class Plain(DDPMpp): conventions = replace(DDPMpp.conventions, embedding="cos")
    monkeypatch.setitem(FAMILIES, "plain", Plain)
    m = CTM(Plain(8, 1, s_branch=True, model_channels=8, channel_mult=(1,), n_blocks=1, attention=()))
    with pytest.raises(ValueError, match=".plain.; write a .safetensors file"): save_model(m, tmp_path / "x.pt")
    assert type(load(save_model(m, tmp_path / "x.safetensors")).net) is Plain


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
        '{"description": {"kind": "teacher", "classes": [], "network": {"family": "mlp", "dim": 2}, "sigma_init": 5}}',
        '{"description": {"kind": "ctm", "classes": [], "network": {"family": "mlp", "dim": 2}, "sigma_init": -5}}',
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
        ("cd-imagenet64-lpips", "teacher", "consistency model, not a teacher"),
        ("edm-imagenet64-openai", "cm", "is a teacher, not a cm"),
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


@pytest.mark.parametrize("family", ["adm", "openai"])
def test_runs_of_before_the_first_convolution_was_wider(tmp_path, family):
    m = small(family=family, model_channels=16, channel_mult=(2, 2), channels_per_head=8, stem=16)
    about = describe(m)
    assert about["network"].pop("stem") == 16
    models = {"ctm": {"part": "ctm", "description": about}}
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"ctm": m.state_dict()}, {}, {"models": models})
    again = load(tmp_path / "run")
    assert describe(again) == describe(m) and torch.equal(sample(again, 2), sample(m, 2))


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
    config = network_config(m.net)
    if (family, mult) == ("edm2", (2,)): config |= dict(model_channels=16, channel_mult=(1,))  # the same network
    assert network_config(build_network(**found)) == config


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
    some = .02 * torch.randn(1_000_003)  # again and again, for drawing 296 M takes seconds
    for k, v in net.state_dict().items():
        if v.ndim < 2 or k.endswith("filter"): v.fill_(.25 if k.endswith("filter") else 0.)
        else:
            for part in v.view(-1).split(len(some)): part.copy_(some[:len(part)])
    with torch.no_grad():
        out = Denoiser(net).D(torch.randn(1, 3, side, side), 1.0, torch.tensor([3]) if n_classes else None)
    assert out.shape == (1, 3, side, side) and torch.isfinite(out).all() and out.std() > 0


def block(c_in, c_out, c_emb, heads, names):
    "Weights of one residual block in the layout of EDM's ADM, or of OpenAI's, name -> shape."
    norm0, conv0, affine, norm1, conv1, skip, norm2, qkv, proj = names
    found = {f"{norm0}.weight": (c_in,), f"{norm0}.bias": (c_in,), f"{conv0}.weight": (c_out, c_in, 3, 3),
             f"{conv0}.bias": (c_out,), f"{affine}.weight": (2 * c_out, c_emb), f"{affine}.bias": (2 * c_out,),
             f"{norm1}.weight": (c_out,), f"{norm1}.bias": (c_out,), f"{conv1}.weight": (c_out, c_out, 3, 3),
             f"{conv1}.bias": (c_out,)}
    if c_in != c_out: found |= {f"{skip}.weight": (c_out, c_in, 1, 1), f"{skip}.bias": (c_out,)}
    if not heads: return found
    return found | {f"{norm2}.weight": (c_out,), f"{norm2}.bias": (c_out,), f"{qkv}.weight": (3 * c_out, c_out, 1, 1),
                    f"{qkv}.bias": (3 * c_out,), f"{proj}.weight": (c_out, c_out, 1, 1), f"{proj}.bias": (c_out,)}


def random_state(shapes, prefix=""):
    g = torch.Generator().manual_seed(0)
    return {prefix + k: .1 * torch.randn(v, generator=g) for k, v in shapes.items()}


def adm_state(size, base, mult, n_blocks, attention, n_classes=0, outputs=3):
    "Random weights as EDM's ADM names and shapes them: attention in channels // 64 heads, none where that is 0."
    emb, shapes, stack, width = 4 * base, {}, [base * mult[0]], base * mult[0]
    inner = "norm0 conv0 affine norm1 conv1 skip norm2 qkv proj".split()
    def add(name, c_in, c_out, attend=False):
        shapes.update(block(c_in, c_out, emb, attend and c_out // 64, [f"{name}.{k}" for k in inner]))
        return c_out
    for i, n in (0, base), (1, emb): shapes |= {f"map_layer{i}.weight": (emb, n), f"map_layer{i}.bias": (emb,)}
    if n_classes: shapes["map_label.weight"] = emb, n_classes
    for level, m in enumerate(mult):
        at = f"{size >> level}x{size >> level}"
        if level == 0: shapes |= {f"enc.{at}_conv.weight": (width, 3, 3, 3), f"enc.{at}_conv.bias": (width,)}
        else: stack.append(add(f"enc.{at}_down", width, width))
        for i in range(n_blocks):
            width = add(f"enc.{at}_block{i}", width, base * m, size >> level in attention)
            stack.append(width)
    for level, m in reversed(list(enumerate(mult))):
        at = f"{size >> level}x{size >> level}"
        if level == len(mult) - 1: add(f"dec.{at}_in1", add(f"dec.{at}_in0", width, width, True), width)
        else: add(f"dec.{at}_up", width, width)
        for i in range(n_blocks + 1):
            width = add(f"dec.{at}_block{i}", width + stack.pop(), base * m, size >> level in attention)
    shapes |= {"out_norm.weight": (width,), "out_norm.bias": (width,), "out_conv.weight": (outputs, width, 3, 3),
               "out_conv.bias": (outputs,)}
    return random_state(shapes, "model.")


def openai_state(size, base, mult, n_blocks, attention, n_classes=0):
    "Random weights as OpenAI's U-Net numbers and shapes them."
    emb, shapes, stack, width, n = 4 * base, {}, [base * mult[0]], base * mult[0], 0
    inner = "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3 skip_connection".split()
    def add(name, c_in, c_out, attend=False, at=0):
        names = [f"{name}.{at}.{k}" for k in inner] + [f"{name}.{at + 1}.{k}" for k in ("norm", "qkv", "proj_out")]
        shapes.update(block(c_in, c_out, emb, attend, names))
        return c_out
    for i, c in (0, base), (2, emb): shapes |= {f"time_embed.{i}.weight": (emb, c), f"time_embed.{i}.bias": (emb,)}
    if n_classes: shapes["label_emb.weight"] = n_classes, emb
    shapes |= {"input_blocks.0.0.weight": (width, 3, 3, 3), "input_blocks.0.0.bias": (width,)}
    for level, m in enumerate(mult):
        for i in range(n_blocks + (level > 0)):
            n, down = n + 1, level > 0 and i == 0
            attend = not down and size >> level in attention
            width = add(f"input_blocks.{n}", width, width if down else base * m, attend)
            stack.append(width)
    add("middle_block", width, width, True)
    add("middle_block", width, width, at=2)
    n = -1
    for level, m in reversed(list(enumerate(mult))):
        for _ in range(n_blocks + 1):
            n, attend = n + 1, size >> level in attention
            width = add(f"output_blocks.{n}", width + stack.pop(), base * m, attend)
        if level: add(f"output_blocks.{n}", width, width, at=1 + attend)
    shapes |= {"out.0.weight": (width,), "out.0.bias": (width,), "out.2.weight": (3, width, 3, 3), "out.2.bias": (3,)}
    return random_state(shapes)


@pytest.mark.parametrize("base, mult", [(32, (2, 2, 2)), (96, (1, 2)), (16, (2, 4)), (16, (1, 2, 2)), (80, (2, 3))])
def test_adm_of_any_width_from_edm_s_layout(tmp_path, base, mult):
    "`--cres=2,2,2`, `--cbase=96`, levels of less than 64 channels, levels that 64 does not divide."
    import foreign_files as ff
    state = adm_state(16, base, mult, 1, (16, 8), n_classes=5)
    heads = lambda channels: channels // 64
    pickled = ff.make_edm_pickle(tmp_path / "x.pkl", state, "EDMPrecond", "DhariwalUNet", num_heads=heads)
    torch.save(state, tmp_path / "x.pt")
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([1., 40.]), torch.tensor([4, 0])
    m, bare = load(pickled), load(tmp_path / "x.pt")
    assert (m.net.config["model_channels"], m.net.config["channel_mult"], m.n_classes) == (base, mult, 5)
    for name, b in m.net.named_modules():
        if hasattr(b, "heads") and b.heads: assert b.heads == b.conv1.weight.shape[0] // 64, name
    assert sum(p.numel() for p in m.parameters()) == sum(v.numel() for v in state.values())
    assert torch.isfinite(m.D(x, t, y)).all() and torch.equal(m.D(x, t, y), bare.D(x, t, y))
    student = student_from(m).eval()
    assert (student.g(x, t, t / 2, y) - m.D(x, t, y)).norm() < 1e-6 * m.D(x, t, y).norm()


@pytest.mark.parametrize("base, mult", [(32, (2, 2, 4)), (64, (1, 2)), (64, (2, 3))])
def test_openai_networks_whose_first_level_is_wider(tmp_path, base, mult):
    state = openai_state(16, base, mult, 1, (8, 4), n_classes=5)
    torch.save(state, tmp_path / "x.pt")
    m = load(tmp_path / "x.pt", image_size=16)
    assert (m.net.config["model_channels"], m.net.config["channel_mult"], m.n_classes) == (base, mult, 5)
    back = _foreign_state(m)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    assert m.about.endswith("3 x 16 x 16, heads of 64 channels (assumed)")
    assert load(tmp_path / "x.pt", image_size=16, channels_per_head=32).about.endswith("5 classes, 3 x 16 x 16")


def test_the_width_of_ncsnpp_is_half_of_its_embedding():
    m = small(Denoiser, family="ncsnpp", model_channels=16, channel_mult=(2, 2))
    found, _ = _infer_network(_foreign_state(m))
    assert (found["model_channels"], found["channel_mult"]) == (16, (2, 2)) and found["family"] == "ncsnpp"


def test_a_student_of_a_teacher_with_augmentation_is_exported_without_its_layer(tmp_path):
    "sony's program builds the student without `map_augment` and refuses a file that has it; the teacher keeps it."
    found, _ = states("ctm_dsm_step_8")
    teacher = _from_state(found["teacher"]).eval()
    student = student_from(teacher).eval()
    assert "map_augment.weight" in student.net.state_dict()
    for name, m in (("teacher", teacher), ("student", student)): save_model(m, tmp_path / f"{name}.pt")
    keys = {name: torch.load(tmp_path / f"{name}.pt").keys() for name in ("teacher", "student")}
    assert keys["teacher"] == found["teacher"].keys() and keys["student"] == found["student"].keys()
    again = load(tmp_path / "student.pt", which="ctm")
    assert torch.equal(sample(again, 3, y=[0, 1, 2]), sample(student, 3, y=[0, 1, 2]))


@pytest.mark.parametrize("class_name, config, low, high", [
    ("EDMPrecond", {}, .002, 80.), ("EDMPrecond", dict(sigma_min=0, sigma_max=float("inf")), .002, 80.),
    ("EDMPrecond", dict(sigma_min=.01, sigma_max=40.), .01, 40.),
    ("VEPrecond", dict(sigma_min=.02, sigma_max=100), .02, 80.),
    ("VEPrecond", dict(sigma_min=.02, sigma_max=50), .02, 50.),
    ("VPPrecond", dict(sigma_min=.001, sigma_max=152.), .002, 80.)])
def test_sigma_range_of_an_edm_pickle_is_never_wider_than_the_file_s(tmp_path, class_name, config, low, high):
    "Where EDM's generate.py samples: 80 to 0.002, as far as the file goes."
    import foreign_files as ff
    path = ff.make_edm_pickle(tmp_path / "x.pkl", _foreign_state(small(Denoiser)), class_name, "SongUNet", **config)
    m = load(path)
    assert (m.sigma_min, m.sigma_max) == (low, high)
    assert load(path, sigma_max=60.).sigma_max == 60.


def test_a_file_without_any_sigma_is_refused(tmp_path):
    import foreign_files as ff
    state = _foreign_state(small(Denoiser))
    path = ff.make_edm_pickle(tmp_path / "x.pkl", state, "EDMPrecond", "SongUNet", sigma_min=90., sigma_max=95.)
    with pytest.raises(ValueError, match="sigma_max must be above sigma_min, the file has 80 and 90"): load(path)


def test_an_iddpm_network_is_its_formula(tmp_path):
    "EDM Table 1, column iDDPM: noise predicted by half of the channels, the index of the nearest level as time."
    import foreign_files as ff
    state = adm_state(16, 16, (1, 4), 1, (8,), n_classes=3, outputs=6)
    alpha = lambda j: (torch.tensor(j / 1000 / 1.008) * np.pi / 2).sin() ** 2
    u = torch.zeros(1001)
    for j in range(1000, 0, -1): u[j - 1] = ((u[j] ** 2 + 1) / (alpha(j - 1) / alpha(j)).clip(min=.001) - 1).sqrt()
    write = lambda name, u: ff.make_edm_pickle(
        tmp_path / name, {**state, "u": u}, "iDDPMPrecond", "DhariwalUNet", num_heads=lambda c: c // 64,
        sigma_min=float(u[999]), sigma_max=float(u[0]))
    m = load(write("x.pkl", u))
    assert (m.kind, m.sigma_max) == ("iddpm", 80.) and m.sigma_min == pytest.approx(.0064, rel=.02)
    net = build_network(**network_config(m.net)).eval()
    mean = {k.removeprefix("model."): v[:3] if "out_conv" in k else v for k, v in state.items()}
    net.load_state_dict({**net.state_dict(), **mean})
    x, t, y = torch.randn(4, 3, 16, 16), torch.tensor([.0064, .3, 5., 79.]), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        c_noise = 999 - (u - t[:, None]).abs().argmin(1).float()
        F = net(x / (1 + t ** 2).sqrt()[:, None, None, None], c_noise, y=y)
    expected = x - t[:, None, None, None] * F
    assert (m.D(x, t, y) - expected).norm() < 1e-5 * expected.norm()
    again = load(save_model(m, tmp_path / "own.safetensors"))
    assert torch.equal(again.D(x, t, y), m.D(x, t, y))
    assert torch.isfinite(sample(again, 2, steps=3, solver="heun")).all()
    with pytest.raises(ValueError, match="the noise levels u must be those of iDDPM"): load(write("y.pkl", 1.1 * u))


@pytest.mark.parametrize("name", ["cd_imagenet64_lpips.pt", "ct_imagenet64.pt", "cd-imagenet64-l2.safetensors"])
def test_a_consistency_model_given_as_file_is_no_teacher(tmp_path, name):
    from safetensors.torch import save_file
    state = openai_state(8, 64, (1,), 1, (8,))
    write = save_file if name.endswith("tensors") else torch.save
    write(state, tmp_path / name)
    with pytest.raises(ValueError, match='consistency model by its name, not a teacher; which="cm" loads it'):
        load(tmp_path / name, which="teacher", image_size=8)
    for which in ("cm", None):
        m = load(tmp_path / name, which=which, image_size=8)
        assert isinstance(m, Denoiser) and "consistency model, loaded as a denoiser" in m.about
    own = save_model(m, tmp_path / "cd_own.safetensors")  # as ctm_nb_convert does: a teacher on purpose
    assert type(load(own, which="teacher")) is Denoiser
    (tmp_path / name).rename(tmp_path / "edm_imagenet64_ema.pt")
    assert type(load(tmp_path / "edm_imagenet64_ema.pt", which="teacher", image_size=8)) is Denoiser


def test_networks_of_the_catalogue_are_not_assumed(tmp_path, monkeypatch):
    torch.save(openai_state(64, 64, (1, 1, 1, 1), 1, ()), tmp_path / "x.pt")
    monkeypatch.setattr("ctm_nb.checkpoints.models.fetch", lambda name: tmp_path / "x.pt")
    for name, which in (("edm-imagenet64-openai", "teacher"), ("cd-imagenet64-l2", "cm")):
        about = load(name, which=which).about
        assert "assumed" not in about and about.endswith("no classes, 3 x 64 x 64")


def test_parts_of_our_own_that_are_no_model_say_what_to_do(tmp_path, untrained_run):
    run = untrained_run(tmp_path / "run", 1, [])
    part, = (run / "checkpoints").rglob("ctm.safetensors")
    with pytest.raises(ValueError, match=f"{part}: a part of a checkpoint: give the folder {part.parent}$"): load(part)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x0c2.15.0" + bytes(range(128, 256)))
    with pytest.raises(ValueError, match="m.onnx: an ONNX file, which is written here but not read"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_here_is_named(tmp_path, untrained_run, device):
    with pytest.raises(ValueError, match=f"device {device}: "): load(untrained_run(tmp_path, 1, []), device=device)
