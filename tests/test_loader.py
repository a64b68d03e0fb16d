"""Batches: the same images whoever asks, whenever, from wherever; and augmentation that is told."""
import numpy as np
import pytest
import torch

from ctm_nb.augment import augment, draw_parameters, label_of, matrix_of, stream_uniforms, warp
from ctm_nb.convert import convert
from ctm_nb.data import ImageData, load_data
from ctm_nb.formats import ArraySource
from ctm_nb.loader import Batches, load_splits
from ctm_nb.sources import Names

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.zip"
    convert(ArraySource("d", "array", Names(map(str, range(70))), np.arange(70) % 2, ["a", "b"], images=IMAGES), path, workers=0)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))


def epoch(data, n=8, **kw):
    out = [(b.x0, b.y) for _, b in zip(range(n), Batches(data, 12, seed=1, flip=True, p=.3, **kw))]
    return torch.cat([x for x, _ in out]), torch.cat([y for _, y in out])


@pytest.mark.parametrize("kw", [dict(), dict(in_memory=False), dict(in_memory=False, workers=1), dict(in_memory=False, workers=2)])
def test_workers_and_streams_change_nothing(zipped, kw):
    kw, workers = dict(kw), kw.get("workers", 0)
    data = load_splits(zipped, **{k: v for k, v in kw.items() if k != "workers"})["train"]
    x, y = epoch(load_splits(zipped)["train"])
    x2, y2 = epoch(data, workers=workers)
    assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_stream(zipped, world):
    data = load_splits(zipped)["train"]
    one = Batches(data, 12, seed=5, flip=True, p=.5).at(60)
    parts = [Batches(data, 12, seed=5, flip=True, p=.5, rank=r, world=world).at(60) for r in range(world)]
    assert torch.allclose(torch.cat([p.x0 for p in parts]), one.x0, atol=1e-5) and torch.equal(torch.cat([p.y for p in parts]), one.y)
    assert torch.equal(torch.cat([p.augment for p in parts]), one.augment)


