"""Archives: their entries, whatever its bytes; and memory that doesn't grow by the images."""

import random
import zipfile

import numpy as np
import pytest
from warm import python

from ctm_nb.data.convert import store
from ctm_nb.data.read import open_archive, read_entry, zip_entries


def by_zipfile(path):
    with zipfile.ZipFile(path) as z:
        return {e.filename: z.read(e) for e in z.infolist() if not e.is_dir()}


def by_us(path):
    with open(path, "rb") as f:
        return {n: read_entry(f.fileno(), *place) for n, place in zip_entries(path)}


@pytest.mark.parametrize("seed", range(8))
def test_random_archives_are_read_as_zipfile_reads_them(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.comment = rng.randbytes(rng.choice([0, 5, 65535])).replace(b"PK", b"kp")
        for i in range(rng.choice([0, 1, 30])):
            name = rng.choice(["a", "ä/ö", "d/e f", "кот"]) + f"/{i}" + rng.choice(["", "/"])
            info = zipfile.ZipInfo(name)
            info.extra, info.comment = rng.choice([b"", b"\x99\x99\x04\x00abcd"]), rng.choice([b"", b"why"])
            data = b"" if name.endswith("/") else rng.randbytes(rng.randrange(50)) * 3
            z.writestr(info, data, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    if rng.random() < 0.5:
        path.write_bytes(b"in front" + path.read_bytes())
    assert by_us(path) == by_zipfile(path)


def test_damaged_archives_are_errors_and_nothing_else(tmp_path):
    "One byte changed, or the file cut, anywhere: ValueError, or entries that may be broken, never another exception."
    rng, path = random.Random(0), tmp_path / "a.zip"
    with open(path, "wb") as f:
        store(f, ((f"d/{i}.png", bytes([i] * 20)) for i in range(5)))
    whole = path.read_bytes()
    opened = refused = broken = 0
    for k in range(1500):
        data = bytearray(whole)
        if k % 3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            s = open_archive([path])
        except ValueError:
            refused += 1
            continue
        opened += 1
        for i in range(len(s)):
            try:
                s.get(i)
            except ValueError:
                broken += 1
    assert opened > 200 and refused > 500 and broken > 50  # all three happen; a reader that refuses all is no reader


@pytest.mark.parametrize("n", [0, 1, 66000])
def test_what_we_write_zipfile_reads(tmp_path, n):
    with open(tmp_path / "a.zip", "wb") as f:
        store(f, ((f"{i:06}", b"x" * (i % 3)) for i in range(n)))
    assert by_us(tmp_path / "a.zip") == by_zipfile(tmp_path / "a.zip") and len(by_us(tmp_path / "a.zip")) == n
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        assert z.testzip() is None


def test_wide_sizes_of_single_entries(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z, z.open("big.png", "w", force_zip64=True) as f:
        f.write(b"abc")
    assert by_us(tmp_path / "a.zip") == {"big.png": b"abc"}


def test_the_order_is_folder_by_folder(tmp_path):
    rng = random.Random(1)
    parts = ["a", "a-b", "a b", "b", "ä", "1", "10"]
    names = list({"/".join(rng.choice(parts) for _ in range(3)) + ".png" for _ in range(200)})
    with open(tmp_path / "a.zip", "wb") as f:
        store(f, ((n, b"") for n in names))
    assert list(open_archive([tmp_path / "a.zip"]).names) == sorted(names, key=lambda n: n.split("/"))


MEMORY = """
import resource, sys
from pathlib import Path
from ctm_nb.data.convert import dataset_json, edm_name, store
from ctm_nb.data.read import open_source
path, n = Path(sys.argv[1]), int(sys.argv[2])
def entries():
    yield from ((edm_name(i), bytes(7000)) for i in range(n))
    yield "dataset.json", dataset_json([i % 10 for i in range(n)], list("abcdefghij"))
with open(path, "wb") as f: store(f, entries())
assert len(open_source(path)) == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_grows_with_names_and_not_with_images(tmp_path):
    "The highest memory of writing and opening an EDM zip grows by what is kept about an image, not by its 7,000 bytes."
    sizes, peaks = (2_000, 12_000), []
    for n in sizes:
        done = python(MEMORY, tmp_path / "a.zip", n)
        done.check_returncode()
        peaks.append(int(done.stdout))
    assert (peaks[1] - peaks[0]) / np.diff(sizes)[0] < 2500
