"Likelihood: densities that are known, what values depend on, and the command."
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch

from ctm_nb.commands.train import ctm_nb_train
from ctm_nb.commands.evaluate import ctm_nb_evaluate
from ctm_nb.data.images import ImageData, digits
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.flow import GaussianMixture, noise, perturb, toy_mixture
from ctm_nb.evaluation.likelihood import (PIXEL, bits_per_dim, _denoise_with_trace, _dequantise, likelihood_record,
                                          ode_bits, ode_log_density, _trace_probes)
from ctm_nb.networks.unet import MLP, DDPMpp, init_
from ctm_nb.method.trajectory import student_from

TOY = toy_mixture()


def points(m, n, dim=2):
    "Points of the mixture at sigma_min."
    return perturb(m.sample(n, seed=8).double(), .002, noise((dim,), 9, range(n)).double())


def small(cls=MLP, **kw):
    "A network none of whose layers is zero."
    torch.manual_seed(0)
    m = Denoiser(cls(**kw)).eval().requires_grad_(False)
    for p in m.parameters():
        if not p.any(): torch.nn.init.normal_(p, 0, .1)
    return m


@pytest.fixture(scope="module")
def net():
    return small(DDPMpp, image_size=8, channels=1, n_classes=10, model_channels=8, channel_mult=(1,), n_blocks=1,
                 attention=())


def test_gaussian_of_any_width():
    for std in (.05, .5, 2.):
        m = GaussianMixture(torch.zeros(1, 3), [std])
        m.sigma_data = .5  # the coordinates expect another width
        x = std * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        var = std ** 2 + .002 ** 2
        exact = -(x ** 2 / (2 * var) + math.log(2 * math.pi * var) / 2).sum(1)
        ours = ode_log_density(m, x, tol=1e-6)[0]  # one sign vector: exact for a multiple of the unit matrix
        prior = 3 * abs(math.log((80 ** 2 + std ** 2) / (80 ** 2 + .25))) * 3
        assert torch.allclose(ours, exact, atol=1e-4 + prior)


@pytest.mark.parametrize("m", [TOY, GaussianMixture([[-.7], [.1], [.6]], [.08, .12, .05], [2, 1, 2])])
def test_mixture_to_one_percent_at_every_point(m):
    x = points(m, 60, m.dim)
    exact, ours = m.log_density(x, .002), ode_log_density(m, x, tol=1e-5, probes=None)[0]
    assert ((ours - exact).abs() / m.dim < 1e-3).all()
    in_bits = lambda p: bits_per_dim(p + m.dim * math.log(PIXEL), m.dim).mean()
    assert abs(in_bits(ours) / in_bits(exact) - 1) < .001


def test_smaller_tolerance_smaller_error():
    x = points(TOY, 30)
    best = ode_log_density(TOY, x, tol=1e-9, probes=None)[0]
    error, cost = zip(*((float((p - best).abs().median()), float(e)) for p,
                        e in (ode_log_density(TOY, x, tol=tol, probes=None) for tol in (1e-3, 1e-4, 1e-5, 1e-6))))
    assert all(a > 3 * b for a, b in zip(error, error[1:])) and all(a < b < 2 * a for a, b in zip(cost, cost[1:]))


def test_any_network_has_mass_one():
    m = small(dim=1, width=16, n_blocks=1)
    init_(m.net.out, 1.)
    line = torch.linspace(-5, 5, 400)[:, None]
    density = ode_log_density(m, line, probes=None)[0].exp()
    assert abs(float(torch.trapezoid(density, line[:, 0].double())) - 1) < .003
    gauss = torch.exp(-line[:, 0].double() ** 2 / .5) / math.sqrt(.5 * math.pi)
    assert (density - gauss).abs().max() > .02  # it isn't the untrained one's


