"""MNIST, in two ways: the preset `mnist`, and the tutorial "your own images". Results are files that the notebooks
read.

    python benchmarks/mnist.py preset MNIST        ctm_nb_train --preset mnist; writes nbs/results/mnist/
    python benchmarks/mnist.py own MNIST           the four commands of the tutorial; writes nbs/results/own_images/

MNIST is the folder with the four idx.gz files (torchvision's `MNIST/raw`). Seconds are wall-clock, so nothing else
should run meanwhile; processor time is recorded beside them. `--work FOLDER` keeps the runs, and continues them
after an interruption.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from digits import hardware

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results"
OWN = [
    "ctm_nb_data convert mnist pictures --split held_out",
    "ctm_nb_data inspect pictures --sheet sheet.png",
    "ctm_nb_data convert pictures pictures16.zip --size 16 --crop box",
    "ctm_nb_train --data pictures16.zip",
    "ctm_nb_sample runs/pictures16 -n 100 --out grid.png",
]
KEPT = ("scores.json", "metrics.jsonl", "samples/final.png")


def shell(words, work):
    "Run a command as it would be typed in a folder; what it said, and what it took."
    command, *rest = words.split()
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command)), *rest], cwd=work, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{words} failed:\n{done.stdout}{done.stderr}")
    said = "\n".join(l for l in done.stderr.splitlines() if re.match(r"(auto|teacher|ctm_dsm): ", l))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"$ {words}\n{said}\n{done.stdout}({time.perf_counter() - started:.0f} s)", flush=True)
    return {
        "command": words,
        "output": f"{said}\n{done.stdout}".strip(),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(cpu, 1),
    }


def about():
    import torch

    return {
        "hardware": hardware(),
        "load": f"load average {os.getloadavg()[2]:.1f} over the last quarter of an hour",
        "torch": torch.__version__,
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
    }


def keep(run, out):
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(run / name, out / Path(name).name)


def preset(work):
    "The whole command, from nothing to scores."
    done = shell("ctm_nb_train --preset mnist --data mnist", work)
    keep(work / "runs" / "mnist", RESULTS / "mnist")
    (RESULTS / "mnist" / "run.json").write_text(json.dumps({**done, **about()}, indent=1) + "\n")


def own(work):
    "A folder of pictures, and what the commands make of it."
    done = [shell(words, work) for words in OWN]
    keep(work / "runs" / "pictures16", RESULTS / "own_images")
    for name in ("sheet.png", "grid.png"):
        shutil.copy(work / name, RESULTS / "own_images" / name)
    (RESULTS / "own_images" / "record.json").write_text(json.dumps({**about(), "commands": done}, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["preset", "own"])
    p.add_argument("mnist", type=Path, metavar="MNIST")
    p.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        work = a.work or Path(d)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "mnist").exists():
            (work / "mnist").symlink_to(a.mnist.resolve())
        {"preset": preset, "own": own}[a.what](work)


if __name__ == "__main__":
    main()
