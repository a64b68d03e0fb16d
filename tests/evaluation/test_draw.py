"""What samples are drawn under: guidance that a model was not trained for, a set of an older version."""
import json
import warnings

import pytest
import torch

from ctm_nb.checkpoints.models import describe, load
from ctm_nb.checkpoints.store import save_checkpoint
from ctm_nb.evaluation.draw import draw_samples, make_recipe
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
            assert make_recipe(m, tmp_path, 3, guidance=2.)["guidance"] == 2.
        assert [word in str(w.message) for w in said] == ([True] if word else [])
    config = {"teacher": {"label_dropout": .1}, "distill": {"label_dropout": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(RuntimeWarning, match="distill.label_dropout=0"): make_recipe(load(run), tmp_path, 3, guidance=2.)
