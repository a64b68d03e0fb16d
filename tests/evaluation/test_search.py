"The search of times: budgets, what is stored."
import numpy as np
import pytest

from ctm_nb.evaluation.search import _coordinate_search, search_times, store_times, stored_times


def test_search_finds_and_respects_its_budget():
    calls, goal = [], [80., 6., .7, .002]
    def score(times, gamma):
        calls.append(times)
        assert all(a > b for a, b in zip(times, times[1:])) and times[0] == 80. and times[-1] == .002
        assert 0 <= gamma <= 1
        return sum((np.log(a) - np.log(b)) ** 2 for a, b in zip(times, goal)) + (gamma - .5) ** 2
    search = lambda steps, budget: search_times(score, steps, .002, 80., budget)
    found = search(3, 60)
    assert len(calls) <= 60 and found["score"] < .02 and len(found["curve"]) == len(calls)
    assert found["curve"] == sorted(found["curve"], reverse=True)
    assert search(3, 60) == found and search(3, 10)["curve"] == found["curve"][:10]
    assert search(1, 9)["times"] == [80., .002]
    with pytest.raises(FloatingPointError, match="nan"): search_times(lambda *_: float("nan"), 2, .002, 80.)


def test_fixed_gamma_is_kept():
    found = search_times(lambda times, gamma: times[1] + gamma, 2, .002, 80., 8, gamma=.3)
    assert found["gamma"] == .3
    seen = []
    _coordinate_search(lambda v: seen.append(v[0]) or abs(v[0] - .61), [.5], 1)
    assert min(abs(v - .61) for v in seen) < .01 and all(0 < v < 1 for v in seen)


def test_stored_times(tmp_path):
    found = {"steps": 2, "times": [80., 1., .002], "gamma": .2, "score": 1., "score_default": 2., "curve": [2., 1.]}
    store_times(tmp_path / "net.pkl", found, metric="FD")
    assert stored_times(tmp_path / "net.pkl", 2)["metric"] == "FD" and (tmp_path / "net.pkl.times.json").exists()
    with pytest.raises(ValueError, match="got steps=5"): stored_times(tmp_path / "net.pkl", 5)
