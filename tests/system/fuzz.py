"""Damaged and hostile files, in child processes with limits:  python tests/system/fuzz.py [N] [SEED] [FORM] [FILE]

A trial may end in a result or in one line that names the file; a traceback, a crash or a hang is a failure. Before it
starts, the script shows that it reports each of these when it is planted. Data sets go through `ctm_nb_data inspect`
and the reader of samples; a run through all that opens it, to resume it last; others' networks through `load`;
references, scores, kept times, parts of samples and pictures to edit through what opens them. Its counts are printed,
and written to FILE, nbs/results/data/fuzz.json say.
"""
import faulthandler
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import filelock  # noqa: F401  # what a child would import, it would import again and again
import jinja2  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import numpy as np
import torch  # before the limit of memory, and only once
import torch._dynamo  # noqa: F401  # the first optimizer needs it
import torch.utils.tensorboard  # noqa: F401
from PIL import Image
from scipy.io import savemat

from ctm_nb.checkpoints.averages import average
from ctm_nb.checkpoints.models import load, save_model
from ctm_nb.checkpoints.store import _seal
from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.commands.flags import one_line_errors
from ctm_nb.commands import main as commands
from ctm_nb.commands.train import plan
from ctm_nb.data import convert, read  # noqa: F401  # imported here, once for all children
from ctm_nb.data.images import digits
from ctm_nb.evaluation.draw import _draw_parts, _drawer_of, _open_parts, _with_parts, draw_samples, make_recipe
from ctm_nb.evaluation.edit import edit_files
from ctm_nb.evaluation.evaluate import Request, evaluate, open_subject, read_scores
from ctm_nb.evaluation.metrics import frechet_gaussians
from ctm_nb.evaluation.reference import read_reference
from ctm_nb.training import budget  # noqa: F401
from ctm_nb.training.config import make_config
from ctm_nb.training.report import write_report
from ctm_nb.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoints"))
from foreign_files import make_edm2_snapshot, make_edm_pickle  # noqa: E402

SECONDS, MEMORY = 20, 2 * 2**30


def ended(f, args):
    "Call a function in a child, and end the child with its code; 99 for what nobody expected."
    code = 0
    try: f(*args)
    except SystemExit as e: code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def fresh(seconds=SECONDS):
    "From now on so many seconds of the processor; more by the clock, for others may want the processor, too."
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 1 + seconds), resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def limited(f, *args, seconds=SECONDS, memory=MEMORY):
    "What a function does in a child process: 'ok', 'refused', 'traceback', 'crash' or 'hang', and its words."
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if not pid:
            for fd in (1, 2): os.dup2(out.fileno(), fd)
            sys.stdout = sys.stderr = open(1, "w", closefd=False, errors="backslashreplace")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            fresh(seconds)
            ended(f, args)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        words = out.read().decode(errors="backslashreplace")
    if code in (-signal.SIGALRM, -signal.SIGXCPU): return "hang", words
    if code < 0: return "crash", f"{words}\nsignal {-code}"
    if code == 99 or "Traceback" in words: return "traceback", words
    return ("refused" if code else "ok"), words


def picture(rng, kind="png", side=8):
    f = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(f, kind)
    return f.getvalue()


def packed(write):
    "The bytes that a function leaves in a file."
    with tempfile.TemporaryDirectory() as d:
        write(Path(d) / "x")
        return next(Path(d).iterdir()).read_bytes()


