"""The published adversary at work, small: real pictures in colour, EfficientNet-lite0's real features.

    python benchmarks/adversary.py CIFAR10 --out nbs/results/adversary

A small teacher and its student on pictures of 16 x 16, then the adversarial stage with the published discriminator.
Every so many steps the student's EMA draws in one step and in two; their Fréchet distances to training pictures in
lite0's features, the logits of real pictures and of the student's, and the weight of the adversary are written to
curve.json. The run is resumed where it was left (--runs).
"""

import argparse
import json
import time
from pathlib import Path

import torch

from ctm_nb.data.images import to_uint8
from ctm_nb.evaluation.features import load_extractor
from ctm_nb.evaluation.metrics import frechet_distance
from ctm_nb.method.sampling import sample
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

WORDS = """data.image_size=16 network.model_channels=32 network.channel_mult=1,2 network.n_blocks=1 network.attention=8
    network.dropout=0 network.augment_dim=0 teacher.augment=0 teacher.steps=1500 teacher.batch=64
    teacher.optimizer=muon teacher.lr=.02 teacher.warmup=50 teacher.decay=cosine teacher.ema=.99
    distill.steps=400 distill.batch=32 distill.optimizer=adamw distill.lr=1e-3 distill.warmup=50
    distill.solver=dpmpp_2m distill.max_evals=5 distill.N=12 distill.K=11 distill.distance=pseudo_huber
    distill.init=teacher distill.dropout=0 distill.emas= distill.ema=.99 distill.target_ema=.99
    gan.steps=400 gan.batch=16 gan.optimizer=adamw gan.lr=2e-4 gan.d_lr=2e-3 gan.features=lite0 gan.emas= gan.ema=.95
    gan.target_ema=.95 distill.balance_rows=16 gan.balance_rows=8 evaluate.n=0 run.save_every=100
    run.sample_every=1000 run.log_every=10""".split()


class Meter:
    "Distances and logits, always of the same noise, classes and training pictures."
    def __init__(self, data, n, seed=0):
        self.data, self.n, self.net = data, n, load_extractor("lite0")
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:2 * n]
        self.real, self.y = data.x0(rows), data.labels[rows]
        self.reference = self.features(self.real)

    def features(self, x):
        with torch.no_grad(): return torch.cat([self.net(to_uint8(part)).pooled for part in x.split(50)]).numpy()

    def __call__(self, t):
        y, found = self.y[:self.n], {}
        for steps in (1, 2):
            x = sample(t.parts["ctm"], self.n, steps=steps, y=y, seed=1)
            found[f"distance, {steps} step{'s' * (steps > 1)}"] = frechet_distance(self.reference, self.features(x))
            if steps == 1 and (D := t.parts.get("discriminator")):
                D.eval()
                m = min(64, self.n)
                numbers = D.draw(m, torch.Generator().manual_seed(2))
                for name, part in (("real", self.real), ("fake", x)):
                    with torch.no_grad(): logits = D(part[:m], y[:m], numbers)
                    found[f"logits, {name}"] = float(torch.cat(logits, 1).mean())
                D.train()
        return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("data", help="CIFAR-10 (folder of pictures, a class each) or others")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--runs", type=Path, default=Path("runs"))
    p.add_argument("-n", type=int, default=500, help="samples for a distance")
    p.add_argument("--every", type=int, default=40, help="steps between distances")
    p.add_argument("--set", nargs="+", default=[], help="settings for a trial")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    a.out.mkdir(parents=True, exist_ok=True)
    t = Trainer(make_config("cifar10-cond", [f"data.source={a.data}", *WORDS, *a.set]), a.runs / "adversary")
    path, meter = a.out / "curve.json", None
    curve = json.loads(path.read_text()) if path.exists() else []
    while t.step < t.total:
        t.train_step()
        if t.step % 10 == 0: t.log_window()
        if t.step % 100 == 0: t.save()
        begun = t.ends["ctm_dsm"]
        if t.step < begun or (t.step - begun) % a.every: continue
        meter = meter or Meter(t.data, a.n)
        row = {"step": t.step - begun, "seconds": time.process_time(), **meter(t)}
        curve = [r for r in curve if r["step"] != row["step"]] + [row]
        path.write_text(json.dumps(curve, indent=1) + "\n")
        print({k: round(v, 3) for k, v in row.items()}, flush=True)
    t.save()
    picture = t.sample_grid(columns=16)
    picture.save(a.out / "final.png")
    lines = [json.loads(line) for line in (t.folder / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "loss_ctm", "loss_dsm", "loss_gan", "loss_d", "lambda_gan", "lambda_dsm")
    kept = [{k: l[k] for k in wanted if k in l} for l in lines if l["stage"] == "ctm_dsm_gan"]
    (a.out / "lines.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__": main()
