"""Files of strangers: round trips, damage of every kind, limits on memory, attacks one by one."""
import io
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import foreign_files as ff  # noqa: E402

import ctm_nb.checkpoints.foreign as foreign  # noqa: E402
from ctm_nb.checkpoints.foreign import read_edm_pickle, read_safetensors, read_weights, sniff  # noqa: E402
from ctm_nb.checkpoints.unpickle import EDM_NAMES, edm_network  # noqa: E402
from ctm_nb.data.pickles import MAX_STEPS, PLAIN_NAMES, SLACK, Budget, ForeignFileError, Unpickler  # noqa: E402

GOLDEN = Path(__file__).parents[1]/"golden"


def golden(name):
    return {k[6:]: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items() if k.startswith("state.")}


def read_torch(path): return read_weights(path)[0]


def run(data, names=EDM_NAMES): return Unpickler(memoryview(data), Budget(len(data)), names).run()


def same(a, b):
    assert list(a) == list(b)
    for k in a: assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]), k


@pytest.fixture
def canary(tmp_path):
    "Must not exist when the test is over."
    path = tmp_path/"canary"
    yield path
    assert not path.exists(), "a payload was run"


# ---- honest files

@pytest.mark.parametrize("name, protocol", [("ddpmpp_uncond_8", 3), ("ncsnpp_cond10_8", 4), ("adm_cond10_16", 5)])
def test_edm_round_trip(name, protocol, tmp_path, canary):
    state = golden(name)
    if protocol == 5: state = {k: v.float() for k, v in state.items()}
    path = ff.make_edm_pickle(
        tmp_path / "net.pkl",
        state,
        "VEPrecond",
        "DhariwalUNet",
        protocol,
        canary,
        sigma_min=0.02,
        sigma_max=float("inf"),
        label_dim=10,
        channel_mult=[1, 2],
    )
    assert sniff(path) == "edm_pickle"
    net = read_edm_pickle(path)
    same(net.state, state)
    assert (net.class_name, net.model_class) == ("VEPrecond", "DhariwalUNet")
    assert {k: net.config[k] for k in ("sigma_min", "sigma_max", "label_dim", "use_fp16")} == dict(
        sigma_min=0.02, sigma_max=float("inf"), label_dim=10, use_fp16=False
    )
    assert "channel_mult" not in net.config  # no number
    heads = {k: v["num_heads"] for k, v in net.config["modules"].items() if "num_heads" in v}
    with_attention = {k[:-len(".qkv.weight")] for k in state if k.endswith(".qkv.weight")}
    assert with_attention and {k for k, n in heads.items() if n} == with_attention
    scale = 1. if name.startswith("adm") else np.sqrt(.5)
    assert all(
        v["skip_scale"] == scale and type(v["skip_scale"]) is float
        for v in net.config["modules"].values()
        if "num_heads" in v
    )


