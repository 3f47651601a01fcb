"""The base of callbacks that look at every tested case and write once, when all of them are there."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pytorch_lightning as pl

from callbacks.gather import gather
from lesionbench.batch import Batch
from lesionbench.prediction import CaseResult

K = TypeVar("K")
V = TypeVar("V")


class CaseCallback(pl.Callback):
    """Collects from the results of this rank's cases, brings the ranks together, and lets the first one write.

    A subclass says with what a rank begins (`empty`), what a case adds to `self.collected` (`add`), and what is written of all ranks
    (`write`). Results that are None, of cases that only even out the ranks, never reach `add`. Every rank takes part in the gathering,
    whatever it has collected; one that has to do more than the first may override `finish`, which all of them call.

    Attributes:
        stages: `test`, `predict` or both: when it looks.
        collected: what this rank has so far; plain data, since it goes from process to process.
    """

    stages: ClassVar[tuple[str, ...]] = ("test",)
    collected: Any

    def empty(self, method: Any) -> Any:
        """What a rank begins with."""
        return {}

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        """Takes in one case."""
        raise TypeError(f"{type(self).__name__} must define add()")

    def write(self, ranks: Sequence[Any], method: Any) -> None:
        """Writes what all ranks have collected, by rank; called on the first one."""
        raise TypeError(f"{type(self).__name__} must define write()")

    def finish(self, ranks: Sequence[Any], trainer: pl.Trainer, method: Any) -> None:
        """Called on every rank with what all of them have collected."""
        if trainer.is_global_zero:
            self.write(ranks, method)

    # Lightning's hooks

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start("test", pl_module)

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start("predict", pl_module)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._add("test", outputs, batch, pl_module)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._add("predict", outputs, batch, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish("test", trainer, pl_module)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish("predict", trainer, pl_module)

    def _start(self, stage: str, method: Any) -> None:
        if stage in self.stages:
            self.collected = self.empty(method)

    def _add(self, stage: str, result: Any, batch: Any, method: Any) -> None:
        if stage in self.stages and isinstance(result, CaseResult):
            self.add(result, batch, method)

    def _finish(self, stage: str, trainer: pl.Trainer, method: Any) -> None:
        if stage in self.stages:
            ranks, self.collected = gather(self.collected), self.empty(method)
            self.finish(ranks, trainer, method)


def summed(ranks: Sequence[Mapping[K, V]]) -> dict[K, V]:
    """Counts of every rank -> their sums, by name, in the order in which the names first come."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: sum(rank[name] for rank in ranks if name in rank) for name in names}
