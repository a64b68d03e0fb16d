"""Every kind of bad input, on the commands as users type them: one line that says what is wrong, nothing half-written,
nothing dropped in silence."""
import builtins
import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import python

from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.data.read import open_source

RNG = np.random.default_rng(0)


def png(a=None, format="png", **kw):
    f = io.BytesIO()
    (
        a
        if isinstance(a, Image.Image)
        else Image.fromarray(RNG.integers(0, 256, (12, 12, 3), np.uint8) if a is None else a)
    ).save(f, format, **kw)
    return f.getvalue()


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width=60000, height=60000):
    "A PNG whose header promises more pixels than there is memory."
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def zip_of(files):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files: z.writestr(name, data)
    return f.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder of 24 good pictures in two classes, and the place to work in."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path / ".cache"))
    for i in range(24):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "ab"[i % 2] / f"{i:02}.png").write_bytes(png())
    return tmp_path


def run(capsys, command, *words):
    try:
        command([str(w) for w in words])
        code = 0
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    return code, out, err


COMMANDS = {
    "inspect": (ctm_nb_data, ["inspect"], ["--workers", 0]),
    "convert": (ctm_nb_data, ["convert"], ["out.zip", "--workers", 0]),
    "train": (ctm_nb_train, ["--preset", "tiny", "--dry-run", "--data"], []),
}

BROKEN = {
    "truncated": (lambda: png()[:200], "truncated or damaged"),
    "zero bytes": (lambda: b"", "empty file"),
    "text": (lambda: b"dear diary", "not an image, begins with b'dear dia'"),
    "bomb": (bomb, "truncated or damaged (Image size"),
    "float": (lambda: png(Image.new("F", (12, 12)), "tiff"), "floating-point pixels have no defined white"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_stops_every_command_and_is_named(here, capsys, kind):
    make, why = BROKEN[kind]
    (here / "d" / "a" / "bad.png").write_bytes(make())
    for name, (command, before, after) in COMMANDS.items():
        code, out, err = run(capsys, command, *before, "d", *after)
        assert code == (1 if name == "inspect" else 2), (name, err)
        assert f"a/bad.png: {why}" in (out if name == "inspect" else err), (name, out, err)
        assert "Traceback" not in err and (name == "inspect" or "--skip-broken" in err)
    assert sorted(p.name for p in here.iterdir() if p.name != ".cache") == ["d"]
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "out.zip", "--workers", 0, "--skip-broken")
    assert code == 0 and "24 images" in out and f"a/bad.png: {why}" in out and len(open_source("out.zip")) == 24
    code, out, err = run(capsys, ctm_nb_train, "--preset", "tiny", "--dry-run", "--data", "d", "--skip-broken")
    assert code == 0 and "22 training images" in out and not (here / "runs").exists()


exif = Image.Exif()
exif[0x0112] = 6
FINE = {
    "16-bit": lambda: png(np.full((12, 12), 65535, np.uint16)),
    "palette": lambda: png(Image.new("P", (12, 12), 3)),
    "RGBA": lambda: png(np.full((12, 12, 4), 128, np.uint8)),
    "grey": lambda: png(np.zeros((12, 12), np.uint8)),
    "EXIF": lambda: png(np.zeros((12, 12, 3), np.uint8), "jpeg", exif=exif),
    "CMYK": lambda: png(Image.new("CMYK", (12, 12)), "jpeg"),
    "PNG called JPEG": png,
    "an animation": lambda: png(
        Image.new("RGB", (12, 12)), "gif", save_all=True, append_images=[Image.new("RGB", (12, 12), "red")]
    ),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_is_only_unusual_is_read(here, capsys, kind):
    (here / "d" / "a" / "odd.JPEG").write_bytes(FINE[kind]())
    for name, (command, before, after) in COMMANDS.items():
        code, out, err = run(capsys, command, *before, "d", *after)
        assert code == 0, (name, err)
    assert len(open_source("out.zip")) == 25 and {open_source("out.zip").pixels(i).shape for i in range(25)} == {
        (12, 12, 3)
    }


def test_one_pixel(here, capsys):
    (here / "d" / "a" / "dot.png").write_bytes(png(np.zeros((1, 1, 3), np.uint8)))
    for name in ("convert", "train"):
        command, before, after = COMMANDS[name]
        code, out, err = run(capsys, command, *before, "d", *after)
        assert (
            code == 2 and "images must be squares of one size, but a/dot.png is 1 x 1 and others are 12 x 12" in err
        ), name
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "small.zip", "--size", 8, "--workers", 0)
    assert code == 0 and len(open_source("small.zip")) == 25


def whole(**more): return [(f"{i}.png", png()) for i in range(4)] + list(more.items())


def labels(pairs): return {"dataset.json": json.dumps({"labels": pairs}).encode()}


ARCHIVES = {
    "duplicated names": (lambda: zip_of([("a.png", png()), ("a.png", png())]), "x.zip holds 'a.png' twice"),
    "missing files": (
        lambda: zip_of(whole(**labels([[f"{i}.png", 0] for i in range(5)]))),
        "x.zip/dataset.json names 1 files that are not there: 4.png",
    ),
    "labels that are no integers": (
        lambda: zip_of(whole(**labels([[f"{i}.png", i / 2] for i in range(4)]))),
        "gives 1.png the label 0.5, expected an integer >= 0",
    ),
    "a path outside": (
        lambda: zip_of([("../../etc/a.png", png())]),
        "x.zip names a path outside of itself: '../../etc/a.png'",
    ),
    "an absolute path": (lambda: zip_of([("/etc/a.png", png())]), "x.zip names a path outside of itself: '/etc/a.png'"),
    "half of it": (lambda: zip_of(whole())[:1500], "x.zip can't be read: File is not a zip file"),
    "no images": (lambda: zip_of([("readme.txt", b"hello")]), "no images in x.zip"),
    "nothing": (lambda: b"", "can't read x.zip, begins with b''"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_are_wrong(here, capsys, kind):
    make, why = ARCHIVES[kind]
    (here / "x.zip").write_bytes(make())
    for name, (command, before, after) in COMMANDS.items():
        code, out, err = run(capsys, command, *before, "x.zip", *after)
        assert code == 2 and why in err and err.count("\n") == 1 and not out, (name, out, err)
    assert sorted(p.name for p in here.iterdir() if p.name != ".cache") == ["d", "x.zip"]


def test_folders_that_are_wrong(here, capsys):
    (here / "empty").mkdir()
    (here / "d" / "a" / "loop").symlink_to(here / "d")
    for where, why in (
        ("empty", "no images in empty"),
        ("d", "d/a/loop is a symbolic link that leads back to a folder it is in"),
        ("nowhere", "no data at nowhere"),
    ):
        for name, (command, before, after) in COMMANDS.items():
            code, out, err = run(capsys, command, *before, where, *after)
            assert code == 2 and why in err and err.count("\n") == 1, (name, where, err)


def test_a_link_that_leads_to_itself_is_a_broken_file(here, capsys):
    (here / "d" / "a" / "self.png").symlink_to("self.png")
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "out.zip", "--workers", 0)
    assert (
        code == 2
        and "a/self.png: can't be opened (Too many levels of symbolic links)" in err
        and not (here / "out.zip").exists()
    )


def test_unreadable_files(here, monkeypatch, capsys):
    "As the system refuses them: root may read everything, so for root `open` does what it does for others."
    locked = here / "d" / "a" / "00.png"
    locked.chmod(0)
    real = io.open
    def refuse(file, *args, **kwargs):
        if isinstance(file, (str, os.PathLike)) and Path(file).name == locked.name:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)
    if os.geteuid() == 0:
        for module in (io, builtins): monkeypatch.setattr(module, "open", refuse)
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "out.zip", "--workers", 0)
    assert code == 2 and "a/00.png: can't be opened (Permission denied)" in err and not (here / "out.zip").exists()