@pytest.mark.parametrize("heads, expected", [(None, 2), (4, 4), (lambda channels: channels // 32, 4)])
def test_heads_are_those_of_the_file(heads, expected, tmp_path):
    block = {
        "model.enc.a.norm0.weight": torch.ones(128),
        "model.enc.a.qkv.weight": torch.ones(384, 128, 1, 1),
        "model.enc.b.norm0.weight": torch.ones(128),
    }
    net = read_edm_pickle(ff.make_edm_pickle(tmp_path/"net.pkl", block, model_class="DhariwalUNet", num_heads=heads))
    assert {k: v["num_heads"] for k, v in net.config["modules"].items() if "num_heads" in v} == {
        "model.enc.a": expected,
        "model.enc.b": 0,
    }


def test_edm_tensors_are_independent_of_the_file(tmp_path):
    path = ff.make_edm_pickle(tmp_path/"net.pkl", {"model.a.weight": torch.ones(3, 3)})
    t = read_edm_pickle(path).state["model.a.weight"]
    path.write_bytes(b"")
    assert torch.equal(t.mul_(2), torch.full((3, 3), 2.))


def test_edm_shared_storage_odd_strides_and_types(tmp_path):
    base = torch.arange(24.)
    state = {
        "model.a.weight": base.view(4, 6).T,
        "model.b.weight": base[5:9].view(2, 2),
        "model.b.bias": torch.zeros(0),
        "model.u.u": torch.tensor(3, dtype=torch.int64),
        "model.mask.flag": torch.tensor([True, False]),
        "model.half.weight": torch.ones(2, 2).bfloat16(),
        "model.conv.weight": torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last),
    }
    net = read_edm_pickle(ff.make_edm_pickle(tmp_path/"net.pkl", state))
    same({k: net.state[k] for k in state}, state)
    assert all(net.state[k].stride() == state[k].stride() for k in state)


def test_one_parameter_under_two_names(tmp_path):
    tied = torch.nn.Parameter(torch.randn(50, 50))
    net = ff.Persistent("EDMPrecond")
    net._modules["model"] = model = ff.Persistent("SongUNet")
    for name in "ab":
        model._modules[name] = ff.Persistent("Linear")
        model._modules[name].weight = tied
    with ff.foreign_names(): (tmp_path/"net.pkl").write_bytes(pickle.dumps(dict(ema=net), 4))
    state = read_edm_pickle(tmp_path/"net.pkl").state
    assert state["model.a.weight"].data_ptr() == state["model.b.weight"].data_ptr() and torch.equal(
        state["model.b.weight"], tied.data
    )


def test_other_entries_do_not_matter_but_must_be_harmless(tmp_path, canary):
    state = {"model.a.weight": torch.ones(2, 2)}
    plain = dict(
        training=ff.EasyDict(
            lr=np.float32(1e-3),
            dtype=torch.float16,
            device=torch.device("cpu"),
            size=torch.Size([3]),
            names={"a", "b"},
            more=OrderedDict(x=1),
        )
    )
    same(read_edm_pickle(ff.make_edm_pickle(tmp_path/"net.pkl", state, extra=plain)).state, state)
    ff.make_edm_pickle(tmp_path/"net.pkl", state, extra=dict(hook=ff.Call(os.system, f"touch {canary}")))
    with pytest.raises(ForeignFileError, match="system, which is not on the list"): read_edm_pickle(tmp_path/"net.pkl")


def test_buffers_that_do_not_persist_are_left_out(tmp_path):
    path = ff.make_edm_pickle(tmp_path/"net.pkl", {"model.enc.a.weight": torch.ones(2, 2)})
    assert list(read_edm_pickle(path).state) == ["model.enc.a.weight"] and b"scratch" in path.read_bytes()


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        dict,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "opt": [s]},
        lambda s: {"model": {"w": torch.ones(1)}, "ema": s},
    ],
)
def test_torch_round_trip(new, wrap, tmp_path):
    state = OrderedDict(golden("unet_cond10_16"))
    state["shared"] = state["out.2.weight"][1:]
    state["number"], state["flag"] = torch.tensor(3), torch.tensor([True])
    torch.save(wrap(state), tmp_path/"x", _use_new_zipfile_serialization=new)
    assert sniff(tmp_path/"x") == "torch"
    same(read_torch(tmp_path/"x"), state)


def test_torch_state_dict_of_a_module(tmp_path):
    "With the version numbers that torch hides in an attribute."
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    torch.save(net.state_dict(), tmp_path/"x.pt")
    same(read_torch(tmp_path/"x.pt"), net.state_dict())


def test_safetensors_round_trip(tmp_path):
    state = {k: v.contiguous() for k, v in sorted(golden("ddpmpp_cond10_8").items())}
    save_file(state, tmp_path/"x.bin", metadata={"a": "b"})
    assert sniff(tmp_path/"x.bin") == "safetensors"
    out, about = read_safetensors(tmp_path/"x.bin")
    same(dict(sorted(out.items())), state)
    assert about == {"a": "b"}


def test_folders(tmp_path):
    (tmp_path/"run"/"checkpoints"/"step_1").mkdir(parents=True)
    (tmp_path/"run"/"checkpoints"/"step_1"/"checkpoint.json").touch()
    assert sniff(tmp_path/"run") == "run" and sniff(tmp_path/"run"/"checkpoints"/"step_1") == "checkpoint"
    with pytest.raises(ForeignFileError, match="neither a run"): sniff(tmp_path)


