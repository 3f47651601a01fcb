"""Metrics against hand-computed numbers, limiting cases, invariances, and MONAI where the suite promises to equal it."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from scipy import ndimage

from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.results import read_rows, write_rows
from lesionbench.task import Task
from lightning_modules.metrics import (
    CaseMetrics,
    PerCaseResults,
    auroc,
    average_precision,
    brier_score,
    calibration_error,
    grid_diagonal,
    lesion_counts,
    lesion_dice,
    lesion_f1,
    overlap_metrics,
    q_dice,
    qu_brats,
    surface_distances,
    surface_metrics,
    volume_recall_rate,
)
from lightning_modules.metrics import lesions as lesions_module
from lightning_modules.metrics import surface as surface_module
from lightning_modules.metrics.agreement import PAPER_THRESHOLDS
from lightning_modules.metrics.box import bounding_box
from lightning_modules.metrics.lesions import components
from lightning_modules.metrics.surface import surface

BRATS = {"background": 0, "ncr": 1, "ed": 2, "et": 4}
DISTANCES = ("hd95", "hd95_pooled", "hd", "asd", "asd_directed")
REGIONS = {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)}


def brats_task(**options):
    return Task(("flair",), BRATS, REGIONS, **options)


def mask(shape, *boxes):
    """A mask with boxes, each given as one (start, stop) per axis."""
    array = np.zeros(shape, bool)
    for box in boxes:
        array[tuple(slice(*b) for b in box)] = True
    return array


def blobs(seed, shape=(26, 22, 18)):
    """Irregular class maps that overlap in part: (prediction, truth) with classes 0..3."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    maps = []
    for _ in range(2):
        center = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        radius = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, center, strict=True))) + rng.normal(0, 0.7, shape)
        maps.append(sum((radius < r).astype(np.int8) for r in (7.5, 5, 3)))
    return maps


def row_of(rows, region, member=""):
    (row,) = [r for r in rows if r["region"] == region and r["member"] == member]
    return row


# ---------------------------------------------------------------- overlap


def test_overlap_by_hand():
    prediction = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    truth = np.array([0, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    assert overlap_metrics(prediction, truth) == pytest.approx(
        {"dice": 4 / 7, "jaccard": 2 / 5, "sensitivity": 1 / 2, "precision": 2 / 3, "specificity": 5 / 6, "volume_difference": -1 / 4}
    )
    assert overlap_metrics(prediction, truth, total=15)["specificity"] == pytest.approx(10 / 11)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (0, 0, {"dice": 1, "jaccard": 1, "sensitivity": math.nan, "precision": math.nan, "specificity": 1, "volume_difference": 0}),
        (1, 0, {"dice": 0, "jaccard": 0, "sensitivity": math.nan, "precision": 0, "specificity": 0.75, "volume_difference": math.nan}),
        (0, 1, {"dice": 0, "jaccard": 0, "sensitivity": 0, "precision": math.nan, "specificity": 1, "volume_difference": -1}),
    ],
)
def test_overlap_of_empty_masks(prediction, truth, expected):
    masks = [np.array([x, 0, 0, 0], bool) for x in (prediction, truth)]
    assert overlap_metrics(*masks) == pytest.approx(expected, nan_ok=True)


def test_specificity_without_background_is_nan():
    assert math.isnan(overlap_metrics(np.ones(3, bool), np.ones(3, bool))["specificity"])


# ---------------------------------------------------------------- surface


def test_bounding_box():
    assert bounding_box(mask((5, 6, 7), [(1, 3), (2, 3), (4, 7)])) == (slice(1, 3), slice(2, 3), slice(4, 7))
    assert bounding_box(mask((5, 5), [(0, 1), (4, 5)], [(3, 4), (0, 1)])) == (slice(0, 4), slice(0, 5))
    assert np.zeros((3, 3), bool)[bounding_box(np.zeros((3, 3), bool))].size == 0


def test_surface_of_a_cube_and_at_the_border():
    cube = mask((7, 7, 7), [(1, 6)] * 3)
    assert surface(cube).sum() == 5**3 - 3**3
    assert not surface(cube)[3, 3, 3]
    assert surface(np.ones((4, 4, 4), bool)).sum() == 4**3 - 2**3  # beyond the grid is outside
    assert surface(mask((5, 5), [(0, 5), (1, 4)])).sum() == 12
    rng = np.random.default_rng(0)
    noise = rng.random((9, 8, 7)) < 0.8
    assert np.array_equal(surface(np.asfortranarray(noise)), surface(noise))
    assert np.array_equal(surface(noise[::-1, :, ::-1]), surface(noise)[::-1, :, ::-1])
    assert np.array_equal(surface(noise.transpose(2, 0, 1)), surface(noise).transpose(2, 0, 1))


def test_surface_metrics_of_two_rows_by_hand():
    # In a row one voxel wide all is surface. Forth: 0, 0, 0, 1 (x = 0 to 3 against 0 to 2, 9); back: 0, 0, 0, 6.
    prediction, truth = mask((10, 1), [(0, 4), (0, 1)]), mask((10, 1), [(0, 3), (0, 1)], [(9, 10), (0, 1)])
    forth, back = surface_distances(prediction, truth, (2.0, 1.0))
    assert sorted(forth) == [0, 0, 0, 2]
    assert sorted(back) == [0, 0, 0, 12]
    found = surface_metrics(prediction, truth, (2.0, 1.0), tolerance=2.0)
    assert found == pytest.approx(
        {
            "hd95": 12 * 0.85,  # position 0.95 * 3 = 2.85 between 0 and 12
            "hd95_pooled": 2 + 10 * 0.65,  # position 0.95 * 7 = 6.65 between 2 and 12
            "hd": 12,
            "asd": 14 / 8,
            "asd_directed": 2 / 4,
            "surface_dice": 7 / 8,
        }
    )
    assert surface_metrics(prediction, truth, (2.0, 1.0), ["surface_dice"], tolerance=1.9) == {"surface_dice": 6 / 8}


