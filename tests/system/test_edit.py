"""Editing by the command, and the canvas of the explorer, without a browser."""
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_nb.checkpoints.models import load
from ctm_nb.commands.sample import ctm_nb_sample, sample_parser
from ctm_nb.explore.explorer import canvas_pixels, explore_strokes
from ctm_nb.method.editing import TASKS, edit
from ctm_nb.method.sampling import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained_run): return untrained_run(tmp_path_factory.mktemp("run"), 3, ["cat", "dog"])


@pytest.fixture
def here(tmp_path):
    "Five pictures in a folder, and a mask whose white half is painted."
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    for name, a in zip("abcde", pixels): Image.fromarray(a).save(tmp_path / "in" / f"{name}.png")
    Image.fromarray(np.repeat([0, 255], 32).reshape(8, 8).astype(np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "small" / "a.png")
    return tmp_path


def edited(run, here, *words):
    words = [str(here / w) if (here / w).exists() else w for w in words]
    ctm_nb_sample([str(run), "--device", "cpu", "--edit", *words])


def test_a_folder_in_is_a_folder_out_and_the_same_bytes_twice(run, here, capsys):
    for out in ("x", "y"): edited(run, here, "inpaint", "in", "--mask", "mask.png", "--out", str(here / out))
    names = [f"{k}.png" for k in "abcde"]
    assert sorted(f.name for f in (here / "x").iterdir()) == [*names, "sampler.json"]  # by which it is known for ours
    assert "5 pictures" in capsys.readouterr().out
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
    (["color", "in"], "got 'color': did you mean colour?\n"),
    (["upscale", "in"], "divided by k"),
    (["encode", "in", "--gamma", ".3"], "gamma has no meaning to encode"),
    (["interpolate", "in", "-n", "1"], "n >= 2"),
    (["denoise", "in", "--steps", "3"], ": --steps has no meaning to denoise, which knows --level\n"),
    (["denoise", "in", "-n", "3"], ": -n has no meaning to denoise, which knows --level\n"),
    (["stroke", "in", "--batch-size", "3"], ": --batch-size has no meaning to stroke, which knows --level, --steps"),
    (["inpaint", "small"], "needs a mask (--mask PNG)"),
    (["inpaint", "small", "--mask", "mask.png"],
     "small/a.png: pictures to inpaint must be 8 x 8, 3 channels, got shape (3, 4, 6): ctm_nb_data convert FOLDER "
     "DST --size 8 makes a folder of them so\n"),
    (["upscale", "in"], "ctm_nb_data convert FOLDER DST --size 4 makes"),
    (["stroke", "in", "--times", "3,1"], "times has no meaning"),
    (["stroke", "in", "-n", "5"], "n has no meaning"),
    (["encode", "in"], "must end in .npz"),
])
def test_bad_input_is_a_sentence(run, here, capsys, words, said):
    out = "out.png" if words[0] != "encode" or "--gamma" not in words else "out.npz"
    with pytest.raises(SystemExit) as e: edited(run, here, *words, "--classes", "cat", "--out", str(here / out))
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1 and not (here / "out.png").exists()


@pytest.mark.parametrize("task", ["colour", "upscale"])
def test_what_is_known_is_known_to_a_byte_in_the_file(run, here, task):
    "Brightness, or the means of blocks of 2 x 2; pixels of pure colours leave the range on the way."
    pixels = np.random.default_rng(1).choice([0, 255], (5, 8, 8, 3)).astype(np.uint8)
    for f, a in zip(sorted((here / "in").iterdir()), pixels):
        Image.fromarray(a if task == "colour" else a[::2, ::2]).save(f)
    edited(run, here, task, "in", "--classes", "cat", "--out", str(here / "x"))
    for k in "abcde":
        given, made = (Image.open(here / d / f"{k}.png") for d in ("in", "x"))
        if task == "colour": given, made = given.convert("L"), made.convert("L")
        given, made = np.asarray(given, float), np.asarray(made, float)
        if task == "upscale": made = made.reshape(4, 2, 4, 2, 3).mean((1, 3))
        assert np.abs(made - given).max() <= 1


def test_transparent_parts_of_a_mask_are_kept(run, here):
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(here / "mask.png")
    edited(run, here, "inpaint", "in", "--mask", "mask.png", "--classes", "cat", "--out", str(here / "x"))
    before, after = (np.asarray(Image.open(here / d / "a.png")) for d in ("in", "x"))
    assert (before[:4] == after[:4]).all() and (before[4:] != after[4:]).any()


def test_a_mask_with_soft_edges_is_cut_at_its_middle(run, here):
    soft = np.repeat([0, 90, 127, 128, 200, 253, 254, 255], 8).reshape(8, 8).astype(np.uint8)
    Image.fromarray(soft).save(here / "mask.png")
    edited(run, here, "inpaint", "in", "--mask", "mask.png", "--classes", "cat", "--out", str(here / "x"))
    before, after = (np.asarray(Image.open(here / d / "a.png")) for d in ("in", "x"))
    assert (before[:3] == after[:3]).all() and all((before[i] != after[i]).any() for i in range(3, 8))


