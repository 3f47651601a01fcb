"""Data sets with a published division of their patients into training, validation and test."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from datamodules.base import CaseDataModule
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown


class PublishedSplit(CaseDataModule):
    """A data set whose patients are divided by a list that everybody uses.

    Of the list what is there is used, and what is not is said; the first `split.labeled` patients of the training list that are there
    keep their labels, whatever the seed.

    Args:
        named_split: name of the list, in place of `split.test`, `split.folds` and `split.file`; None = everything found is divided by `split`.
            A list without validation patients gives `split.val` of the training patients, from its end, to validation.
    """

    named_splits: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {}

    def __init__(self, root: str | Path, *, named_split: str | None, **options: Any) -> None:
        if named_split is not None and named_split not in self.named_splits:
            raise unknown("named split (data.named_split)", named_split, self.named_splits)
        self.named_split = named_split
        super().__init__(root, **options)
        if named_split is not None and (self.split.file is not None or self.split.folds is not None):
            given = "file" if self.split.file is not None else "folds"
            raise SuiteError(f"data.named_split={named_split} and data.split.{given}: give one of them, and null for the other")

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        """Patients by part, as published."""
        return self.named_splits[self.named_split]

    def ordered(self, cases: Sequence[Case]) -> list[Case]:
        """Three training patients and one of each other part in turn, in the order of the lists, one scan of each before the second of any.

        So that a limit (debugging) keeps some of each part.
        """
        by_id = super().ordered(cases)
        if self.named_split is None:
            return by_id
        there = {c.patient for c in by_id}
        train, *others = ([p for p in self.lists[part] if p in there] for part in ("train", "val", "test") if part in self.lists)
        turns = [p for turn in zip_longest(train[0::3], train[1::3], train[2::3], *others) for p in turn if p is not None]
        place = {p: n for n, p in enumerate(turns)}
        scans: Counter[str] = Counter()
        keys = {}
        for case in by_id:
            keys[case.id] = (scans[case.patient], place.get(case.patient, len(place)))
            scans[case.patient] += 1
        return sorted(by_id, key=lambda c: keys[c.id])

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        if self.named_split is None:
            return super().divided(cases)
        parts = self.split.divide([c for c in cases if c.label is not None], self.lists)
        for part in ("train", "test"):
            if not parts[part]:
                raise SuiteError(
                    f"data.named_split={self.named_split}: none of its {len(self.lists[part])} {part} patients is under {self.root} "
                    f"({len(cases)} cases found); data.named_split=null divides what is there by data.split"
                )
        return parts

    def without_label(self, cases: Sequence[Case]) -> list[Case]:
        found = super().without_label(cases)
        return found if self.named_split is None else [c for c in found if c.patient in self.lists["train"]]

    def prepare_data(self) -> None:
        first = not self._prepared
        super().prepare_data()
        if first and self.predict_cases is None and (note := self.missing()):
            print(note)

    def missing(self) -> str:
        """One line that says how much of the published list is there; empty where all is."""
        if self.named_split is None:
            return ""
        there = {c.patient for c in self.cases()}
        gaps = {part: [p for p in patients if p not in there] for part, patients in self.lists.items()}
        if not any(gaps.values()):
            return ""
        counts = ", ".join(f"{len(self.lists[part]) - len(gap)} of {len(self.lists[part])} {part}" for part, gap in gaps.items())
        labeled = "" if self.split.labeled is None else f"; labeled are the first {self.split.labeled} training patients that are there"
        return f"data.named_split={self.named_split}: {counts} patients are under {self.root}{labeled}"
