"""Runs with feature networks: missing weights are said before any work, several networks train and resume."""
import json
import os
from pathlib import Path

import pytest
import torch
from warm import python

from ctm_nb.checkpoints.store import load_checkpoint, save_checkpoint
from ctm_nb.data.images import digits
from ctm_nb.training.config import make_config
from ctm_nb.training.trainer import Trainer

ROOT, LITE = Path(__file__).resolve().parents[2], "tf_efficientnet_lite0"


def command(*words, cwd):
    "The command as a process, where no cache has any weights."
    caches = {"TORCH_HOME": str(cwd / "torch"), "HF_HOME": str(cwd / "hf")}
    code = "from ctm_nb.commands.main import main; main()"
    line = "train", "--preset", "tiny", "--stage", "all", "--set", *words
    return python(code, *line, cwd=cwd, env={**os.environ, **caches})


@pytest.mark.parametrize("words, message", [
    (["gan.steps=2", f"gan.features=deit_base_distilled_patch16_224,{LITE}"],
     "no weights of deit_base_distilled_patch16_224 "),
    (["distill.distance=lpips"], "distance 'lpips' needs torchvision's vgg16-*.pth")])
def test_the_command_misses_weights_before_any_work(tmp_path, words, message):
    "One line and exit code 2, before the first step of the first stage."
    pytest.importorskip("timm")
    r = command(*words, "run.micro_batch=1", "gan.steps=2", cwd=tmp_path)
    lines = r.stderr.splitlines()
    assert r.returncode == 2 and message in lines[0] and len(lines) == 1 and not r.stdout, r.stderr
    assert not (tmp_path / "runs").exists()


def test_several_feature_networks_at_once_train_and_resume(tmp_path):
    "The teacher beside a classifier whose weights lie in a folder; the discriminator's state comes back exactly."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model(LITE, pretrained=False).state_dict(), tmp_path / f"{LITE}-0.pth")
    words = ["teacher.steps=2", "distill.steps=1", "gan.steps=4", "gan.batch=2", "evaluate.n=0",
             f"gan.features=teacher,{LITE}", f"gan.weights={tmp_path}"]
    def until(name, stops):
        for stop in stops:
            t = Trainer(make_config("tiny", words), tmp_path / name)
            while t.step < stop: t.train_step()
            t.save()
        return t
    a, b = until("straight", [7]), until("broken", [4, 6, 7])
    D = a.parts["discriminator"]
    assert [len(p.channels) for p in D.projections] == [2, 2, 2, 4]  # three of the teacher, one of timm
    saved = load_checkpoint(tmp_path / "broken" / "checkpoints" / "step_00000007")
    optimizer = saved.state["optimizers"]["discriminator"]
    assert len(optimizer["state"]) == len(list(D.parameters())) and optimizer["param_groups"][0]["betas"] == (.5, .9)
    for k, v in D.state_dict().items():
        assert torch.equal(v, b.parts["discriminator"].state_dict()[k]), k
        assert torch.equal(v, saved.models["discriminator"][k]), k
    for n, state in a.now.optimizers["discriminator"].state_dict()["state"].items():
        for k, v in state.items():
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer["state"][n][k])), (n, k)


def test_the_published_adversary_trains_and_resumes(tmp_path):
    "Frozen random parts, spectral and batch norms come back from a checkpoint; the student moves first."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model(LITE, pretrained=False).state_dict(), tmp_path / f"{LITE}-0.pth")
    words = ["teacher.steps=2", "distill.steps=1", "gan.steps=4", "gan.batch=3", "evaluate.n=0", "gan.width=8",
             "gan.discriminator=published", "gan.first=student", f"gan.features={LITE}", f"gan.weights={tmp_path}"]
    def until(name, stops):
        for stop in stops:
            torch.manual_seed(stop)
            t = Trainer(make_config("tiny", words), tmp_path / name)
            while t.step < stop: t.train_step()
            t.save()
        return t
    a, b = until("straight", [7]), until("broken", [4, 5, 6, 7])
    turns = [k for w in a.state.window for k in ("loss_d", "loss_gan") if k in w]
    assert turns == ["loss_gan", "loss_d"] * 2
    for part in ("model", "discriminator"):
        for k, v in a.parts[part].state_dict().items(): assert torch.equal(v, b.parts[part].state_dict()[k]), k
    D = a.parts["discriminator"]
    assert int(D.heads[0][0].body[1].num_batches_tracked) == 4 + 2  # real and fake twice, the student's twice
    saved = load_checkpoint(tmp_path / "broken" / "checkpoints" / "step_00000007").models["discriminator"]
    assert {"projections.0.1.ccm.0.weight", "heads.0.0.logit.v", "heads.0.0.body.1.running_var"} <= saved.keys()


