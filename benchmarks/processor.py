"""What a forward pass, a training step and sampling cost on one core, today and in an earlier checkout of this package:
both are loaded into one process and called in turn.

    git worktree add ../before bb4ba02
    python benchmarks/processor.py --before ../before
    python benchmarks/processor.py --before ../before --released ../ctm --only released

Processor seconds of one thread; of every pair of calls the ratio is taken, and of the ratios the median and the tenth
and the ninetieth percentile, of fewer than ten the least and the largest. Networks: DDPM++ at 32 x 32 with 2.4 million
weights, batch 16, and those of the presets digits and mnist, batch 64, all with a student's s-branch. Steps: of
distillation, on random pictures of the preset's size; cifar10 with 32 channels and batch 16. The limit: a pass by its
convolutions alone, and beside them a bare matrix product's operations a second. Released: the authors' class, from a
checkout of their repository (sony/ctm), with our weights, by ours, without gradient and with. Sampling: 64 samples in
one evaluation, against the network alone; and 256 of the 32 x 32 network in parts, written to files meanwhile, by one
process and by two at once. Each section is a process of its own, in which glibc keeps what is freed, as training and
sampling have it today; it is written to nbs/results/speed/processor.json, or to the file --out.
"""
import argparse
import importlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed" / "processor.json"
HERE = str(Path(__file__).resolve().parents[1])
SMALL = dict(channels=1, n_classes=10, model_channels=16, n_blocks=1)
NETWORKS = {"32 x 32, 2.4 M": dict(image_size=32, channels=3, model_channels=32, n_blocks=2),
            "mnist": dict(image_size=28, channel_mult=(1, 2, 2), attention=(7,), **SMALL),
            "digits": dict(image_size=8, channel_mult=(1, 2), attention=(4,), **SMALL)}
BATCH = {"digits": 64, "32 x 32, 2.4 M": 16, "mnist": 64}
QUIET = "teacher.steps=1 gan.steps=0 run.save_every=1000000 run.sample_every=1000000 run.log_every=1000000 evaluate.n=0"
STEPS = {"digits": "distill.phases= distill.anchor_rows=none", "mnist": "data.image_size=28",
         "cifar10": "network.model_channels=32 network.n_blocks=2 distill.batch=16 distill.distance=pseudo_huber "
                    "run.micro_batch=16"}


def package(where):
    "The package in a checkout, beside any other that is loaded already: a function that imports from it."
    mine = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "ctm_nb"}
    sys.path.insert(0, where)
    own: dict = {}
    def get(name):
        kept = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "ctm_nb"}
        sys.modules.update(own)
        sys.path.insert(0, where)
        try: return importlib.import_module(f"ctm_nb.{name}")
        finally:
            own.update({k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "ctm_nb"})
            sys.modules.update(kept)
            sys.path.remove(where)
    get("method.sampling")
    sys.path.remove(where)
    sys.modules.update(mine)
    return get


def model(get, name):
    "A CTM with weights that are no longer zero."
    torch.manual_seed(0)
    net = get("networks.unet").DDPMpp(s_branch=True, **NETWORKS[name])
    for p in net.parameters(): p.data.add_(.02 * torch.randn(p.shape))
    return get("method.trajectory").CTM(net).eval().requires_grad_(False)


def in_turn(jobs, repeats, warm=2):
    "Processor seconds of each job, all called once a round, in random order."
    times, order = {k: [] for k in jobs}, random.Random(0)
    for r in range(warm + repeats):
        for k in order.sample(list(jobs), len(jobs)):
            started = time.process_time()
            spent = jobs[k]()
            if not isinstance(jobs[k], Apart): spent = time.process_time() - started
            if r >= warm: times[k].append(spent)
    return times


