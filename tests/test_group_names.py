"""Groups of runs are named by what a person types to get them."""

import pytest
from omegaconf import OmegaConf

from lesionbench.reports.group_names import group_names
from tests.harness import composed


def names(settings, *keys):
    return [name.text for name in group_names(settings, keys)]


def configuration(*overrides):
    return OmegaConf.to_container(composed(*overrides), resolve=True)


@pytest.mark.parametrize(
    ("choice", "others"),
    [
        ("model=supervised", ()),
        ("model=coranet", ("benchmark=acdc",)),
        ("model=coranet_code", ("benchmark=acdc",)),
        ("model/network=basic_unet", ()),
        ("model/network=small_unet", ()),
        ("model/network=noisy", ()),
        ("model/network=thick_2d_noisy", ()),  # differs from noisy in the network inside alone
        ("model/network=unet", ("model.network.dropout=0.5",)),
        ("model/network=basic_unet", ("model.network.features=[8,8,8,8,8,8]",)),  # small_unet is made from it
        ("model/loss=dice", ()),
        ("model/optimizer=sgd", ("model.optimizer.lr=0.5",)),
        ("data=blobs", ()),
        ("data=brats2021", ()),
    ],
)
def test_a_target_is_named_by_the_choice_that_gives_it(choice, others):
    config = configuration("run_folder=run", choice, *others)
    place = choice.partition("=")[0].replace("/", ".")
    assert names([config], f"{place}._target_") == names([config], place) == [choice]


def test_a_class_that_no_choice_gives_keeps_its_name():
    settings = [{"model": {"network": {"_target_": target}, "_target_": "mine.Method"}} for target in ("mine.Net", "other.Net")]
    expected = ["model.network._target_=mine.Net", "model.network._target_=other.Net"]
    assert names(settings, "model.network._target_") == expected
    assert names(settings, "model._target_", "model.network._target_") == [f"model._target_=mine.Method, {name}" for name in expected]


def test_runs_of_one_class_that_come_from_several_choices_are_named_by_the_class():
    settings = [configuration("run_folder=run", f"model/network={name}") for name in ("basic_unet", "small_unet")]
    assert names(settings, "model.network._target_") == ["model.network._target_=lightning_modules.networks.basic_unet"] * 2
    assert names(settings, "model.network") == ["model/network=basic_unet", "model/network=small_unet"]


def test_runs_of_one_choice_that_differ_otherwise_are_told_apart():
    settings = [{"model": {"loss": {"_target_": "lightning_modules.losses.Focal", "gamma": gamma}}} for gamma in (7, 8)]
    assert names(settings, "model.loss._target_") == ["model/loss=focal"] * 2
    assert len(set(names(settings, "model.loss"))) == 2


def test_different_values_have_different_names():
    values = [
        None,
        "None",
        "null",
        "(none)",
        "",
        1,
        "1",
        1.0,
        True,
        "true",
        [1, 2],
        "[1, 2]",
        {"a": 1},
        "a, b",
        1e-4,
        "x: y",
        "%",
        "plain text/a-b",
    ]
    named = names([{"model": {"key": value}} for value in values] + [{"model": {}}], "model.key")
    assert len(set(named)) == len(values) + 1
    assert named[:3] == ["model.key=null", "model.key=None", 'model.key="null"']
    assert named[-2:] == ["model.key=plain text/a-b", "without model.key"]


def test_keys_that_a_run_lacks_are_left_out_and_experiments_stand_alone():
    settings = [
        {"experiment": "a/b", "model": {"_target_": "lightning_modules.Supervised"}},
        {"experiment": "a/b", "model": {"_target_": "lightning_modules.ModalityPairing", "mp_weight": 0.5}},
        {"experiment": "a/b", "model": {"_target_": "lightning_modules.ModalityPairing", "mp_weight": None}},
    ]
    assert names(settings, "experiment", "model._target_", "model.mp_weight") == [
        "a/b, model=supervised",
        "a/b, model=modality_pairing, model.mp_weight=0.5",
        "a/b, model=modality_pairing, model.mp_weight=null",
    ]
