"""A yardstick beside the results: what one threshold on FLAIR would have scored on the same test cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from callbacks.gather import gather
from lesionbench.baseline import flair_threshold_baseline
from lesionbench.prediction import CaseResult
from lesionbench.results import write_json


class FlairBaseline(pl.Callback):
    """Writes `<folder>/test/baseline.json`: Dice of the outermost region by the best FLAIR threshold, an oracle chosen on these cases.

    Works on the normalized image of the network grid, where FLAIR is comparable between cases; keeps one channel per test case in
    memory. Tasks without a channel `flair`, and cases without a label, are passed over.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._cases: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cases = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: CaseResult | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None or "flair" not in pl_module.task.channels or "label" not in batch:
            return
        flair = batch["image"][0, pl_module.task.channels.index("flair")]
        region = pl_module.task.region_masks(batch["label"][0, 0])[0]
        self._cases[outputs.case] = (flair.cpu().numpy().astype(np.float16), region.cpu().numpy())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cases = {case: pair for part in gather(self._cases) for case, pair in part.items()}
        if not cases or not trainer.is_global_zero:
            return
        threshold, dice = flair_threshold_baseline([c[0].astype(np.float32) for c in cases.values()], [c[1] for c in cases.values()])
        found = {
            "region": pl_module.task.region_names[0],
            "threshold": threshold,
            "dice": float(np.mean(dice)),
            "cases": dict(zip(cases, dice, strict=True)),
        }
        write_json(self.folder / "test" / "baseline.json", found)