def test_shifted_cube_has_its_shift_as_distance():
    cube, shifted = mask((20, 20, 20), [(5, 12)] * 3), mask((20, 20, 20), [(8, 15), (5, 12), (5, 12)])
    assert surface_metrics(cube, shifted, (1, 1, 1), ["hd"])["hd"] == 3
    assert surface_metrics(cube, shifted, (2.5, 1, 1), ["hd"])["hd"] == pytest.approx(7.5)


def test_identical_masks_are_at_distance_zero():
    truth = blobs(0)[1] > 0
    assert surface_metrics(truth, truth, (1, 1, 1)) == {**dict.fromkeys(DISTANCES, 0), "surface_dice": 1}


def test_a_detached_false_voxel_counts_twice_as_much_in_the_directed_distance():
    # medpy.metric.binary.asd(prediction, truth) and .assd
    truth = mask((30, 30, 30), [(5, 10)] * 3)
    prediction = truth | mask((30, 30, 30), [(20, 21), (7, 8), (7, 8)])
    assert surface_metrics(prediction, truth, (1, 1, 1), ["asd", "asd_directed"]) == pytest.approx(
        {"asd": 11 / 197, "asd_directed": 11 / 99}
    )
    assert surface_metrics(truth, prediction, (1, 1, 1), ["asd_directed"]) == {"asd_directed": 0}


def test_empty_masks_follow_brats():
    none, one = np.zeros((240, 240, 155), bool), mask((240, 240, 155), [(3, 5)] * 3)
    assert grid_diagonal((240, 240, 155), (1, 1, 1)) == pytest.approx(373.13, abs=0.005)
    assert surface_metrics(none, none, (1, 1, 1)) == {**dict.fromkeys(DISTANCES, 0), "surface_dice": 1}
    for pair in [(none, one), (one, none)]:
        found = surface_metrics(*pair, (1, 1, 1))
        assert found.pop("surface_dice") == 0
        assert found == pytest.approx(dict.fromkeys(DISTANCES, 373.13), abs=0.005)
        assert surface_metrics(*pair, (1, 1, 1), ["hd95"], empty=50.0) == {"hd95": 50}


@pytest.mark.parametrize("limit", [0, 10**9])
def test_surface_distances_do_not_depend_on_method_crop_flip_or_memory_order(monkeypatch, limit):
    spacing = (0.7, 1.3, 2.5)
    prediction, truth = (m > 0 for m in blobs(1))
    expected = surface_metrics(prediction, truth, spacing)
    monkeypatch.setattr(surface_module, "TREE_LIMIT", limit)
    monkeypatch.setattr(surface_module, "SPARSE", math.inf)
    assert surface_metrics(prediction, truth, spacing) == pytest.approx(expected, rel=1e-5)
    padded = [np.pad(m, ((3, 0), (1, 9), (2, 4))) for m in (prediction, truth)]
    assert surface_metrics(*padded, spacing) == pytest.approx(expected, rel=1e-5)
    assert surface_metrics(prediction[::-1, :, ::-1], truth[::-1, :, ::-1], spacing) == pytest.approx(expected, rel=1e-5)
    assert surface_metrics(np.asfortranarray(prediction), truth, spacing) == pytest.approx(expected, rel=1e-5)
    swapped = [m.transpose(2, 0, 1) for m in (prediction, truth)]
    assert surface_metrics(*swapped, (2.5, 0.7, 1.3)) == pytest.approx(expected, rel=1e-5)
    symmetric = set(expected) - {"asd_directed"}
    assert surface_metrics(truth, prediction, spacing, symmetric) == pytest.approx({name: expected[name] for name in symmetric}, rel=1e-5)


def test_the_transform_is_exact_on_cubic_voxels(monkeypatch):
    prediction, truth = (m > 0 for m in blobs(1))
    expected = surface_distances(prediction, truth, (1.3, 1.3, 1.3))
    monkeypatch.setattr(surface_module, "TREE_LIMIT", 0)
    monkeypatch.setattr(surface_module, "SPARSE", math.inf)
    for found, exact in zip(surface_distances(prediction, truth, (1.3, 1.3, 1.3)), expected, strict=True):
        assert np.abs(found - exact).max() < 1e-12


def test_large_dense_surfaces_use_the_transform_and_others_trees(monkeypatch):
    used = []
    for name in ("_by_tree", "_by_transform"):
        original = getattr(surface_module, name)
        monkeypatch.setattr(surface_module, name, lambda *a, n=name, f=original: used.append(n) or f(*a))
    checkers = np.indices((44, 44, 44)).sum(axis=0) % 2 == 0
    surface_distances(checkers, ~checkers, (1, 1, 1))
    prediction, truth = (m > 0 for m in blobs(1))
    surface_distances(prediction, truth, (1, 1, 1))
    assert used == ["_by_transform"] * 2 + ["_by_tree"] * 2


