"Averages of any length from snapshots of two: the golden numbers, and what lies on the disk."
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.checkpoints.averages import (LONGEST, Profile, average, fit_profile, forget_snapshots, gamma_of,
                                         inner_product, save_snapshot, snapshots_of)
from ctm_nb.checkpoints.models import describe, load
from ctm_nb.checkpoints.store import CheckpointError, load_checkpoint
from ctm_nb.method.teacher import Denoiser
from ctm_nb.networks.unet import DDPMpp, init_

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "phema.npz"))


def golden(prefix): return {k.partition(".")[2]: v for k, v in GOLDEN.items() if k.startswith(prefix + ".")}
def near(a, b): np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())
def gammas(stds): return np.array([gamma_of(s) for s in stds])


def test_lengths_and_exponents_are_golden():
    a, b = golden("std_to_gamma"), golden("gamma_to_std")
    np.testing.assert_allclose(gammas(a["std"]), a["gamma"], rtol=1e-12)
    some = b["std"] < LONGEST
    np.testing.assert_allclose(gammas(b["std"][some]), b["gamma"][some], atol=1e-6)
    for std in (0., LONGEST, .3, -.1, float("nan")):
        with pytest.raises(ValueError, match=r"the length of an average must be in \(0, 0.2887\), got"): gamma_of(std)


def test_the_share_of_the_past_is_golden():
    g = golden("beta")
    for std, betas in zip(g["std"], g["beta"], strict=True):
        p = Profile(torch.nn.Linear(1, 1), std)
        for t, dt, beta in zip(g["t_after_step"], g["dt"], betas, strict=True):
            p.n_updates = t / dt - 1
            np.testing.assert_allclose(p.effective_rate(), beta, rtol=1e-12)


def test_inner_products_and_least_squares_are_golden():
    g = golden("inner")
    of = lambda w: (g[f"t_{w}"], gammas(g[f"std_{w}"]))
    np.testing.assert_allclose(inner_product(*of("a"), *of("b")), g["value"], rtol=1e-12)
    np.testing.assert_allclose(inner_product(*of("b"), *of("a")), g["value"], rtol=1e-12)
    for name in ("solve_at_end", "solve_at_5th"):
        g = golden(name)
        t, own = g["snapshot_t"], gammas(g["snapshot_std"])
        near(inner_product(t[:, None], own[:, None], t, own), g["A"])
        for k, std in enumerate(g["target_std"]):
            near(inner_product(t, own, g["target_t"], gamma_of(std)), g["B"][:, k])
            w, error = fit_profile(t, g["snapshot_std"], g["target_t"], std)
            near(w, g["weights"][:, k])
            fit = g["weights"][:, k] @ g["A"] @ g["weights"][:, k] - 2 * g["weights"][:, k] @ g["B"][:, k]
            norm = inner_product(g["target_t"], gamma_of(std), g["target_t"], gamma_of(std))
            assert abs(error - (1 + fit / norm) ** .5) < 1e-9 and error < .2


def test_tracking_and_reconstruction_are_golden():
    g = golden("track")
    one = torch.nn.Linear(1, 1, bias=False).double()
    profiles, seen = [Profile(one, s) for s in g["std"]], []
    for theta in g["theta"]:
        one.weight.data.fill_(theta)
        for p in profiles: p.update(one)
        seen.append([p.module.weight.item() for p in profiles])
    near(np.array(seen), g["ema"])
    at = g["snapshot_index"].astype(int)
    t, stds, kept = np.repeat((at + 1) * g["dt"], 2), np.tile([.05, .1], len(at)), np.array(seen)[at, :2].reshape(-1)
    for k, std in enumerate((.075, .15)):
        w, _ = fit_profile(t, stds, t[-1], std)
        near(w, g["weights"][:, k])
        near(w @ kept, g["reconstructed"][k])
        near(fit_profile(t / g["dt"], stds, len(seen), std)[0], w)  # the unit of time doesn't matter
    r = golden("response")
    for k, std in enumerate(r["std"]):
        tau = np.arange(24) * (np.arange(24) <= r["t"])
        near(tau ** gamma_of(std) / (tau ** gamma_of(std)).sum(), r["weights"][:, k])


# ---- on the disk

