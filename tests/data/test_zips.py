"""The directory of a zip: as Python's own reader sees it, on whatever bytes; and memory that doesn't grow with objects."""
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ctm_nb.data.read import open_zip
from ctm_nb.data.read import Names, path_order, read_directory, read_entry, store


def by_zipfile(path):
    with zipfile.ZipFile(path) as z: return [(e.filename, e.header_offset, e.compress_size, e.file_size, e.CRC, e.compress_type) for e in z.infolist() if not e.is_dir()]


def by_us(path):
    names, place = read_directory(path)
    return [(n, *p[1:]) for n, p in zip(names, place.tolist())]


@pytest.mark.parametrize("seed", range(20))
def test_random_archives_are_read_as_zipfile_reads_them(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.comment = rng.randbytes(rng.choice([0, 5, 65535])).replace(b"PK", b"kp")
        for i in range(rng.choice([0, 1, 30])):
            name = rng.choice(["a", "ä/ö", "d/e f", "кот"]) + f"/{i}" + rng.choice(["", "/"])
            info = zipfile.ZipInfo(name); info.extra = rng.choice([b"", b"\x99\x99\x04\x00abcd"]); info.comment = rng.choice([b"", b"why"])
            z.writestr(info, b"" if name.endswith("/") else rng.randbytes(rng.randrange(50)) * 3, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    if rng.random() < .5: path.write_bytes(b"in front" + path.read_bytes())
    assert by_us(path) == by_zipfile(path)
    names, place = read_directory(path)
    with open(path, "rb") as f, zipfile.ZipFile(path) as z:
        for n, p in zip(names, place.tolist()): assert read_entry(f.fileno(), *p[1:]) == z.read(n)


def test_damaged_archives_are_errors_and_nothing_else(tmp_path):
    "One byte changed, or the file cut, anywhere: ValueError, or entries that may be broken, never another exception."
    rng, path = random.Random(0), tmp_path / "a.zip"
    with open(path, "wb") as f: store(f, ((f"d/{i}.png", bytes([i] * 20)) for i in range(5)))
    whole = path.read_bytes()
    for k in range(1500):
        data = bytearray(whole)
        if k % 3: data[rng.randrange(len(data))] = rng.randrange(256)
        else: del data[rng.randrange(len(data)):]
        path.write_bytes(data)
        try: s = open_zip(path)
        except ValueError: continue
        for i in range(len(s)):
            try: s.get(i)
            except ValueError: pass


@pytest.mark.parametrize("n", [0, 1, 65534, 65535, 65536])
def test_what_we_write_zipfile_reads(tmp_path, n):
    with open(tmp_path / "a.zip", "wb") as f: store(f, ((f"{i:06}", b"x" * (i % 3)) for i in range(n)))
    assert by_us(tmp_path / "a.zip") == by_zipfile(tmp_path / "a.zip") and len(by_us(tmp_path / "a.zip")) == n
    with zipfile.ZipFile(tmp_path / "a.zip") as z: assert z.testzip() is None


def test_wide_sizes_of_single_entries(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        with z.open("big.png", "w", force_zip64=True) as f: f.write(b"abc")
    assert by_us(tmp_path / "a.zip") == by_zipfile(tmp_path / "a.zip")
    names, place = read_directory(tmp_path / "a.zip")
    with open(tmp_path / "a.zip", "rb") as f: assert read_entry(f.fileno(), *place[0, 1:].tolist()) == b"abc"


def test_path_order_is_that_of_split_paths():
    rng = random.Random(1)
    names = list({"/".join(rng.choice(["a", "a-b", "a b", "b", "ä", "1", "10"]) for _ in range(rng.randrange(1, 4))) for _ in range(200)})
    assert [names[i] for i in path_order(Names(names), "x")] == sorted(names, key=lambda n: n.split("/"))


MEMORY = """
import resource, sys
from pathlib import Path
from ctm_nb.data.read import open_source
from ctm_nb.data.convert import dataset_json, edm_name
from ctm_nb.data.read import store
path, n = Path(sys.argv[2]), int(sys.argv[3])
if sys.argv[1] == "write":
    blob = bytes(70)
    def entries():
        yield from ((edm_name(i), blob) for i in range(n))
        yield "dataset.json", dataset_json([i % 10 for i in range(n)], list("abcdefghij"))
    with open(path, "wb") as f: store(f, entries())
else: assert len(open_source(path)) == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("what, limit", [("write", 220), ("read", 300)])
def test_memory_an_image(tmp_path, what, limit):
    "The highest memory of writing and of opening an EDM zip grows by a few hundred bytes an image at most."
    sizes = (10_000, 60_000)
    def peak(what, n): return int(subprocess.run([sys.executable, "-c", MEMORY, what, tmp_path / f"{n}.zip", str(n)], capture_output=True, text=True, check=True).stdout)
    peaks = {k: [peak(k, n) for n in sizes] for k in (("write",) if what == "write" else ("write", "read"))}[what]
    assert (peaks[1] - peaks[0]) / np.diff(sizes)[0] < limit
