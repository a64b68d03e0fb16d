"""The command's processes run with one thread and flush denormal numbers; so must tests that compare with them."""
import pytest
import torch
from runs import compute_alike


@pytest.fixture(autouse=True)
def as_the_command_computes():
    n = torch.get_num_threads()
    compute_alike()
    yield
    torch.set_num_threads(n)
    torch.set_flush_denormal(False)
