"""Feature networks, references, sample sets, further scores and the command that brings them together."""
import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ctm_nb.checkpoints.models import load
from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.data.images import ImageData, digits
from ctm_nb.evaluation.draw import draw_samples
from ctm_nb.evaluation.evaluate import (METRICS, Evaluator, Request, drawn_samples, extend_scores, _is_checkpoint,
                                        _sampler_settings, text_table)
from ctm_nb.evaluation.features import (ClassifierExtractor, InceptionExtractor, load_extractor, _resize_clean,
                                        _resize_tf1)
from ctm_nb.evaluation.metrics import (FeatureStats, _distance_blocks, frechet_distance,
                                       kernel_distance, _polynomial_mmd, precision_recall, train_classifier)
from ctm_nb.evaluation.reference import (image_samples, build_reference, collect, data_samples,
                                         open_samples, read_reference)

rng = np.random.default_rng(0)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class StandIn(nn.Module):
    "The joints of inception-2015-12-05.pt, with random weights."
    def __init__(self, dim=2048):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, 8), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, dim, 3, 5),
                                    nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(dim, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False):
        theta = torch.eye(2, 3)
        theta[0, 2], theta[1, 2] = 1 / img.shape[3] - 1 / 299, 1 / img.shape[2] - 1 / 299
        grid = nn.functional.affine_grid(theta[None].repeat(img.shape[0], 1, 1), [img.shape[0], 3, 299, 299],
                                         align_corners=False)
        x = nn.functional.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        f = self.layers((x - 128) / 128).flatten(1)
        return f if return_features else self.output(f)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.jit.script(StandIn()).save(folder / "inception-2015-12-05.pt")
    return folder


@pytest.fixture(scope="session")
def net():
    return ClassifierExtractor(train_classifier(digits("train"), epochs=1, width=8))


@pytest.fixture(scope="session")
def ref_file(net, tmp_path_factory):
    return build_reference(net, digits("held_out"), "held out").save(tmp_path_factory.mktemp("ref") / "ref.npz")


@pytest.fixture()
def npz(tmp_path):
    def make(name="s.npz", n=40, y=None, **kw):
        d = digits("train")
        a = kw.get("a", d.images[:n].permute(0, 2, 3, 1).numpy())
        np.savez(tmp_path / name, arr_0=a, **({} if y is None else {"arr_1": y}))
        return tmp_path / name
    return make


def fails(capsys, *words):
    "The one line that a mistake earns."
    with pytest.raises(SystemExit) as e: ctm_nb_evaluate(list(map(str, words)))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.strip().count("\n") == 0 and not out, (out, err)
    return err


# --- distances and further scores

def test_distances_are_exact_near_and_far():
    x = torch.tensor(rng.standard_normal((60, 5)))
    y = torch.cat([x[:20], x[:20] + 1e-7, torch.tensor(rng.standard_normal((30, 5)) * 100)]) + 1e4
    got = torch.cat(list(_distance_blocks(x + 1e4, y, max_pairs=400)))
    direct = (x[:, None] + 1e4 - y).norm(dim=-1)
    assert ((got - direct).abs() <= 1e-9 * direct + 1e-12).all() and got[range(20), range(20)].max() == 0


def test_ties_are_inside():
    grid = np.stack(np.meshgrid(np.arange(9.), np.arange(9.)), -1).reshape(-1, 2) * .1 + 7
    assert precision_recall(grid, grid + [0, .1], k=1)[0] == 1  # each sample a neighbour's distance away from data


def test_kernel_distance_by_hand_and_unbiased():
    x, y = torch.tensor(rng.standard_normal((6, 3))), torch.tensor(rng.standard_normal((4, 3)))
    k = lambda a, b: float((a @ b / 3 + 1) ** 3)
    own = lambda a: np.mean([k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j])
    assert _polynomial_mmd(x, y) == pytest.approx(own(x) + own(y) - 2 * np.mean([k(a, b) for a in x for b in y]),
                                                 rel=1e-9)
    a, b = rng.standard_normal((2, 800, 4))
    value, error = kernel_distance(a, b, 30, 100)
    assert abs(value) < 6 * error and kernel_distance(a, b + .5, 30, 100)[0] > 10 * error
    assert kernel_distance(a, b, 5, 50, seed=1) == kernel_distance(a, b, 5, 50, seed=1) != kernel_distance(a, b, 5, 50,
                                                                                                           seed=2)


