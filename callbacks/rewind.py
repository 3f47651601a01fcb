"""Curves of a resumed run: what was logged after the checkpoint goes, so that nothing stands there twice or in another order."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from callbacks.csv_logger import CurvesLogger
from callbacks.wandb_run import WandbRun
from lesionbench.checkpoint import read_checkpoint


class Rewind(pl.Callback):
    """Keeps in every checkpoint where the curves stand, and winds the loggers back to it when a run goes on from one.

    Has to be the first of the callbacks: what others log when a batch begins is logged again by a run that resumes with that batch. What
    Lightning logs only after the checkpoint of an epoch end, the values of the whole epoch, is kept in the checkpoint. What is logged when
    training starts (`on_fit_start`, `on_train_start`) stands there since it started first, and is not logged at a resume.

    Args:
        tested_after: `last.ckpt` of a training that an earlier process finished, whose test begins anew; None = nothing to wind back to.
    """

    def __init__(self, tested_after: Path | None = None) -> None:
        self.tested_after = tested_after
        self._before_batch: dict[str, int] | None = None
        self._epoch_ended = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "test" and self.tested_after is not None:
            _wind_back(trainer, read_checkpoint(self.tested_after))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        _wind_back(trainer, checkpoint)
        _mute(trainer, True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_ended = False
        _mute(trainer, False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        _mute(trainer, False)
        self._before_batch = _places(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before_batch = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _mute(trainer, False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_ended = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _mute(trainer, False)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        places = _places(trainer) if self._before_batch is None else self._before_batch
        checkpoint["curves"] = {"places": places, "epoch": _of_the_epoch(trainer) if self._epoch_ended else {}}


def _rewindable(trainer: pl.Trainer) -> Iterator[CurvesLogger | WandbRun]:
    return (logger for logger in trainer.loggers if isinstance(logger, CurvesLogger | WandbRun))


def _places(trainer: pl.Trainer) -> dict[str, int]:
    return {type(logger).__name__: logger.place for logger in _rewindable(trainer)}


def _mute(trainer: pl.Trainer, muted: bool) -> None:
    for logger in _rewindable(trainer):
        logger.muted = muted


def _of_the_epoch(trainer: pl.Trainer) -> dict[str, float]:
    """What Lightning logs next, after `on_train_epoch_end`, and under which step; {} = nothing."""
    values = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
    return {"epoch": trainer.current_epoch, "step": step, **values} if values else {}


def _wind_back(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    curves = checkpoint.get("curves")
    for logger in _rewindable(trainer):
        if curves is None:  # of a version that kept no places
            if isinstance(logger, CurvesLogger):
                logger.truncate_after(checkpoint["lesionbench"]["iteration"])
            continue
        logger.wind_back(curves["places"].get(type(logger).__name__, 0))
        if curves["epoch"]:
            values = dict(curves["epoch"])
            logger.log_metrics(values, step=int(values.pop("step")))
