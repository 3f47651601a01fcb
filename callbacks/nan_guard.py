"""Stops a training that has become meaningless, and says which cases did it."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.gather import gather
from lesionbench.errors import SuiteError
from lesionbench.ranges import Count


class NonFiniteLoss(SuiteError):
    """A loss or a weight is NaN or infinite."""


class NanGuard(pl.Callback):
    """Looks at the loss of every batch and raises `NonFiniteLoss` at the first that is NaN or infinite.

    Flags stay on the device and are read together every few batches, since each reading waits for the GPU. The loss is what
    `training_step` returns; where it returns none (manual optimization), every logged `train/...` value is looked at.

    Args:
        every: batches between two readings; by default 1 on CPU and 10 on GPU. The error still names the first bad batch.
    """

    def __init__(self, every: Count | None = None) -> None:
        if every is not None and every < 1:
            raise SuiteError(f"nan_guard.every={every}: must be at least 1")
        self.every = every
        self._pending: list[tuple[int, list[str], torch.Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pending = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        flags = [torch.isfinite(loss.detach()).all() for loss in _losses(trainer, outputs)]
        flag = torch.stack(flags).all() if flags else torch.tensor(True, device=pl_module.device)
        self._pending.append((pl_module.iteration, list(cases_of(batch)), flag))
        if len(self._pending) >= (self.every or (10 if flag.is_cuda else 1)):
            self.read(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read(trainer)

    def read(self, trainer: pl.Trainer) -> None:
        """Raises if a batch since the last reading had a loss that is not finite. Collective."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        finite = torch.stack([flag for *_, flag in pending])
        bad = (~finite).any().float()
        if trainer.world_size > 1:  # all ranks stop together, or the others would wait for this one
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        if not bad.item():
            return
        found = [(iteration, cases) for (iteration, cases, _), good in zip(pending, finite.tolist(), strict=True) if not good]
        first = min((batch for rank in gather(found) for batch in rank), key=lambda batch: batch[0])
        raise NonFiniteLoss(
            f"The loss is not finite in iteration {first[0]}, cases {', '.join(first[1]) or '(unnamed)'}. {advice(trainer)}"
        )


def advice(trainer: pl.Trainer) -> str:
    """What is left to continue from and what to change."""
    kept = getattr(trainer.checkpoint_callback, "last_model_path", "")
    kept = f"The last good checkpoint is kept: {kept}." if kept else "No checkpoint had been written yet."
    return f"{kept} Try a lower learning rate, clip=1, or precision=32; if it is always the same case, run job=check."


def cases_of(batch: Any) -> Iterator[str]:
    """Ids of the cases in a batch, or in a mapping of stream name to batch."""
    if isinstance(batch, Mapping):
        if "case" in batch:
            yield from batch["case"]
        else:
            for stream in batch.values():
                yield from cases_of(stream)


def _losses(trainer: pl.Trainer, outputs: Any) -> list[torch.Tensor]:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, torch.Tensor):
        return [loss]
    return [v for k, v in trainer.callback_metrics.items() if k.startswith("train/")]
