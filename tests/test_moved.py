"""What was written, hashed or typed with the names of commit 0c4dcb1 goes on working."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lesionbench.checkpoint import build_method, load_method
from lesionbench.errors import SuiteError
from lesionbench.installation import CONF
from lesionbench.jobs.command_line import renamed
from lesionbench.jobs.run_folder import RunFolder, variant_hash
from lesionbench.moved import ARGUMENTS, CHOICES, EXPERIMENTS, KEYS, TARGETS, current, recorded, words
from lesionbench.task import Task
from tests.harness import composed, shared

RECORDED = json.loads(
    (Path(__file__).parent / "recorded" / "variant_hashes.json").read_text()
)  # of every experiment, by that commit's code
TASK = Task(("t1", "flair"), {"background": 0, "core": 1, "edema": 2}, {"WT": ("core", "edema"), "CORE": ("core",)})
RATERS = Task(("t1",), {"background": 0, "lesion": 1}, {"WT": ("lesion",)}, raters=3)

INFERER = {"_target_": "lightning_modules.inferers.SliceWise", "batch": 2}
LOSS = {"_target_": "lightning_modules.losses.DiceCE"}
UNET = {
    "_target_": "lightning_modules.networks.BranchedUNet",
    "_partial_": True,
    "dimensions": 2,
    "features": [4, 8],
    "heads": 1,
    "norm": "batch",
}
CORANET_MASK = {"_target_": "lightning_modules.certainty_masks.ConservativeRadical"}
# one model configuration of each family, in the words of that commit
OLD = {
    "supervised": (TASK, {
        "_target_": "lightning_modules.Supervised", "loss": LOSS, "inferer": {"_target_": "lightning_modules.inferers.PackWise", "k": 3, "batch": 2},
        "network": {"_target_": "lightning_modules.networks.WindowChannels", "_partial_": True, "window": 3, "network": UNET},
    }),
    "semi_supervised": (TASK, {"_target_": "lightning_modules.CrossPseudo", "network": UNET, "loss": LOSS, "inferer": INFERER}),
    "virtual_adversarial": (TASK, {
        "_target_": "lightning_modules.VirtualAdversarial", "network": UNET, "loss": LOSS, "inferer": INFERER,
        "vat": {"_target_": "lightning_modules.losses.VAT", "_partial_": True},
    }),
    "coranet": (TASK, {"_target_": "lightning_modules.CoraNet", "network": {**UNET, "heads": 3}, "loss": LOSS, "inferer": INFERER, "mask": CORANET_MASK}),
    "anomaly": (TASK.narrowed(regions=["WT"]), {"_target_": "lightning_modules.FlairThreshold", "threshold": 0.5}),
    "raters": (RATERS, {
        "_target_": "lightning_modules.MultiRater", "network": UNET, "loss": LOSS, "inferer": INFERER, "readings": ["expectation"],
        "target": {"_target_": "lightning_modules.rater_targets.AgreementClasses", "_partial_": True},
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", OLD)
def test_a_checkpoint_in_the_old_names_loads_with_its_weights(family, tmp_path):
    task, config = OLD[family]
    torch.manual_seed(1)
    method = build_method(current(config), task)
    if family == "raters":
        method.target.learn("a", torch.zeros(3, 4, 4, 4, dtype=torch.int8))
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    checkpoint["lesionbench"]["model"] = config
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded, own = load_method(tmp_path / "old.ckpt")
    assert own["model"] == current(config) != config or family == "anomaly"
    for name, weight in method.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


EXPECTED_STATE = json.loads((Path(__file__).parent / "recorded" / "state_names.json").read_text())


@pytest.mark.parametrize("family", EXPECTED_STATE)
def test_names_in_the_state_are_those_of_the_recorded_checkpoints(family):
    task, config = OLD[family]
    assert {k: list(v.shape) for k, v in build_method(current(config), task).state_dict().items()} == EXPECTED_STATE[family]


@pytest.mark.parametrize("experiment", RECORDED)
def test_runs_keep_their_folder(experiment, monkeypatch):
    monkeypatch.setenv("LESIONBENCH_DATA", "/where/data/lie")  # which is not what is computed
    cfg = shared(*words(f"experiment={experiment}"))
    assert variant_hash(cfg) == RECORDED[experiment]


def test_there_and_back():
    for _, config in OLD.values():
        assert recorded(current(config)) == config
        assert current(current(config)) == current(config)
    foreign = {"_target_": "their.Network", "window": 3, "view": "window"}
    assert current(foreign) == foreign


def test_words_of_the_command_line():
    assert words("experiment=agreement/ellipses") == ["experiment=multi_rater/ellipses"]
    assert words("data.window=7") == ["data.slab=7"]
    assert words("model/network=unet,branched_unet") == ["model/network=unet,multi_head_unet"]
    assert words("model/network@model.network.network=branched_unet") == ["model/network@model.network.network=multi_head_unet"]
    assert words("+model@missing=vat") == ["+model@missing=virtual_adversarial_training"]
    assert words("callbacks=[default,reliability]") == ["callbacks=[default,uncertainty_calibration]"]
    assert words("~callbacks.reliability.bins") == ["~callbacks.uncertainty_calibration.bins"]
    for untouched in (
        "seed=1", "-m", "data.windows=3", "model=supervised", "runs=cps/acdc", "model/network@model.network.network=unet",
        "experiment=coranet/acdc", "experiment=supervised/nothing", "experiment=none",
    ):  # fmt: skip
        assert words(untouched) == [untouched]


def test_a_choice_of_ones_own_keeps_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vat.yaml").touch()
    assert words("model=vat,cps", tmp_path) == ["model=vat,cross_pseudo_supervision"]


def test_every_new_name_exists():
    for group, names in CHOICES.items():
        for old, new in names.items():
            if group != "data.view":
                assert (CONF / group / f"{new}.yaml").is_file(), new
                assert not (CONF / group / f"{old}.yaml").exists(), old


def test_experiments_that_are_a_benchmark_and_a_model(tmp_path):
    assert words("experiment=cps/acdc") == ["benchmark=acdc", "model=cross_pseudo_supervision"]
    assert words("experiment=vat/simulated") == ["benchmark=simulated_few_labels", "model=virtual_adversarial_training"]
    assert words("experiment=full_supervision/blobs") == ["benchmark=blobs_full", "model=supervised"]
    assert words("experiment=mean_teacher/blobs,ua_mt/blobs") == ["benchmark=blobs", "model=mean_teacher,ua_mt"]
    assert words("experiment=supervised/brats2018,supervised/brats2020") == ["benchmark=brats2018,brats2020", "model=supervised"]
    (tmp_path / "experiment" / "mean_teacher").mkdir(parents=True)
    (tmp_path / "experiment" / "mean_teacher" / "acdc.yaml").touch()  # one's own goes first
    assert words("experiment=mean_teacher/acdc", tmp_path) == ["experiment=mean_teacher/acdc"]


def test_a_sweep_that_is_several_now_says_which():
    with pytest.raises(SuiteError) as caught:
        words("experiment=supervised_only/blobs,full_supervision/blobs,cps/blobs,coranet/blobs")
    assert str(caught.value).splitlines()[1:] == [
        "  experiment=coranet/blobs",
        "  benchmark=blobs model=supervised,cross_pseudo_supervision",
        "  benchmark=blobs_full model=supervised",
    ]


def test_what_was_renamed_is_said(capsys):
    assert renamed(["-m", "model=vat", "seed=1"]) == ["-m", "model=virtual_adversarial_training", "seed=1"]
    assert capsys.readouterr().err == "model=vat is now called model=virtual_adversarial_training\n"
    assert renamed(["experiment=supervised/acdc", "model=ua_mt"]) == ["benchmark=acdc", "model=ua_mt"]  # the one that is named wins


def test_a_run_begun_under_the_old_name_is_resumed(tmp_path, monkeypatch):
    monkeypatch.delenv("LESIONBENCH_RUN_FOLDER", raising=False)
    cfg = composed("experiment=multi_rater/ellipses", f"runs={tmp_path}")
    old = tmp_path / "agreement" / "ellipses" / variant_hash(cfg) / "seed=0"
    old.mkdir(parents=True)
    assert RunFolder.of(cfg, resume=True).path == old


def test_the_table_ends_with_the_next_release():
    """Old names of experiments and options are answered for one release."""
    assert version("lesionbench").startswith("0.1") or not (EXPERIMENTS or CHOICES or KEYS)
    assert TARGETS
    assert ARGUMENTS
