"""The traps of the adversarial stage."""
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctm_nb.training.config import make_config
from ctm_nb.method.distill import GradientSets, adaptive_weight, ctm_pair, dsm_loss, l2, pseudo_huber, to_end
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.adversary import Frozen, RandomProjection, TeacherFeatures, TimmFeatures, augment, colour, cutout, find_weights, load_weights, probe, translate
from ctm_nb.method.adversary import (Discriminator, add_ctm_dsm_gan, ctm_dsm_gan_objective, discriminator_objective, discriminator_optimizer, gan_loss_d, gan_loss_g, gan_turn, hinge_d, hinge_g,
                        lazy, project_both, softplus_d, softplus_g)
from ctm_nb.networks.unet import DDPMpp
from ctm_nb.checkpoints.store import load_checkpoint
from ctm_nb.training.trainer import Trainer
from ctm_nb.method.trajectory import student_from

ROOT = Path(__file__).resolve().parents[2]
GEN = lambda seed=0: torch.Generator().manual_seed(seed)
TINY, LITE = "deit_tiny_distilled_patch16_224", "tf_efficientnet_lite0"


def make_teacher(channels=1, n_classes=10, size=8):
    torch.manual_seed(0)
    teacher = Denoiser(DDPMpp(size, channels, n_classes, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,)))
    for p in teacher.parameters(): p.data.add_(.1 * torch.randn_like(p))
    return teacher


def make(channels=1, n_classes=10, **kw):
    "A teacher, a discriminator on it, pictures and labels."
    teacher = make_teacher(channels, n_classes)
    D = Discriminator([TeacherFeatures(teacher, kw.pop("times", (.2, 1.)))], (channels, 8, 8), n_classes, width=16, **kw)
    x = torch.rand(5, channels, 8, 8, generator=GEN(1)) * 2 - 1
    return teacher, D, x, torch.arange(5) % 10 if n_classes else None


def step(B=4, n_classes=10):
    "Student, average and the arguments of one training step."
    teacher = make_teacher(n_classes=n_classes)
    student = student_from(teacher).requires_grad_(True)
    for p in student.parameters(): p.data.add_(.02 * torch.randn_like(p))
    target = copy.deepcopy(student).requires_grad_(False)
    t, u, s = torch.linspace(80, .5, B), torch.linspace(40, .3, B), torch.linspace(5, .01, B)
    x_t = torch.randn(B, 1, 8, 8, generator=GEN(2)) * (.5 + t.view(-1, 1, 1, 1))
    x0, eps = torch.rand(B, 1, 8, 8, generator=GEN(3)) * 2 - 1, torch.randn(B, 1, 8, 8, generator=GEN(4))
    return teacher, student, target, dict(x_t=x_t, x_u=.6 * x_t, t=t, u=u, s=s, x0=x0, sigma=torch.linspace(.1, 5, B), eps=eps,
                                          y=torch.arange(B) if n_classes else None)


# ---- augmentation

@pytest.mark.parametrize("C, H, W", [(1, 8, 8), (3, 16, 12), (3, 5, 5), (1, 1, 1)])
def test_augmentation_any_shape_identity_at_zero_and_differentiable(C, H, W):
    x = torch.randn(3, C, H, W, requires_grad=True)
    assert torch.equal(augment(x, GEN(), 0.), x)
    out = augment(x, GEN())
    assert out.shape == x.shape and torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all() and (C * H * W == 1 or x.grad.abs().sum() > 0)


def test_augmentation_gradient_is_right():
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: augment(v, GEN(3)), x)


def test_augmentation_is_a_function_of_the_generator_and_differs_between_rows_and_draws():
    x = torch.randn(1, 1, 8, 8).expand(6, -1, -1, -1)
    gen = GEN()
    a, b = augment(x, gen), augment(x, gen)
    assert torch.equal(augment(x, GEN()), a) and not torch.equal(a, b)
    assert len({tuple(r.flatten().tolist()) for r in a}) == 6


