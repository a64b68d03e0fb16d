"""A run of so many minutes ends in time on a machine that changes its mind, killed or not, and says what can't be."""
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ONE_LEVEL, assert_same, newest

import ctm_nb.training.budget as module
from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.training.budget import SCORES, BudgetTrainer, Speed, _fit_scores, budget, recipe, work
from ctm_nb.training.config import make_config
from ctm_nb.training.runtime import Signals
from ctm_nb.training.trainer import Trainer, open_images

STAGES = ["teacher", "ctm_dsm"]
WORDS = [ONE_LEVEL, "teacher.batch=4", "distill.batch=4", "distill.max_evals=1", "evaluate.n=0", "run.log_every=1000",
         "run.save_every=1000", "run.sample_every=1000"]
SPEED = Speed({"teacher": 1., "ctm_dsm": 1.2, "ctm_dsm_gan": 1.5}, .1, 1., .001, .001, .005)


class Clock:
    "Seconds that only steps let pass: each as many as measured, times a factor of the step; real: steps that train."
    def __init__(self, factor=lambda step: 1., real=True): self.now, self.factor, self.real = 0., factor, real
    def __call__(self): return self.now


@pytest.fixture(autouse=True, scope="module")
def fake():
    "What is measured, and how long a step then takes."
    step, monkeypatch = Trainer.train_step, pytest.MonkeyPatch()
    def count(self):
        if self.stage != self.now.name: self.begin(self.stage, self.parts)
        self.state.step += 1
    def train_step(self):
        if not (isinstance(self, BudgetTrainer) and isinstance(self.clock, Clock)): return step(self)
        before, seconds = self.step, self.state.seconds
        found = step(self) if self.clock.real else count(self)
        taken = float(SPEED.step[self.now.name] * self.clock.factor(before))
        self.clock.now, self.state.seconds = self.clock.now + taken, seconds + taken
        return found
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Trainer, "save_grid", lambda self, final=False: None)
    monkeypatch.setattr(module, "measure", lambda *_: SPEED)
    monkeypatch.setattr(module, "_steps_alone", lambda *_: SPEED.step)
    yield
    monkeypatch.undo()


def planned(folder, minutes=2., words=WORDS, stages=STAGES):
    config = make_config("tiny", words)
    return budget(config, words, minutes, folder, stages, time.perf_counter())[0]


def finish(folder, minutes=2., factor=lambda step: 1., real=True):
    clock = Clock(factor, real)
    trainer = BudgetTrainer(planned(folder, minutes), folder, began=0., clock=clock)
    trainer.run("ctm_dsm")
    return trainer


# ---- in time

@pytest.mark.parametrize("factor", [
    lambda step: 1., lambda step: 3., lambda step: .4, lambda step: 1. if step < 40 else 2.5,
    lambda step: 2. if step < 30 else .7, lambda step: 1. + .8 * np.sin(step / 3)])
def test_it_ends_in_time_on_any_machine(tmp_path, factor):
    t = finish(tmp_path / "r", factor=factor, real=False)
    assert abs(t.clock.now + SPEED.end - 120) <= 12
    assert t.step == t.total and newest(t.folder).step == t.step
    teacher = sum(SPEED.step["teacher"] * factor(step) for step in range(t.ends["teacher"]))
    assert .4 < teacher / t.clock.now < .7  # about half of the time


def test_bursts_of_solving_do_not_mislead(tmp_path, monkeypatch):
    costs = {"teacher": 1., "trajectories": 1., "soft": 3., "solve": 8., "ctm_dsm": 2.6}
    monkeypatch.setattr(module, "measure", lambda *_: SPEED._replace(step=costs))
    words, clock = [*WORDS, "distill.phases=trajectories:.6,soft:.4"], Clock(real=False)
    t = BudgetTrainer(planned(tmp_path / "r", 20., words), tmp_path / "r", began=0., clock=clock)
    clock.factor = lambda step: work(t.config, costs, step, step + 1) / SPEED.step[t.now.name]
    t.run("ctm_dsm")
    assert abs(clock.now + SPEED.end - 1200) <= 24 and t.slow == pytest.approx(1)
    planned_, *later = (np.array(row[1:3]) for row in t.about["steps"])
    assert len(later) > 3 and all(abs(row - planned_).max() <= .06 * planned_.max() for row in later)


