"""Between two lines of the log a GPU's step never waits for the device.

There is no GPU in continuous integration, so this looks at the operations: one that brings a number from the device to
the program, or makes a tensor whose size the device decides, may not be called within a step. `benchmarks/gpu.py` asks
CUDA itself."""
import sys
from pathlib import Path

import pytest
import torch

from ctm_nb.data.augment import augment
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import NobodyWaits, draw_before, like_a_gpu

ADVERSARY = ["gan.steps=8", "gan.batch=16", "gan.optimizer=adamw", "gan.features=teacher", "gan.width=8", "gan.ema=.9"]


@pytest.fixture(autouse=True)
def branches_of_a_gpu():
    with like_a_gpu(): yield


def trainer_of(folder, *words):
    "A run as a GPU trains it: the guard's decision is not waited for."
    t = Trainer(make_config("tiny", [*ADVERSARY, "run.log_every=1000", *words]), folder)
    t.wait = False
    return t


def at_stage(t, stage):
    "The same run where a stage begins."
    for name in list(t.plan)[1:list(t.plan).index(stage) + 1]:
        t.state.step = t.plan[name].first
        t.begin(name, t.parts)
    return t


@pytest.mark.parametrize("stage, steps", [("teacher", 1), ("ctm_dsm", 1), ("ctm_dsm_gan", 2)])
@pytest.mark.parametrize("precision, optimizer", [("fp32", "radam"), ("bf16", "adamw")])
def test_a_step_brings_no_number_to_the_program(stage, steps, precision, optimizer, tmp_path):
    words = [f"run.precision={precision}", *(f"{s}.optimizer={optimizer}" for s in ("teacher", "distill", "gan"))]
    t = at_stage(trainer_of(tmp_path / "r", *words, "teacher.augment=.5", "network.augment_dim=9",
                            "teacher.label_dropout=.2", "run.micro_batch=9"), stage)
    for _ in range(steps): t.train_step()  # the optimizer's state is made in the first step
    draw_before(t, steps)
    with NobodyWaits():
        for _ in range(steps): t.train_step()  # of the adversarial stage: the discriminator's turn and the student's


def test_the_published_adversary_brings_no_number_to_the_program(tmp_path):
    words = ["gan.discriminator=published", "gan.first=student", "run.precision=bf16", "run.micro_batch=9"]
    t = at_stage(trainer_of(tmp_path / "r", *words), "ctm_dsm_gan")
    for _ in range(2): t.train_step()
    draw_before(t, 2)
    with NobodyWaits():
        for _ in range(2): t.train_step()


@pytest.mark.parametrize("matching", ["trajectories", "eulerian"])
@pytest.mark.parametrize("anchor", ["dsm", "teacher"])
def test_a_step_of_another_objective_brings_no_number_to_the_program(matching, anchor, tmp_path):
    words = [f"distill.matching={matching}", f"distill.anchor={anchor}", "distill.N=6", "distill.K=5",
             "distill.reuse=2", "distill.optimizer=muon", "run.precision=bf16"]
    t = at_stage(trainer_of(tmp_path / "r", *words), "ctm_dsm")
    for _ in range(2): t.train_step()
    draw_before(t, 4)
    with NobodyWaits():
        for _ in range(4): t.train_step()


def test_the_augmentation_brings_no_number_to_the_program():
    with NobodyWaits(): augment(torch.rand(8, 3, 16, 16), 0, 0, .5)


@pytest.mark.parametrize("plant", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(),
                                   lambda x: bool((x > 0).all())], ids=["item", "mask", "nonzero", "bool"])
def test_a_planted_wait_is_found(plant, tmp_path, monkeypatch):
    t = trainer_of(tmp_path / "r")
    draw_before(t, 1)
    losses = t.now.losses
    monkeypatch.setattr(t.now, "losses", lambda e, n: (plant(e["x0"]), losses(e, n))[1])
    with pytest.raises(RuntimeError, match="waits for the device"), NobodyWaits(): t.train_step()
