"""What people stumbled on with their own pictures: flags, names, plans that can't be, silence, advice that helps."""
import logging
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.commands.flags import Pulse
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.data.convert import report, survey
from ctm_nb.data.read import open_source
from ctm_nb.evaluation.evaluate import Request, open_subject
from ctm_nb.training import costs
from ctm_nb.training.config import make_config
from ctm_nb.training.costs import fit_memory, memory
from ctm_nb.training.presets import choose
from ctm_nb.training.report import NAMES


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(8):
        path = tmp_path / "pics" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
    return tmp_path / "pics"


def said(command, capsys, *words):
    "Exit code, output and errors of a command."
    code = 0
    try: command(list(map(str, words)))
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def test_what_everybody_sets_has_flags(capsys, tmp_path):
    plan = "--preset", "tiny", "--runs", tmp_path, "--dry-run"
    words = *plan, "--steps", "7,8,9", "--image-size", 4, "--set", "network.attention=2"
    code, out, _ = said(ctm_nb_train, capsys, *words)
    wanted = {"teacher.steps=7", "distill.steps=8", "gan.steps=9", "data.image_size=4"}
    assert code == 0 and wanted <= {*out.split("\n")}
    code, out, _ = said(ctm_nb_train, capsys, *plan, "--steps", 7)
    assert {"teacher.steps=7", "distill.steps=7"} <= {*out.split("\n")} and "gan.steps=7" not in out
    for words, why in ((("--steps", "7,x"), "distill.steps must be int, got 'x'"),
                       (("--image-size", 0), "must be >= 1, got 0"),
                       (("--steps", "1,2,3,4"), "at most three numbers, got 1,2,3,4"),
                       (("--steps", 7, "--minutes", 1), "--minutes chooses distill.steps; leave one of the two out")):
        code, _, err = said(ctm_nb_train, capsys, *plan, *words)
        assert code == 2 and why in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/../..", "a/../../x", "/tmp/x"])
def test_a_run_stays_in_the_folder_of_runs(name, capsys, tmp_path):
    code, _, err = said(ctm_nb_train, capsys, "--preset", "tiny", "--runs", tmp_path / "r", "--name", name)
    assert code == 2 and err == f"ctm_nb_train: --name must be that of a folder in {tmp_path}/r, got {name!r}\n"
    assert not [*tmp_path.iterdir()]


def test_pictures_that_are_made_smaller_say_how_they_stay(pictures, capsys):
    start, words, reasons = choose(pictures, gpu=False)
    assert "data.image_size=32" in words and "--image-size 48 keeps 48 x 48" in reasons[1]
    assert "data.image_size=48" in choose(pictures, gpu=False, image_size=48)[1]
    Image.new("RGB", (48, 40)).save(pictures / "a" / "other.png")
    code, _, err = said(ctm_nb_train, capsys, "--data", pictures, "--preset", "tiny", "--dry-run")
    assert code == 2 and "(--image-size, or ctm_nb_data --size)" in err


def test_skip_broken_where_it_is_advised(pictures, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((6, 48, 48, 3), np.uint8))
    (pictures / "a" / "8.png").touch()
    code, _, err = said(ctm_nb_evaluate, capsys, tmp_path / "s.npz", "--ref", pictures)
    assert code == 2 and "leave them out with --skip-broken" in err
    code, _, err = said(ctm_nb_evaluate, capsys, tmp_path / "s.npz", "--ref", pictures, "--skip-broken", "--dry-run")
    assert code == 0, err
    assert open_subject(Request(str(tmp_path / "s.npz"), str(pictures), skip_broken=True)).reading["skip_broken"]


def test_copies_are_shown(pictures):
    for name in ("a/x.png", "b/x.png"): Image.open(pictures / "a" / "0.png").save(pictures / name)
    facts = survey(open_source(pictures))
    assert facts["copies"] == {
        "a/x.png": "pixel by pixel a/0.png", "b/x.png": "pixel by pixel a/0.png, of another class"}
    assert "copies     2\n           a/x.png: pixel by pixel a/0.png\n" in report(facts)


LARGE = ["data.image_size=256", "distill.matching=soft"]