def test_rates_warm_ups_and_checkpoints_follow_the_steps(tmp_path):
    c = planned(tmp_path / "r", 60, [])
    assert c.teacher.ema == round(1 - 10 / c.teacher.steps, 5) and c.distill.target_ema == .99
    assert 1900 < c.teacher.steps < 2000 and 1300 < c.distill.steps < 1400
    assert c.run.save_every == c.run.sample_every == 55  # a minute
    short = planned(tmp_path / "r", 2, ["teacher.ema=.5"])
    assert short.teacher.ema == .5 and short.distill.ema < .9 and short.run.minutes == 2


def test_the_recipe_fits_with_a_teacher_and_without():
    d = make_config("digits", recipe()).distill
    assert (d.distance, d.anchor_rows, d.phases) == ("features", None, "trajectories:.6,soft:.4")
    words = ["teacher.source=none", "gan.steps=0", *recipe(False), "distill.phases=dsm:.5,soft:.5"]
    assert make_config("digits", words).distill.distance == "pseudo_huber"


def test_bf16_is_chosen_where_its_steps_are_faster(tmp_path, monkeypatch):
    "And kept by whoever goes on, for shorter or longer; small images, who says a precision and others never try."
    monkeypatch.setattr(module, "unpacks", lambda device: False)
    def timed(config, *_, faster=1.5):
        return {k: v / (faster if config.run.precision == "bf16" else 1.) for k, v in SPEED.step.items()}
    monkeypatch.setattr(module, "_steps_alone", timed)
    words = [*WORDS, "data.image_size=16"]
    config = planned(tmp_path / "half", words=words)
    assert config.run.precision == "bf16" and json.loads(config.run.plan)["costs"]["teacher"] == 1 / 1.5
    t = BudgetTrainer(config, tmp_path / "half", began=0., clock=Clock(real=False))
    t.run("ctm_dsm")
    monkeypatch.setattr(module, "_steps_alone", lambda config, *_: timed(config, faster=.5))
    for minutes in (2., 8.): assert planned(tmp_path / "half", minutes, words).run.precision == "bf16"
    assert planned(tmp_path / "slow", words=words).run.precision == "auto"
    monkeypatch.setattr(module, "_steps_alone", timed)
    assert planned(tmp_path / "small").run.precision == "auto"
    assert planned(tmp_path / "typed", words=[*words, "run.precision=fp32"]).run.precision == "fp32"
    file = shutil.copytree(tmp_path / "half", tmp_path / "full") / "config.json"
    file.write_text(file.read_text().replace('"bf16"', '"auto"'))  # as a run of earlier versions has it
    assert planned(tmp_path / "full", 8., words).run.precision == "auto"
    monkeypatch.setattr(module, "unpacks", lambda device: True)
    assert planned(tmp_path / "unable", words=words).run.precision == "auto"


def test_everything_is_measured_with_the_network_that_is_chosen(tmp_path, monkeypatch):
    "A width that would be too slow was tried, and leaves no trace."
    monkeypatch.setattr(module, "unpacks", lambda device: False)
    seen, words = [], [*WORDS, "data.image_size=16"]
    def timed(config, *_):
        width, half = config.network.model_channels, config.run.precision == "bf16"
        seen.append((width, half))
        return {k: v * {8: .001, 16: .005, 32: 1.}[width] / (1.5 if half else 1.) for k, v in SPEED.step.items()}
    monkeypatch.setattr(module, "_steps_alone", timed)
    monkeypatch.setattr(module, "measure", lambda *a: SPEED._replace(step=timed(*a)))
    c = budget(make_config("tiny", words), words, 2., tmp_path / "r", STAGES, time.perf_counter(), True, True)[0]
    assert (8, False) in seen and (32, False) in seen and seen[-2:] == [(16, False), (16, True)]
    assert (c.network.model_channels, c.run.precision) == (16, "bf16")
    assert json.loads(c.run.plan)["costs"]["teacher"] == .005 / 1.5


def test_short_runs_have_small_batches(tmp_path):
    rest = [w for w in WORDS if "batch" not in w]
    def batches(minutes, *words, ours=True):
        config = make_config("tiny", [*rest, *words])
        c = budget(config, [*rest, *words], minutes, tmp_path / "r", STAGES, time.perf_counter(), ours)[0]
        return c.teacher.batch, c.distill.batch
    assert batches(2.) == (16, 16) and batches(5.) == (64, 16) and batches(30.) == (64, 32)  # tiny's student has 32
    assert batches(2., "teacher.batch=64") == (64, 16) and batches(2., ours=False) == (32, 32)


