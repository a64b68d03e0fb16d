"""What samples are drawn under: guidance that a model was not trained for, a set of an older version."""
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctm_nb.checkpoints.models import describe, load
from ctm_nb.checkpoints.store import save_checkpoint
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.data.images import to_uint8
from ctm_nb.evaluation import features
from ctm_nb.evaluation.draw import draw_samples, make_recipe, _warn_unsuited
from ctm_nb.method.guidance import autoguide
from ctm_nb.method.sampling import sample
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.unet import DDPMpp, init_


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(8, 1, 10, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=()))
    init_(teacher.net.out_layers[1], 1.)
    models = {"teacher": teacher, "ctm": student_from(teacher)}
    meta = {"models": {k: {"part": k, "description": describe(m, list("0123456789"))} for k, m in models.items()}}
    save_checkpoint(folder / "checkpoints", 1, {k: m.state_dict() for k, m in models.items()}, {}, meta)
    return folder


@pytest.mark.parametrize("name", [None, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_says_how_memory_is_kept_is_obeyed(monkeypatch, name):
    for k in [k for k in os.environ if k.startswith(("MALLOC_", "GLIBC"))]: monkeypatch.delenv(k)
    if name: monkeypatch.setenv(name, "262144")
    called = []
    monkeypatch.setattr(features.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *a: called.append(a)))
    features.keep_memory()
    assert len(called) == (0 if name else 2)


def test_what_a_classifier_chose_is_not_what_is_asked_for(run, tmp_path):
    "Version 0.1 could keep the best of several draws; its sets are not taken for plain ones."
    recipe = draw_samples(run, tmp_path / "x", 5, device="cpu")
    stamp = (tmp_path / "x").stat().st_mtime_ns
    draw_samples(run, tmp_path / "x", 5, device="cpu")
    assert (tmp_path / "x").stat().st_mtime_ns == stamp
    (tmp_path / "x" / "sampler.json").write_text(json.dumps({**recipe, "reject": 2.}))
    with pytest.raises(FileExistsError, match="x exists"): draw_samples(run, tmp_path / "x", 5, device="cpu")


def test_guidance_without_dropped_labels_is_warned_about(run, tmp_path):
    m = load(run, which="teacher")
    for share, word in ((0., "teacher.label_dropout=0"), (.1, None)):
        (tmp_path / "config.json").write_text(json.dumps({"teacher": {"label_dropout": share}}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _warn_unsuited(m, 2., None, tmp_path)
        assert [word in str(w.message) for w in said] == ([True] if word else [])
    config = {"teacher": {"label_dropout": .1}, "distill": {"label_dropout": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(RuntimeWarning, match="distill.label_dropout=0"): _warn_unsuited(load(run), 2., None, tmp_path)


@pytest.mark.parametrize("classes, said", [("none", 1), ("all", 0), ("3", 0)])
def test_samples_without_class_are_warned_about_where_no_labels_were_dropped(run, tmp_path, recwarn, classes, said):
    (run / "config.json").write_text(json.dumps({"distill": {"label_dropout": 0}}))
    try: recipe = draw_samples(run, tmp_path / "x.npz", 3, classes=classes, device="cpu")
    finally: (run / "config.json").unlink()
    found = [str(w.message) for w in recwarn if "label_dropout=0" in str(w.message)]
    assert len(found) == said and (tmp_path / "x.npz").exists() and recipe["n"] == 3
    for text in found: assert text.startswith("classes none needs") and text.endswith("it draws all the same")


@pytest.mark.parametrize("word", ["rote Äpfel", "x"])
def test_classes_that_are_numbers_have_no_nearest_name(run, word):
    with pytest.raises(ValueError, match=f"'{word}': this model's classes have no names, expected 0..9"):
        make_recipe(load(run), str(run), 3, classes=word)


def test_guidance_is_an_error_or_warned_about_and_not_both(run, tmp_path):
    "One warning once nothing else is wrong; an error comes alone."
    (run / "config.json").write_text(json.dumps({"distill": {"label_dropout": 0}}))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            draw_samples(run, tmp_path / "x.npz", 3, guidance=2., device="cpu")
            assert len(said) == 1
            for words in ({}, {"guidance": -1.}, {"classes": "z"}, {"times": "0"}, {"seed": 1}):
                with pytest.raises((ValueError, FileExistsError)):
                    draw_samples(run, tmp_path / "x.npz", 4, device="cpu", **{"guidance": 2., **words})
        assert len(said) == 1
    finally: (run / "config.json").unlink()


# ---- another model as guide

def test_another_model_guides_the_denoiser(run, tmp_path, capsys):
    weak = tmp_path / "weak"
    torch.manual_seed(1)
    teacher = Denoiser(DDPMpp(8, 1, 10, model_channels=8, channel_mult=(1,), n_blocks=1, attention=()))
    init_(teacher.net.out_layers[1], 1.)
    about = {"models": {"teacher": {"part": "teacher", "description": describe(teacher, list("0123456789"))}}}
    save_checkpoint(weak / "checkpoints", 7, {"teacher": teacher.state_dict()}, {}, about)
    words = ["--which", "teacher", "--steps", "3", "-n", "12", "--device", "cpu", "--guide", str(weak), "--guidance"]
    ctm_nb_sample([str(run), "--out", str(tmp_path / "x.npz"), *words, "2"])
    assert "12 samples, 10 evaluations each, solver heun" in capsys.readouterr().out
    y, m = torch.arange(12) % 10, load(run, which="teacher")
    by_hand = sample(autoguide(m, load(weak), 2.), 12, y=y, solver="heun", steps=3)
    there = np.load(tmp_path / "x.npz")
    assert np.array_equal(there["arr_0"], to_uint8(by_hand).permute(0, 2, 3, 1).numpy())
    recipe = json.loads(str(there["sampler"]))
    assert recipe["guidance"] == 2 and recipe["guide"] == str(weak / "checkpoints" / "step_00000007")
    ctm_nb_sample([str(run), "--out", str(tmp_path / "y.npz"), *words, "1"])
    ctm_nb_sample([str(run), "--out", str(tmp_path / "z.npz"), *words[:-3]])
    one, plain = (np.load(tmp_path / f"{k}.npz")["arr_0"].astype(int) for k in "yz")
    assert abs(one - plain).max() <= 1 and abs(there["arr_0"].astype(int) - plain).max() > 1
    recipe = make_recipe(load(run), str(run), 3, guidance=2., guide=str(weak))  # of a student, its denoiser
    assert recipe["solver"] == "heun" and recipe["evaluations"] == 2 * 35


@pytest.mark.parametrize("words, message", [
    (["--guide", "nowhere", "--guidance", "2"], "nowhere does not exist"),
    (["--guide", "nowhere"], "a guide needs the scale --guidance, got only --guide nowhere"),
    (["--guide", "{run}", "--guidance", "2", "--solver", "ctm"], "guided by another: use solver=\"heun\""),
    (["--guide", "{run}", "--guidance", "-2"], "scale=-2"),
])
def test_mistakes_with_a_guide_are_one_line(run, tmp_path, capsys, words, message):
    words = [w.format(run=run) for w in words]
    with pytest.raises(SystemExit) as e:
        ctm_nb_sample([str(run), "--out", str(tmp_path / "x.png"), "--device", "cpu", *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
