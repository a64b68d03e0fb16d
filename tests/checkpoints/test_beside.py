"""What other programs keep beside their weights, and where they keep the weights; nothing of it is run or imported."""
import argparse
import collections
import datetime
import enum
import functools
import json
import pathlib
import sys

import numpy as np
import pytest
import torch

from ctm_nb.checkpoints.foreign import read_weights, sniff
from ctm_nb.checkpoints.models import load
from ctm_nb.data.pickles import ForeignFileError
from ctm_nb.commands.convert import ctm_nb_convert
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.families import build_network


class Mode(enum.Enum):
    FAST = 1


class Table(dict):
    "A dict of somebody's own."


class Slots:
    __slots__ = ("a",)


def slots():
    s = Slots()
    s.a = 1
    return s


BESIDE = {
    "a number of numpy": np.float64(1.5),
    "others": [np.int64(3), np.float32(.1), np.bool_(True), np.str_("x"), np.datetime64("2024-01-01")],
    "an array": np.arange(6.).reshape(2, 3),
    "an array of objects": np.array([{"a": 1}, None], object),
    "bytes of an array": np.frombuffer(b"\x00\xff\x80", np.uint8),
    "a random state": np.random.RandomState(0).get_state(),
    "arguments": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("/tmp/x"), layers=[1, 2]),
    "a path": pathlib.PosixPath("/tmp/x"),
    "a defaultdict": collections.defaultdict(list, {"loss": [1., 2.]}),
    "another": collections.defaultdict(functools.partial(collections.defaultdict, int), {}),
    "a counter": collections.Counter("abca"),
    "a deque": collections.deque([1, 2], maxlen=3),
    "a date": datetime.datetime(2024, 1, 2, 3),
    "an enum": {Mode.FAST: Mode.FAST},
    "a dict of one's own": Table(a=1, b=[2]),
    "slots": slots(),
    "sets": [{1, 2}, frozenset({3})],
    "odd keys": {(1, 2): "a", .5: "b", b"c": "d", None: "e"},
    "an optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    "complex numbers": torch.ones(2, dtype=torch.complex64),
    "a module": torch.nn.Linear(2, 3),
    "a class": torch.optim.Adam,
    "a function": torch.nn.functional.relu,
    "a type": torch.float16,
    "a device": torch.device("cpu"),
    "bytes": b"\x00\xff",
    "a large number": 2 ** 100,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_weights_are_read_beside_anything(tmp_path, what, new, protocol):
    if not new and what == "complex numbers": pytest.skip("the older format counts its storages")
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(3)}
    path = tmp_path / "x.pt"
    held = {"args": BESIDE[what], "state_dict": weights, "more": {"deeper": BESIDE[what]}, "epoch": 3}
    torch.save(held, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    assert sniff(path) == "torch"
    state, where = read_weights(path)
    assert state.keys() == weights.keys() and all(torch.equal(state[k], v) for k, v in weights.items())
    assert where.startswith(" under 'state_dict'")


def test_nothing_of_a_stand_in_is_imported_or_run(tmp_path):
    class Evil:
        def __reduce__(self): return print, ("run",)
    sys.modules["evil_module"] = evil = type(sys)("evil_module")
    evil.Thing = type("Thing", (), {"__module__": "evil_module", "__qualname__": "Thing"})
    torch.save({"model": {"w": torch.ones(3)}, "a": Evil(), "b": evil.Thing()}, tmp_path / "x.pt")
    torch.save({"model": {"w": torch.ones(3), "v": Evil()}}, tmp_path / "in.pt")
    del sys.modules["evil_module"]
    assert list(read_weights(tmp_path / "x.pt")[0]) == ["w"] and "evil_module" not in sys.modules
    with pytest.raises(ForeignFileError, match="holds no state dict"): read_weights(tmp_path / "in.pt")


# ---- where the weights lie

def network(seed):
    torch.manual_seed(seed)
    return Denoiser(build_network("ddpmpp", image_size=8, channels=1, model_channels=8))


@pytest.fixture(scope="module")
def states(): return [{f"model.{k}": v for k, v in network(s).net.state_dict().items()} for s in (0, 1)]


PLACES = {
    "model_ema": lambda a, b: {"model": b, "model_ema": a},
    "model_state_dict": lambda a, b: {"model_state_dict": a, "optimizer_state_dict": {"state": {0: {"step": a}}}},
    "ema_state_dict": lambda a, b: {"state_dict": b, "ema_state_dict": a},
    "net": lambda a, b: {"net": a, "lr": .1},
    "params_ema": lambda a, b: {"params": b, "params_ema": a},
    "state.model": lambda a, b: {"state": {"model": a, "step": 3}, "config": {"lr": 1}},
    "whatever": lambda a, b: {"whatever": a},
    "": lambda a, b: {**a, "num_updates": 3, "decay": .9, "n_averaged": torch.tensor(7)},
    "model": lambda a, b: {"model": {**a, "step": 5}},
}


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found_and_the_place_is_said(tmp_path, states, place):
    torch.save(PLACES[place](*states), tmp_path / "x.pt")
    m = load(tmp_path / "x.pt")
    theirs = network(0).net.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in m.net.state_dict().items())
    assert (f"under {place!r}" in m.about) == bool(place), m.about


def test_key_chooses(tmp_path, states, capsys):
    torch.save({"generator": states[0], "critic": states[1]}, tmp_path / "x.pt")
    with pytest.raises(SystemExit): ctm_nb_convert([str(tmp_path / "x.pt")])
    assert "x.pt: weights lie under 'generator', 'critic': choose one (--key" in capsys.readouterr().err
    ctm_nb_convert([str(tmp_path / "x.pt"), "--key", "critic"])
    assert "state dict under 'critic' (others: 'generator')" in capsys.readouterr().out
    with pytest.raises(SystemExit): ctm_nb_convert([str(tmp_path / "x.pt"), "--key", "critique"])
    assert "no weights under 'critique', but under 'generator', 'critic'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="key chooses weights in a file of torch.save"):
        load(_edm_pickle(tmp_path / "n.pkl"), key="ema")


def _edm_pickle(path):
    import foreign_files as ff
    return ff.make_edm_pickle(path, {"model.a.weight": torch.ones(3, 3)})


# ---- named for what they are

def test_what_can_not_be_read_is_named(tmp_path, monkeypatch):
    class Persistent:
        def __reduce__(self): return _reconstruct_persistent_obj, ({"type": "class", "class_name": "EDMPrecond"},)
    def _reconstruct_persistent_obj(meta): return meta
    for name in ("torch_utils", "torch_utils.persistence"): monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    torch.save({"net": Persistent(), "optimizer_state": {"state": {}}}, tmp_path / "training-state-000100.pt")
    pipe = tmp_path / "pipe"
    (pipe / "unet").mkdir(parents=True)
    (pipe / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "x"]}))
    (pipe / "vae").mkdir()
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        (pipe / part / "config.json").write_text(json.dumps({"_class_name": name, "sample_size": 32}))
    for path, what in ((tmp_path / "training-state-000100.pt", "EDM's training-state.*network-snapshot"),
                       (pipe, r"a network of diffusers \(UNet2DConditionModel\), which can't be read"),
                       (pipe / "vae", r"a network of diffusers \(AutoencoderKL\)")):
        with pytest.raises(ForeignFileError, match=what) as e: load(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
