"""Between two lines of the log a GPU's step never waits for the device.

There is no GPU in continuous integration, so this looks at the operations: one that brings a number from the device to
the program, or makes a tensor whose size the device decides, may not be called within a step. `benchmarks/gpu.py` asks
CUDA itself."""
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_nb.data.augment import augment
from ctm_nb.training import optimizers
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Ahead, Trainer

WAITING = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "unique_dim",
           "_unique2", "unique_consecutive"}
ADVERSARY = ["gan.steps=8", "gan.batch=16", "gan.optimizer=adamw", "gan.features=teacher", "gan.width=8", "gan.ema=.9"]


class NobodyWaits(TorchDispatchMode):
    "Within it, an operation after which the program has waited for the device raises."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        lists = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(i.dtype in (torch.bool, torch.uint8) for i in lists):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    "Networks and optimizers take the branches that they take on a GPU, where no value is looked at to check it."
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(Ahead, "take", lambda self, step: self.make(step))  # in this thread, which is watched
    of_gpu = partial(optimizers.kernels, device=torch.device("cuda"))
    monkeypatch.setattr(optimizers, "kernels", lambda name, device: of_gpu(name))
    for name in ("torch.optim.radam", "torch.optim.adam"):
        monkeypatch.setattr(sys.modules[name], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


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


def draw_before(t, steps):
    "Make the images and random numbers of the next steps now: those are drawn by the program, which may look at them."
    t.material_of = {n: t.material_of(n) for n in range(t.step, t.step + steps)}.__getitem__


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
    with pytest.raises(AssertionError, match="waits for the device"), NobodyWaits(): t.train_step()
