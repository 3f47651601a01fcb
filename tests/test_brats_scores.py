"""The scores of the BraTS challenges: against the official package's own numbers, recorded or made anew, and by hand."""

import math
import os

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy import ndimage

from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.reports.runs import lower_is_better
from lesionbench.results import summarize
from lesionbench.task import Task
from lightning_modules.metrics import CaseMetrics, brats2023, brats2026, tissue_lesions
from lightning_modules.metrics.surface import surface_hd95_by_area
from tests.brats_official import SEEDS, TASKS, official_rows, random_case, recorded_rows, values_of
from tests.harness import run, shared

ADDED = {"lesionwise_nsd_mean_mm", "lesionwise_hd95_mean_mm"}


def preset(name, *overrides):
    return instantiate(shared(f"metrics={name}", *overrides).metrics)


def task_of(name):
    """The task of a challenge: a class for every value on disk, and the official regions under their official names."""
    classes = {f"class{value}": value for value in range(1, values_of(name) + 1)}
    regions = {region: tuple(f"class{value}" for value in values) for region, values in TASKS[name].regions.items()}
    return Task(("t1",), {"background": 0, **classes}, regions)


def suite_rows(name, case, metrics):
    """The suite's row of a case by region, with the preset of the task."""
    prediction, truth, spacing = case
    labels, truth = (torch.from_numpy(x.astype(np.int64)) for x in (prediction, truth))
    return {row["region"]: row for row in metrics(Prediction(labels=labels), truth, task_of(name), spacing)}


def assert_equal(rows, official):
    assert rows.keys() == official.keys()
    for region, expected in official.items():
        found = {column: rows[region][column] for column in expected}
        assert found == pytest.approx(expected, abs=1e-6, rel=0, nan_ok=True), region


@pytest.mark.parametrize("task", TASKS)
def test_numbers_recorded_from_the_official_package(task):
    metrics, recorded = preset(f"brats2026_{task}"), recorded_rows()
    for seed in SEEDS:
        rows = suite_rows(task, random_case(seed, values_of(task)), metrics)
        assert_equal(rows, recorded[task, seed])
        beside = ADDED | {"member", "region", "dice", "hd95_pooled_mm", "surface_dice"}
        assert all(row.keys() - recorded[task, seed][region].keys() == beside for region, row in rows.items())


@pytest.fixture
def official_python():
    python = os.environ.get("LESIONBENCH_BRATS_PYTHON")
    if not python:
        pytest.skip(
            "needs the official package: set LESIONBENCH_BRATS_PYTHON to a python that has BraTS-evaluation 0.0.10 and panoptica 2.1.7"
        )
    return python


@pytest.mark.parametrize(("task", "number"), [("gli", 200), ("mets", 200), ("ped", 40), ("men", 40), ("menrt", 40), ("goat", 40)])
def test_random_cases_beside_the_official_package(task, number, official_python, tmp_path):
    cases, metrics = [random_case(seed, values_of(task)) for seed in range(1000, 1000 + number)], preset(f"brats2026_{task}")
    for case, official in zip(cases, official_rows(official_python, task, cases, tmp_path), strict=True):
        assert_equal(suite_rows(task, case, metrics), official)


@pytest.mark.parametrize("task", ["gli", "mets"])
def test_real_cases_beside_the_official_package(task, official_python, real_data, tmp_path):
    from lesionbench.geometry import read_volume

    draw, cases = np.random.RandomState(0), []
    for path in sorted((real_data / "brats18").glob("*/*_seg.nii*")):
        truth = read_volume(path)[0].astype(np.uint8)
        truth[truth == 4] = 3  # the value of enhancing tumor since 2023
        moved = ndimage.map_coordinates(truth, np.indices(truth.shape) + _waves(draw, truth.shape), order=0)
        blobs = ndimage.gaussian_filter(draw.standard_normal(truth.shape), 2) > 0.2
        cases.append((np.where(blobs, draw.randint(0, 5), moved).astype(np.uint8), truth, (1.0, 1.0, 1.0)))
    assert len(cases) == 6
    metrics = preset(f"brats2026_{task}")
    for case, official in zip(cases, official_rows(official_python, task, cases, tmp_path), strict=True):
        assert_equal(suite_rows(task, case, metrics), official)


