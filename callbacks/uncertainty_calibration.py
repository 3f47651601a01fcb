"""How far uncertainty maps can be believed: reliability curves over the test cases."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from callbacks.gather import gather
from lesionbench.calibration import calibration_counts
from lesionbench.prediction import CaseResult
from lesionbench.task import IGNORE


class UncertaintyCalibration(pl.Callback):
    """Writes `<folder>/test/uncertainty_calibration.csv`: for every uncertainty map u with values in [0, 1], bins of the confidence 1 - u.

    A voxel is correct where the predicted class is the true one. Columns: map, low, high (of the bin), voxels, confidence (mean),
    correct (share); all test cases pooled, ignored voxels left out. Maps with other values are passed over.

    Args:
        folder: run folder.
        bins: of equal width.
    """

    def __init__(self, folder: str, bins: int = 10) -> None:
        self.folder, self.bins = Path(folder), bins
        self._counts: dict[str, np.ndarray] = {}

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        if outputs is None or outputs.truth is None or outputs.prediction.labels is None:
            return
        truth, labels = outputs.truth.cpu().numpy(), outputs.prediction.labels.cpu().numpy()
        counted = truth != IGNORE
        for name, uncertainty in outputs.prediction.uncertainty.items():
            values = uncertainty.float().cpu().numpy()[counted]
            if values.size and values.min() >= 0 and values.max() <= 1:
                found = calibration_counts(1 - values, (labels == truth)[counted], self.bins)
                self._counts[name] = self._counts.get(name, 0) + found

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ranks = gather(self._counts)
        if not trainer.is_global_zero:
            return
        total = {name: sum(rank[name] for rank in ranks if name in rank) for name in dict.fromkeys(n for rank in ranks for n in rank)}
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