def test_equal_to_monai():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    task = brats_task()
    names = ["hd95", "hd", "asd"]
    for seed, spacing in [(0, (1.0, 1.0, 1.0)), (1, (0.7, 1.3, 2.5)), (2, (3.0, 0.9, 0.9))]:
        prediction, truth = (torch.from_numpy(m) for m in blobs(seed))
        rows = CaseMetrics(names)(Prediction(labels=prediction), truth, task, spacing)
        masks = [task.region_masks(m)[None] for m in (prediction, truth)]
        options = {"include_background": True, "spacing": spacing}
        expected = {
            "hd95_mm": compute_hausdorff_distance(*masks, percentile=95, **options)[0],
            "hd_mm": compute_hausdorff_distance(*masks, **options)[0],
            "asd_mm": compute_average_surface_distance(*masks, symmetric=True, **options)[0],
        }
        for index, region in enumerate(task.region_names):
            row = row_of(rows, region)
            assert {k: row[k] for k in expected} == pytest.approx({k: float(v[index]) for k, v in expected.items()}, abs=1e-3)


# ---------------------------------------------------------------- lesions


def test_lesion_counts_by_hand():
    # Three true lesions: one hit well, one touched by a voxel, one missed; one made-up lesion.
    truth = mask((12, 12), [(0, 4), (0, 2)], [(0, 2), (6, 10)], [(8, 10), (8, 10)])
    prediction = mask((12, 12), [(0, 4), (0, 1)], [(1, 4), (9, 11)], [(8, 9), (0, 2)])
    assert lesion_counts(prediction, truth) == (2, 1, 1)
    assert lesion_f1(prediction, truth) == pytest.approx(4 / 6)
    assert lesion_counts(prediction, truth, min_iou=0.5) == (1, 2, 2)  # 4/8 is reached, 1/13 is not
    assert lesion_counts(prediction, truth, min_iou=0.51) == (0, 3, 3)


@pytest.mark.parametrize("few_runs", [0.1, 1e9])
def test_components_are_those_of_scipy_in_the_same_order(monkeypatch, few_runs):
    monkeypatch.setattr(lesions_module, "FEW_RUNS", few_runs)  # run by run, and not
    rng = np.random.default_rng(0)
    for number in range(120):
        noise = rng.random(rng.integers(1, 12, 2 + number % 2)) < rng.choice([0, 0.05, 0.2, 0.6, 1])
        noise = noise.T if number % 3 else noise
        labels, n = components(noise)
        expected, same = ndimage.label(noise, np.ones((3,) * noise.ndim))
        assert n == same
        assert np.array_equal(labels, expected)


def test_lesions_connect_over_corners():
    diagonal = mask((4, 4, 4), [(0, 1)] * 3, [(1, 2)] * 3)
    assert lesion_counts(np.zeros((4, 4, 4), bool), diagonal) == (0, 1, 0)


def test_lesion_dice_by_hand():
    # Lesion A (8 voxels) overlaps by 4 a predicted lesion of 6: 2*4/14. Lesion B (4) is missed: 0. One false lesion: 0.
    truth = mask((12, 12), [(0, 4), (0, 2)], [(8, 10), (8, 10)])
    prediction = mask((12, 12), [(0, 2), (0, 3)], [(8, 9), (0, 2)])
    assert lesion_dice(prediction, truth) == pytest.approx((8 / 14 + 0 + 0) / 3)
    assert lesion_dice(truth, truth) == 1
    # A predicted lesion that spans two true ones counts in full for each.
    bridge = mask((3, 8), [(0, 1), (0, 8)])
    assert lesion_dice(bridge, mask((3, 8), [(0, 1), (0, 2)], [(0, 1), (6, 8)])) == pytest.approx((4 / 10 + 4 / 10) / 2)


def test_lesion_dice_dilation_joins_neighbors_and_forgives_near_misses():
    truth = mask((9, 20), [(4, 5), (2, 4)], [(4, 5), (6, 8)])
    only_first = mask((9, 20), [(4, 5), (2, 4)])
    assert lesion_dice(only_first, truth) == pytest.approx(1 / 2)  # two lesions, one found
    assert lesion_dice(only_first, truth, dilation=1) == pytest.approx(4 / 6)  # one lesion of 4 voxels, half of it found
    near = mask((9, 20), [(4, 5), (2, 4)], [(5, 6), (9, 10)])  # a corner away from the lesion, and the only false one
    assert lesion_dice(near, truth) == pytest.approx(1 / 3)
    assert lesion_dice(near, truth, dilation=2) == pytest.approx(4 / 7)  # joins the lesion's partners instead of being false
    assert lesion_dice(np.pad(near, 5), np.pad(truth, 5), dilation=2) == pytest.approx(4 / 7)


@pytest.mark.parametrize("measure", [lesion_f1, lesion_dice])
def test_lesions_of_empty_masks(measure):
    none, one = np.zeros((5, 5, 5), bool), mask((5, 5, 5), [(1, 3)] * 3)
    assert measure(none, none) == 1
    assert measure(one, none) == 0
    assert measure(none, one) == 0


# ---------------------------------------------------------------- uncertainty


def test_calibration_by_hand():
    probability = np.array([0.1, 0.1, 0.1, 0.1, 0.8, 0.8, 1.0])
    truth = np.array([0, 0, 0, 1, 1, 1, 0], bool)
    # bins of 0.2: four voxels |0.1 - 0.25|; the last, 1 included: three voxels |2.6/3 - 2/3|
    assert calibration_error(probability, truth, bins=5) == pytest.approx((4 * 0.15 + 0.6) / 7)
    assert brier_score(probability, truth) == pytest.approx((3 * 0.01 + 0.81 + 0.04 + 0.04 + 1) / 7)
    chosen = np.array([1, 1, 0, 0, 0, 0, 0], bool)
    assert calibration_error(probability, truth, chosen) == pytest.approx(0.1)
    assert brier_score(probability, truth, chosen) == pytest.approx(0.01)
    assert math.isnan(calibration_error(probability, truth, np.zeros(7, bool)))
    assert math.isnan(brier_score(probability, truth, np.zeros(7, bool)))


