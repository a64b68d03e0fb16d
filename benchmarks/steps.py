"""What a training step takes of memory, preset by preset and stage by stage, beside what the plan says of it.

    python benchmarks/steps.py                          # all of them: minutes
    python benchmarks/steps.py digits/teacher emoji/student
    python benchmarks/steps.py time                     # of run.recompute, processor seconds, in turn in one process

Each is a process of its own, on one thread, with as many images as this machine can hold: the numbers stand in the
result. After a first step one or two are made, and as many profiled, with intervals of one grid step: most rows move.
*Tensors* is the most that PyTorch's allocator had given out at once, by its profiler; *process* is by how much the
process had grown, `VmHWM`, on a heap that returns what is freed (MALLOC_MMAP_THRESHOLD_), and *as it is*, on glibc's
own, as a training sets it. The libraries' own part, 20 MiB and more, is in both. Feature networks have random weights.
Written to nbs/results/speed/steps.json and recompute.json.
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ctm_nb.data.images import ImageData, digits
from ctm_nb.training.config import make_config
from ctm_nb.training.costs import memory
from ctm_nb.training.runtime import choose_precision
from ctm_nb.training.trainer import Trainer

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed" / "steps.json"
STAGES = {"teacher": "teacher", "student": "ctm_dsm", "adversary": "ctm_dsm_gan"}
SHAPES = {"mnist": (1, 28, 10), "emoji": (3, 32, 8), "cifar10": (3, 32, 0), "cifar10-cond": (3, 32, 10),
          "imagenet64": (3, 64, 1000), "imagenet64-edm2": (3, 64, 1000)}
QUIET = ["evaluate.n=0", "run.precision=fp32", "distill.K=1", "gan.K=1", "gan.head_start=0",
         *(f"run.{k}_every=1000000" for k in ("save", "sample", "log"))]
SMALL = [*(f"{s}.batch=2" for s in ("teacher", "distill", "gan")), "run.micro_batch=1", "distill.stored=2",
         "distill.balance_rows=1", "gan.balance_rows=1"]
ONE = "distill.phases= distill.anchor_rows=none distill.stored=64 distill.matching={}".format
WORDS = {**{k: ONE("soft").split() for k in ("digits", "mnist", "emoji")}, "cifar10": SMALL, "cifar10-cond": SMALL,
         "imagenet64": SMALL, "imagenet64-edm2": [*SMALL, "teacher.source="]}
MORE = {"digits, halves": ("digits", ["run.micro_batch=32"]), "digits, bf16": ("digits", ["run.precision=bf16"]),
        "mnist, trajectories": ("mnist", ONE("trajectories").split()),
        "mnist, eulerian": ("mnist", ONE("eulerian").split()),
        "mnist, recomputed": ("mnist", ["run.recompute=true"]), "emoji, bf16": ("emoji", ["run.precision=bf16"]),
        "cifar10, whole": ("cifar10", ["distill.balance_rows=none", "run.micro_batch=auto", "distill.distance=l2"]),
        "cifar10, recomputed": ("cifar10", ["run.recompute=true"]),
        "imagenet64, recomputed": ("imagenet64", ["run.recompute=true"])}
HEAVY = ("cifar10", "imagenet64")  # measured on one heap


def configuration(name, stage, weights):
    "Of a row of the table: steps enough that the stage has two, and no more than that before it."
    preset, words = MORE.get(name, (name, []))
    words = [*QUIET, *WORDS.get(preset, []), f"distill.weights={weights}", f"gan.weights={weights}", *words]
    if preset in SHAPES and preset != "emoji": words.append("data.source=x")
    before = list(STAGES)[:list(STAGES).index(stage)]
    for s, key in zip(STAGES, ("teacher", "distill", "gan")):
        words.append(f"{key}.steps={1 if s in before else 999 if s == stage else 0}")
        if s in before: words.append(f"{key}.batch=1")
    return make_config(preset, words), preset


def images(preset):
    if preset not in SHAPES: return digits()
    c, side, k = SHAPES[preset]
    n = max(k, 64)
    pixels = torch.randint(256, (n, c, side, side), dtype=torch.uint8)
    return ImageData(pixels, torch.arange(n) % k if k else None, [str(i) for i in range(k)])


def kept(key):
    "A number of /proc/self/status in bytes."
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))


def settle():
    "Return what is free, and begin to count anew."
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def one(name, stage, weights):
    "A row, measured in this process."
    config, preset = configuration(name, stage, weights)
    steps = 1 + (stage == "adversary" or not preset.startswith(HEAVY))  # discriminator and student take turns
    data, conv = images(preset), torch.nn.Conv2d(8, 8, 3)
    with torch.profiler.profile(profile_memory=True): conv(torch.randn(4, 8, 16, 16)).sum().backward()
    settle()
    empty = kept("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        t = Trainer(config, Path(folder) / "run", {"train": data})
        while t.stage != STAGES[stage]: t.train_step()
        t.train_step()
        settle()
        held = [v for m in t.parts.values() for v in (*m.parameters(), *m.buffers())]
        numbers = [s for o in t.now.optimizers.values() for s in o.state.values()]
        held += [v for s in numbers for v in s.values() if torch.is_tensor(v)]
        networks = getattr(t.parts.get("discriminator"), "networks", ()), getattr(t.now, "distance", None)
        networks = [*networks[0], getattr(networks[1], "net", None)]
        held += [v for m in networks if m for v in (*m.parameters(), *m.buffers())]
        held += [v for path in getattr(t.now, "paths", {}).values() for v in path if torch.is_tensor(v)]
        before = sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in held}.values())
        for _ in range(steps): t.train_step()
        grown = kept("VmHWM") - empty
        for m in t.parts.values(): m.zero_grad()  # the profiler does not see what it has not seen made go
        with torch.profiler.profile(profile_memory=True) as p:
            for _ in range(steps): t.train_step()
        t.ahead.forget()
    now = most = 0
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in events):
        now += n
        most = max(most, now)
    batch = t.plan[t.now.name].batch
    return {"tensors": before + most, "process": grown, "images": batch, "at a time": t.micro}


def planned(name, stage):
    "What the plan says."
    config, preset = configuration(name, stage, "")
    micro = None if config.run.micro_batch == "auto" else int(config.run.micro_batch)
    half = choose_precision(config.run.precision, torch.device("cpu")) != "fp32"
    return memory(config, images(preset), micro, half)[STAGES[stage]]


def ratios(preset, repeats=6):
    "Processor seconds of a student's step with blocks computed again over those without, a pair of steps each."
    with tempfile.TemporaryDirectory() as folder:
        def trainer(again):
            config = configuration(preset, "student", folder)[0]
            config.run.recompute = again
            t = Trainer(config, Path(folder) / str(again), {"train": images(preset)})
            t.ahead.end = 0  # nothing is made beside what is timed
            for _ in range(3): t.train_step()
            t.ahead.forget()
            t.ahead.end = 0
            return t
        pair, found = [trainer(again) for again in (False, True)], []
        for _ in range(repeats):
            spent = []
            for t in pair:
                began = time.process_time()
                t.train_step()
                spent.append(time.process_time() - began)
            found.append(spent[1] / spent[0])
    return sorted(found)


def random_weights(folder):
    "Files with which LPIPS and timm's networks can be made here."
    import timm
    import torchvision
    state = torchvision.models.vgg16(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("features.")}, folder / "vgg16-random.pth")
    for f in ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0"):
        torch.save(timm.create_model(f, pretrained=False).state_dict(), folder / f"{f}.pth")


def measured(name, stage, weights, heap):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"MALLOC_MMAP_THRESHOLD_": "262144"} if heap else {})}
    words = [sys.executable, __file__, "one", name, stage, weights]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{name}, {stage}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(rows):
    known = {(r["preset"], r["stage"]): r for r in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        random_weights(Path(folder))
        for name, stage in rows:
            found = measured(name, stage, folder, True)
            own = None if name.startswith(HEAVY) else measured(name, stage, folder, False)["process"]
            known[name, stage] = {"preset": name, "stage": stage, **found, "as it is": own}
            print(json.dumps(known[name, stage]), flush=True)
        for row in known: known[row]["plan"] = planned(*row)
        RESULT.write_text(json.dumps([*known.values()], indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", metavar="PRESET/STAGE", help='which (default: all); or "time"')
    words = p.parse_args().rows
    if words == ["time"]:
        torch.set_num_threads(1)
        found = {p: ratios(p) for p in ("digits", "mnist", "emoji")}
        RESULT.with_name("recompute.json").write_text(json.dumps(found, indent=1) + "\n")
        print(found)
    elif words[:1] == ["one"]: print(json.dumps(one(*words[1:])))
    else:
        every = [(p, s) for p in ("tiny", "digits", "mnist", "emoji", "cifar10", "cifar10-cond", "imagenet64",
                                  "imagenet64-edm2") for s in STAGES]
        every = [r for r in every if r[1] != "adversary" or r[0] in ("digits", "cifar10", "cifar10-cond", "imagenet64")]
        more = [(p, s) for p in MORE for s in STAGES if s == "student"]
        main([tuple(w.rsplit("/", 1)) for w in words] or every + more)
