"""Data sets in nnU-Net's raw format: channels, labels, regions, file ending and folds are read from the folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.nnunet_files import SPLITS, described_task, find_nnunet, nnunet_split, read_description
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.ranges import Axis
from lesionbench.task import Task


class NNUNet(CaseDataModule):
    """A folder `Dataset001_Name` of nnU-Net version 2: `dataset.json`, `imagesTr`, `labelsTr` (Isensee et al., Nature Methods 2021).

    Where `splits_final.json` lies beside it (nnU-Net keeps it with the preprocessed data), `split.fold` counts its folds: what nnU-Net
    validates on is tested, and `split.val` of the rest, from the end of its list, validates. Otherwise `split` divides as everywhere.

    Args:
        slice_axis: see `Task`.
        splits: None = `splits_final.json` in the root, where it is there; another file; or False for none.

    Raises:
        SuiteError: see `nnunet_files`; a file of splits that is not there.
    """

    def __init__(self, root: str | Path, *, slice_axis: Axis = 2, splits: str | Path | bool | None = None, **options: Any) -> None:
        self.slice_axis = slice_axis
        super().__init__(root, **options)
        self.splits = None if splits is False else Path(splits).expanduser() if splits else self.root / SPLITS
        if splits and not self.splits.is_file():
            raise SuiteError(f"data.splits={splits}: no such file")

    def default_task(self) -> Task:
        described = read_description(self.root, "nnU-Net", ("channel_names", "labels", "file_ending"))
        return described_task(self.root / "dataset.json", described["channel_names"], described["labels"], self.slice_axis)

    def find_cases(self) -> list[Case]:
        return find_nnunet(self.root, self.task.channels, self.default_task().channels, self.allow_missing)

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        if self.splits is None or not self.splits.is_file() or self.split.test == "all":
            return super().divided(cases)
        wanted, patients = nnunet_split(self.splits, self.split.fold), {c.id: c.patient for c in cases}
        lost = [i for ids in wanted.values() for i in ids if i not in patients]
        if lost and self.limit_cases is None:
            raise SuiteError(
                f"{self.splits}: {len(lost)} case(s) that are not there: {', '.join(lost[:5])}; data.splits=false divides anew"
            )
        lists = {part: list(dict.fromkeys(patients[i] for i in ids if i in patients)) for part, ids in wanted.items()}
        both = sorted(set(lists["train"]) & set(lists["test"]))
        if both:
            raise SuiteError(f"{self.splits}: patient {both[0]} is in train and val of fold {self.split.fold}")
        return self.split.divide([c for c in cases if c.label is not None], published=lists)
