"Sampling and guidance: what must hold whatever the notebooks show."
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.method.teacher import Denoiser, Model
from ctm_nb.method.flow import GaussianMixture, noise, rho_grid, toy_mixture
from ctm_nb.method.guidance import autoguide, candidates, guide_free, guided, keep_best
from ctm_nb.networks.unet import MLP, init_
from ctm_nb.method.sampling import Churn, edm_sample, landing_time, sample
from ctm_nb.method.trajectory import is_ctm, student_from

TOY = toy_mixture()
GAUSS = GaussianMixture(torch.zeros(1, 2), torch.tensor([.5]), torch.ones(1))


class Linear:
    "A student for one Gaussian at the origin, exact and quick: x_s = x_t sqrt((s^2 + c^2) / (t^2 + c^2))."
    n_classes, data_shape, sigma_min, sigma_max = 3, (2,), .002, 80.
    def D(self, x, t, y=None): return x * .25 / (.25 + t ** 2)
    def G(self, x, t, s, y=None): return x * ((s ** 2 + .25) / (t ** 2 + .25)) ** .5


def test_samples_do_not_depend_on_batch_order_or_count():
    m = student_from(Denoiser(MLP(2, n_classes=3)))
    init_(m.net.out)
    for kw in (dict(steps=3, gamma=.7), dict(solver="edm", steps=5), dict(solver="dpmpp_3m", steps=6)):
        whole = sample(m, 9, seed=3, **kw)
        assert torch.allclose(sample(m, 9, seed=3, batch_size=2, **kw), whole, atol=1e-5)
        order = [8, 0, 5, 3]
        some = sample(m, ids=order, seed=3, **kw)
        assert torch.allclose(some, whole[order], atol=1e-5)  # classes follow the numbers too
        assert not torch.allclose(sample(m, 9, seed=4, **kw), whole, atol=1e-2)


def test_gamma_ends_are_exact():
    draws = lambda i: noise((2,), 0, range(6), draw=i)
    times = rho_grid(4).tolist()
    x = 80 * draws(0)
    for t, u in zip(times, times[1:]): x = Linear().G(x, t, u)
    assert torch.equal(sample(Linear(), 6, steps=3), x)
    x = 80 * draws(0)
    for i, (t, u) in enumerate(zip(times, times[1:])):
        x = Linear().G(x, t, .002)
        if i < 2: x = x + (u ** 2 - .002 ** 2) ** .5 * draws(i + 1)
    assert torch.allclose(sample(Linear(), 6, steps=3, gamma=1.), x, atol=1e-6)
    assert landing_time(3., 0., .002) == 3. and landing_time(3., 1., .002) == .002


def test_edm_sampler_against_its_definition():
    times, churn = [80., 10., 1., .1, 0.], Churn(1.2, .5, 20., 1.1)
    x, kappa, m = 80 * noise((2,), 0, range(4)), 1.2 / 4, Linear()
    for i, (t, u) in enumerate(zip(times, times[1:])):
        if .5 <= t <= 20.:
            x = x + 1.1 * ((t * (1 + kappa)) ** 2 - t ** 2) ** .5 * noise((2,), 0, range(4), draw=i + 1)
            t = t * (1 + kappa)
        d = (x - m.D(x, t)) / t
        e = x + (u - t) * d
        x = e if u == 0 else x + (u - t) / 2 * (d + (e - m.D(e, u)) / u)
    start, fresh = 80 * noise((2,), 0, range(4)), lambda i: noise((2,), 0, range(4), draw=i)
    assert torch.allclose(edm_sample(m, start, torch.tensor(times), None, fresh, churn=churn), x, atol=1e-4)


