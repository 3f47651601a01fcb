"""Runs jobs inside the test process: composed like on the command line, on tiny data, killed or not."""

import csv
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.jobs.command_line import CONF, quoted
from lesionbench.jobs.composition import complete
from lesionbench.jobs.main import run_job
from lesionbench.resolvers import register
from lesionbench.written import locked

# small enough for seconds, large enough that every part is exercised
SMALL = [
    "experiment=supervised/folder", "augmentation=light", "epochs=3", "patch=[8,8,8]", "data.samples_per_epoch=8", "data.batch_size=2", "data.num_workers=0",
    "data.split.test=2", "data.split.val=1", "data.channels=[t1,flair]", "model/scheduler=poly", "metrics.names=[dice,hd95]", "data.check=false",
    "~model.network", "+model.network={_target_:tests.toys.small_net,_partial_:true}", "~model.loss", "+model.loss={_target_:tests.toys.MeanCE}", "callbacks.figures=null", "threads=1", "trust=[tests]",
]  # fmt: skip


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """The configuration for these command-line overrides; with `hydra` also Hydra's own, which knows what was chosen of every group."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=quoted(overrides), return_hydra_config=True)
    with open_dict(cfg):
        own = cfg.pop("hydra")
    complete(cfg, own.runtime.choices)
    if hydra:
        with open_dict(cfg):
            cfg.hydra = own
    return cfg


@cache
def shared(*overrides: str) -> DictConfig:
    """What `composed` gives, once for all tests that do not change it."""
    return composed(*overrides)


def run(*overrides: str) -> float | None:
    """One job, in this process."""
    return run_composed(composed(*overrides))


def run_composed(cfg: DictConfig, **changes: Any) -> float | None:
    """The job of a configuration of `composed`, which stays as it is, with other values of keys that choose nothing of a group."""
    os.environ.pop("LESIONBENCH_RUN_FOLDER", None)
    cfg = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    return run_job(cfg)


def run_killed(*overrides: str) -> int:
    """One job in a process of its own that is expected to die; returns its exit code (negative = signal)."""
    process = multiprocessing.get_context("fork").Process(target=run, args=overrides)
    process.start()
    process.join(300)
    return process.exitcode


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Another process has this lock."""
    ready, done = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def hold() -> None:
        with locked(lock, "held already"):
            ready.set()
            done.wait(300)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        done.set()
        process.join(60)


def program(log: Path, *arguments: str, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The command line in a process and process group of its own, where `before` is called first: exit code and what it printed, in `log`."""
    process = multiprocessing.get_context("fork").Process(target=_program, args=(log, arguments, before))
    process.start()
    process.join(300)
    return process.exitcode, log.read_text()


def _program(log: Path, arguments: Sequence[str], before: Callable[[], None]) -> None:
    from lesionbench.jobs.program import main

    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.pop("LESIONBENCH_RUN_FOLDER", None)
    GlobalHydra.instance().clear()
    sys.argv = ["run.py", *arguments]
    before()
    main()


def run_folders(runs: Path) -> list[Path]:
    """Every run folder under `runs`."""
    return sorted(p.parent for p in Path(runs).rglob("config.yaml"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(folder: Path) -> list[dict[str, str]]:
    """The per-case results of a run."""
    with (folder / "test" / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit-identical weights."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