def run_with(folder, steps=40, stage=("teacher", 0), which="teacher", seed=0, first=0):
    "A network that moves about, two profiles kept after every fifth step, another one tracked."
    torch.manual_seed(seed)
    net = Denoiser(DDPMpp(8, 1, 3, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=()), classes=["a"] * 3)
    init_(net.net.out_layers[1], 1.)
    own, third = {f"{which}-profile{s}": Profile(net, s) for s in (.05, .1)}, Profile(net, .08)
    about = {k: {"part": k, "description": describe(net)} for k in own}
    for step in range(first + 1, first + steps + 1):
        with torch.no_grad():
            for p in net.parameters(): p += .1 * torch.randn_like(p)
            for b in net.buffers(): b.fill_(1 / 3 + step)
        for e in (*own.values(), third): e.update(net)
        if step % 5 == 0: save_snapshot(folder, step, list(stage), own, about)
    return net, third.module, own


def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def test_an_average_that_was_not_kept_is_nearly_the_tracked_one(tmp_path):
    net, third, own = run_with(tmp_path)
    m = average(tmp_path, .08)
    assert (weights(m) - weights(third)).norm() < .05 * (weights(net) - weights(third)).norm()
    for std in (.05, .1):  # those that were kept, but for the rounding
        kept = weights(own[f"teacher-profile{std}"].module)
        assert (weights(average(tmp_path, std)) - kept).abs().max() < 1e-3 * kept.abs().max()
    assert not m.training and not any(p.requires_grad for p in m.parameters()) and m.classes == ["a"] * 3
    assert "teacher, average of length 0.08 over 16 snapshots up to step 40" in m.about
    assert all(torch.equal(b, c) and b.dtype == torch.float32 for b, c in zip(m.buffers(), net.buffers(), strict=True))
    assert len(list(m.buffers())) > 0


def test_weights_lie_there_in_half_precision_and_can_be_loaded(tmp_path):
    net, _, own = run_with(tmp_path)
    path = tmp_path / "averages" / "step_00000040"
    parts = load_checkpoint(path).models
    assert parts.keys() == own.keys()
    for k, v in parts["teacher-profile0.1"].items():
        assert v.dtype == (torch.float16 if k in dict(net.named_parameters()) else torch.float32), k
    kept = weights(own["teacher-profile0.05"].module)
    for m in (load(path), load(path, which="teacher-profile0.05")):
        assert torch.equal(weights(m), kept.half().float()) and m.n_classes == 3


def test_only_the_last_stage_counts_and_no_time_twice(tmp_path):
    run_with(tmp_path, 20)
    run_with(tmp_path, 30, ("ctm_dsm", 20), "ctm", first=20)
    assert [r[2] for r in snapshots_of(tmp_path)] == [float(t) for t in np.repeat(range(5, 31, 5), 2)]
    assert {r[1].partition("-")[0] for r in snapshots_of(tmp_path)} == {"ctm"}
    assert snapshots_of(tmp_path, "teacher")[-1][2] == 20
    run_with(tmp_path, 10, ("ctm_dsm", 50), "ctm", first=50)  # a longer run goes on with a time of its own
    assert [r[2] for r in snapshots_of(tmp_path)] == [5., 5., 10., 10.]
    p = {"ctm-profile0.05": Profile(torch.nn.Linear(1, 1), .05)}
    for step, updates in ((61, 0), (62, 0), (63, 10)):  # a stage in which another network learns
        for e in p.values(): e.n_updates = updates
        save_snapshot(tmp_path, step, ["ctm_dsm", 50], p, {"ctm-profile0.05": {"part": "ctm-profile0.05"}})
    assert [(r[0].name, r[2]) for r in snapshots_of(tmp_path)][-2:] == [("step_00000063", 10), ("step_00000060", 10)]


def test_what_lies_beyond_the_step_is_forgotten(tmp_path):
    forget_snapshots(tmp_path, 0)
    assert not list(tmp_path.iterdir())
    run_with(tmp_path, 20)
    (tmp_path / "averages" / ".tmp-step_00000025-0").mkdir()
    forget_snapshots(tmp_path, 10)
    assert sorted(p.name for p in (tmp_path / "averages").iterdir()) == ["step_00000005", "step_00000010"]


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no snapshots of averages; a run keeps some with --set teacher.prof"):
        average(tmp_path, .1)
    run_with(tmp_path, 20)
    with pytest.raises(ValueError, match="holds no snapshots of averages of 'ctm'"): average(tmp_path, .1, "ctm")
    with pytest.raises(ValueError, match="must be in"): average(tmp_path, .4)
    file = tmp_path / "averages" / "step_00000010" / "teacher-profile0.1.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="step_00000010/teacher-profile0.1.safetensors: expected sha256"):
        average(tmp_path, .08)


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    run_with(tmp_path, 20)
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="while step 25 was being saved; the checkpoints before it are whole"):
        run_with(tmp_path, 5, first=20)
    monkeypatch.undo()
    assert len(snapshots_of(tmp_path)) == 8
    average(tmp_path, .08)