def _waves(draw, shape):
    """A smooth displacement of some voxels (3, *shape)."""
    coarse = draw.standard_normal((3, 8, 8, 8)) * 2
    return np.stack([ndimage.zoom(c, np.array(shape) / 8, order=1) for c in coarse])


# ---------------------------------------------------------------- BraTS 2026 by hand


def box_mask(shape, *boxes):
    array = np.zeros(shape, bool)
    for box in boxes:
        array[tuple(slice(*b) for b in box)] = True
    return array


CUBE = ((5, 10), (5, 10), (5, 10))


def test_a_lesion_in_two_pieces_counts_one_false_positive():
    truth = box_mask((20, 20, 20), CUBE)
    pieces = box_mask((20, 20, 20), ((5, 8), (5, 10), (5, 10)), ((9, 10), (5, 10), (5, 10)))
    found = brats2026(pieces, truth, (1, 1, 1))
    assert [found[f"all_instance_{name}"] for name in ("tp", "fp", "fn")] == [1, 1, 0]
    assert found["lesionwise_dsc_mean"] == pytest.approx(2 * 75 / (75 + 125))  # the larger piece alone
    assert found["global_dsc"] == pytest.approx(2 * 100 / (100 + 125))
    large = brats2026(pieces, truth, (1, 1, 1), metastases=True)
    assert large["lesionwise_dsc_mean"] == pytest.approx(0.75 / 2)  # the false positive is a lesion of Dice 0 and HD95 373
    assert large["lesionwise_hd95_mean"] == pytest.approx((found["lesionwise_hd95_mean"] + 373) / 2)


def test_matching_maximizes_the_sum_of_dice_and_not_the_single_best():
    # One predicted lesion spans both true ones and is the best match of the first (0.41 against 0.33); the second can only have it.
    truth = box_mask((3, 30), ((0, 3), (0, 10)), ((0, 3), (11, 21)))
    prediction = box_mask((3, 30), ((0, 1), (0, 6)), ((2, 3), (0, 19)))
    found = brats2026(prediction, truth, (1, 1))
    assert [found[f"all_instance_{name}"] for name in ("tp", "fp", "fn")] == [2, 0, 0]
    assert found["lesionwise_dsc_mean"] == pytest.approx((2 * 6 / 36 + 2 * 8 / 49) / 2)


def test_of_equally_good_matches_the_first_along_the_last_axis_counts():
    # Two pieces of four voxels inside one lesion, a cube of 2 x 2 x 1 at the low end of the last axis and a row of 4 at its high end, which
    # is the first along the first axis; the numbers are those of the official package.
    truth = box_mask((14, 14, 14), ((2, 10), (2, 10), (2, 10)))
    prediction = box_mask((14, 14, 14), ((8, 10), (2, 4), (2, 3)), ((2, 3), (4, 8), (9, 10)))
    found = brats2026(prediction, truth, (1, 1, 1))
    assert [found[f"all_instance_{name}"] for name in ("tp", "fp", "fn")] == [1, 1, 0]
    assert found["lesionwise_hd95_mean"] == pytest.approx(math.sqrt(89))  # of the row: 9.27


def test_voxel_sizes_between_lesions_go_to_the_opposite_axis_and_beside_it_to_their_own():
    truth = box_mask((20, 20, 20), CUBE)
    for axis, official, own in ((0, 5, 1), (1, 1, 1), (2, 1, 5)):
        found = brats2026(np.roll(truth, 1, axis), truth, (1, 1, 5))
        assert found["lesionwise_hd95_mean"] == official
        assert found["lesionwise_hd95_mean_mm"] == own
        assert found["global_hd95"] == 1  # voxels
    assert found["lesionwise_nsd_mean"] == 1  # one step along the last axis is taken for 1 mm, the tolerance
    assert found["lesionwise_nsd_mean_mm"] == pytest.approx(
        72 / 98
    )  # truly 5 mm: within 1 mm are those of the end face that have one beside
    assert found["global_nsd"] == pytest.approx(64 / 98)  # what coincides


