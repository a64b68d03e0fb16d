"""Files of strangers: what is refused and how, what they may cost, and what never reaches a terminal or a path."""

import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import pickle
import re
import struct
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from warm import python

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.data.convert import convert, folder_names
from ctm_nb.data.files import readable
from ctm_nb.data.read import ENCODINGS, BrokenImage, _unpickle_arrays, decode, open_source

SYSTEM = Path(__file__).parents[1] / "system"
sys.path.insert(0, str(SYSTEM))
from fuzz import limited, tarred  # noqa: E402

ESCAPE = "\x1b]0;pwned\x07\x1b[31m"


def png(value=0, size=(4, 4)):
    f = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(f, "png")
    return f.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Quick(zipfile.LZMACompressor):
    "Writes what any reader of LZMA reads, in a tenth of the time."
    def _init(self):
        head = super()._init()
        self._comp = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 0}])
        return head


def zipped(path, files, method=0):
    with mock.patch("zipfile.LZMACompressor", Quick), zipfile.ZipFile(path, "w", method, compresslevel=1) as z:
        for n, data in files.items(): z.writestr(n, data)
    return path


def inspected(path, *words):
    "The code and all words of `ctm_nb_data inspect`, in a child process that may take 20 s and 1 GB."
    how, said = limited(ctm_nb_data, ["inspect", str(path), "--workers", "0", *words], memory=2**30)
    assert how in ("ok", "refused"), (how, said)
    assert all(c.isprintable() or c == "\n" for c in said), repr(said)
    return how, said


# ---- pickles

def batches(**of_one):
    "The files of a small CIFAR-10, of whose first batch something is told."
    good = {b"data": np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072), b"labels": [0, 1, 9]}
    files = {f"data_batch_{k}": pickle.dumps(good, protocol=2) for k in range(1, 6)}
    return files | {"data_batch_1": pickle.dumps({**good, **{k.encode(): v for k, v in of_one.items()}}, protocol=2)}


def raw(code):
    "The files of a small CIFAR-10 whose first batch is a program."
    return batches() | {"data_batch_1": code}


OBJECTS = b"cnumpy\ndtype\nU\x02O8\x85R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
BYTES = OBJECTS.replace(b"O8\x85", b"u1K\x00K\x01\x87").replace(b"K\x3f", b"K\x00")
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"


def one_array(shape, content):
    "A batch as Python 2 wrote it, of whose array the shape is a program; it ends with three labels and a name."
    return (b"\x80\x02}q\x01(U\x04data" + EMPTY + b"(K\x01" + shape + BYTES + b"\x89T" + struct.pack("<i", len(content))
            + content + b"tbU\x06labels](K\x00K\x01K\x09eU\x09filenames]U\x09tr\xfcck.png"
            + b"aU\x0bbatch_labelU\x15training batch 1 of 5u.")


def laughs():
    "A list whose text would have 3**60 letters."
    x = [1]
    for _ in range(60): x = [x, x, x]
    return x