def test_calibration_equals_torchmetrics_and_falls_when_calibrated():
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    probability = rng.random(20_000, dtype=np.float32)
    truth = rng.random(20_000) < probability**2
    expected = binary_calibration_error(torch.from_numpy(probability), torch.from_numpy(truth).int(), n_bins=15)
    assert calibration_error(probability, truth) == pytest.approx(float(expected), abs=1e-6)
    assert calibration_error(probability**2, truth) < 0.02 < 0.1 < calibration_error(probability, truth)


# a true positive, a missed voxel, a true positive and a false one, four true negatives
UNCERTAINTY = np.array([0, 20, 60, 100, 0, 80, 0, 0], np.float32)
PREDICTED = np.array([1, 0, 1, 1, 0, 0, 0, 0], bool)
TRUE = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)


def test_qu_brats_by_hand():
    # kept at 0: one of two true positives, three of four true negatives; at 50 the missed voxel too; at 100 all
    found = qu_brats(UNCERTAINTY, PREDICTED, TRUE, (0, 50, 100))
    parts = {"dice": (1 / 2 + 2 / 3 + 2 / 3 / 2) / 2, "ftp": (1 / 4 + 1 / 2 + 0) / 2, "ftn": (1 / 8 + 1 / 4 + 0) / 2}
    assert found == pytest.approx({"score": (0.75 + 0.625 + 0.8125) / 3, **parts})
    assert qu_brats(UNCERTAINTY, PREDICTED, TRUE)["dice"] == pytest.approx((19.5 + 40 * 2 / 3 + 40 * 4 / 5 + 0.5 * 2 / 3) / 100)


def test_qu_brats_rewards_doubt_where_it_is_wrong_and_costs_where_it_is_right():
    wrong = PREDICTED != TRUE
    assert qu_brats(np.where(wrong, 100.0, 0.0), PREDICTED, TRUE)["score"] == pytest.approx(1, abs=2e-3)  # but at 100
    sure = qu_brats(np.zeros(8), PREDICTED, TRUE)
    assert sure == pytest.approx({"score": (2 / 3 + 2) / 3, "dice": 2 / 3, "ftp": 0, "ftn": 0})
    reversed_ = qu_brats(np.where(wrong, 0.0, 100.0), PREDICTED, TRUE)
    assert (reversed_["ftp"], reversed_["ftn"]) == pytest.approx((0.995, 0.995))
    assert reversed_["score"] < 0.01 < sure["score"]


def test_qu_brats_of_empty_masks():
    nothing, everything = np.zeros(8, bool), np.ones(8, bool)
    perfect = {"score": 1, "dice": 1, "ftp": 0, "ftn": 0}
    assert qu_brats(np.zeros(8), nothing, nothing) == perfect
    assert qu_brats(np.zeros(8), everything, everything) == perfect  # no true negative to lose
    false = qu_brats(UNCERTAINTY, PREDICTED, nothing, (0, 50, 100))  # a false voxel is kept at every threshold: Dice 0
    assert (false["dice"], false["ftp"]) == (0, 0)
    doubted = qu_brats(np.where(PREDICTED, 60.0, 0.0), PREDICTED, nothing, (0, 50, 100))  # all false voxels go: Dice 1, then 0
    assert doubted["dice"] == pytest.approx(0.75)
    gone = qu_brats(np.full(8, 60.0), TRUE, TRUE, (0, 50, 100))  # nothing is kept: Dice 1, but all is lost
    assert gone == pytest.approx({"score": (1 + 0.25 + 0.25) / 3, "dice": 1, "ftp": 0.75, "ftn": 0.75})
    assert all(math.isnan(v) for v in qu_brats(np.zeros(0), np.zeros(0, bool), np.zeros(0, bool)).values())


def test_auroc_and_average_precision_by_hand():
    scores, labels = np.array([1, 2, 3, 4]) / 4, np.array([0, 1, 0, 1], bool)
    assert auroc(scores, labels) == 0.75
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    tied, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1], bool)
    assert auroc(tied, labels) == 0.875  # a tie counts half
    assert average_precision(tied, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert auroc(np.ones(4), labels) == 0.5
    assert average_precision(np.ones(4), labels) == 0.5
    assert auroc(-tied, labels) == pytest.approx(1 - 0.875)
    assert auroc(np.exp(3 * tied), labels) == 0.875


def test_auroc_without_errors_or_with_errors_only_is_nan():
    scores = np.arange(4.0)
    assert math.isnan(auroc(scores, np.zeros(4, bool)))
    assert math.isnan(auroc(scores, np.ones(4, bool)))
    assert math.isnan(average_precision(scores, np.zeros(4, bool)))
    assert average_precision(scores, np.ones(4, bool)) == 1


def test_auroc_equals_counting_pairs():
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 6, (5, 8)), rng.random((5, 8)) < 0.3
    pairs = scores[labels][:, None] - scores[~labels][None]
    assert auroc(scores, labels) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())


# ---------------------------------------------------------------- agreement


def test_vr70():
    assert volume_recall_rate([0.9, 0.7, 0.69, 0.2]) == 0.5
    assert volume_recall_rate([0.9, math.nan]) == 1
    assert math.isnan(volume_recall_rate([math.nan]))