def test_an_adversary_of_before_goes_on(tmp_path):
    "A run whose configuration lacks the settings that came later has the small discriminator, and keeps it."
    words = ["network.channel_mult=1", "teacher.steps=2", "distill.steps=1", "gan.steps=6", "gan.batch=4",
             "evaluate.n=0"]
    straight = Trainer(make_config("tiny", words), tmp_path / "straight")
    while straight.step < 9: straight.train_step()
    t = Trainer(make_config("tiny", words), tmp_path / "old")
    while t.step < 6: t.train_step()
    t.save()
    later = {"gan": ("discriminator", "first"), "distill": ("pooling",)}
    def forget(path, config_of):
        about = json.loads(path.read_text())
        for section, keys in later.items():
            for k in keys: del config_of(about)[section][k]
        return about
    folder = tmp_path / "old" / "checkpoints" / "step_00000006"
    (tmp_path / "old" / "config.json").write_text(json.dumps(forget(tmp_path / "old" / "config.json", lambda c: c)))
    saved = load_checkpoint(folder)
    for section, keys in later.items():
        for k in keys: del saved.meta["config"][section][k]
    save_checkpoint(folder.parent, saved.step, saved.models, saved.state, saved.meta)
    t = Trainer(make_config("tiny", words), tmp_path / "old")
    while t.step < 9: t.train_step()
    for k, v in straight.parts["model"].state_dict().items(): assert torch.equal(v, t.parts["model"].state_dict()[k]), k
    with pytest.raises(ValueError, match="gan.discriminator: small -> published"):
        Trainer(make_config("tiny", [*words, "gan.discriminator=published"]), tmp_path / "old")


@pytest.mark.parametrize("preset", ["cifar10", "cifar10-cond", "imagenet64"])
def test_published_presets_have_the_published_adversary_and_distance(preset, monkeypatch):
    "And the stage hands the pooling on."
    from ctm_nb.training import stages
    config = make_config(preset, ["data.source=somewhere"])
    g, found = config.gan, []
    assert (g.discriminator, g.first, g.width, g.strength) == ("published", "student", 64, 1.) and g.head_start == 0
    assert (g.loss, g.high, g.d_lr) == ("hinge", 10., 2e-3)
    assert set(g.features.split(",")) == {"deit_base_distilled_patch16_224", LITE}
    small = make_config("tiny", [f"distill.pooling={config.distill.pooling}", "distill.distance=lpips"])
    assert config.distill.distance == "lpips" and config.distill.pooling == "average"
    monkeypatch.setattr(stages, "LPIPSDistance", lambda folder, **kw: found.append(kw) or (lambda a, b: a))
    teacher = stages.TeacherStage(small, digits(), torch.device("cpu")).parts["teacher"]
    stages.DistillStage(small, digits(), torch.device("cpu"), {"teacher": teacher})
    assert found == [{"pooling": "average"}]


def test_the_adversarial_stage_starts_from_the_ema_in_a_runs_folder(tmp_path):
    "`--student RUN`: the run's newest checkpoint, its EMA and not the raw weights."
    words = ["network.channel_mult=1", "teacher.steps=3", "distill.steps=4", "distill.lr=.02", "gan.steps=2",
             "gan.batch=8", "evaluate.n=0"]
    first = Trainer(make_config("tiny", words), tmp_path / "first")
    first.run("ctm_dsm")
    ema, raw = first.parts["ctm"].state_dict(), first.parts["model"].state_dict()
    net = first.parts["ctm"].net
    last = "net." + next(n for n, p in net.named_parameters() if p is net.last_layer)
    assert not torch.equal(ema[last], raw[last])
    sources = [f"{key}.source={tmp_path / 'first'}" for key in ("teacher", "distill")]
    t = Trainer(make_config("tiny", [*words, *sources]), tmp_path / "second")
    assert (t.stage, t.step) == ("ctm_dsm_gan", 0)
    for part in ("model", "target", "ctm"):
        for k, v in ema.items(): assert torch.equal(v, t.parts[part].state_dict()[k]), (part, k)
    for k, v in first.parts["teacher"].state_dict().items(): assert torch.equal(v, t.parts["teacher"].state_dict()[k])
