"""The published recipe, row by row: each of these fails when its line is removed."""
import pytest
import torch
from runs import ONE_LEVEL, newest

from ctm_nb.checkpoints.models import load
from ctm_nb.data.batches import Batches
from ctm_nb.data.images import digits
from ctm_nb.method.balance import ApartGradients
from ctm_nb.method.distances import l2
from ctm_nb.method.sampling import sample
from ctm_nb.networks.unet import ADM, DDPMpp, OpenAIUNet
from ctm_nb.training import stages
from ctm_nb.training.config import make_config
from ctm_nb.training.stages import take
from ctm_nb.training.trainer import Trainer

SHORT = [ONE_LEVEL, "teacher.steps=1", "distill.steps=4", "distill.optimizer=radam", "distill.lr=.01", "gan.steps=4",
         "gan.batch=8", "gan.optimizer=radam", "evaluate.n=0", "run.save_every=1000"]
PUBLISHED = ("cifar10", "cifar10-cond", "imagenet64")


def trainer(folder, *words): return Trainer(make_config("tiny", [*SHORT, *words]), folder)


def weights(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_ask_for_it(preset):
    c, cifar = make_config(preset, ["data.source=x"]), preset != "imagenet64"
    assert c.data.flip and not c.distill.ema_warmup and not c.gan.ema_warmup and c.gan.init == "raw"
    assert c.distill.dropout == (.13 if cifar else 0)
    assert (c.distill.target_ema, c.gan.target_ema) == (.999, .9999 if preset == "cifar10" else .999)
    assert c.distill.emas == c.gan.emas == ((.9999,) if cifar else (.9999, .9999432189950708))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_ema_after_n_steps_is_its_closed_form(tmp_path, warmup):
    t = trainer(tmp_path, f"distill.ema_warmup={warmup}", "distill.ema=.9", "distill.target_ema=.8",
                "distill.emas=.7")
    t.train_step()
    t.begin("ctm_dsm", t.parts)
    path = [weights(t.parts["model"]).double()]
    for _ in range(4):
        t.train_step()
        path.append(weights(t.parts["model"]).double())
    for name, rate in (("ctm", .9), ("target", .8), ("ctm-0.7", .7)):
        fixed = rate ** 4 * path[0] + (1 - rate) * sum(rate ** (3 - i) * v for i, v in enumerate(path[1:]))
        same = torch.allclose(weights(t.parts[name]).double(), fixed, atol=1e-6)
        assert same != warmup and (path[0] - path[-1]).abs().max() > 1e-3, name


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_a_stage_asks_for_the_pooling_of_its_configuration(pooling, monkeypatch):
    asked, cpu = [], torch.device("cpu")
    monkeypatch.setattr(stages, "LPIPSDistance", lambda folder, pooling: asked.append(pooling) or l2)
    config = make_config("tiny", ["distill.distance=lpips", f"distill.pooling={pooling}"])
    teacher = stages.TeacherStage(config, digits(), cpu).parts["teacher"]
    assert stages.DistillStage(config, digits(), cpu, {"teacher": teacher}).distance is l2 and asked == [pooling]


@pytest.mark.parametrize("p", [0., .5])
def test_dropout_is_on_in_student_and_target_of_both_stages(tmp_path, p):
    t = trainer(tmp_path, f"distill.dropout={p}")
    while t.step < 7:
        t.train_step()
        if t.stage == "teacher" or t.now.name == "teacher": continue
        assert [t.parts[k].training for k in ("model", "target", "ctm", "teacher")] == [p > 0, p > 0, False, False]
        net = t.parts["model"].net
        x = torch.randn(2, *t.now.shape), torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        with torch.no_grad(): assert torch.equal(net(*x), net(*x)) == (p == 0)
    assert t.now.name == "ctm_dsm_gan" and t.parts["model"].net.config["dropout"] == p


def test_half_of_the_images_are_mirrored_and_a_resume_mirrors_the_same(tmp_path):
    t = trainer(tmp_path, "data.flip=true")
    t.train_step()
    t.begin("ctm_dsm", t.parts)
    plain, n, mirrored = Batches(t.data, t.config.distill.batch, t.config.run.seed), 0, 0
    while n < 4000:
        x0, was = t.batches.at(n).x0, plain.at(n).x0
        stays = (x0 == was).flatten(1).all(1)
        assert torch.equal(x0[~stays], was[~stays].flip(3)) and torch.equal(x0, t.batches.at(n).x0)
        n, mirrored = n + len(x0), mirrored + int((~stays).sum())
    assert abs(mirrored / n - .5) < .02
    t.save()
    again = trainer(tmp_path, "data.flip=true")
    assert torch.equal(again.batches.at(64).x0, t.batches.at(64).x0)


@pytest.mark.parametrize("init", ["ema", "raw"])
def test_the_adversarial_stage_goes_on_where_the_first_stood(tmp_path, init):
    rates = ["distill.ema_warmup=false", "distill.target_ema=.8", "distill.emas=.5", "gan.emas=.5"]
    t = trainer(tmp_path / init, f"gan.init={init}", *rates, "gan.lr=1e-12")
    while t.step < 5: t.train_step()
    before = {k: weights(t.parts[k]).clone() for k in ("model", "target", "ctm", "ctm-0.5")}
    moments = t.now.optimizers["model"].state_dict()["state"][0]["exp_avg"].clone()
    updates = {k: e.n_updates for k, e in t.now.emas.items()}
    now = t.now
    t.begin("ctm_dsm_gan", t.parts)
    t.now.inherit(now)
    state = t.now.optimizers["model"].state_dict()["state"]
    for k, v in before.items(): assert torch.equal(weights(t.parts[k]), v if init == "raw" else before["ctm"]), k
    assert len({float(v.double().sum()) for v in before.values()}) == 4  # each its own
    if init == "raw":
        assert torch.equal(state[0]["exp_avg"], moments)
        assert {k: e.n_updates for k, e in t.now.emas.items()} == updates
    else: assert not state and not any(e.n_updates for e in t.now.emas.values())


def test_a_run_inherits_at_the_border_of_its_stages(tmp_path):
    "Also when it was killed right there, and with another optimizer it may not."
    t = trainer(tmp_path / "a", "gan.init=raw")
    while t.step < 5: t.train_step()
    t.save()
    resumed = trainer(tmp_path / "a", "gan.init=raw")
    for r in (t, resumed): r.train_step()
    t.save()
    for k, v in newest(tmp_path / "a").models["model"].items():
        assert torch.equal(v, resumed.parts["model"].state_dict()[k]), k
    assert t.now.optimizers["model"].state_dict()["state"][0]["step"] >= 4
    with pytest.raises(ValueError, match="gan.init must be ema where gan.optimizer is not distill.optimizer"):
        make_config("tiny", ["gan.init=raw", "gan.optimizer=adamw", "distill.optimizer=radam"])


def test_the_layer_of_the_adaptive_weights():
    "The output convolution, but on ImageNet the second convolution of the last residual block."
    size = dict(image_size=16, channels=3, model_channels=64, channel_mult=(1, 1), n_blocks=1)
    for family, name in ((DDPMpp, "dec.16x16_aux_conv.weight"), (ADM, "out_conv.weight"),
                         (OpenAIUNet, "dec.16x16_block1.conv1.weight")):
        net = family(**size)
        assert net.balance_layer is dict(net.named_parameters())[name]
    from ctm_nb.networks.unet import openai_names
    names = openai_names(net)
    last = max(int(v.split(".")[1]) for v in names.values() if v.startswith("output_blocks"))
    assert names["dec.16x16_block1.conv1.weight"] == f"output_blocks.{last}.0.out_layers.3.weight"


@pytest.mark.parametrize("rows", ["none", "4"])
def test_stages_weigh_at_that_layer(tmp_path, rows):
    words = ["network.family=openai", "network.channels_per_head=8", "network.model_channels=32"]
    t = trainer(tmp_path, *words, f"distill.balance_rows={rows}", f"gan.balance_rows={rows}")
    for stage in ("ctm_dsm", "ctm_dsm_gan"):
        t.begin(stage, t.parts)
        gradients, net = t.now.gradients(1), t.parts["model"].net
        assert t.now.learner(1) == "model" and gradients.params[gradients.place] is net.balance_layer, stage
        assert net.balance_layer is not net.last_layer
    assert t.now.bounds == {"gan": (.01, 10.)} and gradients.bounds == t.now.bounds


def test_half_of_the_stretches_run_along_the_axes():
    from ctm_nb.data.augment import draw_parameters, stream_uniforms
    a = draw_parameters(stream_uniforms(0, 0, 20_000), .5)
    stretched = a[a[:, 5] != 0]
    assert abs((stretched[:, 4] == 0).mean() - .5) < .02


ALONE = [ONE_LEVEL, "teacher.source=none", "distill.phases=dsm:.5,soft:.5", "distill.steps=8", "evaluate.n=0",
         "gan.steps=0"]


def test_a_student_without_a_teacher_resumes_exactly(tmp_path):
    def until(name, *stops):
        for stop in stops:
            t = Trainer(make_config("tiny", ALONE), tmp_path / name)
            while t.step < stop: t.train_step()
            t.save()
        return t
    whole, cut = until("a", 8), until("b", 2, 4, 6, 8)
    assert list(whole.plan) == ["ctm_dsm"] and list(whole.samplers())[0].startswith("denoiser")
    for part in ("model", "target", "ctm", "teacher"):
        assert torch.equal(weights(whole.parts[part]), weights(cut.parts[part])), part
    assert torch.equal(weights(whole.parts["teacher"]), weights(whole.parts["target"]))
    moved = weights(whole.parts["model"]) - weights(whole.parts["target"])
    assert moved.abs().max() > 0 and isinstance(sample(load(tmp_path / "a"), 2), torch.Tensor)


@pytest.mark.parametrize("words, message", [
    (["distill.phases="], "distill.phases must be begun by dsm"), (["distill.phases=soft:.5,dsm:.5"], "begun by dsm"),
    (["distill.phases=dsm:.5,trajectories:.5"], "without trajectories"),
    (["distill.distance=features"], "distill.distance must be another than features where there is no teacher"),
    (["gan.steps=2"], "gan.features must be timm networks where there is no teacher")])
def test_what_needs_a_teacher_is_refused_without_one(words, message):
    with pytest.raises(ValueError, match=message): make_config("tiny", [*ALONE, *words])


GROUPS = ["distill.balance_rows=4", "run.micro_batch=12"]  # the groups decide how many images are taken at a time


def test_losses_are_weighed_within_groups_of_rows(tmp_path):
    "The gradient of a step is the mean of those of its groups, each with its own weight."
    words = ["distill.batch=12", "run.micro_batch=5", "distill.optimizer=adamw"]
    whole, apart = (trainer(tmp_path / k, *words, *more) for k, more in (("a", []), ("b", GROUPS)))
    for t in (whole, apart): t.train_step()
    for t in (whole, apart): t.begin("ctm_dsm", t.parts)
    assert len(apart.rows) == 3 and len(whole.rows) == 3 and type(apart.now.gradients(0)) is ApartGradients
    material, now, lambdas, total = whole.material_of(1), whole.now, [], 0
    for k in range(3):
        e = whole.example_of(1, take(material, slice(4 * k, 4 * k + 4)))
        gradients = now.gradients(0)
        gradients.add(now.losses(e, 0))
        lambdas.append(float(gradients.combine()["lambda_dsm"]))
        total = total + torch.cat([p.grad.flatten() for p in now.parts["model"].parameters()]) / 3
    numbers = apart.gradient()
    got = torch.cat([p.grad.flatten() for p in apart.parts["model"].parameters()])
    assert torch.allclose(got, total, atol=1e-6) and abs(float(numbers["lambda_dsm"]) - sum(lambdas) / 3) < 1e-5
    assert abs(float(whole.gradient()["lambda_dsm"]) - sum(lambdas) / 3) > 1e-3
