"""What files of strangers cost: the peak memory of `ctm_nb_data inspect` on each bomb, and a folder with one file of
everything.

    python benchmarks/files.py
        prints both and writes nbs/results/data/files.json, in about three minutes

Each bomb is opened in a process of its own; "above" is its peak of resident memory minus that of a folder with one
small picture, which is what Python and the libraries take. The Bombs are a few megabytes and unpack to gigabytes.
"""
import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "data"
SIDE = 24


def encoded(kind="png", mode="RGB", size=(SIDE, SIDE), **how):
    f = io.BytesIO()
    a = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(a).convert(mode).save(f, kind, **how)
    return f.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def zeros(gib, pack):
    "So many GiB of zeros, packed in pieces of 64 MiB, which unpack one after the other."
    return pack(bytes(2**26)) * int(gib * 16)


def tar_of(name, size, pack):
    "A compressed tar with one file of zeros."
    info = tarfile.TarInfo(name)
    info.size = size
    return pack(info.tobuf()) + zeros(size / 2**30, pack) + pack(bytes(1024))


def zip_of(path, name, size, method):
    with zipfile.ZipFile(path, "w", method) as z, z.open(name, "w", force_zip64=True) as f:
        for _ in range(size // 2**26): f.write(bytes(2**26))
    return path


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def strip(width, height):
    "A PNG of one colour that says it is so large."
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(2**26))) + chunk(b"IEND", b"")


