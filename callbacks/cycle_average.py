"""Stochastic weight averaging over cycles of the learning rate."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging

from lesionbench.errors import SuiteError
from lesionbench.ranges import Count


class CycleAverage(WeightAveraging):
    """The mean of the weights after every epoch, while the training goes on from the weights as they are (Izmailov et al., UAI 2018).

    The training has several cycles of equal length; at the first batch of each, the optimizers forget what they had gathered, as
    `schedules.cosine_cycles` starts the learning rate anew. The mean is what is validated, saved and tested. Buffers are averaged with the
    weights, so that batch normalization has the mean of its running statistics.

    Args:
        cycles: their number.

    Raises:
        SuiteError: fewer than one cycle.
    """

    def __init__(self, cycles: Count = 5) -> None:
        super().__init__(use_buffers=True)
        if cycles < 1:
            raise SuiteError(f"callbacks.swa.cycles={cycles}: must be at least 1")
        self.cycles = cycles

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        done, total = int(pl_module.iteration), int(pl_module.total_iterations)
        if done == 0 or done * self.cycles // total != (done - 1) * self.cycles // total:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
