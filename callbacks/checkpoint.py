"""Checkpoints from which a run continues exactly: the best and the last."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from callbacks.nan_guard import NanGuard, NonFiniteLoss, advice
from callbacks.wandb_run import WandbRun
from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Positive
from lesionbench.stopping import Stopped
from lesionbench.written import whole


class BestAndLast(Checkpoint):
    """Keeps `<folder>/checkpoints/best.ckpt` (where `monitor` improved) and `last.ckpt` (the newest); each appears atomically.

    `last.ckpt` is written at every epoch end and, where asked for, every so many batches or minutes. These are saved just before the
    next batch begins: by then every hook has updated its state (an EMA teacher, the iteration) and a validation that was due has run,
    so nothing is lost or repeated on resume. On SIGTERM it is written at once; a validation that was cut is repeated. On another
    exception it is written too (in one process: with several, the others could not follow), unless the batch had changed gradients or
    weights by then: what comes after the last checkpoint is then computed again.
    Weights that are not finite are never saved. W&B, where it is one of the loggers, gets those that it asks for when training ends.

    Args:
        folder: run folder.
        monitor: metric logged in validation; None = no `best.ckpt`. Without validation there is none either.
        mode: `max` or `min`.
        every_n_batches: counted by `pl_module.iteration`.
        every_n_minutes: of wall time since the last one.

    Raises:
        SuiteError: an unknown mode, an interval that is not positive, a monitor that validation did not log.
        NonFiniteLoss: when it finds weights that are not finite.
    """

    def __init__(
        self,
        folder: str,
        monitor: str | None = "val/dice",
        mode: str = "max",
        every_n_batches: Count | None = None,
        every_n_minutes: Positive | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise unknown("checkpoint.mode", mode, ["max", "min"])
        for name, value in [("every_n_batches", every_n_batches), ("every_n_minutes", every_n_minutes)]:
            if value is not None and value <= 0:
                raise SuiteError(f"checkpoint.{name}={value}: must be positive, or null")
        self.folder, self.monitor, self.mode = Path(folder), monitor, mode
        self.every_n_batches, self.every_n_minutes = every_n_batches, every_n_minutes
        self._score: float | None = None
        self.best_model_path, self.last_model_path = "", ""  # Lightning reads both, and sets them after a forked run
        self._saved = 0  # iteration of last.ckpt; 0 = nothing trained yet
        self._stopped = False  # whether another callback had ended the training by then
        self._since = time.monotonic()
        self._within_batch = False  # from the first gradient of a batch to its end

    @property
    def best_model_score(self) -> float | None:
        """The best value of `monitor` so far."""
        return self._score

    def state_dict(self) -> dict[str, Any]:
        paths = {"best": bool(self.best_model_path), "last": bool(self.last_model_path)}
        return {"score": self._score, "saved": self._saved, "stopped": self._stopped, **paths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._score, self._saved, self._stopped = state_dict["score"], state_dict["saved"], state_dict.get("stopped", False)
        for kind in ("best", "last"):
            if state_dict[kind]:
                setattr(self, f"{kind}_model_path", str(self._path(kind)))

    def _path(self, kind: str) -> Path:
        return self.folder / "checkpoints" / f"{kind}.ckpt"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.world_size > 1 and batch_idx % getattr(pl_module, "accumulate", 1):
            return  # summed gradients differ between processes: wait for the step
        if pl_module.iteration != self._saved and self._due(trainer, pl_module):
            _check(trainer, pl_module)
            with _between_batches(trainer):
                self._save_last(trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._within_batch = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._within_batch = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            raise unknown("checkpoint.monitor", self.monitor, trainer.callback_metrics)
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if score != score or (self._score is not None and not (score > self._score if self.mode == "max" else score < self._score)):
            return
        _check(trainer, pl_module)
        self._score = score
        self._save(trainer, pl_module, "best")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check(trainer, pl_module)
        self._save_last(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_checkpoints(self.folder / "checkpoints")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != TrainerFn.FITTING or pl_module.iteration == self._saved or isinstance(exception, NonFiniteLoss | Stopped):
            return  # `Stopped` comes ahead of the first batch, where a checkpoint to go on from may be half read
        if not isinstance(exception, SIGTERMException) and (trainer.world_size > 1 or self._within_batch):
            return
        if not _finite(pl_module):
            return
        if trainer.validating and not _rewind_validation(trainer, pl_module):
            return
        self._save_last(trainer, pl_module)

    def _due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if self.every_n_batches and pl_module.iteration % self.every_n_batches == 0:
            return True
        if self.every_n_minutes is None or (
            trainer.world_size > 1 and pl_module.iteration % 20
        ):  # processes must agree: not at every batch
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._since >= 60 * self.every_n_minutes)

    def _save_last(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved, self._stopped, self._since = pl_module.iteration, trainer.should_stop, time.monotonic()
        self._save(trainer, pl_module, "last")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: str) -> None:
        if trainer.fast_dev_run:
            return
        path = self._path(kind)
        setattr(self, f"{kind}_model_path", str(path))
        if trainer.is_global_zero:
            with whole(path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(path)  # takes part; the first process writes
        trainer.strategy.barrier("checkpoint in place")


@contextmanager
def _between_batches(trainer: pl.Trainer) -> Iterator[None]:
    """In `on_train_batch_start`: the loop's progress as it was before the batch was announced."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch
    progress.is_last_batch = False
    for tracker in (progress.total, progress.current):
        tracker.ready -= 1
    try:
        yield
    finally:
        progress.is_last_batch = is_last
        for tracker in (progress.total, progress.current):
            tracker.ready += 1


def _rewind_validation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Puts a validation that was cut back to its first case, so that a resumed run repeats it. False where it was not among the cases."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    current, total = progress.current, progress.total
    if current.ready == 0 or (progress.is_last_batch and current.completed == current.ready):
        return False
    total.processed = total.completed = total.completed - current.completed
    total.ready = total.started = total.completed + 1
    current.processed = current.completed = 0
    current.ready = current.started = 1
    progress.is_last_batch = False
    for callback in trainer.callbacks:  # averaged weights stand in for the raw ones during validation
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_end(trainer, pl_module)
    return True


def _check(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raises where the training has become meaningless; a guard, which knows the cases, is asked first."""
    for callback in trainer.callbacks:
        if isinstance(callback, NanGuard):
            callback.read(trainer)
    if not _finite(pl_module):
        raise NonFiniteLoss(f"The weights are not finite after iteration {pl_module.iteration}. {advice(trainer)}")


def _finite(pl_module: pl.LightningModule) -> bool:
    flags = [torch.isfinite(p.detach()).all() for p in pl_module.parameters()]
    return not flags or bool(torch.stack(flags).all())
