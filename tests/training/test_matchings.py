"""Optimizers and objectives by name: a run with any of them ends as it would have ended, interrupted or not."""
from pathlib import Path

import pytest
import torch
from runs import assert_same
from test_resume import start, walk

from ctm_nb.training.optimizers import Muon, make_optimizer

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
