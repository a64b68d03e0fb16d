"""Evaluation by several processes, and the search of times: shared, killed, continued, refused."""
import json
import multiprocessing
import os
import socket
import sys

import numpy as np
import pytest
import torch
from warm import ranks

from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.data.images import digits
from ctm_nb.evaluation.draw import make_recipe
from ctm_nb.evaluation.features import ClassifierExtractor
from ctm_nb.checkpoints.models import load
from ctm_nb.evaluation.metrics import FeatureStats, train_classifier
from ctm_nb.evaluation.reference import (Collected, Ranks, image_samples, build_reference, _extract, _joined,
                                         process_group, read_reference)
from ctm_nb.evaluation.search import stored_times


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained_run): return untrained_run(tmp_path_factory.mktemp("run"), 1, "0123456789")


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    net = ClassifierExtractor(train_classifier(digits("train"), epochs=1, width=8))
    return build_reference(net, digits("held_out"), "held out").save(tmp_path_factory.mktemp("ref") / "ref.npz")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(rank, world, port, f, args):
    "A process of a group; exits with 0 if f(*args) returns, with what SystemExit says, or with 1."
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    code = 1
    try:
        f(*args)
        code = 0
    except SystemExit as e: code = e.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def as_group(f, *args, world=2):
    "Exit codes of f(*args) in forked processes that form a group."
    port = free_port()
    both = [multiprocessing.get_context("fork").Process(target=child, args=(r, world, port, f, args))
            for r in range(world)]
    for p in both: p.start()
    for p in both: p.join(100)
    return [p.exitcode for p in both]


def command(*words): ctm_nb_evaluate([str(w) for w in words])


def values(path):
    return {(r["metric"], json.dumps(r["sampler"], sort_keys=True)): r["value"] for r in json.loads(path.read_text())}


def merged_in_a_group(x):
    "Statistics of shares of x equal those of one pass to 1e-10."
    with process_group() as ranks:
        part = ranks.part_of(len(x))
        mine = torch.from_numpy(x[part.start:part.stop])
        got = Collected(len(mine), FeatureStats(x.shape[1]).update(mine) if len(mine) else None, mine, None, None,
                        (1, 8, 8))
        parts, whole = ranks.gather(got), FeatureStats(x.shape[1]).update(x)
        if ranks.rank: assert parts is None
        else:
            every = _joined(parts)
            assert every.n == len(x) and torch.equal(every.points, torch.from_numpy(x))
            assert (every.stats.mean - whole.mean).abs().max() < 1e-10
            assert (every.stats.cov - whole.cov).abs().max() < 1e-10
        assert ranks.send("word" if ranks.rank == 0 else None) == "word"


def test_merged_statistics_are_those_of_one_pass():
    rng = np.random.default_rng(0)
    assert as_group(merged_in_a_group, rng.standard_normal((101, 5)) + 1e3) == [0, 0]
    # one of them has nothing to do
    assert as_group(merged_in_a_group, rng.standard_normal((2, 5)), world=3) == [0, 0, 0]


def test_shares_cover_everything_once():
    for n, world in ((10, 3), (2, 5), (7, 7), (1000, 6)):
        parts = [list(Ranks(r, world).part_of(n)) for r in range(world)]
        assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_joined_needs_images_that_differ(ref):
    net = ClassifierExtractor(read_reference(ref).net)
    one = _extract(net, image_samples(digits().images[:1]).batches())
    with pytest.raises(ValueError, match="at least 2 are needed, got 1"): _joined([one])
    with pytest.raises(ValueError, match="constant: all 3 images"): _joined([one, one, one], "f")
    assert _joined([one, _extract(net, image_samples(digits().images[5:6]).batches())]).n == 2


def test_two_processes_score_as_one(run, ref, tmp_path, capfd):
    words = (run, "--ref", ref, "--metrics", "fid,is,pr,acc", "--steps", "1,2", "--gamma", "0.5", "-n", 71,
             "--batch", 20, "--device", "cpu", "--out")
    command(*words, tmp_path / "one.json")
    capfd.readouterr()
    assert as_group(command, *words, tmp_path / "two.json") == [0, 0]
    one, two = values(tmp_path / "one.json"), values(tmp_path / "two.json")
    assert one.keys() == two.keys() and all(two[k] == pytest.approx(v, rel=1e-3, abs=.02) for k, v in one.items())
    assert capfd.readouterr().out.count("reference held out") == 1  # the first alone prints
    digits_npz = tmp_path / "real.npz"
    np.savez(digits_npz, arr_0=digits().images[:90].permute(0, 2, 3, 1).numpy())
    words = digits_npz, "--ref", ref, "--out"
    command(*words, tmp_path / "one.json")
    as_group(command, *words, tmp_path / "two.json")
    one, two = values(tmp_path / "one.json"), values(tmp_path / "two.json")
    assert one.keys() == two.keys()
    assert all(two[k] == pytest.approx(v, rel=1e-6, abs=1e-6) for k, v in one.items() if k[1] == "null")


