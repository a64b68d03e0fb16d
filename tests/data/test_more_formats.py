"""Containers that other people use, each with the right pictures and labels."""
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ctm_nb.data.batches import load_splits, source_key
from ctm_nb.data.read import open_source

X = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
Y = np.arange(6) % 2


def png(a):
    f = io.BytesIO()
    Image.fromarray(a).save(f, "png")
    return f.getvalue()


FILES = {f"{'ab'[y]}/{k}.png": png(a) for k, (a, y) in enumerate(zip(X, Y))}


def right(source, order=None):
    "Every picture and label is what it was."
    order = range(6) if order is None else order
    assert [source.classes[y] for y in source.labels] == ["ab"[Y[k]] for k in order]
    assert all((source.pixels(i) == X[k]).all() for i, k in enumerate(order))
    return True


def tarred(path, mode, top=""):
    with tarfile.open(path, mode) as t:
        for n, data in FILES.items():
            info = tarfile.TarInfo(top + n)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


BY_CLASS = [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("end", ["gz", "xz", "bz2"])
@pytest.mark.parametrize("top", ["", "ds/"])
def test_a_compressed_tar_of_pictures(tmp_path, end, top):
    path = tarred(tmp_path / f"x.tar.{end}", f"w:{end}", top)
    source = open_source(path)
    assert right(source, BY_CLASS) and source.kind == "tar of images" and [*source.paths()] == [path]
    splits, key = load_splits(path, in_memory=False), source_key(source)
    assert (splits["all"].take([0, 5]).numpy() == X[[0, 5]].transpose(0, 3, 1, 2)).all()
    assert source_key(open_source(path)) == key
    tarred(path, f"w:{end}", "other/")
    assert open_source(path).names[0] == "other/a/0.png"  # unpacked anew
    (tmp_path / "l.csv").write_text("".join(f"other/{n},{'xy'[k % 2]}\n" for k, n in enumerate(FILES)))
    assert open_source(path, labels=tmp_path / "l.csv").classes == ["x", "y"]
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=f"x.tar.{end}"): open_source(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_zips_by_every_method(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as z:
        for n, data in FILES.items(): z.writestr(n, data)
    assert right(open_source(tmp_path / "x.zip"), BY_CLASS)


def test_svhn(tmp_path):
    "Its ten is a zero."
    y = np.array([10, 1, 10, 1, 10, 1])[:, None]
    for packed in (False, True):
        savemat(tmp_path / "train_32x32.mat", {"X": X.transpose(1, 2, 3, 0), "y": y}, do_compression=packed)
        s = open_source(tmp_path / "train_32x32.mat")
        assert (s.images == X).all() and s.labels.tolist() == [0, 1] * 3 and s.classes == ["0", "1"]
    savemat(tmp_path / "x.mat", {"digitStruct": 1})
    with pytest.raises(ValueError, match="x.mat can't be read: expected X .* of SVHN, got digitStruct"):
        open_source(tmp_path / "x.mat")


# ---- through `datasets`

def rows(split=slice(None)):
    import datasets
    pictures = [{"bytes": png(a), "path": None} for a in X[split]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": pictures, "label": Y[split].tolist()}, features=features)


def test_folders_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows().save_to_disk(tmp_path / "one")
    s = open_source(tmp_path / "one")
    assert right(s) and s.held_out is None and s.name == "one"
    datasets.DatasetDict({"test": rows(slice(4, 6)), "train": rows(slice(0, 4))}).save_to_disk(tmp_path / "both")
    s = open_source(tmp_path / "both")
    assert right(s) and s.held_out.tolist() == [False] * 4 + [True] * 2
    (next((tmp_path / "one").glob("*.arrow"))).write_bytes(b"ARROW1 no more")
    with pytest.raises(ValueError, match=f"{tmp_path}/one"): open_source(tmp_path / "one")


def written(path, label, part=slice(None)):
    "A Parquet file as pyarrow and pandas write it: nothing in it says what is a class."
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": png(a), "path": "a.png"} for a in X[part]]
    pq.write_table(pa.table({"image": pictures, **{k: v[part] for k, v in label.items()}}), path)
    return path


@pytest.mark.parametrize("label, classes", [
    ({"label": Y.tolist()}, ["0", "1"]), ({"label": (Y + 8).astype(np.uint8)}, ["8", "9"]),
    ({"note": ["x"] * 6, "class": ["ab"[k] for k in Y]}, ["a", "b"]),
    ({"labels": ["10" if k else "9" for k in Y]}, ["9", "10"]),
])
def test_parquet_of_other_programs_has_its_classes(tmp_path, label, classes):
    pytest.importorskip("datasets")
    s = open_source(written(tmp_path / "a.parquet", label))
    assert s.labels.tolist() == Y.tolist() and s.classes == classes and [*s.paths()] == [tmp_path / "a.parquet"]
    assert all((s.pixels(k) == X[k]).all() for k in range(6))


def test_words_that_are_captions_are_no_classes(tmp_path):
    pytest.importorskip("datasets")
    s = open_source(written(tmp_path / "a.parquet", {"label": ["a b", "c d", "e", "f", "f", "g"]}))
    assert s.labels is None and s.notes == ["column label has 5 different words: no classes"]
    s = open_source(written(tmp_path / "b.parquet", {"label": [.5] * 6, "note": ["b", "a"] * 3}))
    assert s.labels is None and s.notes == []
    with pytest.raises(ValueError, match="c.parquet: expected 6 labels, words or integers >= 0, got"):
        open_source(written(tmp_path / "c.parquet", {"label": [*Y[:5].tolist(), None]}))


def test_a_folder_of_parquet_as_the_hub_has_it(tmp_path):
    pytest.importorskip("datasets")
    y = {"label": ["ab"[k] for k in Y]}
    for name, part in (("train-00000-of-00002", slice(0, 3)), ("train-00001-of-00002", slice(3, 4)),
                       ("test-00000-of-00001", slice(4, 6))):
        written(tmp_path / "pets" / "data" / f"{name}.parquet", y, part)
    (tmp_path / "pets" / "README.md").write_text("---\nlicense: mit\n---\n")
    for path in (tmp_path / "pets", tmp_path / "pets" / "data"):
        s = open_source(path)
        assert right(s) and s.held_out.tolist() == [False] * 4 + [True] * 2 and s.name == path.name
        assert sorted(p.name[:5] for p in s.paths()) == ["test-", "train", "train"]
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 6))): written(tmp_path / "plain" / f"{name}.parquet", y, part)
    s = open_source(tmp_path / "plain")
    assert right(s) and s.held_out is None
    written(tmp_path / "both" / "images" / "metadata.parquet", y)  # beside pictures it speaks of them
    (tmp_path / "both" / "images" / "a.png").write_bytes(png(X[0]))
    assert open_source(tmp_path / "both").kind == "folder of images"


def test_names_on_the_hub(tmp_path, monkeypatch):
    "`datasets` takes a folder for a name of the Hub; hf: keeps nothing in its cache."
    datasets = pytest.importorskip("datasets")
    for name, part in (("train", slice(0, 4)), ("test", slice(4, 6))):
        (tmp_path / "me" / "pets").mkdir(parents=True, exist_ok=True)
        rows(part).to_parquet(tmp_path / "me" / "pets" / f"{name}-00000-of-00001.parquet")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    s = open_source("hf:me/pets")
    assert right(s) and s.held_out.tolist() == [False] * 4 + [True] * 2 and s.name == "pets"
    assert not any(cache.rglob("*.arrow"))
    with pytest.raises(ValueError, match="hf:me/none"): open_source("hf:me/none")


def test_a_name_with_an_underscore_keeps_it(tmp_path):
    for n in ("golden_retriever_1", "golden_retriever_2", "golden_gate_1", "golden_gate_22"):
        (tmp_path / f"{n}.png").write_bytes(png(X[0]))
    assert open_source(tmp_path, labels="prefix").classes == ["golden_gate", "golden_retriever"]
