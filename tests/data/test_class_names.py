"""Names of classes: in the pictures of a run, in its checkpoints, in what ctm_nb_sample writes."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import ctm_nb.data.images
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.data.images import digits, named_grid
from ctm_nb.checkpoints.models import load

WORDS = ["network.channel_mult=1", "teacher.steps=2", "distill.steps=2", "evaluate.n=0", "run.sample_every=1000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run on a folder with two classes, one called in Cyrillic."
    tmp = tmp_path_factory.mktemp("run")
    for i in range(60):
        (tmp / "pets" / ("cat", "кот")[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits().images[i, 0].numpy()).save(tmp / "pets" / ("cat", "кот")[i % 2] / f"{i}.png")
    ctm_nb_train(["--preset", "tiny", "--data", str(tmp / "pets"), "--runs", str(tmp / "runs"), "--set", *WORDS])
    return tmp / "runs" / "pets"


@pytest.fixture
def written(monkeypatch):
    "What is written over columns."
    seen = []
    real = ctm_nb.data.images._words
    def words(names, size, limit):
        if names and limit == 104: seen.append(names)
        return real(names, size, limit)
    monkeypatch.setattr(ctm_nb.data.images, "_words", words)
    return seen


def test_the_grids_of_a_run_name_its_classes(run, written):
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer

    config = json.loads((run / "config.json").read_text())
    t = Trainer(make_config("tiny", [f"data.source={config['data']['source']}", *WORDS]), run)
    t.save_grid()
    t.save_grid(final=True)
    assert written == [["cat", "кот"] * 10] * 2
    assert Image.open(run / "samples" / "final.png").mode == "RGB"


def test_checkpoints_know_the_names(run):
    assert load(run).classes == ["cat", "кот"] == load(run, which="teacher").classes
    meta = json.loads(next((run / "checkpoints").glob("step_*/checkpoint.json")).read_text())
    assert [m["description"]["classes"] for m in meta["meta"]["models"].values()] == [["cat", "кот"]] * 2


def test_samples_know_the_names(run, tmp_path, written):
    for out in ("a.png", "a.zip"):
        ctm_nb_sample([str(run), "-n", "12", "--device", "cpu", "--out", str(tmp_path / out)])
    assert written == [["cat", "кот"] * 2]
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        assert json.loads(z.read("dataset.json"))["classes"] == ["cat", "кот"]
    ctm_nb_sample([str(run), "-n", "12", "--device", "cpu", "--out", str(tmp_path / "b.png"), "--classes", "none"])
    assert len(written) == 1


@pytest.mark.parametrize(
    "names, columns, where",
    [
        (["a", "b"] * 6, 4, "over"),
        (["a"] * 6 + ["b"] * 6, 6, "beside"),
        (list("abcdefghijkl"), 5, "under"),
        (None, 5, ""),
        ([""] * 12, 5, ""),
    ],
)
def test_where_names_go(names, columns, where, written):
    x = torch.zeros(12, 3, 16, 16, dtype=torch.uint8)
    plain, got = named_grid(x, columns), named_grid(x, columns, names)
    rows = -(-12 // columns)
    wider, higher = got.width - plain.width, got.height - plain.height
    assert {
        "over": wider == 0 and higher > 10,
        "beside": wider > 5 and higher == 0,
        "under": wider == 0 and higher == 12 * rows,
        "": (wider, higher) == (0, 0),
    }[where]
    assert (np.asarray(got) < 128).sum() > (np.asarray(plain) < 128).sum() or not where  # there is ink
