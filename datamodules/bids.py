"""BIDS folders: raw images and derivatives, subjects, sessions and `participants.tsv`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.bids_files import find_bids
from lesionbench.case import Case
from lesionbench.ranges import AnyWhole, Axis
from lesionbench.task import Task


class BIDS(CaseDataModule):
    """A folder in the Brain Imaging Data Structure (Gorgolewski et al., Scientific Data 3, 2016), such as ATLAS R2.0 and ISLES 2022.

    Args:
        images: channel -> end of the file's name (see `find_bids`); None = `{t1: T1w}`. All channels of a case lie on one grid.
        label: end of the name of the label map; None for none.
        classes, regions, slice_axis, unit, ignore: the task (see `Task`); by default one class, `lesion`, of value 1.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        images: Mapping[str, str] | None = None,
        label: str | None = None,
        classes: Mapping[str, AnyWhole | Sequence[AnyWhole]] | None = None,
        regions: Mapping[str, Sequence[str]] | None = None,
        slice_axis: Axis = 2,
        unit: str = "mm",
        ignore: Sequence[AnyWhole] = (),
        **options: Any,
    ) -> None:
        self.images, self.label = dict(images or {"t1": "T1w"}), label
        self._task = Task(
            tuple(self.images),
            classes or {"background": 0, "lesion": 1},
            regions or {},
            slice_axis=slice_axis,
            unit=unit,
            ignore=tuple(ignore),
        )
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        return find_bids(self.root, self.images, self.label, self.allow_missing, self.task.channels)