# ---- the machine

def test_plain_data_as_python_reads_it():
    rng = random.Random(0)
    def grow(depth):
        kinds = [
            lambda: rng.choice([None, True, False, 1.5, float("-inf"), "text", "ü€😀"]),
            lambda: rng.randrange(-(2**63), 2**63) >> rng.randrange(64),
        ]
        if depth:
            kinds += [
                lambda: [grow(depth - 1) for _ in range(rng.randrange(4))],
                lambda: tuple(grow(depth - 1) for _ in range(rng.randrange(6))),
                lambda: {rng.choice(["a", "b", 3, None]): grow(depth - 1) for _ in range(3)},
            ]
        return rng.choice(kinds)()
    for i in range(150):
        data = grow(4)
        assert run(pickle.dumps(data, 2 + i % 4), PLAIN_NAMES) == data


def test_no_name_is_imported():
    "A module that would leave a trace when imported; the names of the table themselves are no way to it."
    assert "antigravity" not in sys.modules
    for name in ("antigravity", "torch.nn.modules.linear", "collections"):
        with pytest.raises(ForeignFileError, match="not on the list"): run(ff.glob(name, "fly") + b".")
    assert "antigravity" not in sys.modules
    for module, name in EDM_NAMES:
        assert (
            "system" not in name
            and module.split(".")[0]
            in {"_codecs", "collections", "builtins", "__builtin__", "torch", "numpy", "torch_utils", "dnnlib"}
            and name not in {"eval", "exec", "getattr", "setattr", "__import__", "open", "load"}
        )


def test_the_budget_counts_steps_and_bytes():
    budget = Budget(100)
    budget.spend(steps=MAX_STEPS, nbytes=SLACK + 100)
    for what in (dict(steps=1), dict(steps=0, nbytes=1)):
        with pytest.raises(ForeignFileError): budget.spend(**what)


# ---- attacks

@pytest.fixture(scope="module")
def attack_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    (folder/"files").mkdir()
    return {a.name: a for a in ff.make_attacks(folder/"files", folder/"canary")}, folder/"canary"


EXPECTED = {
    "os_system.pkl": "system",
    "eval.pkl": "builtins.eval",
    "exec.pkl": "builtins.exec",
    "getattr.pkl": "builtins.getattr",
    "dotted.pkl": "OrderedDict.__init__",
    "torch_load.pkl": "torch.serialization.load",
    "nested.pkl": "system",
    "nested_torch.pkl": "system",
    "copyreg.pkl": "copyreg._reconstructor",
    "class.pkl": "'__class__'",
    "dict.pkl": "'__dict__'",
    "persistent_id.pkl": "persistent id",
    "lists.pkl": "steps to unfold",
    "again.pkl": "more memory than the file",
    "astral.pkl": "more memory than the file",
    "size.pkl": "impossible shape",
    "expand.pkl": "does not fit",
    "offset.pkl": "does not fit",
    "negative.pkl": "impossible shape",
    "storage.pkl": "more memory than the file",
    "count.pkl": "claims to have",
    "binbytes8.pkl": "cut short",
    "unicode8.pkl": "more memory than the file",
    "slots.pkl": "in slots",
    "setstate.pkl": "attributes of a function",
    "storage.pt": "more memory than the file",
    "storage_old.pt": "more memory than the file",
    "modules.pkl": "bomb",
    "escape.pkl": r"a \\x1b\[2J.{1,4}ok without a model",
    "huge.safetensors": "damaged",
    "header.safetensors": "too long",
    "cut.safetensors": "cut short",
    "names.pkl": "more memory than the file",
    "deep.pkl": "key that is a tuple",
    "cycle.pkl": "nested more than",
    "bomb.pt": "compressed",
    "evil.pt": "system",
    "evil_old.pt": "system",
    "overlap.pt": "longer than the file",
    "text.pkl": "text file",
    "empty.pkl": "empty file",
    "page.pkl": "HTML",
    "photo.pkl": "JPEG",
    "arrays.pt": "npz",
    "other.pkl": "no.* 'ema'|without an entry 'ema'",
    "pointer.pkl": "LFS",
    "pictures.pt": "zip archive",
    "training.pt": "epoch",
    "a_folder.pkl": "folder",
    "capitals_below.pt": "not one that torch.save wrote",
    "capitals_list.pt": "not one that torch.save wrote",
    "folders.pt": "impossible shape",
    "below.pt": "not one that torch.save wrote",
    "deeper.pt": "impossible shape",
    "zero.pt": "impossible shape",
    "inner.pt": "differ",
    "longer.pt": "differ",
    "mark.pt": "header",
    "split.pt": "not a file of torch.save",
    "loop.pkl": "symbolic links",
    "pipe.pkl": "pipe",
    "/dev/zero": "device",
}


