"""flow: regressions and bad input. What explains the mathematics is tested in nbs/1_method/01_flow.ipynb."""
import math

import numpy as np
import pytest
import torch

from ctm_nb.method.flow import (SIGMA_MAX, SIGMA_MIN, GaussianMixture, check_times, expand, noise, perturb, rho_grid,
                                toy_mixture)

f64 = torch.float64


@pytest.fixture(scope="module")
def toy():
    return toy_mixture()


def points(toy, t, seed=0):
    t = torch.as_tensor(t, dtype=f64)
    return perturb(toy.sample(len(t), seed).double(), t, noise((2,), seed + 1, range(len(t))).double())


def test_noise_values_are_pinned():
    """A change of these numbers changes every sample that anybody ever drew with a seed."""
    z = noise((3,), 1, [5, 6])
    again = np.random.Generator(np.random.Philox(key=np.array([1, 6], np.uint64))).standard_normal(3, dtype=np.float32)
    assert z.dtype == torch.float32 and z.shape == (2, 3)
    assert np.array_equal(z[1].numpy(), again)
    expected = torch.tensor([[1.08549106, -3.12412834, 0.114351571], [-0.177954286, -0.797393143, -1.85201597]])
    assert torch.equal(z, expected)
    third = np.random.Philox(key=np.array([7, 5], np.uint64), counter=np.array([0, 0, 2, 0], np.uint64))
    later = np.random.Generator(third).standard_normal(3, dtype=np.float32)
    assert np.array_equal(noise((3,), 7, [5], draw=2)[0].numpy(), later)


@pytest.mark.parametrize("ids", [range(8), [7, 3, 0], torch.tensor([2, 6]), np.array([1])])
def test_noise_depends_on_the_id_only(ids):
    full = noise((2, 3), 9, range(8), draw=4)
    assert torch.equal(noise((2, 3), 9, ids, draw=4), full[torch.as_tensor(list(ids))])


def test_noise_edges():
    assert noise((2,), 0, []).shape == (0, 2)
    assert noise((), 0, [1]).shape == (1,)
    assert noise((1,), 2**64 - 1, [2**63]).isfinite().all()
    streams = torch.cat([noise((50,), s, [i], d) for s in (0, 1) for i in (0, 1) for d in (0, 1)])
    assert len(streams.unique()) == streams.numel()
    for bad in (dict(seed=-1, ids=[0]), dict(seed=0, ids=[-3]), dict(seed=0, ids=[0], draw=-1),
                *(dict(seed=s, ids=[0]) for s in (2**64, None, 1.5))):
        with pytest.raises(ValueError, match=r"must be a whole number in \[0, 2\*\*64\), got"):
            noise((1,), **bad)


def test_expand_rejects_a_wrong_number_of_levels():
    x = torch.zeros(4, 1, 2, 2)
    for bad in ([1., 2.], torch.ones(4, 1), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="4 rows"):
            expand(bad, x)
    assert expand(torch.tensor(2), x).shape == (1, 1, 1, 1)
    assert expand([], torch.zeros(0, 2)).shape == (0, 1)


@pytest.mark.parametrize("n", [2, 18, 40, 1000])
@pytest.mark.parametrize("rho", [0.5, 1, 7, 50])
def test_rho_grid(n, rho):
    t = rho_grid(n, rho=rho)
    assert t.shape == (n,) and t.dtype == f64 and t[0] == SIGMA_MAX and t[-1] == SIGMA_MIN and (t.diff() < 0).all()


def test_rho_grid_is_edms():
    t = rho_grid(18)
    i = 5
    assert t[i].item() == pytest.approx((80**(1 / 7) + i / 17 * (0.002**(1 / 7) - 80**(1 / 7)))**7, rel=1e-12)


@pytest.mark.parametrize("bad", [dict(n=1), dict(n=0), dict(n=5, rho=0), dict(n=5, sigma_min=-1),
                                 dict(n=5, sigma_min=3, sigma_max=2)])
def test_rho_grid_bad_input(bad):
    with pytest.raises(ValueError):
        rho_grid(**bad)


@pytest.mark.parametrize("bad, message", [
    (dict(means=[0., 1.], stds=[1., 1.]), "means must have shape"),
    (dict(means=[[0., 1.]], stds=[0.]), "stds must all be > 0"),
    (dict(means=[[0., 1.]], stds=[float("nan")]), "stds must all be > 0"),
    (dict(means=[[0., 1.]], stds=[1., 2.]), "stds must have shape"),
    (dict(means=[[0.], [1.]], stds=1., weights=[1., 0.]), "weights must all be > 0")])
def test_mixture_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**bad)


@pytest.mark.parametrize("t, s, message", [
    (1., 2., r"s must be <= t, got s=2.0 > t=1.0 \(row 0\)"), (1., -.1, r"s must be >= 0, got s=-0.1 \(row 0\)"),
    (1., 1.0001, "s must be <= t"), (float("nan"), .1, "s must be <= t"), (1., float("nan"), "s must be >= 0"),
    ([1., 1.], .1, "3 rows")])
