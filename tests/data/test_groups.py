"""Near-duplicates stay on one side of the split: data.group."""
import numpy as np
import pytest

from ctm_nb.data.batches import load_splits
from ctm_nb.data.images import held_out_mask
from ctm_nb.data.read import held_out_of, open_source

STEM = "[^/]*(?=__)"


def test_a_group_is_held_out_as_a_whole_and_one_in_ten():
    groups = np.repeat([f"g{i}" for i in range(40)], 3)
    labels = np.repeat([0, 1], 60)
    held = held_out_mask(labels, groups=groups)
    assert {g: set(held[groups == g]) for g in groups if held[groups == g].any()} == {
        f"g{i}": {True} for i in (9, 19, 29, 39)}
    order = np.random.default_rng(0).permutation(120)
    shuffled = held_out_mask(labels[order], groups=groups[order])
    sides = {g: set(shuffled[groups[order] == g]) for g in groups}
    assert all(len(s) == 1 for s in sides.values()) and sum(s == {True} for s in sides.values()) == 4


def test_without_groups_the_rule_is_the_old_one():
    labels = np.random.default_rng(0).integers(0, 3, 100)
    assert (held_out_mask(labels, groups=np.arange(100)) == held_out_mask(labels)).all()


def test_variants_of_an_emoji_are_on_one_side():
    source = open_source("emoji")
    base = [n.rpartition("/")[2].split("__")[0] for n in source.names]
    both = lambda held: {b for b, h in zip(base, held) if h} & {b for b, h in zip(base, held) if not h}
    assert source.held_out.any() and not both(held_out_of(source))  # as the emoji come
    source.held_out = None
    assert both(held_out_of(source)) and not both(held_out_of(source, STEM))


def test_splits_of_a_folder_by_group(tmp_path):
    from PIL import Image
    for i in range(30):
        for v in "ab": Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}__{v}.png")
    splits = load_splits(tmp_path, group=STEM)
    greys = [set(splits[s].take(np.arange(len(splits[s])))[:, 0, 0, 0].tolist()) for s in ("train", "held_out")]
    assert [len(g) for g in greys] == [27, 3] and not greys[0] & greys[1]


def test_a_bad_expression_is_one_line():
    source = open_source("digits")
    source.held_out = None
    with pytest.raises(ValueError, match=r"data.group must be a regular expression, got '\('"):
        held_out_of(source, "(")
