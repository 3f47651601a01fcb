"""How often a region is there where the method says with which probability: counts over all test voxels."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from callbacks.gather import gather
from callbacks.overlays import masks_of
from lesionbench.calibration import calibration_counts
from lesionbench.prediction import CaseResult
from lesionbench.task import IGNORE

COLUMNS = ("member", "region", "bin", "voxels", "probability", "true")


class Calibration(pl.Callback):
    """Writes `<folder>/test/calibration.csv`: for every member, region and bin of the predicted probability, the number of test voxels, the sum
    of their probabilities and the number of them that are truly in the region (Guo et al. 2017, arXiv:1706.04599, sec. 2).

    Voxels to ignore do not count. Members without region probabilities are left out.

    Args:
        folder: run folder.
        bins: number of bins of equal width.
    """

    def __init__(self, folder: str, bins: int = 15) -> None:
        self.path, self.bins = Path(folder) / "test" / "calibration.csv", bins
        self._counts: dict[tuple[str, str], np.ndarray] = {}

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counts = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: CaseResult | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, CaseResult) or outputs.truth is None:
            return
        truth = outputs.truth.cpu()
        known = (truth != IGNORE).numpy()
        masks = masks_of(truth, pl_module.task)
        for name, part in outputs.prediction.flat():
            if part.regions is None:
                continue
            for region, probability, mask in zip(pl_module.task.region_names, part.regions.float().cpu().numpy(), masks, strict=True):
                counts = calibration_counts(probability[known], mask[known], self.bins)
                self._counts[name, region] = self._counts.get((name, region), 0) + counts

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total: dict[tuple[str, str], np.ndarray] = {}
        for counts in gather(self._counts):
            for key, values in counts.items():
                total[key] = total.get(key, 0) + values
        if total and trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                for (member, region), counts in total.items():
                    for place, (voxels, probability, true) in enumerate(counts):
                        writer.writerow([member, region, place, int(voxels), float(probability), int(true)])