def test_attacks_within_limits(attack_files):
    """Each in a process of its own that can't have much memory; the error is of one line, names the file and says why.

    What remains below 300 MB, in seconds, is neither a bomb nor a loop."""
    files, canary = attack_files
    def read(attack):
        try: sniff(attack.path)
        except ForeignFileError as e: assert str(e).startswith(f"{attack.path}: ")
        return getattr(foreign, attack.read)(attack.path)
    import re
    for name, attack in files.items():
        result, seconds, mb = ff.in_child(
            lambda: ff.shown(read(attack)), memory=300 + 2 * attack.size // 2**20
        )
        if attack.harmless is not None: assert result == attack.harmless, (name, result)
        else:
            assert type(result) is ForeignFileError, (name, result)
            assert (
                str(result).startswith(f"{attack.path}: ") and str(result).isprintable() and len(str(result)) < 500
            ), (name, str(result))
            assert re.search(EXPECTED.get(name, ""), str(result)), (name, str(result))
        assert seconds < 20 and mb < 2 * attack.size / 2**20 + 130, (name, seconds, mb)
    assert set(EXPECTED) <= set(files) and not canary.exists()


def test_archives_that_are_read_in_two_ways(attack_files):
    "They are real: torch reads 2**40 numbers, or a list, where ours gives the honest three numbers or nothing."
    files, _ = attack_files
    for name in ("capitals_below.pt", "capitals_after.pt", "tables.pt"):
        assert torch.load(files[name].path, weights_only=True)["w"].numel() == 2**40, name
    assert torch.load(files["capitals_list.pt"].path, weights_only=True) == [1, 2, 3]
    for name in ff.ONE_READER: same(read_torch(files[name].path), {"w": torch.zeros(3)})
    for name in {name for name, _, _ in ff.two_ways()} - ff.ONE_READER:
        with pytest.raises(ForeignFileError): read_torch(files[name].path)


def test_an_archive_of_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MAX_ENTRIES", 9)
    for n in (6, 7):
        (tmp_path/"x.pt").write_bytes(
            ff.zip_bytes({"a/data.pkl": ff.pickled_state((3,), (1,), 3), "a/data/0": bytes(12), "a/version": b"3\n",
                          **{f"a/{i}": b"" for i in range(n)}}))
        if n == 6: assert sniff(tmp_path/"x.pt") == "torch" and len(read_torch(tmp_path/"x.pt")) == 1
        else:
            with pytest.raises(ForeignFileError, match="more than 9 entries"): sniff(tmp_path/"x.pt")


def test_big_endian_numbers_are_refused(tmp_path):
    state = ff.pickled_state((3,), (1,), 3)
    (tmp_path/"x.pt").write_bytes(ff.zip_bytes({"a/data.pkl": state, "a/byteorder": b"big", "a/data/0": bytes(12)}))
    with pytest.raises(ForeignFileError, match="big-endian"): read_torch(tmp_path/"x.pt")