def test_vr70_of_results_is_the_share_of_volumes_with_enough_recall():
    """Ten true voxels, of which 9, 7 (just enough), 6 and 2 are found; a case without truth has no recall and does not count."""
    task = Task(("t1",), {"background": 0, "lesion": 1})
    values = []
    for found, true in ((9, 10), (7, 10), (6, 10), (2, 10), (5, 0)):
        prediction, truth = torch.zeros(3, 4, 5, dtype=torch.int8), torch.zeros(3, 4, 5, dtype=torch.int8)
        prediction.view(-1)[:found], truth.view(-1)[:true] = 1, 1
        (row,) = CaseMetrics(["vr70"])(Prediction(labels=prediction), truth, task, (1, 1, 1))
        values.append(row["vr70"])
    assert values[:4] == [1, 1, 0, 0]
    assert math.isnan(values[4])
    assert np.nanmean(values) == volume_recall_rate([0.9, 0.7, 0.6, 0.2, math.nan]) == 0.5


def test_q_dice_by_hand():
    votes, graded = np.array([1, 2 / 3, 1 / 3, 0]), np.array([1.0, 1, 0, 0])
    assert q_dice(votes, votes) == 1
    assert q_dice(graded, votes) == pytest.approx((3 * 0.8 + 3 * 1 + 3 * 2 / 3) / 9)
    assert q_dice(graded, votes, PAPER_THRESHOLDS) == pytest.approx(0.84)
    assert q_dice(np.zeros(4), votes) == 0
    assert q_dice(np.zeros(4), votes, PAPER_THRESHOLDS) == pytest.approx(0.1)


def test_q_dice_of_empty_levels_and_strictness():
    votes = np.array([0.5, 0.5, 0, 0])
    assert q_dice(np.zeros(4), votes, empty=1.0) == pytest.approx(4 / 9)  # levels above 0.5 are empty in both
    assert q_dice(np.zeros(4), votes, empty=math.nan) == 0
    assert q_dice(votes, np.array([0.5, 0, 0, 0]), [0.5], strict=False) == pytest.approx(2 / 3)
    assert q_dice(votes, np.array([0.5, 0, 0, 0]), [0.5], strict=True) == 1


@pytest.mark.parametrize("raters", range(2, 8))
def test_q_dice_counts_votes_at_their_threshold_whatever_the_rounding(raters):
    for votes in range(1, raters):
        for tenth in range(1, 10):
            if votes * 10 == tenth * raters:
                for share in (votes / raters, np.float32(votes / raters), sum([1 / raters] * votes)):
                    assert q_dice(np.array([share]), np.ones(1), [tenth / 10]) == 1
                    assert q_dice(np.array([share]), np.ones(1), [tenth * 0.1], strict=True) == 0


# ---------------------------------------------------------------- one case


def test_case_rows_by_hand():
    task = brats_task()
    truth, labels = torch.zeros(6, 6, 6, dtype=torch.int8), torch.zeros(6, 6, 6, dtype=torch.int8)
    truth[1:5, 1:5, 1:5] = 2
    truth[2:4, 2:4, 2:4] = 3
    labels[1:5, 1:5, 1:3] = 2
    rows = CaseMetrics(["dice", "hd95", "sensitivity", "specificity", "volume", "volume_difference", "vr70"])(
        Prediction(labels=labels), truth, task, (1, 1, 2)
    )
    assert [(r["member"], r["region"]) for r in rows] == [("", "WT"), ("", "TC"), ("", "ET")]
    assert row_of(rows, "WT") == pytest.approx(
        {
            **{"member": "", "region": "WT", "dice": 2 * 32 / 96, "hd95_mm": 4.0, "sensitivity": 0.5, "specificity": 1.0},
            **{"volume_ml": 0.064, "truth_volume_ml": 0.128, "volume_difference": -0.5, "vr70": 0.0},
        }
    )
    diagonal = math.sqrt(36 + 36 + 144)
    assert row_of(rows, "ET") == pytest.approx(
        {
            **{"member": "", "region": "ET", "dice": 0.0, "hd95_mm": diagonal, "sensitivity": 0.0, "specificity": 1.0},
            **{"volume_ml": 0.0, "truth_volume_ml": 0.016, "volume_difference": -1.0, "vr70": 0.0},
        }
    )
    assert all(type(v) in (str, float) for row in rows for v in row.values())


def test_default_metrics_and_units():
    labels = torch.from_numpy(blobs(0)[0])
    (row, *_) = CaseMetrics()(Prediction(labels=labels), labels, brats_task(), (2, 2, 2))
    assert list(row) == ["member", "region", "dice", "hd95_mm", "sensitivity", "specificity", "precision", "volume_difference"]
    moved = labels.roll(2, 0)
    names = ["hd", "hd95", "hd95_pooled", "asd", "volume"]
    (mm, *_) = CaseMetrics(names)(Prediction(labels=moved), labels, brats_task(), (2, 2, 2))
    (vox, *_) = CaseMetrics(names)(Prediction(labels=moved), labels, brats_task(unit="vox"), (2, 2, 2))
    for name in names[:-1]:
        assert mm[f"{name}_mm"] == pytest.approx(2 * vox[f"{name}_vox"])
    assert mm["volume_ml"] == pytest.approx(vox["volume_vox"] * 0.008)
    assert vox["volume_vox"] == vox["truth_volume_vox"] == int((labels > 0).sum())


