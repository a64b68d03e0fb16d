"""The trajectory model: how a student starts, half precision, what it refuses."""
import subprocess
import sys

import pytest
import torch

from ctm_nb.method.flow import rho_grid, toy_mixture
from ctm_nb.method.guidance import guide_free
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import CTM, find_sigma_init, is_ctm, student_from, told_share
from ctm_nb.networks.families import network_config
from ctm_nb.networks.unet import ADM, MLP, DDPMpp, NCSNpp, OpenAIUNet

SMALL = dict(model_channels=8, channel_mult=(1, 2), n_blocks=1, attention=(4,))
WIDE = dict(model_channels=16, channel_mult=(1, 2), n_blocks=1, attention=(4,), channels_per_head=8)
IMAGE_FAMILIES = [DDPMpp, NCSNpp, ADM, OpenAIUNet]


def lively(net):
    "Zero-initialised last layers hide mistakes: give every layer random weights."
    torch.manual_seed(0)
    for p in net.parameters(): p.data.add_(.1 * torch.randn_like(p))
    return net.eval()


def test_student_keeps_teacher_and_config():
    teacher = Denoiser(lively(DDPMpp(8, 1, 10, **SMALL)), sigma_data=.7, sigma_min=.01, sigma_max=50.)
    student = student_from(teacher)
    assert (student.sigma_data, student.sigma_min, student.sigma_max) == (.7, .01, 50.)
    assert network_config(student.net) == {**network_config(teacher.net), "s_branch": True}
    x, t, y = 10 * torch.randn(6, 1, 8, 8), torch.tensor([80., 20., 5., 1., .1, .01]).clamp(max=50), torch.arange(6)
    with torch.no_grad():
        D = teacher.D(x, t, y)
        for f in (0., .5, 1.): torch.testing.assert_close(student.g(x, t, f * t, y), D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize("n_classes", [0, 10])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_student_of_every_family_starts_as_its_teacher(family, n_classes, init):
    teacher = Denoiser(lively(family(8, 3, n_classes, **WIDE)))
    student = student_from(teacher, init).eval()
    x, t = torch.randn(6, 3, 8, 8), torch.tensor([80., 20., 5., 1., .1, .002])
    y = torch.arange(6) if n_classes else None
    x = x * (1 + t[:, None, None, None])
    with torch.no_grad():
        D = teacher.D(x, t, y)
        far = [float((student.g(x, t, f * t, y) - D).norm() / D.norm()) for f in (0., .3, 1.)]
    assert max(far) < 1e-6 if init == "teacher" else min(far) > 1e-4


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_bfloat16_autocast_is_finite_at_both_ends(family):
    m = student_from(Denoiser(lively(family(8, 3, **WIDE))), "random").eval()
    t = torch.tensor([80., .002])
    x = torch.randn(2, 3, 8, 8) * t[:, None, None, None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): out = m.g(x, t, torch.zeros(2))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("dtype, least", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_weights_stay_near_float32(family, dtype, least):
    m = student_from(Denoiser(lively(family(8, 3, 10, **WIDE))), "random").eval()
    t, s, y = torch.tensor([80., 1., .002]), torch.tensor([.5, .01, .002]), torch.tensor([1, 2, 3])
    x = torch.randn(3, 3, 8, 8) * (1 + t[:, None, None, None])
    with torch.no_grad():
        exact = m.g(x.to(dtype).float(), t, s, y)
        half = m.to(dtype).g(x.to(dtype), t, s, y)
    least *= 1 + (family is NCSNpp)  # whose random frequencies are rounded as well
    assert half.dtype == dtype and (half.float() - exact).norm() < least * exact.norm()


@pytest.mark.parametrize("dtype, least", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kind", ["edm", "vp", "ddpm v_prediction linear 1000 .0001 .02"])
def test_a_network_that_is_told_less_on_long_jumps_is_the_same_network(kind, dtype, least):
    plain = student_from(Denoiser(lively(DDPMpp(8, 3, **SMALL)), kind=kind), "random").eval()
    low = CTM(plain.net, kind=kind, sigma_init=5.).eval()
    t, s = torch.tensor([80., 20., 80., 3., .002]), torch.tensor([0., 0., 40., 1., .002])
    x = torch.randn(5, 3, 8, 8) * (1 + t[:, None, None, None])
    told = t * told_share(t, s, 5.)
    assert told[0].item() == pytest.approx(5) and t[2] > told[2] > s[2] and (told <= t).all()
    with torch.no_grad():
        wanted = plain.g((told / t)[:, None, None, None] * x, told, s)
        assert torch.equal(low.D(x, t), plain.D(x, t)) and torch.equal(low.D(x, 80.), plain.D(x, 80.))
        assert torch.equal(CTM(plain.net, kind=kind, sigma_init=80.).g(x, t, s), plain.g(x, t, s))
        for jump in ((80., 0.), (80., torch.tensor(0.)), (torch.tensor(80.), 0.)):
            torch.testing.assert_close(low.g(x[:1], *jump), wanted[:1], rtol=1e-4, atol=1e-4)
        found = low.to(dtype).g(x.to(dtype), t, s)
    assert found.dtype == dtype and (found.float() - wanted).norm() < least * wanted.norm()
    with pytest.raises(ValueError, match="t must be > 0, got t=-1"): low.g(x[:2], -1., 0.)
    with pytest.raises(ValueError, match="t must be a number or one level"): low.g(x, t[:2], s)


@pytest.mark.parametrize("level", [0, -1, 81, float("nan")])
def test_a_level_to_be_told_is_one_of_the_model(level):
    with pytest.raises(ValueError, match=r"sigma_init must be in \(0, sigma_max = 80\], got"):
        CTM(MLP(2), sigma_init=level)


@pytest.mark.parametrize("level", [1e-300, .01])
def test_below_sigma_min_all_landing_times_are_one_however_low_the_level(level):
    m, x = CTM(lively(MLP(2).with_s_branch("random")), sigma_init=level), torch.randn(3, 2)
    for t in (80., .5, .002):
        at = lambda s: m.g(x, torch.full((3,), t), torch.full((3,), s))
        assert at(0.).isfinite().all() and torch.equal(at(0.), at(.002))
        assert m.g(x, t, 0.).isfinite().all() and torch.equal(m.g(x, t, 0.), m.g(x, t, .002))


@pytest.mark.parametrize("std", [.5, 2., 6.])
def test_the_level_found_is_the_best_one_for_gaussian_data(std):
    times, y = rho_grid(12), torch.ones(8)
    D = lambda x, t, y: std ** 2 / (std ** 2 + t ** 2) * x * y[:, None]  # as if it were a number
    at = lambda t: ((std ** 2 + t ** 2) / (std ** 2 + 80 ** 2)) ** .5  # the way of a trajectory from 1
    x = 80 * torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = torch.stack([at(t) * x for t in times], 1)
    def miss(level):
        "Of three times in the upper half of the grid, in closed form."
        bend = 1 / (2 / level - 1 / 80)  # whose harmonic mean with 80 is the level
        told = [(t, min(t, 2 / (1 / t + 1 / bend))) for t in times[[0, 2, 4]].tolist()]
        missed = [std ** 2 / (std ** 2 + u ** 2) * u / t * at(t) - at(.002) for t, u in told]
        return sum(m ** 2 for m in missed)
    levels = [80 * 10 ** (-k / 5) for k in range(9)]
    assert find_sigma_init(D, path, times, y) == pytest.approx(min(levels, key=miss))


def test_a_student_is_no_teacher():
    with pytest.raises(ValueError, match="must have no s-branch"): DDPMpp(8, 1, s_branch=True, **SMALL).with_s_branch()


def test_classes_go_from_teacher_to_student():
    teacher = Denoiser(MLP(2, n_classes=2), classes=["cat", "dog"])
    student = student_from(teacher)
    assert student.classes == ["cat", "dog"] and student.classes is not teacher.classes


def test_whoever_has_jumps_is_a_ctm():
    teacher = Denoiser(MLP(2, n_classes=3))
    student = student_from(teacher)
    assert is_ctm(student) and is_ctm(toy_mixture()) and is_ctm(guide_free(student, 1.))
    assert not is_ctm(teacher) and not is_ctm(guide_free(teacher, 1.))


def test_jumps_upwards_are_refused():
    student = student_from(Denoiser(MLP(2)))
    x, t = torch.randn(2, 2), torch.tensor([1., .5])
    with pytest.raises(ValueError, match=r"s must be <= t, got s=1.0 > t=0.5 \(row 1\)"): student.G(x, t, 1.)
    with pytest.raises(ValueError, match="s must be >= 0"): student.G(x, t, -.1)


def test_the_method_imports_no_other_room():
    code = ("import sys, ctm_nb.method.trajectory; "
            "print([m for m in sys.modules if m.startswith('ctm_nb.') and m.split('.')[1] not in ('method', '_moved')],"
            " [m for m in ('timm', 'lpips', 'torchvision', 'PIL', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
