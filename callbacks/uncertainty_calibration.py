"""How far uncertainty maps can be believed: reliability curves over the test cases."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.case_callback import CaseCallback, summed
from lesionbench.batch import Batch
from lesionbench.calibration import calibration_counts
from lesionbench.prediction import CaseResult
from lesionbench.ranges import Count
from lesionbench.task import IGNORE


class UncertaintyCalibration(CaseCallback):
    """Writes `<folder>/test/uncertainty_calibration.csv`: for every uncertainty map u with values in [0, 1], bins of the confidence 1 - u.

    A voxel is correct where the predicted class is the true one. Columns: map, low, high (of the bin), voxels, confidence (mean),
    correct (share); all test cases pooled, ignored voxels left out. Maps with other values are passed over.

    Args:
        folder: run folder.
        bins: of equal width.
    """

    def __init__(self, folder: str, bins: Count = 10) -> None:
        self.folder, self.bins = Path(folder), bins

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        if result.truth is None or result.prediction.labels is None:
            return
        truth, labels = result.truth.cpu().numpy(), result.prediction.labels.cpu().numpy()
        counted = truth != IGNORE
        for name, uncertainty in result.prediction.uncertainty.items():
            values = uncertainty.float().cpu().numpy()[counted]
            if values.size and values.min() >= 0 and values.max() <= 1:
                found = calibration_counts(1 - values, (labels == truth)[counted], self.bins)
                self.collected[name] = self.collected.get(name, 0) + found

    def write(self, ranks: Sequence[Mapping[str, np.ndarray]], method: Any) -> None:
        total = summed(ranks)
        if not total:
            return
        path = self.folder / "test" / "uncertainty_calibration.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["map", "low", "high", "voxels", "confidence", "correct"])
            for name, counts in total.items():
                for number, (voxels, confidence, correct) in enumerate(counts):
                    edges = [number / self.bins, (number + 1) / self.bins]
                    writer.writerow([name, *edges, int(voxels), *([confidence / voxels, correct / voxels] if voxels else ["", ""])])
