"""Damaged and hostile files, in child processes with limits:  python tests/system/fuzz.py [N] [SEED]

A trial may end in a result or in one line; a traceback, a crash or a hang is a failure. Before it starts, the script
shows that it reports each of these three when it is planted.
"""
import gzip
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
from pathlib import Path

import numpy as np
import torch  # noqa: F401  # before the limit of memory, and only once
from PIL import Image
from scipy.io import savemat

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.data import convert, read  # noqa: F401  # imported here, once for all children

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
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            signal.alarm(3 * seconds)  # for who waits and does nothing; others may want the processor, too
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
    cifar = {f"data_batch_{k}": pickle.dumps(batch, protocol=2) for k in range(1, 6)}
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
    return {**found, "cifar": (cifar, ""), "idx": (idx, "")}


ODD = [0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1]
WORDS = [None, True, -1, 2**70, 1e999, .5, "", "..", "a/b", "\x1b[31m", "\ud800", [], {}, [0, 1], {"a": 1}, "9" * 30]


def damaged(data, random):
    "Some bytes turned, cut off, put in, repeated, or made numbers that programs stumble over; JSON gets odd values."
    data = bytearray(data)
    if data[:1] == b"{" and random.random() < .5:
        try: return json.dumps(odd(json.loads(data), random)).encode()
        except ValueError: pass
    for _ in range(random.choice((1, 1, 2, 8))):
        at, n, way = random.randrange(len(data) + 1), random.choice((1, 2, 4, 16, 200)), random.randrange(6)
        if way == 0: data[at:at + n] = random.randbytes(min(n, len(data) - at))
        elif way == 1: del data[at:]
        elif way == 2: data[at:at] = random.randbytes(n)
        elif way == 3: del data[at:at + n]
        elif way == 4: data[at:at] = data[at:at + n]
        else: data[at:at + 4] = struct.pack(random.choice("<>") + "Q", random.choice(ODD))[:4 + 4 * random.randrange(2)]
    return bytes(data)


def odd(value, random):
    "JSON in which one value is another."
    if isinstance(value, dict) and value and random.random() < .8:
        key = random.choice(list(value))
        return {**value, key: odd(value[key], random)}
    if isinstance(value, list) and value and random.random() < .8:
        k = random.randrange(len(value))
        return [*value[:k], odd(value[k], random), *value[k + 1:]]
    return random.choice(WORDS)


def look(paths):
    "Inspect data sets one after the other; each answer begins with a line that only this writes."
    for p in paths:
        sys.stdout.write(f"\n@@ {p}\n")
        sys.stdout.flush()
        try: ctm_nb_data(["inspect", str(p), "--workers", "0"])
        except SystemExit as e:
            if e.code not in (0, 1): sys.stdout.write("\n== refused\n")
        except BaseException: traceback.print_exc()


def judged(paths):
    "{path: kind of failure and words} of a batch; after a crash or a hang the rest is tried again without that one."
    failed, left = {}, list(paths)
    while left:
        how, words = limited(look, left)
        parts = dict(part.partition("\n")[::2] for part in words.split("\n@@ ")[1:])
        for p, said in parts.items():
            if "Traceback" in said: failed[p] = "traceback", said
            elif any(ord(c) < 32 and c != "\n" or 127 <= ord(c) < 160 for c in said): failed[p] = "escape", repr(said)
            elif "== refused" in said and Path(p).name not in said: failed[p] = "unnamed", said
        if how not in ("crash", "hang"): break
        last = list(parts)[-1]
        failed[last] = how, words[-300:]
        left = left[[str(p) for p in left].index(last) + 1:]
    return failed


def planted():
    "The failures that the script finds where they are: a crash, a hang, a traceback, too much memory."
    found = [limited(lambda: os.kill(os.getpid(), signal.SIGSEGV))[0], limited(time.sleep, 9, seconds=1)[0],
             limited(lambda: 1 / 0)[0], limited(lambda: bytearray(3 * 2**30))[0]]
    if found != ["crash", "hang", "traceback", "traceback"]: raise SystemExit(f"a planted failure is not seen: {found}")


def fuzz(n, seed, folder, size=40):
    "Failures of n damaged data sets, {description: (kind, words)}, and how many there were of each form."
    good, rng, failures, count = seeds(), random.Random(seed), {}, {}
    for name, (files, target) in good.items():
        for rel, data in files.items():
            (folder / name / rel).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / rel).write_bytes(data)
        if trouble := judged([folder / name / target]): raise SystemExit(f"a good {name} fails: {trouble}")
    names = list(good)
    for start in range(0, n, size):
        made = {}
        for k in range(start, min(start + size, n)):
            name = names[k % len(names)]
            files, target = good[name]
            hit, root = rng.choice(list(files)), folder / f"{k:06}"
            for rel, data in files.items():
                (root / rel).parent.mkdir(parents=True, exist_ok=True)
                (root / rel).write_bytes(damaged(data, rng) if rel == hit else data)
            made[str(root / target)] = f"seed {seed}, number {k}: {name}, {hit}"
            count[name] = count.get(name, 0) + 1
        failures |= {made[p]: found for p, found in judged(list(map(Path, made))).items()}
        for k in range(start, min(start + size, n)): shutil.rmtree(folder / f"{k:06}")
    return failures, count


def main(n=10_000, seed=0):
    planted()
    began = time.time()
    with tempfile.TemporaryDirectory() as d: failures, count = fuzz(int(n), int(seed), Path(d))
    for what, (kind, words) in failures.items(): print(f"{kind}: {what}\n{words[-1500:]}")
    print(f"{n} inputs in {len(count)} forms, {time.time() - began:.0f} s: "
          + (", ".join(f"{k}: {sum(v[0] == k for v in failures.values())}" for k in
             ("traceback", "crash", "hang", "escape", "unnamed"))))
    sys.exit(bool(failures))


if __name__ == "__main__": main(*sys.argv[1:])