def test_rank_deficient_covariances_are_warned_about():
    with pytest.warns(RuntimeWarning, match="reference: 5 images span at most 4 of 8"):
        frechet_distance(rng.standard_normal((5, 8)), rng.standard_normal((30, 8)))


# --- feature networks

def test_resizing_like_tensorflow_1_and_pil():
    x = torch.randint(0, 256, (1, 3, 20, 33), dtype=torch.uint8)
    slow = lambda i, n: (i * n / 50, int(i * n / 50))
    got = _resize_tf1(x, 50)
    for i, j in [(0, 0), (7, 31), (49, 49), (20, 3)]:
        (p, a), (q, b) = slow(i, 20), slow(j, 33)
        c, d, v, w = min(a + 1, 19), min(b + 1, 32), p - a, q - b
        f = x[0, 1].float()
        assert got[0, 1, i, j] == pytest.approx(float((f[a, b] * (1 - w) + f[a, d] * w) * (1 - v)
                                                      + (f[c, b] * (1 - w) + f[c, d] * w) * v), abs=1e-3)
    pil = np.asarray(Image.fromarray(x[0, 0].numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC)).clip(0, 255)
    assert np.abs(_resize_clean(x)[0, 0].numpy() - pil).max() < .05


def test_inception_by_both_ways(weights):
    x = digits("held_out").images[:3]
    a, b = (load_extractor(n, weights, trust=True) for n in ("inception", "cleanfid"))
    f = a(x)
    assert torch.allclose(f.pooled, a.net(x.expand(-1, 3, -1, -1), return_features=True), atol=1e-4)
    assert a.features_id.split("-")[1] == b.features_id.split("-")[1]
    assert a.features_id != b.features_id
    logits = f.pooled @ a.net.output.weight.T  # the inception score's probabilities have no bias
    assert torch.allclose(f.probs, logits.double().softmax(1), atol=1e-6)
    direct = b.net.layers((_resize_clean(x).expand(-1, 3, -1, -1) - 128) / 128).flatten(1)
    assert torch.allclose(b(x).pooled, direct, atol=1e-4)


@pytest.mark.parametrize("name, message", [("inception", "Inception's weights are missing.*download https"),
                                           ("cleanfid", "weights are missing"),
                                           ("timm:resnet10t", "put resnet10t.safetensors"),
                                           ("timm:nonesuch", "knows no network"), ("vgg", "must be train, inception")])
def test_missing_weights_are_said_at_once(tmp_path, name, message):
    if name.startswith("timm"): pytest.importorskip("timm")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message): load_extractor(name, tmp_path)
    assert time.perf_counter() - start < 5


def test_missing_weights_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("CTM_NB_OFFLINE", "1")
    with pytest.raises(ValueError, match="Inception's weights are missing.*--weights FOLDER"):
        load_extractor("inception")


def test_another_network_in_inceptions_place_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 3)).save(tmp_path / "inception-2015-12-05.pt")
    def refused(why, name="inception", **kw):
        with pytest.raises(ValueError, match=why): load_extractor(name, tmp_path, **kw)
    for name in ("inception", "cleanfid"): refused("with layers and output", name, trust=True)
    for name in ("inception", "cleanfid"): refused("not the published file.*a program.*--trust runs this one", name)
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"no")
    refused("can't be read as TorchScript", trust=True)
    refused("not the published file")


def test_torchscript_does_not_run_unasked(weights, tmp_path, capsys, monkeypatch, npz):
    "Neither from --weights nor from the cache is anything loaded that is not the published file, unless with --trust."
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda path, **_: ran.append(path) or torch.jit.script(nn.Linear(2, 3)))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    words = npz(), "--ref", tmp_path / "edm.npz", "--features", "inception"
    assert "--trust runs this one" in fails(capsys, *words, "--weights", weights) and not ran
    monkeypatch.setenv("CTM_NB_CACHE", str(weights))
    assert "is not the published file" in fails(capsys, *words) and not ran
    assert "with layers and output" in fails(capsys, *words, "--weights", weights, "--trust") and len(ran) == 1


