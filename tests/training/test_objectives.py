"""Optimizers and objectives by name: a run with any of them ends as it would have ended, interrupted or not."""
import pytest
import torch
from runs import assert_same
from test_resume import start, walk

from ctm_nb.training.optimizers import Muon, make_optimizer
from ctm_nb.training.runtime import step_if

MUON = ["teacher.optimizer=muon", "distill.optimizer=muon", "teacher.lr=.02", "distill.lr=.02"]


DECAYING = [*MUON, "teacher.warmup=6", "teacher.decay=cosine"]


@pytest.mark.parametrize("words, stops", [(MUON, (5, 11)), (DECAYING, (3, 8))])
def test_interrupted_and_not_end_alike(tmp_path, words, stops):
    walk(start(tmp_path / "whole", *words), 14)
    for step in (*stops, 14): walk(start(tmp_path / "parts", *words), step)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def network(): return torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))


@pytest.mark.parametrize("first", [True, False])
def test_a_step_of_muon_that_may_not_be_made_leaves_no_trace(first):
    torch.manual_seed(0)
    net = network()
    optimizer = make_optimizer("muon", net, .02, last_layer=net[2].weight)
    for p in net.parameters(): p.grad = torch.randn_like(p)
    if not first: optimizer.step()
    before = [v.clone() for v in net.state_dict().values()]
    kept = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    for p in net.parameters(): p.grad = torch.full_like(p, torch.nan)
    step_if(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values()))
    for s, old in zip(optimizer.state.values(), kept or [{}] * 6):
        assert all(torch.equal(v, old.get(k, torch.zeros_like(v))) for k, v in s.items())


def test_a_step_of_muon_that_may_be_made_is_the_plain_one():
    results = []
    for guarded in (True, False):
        torch.manual_seed(0)
        net = network()
        optimizer = make_optimizer("muon", net, .02, last_layer=net[2].weight)
        for _ in range(3):
            for p in net.parameters(): p.grad = torch.randn_like(p)
            step_if(optimizer, torch.tensor(True)) if guarded else optimizer.step()
        results.append(torch.nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(*results)


def test_what_is_a_matrix_learns_by_muon_and_the_rest_by_adam():
    net = network()
    optimizer = make_optimizer("muon", net, .02, last_layer=net[2].weight)
    assert isinstance(optimizer, Muon)
    matrices, others = ({id(p) for p in g["params"]} for g in optimizer.param_groups)
    assert matrices == {id(net[0].weight), id(net[1].weight)} and len(others) == 4