def test_overwriting_loses_neither_inputs_nor_what_is_no_picture(run, here, capsys):
    words = ["--classes", "cat", "--overwrite", "--out"]
    for out in ("in", "in/a.png"):
        with pytest.raises(SystemExit): edited(run, here, "stroke", "in", *words, str(here / out))
        assert "is read from: choose another OUT" in capsys.readouterr().err
    for _ in range(2): edited(run, here, "stroke", "in", *words, str(here / "x"))
    (here / "x" / "thesis.txt").write_text("years")
    for given in (["--edit", "stroke", str(here / "in")], []):
        with pytest.raises(SystemExit): ctm_nb_sample([str(run), "--device", "cpu", *given, *words, str(here / "x")])
        assert "holds more than samples, thesis.txt" in capsys.readouterr().err
    assert len(list((here / "in").iterdir())) == 5 and (here / "x" / "thesis.txt").exists()


@pytest.mark.parametrize("edit", [True, False])
@pytest.mark.parametrize("kind", ["photos", "photos of classes", "[1, 2]", '{"checkpoint": 1, "pictures": 5}',
                                  "beside samples"])
def test_a_folder_of_one_s_own_pictures_is_never_overwritten(run, here, capsys, edit, kind):
    "Whatever they are called, sampler.json too, if we did not write it."
    own, given = here / "own", ["--edit", "stroke", str(here / "in")] if edit else []
    words = [str(run), "--device", "cpu", *given, "--classes", "cat", "--out", str(own)]
    if kind == "beside samples": ctm_nb_sample(words)
    for k in range(7):
        name = f"{k:06d}.png" if k and kind != "beside samples" else "holiday.png"
        path = own / ("dog" if kind == "photos of classes" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (k, 0, 0)).save(path)
    if "[" in kind or "{" in kind: (own / "sampler.json").write_text(kind)
    what = f"own {'holds more than' if kind == 'beside samples' or '{' in kind else 'is no folder of'} samples, "
    before = {f: f.read_bytes() for f in own.rglob("*") if f.is_file()}
    capsys.readouterr()
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as e: ctm_nb_sample([*words, "--seed", "1", *more])
        err = capsys.readouterr().err
        assert e.value.code == 2 and what in err and err.count("\n") == 1, err
        assert "choose another name" in err and "pass --overwrite" not in err
    assert {f: f.read_bytes() for f in own.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("task, said", [("colour", "must end in .png, .npz, or be a folder, got"),
                                        ("encode", "must end in .npz, got")])
def test_the_forms_of_out_are_a_sentence(run, here, capsys, task, said):
    with pytest.raises(SystemExit): edited(run, here, task, "in", "--out", str(here / "x.zip"))
    assert said in capsys.readouterr().err


def test_what_is_not_listed_is_counted(run, here, capsys):
    "Of the classes, and of the levels of noise."
    for k in range(3): Image.open(here / "in" / "a.png").save(here / "in" / f"{k}.png")
    edited(run, here, "denoise", "in", "--classes", "cat", "--out", str(here / "x"))
    assert "; class cat, cat, cat, cat, cat and 3 more; noise " in (out := capsys.readouterr().out)
    assert out.endswith(" and 3 more\n")


def test_pictures_without_classes_are_warned_about_where_none_were_trained(run, here, capsys):
    (run / "config.json").write_text('{"distill": {"label_dropout": 0}}')
    try: edited(run, here, "stroke", "in", "--classes", "none", "--out", str(here / "x.png"))
    finally: (run / "config.json").unlink()
    said = capsys.readouterr().err
    assert said.count("label_dropout=0") == 1 and "classes none" in said and (here / "x.png").exists()


def test_a_sheet_bears_names(run, here):
    edited(run, here, "stroke", "in", "--classes", "cat,dog", "--out", str(here / "x.png"))
    edited(run, here, "interpolate", "in/a.png", "in/b.png", "--steps", "2", "-n", "3", "--classes", "cat", "--out",
           str(here / "y.png"))
    assert Image.open(here / "x.png").height > 2 * 34 and Image.open(here / "y.png").width > 3 * 34 + 8


def test_the_help_says_the_defaults_of_every_task():
    words = " ".join(sample_parser().format_help().split())
    level = {k: how["level"] or 80 for k, how in TASKS.items() if "level" in how and k != "denoise"}
    assert level == dict(inpaint=80, colour=2, upscale=2, stroke=1)
    assert "to inpaint 80, to colour and upscale 2, of a stroke 1, to denoise found" in words
    steps = {k: how["steps"] for k, how in TASKS.items() if "steps" in how}
    assert {how["gamma"] for how in TASKS.values() if "gamma" in how} == {1.}
    assert steps == dict(encode=16, interpolate=16, inpaint=8, colour=8, upscale=8, stroke=1)
    assert "8 jumps with gamma 1, a stroke 1; encode and interpolate 16 steps; a teacher 18" in words


@pytest.mark.parametrize("size, colour, said", [
    (8, "white", "no known pixels"), (8, "black", "nothing to paint (of a --mask PNG white is painted)"),
    (4, "white", "mask must have shape (8, 8) or (5, 1, 8, 8) for pictures of 8 x 8, got (1, 1, 4, 4)")])
def test_a_mask_of_no_use_is_refused_by_its_file(run, here, capsys, size, colour, said):
    Image.new("L", (size, size), colour).save(here / "mask.png")
    words = ["--mask", "mask.png", "--classes", "cat", "--out", str(here / "out.png")]
    with pytest.raises(SystemExit): edited(run, here, "inpaint", "in", *words)
    err = capsys.readouterr().err
    assert f"{here / 'mask.png'}: mask " in err and said in err and not (here / "out.png").exists()


def test_the_advice_for_pictures_of_another_size_works(run, here):
    from ctm_nb.commands.data import ctm_nb_data
    ctm_nb_data(["convert", str(here / "small"), str(here / "right"), "--size", "8"])
    edited(run, here, "stroke", "right", "--classes", "cat", "--out", str(here / "out.png"))
    assert Image.open(here / "out.png").size == (8, 8)


def test_masks_of_every_shape_that_can_be_meant(run):
    m = load(run)
    x, mask = sample(m, 4).clamp(-1, 1), torch.ones(8, 8)
    mask[4:] = 0
    made = edit(m, "inpaint", x, mask[None, None], y=0, steps=2).x
    for one in (mask, mask[None], mask.expand(4, 1, 8, 8), mask > 0, mask.numpy()):
        assert torch.equal(edit(m, "inpaint", x, one, y=0, steps=2).x, made)
    for bad in (mask.expand(4, 8, 8), mask.expand(4, 3, 8, 8), mask[:, :4], mask.expand(2, 1, 8, 8)):
        with pytest.raises(ValueError) as e: edit(m, "inpaint", x, bad, y=0)
        assert str(e.value).endswith(f"got {tuple(bad.shape)}") and "(8, 8) or (4, 1, 8, 8)" in str(e.value)
    with pytest.raises(ValueError, match="nothing to paint"): edit(m, "inpaint", x, mask * 0 + 1, y=0)
    with pytest.raises(ValueError, match="got shape .3, 8, 8.$"): edit(m, "colour", x)  # no advice about the size


def test_a_stroke_is_answered(run):
    explorer = explore_strokes(run)
    before = explorer.scene.png
    explorer.controls["t"].value = 3.
    assert explorer.scene.png != before and not explorer.note.value
    explorer.controls["stroke"].value = "data:image/png;base64,AAAA"
    assert "not an image" in explorer.note.value
    assert canvas_pixels("", (1, 8, 8)).unique().tolist() == [-1.]


def test_a_stroke_on_digits_is_answered_in_less_than_150_ms_of_processor_time(tmp_path, untrained_run):
    size = dict(model_channels=16, channel_mult=(1, 2), attention=(4,))  # of the preset digits
    explorer, spent = explore_strokes(untrained_run(tmp_path, 1, "0123456789", **size)), []
    for k in range(21):
        begin, wall = time.process_time(), time.perf_counter()
        explorer.controls["seed"].value = k + 1
        spent.append((1000 * (time.process_time() - begin), 1000 * (time.perf_counter() - wall)))
    cpu, wall = map(statistics.median, zip(*spent[1:]))
    print(f"a stroke is answered in {cpu:.0f} ms of processor time, {wall:.0f} ms by the clock")
    assert cpu < 150


@pytest.mark.parametrize("classes, evaluations", [((0, 1), 8), ((1, 1), 6), (None, 6)])
def test_a_way_mixes_the_denoisers_of_its_classes_and_no_more_than_needed(classes, evaluations):
    "Of a constant denoiser c the flow is c + (s/t) (x - c), whatever solves it."
    from ctm_nb.method.editing import encode, interpolate, sphere
    from ctm_nb.method.flow import rho_grid
    means, asked = torch.tensor([-1., 2.], dtype=torch.float64), []
    class Constant:
        def D(self, x, t, y=None):
            asked.append(y)
            return (means[:1] if y is None else means[y])[:, None].expand_as(x)
    x0, times = torch.tensor([[.3, -2., 1.], [1.5, 0., -.7]], dtype=torch.float64), rho_grid(3)
    y = None if classes is None else torch.tensor(classes)
    z = encode(Constant(), x0, times, y)
    up = len(asked)
    way = interpolate(Constant(), x0, times, 3, y)[0]
    assert len(asked) == 2 * up + evaluations
    a, b = (means[:1].expand(2) if y is None else means[y])
    for w, c, picture in zip((0, .5, 1), (a, (a + b) / 2, b), way):
        expected = c + (times[-1] / times[0]) * (sphere(z[:1], z[1:], w)[0] - c)
        assert torch.allclose(picture, expected, atol=1e-6), w