def test_traces():
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    class Linear:
        def D(self, x, t, y=None): return x @ A.T
    x, t = torch.zeros(4000, 6, dtype=torch.float64), torch.ones(4000)
    _, exact = _denoise_with_trace(Linear(), x[:1], t[:1], None, _trace_probes((6,), None).double())
    assert torch.allclose(exact, A.trace())
    S2 = ((A + A.T) / 2).square()
    var = 2 * (S2.sum() - S2.trace())
    for K in (1, 4):
        _, e = _denoise_with_trace(Linear(), x, t, None, _trace_probes((6,), K, 0, range(4000)).double())
        assert abs(float(e.mean() - A.trace())) < 4 * float(e.std()) / 4000 ** .5
        assert abs(float(e.std() / (var / K).sqrt()) - 1) < .07



def test_values_depend_on_the_image_and_its_number(net):
    data = digits("held_out")
    x, y = data.x0(slice(0, 5)), data.labels[:5]
    for f, kw in ((ode_bits, dict(tol=1e-5, probes=2)),):
        whole = f(net, x, y, **kw)
        assert torch.allclose(f(net, x[[4, 1]], y[[4, 1]], ids=[4, 1], **kw), whole[[4, 1]], atol=1e-4)
        assert not torch.allclose(f(net, x, y, seed=1, **kw), whole, atol=1e-3)
        # chance differs from image to image
        assert (f(net, x[:1].expand(5, -1, -1, -1), y[:1].expand(5), **kw).diff().abs() > 1e-6).all()
    a, b = (likelihood_record(net, data, n=4, tol=1e-5, batch=k) for k in (4, 3))
    assert abs(a["value"] - b["value"]) < 1e-4


def test_labels_and_students(net):
    data = digits("held_out")
    x, y = data.x0(slice(0, 3)), data.labels[:3]
    assert not torch.allclose(ode_bits(net, x, y, tol=1e-3), ode_bits(net, x, (y + 1) % 10, tol=1e-3), atol=1e-4)
    assert torch.equal(ode_bits(net, x, None, tol=1e-3), ode_bits(net, x, [-1] * 3, tol=1e-3))
    student = student_from(net)  # starts as its teacher
    assert torch.allclose(ode_bits(student, x, y, tol=1e-3), ode_bits(net, x, y, tol=1e-3), atol=1e-3)


def test_dequantisation_fills_the_cell_and_knows_no_sample():
    x = torch.zeros(4000, 1) + 1 / 255
    u = ((_dequantise(x, 0, range(4000)) - x) / PIXEL)[:, 0]
    assert abs(PIXEL - 1 / 127.5) < 1e-12 and u.abs().max() <= .5 and abs(float(u.mean())) < .02
    assert abs(float(u.var()) - 1 / 12) < .004
    assert abs(float(torch.corrcoef(torch.stack([u, noise((1,), 0, range(4000))[:, 0].double()]))[0, 1])) < .06


MISTAKES = [(lambda m, x: ode_bits(m, x[:, :, :4]), r"x must be \(B, 1, 8, 8\) with B >= 1, got \(2, 1, 4, 8\)"),
            (lambda m, x: ode_bits(m, x[:0]), "B >= 1"), (lambda m, x: ode_bits(m, x * 1.5),
                                                          r"images must lie in \[-1, 1\], got .* in image 0"),
            (lambda m, x: ode_bits(m, x * .99, ids=[5, 6]), r"images must have the 256 levels .* in image 5"),
            (lambda m, x: ode_log_density(m, torch.full_like(x, torch.nan)), "x must be finite, got nan"),
            (lambda m, x: ode_bits(m, x, [1, 10]), r"y must be in \[0, 10\), or -1 for no label, got 10"),
            (lambda m, x: ode_bits(m, x, [1]), "y must be one class or n=2 classes"),
            (lambda m, x: ode_bits(m, x, tol=0), "tol must be > 0, got tol=0"),
            (lambda m, x: ode_bits(m, x, tol=math.nan), "tol must be > 0, got tol=nan"),
            (lambda m, x: ode_bits(m, x, probes=0), "probes must be >= 1"),
            (lambda m, x: ode_bits(m, x, ids=[0]), "ids must be 2 numbers"),
            (lambda m, x: likelihood_record(m, ImageData(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), name="colour")),
             "images of colour must be 1 x 8 x 8 as the model's, got 3 x 8 x 8"),
            (lambda m, x: likelihood_record(m, ImageData(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), name="grey")),
             "grey must have labels of the model's 10 classes, got no classes"),]