def test_resume_continues_with_the_next_image(zipped):
    data = load_splits(zipped)["train"]
    x, _ = epoch(data, 8)
    b = Batches(data, 12, seed=1, flip=True, p=.3)
    for _, _ in zip(range(3), b): pass
    assert b.position == 36  # the prefetched batches don't count
    again = [q.x0 for _, q in zip(range(5), Batches(data, 12, seed=1, flip=True, p=.3, position=b.position))]
    assert torch.equal(torch.cat(again), x[36:])
    plain = Batches(data, 12, seed=1)
    seen = torch.cat([plain.indices(12 * k) for k in range(-(-len(data) // 12))])[:len(data)]
    assert torch.equal(seen.sort().values, torch.arange(len(data)))  # an epoch shows every image


def test_the_seed_decides(zipped):
    data = load_splits(zipped)["train"]
    assert not torch.equal(Batches(data, 12, seed=1).at(0).x0, Batches(data, 12, seed=2).at(0).x0)


@pytest.mark.parametrize("kw, message", [(dict(world=5), "a batch of 12 can't be shared evenly by 5 processes"), (dict(rank=2, world=2), "rank must be in 0..1, got 2")])
def test_impossible_shares(zipped, kw, message):
    with pytest.raises(ValueError) as e: Batches(load_splits(zipped)["train"], 12, **kw)
    assert str(e.value) == message


def test_an_error_in_the_thread_arrives(zipped):
    data = load_splits(zipped)["train"]
    b = Batches(data, 12)
    data.labels = data.labels[:3]
    with pytest.raises(IndexError): next(iter(b))


def test_the_datas_own_split_is_used(tmp_path):
    from PIL import Image
    for part, n in (("train", 6), ("test", 4)):
        for i in range(n):
            (tmp_path / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), i + 100 * (part == "test")).save(tmp_path / part / "ab"[i % 2] / f"{i}.png")
    assert sorted(load_data(tmp_path, "held_out").images[:, 0, 0, 0].tolist()) == [100, 101, 102, 103]
    assert sorted(load_data(tmp_path).images[:, 0, 0, 0].tolist()) == list(range(6))


def test_flips_alone_are_exact_and_untold(zipped):
    data = load_splits(zipped)["train"]
    idx, x = Batches(data, 12, seed=3).indices(24), Batches(data, 12, seed=3, flip=True).at(24).x0
    plain = data.x0(idx)
    same = [(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(x, plain)]
    assert all(s or f for s, f in same) and {s for s, _ in same} == {True, False} and Batches(data, 12, seed=3, flip=True).at(24).augment is None


def test_labels_are_nine_numbers_that_say_what_was_done():
    a = np.zeros((9, 8))
    a[1, 0], a[2, 1], a[3, 2], a[4, 3], a[5, 4:6], a[6, 6], a[7, 7], a[8, :] = 1, 1, .7, np.pi / 2, (np.pi / 2, 2), -1.5, 2.5, 0
    want = np.zeros((9, 9)); want[1, 0], want[2, 1], want[3, 2], want[4, 3:5], want[5, 5:7], want[6, 7], want[7, 8] = 1, 1, .7, (-1, 1), (0, 2), -1.5, 2.5
    assert np.allclose(label_of(a), want, atol=1e-6)
    assert np.allclose(matrix_of(a)[5], np.diag([2 ** (-2 / 5), 2 ** (2 / 5), 1]))  # stretched along y
    assert np.allclose(matrix_of(a)[6, :2, 2], [-1.5 / 8, 0]) and np.allclose(matrix_of(a)[3], np.diag([2 ** .14, 2 ** .14, 1]))


def test_random_numbers_belong_to_positions():
    whole = stream_uniforms(7, 0, 64)
    for at, n in [(0, 1), (1, 1), (13, 7), (63, 1)]: assert np.array_equal(stream_uniforms(7, at, n), whole[at:at + n])
    assert stream_uniforms(7, 10**15, 2).shape == (2, 24) and not np.array_equal(stream_uniforms(8, 0, 64), whole)


@pytest.mark.parametrize("size", [8, 9, 32])
def test_warp_is_centred_and_moves_the_right_way(size):
    "A blob goes where its matrix says; an even and an odd size."
    def blob(cx, cy):
        g = (torch.arange(size) + .5) / size - .5
        return torch.exp(-((g[None, :] - cx) ** 2 + (g[:, None] - cy) ** 2) / .02)[None, None]
    for k, value in [(6, 1.), (7, -1.), (3, np.pi / 2), (3, .4), (2, 1.5)]:
        a = np.zeros((1, 8)); a[0, k] = value
        M = matrix_of(a)
        cx, cy, _ = M[0] @ [.15, .1, 1]
        got, g = warp(blob(.15, .1), M)[0, 0], (torch.arange(size) + .5) / size - .5
        w = got.clamp(min=.3) - .3
        assert abs((w.sum(0) * g).sum() / w.sum() - cx) < .02 and abs((w.sum(1) * g).sum() / w.sum() - cy) < .02, (k, value)


def test_unchanged_images_are_exactly_unchanged():
    x = torch.rand(200, 1, 8, 8)
    y, label = augment(x, 0, 0, p=.12, flip=False)
    still = (label == 0).all(1)
    assert .4 < still.float().mean() < .8 and torch.equal(y[still], x[still]) and not torch.equal(y[~still], x[~still])
    assert draw_parameters(stream_uniforms(0, 0, 50), 1.)[:, 2:].all()


def test_image_data_and_stream_answer_the_same(zipped):
    memory, stream = (load_splits(zipped, in_memory=m)["held_out"] for m in (True, False))
    assert type(memory) is ImageData and torch.equal(memory.x0(torch.arange(3)), stream.x0(torch.arange(3)))
    for k in ("classes", "n_classes", "channels", "image_size", "name"): assert getattr(memory, k) == getattr(stream, k), k
    assert len(memory) == len(stream) and len(stream.sha256()) == 64
