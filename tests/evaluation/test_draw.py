"""Samples that a classifier pushes or chooses, through the sampling command: interrupted, in two processes, refused."""
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch

from ctm_nb.evaluation import draw
from ctm_nb.evaluation.draw import (_class_log_probs, _classifier_source, draw_parts, draw_samples, drawer_of,
                                    make_recipe, _open_parts, _with_parts)
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.data.images import ImageData, digits, to_uint8
from ctm_nb.method.teacher import Denoiser
from ctm_nb.evaluation.features import ClassifierExtractor
from ctm_nb.method.guidance import autoguide, candidates, keep_best
from ctm_nb.checkpoints.models import describe, load
from ctm_nb.evaluation.metrics import train_classifier
from ctm_nb.networks.unet import DDPMpp, init_
from ctm_nb.evaluation.reference import Ranks, build_reference, read_reference
from ctm_nb.checkpoints.store import save_checkpoint
from ctm_nb.method.sampling import sample
from ctm_nb.method.trajectory import student_from

def parts_of(out): return out.with_name(out.name + ".parts")


def save_run(folder, n_classes):
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(8, 1, n_classes, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=()))
    init_(teacher.net.out_layers[1], 1.)
    models = {"teacher": teacher, "ctm": student_from(teacher)}
    names = [str(c) for c in range(n_classes)]
    meta = {"models": {k: {"part": k, "description": describe(m, names)} for k, m in models.items()}}
    save_checkpoint(folder / "checkpoints", 1, {k: m.state_dict() for k, m in models.items()}, {}, meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory): return save_run(tmp_path_factory.mktemp("run"), 10)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory): return save_run(tmp_path_factory.mktemp("unlabelled"), 0)


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    net = ClassifierExtractor(train_classifier(digits("train"), epochs=1, width=8))
    return build_reference(net, digits("held_out")).save(tmp_path_factory.mktemp("ref") / "ref.npz")


