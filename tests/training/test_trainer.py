"""A run is cut into pieces, refused, starved of labels; its numbers must not notice, or it must say so.

(How it is killed: test_resume.)"""
import json
import math
import re
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ONE_LEVEL, assert_same, command, newest

from ctm_nb.checkpoints.models import load
from ctm_nb.checkpoints.store import load_checkpoint
from ctm_nb.method.sampling import sample
from ctm_nb.training.config import PRESETS, Config, make_config, set_value
from ctm_nb.training.costs import memory
from ctm_nb.training.runtime import Guard
from ctm_nb.training.report import markdown_table, score_table
from ctm_nb.training.trainer import Trainer, _changes

TINY = [ONE_LEVEL, "teacher.steps=12", "distill.steps=9", "gan.steps=9", "teacher.batch=8", "distill.batch=8",
        "gan.batch=8", "run.save_every=4", "run.log_every=3", "run.sample_every=100", "evaluate.n=0",
        "distill.sigma_init=auto"]
CLOCKS = ("seconds", "images_per_sec", "peak_memory_mb")


def logged(folder):
    "The lines of the log without the clocks."
    lines = [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in l.items() if k not in CLOCKS} for l in lines]


def assert_same_run(a, b):
    assert_same(a, b)
    assert newest(a).state["optimizers"].keys() == {"model", "discriminator"} and logged(a) == logged(b)


