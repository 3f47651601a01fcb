"""What a run costs: parameters, iterations, samples, time, memory; and the throughput while it runs."""

import json
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from callbacks.gather import gather
from lesionbench.errors import SuiteError
from lesionbench.ranges import Count
from lesionbench.results import write_json

PHASES = ("train", "validation", "test", "predict")


class Cost(pl.Callback):
    """Writes `<folder>/cost.json` and logs `perf/samples_per_s`, `perf/memory_mb` and `perf/data_wait` every few batches.

    Times, samples and the memory peak go on over resumes. `perf/data_wait` is the fraction of training time spent waiting for a batch.
    Samples count every stream's images on every process. Memory is the peak of the process that had most, in MiB: allocated GPU
    memory, or the resident set of the process on CPU. `iteration_s` is the median over the last thousand iterations, waiting included.

    Args:
        folder: run folder.
        every: batches between two logged values.
    """

    def __init__(self, folder: str, every: Count = 50) -> None:
        if every < 1:
            raise SuiteError(f"cost.every={every}: must be at least 1")
        self.folder, self.every = Path(folder), every
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = 0.0
        self._samples, self._waited, self._peak = 0, 0.0, 0.0
        self._wait = 0.0  # for the current batch
        self._mark = 0.0  # end of the last training batch, or of what came between it and the next
        self._durations: deque[float] = deque(maxlen=1000)
        self._window = (0, 0.0, 0.0)  # samples, seconds, seconds waited since the last log

    # what is kept in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        self._enter(self._phase)
        return {"seconds": dict(self._seconds), "samples": self._samples, "waited": self._waited, "peak": max(self._peak, peak_memory())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = {**self._seconds, **state_dict["seconds"]}
        self._samples, self._waited, self._peak = state_dict["samples"], state_dict["waited"], state_dict["peak"]

    # phases

    def _enter(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("train")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        self._enter("train" if training else None)
        self._mark = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self.folder / "cost.json"
        if trainer.is_global_zero and not path.exists():  # killed after its last checkpoint, a resumed run trains no more
            write_json(path, self.report(trainer, pl_module))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("predict")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer, pl_module)

    # batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._wait = time.perf_counter() - self._mark

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        duration, samples = now - self._mark, samples_of(batch) * trainer.world_size
        self._mark = now
        self._durations.append(duration)
        self._samples += samples
        self._waited += self._wait
        self._window = tuple(a + b for a, b in zip(self._window, (samples, duration, self._wait), strict=True))
        if (batch_idx + 1) % self.every == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (samples, seconds, waited), self._window = self._window, (0, 0.0, 0.0)
        values = {"perf/samples_per_s": samples / seconds, "perf/memory_mb": peak_memory(), "perf/data_wait": waited / seconds}
        trained = pl_module.iteration + 1  # the module counts this batch after its callbacks
        for logger in trainer.loggers:
            logger.log_metrics({**values, "iteration": float(trained), "epoch": float(trainer.current_epoch)}, step=trained)

    # result

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        phase = self._phase
        self._enter(None)
        self._peak = max(self._peak, *gather(peak_memory()))
        if not trainer.is_global_zero:
            return
        path = self.folder / "cost.json"
        report = self.report(trainer, pl_module)
        if phase != "train" and path.exists():  # testing comes after training, maybe in another process
            before = json.loads(path.read_text())
            report = {**before, f"{phase}_s": self._seconds[phase], "peak_memory_mb": max(self._peak, before["peak_memory_mb"])}
            report["wall_s"] = sum(report[f"{p}_s"] for p in PHASES)
        write_json(path, report)

    def report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The cost so far, as plain data; times in seconds."""
        parameters = list(pl_module.parameters())
        train = self._seconds["train"]
        return {
            "parameters": sum(p.numel() for p in parameters),
            "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "iterations": pl_module.iteration,
            "samples": self._samples,
            "wall_s": sum(self._seconds.values()),
            **{f"{phase}_s": seconds for phase, seconds in self._seconds.items()},
            "peak_memory_mb": self._peak,
            "samples_per_s": self._samples / train if train else None,
            "iteration_s": statistics.median(self._durations) if self._durations else None,
            "data_wait": self._waited / train if train else None,
            "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else platform.processor() or platform.machine(),
            "devices": trainer.world_size,
        }


def peak_memory() -> float:
    """Largest memory of this process so far, in MiB: allocated on the GPU where one is used, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows, where only the GPU branch can be used

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def samples_of(batch: Any) -> int:
    """Images in a batch, or in all batches of a mapping of streams."""
    if not isinstance(batch, Mapping):
        return 0
    return len(batch["image"]) if "image" in batch else sum(samples_of(stream) for stream in batch.values())