@pytest.mark.parametrize("call, word", MISTAKES)
def test_mistakes_are_named(net, call, word):
    with pytest.raises(ValueError, match=word): call(net, digits("held_out").x0(slice(0, 2)))


def test_networks_that_are_not_finite_are_named(net):
    class Bad:
        n_classes, sigma_min, sigma_max, sigma_data, data_shape = 0, .002, 80., .5, (2,)
        def D(self, x, t, y=None): return torch.where((torch.as_tensor(t).reshape(-1, 1) > 1), torch.inf, 0.) + x * 0
    x = torch.zeros(2, 2)
    with pytest.raises(FloatingPointError, match=r"Bad or its gradient is not finite for image 7 at t=\d"):
        ode_log_density(Bad(), x, ids=[7, 8])
    class Noisy(Bad):
        def D(self, x, t, y=None): return torch.randn_like(x) + 0 * x
    with pytest.raises(FloatingPointError, match="tol=1e-14 can't be reached"): ode_log_density(Noisy(), x, tol=1e-14)


def command(f, *words):
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            f(list(map(str, words)))
            code = 0
        except SystemExit as e: code = e.code
    return code, out.getvalue(), err.getvalue().strip()


def test_command(tmp_path, monkeypatch):
    code, _, err = command(ctm_nb_train, "--preset", "tiny", "--runs", tmp_path, "--set", "network.channel_mult=1",
                           "teacher.steps=2", "distill.steps=2", "evaluate.n=0")
    assert code == 0, err
    run, out = tmp_path / "tiny", tmp_path / "scores.json"
    words = run, "--ref", "digits", "--metrics", "bpd", "-n", 6, "--tol", 1e-2, "--out", out
    for _ in range(2):  # the second time the same records replace the first
        code, text, err = command(ctm_nb_evaluate, *words)
        assert code == 0 and "bits_per_dim" in text and "±" in text, err
    (a,) = json.loads(out.read_text())
    assert a["metric"] == "bits_per_dim" and 4 < a["value"] < 12 and a["n_samples"] == 6
    assert a["tolerance"] == 1e-2 and a["probes"] == 1 and a["standard_error"] > 0
    assert a["reference"]["name"] == "digits, held out" and a["checkpoint"].startswith(str(run))
    assert command(ctm_nb_evaluate, *words[:-2], "--which", "teacher",
                   "--dry-run")[1].startswith("likelihood bpd of images of digits, held_out")
    code, text, err = command(ctm_nb_evaluate, run, "--ref", "digits", "--metrics", "bpd,fid", "-n", 8, "--steps", 1,
                              "--tol", .1, "--out", tmp_path / "both.json")
    names = [r["metric"] for r in json.loads((tmp_path / "both.json").read_text())]
    assert code == 0 and names == ["bits_per_dim", "frechet_distance"], err
    monkeypatch.setenv("RANK", "1")
    assert command(ctm_nb_evaluate, *words)[:2] == (0, "")
    monkeypatch.delenv("RANK")
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    for words, say in (((tmp_path / "s.npz", "--ref", "digits", "--metrics", "bpd"), "needs a model"),
                       ((run, "--ref", tmp_path / "ref.npz", "--metrics", "bpd"), "needs images"),
                       ((run, "--ref", "digits", "--metrics", "bpd", "--tol", 0), "--tol must be >= 1e-15, got 0"),
                       ((run, "--ref", tmp_path / "s.npz", "--ref-split", "all", "--metrics", "bpd"),
                        "must have labels of the model's 10 classes")):
        code, text, err = command(ctm_nb_evaluate, *words)
        assert code == 2 and say in err and err.count("\n") == 0, err
