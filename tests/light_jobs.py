"""Jobs that other processes can run without importing anything large."""

import math
import os
from pathlib import Path

from omegaconf import DictConfig

from lesionbench.errors import SuiteError


def optimum(cfg: DictConfig) -> float:
    """Best, 0, at a learning rate of 0.001."""
    return -((math.log10(cfg.model.optimizer.lr) + 3) ** 2)


def process(cfg: DictConfig) -> float:
    """Leaves the number of the process that it ran in."""
    folder = Path(cfg.runs) / f"seed={cfg.seed}"
    folder.mkdir(parents=True)
    (folder / "process").write_text(str(os.getpid()))
    return float(cfg.seed)


def refusing_one(cfg: DictConfig) -> float:
    """A job that the user has to mend, for one of several seeds."""
    if cfg.seed == 1:
        raise SuiteError(f"seed={cfg.seed} is refused")
    return 0.0
