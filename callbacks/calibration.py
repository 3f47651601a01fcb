"""How often a region is there where the method says with which probability: counts over all test voxels."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.case_callback import CaseCallback, summed
from callbacks.overlays import masks_of
from lesionbench.batch import Batch
from lesionbench.calibration import calibration_counts
from lesionbench.prediction import CaseResult
from lesionbench.ranges import Count
from lesionbench.task import IGNORE

COLUMNS = ("member", "region", "bin", "voxels", "probability", "true")


class Calibration(CaseCallback):
    """Writes `<folder>/test/calibration.csv`: for every member, region and bin of the predicted probability, the number of test voxels, the sum
    of their probabilities and the number of them that are truly in the region (Guo et al. 2017, arXiv:1706.04599, sec. 2).

    Voxels to ignore do not count. Members without region probabilities are left out.

    Args:
        folder: run folder.
        bins: number of bins of equal width.
    """

    def __init__(self, folder: str, bins: Count = 15) -> None:
        self.path, self.bins = Path(folder) / "test" / "calibration.csv", bins

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        if result.truth is None:
            return
        truth = result.truth.cpu()
        known = (truth != IGNORE).numpy()
        masks = masks_of(truth, method.task)
        for name, part in result.prediction.flat():
            if part.regions is None:
                continue
            for region, probability, mask in zip(method.task.region_names, part.regions.float().cpu().numpy(), masks, strict=True):
                counts = calibration_counts(probability[known], mask[known], self.bins)
                self.collected[name, region] = self.collected.get((name, region), 0) + counts

    def write(self, ranks: Sequence[Mapping[tuple[str, str], np.ndarray]], method: Any) -> None:
        total = summed(ranks)
        if not total:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for (member, region), counts in total.items():
                for place, (voxels, probability, true) in enumerate(counts):
                    writer.writerow([member, region, place, int(voxels), float(probability), int(true)])
