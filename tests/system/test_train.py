"""The command as a process: light to start, clear when wrong."""
import json
import subprocess
import sys

import pytest
from PIL import Image
from warm import python


def call(*words, cwd=None):
    code = "from ctm_nb.commands.train import ctm_nb_train; ctm_nb_train()"
    return python(code, *words, cwd=cwd)


def test_help_imports_nothing_heavy():
    code = ("import ctm_nb.commands.train, sys; print([m for m in ('torch', 'numpy', 'sklearn', 'matplotlib', 'PIL') "
            "if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    r = call("--help")
    assert r.returncode == 0 and "--set" in r.stdout and "one-step" in r.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "distil.lr=1"], "nearest is 'distill.lr'"),
        (["--preset", "digitz"], "digitz"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--set", "distill.K=99"], "distill.K"),
        (["--set", "evaluate.n=5"], "evaluate.n"),
        (["--set", "gan.steps=0", "--stage", "ctm_dsm_gan"], "ctm_dsm_gan has no steps"),
        (["--set", "distill.steps=0", "--stage", "ctm_dsm"], "ctm_dsm has no steps"),
        (["--minutes", "inf", "--dry-run"], "--minutes must be >= 0.01, got inf"),
        (["--steps", "5,5,5"], "gan.steps must be more than gan.start + gan.head_start"),
        (["--dry-run", "--stage", "all", "--set", "gan.features=foo"], "timm knows no network 'foo'"),
        *[(["--set", word], f"{word.partition('=')[0]} must be") for word in (
            "network.sigma_max=inf", "teacher.P_mean=nan", "teacher.P_std=0", "distill.k_power=nan",
            "distill.k_power=1000", "gan.high=inf", "network.channel_mult=1.5,2", "evaluate.steps=1.5")],
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, words, message):
    r = call(*words, cwd=tmp_path)
    assert r.returncode == 2 and message in r.stderr and r.stderr.count("\n") == 1 and not r.stdout
    assert not list(tmp_path.iterdir())


def test_a_reader_who_has_seen_enough(tmp_path):
    code = ("import os; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r); from ctm_nb.commands.train import "
            "ctm_nb_train; ctm_nb_train()")
    r = python(code, "--preset", "tiny", "--dry-run", cwd=tmp_path)
    assert (r.returncode, r.stderr) == (141, "")


def test_ctrl_c_while_watching_does_not_speak_of_the_run_as_stopped(tmp_path):
    code = ("import ctm_nb.training.report\ndef follow(run): raise KeyboardInterrupt\nctm_nb.training.report.follow = "
            "follow\nfrom ctm_nb.commands.train import ctm_nb_train; ctm_nb_train(['--watch', 'runs/x'])")
    r = python(code, cwd=tmp_path)
    assert (r.returncode, r.stderr) == (130, "ctm_nb_train: stopped watching; the run itself goes on\n")


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_while_the_images_are_opened_has_the_exit_code_of_one_in_training(tmp_path, name, code):
    told = ("import os, signal, ctm_nb.training.trainer as t\nfrom ctm_nb.commands.train import ctm_nb_train\n"
            f"t.open_images = lambda *_: os.kill(os.getpid(), signal.{name})\n"
            "ctm_nb_train(['--preset', 'tiny'])")
    r = python(told, cwd=tmp_path)
    assert (r.returncode, r.stderr.count("\n")) == (code, 1), r
    assert f"{name}: what had been saved is whole; the same command continues" in r.stderr
    assert not list(tmp_path.iterdir())


def test_a_plan_says_that_the_images_are_others(tmp_path):
    words = ["--preset", "tiny", "--data", "d", "--set", "teacher.steps=2", "distill.steps=2", "evaluate.n=0"]
    for k in range(8):
        (tmp_path / "d").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 30 * k).save(tmp_path / "d" / f"{k}.png")
    assert call(*words, "--stage", "teacher", cwd=tmp_path).returncode == 0
    assert "continues the run there from step 2" in call(*words, "--dry-run", cwd=tmp_path).stdout
    Image.new("L", (8, 8), 99).save(tmp_path / "d" / "3.png")
    plan, run = call(*words, "--dry-run", cwd=tmp_path), call(*words, cwd=tmp_path)
    told = "runs/d was trained on other images than 'd' holds now"
    assert f"(refused: {told}" in plan.stdout and run.returncode == 2 and told in run.stderr


def test_a_folder_of_trajectories_that_is_a_file_is_refused_before_the_teacher_trains(tmp_path):
    (tmp_path / "t").write_text("")
    r = call("--preset", "tiny", "--trajectories", "t", "--set", "distill.matching=trajectories", cwd=tmp_path)
    assert r.returncode == 2 and "'t'" in r.stderr and r.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, said", [
    ("--image-size 4 --set network.attention=8,4", "network.attention=8: the network has no such side, its sides"),
    ("--set data.use_labels=false teacher.label_dropout=.1", "teacher.label_dropout=0.1: there are no labels to drop"),
    ("--set teacher.label_dropout=.1", ""),
    ("", "")])
def test_settings_that_nothing_answers_to_are_named(tmp_path, words, said):
    r = call("--dry-run", *words.split(), cwd=tmp_path)
    assert r.returncode == 0 and (said in r.stderr if said else not r.stderr), r.stderr


def test_empty_folder_of_images(tmp_path):
    (tmp_path / "empty").mkdir()
    r = call("--data", "empty", cwd=tmp_path)
    assert r.returncode == 2 and "empty" in r.stderr and r.stderr.count("\n") == 1


def test_dry_run_writes_nothing_and_says_everything(tmp_path):
    r = call("--dry-run", "--set", "distill.lr=1e-3", "run.seed=7", "--set", "teacher.batch=3", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for text in ("distill.lr=0.001", "run.seed=7", "teacher.batch=3", "1352 training images", "runs/digits"):
        assert text in r.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_students_steps_the_teacher_is_trained(tmp_path):
    words = ["--preset", "tiny", "--set", "teacher.steps=3", "distill.steps=0", "evaluate.n=0"]
    plan, run = (call(*words, *more, cwd=tmp_path) for more in (["--dry-run"], []))
    assert "student   none (distill.steps is 0)" in plan.stdout and run.returncode == 0, plan.stderr + run.stderr
    assert [p.name for p in (tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_whole_run_scores_and_repeats(tmp_path):
    words = ["--preset", "tiny", "--set", "teacher.steps=6", "distill.steps=4"]
    first = call(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    records = json.loads((tmp_path / "runs" / "tiny" / "scores.json").read_text())
    samplers = {json.dumps(r["sampler"]) for r in records}
    assert len(samplers) == 4 and {r["metric"] for r in records} >= {
        "frechet_distance",
        "precision",
        "recall",
        "class_accuracy",
    }
    for r in records:
        assert {
            "metric",
            "value",
            "n_samples",
            "reference",
            "features",
            "sampler",
            "seed",
            "checkpoint",
        } <= r.keys() and len(r["reference"]["sha256"]) == 64
    stamp = (tmp_path / "runs" / "tiny" / "scores.json").stat().st_mtime_ns
    again = call(*words, cwd=tmp_path)
    assert (
        again.returncode == 0
        and again.stdout == first.stdout
        and (tmp_path / "runs" / "tiny" / "scores.json").stat().st_mtime_ns == stamp
    )
