"""What Windows and macOS lack is not asked for: modules of Unix, forks, and numbers of 64 bits on Apple's GPUs."""
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from warm import python

from ctm_nb.data.images import digits
from ctm_nb.evaluation.evaluate import Evaluator
from ctm_nb.evaluation.features import ClassifierExtractor, _resize_tf1
from ctm_nb.evaluation.likelihood import ode_bits, ode_log_density
from ctm_nb.evaluation.metrics import FeatureClassifier, FeatureStats
from ctm_nb.evaluation.reference import build_reference, collect, data_samples
from ctm_nb.method import flow
from ctm_nb.method.sampling import sample
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.families import build_network
from ctm_nb.training.config import make_config
from ctm_nb.training.stages import STAGE_CLASSES, carry_to, step_generator, take
from ctm_nb.training.step import gradient

WINDOWS = """
import importlib, os, pathlib, signal, sys
import torch, torchvision, scipy.stats, matplotlib.font_manager, PIL.Image, tqdm.auto, requests, pooch
import filelock, jinja2, multiprocessing.util, subprocess, tempfile, torch.utils.tensorboard  # each knows its system
hidden = {"fcntl", "resource", "pwd", "grp", "termios"}
for name in hidden | {m for m in sys.modules if m.partition(".")[0] == "ctm_nb"}: sys.modules.pop(name, None)
class Hidden:
    def find_spec(self, name, *_):
        if name in hidden: raise ImportError(f"no {name} on Windows")
sys.meta_path.insert(0, Hidden())
for name in ("fork", "pread", "sysconf", "sched_getaffinity"): delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"): delattr(signal, name)
root = pathlib.Path(importlib.import_module("ctm_nb").__file__).parent
for p in sorted(root.rglob("*.py")):
    if not p.stem.startswith("_"): importlib.import_module(".".join(p.relative_to(root.parent).with_suffix("").parts))
from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.commands.sample import ctm_nb_sample
ctm_nb_data(["convert", "a.zip", "b", "--workers", "2"])
ctm_nb_train("--preset tiny --steps 2 --name t --set evaluate.n=0 run.sample_every=1000".split())
ctm_nb_sample("runs/t -n 2 --out c.zip".split())
"""


def test_without_the_modules_of_unix(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for k in range(3):
            Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / "x.png")
            z.write(tmp_path / "x.png", f"{k}.png")
    done = python(WINDOWS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([*(tmp_path / "b").glob("*.png")]) == 3 and (tmp_path / "c.zip").exists()


# ---- a device without float64

DEVICE = torch.device("lazy")  # has no kernels: all of its work is done on the CPU below, under watch


class There(torch.Tensor):
    "A tensor on that device."
    @staticmethod
    def __new__(cls, inner):
        t = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                                storage_offset=inner.storage_offset(), device=DEVICE)
        t.inner = inner
        return t
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return watched(func, args, kwargs or {})


