"Averages of any length, and guided teachers, in runs: killed, out of disk, changed, scored, distilled."
import hashlib
import json
import shutil

import pytest
import torch
from runs import ONE_LEVEL, assert_same, command, compute_alike, newest

from ctm_nb.checkpoints.averages import average, snapshots_of
from ctm_nb.checkpoints.models import load
from ctm_nb.commands.convert import ctm_nb_convert
from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.method.guidance import Guided, autoguide, guide_free
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import MLP
from ctm_nb.training.config import DistillConfig, make_config
from ctm_nb.training.costs import costs, mean_evals, memory
from ctm_nb.training.stages import STAGE_CLASSES, DistillStage, TrajectoryFolder
from ctm_nb.training.trainer import Trainer
from ctm_nb.data.images import digits

TINY = [ONE_LEVEL, "teacher.steps=12", "distill.steps=9", "teacher.batch=8", "distill.batch=8", "run.save_every=5",
        "run.log_every=3", "run.sample_every=1000", "evaluate.n=0", "run.snapshots=4", "teacher.lr=.02",
        "distill.lr=.02"]
PROFILES = ["teacher.profiles=.05,.1", "distill.profiles=.05,.10"]


def start(folder, *more): return Trainer(make_config("tiny", [*TINY, *more]), folder)


def walk(t, step):
    "Steps and what is due after each, without pictures; nothing is saved at the end."
    t.save_grid = lambda *_: None
    while t.step < step:
        t.train_step()
        t.keep_up(t.ends[t.now.name], False)
    return t


