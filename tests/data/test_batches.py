"""Batches: the same images whoever asks, whenever, from wherever; and augmentation that is told."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctm_nb.data.augment import augment, draw_parameters, label_of, matrix_of, stream_uniforms, warp
from ctm_nb.data.convert import convert
from ctm_nb.data.batches import load_data
from ctm_nb.data.images import ImageData
from ctm_nb.data.read import ArraySource
from ctm_nb.data.batches import Batches, load_splits

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.zip"
    convert(
        ArraySource("d", "array", list(map(str, range(70))), np.arange(70) % 2, ["a", "b"], images=IMAGES),
        path,
        workers=0,
    )
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))


def epoch(data, n=8, **kw):
    batches = Batches(data, 12, seed=1, flip=True, p=0.3, **kw)
    out = [(b.x0, b.y) for b in map(batches.at, range(0, 12 * n, 12))]
    batches.close()
    return torch.cat([x for x, _ in out]), torch.cat([y for _, y in out])


@pytest.mark.parametrize(
    "kw", [dict(), dict(in_memory=False), dict(in_memory=False, workers=1), dict(in_memory=False, workers=2)]
)
def test_workers_and_streams_change_nothing(zipped, kw):
    kw, workers = dict(kw), kw.get("workers", 0)
    data = load_splits(zipped, **{k: v for k, v in kw.items() if k != "workers"})["train"]
    x, y = epoch(load_splits(zipped)["train"])
    x2, y2 = epoch(data, workers=workers)
    assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_stream(zipped, world):
    data = load_splits(zipped)["train"]
    one = Batches(data, 12, seed=5, flip=True, p=0.5).at(60)
    parts = [Batches(data, 12, seed=5, flip=True, p=0.5, rank=r, world=world).at(60) for r in range(world)]
    assert torch.allclose(torch.cat([p.x0 for p in parts]), one.x0, atol=1e-5) and torch.equal(
        torch.cat([p.y for p in parts]), one.y
    )
    assert torch.equal(torch.cat([p.augment for p in parts]), one.augment)


def test_resume_continues_with_the_next_image(zipped):
    data = load_splits(zipped)["train"]
    x, _ = epoch(data, 8)
    again = [Batches(data, 12, seed=1, flip=True, p=0.3).at(12 * k).x0 for k in range(3, 8)]
    assert torch.equal(torch.cat(again), x[36:])
    plain = Batches(data, 12, seed=1)
    seen = torch.cat([plain.indices(12 * k) for k in range(math.ceil(len(data) / 12))])[: len(data)]
    assert torch.equal(seen.sort().values, torch.arange(len(data)))  # an epoch shows every image


def test_the_seed_decides(zipped):
    data = load_splits(zipped)["train"]
    assert not torch.equal(Batches(data, 12, seed=1).at(0).x0, Batches(data, 12, seed=2).at(0).x0)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(world=5), "a batch of 12 can't be shared evenly by 5 processes"),
        (dict(rank=2, world=2), "rank must be in 0..1, got 2"),
    ],
)
def test_impossible_shares(zipped, kw, message):
    with pytest.raises(ValueError) as e:
        Batches(load_splits(zipped)["train"], 12, **kw)
    assert str(e.value) == message


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
    assert (
        all(s or f for s, f in same)
        and {s for s, _ in same} == {True, False}
        and Batches(data, 12, seed=3, flip=True).at(24).augment is None
    )


def test_labels_are_nine_numbers_that_say_what_was_done():
    a = np.zeros((9, 8))
    a[1, 0], a[2, 1], a[3, 2], a[4, 3], a[5, 4:6], a[6, 6], a[7, 7], a[8, :] = (
        1,
        1,
        0.7,
        np.pi / 2,
        (np.pi / 2, 2),
        -1.5,
        2.5,
        0,
    )
    want = np.zeros((9, 9))
    want[1, 0], want[2, 1], want[3, 2], want[4, 3:5], want[5, 5:7], want[6, 7], want[7, 8] = (
        1,
        1,
        0.7,
        (-1, 1),
        (0, 2),
        -1.5,
        2.5,
    )
    assert np.allclose(label_of(a), want, atol=1e-6)
    assert np.allclose(matrix_of(a)[5], np.diag([2 ** (-2 / 5), 2 ** (2 / 5), 1]))  # stretched along y
    assert np.allclose(matrix_of(a)[6, :2, 2], [-1.5 / 8, 0]) and np.allclose(
        matrix_of(a)[3], np.diag([2**0.14, 2**0.14, 1])
    )


def test_random_numbers_belong_to_positions():
    whole = stream_uniforms(7, 0, 64)
    for at, n in [(0, 1), (1, 1), (13, 7), (63, 1)]:
        assert np.array_equal(stream_uniforms(7, at, n), whole[at : at + n])
    assert stream_uniforms(7, 10**15, 2).shape == (2, 24) and not np.array_equal(stream_uniforms(8, 0, 64), whole)


@pytest.mark.parametrize("size", [8, 9, 32])
def test_warp_is_centred_and_moves_the_right_way(size):
    "A blob goes where its matrix says; an even and an odd size."

    def blob(cx, cy):
        g = (torch.arange(size) + 0.5) / size - 0.5
        return torch.exp(-((g[None, :] - cx) ** 2 + (g[:, None] - cy) ** 2) / 0.02)[None, None]

    for k, value in [(6, 1.0), (7, -1.0), (3, np.pi / 2), (3, 0.4), (2, 1.5)]:
        a = np.zeros((1, 8))
        a[0, k] = value
        M = matrix_of(a)
        cx, cy, _ = M[0] @ [0.15, 0.1, 1]
        got, g = warp(blob(0.15, 0.1), M)[0, 0], (torch.arange(size) + 0.5) / size - 0.5
        w = got.clamp(min=0.3) - 0.3
        assert abs((w.sum(0) * g).sum() / w.sum() - cx) < 0.02 and abs((w.sum(1) * g).sum() / w.sum() - cy) < 0.02, (
            k,
            value,
        )


def test_unchanged_images_are_exactly_unchanged():
    x = torch.rand(200, 1, 8, 8)
    y, label = augment(x, 0, 0, p=0.12, flip=False)
    still = (label == 0).all(1)
    assert (
        0.4 < still.float().mean() < 0.8 and torch.equal(y[still], x[still]) and not torch.equal(y[~still], x[~still])
    )
    assert draw_parameters(stream_uniforms(0, 0, 50), 1.0)[:, [2, 3, 5, 6, 7]].all()  # a direction may be 0


def test_image_data_and_stream_answer_the_same(zipped):
    memory, stream = (load_splits(zipped, in_memory=m)["held_out"] for m in (True, False))
    assert type(memory) is ImageData and torch.equal(memory.x0(torch.arange(3)), stream.x0(torch.arange(3)))
    for k in ("classes", "n_classes", "channels", "image_size", "name"):
        assert getattr(memory, k) == getattr(stream, k), k
    assert len(memory) == len(stream) and len(stream.sha256()) == 64


def test_any_position_of_a_stream_and_in_any_order(zipped):
    stream, memory = (load_splits(zipped, in_memory=m)["train"] for m in (False, True))
    a, b = Batches(stream, 12, seed=1, flip=True, p=0.3, workers=2), Batches(memory, 12, seed=1, flip=True, p=0.3)
    for p in (0, 12, 24, 120, 132, 12, 24, 36):
        assert torch.equal(a.at(p).x0, b.at(p).x0), p
    assert a.running[0] == 48
    a.close()
    assert torch.equal(a.at(48).x0, b.at(48).x0)


@pytest.mark.parametrize("world, batch, workers", [(1, 200, 3), (2, 12, 1), (1, 1, 2)])
def test_pieces_of_a_batch_make_the_batch(zipped, world, batch, workers):
    "More pieces than processes, fewer, and batches of one image."
    stream, memory = (load_splits(zipped, in_memory=m)["train"] for m in (False, True))
    for rank in range(world):
        kw = dict(seed=2, rank=rank, world=world)
        a, b = Batches(stream, batch, workers=workers, **kw), Batches(memory, batch, **kw)
        for k in range(9):
            assert torch.equal(a.at(k * batch).x0, b.at(k * batch).x0), (rank, k)


@pytest.fixture
def no_room(monkeypatch):
    "A machine whose memory no data set fits into."
    import ctm_nb.data.batches

    monkeypatch.setattr(ctm_nb.data.batches, "fits", lambda *_: False)


def test_a_training_on_a_stream_decodes_ahead_and_is_the_same(zipped, tmp_path, no_room, monkeypatch):
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer

    words = [f"data.source={zipped}", "data.flip=true", "evaluate.n=0", "run.save_every=7", "teacher.steps=6",
             "network.channel_mult=1"]

    def train(folder, steps):
        t = Trainer(make_config("tiny", words), folder)
        while t.step < steps:
            t.train_step()
        return t

    streamed = train(tmp_path / "a", 10)
    assert type(streamed.data).__name__ == "StreamData" and streamed.batches.workers >= 1 and streamed.batches.running
    train(tmp_path / "b", 7).save()
    resumed = train(tmp_path / "b", 10)  # in the middle of the second stage, and of an epoch
    monkeypatch.undo()
    memory = train(tmp_path / "c", 10)
    for t in (resumed, memory):
        for name, m in streamed.parts.items():
            for a, b in zip(m.state_dict().values(), t.parts[name].state_dict().values()):
                assert torch.equal(a, b), name


def test_workers_end_at_once_where_a_circle_is_collected(zipped):
    import gc, time
    from multiprocessing import active_children

    batches = Batches(load_splits(zipped, in_memory=False)["train"], 12, workers=3)
    batches.me = [batches]
    others = set(active_children())
    batches.at(0)
    assert len(set(active_children()) - others) == 3
    del batches
    began = time.monotonic()
    gc.collect()
    assert set(active_children()) <= others and time.monotonic() - began < 9  # each would wait for 5 seconds


def test_workers_leave_when_their_parent_is_killed(zipped):
    import signal, subprocess, sys, time

    code = (
        "import sys; from ctm_nb.data.batches import *; from torch.utils.data._utils import worker\n"
        "worker.MP_STATUS_CHECK_INTERVAL = 1  # not five seconds\n"
        "b = Batches(load_splits(sys.argv[1], in_memory=False)['train'], 12, workers=2); b.at(0)\n"
        "import multiprocessing as mp, time; print(*[p.pid for p in mp.active_children()], flush=True)\n"
        "time.sleep(60)"
    )
    p = subprocess.Popen([sys.executable, "-c", code, zipped], stdout=subprocess.PIPE, text=True)
    children = [int(c) for c in p.stdout.readline().split()]
    p.send_signal(signal.SIGKILL)
    p.wait()

    def alive(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    for _ in range(100):
        if not any(map(alive, children)):
            break
        time.sleep(0.1)
    assert len(children) == 2 and not any(map(alive, children))


def test_a_dead_worker_ends_the_command_with_a_sentence(zipped, tmp_path, no_room, monkeypatch, capsys):
    import os
    from ctm_nb.commands.train import ctm_nb_train
    from ctm_nb.data.batches import StreamData

    parent = os.getpid()
    decode = StreamData.decode
    monkeypatch.setattr(
        StreamData, "decode", lambda self, idx: os._exit(1) if os.getpid() != parent else decode(self, idx)
    )
    with pytest.raises(SystemExit) as e:
        ctm_nb_train(["--preset", "tiny", "--data", str(zipped), "--runs", str(tmp_path)])
    assert e.value.code == 3 and "ctm_nb_train: a worker process died" in capsys.readouterr().err


def test_a_single_colour_among_many_greys_is_found(tmp_path):
    from ctm_nb.data.batches import decode_all

    images = IMAGES[:, :, :, :1].repeat(10, 0).repeat(3, 3)
    images[333] = [255, 0, 0]
    source = ArraySource("d", "array", list(map(str, range(700))), images=images)
    for workers in (0, 2):
        assert np.array_equal(decode_all(source, workers=workers)[0].transpose(0, 2, 3, 1), images)


def test_a_program_may_end_in_the_middle_of_a_stream(zipped):
    import subprocess, sys

    code = (
        "import sys; from ctm_nb.data.batches import *\n"
        "b = Batches(load_splits(sys.argv[1], in_memory=False)['train'], 12, flip=True, p=.5, workers=2)\n"
        "for k in range(5): b.at(12 * k)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code, zipped], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_stream_has_the_fingerprint_of_the_memory(zipped, tmp_path, monkeypatch):
    "A run that is continued on a machine with less memory continues on the same images."
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))
    for size in (None, 4):
        stream, memory = (load_splits(zipped, size, in_memory=m) for m in (False, True))
        for split in memory:
            for workers in (0, 2):
                assert stream[split].sha256(workers=workers) == memory[split].sha256(), (size, split)


def test_a_run_continues_where_its_images_no_longer_fit(zipped, tmp_path, monkeypatch):
    import ctm_nb.data.batches
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer

    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))
    c = make_config("tiny", [f"data.source={zipped}", "evaluate.n=0"])
    t = Trainer(c, tmp_path / "run")
    for _ in range(3):
        t.train_step()
    t.save()
    monkeypatch.setattr(ctm_nb.data.batches, "fits", lambda *_: False)
    assert Trainer(c, tmp_path / "run").step == 3


def test_a_repaired_file_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "cache"))
    from ctm_nb.data.read import as_image

    for k in range(20):
        (tmp_path / "d" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        as_image(IMAGES[k]).save(tmp_path / "d" / "ab"[k % 2] / f"{k}.png")
    good = (tmp_path / "d" / "a" / "0.png").read_bytes()
    (tmp_path / "d" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="a/0.png: empty file"):
        load_splits(tmp_path / "d", in_memory=False)
    (tmp_path / "d" / "a" / "0.png").write_bytes(good)
    assert len(load_splits(tmp_path / "d", in_memory=False)["all"]) == 20


def test_a_cache_that_cant_be_written_is_no_reason_to_stop(zipped, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_splits(zipped, in_memory=False)["train"]) and "can't be kept" in caplog.text


def test_processes_of_one_machine_share_its_memory(zipped, monkeypatch):
    import ctm_nb.data.batches
    from ctm_nb.data.read import open_source

    s = open_source(zipped)
    free = f"MemAvailable: {len(s) * 8 * 8 * 3 * 3 * 2 // 1024 + 1} kB\nMemFree: 1 kB"
    texts = {"/proc/meminfo": free, "/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/memory.current": "1"}
    monkeypatch.setattr(ctm_nb.data.batches, "Path", lambda p: SimpleNamespace(read_text=lambda: texts[p]))
    for ranks, enough in (("1", True), ("2", True), ("3", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert ctm_nb.data.batches.fits(s, 8) == enough