def watched(func, args, kwargs):
    "What a function gives; an error if it makes float64 on the device, or takes tensors of two devices."
    there, here = [], []
    def inner(v):
        if isinstance(v, torch.Tensor): (there if isinstance(v, There) else here).append(v)
        return v.inner if isinstance(v, There) else v
    plain, named = tree_map(inner, args), tree_map(inner, kwargs)
    aten, where = torch.ops.aten, kwargs.get("device")
    stays = bool(there) if where is None else torch.device(where) == DEVICE
    if func is aten.copy_.default: stays = isinstance(args[0], There)
    elif there and func not in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put_.default):
        assert all(v.ndim == 0 for v in here), f"{func} takes tensors of two devices"
    if where is not None: named["device"] = torch.device("cpu")
    out = func(*plain, **named)
    if not stays or func is aten._local_scalar_dense.default: return out
    for v in (out if isinstance(out, (list, tuple)) else [out]):
        assert not (isinstance(v, torch.Tensor) and v.dtype == torch.float64), f"{func} makes float64 on the device"
    wrapped = tree_map(lambda v: There(v) if isinstance(v, torch.Tensor) else v, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class NoDouble(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return watched(func, args, kwargs or {})


def test_the_watch_sees_what_it_shall():
    x = torch.ones(2, dtype=torch.float64)
    with NoDouble():
        assert (x.to(DEVICE, torch.float32) * 2).sum().item() == 4
        for wrong in (lambda: x.to(DEVICE), lambda: torch.zeros(2, device=DEVICE).double(),
                      lambda: torch.zeros(2, device=DEVICE, dtype=torch.float64)):
            with pytest.raises(AssertionError, match="float64"): wrong()
        with pytest.raises(AssertionError, match="two devices"): torch.zeros(2, device=DEVICE) + torch.ones(2)


WORDS = ["distill.distance=features", "gan.steps=4", "gan.features=teacher", "distill.phases=trajectories:.5,soft:.5",
         "distill.stored=32"]


@pytest.mark.parametrize("stage", ["teacher", "ctm_dsm", "ctm_dsm_gan"])
def test_a_step_and_samples_without_float64(stage, monkeypatch):
    monkeypatch.setattr(flow, "NO_DOUBLE", {DEVICE.type})
    config, data, B = make_config("tiny", WORDS), digits(), 8
    with NoDouble():
        parts = {}
        for name in [*STAGE_CLASSES][:[*STAGE_CLASSES].index(stage) + 1]:
            now = STAGE_CLASSES[name](config, data, DEVICE, parts)
            parts = now.parts
        for n in (0, 1, 15):
            ids, numbers = torch.arange(B), carry_to(now.draw(B, step_generator(0, n), n), DEVICE)
            material = dict(x0=data.x0(ids).to(DEVICE), y=data.labels[ids].to(DEVICE), augment=None,
                            numbers=take(numbers, slice(0, B)))
            losses = gradient(now, [now.example(**material, n=n)], n, [1.])
            now.optimizers[now.learner(n)].step()
            for e in now.emas.values(): e.update(now.parts["model"])
            assert all(np.isfinite(float(v)) for v in losses.values())
        m = parts["ctm" if "ctm" in parts else "teacher"]
        for solver in (["ctm"] if "ctm" in parts else []) + ["heun", "dpmpp_2m", "edm"]:
            x = sample(m, n=3, steps=3, gamma=.5 if solver == "ctm" else 0., solver=solver)
            assert x.device == DEVICE and x.dtype == torch.float32


def test_features_without_float64(monkeypatch):
    monkeypatch.setattr(flow, "NO_DOUBLE", {DEVICE.type})
    x, net = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), FeatureClassifier(8, 1, 10).eval()
    e, resized = ClassifierExtractor(net), _resize_tf1(x, 5)
    there = e(x)
    with NoDouble():
        f = e.to(DEVICE)(x)
        assert f.pooled.device == DEVICE and f.probs.dtype == torch.float32
        assert torch.equal(_resize_tf1(x.to(DEVICE), 5).cpu(), resized)
        stats = FeatureStats(64).update(f.pooled)
    assert torch.allclose(stats.mean, there.pooled.double().mean(0)) and there.probs.dtype == torch.float64


def test_scores_and_likelihoods_without_float64(monkeypatch):
    monkeypatch.setattr(flow, "NO_DOUBLE", {DEVICE.type})
    torch.manual_seed(0)
    data, net = digits("held_out"), FeatureClassifier(8, 1, 10).eval()
    small = dict(image_size=8, channels=1, model_channels=8, channel_mult=(1, 1), n_blocks=1)
    m = Denoiser(build_network("ddpmpp", **small)).eval()
    x, extractor = data.x0(slice(0, 1)), ClassifierExtractor(net)
    reference = build_reference(extractor, data)
    got = collect(extractor, data_samples(data, 40))
    here = ode_log_density(m, x, tol=.1)[0], Evaluator(reference, extractor, ["fid", "pr", "kid"]).score(got)
    with NoDouble():
        m.to(DEVICE)
        assert torch.equal(ode_log_density(m, x, tol=.1)[0], here[0])
        assert torch.isfinite(ode_bits(m, x, tol=.1)).all()
        there = Evaluator(reference, extractor.to(DEVICE), ["fid", "pr", "kid"])
        assert there.score(there.collect(data_samples(data, 40))) == pytest.approx(here[1], rel=1e-4, abs=1e-6)