def test_an_adversary_of_few_steps_has_a_head_start_that_leaves_some_to_the_student(tmp_path):
    words = [*WORDS, "gan.batch=4"]
    def planned(*more):
        stages = [*STAGES, "ctm_dsm_gan"]
        c = make_config("digits", [*words, *more])
        return budget(c, [*words, *more], 5., tmp_path / "r", stages, time.perf_counter())[0].gan
    g = planned()
    assert 0 < g.head_start == g.steps // 3 < 200 and g.start == 0
    assert planned("gan.head_start=5").head_start == 5


def test_scores_take_a_tenth_at_most(tmp_path, monkeypatch):
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path))
    splits = open_images(make_config("digits"))
    for seconds in (5, 120, 600, 6000):
        c = make_config("digits")
        cost = _fit_scores(c, splits, SPEED, SCORES * seconds, set())
        assert cost <= 1.25 * SCORES * seconds and (c.evaluate.n == 0) == (seconds < 120)
    assert (c.evaluate.n, c.evaluate.classifier) == (5000, 60000)
    c = make_config("digits", ["evaluate.n=77"])
    _fit_scores(c, splits, SPEED, 1., {"evaluate.n"})
    assert c.evaluate.n == 77 and c.evaluate.classifier < 60000


# ---- killed

def again(folder, whole, clock):
    "The run in `folder`, with the decisions that `whole` has made."
    saved = json.loads((whole / "config.json").read_text())
    return BudgetTrainer(planned(whole, saved["run"]["minutes"]), folder, began=0., clock=clock)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "The folder of a run of two minutes, in 55 steps, 34 of the teacher; to be copied before it is changed."
    return finish(tmp_path_factory.mktemp("short") / "r", factor=lambda step: 2. + np.sin(step)).folder


@pytest.mark.parametrize("how, nfe", [(dict(solver="heun", steps=3), 5), (dict(solver="dpmpp_2m", steps=12), 12),
                                      (dict(solver="ctm", steps=2, gamma=0.), 2)])
def test_an_image_drawn_takes_all_its_evaluations(how, nfe, monkeypatch):
    "One of them is timed, with so many images that each takes no longer than in a large batch."
    seen = []
    monkeypatch.setattr(module, "_seconds", lambda work, m, n, **how: seen.append((n, how["steps"])) or 128.)
    assert module._draw_speed(SimpleNamespace(sigma_min=.002, sigma_max=80.), **how) == 2 * nfe and seen == [(64, 1)]


def test_no_level_is_looked_for_in_the_little_run(tmp_path):
    "It would take sixteen trajectories of a teacher that has learned nothing, and change no step's time."
    config = make_config("digits", [*WORDS, *recipe()])
    assert config.distill.sigma_init == "auto"
    assert module._small(config, tmp_path, open_images(config)).config.distill.sigma_init == "published"


def test_killed_and_resumed_it_is_the_same_run(tmp_path, short):
    for stop in (3, 10, 11, 25, 31, 35, 36, 41):
        t = again(tmp_path / "parts", short, Clock(lambda step: 7.))  # what a clock says no longer counts
        with Signals() as signals:
            while t.step < stop: t.advance(stop, signals)
        for _ in range(min(3, t.total - t.step)): t.train_step()  # lost
    again(tmp_path / "parts", short, Clock()).run("ctm_dsm")
    assert_same(tmp_path / "parts", short)
    plans = [json.loads((k / "config.json").read_text()) for k in (tmp_path / "parts", short)]
    assert plans[0] == plans[1]


def test_a_decision_is_kept_before_it_is_acted_upon(tmp_path):
    clock = Clock(lambda step: 2.)
    t = BudgetTrainer(planned(tmp_path / "r"), tmp_path / "r", began=0., clock=clock)
    with Signals() as signals: t.advance(t.total, signals)
    row = json.loads(json.loads((t.folder / "config.json").read_text())["run"]["plan"])["steps"][-1]
    assert row == [t.step, t.config.teacher.steps, t.config.distill.steps, 0] and newest(t.folder).step == t.step
    saved = newest(t.folder).meta["config"]["teacher"]["steps"]
    assert saved > t.config.teacher.steps  # of before the decision
    other = again(t.folder, t.folder, Clock())  # killed right after it
    assert (other.step, other.config.teacher.steps) == (t.step, t.config.teacher.steps)


def test_earlier_sittings_count(tmp_path):
    config = planned(tmp_path / "r")
    t = BudgetTrainer(config, tmp_path / "r", began=0., clock=Clock())
    with Signals() as signals: t.advance(t.total, signals)
    t.state.seconds = 60.
    t.save()
    assert again(t.folder, t.folder, Clock()).spent == 60.


# ---- longer

