"""The embedded data set: real anatomy with simulated pathology, made on first use. A stand-in, never a benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from datamodules.simulated.simulation import Simulation, task_of, write_folder
from lesionbench.case import Case
from lesionbench.keyed import key
from lesionbench.ranges import Count, Positive, Whole
from lesionbench.task import Task


class Simulated(CaseDataModule):
    """`count` simulated cases under `root/<variant>-<key of the settings>`.

    Args:
        variant: `tumor`, `stroke`, `spots`, `tissue`, `raters`, `healthy` or `habitats`.
        count: number of cases.
        difficulty: `easy`, `default`, `hard`, or a mapping that changes single values of `default`.
        spacing: voxel size in mm.
        simulation_seed: of the generator; training seeds leave the cases as they are.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        variant: str = "tumor",
        count: Count = 24,
        difficulty: str | Mapping[str, Any] = "default",
        spacing: Positive = 2.0,
        simulation_seed: Whole = 0,
        **options: Any,
    ) -> None:
        self.settings = Simulation(variant=variant, seed=simulation_seed, spacing=spacing, difficulty=difficulty)
        limit = options.get("limit_cases")
        self.count = count if limit is None else min(count, limit)
        super().__init__(Path(root) / f"{variant}-{key(self.settings) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return task_of(self.settings.variant)

    def materialize(self) -> None:
        write_folder(self.root, self.settings, range(self.count))

    def find_cases(self) -> list[Case]:
        return [c for c in find_folder(self.root, list(self.default_task().channels)) if int(c.id.rsplit("_", 1)[1]) < self.count]
