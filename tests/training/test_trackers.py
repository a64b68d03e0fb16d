"""Services that follow a run: asked for by name only, the same tags as everywhere, one curve over a resume."""
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from runs import ONE_LEVEL
from warm import python

from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer


def followed(package, folder, *words):
    few = [ONE_LEVEL, "teacher.batch=8", "distill.batch=8", "run.sample_every=20", "evaluate.n=0"]
    words = [*few, f"run.track={package}", *words]
    return Trainer(make_config("tiny", words), folder)


def stand_in(monkeypatch, name):
    "A module of this name with the functions of wandb, and what it was told."
    module, told = ModuleType(name), []
    module.__spec__, module.told = ModuleSpec(name, None), told
    module.init = lambda **words: told.append(words) or module
    module.log = lambda numbers, step: told.append((step, numbers))
    module.Image, module.finish = (lambda image: image.shape), lambda: told.append("finished")
    monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_tags_of_the_log_and_one_curve_over_a_resume(name, tmp_path, monkeypatch):
    told = stand_in(monkeypatch, name)
    followed(name, tmp_path / "run").run("teacher")
    (first,), rows, end = told[:1], told[1:-1], told[-1]
    assert end == "finished" and [s for s, _ in rows] == sorted({s for s, _ in rows})
    lines = [json.loads(l) for l in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = {s: {k: v for k, v in n.items() if k != "samples"} for s, n in rows}
    assert {s: n for s, n in numbers.items() if n} == {
        l["step"]: {k: l[k] for k in l if k in numbers[l["step"]]} for l in lines}
    assert {"loss_edm", "lr", "grad_norm"} <= set(rows[0][1]) and any("samples" in n for _, n in rows)
    assert first["config"]["run"]["track"] == name and first["project"] == "ctm_nb"
    del told[:]
    followed(name, tmp_path / "run").run()
    assert told[0]["name"] == first["name"] and told[0]["resume"] == "allow" and told[1][0] > rows[-1][0]
    assert (told[0].get("id") == first["name"]) == (name == "wandb")


def test_a_missing_package_is_one_line_before_anything_is_trained(tmp_path):
    code = ("import sys; sys.modules['wandb'] = None\nfrom ctm_nb.commands.train import ctm_nb_train\n"
            "sys.argv[1:] = '--preset tiny --set run.track=wandb --runs'.split() + [sys.argv[1]]\nctm_nb_train()")
    done = python(code, tmp_path)
    assert done.returncode and "pip install wandb" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_nothing_is_followed_where_none_is_asked_for(tmp_path):
    followed("none", tmp_path / "run").run("teacher")
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_offline(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for stage in "teacher", "all": followed(name, tmp_path / "run").run(stage)
    assert list((tmp_path / ("run/wandb" if name == "wandb" else "trackio")).rglob("*.png"))