def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path, short):
    folder = shutil.copytree(short, tmp_path / "r")
    short = again(folder, folder, Clock())
    before, parts = short.step, {k: {n: v.clone() for n, v in short.parts[k].state_dict().items()}
                                 for k in ("teacher", "ctm")}
    config = planned(folder, 4.)
    assert config.run.before == before and config.run.minutes == 4
    t = BudgetTrainer(config, folder, began=0., clock=Clock(lambda step: 2.))
    assert (t.step, t.stage, t.begun_at) == (before, "teacher", before)
    same = lambda part, name: all(torch.equal(v, parts[name][k]) for k, v in t.parts[part].state_dict().items())
    assert same("model", "teacher") and same("ctm", "ctm")
    with Signals() as signals:
        while t.step < before + 20: t.advance(before + 20, signals)
    t = again(folder, folder, Clock(lambda step: 2.))  # interrupted
    assert same("ctm", "ctm") and t.step == before + 20 and not same("model", "teacher")
    with Signals() as signals:
        while t.stage == "teacher": t.advance(t.total, signals)
    t.train_step()
    assert t.now.name == "ctm_dsm"
    t.run("ctm_dsm")
    steps = [line["step"] for line in t.log.read()]
    assert steps == sorted(set(steps)) and max(steps) == t.step > before + 40
    assert t.spent > 15 and abs(t.spent + t.clock.now - 120) < 15  # the additional minutes
    assert planned(folder, 4.).run.plan == json.loads((folder / "config.json").read_text())["run"]["plan"]


def test_a_longer_run_that_is_killed_is_the_same_run(tmp_path, short):
    for k in ("whole", "parts"): shutil.copytree(short, tmp_path / k)
    whole = finish(tmp_path / "whole", 4., lambda step: 2. + np.sin(step))
    for stop in (whole.begun_at - 20, whole.begun_at + 3):
        t = again(tmp_path / "parts", whole.folder, Clock())
        with Signals() as signals:
            while t.step < stop: t.advance(stop, signals)
    again(tmp_path / "parts", whole.folder, Clock()).run("ctm_dsm")
    assert_same(tmp_path / "parts", tmp_path / "whole")


# ---- what can't be

def refused(*about, **more):
    with pytest.raises(ValueError) as e: planned(*about, **more)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_can_not_be_is_said_in_a_line(tmp_path):
    text = refused(tmp_path / "r", .1)
    least = float(re.search(r"at least ([\d.]+) here", text)[1])
    assert not (tmp_path / "r").exists()
    planned(tmp_path / "r", least)
    refused(tmp_path / "r", .7 * least)
    assert "teacher.steps" in refused(tmp_path / "r", 2., [*WORDS, "teacher.steps=7"])
    Trainer(make_config("tiny", WORDS), tmp_path / "plain")
    assert "without --minutes" in refused(tmp_path / "plain")
    BudgetTrainer(planned(tmp_path / "begun"), tmp_path / "begun", clock=Clock())
    assert "not finished" in refused(tmp_path / "begun", 3.)
    finish(tmp_path / "done", real=False)
    assert "at least 2" in refused(tmp_path / "done", 1.)
    assert planned(tmp_path / "done").run.minutes == 2  # nothing to do, and nothing wrong
    with pytest.raises(ValueError, match="distill.lr"):
        BudgetTrainer(planned(tmp_path / "done", 2., [*WORDS, "distill.lr=.5"]), tmp_path / "done", clock=Clock())


# ---- the command

@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def run(*words):
        try: ctm_nb_train([*map(str, words)])
        except SystemExit as e: return e.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


def test_own_pictures_get_half_an_hour_on_a_cpu(tmp_path, shell):
    for i in range(20):
        folder = tmp_path / "pics" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    code, out, err = shell("--data", "pics", "--dry-run")
    assert code == 0, err
    assert "budget    30 min" in out and "run.minutes=30" in out and "teacher.optimizer=muon" in out
    out = shell("--data", "pics", "--dry-run", "--set", "teacher.steps=50")[1]  # as ever
    assert "budget" not in out and "teacher.steps=50" in out
    assert [p.name for p in Path().iterdir()] == ["pics"]


def test_the_command_keeps_its_minutes(tmp_path, shell, monkeypatch):
    code, out, err = shell("--preset", "tiny", "--minutes", 2, "--dry-run", "--set", *WORDS)
    assert code == 0 and "budget    2 min" in out and not list(tmp_path.iterdir()), err
    assert shell("--minutes", "0")[0] == 2 and shell("--minutes", "x")[0] == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "x")
    code, _, err = shell("--preset", "tiny", "--minutes", 2)
    assert code == 2 and "one process" in err and err.count("\n") == 1
