"""Run the notebooks with nbdev_test, two at a time, each in a process of its own that is forked from one in which
the heavy libraries are imported already.

    python .ci/nbtest.py [NOTEBOOK ...]

As in Jupyter, what one notebook changes in torch or matplotlib can neither break another nor save it; but nobody
imports torch sixty times.
"""
import gc
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CTM_NB_HEARTBEAT"] = "0"  # what a command says must not depend on how fast a machine is
os.fsync = os.fstat  # nobody waits for the disk
AT_ONCE = 2
LONG = """02_digits 08_adversary 06_likelihood 13_editing 01_toy 08_trainer 10_budget 04_editing 03_teacher 01_metrics
    07_export 03_evaluate 01_train 01_explorer 05_stages 02_many_gpus 01_oracle 07_evaluate
    02_sample""".split()  # these come first, so that processes that share them end together

import IPython.core.interactiveshell  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import scipy.integrate  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torchvision  # noqa: F401
from nbdev.test import nbdev_test


def one(path):
    torch.manual_seed(0)  # which else is another in each process
    nbdev_test.__wrapped__(path, timing=True, do_print=True)  # leaves with 1 if the notebook fails


def main(paths):
    if missing := [p for p in paths if not Path(p).is_file()]:
        sys.exit(f"no such notebook: {', '.join(missing)}")  # nbdev_test would find nothing to do, and pass
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and need not be looked through
    fork, waiting, running, failed = multiprocessing.get_context("fork"), list(paths), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            p = fork.Process(target=one, args=(path := waiting.pop(0),))
            p.start()
            running[p.sentinel] = p, path
        for sentinel in wait(running):
            p, path = running.pop(sentinel)
            p.join()
            if p.exitcode: failed.append(f"{path} (exit code {p.exitcode})")
    gc.unfreeze()  # or libraries would report leaks
    if failed: sys.exit("notebooks failed: " + ", ".join(failed))


if __name__ == "__main__":
    started = time.time()
    root = Path(__file__).resolve().parents[1]
    os.chdir(root)
    turn = lambda path: (LONG.index(stem) if (stem := Path(path).stem) in LONG else len(LONG), path)
    main(
        sys.argv[1:]
        or sorted(
            (
                str(p.relative_to(root))
                for p in (root / "nbs").rglob("*.ipynb")
                if p.name[0] not in "_." and ".ipynb_checkpoints" not in p.parts
            ),
            key=turn,
        )
    )
    print(f"all notebooks passed, {time.time() - started:.0f} s")