def test_chosen_samples_are_those_chosen_by_hand(run, ref, tmp_path):
    plan = draw_samples(run, tmp_path / "x.npz", 43, device="cpu", steps=2, gamma=.5, classes="3,7,1", seed=4,
                        reject=2.5, classifier=str(ref), batch_size=9)
    net = read_reference(ref).net
    y = torch.tensor([3, 7, 1])[torch.arange(43) % 3]
    log_prob = lambda x: net(((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1).log_softmax(1)
    ids, labels = candidates(y, 2.5)
    drawn = sample(load(run), ids=ids, y=labels, steps=2, gamma=.5, seed=4)
    order = keep_best(y, labels, log_prob(drawn).gather(1, labels[:, None])[:, 0])
    x, numbers = drawn[order], ids[order]
    with np.load(tmp_path / "x.npz") as z:
        images, labels, kept = z["arr_0"], z["arr_1"], json.loads(str(z["sampler"]))["kept"]
    assert kept == numbers.tolist() and labels.tolist() == y.tolist() and len(images) == 43
    assert plan["draws"] == sum(int(np.ceil(2.5 * int((y == c).sum()))) for c in (1, 3, 7))
    assert (np.abs(images[..., 0].astype(int) - ((x[:, 0] + 1) * 127.5).round().clamp(0, 255).numpy()) <= 1).all()
    plain = draw_samples(run, tmp_path / "y.npz", 43, device="cpu", steps=2, gamma=.5, classes="3,7,1", seed=4)
    with np.load(tmp_path / "y.npz") as z:
        same = [i for i in range(43) if kept[i] < 43]
        # sample i is sample i
        assert same and (np.abs(images[same].astype(int) - z["arr_0"][np.array(kept)[same]]) <= 1).all()
        judged = lambda a: _class_log_probs(net, torch.from_numpy(a), y).mean()
        assert judged(images) > judged(z["arr_0"]) and plain["evaluations"] == plan["evaluations"]


def test_interrupted_while_choosing_continues(run, ref, tmp_path, monkeypatch):
    words = [str(run), "-n", "40", "--which", "teacher", "--solver", "heun", "--steps", "3", "--device", "cpu",
             "--reject", "3", "--classifier", str(ref)]
    out, parts, write = tmp_path / "x.zip", tmp_path / "x.zip.parts", draw.atomic_write
    def fourth_time_unlucky(path, data):
        if path.name == "part_000004.npz": raise KeyboardInterrupt
        return write(path, data)
    monkeypatch.setattr(draw, "atomic_write", fourth_time_unlucky)
    with pytest.raises(SystemExit) as e: ctm_nb_sample([*words, "--out", str(out)])
    assert e.value.code == 130
    monkeypatch.undo()
    kept = {f: f.stat().st_mtime_ns for f in parts.glob("part_*")}
    assert len(kept) == 4 and not out.exists()
    # another ratio is another plan
    with pytest.raises(SystemExit): ctm_nb_sample([w if w != "3" else "4" for w in words] + ["--out", str(out)])
    seen, publish = {}, draw.publish
    monkeypatch.setattr(draw, "publish", lambda temp, out: seen.update({f: f.stat().st_mtime_ns
                                                                       for f in parts_of(out).glob("part_*")})
                        or publish(temp, out))
    m = load(run, which="teacher")  # a process of torchrun, before the other
    plan = _with_parts(make_recipe(m, run, 40, 3, solver="heun", reject=3., classifier=str(ref)), m)
    draw_parts(drawer_of(m, plan), plan, _open_parts(out, plan), Ranks(1, 2))
    assert len(list(parts.glob("part_*"))) > len(kept)
    ctm_nb_sample([*words, "--out", str(out)])
    assert len(seen) == 15 and seen.items() >= kept.items()  # what was finished was not drawn again
    ctm_nb_sample([*words, "--out", str(tmp_path / "whole.zip"), "--batch-size", "7"])
    with zipfile.ZipFile(out) as a, zipfile.ZipFile(tmp_path / "whole.zip") as b:
        plans = [json.loads(z.read("sampler.json")) for z in (a, b)]
        assert plans[0]["kept"] == plans[1]["kept"]
        assert len(plans[0]["kept"]) == 40 == len([k for k in a.namelist() if k.endswith(".png")])
    stamp = out.stat().st_mtime_ns
    ctm_nb_sample([*words, "--out", str(out)])
    assert out.stat().st_mtime_ns == stamp and not parts.exists()  # complete: nothing is drawn, nothing trained


@pytest.mark.parametrize("words, message", [(["--reject", "0.9"], "reject must be >= 1 and finite, got reject=0.9"),
                                            (["--reject", "nan"], "got reject=nan"),
                                            (["--classifier", "digits"], "a classifier reject"),
                                            (["--reject", "2"], "reject needs a classifier"),
                                            (["--reject", "2", "--classes", "none", "--classifier", "REF"],
                                             "reject=2 needs a class for every sample"),
                                            (["--reject", "2", "--classifier", "no/such/folder"], "no/such/folder"),
                                            (["--reject", "2", "--classifier", "none.npz"], "none.npz")])
def test_mistakes_are_one_line_and_write_nothing(run, ref, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    words = [str(ref) if w == "REF" else w for w in words]
    with pytest.raises(SystemExit) as e: ctm_nb_sample([str(run), "--out", "o.npz", *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.strip().count("\n") == 0 and not list(tmp_path.iterdir())


def test_a_classifier_of_other_pictures_is_refused(run, unlabelled, tmp_path, ref):
    with pytest.raises(ValueError, match="this one has none"):
        make_recipe(load(unlabelled), unlabelled, 3, reject=2., classifier=str(ref))
    four = ImageData(digits().images[:90] , digits().labels[:90] % 4, list("abcd"), "four")
    other = build_reference(ClassifierExtractor(train_classifier(four, epochs=1, width=8)),
                            four).save(tmp_path / "four.npz")
    with pytest.raises(ValueError, match="10 classes, got one of 4"): _classifier_source(other, load(run))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="holds no classifier"):
        make_recipe(load(run), run, 3, reject=2., classifier=str(tmp_path / "edm.npz"))
    _open_parts(tmp_path / "w.npz", _with_parts(make_recipe(load(run), run, 80, reject=2., classifier=str(ref)),
                                              load(run)))
    again = dict(device="cpu", classifier=str(ref))
    with pytest.raises(ValueError, match="reject: 2.0 -> 3.0"):
        draw_samples(run, tmp_path / "w.npz", 80, reject=3., **again)
    again["classifier"] = str(build_reference(ClassifierExtractor(train_classifier(digits("train"), 1, 1, width=8)),
                                              digits("held_out")).save(tmp_path / "second.npz"))
    with pytest.raises(ValueError, match="classifier: "): draw_samples(run, tmp_path / "w.npz", 80, reject=2., **again)


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
    (["--guide", "{unlabelled}", "--guidance", "2", "--solver", "ctm"], "guided by another: use solver=\"heun\""),
    (["--guide", "{unlabelled}", "--guidance", "-2"], "scale=-2"),
])
def test_mistakes_with_a_guide_are_one_line(run, unlabelled, tmp_path, capsys, words, message):
    words = [w.format(unlabelled=unlabelled) for w in words]
    with pytest.raises(SystemExit) as e:
        ctm_nb_sample([str(run), "--out", str(tmp_path / "x.png"), "--device", "cpu", *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