def test_every_change_reaches_its_bounds_and_not_further():
    x = torch.arange(16.).view(1, 1, 1, 16).expand(2000, 1, 16, 16)
    one = lambda **kw: augment(x, GEN(), **kw)
    shifts = one(cut=0.)
    u = torch.rand(2000, 7, generator=GEN())
    shifts = shifts - colour(x, 2 * u[:, :3] - 1)
    mid = (x[:, :, :, 8] - translate(x, (u[:, 3:5] * 5).long() - 2)[:, :, :, 8])[:, 0, 0]
    assert mid.min() == -2 and mid.max() == 2
    holes = (augment(torch.ones(2000, 1, 10, 10), GEN(), translation=0.) == 0).flatten(1).sum(1)
    assert holes.max() == 4 and holes.min() >= 1  # 2 x 2, at the border partly outside


def test_translation_and_cutout_by_hand():
    x = torch.arange(9.).view(1, 1, 3, 3)
    assert translate(x, torch.tensor([[1, 0]]))[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert translate(x, torch.tensor([[0, -1]]))[0, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]
    assert cutout(x + 1, torch.tensor([[-1, 2]]), 2)[0, 0].tolist() == [[1, 2, 0], [4, 5, 6], [7, 8, 9]]


# ---- feature networks

@pytest.mark.parametrize("channels, n_classes", [(1, 10), (3, 0), (1, 0)])
def test_teachers_features_at_each_level(channels, n_classes):
    teacher, x = make_teacher(channels, n_classes), torch.rand(3, channels, 8, 8)
    y = torch.arange(3) if n_classes else None
    eyes = TeacherFeatures(teacher, (.5, 80.))
    pyramids = eyes(x, y, GEN())
    eps = torch.randn(6, channels, 8, 8, generator=GEN())
    for n, t in enumerate((.5, 80.)):
        for a, b in zip(pyramids[n], teacher.features(x + t * eps[3 * n:3 * n + 3], t, y)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(m).all() for p in pyramids for m in p)
    assert not any(p.requires_grad for p in teacher.parameters())
    eyes.train()
    assert not any(m.training for m in eyes.modules())


def test_features_refuse_impossible_levels():
    for times in ((), (0., 1.), (-1.,)):
        with pytest.raises(ValueError, match="times must be"): TeacherFeatures(make_teacher(), times)


def test_missing_weights_are_reported_at_once(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    for var in ("HF_HOME", "TORCH_HOME"): monkeypatch.setenv(var, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    import socket
    def no_network(*a, **k): raise AssertionError("network touched")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    started = time.perf_counter()
    for name in ("deit_base_distilled_patch16_224", LITE):
        for where in (None, tmp_path, tmp_path / "missing"):
            with pytest.raises(ValueError, match=name) as e: TimmFeatures(name, where)
            assert "\n" not in str(e.value)
    assert time.perf_counter() - started < 5
    with pytest.raises(ValueError, match="'no_such_net'"): find_weights("no_such_net")


def test_missing_timm_is_reported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"): TimmFeatures()


def test_weights_from_file_folder_and_cache_and_damaged_ones(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file
    net = timm.create_model(LITE, pretrained=False)
    save_file(net.state_dict(), tmp_path / f"{LITE}.safetensors")
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(net.state_dict(), hub / "tf_efficientnet_lite0-0aa007d2.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    for where in (tmp_path, tmp_path / f"{LITE}.safetensors", None):
        found = TimmFeatures(LITE, where)
        assert all(torch.equal(a, b) for a, b in zip(found.net.state_dict().values(), net.state_dict().values()))
    for bad in (b"", b"garbage", b"\x80\x02]q\x00."):
        for suffix in ("safetensors", "pth"):
            path = tmp_path / f"bad.{suffix}"
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="must hold the weights") as e: load_weights(net, path)
            assert "\n" not in str(e.value)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold the weights"): load_weights(net, path)


def command(*words, cwd):
    "The command as a process, where no cache has any weights."
    return subprocess.run([sys.executable, "-m", "ctm_nb.commands.train", "--preset", "tiny", "--stage", "all", "--set", *words], capture_output=True, text=True, cwd=cwd,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_HOME": str(cwd / "torch"), "HF_HOME": str(cwd / "hf")}, timeout=300)


@pytest.mark.parametrize("words, message", [
    (["gan.steps=2", "gan.features=deit_base_distilled_patch16_224,tf_efficientnet_lite0"], "no weights of deit_base_distilled_patch16_224 on this machine"),
    (["distill.distance=lpips"], "distance 'lpips' needs torchvision's vgg16-*.pth")])
def test_the_command_misses_weights_before_any_work(tmp_path, words, message):
    "One line and exit code 2, before the first step of the first stage (how fast: above, without the time of starting a process)."
    pytest.importorskip("timm")
    r = command(*words, cwd=tmp_path)
    assert r.returncode == 2 and message in r.stderr and r.stderr.count("\n") == 1 and not r.stdout, r.stderr
    assert not (tmp_path / "runs").exists()


def test_several_feature_networks_at_once_train_and_resume(tmp_path):
    "The teacher beside a classifier whose weights lie in a folder; optimizer and state of the discriminator come back exactly."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model(LITE, pretrained=False).state_dict(), tmp_path / f"{LITE}-0.pth")
    words = ["teacher.steps=2", "distill.steps=1", "gan.steps=4", "gan.batch=2", f"gan.features=teacher,{LITE}", f"gan.weights={tmp_path}", "evaluate.n=0"]
    def until(name, stops):
        for stop in stops:
            t = Trainer(make_config("tiny", words), tmp_path / name)
            while t.step < stop: t.train_step()
            t.save()
        return t
    a, b = until("straight", [7]), until("broken", [4, 6, 7])
    D = a.parts["discriminator"]
    assert [len(p.channels) for p in D.projections] == [2, 2, 2, 4]  # three levels of the teacher, four depths of the classifier
    saved = load_checkpoint(tmp_path / "broken" / "checkpoints" / "step_00000007")
    assert len(saved.state["optimizers"]["discriminator"]["state"]) == len(list(D.parameters())) and saved.state["optimizers"]["discriminator"]["param_groups"][0]["betas"] == (.5, .9)
    for k, v in D.state_dict().items(): assert torch.equal(v, b.parts["discriminator"].state_dict()[k]) and torch.equal(v, saved.models["discriminator"][k]), k
    for n, state in a.now.optimizers["discriminator"].state_dict()["state"].items():
        for k, v in state.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(saved.state["optimizers"]["discriminator"]["state"][n][k])), (n, k)


def test_the_adversarial_stage_starts_from_the_average_in_a_runs_folder(tmp_path):
    "`--student RUN`: the run's newest checkpoint, its average and not the weights that were still moving."
    words = ["teacher.steps=3", "distill.steps=4", "distill.lr=.02", "gan.steps=2", "gan.batch=8", "evaluate.n=0"]
    first = Trainer(make_config("tiny", words), tmp_path / "first")
    first.run("ctm_dsm")
    average, moving = first.parts["ctm"].state_dict(), first.parts["model"].state_dict()
    last = "net." + next(n for n, p in first.parts["ctm"].net.named_parameters() if p is first.parts["ctm"].net.last_layer)
    assert not torch.equal(average[last], moving[last])
    t = Trainer(make_config("tiny", [*words, f"teacher.source={tmp_path / 'first'}", f"distill.source={tmp_path / 'first'}"]), tmp_path / "second")
    assert (t.stage, t.step) == ("ctm_dsm_gan", 0)
    for part in ("model", "target", "ctm"):
        for k, v in average.items(): assert torch.equal(v, t.parts[part].state_dict()[k]), (part, k)
    for k, v in first.parts["teacher"].state_dict().items(): assert torch.equal(v, t.parts["teacher"].state_dict()[k])


@pytest.mark.parametrize("name", [TINY, LITE])
def test_timm_networks_pass_gradients_and_keep_none(name):
    pytest.importorskip("timm")
    eyes = TimmFeatures(name, pretrained=False)
    x = (torch.rand(1, 1, 8, 8) * 2 - 1).requires_grad_()
    maps = eyes(x)[0]
    assert len(maps) == 4 and all(a.shape[-1] >= b.shape[-1] for a, b in zip(maps, maps[1:]))
    sum(m.square().mean() for m in maps).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in eyes.parameters()) and not any(m.training for m in eyes.train().modules())
    with pytest.raises(ValueError, match="1 or 3 channels"): eyes(torch.zeros(1, 2, 8, 8))
    seen = []
    eyes.net.forward_intermediates = lambda v, **kw: seen.append(v) or []
    for side in (8, 255, 256, 300): eyes(torch.ones(1, 3, side, side))
    assert [v.shape[-1] for v in seen] == [224, 224, *((224, 224) if name == TINY else (256, 300))]
    torch.testing.assert_close(seen[0][0, :, 0, 0], (1 - eyes.mean[:, 0, 0]) / eyes.std[:, 0, 0])


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
            for k in range(l + 1): assert ((changed[k] - out[k]).abs().amax((0, 2, 3)) > 1e-3).all()  # every output channel of this scale and the finer


# ---- discriminator

@pytest.mark.parametrize("channels, n_classes", [(1, 10), (3, 0)])
@pytest.mark.parametrize("B", [1, 4])
def test_shapes_gradients_and_frozen_parts(channels, n_classes, B):
    teacher, D, x, y = make(channels, n_classes)
    x, y = x[:B].clone().requires_grad_(), None if y is None else y[:B]
    logits = D(x, y, GEN())
    assert [tuple(l.shape) for l in logits] == [(B, 16)] * 4
    loss = gan_loss_g(D, x, y, GEN())
    assert loss.shape == (B,)
    loss.sum().backward()
    assert (x.grad != 0).flatten(1).any(1).all() and all(p.grad is None for p in teacher.parameters())


def test_logits_are_a_function_of_the_generator_and_of_the_class():
    _, D, x, y = make()
    D.eval()
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a, b))
    assert same(D(x, y, GEN()), D(x, y, GEN())) and not same(D(x, y, GEN()), D(x, y, GEN(1)))
    mixed = D.project(x, y, GEN())
    assert not same(D.judge(mixed, y), D.judge(mixed, (y + 1) % 10)) and same(D.judge(mixed, torch.full_like(y, -1)), D.judge(mixed))
    with pytest.raises(ValueError, match=r"x must be \(B, 1, 8, 8\)"): D(torch.zeros(2, 1, 16, 16))


