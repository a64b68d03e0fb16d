"""Labels and arrays as other people write them: each with the right value."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from ctm_nb.data.read import open_source


def png():
    f = io.BytesIO()
    Image.new("L", (4, 4)).save(f, "png")
    return f.getvalue()


PNG = png()


def made(tmp_path, names, form="folder", **helpers):
    "Pictures of these names and helper files, as a folder or a zip."
    texts = {n.replace("_json", ".json").replace("_csv", ".csv"): t for n, t in helpers.items()}
    files = dict.fromkeys(names, PNG) | texts
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
            for n, data in files.items(): z.writestr(n, data)
        return tmp_path / "x.zip"
    for n, data in files.items():
        (tmp_path / "x" / n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / n).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / "x"


def labelled(s): return {n: None if s.labels is None else s.classes[s.labels[k]] for k, n in enumerate(s.names)}


def words(pairs, **more): return json.dumps({"labels": pairs, **more})


AB = ["a.png", "b.png"]
RIGHT = {  # names of the pictures, helper, its text, class of each picture, classes
    "one wrapping folder": (["ds/a/1.png", "ds/b/2.png"], {}, ["a", "b"], "a b"),
    "two wrapping folders": (["x/ds/a/1.png", "x/ds/b/2.png"], {}, ["a", "b"], "a b"),
    "a wrapped split": (["ds/train/a/1.png", "ds/train/b/2.png", "ds/test/a/3.png"], {}, ["a", "a", "b"], "a b"),
    "a wrapped dataset.json": (["ds/a.png", "ds/b.png"], {"ds/dataset_json": words([["a.png", 1], ["b.png", 0]])},
                               ["1", "0"], "0 1"),
    "labels from 1": (AB, {"dataset_json": words([["a.png", 1], ["b.png", 2]])}, ["1", "2"], "1 2"),
    "labels with gaps": (AB, {"labels_csv": "a.png,900\nb.png,5\n"}, ["900", "5"], "5 900"),
    "numbers in order": (["a.png", "b.png", "c.png"], {"labels_csv": "a.png,10\nb.png,9\nc.png,100"},
                         ["10", "9", "100"], "9 10 100"),
    "one-hot": (AB, {"dataset_json": words([["a.png", [0, 1, 0]], ["b.png", [1, 0, 0]]])}, ["1", "0"], "0 1"),
    "floats": (AB, {"dataset_json": words([["a.png", 1.0], ["b.png", 0.0]])}, ["1", "0"], "0 1"),
    "given names with one that is empty": (
        AB, {"dataset_json": words([["a.png", 2], ["b.png", 0]], classes=["x", "y", "z"])}, ["z", "x"], "x y z"),
    "a table with semicolons": (AB, {"labels_csv": "name;class\na.png;dog\nb.png;cat\n"}, ["dog", "cat"], "cat dog"),
    "a table with tabs": (AB, {"labels_csv": "a.png\tdog\nb.png\tcat"}, ["dog", "cat"], "cat dog"),
    "a byte order mark": (AB, {"labels_csv": "\ufeffa.png,dog\nb.png,cat"}, ["dog", "cat"], "cat dog"),
    "UTF-16, as spreadsheets write it": (
        AB, {"labels_csv": "name\tclass\na.png\tKäfer\nb.png\tcat\n".encode("utf-16")}, ["Käfer", "cat"], "Käfer cat"),
    "a heading the other way round": (AB, {"labels_csv": "Label,Filename\ndog,a.png\ncat,b.png\n"}, ["dog", "cat"],
                                      "cat dog"),
    "the name last": (AB, {"labels_csv": "breed;file\ndog;a\ncat;b\n"}, ["dog", "cat"], "cat dog"),
    "a name in the last of three": (AB, {"labels_csv": "id,class,image\n7,dog,a.png\n8,cat,b.png\n"}, ["dog", "cat"],
                                    "cat dog"),
    "Latin-1": (AB, {"labels_csv": b"a.png,K\xe4fer\nb.png,x\n"}, ["Käfer", "x"], "Käfer x"),
    "a third column": (AB, {"labels_csv": "id,label,score\na.png,dog,.5\nb.png,cat,.4\n"}, ["dog", "cat"], "cat dog"),
    "ids without endings": (AB, {"labels_csv": "id,breed\na,dog\nb,cat\n"}, ["dog", "cat"], "cat dog"),
    "columns in another order": (
        AB, {"metadata_csv": "text,label,file_name\nx,dog,a.png\ny,cat,b.png\n"}, ["dog", "cat"], "cat dog"),
    "lines of JSON": (
        AB, {"metadata.jsonl": '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": 0}\n'},
        ["1", "0"], "0 1"),
    "captions only": (
        ["a/1.png", "b/2.png"], {"metadata_csv": "file_name,text\na/1.png,hello\nb/2.png,x\n"}, ["a", "b"], "a b"),
    "quoted commas": (AB, {"labels_csv": 'a.png,"dog, big"\nb.png,cat\n'}, ["dog, big", "cat"], "cat|dog, big"),
    "no endings at all": (["a/1", "a/2", "b/3"], {}, ["a", "a", "b"], "a b"),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_labels_that_people_write(tmp_path, kind, form):
    names, helpers, want, classes = RIGHT[kind]
    s = open_source(made(tmp_path, names, form, **helpers))
    assert s.classes == classes.split("|" if "|" in classes else " ") and len(set(s.labels)) <= len(s.classes)
    assert [labelled(s)[n] for n in sorted(s.names)] == [w for _, w in sorted(zip(sorted(names), want))]


WRONG = {
    "an empty label": (AB, {"labels_csv": "a.png,dog\nb.png,\n"}, "has no label for 1 images: b.png"),
    "half a label": (AB, {"dataset_json": words([["a.png", .5], ["b.png", 1]])}, "the label 0.5, expected an integer"),
    "two hot": (AB, {"dataset_json": words([["a.png", [1, 1]], ["b.png", [0, 1]]])}, r"the label \[1, 1\], expected"),
    "null": (AB, {"dataset_json": words([["a.png", None], ["b.png", 1]])}, "the label None, expected"),
    "names that are numbers": (AB, {"dataset_json": words([["a.png", 0], ["b.png", 1]], classes=[1, 2])}, "as strings"),
    "too few names": (
        AB, {"dataset_json": words([["a.png", 0], ["b.png", 1]], classes=["x"])}, "but names 1 classes only"),
    "a picture that is gone": (
        AB, {"dataset_json": words([["a.png", 0], ["b.png", 1], ["c.png", 1]])}, "not there: c.png"),
    "a line too short": (AB, {"labels_csv": "a.png,x\nb.png\n"}, "expected lines of name,class, got 'b.png'"),
    "a line that is no object": (AB, {"metadata.jsonl": "[1]\n"}, "metadata.jsonl can't be read"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_labels_that_cant_be_meant(tmp_path, kind, form):
    names, helpers, why = WRONG[kind]
    with pytest.raises(ValueError, match=why) as e: open_source(made(tmp_path, names, form, **helpers))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_gaps_are_told_and_the_numbers_kept(tmp_path):
    s = open_source(made(tmp_path, ["a.png", "b.png", "c.png"], labels_csv="a.png,17\nb.png,900\nc.png,5\n"))
    assert (s.labels.tolist(), s.numbers.tolist(), s.classes) == ([1, 2, 0], [17, 900, 5], ["5", "17", "900"])
    assert s.notes == ["the labels 5, 17, 900 are the classes 0 to 2, called by their numbers"]
    whole = open_source(made(tmp_path / "y", AB, labels_csv="a.png,1\nb.png,0\n"))
    assert (whole.numbers, whole.notes) == (None, [])


def test_samples_keep_the_numbers_of_their_classes(tmp_path):
    "A model's class 7 is its class 7, though no sample is of any class below."
    from ctm_nb.evaluation.reference import open_samples
    np.savez(tmp_path / "a.npz", np.zeros((3, 4, 4, 3), np.uint8), np.array([7, 3, 7]))
    assert open_samples(tmp_path / "a.npz").labels.tolist() == [7, 3, 7]
    assert open_source(tmp_path / "a.npz").labels.tolist() == [1, 0, 1]


def test_classes_in_names_on_request(tmp_path):
    names = ["cat_1.png", "cat_22.png", "dog_1.png", "dog_2.png"]
    path = made(tmp_path, names)
    s = open_source(path)
    hint = "names like CLASS_NUMBER (cat, dog): --labels prefix (in training --set data.labels=prefix) makes classes"
    assert s.labels is None and any(hint in n for n in s.notes)
    s = open_source(path, labels="prefix")
    assert (s.classes, s.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
    assert open_source(made(tmp_path / "y", ["IMG_1.png", "IMG_2.png"])).notes == []  # one class is none
    assert open_source(made(tmp_path / "z", [f"{k}_1.png" for k in "abcd"])).notes == []  # nor is each its own


@pytest.mark.parametrize("text", ["", "filename,label\n", "file_name,text\na.png,hello\nb.png,x\n", '{"labels": []}',
                                  '{"file_name": "a.png", "text": "x"}'])
def test_a_file_of_labels_that_labels_nothing_is_refused(tmp_path, text):
    path = made(tmp_path, ["a/1.png", "b/2.png"])
    end = ".csv" if not text.startswith("{") else ".json" if "labels" in text else ".jsonl"
    given = tmp_path / f"l{end}"
    given.write_text(text)
    with pytest.raises(ValueError, match=f"{given} gives no image a label: expected lines of name,class"):
        open_source(path, given)
    given.write_text('{"labels": null}')
    if end == ".json": assert open_source(path, given).labels is None  # which is said


def test_a_file_of_labels_that_is_not_there(tmp_path):
    path = made(tmp_path, AB)
    for given, why in ((tmp_path / "no.csv", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError) as e: open_source(path, given)
        assert str(e.value) == f"labels {given} can't be read: can't be opened ({why})"


@pytest.mark.parametrize("names", [["0.png", "1.png"], ["a/000.png", "b/001.png"], ["a_1.png", "b_1.png"],
                                   ["a_1.png", "a_2.png", "b.png"]])
def test_no_classes_in_names(tmp_path, names):
    with pytest.raises(ValueError, match="x: prefix as labels is for names like cat_17.png, .* dog_1.png, got"):
        open_source(made(tmp_path, names), "prefix")


def test_classes_in_names_rather_than_in_folders_are_told(tmp_path):
    s = open_source(made(tmp_path, ["x/cat_1.png", "y/cat_2.png", "y/dog_1.png"]), "prefix")
    assert s.classes == ["cat", "dog"] and s.notes == ["classes are those of the names, not of the 2 folders"]


def shard(path, files):
    with tarfile.open(path, "w") as t:
        for n, data in files.items():
            info = tarfile.TarInfo(n)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def test_labels_of_shards(tmp_path):
    def classes(*labels, end="cls"):
        files = {k: v for n, label in enumerate(labels) for k, v in ((f"{n}.png", PNG), (f"{n}.{end}", label))}
        s = open_source(shard(tmp_path / "a.tar", files))
        return [s.classes[k] for k in s.labels]
    assert classes(b"1", b"0\n") == ["1", "0"] and classes(b"dog", b"cat") == ["dog", "cat"]
    for key in ("label", "class", "cls", "class_id"):
        assert classes(*(json.dumps({key: k, "text": "x"}).encode() for k in (3, 8)), end="json") == ["3", "8"]
    for empty, end in ((b"", "cls"), (b" \n", "cls"), (b'{"label": null}', "json"), (b"{}", "json")):
        with pytest.raises(ValueError, match="has no label for 1 images: a.tar/1.png"):
            classes(b"0" if end == "cls" else b'{"label": 0}', empty, end=end)
    dots = {"a.0.png": PNG, "a.0.json": b'{"class_id": 1}', "a.1.png": PNG, "a.1.cls": b"0"}
    assert open_source(shard(tmp_path / "d.tar", dots)).labels.tolist() == [1, 0]


X = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
ARRAYS = {
    "channels first": ({"arr_0": X.transpose(0, 3, 1, 2)}, X),
    "no channels": ({"arr_0": X[..., 0]}, X[..., :1]),
    "one channel first": ({"arr_0": X[..., 0][:, None]}, X[..., :1]),
    "in [0, 1]": ({"arr_0": X / 255}, X),
    "in [-1, 1]": ({"arr_0": (X / 127.5 - 1).astype(np.float32)}, X),
    "floats to 255": ({"arr_0": X.astype(np.float32)}, X), "large integers": ({"arr_0": X.astype(np.int64)}, X),
    "another name": ({"images": X}, X),
    "other names": ({"images": X, "labels": np.arange(5)}, X),
    "beside other arrays": ({"arr_0": X, "more": X}, X),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_people_save(tmp_path, kind):
    arrays, want = ARRAYS[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    s = open_source(tmp_path / "a.npz")
    assert np.array_equal(s.images, want) and s.images.dtype == np.uint8
    assert (s.labels is not None) == ("labels" in arrays) and bool(s.notes) == ("in [" in kind)
    np.save(tmp_path / "b.npy", next(iter(arrays.values())))
    assert np.array_equal(open_source(tmp_path / "b.npy").images, want)


def test_labels_of_arrays_that_are_words(tmp_path):
    words = np.array(["square", "round", "line", "round", "line"])
    np.savez(tmp_path / "a.npz", X, words)
    np.savez(tmp_path / "b.npz", images=X, labels=words)
    for name in ("a.npz", "b.npz"):
        s = open_source(tmp_path / name)
        assert s.classes == ["line", "round", "square"] and s.labels.tolist() == [2, 1, 0, 1, 0]
    np.savez(tmp_path / "c.npz", X, np.array(["10", "9", "9", "10", "9"]))
    assert open_source(tmp_path / "c.npz").classes == ["9", "10"]
    np.savez(tmp_path / "d.npz", X, np.array(["a", "", "a", "a", "a"]))
    with pytest.raises(ValueError, match="d.npz: expected 5 labels, words or integers >= 0, got ''"):
        open_source(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", images=X, names=words)  # nobody says that these are classes
    assert open_source(tmp_path / "e.npz").labels is None


@pytest.mark.parametrize("a", [X / 100, X * np.nan, X.astype(np.int32) + 1, X[:0], X[:, :0], X[0, 0], X[..., :2]],
                         ids=["above 1", "NaN", "int32", "none", "height 0", "2 axes", "2 channels"])
def test_arrays_that_are_no_pictures(tmp_path, a):
    np.savez(tmp_path / "a.npz", a)
    with pytest.raises(ValueError, match="a.npz"): open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("a, got", [(X / 100., "float64 from 0 to 2.55"), (X * 2., "float64 from 0 to 510"),
                                    (X - 300., "int.* from -300 to -45"), (X + .5, "float64 from 0.5 to 255.5")])
def test_numbers_that_are_no_pixels_are_told(tmp_path, a, got):
    np.savez(tmp_path / "a.npz", a.astype(np.int64) if "int" in got else a)
    with pytest.raises(ValueError, match=f"a.npz: expected pixels uint8, or numbers in .* 255, got {got}"):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("old, new", [(b"(5, 4, 4, 3)", b"(5.,4, 4, 3)"), (b"(5, 4, 4, 3)", b"(5, 4, 4, 9)"),
                                      (b"(5, 4, 4, 3)", b"(-5,4, 4, 3)"), (b"|u1", b"|O8"), (b"False", b"Fals3")])
def test_headers_that_are_damaged(tmp_path, old, new):
    np.save(tmp_path / "a.npy", X)
    data = (tmp_path / "a.npy").read_bytes().replace(old, new)
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z: z.writestr("arr_0.npy", data)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=name) as e: open_source(tmp_path / name)
        assert "\n" not in str(e.value)


def test_windows_names_its_folders_with_backslashes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for n in (r"ds\cat\1.png", r"ds\dog\2.png"): z.writestr(zipfile.ZipInfo(n), PNG)
    assert open_source(tmp_path / "a.zip").classes == ["cat", "dog"]
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as z: z.writestr(zipfile.ZipInfo(r"..\1.png"), PNG)
    with pytest.raises(ValueError, match="names a path outside"): open_source(tmp_path / "b.zip")
