"""Writing: interrupted, killed, out of space, in the way of others; and what other tools expect of the result."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import python

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.data.convert import convert, folder_names, survey
from ctm_nb.data.read import ArraySource, open_source
from ctm_nb.evaluation.draw import _save_samples

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (300, 8, 8, 3), np.uint8)


def source(images=COLOURS, classes=("cat", "dog", "cow")):
    n = len(images)
    return ArraySource(
        "pets",
        "array",
        list(map(str, range(n))),
        np.arange(n) % len(classes) if classes else None,
        list(classes),
        images=images,
    )


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_zip_is_what_edm_reads(tmp_path):
    convert(source(), tmp_path / "a.zip", workers=0)
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        names = z.namelist()
        assert (
            names[0] == "00000/img00000000.png"
            and names[299] == "00000/img00000299.png"
            and names[300:] == ["dataset.json"]
        )
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        assert dict(json.loads(z.read("dataset.json"))["labels"])["00000/img00000004.png"] == 1
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(z.read(names[7])))), COLOURS[7])


def test_workers_change_no_byte(tmp_path):
    for n in (0, 1, 2):
        convert(source(), tmp_path / f"{n}.zip", workers=n)
    assert len({(tmp_path / f"{n}.zip").read_bytes() for n in (0, 1, 2)}) == 1


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_one_mode_even_if_the_first_parts_are_grey(tmp_path, name):
    images = COLOURS.copy()
    images[:200] = images[:200, ..., :1]
    done = convert(source(images), tmp_path / name, workers=0)
    back = open_source(tmp_path / name)
    assert done["channels"] == 3 and {back.pixels(i).shape[2] for i in (0, 150, 299)} == {3}
    assert survey(back)["sha256"] == survey(source(images))["sha256"]


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_unlabelled_and_grey(tmp_path, name):
    s = source(COLOURS[:20, ..., :1], ())
    convert(s, tmp_path / name, workers=0)
    back = open_source(tmp_path / name)
    assert back.labels is None and back.pixels(3).shape == (8, 8, 1) and survey(back)["sha256"] == survey(s)["sha256"]


def test_class_names_that_are_no_folder_names(tmp_path):
    s = source(COLOURS[:12], ("T-shirt/top", ".hidden", "T-shirt_top", "../\n"))
    convert(s, tmp_path / "tree", workers=0)
    assert leftovers(tmp_path) == ["tree"] and leftovers(tmp_path / "tree") == [
        "T-shirt_top (0)", "T-shirt_top (2)", "class", "dataset.json", "hidden"
    ]
    back = open_source(tmp_path / "tree")
    s.classes[3] = r"../\n"  # printable
    assert back.classes == s.classes and survey(back)["sha256"] == survey(s)["sha256"]


@pytest.mark.parametrize("name", ["Linien & co", "it's 50%, (really)!", "#1 @home = {a, b}", "हिन्दी", "☀ 😀",
                                  "rote Äpfel", "a'b~c^d"])
def test_names_that_a_folder_can_have_are_kept(tmp_path, name):
    "By samples in folders too, which are then data of the same classes."
    _save_samples(tmp_path / "drawn", COLOURS[:2], np.array([0, 1]), {"class_names": [name, "x"]})
    assert sorted(open_source(tmp_path / "drawn").classes) == sorted([name, "x"])
    assert folder_names(["a/b", "x:y", "a|b?*", '<"q">']) == ["a_b (0)", "x_y", "a_b (2)", "q"]
    assert folder_names(["a;b$c", "d`e[f]"]) == ["a_b_c", "d_e_f"]  # what a shell would take for its own


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    "A limit on the size of files stands in for a full disk: writing fails with an OSError in the middle."
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from ctm_nb.commands.data import ctm_nb_data; import sys; ctm_nb_data(sys.argv[1:])"
    )
    convert(source(), tmp_path / "src.zip", workers=0)
    done = python(code, "convert", tmp_path / "src.zip", tmp_path / "a.zip", "--workers", "0")
    assert (
        done.returncode == 3
        and done.stderr.strip()
        == f"ctm_nb_data: [Errno 27] File too large: '{tmp_path}/a.zip'"
    )
    assert leftovers(tmp_path) == ["src.zip"]
    ctm_nb_data(
        ["convert", str(tmp_path / "src.zip"), str(tmp_path / "a.zip"), "--workers", "0"]
    )  # there is space again
    assert survey(open_source(tmp_path / "a.zip"))["sha256"] == survey(source())["sha256"] and leftovers(tmp_path) == [
        "a.zip",
        "src.zip",
    ]


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "a.zip").write_text("thesis")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError) as e:
        convert(source(), tmp_path / "a.zip", workers=0)
    assert (
        str(e.value) == f"{tmp_path}/a.zip exists: choose another name, or give --overwrite to replace it"
        and (tmp_path / "a.zip").read_text() == "thesis"
    )
    with pytest.raises(FileExistsError, match="d is a folder: choose another name, or remove it yourself"):
        convert(source(), tmp_path / "d", overwrite=True, workers=0)
    convert(source(), tmp_path / "e.zip", workers=0)
    convert(source(COLOURS[:30]), tmp_path / "e.zip", overwrite=True, workers=0)
    assert (
        len(open_source(tmp_path / "e.zip")) == 30
        and leftovers(tmp_path) == ["a.zip", "d", "e.zip"]
        and leftovers(tmp_path / "d") == ["thesis.tex"]
    )


def test_no_source_is_replaced_by_its_copy(tmp_path, capsys):
    convert(source(), tmp_path / "a.zip", workers=0)
    convert(source(), tmp_path / "d", workers=0)
    (tmp_path / "l.zip").symlink_to(tmp_path / "a.zip")
    (tmp_path / "l").symlink_to(tmp_path / "d")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "cats").symlink_to(tmp_path / "d" / "cat")  # pictures elsewhere
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for src, dst in (("a.zip", "a.zip"), ("l.zip", "a.zip"), ("a.zip", "l.zip"), ("d", "d/sub"), ("d", "d/cat/sub"),
                     ("l", "d/sub"), ("d", "l/sub"), ("m", "d/cat/sub")):
        with pytest.raises(SystemExit):
            ctm_nb_data(["convert", str(tmp_path / src), str(tmp_path / dst), "--overwrite", "--size", "4"])
        name = "d" if src == "l" else Path(src).stem
        assert capsys.readouterr().err == (
            f"ctm_nb_data: {tmp_path}/{dst} is where {name} is read from: choose another DST\n")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    convert(open_source(tmp_path / "d"), tmp_path / "d" / "d.zip", workers=0)  # a zip is no picture
    convert(open_source(tmp_path / "a.zip"), tmp_path / "b", workers=0)
    assert len(open_source(tmp_path / "d")) == len(open_source(tmp_path / "b")) == len(COLOURS)


def test_broken_images_are_listed_repaired_or_left_out(tmp_path, capsys):
    for i in range(6):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS[i]).save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "d" / "b" / "3.png").write_bytes(b"")
    words = ["convert", str(tmp_path / "d"), str(tmp_path / "a.zip"), "--workers", "0"]
    with pytest.raises(SystemExit) as e:
        ctm_nb_data(words)
    assert e.value.code == 2 and capsys.readouterr().err == (
        "ctm_nb_data: 1 of 6 images in d can't be read; repair or remove them, or leave them out with "
        "--skip-broken:\n  b/3.png: empty file\n"
    )
    assert not (tmp_path / "a.zip").exists()
    ctm_nb_data([*words, "--skip-broken"])
    assert "5 images" in capsys.readouterr().out and survey(open_source(tmp_path / "a.zip"))["classes"] == {
        "a": 3,
        "b": 2,
    }
    words[2] = str(tmp_path / "b.zip")
    with pytest.raises(SystemExit):
        ctm_nb_data(words)
    Image.fromarray(COLOURS[3]).save(tmp_path / "d" / "b" / "3.png")
    ctm_nb_data(words)
    assert len(open_source(tmp_path / "b.zip")) == 6


@pytest.mark.parametrize(
    "words, message",
    [
        (["convert", "digits", "no/such/a.zip"], "no/such is not a folder: make it first"),
        (
            ["convert", "digits", "a.tar"],
            "a.tar: expected a name ending in .zip, or a folder",
        ),
        (["inspect", "digits", "--size", "0"], "--size must be >= 1, got 0"),
        (["inspect", "digits", "--workers", "-1"], "--workers must be >= 0, got -1"),
        (["inspect", "torchvision:CIFAR11"],
         "torchvision:CIFAR11 can't be read: torchvision has no data set 'CIFAR11'"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        ctm_nb_data(words)
    assert (
        e.value.code == 2 and capsys.readouterr().err.strip() == f"ctm_nb_data: {message}" and not leftovers(tmp_path)
    )


def test_sizes_must_agree_unless_told(tmp_path):
    for i, wh in enumerate([(8, 8), (9, 8)]):
        (tmp_path / "d").mkdir(exist_ok=True)
        Image.new("L", wh).save(tmp_path / "d" / f"{i}.png")
    with pytest.raises(ValueError) as e:
        convert(open_source(tmp_path / "d"), tmp_path / "a.zip", workers=0)
    assert (
        str(e.value)
        == "images must be squares of one size, but 1.png is 9 x 8 and others are 8 x 8; "
        "give a size (--image-size, or ctm_nb_data --size) to crop and resize them"
    )
    assert convert(open_source(tmp_path / "d"), tmp_path / "a.zip", size=5, workers=0)["size"] == 5


def test_help_is_light():
    code = (
        "import sys; from ctm_nb.commands.data import data_parser; data_parser();"
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_interrupted_in_the_middle_nothing_is_left(tmp_path):
    "Ctrl-C while the second pass writes; the next run is undisturbed."
    class Stopped(ArraySource):
        drawn = 0
        def get(self, i):
            self.drawn += 1
            if self.drawn == 400: raise KeyboardInterrupt
            return super().get(i)

    s = source()
    for name in ("a.zip", "a"):
        w = Stopped(s.name, s.kind, s.names, s.labels, s.classes, images=s.images)
        with pytest.raises(KeyboardInterrupt): convert(w, tmp_path / name, workers=0)
        assert w.drawn == 400 and not leftovers(tmp_path)