def tarred(path, files, mode="w"):
    "A tar of some files, name -> bytes; its path."
    with tarfile.open(path, mode) as t:
        for n, data in files.items():
            info = tarfile.TarInfo(n)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def seeds():
    "Good data sets of every form: {name: (files, what is opened)}; `files` are path -> bytes."
    import lmdb
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (4, 8, 8, 3), np.uint8), np.arange(4) % 2
    kinds = {"png": "png", "jpeg": "jpg", "gif": "gif", "bmp": "bmp", "webp": "webp", "tiff": "tif", "ppm": "ppm",
             "jpeg2000": "jp2"}
    found = {f"a {kind}": ({f"{end}/1.{end}": picture(rng, kind), "b/2.png": picture(rng)}, "")
             for kind, end in kinds.items()}
    pngs = {f"{'ab'[k % 2]}/{k}.png": picture(rng) for k in range(3)}
    labels = {"labels": [[n, k % 2] for k, n in enumerate(pngs)], "classes": ["cat", "dog"]}
    table = "file_name,label\n" + "".join(f"{n},{k % 2}\n" for k, n in enumerate(pngs))
    lines = "".join(json.dumps({"file_name": n, "label": k}) + "\n" for k, n in enumerate(pngs))
    helpers = {"dataset.json": json.dumps(labels), "labels.csv": table, "metadata.csv": table, "metadata.jsonl": lines}
    for name, text in helpers.items(): found[name] = ({**pngs, name: text.encode()}, "")

    def zipped(method):
        def write(p):
            with zipfile.ZipFile(p, "w", method) as z:
                for n, data in {**pngs, "dataset.json": json.dumps(labels).encode()}.items(): z.writestr(n, data)
        return write

    shard = {k: v for n in range(3) for k, v in ((f"{n}.png", picture(rng)), (f"{n}.cls", b"1"),
                                                 (f"{n}.json", b'{"label": 1}'))}
    batch = {b"data": rng.integers(0, 256, (3, 3072), np.uint8), b"labels": [0, 1, 9]}
    cifar = {f"data_batch_{k}": pickle.dumps(batch, protocol=min(k + 1, 5)) for k in range(1, 6)}
    cifar |= {"test_batch": pickle.dumps(batch), "batches.meta": pickle.dumps({"label_names": list("abcdefghij")})}
    numbers = {"images-idx3-ubyte.gz": x[..., 0], "labels-idx1-ubyte.gz": y.astype(np.uint8)}
    idx = {f"{part}-{end}": gzip.compress(struct.pack(f">{a.ndim + 1}I", 2048 + a.ndim, *a.shape) + a.tobytes())
           for part in ("train", "t10k") for end, a in numbers.items()}

    def store(p):
        with lmdb.open(str(p), map_size=2**20, subdir=False, lock=False) as env, env.begin(write=True) as txn:
            for n, data in pngs.items(): txn.put(n.encode(), data)

    for name, write in {"stored.zip": zipped(0), "deflated.zip": zipped(8), "plain.tar": lambda p: tarred(p, pngs),
                        "bzip2.zip": zipped(12), "lzma.zip": zipped(14),
                        "packed.tar.xz": lambda p: tarred(p, pngs, "w:xz"),
                        "shard.tar": lambda p: tarred(p, shard),
                        "cifar.tar.gz": lambda p: tarred(p, cifar, "w:gz"), "store.lmdb": store}.items():
        found[name] = ({name: packed(write)}, name)
    def arrays(save): return packed(lambda p: save(open(p, "wb")))  # numpy writes where it is told to
    found["arrays.npz"] = {"x.npz": arrays(lambda f: np.savez(f, x, y))}, "x.npz"
    named = dict(arr_0=x, arr_1=y, classes=np.array(["a", "b"]))
    found["small.npz"] = {"x.npz": arrays(lambda f: np.savez_compressed(f, **named))}, "x.npz"
    digits = dict(X=x.transpose(1, 2, 3, 0), y=y[:, None] + 1)
    found["svhn.mat"] = {"x.mat": arrays(lambda f: savemat(f, digits, do_compression=True))}, "x.mat"
    found["floats.npy"] = {"x.npy": arrays(lambda f: np.save(f, x / 255))}, "x.npy"
    found |= {"cifar": (cifar, ""), "idx": (idx, "")}
    both = "stored.zip", "deflated.zip", "arrays.npz", "small.npz", "a png", "dataset.json", "svhn.mat", "floats.npy"
    return {k: (*v, "inspect") for k, v in found.items()} | {f"samples: {k}": (*found[k], "samples") for k in both}


WORDS_OF_RUN = ["network.channel_mult=1", "teacher.steps=2", "distill.steps=2", "evaluate.n=0", "run.sample_every=1000",
                "teacher.profiles=.05,.1", "run.micro_batch=32"]