def cut_store(folder):
    import lmdb
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as txn:
        for k in range(200): txn.put(f"{k:03}.png".encode(), encoded())
    data = (folder / "data.mdb").read_bytes()
    return write(folder / "data.mdb", data[:len(data) // 2 // 4096 * 4096]).parent


def linked(path, to):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path.parent


def piped(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path.parent


GIB = 2**30
BOMBS = {  # name -> how it is made below a folder, and bytes that it would take unpacked
    "idx.gz, 13.8 GB": (lambda d: write(d / "a-images-idx3-ubyte.gz", gzip.compress(
        bytes([0, 0, 8, 3]) + struct.pack(">3I", 13194139, 32, 32)) + zeros(12.875, gzip.compress)), 12.875 * GIB),
    "CIFAR's tar.gz": (lambda d: write(d / "c.tar.gz", tar_of("data_batch_1", 8 * GIB, gzip.compress)), 8 * GIB),
    "tar.xz of pictures": (lambda d: write(d / "c.tar.xz", tar_of("a.png", 8 * GIB, lzma.compress)), 8 * GIB),
    "tar.bz2 of pictures": (lambda d: write(d / "c.tar.bz2", tar_of("a.png", 8 * GIB, bz2.compress)), 8 * GIB),
    "npz": (lambda d: zip_of(d / "a.npz", "arr_0.npy", GIB, 8), GIB),
    "picture in a zip": (lambda d: zip_of(d / "a.zip", "a.png", GIB, 8), GIB),
    "labels in a zip": (lambda d: zip_of(d / "b.zip", "labels.csv", GIB, 8), GIB),
    "PNG, 1 x 80,000,000": (lambda d: write(d / "s" / "a.png", strip(1, 80_000_000)).parent, 8e7),
    "PNG, 30,000 x 30,000": (lambda d: write(d / "b" / "a.png", strip(30_000, 30_000)).parent, 9e8),
    "JPEG, 48 megapixels": (lambda d: write(d / "j" / "a.jpg", encoded("jpeg", size=(8000, 6000))).parent, 3 * 48e6),
    "s-{0..99999999}.tar": (lambda d: d / "s-{0..99999999}.tar", None),
    "LMDB that is cut": (lambda d: cut_store(d / "l"), None),
    "a pipe among pictures": (lambda d: piped(d / "p" / "a.png"), None),
    "/dev/zero among pictures": (lambda d: linked(d / "z" / "a.png", "/dev/zero"), None),
}


def everything(folder):
    "One file of everything that people leave in a folder of pictures."
    good = {f"{kind}.{end}": encoded(kind) for kind, end in (
        ("png", "PNG"), ("jpeg", "jpeg"), ("gif", "gif"), ("bmp", "bmp"), ("webp", "webp"), ("tiff", "tif"),
        ("ppm", "ppm"), ("jpeg2000", "jp2"))}
    if features.check("avif"): good["avif.avif"] = encoded("avif")
    for mode, kind in (("1", "png"), ("L", "jpeg"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpeg"),
                       ("I;16", "png"), ("YCbCr", "jpeg")):
        if mode == "I;16": image = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 100)
        else: image = Image.open(io.BytesIO(encoded())).convert(mode)
        f = io.BytesIO()
        image.save(f, kind)
        good[f"mode {mode.replace(';', '-')}.{kind}"] = f.getvalue()
    turned = Image.Exif()
    turned[274] = 6
    good["turned.jpg"] = encoded("jpeg", size=(SIDE, 16), exif=turned)
    named = {"copy of png.png": good["png.PNG"], "a png.jpg": encoded("png"), "кот 猫.png": encoded(mode="L")}
    good |= named
    bad = {"photo.heic": b"\0\0\0\x18ftypheic" + bytes(99), "evil.png": b"%!PS-Adobe-3.0 EPSF-3.0\n", "empty.png": b"",
           "text.jpg": b"dear diary", "half.jpg": encoded("jpeg")[:300], "escape \x1b[31m.png": b"\x1b[31m",
           "bomb.png": strip(30_000, 30_000), "page.gif": b"<!DOCTYPE html>", "photoshop.tif": b"8BPS\0\1"}
    others = {"Thumbs.db": b"\xd0\xcf", ".DS_Store": b"\0\0\0\1Bud1", "notes.txt": b"x", "drawing.svg": b"<svg/>",
              "film.mp4": b"\0\0\0\x18ftypmp42", "paper.pdf": b"%PDF-1.7", "more.zip": b"PK\3\4",
              "weights.pt": b"PK\3\4", "shard.tar": bytes(10240), "raw.dng": b"II*\0",
              "__MACOSX/._png.png": b"\0\5\x16\7"}
    for name, data in {**good, **bad, **others}.items(): write(folder / name, data)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to("nowhere")
    return len(good), len(bad) + 2, sorted(others)


def inspect(path):
    "Code, words, peak memory in bytes and processor seconds of `ctm_nb_data inspect`."
    words = [sys.executable, "-m", "ctm_nb", "data", "inspect", str(path), "--workers", "0"]
    with tempfile.TemporaryFile() as f:
        p = subprocess.Popen(words, stdout=f, stderr=f)
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        f.seek(0)
        return p.returncode, f.read().decode(), used.ru_maxrss * 1024, used.ru_utime + used.ru_stime


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        top = Path(d)
        _, _, usual, _ = inspect(write(top / "one" / "a.png", encoded()).parent)
        for name, (make, size) in BOMBS.items():
            path = make(top)
            stored = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else \
                path.stat().st_size if path.exists() else 0
            code, said, peak, seconds = inspect(path)
            told = [t for t in said.split("\n") if "at work" not in t]
            line = next((t for t in told if "ctm_nb_data" in t or " a." in t), [*told, *"   "][3])  # else the sizes
            rows.append(dict(name=name, stored=stored, unpacked=size, code=code, above=peak - usual, seconds=seconds,
                             said=line.replace(d, "").strip()[:160]))
            print(f"{name:26} {stored / 1e6:8.2f} MB {(size or 0) / 1e6:10.0f} MB  {(peak - usual) / 1e6:6.0f} MB  "
                  f"{seconds:5.1f} s  {rows[-1]['said'][:90]}", flush=True)
            if path.is_file(): path.unlink()
        (top / "everything").mkdir()
        everything(top / "everything")
        said = "\n".join(t for t in inspect(top / "everything")[1].split("\n") if "at work" not in t)
    print(said)
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"usual": usual, "bombs": rows, "everything": said}
    (RESULTS / "files.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
