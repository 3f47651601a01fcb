"""Reliability curves against counts made by hand."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks import UncertaintyCalibration
from lesionbench.calibration import calibration_counts
from lesionbench.prediction import CaseResult, Prediction


def test_bins_by_hand():
    counts = calibration_counts(np.array([0.05, 0.95, 1.0, 0.45, 0.4]), np.array([False, True, False, True, True]), bins=5)
    assert counts[:, 0].tolist() == [1, 0, 2, 0, 2]
    assert counts[:, 1] == pytest.approx([0.05, 0, 0.85, 0, 1.95])
    assert counts[:, 2].tolist() == [0, 0, 2, 0, 1]


def test_a_calibrated_map_lies_on_the_diagonal():
    generator = np.random.default_rng(0)
    confidence = generator.random(200_000)
    counts = calibration_counts(confidence, generator.random(confidence.size) < confidence)
    assert counts[:, 2] / counts[:, 0] == pytest.approx(counts[:, 1] / counts[:, 0], abs=0.02)


def test_cases_are_pooled_and_ignored_voxels_left_out(tmp_path):
    callback, trainer = UncertaintyCalibration(str(tmp_path), bins=2), SimpleNamespace(is_global_zero=True)
    callback.on_test_epoch_start(trainer, None)
    truth = torch.tensor([[[0, 1, 1, -1]]])
    prediction = Prediction(
        labels=torch.tensor([[[0, 1, 0, 0]]]),
        uncertainty={"critic": torch.tensor([[[0.1, 0.2, 0.9, 0.0]]]), "variance": torch.tensor([[[0.0, 2.0, 0.0, 0.0]]])},
    )
    for _ in range(2):
        callback.on_test_batch_end(trainer, None, CaseResult("c", "c", "", prediction, truth, None, None, native=False), None, 0)
    callback.on_test_batch_end(trainer, None, None, None, 0)
    callback.on_test_epoch_end(trainer, None)
    with (tmp_path / "test" / "uncertainty_calibration.csv").open() as file:
        low, high = csv.DictReader(file)
    assert (low["map"], low["voxels"], float(low["correct"])) == ("critic", "2", 0.0)
    assert float(low["confidence"]) == pytest.approx(0.1)
    assert (high["voxels"], float(high["correct"])) == ("4", 1.0)
    assert float(high["confidence"]) == pytest.approx(0.85)
