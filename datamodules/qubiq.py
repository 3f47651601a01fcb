"""QUBIQ: quantification of uncertainties in biomedical image segmentation, six data sets drawn by two to seven experts each."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.qubiq_files import PARTS, SETS, as_volumes, find_qubiq, qubiq_task, write_volumes
from lesionbench.case import Case
from lesionbench.ranges import Count
from lesionbench.task import Task


class QUBIQ(CaseDataModule):
    """One task of one data set of the QUBIQ challenges 2020 and 2021 (Li et al., arXiv:2405.18435, 2024).

    2D files are copied once as volumes of one slice, beside the cache; 3D files are read as they are.

    Args:
        dataset: `prostate`, `brain-growth`, `brain-tumor`, `kidney`, `pancreas` or `pancreatic-lesion`.
        number: task of the data set, from 1: what is drawn.
        official: test on the challenge's validation cases, as every published number is; of the split only `val`, `train`, `labeled`
            and `seed` then count, on the training cases. False: all cases are divided by the split.
    """

    def __init__(self, root: str | Path, *, dataset: str, number: Count = 1, official: bool = True, **options: Any) -> None:
        self.dataset, self.number, self.official = dataset, number, official
        super().__init__(root, **options)

    def default_task(self) -> Task:
        return qubiq_task(self.dataset, self.number)

    @property
    def _volumes(self) -> Path:
        return self.cache_root / "volumes" / self.dataset

    def materialize(self) -> None:
        if SETS[self.dataset].dimensions == 2:
            for cases in find_qubiq(self.root, self.dataset, self.number).values():
                for case in cases:
                    write_volumes(case, self._volumes)

    def find_cases(self) -> list[Case]:
        cases = [case for cases in find_qubiq(self.root, self.dataset, self.number).values() for case in cases]
        return [as_volumes(case, self._volumes) for case in cases] if SETS[self.dataset].dimensions == 2 else cases

    def cases(self) -> list[Case]:
        """Cases of the two parts in turn, so that a limit (debugging) keeps some of both."""
        found = self.find_cases()
        parts = [[c for c in found if c.id.startswith(part.lower())] for part in PARTS]
        return [c for pair in zip_longest(*parts) for c in pair if c is not None][: self.limit_cases]

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        if not self.official:
            return super().divided(cases)
        drawn = [c for c in cases if c.raters]
        own = {part: [c for c in drawn if c.id.startswith(part.lower())] for part in PARTS}
        parts = replace(self.split, test=0, folds=None, file=None).divide(own["Training"])
        return {**parts, "test": own["Validation"]}