def test_checkpoint_is_exact_and_holds_no_frozen_network():
    teacher, D, x, y = make()
    opt = discriminator_optimizer(D)
    for n in range(3):
        loss = gan_loss_d(D, x, .5 * x, y, GEN(n)).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    state, opt_state = copy.deepcopy(D.state_dict()), copy.deepcopy(opt.state_dict())
    assert sum(v.numel() for v in state.values()) < 60000 and not any(".net." in k or "teacher" in k for k in state)
    assert {id(p) for p in D.parameters()} & {id(p) for p in teacher.parameters()} == set()
    torch.manual_seed(99)
    twin = Discriminator([TeacherFeatures(teacher, (.2, 1.))], (1, 8, 8), 10, width=16, seed=7)
    twin.load_state_dict(state)
    again = discriminator_optimizer(twin)
    again.load_state_dict(opt_state)
    for E, o in ((D, opt), (twin, again)):  # the next step too, power iteration included
        loss = gan_loss_d(E, x, .5 * x, y, GEN(9)).mean()
        o.zero_grad(); loss.backward(); o.step()
    for a, b in zip(D.eval()(x, y, GEN()), twin.eval()(x, y, GEN())): assert torch.equal(a, b)


def test_frozen_networks_follow_to_another_type():
    teacher, D, x, y = make()
    D.double()
    assert teacher.net.last_layer.dtype == torch.float64
    assert all(l.dtype == torch.float64 for l in D(x.double(), y, GEN()))


