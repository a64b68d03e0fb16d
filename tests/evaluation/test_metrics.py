"""Metrics: golden numbers, closed forms, invariances, and errors that name what is wrong."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.data.images import ImageData, digits
from ctm_nb.evaluation.evaluate import run_evaluator
from ctm_nb.evaluation.features import ClassifierExtractor
from ctm_nb.evaluation.metrics import (FeatureStats, _as_probs, class_accuracy, frechet_distance, frechet_gaussians,
                                       inception_score, _knn_radii, precision_recall, train_classifier)
from ctm_nb.evaluation.reference import image_samples

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"


def cloud(n=200, d=6, seed=0, shift=0.):
    return np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(.5, 2, d) + shift


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def scored():
    "What scores digits, and the training images."
    splits = {"train": digits("train"), "held_out": digits("held_out")}
    return run_evaluator(splits), splits


def scores_of(evaluator, x, y=None): return evaluator.score(evaluator.collect(image_samples(x, y)))


# --- golden

def test_golden_frechet(golden):
    assert frechet_distance(golden["ref_features"], golden["sample_features"]) == pytest.approx(float(golden["fid"]),
                                                                                                rel=1e-6)


@pytest.mark.parametrize("convert", [lambda a: a, torch.from_numpy, lambda a: torch.from_numpy(a).float()])
def test_golden_precision_recall(golden, convert):
    got = precision_recall(convert(golden["ref_features"]), convert(golden["sample_features"]), k=int(golden["k"]))
    assert got == (float(golden["precision"]), float(golden["recall"]))


def test_golden_inception_score(golden):
    assert inception_score(golden["sample_probs"]) == pytest.approx(float(golden["inception_score"]), abs=1e-9)


# --- Frechet distance

def test_identical_sets_are_at_zero():
    for n, d in [(300, 8), (5, 40)]:                         # full rank, and far fewer points than dimensions
        assert frechet_distance(cloud(n, d), cloud(n, d)) == pytest.approx(0, abs=1e-9)


def test_rank_deficient_wide():
    # against the overlap of the centred data matrices, which needs no square root
    a, b = cloud(20, 400), cloud(30, 400, seed=1)
    ca, cb = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
    expect = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca ** 2).sum() + (cb ** 2).sum() - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expect, rel=1e-9)


def test_closed_form_of_rotated_gaussians():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    va, vb, ma, mb = np.array([1., 2, 3, 4, 5]), np.array([9., 1, 0, 2, 4]), np.zeros(5), np.arange(5.)
    got = frechet_gaussians(ma, q @ np.diag(va) @ q.T, mb, q @ np.diag(vb) @ q.T)
    assert got == pytest.approx(30 + ((np.sqrt(va) - np.sqrt(vb)) ** 2).sum(), abs=1e-6)


def test_large_sample_reaches_the_closed_form():
    a, b = cloud(40000, 4), cloud(40000, 4, seed=1) * 2 + 1
    assert frechet_distance(a, b) == pytest.approx((np.linspace(.5, 2, 4) ** 2).sum() + 4, rel=.03)


def test_permutation_and_symmetry():
    a, b, rng = cloud(), cloud(150, seed=1, shift=.3), np.random.default_rng(2)
    assert frechet_distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(frechet_distance(a, b), abs=1e-10)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-10)
    assert precision_recall(rng.permutation(a), rng.permutation(b)) == precision_recall(a, b)
    assert precision_recall(b, a) == precision_recall(a, b)[::-1]


def test_far_from_the_origin():
    a, b = cloud(), cloud(seed=1, shift=.3)
    assert frechet_distance(a + 1e5, b + 1e5) == pytest.approx(frechet_distance(a, b), abs=1e-6)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [0, 100], [199], [50, 100, 150]])
def test_merge_equals_one_pass(cuts):
    x = cloud(shift=1e3)
    merged = FeatureStats(6)
    for part in np.split(x, cuts): merged.merge(FeatureStats(6).update(part))
    whole = FeatureStats(6).update(x)
    assert merged.n == whole.n == 200
    assert (merged.mean - whole.mean).abs().max() < 1e-10 and (merged.cov - whole.cov).abs().max() < 1e-10
    assert np.abs(whole.cov.numpy() - np.cov(x.T)).max() < 1e-10


# --- precision and recall

def test_precision_recall_against_all_pairs(monkeypatch):
    import ctm_nb.evaluation.metrics as m
    a, b = cloud(90), cloud(70, seed=1, shift=.5)
    dist = lambda x, y: np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))
    ra, rb = (np.sort(dist(x, x), 1)[:, 4] for x in (a, b))
    expect = (dist(b, a) <= ra).any(1).mean(), (dist(a, b) <= rb).any(1).mean()
    assert precision_recall(a, b, k=4) == pytest.approx(expect, abs=1e-12)
    monkeypatch.setattr(m._distance_blocks, "__defaults__", (200,))        # blocks of two rows: the same
    assert precision_recall(a, b, k=4) == pytest.approx(expect, abs=1e-12)


def test_duplicates_have_radius_zero_and_hold_themselves():
    x = np.repeat(cloud(5) * 1e3 + .1, 4, 0)
    assert _knn_radii(torch.from_numpy(x), 3).max() == 0
    assert precision_recall(x, x) == (1., 1.)


def test_noise_costs_precision_and_collapse_costs_recall():
    real = np.concatenate([cloud(100, 6, i, shift=8 * i) for i in range(3)])
    precision, recall = precision_recall(real, np.concatenate([cloud(100, 6, 5 + i, shift=8 * i) for i in range(3)]))
    assert precision > .7 and recall > .7
    assert precision_recall(real, np.random.default_rng(0).uniform(-10, 30, (300, 6)))[0] < .2
    collapsed = precision_recall(real, cloud(300, 6, 9))
    assert collapsed[0] > .7 and collapsed[1] < .4


# --- probabilities

def test_inception_score_limits():
    eye = np.eye(7)
    assert inception_score(eye) == pytest.approx(7) and inception_score(eye[[2] * 9]) == pytest.approx(1)
    assert inception_score(eye, splits=7) == pytest.approx(1)


def test_class_accuracy_counts():
    assert class_accuracy(np.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])) == .75


# --- what must be refused

NAN, INF = cloud(), cloud()
NAN[7, 2], INF[3, 1] = np.nan, np.inf


@pytest.mark.parametrize("score", [frechet_distance, precision_recall])
@pytest.mark.parametrize("bad, message", [
    (NAN, r"finite.*1 of 200 rows \(first: row 7\)"), (INF, r"finite.*row 3"), (np.ones((50, 6)), "constant"),
    (cloud(1), "too few"), (cloud(0), "too few"), (cloud()[0], r"\(N, d\)"), (cloud(d=5), "same dimension.*5")])
def test_bad_features_are_refused(score, bad, message):
    with pytest.raises(ValueError, match=message): score(cloud(), bad)
    with pytest.raises(ValueError, match=message): score(bad, cloud())


def test_bad_arguments_are_refused(scored):
    evaluator, splits = scored
    with pytest.raises(ValueError, match="k must be >= 1, got 0"): precision_recall(cloud(), cloud(), k=0)
    with pytest.raises(ValueError, match="at least 6 are needed, got 5"): precision_recall(cloud(), cloud(5), k=5)
    with pytest.raises(ValueError, match="splits must be between 1 and"): inception_score(np.eye(3), splits=4)
    with pytest.raises(ValueError, match="row 1"): _as_probs([[1., 0.], [.5, .6]])
    with pytest.raises(ValueError, match="a class for each of the 3"): class_accuracy(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="same features, got 3 and 2"): FeatureStats(3).merge(FeatureStats(2))
    with pytest.raises(ValueError, match="finite"): FeatureStats(6).update(NAN)
    with pytest.raises(ValueError, match="without labels"):
        train_classifier(ImageData(splits["train"].images, None, [], "folder"))
    with pytest.raises(ValueError, match="x must be finite"):
        scores_of(evaluator, torch.full((5, 1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match=r"images must be uint8 .* \(5, 8, 8\)"):
        scores_of(evaluator, torch.zeros(5, 8, 8))
    with pytest.raises(ValueError, match="constant"): scores_of(evaluator, torch.zeros(50, 1, 8, 8))


# --- the classifier

def test_training_is_deterministic_and_private():
    train = digits("train")
    few = ImageData(train.images[:200], train.labels[:200], train.classes, "few")
    state = torch.random.get_rng_state()
    nets = [train_classifier(few, seed=s, epochs=1, width=8, dim=16) for s in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    f = [ClassifierExtractor(n)(few.images).pooled for n in nets]
    assert torch.equal(f[0], f[1]) and not torch.equal(f[0], f[2])
    assert not nets[0].training and (f[0].var(0) - 1).abs().max() < .05


def test_a_classifier_of_few_images_reads_others_too(caplog):
    "And one that reads no better than guessing says so."
    train, held_out = digits("train"), digits("held_out")
    of = lambda data, n: ImageData(data.images[:n], data.labels[:n], data.classes, "few")
    few = {"train": of(train, 100), "held_out": of(held_out, 60)}
    right = lambda splits: next(r["value"] for r in run_evaluator(splits).floor(splits)
                                if r["metric"] == "classifier_accuracy")
    assert right(few) > .6 and not caplog.records
    mixed = few["train"].labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert right({**few, "train": ImageData(few["train"].images, mixed, train.classes, "mixed")}) < .3
    assert "of the 60 held-out images, guessing 10 %: scores in its features say nothing" in caplog.text


def test_scores_see_noise_collapse_and_wrong_labels(scored):
    evaluator, splits = scored
    train = splits["train"]
    floor = {r["metric"]: r["value"] for r in evaluator.floor(splits)}
    assert floor["classifier_accuracy"] > .95 and floor["class_accuracy"] > .95
    assert floor["precision"] > .8 and floor["recall"] > .8
    noise = scores_of(evaluator, torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert "class_accuracy" not in noise and noise["precision"] < .2
    assert noise["frechet_distance"] > 20 * floor["frechet_distance"]
    ones = train.labels == 1
    collapsed = scores_of(evaluator, train.images[ones], train.labels[ones])
    assert collapsed["recall"] < .2 < .7 < collapsed["precision"] and collapsed["inception_score"] < 2
    assert scores_of(evaluator, train.images, (train.labels + 1) % 10)["class_accuracy"] < .05
    again = scores_of(replace(evaluator, batch=97), train.x0(), train.labels)
    assert again["frechet_distance"] == pytest.approx(floor["frechet_distance"], rel=1e-3)


def test_records_are_complete(scored):
    evaluator, splits = scored
    sampler = {"solver": "ctm", "steps": 1, "gamma": 0.}
    (record,) = evaluator._records({"precision": np.float64(.5)}, 10, sampler, 3, "step_5")
    names = {"metric", "value", "n_samples", "reference", "features", "sampler", "seed", "checkpoint"}
    assert set(record) == names and type(record["value"]) is float
    assert record["reference"] == {"name": "digits, held out", "sha256": digits("held_out").sha256(), "n": 445}
    assert record["sampler"] == sampler and record["features"].startswith("classifier64-")
    with pytest.raises(ValueError, match="finite"):
        evaluator.extractor.net.norm.running_mean += float("nan")
        evaluator.collect(image_samples(splits["held_out"].images))
