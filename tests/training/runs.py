"""What the tests of training share: the command, how it computes, and comparisons of runs bit for bit."""
from functools import partial

import torch
from warm import python

from ctm_nb.checkpoints.store import load_checkpoint

ONE_LEVEL = "network.channel_mult=1"  # half a network, where nothing depends on what else is in it
TRAIN = "from ctm_nb.commands.train import ctm_nb_train; ctm_nb_train()", "--preset", "tiny"
command = partial(python, *TRAIN)


def compute_alike():
    "As in the processes of the command: one thread, denormal numbers flushed."
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def newest(folder):
    return load_checkpoint(sorted((folder / "checkpoints").glob("step_*"))[-1])


def assert_same(a, b):
    "Networks and optimizers of the newest checkpoints, bit for bit."
    a, b = newest(a), newest(b)
    assert a.step == b.step and a.models.keys() == b.models.keys()
    for part in a.models:
        for k, v in a.models[part].items(): assert torch.equal(v, b.models[part][k]), (part, k)
    mine, theirs = a.state["optimizers"], b.state["optimizers"]
    assert mine.keys() == theirs.keys()
    for who in mine:
        for k, v in mine[who]["state"].items():
            for name, t in v.items():
                assert torch.equal(torch.as_tensor(t), torch.as_tensor(theirs[who]["state"][k][name])), (who, k, name)
