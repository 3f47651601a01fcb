"""Progress for people at a terminal and for log files."""

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar

from lesionbench.progress import PATIENCE, Tenths
from lightning_modules.inferers import watch


def progress_bar() -> ProgressBar:
    """A rich progress bar at an interactive terminal, else one line per epoch."""
    return CaseBar(leave=True) if sys.stdout.isatty() else LineProgress()


class CaseBar(RichProgressBar):
    """Lightning's bar, with one more for the passes over the case that is tested or predicted."""

    _case: Any = None  # the number of that bar

    def _begin_case(self) -> None:
        if self.is_enabled and self.progress is not None:
            self._case = self._add_task(1, "case")
            watch(self._passed)

    def _passed(self, done: int, passes: int) -> None:
        if self.progress is not None and self._case is not None:
            self.progress.update(self._case, completed=done, total=passes)
            self.refresh()

    def _end_case(self) -> None:
        watch(None)
        if self.progress is not None and self._case is not None:
            self.progress.remove_task(self._case)
            self._case = None

    def on_test_batch_start(self, *hook: Any, **more: Any) -> None:
        super().on_test_batch_start(*hook, **more)
        self._begin_case()

    def on_test_batch_end(self, *hook: Any, **more: Any) -> None:
        self._end_case()
        super().on_test_batch_end(*hook, **more)

    def on_predict_batch_start(self, *hook: Any, **more: Any) -> None:
        super().on_predict_batch_start(*hook, **more)
        self._begin_case()

    def on_predict_batch_end(self, *hook: Any, **more: Any) -> None:
        self._end_case()
        super().on_predict_batch_end(*hook, **more)


class LineProgress(ProgressBar):
    """Prints `epoch 3/10  loss 0.4321  val/dice 0.712  4.1 it/s  ETA 0:01:23` at every epoch end, from rank zero.

    The loss is the mean over the epoch's batches; the speed leaves validation out, the remaining time includes it. A run that is resumed
    counts the batches of this process alone.

    A case that takes long in testing or prediction has a line for each tenth of its passes, `predict  case_07  40 of 400 passes (10 %)  ETA
    0:04:10`; a method that goes over a case several times begins again.

    Args:
        patience: seconds of a case without such lines.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        super().__init__()
        self.patience = patience
        self._enabled = True
        self._begin_epoch()
        self._paused = self._trained_s = self._evaluated_s = 0.0  # the last two of all epochs
        self._trained = self._epochs = 0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained_s, self._evaluated_s, self._trained, self._epochs = 0.0, 0.0, 0, 0
        self._begin_epoch()  # one that is resumed in the middle has no start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._started, self._evaluated, self._batches = time.monotonic(), 0.0, 0
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses = [sum(self._losses, loss.detach().float())]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated += time.monotonic() - self._paused

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained_s = time.monotonic() - self._started - self._evaluated
        self._epochs += 1
        self._trained += self._batches
        self._trained_s += trained_s
        self._evaluated_s += self._evaluated
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else "")]
        parts += [f"loss {float(total) / self._batches:.4f}" for total in self._losses]
        parts += [f"{name} {float(value):.3f}" for name, value in trainer.callback_metrics.items() if name == "val/dice"]
        parts.append(f"{self._batches / max(trained_s, 1e-9):.1f} it/s")
        if (trainer.max_epochs or -1) > 0 and math.isfinite(trainer.num_training_batches):
            epoch_s = self._trained_s / max(self._trained, 1) * trainer.num_training_batches + self._evaluated_s / self._epochs
            parts.append(f"ETA {timedelta(seconds=round(epoch_s * (trainer.max_epochs - trainer.current_epoch - 1)))}")
        self.print("  ".join(parts))

    def _watch(self, job: str, batch: Any) -> None:
        names = batch.get("case") if isinstance(batch, Mapping) else None
        label = f"{job}  {names[0]}" if names else job
        watch(Tenths(label, "passes", self.print, self.patience))

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *where: Any) -> None:
        self._watch("test", batch)

    def on_test_batch_end(self, *hook: Any, **more: Any) -> None:
        watch(None)

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *where: Any) -> None:
        self._watch("predict", batch)

    def on_predict_batch_end(self, *hook: Any, **more: Any) -> None:
        watch(None)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.print(f"test  {sum(trainer.num_test_batches)} cases  {time.monotonic() - self._started:.1f} s")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.print(f"predict  {sum(trainer.num_predict_batches)} cases  {time.monotonic() - self._started:.1f} s")
