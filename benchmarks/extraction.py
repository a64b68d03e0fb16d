"""Processor time and memory of features and of drawing on a CPU, by how many pictures a network takes at a time.

    python benchmarks/extraction.py

EfficientNet-lite0 and the classifier of `--features train` with random weights, and one jump of the emoji's student;
500 pictures, one thread, each row a process of its own. Writes nbs/results/speed/extraction.json.
"""
import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch

from ctm_nb.checkpoints.models import load
from ctm_nb.evaluation.features import LITE0, ClassifierExtractor, Extractor, TimmExtractor, at_once, keep_memory
from ctm_nb.evaluation.metrics import FeatureClassifier
from ctm_nb.method.sampling import sample

ROOT = Path(__file__).resolve().parents[1]
OUT, N = ROOT / "nbs" / "results" / "speed" / "extraction.json", 500
SIDES = {"lite0": 224, "classifier": 64, "emoji student": 32}


def job(name: str):
    "A function of numbers of pictures."
    if name == "emoji student":
        m = load(ROOT / "nbs" / "results" / "emoji" / "student.safetensors")
        return lambda ids: sample(m, ids=ids)
    net: Extractor = (TimmExtractor(timm.create_model(LITE0), name) if name == "lite0" else
                      ClassifierExtractor(FeatureClassifier(64, 3, 10)))
    x = torch.randint(0, 256, (N, 3, SIDES[name], SIDES[name]), dtype=torch.uint8)
    return torch.no_grad()(lambda ids: net.extract(x[ids]))


def spent() -> tuple[float, float]:
    "Processor seconds, all and the system's."
    u = resource.getrusage(resource.RUSAGE_SELF)
    return u.ru_utime + u.ru_stime, u.ru_stime


def row(name: str, few: int, kept: bool) -> dict:
    "One row, measured here."
    torch.set_num_threads(1)
    if kept: keep_memory()
    f = job(name)
    f(torch.arange(min(few, 16)))
    before = spent()
    for ids in torch.arange(N).split(few): f(ids)
    whole, system = (b - a for a, b in zip(before, spent()))
    return {"network": name, "side": SIDES[name], "at_once": few, "kept": kept, "ms": 1000 * whole / N,
            "system": system / whole, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    if one := p.parse_args().one: return print(json.dumps(row(one[0], int(one[1]), one[2] == "kept")))
    rows = []
    for name, side in SIDES.items():
        for few, kept in ((500, False), (500, True), (at_once(side, "cpu"), True)):
            words = [sys.executable, __file__, "--one", name, str(few), "kept" if kept else "no"]
            rows.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
            print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"processor": platform.processor() or platform.machine(), "torch": torch.__version__,
                               "rows": rows}, indent=1) + "\n")


if __name__ == "__main__": main()