def test_what_is_empty_missed_or_apart():
    lesion, none = box_mask((20, 20, 20), CUBE), np.zeros((20, 20, 20), bool)
    nothing = brats2026(none, none, (1, 1, 1))
    assert {name for name, value in nothing.items() if not math.isnan(value)} == {f"all_instance_{name}" for name in ("tp", "fp", "fn")}
    for pair in ((lesion, none), (none, lesion), (lesion, np.roll(lesion, 8, 0))):
        found = brats2026(*pair, (1, 1, 1))
        assert [found[f"global_{name}"] for name in ("dsc", "nsd", "hd95")] == [0, 0, 373]
        assert [found[f"lesionwise_{name}_mean"] for name in ("dsc", "nsd", "hd95")] == [0, 0, math.inf]
        assert all(math.isnan(found[name]) for name in ADDED)
    assert brats2026(none, lesion, (1, 1, 1), metastases=True)["lesionwise_hd95_mean"] == 373


def test_large_and_small_metastases():
    # True lesions of 64, 20 and 8 voxels; the first is found well, the second grazed (Dice 0.07), the third missed; one false positive.
    truth = box_mask((30, 30, 30), ((0, 4),) * 3, ((10, 14), (10, 15), (10, 11)), ((20, 22),) * 3)
    prediction = box_mask((30, 30, 30), ((0, 4), (0, 4), (0, 3)), ((13, 15), (14, 16), (10, 12)), ((28, 30),) * 3)
    found = brats2026(prediction, truth, (1, 1, 1), metastases=True)
    grazed = 2 * 1 / (20 + 8)
    names = ("tp", "fp", "fn", "prec", "rec", "f1")
    assert [found[f"large_instance_{name}"] for name in names] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert [found[f"small_instance_{name}"] for name in names] == [0, 1, 1, 0, 0, 0]
    assert found["all_instance_tp"] == 2
    assert found["lesionwise_dsc_mean"] == pytest.approx((2 * 48 / 112 + grazed + 0) / 3)
    smaller = brats2026(prediction, truth, (1, 1, 0.99), metastases=True)  # now the second has 19.8 mm^3
    assert [smaller[f"large_instance_{name}"] for name in names[:3]] == [1, 1, 0]


# ---------------------------------------------------------------- BraTS 2023 by hand


def test_distances_by_area_of_shifted_and_empty_masks():
    cube = box_mask((20, 20, 20), CUBE)
    assert surface_hd95_by_area(cube, cube, (1, 1, 1)) == 0
    assert surface_hd95_by_area(np.roll(cube, 3, 1), cube, (1, 2, 1)) == 6
    # A rod of 1 x 1 x 36 has elements at 37 heights: the inner ones with an area of 4 / sqrt(2), the two ends with sqrt(3) / 2. Of 100.7 in all,
    # 85.7 lie where the shorter rod is; 95.7 are reached with the fourth height beyond. With equal weights it would be the fifth.
    rod, short = box_mask((4, 4, 60), ((1, 2), (1, 2), (0, 36))), box_mask((4, 4, 60), ((1, 2), (1, 2), (0, 30)))
    assert surface_hd95_by_area(rod, short, (1, 1, 1)) == surface_hd95_by_area(short, rod, (1, 1, 1)) == 4


def test_lesion_wise_scores_of_2023():
    shape = (40, 40, 40)
    large, small = ((5, 10), (5, 10), (5, 10)), ((30, 33), (30, 33), (30, 33))  # 125 and 27 voxels
    truth = box_mask(shape, large, small)
    prediction = box_mask(shape, ((6, 11), (5, 10), (5, 10)), ((20, 21), (20, 21), (20, 21)))
    found = brats2023(prediction, truth, (1, 1, 1), dilation=3, min_volume=50)
    assert [found[f"num_{name}"] for name in ("tp", "fp", "fn")] == [1, 1, 0]  # the small one does not count, a speck does
    assert found["lesionwise_score_dice"] == pytest.approx(0.8 / 2)
    assert found["lesionwise_score_hd95"] == pytest.approx((1 + 374) / 2)
    assert found["legacy_dice"] == pytest.approx(2 * 100 / (126 + 152))
    found = brats2023(prediction, truth, (1, 1, 1), dilation=3, min_volume=26)
    assert [found[f"num_{name}"] for name in ("tp", "fp", "fn")] == [1, 1, 1]
    assert found["lesionwise_score_hd95"] == pytest.approx((1 + 374 + 374) / 3)
    assert brats2023(prediction, truth, (2, 2, 2), min_volume=216)["num_fn"] == 0  # 27 voxels are 216 mm^3, and "up to"
    on_small = brats2023(box_mask(shape, small), truth, (1, 1, 1))
    assert (on_small["num_fp"], on_small["num_fn"]) == (0, 1)  # what reaches into a lesion that does not count is not false
    none = np.zeros(shape, bool)
    assert list(brats2023(none, none, (1, 1, 1)).values()) == [1, 0, 0, 0, 0, 1, 0]
    assert list(brats2023(none, truth, (1, 1, 1)).values()) == [0, 374, 0, 0, 1, 0, 374]