def pictures(folder, n, classes=("",), shape=(8, 8)):
    "Random pictures in files, in a folder for each class."
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / classes[i % len(classes)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command("--stage", "all", "--set", *TINY, "--runs", folder, "--name", "a").check_returncode()
    return folder / "a"


def test_the_log_says_what_was_promised(undisturbed):
    lines, ends = logged(undisturbed), {"teacher": 12, "ctm_dsm": 21, "ctm_dsm_gan": 30}
    stage_of = lambda n: next(stage for stage, end in ends.items() if n <= end)
    assert [(l["stage"], l["step"]) for l in lines] == [(stage_of(n), n) for n in range(3, 31, 3)]
    assert {"loss_edm", "lr", "grad_norm", "images"} <= lines[0].keys()
    assert {"loss_ctm", "loss_dsm", "lambda_dsm", "teacher_evals", "lr", "grad_norm"} <= lines[6].keys()
    losses, weights = {f"loss_{k}" for k in ("ctm", "dsm", "gan", "d")}, {"lambda_dsm", "lambda_gan"}
    assert losses | weights | {"grad_norm", "grad_norm_d"} <= lines[-1].keys()
    assert 0 < load(undisturbed, which="ctm").sigma_init <= 80
    full = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    assert all(full[k] > 0 for k in CLOCKS)


def test_resume_inside_a_log_window_and_a_stage(undisturbed, tmp_path):
    config = make_config("tiny", TINY)
    for stop in (5, 12, 13, 21, 22, 24, 30):
        trainer = Trainer(config, tmp_path / "c")
        while trainer.step < stop:
            trainer.train_step()
            if trainer.step % 3 == 0: trainer.log_window()
        trainer.save()
    assert_same_run(undisturbed, tmp_path / "c")


def test_another_configuration_is_refused_by_name(undisturbed):
    with pytest.raises(
        ValueError, match=r"runs.*/a holds a run of another configuration \(distill\.lr: 0\.0004 -> 0\.1"
    ):
        Trainer(make_config("tiny", [*TINY, "distill.lr=.1"]), undisturbed)
    Trainer(make_config("tiny", [*TINY, "run.keep=7"]), undisturbed)  # harmless


def test_what_only_the_network_finds_claims_no_folder(tmp_path):
    with pytest.raises(ValueError, match="divisible"):
        Trainer(make_config("tiny", [*TINY, "network.channel_mult=1,1,1,1,1"]), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_classes_of_the_samples_follow_the_data(tmp_path, monkeypatch):
    "Images sorted by class, more of them than samples: every class must still be drawn."
    import ctm_nb.evaluation.evaluate as evaluation
    seen, real = [], evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda m, *a, y, **kw: seen.append(y) or real(m, *a, y=y, **kw))
    t = Trainer(make_config("tiny", [*TINY, "evaluate.n=100", "evaluate.teacher_steps=1"]), tmp_path / "n")
    order = t.data.labels.argsort()
    t.data.labels, t.data.images = t.data.labels[order], t.data.images[order]
    t.evaluate()
    counts = torch.bincount(torch.cat(seen), minlength=10)
    assert counts.min() >= 9 and counts.max() <= 11


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"): Trainer(make_config("tiny", TINY), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_nan_stops_before_the_update(tmp_path):
    trainer = Trainer(make_config("tiny", TINY), tmp_path / "e")
    trainer.train_step()
    before = {k: v.clone() for k, v in trainer.parts["model"].state_dict().items()}
    good = trainer.material_of
    trainer.material_of = lambda step: {**good(step), "x0": torch.full((8, 1, 8, 8), float("nan"))}
    trainer.ahead.forget()
    with pytest.raises(FloatingPointError, match="loss_edm.*step 1"): trainer.train_step()
    for k, v in trainer.parts["model"].state_dict().items(): assert torch.equal(v, before[k])
    assert trainer.step == 1 and trainer.now.emas["teacher"].n_updates == 1


@pytest.mark.parametrize("loss, norm", [(1., math.inf), (1., math.nan), (math.inf, 1.)])
def test_a_gradient_or_a_loss_that_is_not_finite_makes_no_update_and_none_after_it(loss, norm):
    one, guard = torch.tensor(1.), Guard(torch.device("cpu"))
    assert guard.judge(0, [one], one) and guard.look() is None
    assert not guard.judge(1, [one, torch.tensor(loss)], torch.tensor(norm)) and guard.look() == 1
    assert not guard.judge(2, [one], one) and guard.look() == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_own_folder_of_colour_images(tmp_path, labelled):
    images = pictures(tmp_path / "pictures", 40, "ab" if labelled else ("",), (8, 8, 3))
    config = make_config("tiny", [f"data.source={images}", "teacher.steps=3", "distill.steps=3", "evaluate.n=10"])
    assert bool(Trainer(config, tmp_path / "run").run()) == labelled
    m = load(tmp_path / "run")
    assert m.classes == (["a", "b"] if labelled else []) and sample(m, 3).shape == (3, 3, 8, 8)
    assert (tmp_path / "run" / "samples" / "final.png").exists()


def test_a_run_is_reproducible_and_depends_on_its_seed(tmp_path):
    def weights(name, seed):
        t = Trainer(make_config("tiny", [*TINY, f"run.seed={seed}"]), tmp_path / name)
        for _ in range(14): t.train_step()
        return t.parts["model"].net.last_layer
    assert torch.equal(weights("f", 0), weights("g", 0)) and not torch.equal(weights("h", 1), weights("i", 2))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
    config = make_config(preset, ["data.source=somewhere"])
    assert _changes(json.loads(json.dumps(asdict(config))), asdict(config)) == ([], [])


@pytest.mark.parametrize("assignment, message", [
    ("distill.k=3", "nearest is 'distill.K'"), ("nothing", "section.key=value"), ("distill.dsm=maybe", "true or false"),
    ("network.channel_mult=1,x", "channel_mult"), ("teacher.steps=", "teacher.steps must be int")])
def test_bad_assignments(assignment, message):
    with pytest.raises(ValueError, match=re.escape(message)): set_value(Config(), assignment)


@pytest.mark.parametrize("assignment", [
    "teacher.steps=0", "teacher.batch=0", "teacher.lr=nan", "distill.ema=1", "distill.K=0", "distill.N=1",
    "distill.init=zero", "distill.max_evals=0", "network.dropout=1", "network.channel_mult=", "network.sigma_data=0",
    "evaluate.batch=0", "evaluate.steps=0", "run.device=tpux", "run.seed=-1", f"run.seed={2 ** 62}", "teacher.beta2=2",
    "network.sigma_min=0", "network.model_channels=7", "run.keep=0", "evaluate.n=-1", "distill.optimizer=sgd",
    "distill.sigma_init=low", "distill.sigma_init=-1", "distill.sigma_init=90", "distill.sigma_init=nan"])
def test_impossible_values_name_their_key(assignment):
    with pytest.raises(ValueError, match=re.escape(assignment.split("=")[0])): make_config("digits", [assignment])


def test_table_is_made_of_the_records():
    record = lambda metric, value, **s: {"metric": metric, "value": value, "sampler": s or None}
    one = dict(solver="ctm", steps=1)
    records = [("frechet_distance", 1., {}), ("frechet_distance", 2.25, one), ("precision", .5, one)]
    rows = score_table([record(metric, value, **sampler) for metric, value, sampler in records])
    assert markdown_table(rows).splitlines()[-1] == "| CTM, 1 step | 2.25 | 0.500 |"


def test_stage_by_stage_is_the_whole(undisturbed, tmp_path):
    for i, stage in enumerate(("teacher", "ctm_dsm", "ctm_dsm_gan")):
        t = Trainer(make_config("tiny", TINY), tmp_path / "s")
        t.run(stage)
        assert t.step == (12, 21, 30)[i] and set(t.parts) >= {"model", "teacher"}
    assert_same_run(undisturbed, tmp_path / "s")


def test_the_adversarial_stage_starts_from_the_average(tmp_path):
    t = Trainer(make_config("tiny", TINY), tmp_path / "s")
    t.run("ctm_dsm")
    average = {k: v.clone() for k, v in t.parts["ctm"].state_dict().items()}
    t.begin("ctm_dsm_gan", t.parts)
    for part in ("model", "target", "ctm"):
        assert all(torch.equal(v, average[k]) for k, v in t.parts[part].state_dict().items()), part


def test_further_averages_are_kept_resumed_and_loaded(tmp_path):
    config = make_config("tiny", [*TINY, "gan.steps=0", "distill.steps=15", "distill.ema=.5", "distill.emas=.2,.9999"])
    straight, cut = Trainer(config, tmp_path / "a"), Trainer(config, tmp_path / "b")
    while straight.step < 27: straight.train_step()
    straight.save()
    for stop in (14, 20, 27):
        while cut.step < stop: cut.train_step()
        cut.save()
        cut = Trainer(config, tmp_path / "b")
    a, b = (load_checkpoint(tmp_path / k / "checkpoints" / "step_00000027") for k in "ab")
    averages = {k for k in a.models if k.startswith("ctm")}
    assert averages == {"ctm", "ctm-0.2", "ctm-0.9999"}
    for k in averages: assert all(torch.equal(v, b.models[k][n]) for n, v in a.models[k].items()), k
    by_rate = [load(tmp_path / "a", which=k) for k in ("ctm-0.2", "ctm", "ctm-0.9999")]
    weights = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()])
    far = [float((weights(m) - weights(straight.parts["model"])).norm()) for m in by_rate]
    assert 0 < far[0] < far[1] < far[2]  # the longer the memory, the farther behind
    with pytest.raises(ValueError, match="holds no 'ctm-0.3' model: it describes .*'ctm-0.2'"):
        load(tmp_path / "a", which="ctm-0.3")
    with pytest.raises(ValueError, match="which must be one of"): load(tmp_path / "a", which="cmt")
    few = [ONE_LEVEL, "distill.steps=15"]
    needs = lambda *words: memory(make_config("tiny", [*few, *words]), straight.data)["ctm_dsm"]
    two_more = 2 * sum(v.nbytes for v in straight.parts["ctm"].state_dict().values())
    assert needs("distill.emas=.2,.9999") - needs() == two_more


