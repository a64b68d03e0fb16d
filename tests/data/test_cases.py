"""Small inputs that once went wrong, in cases.tar.xz, and what is right for each."""
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.data.convert import convert
from ctm_nb.data.read import open_source

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))
from fuzz import limited  # noqa: E402

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python before 3.11.4

REFUSED = {  # in one line with the file's name, and for this reason
    "cifar-empty-dict": "expected data uint8", "cifar-list": "expected a dictionary, got a list",
    "cifar-no-meta": "has five batches", "cifar-object-array": "data_batch_1 can't be read",
    "cifar-object-array.tar.gz": "data_batch_1 can't be read", "cifar-one-batch-of-five": "has five batches",
    "idx-3-bytes.idx": "expected an idx file of bytes", "idx-cut-gz": "unpacks to more", "lmdb-cut": "it is cut off",
    "npz-flipped-bit.npz": "Bad CRC-32", "npz-float.npz": "shape is not valid", "npz-header-cut.npz": "can't be read",
    "npz-huge-shape.npz": "more memory", "npz-not-npy.npz": "arr_0 is no array", "npz-shape-overflow.npz": "too large",
    "npz-zero-height.npz": "expected images", "ref-mu-not-npy.npz": "mu is no array", "tar-slip.tar": "path outside",
    "wds-json-escape.tar": "can't be read", "wds-two-images-escape.tar": "images of one key",
    "zip-bad-magic.zip": "Bad magic number", "zip-cut.zip": "dataset.json can't be read",
    "zip-duplicate-name.zip": "twice", "zip-encrypted-escape-name.zip": "is encrypted",
    "zip-label-escape.zip": "twice", "zip-labels-dict.zip": "expected {", "zip-labels-list.zip": "expected {",
    "zip-labels-str.zip": "the label 'a', expected an integer", "zip-slip.zip": "path outside",
    "zip-stored-2e62.zip": "can't have 4611686018427387904 bytes", "zip-stored-4g.zip": "can't have 4294967280 bytes",
}
BROKEN = {  # pictures are named that are none; the command ends with 1
    "eps-named-png": r"images     2\n.*evil.png: not an image, begins with b'%!PS-Ado'",
    "zip-escape-name.zip": r"images     2\n.*b.jpg: not an image, begins with b'zzz'",
    "zip-method-escape-name.zip": r"\\x1b\]0;pwned\\x07\\x1b\[31mx.jpg: damaged in the zip"}
READ = {
    "exif-damaged": "images     2\n", "lmdb-two-versions": "kind       LMDB\nimages     3\n",
    "tar-links.tar": "images     1\n", "zip-stored-size.zip": "images     1\n",
    "zip-more-escapes.zip": "images     2\n",
    "zip-size-escape.zip": "342 x 259: 1, 32 x 32: 1",
    "zip-class-names.zip": r"2: \\x1b\]0;pwned\\x07\\x1b\[31mone: 1, <script>alert\(1\)</script>: 1"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    with tarfile.open(Path(__file__).parent / "cases.tar.xz") as t:
        t.extractall(folder := tmp_path_factory.mktemp("cases"), **SAFELY)
    return folder


def test_every_case_has_an_answer(cases): assert {*os.listdir(cases)} == {*REFUSED, *BROKEN, *READ}


@pytest.mark.parametrize("name", [*REFUSED, *BROKEN, *READ])
def test_a_case(cases, name):
    how, said = limited(ctm_nb_data, ["inspect", str(cases / name), "--workers", "0"])
    assert how == ("ok" if name in READ else "refused"), said
    assert all(c.isprintable() or c == "\n" for c in said)
    if name in REFUSED: assert said.count("\n") == 1 and name in said
    assert re.search({**REFUSED, **BROKEN, **READ}[name], said, re.S), said


@pytest.mark.parametrize("name", [n for n in REFUSED if n.startswith(("npz-", "ref-", "zip-labels", "cifar-object"))])
def test_a_case_as_reference(cases, name, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((6, 8, 8, 3), np.uint8))
    how, said = limited(ctm_nb_evaluate, [str(tmp_path / "s.npz"), "--ref", str(cases / name), "--device", "cpu"])
    assert how == "refused" and said.count("\n") == 1 and name in said, said


def test_classes_become_folders(cases, tmp_path):
    convert(open_source(cases / "zip-class-names.zip"), tmp_path / "o", workers=0)
    found = [p.name for p in (tmp_path / "o").iterdir() if p.is_dir()]
    assert len(found) == 2 and all(re.fullmatch(r"\w[\w .+()-]*", n) for n in found) and len(os.listdir(tmp_path)) == 1
