"""MNIST, in two ways: the preset `mnist`, and the tutorial "your own images". Results are files that the notebooks
read.

    python benchmarks/mnist.py preset MNIST        ctm_nb_train --preset mnist --minutes 15; writes nbs/results/mnist/
    python benchmarks/mnist.py own MNIST           the four commands of the tutorial; writes nbs/results/own_images/

MNIST is the folder with the four idx.gz files (torchvision's `MNIST/raw`). Seconds are wall-clock, so nothing else
should run meanwhile; processor time is recorded beside them. `--minutes N` takes another budget, written to
nbs/results/mnist-N/. Scores of the preset are taken twice: by the command itself, and afterwards of 5,000 samples
in the features of a classifier that learned for six epochs, which takes a while the first time. `--work FOLDER`
keeps the runs and that classifier, and continues a run after an interruption.
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


def strict(run, work, n=5000):
    "Scores of a run in the features of the classifier of six epochs."
    import torch

    from ctm_nb.checkpoints.models import load
    from ctm_nb.data.batches import load_splits
    from ctm_nb.evaluation.evaluate import Evaluator, drawn_samples, run_evaluator
    from ctm_nb.evaluation.features import ClassifierExtractor
    from ctm_nb.evaluation.reference import read_reference

    file = work / "classifier6.npz"
    if not file.exists():
        run_evaluator(load_splits(work / "mnist"), most=360_000).reference.save(file)
    reference = read_reference(file)
    judge = Evaluator(reference, ClassifierExtractor(reference.net), ["fid", "pr", "acc"])
    e = json.loads((run / "config.json").read_text())["evaluate"]
    ways = {"teacher": ("teacher", {"solver": e["teacher_solver"], "steps": e["teacher_steps"]})}
    ways |= {f"{k} step{'s' * (k > 1)}": ("ctm", {"solver": "ctm", "steps": k, "gamma": 0.0}) for k in (1, 2, 4)}
    with torch.no_grad():
        samples = {k: drawn_samples(load(run, which=w), n, how, reference.label_counts) for k, (w, how) in ways.items()}
        return {k: judge.score(judge.collect(s)) for k, s in samples.items()}


def preset(work, minutes):
    "The whole command, from nothing to scores."
    name = "mnist" if minutes == 15 else f"mnist-{minutes:g}"
    done = shell(f"ctm_nb_train --preset mnist --data mnist --minutes {minutes:g} --name {name}", work)
    keep(work / "runs" / name, RESULTS / name)
    plan = json.loads(json.loads((work / "runs" / name / "config.json").read_text())["run"]["plan"])
    record = {**done, **about(), "minutes": minutes, "steps": plan["steps"]}
    record["six epochs"] = strict(work / "runs" / name, work)
    (RESULTS / name / "run.json").write_text(json.dumps(record, indent=1) + "\n")


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
    p.add_argument("--minutes", type=float, default=15, help="of the preset (default: 15)")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        work = a.work or Path(d)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "mnist").exists():
            (work / "mnist").symlink_to(a.mnist.resolve())
        own(work) if a.what == "own" else preset(work, a.minutes)


if __name__ == "__main__":
    main()