def test_a_batch_that_does_not_fit_is_taken_in_parts_on_a_cpu(tmp_path, caplog):
    config = make_config("digits", [*LARGE, "run.device=cpu"])
    data = SimpleNamespace(channels=3, image_size=256, n_classes=0)
    whole, gib = max(memory(config, data).values()), 2 ** 30
    assert whole > 23 * gib
    fit_memory(config, data, tmp_path, room=2 * whole)
    assert config.run.micro_batch == "auto" and not caplog.records
    fit_memory(config, data, tmp_path, room=8 * gib)
    n = int(config.run.micro_batch)
    assert max(memory(config, data, n).values()) <= .8 * 8 * gib < max(memory(config, data, n + 1).values())
    assert f"{whole / gib:.1f} GiB, and 8.0 GiB are free: {n} images at a time" in caplog.text
    (tmp_path / "config.json").write_text('{"run": {"micro_batch": "3"}}')
    config.run.micro_batch = "auto"
    fit_memory(config, data, tmp_path, room=4 * gib)  # a run goes on as it began
    assert config.run.micro_batch == "3"
    config.run.micro_batch = "auto"
    fit_memory(config, data, tmp_path / "new", room=gib // 16)
    assert config.run.micro_batch == "1" and "take smaller ones (--image-size)" in caplog.text


def test_processes_share_a_batch_and_take_what_the_one_with_least_room_can(tmp_path, caplog):
    data, gib = SimpleNamespace(channels=3, image_size=256, n_classes=0), 2 ** 30
    most = lambda config, n, world=1: max(memory(config, data, n, world=world).values())
    for world in (1, 2, 4):
        config, caplog.records[:] = make_config("digits", [*LARGE, "run.device=cpu"]), []
        here = SimpleNamespace(world=world, main=True, least=lambda n: n - (world > 1) * 2 * gib)
        fit_memory(config, data, tmp_path, room=8 * gib, here=here)
        n, room = int(config.run.micro_batch), here.least(8 * gib)
        assert most(config, n) <= .8 * room < most(config, n + 1)
        told = f"would take {most(config, None, world) / gib:.1f} GiB, and {room / gib:.1f} GiB are free"
        assert told + f"{' for each process' * (world > 1)}: {n} images" in caplog.text
        worst = max(need := memory(config, data, None, False, world), key=need.__getitem__)
        assert f"{NAMES[worst]}: a step of " in caplog.text  # whose plan may not be the one that is printed
    assert most(config, None, 4) < most(config, None) / 2
    config.run.micro_batch = "auto"
    fit_memory(config, data, tmp_path, room=int(most(config, None, 4) / .79), here=SimpleNamespace(world=4, least=int))
    assert config.run.micro_batch == "auto"  # a quarter of the batch fits


@pytest.mark.parametrize("device, wanted, said", [
    ("cpu", "64", "student and adversary: a step of 64 images at a time would take .* GiB, and 8.0 GiB are free: \\d+ "
     "images at a time fit"),
    ("cuda", "auto", "a step of whole batches would take .* GiB, and 8.0 GiB are free: \\d+ images at a time"),
    ("cuda", "64", "a step of 64 images at a time would take"), ("cuda", "1", ""), ("mps", "auto", "")])
def test_a_plan_that_does_not_fit_is_warned_of(tmp_path, caplog, monkeypatch, device, wanted, said):
    monkeypatch.setattr(costs, "pick_device", lambda _: torch.device(device))
    config = make_config("digits", [*LARGE, f"run.micro_batch={wanted}", "run.precision=fp32"])
    fit_memory(config, SimpleNamespace(channels=3, image_size=256, n_classes=0), tmp_path, room=8 * 2 ** 30)
    assert bool(caplog.text) == bool(said) and re.search(said, caplog.text), caplog.text
    assert config.run.micro_batch == wanted  # a GPU finds out itself


def test_trajectories_of_large_pictures_leave_room(tmp_path, caplog):
    data = SimpleNamespace(channels=3, image_size=256, n_classes=0)
    named, gib = make_config("digits", ["data.image_size=256"]), 2 ** 30
    fit_memory(named, data, tmp_path, room=8 * gib)
    assert "fewer of them (distill.stored)" in caplog.text
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    start, words, _ = choose(tmp_path, gpu=False, image_size=256)
    chosen = make_config(start, [*words, "run.device=cpu"])
    assert chosen.distill.stored == 256 and memory(chosen, data, 1)["ctm_dsm"] < 4 * gib
    fit_memory(chosen, data, tmp_path, room=8 * gib)
    assert int(chosen.run.micro_batch) > 5


def test_words_take_the_place_of_what_the_preset_says(tmp_path, capsys):
    def planned(*words):
        ctm_nb_train(["--dry-run", "--runs", str(tmp_path), *words])
        lines = (l.partition("=") for l in capsys.readouterr().out.splitlines() if l.startswith("distill."))
        return {k.removeprefix("distill."): v for k, _, v in lines}
    d = planned()
    assert (d["phases"], d["anchor_rows"]) == ("trajectories:.8,soft:.2", "4")
    d = planned("--set", "distill.matching=local")
    assert (d["phases"], d["matching"]) == ("", "local")
    d = planned("--teacher", "none")  # whose denoiser is trained by every row
    assert (d["phases"], d["anchor_rows"]) == ("dsm:.5,soft:.5", "None")


def test_all_stages_without_an_adversary_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for words, said in (((), False), (("--stage", "all"), True), (("--stage", "all", "--set", "gan.steps=2"), False)):
        caplog.clear()
        ctm_nb_train(["--preset", "tiny", "--dry-run", "--runs", str(tmp_path), *words])
        assert ("no adversary: gan.steps is 0" in caplog.text) == said


def test_silence_ends_within_ten_seconds_and_a_minute(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    with Pulse("ctm_nb_train"): assert not any(isinstance(h, Pulse) for h in logging.getLogger().handlers)  # told so
    monkeypatch.delenv("CTM_NB_HEARTBEAT")
    caplog.set_level(logging.WARNING)  # as of ctm_nb_evaluate, which tells nothing else on the way
    with Pulse("ctm_nb_train") as p:
        assert p.due - p.began < 9
        p.due, p.say = 0, lambda: "teacher: step 3 of 9"
        time.sleep(1.5)
        assert 40 < p.due - time.monotonic() < 50  # it has said something itself
        logging.warning("another line")
        assert p.due - time.monotonic() > 49.9
        time.sleep(1.1)
    assert [r.getMessage()[:36] for r in caplog.records] == ["ctm_nb_train: teacher: step 3 of 9, ", "another line"]
    logging.warning("after it")
    assert p.due < time.monotonic() + 49.9
