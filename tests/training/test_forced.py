"""EDM2's network in training: weights of unit length at every step, exact resume, micro-batches, its loss and rate."""
import math
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from runs import ONE_LEVEL, assert_same, newest

from ctm_nb.checkpoints.models import load, save_model
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.data.images import digits
from ctm_nb.method.sampling import sample
from ctm_nb.method.teacher import edm_loss
from ctm_nb.training.config import make_config
from ctm_nb.training.costs import SCRATCH, estimate, memory, step_needs
from ctm_nb.training.optimizers import lr_at, make_optimizer
from ctm_nb.training.stages import TeacherStage, step_generator
from ctm_nb.training.trainer import Trainer, _changes

WORDS = [ONE_LEVEL, "network.family=edm2", "teacher.steps=5", "distill.steps=5", "gan.steps=4", "teacher.batch=12",
         "distill.batch=12", "gan.batch=12", "gan.optimizer=adamw", "gan.width=8", "gan.features=teacher",
         "teacher.lr=.02", "distill.lr=.02", "evaluate.n=0", "run.save_every=1000", "run.sample_every=1000"]


def start(folder, *more): return Trainer(make_config("tiny", [*WORDS, *more]), folder)


def walk(trainer, step):
    while trainer.step < step: trainer.train_step()
    trainer.save()
    return trainer


def sizes(module):
    "Root mean square of every row of every layer."
    return torch.cat([p.detach().flatten(1).square().mean(1).sqrt() for p in module.parameters() if p.ndim > 1])