def test_compiled_networks_learn_the_same(tmp_path, monkeypatch, caplog):
    "And see batches of one size only: whatever the times of a batch, no code is made after each kind of step was seen."
    from torch._dynamo.utils import counters
    everything_but_code = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", everything_but_code)
    words = [*TINY, "teacher.steps=2", "distill.steps=6", "gan.steps=0"]
    start = lambda c: Trainer(make_config("tiny", [*words, f"run.compile={c}"]), tmp_path / c)
    plain, compiled = start("false"), start("true")
    for n in range(8):
        a, b = plain.train_step(), compiled.train_step()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        if n == 2: made = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == made > 0
    assert "not compiled" not in caplog.text and compiled.parts["model"].net._compiled_call_impl is not None


def test_a_new_student_is_told_what_is_configured_and_an_old_one_what_it_was(undisturbed, tmp_path, monkeypatch):
    from ctm_nb.training import stages
    asked = []
    def find(D, path, times, y):
        asked.append(D(path[:, 0], times[0], y))
        return times[0].item()
    monkeypatch.setattr(stages, "find_sigma_init", find)
    def told(*more):
        config = make_config("tiny", [*TINY, f"teacher.source={undisturbed}", *more])
        return Trainer(config, tmp_path / str(len([*tmp_path.iterdir()]))).parts["ctm"].sigma_init
    assert told("distill.sigma_init=5") == 5 and told("distill.sigma_init=published") is None and not asked
    assert told() is None and told("distill.guidance=3") is None  # none is better than the truth
    assert len(asked) == 2 and not torch.equal(*asked)  # of the guided teacher, where it is guided
    known = load(undisturbed, which="ctm").sigma_init
    assert known and told("distill.sigma_init=5", f"distill.initial={undisturbed}") == known


