"""BraTS: multi-parametric MRI of gliomas with expert labels, challenge years 2018 to 2023."""

from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.brats_files import brats_task, find_brats
from lesionbench.case import Case
from lesionbench.task import Task


class BraTS(CaseDataModule):
    """The Brain Tumor Segmentation Challenge (Menze et al., IEEE TMI 2015; Bakas et al. 2018; Baid et al. 2021).

    `layout` is the challenge year whose folder and file names are used (2018, 2019, 2020, 2021, 2023); it also decides the value that
    the enhancing tumor has on disk (4, from 2023 on 3).
    """

    def __init__(self, root: str | Path, *, layout: str | int = "2020", **options: Any) -> None:
        self.layout = str(layout)
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return brats_task(self.layout)

    def find_cases(self) -> list[Case]:
        return find_brats(self.root, self.layout, self.allow_missing, self.task.channels)