@pytest.mark.parametrize(("empty", "expected"), [("diagonal", math.sqrt(300)), (12.5, 12.5), ("nan", math.nan)])
def test_distance_of_an_empty_region_is_configurable(empty, expected):
    truth, nothing = torch.zeros(10, 10, 10, dtype=torch.int8), torch.zeros(10, 10, 10, dtype=torch.int8)
    truth[4, 4, 4] = 3
    metrics = CaseMetrics(["hd95", "asd"], empty_distance=empty)
    row = row_of(metrics(Prediction(labels=nothing), truth, brats_task(), (1, 1, 1)), "ET")
    assert [row["hd95_mm"], row["asd_mm"]] == pytest.approx([expected] * 2, nan_ok=True)
    row = row_of(metrics(Prediction(labels=nothing), nothing, brats_task(), (1, 1, 1)), "ET")
    assert [row["hd95_mm"], row["asd_mm"]] == [0, 0]


ALL = ["dice", "jaccard", "sensitivity", "precision", "specificity", "volume_difference", "vr70", "volume", "hd95", "hd95_pooled"]
ALL += [
    "hd",
    "asd",
    "asd_directed",
    "surface_dice",
    "lesion_dice",
    "lesion_f1",
    "brats2023",
    "brats2026",
    "brats2026_mets",
    "ece",
    "brier",
    "q_dice",
    "q_dice_paper",
    "auroc",
    "ap",
    "error_auroc",
    "qu_brats",
]