STEP = "checkpoints/step_00000004"
PARTS = {  # of a run: who reads it, and what of it is damaged
    "config": ("draw plan resume", "config.json"), "log": ("resume", "metrics.jsonl"),
    "scores": ("resume", "scores.json"), "times": ("draw score", "times.json"),
    "manifest": ("checkpoint draw score plan resume", f"{STEP}/checkpoint.json"),
    "state": ("resume", f"{STEP}/state.pt"), "weights": ("checkpoint resume", f"{STEP}/ctm.safetensors"),
    "average": ("average resume", "averages/step_00000002/checkpoint.json"),
    "report": ("report", "config.json", "metrics.jsonl", "scores.json", f"{STEP}/checkpoint.json")}


def files_of(folder, *without):
    "What lies below a folder."
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in without]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def others(folder):
    "Runs, networks, references and pictures that a run here and other programs leave; as `seeds`."
    def there(words):
        os.chdir(folder)
        commands.main(list(words))
    def command(*words):
        kind, said = limited(there, words, seconds=100, memory=2 * MEMORY)
        if kind != "ok": raise SystemExit(said)
    command("train", "--preset", "tiny", "--name", "run", "--set", *WORDS_OF_RUN)
    command("sample", "runs/run", "-n", "8", "--out", "s.npz")
    command("evaluate", "s.npz", "--ref", "digits", "--save-ref", "r.npz", "--out", "e.json",
            "--metrics", "fid,pr,kid")
    run, rng = folder / "runs" / "run", np.random.default_rng(0)
    shutil.copy(folder / "e.json", run / "scores.json")
    (run / "times.json").write_text(json.dumps({"2": {"times": [80., 1., .002], "gamma": .5}}))
    def one(name): return {name: (folder / name).read_bytes()}, name
    files = files_of(run, ".html", ".0")
    found = {f"run: {k}": (files, "", how, hits) for k, (how, *hits) in PARTS.items()}
    m, teacher = load(run), load(run, which="teacher")
    save_model(m, folder / "m.safetensors", json.loads((run / "config.json").read_text()))
    state = {f"model.{k}": v for k, v in teacher.net.state_dict().items()}
    make_edm_pickle(folder / "edm.pkl", state)
    golden = np.load(Path(__file__).parents[1] / "golden" / "edm2_uncond_16.npz")
    edm2 = {k[6:]: torch.from_numpy(v).half() for k, v in golden.items() if k.startswith("state.")}
    make_edm2_snapshot(folder / "edm2.pkl", edm2)
    torch.save({"args": {"lr": .1}, "model_ema": state, "step": np.float64(3)}, folder / "new.pt")
    torch.save({"state_dict": state}, folder / "old.pt", _use_new_zipfile_serialization=False)
    for n in ("m.safetensors", "edm.pkl", "edm2.pkl", "new.pt", "old.pt"): found[n] = *one(n), "load"
    unet = {"config.json": b'{"_class_name": "UNet2DModel", "sample_size": 32}', "weights.bin": b"x"}
    pipe = {f"unet/{k}": v for k, v in unet.items()} | {"model_index.json": b'{"_class_name": "DDPMPipeline"}'}
    found |= {"a pipeline": (pipe, "", "load"), "a unet": (unet, "", "load")}
    x, mu = rng.integers(0, 256, (8, 8, 8, 3), np.uint8), dict(mu=rng.normal(size=8), sigma=np.eye(8))
    for n, arrays in {"edm.npz": mu, "adm.npz": {**mu, "arr_0": x}}.items():
        np.savez(folder / n, **arrays)
        found[n] = *one(n), "statistics"
    found |= {"r.npz": (*one("r.npz"), "reference"), "e.json": (*one("e.json"), "scores")}
    recipe = _with_parts(make_recipe(m, str(run), 20), m)
    _draw_parts(_drawer_of(m, recipe), recipe, _open_parts(folder / "parts" / "x.npz", recipe))
    found["parts"] = files_of(folder / "parts"), "x.npz", "parts overwrite"
    found["edit"] = {"i.png": picture(rng), "mask.png": picture(rng)}, "", "inpaint encode"
    return found


