"""EDM2's snapshots: read without running anything of theirs, by file and by name, or refused in a sentence."""
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.checkpoints import models
from ctm_nb.checkpoints.catalogue import CATALOGUE, fetch
from ctm_nb.checkpoints.models import load, save_model
from ctm_nb.method.sampling import sample

sys.path.insert(0, str(Path(__file__).parent))
from foreign_files import Call, EasyDict, make_edm2_snapshot  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name="edm2_cond10_16"):
    z = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    return z, {k[6:]: v.half() for k, v in z.items() if k.startswith("state.")}


def check(m, z):
    "D is the reference's, in the rows whose label is one class or none."
    x, t = z["io.x"], z["io.sigma"]
    if "io.labels" not in z: rows, y, D = range(8), None, z["io.D"]
    else: rows, y, D = [0, 1, 2, 3, 5, 7], z["io.labels"].argmax(1), z["io.D"]
    for ours, theirs in ((m.D(x, t, y)[rows], D[rows]), (m.D(x, t), z.get("io.D_nolabel", D))):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", ["edm2_cond10_16", "edm2_uncond_16"])
def test_a_snapshot_is_the_reference_after_every_round_trip(tmp_path, name, caplog):
    z, state = golden(name)
    with caplog.at_level(logging.WARNING):
        m = load(make_edm2_snapshot(tmp_path / "net.pkl", state, canary=tmp_path / "canary"))
    assert not (tmp_path / "canary").exists() and not caplog.records
    check(m, z)
    assert "teacher, edm2" in m.about and m.sigma_data == .5 and (m.sigma_min, m.sigma_max) == (.002, 80.)
    assert m.net.config["channels_per_head"] == 16  # from the heads that the blocks say they have
    check(load(save_model(m, tmp_path / "ours.safetensors")), z)
    check(load(save_model(m, tmp_path / "theirs.pt"), channels_per_head=16), z)
    back = models._foreign_state(m)
    assert set(back) == set(state) and all(torch.equal(back[k], v.float()) for k, v in state.items())
    drawn = sample(m, 2, steps=3, solver="heun")
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()


@pytest.mark.parametrize("per_head, config", [(16, 16), (32, 32), (64, 64)])
def test_heads_are_those_of_the_file(tmp_path, per_head, config):
    _, state = golden()
    path = make_edm2_snapshot(tmp_path / "net.pkl", state, num_heads=lambda c: max(1, c // per_head))
    assert load(path).net.config["channels_per_head"] == config


def refused(path, **how):
    with pytest.raises(ValueError) as e: load(path, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_latents_are_refused_by_file_and_by_name(tmp_path):
    _, state = golden()
    path = make_edm2_snapshot(tmp_path / "net.pkl", state, "StabilityVAEEncoder")
    assert "draws latents of 3 channels (StabilityVAEEncoder), this package draws pixels" in refused(path)
    assert "draws latents of a VAE, this package draws pixels" in refused("edm2-img512-s-2147483-0.130")
    state["unet.out_conv.weight"] = torch.cat([state["unet.out_conv.weight"]] * 2)[:4]
    path = make_edm2_snapshot(tmp_path / "net.pkl", state, None)
    assert "draws latents of 4 channels (no encoder is named)" in refused(path)


def test_another_version_is_refused(tmp_path):
    assert "an EDM2 snapshot of version 7, expected 6" in refused(
        make_edm2_snapshot(tmp_path / "net.pkl", golden()[1], version=7))


@pytest.mark.parametrize("change, word", [(dict(encoder=None), "names no encoder: taken as one of pixels"),
                                          (dict(state=torch.Tensor.float), "not in float16")])
def test_what_is_unusual_but_clear_is_read_and_said(tmp_path, change, word, caplog):
    z, state = golden()
    if "state" in change: state = {k: change["state"](v) for k, v in state.items()}
    path = make_edm2_snapshot(tmp_path / "net.pkl", state, change.get("encoder", "StandardRGBEncoder"))
    with caplog.at_level(logging.WARNING): check(load(path), z)
    assert [word in r.message for r in caplog.records] == [True]


def test_a_state_with_foreign_or_missing_keys_is_refused(tmp_path):
    _, state = golden()
    more = {**state, "unet.enc.8x8_block0.conv_extra.weight": torch.zeros(2, 2).half()}
    assert "no place for 'net.enc.8x8_block0.conv_extra.weight'" in refused(
        make_edm2_snapshot(tmp_path / "net.pkl", more))
    less = {k: v for k, v in state.items() if k != "unet.enc.8x8_block0.emb_gain"}
    assert "lacks 'net.enc.8x8_block0.emb_gain'" in refused(make_edm2_snapshot(tmp_path / "net.pkl", less))
    other = {**state, "unet.out_conv.weight": torch.zeros(3, 32, 1, 1).half()}
    assert "'net.out_conv.weight' must have shape (3, 32, 3, 3)" in refused(
        make_edm2_snapshot(tmp_path / "net.pkl", other))
    bad = {**state, "unet.out_gain": torch.tensor(float("nan")).half()}
    assert "'net.out_gain' must be finite" in refused(make_edm2_snapshot(tmp_path / "net.pkl", bad))


@pytest.mark.parametrize("changed", [dict(res_balance=.5), dict(clip_act=64), dict(label_balance=.2)])
def test_other_constants_are_refused(tmp_path, changed):
    (key, value), = changed.items()
    said = refused(make_edm2_snapshot(tmp_path / "net.pkl", golden()[1], **changed))
    assert f"{key} of unet" in said and f"the file has {value}" in said


def test_uneven_heads_are_refused(tmp_path):
    counts = iter([1, 2, 4, 8, 16, 32])
    path = make_edm2_snapshot(tmp_path / "net.pkl", golden()[1], num_heads=lambda channels: next(counts))
    assert "heads must follow from one width of them" in refused(path)


def test_what_would_run_is_not_run(tmp_path):
    path = make_edm2_snapshot(tmp_path / "net.pkl", golden()[1])
    import os
    import pickle
    evil = EasyDict(ema=Call(os.system, f"touch {tmp_path / 'canary'}"))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(dict(evil), 4))
    assert "is not on the list of harmless names" in refused(tmp_path / "evil.pkl")
    data = path.read_bytes()
    for cut in (len(data) // 2, len(data) - 3):
        (tmp_path / "cut.pkl").write_bytes(data[:cut])
        refused(tmp_path / "cut.pkl")
    assert not (tmp_path / "canary").exists()


def test_public_names(tmp_path, monkeypatch):
    ours = {n: e for n, e in CATALOGUE.items() if n.startswith("edm2-img64-")}
    assert {n.split("-")[2] for n in ours} == {"xs", "s", "m", "l", "xl"}
    for n, e in ours.items():
        assert (e.kind, e.licence) == ("teacher", "CC BY-NC-SA 4.0") and e.file == f"{n}.pkl"
        assert e.url == f"https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/{n}.pkl"
    name = "edm2-img64-s-1073741-0.075"
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path))
    z, state = golden()
    make_edm2_snapshot(tmp_path / f"{name}.pkl", state)
    check(load(name), z)
    with pytest.raises(ValueError, match="is a teacher, not a ctm"): load(name, which="ctm")
    monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], url=None))
    assert fetch(name) == tmp_path / f"{name}.pkl"