@pytest.mark.parametrize("kw, word", [
    (dict(gamma=.3, solver="heun"), "gamma=0.3 has no meaning to solver 'heun'"),
    (dict(gamma=1, solver="edm"), "gamma=1 has no meaning"),
    (dict(gamma=-.1), "gamma=-0.1"), (dict(gamma=float("nan")), "gamma=nan"), (dict(gamma="0.5"), "gamma='0.5'"),
    (dict(times=[80., 80., .002]), "decreasing"), (dict(times=[80., float("nan"), .002]), "decreasing"),
    (dict(times=[81., .002]), "80"), (dict(times=[80., .001]), "0.002"), (dict(times=[80.]), "two"),
    (dict(y=3), r"\[0, 3\)"), (dict(y=-2), "got -2"), (dict(y=[0, 1]), "n=4"), (dict(y=1.5), "whole"),
    (dict(y="cat"), "class indices, got 'cat'"), (dict(solver="rk"), "rk"), (dict(steps=0), "steps=0"),
    (dict(steps=1.5), "steps=1.5"), (dict(n=-1), "n=-1"), (dict(batch_size=0), "batch_size=0"),
    (dict(batch_size=-3), "batch_size=-3"),
    (dict(seed=None), "seed must be a whole number .*, got seed=None"), (dict(seed=10 ** 25), "2..64., got seed=1000"),
    (dict(times="auto"), "decreasing numbers, got 'auto'"), (dict(times=[80., None]), "decreasing numbers"),
    (dict(ids=[0, 1, 2, 3.5]), "ids must be .n,. whole numbers, got float32"), (dict(ids=3), "got int64 of shape"),
    (dict(ids=[3, 1]), "n must be the 2 of ids, or be left out, got n=4"),
    (dict(noise_fn=lambda i, shape: torch.zeros(5, 2)), r"noise_fn.0, .* noise of shape .4, 2., got .5, 2.")])
def test_bad_requests(kw, word):
    with pytest.raises(ValueError, match=word): sample(Linear(), **{"n": 4, **kw})


def test_gamma_may_be_numpys():
    expected = sample(TOY, 4, steps=2, gamma=1.)
    for kind in (np.float32, np.float64, np.int64): assert torch.equal(sample(TOY, 4, steps=2, gamma=kind(1)), expected)


def test_a_path_is_no_model():
    for path in ("runs/a", Path("runs/a")):
        with pytest.raises(TypeError, match=r"m must be a model, got .*: load.'runs/a'. opens it"): sample(path, 4)


def test_numbers_count_themselves():
    m = Linear()
    assert (len(sample(m)), len(sample(m, ids=[3, 1])), len(sample(m, 2, ids=[3, 1]))) == (16, 2, 2)


def test_not_finite_is_named():
    class Bad(Linear):
        def G(self, x, t, s, y=None): return torch.where(torch.arange(len(x))[:, None] == 2, torch.inf, x)
    with pytest.raises(FloatingPointError, match="Bad gave inf in sample 7"): sample(Bad(), ids=[5, 6, 7, 8])


def test_callback_sees_every_step():
    for solver in ("ctm", "heun", "edm"):
        seen = []
        x = sample(Linear(), 2, steps=3, solver=solver, callback=lambda i, x: seen.append((i, x)))
        assert [i for i, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], x)


def test_free_guidance_on_a_student():
    m = student_from(Denoiser(MLP(2, n_classes=3)))
    for layer in (m.net.out, m.net.map_layer0): init_(layer)
    x, y, none = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), -1)
    assert torch.allclose(guide_free(m, 1.).G(x, 2., .5, y), m.G(x, 2., .5, y), atol=1e-5)
    assert torch.allclose(guide_free(m, 0.).D(x, 2., y), m.D(x, 2., none), atol=1e-5)
    past = 3 * m.g(x, 2., .5, y) - 2 * m.g(x, 2., .5, none)
    assert torch.allclose(guide_free(m, 3.).g(x, 2., .5, y), past, atol=1e-5)
    assert is_ctm(guided(m, None, 3)) and not is_ctm(guided(Denoiser(MLP(2, n_classes=3)), None, 3))
    assert sample(guide_free(m, 2.), 3).shape == (3, 2)


def moved(m):
    for layer in (m.net.out, m.net.map_layer0): init_(layer)
    return m


def test_a_worse_model_guides_the_denoiser():
    torch.manual_seed(0)
    m, worse, plain = (moved(Denoiser(MLP(2, n_classes=k))) for k in (3, 3, 0))
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, -1, 1])
    for ref in (worse, plain):
        D_ref, D = ref.D(x, 2., y if ref.n_classes else None), m.D(x, 2., y)
        assert not torch.allclose(D_ref, D, atol=1e-3)
        for w in (0., 1., 2.5):
            assert torch.allclose(autoguide(m, ref, w).D(x, 2., y), (1 - w) * D_ref + w * D, atol=1e-5)
    D = autoguide(m, worse, 2.)
    assert torch.allclose(D.D(x, 2.), 2 * m.D(x, 2.) - worse.D(x, 2.), atol=1e-5)
    assert len(list(D.parameters())) == 2 * len(list(m.parameters()))
    unlabelled = autoguide(plain, plain, 3.)
    assert torch.allclose(unlabelled.D(x, 2., None), plain.D(x, 2.), atol=1e-5) and unlabelled.n_classes == 0
    hand = sample(guided(m, lambda predict, x, t, y: 2 * predict(y) - worse.D(x, t, y), 3), 6, solver="heun", steps=4)
    assert torch.allclose(sample(D, 6, solver="heun", steps=4), hand, atol=1e-4)


