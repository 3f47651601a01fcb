"""ACDC: cine MRI of the heart in short-axis slices, at end diastole and end systole."""

from pathlib import Path
from typing import Any

from datamodules.published import PublishedSplit
from datamodules.readers.acdc_files import NAMED_SPLITS, check_files, find_niftis, find_stacks, stack_case, write_stack
from lesionbench.case import Case
from lesionbench.task import Task


class ACDC(PublishedSplit):
    """The Automated Cardiac Diagnosis Challenge: right ventricle, myocardium, left ventricle (Bernard et al., IEEE TMI 37, 2018).

    Slices are up to 10 mm apart, so networks are trained on slices (`view: slice`) and tested on the stacks. HDF5 files are copied once as
    NIfTI volumes beside the cache, see `write_stack`; NIfTI files are read as they are.

    Args:
        files: `h5` (volumes or slices, as the semi-supervised literature keeps them) or `nifti` (the challenge's own).
        named_split: `luo2022` (70 patients to train, 10 to validate, 20 to test on), or None. See `PublishedSplit`.
        unit: of distances: `vox`, as in the tables of the literature, or `mm`, for NIfTI files.
    """

    named_splits = NAMED_SPLITS

    def __init__(
        self, root: str | Path, *, files: str = "h5", named_split: str | None = "luo2022", unit: str = "vox", **options: Any
    ) -> None:
        check_files(files)
        self.files = files
        self._task = Task(
            ("mri",), {"background": 0, "rv": 1, "myo": 2, "lv": 3}, {"RV": ("rv",), "MYO": ("myo",), "LV": ("lv",)}, unit=unit
        )
        super().__init__(root, named_split=named_split, **options)

    def default_task(self) -> Task:
        return self._task

    @property
    def _volumes(self) -> Path:
        return self.cache_root / "volumes"

    def materialize(self) -> None:
        if self.files == "h5":
            wanted = {case.id for case in self.cases()}
            for stack in find_stacks(self.root):
                if stack.id in wanted:
                    write_stack(stack, self._volumes)

    def find_cases(self) -> list[Case]:
        if self.files == "nifti":
            return find_niftis(self.root)
        return [stack_case(stack, self._volumes) for stack in find_stacks(self.root)]