def test_times_are_checked(toy, t, s, message):
    x = torch.zeros(3, 2)
    for call in (toy.flow, toy.G, toy.g):
        with pytest.raises(ValueError, match=message):
            call(x, t, s)


@pytest.mark.parametrize("name", ["log_density", "score", "D", "responsibilities"])
def test_oracle_checks_x_and_t(toy, name):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\)"):
        getattr(toy, name)(torch.zeros(3, 5), 1.)
    with pytest.raises(ValueError, match="t must be >= 0"):
        getattr(toy, name)(torch.zeros(3, 2), -1.)


def test_score_against_autograd_and_tweedie(toy):
    t = torch.logspace(-3, math.log10(80), 60, dtype=f64)
    x = points(toy, t).requires_grad_()
    gradient, = torch.autograd.grad(toy.log_density(x, t).sum(), x)
    scale = 1 + gradient.abs()
    assert ((toy.score(x, t) - gradient).abs() / scale).max() < 1e-9
    assert (toy.D(x, t) - (x + t[:, None]**2 * gradient)).abs().max() < 1e-9


def test_flow_matches_the_closed_form_of_one_gaussian():
    g = torch.Generator().manual_seed(0)
    for d, std in ((1, .01), (2, .5), (7, 3.)):
        m = torch.randn(1, d, generator=g, dtype=f64)
        t, s = torch.sort(80 * torch.rand(2, 20, generator=g, dtype=f64)**4, 0, descending=True).values
        s[:3], t[3], s[4] = 0., 80., t[4]
        x = m + (t**2 + std**2).sqrt()[:, None] * torch.randn(20, d, generator=g, dtype=f64)
        exact = m + ((s**2 + std**2) / (t**2 + std**2)).sqrt()[:, None] * (x - m)
        assert (GaussianMixture(m, std).flow(x, t, s) - exact).abs().max() < 1e-8


def test_flow_is_itself_at_other_tolerances_and_in_stages(toy):
    t = torch.tensor([80., 10., 1., .3, .05], dtype=f64)
    x = points(toy, t)
    end = toy.flow(x, t, 0.)
    assert (end - toy.flow(x, t, 0., tol=1e-13)).abs().max() < 1e-8
    assert (end - toy.flow(toy.flow(x, t, t / 3), t / 3, 0.)).abs().max() < 1e-8
    assert (end - torch.cat([toy.flow(x[i:i + 1], t[i], 0.) for i in range(5)])).abs().max() < 1e-8


def test_flow_keeps_dtype_shape_and_identity(toy):
    x = torch.randn(4, 2, requires_grad=True)
    out = toy.flow(x, [1., 2., 3., 4.], [1., 0., .5, 4.])
    assert out.dtype == torch.float32 and out.shape == x.shape and not out.requires_grad
    assert torch.equal(out[[0, 3]], x.detach()[[0, 3]])
    assert toy.flow(torch.zeros(0, 2), 1., 0.).shape == (0, 2)
    assert toy.G(x, 1., 1.) is not x and torch.equal(toy.G(x, 0., 0.), x.detach())


def test_g_and_G_identities_row_by_row(toy):
    t = torch.tensor([80., 5., 1., 0.], dtype=f64)
    s = torch.tensor([.002, 5., 0., 0.], dtype=f64)
    x = points(toy, t)
    g, jump = toy.g(x, t, s), torch.tensor([0, 2])
    assert torch.equal(g[[1, 3]], toy.D(x, t)[[1, 3]])
    r = (s / t)[jump, None]
    assert (r * x[jump] + (1 - r) * g[jump] - toy.G(x, t, s)[jump]).abs().max() < 1e-8
    assert toy.g(x.float(), t, s).dtype == torch.float32
    assert torch.equal(toy.G(x, t, s, y=None), toy.flow(x, t, s))


def test_sample_is_independent_of_n_and_fits_the_moments(toy):
    x = toy.sample(4000, seed=2)
    assert x.dtype == torch.float32 and torch.equal(toy.sample(10, seed=2), x[:10])
    assert not torch.equal(toy.sample(10, seed=3), x[:10])
    assert (x.double().mean(0) - toy.mean).abs().max() < 0.04
    assert abs((x.double() - toy.mean).pow(2).mean().sqrt() - toy.sigma_data) < 0.02
    assert x.abs().max() < 1.3


def test_it_quacks_like_a_model(toy):
    assert (toy.n_classes, toy.sigma_min, toy.sigma_max) == (0, SIGMA_MIN, SIGMA_MAX)
    assert toy.sigma_data == pytest.approx(0.5)
    t, s = check_times(torch.zeros(2, 1, 8, 8), 2, [0, 1])
    assert t.dtype == s.dtype == f64 and t.shape == s.shape == (2,)
