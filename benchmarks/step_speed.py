"""A training step through `run.py`'s job against a bare PyTorch loop over the same batches in memory, and with the real loader.

    python benchmarks/step_speed.py

Both train the default small 3D U-Net on the same pre-made batches with the same loss and optimizer. Through the job means: the composed
configuration, Lightning, default callbacks, csv logger. Epochs of either are run in turn (A B, B A, ...); compared are the medians of the
seconds between the starts of two steps.
"""

import contextlib
import io
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from interleaved import machine
from omegaconf import open_dict
from torch.utils.data import DataLoader

from lesionbench.jobs.assembled import Assembled
from lesionbench.jobs.command_line import CONF
from lesionbench.resolvers import register

BATCHES, ROUNDS = 12, 4
OVERRIDES = [
    "data.limit_cases=8",
    "data.split.test=1",
    "data.split.val=0",
    "threads=1",
    "data.num_workers=0",
    "patch=[64,64,64]",
    "data.batch_size=2",
]


class Stamps(pl.Callback):
    """When each batch starts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times[1:])]  # without the first step, which warms up


def assembled(scratch: str) -> Assembled:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*OVERRIDES, f"data.root={scratch}/data", "epochs=1", f"data.samples_per_epoch={2 * BATCHES}"])
    with open_dict(cfg):
        cfg.run_folder = f"{scratch}/run"
    run = Assembled(cfg)
    run.prepare()
    return run


def through_the_job(scratch: str, batches: list[Any] | None) -> list[float]:
    """One epoch through the job; `batches` None = by the real loader."""
    run = assembled(scratch)
    if batches is not None:
        run.data.train_dataloader = lambda: DataLoader(batches, batch_size=None)
    stamps = Stamps()
    run.trainer.callbacks.append(stamps)
    with contextlib.redirect_stdout(io.StringIO()):
        run.trainer.fit(run.method, datamodule=run.data)
    return gaps(stamps.times)


def bare(scratch: str, batches: list[Any]) -> list[float]:
    """The same network, loss and optimizer in five lines."""
    method = assembled(scratch).method.train()
    optimizer = method.optimizer(method.parameters())
    times = []
    for batch in batches:
        times.append(time.perf_counter())
        loss = method.loss(method.network(batch["image"]), method.target.encode(batch["label"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gaps(times)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = assembled(scratch)
        run.data.setup("fit")
        loader = iter(run.data.train_dataloader())
        batches = [next(loader) for _ in range(BATCHES)]
        found: dict[str, list[float]] = {"bare loop": [], "run.py": [], "run.py, real loader": []}
        ways = {
            "bare loop": lambda: bare(scratch, batches),
            "run.py": lambda: through_the_job(scratch, batches),
            "run.py, real loader": lambda: through_the_job(scratch, None),
        }
        for number in range(ROUNDS):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                found[name] += ways[name]()
    print(machine())
    base = statistics.median(found["bare loop"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"{name:20s} {middle * 1e3:7.1f} ms a step ({len(values)} steps)  speed {base / middle:.3f} of the bare loop")


if __name__ == "__main__":
    main()
