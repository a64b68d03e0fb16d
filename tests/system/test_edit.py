"""Editing by the command, and the canvas of the explorer, without a browser."""
import numpy as np
import pytest
from PIL import Image

from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.explore.explorer import canvas_pixels, explore_strokes


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained_run): return untrained_run(tmp_path_factory.mktemp("run"), 3, ["cat", "dog"])


@pytest.fixture
def here(tmp_path):
    "Five pictures in a folder, and a mask whose white half is painted."
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    for name, a in zip("abcde", pixels): Image.fromarray(a).save(tmp_path / "in" / f"{name}.png")
    Image.fromarray(np.repeat([0, 255], 32).reshape(8, 8).astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path


def edited(run, here, *words):
    words = [str(here / w) if (here / w).exists() else w for w in words]
    ctm_nb_sample([str(run), "--device", "cpu", "--edit", *words])


def test_a_folder_in_is_a_folder_out_and_the_same_bytes_twice(run, here, capsys):
    for out in ("x", "y"): edited(run, here, "inpaint", "in", "--mask", "mask.png", "--out", str(here / out))
    names = [f"{k}.png" for k in "abcde"]
    assert sorted(f.name for f in (here / "x").iterdir()) == names and "5 pictures" in capsys.readouterr().out
    for k in names:
        assert (here / "x" / k).read_bytes() == (here / "y" / k).read_bytes()
        before, after = (np.asarray(Image.open(here / d / k)) for d in ("in", "x"))
        assert (before[:4] == after[:4]).all() and (before[4:] != after[4:]).any()


@pytest.mark.parametrize("end", ["png", "gif", "webp"])
def test_a_way_between_two_pictures(run, here, end):
    words = ["in/a.png", "in/b.png", "--classes", "cat,dog", "-n", "4", "--steps", "3", "--out", str(here / f"x.{end}")]
    edited(run, here, "interpolate", *words)
    im = Image.open(here / f"x.{end}")
    assert getattr(im, "n_frames", 1) == (1 if end == "png" else 4)
    assert {f.suffix for f in here.iterdir()} == {"", ".png", f".{end}"}


def test_latents(run, here):
    edited(run, here, "encode", "in", "--classes", "cat", "--steps", "4", "--out", str(here / "z.npz"))
    with np.load(here / "z.npz") as z: assert z["latents"].shape == (5, 3, 8, 8) and z["arr_0"].shape == (5, 8, 8, 3)


@pytest.mark.parametrize("words, said", [
    (["inpaint", "in"], "needs a mask"),
    (["inpaint", "in", "--mask", "in/no.png"], "there is no file"),
    (["stroke", "in", "--mask", "mask.png"], "only inpaint"),
    (["paint", "in"], "task must be one of"),
    (["upscale", "in"], "divided by k"),
    (["stroke", "in", "--times", "3,1"], "times has no meaning"),
    (["stroke", "in", "-n", "5"], "n has no meaning"),
    (["encode", "in"], "must end in .npz"),
])
def test_bad_input_is_a_sentence(run, here, capsys, words, said):
    with pytest.raises(SystemExit) as e: edited(run, here, *words, "--classes", "cat", "--out", str(here / "out.png"))
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1 and not (here / "out.png").exists()


def test_a_mask_that_hides_all_or_has_another_size(run, here, capsys):
    for size, said in ((8, "no known pixels"), (4, "mask must be 8 x 8")):
        Image.new("L", (size, size), "white").save(here / "mask.png")
        words = ["--mask", "mask.png", "--classes", "cat", "--out", str(here / "out.png")]
        with pytest.raises(SystemExit): edited(run, here, "inpaint", "in", *words)
        assert said in capsys.readouterr().err


def test_a_stroke_is_answered(run):
    explorer = explore_strokes(run)
    before = explorer.scene.png
    explorer.controls["t"].value = 3.
    assert explorer.scene.png != before and not explorer.note.value
    explorer.controls["stroke"].value = "data:image/png;base64,AAAA"
    assert "not an image" in explorer.note.value
    assert canvas_pixels("", (1, 8, 8)).unique().tolist() == [-1.]