def weights(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_every_step_leaves_weights_of_unit_length(tmp_path):
    t = start(tmp_path)
    for step in range(14):
        t.train_step()
        assert (sizes(t.parts["model"]) - 1).abs().max() < 3e-4, (step, t.stage)
        if step == 9: assert (sizes(t.parts["ctm"]) - 1).abs().max() > 1e-3  # an EMA sees what the optimizer left
    assert t.now.name == "ctm_dsm_gan"
    assert t.parts["model"].net.balance_s != 0  # the student has begun to use s


def test_a_stage_begins_with_unit_length_and_its_emas_with_the_same(tmp_path):
    t = walk(start(tmp_path), 5)
    assert (sizes(t.parts["teacher"]) - 1).abs().max() > 1e-3
    t.begin("ctm_dsm", t.parts)
    for name in ("model", "ctm", "target"): assert (sizes(t.parts[name]) - 1).abs().max() < 3e-4, name
    assert torch.equal(weights(t.parts["model"]), weights(t.parts["target"]))


@pytest.mark.parametrize("phases", ["", "distill.phases=trajectories:.5,eulerian:.5"])
def test_resumed_anywhere_not_a_bit_differs(tmp_path, phases):
    words = [phases] if phases else []
    walk(start(tmp_path / "whole", *words), 14)
    for stop in (3, 5, 8, 11): walk(start(tmp_path / "parts", *words), stop)
    walk(start(tmp_path / "parts", *words), 14)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_micro_batches_are_the_whole_batch(tmp_path):
    words = ["teacher.optimizer=radam", "distill.optimizer=radam", "gan.steps=0"]
    whole, parts = (walk(start(tmp_path / f"{m}", *words, f"run.micro_batch={m}"), 10) for m in ("auto", "5"))
    assert len(parts.rows) == 3
    for name in ("model", "ctm", "target"):
        torch.testing.assert_close(weights(parts.parts[name]), weights(whole.parts[name]), rtol=0, atol=2e-5)


def test_a_bad_gradient_changes_nothing(tmp_path):
    t = walk(start(tmp_path), 2)
    kept, real = weights(t.parts["model"]), t.now.losses
    t.now.losses = lambda e, n: {k: v * float("nan") for k, v in real(e, n).items()}
    with pytest.raises(FloatingPointError): t.train_step()
    assert torch.equal(weights(t.parts["model"]), kept)


def test_the_command_trains_draws_and_exports(tmp_path, capsys):
    words = ["--preset", "tiny", "--runs", str(tmp_path), "--name", "r", "--set", *WORDS, "gan.steps=0"]
    ctm_nb_train(words)
    ctm_nb_train(words)  # a finished run only reports
    m = load(tmp_path / "r")
    assert "CTM, edm2" in m.about and newest(tmp_path / "r").step == 10
    drawn = sample(m, 4, steps=2)
    assert drawn.shape == (4, 1, 8, 8) and drawn.isfinite().all()
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([.1, 1., 40.]), torch.arange(3)
    for suffix in (".safetensors", ".pt"):
        again = load(save_model(m, tmp_path / f"m{suffix}"))
        assert torch.equal(again.g(x, t, .3 * t, y), m.g(x, t, .3 * t, y))


# ---- the teacher's weighting and the rate's decay

def test_uncertainty_weighting_learns_the_loss_of_each_level():
    words = [*WORDS, "teacher.weighting=uncertainty", "teacher.optimizer=adamw"]
    cpu, data = torch.device("cpu"), digits()
    learned, plain = (TeacherStage(make_config("tiny", w), data, cpu) for w in (words, WORDS))
    numbers = learned.draw(12, step_generator(0, 0), 0)
    ids = torch.arange(12)
    e = learned.example(data.x0(ids), data.labels[ids], numbers, 0)
    m = learned.parts["model"]
    u = m.net.logvar(e["sigma"].log() / 4)
    loss = edm_loss(m, e["x0"], e["sigma"], e["eps"], e["y"])
    torch.testing.assert_close(learned.losses(e, 0)["edm"], (loss / u.exp() + u).mean())
    for stage, moves in ((learned, True), (plain, False)):
        before = stage.parts["model"].net.logvar_linear.weight.clone()
        gradients = stage.gradients(0)
        gradients.add(stage.losses(e, 0))
        gradients.combine()
        stage.optimizers["model"].step()
        assert torch.equal(before, stage.parts["model"].net.logvar_linear.weight) != moves


def test_the_rate_by_reference_is_edm2s():
    peak, batch, t_ref = .01, 2048, 35000
    c = make_config("imagenet64-edm2", ["data.source=x"]).teacher
    assert (c.lr, c.batch, c.reference, c.decay, c.weighting) == (peak, batch, t_ref, "reference", "uncertainty")
    for step in (3, 1000, 4000, 6000, 30000, 100_000, 500_000):
        seen = step * batch
        theirs = peak * min(seen / 1e7, 1) / math.sqrt(max(seen / (batch * t_ref), 1))
        assert abs(lr_at(c, step) - theirs) <= peak * 1.01 * batch / 1e7  # the warm-up is one step ahead


def test_a_stage_whose_rate_falls_by_reference_can_be_made_longer(tmp_path):
    words = ["teacher.decay=reference", "teacher.reference=2"]
    walk(start(tmp_path / "a", *words), 4)
    walk(start(tmp_path / "a", *words, "teacher.steps=7"), 7)
    walk(start(tmp_path / "b", *words, "teacher.steps=7"), 7)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_other_numbers_of_steps_in_scores_are_no_change_of_the_run():
    old, new = (asdict(make_config("tiny", [f"evaluate.steps={steps}"])) for steps in ("1,2", "1,4"))
    assert _changes(old, new, 3) == (["evaluate.steps: [1, 2] -> [1, 4]"], [])


@pytest.mark.parametrize("word, message", [
    ("network.augment_dim=9", "network.augment_dim must be 0 for edm2, got 9"),
    ("network.family=ddpmpp", "teacher.weighting must be edm for a family without a log-variance"),
    ("teacher.weighting=none", "teacher.weighting must be one of edm, uncertainty"),
    ("teacher.decay=sqrt", "teacher.decay must be one of constant, linear, cosine, reference")])
def test_what_does_not_fit_is_said(word, message):
    with pytest.raises(ValueError, match=message):
        make_config("tiny", [*WORDS, "teacher.weighting=uncertainty", word])


def test_a_label_is_a_table_for_muon():
    stage = TeacherStage(make_config("tiny", [*WORDS, "teacher.optimizer=muon"]), digits(), torch.device("cpu"))
    net, groups = stage.parts["model"].net, stage.optimizers["model"].param_groups
    matrices = {id(p) for g in groups if g["matrices"] for p in g["params"]}
    assert id(net.emb_noise.weight) in matrices and id(net.enc["8x8_conv"].weight) in matrices
    assert not {id(net.emb_label.weight), id(net.out_conv.weight), id(net.out_gain)} & matrices
    assert make_optimizer("muon", stage.parts["model"], .02).param_groups


# ---- the preset

def test_its_preset_says_where_each_value_comes_from_and_what_it_takes(tmp_path, capsys):
    from PIL import Image

    from ctm_nb.training.presets import RECIPES
    recipe = RECIPES["imagenet64-edm2"]
    sources = {word.partition("=")[0]: source for source, words in recipe for word in words.split()}
    assert "ours" in sources["distill.lr"] and sources["distill.anchor"] == "CMT"
    assert "EDM2" in sources["teacher.source"]
    for c in "ab":
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(6): Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(tmp_path / "data" / c / f"{i}.png")
    words = ["--preset", "imagenet64-edm2", "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    ctm_nb_train([*words, "--dry-run"])
    out = capsys.readouterr().out
    assert "edm2, 279.4" in out and "given: edm2-img64-s-1073741-0.075" in out
    assert re.search(r"memory    student \d+\.\d\d GiB", out)
    config = make_config("imagenet64-edm2", ["data.source=x"])
    data = SimpleNamespace(channels=3, image_size=64, n_classes=2)
    assert "(20 s a step)" in estimate(config, data, 100.)[1]  # 2048 images
    assert not (tmp_path / "runs").exists()


def test_normalised_weights_are_counted_once_and_not_for_each_image():
    words = ["data.source=x", "teacher.source=", "distill.steps=0", "gan.steps=0", "run.micro_batch=1"]
    config, data = make_config("imagenet64-edm2", words), SimpleNamespace(channels=3, image_size=64, n_classes=1000)
    need, plain = (step_needs(make_config(p, words), data)["teacher"] for p in ("imagenet64-edm2", "imagenet64"))
    assert need.weights == 4 * 280_209_381 and .8 * need.weights < need.fixed < 2.2 * need.weights
    assert plain.fixed < .2 * plain.weights
    few, more = (memory(config, data, n)["teacher"] for n in (1, 5))
    assert more - few == pytest.approx(4 * SCRATCH * need.each, rel=1e-6) and few > 5 * need.weights
