"""Small-lesion strata: components and overlap of slices by hand, pooled over cases, on the native grid whatever its axes."""

import csv
import math

import numpy as np
import pytest
import torch

from callbacks import CaseTable
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry
from lesionbench.prediction import Prediction
from lesionbench.results import pool_slices
from lesionbench.task import Task
from lightning_modules.metrics import CaseMetrics, largest_components, slice_metrics

TASK = Task(("t1",), {"background": 0, "lesion": 1}, {"LESION": ("lesion",)})


def volume() -> np.ndarray:
    """Axial slices: 0 empty; 1 two diagonal pixels (8-connected: one of 2); 2 a square of 4 and a pixel; 3 the same square; 4 a square of 9."""
    truth = np.zeros((8, 8, 5), bool)
    truth[1, 1, 1] = truth[2, 2, 1] = True
    truth[1:3, 1:3, 2] = truth[6, 6, 2] = True
    truth[1:3, 1:3, 3] = True
    truth[2:5, 2:5, 4] = True
    return truth


def test_largest_component_of_every_slice():
    truth = volume()
    assert largest_components(truth, 2).tolist() == [0, 2, 4, 4, 9]
    assert largest_components(truth[:, :, 4], None).tolist() == [9]
    assert largest_components(np.zeros((0, 0, 0), bool), 2).tolist() == []


def test_strata_by_hand():
    truth, prediction = volume(), np.zeros((8, 8, 5), bool)
    prediction[:, :, 0] = True  # a slice without lesion is in no stratum
    prediction[1, 1, 1] = True  # 1 of 2
    prediction[1:3, 1:3, 2] = prediction[4, 4, 2] = True  # 4 of 5, one false; slice 3 missed
    prediction[2:5, 2:4, 4] = True  # 6 of 9
    found = slice_metrics(prediction, truth, 2, bounds=(4,))
    assert [found[f"slices_le4_{c}"] for c in ("n", "hit", "predicted", "true")] == [3, 5, 6, 11]
    assert [found[f"slices_gt4_{c}"] for c in ("n", "hit", "predicted", "true")] == [1, 6, 6, 9]
    assert found["slices_le4_dice"] == pytest.approx(10 / 17)
    assert found["slices_le4_jaccard"] == pytest.approx(5 / 12)
    assert found["slices_le4_precision"] == pytest.approx(5 / 6)
    assert found["slices_le4_sensitivity"] == pytest.approx(5 / 11)
    three = slice_metrics(prediction, truth, 2, bounds=(2, 4, 50))
    assert [three[f"slices_{s}_n"] for s in ("le2", "le4", "le50", "gt50")] == [1, 2, 1, 0]
    assert math.isnan(three["slices_gt50_dice"])


def test_pooled_over_cases_is_one_confusion():
    a = {
        "case": "a",
        "member": "",
        "region": "LESION",
        "slices_le100_n": 2,
        "slices_le100_hit": 5,
        "slices_le100_predicted": 6,
        "slices_le100_true": 11,
    }
    b = {
        "case": "b",
        "member": "",
        "region": "LESION",
        "slices_le100_n": 1,
        "slices_le100_hit": 3,
        "slices_le100_predicted": 8,
        "slices_le100_true": 3,
    }
    (pooled,) = pool_slices([a, b])
    assert (pooled["stratum"], pooled["slices"]) == ("le100", 3)
    assert pooled["dice"] == pytest.approx(16 / 28)
    assert pooled["jaccard"] == pytest.approx(8 / 20)
    assert pooled["jaccard"] == pytest.approx(pooled["dice"] / (2 - pooled["dice"]))
    assert (pooled["sensitivity"], pooled["precision"]) == pytest.approx((8 / 14, 8 / 14))
    assert pool_slices([{"case": "a", "dice": 1.0}]) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_case_metrics_slice_along_the_axis_given(axis):
    truth = np.moveaxis(volume(), 2, axis)
    labels = torch.from_numpy(truth.astype(np.int8))
    rows = CaseMetrics(["slices"], slice_bounds=(4,))(Prediction(labels=labels), labels, TASK, (1, 1, 1), slice_axis=axis)
    assert rows[0]["slices_le4_n"] == 3
    assert rows[0]["slices_le4_dice"] == rows[0]["slices_gt4_dice"] == 1
    (one,) = CaseMetrics(["slices"])(Prediction(labels=labels[:, :, :1] * 0), labels[:, :, :1] * 0, TASK, (1, 1, 1))
    assert one["slices_le100_n"] == 0


def test_native_axis_of_the_slices():
    canonical = Geometry.of(np.eye(4), (4, 5, 6))
    turned = Geometry.of(np.array([[0, 0, -1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), (4, 5, 6))  # axes A, S, L
    assert [canonical.native_axis(a) for a in range(3)] == [0, 1, 2]
    assert [turned.native_axis(a) for a in range(3)] == [2, 0, 1]


def test_bounds_must_make_sense():
    for bounds in ((), (0, 5), (10, 5)):
        with pytest.raises(SuiteError, match="slice_bounds"):
            CaseMetrics(["slices"], slice_bounds=bounds)


def test_case_table_writes_the_pooled_table(tmp_path):
    from types import SimpleNamespace

    labels = torch.from_numpy(volume().astype(np.int8))
    rows = [{"case": c, **r} for c in "ab" for r in CaseMetrics(["slices"])(Prediction(labels=labels), labels, TASK, (1, 1, 1))]
    module = SimpleNamespace(test_results=SimpleNamespace(compute=lambda: rows), dataset_results=SimpleNamespace(compute=dict))
    CaseTable(str(tmp_path)).on_test_epoch_end(SimpleNamespace(is_global_zero=True, loggers=[]), module)
    with (tmp_path / "test" / "slices.csv").open(newline="") as file:
        small, large = csv.DictReader(file)
    assert (small["region"], small["stratum"], small["slices"], float(small["dice"])) == ("LESION", "le100", "8", 1.0)
    assert large["slices"] == "0"
