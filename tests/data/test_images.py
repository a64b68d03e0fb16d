"""data: regressions and bad input. What explains is tested in nbs/3_data/01_images.ipynb."""

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_nb.data.batches import load_data
from ctm_nb.data.images import ImageData, digits, held_out_mask, image_grid, stream_indices, to_uint8
from ctm_nb.data.read import decode

u8 = torch.uint8


def save(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **kw)


def grey(value=0, size=(4, 4)):
    return np.full(size, value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 and 9 grey images whose value is their number."""
    for i in range(12):
        save(tmp_path / "set" / "cat" / f"{i:02}.png", grey(i))
    for i in range(9):
        save(tmp_path / "set" / "dog" / f"{i:02}.png", grey(100 + i))
    return tmp_path / "set"


def test_digits_split_is_pinned():
    train, held_out, both = digits(), digits("held_out"), digits("all")
    assert (len(train), len(held_out), len(both)) == (1352, 445, 1797)
    assert held_out.labels.bincount().tolist() == [44, 45, 44, 45, 45, 45, 45, 44, 43, 45]
    assert (train.channels, train.image_size, train.n_classes) == (1, 8, 10)
    assert train.sha256() == "e7d6a90e5150c9e16bde6941c0cd57edc02833352ab787d3d963eee3036b19c3"
    assert load_data("digits").sha256() == train.sha256() and load_data("digits", image_size=4).image_size == 4
    assert held_out.sha256() == "578380f47c64ae12d257e715830caf0e4b9fa0073f4beea28c41e903e03cd3ea"


def test_digits_splits_are_disjoint_and_complete():
    pixels = [
        torch.cat([digits(s).images for s in names]).flatten(1).tolist()
        for names in (("train", "held_out"), ("all",))
    ]
    assert sorted(pixels[0]) == sorted(pixels[1])


def test_x0_round_trip_of_every_byte():
    data = ImageData(torch.arange(256, dtype=u8).reshape(1, 1, 16, 16))
    x0 = data.x0()
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    assert torch.equal(to_uint8(x0), data.images) and torch.equal(to_uint8(x0.double()), data.images)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(images=torch.zeros(2, 1, 4, 4)), "images must be uint8"),
        (dict(images=torch.zeros(2, 4, 4, dtype=u8)), "images must be uint8"),
        (dict(images=torch.zeros(2, 2, 4, 4, dtype=u8)), "images must be uint8"),
        (dict(images=torch.zeros(2, 1, 4, 5, dtype=u8)), "images must be uint8"),
        (dict(images=torch.zeros(2, 1, 4, 4, dtype=u8), labels=torch.tensor([0, 1])), "come together"),
        (
            dict(images=torch.zeros(2, 1, 4, 4, dtype=u8), labels=torch.tensor([0]), classes=["a"]),
            r"labels must have shape \(2,\)",
        ),
        (dict(images=torch.zeros(2, 1, 4, 4, dtype=u8), labels=torch.tensor([0, -1]), classes=["a"]), "got -1"),
    ],
)
def test_image_data_bad_input(kw, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**kw)


def test_held_out_mask_takes_the_same_share_of_every_class():
    labels = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = 4  # a class without images
    mask = torch.from_numpy(held_out_mask(labels, 10))
    for k in range(7):
        assert mask[labels == k].sum() == (labels == k).sum() // 10
    assert held_out_mask(torch.zeros(0, dtype=torch.int64), 10).shape == (0,)


def test_folder_with_classes(folder):
    data = load_data(folder, "all")
    assert data.classes == ["cat", "dog"] and data.name == "set" and data.channels == 1
    assert data.images[:, 0, 0, 0].tolist() == [*range(12), *range(100, 109)]
    assert data.labels.tolist() == [0] * 12 + [1] * 9
    assert load_data(folder, "held_out").images[:, 0, 0, 0].tolist() == [9]
    assert len(load_data(str(folder))) == 20
    with pytest.raises(ValueError, match="split must be"):
        load_data(folder, "validation")


def test_flat_folder_and_files_that_are_not_images(folder):
    (folder / "cat" / "notes.txt").write_text("hello")
    save(folder / "cat" / ".hidden.png", grey())
    data = load_data(folder / "cat", "all")
    assert len(data) == 12 and data.labels is None and data.n_classes == 0
    with pytest.raises(ValueError, match="held_out split is empty"):
        load_data(folder / "dog", "held_out")


def test_one_coloured_image_makes_all_rgb(folder):
    save(folder / "dog" / "red.png", np.full((4, 4, 3), [255, 0, 0], np.uint8))
    data = load_data(folder, "all")
    assert (
        data.channels == 3
        and data.images[-1, :, 0, 0].tolist() == [255, 0, 0]
        and data.images[5, :, 0, 0].tolist() == [5, 5, 5]
    )


def test_sizes_must_agree_unless_told(folder):
    save(folder / "dog" / "wide.png", grey(50, (4, 8)))
    with pytest.raises(ValueError, match=r"dog.wide.png is 8 x 4 and others are 4 x 4; give a size"):
        load_data(folder)
    assert load_data(folder, "all", image_size=2).images.shape == (22, 1, 2, 2)
    with pytest.raises(ValueError, match="side of images must be >= 1, got 0"):
        load_data(folder, image_size=0)


def test_crop_is_central_and_resize_is_by_area(tmp_path):
    a = np.zeros((6, 4), np.uint8)
    a[1:3, :2], a[3:5, 2:] = 200, [[10, 20], [30, 40]]
    save(tmp_path / "a.png", a)
    assert decode(tmp_path / "a.png", 2, "box")[..., 0].tolist() == [[200, 0], [0, 25]]
    assert load_data(tmp_path, "all", image_size=2, crop="box").images[0, 0].tolist() == [[200, 0], [0, 25]]


def test_both_published_crops_by_name(tmp_path):
    "EDM cuts out the square and resizes it by Lanczos' kernel; ADM resizes the whole, by bicubic interpolation."
    from PIL import Image
    a = np.random.default_rng(0).integers(0, 256, (45, 62, 3), np.uint8)
    save(tmp_path / "a.png", a)
    square = Image.fromarray(np.ascontiguousarray(a[:, 8:53]))  # nothing beyond its edge may leak in
    edm, adm, center = (load_data(tmp_path, "all", 16, crop=crop).images[0].permute(1, 2, 0).numpy()
                        for crop in ("edm", "adm", "center"))
    assert (edm == np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS))).all()
    halved = Image.fromarray(a).resize((31, 22), Image.Resampling.BOX)
    whole = np.asarray(halved.resize((round(31 * 16 / 22), 16), Image.Resampling.BICUBIC))
    assert (adm == whole[:, 3:19]).all() and (center == adm).all() and (edm != adm).any()


def test_bytes_of_samples_as_published():
    "Half of all values are one higher when rounded; the published bytes are clamp((x + 1) * 127.5) cut off."
    x = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    published = torch.tensor(np.clip((x.numpy() + 1) * np.float32(127.5), 0, 255).astype(np.uint8))
    assert torch.equal(to_uint8(x, "truncate"), published)
    higher = to_uint8(x).float() - published.float()
    assert set(higher.unique().tolist()) == {0., 1.} and .4 < higher.mean() < .5
    with pytest.raises(ValueError, match="bytes must be one of round, truncate, got 'floor'"): to_uint8(x, "floor")


def test_modes(tmp_path):
    save(tmp_path / "deep.png", np.array([[0, 65535], [257 * 7, 257 * 200]], np.uint16))
    assert decode(tmp_path / "deep.png")[..., 0].tolist() == [[0, 255], [7, 200]]
    Image.new("P", (2, 2), 0).save(tmp_path / "palette.png", transparency=0)
    assert decode(tmp_path / "palette.png").min() == 255
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert decode(tmp_path / "bits.png").min() == 255
    Image.new("CMYK", (2, 2)).save(tmp_path / "print.jpg")
    assert decode(tmp_path / "print.jpg").shape == (2, 2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert decode(tmp_path / "photo.jpg").shape == (8, 4, 1)


def test_every_broken_file_is_listed_once(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpeg", "cut.webp"):
        save(folder / "cat" / name, pixels)
        (folder / "cat" / name).write_bytes((folder / "cat" / name).read_bytes()[:600])
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError) as e:
        load_data(folder)
    text = str(e.value)
    assert text.startswith("5 of 26 images in")
    assert all(name in text for name in ("cut.png", "cut.jpeg", "cut.webp", "empty.png", "text.jpg"))
    for i in range(60):
        (folder / "dog" / f"x{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="(?s)65 of 86 images.*and 15 more"):
        load_data(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected 'digits'"):
        load_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images in"):
        load_data(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match="can't read .*a.csv"):
        load_data(tmp_path / "a.csv")


def test_ambiguous_folders_are_refused(folder):
    save(folder / "stray.png", grey())
    with pytest.raises(ValueError, match="holds 1 images beside sub-folders"):
        load_data(folder)
    (folder / "stray.png").unlink()
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="dataset.json: expected"):
        load_data(folder)


def test_npz_round_trip(tmp_path):
    images = torch.randint(0, 256, (25, 5, 5, 3), dtype=u8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(25) % 2
    np.savez(tmp_path / "a.npz", images.numpy(), labels.numpy().astype(np.int32))
    data = load_data(tmp_path / "a.npz", "all")
    assert (
        torch.equal(data.images.permute(0, 2, 3, 1), images)
        and torch.equal(data.labels, labels)
        and data.classes == ["0", "1"]
    )
    assert len(load_data(tmp_path / "a.npz", "held_out")) == 2
    np.savez(tmp_path / "b.npz", images.numpy())
    assert load_data(tmp_path / "b.npz").labels is None
    assert load_data(tmp_path / "b.npz", "all", image_size=2).image_size == 2


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(x=np.zeros(3)), "got no arr_0 but x"),
        (dict(arr_0=np.full((2, 4, 4, 3), 2.5)), "got float64"),
        (dict(arr_0=np.zeros((2, 5, 4, 4), np.uint8)), r"got uint8 \(2, 5, 4, 4\)"),
        (dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), r"got uint8 \(0, 4, 4, 3\)"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(2)), "expected 2 labels, words or int"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(3, int)), "expected 2 labels, words or int"),
        (dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.array([0, -1])), "got -1"),
        (dict(arr_0=np.array([None])), "can't be read: Object arrays"),
    ],
)
def test_npz_bad_content(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "bad.npz", "all")


def test_npz_broken_file(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="torn.npz can't be read"):
        load_data(tmp_path / "torn.npz")


def test_image_grid():
    canvas = image_grid(torch.zeros(5, 3, 2, 2, dtype=u8), columns=3)
    assert canvas.shape == (7, 10, 3) and (canvas[4:6, 7:9] == 255).all() and (canvas[4:6, 4:6] == 0).all()


@pytest.mark.parametrize("n, batch_size", [(1, 1), (1, 5), (10, 3), (10, 10), (7, 100)])
def test_the_stream_ignores_batches_and_resumes(n, batch_size):
    reference = torch.cat([stream_indices(n, 5, e * n, n) for e in range(40)])
    seen = [stream_indices(n, 5, p, batch_size) for p in range(0, 30 * n, batch_size)]
    assert all(s.shape == (batch_size,) and s.dtype == torch.int64 for s in seen)
    seen = torch.cat(seen)[: 40 * n]
    assert torch.equal(seen, reference[: len(seen)])
    for epoch in reference.split(n):
        assert torch.equal(epoch.sort().values, torch.arange(n))


def test_the_order_is_pinned_and_seeded():
    assert stream_indices(6, 1, 0, 12).tolist() == [4, 1, 5, 2, 0, 3, 5, 0, 4, 2, 3, 1]
    assert not torch.equal(stream_indices(100, 1, 0, 100), stream_indices(100, 2, 0, 100))
    stream_indices(6, 1, 0, 6)[:] = 0  # nobody's business but the caller's
    assert stream_indices(6, 1, 0, 6).tolist() == [4, 1, 5, 2, 0, 3]


def test_the_stream_far_in_the_future():
    assert stream_indices(1797, 0, 10**12, 64).shape == (64,)


@pytest.mark.parametrize("bad", [dict(n=0), dict(count=0), dict(position=-1), dict(seed=-1)])
def test_a_stream_that_cant_be(bad):
    with pytest.raises(ValueError, match="must be >="):
        stream_indices(**{"n": 5, "seed": 0, "position": 0, "count": 1, **bad})


def font(path, text):
    "A font with boxes for some letters."
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    names = [".notdef", *(f"u{ord(c):x}" for c in text)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for p in ((0, 700), (500, 700), (500, 0)): pen.lineTo(p)
    pen.closePath()
    f = FontBuilder(1000, isTTF=True)
    f.setupGlyphOrder(names)
    f.setupCharacterMap({ord(c): n for c, n in zip(text, names[1:])})
    f.setupGlyf({n: pen.glyph() for n in names})
    f.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    f.setupHorizontalHeader(ascent=800, descent=-200)
    f.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    f.setupOS2()
    f.setupPost()
    f.save(path)


def test_a_name_of_any_script_is_written_or_spelt(tmp_path, monkeypatch):
    "By the first font here that has its letters, else by their numbers: no two names become the same boxes."
    from ctm_nb.data import images
    found = [str(tmp_path / n) for n in ("bad.ttf", "f.ttf")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    font(tmp_path / "f.ttf", "猫 ")
    monkeypatch.setattr(images, "_font", images._font.__wrapped__)
    monkeypatch.setattr(images, "_letters", images._letters.__wrapped__)
    for text in ("cat", "кот", "γάτα", "قط"): assert images._font(12, text)[0].path.endswith("DejaVuSans.ttf")
    f, shown = images._font(12, "猫 猫")
    assert (f.path, shown) == (str(tmp_path / "f.ttf"), "猫 猫")
    assert images._font(12, "a 狗")[1] == r"a \u72d7" and images._font(12, "แมว")[1] == r"\u0e41\u0e21\u0e27"
    x = torch.zeros(2, 1, 48, 48, dtype=u8)
    two = [np.asarray(images.named_grid(x, 2, names)) for names in (["狗", "鱼"], ["狼", "鱼"])]
    assert two[0].shape == two[1].shape and (two[0] != two[1]).any()