def test_bfloat16_autocast_and_extreme_pictures_stay_finite():
    _, D, x, y = make(times=(.002, 80.))
    for scale in (1., 100.):
        with torch.autocast("cpu", torch.bfloat16):
            v = (scale * x).requires_grad_()
            loss = gan_loss_g(D, v, y, GEN()).sum() + gan_loss_d(D, x, v, y, GEN(), r1=1.).sum()
        loss.backward()
        assert torch.isfinite(v.grad).all() and all(torch.isfinite(p.grad).all() for p in D.parameters() if p.grad is not None)


# ---- losses

def test_losses_by_hand():
    real, fake = torch.tensor([[2., 0.], [-1., 1.]]), torch.tensor([[-2., 0.], [1., -1.]])
    assert hinge_d(real, fake).tolist() == [.5 + .5, 1. + 1.] and hinge_g(fake).tolist() == [1., 0.]
    zero = torch.zeros(3, 2)
    torch.testing.assert_close(softplus_d(zero, zero), torch.full((3,), 2 * .6931472)); torch.testing.assert_close(softplus_g(zero), torch.full((3,), .6931472))
    assert softplus_g(torch.full((1, 1), -90.)) == 90. and softplus_d(torch.full((1, 1), 90.), torch.full((1, 1), -90.)) < 1e-30


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_discriminator_loss_reaches_only_the_heads_and_augments_independently(loss, monkeypatch):
    teacher, D, x, y = make()
    seen = []
    project = D.project
    monkeypatch.setattr(D, "project", lambda v, *a: seen.append(project(v, *a)) or seen[-1])
    fake = x.clone().requires_grad_()
    out = gan_loss_d(D, x, fake, y, GEN(), loss=loss)
    assert out.shape == (5,)
    out.mean().backward()
    assert fake.grad is None and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in D.heads.parameters() if p.ndim > 1)
    assert (seen[0][0][0] - seen[1][0][0]).abs().amax((1, 2, 3)).min() > 1e-3  # the same pictures, seen differently