@pytest.mark.parametrize("new", [True, False])
def test_bools_and_numbers_are_those_that_torch_reads(new, tmp_path):
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.half, torch.bfloat16, torch.double)
    state = {str(kind): (9 * torch.randn(3, 5)).to(kind) for kind in kinds}
    state |= {"part": torch.arange(12.).view(3, 4)[1:, ::2], "empty": torch.zeros(2, 0)}
    torch.save(state, tmp_path/"x.pt", _use_new_zipfile_serialization=new)
    same(read_torch(tmp_path/"x.pt"), torch.load(tmp_path/"x.pt", weights_only=True))
    if new: return
    data = (tmp_path/"x.pt").read_bytes()
    flags = state["torch.bool"].view(torch.uint8).numpy().tobytes()
    (tmp_path/"x.pt").write_bytes(data.replace(flags, b"\x07" * len(flags)))
    assert read_torch(tmp_path/"x.pt")["torch.bool"].view(torch.uint8).eq(1).all()


def test_a_flipped_bit_among_the_numbers_is_an_error(tmp_path):
    torch.save({"w": torch.arange(100.)}, tmp_path/"x.pt")
    data = bytearray((tmp_path/"x.pt").read_bytes())
    data[data.index(np.arange(100, dtype=np.float32).tobytes()) + 50] ^= 1
    (tmp_path/"x.pt").write_bytes(data)
    with pytest.raises(ForeignFileError, match="x.pt: damaged: Bad CRC-32"): read_torch(tmp_path/"x.pt")


def test_honest_archives_of_other_writers(tmp_path, monkeypatch):
    "Without zip64 records, with entries for folders, with zip64 fields in every entry."
    path, files = (
        tmp_path / "x.pt",
        {
            "a/": b"",
            "a/data.pkl": ff.pickled_state((3,), (1,), 3),
            "a/data/0": np.float32([1, 2, 3]).tobytes(),
            "a/version": b"3\n",
        },
    )
    for limit in (zipfile.ZIP64_LIMIT, 10):
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        path.write_bytes(ff.zip_bytes(files))
        assert (b"PK\6\6" in path.read_bytes()) == (limit == 10)
        assert sniff(path) == "torch" and read_torch(path)["w"].tolist() == [1, 2, 3]


def test_form_of_empty_tensors(tmp_path):
    "Their strides mean nothing."
    state = {"w": torch.empty(0, 4, 3).transpose(1, 2), "v": torch.ones(2)}
    torch.save(state, tmp_path/"x.pt")
    same(read_torch(tmp_path/"x.pt"), state)


@pytest.mark.parametrize("error", [AttributeError, KeyError, IndexError, TypeError, RuntimeError, ZeroDivisionError])
def test_errors_from_elsewhere_name_the_file(error):
    with pytest.raises(ForeignFileError, match="x.pt: damaged: .*oh"), foreign._naming("x.pt"): raise error("oh")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set from /proc")
def test_the_limit_of_the_test_above_bites():
    take = lambda: len(bytearray(1 << 29))  # more than any heap has left over from other tests
    assert ff.in_child(take)[0] == 1 << 29 and type(ff.in_child(take, memory=300)[0]) is MemoryError


def test_the_attacks_are_real(tmp_path):
    "Python's own unpickler falls for them: so a reader that runs nothing is worth something, and the canary sings."
    canary = tmp_path/"canary"
    files = {name: data for name, _, data in ff.executing(canary)}
    for name in ("os_system.pkl", "os_system_0.pkl", "eval.pkl", "exec.pkl", "inst.pkl", "nested.pkl"):
        load = (lambda f: torch.load(f, weights_only=False)) if name == "nested.pkl" else pickle.load
        data = (
            files[name][files[name].index(b"\x80\x02") : -3] if name == "nested.pkl" else files[name]
        )  # the bytes that torch itself would load
        ff.in_child(lambda: load(io.BytesIO(data)) and None)
        assert canary.exists(), name
        canary.unlink()


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path/"secret.pkl"
    path.write_bytes(pickle.dumps({"ema": 1}))
    path.chmod(0)
    def read():
        if os.geteuid() == 0: os.seteuid(65534)
        for reader in (sniff, read_edm_pickle, read_torch, read_safetensors):
            try: reader(path)
            except ForeignFileError as e: message = str(e)
        return message
    assert "secret.pkl: can't be read: Permission denied" in str(ff.in_child(read)[0])


