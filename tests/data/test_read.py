"""Reading: every kind of bad input with the sentence it earns, and every format with the pixels it must give."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from ctm_nb.data.read import MAX_PIXELS, BrokenImage, decode, in_order
from ctm_nb.data.read import open_source
from ctm_nb.data.batches import load_splits
from ctm_nb.data.convert import contact_sheet, report, survey

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 4, 3), np.uint8)


def png(a=PIXELS, format="png", **kw):
    f = io.BytesIO()
    Image.fromarray(np.asarray(a)).save(f, format, **kw)
    return f.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zipped(path, files, **kw):
    with zipfile.ZipFile(path, "w", **kw) as z:
        for name, data in files:
            z.writestr(name, data)
    return path


def refuse(message, path, error=ValueError, **kw):
    with pytest.raises(error) as e:
        open_source(path, **kw)
    assert str(e.value) == message


def reason(data):
    with pytest.raises(BrokenImage) as e:
        decode(data)
    return str(e.value)


def bomb(width, height):
    "A valid PNG header of any size without the pixels to go with it."
    import zlib

    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "empty file"),
        (b"dear diary", "not an image, begins with b'dear dia'"),
        (bomb(30000, 3000), f"decompression bomb? 30000 x 3000 pixels, the limit is {MAX_PIXELS}, and 65535 a side"),
        (bomb(60000, 60000),
         f"truncated or damaged (Image size (3600000000 pixels) exceeds limit of {2 * MAX_PIXELS} pixels, "
         "could be decompression bomb DOS attack.)"),
    ],
)
def test_files_that_are_no_images(data, message):
    assert reason(data) == message


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
def test_a_cut_file_is_broken_wherever_it_is_cut(format):
    data = png(RNG.integers(0, 256, (32, 32, 3), np.uint8), format)
    for share in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * share)]).startswith(("truncated or damaged (", "not an image")), (
            format,
            share,
        )


@pytest.mark.parametrize(
    "path, message",
    [("gone.png", "can't be opened (No such file or directory)"), (".", "can't be opened (Is a directory)")],
)
def test_files_that_cant_be_opened(tmp_path, path, message):
    assert reason(tmp_path / path) == message


def test_a_link_to_nothing_and_an_unreadable_file_are_broken_not_dropped(tmp_path, monkeypatch):
    write(tmp_path / "d", {"a.png": png()})
    (tmp_path / "d" / "b.png").symlink_to(tmp_path / "nowhere")
    found = survey(open_source(tmp_path / "d"))["broken"]
    assert found == {"b.png": "can't be opened (No such file or directory)"}
    from pathlib import Path

    real = Path.read_bytes
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied")) if p.name == "a.png" else real(p),
    )
    assert survey(open_source(tmp_path / "d"))["broken"]["a.png"] == "can't be opened (Permission denied)"


MODES = {
    "16-bit": (Image.fromarray(np.array([[0, 65535], [257 * 7, 257 * 200]], np.uint16)), [[0, 255], [7, 200]]),
    "1 bit": (Image.new("1", (2, 2), 1), [[255, 255]] * 2),
    "LA, half": (Image.new("LA", (2, 2), (0, 128)), [[127, 127]] * 2),
    "one pixel": (Image.new("L", (1, 1), 9), [[9]]),
}


@pytest.mark.parametrize("mode", MODES)
def test_grey_modes(mode):
    im, want = MODES[mode]
    f = io.BytesIO()
    im.save(f, "png")
    a = decode(f.getvalue())
    assert a.shape[2] == 1 and a[..., 0].tolist() == want


def test_colour_modes():
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    for im, want in [(clear, [255, 255, 255]), (half, [255, 127, 127]), (palette, [10, 20, 30])]:
        f = io.BytesIO()
        im.save(f, "png")
        assert decode(f.getvalue())[0, 0].tolist() == want
    f = io.BytesIO()
    palette.save(f, "png", transparency=0)
    assert decode(f.getvalue())[0, 0].tolist() == [255, 255, 255]
    f = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(f, "jpeg")
    r, g, b = decode(f.getvalue())[4, 4]
    assert r > 200 and g < 60 and b < 60


def test_what_is_transparent_shows_the_background(tmp_path):
    write(tmp_path / "d", {"a.png": png(np.zeros((4, 4, 4), np.uint8)), "b.png": png()})
    source = open_source(tmp_path / "d", background="#102030")
    assert source.pixels(0)[0, 0].tolist() == [16, 32, 48] and np.array_equal(source.pixels(1), PIXELS)
    assert "1 images have transparent pixels, put on #102030" in report(survey(source))
    for in_memory in (True, False):
        red, white = (load_splits(tmp_path / "d", in_memory=in_memory, background=c)["all"] for c in ("red", "white"))
        assert red.take([0])[0, :, 0, 0].tolist() == [255, 0, 0] and white.take([0]).min() == 255
    refuse("background must be a colour, grey or #ff8000, got 'blurple'", tmp_path / "d", background="blurple")


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (3, 7)), (6, (0, 3)), (8, (7, 0))])
def test_photographs_stand_upright(orientation, corner):
    "The dark corner of the stored picture is at `corner` (row, column) of the upright one."
    a = np.full((4, 8), 255, np.uint8)
    a[0, 0] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = decode(png(a, "tiff", exif=exif))[..., 0]
    dark = tuple(int(v) for v in np.unravel_index(out.argmin(), out.shape))
    assert dark == corner and out.shape == ((4, 8) if orientation in (1, 3) else (8, 4))


def test_deep_png_under_an_imagenet_name_is_read_by_content(tmp_path):
    write(
        tmp_path / "train",
        {
            "n01/a.JPEG": png(),
            "n01/b.JPEG": png(np.zeros((5, 7), np.uint8)),
            "n02/c.JPEG": png(np.zeros((9, 9, 4), np.uint8) + 255),
        },
    )
    write(tmp_path / "val", {"x.JPEG": png()})
    s = open_source(tmp_path)
    assert s.classes == ["n01", "n02"] and [s.pixels(i, 4).shape for i in range(3)] == [
        (4, 4, 3),
        (4, 4, 1),
        (4, 4, 3),
    ]
    assert s.notes == ["1 images outside of train lie in no class folder and are left out"]


def test_empty_and_ambiguous_folders(tmp_path):
    endings = (".avif, .bmp, .gif, .heic, .heif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, "
               ".webp")
    refuse(
        f"no images in {tmp_path}: expected files ending in {endings}, there or in one sub-folder a class", tmp_path
    )
    write(tmp_path, {"a/1.png": png(), "2.png": png()})
    refuse(
        f"{tmp_path} holds 1 images beside sub-folders with images: expected one or the other, or a labels.csv with "
        "a line name,class for each",
        tmp_path,
    )


def test_symlink_loop(tmp_path):
    write(tmp_path / "d", {"a/1.png": png()})
    (tmp_path / "d" / "a" / "up").symlink_to(tmp_path / "d")
    refuse(f"{tmp_path}/d/a/up is a symbolic link that leads back to a folder it is in", tmp_path / "d")
    (tmp_path / "d" / "a" / "up").unlink()
    (tmp_path / "d" / "b").symlink_to(tmp_path / "d" / "a")  # a link that is no loop is followed
    assert len(open_source(tmp_path / "d")) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"labels": [["a.png", 0], ["b.png", 1], ["c.png", 1]]}', "names 1 files that are not there: c.png"),
        ('{"labels": [["a.png", 0]]}', "has no label for 1 images: b.png"),
        ('{"labels": [["a.png", 0], ["a.png", 1], ["b.png", 1]]}', "names a.png twice"),
        ('{"labels": [["a.png", "cat"], ["b.png", 1]]}', "gives a.png the label 'cat', expected an integer >= 0"),
        ('{"labels": [["a.png", 0.5], ["b.png", 1]]}', "gives a.png the label 0.5, expected an integer >= 0"),
        ('{"labels": [["a.png", true], ["b.png", 1]]}', "gives a.png the label True, expected an integer >= 0"),
        ('{"labels": [["a.png", -1], ["b.png", 1]]}', "gives a.png the label -1, expected an integer >= 0"),
        ('{"labels": [1, 2]}', ': expected {"labels": [[name, label], ...]} or {"labels": null}'),
    ],
)
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_dataset_json(tmp_path, container, text, message):
    files = {"a.png": png(), "b.png": png(), "dataset.json": text.encode()}
    path = write(tmp_path / "d", files) if container == "folder" else zipped(tmp_path / "d.zip", files.items())
    refuse(f"{path}/dataset.json{'' if message[0] == ':' else ' '}{message}", path)


def test_zips_that_are_traps(tmp_path):
    refuse(
        f"{tmp_path}/out.zip names a path outside of itself: '../b.png'",
        zipped(tmp_path / "out.zip", [("a.png", png()), ("../b.png", png())]),
    )
    refuse(
        f"{tmp_path}/abs.zip names a path outside of itself: '/etc/b.png'",
        zipped(tmp_path / "abs.zip", [("/etc/b.png", png())]),
    )
    with pytest.warns(UserWarning):
        zipped(tmp_path / "twins.zip", [("a.png", png()), ("a.png", png())])
    refuse(f"{tmp_path}/twins.zip holds 'a.png' twice", tmp_path / "twins.zip")
    data = bytearray(zipped(tmp_path / "zstd.zip", [("a.png", png())]).read_bytes())
    data[data.index(b"PK\1\2") + 10] = 93
    (tmp_path / "zstd.zip").write_bytes(data)
    refuse(
        f"{tmp_path}/zstd.zip can't be read: a.png is compressed by method 93, expected deflate, bzip2 or LZMA",
        tmp_path / "zstd.zip",
    )
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 torn")
    refuse(f"{tmp_path}/torn.zip can't be read: File is not a zip file", tmp_path / "torn.zip")


def test_damage_in_a_zip_is_found_by_its_checksum(tmp_path):
    for method, reason in (
        (zipfile.ZIP_STORED, "damaged in the zip (checksum)"),
        (zipfile.ZIP_DEFLATED, "damaged in the zip ("),
        (zipfile.ZIP_BZIP2, "damaged in the zip ("),
        (zipfile.ZIP_LZMA, "damaged in the zip ("),
    ):
        path = zipped(tmp_path / f"{method}.zip", [("a.png", png()), ("b.png", png())], compression=method)
        data = bytearray(path.read_bytes())
        data[80] ^= 1
        path.write_bytes(data)
        broken = survey(open_source(path))["broken"]
        assert list(broken) == ["a.png"] and broken["a.png"].startswith(reason), method


def test_tars(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as t:
        t.add(write(tmp_path / "d", {"a/1.png": png(), "b/2.png": png()}), ".")
    assert open_source(tmp_path / "d.tar").classes == ["a", "b"]
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as t:
        t.add(tmp_path / "d", ".")
    assert open_source(tmp_path / "d.tar.gz").classes == ["a", "b"]
    whole = (tmp_path / "d.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 * 3 + 20])
    why = "can't be read: cut off, the block of zeros that ends a tar is missing"
    refuse(f"{tmp_path}/cut.tar {why}", tmp_path / "cut.tar")


def test_shards_with_contradictions(tmp_path):
    def shard(name, files):
        with tarfile.open(tmp_path / name, "w") as t:
            for n, data in files:
                info = tarfile.TarInfo(n)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
        return tmp_path / name

    refuse(
        f"{tmp_path}/a.tar has no label for 1 images: a.tar/1.png",
        shard("a.tar", [("0.png", png()), ("0.cls", b"1"), ("1.png", png())]),
    )
    refuse(
        f"{tmp_path}/b.tar has images of one key: b.tar/0.seg.png, b.tar/0.rgb.png; expected one",
        shard("b.tar", [("0.seg.png", png()), ("0.rgb.png", png()), ("0.cls", b"1")]),
    )
    refuse(
        f"{tmp_path}/c.tar names a path outside of itself: '../0.png'",
        shard("c.tar", [("../0.png", png()), ("../0.cls", b"1")]),
    )
    refuse(
        f"{tmp_path}/d.tar holds '0.png' twice", shard("d.tar", [("0.png", png()), ("0.png", png()), ("0.cls", b"1")])
    )
    dots = open_source(shard("f.tar", [("a.0.png", png()), ("a.0.cls", b"1"), ("a.1.png", png()), ("a.1.cls", b"0")]))
    assert dots.labels.tolist() == [1, 0]
    words = open_source(shard("e.tar", [("0.png", png()), ("0.cls", b"dog\n"), ("1.png", png()), ("1.cls", b"cat")]))
    assert words.classes == ["cat", "dog"] and words.labels.tolist() == [1, 0]


@pytest.mark.parametrize("attack", ["os.system", "eval", "numpy.load"])
def test_a_pickle_runs_nothing(tmp_path, attack):
    import builtins

    target = {"os.system": os.system, "eval": builtins.eval, "numpy.load": np.load}[attack]

    class Evil:
        def __reduce__(self):
            return target, (f"touch {tmp_path}/owned" if attack == "os.system" else f"open('{tmp_path}/owned', 'w')",)

    write(
        tmp_path / "cifar-10-batches-py",
        {"data_batch_1": pickle.dumps({b"data": Evil()}, protocol=2), "batches.meta": pickle.dumps({})},
    )
    with pytest.raises(ValueError, match=r"data_batch_1 can't be read: it asks for .*, which is not on the list"):
        open_source(tmp_path / "cifar-10-batches-py")
    assert not (tmp_path / "owned").exists()


def test_idx_files(tmp_path):
    idx = lambda a: bytes([0, 0, 8, a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape) + a.tobytes()
    x = RNG.integers(0, 256, (5, 3, 3), np.uint8)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as f:
        f.write(idx(x))
    assert open_source(tmp_path).labels is None and np.array_equal(open_source(tmp_path).images[..., 0], x)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as f:
        f.write(idx(np.zeros(4, np.uint8)))
    refuse(
        f"{tmp_path}/train-images-idx3-ubyte.gz: expected 5 labels, words or integers >= 0, got uint8 (4,)", tmp_path)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[:-12])
    refuse(
        f"{tmp_path}/cut.gz can't be read: Compressed file ended before the end-of-stream marker was reached",
        tmp_path / "cut.gz",
    )


def test_nothing_and_nonsense(tmp_path):
    expected = (
        "expected 'digits', 'emoji', a folder of images, a zip, an npz or npy, MNIST's idx or CIFAR's tar.gz, "
        "an LMDB, "
        "WebDataset shards, Parquet, hf:NAME or torchvision:NAME"
    )
    refuse(f"no data at {tmp_path}/x: {expected}", tmp_path / "x", FileNotFoundError)
    (tmp_path / "a.png").write_bytes(png())
    refuse(f"{tmp_path}/a.png is a single picture: give the folder that it is in", tmp_path / "a.png")
    (tmp_path / "a").write_bytes(png())
    refuse(f"can't read {tmp_path}/a, begins with {png()[:8]!r}: {expected}", tmp_path / "a")
    np.savez(tmp_path / "a.npz", PIXELS[None])
    (tmp_path / "l.csv").write_text("a,b\n")
    refuse(
        f"a labels file goes with a folder, a zip or a tar of images, not with {tmp_path}/a.npz",
        tmp_path / "a.npz",
        labels=tmp_path / "l.csv",
    )


def test_labels_file(tmp_path):
    write(tmp_path / "d", {"a.png": png(), "b.png": png()})
    (tmp_path / "l.csv").write_text("name,class\na.png,tabby cat\nb.png,dog\n")
    s = open_source(tmp_path / "d", tmp_path / "l.csv")
    assert s.classes == ["dog", "tabby cat"] and s.labels.tolist() == [1, 0]
    (tmp_path / "l.csv").write_text("a.png,1\nb.png\n")
    refuse(f"{tmp_path}/l.csv: expected lines of name,class, got 'b.png'", tmp_path / "d", labels=tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("a.png,1\nb.png,0\n")
    assert open_source(tmp_path / "d", tmp_path / "l.csv").classes == ["0", "1"]


def test_broken_images_stop_before_training_unless_told(tmp_path, caplog):
    write(tmp_path / "d", {f"{i}.png": png() for i in range(20)} | {"3.png": b"", "7.png": b"text"})
    with pytest.raises(ValueError) as e:
        load_splits(tmp_path / "d")
    assert str(e.value) == (
        "2 of 20 images in d can't be read; repair or remove them, or leave them out with --skip-broken:\n"
        "  3.png: empty file\n  7.png: not an image, begins with b'text'"
    )
    splits = load_splits(tmp_path / "d", skip_broken=True)
    assert (
        len(splits["all"]) == 18
        and "2 of 20 images in d can't be read and are left out:\n  3.png: empty file" in caplog.text
    )
    write(tmp_path / "e", {"a.png": b""})
    with pytest.raises(ValueError, match="none of the 1 images in e can be read"):
        load_splits(tmp_path / "e", skip_broken=True)


def test_skipping_moves_no_image_across_the_split(tmp_path):
    write(tmp_path / "d", {f"{i:02}.png": png(np.full((2, 2), i, np.uint8)) for i in range(40)})
    before = load_splits(tmp_path / "d")["held_out"].images[:, 0, 0, 0].tolist()
    (tmp_path / "d" / "03.png").write_bytes(b"")
    assert (
        load_splits(tmp_path / "d", skip_broken=True)["held_out"].images[:, 0, 0, 0].tolist()
        == before
        == [9, 19, 29, 39]
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_grey_set_keeps_three_channels_when_asked(tmp_path, in_memory):
    write(tmp_path / "d", {f"{i}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(20)})  # stored as RGB
    grey, colour = (load_splits(tmp_path / "d", channels=c, in_memory=in_memory)["all"] for c in (None, 3))
    assert (grey.channels, colour.channels) == (1, 3)
    both = [d.take(np.arange(20)) for d in (grey, colour)]
    assert (both[0] == both[1]).all() and grey.sha256() != colour.sha256()
    with pytest.raises(ValueError, match="channels must be 3 or None, got channels=2"):
        load_splits(tmp_path / "d", channels=2)


def test_a_folder_of_numbered_npz_is_one_set(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (25, 4, 4, 3), np.uint8)
    labels = np.arange(25) % 7
    for i in range(3): np.savez(tmp_path / f"sample_{9 + i}.npz", images[9 * i:][:9], labels[9 * i:][:9])
    (tmp_path / "sample_9.png").write_bytes(png())  # a grid of the first ones
    source = open_source(tmp_path)
    assert (source.images == images).all() and (source.labels == labels).all() and len(source.classes) == 7
    np.savez(tmp_path / "sample_12.npz", images[:2])
    with pytest.raises(ValueError, match="sample_12.npz has no labels, sample_9.npz has some"):
        open_source(tmp_path)


def test_grey_among_colour_and_the_other_way(tmp_path):
    write(tmp_path / "d", {f"{i}.png": png(np.full((2, 2), i, np.uint8)) for i in range(5)})
    assert load_splits(tmp_path / "d")["all"].channels == 1 and survey(open_source(tmp_path / "d"))["channels"] == 1
    write(tmp_path / "d", {"9.png": png(np.full((2, 2, 3), [1, 2, 3], np.uint8))})
    both = load_splits(tmp_path / "d")["all"]
    assert (
        both.channels == 3
        and both.images[4].unique().tolist() == [4]
        and both.images[5, :, 0, 0].tolist() == [1, 2, 3]
    )


def test_a_survey_counts_everything(tmp_path):
    write(
        tmp_path / "d",
        {
            "a/1.png": png(np.full((2, 4), 10, np.uint8)),
            "a/2.jpg": b"",
            "b/3.png": png(np.full((3, 3, 3), 250, np.uint8)),
            "b/notes.txt": b"x",
        },
    )
    facts = survey(open_source(tmp_path / "d"))
    assert (
        facts["sizes"] == {"3 x 3": 1, "4 x 2": 1}
        and facts["modes"] == {"L": 1, "RGB": 1}
        and facts["classes"] == {"a": 1, "b": 1}
    )
    assert (
        facts["broken"] == {"a/2.jpg": "empty file"}
        and facts["channels"] == 1
        and facts["in [-1, 1]"]["mean"] == round((8 * 10 + 9 * 250) / 17 / 127.5 - 1, 4)
    )
    assert "1 files are no images and are left alone: b/notes.txt" in report(facts)
    assert contact_sheet(open_source(tmp_path / "d")).size[1] == 2 * (2 * 16 + 2) + 2  # the smaller side, 16 times


def test_a_survey_tells_what_is_used_only_in_part(tmp_path, recwarn):
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4)
    frames = [Image.fromarray(a) for a in np.stack([PIXELS, 255 - PIXELS])]
    write(tmp_path / "d", {"12.png": png(grey * 273), "12.tif": png(grey * 240, "tiff"), "16.png": png(grey * 4369)})
    assert survey(open_source(tmp_path / "d"))["notes"] == [
        "2 images of 16 bits have grey levels 0..4095 of 65535, nearly black: multiply those of 12 bits by 16 first"]
    for end in ("gif", "png", "webp", "tif"):
        frames[0].save(tmp_path / f"d/two.{end}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"d/one.{end}")
    (tmp_path / "d" / "12.png").unlink()
    (tmp_path / "d" / "12.tif").unlink()
    (tmp_path / "d" / "cut.tif").write_bytes((tmp_path / "d" / "two.tif").read_bytes()[:-100])  # in its second page
    facts = survey(open_source(tmp_path / "d"))
    assert facts["images"] == 10 and not facts["broken"]
    assert facts["notes"] == ["4 images have several frames or pages, the first of which is used"]
    assert facts["copies"]["two.tif"] == facts["copies"]["one.png"] == "pixel by pixel cut.tif" and not recwarn.list


def test_the_fingerprint_is_of_the_content(tmp_path):
    write(tmp_path / "a", {"x/1.png": png(), "y/2.png": png(np.zeros((4, 4, 3), np.uint8))})
    write(tmp_path / "b", {"y/1.bmp": png(np.zeros((4, 4), np.uint8), "bmp"), "x/9.tiff": png(PIXELS, "tiff")})
    write(tmp_path / "c", {"y/1.png": png(), "x/2.png": png(np.zeros((4, 4, 3), np.uint8))})
    a, b, c = (survey(open_source(tmp_path / n))["sha256"] for n in "abc")
    assert a == b != c


def test_adm_crop_is_halving_then_bicubic():
    a = RNG.integers(0, 256, (45, 70, 3), np.uint8)
    im = Image.fromarray(a).resize((35, 22), Image.Resampling.BOX)
    scale = 16 / 22
    im = im.resize((round(35 * scale), 16), Image.Resampling.BICUBIC)
    left = (im.width - 16) // 2
    assert np.array_equal(decode(a, 16), np.asarray(im)[:, left : left + 16])


def test_a_dead_worker_is_an_error_and_not_a_hang():
    def work(i):
        return os._exit(1) if i == 3 else i

    with pytest.raises(OSError, match="a worker process died"):
        list(in_order(work, range(6), workers=1))


def test_shards_whose_json_is_a_caption_have_no_labels(tmp_path):
    "As img2dataset writes them."
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=3, verbose=0) as w:
        for i in range(7):
            w.write(
                {"__key__": f"{i:09}", "png": png(), "txt": "a cat", "json": {"caption": "a cat", "url": "http://x"}}
            )
    s = open_source(tmp_path)
    assert (len(s), s.labels, s.classes) == (7, None, [])
    with tarfile.open(tmp_path / "x.tar", "w") as t:
        for n, data in (("0.png", png()), ("0.json", b"{")):
            info = tarfile.TarInfo(n)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"x.tar/0.json can't be read: Expecting"):
        open_source(tmp_path)


def test_npz_with_too_few_names(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS[None].repeat(3, 0), arr_1=np.arange(3), classes=np.array(["x", "y"]))
    refuse(f"{tmp_path}/a.npz gives an image the label 2, but names 2 classes only", tmp_path / "a.npz")


def test_two_classes_of_one_name_stay_two(tmp_path):
    "ImageNet has two cranes."
    write(
        tmp_path,
        {"a.png": png(), "b.png": png(),
         "dataset.json": b'{"labels": [["a.png", 0], ["b.png", 1]], "classes": ["crane", "crane"]}'},
    )
    s = open_source(tmp_path)
    assert s.classes == ["crane", "crane (2)"] and survey(s)["classes"] == {"crane": 1, "crane (2)": 1}


@pytest.mark.parametrize(
    "name, message",
    [
        ("VOCDetection", "torchvision's VOCDetection is not in .*VOCDetection\\('.*', download=True\\)\""),
        ("", "torchvision has no data set ''"),
        ("ImageFolder", None),
    ],
)
def test_torchvision_by_name(tmp_path, name, message):
    write(tmp_path, {"cat/a.png": png(), "dog/b.png": png()})
    if message:
        with pytest.raises(ValueError, match=message):
            open_source(f"torchvision:{name}:{tmp_path}")
    else:
        assert open_source(f"torchvision:{name}:{tmp_path}").classes == ["cat", "dog"]


def test_an_uncompressed_npz_is_opened_without_a_warning(tmp_path, recwarn):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8), arr_1=np.arange(20) % 2)
    source = open_source(tmp_path / "a.npz")
    assert (
        source.labels.flags.writeable
        and len(load_splits(tmp_path / "a.npz")["train"])
        and not [w for w in recwarn if "writable" in str(w.message)]
    )
