"""BraTS: multi-parametric MRI of brain tumors with expert labels, challenge years 2018 to 2026."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import CaseDataModule
from datamodules.integrity import UNKNOWN_VALUE, Finding
from datamodules.readers.brats_files import brats_task, find_brats, other_layouts
from lesionbench.case import Case
from lesionbench.geometry import read_volume
from lesionbench.task import Task


class BraTS(CaseDataModule):
    """The Brain Tumor Segmentation Challenge (Menze et al., IEEE TMI 2015; Bakas et al. 2018; Baid et al. 2021).

    `layout` is the published set whose folder and file names are used (a key of `brats_files.LAYOUTS`, such as 2021 or 2024_ped); it also
    decides what label values mean, and the regions.
    """

    def __init__(self, root: str | Path, *, layout: str | int = "2020", **options: Any) -> None:
        self.layout = str(layout)
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return brats_task(self.layout)

    def find_cases(self) -> list[Case]:
        return find_brats(self.root, self.layout, self.allow_missing, self.task.channels)

    def findings(self, cases: Sequence[Case] | None = None, progress: bool = True) -> list[Finding]:
        """The integrity check; a label map with values of another set says which that could be."""
        return [self._with_hint(finding) for finding in super().findings(cases, progress)]

    def _with_hint(self, finding: Finding) -> Finding:
        if finding.message != UNKNOWN_VALUE or finding.file is None:
            return finding
        fitting = other_layouts(finding.case, self.layout, (int(v) for v in np.unique(read_volume(finding.file)[0])))
        return replace(finding, value=f"{finding.value}; fits {' or '.join(fitting)}") if fitting else finding
