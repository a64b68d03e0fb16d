"""Time of each score, features given: 50,000 samples of 2048 features against 10,000 reference points.

    python benchmarks/metrics.py
        the full size (minutes to tens of minutes on two cores; nothing else should run)
    python benchmarks/metrics.py --n 5000 --reference 1000          a smaller one

Features are random with a decaying spectrum, which costs the same as real ones. Each size writes its own JSON under
nbs/results/metrics/, after each score, with the load of the machine at start and end, so that a measurement on a
busy machine can be told from one on an idle machine.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from ctm_nb.evaluation.metrics import FeatureStats, frechet_gaussians, inception_score, precision_recall
from ctm_nb.evaluation.metrics import kernel_distance

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "metrics"


def features(n, d, seed):
    "Random features of variance 1/k in direction k, float32."
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1) ** -0.5


def statistics(f, batch=500):
    "Mean and covariance as the evaluation gathers them, a batch at a time."
    stats = FeatureStats(f.shape[1])
    for b in f.split(batch):
        stats.update(b)
    return stats


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=50000, help="samples")
    p.add_argument("--reference", type=int, default=10000, help="reference points for precision and its relatives")
    p.add_argument("--dim", type=int, default=2048, help="features")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    p.add_argument("--device", default="cpu", help="for pairs of points")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    load, seconds = os.getloadavg()[0], {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{a.n}x{a.reference}x{a.dim}_{a.device}.json"
    conditions = {
        "samples": a.n,
        "reference": a.reference,
        "features": a.dim,
        "device": a.device,
        "threads": a.threads,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    samples, reference = features(a.n, a.dim, 0), features(a.reference, a.dim, 1)
    r = statistics(reference)

    def timed(name, call):
        start = time.perf_counter()
        out = call()
        if a.device != "cpu":
            torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - start, 2)
        print(f"{name:34} {seconds[name]:9.2f} s", flush=True)
        path.write_text(
            json.dumps(
                {**conditions, "load_average": [round(load, 1), round(os.getloadavg()[0], 1)], "seconds": seconds},
                indent=1,
            )
            + "\n"
        )
        return out

    s = timed("mean and covariance", lambda: statistics(samples))
    timed("Frechet distance from these", lambda: frechet_gaussians(r.mean, r.cov, s.mean, s.cov))
    probs = torch.softmax(torch.randn(a.n, 1008, generator=torch.Generator().manual_seed(2)).double(), 1)
    timed("inception score, 1008 classes", lambda probs=probs: inception_score(probs, max(1, a.n // 5000)))
    del probs
    samples, reference = samples.to(a.device), reference.to(a.device)
    timed("kernel distance, 100 subsets", lambda: kernel_distance(reference, samples))
    timed("precision and recall", lambda: precision_recall(reference, samples))


if __name__ == "__main__":
    main()
