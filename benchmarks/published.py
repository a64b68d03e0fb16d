"""What rows of the published recipe do to the digits: one change at a time, the same teacher, the same steps.

    python benchmarks/published.py --seeds 0 1 2
    python benchmarks/published.py --time

Each seed trains a teacher, then a student for each row. The last rows take no teacher, for as long as teacher and
student by soft matching took together. A result is kept in nbs/results/digits/published.json when it is there.
With --time, steps of a small twin of cifar10 are timed in turn, on emoji, as it is and without each of its rows.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from digits import SOFT

from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "digits" / "published.json"
PLAIN, ADVERSARY = [*SOFT, "gan.steps=0"], SOFT
ROWS = {
    "soft matching": PLAIN,
    "EMAs at a fixed rate": [*PLAIN, "distill.ema_warmup=false"],
    "EMAs at a fixed rate of .999": [*PLAIN, "distill.ema_warmup=false", "distill.ema=.999", "distill.target_ema=.999"],
    "mirror images": [*PLAIN, "data.flip=true"],
    "dropout .13": [*PLAIN, "distill.dropout=.13"],
    "weights of 16 images": [*PLAIN, "distill.balance_rows=16"],
    "adversary, from the EMA": ADVERSARY,
    "adversary, from the raw student": [*ADVERSARY, "gan.init=raw"],
}
ALONE = {"no teacher, half denoising": "dsm:.5,soft:.5", "no teacher, a quarter denoising": "dsm:.25,soft:.75"}


def trained(folder, *words):
    "A run to its end: seconds of one thread and the Fréchet distances of its samplers."
    started = time.process_time()
    t = Trainer(make_config("digits", words), folder)
    while t.step < t.total: t.train_step()
    seconds = time.process_time() - started
    t.save()
    records = t.evaluate()
    of = lambda s: f"{s['steps']} step{'s' * (s['steps'] > 1)}" if s["solver"] == "ctm" else "denoiser"
    scored = [r for r in records if r["metric"] == "frechet_distance" and r["sampler"]]
    return seconds, {of(r["sampler"]): r["value"] for r in scored}


def of_seed(seed, done, small):
    "Every row that is not done yet."
    with tempfile.TemporaryDirectory() as d:
        short = [f"run.seed={seed}", *small]
        teacher = Trainer(make_config("digits", [*short, "distill.steps=0", "gan.steps=0"]), Path(d) / "teacher")
        started = time.process_time()
        while teacher.step < teacher.total: teacher.train_step()
        both = time.process_time() - started
        teacher.save()
        for name, words in ROWS.items():
            if (name, seed) in done: both += (name == "soft matching") * done[name, seed]["seconds"]
            else:
                source = f"teacher.source={teacher.folder}"
                seconds, scores = trained(Path(d) / name.replace(" ", "_"), *short, source, *words)
                both += (name == "soft matching") * seconds
                yield {"row": name, "words": words, "seed": seed, "seconds": seconds, "scores": scores}
        for name, phases in ALONE.items():
            if (name, seed) in done: continue
            words = [*SOFT, "teacher.source=none", "gan.steps=0", f"distill.phases={phases}"]
            with tempfile.TemporaryDirectory() as trial:  # how many steps there is time for
                n = 40
                probe = Trainer(make_config("digits", [*short, *words, f"distill.steps={n}"]), trial)
                started = time.process_time()
                while probe.step < n: probe.train_step()
                each = (time.process_time() - started) / n
            words += [f"distill.steps={max(n, int(both / each))}"]
            seconds, scores = trained(Path(d) / name.replace(" ", "_"), *short, *words)
            yield {"row": name, "words": words, "seed": seed, "seconds": seconds, "scores": scores, "both": both}


TWIN = """data.source=emoji network.model_channels=32 network.channel_mult=1,2 network.n_blocks=1 network.dropout=0
    network.augment_dim=0 teacher.augment=0 teacher.steps=1 teacher.batch=16 distill.batch=32 distill.distance=l2
    distill.emas= gan.emas= gan.batch=22 gan.features=lite0 evaluate.n=0 run.save_every=1000000
    run.log_every=1000000""".split()
WITHOUT = {
    "as published": [],
    "without mirror images": ["data.flip=false"],
    "without dropout": ["distill.dropout=0"],
    "weights of the whole batch": ["distill.balance_rows=none"],
    "without all three": ["data.flip=false", "distill.dropout=0", "distill.balance_rows=none"],
    "with the adversary": ["distill.steps=1"],
}


def step_times(rounds=10):
    "Median processor seconds of a step of the twin, the variants in turn; with the adversary, of two turns."
    with tempfile.TemporaryDirectory() as d:
        runs = {name: Trainer(make_config("cifar10-cond", [*TWIN, *words]), Path(d) / str(k))
                for k, (name, words) in enumerate(WITHOUT.items())}
        times = {name: [] for name in runs}
        for n in range(rounds + 2):
            for name, t in runs.items():
                while t.step < 2: t.train_step()
                started = time.process_time()
                for _ in range(2): t.train_step()
                if n > 1: times[name].append((time.process_time() - started) / 2)
    return {name: {"median": median(v), "quartiles": quantiles(v, n=4)[::2]} for name, v in times.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--time", action="store_true", help="time steps of the twin")
    p.add_argument("--rounds", type=int, default=10, help="of --time")
    p.add_argument("--set", nargs="+", default=[], help="settings for a trial, e.g. teacher.steps=5")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if a.time:
        found = step_times(a.rounds)
        a.out.with_name("published_times.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, row in found.items(): print(f"{name:28} {row['median']:.3f} s")
        return
    found = json.loads(a.out.read_text()) if a.out.exists() else []
    for seed in a.seeds:
        for record in of_seed(seed, {(r["row"], r["seed"]): r for r in found}, a.set):
            found.append(record)
            a.out.write_text(json.dumps(found, indent=1) + "\n")
            print(record["row"], seed, {k: round(v, 2) for k, v in record["scores"].items()})


if __name__ == "__main__": main()