def test_two_ranks_with_a_classifier_trained_by_the_first(run, tmp_path):
    words = [run, "--ref", "digits", "--steps", "1", "-n", "40", "--device", "cpu", "--out", tmp_path / "s.json"]
    done = ranks("from ctm_nb.commands.evaluate import ctm_nb_evaluate; ctm_nb_evaluate()", *words)
    assert all(d.returncode == 0 for d in done), done
    assert sum(d.stdout.count("frechet_distance") for d in done) == 1
    assert {r["n_samples"] for r in json.loads((tmp_path / "s.json").read_text())} == {40}


def test_mistakes_end_every_process(run, ref):
    assert as_group(command, run, "--ref", ref, "--gamma", "3") == [2, 2]


# --- search of times

def test_search_is_stored_and_used(run, ref, tmp_path, capsys):
    words = (run, "--ref", ref, "--search", "--steps", "2,3", "--tries", 5, "--search-n", 70, "-n", 75, "--metrics",
             "fid,pr", "--device", "cpu", "--out", tmp_path / "s.json")
    command(*words)
    said, stored = capsys.readouterr().out, json.loads((run / "times.json").read_text())
    assert "default, fresh" in said and set(stored) == {"2", "3"}
    for e in stored.values():
        assert e["seed"] == 0 and e["n_samples"] == 75 and len(e["curve"]) == 5 and e["metric"] == "frechet_distance"
        assert e["reference"]["name"] == "held out"
        assert e["kept"] == ("found" if e["fresh"]["found"] < e["fresh"]["default"] else "default")
        assert (e["times"] == e["searched"]["times"]) == (e["kept"] == "found")
    rows = [r for r in json.loads((tmp_path / "s.json").read_text()) if r["metric"] == "frechet_distance"]
    both = [((False, e["fresh"]["default"]), (True, e["fresh"]["found"])) for e in stored.values()]
    assert [("times" in r["sampler"], r["value"]) for r in rows] == [pair for e in both for pair in e]
    plan = make_recipe(load(run), run, 3, steps=2, times="auto")
    assert plan["times"] == stored["2"]["times"] and plan["gamma"] == stored["2"]["gamma"]
    assert stored_times(run, 3)["times"] == stored["3"]["times"]
    (run / "times.json").unlink()
    assert as_group(command, *words[:-2]) == [0, 0]  # two processes search side by side
    again = json.loads((run / "times.json").read_text())
    assert {k: len(e["curve"]) for k, e in again.items()} == {"2": 5, "3": 5}
    (run / "times.json").write_text(json.dumps(stored))
    capsys.readouterr()
    command(run, "--ref", ref, "--times", "auto", "--steps", "2", "-n", 75, "--metrics", "fid",
                                 "--device", "cpu", "--out", tmp_path / "t.json")
    (auto,) = json.loads((tmp_path / "t.json").read_text())
    assert auto["sampler"]["times"] == stored["2"]["times"]
    assert auto["value"] == pytest.approx(min(stored["2"]["fresh"].values()), rel=1e-4)


@pytest.mark.parametrize("words, message", [(["--search", "--steps", "1"], "--steps >= 2"),
                                            (["--search", "--gamma", "0,0.5"], "one --gamma"),
                                            (["--search", "--metrics", "pr"], "fid, kid, got 'pr'"),
                                            (["--search", "--tries", "1"], "--tries must be >= 2, got 1"),
                                            (["--search", "--solver", "heun"], "got heun"),
                                            (["--search", "--which", "teacher"], "a teacher"),
                                            (["--search", "--search-n", "2"], "--search-n must be >= 6, got 2"),
                                            (["--times", "80,90"], "decreasing"), (["--times", "900,1"], "[0.002, 80]"),
                                            (["--times", "x"], "got 'x'"),
                                            (["--times", "auto", "--steps", "9"], "times"),
                                            (["--seed", "-1"], "--seed must be >= 0, got -1"),
                                            (["--solver", "rk4"], "got 'rk4'"), (["--gamma", "nan"], "--gamma"),
                                            (["--steps", "1.5"], "whole numbers"), (["-n", "2"], "-n must be >= 6")])
def test_mistakes_are_one_line(run, ref, capsys, words, message):
    with pytest.raises(SystemExit) as e: command(run, "--ref", ref, *words)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and message in err and err.strip().count("\n") == 0 and not out, err