TREATED = {"background": 0, "netc": 1, "snfh": 2, "et": 3, "rc": 4}


def test_presets_of_2023_and_2024_set_dilation_and_volume_by_region():
    truth = torch.zeros(30, 30, 30, dtype=torch.int64)
    truth[2:7, 2:7, 2:5] = 3  # 75 voxels
    truth[20:24, 20:22, 20:22] = 3  # 16
    task = Task(("t1",), TREATED, {"WT": ("netc", "snfh", "et"), "et": ("et",)})
    nothing = Prediction(labels=torch.zeros_like(truth))
    missed = {name: [row["num_fn"] for row in preset(name)(nothing, truth, task, (1, 1, 1))] for name in ("brats2023", "brats2024")}
    assert missed == {"brats2023": [1, 1], "brats2024": [1, 2]}
    near = truth.clone()
    near[20:24, 20:22, 20:22] = 0
    near[9:11, 2:7, 2:5] = 3  # the third voxel from the first lesion: reached with dilation 3, false with 1
    counts = [
        preset("brats2023", *more)(Prediction(labels=near), truth, task, (1, 1, 1))[0]["num_fp"]
        for more in ((), ("metrics.lesion_dilation=1",))
    ]
    assert counts == [0, 1]
    with pytest.raises(SuiteError, match="add `default`"):
        CaseMetrics(["brats2023"], lesion_min_volume={"ET": 10})


def joined_one_by_one(tissues: dict[str, np.ndarray], dilation: int) -> dict[str, np.ndarray]:
    """What the published evaluation of 2024 does with every pair of lesions, on the whole grid and one pair after the other."""
    structure = ndimage.generate_binary_structure(3, 2)

    def grown(mask: np.ndarray, steps: int) -> np.ndarray:
        return ndimage.binary_dilation(mask, structure, iterations=steps) if steps else mask

    def joined(lesions: np.ndarray, others: np.ndarray) -> np.ndarray:
        of: dict[int, int] = {}
        for a in range(1, lesions.max() + 1):
            for b in range(others.max(), 0, -1):
                if (grown(lesions == a, 1) & (others == b)).any():
                    of[a] = b  # the smallest comes last
        answer = lesions + others.max()
        answer[lesions == 0] = 0
        for a, b in of.items():
            answer[lesions == a] = b
        for number, value in enumerate(sorted(set(answer[answer > 0])), start=1):
            answer = np.where(answer == value, -number, answer)
        return -answer

    first = {name: ndimage.label(grown(mask, dilation), np.ones((3, 3, 3)))[0] * mask for name, mask in tissues.items()}
    netc, snfh, et, rc = (first[name] for name in ("netc", "snfh", "et", "rc"))
    return {
        "netc": joined(joined(netc, et), rc),
        "et": joined(joined(et, netc), rc),
        "rc": joined(joined(rc, et), netc),
        "snfh": joined(joined(joined(snfh, et), rc), netc),
    }


