"""Tasks of the Medical Segmentation Decathlon: images that hold all channels in one file."""

from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.nnunet_files import described_task, find_decathlon, read_description, split_channels, write_channels
from lesionbench.case import Case
from lesionbench.progress import tracked
from lesionbench.ranges import Axis
from lesionbench.task import Task


class Decathlon(CaseDataModule):
    """A folder `Task01_Name` of the Decathlon: `dataset.json`, `imagesTr`, `labelsTr` (Antonelli et al., Nature Communications 13, 2022).

    Where there are several channels, each is written to a file of its own beside the cache, once.

    Args:
        slice_axis: see `Task`.

    Raises:
        SuiteError: see `nnunet_files`.
    """

    def __init__(self, root: str | Path, *, slice_axis: Axis = 2, **options: Any) -> None:
        self.slice_axis = slice_axis
        super().__init__(root, **options)

    def default_task(self) -> Task:
        described = read_description(self.root, "the Medical Segmentation Decathlon", ("modality", "labels", "training"))
        labels = {name: int(value) if str(value).isdecimal() else value for value, name in described["labels"].items()}
        return described_task(self.root / "dataset.json", described["modality"], labels, self.slice_axis)

    def materialize(self) -> None:
        every = self.default_task().channels
        cases = find_decathlon(self.root, every) if len(every) > 1 else []
        for case in tracked(cases, len(cases), "Splitting channels"):
            write_channels(case, every, self.cache_root / "channels")

    def find_cases(self) -> list[Case]:
        every = self.default_task().channels
        cases = find_decathlon(self.root, every)
        return cases if len(every) == 1 else [split_channels(case, every, self.cache_root / "channels") for case in cases]