def full_prediction(labels, seed=0):
    """A prediction with every part, whose maps belong to `labels`."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(labels.shape, generator=generator) for _ in range(5)]
    regions = (0.6 * brats_task().region_masks(labels) + 0.4 * torch.stack(noise[:3])).clamp(0, 1)
    return Prediction(regions=regions, labels=labels, scores=labels + noise[3], uncertainty={"entropy": noise[4]}, table={"risk": 0.25})


def test_ignored_voxels_count_nowhere():
    labels, truth = (torch.from_numpy(m) for m in blobs(4, (14, 12, 12)))
    inside = (slice(1, 12), slice(0, 12), slice(2, 12))
    ignoring = torch.full_like(truth, -1)
    ignoring[inside] = truth[inside]
    raters = torch.stack([truth, labels])
    part = full_prediction(labels)
    cropped = part.map(lambda x: x[(slice(None), *inside)], lambda x: x[(slice(None), *inside)])
    metrics = CaseMetrics(ALL, empty_distance=99.0, lesion_dilation=1)
    rows = metrics(part, ignoring, brats_task(), (1, 1, 2), raters)
    expected = metrics(cropped, truth[inside], brats_task(), (1, 1, 2), raters[(slice(None), *inside)])
    assert len(rows) == len(expected) == 4
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, nan_ok=True)
    nothing = CaseMetrics()(Prediction(labels=labels), torch.full_like(truth, -1), brats_task(), (1, 1, 1))
    assert [r["dice"] for r in nothing] == [1, 1, 1]
    assert all(math.isnan(r["specificity"]) for r in nothing)


def test_padding_changes_only_what_counts_background():
    labels, truth = (torch.from_numpy(m) for m in blobs(5, (14, 12, 12)))
    pad = torch.nn.functional.pad
    names = [n for n in ALL if n != "specificity"]
    metrics = CaseMetrics(names, empty_distance=99.0, lesion_dilation=1)
    rows = metrics(Prediction(labels=labels), truth, brats_task(), (1, 1, 2))
    padded = metrics(Prediction(labels=pad(labels, (3, 2, 1, 0, 4, 9))), pad(truth, (3, 2, 1, 0, 4, 9)), brats_task(), (1, 1, 2))
    flipped = metrics(Prediction(labels=labels.flip(0, 2)), truth.flip(0, 2), brats_task(), (1, 1, 2))
    for row, other, mirrored in zip(rows, padded, flipped, strict=True):
        assert row == pytest.approx(other, nan_ok=True)
        assert row == pytest.approx(mirrored, nan_ok=True)


def test_members_tables_and_what_is_missing():
    labels, truth = (torch.from_numpy(m) for m in blobs(6, (12, 12, 12)))
    task = brats_task()
    prediction = Prediction(
        labels=labels,
        table={"grade": 1, "risk": math.nan},
        members={
            "teacher": Prediction(labels=truth, members={"head": Prediction(labels=truth)}),
            "classifier": Prediction(table={"probability": 0.75}),
            "silent": Prediction(uncertainty={"entropy": torch.rand(12, 12, 12)}),
        },
    )
    rows = CaseMetrics(["dice"])(prediction, truth, task, (1, 1, 1))
    expected = [("", r) for r in ("WT", "TC", "ET", "")] + [(m, r) for m in ("teacher", "teacher/head") for r in ("WT", "TC", "ET")]
    assert [(r["member"], r["region"]) for r in rows] == [*expected, ("classifier", "")]
    assert rows[3] == pytest.approx({"member": "", "region": "", "grade": 1.0, "risk": math.nan}, nan_ok=True)
    assert row_of(rows, "", "classifier") == {"member": "classifier", "region": "", "probability": 0.75}
    assert row_of(rows, "WT", "teacher")["dice"] == 1 > row_of(rows, "WT")["dice"]
    without_truth = CaseMetrics(["dice"])(prediction, None, task, (1, 1, 1))
    assert [(r["member"], r["region"]) for r in without_truth] == [("", ""), ("classifier", "")]


def test_probabilities_scores_and_uncertainty_of_a_case():
    task = Task(("flair",), {"background": 0, "lesion": 1})
    truth = torch.tensor([[[0, 0], [1, 1]]], dtype=torch.int8)
    labels = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.int8)
    prediction = Prediction(
        regions=torch.tensor([[[[0.1, 0.7], [0.9, 0.9]]]], dtype=torch.bfloat16),
        labels=labels,
        scores=torch.tensor([[[1.0, 3.0], [2.0, 4.0]]]),
        uncertainty={"entropy": torch.tensor([[[0.2, 0.3], [0.2, 0.4]]])},
    )
    (row,) = CaseMetrics(["ece", "brier", "auroc", "ap", "error_auroc"], bins=10)(prediction, truth, task, (1, 1, 1))
    assert row == pytest.approx(
        {
            **{"member": "", "region": "lesion", "brier": (0.01 + 0.49 + 0.01 + 0.01) / 4, "ece": (0.1 + 0.7 + 0.2) / 4},
            **{"auroc": 0.75, "ap": (1 + 2 / 3) / 2, "auroc_entropy": 2 / 3},
        },
        abs=5e-3,  # bfloat16
    )
    mask = torch.tensor([[[True, False], [True, True]]])
    (row,) = CaseMetrics(["brier", "auroc", "error_auroc"])(prediction, truth, task, (1, 1, 1), mask=mask)
    assert row == pytest.approx(
        {"member": "", "region": "lesion", "brier": 0.01, "auroc": 1, "auroc_entropy": math.nan}, nan_ok=True, abs=5e-3
    )
    (row,) = CaseMetrics()(Prediction(scores=prediction.scores), truth, task, (1, 1, 1))
    assert row == {"member": "", "region": "lesion", "auroc": 0.75, "ap": pytest.approx(5 / 6)}


def test_uncertainty_is_scaled_to_the_score_s_range():
    task = Task(("flair",), {"background": 0, "lesion": 1})
    truth, labels = (torch.from_numpy(m.astype(np.int8))[None, None] for m in (TRUE, PREDICTED))
    between = np.array([0.25, 20.25, 60.25, 100, 0.25, 80.25, 0.25, 0.25], np.float32)  # thresholds, not to depend on the last bit
    prediction = Prediction(labels=labels, uncertainty={"doubt": torch.from_numpy(between / 200)[None, None]})  # up to 1/2

    def measured(**options):
        (row,) = CaseMetrics(["qu_brats"], **options)(prediction, truth, task, (1, 1, 1))
        return {name.removesuffix("_doubt"): value for name, value in row.items() if name.endswith("_doubt")}

    def expected(values):
        return {"qu_brats" if n == "score" else f"qu_{n}": pytest.approx(v) for n, v in qu_brats(values, PREDICTED, TRUE).items()}

    assert measured() == expected(between)  # the largest of the case is 100
    assert measured(uncertainty_top=1.0) == expected(between / 2)
    assert measured(uncertainty_top=0.25) == expected(np.minimum(between * 2, 100))
    prediction.uncertainty["doubt"] = torch.zeros(1, 1, 8)
    assert measured() == expected(np.zeros(8))


def test_entropy_of_a_region_s_own_probability_is_a_map_of_each_region():
    task = Task(("flair",), {"background": 0, "core": 1, "rim": 2}, {"whole": ("core", "rim"), "core": ("core",)})
    truth = torch.tensor([[[0, 0, 1, 2]]], dtype=torch.int8)
    labels = torch.tensor([[[2, 0, 2, 2]]], dtype=torch.int8)
    whole, core = torch.tensor([0.7, 0.1, 0.9, 1.0]), torch.tensor([0.1, 0.0, 0.5, 0.3])
    prediction = Prediction(regions=torch.stack([whole, core])[:, None, None], labels=labels)
    rows = CaseMetrics(["error_auroc", "qu_brats"], region_entropy=True)(prediction, truth, task, (1, 1, 1))
    assert [row["auroc_region_entropy"] for row in rows] == [1, 1]  # whole is wrong at 0.7, core at 0.5
    for row, p, region in zip(rows, (whole, core), ((1, 2), (1,)), strict=True):
        entropy = -(p.clamp(1e-12, 1) * p.clamp(1e-12, 1).log() + (1 - p).clamp(1e-12, 1) * (1 - p).clamp(1e-12, 1).log())
        ours, theirs = (np.isin(x[0, 0].numpy(), region) for x in (labels, truth))
        expected = qu_brats(entropy.numpy() / math.log(2) * 100, ours, theirs)  # at 0.5 it is largest: ln 2
        assert row["qu_brats_region_entropy"] == pytest.approx(expected["score"], abs=2e-3)  # a threshold more or less
        assert row["qu_dice_region_entropy"] == pytest.approx(expected["dice"], abs=4e-3)
    assert CaseMetrics(["error_auroc", "qu_brats"])(prediction, truth, task, (1, 1, 1)) == []
    assert CaseMetrics(["qu_brats"], region_entropy=True)(Prediction(labels=labels), truth, task, (1, 1, 1)) == []


def test_q_dice_of_a_case():
    task = Task(("t1",), {"background": 0, "lesion": 1}, raters=4)
    votes = torch.tensor([[[1, 1, 1, 0, 0]], [[1, 1, 0, 0, -1]], [[1, 0, 0, 0, 1]], [[-1] * 5]], dtype=torch.int8)
    labels = torch.tensor([[1, 1, 0, 0, 0]], dtype=torch.int8)
    metrics = CaseMetrics(["q_dice", "q_dice_paper"])
    expected = {"member": "", "region": "lesion", "q_dice": 7.4 / 9, "q_dice_paper": 0.84}
    for prediction in (Prediction(labels=labels), Prediction(labels=labels * 0, regions=labels[None].float())):
        (row,) = metrics(prediction, labels, task, (1, 1), raters=votes)
        assert row == pytest.approx(expected)
    assert metrics(Prediction(labels=labels), labels, task, (1, 1)) == []


def test_two_dimensional_and_one_voxel_thick_volumes_agree():
    labels, truth = (torch.from_numpy(m[:, :, 9].copy()) for m in blobs(7))
    flat = full_prediction(labels)
    raters = torch.stack([truth, labels])
    metrics = CaseMetrics(ALL, lesion_dilation=1)
    expected = metrics(flat, truth, brats_task(unit="vox"), (1, 1), raters)
    assert expected[0]["hd95_vox"] > 0
    for axis in range(3):
        thick = flat.map(lambda x, a=axis: x.unsqueeze(a + 1), lambda x, a=axis: x.unsqueeze(a + 1))
        rows = metrics(thick, truth.unsqueeze(axis), brats_task(unit="vox"), (1, 1, 1), raters.unsqueeze(axis + 1))
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, nan_ok=True)
    # in-plane surfaces: a disc's inner voxels are no surface, so a smaller disc inside it is at a distance
    disc, hole = torch.zeros(9, 9, 1, dtype=torch.int8), torch.zeros(9, 9, 1, dtype=torch.int8)
    disc[1:8, 1:8], hole[3:6, 3:6] = 1, 1
    rows = CaseMetrics(["hd", "surface_dice"])(Prediction(labels=hole), disc, brats_task(), (1, 1, 5))
    assert row_of(rows, "WT")["hd_mm"] == pytest.approx(math.sqrt(8))
    assert row_of(rows, "WT")["surface_dice"] == 0


def test_mistakes_are_answered():
    with pytest.raises(SuiteError, match="Unknown metric 'dcie'; did you mean 'dice'"):
        CaseMetrics(["dcie"])
    with pytest.raises(SuiteError, match="Unknown empty_distance 'diag'; did you mean 'diagonal'"):
        CaseMetrics(empty_distance="diag")
    with pytest.raises(SuiteError, match="Unknown space 'nativ'; did you mean 'native'"):
        CaseMetrics(space="nativ")
    with pytest.raises(SuiteError, match=r"\(4, 4, 5\), the truth \(4, 4, 4\)"):
        CaseMetrics()(Prediction(labels=torch.zeros(4, 4, 5)), torch.zeros(4, 4, 4, dtype=torch.int8), brats_task(), (1, 1, 1))


def test_every_metric_name_yields_a_column():
    labels, truth = (torch.from_numpy(m) for m in blobs(8, (12, 12, 12)))
    columns = {"hd95": "hd95_mm", "hd95_pooled": "hd95_pooled_mm", "hd": "hd_mm", "asd": "asd_mm", "volume": "volume_ml"}
    columns |= {
        "asd_directed": "asd_directed_mm",
        "brats2023": "num_tp",
        "brats2026": "all_instance_tp",
        "brats2026_mets": "large_instance_tp",
    }
    columns |= {"error_auroc": "auroc_entropy", "qu_brats": "qu_brats_entropy"}
    for name in ALL:
        rows = CaseMetrics([name])(full_prediction(labels), truth, brats_task(), (1, 1, 1), raters=truth[None])
        assert columns.get(name, name) in row_of(rows, "WT")
        assert row_of(rows, "") == {"member": "", "region": "", "risk": 0.25}


# ---------------------------------------------------------------- all cases


def rows_of(case):
    return [{"case": case, "member": m, "region": r, "dice": 0.1 * len(case) + len(m)} for m in ("", "a") for r in ("WT", "TC")]


def test_per_case_results_on_one_process():
    metric = PerCaseResults()
    assert metric(rows_of("b")) == rows_of("b")
    metric.update(rows_of("a"))
    metric.update(rows_of("b"))
    assert metric.compute() == rows_of("a") + rows_of("b")
    metric.update(rows_of("0"))
    assert len(metric.compute()) == 12
    metric.reset()
    assert metric.rows == []
    metric.update(rows_of("c"))
    assert metric.compute() == rows_of("c")


def gather(rank, folder, held):
    """One rank: collects twice (the second time nobody but rank 1 has cases) and writes what it was told."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = PerCaseResults()
    for case in held[rank]:
        metric.update(rows_of(case))
    write_rows(folder / f"first-{rank}.csv", metric.compute())
    if rank:
        metric.update(rows_of("z"))
    write_rows(folder / f"second-{rank}.csv", metric.compute())
    metric.reset()
    write_rows(folder / f"third-{rank}.csv", metric.compute())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("held", [(["d", "a", "c"], ["b", "a"]), ([], ["b"])])
def test_per_case_results_on_two_processes(tmp_path, held):
    mp.start_processes(gather, args=(tmp_path, held), nprocs=2, start_method="fork")
    expected = sorted({case for cases in held for case in cases})
    for rank in range(2):
        rows = [read_rows(tmp_path / f"{name}-{rank}.csv") for name in ("first", "second", "third")]
        for found, cases in zip(rows, (expected, [*expected, "z"], []), strict=True):
            wanted = [row for case in cases for row in rows_of(case)]
            assert [{k: r[k] for k in ("case", "member", "region", "dice")} for r in found] == wanted


def test_importing_metrics_does_not_bring_monai():
    code = "import sys, lightning_modules.metrics; print('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
