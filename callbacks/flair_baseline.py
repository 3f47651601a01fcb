"""A yardstick beside the results: what one threshold on FLAIR would have scored on the same test cases."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from callbacks.case_callback import CaseCallback
from lesionbench.batch import Batch
from lesionbench.prediction import CaseResult
from lesionbench.results import write_json
from lesionbench.score_counts import ScoreCounts, dice


class FlairBaseline(CaseCallback):
    """Writes `<folder>/test/baseline.json`: Dice of the outermost region by the best threshold on equalized FLAIR.

    The threshold is the one of 100 with the best Dice over the voxels of all test cases (the protocol of Meissen et al., BrainLes 2021,
    without its rule on components): chosen with the truth in hand, an upper bound for thresholding and never a result of a method.
    `dice` is the mean over cases, `oracle` says so. Measured on the network grid. Tasks without a channel `flair`, and cases without a
    label, are passed over.

    Args:
        folder: run folder.
        method: called with the task, returns the anomaly method whose scores, from 0 to 1, are cut.

    Attributes:
        collected: case -> its positives and its voxels above each threshold, and its true voxels.
    """

    thresholds = np.linspace(0, 1, 100)

    def __init__(self, folder: str, method: Callable) -> None:
        self.folder, self.method = Path(folder), method

    def check(self, method: Any) -> None:
        """Builds the method that scores; raises what that finds wrong with its options."""
        task = method.task
        self._scorer = self.method(task.narrowed(regions=task.region_names[:1])) if "flair" in task.channels else None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(pl_module)

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        if self._scorer is None or "label" not in batch:
            return
        region = method.task.region_masks(batch["label"][0, 0])[0]
        counts = ScoreCounts.of(self._scorer.score_map(batch).cpu().numpy(), region.cpu().numpy())
        self.collected[result.case] = (*counts.above(self.thresholds), counts.positive)

    def write(self, ranks: Sequence[dict[str, tuple[np.ndarray, np.ndarray, int]]], method: Any) -> None:
        cases = {case: counts for part in ranks for case, counts in part.items()}
        if not cases:
            return
        hits, marked, true = (np.array(part) for part in zip(*cases.values(), strict=True))
        best = int(np.argmax(dice(hits.sum(axis=0), marked.sum(axis=0), true.sum())))
        found = [float(dice(h, m, t)) for h, m, t in zip(hits[:, best], marked[:, best], true, strict=True)]
        write_json(
            self.folder / "test" / "baseline.json",
            {
                "region": method.task.region_names[0],
                "threshold": self.thresholds[best],
                "dice": float(np.mean(found)),
                "oracle": True,
                "cases": dict(zip(cases, found, strict=True)),
            },
        )
