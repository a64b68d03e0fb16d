"""Networks of another run as a beginning, for other classes; more steps after a run is finished."""
import json

import pytest
import torch

from runs import ONE_LEVEL

from ctm_nb import load
from ctm_nb.checkpoints.models import relabel
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.training.config import make_config
from ctm_nb.training.stages import given_model
from ctm_nb.training.trainer import Trainer

FAST = [ONE_LEVEL, "teacher.batch=8", "distill.batch=8", "evaluate.n=0", "run.log_every=10", "run.sample_every=100",
        "run.track=none"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    ctm_nb_train(["--preset", "tiny", "--name", "a", "--runs", str(runs), "--set", *FAST])
    return runs


def words(runs, name, *more): return ["--preset", "tiny", "--name", name, "--runs", str(runs), *more, "--set", *FAST]


def rows(run): return [json.loads(l) for l in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_class_of_a_known_name_stays_and_a_network_without_classes_draws_what_it_drew(finished):
    m = load(finished / "a")
    t, s, x = torch.tensor([2.]), torch.tensor([.5]), torch.randn(1, *m.data_shape)
    G = lambda m, c: m.G(x, t, s, None if c is None else torch.tensor([c]))
    more = relabel(m, ["ten", *reversed(m.classes)])
    for i, c in enumerate(m.classes): assert torch.allclose(G(m, i), G(more, 1 + more.classes[1:].index(c)), atol=1e-5)
    assert more.n_classes == m.n_classes + 1 and not torch.allclose(G(more, 0), G(more, 1), atol=1e-5)
    bare = relabel(m, [])
    grown = relabel(bare, ["a", "b"])
    assert bare.n_classes == 0 and torch.equal(G(bare, None), G(grown, 1))


def test_a_given_teacher_draws_the_classes_of_the_data(finished, tmp_path, caplog):
    "Known names in another order are put in order; what other names stand for is said."
    from ctm_nb.checkpoints.models import save_model
    from ctm_nb.data.images import digits
    data, m = digits(), load(finished / "a", which="teacher")
    def given(names):
        path = save_model(relabel(m, names), tmp_path / f"{names[0]}.safetensors")
        return given_model(make_config("tiny", [f"teacher.source={path}", "data.source=x"]), "teacher", data)
    D = lambda m: m.D(torch.ones(2, *m.data_shape), torch.tensor([2., 2.]), torch.tensor([3, 8]))
    for names in (list(data.classes), data.classes[::-1]): assert torch.allclose(D(given(names)), D(m), atol=1e-6)
    assert not caplog.records
    given([f"letter {c}" for c in "abcdefghij"])
    assert "draws other classes, which are taken in their order: letter a for 0, ..." in caplog.text


def test_finetuning_begins_with_teacher_and_student(finished):
    config = make_config("tiny", [f"{s}.initial={finished / 'a'}" for s in ("teacher", "distill")] + FAST)
    t = Trainer(config, finished / "b")
    known = load(finished / "a", which="teacher").state_dict()
    assert all(torch.equal(v, known[k]) for k, v in t.parts["model"].state_dict().items())
    while t.now.name == "teacher": t.train_step()
    assert t.step == t.plan["teacher"].end + 1  # the first step of the student is made
    student, begun = t.parts["ctm"].state_dict(), load(finished / "a", which="ctm").state_dict()
    assert max(float((v - begun[k]).abs().max()) for k, v in student.items()) < .01
    assert any(float(v.abs().max()) > 0 for k, v in begun.items() if "affine_s" in k)


def test_a_mere_teacher_gets_a_student_as_always_and_a_public_one_of_another_shape_is_refused(finished, tmp_path):
    from ctm_nb.checkpoints.models import save_model
    save_model(load(finished / "a", which="teacher"), path := tmp_path / "t.safetensors")
    ctm_nb_train(words(finished, "c", "--finetune", str(path), "--steps", "4"))
    assert load(finished / "c").about and rows(finished / "c")[-1]["stage"] == "ctm_dsm"
    with pytest.raises(SystemExit): ctm_nb_train(words(finished, "d", "--finetune", str(path), "--data", "emoji"))
    assert not (finished / "d" / "checkpoints").exists()


def test_more_steps_follow_a_finished_run_and_the_same_words_resume_them(finished, capsys):
    ctm_nb_train(words(finished, "e", "--steps", "20"))
    with pytest.raises(SystemExit): ctm_nb_train(words(finished, "e", "--steps", "20,+20"))
    with pytest.raises(SystemExit): ctm_nb_train(words(finished, "f", "--steps", "+20"))
    assert "/f is none" in capsys.readouterr().err
    ctm_nb_train(words(finished, "e", "--steps", "+20,+10", "--stage", "teacher"))  # of 70
    assert rows(finished / "e")[-1]["step"] == 60
    ctm_nb_train(words(finished, "e", "--steps", "+20,+10"))  # goes on, adds nothing
    assert rows(finished / "e")[-1]["step"] == 70
    assert json.loads((finished / "e/config.json").read_text())["run"]["before"] == 40
    ctm_nb_train(words(finished, "e", "--steps", "+0,+10"))
    assert rows(finished / "e")[-1]["step"] == 80
    capsys.readouterr()
    with pytest.raises(SystemExit): ctm_nb_train(words(finished, "e", "--steps", "20"))
    assert "goes on by --steps +N or more --minutes, not by its first command" in capsys.readouterr().err