def test_r1_is_the_squared_slope_at_real_pictures():
    _, D, x, y = make(strength=0.)
    D.eval()
    with_r1 = gan_loss_d(D, x, -x, y, GEN(), r1=2.) - gan_loss_d(D, x, -x, y, GEN())
    mixed = [[z.requires_grad_() for z in maps] for maps in D.project(x, y, GEN())]
    slopes = [torch.autograd.grad(l.mean(1).sum(), z)[0].flatten(1).square().sum(1) for l, z in zip(D.judge(mixed, y), [z for m in mixed for z in m])]
    torch.testing.assert_close(with_r1, torch.stack(slopes).mean(0), rtol=1e-3, atol=1e-6)
    grads = lambda r1: torch.autograd.grad(gan_loss_d(D, x, -x, y, GEN(), r1=r1).sum(), D.heads[0][0].logit.parametrizations.weight.original)[0]
    assert (grads(5.) - grads(0.)).abs().max() > 1e-4  # it is differentiated again


def test_discriminator_learns():
    _, D, x, y = make(n_classes=0)
    opt, gen = discriminator_optimizer(D, lr=1e-2), GEN()
    real = torch.rand(64, 1, 8, 8, generator=gen).round() * 2 - 1
    for n in range(60):
        loss = gan_loss_d(D, real, .1 * real, None, gen).mean()
        if n == 0: first = float(loss.detach())
        opt.zero_grad(); loss.backward(); opt.step()
    assert 1.5 < first < 2.5 and loss < .7 * first


# ---- turns

def test_turns():
    assert [gan_turn(n) for n in range(4)] == ["discriminator", "ctm_dsm_gan"] * 2
    turns = [gan_turn(n, 3, 2) for n in range(11)]
    assert turns == ["ctm_dsm"] * 3 + ["discriminator"] * 3 + ["ctm_dsm_gan", "discriminator"] * 2 + ["ctm_dsm_gan"]
    assert [gan_turn(n, 0, 3) for n in range(6)] == ["discriminator"] * 4 + ["ctm_dsm_gan", "discriminator"]
    assert sum(lazy(n, .1, 4) for n in range(40)) == pytest.approx(4.) and lazy(4, 0., 4) == 0


# ---- the objective

