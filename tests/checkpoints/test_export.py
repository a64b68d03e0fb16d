"""Students as ONNX files and as a page: the same pictures, whatever the network, the number of them and the jumps."""
import gc
import json
import os
from functools import cache

import pytest
import torch

from ctm_nb.checkpoints import export
from ctm_nb.commands.convert import ctm_nb_convert
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.families import build_network
from ctm_nb.networks.unet import MLP

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SMALL = dict(image_size=8, channels=3, n_classes=4, model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,),
             channels_per_head=16)


@pytest.fixture(scope="module", autouse=True)
def much_is_made_and_little_of_it_garbage():
    "And how torch's operations are written in ONNX is read once: it is the same for every file."
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield
    gc.enable()


def student(family, **more):
    "A student whose every layer has something to say."
    torch.manual_seed(0)
    m = student_from(Denoiser(build_network(family, **SMALL | more))).eval().requires_grad_(False)
    for p in m.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.2)
    if family == "ddpmpp": m.sigma_init = 5.
    m.classes, m.about = list("abcd")[:m.n_classes], "a trial"
    return m


def written(path, *args, **more):
    path.write_bytes(export.onnx_bytes(*args, **more))
    return path


def cache_of_one(f):
    "What a function has returned when it was first called."
    found = []
    return lambda *args, **words: found[0] if found else found.append(f(*args, **words)) or found[0]


@pytest.mark.parametrize("family, jumps, levels", [
    ("ddpmpp", 2, 1), ("ncsnpp", 1, 2), ("adm", 1, 2), ("openai", 1, 1), ("edm2", 1, 2)])
def test_every_family_draws_the_same(family, jumps, levels, tmp_path):
    "Two jumps are two networks in a graph: smaller ones; OpenAI's goes from level to level as ADM does."
    m = student(family, channel_mult=(1, 2)[:levels])
    file = written(tmp_path / "m.onnx", m, jumps)
    assert max(export.onnx_difference(m, file, jumps, n) for n in (3, 5)) < 1e-4
    session = onnxruntime.InferenceSession(str(file))
    assert [i.name for i in session.get_inputs()] == ["noise", "label"]
    kept = session.get_modelmeta().custom_metadata_map
    assert json.loads(kept["classes"]) == m.classes and len(json.loads(kept["times"])) == jumps + 1
    assert b"ctm_nb" + os.sep.encode() not in file.read_bytes()  # no folders of this machine


def test_the_jump_itself_bytes_and_no_classes(tmp_path):
    m = student("ddpmpp", n_classes=0, channel_mult=(1,))
    file = written(tmp_path / "g.onnx", m, None)
    assert export.onnx_difference(m, file, None) < 1e-4
    assert [i.name for i in onnxruntime.InferenceSession(str(file)).get_inputs()] == ["x", "t", "s"]
    m = student_from(Denoiser(MLP(16))).eval().requires_grad_(False)  # bytes are made of whatever a network draws
    for p in m.parameters(): torch.nn.init.normal_(p, std=.1)
    file = written(tmp_path / "b.onnx", m, 1, bytes=True)
    assert export.onnx_difference(m, file, 1) <= 1
    assert onnxruntime.InferenceSession(str(file)).get_outputs()[0].type == "tensor(uint8)"


def test_narrow_weights(tmp_path, monkeypatch):
    m = student("ddpmpp", model_channels=48, channel_mult=(1,))
    for module in (torch.export, torch.onnx):  # both are made of one graph
        monkeypatch.setattr(module, "export", cache_of_one(module.export))
    for weights, most, share in (("float16", .02, .6), ("int8", .2, .4)):
        file, plain = written(tmp_path / "n.onnx", m, weights=weights), 4 * sum(p.numel() for p in m.parameters())
        assert 0 < export.onnx_difference(m, file) < most and file.stat().st_size < share * plain, weights


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match="only a student"):
        export.onnx_bytes(Denoiser(build_network("ddpmpp", **SMALL)))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match="an ONNX file needs the package onnxscript: pip install onnxscript"):
        export.onnx_bytes(student("ddpmpp"))


@pytest.mark.parametrize("name, words, said", [
    ("x.onnx", ["--jump", "--steps", "2"], "--jump writes G itself"),
    ("x.onnx", ["--jump", "--bytes"], "--jump writes G itself"),
    ("x.safetensors", ["--steps", "2"], "--steps is for OUT.onnx or --web"),
    ("x.safetensors", ["--bytes"], "--bytes is for OUT.onnx"),
    ("x.safetensors", ["--weights", "int8"], "--weights is for OUT.onnx or --web"),
    ("x.safetensors", ["--private"], "--private is for OUT hf:owner/name"),
])
def test_words_without_an_effect_are_refused(tmp_path, capsys, name, words, said):
    with pytest.raises(SystemExit): ctm_nb_convert(["student.safetensors", str(tmp_path / name), *words])
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
