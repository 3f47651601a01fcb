"""Any user's images: a folder with `images/` and `labels/`, or a CSV or JSON list of files; classes and regions come from the configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.ranges import AnyWhole, Axis, Whole
from lesionbench.task import Task


class Folder(CaseDataModule):
    """`images/<case>_<channel>.nii.gz` with `labels/<case>.nii.gz` (raters: `labels/<case>_rater1.nii.gz` ...), or `list_file`.

    Args:
        channels, classes, regions, raters, slice_axis, unit, ignore: the task (see `Task`); by default one class, `lesion`, of value 1.
        list_file: CSV or JSON list of files instead of the folder layout.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        channels: Sequence[str],
        classes: Mapping[str, AnyWhole | Sequence[AnyWhole]] | None = None,
        regions: Mapping[str, Sequence[str]] | None = None,
        raters: Whole = 0,
        slice_axis: Axis = 2,
        unit: str = "mm",
        ignore: Sequence[AnyWhole] = (),
        list_file: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.list_file = None if list_file is None else Path(list_file).expanduser()
        self._task = Task(
            tuple(channels), classes or {"background": 0, "lesion": 1}, regions or {}, raters, slice_axis, unit, tuple(ignore)
        )
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        return find_folder(self.root, list(self._task.channels), self.list_file, self.allow_missing)