@pytest.mark.parametrize("dst, limit", [("out.zip", 3000), ("out.zip", 12000), ("tree", 500)])
def test_a_full_disk(here, dst, limit):
    "No file may grow beyond the limit, which to the program is what a full disk is: in a file, in one of a folder."
    code = "from ctm_nb.commands.data import ctm_nb_data; ctm_nb_data()"
    done = python(code, "convert", "d", dst, "--workers", "0", largest_file=limit)
    assert done.returncode == 3 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert dst in done.stderr and ".tmp" not in done.stderr and sorted(p.name for p in here.iterdir()) == ["d"]
    done = python(code, "convert", "d", dst, "--workers", "0")
    assert (
        done.returncode == 0
        and len(open_source(dst)) == 24
        and sorted(p.name for p in here.iterdir()) == sorted(["d", dst])
    ), done.stderr


LABEL_FILES = {
    "a list alone": ("dataset.json", b'[["a.png", 0], ["b.png", 1]]', None),
    "names that are numbers": (
        "dataset.json",
        b'{"labels": [[1, 0], ["b.png", 1]]}',
        'expected {"labels": [[name, label], ...]}',
    ),
    "names that are lists": (
        "dataset.json",
        b'{"labels": [[["a.png"], 0], ["b.png", 1]]}',
        'expected {"labels": [[name, label], ...]}',
    ),
    "a label of 71 bits": (
        "dataset.json",
        b'{"labels": [["a.png", 1180591620717411303424], ["b.png", 1]]}',
        None,
    ),
    "a label of 30 bits": (
        "dataset.json",
        b'{"labels": [["a.png", 999999999], ["b.png", 1]]}',
        None,
    ),
    "fewer classes than labels": (
        "dataset.json",
        b'{"labels": [["a.png", 0], ["b.png", 1]], "classes": ["x"]}',
        "gives an image the label 1, but names 1 classes only",
    ),
    "classes that are no list": (
        "dataset.json",
        b'{"labels": [["a.png", 0], ["b.png", 1]], "classes": {"0": "x", "1": "y"}}',
        "expected a list of the names of the classes",
    ),
    "brackets without end": ("dataset.json", b"[" * 100_000, "dataset.json can't be read: "),
    "a table in Latin-1": (
        "labels.csv",
        b"a.png,\xe4\nb.png,x\n",
        None,
    ),
    "a table with a field without end": (
        "labels.csv",
        b'a.png,"' + b"x" * 200_000 + b'"\nb.png,x\n',
        "labels.csv can't be read: field larger than field limit",
    ),
    "a number of 20 digits": (
        "labels.csv",
        b"a.png,99999999999999999999\nb.png,1\n",
        None,
    ),
    "digits that are no numbers": ("labels.csv", "a.png,²\nb.png,1\n".encode(), None),
    "a byte order mark and Windows' ends of lines": (
        "labels.csv",
        b"\xef\xbb\xbfname,class\r\na.png,x\r\nb.png,y\r\n",
        None,
    ),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_labels_that_somebodys_script_wrote(here, capsys, kind, container):
    name, text, why = LABEL_FILES[kind]
    files = [("a.png", png()), ("b.png", png()), (name, text)]
    if container == "zip": (here / "x").write_bytes(zip_of(files))
    else:
        (here / "x").mkdir()
        for n, data in files: (here / "x" / n).write_bytes(data)
    code, out, err = run(capsys, ctm_nb_data, "inspect", "x", "--workers", 0)
    if why is None: assert code == 0 and "classes    2: " in out, err
    else: assert code == 2 and why in err and err.count("\n") == 1 and not out, err


def test_names_of_any_bytes_can_be_said(here):
    "A file's name that is no UTF-8, one with a line break, and a terminal that knows ASCII only."
    for name, data in ((b"\xff.png", b"junk"), ("кот.png".encode(), png()), (b"two\nlines.png", b"")):
        (here / "d" / "a" / os.fsdecode(name)).write_bytes(data)
    code = "from ctm_nb.commands.data import ctm_nb_data; ctm_nb_data()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "d", "--workers", "0", "--json", "r.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (
        done.returncode == 1
        and r"a/\xff.png: not an image" in done.stdout
        and r"a/two\nlines.png: empty file" in done.stdout
    ), done.stderr
    assert sorted(json.loads((here / "r.json").read_text())["broken"]) == [r"a/\xff.png", r"a/two\nlines.png"]
    done = python(code, "convert", "d", "t", "--workers", "0", "--skip-broken")
    assert done.returncode == 0 and len(open_source("t")) == 25, done.stderr


def test_folders_of_any_bytes_are_classes(here, capsys):
    (here / "d" / os.fsdecode(b"caf\xe9")).mkdir()
    (here / "d" / os.fsdecode(b"caf\xe9") / "1.png").write_bytes(png())
    assert open_source("d").classes == ["a", "b", r"caf\xe9"]
    for dst in ("t", "e.zip"):
        code, out, err = run(capsys, ctm_nb_data, "convert", "d", dst, "--workers", 0)
        assert code == 0 and open_source(dst).classes == ["a", "b", r"caf\xe9"], err


def test_a_picture_that_is_long_and_thin(here, capsys):
    "Its short side enlarged to 64 would take 250 million pixels."
    (here / "d" / "a" / "hair.png").write_bytes(png(np.zeros((1, 60_000), np.uint8)))
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "out.zip", "--size", 64, "--workers", 0)
    assert code == 2 and "a/hair.png: 60000 x 1 is too long and thin to become 64 x 64" in err
    code, out, err = run(capsys, ctm_nb_data, "convert", "d", "out.zip", "--size", 10_000, "--workers", 0)
    assert code == 2 and "12 x 12 is too small to become 10000 x 10000" in err


def test_no_images_says_what_there_is(here, capsys):
    (here / "phone").mkdir()
    (here / "phone" / "IMG_1.MOV").write_bytes(b"x")
    code, out, err = run(capsys, ctm_nb_data, "inspect", "phone")
    assert code == 2 and err.rstrip().endswith("there or in one sub-folder a class; found IMG_1.MOV")
