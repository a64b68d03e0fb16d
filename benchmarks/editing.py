"""What editing through the trajectory keeps, costs and loses. Results are JSON files that the notebooks read.

    python benchmarks/editing.py digits --run runs/digits
        200 held-out digits; without a run there, the preset trains one first (two to five minutes)
    python benchmarks/editing.py emoji --teacher runs/emoji
        200 held-out emoji with the student of the clone; the teacher's rows need the run of the preset `emoji`

Each part is a file under nbs/results/editing/ and is not measured again while it is there.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from digits import hardware
from scipy.ndimage import median_filter

from ctm_nb.checkpoints.models import load
from ctm_nb.data.batches import load_data
from ctm_nb.data.images import to_uint8
from ctm_nb.evaluation.metrics import train_classifier
from ctm_nb.method import editing as e
from ctm_nb.method.flow import noise, rho_grid
from ctm_nb.method.solvers import nfe, solve

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "editing"
EMOJI = RESULTS.parent / "emoji" / "student.safetensors"
SEEDS, GAMMAS, JUMPS, LEVEL = (0, 1, 2), (0.0, 0.3, 0.6, 1.0), 4, 3.0
TRUE = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Ends:
    "A consistency model's view of a student: it can only be asked where a trajectory ends."

    def __init__(self, m):
        self.m, self.sigma_min, self.n_classes = m, m.sigma_min, m.n_classes

    def g(self, x, t, s, y=None):
        return self.m.g(x, t, self.sigma_min, y)

    def D(self, x, t, y=None):
        return self.m.g(x, t, self.sigma_min, y)


def in_parts(m, size=32):
    "The same model, a few pictures at a time, which a small cache likes better."

    def wrap(f):
        def parts(x, *rest):
            rows = lambda a: a.split(size) if isinstance(a, torch.Tensor) and a.ndim else [a] * math.ceil(len(x) / size)
            return torch.cat([f(*p) for p in zip(x.split(size), *map(rows, rest))])

        return parts

    for name in ("D", "g", "G"):
        if hasattr(m, name):
            setattr(m, name, wrap(getattr(m, name)))
    return m


class Bench:
    "A student, its teacher (or None), held-out pictures and a classifier that scores."

    def __init__(self, name, student, teacher, n):
        self.name, self.student = name, in_parts(load(student, which="ctm"))
        self.teacher = in_parts(load(teacher, which="teacher")) if teacher else None
        data = load_data(name, "held_out")
        rows = torch.arange(n) * len(data) // n
        self.x0, self.y, self.classes = data.x0(rows), data.labels[rows], data.classes
        with torch.enable_grad():
            self.classifier = train_classifier(load_data(name, "train"))
        features = lambda x: self.classifier.pool(self.classifier.body(to_uint8(x).float() / 127.5 - 1))
        true = features(self.x0)
        self.distance = lambda x: (features(x) - true).norm(dim=1).mean().item()

    def classes_of(self, x):
        return self.classifier(to_uint8(x).float() / 127.5 - 1).argmax(1)

    def kept(self, x):
        return (self.classes_of(x) == self.y).float().mean().item()

    def draw(self, seed):
        return lambda i: noise(tuple(self.x0.shape[1:]), seed, range(len(self.x0)), draw=i)

    def tasks(self):
        "name -> (P, first picture, what is seen of a picture); P is None where nothing is kept."
        x0, size, made = self.x0, self.x0.shape[2], {}
        for name, rows in {
            "lower half": slice(size // 2),
            "upper half": slice(size // 2, None),
            "every other row": slice(None, None, 2),
        }.items():
            mask = torch.zeros(1, 1, size, size)
            mask[:, :, rows] = 1
            see = partial(torch.mul, mask)
            made[f"inpaint, {name} hidden"] = e.put_pixels(x0, mask), see(x0), see
        see, luma = partial(torch.nn.functional.avg_pool2d, kernel_size=2), torch.tensor(e.LUMA).view(3, 1, 1)
        enlarged = torch.nn.functional.interpolate(see(x0), size)
        made[f"upscale, {size // 2} to {size}"] = e.put_means(see(x0), 2), enlarged, see
        if x0.shape[1] == 3:
            see = lambda x: (x * luma).sum(1, keepdim=True)
            made["colour"] = e.put_brightness(see(x0)), see(x0).expand_as(x0), see
        rough = torch.nn.functional.avg_pool2d(x0, 3, 1, 1)  # blurred, then four tones: a sketch
        made["stroke"] = None, ((rough + 1) * 1.5).round() / 1.5 - 1, None
        return made

    def made(self, m, put, first, level, steps, seed=0, y=None, **how):
        "Pictures in [-1, 1] by `steps` jumps from a level."
        times, same = rho_grid(steps + 1, self.student.sigma_min, level), lambda g: g
        x = e.complete(m, put or same, first, times, self.draw(seed), self.y if y is None else y, **how)
        return e.agree(x, put) if put else x.clamp(-1, 1)


def rmse(a, b, weight=None):
    square = (a - b) ** 2 * (torch.ones_like(a) if weight is None else weight)
    return math.sqrt(square.sum() / (torch.ones_like(a) * (1 if weight is None else weight)).sum())


def settings(task):
    "Level and jumps: the defaults of `ctm_nb_sample --edit`."
    how = e.TASKS[task.split(",")[0]]
    return how["level"] or 80.0, how["steps"]


def one(b, task, method, found):
    "One task by one method, the class told or found."
    (put, first, see), m = b.tasks()[task], {"student": b.student, "teacher": b.teacher}.get(method, Ends(b.student))
    begin, y, (level, steps) = time.process_time(), b.y, settings(task)
    if found:
        y = e.likeliest_class(m, put or (lambda g: first), first, b.draw(1))
    if method == "teacher":  # 35 evaluations, as `sample` makes them
        times = torch.cat([rho_grid(18, b.student.sigma_min, level), torch.zeros(1)])
        x, cost = e.complete(m, put or (lambda g: g), first, times, b.draw(0), y, "heun"), nfe("heun", times)
        x = e.agree(x, put) if put else x.clamp(-1, 1)
    else:
        x, cost = b.made(m, put, first, level, steps, y=y, gamma=1.0 if method == "consistency" else 0.6), steps
    ms, pixels = 1000 * (time.process_time() - begin) / len(x), to_uint8(x).float() / 127.5 - 1
    row = {
        "task": task,
        "method": method,
        "class": "found" if found else "given",
        "class kept": b.kept(x),
        "class found": (y == b.y).float().mean().item(),
        "error": rmse(x, b.x0),
        "distance": b.distance(x),
        "NFE": cost + found * 16 * b.student.n_classes,
        "ms": ms,
        "n": len(x),
    }
    if task.startswith("inpaint"):
        row["error hidden"] = rmse(x, b.x0, 1 - see(torch.ones_like(x)))
    if see:
        row["error known"] = (see(pixels) - see(b.x0)).abs().max().item() / 2  # in the bytes that are written
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def task_rows(b, find):
    "Each task by each method, the class given and (with `find`) found."
    methods = ["student", "consistency", *(["teacher"] if b.teacher else [])]
    for task, method, found in product(b.tasks(), methods, (False, True)):
        if not found or task in find:
            yield one(b, task, method, found)


def settings_rows(b, seeds):
    "What the number of jumps and the level they start from are good for, by the student."
    for task, (put, first, _) in b.tasks().items():
        if "upper" in task or "every" in task:
            continue
        for level, steps in product((1.0, 2.0, 3.0, 80.0), (1, 2, 4, 8)):
            found = []
            for seed in seeds:
                x = b.made(b.student, put, first, level, steps, seed, gamma=0.6)
                found.append((b.kept(x), rmse(x, b.x0), b.distance(x)))
            means = dict(zip(("class kept", "error", "distance"), map(statistics.mean, zip(*found))))
            print(task, level, steps, means, flush=True)
            yield {"task": task, "level": level, "jumps": steps, **means, "n": len(b.x0), "seeds": len(seeds)}


def round_trips(b, evaluations):
    "RMSE of a picture to its latent and back over the evaluations of one way."
    for steps in evaluations:
        for name, m, solver in (
            ("teacher, 2M", b.teacher, "dpmpp_2m"),
            ("teacher, Heun", b.teacher, "heun"),
            ("student's denoiser, 2M", b.student, "dpmpp_2m"),
        ):
            if m is None:
                continue
            times = rho_grid(steps // (2 if solver == "heun" else 1) + 1, m.sigma_min, m.sigma_max)
            z = e.encode(m, b.x0, times, b.y, solver)
            yield {
                "by": name,
                "NFE up": steps,
                "NFE down": steps,
                "rmse": rmse(solve(m.D, z, times, b.y, solver), b.x0),
            }
            if m is not b.teacher or solver == "dpmpp_2m":
                yield {
                    "by": name + ", back by the student's jump",
                    "NFE up": steps,
                    "NFE down": 1,
                    "rmse": rmse(b.student.G(z, m.sigma_max, m.sigma_min, b.y), b.x0),
                }


def freedom(b):
    "Item by item: how much fresh noise, and whether the network is told where it lands."
    for task, (put, first, _) in b.tasks().items():
        if put is None or "upper" in task:
            continue
        for gamma in GAMMAS:
            for s, m in (("midway", b.student), ("0", Ends(b.student))):
                found = []
                for seed in SEEDS:
                    x = b.made(m, put, first, LEVEL, JUMPS, seed, gamma=gamma)
                    found.append((b.kept(x), rmse(x, b.x0), b.distance(x)))
                columns = dict(zip(("class kept", "error", "distance"), zip(*found)))
                yield {
                    "task": task,
                    "gamma": gamma,
                    "s": s,
                    "NFE": JUMPS,
                    **{k: {"mean": statistics.mean(v), "deviation": statistics.stdev(v)} for k, v in columns.items()},
                }


def bilateral(x, sigma, reach=1):
    "Every pixel the mean of its neighbours, weighted by nearness in place and in value; x (n, C, H, W)."
    padded, total, weights = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge"), 0, 0
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            shifted = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            w = np.exp(-((i - reach) ** 2 + (j - reach) ** 2) / 2 - (shifted - x) ** 2 / (2 * (3 * sigma) ** 2))
            total, weights = total + w * shifted, weights + w
    return total / weights


def denoising(b, n):
    "The level found against the true one, PSNR (of pictures whose range is 2) and class kept by several denoisers."
    b.x0, b.y = b.x0[:: max(1, len(b.x0) // n)][:n], b.y[:: max(1, len(b.y) // n)][:n]
    psnr = lambda x: 20 * math.log10(2 / rmse(torch.as_tensor(np.asarray(x)).float().clamp(-1, 1), b.x0))
    for true in TRUE:
        x, n = b.x0 + true * b.draw(7)(0), len(b.x0)
        begin = time.process_time()
        t, y = e.noise_level(b.student, x, b.draw(8))
        ms = 1000 * (time.process_time() - begin) / n
        log = (t / true).log()
        row = {
            "true": true,
            "median": t.median().item(),
            "relative error": log.pow(2).mean().sqrt().item(),
            "ms": ms,
            "low": t.quantile(0.1).item(),
            "high": t.quantile(0.9).item(),
            "class found": (y == b.y).float().mean().item(),
            "n": n,
            "NFE": 48 * b.student.n_classes + 1,
        }
        t = t.clamp(b.student.sigma_min, b.student.sigma_max)
        made = {
            "noisy": x,
            "jump": b.student.G(x, t, b.student.sigma_min, y),
            "mean": b.student.D(x, t, y),
            "median filter": torch.from_numpy(median_filter(x.numpy(), (1, 1, 3, 3))),
            "bilateral filter, true level": torch.from_numpy(bilateral(x.numpy(), true)),
        }
        if b.teacher:  # 35 evaluations, from the level that was found
            times = torch.cat([rho_grid(18, b.student.sigma_min, t.median().item()), torch.zeros(1)])
            made["teacher at 35"] = solve(b.teacher.D, x, times, y, "heun")
        row["PSNR"] = {k: psnr(v) for k, v in made.items()}
        row["class kept"] = {k: b.kept(v.float()) for k, v in made.items()}
        print(row, flush=True)
        yield row


def strokes(b, run, n=20):
    "Processor and wall time of the explorer's callback, a stroke drawn anew each time."
    from ctm_nb.explore.explorer import explore_strokes

    explorer, spent = explore_strokes(run), []
    for k in range(n):
        begin, wall = time.process_time(), time.perf_counter()
        explorer.controls["seed"].value = k + 1
        spent.append((1000 * (time.process_time() - begin), 1000 * (time.perf_counter() - wall)))
    cpu, wall = map(statistics.median, zip(*spent))
    yield {"strokes": n, "processor ms": cpu, "wall ms": wall}


def keep(b, part, make):
    "Measure unless it is there."
    path = RESULTS / f"{b.name}_{part}.json"
    if path.exists():
        return print(f"{path} is there", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"hardware": hardware(), "classifier reads right": b.kept(b.x0), "teacher": b.teacher is not None}
    path.write_text(json.dumps({**about, "rows": list(make)}, indent=1) + "\n")
    print(f"{path} written", flush=True)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["digits", "emoji"])
    p.add_argument("--run", type=Path, default=Path("runs/digits"), help="of the preset digits")
    p.add_argument("--teacher", help="the run that holds the emoji's teacher")
    p.add_argument("-n", type=int, default=200, help="held-out pictures (default: 200)")
    a = p.parse_args()
    digits, run = a.what == "digits", str(a.run)
    if digits and not a.run.exists():
        train = str(Path(sys.executable).with_name("ctm_nb_train"))
        subprocess.run([train, "--runs", str(a.run.parent), "--name", a.run.name], check=True)
    b = Bench(a.what, run, run, a.n) if digits else Bench("emoji", str(EMOJI), a.teacher, a.n)
    keep(b, "settings", settings_rows(b, SEEDS if digits else SEEDS[:1]))
    keep(b, "tasks", task_rows(b, list(b.tasks()) if digits else ["inpaint, lower half hidden"]))
    keep(b, "trips", round_trips(b, (4, 8, 16, 32, 64) if digits else (4, 8, 16, 32)))
    if digits:
        keep(b, "freedom", freedom(b))
        keep(b, "explorer", strokes(b, run))
    keep(b, "denoise", denoising(b, 200 if digits else 50))


if __name__ == "__main__":
    main()
