"""Rules on labels, test-time mirroring, and thresholds tuned on cases that were held out."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from benchmarks.recipe_effects import specks
from datamodules.readers.brats_files import brats_task
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.evaluation.tuning import HeldOut, Tuned, best_threshold
from lightning_modules.inferers import Mirrored, SliceWise, Whole, Window
from lightning_modules.postprocessing import PostProcessing

BRATS = brats_task("2020")
NCR, ED, ET = 1, 2, 3


def volume(*boxes):
    """Labels (20, 20, 20) with boxes of (class, slices)."""
    labels = torch.zeros(20, 20, 20, dtype=torch.int8)
    for value, *where in boxes:
        labels[tuple(slice(a, b) for a, b in where)] = value
    return labels


def island(voxels, value=ED):
    """A row of so many voxels far from everything else."""
    return (value, (18, 19), (0, voxels), (18, 19))


# components


def test_an_island_of_nine_goes_and_one_of_ten_stays():
    body = (ED, (2, 8), (2, 8), (2, 8))
    rules = PostProcessing(min_component={"WT": 10})
    assert torch.equal(rules.labels(volume(body, island(9)), BRATS), volume(body))
    assert torch.equal(rules.labels(volume(body, island(10)), BRATS), volume(body, island(10)))


def test_corners_join_components_as_the_connectivity_says():
    labels = volume((ED, (0, 2), (0, 2), (0, 2)), (ED, (2, 4), (2, 4), (2, 4)))  # two cubes of 8 that meet in a corner
    assert torch.equal(PostProcessing({"WT": 10}).labels(labels, BRATS), labels)
    assert not PostProcessing({"WT": 10}, connectivity=2).labels(labels, BRATS).any()


def test_what_leaves_an_inner_region_stays_in_the_outer_one():
    body = (ED, (2, 10), (2, 10), (2, 10))
    labels = volume(body, (ET, (3, 4), (3, 4), (3, 4)), (NCR, (6, 9), (6, 9), (6, 9)))
    changed = PostProcessing(min_component={"TC": 5}).labels(labels, BRATS)
    assert torch.equal(changed, volume(body, (NCR, (6, 9), (6, 9), (6, 9))))  # the lone voxel of the core becomes edema
    whole = PostProcessing(min_component={"WT": 5}).labels(labels, BRATS)
    assert torch.equal(whole, labels)


# volumes


@pytest.mark.parametrize(("voxels", "stays"), [(199, False), (200, True)])
def test_enhancing_tumor_below_200_voxels_becomes_necrosis(voxels, stays):
    labels = volume((ED, (0, 20), (0, 20), (0, 14)), (NCR, (1, 19), (1, 19), (1, 12)))
    labels[2:12, 2:7, 2:6] = ET  # 200
    if voxels == 199:
        labels[2, 2, 2] = NCR
    changed = PostProcessing(min_volume={"ET": 200}).labels(labels, BRATS)
    before, after = BRATS.region_masks(labels), BRATS.region_masks(changed)
    assert torch.equal(before[:2], after[:2])
    assert after[2].sum() == (200 if stays else 0)
    assert (changed[labels == ET] == (ET if stays else NCR)).all()


def test_components_go_before_volumes_are_measured():
    """Enhancing tumor of 8 voxels in the body and of 4 in an island: 12 together, 8 once the island is gone."""
    body = [(ED, (2, 8), (2, 8), (2, 8)), (ET, (3, 5), (3, 5), (3, 5))]
    labels = volume(*body, island(4, ET))
    both = PostProcessing(min_component={"WT": 5}, min_volume={"ET": 10}).labels(labels, BRATS)
    assert torch.equal(both, volume(body[0], (NCR, (3, 5), (3, 5), (3, 5))))
    assert (PostProcessing(min_volume={"ET": 10}).labels(labels, BRATS) == ET).sum() == 12


def test_empty_and_members_and_what_is_left_alone():
    rules = PostProcessing({"WT": 10}, {"ET": 200})
    empty = volume()
    assert torch.equal(rules.labels(empty, BRATS), empty)
    small = volume(island(3))
    regions = torch.rand(3, 20, 20, 20)
    prediction = rules(Prediction(regions, small, members={"a": Prediction(labels=small), "b": Prediction(scores=regions[0])}), BRATS)
    assert not prediction.labels.any()
    assert not prediction.members["a"].labels.any()
    assert prediction.members["b"].labels is None
    assert prediction.regions is regions
    assert small.any()  # the original is not written to


def test_an_outermost_region_below_its_volume_becomes_background():
    task = Task(channels=("t1",), classes={"background": 0, "lesion": 1})
    labels = torch.zeros(4, 4, 4, dtype=torch.int8)
    labels[0, 0, :3] = 1
    assert not PostProcessing(min_volume={"lesion": 4}).labels(labels, task).any()
    assert torch.equal(PostProcessing(min_volume={"lesion": 3}).labels(labels, task), labels)


def test_wrong_rules_are_refused(tmp_path):
    with pytest.raises(SuiteError, match="E T"):
        PostProcessing({"E T": 3}).labels(volume(), BRATS)
    with pytest.raises(SuiteError, match=r"min_volume\.ET=-1"):
        PostProcessing(min_volume={"ET": -1})
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "absent.json"):
        with pytest.raises(SuiteError, match=name):
            PostProcessing(thresholds=tmp_path / name)
    assert not PostProcessing().active
    assert PostProcessing({"WT": 10}).active


@pytest.mark.parametrize(("layout", "value"), [("2020", 4), ("2021", 4), ("2023", 3)])
def test_values_on_disk_follow_the_year(layout, value):
    task = brats_task(layout)
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.int8)
    written = task.to_disk(labels.numpy())
    assert written.tolist() == [0, 1, 2, value]
    assert np.array_equal(task.from_disk(written), labels.numpy())
    emptied = PostProcessing(min_volume={"ET": 2}).labels(labels.reshape(4, 1, 1), task)
    assert task.to_disk(emptied.numpy()).ravel().tolist() == [0, 1, 2, 1]


# the tuner


def case(name, volume, kept, dropped, run="r0"):
    return HeldOut(run, name, name, volume, kept, dropped)


HELD_OUT = [case("a", 5, 0.0, 1.0), case("b", 40, 0.0, 1.0), case("c", 60, 0.5, 0.0), case("d", 300, 0.8, 0.0), case("e", 0, 1.0, 1.0)]


def test_best_threshold_by_hand():
    """Dropping a and b, which have no enhancing tumor, gives 1 each; from 61 on it costs c, from 301 on d as well."""
    threshold, tried = best_threshold(HELD_OUT)
    assert tried == pytest.approx({0: 2.3 / 5, 1: 2.3 / 5, 6: 3.3 / 5, 41: 4.3 / 5, 61: 3.8 / 5, 301: 3.0 / 5})
    assert threshold == 41
    threshold, tried = best_threshold(HELD_OUT, [0, 10, 50, 100, 200])
    assert threshold == 50
    assert tried == pytest.approx({0: 0.46, 10: 0.66, 50: 0.86, 100: 0.76, 200: 0.76})


def test_the_smallest_of_equal_thresholds_and_none_that_hurts():
    assert best_threshold(HELD_OUT[4:], [10, 50])[0] == 0
    assert best_threshold(HELD_OUT[2:4], [10, 50, 100])[0] == 0
    distances = [case("a", 5, 373.0, 0.0), case("c", 60, 2.0, 373.0)]
    assert best_threshold(distances, [0, 10, 100], lower_is_better=True)[0] == 10


def test_what_the_tuner_writes_is_what_postprocessing_reads(tmp_path):
    found = Tuned("ET", "dice", 50, 0.46, 0.86, 0.7, ["p1", "p2"], ["r0", "r1"], {0: 0.46, 50: 0.86})
    path = found.write(tmp_path / "thresholds.json")
    rules = PostProcessing(min_volume={"ET": 7, "WT": 3}, thresholds=path)
    assert rules.rules["min_volume"] == {"ET": 50, "WT": 3}
    assert rules.chosen_on == {"p1", "p2"}
    assert json.loads(path.read_text())["tried"] == {"0": 0.46, "50": 0.86}
    assert "0.4600 -> 0.8600" in found.report()
    assert "0.7000" in found.report()


def test_a_threshold_chosen_on_one_half_raises_the_dice_of_the_other():
    """The first seeds of the table in docs/methods/nnunet_region_loss_ensemble.md: cases without enhancing tumor, and false specks of it."""
    rows = list(islice(specks(), 2))
    assert all(row["gain"] > 0.03 for row in rows), rows
    assert all(row["after"] < 1 for row in rows)


# mirroring


def slanted(view):
    """A network that no mirroring leaves alone: every voxel takes from its neighbors before it along each axis."""
    maps = view[:, :1].clone()
    for axis in range(2, view.ndim):
        maps = maps + 0.5 ** (axis - 1) * view[:, :1].roll(1, axis)
    return {"probabilities": maps, "more": view.mean(1, keepdim=True)}


INFERERS = {"whole": Whole(4), "window": Window((6, 6, 6)), "slice": SliceWise(4, batch=3)}


@pytest.mark.parametrize("name", INFERERS)
def test_a_mirrored_case_gives_the_mirrored_result(name):
    image = torch.rand(1, 2, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    mirrored = Mirrored(INFERERS[name])
    result = mirrored(image, slanted, 2)
    for dims in ([2], [3], [4], [2, 3, 4]):
        assert torch.allclose(mirrored(image.flip(dims), slanted, 2)["probabilities"], result["probabilities"].flip(dims), atol=1e-5)
    assert not torch.allclose(INFERERS[name](image, slanted, 2)["probabilities"], result["probabilities"], atol=1e-3)
    assert torch.allclose(result["more"], image.mean(1, keepdim=True), atol=1e-5)  # a symmetric answer is what it was


def test_mirroring_by_hand():
    image = torch.tensor([1.0, 2, 4]).reshape(1, 1, 3, 1, 1)

    def first(view):  # the value of the first voxel, at its place
        maps = torch.zeros_like(view)
        maps[:, :, 0] = view[:, :, 0]
        return {"probabilities": maps}

    assert Mirrored(Whole(1), [0])(image, first)["probabilities"].flatten().tolist() == [0.5, 0, 2]
    assert image.flatten().tolist() == [1, 2, 4]
    calls = []
    Mirrored(Whole(1), [0, 2])(image, lambda view: calls.append(1) or {"probabilities": view})
    assert len(calls) == 4


@pytest.mark.parametrize("axes", [[], [0, 0], [3]])
def test_axes_that_do_not_exist(axes):
    with pytest.raises(SuiteError, match="mirror"):
        Mirrored(Whole(1), axes)