def test_missing_file_and_odd_names(tmp_path):
    with pytest.raises(ForeignFileError, match="No such file"): sniff(tmp_path/"nowhere")
    path = tmp_path/"a\nb\x1b.pkl"
    path.write_bytes(b"hello")
    with pytest.raises(ForeignFileError) as e: sniff(path)
    assert r"a\nb\x1b.pkl: a text file" in str(e.value)


# ---- damage

def small_files(folder, canary):
    state = {"model.map.weight": torch.randn(4, 4), "model.map.freqs": torch.ones(2).bool()}
    yield read_edm_pickle, ff.make_edm_pickle(folder/"a", state, short=True, canary=canary).read_bytes()
    for new in (True, False):
        torch.save(
            OrderedDict(a=state["model.map.weight"], b=state["model.map.freqs"]),
            folder / "a",
            _use_new_zipfile_serialization=new,
        )
        yield read_torch, (folder/"a").read_bytes()
    save_file(dict(a=state["model.map.weight"], b=state["model.map.freqs"]), folder/"a")
    yield read_safetensors, (folder/"a").read_bytes()


def attempt(reader, path, data):
    "Whether the file was read; anything but a ForeignFileError of one line is a failure."
    path.write_bytes(data)
    for f in (sniff, reader):
        try: out = f(path)
        except ForeignFileError as e:
            assert str(e).startswith(f"{path}: ") and str(e).isprintable()
            out = None
    if out is None: return False
    state = out if type(out) is dict else out[0] if type(out) is tuple else out.state
    for k, t in state.items():
        assert type(k) is str and type(t) is torch.Tensor and t.numel() < 1000
        t.clone().float().sum()
        if t.dtype is torch.bool: assert t.view(torch.uint8).max() <= 1 if t.numel() else True
    return True


@pytest.mark.parametrize("which", range(4))
def test_truncated_anywhere(which, tmp_path, canary):
    reader, data = list(small_files(tmp_path, canary))[which]
    assert attempt(reader, tmp_path/"x", data)
    for n in range(which, len(data), 4): assert not attempt(reader, tmp_path/"x", data[:n]), n


@pytest.mark.parametrize("which, changes", [(0, 600), (1, 300), (2, 300), (3, 300)])
def test_changed_bytes(which, changes, tmp_path, canary):
    reader, data = list(small_files(tmp_path, canary))[which]
    rng = random.Random(which)
    results = []
    for _ in range(changes):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))): damaged[rng.randrange(len(data))] = rng.randrange(256)
        results.append(attempt(reader, tmp_path/"x", bytes(damaged)))
    assert 0 < sum(results) < changes  # some in the weights, some elsewhere


def test_programs_at_random(tmp_path):
    "Random sequences of valid instructions, with names of the table, storages and tensors among them."
    rng, names = random.Random(0), list(EDM_NAMES)
    storage = ff.load_bytes(ff.legacy(ff.storage_id(4), raw=struct.pack("<q4f", 4, 1, 2, 3, 4)))
    pieces = [
        b"(",
        b"}",
        b"]",
        b")",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"\x81",
        b"b",
        b"N",
        b"K\x03",
        b"\x94",
        b"h\x00",
        b"h\x01",
        b"\x90",
        b"Q",
        ff.text("ema"),
        ff.text("state"),
        ff.text("_modules"),
        ff.text("f8"),
        ff.blob(b"12345678"),
        storage,
        ff.tensor(storage, 0, (2, 2), (2, 1)),
        b"\x93",
    ]
    for _ in range(4000):
        program = (
            b"\x80\x04"
            + b"".join(
                rng.choice(pieces) if rng.random() < 0.8 else ff.glob(*rng.choice(names))
                for _ in range(rng.randrange(4, 30))
            )
            + b"."
        )
        try: edm_network(run(program), len(program))
        except (ForeignFileError, TypeError, ValueError, AttributeError, LookupError, pickle.UnpicklingError): pass


def test_edm_network_wants_a_network():
    for value in ([], {"a": 1}, {"ema": {}}, {"ema": 3}):
        with pytest.raises(ForeignFileError): edm_network(value, 10)
