"""How many images a second arrive: the input pipeline, from each place that images can be in, beside what training
consumes.

    python benchmarks/data.py [--images 20000] [--seconds 5]
        writes nbs/results/data/benchmark.json and prints it as a table

Random 32 x 32 images are used: what is in a picture changes the time of an uncompressed PNG little, that of a JPEG
somewhat. `digits trainer` is the rate at which the digits preset itself takes images (teacher, distillation),
measured here by running it for a moment.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ctm_nb.data.convert import convert
from ctm_nb.data.read import as_image, cores
from ctm_nb.data.read import ArraySource, open_source
from ctm_nb.data.batches import Batches, decode_all, load_splits

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "data"


def hardware():
    "Processor and cores, as a reader would want to know them."
    try:
        name = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {cores()} cores"


def pictures(n, size=32):
    "Smooth random colour images, so that JPEG has something to do that resembles its work."
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(as_image(s).resize((size, size), 2)) for s in small])


class Clock:
    "Images a second by the clock, and processor time an image, which other processes on the machine change less."

    def __enter__(self):
        self.n, self.wall, self.cpu = 0, time.perf_counter(), self.now()
        return self

    def now(self):
        return sum(os.times()[:4])  # of this process and of its children that have ended

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, self.now() - self.cpu

    def row(self, what, processes=1, cpu=True):
        return {
            "what": what,
            "processes": processes,
            "images a second": round(self.n / self.wall),
            "CPU microseconds an image": round(self.cpu / self.n * 1e6, 1) if cpu else None,
        }


def of_batches(batches, seconds):
    "A running loader, after its first batches."
    for k in range(8):
        batches.at(k * batches.batch_size)
    with Clock() as c:
        while time.perf_counter() - c.wall < seconds:
            batches.at(8 * batches.batch_size + c.n)
            c.n += batches.batch_size
    batches.close()
    return c


def of_decoding(source, workers):
    "All images into memory, once."
    with Clock() as c:
        decode_all(source, workers=workers)
        c.n = len(source)
    return c


def of_training(seconds):
    "The digits preset in its two stages."
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as d:
        for stage, words in (
            ("teacher", ["teacher.steps=100000"]),
            ("ctm_dsm", ["teacher.steps=1", "distill.steps=100000"]),
        ):
            t = Trainer(make_config("digits", words), Path(d) / stage)
            for _ in range(4):
                t.train_step()
            batch = 128 if stage == "teacher" else 64
            with Clock() as c:
                while time.perf_counter() - c.wall < seconds:
                    t.train_step()
                    c.n += batch
            yield c.row(f"for comparison: the digits preset trains ({stage})")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=20_000)
    p.add_argument("--seconds", type=float, default=5.0)
    a = p.parse_args()
    load_before, rows = os.getloadavg()[0], []
    images = pictures(a.images)
    array = ArraySource(
        "random",
        "array",
        list(map(str, range(a.images))),
        np.arange(a.images) % 10,
        [str(k) for k in range(10)],
        images=images,
    )
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        os.environ["CTM_NB_CACHE"] = str(d / "cache")
        convert(array, d / "edm.zip")
        convert(array, d / "tree")
        (d / "jpeg").mkdir()
        for i, im in enumerate(images):
            as_image(im).save(d / "jpeg" / f"{i:06}.jpg", quality=90)
        stream = load_splits(d / "edm.zip", in_memory=False)["train"]
        memory = load_splits(d / "edm.zip")["train"]
        many = sorted({1, cores()})
        for file, name in (("edm.zip", "EDM zip"), ("tree", "PNG tree"), ("jpeg", "JPEG folder")):
            for w in many:
                rows.append(of_decoding(open_source(d / file), w if w > 1 else 0).row(f"{name} decoded into memory", w))
        for w in many:
            rows.append(
                of_batches(Batches(stream, 128, workers=w if w > 1 else 0), a.seconds).row(
                    "EDM zip on a stream, batches of x0", w, cpu=w == 1
                )
            )
        for name, kw in (
            ("batches of x0", {}),
            ("flipped", dict(flip=True)),
            ("EDM's augmentation, p = 0.12", dict(flip=True, p=0.12)),
        ):
            rows.append(of_batches(Batches(memory, 128, **kw), a.seconds).row(f"memory, {name}"))
        rows.append(
            of_batches(Batches(load_splits("digits")["train"], 128), a.seconds).row("digits in memory, batches of x0")
        )
    rows += of_training(a.seconds)
    load = f"load average {load_before:.1f} before and {os.getloadavg()[0]:.1f} after"
    about = {
        "command": "python benchmarks/data.py",
        "hardware": hardware(),
        "load": load,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images": a.images,
        "size": 32,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "benchmark.json").write_text(json.dumps(about, indent=1) + "\n")
    print(
        f"{about['hardware']}, {load}\n\n"
        "| what | processes | images a second | CPU microseconds an image |\n| --- | --- | --- | --- |"
    )
    for r in rows:
        print(f"| {r['what']} | {r['processes']} | {r['images a second']:,} | {r['CPU microseconds an image']} |")


if __name__ == "__main__":
    main()
