"""Cubes that brains were mapped to, as a data set to train and validate on."""

from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.readers.folder_files import find_folder
from datamodules.split import Split
from lesionbench.case import Case
from lesionbench.cubes import CubeStore
from lesionbench.ranges import Count
from lesionbench.task import Task


class Cubes(CaseDataModule):
    """The cubes of a finished `CubeStore`, whole ones as samples; their cases are divided as those that they were made from.

    Attributes:
        origin: what the cubes were made from (`CubeStore.origin`); what is trained on them is for such cases.

    Args:
        root: folder of the store.
        samples_per_epoch: None = the number of training cases.
        options: of `CaseDataModule`.

    Raises:
        SuiteError: no finished store.
    """

    def __init__(self, root: str | Path, *, samples_per_epoch: Count | None = None, **options: Any) -> None:
        store = CubeStore(root)
        self.origin = store.origin
        options |= {"preprocessing": Preprocessing(crop="none", normalize="none"), "split": Split(file=str(store.split)), "check": False}
        super().__init__(root, samples_per_epoch=samples_per_epoch or len(store.parts["train"]), **options)
        self.statistics = self.origin["statistics"]

    def default_task(self) -> Task:
        return Task.from_dict(self.origin["task"])

    def find_cases(self) -> list[Case]:
        return find_folder(self.root, list(self.default_task().channels))

    def fingerprint(self) -> str | None:
        """That of the cases from which the cubes were made."""
        return self.origin["cases"]