def test_timm(tmp_path):
    timm, x = pytest.importorskip("timm"), digits("held_out").images[:2]
    torch.jit.script(nn.Conv2d(3, 9, 3)).save(tmp_path / "c.pt")  # somebody's own code is not run
    with pytest.raises(ValueError, match="lite0 or timm:NAME, got '.*c.pt'"): load_extractor(str(tmp_path / "c.pt"))
    net = timm.create_model("resnet10t", pretrained=False)
    torch.save(net.state_dict(), tmp_path / "resnet10t.pth")
    out = load_extractor("timm:resnet10t", tmp_path)(x)
    assert out.pooled.shape == (2, net.num_features) and torch.allclose(out.probs.sum(1), torch.ones(2).double())
    torch.save({"a": torch.zeros(1)}, tmp_path / "resnet10t.pth")
    with pytest.raises(ValueError, match="must hold the weights of ResNet"): load_extractor("timm:resnet10t", tmp_path)


# --- sample sets and references

def test_collect_equals_one_pass(net):
    x = digits("held_out").images[:101]
    got, whole = collect(net, image_samples(x), batch_size=17), net(x).pooled
    assert torch.allclose(got.points, whole, atol=1e-5)
    assert np.abs(got.stats.cov.numpy() - np.cov(got.points.double().T)).max() < 1e-6
    again = FeatureStats(64)
    for part in got.points.split([1, 50, 50]): again.merge(FeatureStats(64).update(part))
    one = FeatureStats(64).update(got.points)
    assert (again.cov - one.cov).abs().max() < 1e-10 and (again.mean - one.mean).abs().max() < 1e-10


def test_bad_features_are_errors(net):
    with pytest.raises(ValueError, match="constant: all 4 images"):
        collect(net, image_samples(digits().images[:1].expand(4, -1, -1, -1)))
    with pytest.raises(ValueError, match="too few images"): collect(net, image_samples(digits().images[:0]))
    bent = ClassifierExtractor(train_classifier(digits("train"), epochs=1, width=8))
    bent.net.norm.running_mean += float("nan")
    with pytest.raises(ValueError, match="finite"): collect(bent, image_samples(digits().images[:4]))


