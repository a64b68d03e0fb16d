"""Optimizers and objectives by name: a run with any of them ends as it would have ended, interrupted or not."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same
from safetensors.torch import save
from test_resume import start, walk

from ctm_nb.method.solvers import solve
from ctm_nb.training import budget, costs
from ctm_nb.training.config import make_config
from ctm_nb.training.optimizers import Muon, make_optimizer
from ctm_nb.training.trainer import open_images

MUON = ["teacher.optimizer=muon", "distill.optimizer=muon", "teacher.lr=.02", "distill.lr=.02"]


DECAYING = [*MUON, "teacher.warmup=6", "teacher.decay=cosine"]


@pytest.mark.parametrize("words, stops", [(MUON, (5, 11)), (DECAYING, (3, 8))])
def test_interrupted_and_not_end_alike(tmp_path, words, stops):
    walk(start(tmp_path / "whole", *words), 14)
    for step in (*stops, 14): walk(start(tmp_path / "parts", *words), step)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def network(): return torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))


def test_what_is_a_matrix_learns_by_muon_and_the_rest_by_adam():
    net = network()
    optimizer = make_optimizer("muon", net, .02, last_layer=net[2].weight)
    assert isinstance(optimizer, Muon)
    matrices, others = ({id(p) for p in g["params"]} for g in optimizer.param_groups)
    assert matrices == {id(net[0].weight), id(net[1].weight)} and len(others) == 4


# ---- objectives

SMALL = ["distill.N=6", "distill.K=5", "distill.reuse=2"]
KINDS = [["distill.matching=trajectories"], ["distill.matching=trajectories", "distill.stored=16"],
         ["distill.matching=trajectories", "distill.anchor=teacher", "distill.anchor_rows=2"],
         ["distill.matching=eulerian"], ["distill.matching=eulerian", "distill.anchor=teacher"],
         ["distill.phases=trajectories:.5,soft:.5"], ["distill.phases=soft:.5,eulerian:.5", "distill.optimizer=muon"],
         ["distill.matching=trajectories", "teacher.label_dropout=.2", "distill.label_dropout=.5"]]


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_a_stage_with_any_objective_resumes_bit_for_bit(tmp_path, words):
    "Interrupted within a phase, at its end, and with stored trajectories in memory and not."
    words = [*SMALL, *words, "teacher.steps=2", "distill.steps=8"]
    walk(start(tmp_path / "whole", *words), 10)
    for step in (5, 6, 9, 10): walk(start(tmp_path / "parts", *words), step)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    both = [Path(tmp_path / k / "metrics.jsonl").read_text().count("teacher_evals") for k in ("whole", "parts")]
    assert min(both) > 0


@pytest.mark.parametrize("words", [["distill.matching=trajectories"], ["distill.phases=trajectories:.5,soft:.5"]])
def test_the_length_of_a_stage_with_phases_stays(tmp_path, words):
    words = [*SMALL, *words, "teacher.steps=2", "distill.steps=8", "distill.decay=constant"]
    walk(start(tmp_path / "r", *words), 5)
    with pytest.raises(ValueError, match="distill.steps"): start(tmp_path / "r", *words, "distill.steps=9")


def test_any_objective_holds_as_many_rows_as_are_asked_for(tmp_path):
    "Soft matching too: the jumps stay, the denoising loss sees every second row, and the plan counts them."
    first = {}
    for rows in ("none", "1", "2"):
        t = start(tmp_path / rows, *SMALL, "teacher.steps=1", "distill.steps=2", f"distill.anchor_rows={rows}")
        t.train_step()
        first[rows] = t.train_step()
    ctm, dsm = ({rows: float(v[k]) for rows, v in first.items()} for k in ("loss_ctm", "loss_dsm"))
    assert ctm["none"] == ctm["1"] == ctm["2"] and dsm["none"] == dsm["1"] != dsm["2"]
    cost = lambda rows: costs.student_cost(make_config("tiny", [f"distill.anchor_rows={rows}"]).distill, "soft")
    assert cost("none") == cost("1") == cost("2") + 1.5


@pytest.mark.parametrize("anchor", ["dsm", "teacher"])
def test_a_batch_in_one_piece_goes_through_the_student_once(tmp_path, anchor):
    "Its jumps and the rows to denoise; and what the step says and learns is what two passes do."
    found = {}
    for m in ("auto", "8"):
        words = [*SMALL, "distill.matching=trajectories", f"distill.anchor={anchor}", "teacher.steps=1",
                 "distill.steps=2", "distill.batch=16", f"run.micro_batch={m}"]
        t, sizes = walk(start(tmp_path / m, *words), 2), []
        t.parts["model"].net.register_forward_hook(lambda net, args, out, sizes=sizes: sizes.append(len(out)))
        found[m] = {k: float(v) for k, v in t.train_step().items() if k.startswith(("loss", "lambda", "grad"))}
        assert sizes == {"auto": [20], "8": [8, 2, 8, 2]}[m]
    assert found["auto"] == pytest.approx(found["8"], rel=1e-4, abs=1e-7)
    need = costs.step_needs(t.config, t.data)["ctm_dsm"]
    assert need.fixed < 100 * need.each  # nearly all of it grows with the batch


@pytest.mark.parametrize("matching", ["trajectories", "eulerian"])
def test_micro_batches_make_the_gradient_of_the_batch(tmp_path, matching):
    ends = []
    for m in ("auto", "4"):
        words = [*SMALL, f"distill.matching={matching}", "teacher.steps=2", "distill.steps=4", f"run.micro_batch={m}"]
        t = walk(start(tmp_path / m, *words), 6)
        ends.append(torch.nn.utils.parameters_to_vector(t.parts["model"].parameters()))
    assert (ends[0] - ends[1]).abs().max() < 1e-4


def test_an_adversary_after_trajectories_matches_intervals(tmp_path):
    words = [*SMALL, "distill.matching=trajectories", "teacher.steps=2", "distill.steps=2", "gan.steps=4"]
    assert walk(start(tmp_path, *words, "gan.batch=8"), 8).step == 8


def test_the_teacher_is_asked_once_for_each_batch(tmp_path):
    words = [*SMALL, "distill.matching=trajectories", "teacher.steps=1", "distill.steps=8"]
    t = start(tmp_path, *words)
    assert [t.train_step().get("teacher_evals") for _ in range(9)][1:] == [5.] * 4 + [0.] * 4


# ---- trajectories in a folder

def stored(tmp_path, *words):
    return [*SMALL, "distill.matching=trajectories", "distill.stored=100", "teacher.steps=2", "distill.steps=6",
            f"distill.trajectories={tmp_path / 'paths'}", *words]


def test_trajectories_in_a_folder_are_solved_once_for_all_students(tmp_path):
    words = stored(tmp_path)
    walk(start(tmp_path / "whole", *words), 8)
    made = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "paths").iterdir()}
    assert sorted(made) == ["000000.safetensors", "000001.safetensors", "trajectories.json"]
    other = [*words, "distill.lr=1e-3", "distill.batch=8", f"teacher.source={tmp_path}/whole"]
    t = walk(start(tmp_path / "other", *other), 4)
    assert t.train_step()["teacher_evals"] == 0
    again = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "paths").glob("*.safetensors")}
    assert again == {k: v for k, v in made.items() if k != "trajectories.json"}
    (tmp_path / "paths" / "000001.safetensors").unlink()  # killed before it was written
    for step in (4, 5, 8): walk(start(tmp_path / "parts", *words), step)
    assert (tmp_path / "paths" / "000001.safetensors").read_bytes() == made["000001.safetensors"][1]
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_folder_holds_the_solutions_of_its_teacher(tmp_path):
    t = walk(start(tmp_path / "r", *stored(tmp_path, "distill.label_dropout=.5", "teacher.label_dropout=.5")), 3)
    path, y = t.now.folder.take(torch.arange(40, 100))
    whole = path.flatten(0, 1)
    assert path.shape[1] == 6 and len({tuple(v[:4]) for v in whole.flatten(1).tolist()}) == len(whole)
    assert .2 < (y < 0).float().mean() < .8 and y.max() < 10
    ends = solve(t.parts["teacher"].D, path[:, 0], t.now.times, y, t.now.config.distill.solver, above_zero=True)
    assert (ends - path[:, -1]).abs().max() < 1e-5
    assert abs(path[:, 0].std() / t.parts["teacher"].sigma_max - 1) < .1


def test_trajectories_of_another_teacher_are_refused(tmp_path):
    walk(start(tmp_path / "r", *stored(tmp_path)), 3)
    file = tmp_path / "paths" / "trajectories.json"
    for words, what in [(["run.seed=1"], "(teacher differ)"), (["distill.N=7"], "(times differ)")]:
        with pytest.raises(ValueError, match=re.escape(what)):
            walk(start(tmp_path / words[0], *stored(tmp_path), *words), 3)
    good = file.read_text()
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="choose another folder"): walk(start(tmp_path / "s", *stored(tmp_path)), 3)
    file.write_text(good)
    (tmp_path / "paths" / "000000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="000000.safetensors can't be read"):
        walk(start(tmp_path / "s", *stored(tmp_path)), 8)
    (tmp_path / "paths" / "000000.safetensors").write_bytes(save({"other": torch.zeros(1)}))
    with pytest.raises(ValueError, match="000000.safetensors holds no trajectories of this run"):
        walk(start(tmp_path / "s", *stored(tmp_path)), 8)
    with pytest.raises(ValueError, match=r"distill.trajectories must be empty where no phase is trajectories"):
        start(tmp_path / "t", "distill.trajectories=x")


def test_what_measures_leaves_the_folder_alone(tmp_path):
    "A plan's small teacher must not fill the folder of the run's own."
    words = stored(tmp_path, "teacher.batch=8", "distill.batch=8", "evaluate.n=0")
    config = make_config("tiny", ["gan.steps=0", *words])
    budget.measure(config, open_images(config), False, .01)
    assert not (tmp_path / "paths").exists()
    walk(start(tmp_path / "r", *words), 3)
    shutil.rmtree(tmp_path / "paths")
    given = make_config("tiny", ["gan.steps=0", *words, f"teacher.source={tmp_path / 'r'}"])
    costs.measure(given, open_images(given)["train"])
    assert not (tmp_path / "paths").exists()


@pytest.mark.parametrize("matching, cores", [("soft", 2), ("trajectories", 1)])
def test_the_thread_that_works_ahead_has_no_idle_helpers(tmp_path, matching, cores):
    "One core, or half of four where it solves for the student; more than cores in all slows every operation."
    torch.set_num_threads(4)
    try:
        t = start(tmp_path / "r", *SMALL, f"distill.matching={matching}", "teacher.steps=2", "distill.steps=4")
        seen = []
        for _ in range(4):
            t.train_step()
            seen.append(t.ahead.pool.submit(torch.get_num_threads).result())
        assert seen == [1, 1, cores, cores] and torch.get_num_threads() == 4
    finally: torch.set_num_threads(1)