def files_of(run):
    found = {p.relative_to(run): p for p in sorted((run / "averages").rglob("*")) if p.is_file()}
    return {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    compute_alike()
    folder = tmp_path_factory.mktemp("runs") / "whole"
    walk(start(folder, *PROFILES), 21)
    return folder


def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


# ---- averages

def test_snapshots_lie_at_equal_distances_and_make_other_averages(whole, tmp_path):
    assert [p.name for p in sorted((whole / "averages").iterdir())] == [
        f"step_{n:08d}" for n in (3, 6, 9, 12, 15, 17, 19, 21)]
    assert {r[0].name: r[2] for r in snapshots_of(whole)} == {
        "step_00000015": 3, "step_00000017": 5, "step_00000019": 7, "step_00000021": 9}
    assert {r[1] for r in snapshots_of(whole, "teacher")} == {"teacher-profile0.05", "teacher-profile0.1"}
    other = start(tmp_path / "r", "teacher.profiles=.075", "distill.profiles=.075")
    while other.step < 21:
        other.train_step()
        for which in ("teacher", "ctm"):
            if other.step == other.ends[{"teacher": "teacher", "ctm": "ctm_dsm"}[which]]:
                tracked, last = weights(other.parts[f"{which}-profile0.075"]), weights(other.parts["model"])
                made = weights(average(whole, .075, which))
                assert (made - tracked).norm() < .15 * (last - tracked).norm()
    with_them = {k: load(whole, which=k) for k in ("ctm-profile0.05", "ctm-profile0.1", "ctm")}
    assert len({float(weights(m).sum()) for m in with_them.values()}) == 3


@pytest.mark.parametrize("killed_at", [4, 8, 14, 20])
def test_killed_and_gone_on_not_a_bit_differs(whole, tmp_path, killed_at):
    run = tmp_path / "r"
    walk(start(run, *PROFILES), killed_at)  # what came after the last checkpoint is lost, its snapshots are there
    walk(start(run, *PROFILES), 21)
    assert_same(run, whole)
    assert files_of(run) == files_of(whole) and len(files_of(run)) == 8 * 4


def test_snapshots_beyond_the_checkpoint_go(whole, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    for p in (run / "checkpoints").iterdir():
        if p.name > "step_00000020": shutil.rmtree(p)
    start(run, *PROFILES)
    assert sorted(p.name for p in (run / "averages").iterdir())[-1] == "step_00000019"


def test_without_profiles_nothing_changes(whole, tmp_path):
    t = walk(start(tmp_path / "r"), 21)
    assert not (tmp_path / "r" / "averages").exists() and not any("profile" in k for k in t.parts)
    mine, theirs = newest(tmp_path / "r").models, newest(whole).models
    assert mine.keys() < theirs.keys()
    for part in mine: assert all(torch.equal(v, theirs[part][k]) for k, v in mine[part].items()), part


def test_a_full_disk_is_one_line_and_room_goes_on(whole, tmp_path):
    walk(start(tmp_path / "r", *PROFILES), 5)
    done = command("--runs", tmp_path, "--name", "r", "--set", *TINY, *PROFILES, largest_file=15_000)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "averages" in (line := done.stderr.strip().splitlines()[-1]) and "while step 6 was being saved" in line
    assert [p.name for p in (tmp_path / "r" / "averages").iterdir()] == ["step_00000003"]
    walk(start(tmp_path / "r", *PROFILES), 21)
    assert_same(tmp_path / "r", whole)
    assert files_of(tmp_path / "r") == files_of(whole)


def test_profiles_change_until_their_stage_begins_and_snapshots_always(whole, tmp_path):
    walk(start(tmp_path / "r", *PROFILES), 5)
    with pytest.raises(ValueError, match=r"teacher.profiles: \[0.05, 0.1\] -> \[0.05\]"):
        start(tmp_path / "r", "teacher.profiles=.05")
    t = start(tmp_path / "r", "teacher.profiles=.05,.1", "distill.profiles=.2", "run.snapshots=2")
    walk(t, 21)
    assert {(r[0].name, r[3]) for r in snapshots_of(tmp_path / "r")} == {("step_00000017", .2), ("step_00000021", .2)}


def test_raw_into_the_adversarial_stage_the_profile_goes_on(tmp_path):
    more = ["gan.steps=4", "gan.batch=8", "gan.init=raw", "gan.optimizer=adamw", "gan.first=student",
            "gan.profiles=.05,.2", "distill.profiles=.05"]
    t = walk(start(tmp_path / "r", *more), 21)
    before = {k: (e.n_updates, weights(e.module)) for k, e in t.now.emas.items()}
    old = Trainer(make_config("tiny", [*TINY, *more]), tmp_path / "r")
    old.train_step()
    assert old.now.name == "ctm_dsm_gan"
    updates = {k: e.n_updates for k, e in old.now.emas.items() if "profile" in k}
    assert updates == {"ctm-profile0.05": before["ctm-profile0.05"][0] + 1, "ctm-profile0.2": 1}


@pytest.mark.parametrize("words, message", [
    (["teacher.profiles=.3"], "teacher.profiles must be one or more numbers, each in (0, 0.2887), got (0.3,)"),
    (["distill.profiles=.05,.05"], "distill.profiles must be different lengths"),
    (["run.snapshots=0"], "run.snapshots must be at least 1"),
    (["distill.guidance=-1"], "distill.guidance must be at least 0"),
    (["distill.guide=x"], "distill.guide must be empty where there is no scale distill.guidance"),
    (["distill.guidance=2"], "distill.guidance must be none without distill.guide for a teacher that has seen no"),
    (["distill.guidance=2", "distill.guide=x", "teacher.source=none", "distill.phases=dsm:.5,soft:.5"],
     "distill.guidance must be none where there is no teacher"),
])
def test_impossible_settings_name_their_key(words, message):
    with pytest.raises(ValueError) as e: make_config("tiny", words)
    assert str(e.value).startswith(message), e.value


def test_the_plan_tells_what_they_take(tmp_path, capsys):
    ctm_nb_train(["--preset", "tiny", "--runs", str(tmp_path), "--dry-run", "--set", "teacher.profiles=.05,.1",
                  "distill.profiles=.1", "teacher.steps=30", "distill.steps=5"])
    out = capsys.readouterr().out
    size = 2 * sum(p.numel() for p in STAGE_CLASSES["teacher"](
        make_config("tiny"), digits(), torch.device("cpu")).parts["model"].parameters()) / 2**20
    assert f"averages  teacher 16 times 2, distill 5 times 1: 37 of {size:.2g} MiB, {37 * size:.2g} MiB in all" in out
    ctm_nb_train(["--preset", "tiny", "--runs", str(tmp_path), "--dry-run"])
    assert "averages " not in capsys.readouterr().out
    more = memory(make_config("tiny", PROFILES), digits()), memory(make_config("tiny"), digits())
    n = size * 2**20 / 2
    assert all(2 * 4 * n <= more[0][s] - more[1][s] < 2.6 * 4 * n for s in more[0])  # a student's are larger


# ---- commands

def test_an_average_is_converted_and_several_are_scored(whole, tmp_path, capsys):
    ctm_nb_convert([str(whole), str(tmp_path / "m.safetensors"), "--ema-length", ".08"])
    assert "average of length 0.08 over 8 snapshots up to step 21" in capsys.readouterr().out
    assert torch.equal(weights(load(tmp_path / "m.safetensors")), weights(average(whole, .08)))
    ctm_nb_convert([str(whole), "--ema-length", ".2", "--which", "teacher"])
    assert "teacher, average of length 0.2" in capsys.readouterr().out
    words = ["-n", "40", "--metrics", "fid", "--device", "cpu", "--steps", "1", "--ref"]
    ctm_nb_evaluate([str(whole), *words, "digits", "--ema-lengths", ".05,.2", "--out", str(tmp_path / "s.json"),
                     "--save-ref", str(tmp_path / "ref.npz")])
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [r["sampler"]["ema_length"] for r in rows] == [.05, .2] and rows[0]["value"] != rows[1]["value"]
    assert "ema length 0.05" in out and "ema length 0.2" in out, out
    ctm_nb_convert([str(whole), str(tmp_path / "05.safetensors"), "--ema-length", ".05"])
    ctm_nb_evaluate([str(tmp_path / "05.safetensors"), *words, str(tmp_path / "ref.npz"), "--out",
                     str(tmp_path / "t.json")])
    assert json.loads((tmp_path / "t.json").read_text())[0]["value"] == rows[0]["value"]


@pytest.mark.parametrize("command, words, message", [
    (ctm_nb_convert, ["--ema-length", ".4"], "the length of an average must be in (0, 0.2887), got 0.4"),
    (ctm_nb_convert, ["--ema-length", "0"], "the length of an average must be in (0, 0.2887), got 0"),
    (ctm_nb_evaluate, ["--ref", "digits", "--ema-lengths", ".1,.4"], "the length of an average must be in"),
    (ctm_nb_evaluate, ["--ref", "digits", "--ema-lengths", ".1", "--search"], "--ema-lengths is for scores of samples"),
    (ctm_nb_evaluate, ["--ref", "digits", "--guide", "x"], "a guide needs the scale --guidance, got only --guide x"),
    (ctm_nb_evaluate, ["--ref", "digits", "--guide", "x", "--guidance", "2"], "x does not exist"),
])
def test_mistakes_are_one_line(whole, capsys, command, words, message):
    with pytest.raises(SystemExit) as e: command([str(whole), *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_a_run_without_snapshots_says_so(tmp_path, capsys):
    run = walk(start(tmp_path / "r"), 5).folder
    with pytest.raises(SystemExit): ctm_nb_convert([str(run), "--ema-length", ".1"])
    assert "holds no snapshots of averages; a run keeps some with --set teacher.profiles=" in capsys.readouterr().err


# ---- guided teachers

def test_the_student_of_a_guided_teacher(whole, tmp_path):
    guide = whole / "averages" / "step_00000003"
    words = ["distill.guidance=1.5", f"distill.guide={tmp_path / 'guide'}"]
    shutil.copytree(guide, tmp_path / "guide")
    t = walk(start(tmp_path / "a", *words), 16)
    stage, worse = t.now, load(guide)
    assert isinstance(stage, DistillStage) and isinstance(stage.teacher, Guided)
    by_hand = autoguide(t.parts["teacher"], worse, 1.5)
    x, y = torch.randn(5, 1, 8, 8), torch.arange(5)
    assert torch.equal(stage.teacher.D(x, 2., y), by_hand.D(x, 2., y))
    assert not torch.equal(stage.teacher.D(x, 2., y), t.parts["teacher"].D(x, 2., y))
    shutil.rmtree(tmp_path / "guide")  # the run has its own copy
    walk(start(tmp_path / "a", *words), 21)
    shutil.copytree(guide, tmp_path / "guide")
    straight = walk(start(tmp_path / "b", *words), 21)
    assert_same(tmp_path / "a", tmp_path / "b")
    plain = newest(walk(start(tmp_path / "c"), 21).folder)
    assert not torch.equal(weights(load(tmp_path / "b")), weights(load(tmp_path / "c")))
    assert "teacher-guide" not in plain.models and straight.parts["teacher-guide"] is not None
    logged = {r["stage"]: r for r in straight.log.read()}
    assert logged["ctm_dsm"]["teacher_evals"] == 2 * {r["stage"]: r for r in start(tmp_path / "c").log.read()}[
        "ctm_dsm"]["teacher_evals"]
    assert next(iter(straight.samplers())).startswith("guided teacher, 10 evaluations")
    g = make_config("tiny", ["distill.guidance=1.5", "distill.guide=x"])
    assert mean_evals(g.distill) == 2 * mean_evals(make_config("tiny").distill)
    more = costs(g)["ctm_dsm"] - costs(make_config("tiny"))["ctm_dsm"]
    assert more == pytest.approx(mean_evals(make_config("tiny").distill))


@pytest.mark.parametrize("matching", ["trajectories", "eulerian"])
def test_other_objectives_follow_the_guided_teacher(whole, tmp_path, matching):
    guide = whole / "averages" / "step_00000003"
    words = ["distill.guidance=2", f"distill.guide={guide}", f"distill.matching={matching}", "distill.anchor=teacher",
             f"teacher.source={whole}"]
    t = start(tmp_path / "r", *words)
    seen = []
    t.now.teacher.D = (lambda D: lambda *a: seen.append(1) or D(*a))(t.now.teacher.D)
    t.train_step()
    assert seen


def test_labels_guide_a_teacher_that_has_seen_images_without(tmp_path):
    t = walk(start(tmp_path / "r", "distill.guidance=3", "teacher.label_dropout=.2"), 13)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(t.now.teacher.D(x, 1., y), guide_free(t.parts["teacher"], 3.).D(x, 1., y))
    assert "teacher-guide" not in t.parts


def test_a_guide_of_other_pictures_is_one_line(whole, tmp_path):
    other = walk(Trainer(make_config("tiny", [*TINY, "data.channels=3"]), tmp_path / "rgb"), 5).folder
    with pytest.raises(ValueError, match=r"guide must draw data of shape \(1, 8, 8\) as the model, got \(3, 8, 8\)"):
        start(tmp_path / "r", f"teacher.source={whole}", f"distill.guide={other}", "distill.guidance=2")
    assert not (tmp_path / "r").exists()


def test_the_guided_teacher_is_scored_as_such(whole, tmp_path):
    t = start(tmp_path / "r", f"teacher.source={whole}", f"distill.guide={whole}/averages/step_00000003",
              "distill.guidance=2", "evaluate.n=20", "evaluate.steps=1", "evaluate.teacher_steps=2")
    records = walk(t, 9).evaluate()
    assert {r["sampler"].get("guidance") for r in records if r["sampler"] and r["sampler"]["solver"] == "heun"} == {2.}
    assert not any("guidance" in r["sampler"] for r in records if r["sampler"] and r["sampler"]["solver"] == "ctm")


def test_a_folder_of_trajectories_belongs_to_one_guidance(tmp_path):
    m, times = Denoiser(MLP(2, n_classes=3)), torch.tensor([80., 1., .002])
    kept = lambda teacher, w: TrajectoryFolder(
        DistillConfig(trajectories=str(tmp_path), stored=64, guidance=w), teacher, times)
    kept(guide_free(m, 2.), 2.)
    kept(guide_free(m, 2.), 2.)
    for teacher, w in ((guide_free(m, 3.), 3.), (m, None), (autoguide(m, m, 2.), 2.)):
        with pytest.raises(ValueError, match="holds trajectories of another run"): kept(teacher, w)
