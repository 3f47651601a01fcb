"""Per-case results of a run as tables."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from callbacks.wandb_run import WandbRun
from lesionbench.results import KEYS, Summary, pool_slices, summarize, write_json, write_rows


class CaseTable(pl.Callback):
    """Writes `<folder>/{validation,test}/cases.csv` (validation: of the last epoch) and `<folder>/test/summary.json`; with the metric
    `slices` also `<folder>/test/slices.csv`, pooled over cases, and `<folder>/test/dataset.json` where something is measured over the
    voxels of all test cases as one set.

    Rows come from `pl_module.val_results` and `pl_module.test_results`, whose `compute()` gathers those of all ranks, as does that of
    `pl_module.dataset_results`. W&B, where it is one of the loggers, gets the test rows as a table, and their means as
    `test/<metric>_<region>` (of a member: `test/<member>/...`).

    Args:
        folder: run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = pl_module.val_results.compute()
        if rows and trainer.is_global_zero and not trainer.sanity_checking:
            write_rows(self.folder / "validation" / "cases.csv", rows)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows, whole = pl_module.test_results.compute(), pl_module.dataset_results.compute()
        if not rows or not trainer.is_global_zero:
            return
        write_rows(self.folder / "test" / "cases.csv", rows)
        summary = summarize(rows)
        write_json(self.folder / "test" / "summary.json", summary)
        if pooled := pool_slices(rows):
            write_rows(self.folder / "test" / "slices.csv", pooled, keys=("member", "region", "stratum"))
        if whole:
            write_json(self.folder / "test" / "dataset.json", whole)
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_table("test/cases", *_table(rows))
                logger.log_summary(_means(summary))


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    columns = [*KEYS, *dict.fromkeys(name for row in rows for name in row if name not in KEYS)]
    return columns, [[row.get(c, "" if c in KEYS else None) for c in columns] for row in rows]


def _means(summary: Summary) -> dict[str, float]:
    return {
        "/".join(["test", *([member] if member else []), f"{metric}_{region}" if region else metric]): values["mean"]
        for member, regions in summary.items()
        for region, metrics in regions.items()
        for metric, values in metrics.items()
        if values["mean"] is not None
    }