def test_sample_sets_agree(tmp_path):
    x = torch.randint(0, 256, (11, 3, 6, 6), dtype=torch.uint8)
    np.savez(tmp_path / "a.npz", arr_0=x.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(11))
    names = [f"0000{i // 5}/img{i:05d}.png" for i in range(11)]
    for f, p in zip(names, x):
        (tmp_path / "t" / f).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(tmp_path / "t" / f)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for f in names: z.write(tmp_path / "t" / f, f)
        z.writestr("dataset.json", json.dumps({"labels": [[f, i] for i, f in enumerate(names)]}))
    for name, labelled in (("a.npz", True), ("t", False), ("z.zip", True)):
        parts = list(open_samples(tmp_path / name).batches(batch_size=4))
        assert torch.equal(torch.cat([p for p, _ in parts]), x)
        assert [y.tolist() for _, y in parts] == [[0, 1, 2, 3], [4, 5, 6, 7],
                                                  [8, 9, 10]] if labelled else parts[0][1] is None
    Image.fromarray(np.zeros((7, 7, 3), np.uint8)).save(tmp_path / "t/00000/img00001.png")
    with pytest.raises(ValueError, match="one size.*img00001"): list(open_samples(tmp_path / "t").batches())
    (tmp_path / "t/00000/img00001.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="img00001.png can't be read"): list(open_samples(tmp_path / "t").batches())


@pytest.mark.parametrize("classes", ["all", "3", "none"])
def test_a_folder_of_the_sampler_has_the_labels_of_its_npz(tmp_path, untrained_run, ref_file, capsys, classes):
    "By the names of its folders, in the order of the model and not of the alphabet."
    names, scores = ["10", "9", *"12345678"], []
    run = untrained_run(tmp_path / "run", 1, names)
    for out in ("x.npz", "x.zip", "x"):
        draw_samples(str(run), tmp_path / out, 30, device="cpu", classes=classes)
        if classes == "none" and out != "x": continue
        s = open_samples(tmp_path / out)
        if classes == "none":
            assert s.labels is None
            continue
        assert s.labels.bincount().tolist() == ([3] * 10 if classes == "all" else [0] * 4 + [30])
        rows = tmp_path / f"{out}.json"
        ctm_nb_evaluate([str(tmp_path / out), "--ref", str(ref_file), "--metrics", "acc", "--out", str(rows)])
        scores += [row["value"] for row in json.loads(rows.read_text())]
    if scores: assert len(scores) == 3 and scores[0] == scores[1] == pytest.approx(scores[2])
    (tmp_path / "x" / "sampler.json").unlink()
    assert open_samples(tmp_path / "x").labels is None  # anybody's folders: in whatever order


def test_reference_survives_and_damage_is_seen(net, ref_file, tmp_path):
    r = read_reference(ref_file)
    built = build_reference(net, digits("held_out"))
    assert torch.equal(r.cov, built.cov) and torch.equal(r.points, built.points)
    assert r.sha256 == digits("held_out").sha256() and r.n == 445
    assert ClassifierExtractor(r.net).features_id == net.features_id == r.features
    with np.load(ref_file) as z: a = dict(z)
    bent = bytearray(ref_file.read_bytes())
    bent[len(bent) // 2] ^= 1
    (tmp_path / "bent.npz").write_bytes(bent)
    with pytest.raises(ValueError, match="bent.npz can't be read"): read_reference(tmp_path / "bent.npz")
    with pytest.raises(ValueError, match="can't be compared"): r.check("inception-0")
    with pytest.raises(ValueError, match="8 x 8.*got 9 x 9"): r.check(r.features, (1, 9, 9))
    meta = json.loads(str(a.pop("meta")))  # an older file holds statistics of maps, too
    a |= {"spatial_mean": np.zeros(7), "spatial_cov": np.eye(7)}
    np.savez(tmp_path / "old.npz", meta=json.dumps(meta | {"arrays_sha256": "0" * 64}), **a)
    assert torch.equal(read_reference(tmp_path / "old.npz").cov, r.cov)


def test_reference_of_images_that_stay_on_disk(net, tmp_path, monkeypatch):
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))
    from ctm_nb.data.batches import load_splits
    d = digits()
    for i in range(60):
        (tmp_path / "d" / f"{int(d.labels[i])}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(d.images[i, 0].numpy()).save(tmp_path / "d" / f"{int(d.labels[i])}" / f"{i}.png")
    here, there = (load_splits(tmp_path / "d", in_memory=k)["all"] for k in (True, False))
    a, b = build_reference(net, here, batch_size=25), build_reference(net, there, batch_size=25, max_points=40)
    assert not hasattr(there, "images") and torch.allclose(a.cov, b.cov, atol=1e-4) and a.label_counts == b.label_counts
    assert (a.n, len(a.points), len(b.points)) == (60, 60, 40)
    x, y = next(data_samples(there).batches(range(7, 11)))
    assert torch.equal(x, here.images[7:11]) and torch.equal(y, here.labels[7:11])


def test_foreign_references(tmp_path):
    e, x = InceptionExtractor(torch.jit.script(StandIn(40)), "inception-0"), digits("held_out").images[:30]
    got = collect(e, image_samples(x))
    stats = dict(mu=got.stats.mean.numpy(), sigma=got.stats.cov.numpy())
    np.savez(tmp_path / "edm.npz", **stats)
    maps = dict(mu_s=np.zeros(7), sigma_s=np.eye(7))  # for sFID; not read
    np.savez(tmp_path / "adm.npz", **stats, **maps, arr_0=x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    edm, adm = read_reference(tmp_path / "edm.npz"), read_reference(tmp_path / "adm.npz")
    with pytest.warns(RuntimeWarning, match="samples: 30 images"): values = Evaluator(adm, e, ["fid", "pr"]).score(got)
    assert values == {"fid": pytest.approx(0, abs=1e-5), "precision": 1, "recall": 1}
    with pytest.raises(ValueError, match="mean and covariance only"): Evaluator(edm, e, ["pr"]).score(got)
    with pytest.raises(ValueError, match="can't be compared"): edm.check("cleanfid-0")
    np.savez(tmp_path / "bad.npz", mu=stats["mu"], sigma=stats["sigma"][:5])
    with pytest.raises(ValueError, match=r"mu must be \(d,\) and sigma"): read_reference(tmp_path / "bad.npz")


# --- the command

def test_help_imports_nothing_heavy():
    code = ("import sys, ctm_nb.commands.evaluate as c; c.evaluate_parser().format_help(); "
            "print([m for m in ('torch', 'numpy', 'matplotlib', 'PIL') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_scores_grow_and_replace(tmp_path):
    r = {"metric": "fid", "value": 1., "sampler": {"solver": "ctm", "steps": 1, "gamma": 0.}, "checkpoint": "c"}
    extend_scores(tmp_path / "s.json", [r])
    assert [x["value"] for x in extend_scores(tmp_path / "s.json", [{**r, "value": 2.}, {**r, "seed": 1}])] == [2., 1.]
    assert "ctm" in text_table([r]) and text_table([]) == "no scores"
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a list of score records"): extend_scores(tmp_path / "s.json", [r])


def test_samples_are_scored_and_recorded(npz, ref_file, tmp_path, capsys):
    d, out = digits("train"), tmp_path / "scores.json"
    samples = npz(n=300, y=d.labels[:300].numpy())
    ctm_nb_evaluate([str(samples), "--ref", str(ref_file), "--metrics", "fid,is,pr,kid,acc", "--out", str(out),
                     "-n", "250"])
    rows = {r["metric"]: r for r in json.loads(out.read_text())}
    r = read_reference(ref_file)
    net = ClassifierExtractor(r.net)
    f = torch.cat([net(x[:, :1]).pooled for x, _ in open_samples(samples, 250).batches()])
    real = net(digits("held_out").images).pooled
    assert rows["frechet_distance"]["value"] == pytest.approx(frechet_distance(real, f), rel=1e-3)
    assert (rows["precision"]["value"], rows["recall"]["value"]) == pytest.approx(precision_recall(r.points, f),
                                                                                  abs=.01)
    assert rows["class_accuracy"]["value"] > .8 and rows["precision"]["n_samples"] == 250
    assert rows["precision"]["features"] == r.features
    assert rows["precision"]["reference"] == {"name": "held out", "sha256": digits("held_out").sha256(), "n": 445}
    assert "frechet_distance" in capsys.readouterr().out


def test_mistakes_are_one_line(npz, ref_file, weights, tmp_path, capsys):
    ref = ("--ref", ref_file)
    assert "40 are" not in fails(capsys, npz(), *ref, "-n", 50) and not list(tmp_path.glob("*.json"))
    assert "at least 6 are needed, got 3" in fails(capsys, npz(n=3), *ref)
    floats = np.arange(10.)[:, None, None, None] / 3 * np.ones((10, 8, 8, 1))
    assert "expected pixels uint8, or numbers in [0, 1]" in fails(capsys, npz(a=floats), *ref)
    assert "8 x 8 as in the reference" in fails(capsys, npz(a=np.zeros((9, 4, 4, 1), np.uint8)), *ref)
    assert "must be below 10" in fails(capsys, npz(y=np.full(40, 10)), *ref)
    assert "integers >= 0, got -1" in fails(capsys, npz(y=np.full(40, -1)), *ref)
    own = "--weights", weights, "--trust"
    assert "can't be compared" in fails(capsys, npz(), *ref, "--features", "inception", *own)
    assert "got 'fdi'" in fails(capsys, npz(), *ref, "--metrics", "fid,fdi")
    assert "--gamma must be >= 0 and <= 1, got 2" in fails(capsys, npz(), *ref, "--gamma", "2")
    assert "--steps must be >= 1, got 0" in fails(capsys, npz(), *ref, "--steps", "0")
    assert "no samples at" in fails(capsys, tmp_path / "none", *ref)
    assert "constant" in fails(capsys, npz(a=np.zeros((20, 8, 8, 1), np.uint8)), *ref)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "mean and covariance only" in fails(capsys, npz(), "--ref", tmp_path / "edm.npz", "--metrics", "pr",
                                               *own)
    assert "weights are missing" in fails(capsys, npz(), "--ref", tmp_path / "edm.npz", "--weights", tmp_path)


@pytest.mark.parametrize("labels", [{}, {"arr_1": np.zeros(40, int)}])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_reference_without_classes_is_refused_before_the_work_and_by_a_plan(npz, tmp_path, capsys, labels, more):
    "One class is none either. Features that need no classes, and a likelihood, are planned."
    np.savez(tmp_path / "flat.npz", arr_0=digits("train").images[:40].permute(0, 2, 3, 1).numpy(), **labels)
    words = npz(), "--ref", tmp_path / "flat.npz"
    for features in ([], ["--features", "train"]):
        err = fails(capsys, *words, *features, *more)
        assert "flat.npz has no labelled classes" in err and "--features lite0|inception|dinov2|timm:NAME" in err
    if more: ctm_nb_evaluate([str(w) for w in (*words, "--features", "lite0", *more)])


def test_a_plan_refuses_a_reference_that_is_not_there(npz, tmp_path, capsys):
    assert "nowhere" in fails(capsys, npz(), "--ref", tmp_path / "nowhere", "--dry-run")


@pytest.mark.parametrize("n", [40, 200])
def test_few_pictures_are_warned_about_on_both_sides_once(tmp_path, capsys, untrained_run, n):
    "The held-out pictures, fewer than the 64 features, and as many samples with each of the settings."
    d, run = digits("train"), untrained_run(tmp_path / "run", 1, "01234567")
    keep = d.labels < 8
    images, labels = d.images[keep][:n].permute(0, 2, 3, 1).numpy(), d.labels[keep][:n].numpy()
    np.savez(tmp_path / "few.npz", arr_0=images, arr_1=labels)
    ctm_nb_evaluate([str(w) for w in (run, "--ref", tmp_path / "few.npz", "--ref-split", "all", "-n", 30, "--steps",
                                      "1,2,3", "--metrics", "fid", "--device", "cpu")])
    err = capsys.readouterr().err
    assert err.count("reference: 40 images span at most 39 of 64") == (n == 40) and err.count("reference:") == (n == 40)
    assert err.count("samples: 30 images span at most 29 of 64") == 1


@pytest.mark.parametrize("words", [["--which", "teacher"], ["--solver", "heun"], ["--solver", "heun,euler"]])
def test_gamma_without_jumps_is_refused(tmp_path, capsys, untrained_run, words):
    "Beside jumps it is theirs alone, and no noise is no mistake."
    run, ref = untrained_run(tmp_path / "run", 1, "0123456789"), ["--ref", "digits", "--device", "cpu", "--dry-run"]
    assert "--gamma has no meaning without --solver ctm" in fails(capsys, run, *ref, *words, "--gamma", "0,.3")
    ctm_nb_evaluate([str(w) for w in (run, *ref, *words, "--gamma", "0")])
    found = _sampler_settings(Request(str(run), "digits", solver="ctm,heun", steps=[2], gammas=[0., .3]), load(run))
    assert [(s["solver"], s["gamma"]) for s in found] == [("ctm", 0.), ("ctm", .3), ("heun", 0.)]


def test_fewer_samples_are_of_all_classes_whatever_their_order(tmp_path):
    "By class, as folders lie, or in turn, as the sampler writes them."
    for name, labels in {"sorted": np.arange(200) // 20, "in turn": np.arange(200) % 10}.items():
        images = np.zeros((200, 8, 8, 3), np.uint8) + labels[:, None, None, None].astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images, labels)
        few, again = (open_samples(tmp_path / f"{name}.npz", 60) for _ in range(2))
        x = torch.cat([x for x, _ in few.batches(batch_size=25)])
        assert few.n == len(x) == 60 and torch.equal(x[:, 0, 0, 0].long(), few.labels)
        assert torch.equal(few.labels, again.labels) and min(few.labels.bincount(minlength=10)) >= 2
        assert open_samples(tmp_path / f"{name}.npz").labels.tolist() == labels.tolist()


def test_a_folder_of_sony_s_samples_is_scored_as_one_file(tmp_path, capsys):
    d = digits("train")
    images, labels = d.images.permute(0, 2, 3, 1).numpy().repeat(3, 3), d.labels.numpy()
    (tmp_path / "samples").mkdir()
    for i in range(14):
        np.savez(tmp_path / "samples" / f"sample_{i}.npz", images[100 * i:][:100], labels[100 * i:][:100])
    np.savez(tmp_path / "all.npz", images, labels)
    ref = ["--ref", "digits", "--save-ref", tmp_path / "ref.npz"]
    for what in ("samples", "all.npz"):
        words = [tmp_path / what, *ref, "--metrics", "fid,acc", "--out", tmp_path / f"{what}.json"]
        ctm_nb_evaluate([str(w) for w in words])
        ref = ["--ref", tmp_path / "ref.npz"]
    one, two = (json.loads((tmp_path / f"{what}.json").read_text()) for what in ("samples", "all.npz"))
    assert [(r["value"], r["n_samples"]) for r in one] == [(r["value"], len(images)) for r in two]


def test_scores_say_how_samples_became_bytes(tmp_path):
    "The run's configuration decides, a flag overrules it; the published presets truncate."
    from ctm_nb.checkpoints.models import describe
    from ctm_nb.checkpoints.store import save_checkpoint
    from ctm_nb.commands.evaluate import evaluate_parser, _request_of
    from ctm_nb.data.images import to_uint8
    from ctm_nb.evaluation.draw import draw_samples
    from ctm_nb.evaluation.evaluate import evaluate, open_subject
    from ctm_nb.method.sampling import sample
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.unet import DDPMpp
    from ctm_nb.training.config import make_config
    m = CTM(DDPMpp(8, 1, s_branch=True, model_channels=8, channel_mult=(1,), n_blocks=1, attention=())).eval()
    meta = {"models": {"ctm": {"part": "ctm", "description": describe(m)}},
            "config": {"evaluate": {"bytes": "truncate"}}}
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"ctm": m.state_dict()}, {}, meta)
    ask = lambda *more: _request_of(evaluate_parser().parse_args(
        [str(tmp_path / "run"), "--ref", "digits", "--metrics", "fid", "-n", "60", "--steps", "1", *more]))
    assert [r["sampler"]["bytes"] for r in evaluate(ask())[0]] == ["truncate"]
    assert open_subject(ask("--bytes", "round")).bytes == "round"
    for words, expected in (({}, "truncate"), ({"bytes": "round"}, "round")):  # and so are samples written
        recipe = draw_samples(str(tmp_path / "run"), tmp_path / f"{expected}.npz", 20, device="cpu", **words)
        written = torch.from_numpy(np.load(tmp_path / f"{expected}.npz")["arr_0"]).permute(0, 3, 1, 2)
        assert recipe["bytes"] == expected and torch.equal(written, to_uint8(sample(m, 20), expected))
    how = dict(solver="ctm", steps=1, gamma=0.)
    x = sample(m, 20, **how)
    drawn = [drawn_samples(m, 20, {**how, "bytes": b}).read(slice(20)) for b in ("round", "truncate")]
    assert torch.equal(drawn[0], to_uint8(x)) and torch.equal(drawn[1], to_uint8(x, "truncate"))
    assert not torch.equal(*drawn)
    presets = {"digits": "round", "cifar10": "truncate", "cifar10-cond": "truncate", "imagenet64": "truncate"}
    assert {p: make_config(p, ["data.source=x"]).evaluate.bytes for p in presets} == presets


def test_drawing_in_batches_is_drawing_at_once():
    from ctm_nb.method.sampling import sample
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.unet import DDPMpp
    m = CTM(DDPMpp(8, 1, n_classes=3, s_branch=True, model_channels=8)).eval()
    sampler = dict(solver="ctm", steps=2, gamma=.7)
    drawn = drawn_samples(m, 10, sampler, [1, 2, 7], 5)
    parts = list(drawn.batches(batch_size=4))
    y = torch.cat([y for _, y in parts])
    assert y.tolist() == [0, 1, 1] + [2] * 7
    whole = ((sample(m, 10, y=y, seed=5, **sampler) + 1) * 127.5).round().clamp(0, 255)
    assert (torch.cat([x for x, _ in parts]).float() - whole).abs().max() <= 1
    request = Request("", "", solver="ctm,heun", steps=[1, 2], gammas=[0., 1.])
    assert len(_sampler_settings(request, m)) == 5 and not _is_checkpoint("nothing.npz")
    assert set(METRICS) >= {"fid", "is", "pr", "kid"}


def test_a_run_s_reference_is_read_as_the_run_read_its_images(tmp_path, monkeypatch):
    "Near-duplicates stay on one side of the split, crops and sides are the run's; another data set has no groups."
    from ctm_nb.checkpoints.models import describe
    from ctm_nb.checkpoints.store import save_checkpoint
    from ctm_nb.data.batches import load_splits
    from ctm_nb.evaluation import evaluate as room
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.unet import DDPMpp
    d, folder = digits(), tmp_path / "pictures"
    for i in range(120):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        big = np.kron(d.images[i, 0].numpy(), np.ones((2, 3), np.uint8))                  # 16 x 24, twins of three
        Image.fromarray(big).save(folder / str(i % 2) / f"{i // 6}_{i}.png")
    m = CTM(DDPMpp(8, 1, s_branch=True, model_channels=8, channel_mult=(1,), n_blocks=1, attention=())).eval()
    how = dict(image_size=8, crop="resize", group="[0-9]+(?=_)") if "resize" in room.load_splits.__globals__["CROPS"] \
        else dict(image_size=8, group="[0-9]+(?=_)")
    meta = {"models": {"ctm": {"part": "ctm", "description": describe(m)}},
            "config": {"data": {"source": str(folder), "labels": "", "channels": None, "flip": True,
                                "background": "red", **how}}}
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"ctm": m.state_dict()}, {}, meta)
    asked = lambda ref: Request(str(tmp_path / "run"), str(ref), metrics=["fid"], n=40, steps=[1])
    real = load_splits(folder, **how)
    assert real["held_out"].sha256() != load_splits(folder, **{**how, "group": ""})["held_out"].sha256()
    records, _ = room.evaluate(asked(folder))
    assert records[0]["reference"]["sha256"] == real["held_out"].sha256()
    assert records[0]["reference"]["name"] == "pictures, held out"
    subject = room.open_subject(asked("digits"))
    assert "group" not in subject.reading and subject.reading["image_size"] == 8
    assert subject.reading["background"] == "red"  # of transparent pictures, wherever they are now