PICKLES = {
    "an array of pointers": batches(data=np.array([[None] * 3072], object)),
    "an array of floats": batches(data=np.zeros((3, 3072))),
    "an array of signed bytes": batches(data=np.zeros((3, 3072), np.int8)),
    "room for 2**31 memos": raw(b"\x80\x02}r\xff\xff\xff\x7f."),
    "an array of 2**40 bytes": raw(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
    "bytes beyond the end": raw(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."),
    "labels that unfold without end": batches(labels=laughs()),
    "labels that are words": batches(labels=["a", "b", "c"]),
    "too few labels": batches(labels=[1]),
    "negative labels": batches(labels=[0, 1, -1]),
    "a label above the names": batches(labels=[0, 1, 10]),
    "another width": batches(data=np.zeros((3, 100), np.uint8)),
    "a list": raw(pickle.dumps([1])),
    "nothing": raw(b""),
    "half of it": raw(batches()["data_batch_2"][:4000]),
    "a global": raw(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "an object of the registry": raw(b"\x80\x02\x82\x01."),
    "an attribute": raw(b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb."),
    "names that unfold without end": batches() | {"batches.meta": pickle.dumps({"label_names": laughs()})},
    "names that are numbers": batches() | {"batches.meta": pickle.dumps({"label_names": list(range(10))})},
    "an array of pointers in one call": batches(data=np.array([[None] * 3072], object)) | raw(
        b"\x80\x05}\x8c\x04datacnumpy.core.numeric\n_frombuffer\n(C\x08" + bytes(range(8)) + OBJECTS
        + b"K\x01\x85\x8c\x01CtRs."),
    "an array of pointers told by its state": raw(
        b"\x80\x02}X\x04\x00\x00\x00data" + EMPTY + b"(K\x01K\x01\x85" + OBJECTS + b"\x89U\x0812345678tbs."),
    "an array of -1 rows": raw(one_array(b"J\xff\xff\xff\xffM\x00\x0c\x86", bytes(100))),
    "an array of 2**62 rows": raw(one_array(b"\x8a\x08" + struct.pack("<q", 2**62) + b"M\x00\x0c\x86", bytes(3072))),
    "an array without content": raw(b"\x80\x02}X\x04\x00\x00\x00data" + EMPTY + b"s."),
    "an attribute in place of an array": raw(
        b"\x80\x02}X\x04\x00\x00\x00data" + EMPTY + b"}X\x05\x00\x00\x00arrayK\x01sbs."),
    "an object from outside": raw(b"\x80\x02}X\x04\x00\x00\x00dataX\x01\x00\x00\x00aQs."),
    "protocol 0": raw(pickle.dumps({"data": [1]}, 0)),
    "four batches": {k: v for k, v in batches().items() if k != "data_batch_3"},
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("form", ["folder", "tar.gz"])
def test_cifar_is_numbers_only(tmp_path, kind, form):
    path = tmp_path / "cifar"
    if form == "folder": write(path, PICKLES[kind])
    else: path = tarred(tmp_path / "cifar.tar.gz", PICKLES[kind], "w:gz")
    how, said = inspected(path)
    assert how == "refused" and str(path) in said and said.count("\n") == 1, said
    assert "memory" not in said  # it is seen for what it is, and not by what it costs


HONEST = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [bytes, str])
def test_cifar_in_every_protocol(tmp_path, protocol, keys):
    "Keys and names are bytes or strings, labels numbers of Python or numpy, and arrays lie in rows or in columns."
    named = lambda d: {k.encode() if keys is bytes else k: v for k, v in d.items()}
    forms = [HONEST, np.asfortranarray(HONEST), np.repeat(HONEST, 2, 1)[:, ::2], HONEST[::-1][::-1], HONEST]
    batches = [named({"data": a, "labels": [0, np.int64(1), 9], "mean": np.ones(3)}) for a in forms]
    files = {f"data_batch_{k}": pickle.dumps(b, protocol) for k, b in enumerate(batches, 1)}
    names = [n.encode() if keys is bytes else n for n in "abcdefghij"]
    files["batches.meta"] = pickle.dumps(named({"label_names": names, "num_vis": 3072}), protocol)
    s = open_source(write(tmp_path / "c", files))
    assert s.classes == list("abcdefghij") and s.labels.tolist() == [0, 1, 9] * 5
    assert np.array_equal(s.images, np.tile(HONEST.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1), (5, 1, 1, 1)))


def test_cifar_of_python_2(tmp_path):
    "As it is offered for download: strings of bytes everywhere."
    batch = one_array(b"K\x03M\x00\x0c\x86", HONEST.tobytes())
    assert pickle.loads(batch, encoding="bytes")[b"labels"] == [0, 1, 9]  # Python agrees that it is one
    names = b"\x80\x02}U\x0blabel_names](" + b"".join(b"U\x01" + bytes([c]) for c in b"abcdefghij") + b"es."
    s = open_source(write(tmp_path / "c", {**{f"data_batch_{k}": batch for k in range(1, 6)}, "batches.meta": names}))
    assert s.classes == list("abcdefghij") and s.labels.tolist() == [0, 1, 9] * 5
    assert np.array_equal(s.images[:3], HONEST.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1))


PROGRAMS = {
    "lists without end": (b"(" + b"]" * 2_000_000 + b"t", "steps to unfold"),
    "a text that is encoded again and again": (
        b"X\x00\x00\x10\x00" + b"x" * 2**20 + b"q\0c_codecs\nencode\nq\1" + b"h\1h\0U\6latin1\x86R" * 900,
        "more memory than the file"),
    "a text of wide letters": (
        b"X" + struct.pack("<I", 2**24 + 4) + b"x" * 2**24 + "😀".encode(), "more memory than the file"),
    "a text longer than the file": (b"X\xff\xff\xff\xff", "more memory than the file"),
    "a long key again and again": (b"T\0\0\x80\0" + bytes(2**23) + b"q\0}" + b"h\0Ns" * 9, "key that is a memoryview"),
    "a long name of a module, again and again": (
        b"X\0\0\x80\0numpy._core." + b"x" * (2**23 - 12) + b"q\0X\1\0\0\0xq\1" + b"h\0h\1\x93" * 9,
        "it asks for numpy.core.x"),
    "a tuple deep in a key": (b"})" + b"\x85" * 100_000 + b"Ns", "key that is a tuple"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_pickle_of_cifar_costs_what_it_is_worth(tmp_path, kind):
    program, why = PROGRAMS[kind]
    path = write(tmp_path / "cifar", raw(b"\x80\x04" + program + b"."))
    how, said = inspected(path)
    assert how == "refused" and said.count("\n") == 1, said
    assert re.search(f"data_batch_1 can't be read: .*{why}", said), said


@pytest.mark.parametrize("batch", [one_array(b"K\x03M\x00\x0c\x86", HONEST.tobytes()), *(pickle.dumps(
    {b"data": HONEST, b"labels": [0, 1, 9]}, protocol) for protocol in (2, 3, 4, 5))], ids="py2 2 3 4 5".split())
def test_a_batch_that_is_cut_anywhere(batch):
    "The honest one is read; none of those that end early is, and each says so in one line with the file's name."
    assert np.array_equal(_unpickle_arrays(batch, "batch")["data"], HONEST)
    for n in (*range(0, 400), *range(400, len(batch) - 200, 997), *range(len(batch) - 200, len(batch))):
        with pytest.raises(ValueError, match=r"^batch can't be read: [^\n]+$"): _unpickle_arrays(batch[:n], "batch")


def test_cifar_without_a_meta_file_has_ten_classes(tmp_path):
    s = open_source(write(tmp_path / "c", batches()))
    assert (len(s), s.classes, s.labels.tolist()) == (15, list(map(str, range(10))), [0, 1, 9] * 5)
    assert s.pixels(1)[2, 5, 1] == (3072 + 1024 + 2 * 32 + 5) % 256


# ---- decoders

def test_only_formats_of_pictures_are_decoded():
    "Every format that Pillow can write is read to the last pixel, or named as none; PostScript starts no program."
    Image.init()
    picture, read = Image.new("RGB", (16, 16), (200, 100, 50)), []
    for kind in sorted(Image.SAVE):
        f = io.BytesIO()
        try: picture.save(f, kind)
        except Exception: continue
        try: a = decode(f.getvalue())
        except BrokenImage as e: assert str(e).startswith("not an image, begins with"), (kind, str(e))
        else:
            read.append(kind)
            assert a.shape == (16, 16, 3) and np.abs(a.astype(int) - [200, 100, 50]).max() < 12, kind
    assert {*ENCODINGS} <= {*read} and {*read} - {*ENCODINGS} <= {"DIB", "MPO", "JFIF"}, read
    with pytest.raises(BrokenImage, match="not an image"): decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_heif_says_what_to_install():
    if importlib.util.find_spec("pillow_heif"): pytest.skip("it is installed")
    with pytest.raises(BrokenImage, match="pip install pillow-heif"): decode(b"\0\0\0\x18ftypheic" + bytes(99))


# ---- names

CLASSES = ["..", ".", "/", "a/b", "a_b", "A_B", "a\\b", "-n", "two\nlines", ESCAPE + "one", "", " ", "x" * 300,
           "x" * 301, "ä" * 200, "class", "con/..", "cat", "dog", "\u202ecat", "../../etc", "a_b (4)", "\ud800"]


def test_folders_of_classes_are_safe_and_distinct():
    names = folder_names(CLASSES)
    alike = folder_names(["x (5) (3)", "y", "x", "x (5)", "a\u0308", "\xe4"])  # the last two are one on a Mac
    assert len({unicodedata.normalize("NFC", n) for n in alike}) == len(alike) and alike[1] == "y"
    assert len({n.casefold() for n in names}) == len(CLASSES) and names[CLASSES.index("dog")] == "dog"
    for n in names:
        assert n and n[0] not in ".-" and len(n.encode()) < 256 and n.isprintable() and not set(n) & set("/\\:"), n


def test_a_conversion_and_samples_stay_inside_of_their_folder(tmp_path):
    from ctm_nb.data.read import ArraySource
    from ctm_nb.evaluation.draw import _save_samples
    (tmp_path / "in").mkdir()
    n = len(CLASSES)
    images, y = np.zeros((n, 4, 4, 3), np.uint8), np.arange(n)
    source = ArraySource("x", "array", list(map(str, y)), y, [readable(c) for c in CLASSES], images=images)
    convert(source, tmp_path / "in" / "a", workers=0)
    _save_samples(tmp_path / "in" / "b", images, np.append(y[1:], -1), {"class_names": CLASSES})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["a", "b"]
    for name in "ab": assert len({p.parent for p in (tmp_path / "in" / name).rglob("*.png")}) == n
    assert open_source(tmp_path / "in" / "a").classes == source.classes


def test_readable_is_printable_and_keeps_what_is():
    everything = "".join(map(chr, range(0x3000))) + "\ud800\udcff\u202e\ue000\U000e0001"
    assert readable(everything).isprintable() and readable("Ünïcode 字") == "Ünïcode 字"
    assert readable(os.fsdecode(b"caf\xe9\x1b")) == r"caf\xe9\x1b"


bad = ESCAPE + "x.png"
SPEAKING = {
    "a name": lambda p: zipped(p / "a.zip", {bad: b"zzz", "b.png": png()}),
    "a name that is there twice": lambda p: tarred(p / "a.tar", {bad: png()}) and _twice(p / "a.tar"),
    "a path outside": lambda p: zipped(p / "a.zip", {"../" + bad: png()}),
    "other files": lambda p: zipped(p / "a.zip", {"a.png": png(), ESCAPE + ".txt": b""}),
    "folders": lambda p: zipped(p / "a.zip", {ESCAPE + "/a.png": png(), "b/b.png": png()}),
    "one folder": lambda p: zipped(p / "a.zip", {ESCAPE + "/a.png": png()}),
    "another size": lambda p: zipped(p / "a.zip", {"a.png": png(size=(5, 4)), bad: png()}),
    "a method": lambda p: _by_zstd(zipped(p / "a.zip", {bad: png()})),
    "labels of others": lambda p: zipped(p / "a.zip", {"a.png": png(), "dataset.json": _labels([[bad, 1]])}),
    "a strange label": lambda p: zipped(p / "a.zip", {bad: png(), "dataset.json": _labels([[bad, ESCAPE]])}),
    "classes": lambda p: zipped(p / "a.zip", {"a.png": png(), "dataset.json": _labels([["a.png", 0]], [ESCAPE])}),
    "no classes": lambda p: zipped(p / "a.zip", {"a.png": png(), "dataset.json": _labels([["a.png", 0]], ESCAPE)}),
    "half a sign": lambda p: zipped(p / "a.zip", {"a.png": png(), "dataset.json": _labels([["a.png", 0]], ["\ud800"])}),
    "a table": lambda p: zipped(p / "a.zip", {"a.png": png(), "labels.csv": f"a.png,{ESCAPE}".encode()}),
    "a line of a table": lambda p: zipped(p / "a.zip", {"a.png": png(), "labels.csv": b"a.png,a\n" + ESCAPE.encode()}),
    "an example": lambda p: tarred(p / "a.tar", {bad: png(), ESCAPE + "x.cls": b"1", ESCAPE + "x.jpg": png()}),
    "an example's label": lambda p: tarred(p / "a.tar", {"a.png": png(), "a.cls": ESCAPE.encode()}),
    "an example's JSON": lambda p: tarred(p / "a.tar", {bad: png(), ESCAPE + "x.json": b"{ "}),
    "a folder": lambda p: write(p / ESCAPE, {"a.png": png(), bad: b""}),
    "an array": lambda p: _npz(p / "a.npz", {ESCAPE: np.zeros(3)}),
    "an array's classes": lambda p: _npz(p / "a.npz", {
        "arr_0": np.zeros((1, 4, 4, 3), np.uint8), "arr_1": np.zeros(1, int), "classes": np.array([ESCAPE])}),
    "CIFAR's classes": lambda p: write(p / "c", {
        **batches(), "batches.meta": pickle.dumps({"label_names": [ESCAPE] * 10})}),
    "a pickle's global": lambda p: write(p / "c", raw(b"\x80\x02c" + ESCAPE.encode() + b"\nsystem\n.")),
    "a store": lambda p: _lmdb(p / "l", {ESCAPE + "/a": b"", "b/c": png()}),
}


def _by_zstd(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 10] = 93
    path.write_bytes(data)
    return path


def _twice(path):
    with tarfile.open(path, "a") as t: t.addfile(tarfile.TarInfo(bad))
    return path


def _labels(pairs, classes=None): return json.dumps({"labels": pairs, "classes": classes}).encode()


def _npz(path, arrays):
    np.savez(path, **arrays)
    return path


def _lmdb(path, values):
    import lmdb
    with lmdb.open(str(path), map_size=2**20) as env, env.begin(write=True) as txn:
        for k, v in values.items(): txn.put(k.encode(), v)
    return path


@pytest.mark.parametrize("kind", SPEAKING)
def test_no_control_character_reaches_a_terminal(tmp_path, kind):
    path = SPEAKING[kind](tmp_path)
    inspected(path)  # checks that what was said is printable
    how, said = limited(ctm_nb_data, ["convert", str(path), str(tmp_path / "o.zip"), "--workers", "0", "--skip-broken"])
    assert how in ("ok", "refused") and all(c.isprintable() or c == "\n" for c in said), (how, said)


# ---- bombs, pipes, cuts

def idx(n, side, data): return bytes([0, 0, 8, 3]) + struct.pack(">3I", n, side, side) + data


def _long(path, name, pack):
    "A file of 2**28 zeros in a packed tar, a sixty-fourth of it packed once."
    about = tarfile.TarInfo(name)
    about.size = 2**28
    path.write_bytes(pack(about.tobuf()) + pack(bytes(2**22)) * 64 + pack(bytes(2**10)))
    return path


BOMBS = {
    "gzip": lambda p: write(p, {"a-images-idx3-ubyte.gz": gzip.compress(idx(2**8, 2**10, bytes(2**28)), 1)}),
    "tar.gz": lambda p: _long(p.parent / "c.tar.gz", "data_batch_1", gzip.compress),
    "pictures in a tar.gz": lambda p: _long(p.parent / "c.tar.gz", "a.png", gzip.compress),
    "pictures in a tar.xz": lambda p: _long(p.parent / "c.tar.xz", "a.png", lzma.compress),
    "MATLAB": lambda p: _mat(p.parent / "a.mat", np.zeros((64, 64, 3, 2**13), np.uint8)),
    "bzip2 in a zip": lambda p: zipped(p.parent / "a.zip", {"a.png": bytes(2**28), "b.png": png()}, 12),
    "LZMA in a zip": lambda p: zipped(p.parent / "a.zip", {"a.png": bytes(2**28), "b.png": png()}, 14),
    "npz": lambda p: _compressed(p.parent / "a.npz", np.zeros((2**8, 2**10, 2**10, 1), np.uint8)),
    "a picture in a zip": lambda p: zipped(p.parent / "a.zip", {"a.png": bytes(2**28), "b.png": png()}, 8),
    "labels in a zip": lambda p: zipped(p.parent / "a.zip", {"a.png": png(), "labels.csv": bytes(2**28)}, 8),
    "a shard of many": lambda p: Path(str(p) + "-{0..99999999999}.tar"),
    "a pipe": lambda p: os.mkfifo(p) or p,
    "a device": lambda p: Path("/dev/zero"),
}


def _mat(path, a):
    from scipy.io import savemat
    savemat(path, {"X": a, "y": np.ones((a.shape[3], 1), np.uint8)}, do_compression=True)
    return path


def _compressed(path, a):
    np.save(f := io.BytesIO(), a)
    return zipped(path, {"arr_0.npy": f.getbuffer()}, 8)


@pytest.mark.parametrize("kind", BOMBS)
def test_what_would_never_end_is_refused(tmp_path, kind):
    path = BOMBS[kind](tmp_path / "x")
    room = 2**29 if kind == "MATLAB" else 2**28  # scipy unpacks 128 kB at once, be they 128 MB
    how, said = limited(ctm_nb_data, ["inspect", str(path), "--workers", "0"], memory=room)
    assert how == "refused" and said.count("\n") == 1 and "memory" not in said, said
    assert path.name in said or str(tmp_path / "x-0.tar") in said, said


SQUARE, STRIP = struct.pack(">II", 8, 8), struct.pack(">II", 1, 8 * 10**7)
PICTURES = {
    "a pipe": (os.mkfifo, "a pipe or a device"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "a pipe or a device"),
    "a strip": (lambda p: p.write_bytes(png(0, (8, 8)).replace(SQUARE, STRIP)), ""),
    "two gigabytes": (lambda p: p.touch() or os.truncate(p, 2**31), "2147483648 bytes, the limit is"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_would_never_end_is_broken(tmp_path, kind):
    write(tmp_path / "d", {"b.png": png()})
    make, why = PICTURES[kind]
    make(tmp_path / "d" / "a.png")
    how, said = limited(ctm_nb_data, ["inspect", str(tmp_path / "d"), "--workers", "0"], memory=2**28)
    assert how == "refused" and f"a.png: {why}" in said, said


def test_a_strip_of_eighty_million_pixels_is_broken(tmp_path):
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try: Image.new("1", (1, 70_000)).save(tmp_path / "a.png")
    finally: Image.MAX_IMAGE_PIXELS = before
    with pytest.raises(BrokenImage, match="1 x 70000 pixels, the limit is .* 65535 a side"): decode(tmp_path / "a.png")
    Image.new("1", (1, 65_535)).save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png").shape == (65_535, 1, 1)


def test_pipes_beside_pictures_are_no_data(tmp_path):
    "Whatever a folder is recognised by may be a pipe."
    for k, name in enumerate(("dataset.json", "data.mdb", "data_batch_1", "train-images-idx3-ubyte", "a.tar",
                              "sample_1.npz", "labels.csv", "metadata.jsonl")):
        write(tmp_path / str(k), {"a.png": png()})
        os.mkfifo(tmp_path / str(k) / name)
        how, said = limited(ctm_nb_data, ["inspect", str(tmp_path / str(k)), "--workers", "0"], seconds=8)
        assert how in ("ok", "refused"), (name, how, said)


def test_a_store_cut_anywhere_is_refused(tmp_path):
    import lmdb  # noqa: F401
    data = (_lmdb(tmp_path / "l", {f"{k:03}": png(k) for k in range(200)}) / "data.mdb").read_bytes()
    assert len(data) > 5 * 4096
    for size in [*range(0, len(data), 4096), 100, 4095, 4097, 9000, len(data) - 1]:
        (tmp_path / "cut.mdb").write_bytes(data[:size])
        how, said = inspected(tmp_path / "cut.mdb")
        assert how == "refused" and "cut.mdb" in said, (size, how, said)


def test_a_store_that_was_replaced_is_read_anew(tmp_path):
    for value in (10, 200):
        folder = _lmdb(tmp_path / str(value), {"a": png(value)})
        os.replace(folder / "data.mdb", tmp_path / "data.mdb")
        source = open_source(tmp_path / "data.mdb")
        assert source.pixels(0)[0, 0, 0] == value
    os.utime(tmp_path / "data.mdb", (1, 1))  # as a writer leaves it that puts other things at the old places
    with pytest.raises(OSError, match="data.mdb has changed since it was opened"): source.pixels(0)


def test_a_store_damaged_anywhere_is_refused_or_read(tmp_path):
    "Numbers of a page turned into others, each in turn: what the library of LMDB follows until the process dies."
    values = {f"{'ab'[k % 2]}/{k:03}": png(k) + bytes(5000 * (k % 12 == 0)) for k in range(60)}
    data = (_lmdb(tmp_path / "l", values) / "data.mdb").read_bytes()
    bad, places, numbers = tmp_path / "bad.mdb", (0, 10, 12, 14, 16, 20, 40, 128, 136, 144, 4090), (0, 2**15, 2**63)
    pages = [k for k in range(len(data) // 4096) if k < 2 or data[4096 * k + 10] in (1, 2)]
    refused = 0
    for page, at, value in itertools.product(pages, places, numbers):
        place = 4096 * page + at
        bad.write_bytes(data[:place] + struct.pack("<Q", value) + data[place + 8:])
        try: source = open_source(bad)
        except ValueError as e:
            refused += 1
            assert str(bad) in str(e) and readable(e) == str(e), e
        else:
            for k in range(len(source)):
                try: source.pixels(k)
                except BrokenImage: pass
    assert len(pages) > 4 and refused > 50


def test_a_store_in_which_bytes_count_twice_is_refused(tmp_path):
    "A page of which all entries are the first one, and a branch of which all pages are the first: bombs."
    data = bytearray((_lmdb(tmp_path / "l", {f"{k:03}": png() for k in range(200)}) / "data.mdb").read_bytes())
    refused = 0
    for page in range(2, len(data) // 4096):
        own, kind, low = struct.unpack_from("<Q2x2H", data, 4096 * page)
        if own != page or kind not in (1, 2): continue
        first, n = data[4096 * page + 16:4096 * page + 18], low // 2 - 8
        (tmp_path / "bomb.mdb").write_bytes(data[:4096 * page + 16] + first * n + data[4096 * page + 16 + 2 * n:])
        try: assert len(set(open_source(tmp_path / "bomb.mdb").names)) == 200  # a page that is no longer in use
        except ValueError as e: refused += "bomb.mdb" in str(e) and ("damaged" in str(e) or "differ" in str(e))
    assert refused > 2


def test_a_store_of_tables_is_refused(tmp_path):
    import lmdb
    with lmdb.open(str(tmp_path / "t"), map_size=2**20, max_dbs=2) as env:
        table = env.open_db(b"pictures")
        with env.begin(write=True) as txn: txn.put(b"a.png", png(), db=table)
    with pytest.raises(ValueError, match="t: it holds tables|data.mdb.*tables|t can't be read: it holds tables"):
        open_source(tmp_path / "t")


# ---- the seeded trial, a part of it

def test_damaged_files_end_in_one_line():
    "In a process of its own: it forks before torch has threads."
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = python(run, SYSTEM / "fuzz.py", "500", "1")
    forms = re.search(r"500 inputs in (\d+) forms", done.stdout)
    assert done.returncode == 0 and int(forms[1]) > 50, done.stdout + done.stderr[-3000:]