ARRAYS = [np.zeros(0), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 2)), np.array(3.), np.array("x"), np.arange(4),
          np.array([None]), np.full((4, 8, 8, 3), np.nan), np.zeros((4, 8, 8, 3)) + 200., np.zeros((4, 8), complex),
          np.array(["a", "b"]), np.zeros((8, 8)) - 1e300, np.full(8, np.inf), np.zeros((1, 1, 1, 1, 1, 1), np.uint8),
          np.zeros((4, 3, 8, 8), np.int64), np.array([-1, 2, 3, 4]), np.array([b"a"]), np.zeros(4, "M8[s]")]
ODD = [0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1]
WORDS = [None, True, -1, 2**70, 1e999, .5, "", "..", "a/b", "\x1b[31m", "\ud800", [], {}, [0, 1], {"a": 1}, "9" * 30]


def packed_again(data, change):
    "A zip whose members are what a function of name and content makes of them, with sums that fit."
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as z, zipfile.ZipFile(out, "w") as new:
        for n in z.namelist(): new.writestr(n, change(n, z.read(n)))
    return out.getvalue()


def remade(name, data, random):
    "A file that is whole, with an odd value in it; None where this kind has none."
    end, f = name.rpartition(".")[2], io.BytesIO()
    if end == "jsonl":
        lines = data.split(b"\n")
        k = random.randrange(len(lines) - 1)
        return b"\n".join([*lines[:k], json.dumps(odd(json.loads(lines[k]), random)).encode(), *lines[k + 1:]])
    if end == "json": return json.dumps(odd(json.loads(data), random)).encode()
    if end == "pt":
        torch.save(odd(torch.load(io.BytesIO(data), weights_only=False), random), f)
        return f.getvalue()
    if end == "safetensors":
        n = int.from_bytes(data[:8], "little")
        head = odd(json.loads(data[8:8 + n]), random)
        if (own := isinstance(head, dict) and head.get("__metadata__")) and isinstance(own, dict) and "ctm_nb" in own:
            own["ctm_nb"] = json.dumps(odd(json.loads(str(own["ctm_nb"])), random))
        text = json.dumps(head).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + n:]
    if end in ("npz", "zip"):
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        hit = random.choice(names)
        return packed_again(data, lambda n, d: damaged(d, random, n) if n == hit else d)
    if end == "npy":
        if random.random() < .5:  # the text that says shape and type
            head = bytearray(data[:80])
            digits = [k for k, c in enumerate(head) if k > 9 and chr(c).isalnum()]
            for _ in range(random.choice((1, 1, 2))): head[random.choice(digits)] = random.choice(b"0123456789.-fOUc8<")
            return bytes(head) + data[80:]
        np.save(f, random.choice(ARRAYS), allow_pickle=True)
        return f.getvalue()
    return None


def damaged(data, random, name=""):
    "Some bytes turned, cut off, put in, repeated, or made numbers that programs stumble over; or an odd value."
    if random.random() < .5:
        try: again = remade(name, data, random)
        except (ValueError, zipfile.BadZipFile, pickle.PicklingError): again = None
        if again is not None: return again
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, n, way = random.randrange(len(data) + 1), random.choice((1, 2, 4, 16, 200)), random.randrange(6)
        if way == 0: data[at:at + n] = random.randbytes(min(n, len(data) - at))
        elif way == 1: del data[at:]
        elif way == 2: data[at:at] = random.randbytes(n)
        elif way == 3: del data[at:at + n]
        elif way == 4: data[at:at] = data[at:at + n]
        else: data[at:at + 4] = struct.pack(random.choice("<>") + "Q", random.choice(ODD))[:4 + 4 * random.randrange(2)]
    return bytes(data)