# --- is it memory?

@pytest.mark.parametrize(("copied", "expected"), [(1., 1.), (.5, .75), (0., .5)])
def test_share_of_nearer_samples_tells_how_many_are_copies(net, copied, expected):
    "Training pictures get 1, pictures never seen 1/2, a mixture what lies between."
    train, held = digits("train"), digits("held_out")
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    new, rest = order[:220], order[220:]
    asking = Evaluator(build_reference(net, held), net, ["fid"]).remember(
        {"train": train, "held_out": ImageData(held.images[rest], name="rest")})
    n = round(copied * 220)
    samples = image_samples(torch.cat([train.images[torch.arange(n) * 6], held.images[new[n:]]]))
    row = asking.records(samples)[-1]
    assert row["metric"] == "nearer_to_training" and row["reference"]["n"] == len(train)
    assert row["value"] == pytest.approx(expected, abs=.02 if copied == 1 else 3 * row["standard_error"])
    assert .01 < row["standard_error"] < .04


def test_nearest_draws_a_sheet_and_keeps_a_record(npz, tmp_path, capsys):
    "Samples that are the held-out pictures get one half, each is drawn before five training pictures."
    held = digits("held_out")
    words = [str(npz(a=held.images.permute(0, 2, 3, 1).numpy(), y=held.labels.numpy())), "--ref", "digits", "--nearest",
             "--metrics", "fid", "--out", str(tmp_path / "scores.json")]
    ctm_nb_evaluate([*words, "--dry-run"])
    assert "scores.nearest.png" in capsys.readouterr().out and not (tmp_path / "scores.nearest.png").exists()
    ctm_nb_evaluate(words)
    assert "nearer_to_training" in capsys.readouterr().out
    row = json.loads((tmp_path / "scores.json").read_text())[-1]
    assert row["value"] == pytest.approx(.5, abs=1e-3) and row["reference"]["name"] == "digits, train"
    width, height = Image.open(tmp_path / "scores.nearest.png").size
    assert height > 16 * 32 and width > 6 * 32


def test_nearest_needs_training_pictures(npz, ref_file, tmp_path, capsys):
    assert "--nearest needs training pictures" in fails(capsys, npz(), "--ref", ref_file, "--nearest")
    assert "no weights of lite0" in fails(capsys, npz(), "--ref", "digits", "--nearest", "--features", "lite0",
                                          "--weights", tmp_path)
    assert not list(tmp_path.glob("*.png"))