def test_all_processes_tell_what_the_first_one_found(monkeypatch):
    from ctm_nb.method.trajectory import CTM
    from ctm_nb.networks.unet import MLP
    from ctm_nb.training import runtime
    monkeypatch.setattr(runtime.dist, "broadcast", lambda v, source: None)
    monkeypatch.setattr(runtime.Here, "send", lambda self, value: 5.)
    m = CTM(MLP(2).with_s_branch(), sigma_init=8.)
    runtime.Here(1, 2).same_weights([m])
    assert m.sigma_init == 5


def test_a_given_teacher_is_distilled_and_a_given_student_sharpened(undisturbed, tmp_path):
    from ctm_nb.checkpoints.models import save_model
    models = {which: load(undisturbed, which=which) for which in ("teacher", "ctm")}
    suffixes = {"teacher": ".pt", "ctm": ".safetensors"}
    files = {which: save_model(m, tmp_path / (which + suffixes[which])) for which, m in models.items()}
    given = [*TINY, "run.save_every=1", f"teacher.source={files['teacher']}"]
    t = Trainer(make_config("tiny", given), tmp_path / "t")
    assert (t.stage, t.total) == ("ctm_dsm", 18)
    t.train_step(), t.save()
    for k, v in models["teacher"].state_dict().items(): assert torch.equal(v, t.parts["teacher"].state_dict()[k])
    files["teacher"].rename(tmp_path / "away.pt")  # a run that has begun no longer needs the file
    again = Trainer(make_config("tiny", given), tmp_path / "t")
    assert again.step == 1 and again.train_step()["stage"] == "ctm_dsm"
    (tmp_path / "away.pt").rename(files["teacher"])
    t = Trainer(make_config("tiny", [*given, f"distill.source={files['ctm']}"]), tmp_path / "g")
    assert (t.stage, t.total) == ("ctm_dsm_gan", 9)
    assert torch.equal(t.parts["model"].net.last_layer, load(undisturbed).net.last_layer)
    assert [t.train_step()["stage"] for _ in range(2)] == ["ctm_dsm_gan"] * 2
    with pytest.raises(ValueError, match="not a CTM"):
        Trainer(make_config("tiny", [*given, f"distill.source={files['teacher']}"]), tmp_path / "h")
    with pytest.raises(ValueError, match="given when distill.source is"):
        make_config("tiny", [*TINY, "distill.source=x"])


def test_a_teacher_of_other_pictures_is_refused(undisturbed, tmp_path):
    words = [*TINY, f"data.source={pictures(tmp_path / 'c', 20, 'ab')}", f"teacher.source={undisturbed}"]
    start = lambda *more: Trainer(make_config("tiny", [*words, *more]), tmp_path / "x")
    with pytest.raises(ValueError, match="knows 10 classes, the data have 2"): start()
    with pytest.raises(ValueError, match="data.image_size=8 would resize them$"): start("data.image_size=16")
    with pytest.raises(ValueError) as e: start("data.channels=3")
    assert "image_size" not in str(e.value) and "no setting makes those of colour grey" in str(e.value)
    assert not (tmp_path / "x").exists()


