"""The traps of the adversarial stage."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_nb.data.images import digits
from ctm_nb.method.adversary import (
    GAN_LOSSES,
    CrossMixing,
    Discriminator,
    FeatureNetwork,
    ProjectedDiscriminator,
    RandomProjection,
    ScaleHead,
    SpectralConv,
    TeacherFeatures,
    TokenMaps,
    _colour,
    _cutout,
    _probe,
    _translate,
    augment,
    discriminator_loss,
    gan_loss_d,
    gan_loss_g,
    gan_turn,
    head_widths,
)
from ctm_nb.method.balance import BalancedGradients
from ctm_nb.method.distances import l2, pseudo_huber
from ctm_nb.method.distill import step_losses, to_end
from ctm_nb.method.flow import perturb
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import student_from
from ctm_nb.networks.unet import DDPMpp

from formulas import adaptive_weight


def GEN(seed=0): return torch.Generator().manual_seed(seed)


def radam(D, lr=2e-3): return torch.optim.RAdam(D.parameters(), lr, betas=(.5, .9))


def uniform(B, seed=0): return torch.rand(B, 7, generator=GEN(seed))


def make_teacher(channels=1, n_classes=10, size=8):
    torch.manual_seed(0)
    net = DDPMpp(size, channels, n_classes, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,))
    teacher = Denoiser(net)
    for p in teacher.parameters(): p.data.add_(.1 * torch.randn_like(p))
    return teacher


def make(channels=1, n_classes=10, times=(.2, 1.), **kw):
    "A teacher, a discriminator on it, pictures and labels."
    teacher = make_teacher(channels, n_classes)
    D = Discriminator([TeacherFeatures(teacher, times)], (channels, 8, 8), n_classes, width=16, **kw)
    x = torch.rand(5, channels, 8, 8, generator=GEN(1)) * 2 - 1
    return teacher, D, x, torch.arange(5) % 10 if n_classes else None


def material(B=4, n_classes=10):
    "Teacher, student, EMA, discriminator and the arguments of one training step."
    teacher = make_teacher(n_classes=n_classes)
    student = student_from(teacher).requires_grad_(True)
    for p in student.parameters(): p.data.add_(.02 * torch.randn_like(p))
    target = copy.deepcopy(student).requires_grad_(False)
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), n_classes, width=16).eval()
    t, u, s = torch.linspace(80, .5, B), torch.linspace(40, .3, B), torch.linspace(5, .01, B)
    x_t = torch.randn(B, 1, 8, 8, generator=GEN(2)) * (.5 + t.view(-1, 1, 1, 1))
    x0, eps = torch.rand(B, 1, 8, 8, generator=GEN(3)) * 2 - 1, torch.randn(B, 1, 8, 8, generator=GEN(4))
    y = torch.arange(B) if n_classes else None
    e = dict(x_t=x_t, x_u=.6 * x_t, t=t, u=u, s=s, x0=x0, sigma=torch.linspace(.1, 5, B), eps=eps, y=y)
    return teacher, student, target, D, e


def select(numbers, part): return {k: [n[part] for n in v] for k, v in numbers.items()}


def judge_of(D, y, numbers, loss="hinge"): return lambda estimate: gan_loss_g(D, estimate, y, numbers, loss)


def starts(e): return {k: e[k] for k in ("x_t", "t", "s", "x0", "y")}


# ---- augmentation

@pytest.mark.parametrize("C, H, W", [(1, 8, 8), (3, 16, 12), (3, 5, 5), (1, 1, 1)])
def test_augmentation_any_shape_identity_at_zero_and_differentiable(C, H, W):
    x = torch.randn(3, C, H, W, requires_grad=True)
    assert torch.equal(augment(x, uniform(3), 0.), x)
    out = augment(x, uniform(3))
    assert out.shape == x.shape and torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all() and (C * H * W == 1 or x.grad.abs().sum() > 0)


def test_augmentation_gradient_is_right():
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: augment(v, uniform(1, 3)), x)


def test_augmentation_is_a_function_of_its_numbers_and_differs_between_rows_and_draws():
    x = torch.randn(1, 1, 8, 8).expand(6, -1, -1, -1)
    a, b = augment(x, uniform(6)), augment(x, uniform(6, 1))
    assert torch.equal(augment(x, uniform(6)), a) and not torch.equal(a, b)
    assert len({tuple(r.flatten().tolist()) for r in a}) == 6


def test_every_change_reaches_its_bounds_and_not_further():
    x, u = torch.arange(16.).view(1, 1, 1, 16).expand(2000, 1, 16, 16), uniform(2000)
    shift = (u[:, 3:5] * 5).long() - 2
    coloured = _colour(x, 2 * u[:, :3] - 1)
    torch.testing.assert_close(augment(x, u, cut=0.), _translate(coloured, shift))
    moved = (x[:, :, 8, 8] - _translate(x, shift)[:, :, 8, 8])[:, 0]
    assert moved.min() == -2 and moved.max() == 2
    holes = (augment(torch.ones(2000, 1, 10, 10), u, translation=0.) == 0).flatten(1).sum(1)
    assert holes.max() == 4 and holes.min() >= 1  # 2 x 2, at the border partly outside


def test_translation_and_cutout_by_hand():
    x = torch.arange(9.).view(1, 1, 3, 3)
    moved = lambda *by: _translate(x + 1, torch.tensor([by]))[0, 0].tolist()
    assert moved(0, 0) == (x + 1)[0, 0].tolist() and moved(1, 0) == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert moved(0, -1) == [[2, 3, 0], [5, 6, 0], [8, 9, 0]] and moved(5, -5) == [[0, 0, 0]] * 3
    assert _cutout(x + 1, torch.tensor([[-1, 2]]), 2)[0, 0].tolist() == [[1, 2, 0], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("side, cut, places", [(64, .2, 64), (64, .19, 65), (5, .2, 5)])  # holes of 13, 12 and 1
def test_an_odd_hole_has_a_pixel_in_the_middle(side, cut, places):
    "The centres that the two ends of the uniform numbers give, read off the hole's edges in an empty surrounding."
    u = torch.zeros(2, 7)
    u[1, 5:] = 1 - 1e-6
    hole = int(cut * side + .5)
    low, high = (augment(torch.ones(2, 1, side, side), u, translation=0., cut=cut) == 0).any(3)[:, 0].nonzero().split(
        [hole - hole // 2, hole // 2 + hole % 2 if places == side else hole // 2])
    assert low[:, 1].tolist() == list(range(hole - hole // 2))  # its centre at 0
    assert high[:, 1].tolist() == list(range(places - 1 - hole // 2, side))  # and at places - 1


# ---- feature networks and projection

@pytest.mark.parametrize("channels, n_classes", [(1, 10), (3, 0), (1, 0)])
def test_teachers_features_at_each_level(channels, n_classes):
    teacher, x = make_teacher(channels, n_classes), torch.rand(3, channels, 8, 8)
    y = torch.arange(3) if n_classes else None
    net = TeacherFeatures(teacher, (.5, 80.))
    noise = net.draw(3, (channels, 8, 8), GEN())
    pyramids = net(x, y, noise)
    for n, t in enumerate((.5, 80.)):
        expected = teacher.features(perturb(x, t, noise[:, n]), t, y)
        for a, b in zip(pyramids[n], expected): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(m).all() for p in pyramids for m in p)
    assert not any(p.requires_grad for p in teacher.parameters())
    net.train()
    assert not any(m.training for m in net.modules())


def test_features_refuse_impossible_levels():
    for times in ((), (0., 1.), (-1.,)):
        with pytest.raises(ValueError, match="times must be"): TeacherFeatures(make_teacher(), times)


def test_a_feature_network_never_changes_and_is_measured():
    net = FeatureNetwork(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)))
    mean = net.net[1].running_mean.clone()
    net.train().net(torch.randn(3, 1, 4, 4))
    assert torch.equal(mean, net.net[1].running_mean) and net.draw(3, (1, 4, 4)) is None
    sizes = _probe(TeacherFeatures(make_teacher(), (.1, 80.)), (1, 8, 8), 10)
    assert [[s for s, _ in p] for p in sizes] == [[(8, 8, 8), (8, 4, 4)]] * 2
    assert all(r > 0 for p in sizes for _, r in p)


def test_mixtures_keep_size_are_fixed_and_mix_everything():
    maps = [torch.randn(2, 6, 8, 8) * 30, torch.randn(2, 12, 4, 4) * .01]
    sizes = [(tuple(m.shape[1:]), float(m.square().mean().sqrt())) for m in maps]
    P = RandomProjection(sizes, seed=3, width=8)
    out = P(maps)
    assert [tuple(m.shape) for m in out] == [(2, 6, 8, 8), (2, 8, 4, 4)] and all(.3 < m.std() < 2 for m in out)
    assert not list(P.parameters()) and torch.equal(RandomProjection(sizes, seed=3, width=8).A1, P.A1)
    for l in range(2):
        for c in range(len(maps[l][0])):
            other = [m.clone() for m in maps]
            other[l][:, c] = 0
            changed = P(other)
            for k in range(l + 1):  # every output channel of this scale and the finer ones
                assert ((changed[k] - out[k]).abs().amax((0, 2, 3)) > 1e-3).all()


# ---- discriminator

@pytest.mark.parametrize("channels, n_classes", [(1, 10), (3, 0)])
@pytest.mark.parametrize("B", [1, 4])
def test_shapes_gradients_and_frozen_parts(channels, n_classes, B):
    teacher, D, x, y = make(channels, n_classes)
    x, y = x[:B].clone().requires_grad_(), None if y is None else y[:B]
    assert [tuple(l.shape) for l in D(x, y)] == [(B, 16)] * 4
    loss = gan_loss_g(D, x, y)
    assert loss.shape == (B,)
    loss.sum().backward()
    assert (x.grad != 0).flatten(1).any(1).all() and all(p.grad is None for p in teacher.parameters())


def test_logits_are_a_function_of_the_numbers_and_of_the_class():
    _, D, x, y = make()
    D.eval()
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a, b))
    one, two = D.draw(5, GEN()), D.draw(5, GEN(1))
    assert same(D(x, y, one), D(x, y, one)) and not same(D(x, y, one), D(x, y, two))
    mixed = D.project(x, y, one)
    assert not same(D.logits(mixed, y), D.logits(mixed, (y + 1) % 10))
    assert same(D.logits(mixed, torch.full_like(y, -1)), D.logits(mixed))
    with pytest.raises(ValueError, match=r"x must be \(B, 1, 8, 8\)"): D(torch.zeros(2, 1, 16, 16))


def test_checkpoint_is_exact_and_holds_no_frozen_network():
    teacher, D, x, y = make()
    opt = radam(D)
    def step(D, opt, seed):
        opt.zero_grad()
        gan_loss_d(D, x, .5 * x, y, [D.draw(5, GEN(seed)), D.draw(5, GEN(seed + 9))]).mean().backward()
        opt.step()
    for n in range(3): step(D, opt, n)
    state, opt_state = copy.deepcopy(D.state_dict()), copy.deepcopy(opt.state_dict())
    assert sum(v.numel() for v in state.values()) < 60000 and not any(".net." in k or "teacher" in k for k in state)
    assert {id(p) for p in D.parameters()} & {id(p) for p in teacher.parameters()} == set()
    torch.manual_seed(99)
    twin = Discriminator([TeacherFeatures(teacher, (.2, 1.))], (1, 8, 8), 10, width=16, seed=7)
    twin.load_state_dict(state)
    again = radam(twin)
    again.load_state_dict(opt_state)
    for E, o in ((D, opt), (twin, again)): step(E, o, 5)  # the next step too, power iteration included
    numbers = D.draw(5, GEN())
    for a, b in zip(D.eval()(x, y, numbers), twin.eval()(x, y, numbers)): assert torch.equal(a, b)


def test_frozen_networks_follow_to_another_type():
    teacher, D, x, y = make()
    D.double()
    assert teacher.net.last_layer.dtype == torch.float64
    assert all(l.dtype == torch.float64 for l in D(x.double(), y))


def test_bfloat16_autocast_and_extreme_pictures_stay_finite():
    _, D, x, y = make(times=(.002, 80.))
    for scale in (1., 100.):
        with torch.autocast("cpu", torch.bfloat16):
            v = (scale * x).requires_grad_()
            loss = gan_loss_g(D, v, y).sum() + gan_loss_d(D, x, v, y).sum()
        loss.backward()
        assert torch.isfinite(v.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in D.parameters() if p.grad is not None)


# ---- losses

def test_losses_by_hand():
    real, fake = torch.tensor([[2., 0.], [-1., 1.]]), torch.tensor([[-2., 0.], [1., -1.]])
    (h, student), zero = GAN_LOSSES["hinge"], torch.zeros(3)
    assert (h(real) + h(-fake)).mean(1).tolist() == [.5 + .5, 1. + 1.] and student(fake).mean(1).tolist() == [1., 0.]
    h, student = GAN_LOSSES["softplus"]
    torch.testing.assert_close(h(zero) + h(-zero), torch.full((3,), 2 * .6931472))
    torch.testing.assert_close(student(zero), torch.full((3,), .6931472))
    assert student(torch.tensor(-90.)) == 90. and h(torch.tensor(90.)) < 1e-30


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_discriminator_loss_reaches_only_the_heads_and_augments_independently(loss, monkeypatch):
    teacher, D, x, y = make()
    seen, project = [], D.project
    monkeypatch.setattr(D, "project", lambda v, *a: seen.append(project(v, *a)) or seen[-1])
    fake = x.clone().requires_grad_()
    out = gan_loss_d(D, x, fake, y, loss=loss)
    assert out.shape == (5,)
    out.mean().backward()
    assert fake.grad is None and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in D.heads.parameters() if p.ndim > 1)
    assert (seen[0][0][0] - seen[1][0][0]).abs().amax((1, 2, 3)).min() > 1e-3  # the same pictures, other numbers


def test_discriminator_learns():
    _, D, x, y = make(n_classes=0)
    opt, gen, losses = radam(D, 1e-2), GEN(), []
    real = torch.rand(64, 1, 8, 8, generator=gen).round() * 2 - 1
    for _ in range(60):
        loss = gan_loss_d(D, real, .1 * real, None, [D.draw(64, gen), D.draw(64, gen)]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert 1.5 < losses[0] < 2.5 and losses[-1] < .7 * losses[0]


# ---- turns

def test_turns():
    assert [gan_turn(n) for n in range(4)] == ["ctm_dsm_gan", "discriminator"] * 2
    assert [gan_turn(n, first="discriminator") for n in range(4)] == ["discriminator", "ctm_dsm_gan"] * 2
    game = ["ctm_dsm_gan", "discriminator"] * 3
    assert [gan_turn(n, 3, 2) for n in range(11)] == ["ctm_dsm"] * 3 + ["discriminator"] * 2 + game
    turns = [gan_turn(n, 3, 2, "discriminator") for n in range(12)]
    assert turns == ["ctm_dsm"] * 3 + ["discriminator"] * 3 + game


@pytest.mark.parametrize("first", ["student", "discriminator"])
@pytest.mark.parametrize("start, head_start", [(0, 0), (0, 5), (3, 4), (0, 8)])
def test_both_turns_are_tried_for_memory(start, head_start, first):
    from ctm_nb.training import stages
    from ctm_nb.training.config import make_config
    words = ["gan.steps=80", f"gan.start={start}", f"gan.head_start={head_start}", f"gan.first={first}"]
    config, cpu = make_config("tiny", words), torch.device("cpu")
    teacher = stages.TeacherStage(config, digits(), cpu).parts["teacher"]
    stage = stages.GanStage(config, digits(), cpu, {"teacher": teacher, "ctm": student_from(teacher)})
    assert {stage.turn(n) for n in stage.kinds()} == {"discriminator", "ctm_dsm_gan"}
    assert (stage.turn(start + head_start) == "discriminator") == (first == "discriminator")


# ---- the published discriminator

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "discriminator.npz"


def golden(z, key): return torch.from_numpy(z[key]).float()


def golden_head(z, name, steps):
    "A head as it was before the forward pass, and under which names the published one knows its weights."
    norms, batch = {"bias": "bias", "weight": "weight_orig", "u": "weight_u", "v": "weight_v"}, ("weight", "bias")
    stats = (*batch, "running_mean", "running_var", "num_batches_tracked")
    names = {f"body.{3 * l}.{k}": f"main.{l}.main.0.{v}" for l in range(steps) for k, v in norms.items()}
    names |= {f"body.{3 * l + 1}.{k}": f"main.{l}.main.1.{k}" for l in range(steps) for k in stats}
    names |= {f"logit.{k}": f"main.{steps}.{v}" for k, v in norms.items() if k != "bias"}
    head = ScaleHead(z[f"io.{name}.x"].shape[1], [12] * steps)
    head.load_state_dict({k: golden(z, f"{name}.{v}") for k, v in names.items()})
    return head, names


def test_mixing_across_channels_and_scales_is_the_published_one():
    z, mixing = np.load(GOLDEN), CrossMixing([6, 10, 14, 20], width=8)
    names = {f"{k}.{l}.{p}": f"projection.layer{l}_{k}{conv}.{p}" for l in range(4) for p in ("weight", "bias")
             for k, conv in (("ccm", ""), ("csm", ".out_conv"))}
    mixing.load_state_dict({k: golden(z, v) for k, v in names.items()})
    mixed = mixing([golden(z, f"io.map{l}") for l in range(4)])
    for l, m in enumerate(mixed): torch.testing.assert_close(m, golden(z, f"io.mixed{l}"), rtol=1e-5, atol=1e-6)
    assert not list(mixing.parameters()) and len(mixing.state_dict()) == 16  # frozen, and in checkpoints


@pytest.mark.parametrize("name, steps", [("head32", 2), ("head16", 1)])
def test_heads_are_the_published_ones_in_training_and_after(name, steps):
    z = np.load(GOLDEN)
    head, names = golden_head(z, name, steps)
    x = golden(z, f"io.{name}.x")
    logits = head.train()(x)
    expected = golden(z, f"io.{name}.logits_train").flatten(1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-6)
    logits.square().mean().backward()
    for k, p in head.named_parameters():
        torch.testing.assert_close(p.grad.norm(), golden(z, f"gradnorm.{name}.{names[k]}"), rtol=1e-5, atol=1e-6)
    after = golden(z, f"io.{name}.logits_eval_after").flatten(1)
    torch.testing.assert_close(head.eval()(x), after, rtol=1e-5, atol=2e-6)


class Stand(FeatureNetwork):
    "Maps or tokens as a published network gives them, from a small picture."
    def __init__(self, channels, sides):
        super().__init__(torch.nn.ModuleList(torch.nn.Conv2d(3, c, 1) for c in channels))
        self.sides = sides
    def forward(self, x, y=None, noise=None):
        return [[net(torch.nn.functional.interpolate(x, (n, n))) for net, n in zip(self.net, self.sides)]]


def test_the_published_discriminator_has_its_shapes_and_weights():
    torch.manual_seed(0)
    lite0, deit = Stand((24, 40, 112, 320), (56, 28, 14, 7)), Stand((768,) * 4, (14,) * 4)
    D = ProjectedDiscriminator([lite0, deit], (3, 8, 8), n_classes=10)
    assert sum(p.numel() for p in D.parameters()) == 20_662_656 and all(p.requires_grad for p in D.parameters())
    maps = TokenMaps([768] * 4)(deit(torch.rand(1, 3, 8, 8))[0])
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    x = torch.rand(1, 3, 8, 8)
    numbers = D.draw(1, GEN())
    for mixed in D.project(x, None, numbers):
        assert [tuple(m.shape[1:]) for m in mixed] == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    widths = [[p.shape[0] for p in head.parameters() if p.ndim == 4] for head in D.heads[0]]
    assert widths == [[64, 128, 256, 512, 1], [128, 256, 512, 1], [256, 512, 1], [512, 1]]
    assert [head_widths(n) for n in (8, 7, 4, 16, 128, 256)] == [[], [], [], [512], widths[0][:4], [64, *widths[0][:4]]]
    logits = D.eval()(x, None, numbers)
    assert [tuple(l.shape) for l in logits] == [(1, 4 * 16)] * 2  # those of a network's four heads joined
    for a, b in zip(logits, D(x, torch.tensor([3]), numbers)): assert torch.equal(a, b)  # unconditional


def published(width=8, seed=0, **kw):
    teacher = make_teacher()
    return ProjectedDiscriminator([TeacherFeatures(teacher, (.2, 1.))], (1, 8, 8), 10, width, seed=seed, **kw)


def test_random_parts_come_from_the_seed_and_stay():
    "The same ones whatever was drawn before, others for other seeds and networks; nothing trains them; all are saved."
    torch.manual_seed(0)
    a, before = published(), torch.get_rng_state()
    CrossMixing([4, 8]), TokenMaps([8] * 4)
    assert torch.equal(before, torch.get_rng_state())  # the program's own numbers go on
    torch.manual_seed(5)
    b, c = published(), published(seed=9)
    frozen = a.projections.state_dict()
    assert len(frozen) == 2 * 2 * 2 * 2  # two levels of noise, two maps each, two kinds, weight and bias
    for k, v in frozen.items():
        assert torch.equal(v, b.projections.state_dict()[k]) and not torch.equal(v, c.projections.state_dict()[k])
    assert not torch.equal(frozen["0.1.ccm.0.weight"], frozen["1.1.ccm.0.weight"])
    assert len(TokenMaps([8] * 4).state_dict()) == 14 and not list(TokenMaps([8] * 4).parameters())
    saved, opt = {k: v.clone() for k, v in frozen.items()}, radam(a, .1)
    x = torch.rand(4, 1, 8, 8)
    for _ in range(2):
        gan_loss_d(a, x, -x, None).mean().backward()
        opt.step()
    for k, v in saved.items(): assert torch.equal(v, a.projections.state_dict()[k])
    c.load_state_dict(a.state_dict())  # a checkpoint brings them back
    numbers = a.draw(4, GEN())
    for p, q in zip(a.eval()(x, None, numbers), c.eval()(x, None, numbers)): assert torch.equal(p, q)


def test_each_feature_network_gets_a_draw_of_its_own(monkeypatch):
    from ctm_nb.method import adversary
    teacher, seen = make_teacher(), []
    D = Discriminator([TeacherFeatures(teacher, (.2,)) for _ in range(2)], (1, 8, 8), 10, width=8)
    monkeypatch.setattr(adversary, "augment", lambda x, u, strength: seen.append(u) or augment(x, u, strength))
    D.project(torch.rand(3, 1, 8, 8), None, D.draw(3, GEN()))
    assert len(seen) == 2 and (seen[0] != seen[1]).all() and torch.equal(seen[0], D.draw(3, GEN())["u"][0])


def test_the_slope_of_a_spectral_convolution_is_at_most_one():
    torch.manual_seed(0)
    conv = SpectralConv(5, 7)
    conv.weight.data.mul_(40)
    for _ in range(60): conv(torch.randn(1, 5, 8, 8))  # one power iteration each
    kernel = conv.weight.detach().flatten(1)
    assert torch.linalg.matrix_norm(kernel, 2) > 5
    torch.testing.assert_close(conv.u @ kernel @ conv.v, torch.linalg.matrix_norm(kernel, 2), rtol=1e-4, atol=0.)
    conv.eval()
    u = conv.u.clone()
    a, b = conv(torch.ones(1, 5, 8, 8)), conv(torch.ones(1, 5, 8, 8))
    assert torch.equal(a, b) and torch.equal(u, conv.u)
    first, second = conv.train()(torch.ones(1, 5, 8, 8)), conv(torch.ones(1, 5, 8, 8))
    (first.sum() + second.sum()).backward()  # the second pass has changed u and v, the first one's gradient has not
    assert torch.isfinite(conv.weight.grad).all()


def losses_of(steps, batch, dtype=torch.float32):
    "Of the published discriminator, which learns to tell noise from a tenth of it."
    D, gen, losses = published(), GEN(), []
    opt, real = radam(D, 1e-2), torch.rand(batch, 1, 8, 8, generator=GEN()).round() * 2 - 1
    for _ in range(steps):
        numbers = [D.draw(batch, gen), D.draw(batch, gen)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = gan_loss_d(D, real, .1 * real, None, numbers).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p).all() for p in D.parameters())
    return losses


def test_the_published_discriminator_learns():
    losses = losses_of(30, 32)
    assert sum(losses[-5:]) / 5 < .85 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_published_discriminator_learns_the_same_in_half(dtype):  # float16 may take a processor 100 times as long
    found, expected = losses_of(10, 8, dtype), losses_of(10, 8)
    assert expected[-1] < .96 * expected[0] and max(abs(a - b) for a, b in zip(found, expected)) < .05


def test_maps_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="mixed maps must be at least 4 x 4"):
        ProjectedDiscriminator([Stand((4, 8), (2, 1))], (3, 8, 8))


# ---- the losses of the student's turn

CASES = [(l2, "hinge", "end", .01, 10.), (pseudo_huber, "softplus", "s", 0., 1e4),
         (pseudo_huber, "hinge", "end", .5, .5)]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n_classes", [10, 0])
@pytest.mark.parametrize("distance, loss, compare_at, low, high", CASES)
def test_three_losses_have_the_plain_formulas_gradient(m, n_classes, distance, loss, compare_at, low, high):
    teacher, student, target, D, e = material(4, n_classes)
    numbers, w = D.draw(4, GEN(5)), student.net.last_layer
    options = dict(distance=distance, compare_at=compare_at)
    losses = step_losses(student, target, **e, **options, adversary=judge_of(D, e["y"], numbers, loss))
    ctm, dsm, gan = (losses[k] for k in ("ctm", "dsm", "gan"))
    lam = adaptive_weight(ctm, dsm, w), adaptive_weight(ctm, gan, w, low, high)
    params = list(student.parameters())
    plain = torch.autograd.grad(ctm + lam[0] * dsm + lam[1] * gan, params, allow_unused=True, materialize_grads=True)
    gradients = BalancedGradients(params, w, gan=(low, high))
    for part in torch.arange(4).tensor_split(m):
        row = {k: None if v is None else v[part] for k, v in e.items()}
        judge = judge_of(D, row["y"], select(numbers, part), loss)
        gradients.add(step_losses(student, target, **row, **options, adversary=judge), len(part) / 4)
    out = gradients.combine()
    mine = torch.stack([out[k] for k in ("loss_ctm", "loss_dsm", "loss_gan", "lambda_dsm", "lambda_gan")])
    torch.testing.assert_close(mine, torch.stack([ctm, dsm, gan, *lam]).detach(), rtol=1e-3, atol=1e-5)
    assert not mine.requires_grad and low <= mine[4] <= high
    size = max(g.abs().max() for g in plain)
    for p, b in zip(params, plain): torch.testing.assert_close(p.grad / size, b / size, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for net in (teacher, target, D) for p in net.parameters())


def test_half_precision_finds_the_same_balance_of_three_losses():
    _, student, target, D, e = material(8)
    numbers = D.draw(8, GEN(5))
    def step(m, half):
        gradients = BalancedGradients(student.parameters(), student.net.last_layer, gan=(.01, 10.))
        for part in torch.arange(8).tensor_split(m):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                judge = judge_of(D, e["y"][part], select(numbers, part))
                row = {k: v[part] for k, v in e.items()}
                losses = step_losses(student, target, **row, distance=pseudo_huber, adversary=judge)
            gradients.add(losses, len(part) / 8)
        out = gradients.combine()
        return out, torch.cat([p.grad.flatten() for p in student.parameters()])
    full, g = step(1, False)
    assert .011 < full["lambda_gan"] < 9.9 and .011 < full["lambda_dsm"] < 9e3  # away from the clamps
    for m in (1, 3):
        out, h = step(m, True)
        for k in full: assert abs(out[k] / full[k] - 1) < .1, (k, out[k], full[k])
        assert float((h - g).norm() / g.norm()) < .3


def test_the_students_jump_is_made_once():
    "One forward pass of the student for CTM and GAN, one for DSM; each loss is differentiated once."
    _, student, target, D, e = material()
    passes, backward = [], []
    def watch(name, module):
        def hook(module, inputs, out):
            passes.append(name)
            if out.requires_grad: out.register_hook(lambda g: backward.append(name))
        module.register_forward_hook(hook)
    for name, m in (("student", student.net), ("target", target.net)): watch(name, list(m.enc.values())[1])
    watch("head", D.heads[0][0].body)
    gradients = BalancedGradients(student.parameters(), student.net.last_layer)
    gradients.add(step_losses(student, target, **e, adversary=judge_of(D, e["y"], D.draw(4))))
    assert sorted(passes) == ["head", *["student"] * 3, *["target"] * 2]  # the third of the student makes the target
    assert sorted(backward) == ["head", *["student"] * 3, *["target"] * 2]  # CTM and GAN through both, DSM


def test_the_adversary_reaches_the_student_through_both_frozen_networks():
    _, student, target, D, e = material()
    s, y, w, numbers = e["s"], e["y"], student.net.last_layer, D.draw(4, GEN())
    x_s = student.G(e["x_t"], e["t"], s, y)
    grad, = torch.autograd.grad(gan_loss_g(D, to_end(target, x_s, s, y), y, numbers).mean(), w, retain_graph=True)
    assert grad.abs().max() > 0
    with torch.no_grad(): end = to_end(target, x_s, s, y)  # the classical mistake: nothing arrives
    loss = gan_loss_g(D, end, y, numbers).mean()
    assert loss.requires_grad  # through the heads
    with pytest.raises(RuntimeError, match="not have been used"): torch.autograd.grad(loss, w)


def test_a_step_against_the_adversary_raises_the_logits_of_the_fakes():
    "The sign of the student's adversarial loss."
    _, student, target, D, e = material()
    D.strength, numbers, bounds = 0., D.draw(4, GEN()), (1e4, 1e4)
    def logit():
        with torch.no_grad(): fake = to_end(target, student.G(e["x_t"], e["t"], e["s"], e["y"]), e["s"], e["y"])
        return float(torch.cat(D(fake, e["y"], numbers), 1).mean().detach())
    before, opt = logit(), torch.optim.SGD(student.parameters(), .05)
    gradients = BalancedGradients(student.parameters(), student.net.last_layer, gan=bounds)
    for _ in range(5):
        gradients.add(step_losses(student, target, **e, adversary=judge_of(D, e["y"], numbers)))
        gradients.combine()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
        opt.step()
    assert logit() > before


def test_the_discriminators_turn_trains_it_and_nothing_else():
    teacher, student, target, D, e = material()
    loss = discriminator_loss(student, target, D.train(), **starts(e))
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert all(p.grad is None for m in (student, target, teacher) for p in m.parameters())
    assert all(p.grad is not None for p in D.parameters())
