"""IBSR-18: brain tissue in T1-weighted MRI of 18 healthy subjects."""

from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.ibsr_files import find_ibsr, ibsr_task
from lesionbench.case import Case
from lesionbench.ranges import Axis
from lesionbench.task import Task


class IBSR(CaseDataModule):
    """The Internet Brain Segmentation Repository, V2.0: 18 T1 volumes of 256 x 128 x 256 voxels, 1.5 mm thick in the middle axis.

    The MR brain data sets and their manual segmentations are provided by the Center for Morphometric Analysis at Massachusetts General
    Hospital; the skull-stripped NIfTI form is by Rohlfing, IEEE TMI 31(2), 2012.

    Args:
        files, image, label: which of the published files are read (see `find_ibsr`).
        slice_axis, unit: see `ibsr_task`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        files: str = "nifti",
        image: str = "ana_strip",
        label: str = "segTRI",
        slice_axis: Axis | None = None,
        unit: str = "mm",
        **options: Any,
    ) -> None:
        self.files, self.image, self.label = files, image, label
        self._task = ibsr_task(files, slice_axis, unit)
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        return find_ibsr(self.root, self.files, self.image, self.label)
