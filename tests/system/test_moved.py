"""Modules of 0.1: every old path either goes on working for a release or says where its contents are; importing a room
imports nothing else."""
import importlib
import subprocess
import sys

import pytest

from ctm_nb._moved import GONE, MOVED, WORKING

ROOMS = ("data", "networks", "training", "evaluation", "commands")
# every module of 0.1, and something that was in it or has taken its place
HELD = dict(word.split("=") for word in (
    "blocks=ResBlock networks=UNet flow=rho_grid edm=Denoiser trajectory=CTM together=average_gradients "
    "distances=pseudo_huber distill=ctm_loss features=augment gan=gan_turn sampling=gamma_sample "
    "guidance=Guided decode=open_image zips=read_entry sources=Source formats=open_npz survey=survey "
    "convert=convert data=ImageData augment=draw_parameters loader=load_splits pictures=named_grid "
    "state=EMA depickle=ForeignFileError edm_pickle=read_legacy foreign=sniff download=DownloadError "
    "hub=catalogue_table interchange=load metrics=frechet_distance similarity=kernel_distance "
    "extractors=Extractor references=read_reference evaluation=score classifier=draw_samples "
    "containers=WRITERS search=search_times tuning=search_times draw=draw_samples shares=Ranks "
    "ways=Request sides=Evaluator likelihood=ode_bits scoring=evaluate auto=choose config=make_config "
    "precision=choose_precision processes=join signals=Signals guards=Guard resume=check_changes "
    "judge=no_scores_because stages=make_network update=apply_gradient engine=open_images "
    "training=Trainer history=read_run report=write_report watch=follow scale=memory cli=ctm_nb_train "
    "cli_sample=ctm_nb_sample cli_evaluate=ctm_nb_evaluate cli_data=ctm_nb_data "
    "cli_convert=ctm_nb_convert commands=main scenes=Scene explorer=explore_flow "
).split())


@pytest.mark.parametrize("old", [m for m in MOVED if m not in (*WORKING, *ROOMS)])
def test_an_old_path_names_the_new_one(old):
    for code in (f"import ctm_nb.{old}", f"from ctm_nb import {old}"):
        with pytest.raises(ImportError, match=f"^ctm_nb.{old} is now ctm_nb.{MOVED[old]}$"): exec(code, {})
    importlib.import_module(f"ctm_nb.{MOVED[old]}")


def test_the_new_place_holds_what_the_old_module_held():
    assert HELD.keys() == MOVED.keys()
    for old, name in HELD.items(): assert hasattr(importlib.import_module(f"ctm_nb.{MOVED[old]}"), name), (old, name)


@pytest.mark.parametrize("old", GONE)
def test_an_old_path_that_left_the_package_says_where_its_code_went(old):
    for code in (f"import ctm_nb.{old}", f"from ctm_nb import {old}"):
        with pytest.raises(ImportError, match=GONE[old]): exec(code, {})


@pytest.mark.parametrize("old", WORKING)
def test_three_modules_go_on_working(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"ctm_nb.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"ctm_nb.{old} is now"):
        module = importlib.import_module(f"ctm_nb.{old}")
    assert module is importlib.import_module(f"ctm_nb.{MOVED[old]}")


@pytest.mark.parametrize(
    "room, name",
    [
        ("data", "to_uint8"),
        ("networks", "DDPMpp"),
        ("training", "Trainer"),
        ("evaluation", "score"),
        ("commands", "overview"),
    ],
)
def test_five_rooms_hand_on_the_names_of_the_module_they_are_called_after(room, name):
    with pytest.warns(DeprecationWarning, match=f"ctm_nb.{room}.{name} is now"):
        value = getattr(importlib.import_module(f"ctm_nb.{room}"), name)
    assert value is getattr(importlib.import_module(f"ctm_nb.{MOVED[room]}"), name)
    with pytest.raises(AttributeError, match="nothing"): _ = importlib.import_module(f"ctm_nb.{room}").nothing


@pytest.mark.parametrize("room", ["ctm_nb", "ctm_nb.method", "ctm_nb.data", "ctm_nb.networks", "ctm_nb.commands"])
def test_a_room_imports_nothing_else(room):
    code = (f"import sys, {room}; print([m for m in sys.modules if m.startswith('ctm_nb.') and m not in "
            f"('ctm_nb._moved', {room!r})], 'torch' in sys.modules)")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "[] False"
    )


def test_what_has_moved_on_is_offered_by_its_room():
    from ctm_nb.networks import build_network
    from ctm_nb.networks.families import build_network as here
    assert build_network is here


def test_load_and_sample_are_offered_by_the_package_and_by_their_rooms():
    import ctm_nb
    from ctm_nb.checkpoints import load
    from ctm_nb.method import sample
    assert ctm_nb.load is load and ctm_nb.sample is sample