def sealed(files, hit, random):
    "The files of a run whose manifests agree with them, mostly, so that the damage is not found by its checksum."
    folder, _, name = hit.rpartition("/")
    about = f"{folder}/checkpoint.json"
    if about not in files or random.random() < .3: return files
    try: body = json.loads(files[about])
    except ValueError: return files
    if not isinstance(body, dict): return files
    body.pop("seal", None)
    if name != "checkpoint.json":
        data = files[hit]
        body["files"][name] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return {**files, about: _seal(body)}


def odd(value, random):
    "JSON in which one value is another."
    if isinstance(value, dict) and value and random.random() < .8:
        key = random.choice(list(value))
        return {**value, key: odd(value[key], random)}
    if isinstance(value, list) and value and random.random() < .8:
        k = random.randrange(len(value))
        return [*value[:k], odd(value[k], random), *value[k + 1:]]
    return random.choice(WORDS)


MADE: dict = {}  # what some trials start from: a run, its configuration and its images, samples of it


def statistics(path):
    r = read_reference(path)
    r.check("inception", None)
    return frechet_gaussians(torch.zeros(8).double(), torch.eye(8).double(), r.mean, r.cov)


OPENERS = {
    "inspect": lambda p: ctm_nb_data(["inspect", str(p), "--workers", "0"]), "load": load, "scores": read_scores,
    "samples": lambda p: [*open_subject(Request(str(p), "digits", n=2)).samples.batches()], "statistics": statistics,
    "reference": lambda p: evaluate(Request(MADE["samples"], str(p))),
    "parts": lambda p: draw_samples(MADE["run"], p, 20),
    "overwrite": lambda p: draw_samples(MADE["run"], p, 20, overwrite=True),
    "inpaint": lambda p: edit_files(MADE["run"], "inpaint", [p / "i.png"], p / "o.png", p / "mask.png", "none"),
    "encode": lambda p: edit_files(MADE["run"], "encode", [p / "i.png"], p / "o.npz", classes="none")}
RUN = {
    "checkpoint": load, "average": lambda p: average(p, .08, "teacher"), "report": write_report,
    "draw": lambda p: draw_samples(str(p), f"{p}.npz", 3, steps=2, times="auto", guidance=2., overwrite=True),
    "score": lambda p: open_subject(Request(str(p), "digits", times="auto", steps=[2])),
    "plan": lambda p: plan(MADE["config"], p, splits=MADE["images"]),
    "resume": lambda p: Trainer(MADE["config"], p, MADE["images"]).scores()}
OPENERS |= RUN


def look(items):
    "Open one thing after the other; each answer begins with a line that only this writes, each refusal ends with one."
    for p, how in items:
        sys.stdout.write(f"\n@@ {p}\n")
        fresh()
        for word in how.split():
            sys.stdout.flush()
            try:
                with one_line_errors(word): OPENERS[word](p)
            except SystemExit as e:
                if e.code not in (0, 1): sys.stdout.write("\n== refused\n")
            except BaseException: traceback.print_exc()


def judged(items):
    "{path: kind of failure and words} of a batch; after a crash or a hang the rest is tried again without that one."
    failed, left, names = {}, list(items), dict(items)
    while left:
        end, words = limited(look, left)
        parts = dict(part.partition("\n")[::2] for part in words.split("\n@@ ")[1:])
        for p, said in parts.items():
            how = names[Path(p)]
            name = f"{p}/" if how.split()[0] in RUN and how != "report" else Path(p).name  # of a run, one of its files
            named = (name, f"{p} ")  # a run is named by its folder too
            unnamed = [part for part in said.split("== refused")[:-1] if not any(n in part for n in named)]
            if "Traceback" in said: failed[p] = "traceback", said[said.index("Traceback"):]
            elif any(ord(c) < 32 and c not in "\n\r\t" or 127 <= ord(c) < 160 for c in said):
                failed[p] = "escape", repr(said)
            elif unnamed: failed[p] = "unnamed", unnamed[0]
        if end not in ("crash", "hang"): break
        last = list(parts)[-1]
        failed[last] = end, words[-300:]
        left = left[[str(p) for p, _ in left].index(last) + 1:]
    return failed


