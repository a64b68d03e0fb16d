"""Folders of diffusers: read to 1e-5 of what the library computes, refused in one line, written and drawn from.

What needs the library is left out where it isn't installed; the golden folders were written by it."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import unet2d as u

from ctm_nb.checkpoints.diffusers import WEIGHTS, diffusers_names, read_unet2d
from ctm_nb.checkpoints.export import diffusers_difference, diffusers_folder
from ctm_nb.checkpoints.foreign import read_safetensors, sniff
from ctm_nb.checkpoints.models import describe, load, save_model
from ctm_nb.commands.convert import ctm_nb_convert
from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.method.sampling import sample
from ctm_nb.method.teacher import Denoiser, ddpm_levels
from ctm_nb.method.trajectory import ConsistencyModel, student_from

PIPELINE = (Path(__file__).parents[2] / "ctm_nb" / "checkpoints" / "pipeline.txt").read_text()
CM, DDPM = u.GOLDEN / "unet2d_cm", u.GOLDEN / "unet2d_ddpm"


def relative(a, b): return float((a - b).detach().norm() / b.norm())


def numbers(folder): return {k: torch.from_numpy(v) for k, v in np.load(folder / "io.npz").items()}


# --- what was read

@pytest.mark.parametrize("folder", [CM, DDPM, CM / "unet"], ids=["pipeline", "one folder", "network"])
def test_golden(folder):
    m, io = load(folder), numbers(DDPM if folder == DDPM else CM)
    assert sniff(folder) == "diffusers" and relative(m.D(io["x"], io["t"], io.get("y")), io["D"]) < 1e-5
    for i, t in enumerate(io["t"]): assert relative(m.D(io["x"], io["t"], io.get("y"))[i], io["D"][i]) < 2e-5, t


def test_a_consistency_model_jumps_to_the_end_and_is_no_teacher(tmp_path):
    m, z = load(CM), torch.randn(3, 2, 3, 8, 8)
    assert type(m) is ConsistencyModel and "consistency model, openai" in m.about and m.n_classes == 5
    noise_fn, y = lambda i, shape: z[i], torch.tensor([3, 1])
    one, two = (sample(m, 2, times=t, gamma=1., y=y, noise_fn=noise_fn) for t in ([80, .002], [80, 1., .002]))
    assert torch.equal(one, m.D(80 * z[0], 80., y))
    assert relative(two, m.D(one + (1 - .002 ** 2) ** .5 * z[1], 1., y)) < 1e-6
    with pytest.raises(ValueError, match="several steps need gamma=1"): sample(m, 2, steps=2)
    own = save_model(m, tmp_path / "own.safetensors")
    assert describe(load(own, which="cm")) == describe(m) and torch.equal(load(own).D(z[0], 80., y), m.D(z[0], 80., y))
    for path in (CM, own):
        for which in ("teacher", "ctm"):
            with pytest.raises(ValueError, match=f"expected a {which}"): load(path, which=which)
    with pytest.raises(ValueError, match=r"write a \.safetensors file"): save_model(m, tmp_path / "x.pt")


def test_a_ddpm_is_a_teacher_with_its_own_levels(tmp_path):
    m, io = load(DDPM, which="teacher"), numbers(DDPM)
    assert type(m) is Denoiser and m.kind == "ddpm epsilon linear 1000 0.0001 0.02" and "interpolated" in m.about
    assert (m.sigma_min, m.sigma_max) == (pytest.approx(.01, rel=1e-3), 80.)
    assert m.c_noise(ddpm_levels(m.kind)[[7, 800]].float(), io["x"][:2]).tolist() == pytest.approx([7, 800], abs=1e-3)
    student = student_from(m)
    assert relative(student.g(io["x"], io["t"], .5 * io["t"]), m.D(io["x"], io["t"])) < 1e-6
    for again in (load(save_model(k, tmp_path / f"{n}.safetensors")) for n, k in enumerate((m, student))):
        assert torch.equal(again.D(io["x"], io["t"]), m.D(io["x"], io["t"])) and again.kind == m.kind
    with pytest.raises(ValueError, match="expected a ctm"): load(DDPM, which="ctm")
    with pytest.raises(ValueError, match="image_size can't be given"): load(DDPM, image_size=8)
    with pytest.raises(ValueError, match=r"write a \.safetensors file"): save_model(m, tmp_path / "x.pt")


def test_commands_take_such_folders(tmp_path, capsys):
    ctm_nb_convert([str(CM)])
    ctm_nb_convert([str(CM), str(tmp_path / "own.safetensors")])
    ctm_nb_sample([str(CM), "-n", "2", "--steps", "2", "--gamma", "1", "--out", str(tmp_path / "x.npz")])
    ctm_nb_sample([str(DDPM), "-n", "2", "--steps", "3", "--out", str(tmp_path / "y.npz")])
    assert "consistency model" in capsys.readouterr().out and np.load(tmp_path / "y.npz")["arr_0"].shape == (2, 8, 8, 3)


# --- what is refused

def changed(source, tmp_path, file, change):
    shutil.copytree(source, folder := tmp_path / "folder")
    value = change(json.loads((folder / file).read_text()))
    (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize("change, said", [
    (dict(down_block_types=["DownBlock2D", "SkipDownBlock2D"]), "has SkipDownBlock2D"),
    (dict(down_block_types="DownBlock2D"), "must be <class .list.>"),
    (dict(down_block_types=["DownBlock2D"]), "must be 2"),
    (dict(down_block_types=[[], {}]), "a block must be one of"),
    (dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "up_block_types must be .'AttnUpBlock2D', 'UpBlock2D'"),
    (dict(downsample_type="resnet", down_block_types=["AttnDownBlock2D"] * 2, up_block_types=["AttnUpBlock2D"] * 2),
     "ways to change the resolution"),
    (dict(block_out_channels=[8, 12]), "multiples of the first"), (dict(block_out_channels=[0, 0]), "multiples"),
    (dict(block_out_channels=[1e3, None]), "multiples"), (dict(block_out_channels=[8] * 99), "multiples"),
    (dict(layers_per_block=10 ** 12), "1 to 64"), (dict(layers_per_block=True), "1 to 64"),
    (dict(layers_per_block=2), "the weights lack"), (dict(norm_eps="1e-6"), "norm_eps"),
    (dict(norm_eps=float("inf")), "norm_eps"), (dict(sample_size=[8, 8]), "sample_size"),
    (dict(sample_size=None), "sample_size"), (dict(sample_size=7), "divisible"),
    (dict(norm_num_groups=5), "norm_num_groups must be 1"), (dict(attn_norm_num_groups=2), "attn_norm_num_groups"),
    (dict(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups must be 4"),
    (dict(resnet_time_scale_shift="ada_group"), "resnet_time_scale_shift"),
    (dict(add_attention=False), "add_attention"), (dict(mid_block_type=None), "mid_block_type"),
    (dict(time_embedding_type="learned"), "time_embedding_type"), (dict(act_fn="gelu"), "act_fn"),
    (dict(time_embedding_dim=64), "time_embedding_dim must be 32"), (dict(class_embed_type="timestep"), "class_embed"),
    (dict(num_class_embeds=9), "lack 'class_embedding.weight'"), (dict(in_channels=1), "out_channels must be 1"),
    (dict(out_channels=5), "out_channels must be 3"), (dict(attention_head_dim=3), "channels_per_head"),
    (dict(_class_name="UNet2DConditionModel"), "can't be read; a UNet2D"),
])
def test_a_network_that_ours_is_not(tmp_path, change, said):
    folder = changed(DDPM, tmp_path, "config.json", lambda c: c | change)
    with pytest.raises(ValueError, match=said) as e: load(folder)
    assert str(e.value).startswith(str(folder)) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, said", [
    (dict(beta_schedule="sigmoid"), "a kind is ddpm"), (dict(beta_schedule=["linear"]), "a kind is ddpm"),
    (dict(beta_end=float("nan")), "a kind is ddpm"), (dict(num_train_timesteps=10 ** 9), "up to 10000"),
    (dict(prediction_type="flow"), "a kind is ddpm"), (dict(prediction_type="epsilon linear"), "a kind is ddpm"),
    (dict(trained_betas=[.1]), "no equivalent of DDPM"), (dict(rescale_betas_zero_snr=True), "no equivalent of DDPM"),
    (dict(timestep_type="continuous"), "no equivalent"),
    (dict(_class_name="EDMEulerScheduler", sigma_min=-1), "sigma_min"),
    (dict(_class_name="EDMEulerScheduler", prediction_type="v_prediction"), "no equivalent of EDMEuler"),
])
def test_a_scheduler_that_we_do_not_have(tmp_path, change, said):
    folder = changed(DDPM, tmp_path, "scheduler_config.json", lambda c: c | change)
    with pytest.raises(ValueError, match=said) as e: load(folder)
    assert str(e.value).startswith(str(folder)) and "\n" not in str(e.value)


@pytest.mark.parametrize("file, text", [("scheduler_config.json", "[1]"), ("scheduler_config.json", "{"),
                                        ("scheduler_config.json", "[" * 10 ** 5), (WEIGHTS, "not a network")])
def test_damage(tmp_path, file, text):
    shutil.copytree(DDPM, folder := tmp_path / "folder")
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=str(folder)) as e: load(folder)
    assert "\n" not in str(e.value)


def test_what_is_missing(tmp_path):
    shutil.copytree(DDPM, folder := tmp_path / "folder")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin"): load(folder)
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="no scheduler_config.json"): load(folder)


def test_a_weight_too_many(tmp_path):
    from safetensors.torch import save_file
    shutil.copytree(DDPM, folder := tmp_path / "folder")
    state = read_safetensors(folder / WEIGHTS)[0]
    save_file(state | {"more.weight": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="no place for 'more.weight'"): load(folder)


def test_older_names_of_attentions_and_torchs_file(tmp_path):
    shutil.copytree(DDPM, folder := tmp_path / "folder")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = read_safetensors(folder / WEIGHTS)[0]
    for new, name in old.items(): state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert sum("query" in k for k in state) == 8
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    io = numbers(DDPM)
    assert torch.equal(load(folder).D(io["x"], io["t"]), load(DDPM).D(io["x"], io["t"]))


# --- beside the library

CASES = {
    "openai": (u.CM, "CMStochasticIterative", {}),
    "openai, LSUN": (u.TINY | u.RESNET, "CMStochasticIterative", dict(sigma_min=.01, sigma_data=.7)),
    "tutorial": (u.TINY | u.CONV, "DDPM", {}),
    "google": (u.DDPM, "DDIM", dict(beta_schedule="scaled_linear")),
    "cosine, v": (u.TINY | u.CONV | dict(in_channels=1, out_channels=1, freq_shift=1, num_class_embeds=3), "DDPM",
                  dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")),
    "x0": (u.TINY | u.CONV | dict(flip_sin_to_cos=False, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
           "DDPM", dict(prediction_type="sample", num_train_timesteps=100)),
    "learned variance": (u.TINY | u.CONV | dict(out_channels=6), "DDPM", dict(variance_type="learned_range")),
    "EDM": (u.TINY | u.RESNET | dict(layers_per_block=2), "EDMEuler", dict(sigma_data=.6)),
}


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_library(tmp_path, name):
    diffusers = pytest.importorskip("diffusers")
    config, scheduler, how = CASES[name]
    net, y = u.unet2d(**config), torch.arange(3) % 3 if config.get("num_class_embeds") else None
    plain = dict(clip_sample=False) if scheduler.startswith("DD") else {}
    scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**how, **plain)
    net.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    m, unit = load(tmp_path), torch.randn(3, config.get("in_channels", 3), 8, 8, generator=torch.manual_seed(1))
    for j in (0, 5, 40, 77):
        if scheduler.config.get("beta_schedule"):
            t = (1 / (1 - scheduler.betas.double()).cumprod(0) - 1).sqrt()[j].float()
            x = unit * (t ** 2 + 1) ** .5
            a = scheduler.alphas_cumprod[j] ** .5
            F = net(a * x, j, y).sample[:, :m.channels]
            assert relative(m.net(a * x, m.c_noise(t, x), y=y), F) < 1e-5, j
            scheduler.set_timesteps(scheduler.config.num_train_timesteps)
            D = u.denoised(net, scheduler, x, j, y)
        else:
            t = torch.tensor(.01 + j)
            x = unit * t
            if m.kind == "cm": D = u.jump(net, scheduler, x, t.expand(3), y)
            else:
                F = net(scheduler.precondition_inputs(x, t), scheduler.precondition_noise(t), y).sample
                D = scheduler.precondition_outputs(x, F, t)
        assert relative(m.D(x, t, y), D) < 1e-5, j


def test_the_pipeline_of_consistency_models_draws_the_same():
    diffusers = pytest.importorskip("diffusers")
    pipe, m = diffusers.ConsistencyModelPipeline.from_pretrained(str(CM)), load(CM)
    pipe.scheduler.register_to_config(clip_denoised=False)
    z, how = torch.randn(2, 3, 8, 8), dict(class_labels=[1, 4], output_type="pt")
    one = pipe(2, latents=z.clone(), **how).images
    mine = sample(m, 2, y=torch.tensor([1, 4]), noise_fn=lambda i, shape: z)
    assert ((mine / 2 + .5).clamp(0, 1) - one).abs().max() < 1e-5
    two = pipe(2, num_inference_steps=None, timesteps=[22, 0], latents=z.clone(), generator=torch.manual_seed(7), **how)
    fresh = torch.randn(2, 2, 3, 8, 8, generator=torch.manual_seed(7))
    grid = pipe.scheduler.sigmas.tolist()
    draw = lambda i, shape: z if i == 0 else fresh[i - 1]
    mine = sample(m, 2, times=grid, gamma=1., y=torch.tensor([1, 4]), noise_fn=draw)
    assert ((mine / 2 + .5).clamp(0, 1) - two.images).abs().max() < 1e-5


# --- written

@pytest.fixture
def library(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield diffusers
    sys.path[:] = [p for p in sys.path if p != str(tmp_path / "modules")]
    for name in [k for k in sys.modules if k.startswith("diffusers_modules")]: del sys.modules[name]


def students(untrained_run, folder):
    "A student without labels, one with, and a consistency model."
    for classes in ([], ["a", "b", "c"]):
        yield load(untrained_run(folder / f"run{len(classes)}", 1 + 2 * bool(classes), classes))
    yield load(CM)


def test_a_pipeline_draws_what_we_draw(library, tmp_path, untrained_run):
    for n, m in enumerate(students(untrained_run, tmp_path)):
        folder = diffusers_folder(m, tmp_path / str(n), config={"run": {"seed": n}})
        assert describe(load(folder)) == describe(m) and load(folder, which=None).about.startswith(str(folder))
        for more in ({}, dict(custom_pipeline=str(folder))):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                library.DiffusionPipeline.from_pretrained(str(folder), **more)
            pipe = library.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **more)
        pipe.set_progress_bar_config(disable=True)
        gamma, z = (1. if isinstance(m, ConsistencyModel) else .3), torch.randn(3, 4, *m.data_shape)
        for k, y in ((1, None), (3, 0 if m.n_classes else None)):
            draw = lambda i, shape: z[0] if i == 0 else torch.randn(shape, generator=g)
            g = torch.manual_seed(5)
            mine = sample(m, 4, k, gamma, y=y, noise_fn=draw)
            how = dict(latents=z[0], class_labels=y, num_inference_steps=k, gamma=gamma, output_type="pt")
            got = pipe(4, generator=torch.manual_seed(5), **how).images
            assert ((mine / 2 + .5).clamp(0, 1) - got).abs().max() < 1e-5
        assert diffusers_difference(m, folder) < 1e-5


def test_forms_and_seeds(library, tmp_path, untrained_run):
    m = load(untrained_run(tmp_path / "run", 1, ["a", "b"]))
    pipe = library.DiffusionPipeline.from_pretrained(str(diffusers_folder(m, tmp_path / "d")), trust_remote_code=True)
    pt, np_, pil = (pipe(2, generator=torch.manual_seed(3), output_type=k).images for k in ("pt", "np", "pil"))
    assert pt.shape == (2, 1, 8, 8) and np_.shape == (2, 8, 8, 1) and [p.size for p in pil] == [(8, 8)] * 2
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), np_)
    assert abs(np.asarray(pil[0]) - 255 * np_[0, ..., 0]).max() <= .501
    each = pipe(2, generator=[torch.Generator().manual_seed(k) for k in (3, 4)], output_type="pt").images
    alone = pipe(1, class_labels=1, generator=torch.manual_seed(4), output_type="pt", return_dict=False)[0]
    assert (each[1:] - alone).abs().max() < 1e-6 and not torch.equal(each[0], each[1])
    assert pipe(2, times=[80, 1, .002], output_type="pt").images.shape == pt.shape
    assert pipe.to(torch.bfloat16)(2, output_type="pt").images.dtype == torch.float32


def test_the_command(library, tmp_path, untrained_run, capsys):
    run, out = untrained_run(tmp_path / "run", 3, ["a", "b"]), tmp_path / "out"
    ctm_nb_convert([str(run), f"diffusers:{out}"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"written: {out}" and float(said[2].rsplit(maxsplit=1)[1]) < 1e-5 and "by diffusers" in said[2]
    assert sniff(out) == "diffusers" and load(out).classes == ["a", "b"]
    for words, why in (([], "exists; --overwrite"), (["--overwrite", "--steps", "2"], "--steps is for")):
        with pytest.raises(SystemExit): ctm_nb_convert([str(run), f"diffusers:{out}", *words])
        assert why in capsys.readouterr().err
    ctm_nb_convert([str(run), f"diffusers:{out}", "--overwrite"])


@pytest.mark.parametrize("there", ["pipeline.py", "model_index.json", "ctm/notes.txt"])
def test_a_folder_of_somebody_else_is_never_written_into(tmp_path, untrained_run, capsys, there):
    run, file = untrained_run(tmp_path / "run", 1, []), tmp_path / "mine" / there
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as e: ctm_nb_convert([str(run), f"diffusers:{tmp_path / 'mine'}", *more])
        assert e.value.code == 2 and "mine is no pipeline of ours" in capsys.readouterr().err
    assert [f for f in (tmp_path / "mine").rglob("*") if f.is_file()] == [file] and file.read_text() == "precious"


def test_without_the_library_the_folder_is_written_and_not_tried(tmp_path, untrained_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ctm_nb_convert([str(untrained_run(tmp_path / "run", 1, [])), f"diffusers:{tmp_path / 'out'}"])
    assert "not tried: trying its folder needs the package diffusers: pip install diffusers" in capsys.readouterr().out
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == [f"ctm/{WEIGHTS}", "ctm/pipeline.py", "model_index.json", "pipeline.py"]


def test_a_teacher_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="only a student"): diffusers_folder(load(DDPM), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_our_package_the_pipeline_says_what_to_install(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(sys.modules, "ctm_nb", None)
    with pytest.raises(ImportError, match="pip install ctm_nb") as e: exec(compile(PIPELINE, "pipeline.py", "exec"), {})
    assert "\n" not in str(e.value)


def test_every_weight_of_theirs_has_one_place():
    about, state = read_unet2d(CM)
    from ctm_nb.networks.families import build_network
    names = diffusers_names(build_network(**about["network"]))
    assert set(names) == set(state)
    assert sorted(k for row in names.values() for k in row) == sorted(read_safetensors(CM / "unet" / WEIGHTS)[0])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CTM_SLOW"), reason="CTM_SLOW=1 runs it")
def test_the_published_size(library, tmp_path):
    net, scheduler = u.unet2d(**u.IMAGENET), library.CMStochasticIterativeScheduler()
    for part, at in ((net, "unet"), (scheduler, "scheduler")): part.save_pretrained(tmp_path / at)
    m = load(tmp_path, which="cm")
    assert "conventions" not in m.net.config and sum(p.numel() for p in m.net.parameters()) == net.num_parameters()
    x, t, y = torch.randn(1, 3, 64, 64), torch.tensor([2.]), torch.tensor([7])
    with torch.no_grad(): assert relative(m.D(x, t, y), u.jump(net, scheduler, x, t, y)) < 1e-5
    del net
    assert diffusers_difference(m, diffusers_folder(m, tmp_path / "out")) < 1e-5
