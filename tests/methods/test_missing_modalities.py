"""Modality dropout in training samples, and tests of a checkpoint with subsets of its modalities."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from datamodules.preprocessing import Preprocessing
from datamodules.split import Split
from lesionbench.checkpoint import read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.jobs.command_line import CONF
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules import MissingModalities
from lightning_modules.inferers import Mirrored
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import composed, rows, run, run_folders
from tests.test_samples import dataset, module

SHAPE = (14, 12, 10)
CHANNELS = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 6, channels=CHANNELS, shape=SHAPE)


def samples(root, dropout: float, count: int = 60, **options) -> list[dict]:
    data = module(root, channels=list(CHANNELS), channel_dropout=dropout, **options)
    return [dataset(data)[(0, n)] for n in range(count)]


@pytest.mark.parametrize("view", ["patch", "slice", "voxels"])
def test_dropped_channels_are_zero_and_nothing_else_changes(root, view):
    whole, dropped = samples(root, 0.0, view=view), samples(root, 0.4, view=view)
    shares = []
    for a, b in zip(whole, dropped, strict=True):
        kept = b["channel_mask"]
        assert a["channel_mask"].all()
        assert kept.any()
        images = [x["image"].movedim(-1, 0) if view == "voxels" else x["image"] for x in (a, b)]
        for channel, there in enumerate(kept):
            assert torch.equal(images[1][channel], images[0][channel] * there)
        assert torch.equal(a["label"], b["label"])
        assert a["case"] == b["case"]
        shares.append(kept.float().mean().item())
    assert np.mean(shares) == pytest.approx(0.6 + 0.4**4 / 4, abs=0.08)
    assert len({tuple(b["channel_mask"].tolist()) for b in dropped}) > 6


def test_dropout_belongs_to_the_sample(root):
    first, second = samples(root, 0.4, 12), samples(root, 0.4, 12)
    assert all(
        torch.equal(a["channel_mask"], b["channel_mask"]) and torch.equal(a["image"], b["image"])
        for a, b in zip(first, second, strict=True)
    )
    other = samples(root, 0.4, 12, seed=1)
    assert [a["channel_mask"].tolist() for a in first] != [b["channel_mask"].tolist() for b in other]


def test_one_channel_always_stays_and_it_is_one_that_the_case_has(tmp_path):
    root = write_fake_folder(tmp_path, 4, channels=CHANNELS, shape=SHAPE)
    incomplete = {"case_00", "case_01"}  # of four, one of which is tested on
    for case in incomplete:
        (root / "images" / f"{case}_t1.nii.gz").unlink()
    found = samples(root, 0.99, split=Split(test=1, val=0), preprocessing=Preprocessing(allow_missing=True))
    assert all(s["channel_mask"].sum() >= 1 for s in found)
    assert np.mean([float(s["channel_mask"].sum()) for s in found]) < 1.2
    assert not any(s["channel_mask"][0] for s in found if s["case"] in incomplete)
    assert len({int(s["channel_mask"].float().argmax()) for s in found}) == 4
    found = samples(root, 0.3, split=Split(test=1, val=0), preprocessing=Preprocessing(allow_missing=True))
    assert not any(s["channel_mask"][0] for s in found if s["case"] in incomplete)
    assert any(s["channel_mask"][0] for s in found if s["case"] not in incomplete)
    assert incomplete & {s["case"] for s in found}


def test_evaluation_and_repeated_samples_keep_all(root):
    data = module(root, channels=list(CHANNELS), channel_dropout=0.9)
    assert all(b["channel_mask"].all() for b in data.test_dataloader())
    assert all(s["channel_mask"].all() for s in samples(root, 0.9, 8, repeat=2))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_is_a_probability(root, dropout):
    with pytest.raises(SuiteError, match="channel_dropout"):
        module(root, channel_dropout=dropout)


# subsets at test time

TINY = [
    "experiment=modality_pairing/toy_missing", "threads=1", "epochs=1", "data.samples_per_epoch=8", "data.count=5", "data.split.test=2",
    "model.network.widths=[4,4,4]", "model.scheduler.warmup_epochs=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """The folder of a small run of the experiment."""
    folder = tmp_path_factory.mktemp("missing")
    run(*TINY, f"data.root={folder / 'data'}", f"runs={folder / 'runs'}")
    (found,) = [f for f in run_folders(folder / "runs") if (f / "test").exists()]
    return found


def test_every_subset_is_a_member(tested):
    names = {"+".join(s) for n in (1, 2, 3) for s in combinations(("flair", "t2", "t1", "t1ce"), n)}
    assert {r["member"] for r in rows(tested)} == {"", *names}
    assert len(names) == 14


def test_subsets_see_only_their_modalities(tested):
    checkpoint = str(tested / "checkpoints" / "last.ckpt")
    task = Task.from_dict(read_checkpoint(checkpoint)["lesionbench"]["task"])
    tester = MissingModalities(task, checkpoint=checkpoint, subsets=[["t1ce", "flair"], ["t2"]])
    seen = {}

    def spy(batch):
        seen[tuple(batch["channel_mask"][0].tolist())] = batch["image"]
        return Prediction(labels=batch["image"][0].sum(dim=0))

    tester.__dict__["_modules"]["method"] = SimpleNamespace(predict_case=spy)
    image = torch.randn(1, 4, 4, 4, 1)
    batch = {"image": image, "channel_mask": torch.tensor([[True, True, True, False]])}  # the case itself has no t1ce
    prediction = tester.predict_case(batch)
    assert list(prediction.members) == ["flair+t1ce", "t2"]
    assert torch.equal(seen[True, True, True, False], image)
    assert torch.equal(seen[True, False, False, False], image * torch.tensor([1.0, 0, 0, 0])[:, None, None, None])
    assert torch.equal(seen[False, True, False, False], image * torch.tensor([0, 1.0, 0, 0])[:, None, None, None])


def test_mirroring_reaches_the_method_under_test(tested):
    task = Task(("flair", "t2", "t1", "t1ce"), {"background": 0, "ed": 2, "et": 4}, {"WT": ("ed", "et"), "ET": ("et",)})
    tester = MissingModalities(task, checkpoint=str(tested / "checkpoints" / "last.ckpt"), subsets=[])
    tester.mirror([0, 1])
    assert isinstance(tester.method.inferer, Mirrored)


def test_wrong_subsets_are_refused(tested):
    task = Task(("flair", "t2", "t1", "t1ce"), {"background": 0, "ed": 2, "et": 4})
    for subset, says in [(["flair", "pd"], "pd"), ([], "empty")]:
        with pytest.raises(SuiteError, match=says):
            MissingModalities(task, checkpoint=str(tested / "checkpoints" / "last.ckpt"), subsets=[subset])


# one training for each subset


def test_ablation_is_one_sweep_over_all_subsets():
    cfg = OmegaConf.load(CONF / "sweep" / "modality_ablation.yaml")
    assert cfg.hydra.mode == "MULTIRUN"
    ((key, values),) = cfg.hydra.sweeper.params.items()
    swept = list(OverridesParser.create().parse_override(f"{key}={values}").sweep_string_iterator())
    tried = [list(composed("benchmark=brats2020", "model=supervised", f"{key}={value}").data.task.channels) for value in swept[::5]]
    assert tried == [["t1"], ["t1", "t2"], ["t1", "t1ce", "t2"]]
    subsets = [frozenset(value.strip("[]").split(",")) for value in swept]
    assert len(subsets) == 15
    assert set(subsets) == {frozenset(s) for n in (1, 2, 3, 4) for s in combinations(CHANNELS, n)}


def test_narrowed_network_reads_just_those_files(tmp_path):
    root = write_fake_brats(tmp_path / "brats", "2020", 4)
    common = [
        "experiment=modality_pairing/brats2020", "debug=tiny", "trainer=cpu", "augmentation=none", "model.network.widths=[4,4,4]", f"data.root={root}",
        "patch=[16,16,16]", "model.scheduler.warmup_epochs=0", "threads=1",
    ]  # fmt: skip
    scores = []
    for name in ("all", "cut"):
        run(*common, "task.channels=[flair,t1ce]", f"runs={tmp_path / name}", f"data.cache={tmp_path / 'cache' / name}")
        (folder,) = run_folders(tmp_path / name)
        scores.append([(r["case"], r["region"], r["dice"]) for r in rows(folder)])
        for path in root.rglob("*_t2.nii.gz"):  # unselected: not even looked at
            path.unlink()
    assert scores[0] == scores[1]