@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("n_classes", [10, 0])
@pytest.mark.parametrize("distance, loss, low, high", [(l2, "hinge", .01, 10.), (pseudo_huber, "softplus", 0., 1e4), (pseudo_huber, "hinge", .5, .5)])
def test_the_cheap_step_has_the_plain_formulas_gradient(B, n_classes, distance, loss, low, high):
    teacher, student, target, e = step(B, n_classes)
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), n_classes, width=16).eval()
    estimate, goal = ctm_pair(student, target, *(e[k] for k in ("x_t", "x_u", "t", "u", "s", "y")))
    ctm, dsm = distance(estimate, goal).mean(), dsm_loss(student, e["x0"], e["sigma"], e["eps"], e["y"]).mean()
    gan = gan_loss_g(D, estimate, e["y"], GEN(5), loss).mean()
    lam = adaptive_weight(ctm, dsm, student.net.last_layer), adaptive_weight(ctm, gan, student.net.last_layer, low, high)
    plain = torch.autograd.grad(ctm + lam[0] * dsm + lam[1] * gan, list(student.parameters()))
    out = ctm_dsm_gan_objective(student, target, D, **e, distance=distance, generator=GEN(5), loss=loss, low=low, high=high)
    cheap = torch.autograd.grad(out["objective"], list(student.parameters()))
    mine = torch.stack([out[k] for k in ("loss_ctm", "loss_dsm", "loss_gan", "lambda_dsm", "lambda_gan")])
    torch.testing.assert_close(mine, torch.stack([ctm, dsm, gan, *lam]).detach(), rtol=1e-3, atol=1e-5)
    assert not mine.requires_grad and low <= mine[4] <= high
    scale = max(g.abs().max() for g in plain)
    for a, b in zip(cheap, plain): torch.testing.assert_close(a / scale, b / scale, rtol=1e-3, atol=1e-4)
    out["objective"].detach_()
    assert all(p.grad is None for m in (teacher, target, D) for p in m.parameters())


@pytest.mark.parametrize("dtype, close", [(torch.float16, .03), (torch.bfloat16, .1)])
def test_half_precision_finds_the_same_balance_of_three_losses(dtype, close):
    teacher, student, target, e = step(8)
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16).eval()
    options, look = dict(distance=pseudo_huber), D.draw(8, GEN(5))
    flat = lambda: torch.cat([p.grad.flatten() for p in student.parameters()])
    def at_once(scale):
        student.zero_grad(set_to_none=True)
        out = ctm_dsm_gan_objective(student, target, D, **e, **options, generator=look, scale=scale)
        return out, out.pop("objective")
    def in_parts(scale):
        sets = GradientSets(student.parameters(), student.net.last_layer)
        for rows in torch.arange(8).tensor_split(3):
            deal = {"u": look["u"][rows], "eps": [v[rows] for v in look["eps"]]}
            add_ctm_dsm_gan(sets, student, target, D, **{k: v[rows] for k, v in e.items()}, **options, generator=deal, share=len(rows) / 8, scale=scale)
        return sets.combine(scale, gan=(.01, 10.))
    full, objective = at_once(1.)
    objective.backward()
    g = flat()
    assert .011 < full["lambda_gan"] < 9.9 and .011 < full["lambda_dsm"] < 9e3  # where the clamps say nothing
    scale = 2. ** 12
    with torch.autocast("cpu", dtype=dtype): out, objective = at_once(scale)
    (objective * scale).backward()
    for k in full: assert abs(out[k] / full[k] - 1) < close, (k, out[k], full[k])
    assert float((flat() / scale - g).norm() / g.norm()) < 3 * close
    with torch.autocast("cpu", dtype=dtype): out = in_parts(scale)
    for k in full: assert abs(out[k] / full[k] - 1) < close, (k, out[k], full[k])
    assert float((flat() / scale - g).norm() / g.norm()) < 3 * close
    out = in_parts(1.)
    for k in full: assert abs(out[k] / full[k] - 1) < 1e-4, (k, out[k], full[k])


def test_small_gradients_survive_the_frozen_networks_in_float16():
    teacher, student, target, e = step(8)
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16).eval()
    x_s, goal, s, look = e["eps"].requires_grad_(), torch.zeros(8, 1, 8, 8), torch.ones(8), D.draw(8, GEN(5))
    def gradients(scale, half=True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            both = project_both(x_s, goal, target, D, s, e["y"], lambda a, b: 1e-7 * l2(a, b), look, "hinge", "end", scale)
        return [torch.autograd.grad(v, x_s)[0] for v, _ in both]
    off = lambda a, b: float((a - b).norm() / b.norm())
    exact = gradients(1., half=False)
    assert off(gradients(2. ** 20)[0], exact[0]) < .03 < .1 < off(gradients(1.)[0], exact[0])
    assert off(gradients(2. ** 8)[1], exact[1]) < .05


def test_what_the_balance_costs():
    "The student and the discriminator are walked back once, the frozen map once more: one partial way for the weight of the adversary."
    teacher, student, target, e = step()
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16)
    seen = []
    def watch(name, module):
        def hook(module, inputs, out):
            if out.requires_grad: out.register_hook(lambda g: seen.append(name))
        module.register_forward_hook(hook)
    for name, m in (("student", student.net), ("target", target.net), ("judge", D.heads[0][0].body)): watch(name, list(m.enc.values())[1] if hasattr(m, "enc") else m)
    ctm_dsm_gan_objective(student, target, D, **e, generator=GEN())["objective"].backward()
    assert sorted(seen) == ["judge", "student", "target", "target"]


