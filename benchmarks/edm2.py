"""EDM2's network beside DDPM++ where people start: small pictures, equal processor seconds, two optimizers.

    python benchmarks/edm2.py digits --seconds 60 60 --seeds 0 1 2
    python benchmarks/edm2.py mnist --data MNIST --ref classifier6.npz --seconds 240 180 --seeds 0 1 2
    python benchmarks/edm2.py cifar --data CIFAR10 --seconds 240 180 --seeds 0 1 2

With the first seed each network tries all its optimizers for the teacher, then all rates for the student, from the best
teacher; the other seeds repeat the best. A stage gets as many steps as fit into its seconds (of the process, one
thread), by the time of forty of them. Digits and MNIST are scored in the features of their classifier, CIFAR-10 at
16 x 16 in lite0's. Results are added to nbs/results/edm2/NAME.json as they come; what is there is not computed again.
With `--lengths` the averages of other lengths of each finished run are scored instead, with `--distance` the best
students are trained again with another distance of the loss.
"""
import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from ctm_nb.checkpoints.averages import average
from ctm_nb.checkpoints.models import load
from ctm_nb.data.files import atomic_write
from ctm_nb.data.images import to_uint8
from ctm_nb.evaluation.evaluate import Evaluator, drawn_samples, run_evaluator
from ctm_nb.evaluation.features import ClassifierExtractor, load_extractor
from ctm_nb.evaluation.metrics import frechet_distance
from ctm_nb.evaluation.reference import read_reference
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer, open_images

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "edm2"
PRESET = {"digits": "digits", "mnist": "mnist", "cifar": "mnist"}
EXTRA = {"cifar": "data.image_size=16 network.attention=4 data.flip=true"}
NETWORKS = {"ddpmpp": "network.family=ddpmpp",
            "edm2": "network.family=edm2 network.channels_per_head=16 teacher.weighting=uncertainty"}
WIDTH = {"digits": {"ddpmpp": 16, "edm2": 16}, "mnist": {"ddpmpp": 16, "edm2": 16}, "cifar": {"ddpmpp": 24, "edm2": 24}}
TEACHERS = {"ddpmpp": [("adamw", 4e-3), ("muon", .02)], "edm2": [("adamw", .1), ("muon", .2)]}
STUDENTS = {"ddpmpp": [("adamw", 1.6e-3), ("muon", .02)], "edm2": [("adamw", .03), ("muon", .06), ("muon", .2)]}
STAGE = """distill.phases=trajectories:.6,soft:.4 distill.anchor_rows=none distill.sigma_init=published
    distill.distance=pseudo_huber distill.stored=3008 gan.steps=0
    run.save_every=1000000 run.log_every=1000000 run.sample_every=1000000 evaluate.n=0"""
LENGTHS = (.02, .04, .06, .09, .13, .2)
WAYS = {"teacher": dict(solver="dpmpp_2m", steps=12), **{f"{k} steps": dict(solver="ctm", steps=k) for k in (1, 2, 4)}}
TRIAL = 40


def stage(section, optimizer, rate, steps):
    "Settings of a stage of so many steps: a tenth of them to warm up, averages that have forgotten the first ones."
    memory = round(1 - 10 / max(steps, 20), 5)
    words = f"optimizer={optimizer} lr={rate} steps={steps} warmup={steps // 10} ema={memory} profiles=.05,.1"
    own = "decay=cosine batch=64" if section == "teacher" else f"decay=linear batch=64 target_ema={min(.99, memory)}"
    return [f"{section}.{w}" for w in f"{words} {own}".split()]


def trained(preset, shared, section, choice, seconds, folder):
    "A stage of so many seconds, begun or continued; its steps and what they took."
    def plan(steps): return make_config(preset, [*shared, *stage(section, *choice, steps=steps)])
    if not (folder / "config.json").exists():
        trial = Trainer(plan(TRIAL), folder.with_name("trial"))
        started = time.process_time()
        while trial.step < trial.total: trial.train_step()
        steps = max(60, round(seconds * TRIAL / (time.process_time() - started)))
        shutil.rmtree(trial.folder, ignore_errors=True)
    else: steps = json.loads((folder / "config.json").read_text())[section]["steps"]
    t, started = Trainer(plan(steps), folder), time.process_time()
    t.run()  # snapshots of the averages too
    count = sum(p.numel() for p in t.parts["ctm" if section == "distill" else "teacher"].parameters())
    return dict(steps=steps, seconds=round(time.process_time() - started, 1), weights=count)


class Meter:
    "Distance of samples to pictures, in the features of a classifier or of lite0."
    def __init__(self, config, n, ref):
        self.n, self.data = n, open_images(config)
        if config.data.image_size == 16:
            real = self.data["train"]
            self.net, self.counts = load_extractor("lite0"), [n // len(real.classes)] * len(real.classes)
            rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:2 * n]
            self.real = self.features(to_uint8(real.x0(rows)))
            return
        self.net = None
        known = read_reference(ref) if ref else None
        self.judge = (Evaluator(known, ClassifierExtractor(known.net)) if known else
                      run_evaluator(self.data, keep=True))
        self.counts, self.judge.metrics = self.judge.reference.label_counts, ["fid"]

    def features(self, images):
        with torch.no_grad(): return torch.cat([self.net(part).pooled for part in images.split(50)]).numpy()

    def __call__(self, model, how, seed):
        drawn = drawn_samples(model, self.n, how, self.counts, seed + 1)
        if self.net is None: return self.judge.score(self.judge.collect(drawn))["frechet_distance"]
        images = torch.cat([x for x, _ in drawn.batches()])
        return frechet_distance(self.real, self.features(images))