def test_a_guided_student_has_a_denoiser_and_no_jumps():
    m = moved(student_from(Denoiser(MLP(2))))
    D = autoguide(m, moved(Denoiser(MLP(2))), 2.)
    assert not is_ctm(D) and sample(D, 2, solver="euler", steps=2).shape == (2, 2)
    with pytest.raises(ValueError, match="needs a CTM; this model is a teacher, or guided by another"): sample(D, 2)


@pytest.mark.parametrize("worse, message", [
    (lambda: Denoiser(MLP(3, n_classes=2)), r"draw data of shape \(2,\) as the model, got \(3,\)"),
    (lambda: Denoiser(MLP(2, n_classes=3)), "know the model's 2 classes or none, got 3"),
    (lambda: Denoiser(MLP(2, n_classes=2), classes=["a", "c"]), "classes in their order, got 'c' for 'b'"),
    (lambda: Denoiser(MLP(2, n_classes=2), sigma_max=20.), "noise levels 0.002 to 80, got 0.002 to 20"),
    (lambda: Denoiser(MLP(2, n_classes=2), sigma_min=.01), "noise levels 0.002 to 80, got 0.01 to 80"),
])
def test_a_guide_of_something_else_is_a_sentence(worse, message):
    m = Denoiser(MLP(2, n_classes=2), classes=["a", "b"])
    with pytest.raises(ValueError, match=message): autoguide(m, worse(), 2.)
    autoguide(m, Denoiser(MLP(2, n_classes=2)), 2.)  # without names: nothing to compare
    with pytest.raises(ValueError, match="scale=-1"): autoguide(m, m, -1.)


def test_a_guided_model_has_what_the_protocol_names():
    teacher = Denoiser(MLP(2, n_classes=2), classes=("cat", "dog"))
    for m in (guide_free(teacher), guide_free(student_from(teacher)), autoguide(teacher, TOY)):
        assert all(hasattr(m, name) for name in Model.__annotations__) and m.classes == ["cat", "dog"]
    assert autoguide(guide_free(teacher), teacher).classes == ["cat", "dog"]  # and it can be guided again
    assert guided(TOY, lambda predict, x, t, y: predict(None), 8).classes == []  # other classes than the model's


@pytest.mark.parametrize("ratio", [.5, 0, -1., float("nan"), float("inf")])
def test_fewer_candidates_than_samples_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be >= 1 and finite, got ratio="):
        candidates(torch.tensor([0, 1, 0]), ratio)


def test_rejection_keeps_the_best_of_each_class():
    y, scores = torch.tensor([0, 1, 2, 2, 0]), torch.randn(15, generator=torch.Generator().manual_seed(0))
    ids, labels = candidates(y, 3.)
    assert ids.tolist() == list(range(15)) and labels.tolist() == y.tolist() * 3
    kept = keep_best(y, labels, scores)
    assert labels[kept].tolist() == y.tolist()
    for c in range(3):
        of_class = scores[labels == c].sort(descending=True).values
        mine = scores[kept[y == c]].sort(descending=True).values
        assert torch.equal(mine, of_class[:len(mine)])
    assert keep_best(y, labels[:5], scores[:5]).tolist() == list(range(5))  # with one draw each nothing changes
    assert len(candidates(y, 1.5)[0]) == 3 + 2 + 3  # half a draw more for each class, rounded up


@pytest.mark.parametrize("gamma, share", [(0., 1.), (.6, .8), (.8, .6), (1., 0.)])
def test_a_chain_lands_below_the_timestep_by_as_much_as_is_noise_again(gamma, share):
    "s - sigma_min = sqrt(1 - gamma^2) (tau - sigma_min); the fresh noise has the variance tau^2 - s^2."
    class Watched(Linear):
        def __init__(self): self.jumps = []
        def G(self, x, t, s, y=None):
            self.jumps.append((t, s))
            return torch.zeros_like(x)
    m, noises = Watched(), []
    one = lambda i, shape: noises.append(i) or torch.ones(shape)
    sample(m, 2, times=(80., 5., .5, .002), gamma=gamma, noise_fn=one, callback=None)
    s = [.002 + share * (tau - .002) for tau in (5., .5)]
    assert m.jumps == [(80., pytest.approx(s[0])), (5., pytest.approx(s[1])), (.5, pytest.approx(.002))]
    assert landing_time(5., gamma, .002) == pytest.approx(s[0])