def planted():
    "The failures that the script finds where they are: a crash, a hang, a traceback, too much memory."
    crash = lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV))  # without a dump
    found = [limited(crash)[0], limited(time.sleep, 9, seconds=.2)[0],
             limited(lambda: 1 / 0)[0], limited(lambda: bytearray(3 * 2**30))[0]]
    if found != ["crash", "hang", "traceback", "traceback"]: raise SystemExit(f"a planted failure is not seen: {found}")


def put(root, files):
    for rel, data in files.items():
        (root / rel).parent.mkdir(parents=True, exist_ok=True)
        (root / rel).write_bytes(data)


GOOD: dict = {}


def trial(numbers, seed, folder):
    "Failures of some damaged inputs, {description: (kind, words)}."
    made, names = {}, list(GOOD)
    for k in numbers:
        rng, name = random.Random(f"{seed} {k}"), names[k % len(names)]
        files, target, how, *hits = GOOD[name]
        hit, root = rng.choice(hits[0] if hits else list(files)), folder / f"{k:06}"
        put(root, sealed({**files, hit: damaged(files[hit], rng, hit)}, hit, rng))
        made[root / target] = f"seed {seed}, number {k}: {name}, {hit}", how
    found = judged([(p, how) for p, (_, how) in made.items()])
    for k in numbers:
        for p in folder.glob(f"{k:06}*"): shutil.rmtree(p) if p.is_dir() else p.unlink()
    return {made[Path(p)][0]: trouble for p, trouble in found.items()}


def fuzz(n, seed, folder, only="", size=40):
    "Failures of n damaged inputs of the forms in whose names `only` occurs, which come in turn; by two processes."
    os.environ["CTM_NB_CACHE"] = f"{folder}/cache"
    MADE.update(run=f"{folder}/made/runs/run", samples=f"{folder}/made/s.npz", config=make_config("tiny", WORDS_OF_RUN),
                images={"train": digits(), "held_out": digits("held_out")})
    (folder / "made").mkdir()
    plan(MADE["config"], folder / "made", splits=MADE["images"])  # counts what a step costs, and remembers it
    GOOD.update({k: v for k, v in {**seeds(), **others(folder / "made")}.items() if only in k})
    roots = {name: folder / name.replace("/", "-") for name in GOOD}
    for name, root in roots.items(): put(root, GOOD[name][0])
    if trouble := judged([(root / GOOD[name][1], GOOD[name][2]) for name, root in roots.items()]):
        raise SystemExit(f"what is good fails: {trouble}")
    batches = [range(k, min(k + size, n)) for k in range(0, n, size)]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        found = pool.map(trial, batches, repeat(seed), repeat(folder))
        return {k: v for failures in found for k, v in failures.items()}


def main(n=10_000, seed=0, only="", out=None):
    planted()
    began, kinds = time.time(), ("traceback", "crash", "hang", "escape", "unnamed")
    with tempfile.TemporaryDirectory() as d: failures = fuzz(int(n), int(seed), Path(d), only)
    for what, (kind, words) in failures.items(): print(f"{kind}: {what}\n{words[-1500:]}")
    forms = {}
    for k, name in enumerate(GOOD):
        found = [kind for what, (kind, _) in failures.items() if f": {name}, " in what]
        forms[name] = {"inputs": len(range(k, int(n), len(GOOD))), **{kind: found.count(kind) for kind in kinds}}
    whole = {k: sum(f[k] for f in forms.values()) for k in ("inputs", *kinds)}
    print(f"{'form':22}" + "".join(f"{k:>11}" for k in whole))
    for name, row in forms.items(): print(f"{name:22}" + "".join(f"{v:11}" for v in row.values()))
    about = {"seed": int(seed), "seconds": round(time.time() - began), **whole, "forms": forms}
    if out: Path(out).write_text(json.dumps(about, indent=1) + "\n")
    print(f"{n} inputs in {len(GOOD)} forms, {about['seconds']} s: " + ", ".join(f"{k}: {whole[k]}" for k in kinds))
    sys.exit(bool(failures))


if __name__ == "__main__": main(*sys.argv[1:])
