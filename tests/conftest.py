"""What tests of several rooms start from."""
import atexit
import gc
import os
import sys

import pytest

os.environ["CTM_NB_HEARTBEAT"] = "0"  # what a command says must not depend on how fast a machine is
os.fsync = os.fstat  # tests kill processes and no machines; so nobody waits for the disk (benchmarks/crash.py does)

LONG = """test_gpu_script test_processes test_export test_hostile test_resume test_trainer test_budget test_matchings
    test_profiles test_forced test_adversarial_runs test_finetune test_likelihood test_other_systems test_features
    test_sample test_batches test_foreign test_first_steps test_docker test_two_at_once test_archives test_adversary
    test_models test_published test_trackers test_train test_sync test_catalogue test_evaluate test_site test_ranks
    test_outputs test_class_names test_cases""".split()


def pytest_collection_modifyitems(items):
    "Files that take long come first, so that processes that share them end together (--no-loadscope-reorder)."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_collection():
    "Nothing that is imported meanwhile is garbage; then, with pytest's own handlers gone, others are forked from it."
    gc.disable()
    yield
    gc.enable()
    if "warm" in sys.modules: sys.modules["warm"].begin()


def pytest_collection_finish():
    "A trainer looks for garbage at every stage; half of its time went into looking through what was imported."
    if "torch" not in sys.modules: return
    import torch._dynamo  # noqa: F401  # the first optimizer would
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_others_imported_is_no_garbage():
    "Nor what the tests of other files have made."
    gc.collect()
    gc.freeze()


atexit.register(gc.unfreeze)  # or libraries would report leaks at the end


@pytest.fixture(autouse=True)
def seeded():
    "torch's numbers, which else are others in each process."
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def untrained_run():
    "A function of folder, channels, classes and network that writes a run with an untrained teacher and student."
    import torch

    from ctm_nb.checkpoints.models import describe
    from ctm_nb.checkpoints.store import save_checkpoint
    from ctm_nb.method.teacher import Denoiser
    from ctm_nb.method.trajectory import student_from
    from ctm_nb.networks.unet import DDPMpp, init_

    def write(folder, channels, classes, **network):
        torch.manual_seed(0)
        small = dict(model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=())
        net = DDPMpp(8, channels, len(classes), **small | network)
        teacher = Denoiser(net)
        init_(teacher.net.out_layers[1], 1.)
        models = {"teacher": teacher, "ctm": student_from(teacher)}
        meta = {"models": {k: {"part": k, "description": describe(m, list(classes))} for k, m in models.items()}}
        save_checkpoint(folder / "checkpoints", 1, {k: m.state_dict() for k, m in models.items()}, {}, meta)
        return folder

    return write