def best(rows, network, what):
    "Optimizer and rate with the least distance of the first seed: of the teacher, or of the student in one step."
    kind = "teacher" if what == "teacher" else "1 steps"
    mine = [r for r in rows if (r["network"], r["what"]) == (network, what) and kind in r["distance"]]
    first = [r for r in mine if r["seed"] == min(r["seed"] for r in mine)]
    r = min(first, key=lambda r: r["distance"][kind])
    return r["optimizer"], r["lr"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=list(PRESET))
    p.add_argument("--data", help="images, for all but the digits")
    p.add_argument("--ref", type=Path, help="a reference with its classifier")
    p.add_argument("--seconds", type=float, nargs=2, default=[60, 60], metavar=("TEACHER", "STUDENT"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--lengths", nargs="+", default=[], choices=list(NETWORKS), help="score averages of these networks")
    p.add_argument("--distance", default="", help="train the best students with it, e.g. features")
    p.add_argument("--runs", type=Path, default=Path("runs/edm2"))
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("-n", type=int, default=2000, help="samples a distance")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    what = "-lengths" if a.lengths else f"-{a.distance}" if a.distance else ""
    out, preset = a.out / f"{a.name}{what}.json", PRESET[a.name]
    rows = json.loads(out.read_text()) if out.exists() else []
    common = [*STAGE.split(), *EXTRA.get(a.name, "").split(), *([f"data.source={a.data}"] if a.data else [])]
    meter = None

    def distances(run, seed, which, ways):
        nonlocal meter
        meter = meter or Meter(make_config(preset, common), a.n, a.ref)
        with torch.no_grad(): return {k: round(meter(which(run), WAYS[k], seed), 3) for k in ways}

    def once(key, make):
        if any(all(r.get(k) == v for k, v in key.items()) for r in rows): return
        rows.append(key | make())
        print(rows[-1], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, (json.dumps(rows, indent=1) + "\n").encode())

    if a.lengths: fill_lengths(a, once, distances)
    elif a.distance: fill_distance(a, preset, common, once, distances)
    else: fill(a, preset, common, rows, once, distances)


def run_of(a, seed, network, what, choice):
    return a.runs / a.name / f"{network}-{seed}-{what}-{choice[0]}-{choice[1]:g}"


def fill(a, preset, common, rows, once, distances):
    "Teachers, then students, seed by seed."
    for seed in a.seeds:
        for network, words in NETWORKS.items():
            shared = [*common, *words.split(), f"network.model_channels={WIDTH[a.name][network]}", f"run.seed={seed}"]
            teacher = None
            for what, choices, seconds in (("teacher", TEACHERS, a.seconds[0]), ("distill", STUDENTS, a.seconds[1])):
                first = seed == min(a.seeds)
                for choice in choices[network] if first else [best(rows, network, what)]:
                    run = run_of(a, seed, network, what, choice)
                    key = dict(network=network, what=what, seed=seed, optimizer=choice[0], lr=choice[1], budget=seconds)
                    own = ["distill.steps=0"] if what == "teacher" else [f"teacher.source={teacher}"]
                    ways = ["teacher"] if what == "teacher" else ["1 steps", "2 steps", "4 steps"]
                    which = lambda run, w="teacher" if what == "teacher" else "ctm": load(run, which=w)
                    def make():
                        try: spent = trained(preset, [*shared, *own], what, choice, seconds, run)
                        except (FloatingPointError, RuntimeError) as e: return dict(distance={}, failed=str(e)[:200])
                        return {**spent, "distance": distances(run, seed, which, ways)}
                    once(key, make)
                teacher = run_of(a, seed, network, what, best(rows, network, what))


def fill_distance(a, preset, common, once, distances):
    "The best student of each network, with another distance of the loss."
    done = json.loads((a.out / f"{a.name}.json").read_text())
    for seed in a.seeds:
        for network, words in NETWORKS.items():
            shared = [*common, *words.split(), f"network.model_channels={WIDTH[a.name][network]}", f"run.seed={seed}"]
            teacher = run_of(a, seed, network, "teacher", best(done, network, "teacher"))
            choice = best(done, network, "distill")
            run = run_of(a, seed, network, f"distill-{a.distance}", choice)
            key = dict(network=network, what="distill", seed=seed, optimizer=choice[0], lr=choice[1],
                       budget=a.seconds[1], loss=a.distance)
            own = [*shared, f"teacher.source={teacher}", f"distill.distance={a.distance}"]

            def make(own=own, choice=choice, run=run):
                spent = trained(preset, own, "distill", choice, a.seconds[1], run)
                kinds = ["1 steps", "2 steps", "4 steps"]
                return {**spent, "distance": distances(run, seed, lambda r: load(r, which="ctm"), kinds)}
            once(key, make)


def fill_lengths(a, once, distances):
    "The best teacher and student of every seed, at other lengths of their averages."
    done = json.loads((a.out / f"{a.name}.json").read_text())
    for seed in a.seeds:
        for network in a.lengths:
            for what, who, ways in (("teacher", "teacher", ["teacher"]), ("distill", "ctm", ["1 steps", "2 steps"])):
                run = run_of(a, seed, network, what, best(done, network, what))
                for length in (None, *LENGTHS):  # None: the EMA at a fixed rate
                    which = lambda run, s=length: average(run, s, who) if s else load(run, which=who)
                    key = dict(network=network, what=what, seed=seed, length=length)
                    once(key, lambda: dict(distance=distances(run, seed, which, ways)))


if __name__ == "__main__": main()