def test_the_adversary_reaches_the_student_through_both_frozen_networks():
    teacher, student, target, e = step()
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16)
    x_s = student.G(e["x_t"], e["t"], e["s"], e["y"])
    grad = torch.autograd.grad(gan_loss_g(D, to_end(target, x_s, e["s"], e["y"]), e["y"], GEN()).mean(), student.net.last_layer)[0]
    assert grad.abs().max() > 0
    with torch.no_grad(): end = to_end(target, x_s, e["s"], e["y"])
    assert not gan_loss_g(D, end, e["y"], GEN()).requires_grad or torch.autograd.grad(
        gan_loss_g(D, end, e["y"], GEN()).mean(), student.net.last_layer, allow_unused=True)[0] is None  # the classical mistake: nothing arrives


def test_a_step_against_the_adversary_lowers_its_verdict():
    "The sign: descending the student's adversarial loss raises the logits of the fakes."
    teacher, student, target, e = step()
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16, strength=0.).eval()
    def logit():
        with torch.no_grad(): return float(torch.cat(D(to_end(target, student.G(e["x_t"], e["t"], e["s"], e["y"]), e["s"], e["y"]), e["y"], GEN()), 1).mean())
    before = logit()
    opt = torch.optim.SGD(student.parameters(), .05)
    for _ in range(5):
        out = ctm_dsm_gan_objective(student, target, D, **e, generator=GEN(), low=1e4, high=1e4)
        opt.zero_grad(); out["objective"].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.); opt.step()
    assert logit() > before


def test_the_discriminators_turn_trains_it_and_nothing_else():
    teacher, student, target, e = step()
    D = Discriminator([TeacherFeatures(teacher, (.3,))], (1, 8, 8), 10, width=16)
    loss = discriminator_objective(student, target, D, e["x_t"], e["t"], e["s"], e["x0"], e["y"], GEN(), r1=.1)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert all(p.grad is None for m in (student, target, teacher) for p in m.parameters())
    assert all(p.grad is not None for p in D.parameters())


def test_frozen_and_probe():
    net = Frozen(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)))
    mean = net.net[1].running_mean.clone()
    net.train().net(torch.randn(3, 1, 4, 4))
    assert torch.equal(mean, net.net[1].running_mean)
    sizes = probe(TeacherFeatures(make_teacher(), (.1, 80.)), (1, 8, 8), 10)
    assert [[s for s, _ in p] for p in sizes] == [[(8, 8, 8), (8, 4, 4)]] * 2 and all(r > 0 for p in sizes for _, r in p)


@pytest.mark.parametrize("start, head_start", [(0, 0), (0, 5), (3, 4), (0, 8)])
def test_the_penalty_falls_on_turns_of_the_discriminator(start, head_start, monkeypatch):
    from ctm_nb.training import stages
    from ctm_nb.training.config import make_config
    from ctm_nb.data.images import digits
    config = make_config("tiny", ["gan.steps=80", "gan.r1=1", f"gan.start={start}", f"gan.head_start={head_start}"])
    teacher = stages.TeacherStage(config, digits(), torch.device("cpu")).parts["teacher"]
    stage = stages.GanStage(config, digits(), torch.device("cpu"), {"teacher": teacher, "ctm": student_from(teacher)})
    charged = []
    monkeypatch.setattr(stages, "discriminator_objective", lambda *_, r1, **__: charged.append(r1 > 0))
    for n in range(start, 80):
        if stage.turn(n) == "discriminator": stage._adversary(dict.fromkeys(("x_t", "t", "s", "x0", "y", "looks")), n)
    assert sum(charged) >= (80 - start - head_start) // 16
    assert stage.turn(stage.kinds()[2]) == "discriminator"