def test_grey_pictures_stored_as_rgb_meet_a_teacher_of_three_channels(tmp_path):
    from PIL import Image
    from ctm_nb.checkpoints.models import save_model
    from ctm_nb.method.teacher import Denoiser
    from ctm_nb.networks.unet import DDPMpp
    (tmp_path / "grey").mkdir()
    for i in range(24): Image.new("RGB", (8, 8), (9 * i,) * 3).save(tmp_path / "grey" / f"{i}.png")
    net = DDPMpp(8, 3, model_channels=8, channel_mult=(1, 1), n_blocks=1, attention=(4,))
    teacher = save_model(Denoiser(net), tmp_path / "teacher.safetensors")
    words = [*TINY, f"data.source={tmp_path / 'grey'}", f"teacher.source={teacher}", "distill.steps=2", "gan.steps=0"]
    with pytest.raises(ValueError, match="data.channels=3 keeps grey images as the teacher takes them"):
        Trainer(make_config("tiny", words), tmp_path / "a")
    t = Trainer(make_config("tiny", [*words, "data.channels=3"]), tmp_path / "b")
    while t.step < t.total: t.train_step()
    t.save()
    assert load(tmp_path / "b").data_shape == (3, 8, 8)


def test_unlabelled_pictures_through_all_stages(tmp_path):
    words = [f"data.source={pictures(tmp_path / 'p', 24)}", "teacher.steps=2", "distill.steps=2", "gan.steps=4"]
    t = Trainer(make_config("tiny", [*TINY, *words]), tmp_path / "r")
    assert t.run() == [] and t.step == 8 and torch.isfinite(t.parts["ctm"].net.last_layer).all()


def test_labels_can_be_ignored(tmp_path, caplog):
    "The same images are held out, nothing of the classes is left, and the plan says so."
    from ctm_nb.commands.train import plan
    from ctm_nb.training.trainer import open_images
    words = lambda v: [*TINY, "teacher.steps=2", f"data.use_labels={v}"]
    with_labels, without = (make_config("tiny", words(v)) for v in ("true", "false"))
    a, b = open_images(with_labels), open_images(without)
    for split in ("train", "held_out"):
        assert torch.equal(a[split].images, b[split].images)
        assert b[split].labels is None and b[split].classes == []
    assert "labels not used (data.use_labels=false)" in plan(without, tmp_path / "r")
    t = Trainer(without, tmp_path / "r")
    t.train_step()
    assert t.parts["teacher"].n_classes == 0 and Trainer(with_labels, tmp_path / "s").parts["teacher"].n_classes == 10
    used = {p: make_config(p, ["data.source=x"]).data.use_labels for p in ("cifar10", "cifar10-cond")}
    assert used == {"cifar10": False, "cifar10-cond": True}
    with pytest.raises(ValueError, match="data.labels must be empty where data.use_labels is false"):
        make_config("tiny", ["data.labels=f", "data.use_labels=false"])


def test_plan_and_progress_speak_of_what_this_command_does(tmp_path, caplog):
    from ctm_nb.commands.train import plan
    config = make_config("tiny", TINY)
    said = {s: plan(config, tmp_path / "r", stage=s) for s in ("teacher", "ctm_dsm", "all")}
    assert "adversary 9 steps" in said["all"]
    assert "adversary none (--stage ctm_dsm ends before it; --stage all adds 9 steps)" in said["ctm_dsm"]
    assert "student   none (--stage teacher ends before it)" in said["teacher"]
    assert "student   9 steps" in said["ctm_dsm"]
    memory = {s: next(l for l in text.splitlines() if l.startswith("memory")) for s, text in said.items()}
    assert [m.count("GiB") for m in memory.values()] == [1, 2, 3]
    with caplog.at_level("INFO"): Trainer(config, tmp_path / "r").run("teacher")
    assert "step 12 of 12," in caplog.text and "of 30" not in caplog.text


def test_a_student_is_trained_without_labels_only_if_its_teacher_was():
    dropped = "distill.label_dropout=.1"
    message = "distill.label_dropout must be 0 for a teacher that has seen no image without its label"
    with pytest.raises(ValueError, match=message): make_config("tiny", [dropped])
    make_config("tiny", [dropped, "teacher.label_dropout=.1"])
    make_config("tiny", [dropped, "teacher.source=x"])