class Apart:
    "A job in a process of its own, which does it when it is called and says what that took."
    def __init__(self, job, keep):  # keep(), first of all in that process
        fork = torch.multiprocessing.get_context("fork")
        self.pipe, end = fork.Pipe()
        def serve():
            keep()
            while end.recv():
                started = time.process_time()
                job()
                end.send(time.process_time() - started)
        self.process = fork.Process(target=serve, daemon=True)
        self.process.start()

    def __call__(self, again=True):
        self.pipe.send(again)
        return self.pipe.recv() if again else self.process.join()


def ratio(a, b):
    "Of the times a to the times b: the median, and where four of five lie; of fewer than ten, the least and the most."
    r = sorted(x / y for x, y in zip(a, b))
    return [round(v, 3) for v in (median(r), r[len(r) // 10], r[-1 - len(r) // 10])]


def made(before):
    "Where and against what a section was measured."
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    def commit(where):
        done = subprocess.run(["git", "-C", where, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip()
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "torch": torch.__version__, "threads": torch.get_num_threads(), "before": commit(before),
            "after": commit(HERE)}


def forward_section(sides, repeats):
    "The network alone, without gradient."
    rows = {}
    for name, B in BATCH.items():
        models = {side: model(get, name) for side, get in sides.items()}
        x = torch.randn(B, *models["after"].data_shape)
        c, y = torch.linspace(-1.5, 1, B), torch.arange(B) % 10 if models["after"].n_classes else None
        def call(side, half, models=models, x=x, c=c, y=y):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                return models[side].net(x, c, c - 1, y)
        jobs = {(side, half): lambda side=side, half=half: call(side, half) for side in sides for half in (False, True)}
        gap = lambda a, b: float((jobs[a]().float() - jobs[b]().float()).abs().max())
        apart = {"fp32": gap(("before", False), ("after", False)), "bf16": gap(("before", False), ("after", True))}
        t = in_turn(jobs, repeats)
        base = t["before", False]
        rows[name] = {"batch": B, "before ms": round(1e3 * median(base), 1), "apart": apart,
                      "fp32": ratio(base, t["after", False]), "bf16": ratio(base, t["after", True]),
                      "bf16 before": ratio(base, t["before", True]),
                      "bf16 by bf16": ratio(t["before", True], t["after", True])}
        print(name, rows[name], flush=True)
    return rows


class Convolutions(TorchDispatchMode):
    "Keeps the arguments of each convolution that is called within it, as they reach the library."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is torch.ops.aten.convolution.default: self.calls.append(args)
        return f(*args, **(kwargs or {}))


def limit_section(sides, repeats, side=1024):
    """A pass by its own convolutions: the same calls on the same tensors in the same order, with nothing between them.

    Each job is a process of its own, and the earlier pass is there once more as it was, on glibc's own heap."""
    rows, keep = {}, sides["after"]("evaluation.draw").keep_memory
    for name, B in BATCH.items():
        nets, jobs, ops = {s: model(get, name) for s, get in sides.items()}, {}, {}
        args = torch.randn(B, *nets["after"].data_shape), torch.linspace(-1.5, 1, B), torch.linspace(-2.5, 0, B)
        if nets["after"].n_classes: args += (torch.arange(B) % 10,)
        for half in (False, True):
            def network(s="after", half=half, args=args, nets=nets):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                    nets[s].net(*args)
            with Convolutions() as seen: network()
            def convolutions(calls=seen.calls):
                with torch.no_grad():
                    for call in calls: torch.ops.aten.convolution.default(*call)
            square = torch.randn(side, side, dtype=torch.bfloat16 if half else torch.float32)
            with FlopCounterMode(display=False) as counter: convolutions()
            ops |= {("convolutions", half): counter.get_total_flops(), ("product", half): 2 * side ** 3}
            before = lambda network=network: network("before")
            found = {"as it was": before, "before": before, "pass": network, "convolutions": convolutions,
                     "product": lambda a=square: a @ a}
            jobs |= {(k, half): Apart(f, (lambda: None) if k == "as it was" else keep) for k, f in found.items()}
        t, rows[name] = in_turn(jobs, repeats), {}
        for job in jobs.values(): job(False)
        for half, f in ((False, "fp32"), (True, "bf16")):
            by = lambda a, b, t=t, half=half: ratio(t[a, half], t[b, half])
            row = {f"{k} ms": round(1e3 * median(t[k, half]), 2) for k in found}
            row |= {f"{a} by {b}": by(a, b) for a, b in (("pass", "convolutions"), ("before", "pass"),
                                                         ("as it was", "pass"), ("as it was", "convolutions"))}
            row |= {f"{k} GFLOP/s": round(n / 1e9 / median(t[k, h]), 1) for (k, h), n in ops.items() if h == half}
            row |= {"as it was, fp32, by pass": ratio(t["as it was", False], t["pass", half])}
            rows[name][f] = row | {"calls": len(seen.calls)}
            print(name, f, rows[name][f], flush=True)
    return rows


def released_class(folder):
    "The authors' U-Net; what else its file imports concerns pickles and MPI, and may be missing."
    pickles = SimpleNamespace(persistent_class=lambda c: c)
    sys.modules |= {"torch_utils_cm": SimpleNamespace(persistence=pickles), "cm.dist_util": ModuleType("cm.dist_util")}
    sys.path.insert(0, str(Path(folder).resolve() / "code"))
    return importlib.import_module("cm.networks").SongUNet


def released_section(sides, repeats, folder, name="32 x 32, 2.4 M"):
    """The network of the released code beside ours, with the same weights: a pass, and one with its backward pass.

    Each job is a process of its own; theirs is there once more as it would run, on glibc's own heap."""
    ours, size, keep = model(sides["after"], name).net, NETWORKS[name], sides["after"]("evaluation.draw").keep_memory
    side, channels = size["image_size"], size["channels"]
    theirs = released_class(folder)(side, channels, channels, model_channels=size["model_channels"],
                                    num_blocks=size["n_blocks"], dropout=0., embedding_type="positional",
                                    channel_mult_noise=1, encoder_type="standard", resample_filter=[1, 1],
                                    training_mode="ctm")
    theirs.load_state_dict(ours.state_dict())  # strictly: not one more, not one less
    B, nets, jobs = BATCH[name], {"ours": ours, "theirs": theirs, "as it runs": theirs}, {}
    args = torch.randn(B, channels, side, side), *torch.linspace(-2.5, 1, 2 * B).chunk(2), None
    def call(net, half, train):
        net.train(train).requires_grad_(train)
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            out = net(*args)
        if not train: return out.float()
        net.zero_grad()
        out.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])
    whats = {"pass, fp32": (False, False), "pass, bf16": (True, False), "pass and backward, fp32": (False, True)}
    for what, how in whats.items():
        for who, net in nets.items():
            own = who == "as it runs"
            jobs[what, who] = Apart(lambda net=net, how=how: call(net, *how), (lambda: None) if own else keep)
    t, rows = in_turn(jobs, repeats), {}
    for job in jobs.values(): job(False)
    for what, how in whats.items():
        a, b = (call(net, *how) for net in (ours, theirs))
        row = {f"{who} ms": round(1e3 * median(t[what, who]), 1) for who in nets}
        row |= {f"{who} by ours": ratio(t[what, who], t[what, "ours"]) for who in nets if who != "ours"}
        rows[what] = row | {"apart": float((a - b).norm() / b.norm())}
        print(what, rows[what], flush=True)
    count = {k: sum(p.numel() for p in net.parameters()) for k, net in (("ours", ours), ("theirs", theirs))}
    return {"batch": B, "weights": count, "rows": rows}


def sampling_section(sides, repeats):
    "One jump with all that surrounds it, by the network alone."
    rows = {}
    for name in ("digits", "32 x 32, 2.4 M"):
        jobs, drawn = {}, {}
        for side, get in sides.items():
            m, seen, sample = model(get, name), [], get("method.sampling").sample
            hook = m.net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
            drawn[side] = sample(m, 64)
            hook.remove()
            def bare(m=m, args=seen[0]):
                with torch.no_grad(): m.net(*args)
            jobs |= {("bare", side): bare, ("sample", side): lambda m=m, sample=sample: sample(m, 64)}
        t = in_turn(jobs, max(9, repeats // 4) if name != "digits" else 20 * repeats)
        rows[name] = {f"over the network, {s}": ratio(t["sample", s], t["bare", s]) for s in sides}
        rows[name] |= {"before by after": ratio(t["sample", "before"], t["sample", "after"]),
                       "apart": float((drawn["before"] - drawn["after"]).abs().max())}
        print(name, rows[name], flush=True)
    return rows


def trainer(get, preset, folder, half):
    "A run at the beginning of its distillation, on random pictures."
    words = f"{QUIET} {STEPS[preset]} data.source=digits run.precision={'bf16' if half else 'fp32'}".split()
    config = get("training.config").make_config(preset, words)
    side, channels = {"digits": (8, 1), "mnist": (28, 1), "cifar10": (32, 3)}[preset]
    draw = torch.Generator().manual_seed(0)
    data = get("data.images").ImageData(torch.randint(0, 256, (512, channels, side, side), generator=draw).byte(),
                                        torch.arange(512) % 10, [str(k) for k in range(10)], "noise")
    t = get("training.trainer").Trainer(config, folder, {"train": data, "held_out": data})
    for _ in range(2): t.train_step()
    t.ahead.end = 0  # nothing is made ahead of time, beside what is timed
    return t


def step_section(sides, repeats):
    "A training step, of the first phase of distillation, whose draw of times is the same on both sides."
    rows = {}
    for preset in STEPS:
        with tempfile.TemporaryDirectory() as d:
            runs = {(s, half): trainer(get, preset, Path(d) / f"{s}{half}", half) for s, get in sides.items()
                    for half in (False, True)}
            def step(t):
                t.ahead.forget()
                t.train_step()
            many = 5 * repeats if preset == "digits" else repeats  # its steps are short
            t = in_turn({k: lambda run=run: step(run) for k, run in runs.items()}, many, warm=1)
        base = t["before", False]
        rows[preset] = {"before ms": round(1e3 * median(base), 1), "fp32": ratio(base, t["after", False]),
                        "bf16": ratio(base, t["after", True]), "bf16 before": ratio(base, t["before", True]),
                        "bf16 by bf16": ratio(t["before", True], t["after", True])}
        print(preset, rows[preset], flush=True)
    return rows


def profile_section(sides, repeats):
    "Milliseconds of a forward pass by kind of operation, of the network at 32 x 32."
    from torch.profiler import ProfilerActivity, profile

    nets, rows = {s: model(get, "32 x 32, 2.4 M").net for s, get in sides.items()}, {}
    x, c = torch.randn(16, 3, 32, 32), torch.linspace(-1.5, 1, 16)
    for _ in range(max(12, repeats)):  # the least of many: the profiler counts by the wall's clock
        for side, half in ((s, h) for s in sides for h in (False, True)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                with profile(activities=[ProfilerActivity.CPU]) as p: nets[side](x, c, c - 1)
            row = rows.setdefault(f"{side}, {'bf16' if half else 'fp32'}", {})
            for e in p.key_averages():
                k = e.key.removeprefix("aten::")
                row[k] = min(e.self_cpu_time_total / 1e3, row.get(k, 1e9))
    return {name: {k: round(v, 2) for k, v in row.items() if v > .3} for name, row in rows.items()}


def compile_section(sides, repeats):
    "The network at 32 x 32 by torch.compile, without gradient, beside the others."
    nets = {s: model(get, "32 x 32, 2.4 M").net for s, get in sides.items()}
    x, c, jobs = torch.randn(16, 3, 32, 32), torch.linspace(-1.5, 1, 16), {}
    for name, net in {**nets, "compiled": torch.compile(nets["after"], dynamic=False)}.items():
        for half in (False, True):
            def call(net=net, half=half):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                    return net(x, c, c - 1)
            jobs[name, half] = call
    out = {k: f().float() for k, f in jobs.items()}
    gaps = {h: float((out["compiled", h] - out["after", False]).abs().max()) for h in (False, True)}
    t = in_turn(jobs, repeats)
    return {"bf16" if h else "fp32": {"after": ratio(t["before", False], t["after", h]), "apart": gaps[h],
                                      "compiled": ratio(t["before", False], t["compiled", h])} for h in (False, True)}


def parts_section(sides, repeats, rank=0, world=1, together=lambda: None):
    "Many samples as `ctm_nb_sample` draws them: parts, written while the next is drawn; by the network alone."
    get = sides["after"]
    draw = get("evaluation.draw")
    m, n, shapes = model(get, "32 x 32, 2.4 M"), 256, []
    hook = m.net.register_forward_pre_hook(lambda _, args: shapes.append(args))
    ranks = draw.Ranks(rank, world)
    def parts(precision):
        recipe = draw.make_recipe(m, "", n * world, bytes="round", precision=precision)
        recipe |= {"part": 64, "weights": ""}
        with tempfile.TemporaryDirectory() as d:
            folder = draw._open_parts(Path(d) / "x.npz", recipe)
            draw._draw_parts(draw._drawer_of(m, recipe), recipe, folder, ranks)
    parts("fp32")
    hook.remove()
    def bare(half):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            for args in shapes: m.net(*args)
    jobs = {"fp32": lambda: parts("fp32"), "bf16": lambda: parts("bf16"),
            "fp32, bare": lambda: bare(False), "bf16, bare": lambda: bare(True)}
    def at_once(job): return lambda: (together(), job())
    t = in_turn({k: at_once(job) for k, job in jobs.items()}, max(5, repeats // 4), warm=0)
    rows = {f"{p} over the network": ratio(t[p], t[f"{p}, bare"]) for p in ("fp32", "bf16")}
    return {"samples": n * world, "processes": world, **rows, "fp32 by bf16": ratio(t["fp32"], t["bf16"])}


def processes_section(sides, repeats, world=2):
    "The same by several processes, each with its share, that begin every job together: what the slowest says."
    fork = torch.multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(world), fork.Queue()
    def one(rank): found.put(parts_section(sides, repeats, rank, world, barrier.wait))
    running = [fork.Process(target=one, args=(r,)) for r in range(world)]
    for p in running: p.start()
    rows = [found.get() for _ in running]
    for p in running: p.join()
    return max(rows, key=lambda r: r["fp32 over the network"])


SECTIONS = {"forward": forward_section, "limit": limit_section, "released": released_section,
            "sampling": sampling_section, "parts": parts_section, "processes": processes_section, "step": step_section,
            "profile": profile_section, "compile": compile_section}
OWN_HEAP = ("limit", "released")  # sections whose jobs say for themselves what they keep


def measure(what, a):
    "One section, written to the results."
    sides = {"before": package(str(Path(a.before).resolve())), "after": package(HERE)}
    if what not in OWN_HEAP: sides["after"]("evaluation.draw").keep_memory()
    more = {"folder": a.released} if what == "released" else {}
    rows = SECTIONS[what](sides, a.repeats, **more)
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    found[what] = rows
    found.setdefault("made", {})[what] = made(a.before)
    a.out.write_text(json.dumps(found, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", required=True, help="an earlier checkout")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--released", metavar="FOLDER", help="a checkout of the authors' repository, sony/ctm")
    p.add_argument("--only", nargs="+", choices=SECTIONS)
    p.add_argument("--out", type=Path, default=RESULT, help="where the results go (default: %(default)s)")
    a = p.parse_args()
    if a.released is None and "released" in (a.only or ()): p.error("the section released needs --released FOLDER")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for what in a.only or [k for k in SECTIONS if k != "released" or a.released]:
        one = torch.multiprocessing.get_context("fork").Process(target=measure, args=(what, a))
        one.start()
        one.join()
        if one.exitcode: sys.exit(f"{what}: failed")


if __name__ == "__main__": main()