def test_lesions_of_a_tissue_that_touch_one_of_another_are_one():
    netc = box_mask((40, 9, 9), ((2, 6), (2, 6), (2, 6)), ((20, 24), (2, 6), (2, 6)), ((34, 38), (2, 6), (2, 6)))
    et = box_mask((40, 9, 9), ((6, 20), (2, 6), (2, 6)))  # between the first two
    rc = box_mask((40, 9, 9), ((28, 34), (2, 6), (2, 6)))  # touches the third alone
    nothing = np.zeros_like(netc)
    found = tissue_lesions({"netc": netc, "snfh": nothing, "et": et, "rc": rc})
    assert [int(lesions.max()) for lesions in found.values()] == [2, 1, 1, 0]  # netc, et, rc, snfh
    first, second, third = (found["netc"][x, 3, 3] for x in (3, 21, 35))
    assert first == second != third
    assert tissue_lesions({"netc": netc, "snfh": nothing, "et": nothing, "rc": rc})["netc"].max() == 3

    truth = torch.from_numpy(netc * 1 + et * 3 + rc * 4)
    task = Task(("t1",), TREATED, {"WT": ("netc", "snfh", "et"), "NETC": ("netc",), "ET": ("et",), "RC": ("rc",)})
    missing = torch.zeros_like(truth)
    missing[20:24, 2:6, 2:6] = 1  # a half of the joined lesion is found, the third not
    counts = {
        name: {row["region"]: (row["num_tp"], row["num_fn"]) for row in preset(name)(Prediction(labels=missing), truth, task, (1, 1, 1))}
        for name in ("brats2023", "brats2024")
    }
    assert (counts["brats2023"]["NETC"], counts["brats2024"]["NETC"]) == ((1, 2), (1, 1))
    assert counts["brats2023"]["WT"] == counts["brats2024"]["WT"]
    row = preset("brats2024")(Prediction(labels=missing), truth, task, (1, 1, 1))[1]
    assert row["lesionwise_score_dice"] == pytest.approx((2 * 64 / (128 + 64) + 0) / 2)


@pytest.mark.parametrize("seed", range(20))
def test_lesions_are_joined_as_one_by_one(seed):
    random = np.random.default_rng(seed)
    labels = np.zeros((22, 19, 17), int)
    for _ in range(30):
        low = [int(random.integers(0, n - 1)) for n in labels.shape]
        labels[tuple(slice(a, a + int(random.integers(1, 5))) for a in low)] = random.integers(1, 5)
    labels[random.random(labels.shape) < 0.3] = 0
    tissues = {name: labels == value for name, value in (("netc", 1), ("snfh", 2), ("et", 3), ("rc", 4))}
    for dilation in (0, 1):  # with 3 all lesions of so small a grid are one
        expected, found = joined_one_by_one(tissues, dilation), tissue_lesions(tissues, dilation)
        assert list(found) == list(expected)
        for name, lesions in found.items():
            np.testing.assert_array_equal(
                np.unique(np.stack([lesions, expected[name]]).reshape(2, -1), axis=1)[0], range(lesions.max() + 1)
            )
            assert lesions.max() == expected[name].max()


def test_data_without_the_tissues_of_2024_are_refused_by_name(tmp_path):
    with pytest.raises(SuiteError, match=r"brats2024 joins lesions across the classes netc, et, rc, snfh, the task has no netc, rc, snfh"):
        preset("brats2024").check(Task(("t1",), {"background": 0, "ncr": 1, "ed": 2, "et": 3}))
    preset("brats2023").check(Task(("t1",), {"background": 0, "ncr": 1, "ed": 2, "et": 3}))
    with pytest.raises(SuiteError, match="brats2024 joins lesions across"):  # before anything is made or cached
        run("benchmark=brats2021", "model=supervised", "metrics=brats2024", f"data.root={tmp_path}", f"runs={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- around


def test_reports_know_which_scores_are_better_low_and_sum_up_infinite_ones():
    low = [
        "global_hd95",
        "lesionwise_hd95_mean",
        "lesionwise_score_hd95",
        "num_fp",
        "small_instance_fn",
        "asd_directed_vox",
        "qu_ftp_entropy",
    ]
    assert all(map(lower_is_better, low))
    assert not any(
        map(lower_is_better, ["global_dsc", "lesionwise_nsd_mean", "all_instance_tp", "num_tp", "all_instance_f1", "qu_brats_entropy"])
    )
    rows = [{"case": str(n), "region": "ET", "lesionwise_hd95_mean": value} for n, value in enumerate([1.0, math.inf, math.inf])]
    summary = summarize(rows, bootstrap=20)[""]["ET"]["lesionwise_hd95_mean"]
    assert (summary["mean"], summary["std"], summary["n"]) == (math.inf, None, 3)
