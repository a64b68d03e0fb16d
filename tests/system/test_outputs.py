"""What is going to be written is checked before it is computed; what was computed is printed before it is written."""
import json

import numpy as np
import pytest
from PIL import Image

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.data import convert
from ctm_nb.evaluation import evaluate as work
from ctm_nb.evaluation import reference
from ctm_nb.evaluation.draw import draw_samples, _open_parts, _parts_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8))
    return tmp_path


def said(capsys, f, *words):
    with pytest.raises(SystemExit) as e: f(list(map(str, words)))
    out, err = capsys.readouterr()
    assert e.value.code in (2, 3) and "Traceback" not in err, err
    return out, err.splitlines()[-1]


EVALUATE = ctm_nb_evaluate, "good.npz", "--ref", "digits"
TRAIN = ctm_nb_train, "--preset", "tiny", "--dry-run", "--runs", "runs", "--teacher"
EARLY = [
    ((*EVALUATE, "--out", "no/e.json"), "there is no folder .*/no for e.json"),
    ((*EVALUATE, "--out", "."), ". is a folder, expected the name of a file"),
    ((*EVALUATE, "--out", "bad.json"), "bad.json must be a list of score records, got no JSON"),
    ((*EVALUATE, "--out", "list.json"), r"list.json must be a list of score records, got 3"),
    ((*EVALUATE, "--out", "odd.json"), "odd.json must be a list of score records, got .*sampler"),
    ((*EVALUATE, "--out", "text.json"), "text.json must be a list of score records, got .*value"),
    ((*EVALUATE, "--save-ref", "no/r.npz"), "there is no folder .*/no for r.npz"),
    ((*EVALUATE, "--save-ref", "r.txt"), "r.txt must end in .npz, got .txt"),
    ((*EVALUATE, "--save-ref", "good.npz"), "good.npz exists: give it as --ref, or choose another name"),
    ((*EVALUATE, "--nearest", "--out", "no/e.json"), "there is no folder"),
    ((ctm_nb_data, "inspect", "good.npz", "--sheet", "s.xyz"), "s.xyz must end in .png or .jpg or .webp, got .xyz"),
    ((ctm_nb_data, "inspect", "good.npz", "--sheet", "no/s.png"), "there is no folder"),
    ((ctm_nb_data, "inspect", "good.npz", "--json", "no/s.json"), "there is no folder"),
    ((*TRAIN, "nowhere.pkl"), "nowhere.pkl does not exist"),
    ((*TRAIN, "good.npz"), "good.npz: a numpy archive"),
    ((*TRAIN, "edm-cifar10-32x32-uncond-vpp"), "did you mean edm-cifar10-32x32-uncond-vp?"),
]


@pytest.mark.parametrize("words, why", EARLY)
def test_checked_before_anything_is_computed(here, capsys, monkeypatch, words, why):
    (here / "bad.json").write_text("{")
    (here / "list.json").write_text("[3]")
    (here / "odd.json").write_text('[{"sampler": [1], "metric": "fid", "value": 3}]')
    (here / "text.json").write_text('[{"metric": "fid", "value": "low"}]')
    for module, name in ((work, "open_subject"), (convert, "survey")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it computes"))
    out, err = said(capsys, *words)
    import re
    assert re.search(why, err), err


def test_a_given_teacher_that_fits_is_no_error_of_a_dry_run(here, capsys, untrained_run):
    run = untrained_run(here / "t", 1, [str(k) for k in range(10)])
    ctm_nb_train(["--preset", "tiny", "--dry-run", "--teacher", str(run)])
    assert "given: " in capsys.readouterr().out


def test_what_was_computed_is_printed_though_it_can_not_be_written(here, capsys, monkeypatch):
    rows = [dict(metric="fid", value=1.25, n_samples=8, reference=dict(name="r", n=9, sha256="0" * 64), features="f",
                 sampler=None, seed=None, checkpoint="good.npz")]
    def full(*_): raise OSError(28, "No space left on device", "e.json")
    monkeypatch.setattr(work, "evaluate", lambda *_: (rows, []))
    monkeypatch.setattr(work, "atomic_write", full)
    out, err = said(capsys, *EVALUATE, "--out", "e.json")
    assert "1.25" in out and "No space left" in err
    monkeypatch.setattr(Image.Image, "save", full)
    out, err = said(capsys, ctm_nb_data, "inspect", "good.npz", "--workers", 0, "--sheet", "s.png")
    assert "images     8" in out and "No space left" in err


def test_files_beside_scores_that_can_not_be_written_lose_no_score(here, capsys, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device", "x")
    monkeypatch.setattr(reference, "atomic_write", full)
    monkeypatch.setattr(Image.Image, "save", full)
    np.savez("grey.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8))
    ctm_nb_evaluate(["grey.npz", "--ref", "digits", "--save-ref", "r.npz", "--nearest"])
    out, err = capsys.readouterr()
    assert "nearer_to_training" in out and "frechet" in out and not (here / "r.npz").exists()


def test_overwrite_removes_what_another_sampling_has_left(here, untrained_run):
    run = untrained_run(here / "run", 3, ["cat", "dog", "cow"])
    words = dict(which="teacher", solver="euler", steps=1, device="cpu")
    for n in (70, 4):
        parts = _open_parts(here / "x.npz", {"n": 300, "seed": 9, "part": 20})
        assert parts == _parts_of(here / "x.npz") and parts.is_dir()
        if n == 70:
            with pytest.raises(ValueError, match="holds parts of other samples .* pass --overwrite"):
                draw_samples(str(run), here / "x.npz", n, **words)
        draw_samples(str(run), here / "x.npz", n, overwrite=True, **words)
        assert not parts.exists() and len(np.load(here / "x.npz")["arr_0"]) == n
    assert sorted(p.name for p in here.iterdir() if "x.npz" in p.name) == ["x.npz"]


def test_scores_of_a_run_that_are_none_stop_it_before_it_trains(here, capsys):
    words = ["--preset", "tiny", "--name", "r", "--set", "teacher.steps=2", "distill.steps=1", "evaluate.n=0"]
    ctm_nb_train([*words, "--stage", "teacher"])
    (here / "runs" / "r" / "scores.json").write_text(json.dumps({"fid": 3}))
    capsys.readouterr()
    assert "scores.json must be a list of score records" in said(capsys, ctm_nb_train, *words)[1]
