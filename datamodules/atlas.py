"""ATLAS: T1-weighted MRI of chronic stroke with lesion masks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.readers.atlas_files import NAMED_SPLITS, RELEASES, find_atlas, merge_masks
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.task import Task


class Atlas(CaseDataModule):
    """Anatomical Tracings of Lesions After Stroke (Liew et al., Scientific Data 5, 2018; R2.0: Scientific Data 9, 2022).

    A scan may have several masks, one per lesion; their union is the label, kept beside the cache.

    Args:
        release: `1.2` or `2.0`, see `find_atlas`.
        named_split: None, or a published list of test scans in place of `split.test` and `split.folds`; all other patients train and
            validate. `wong2021`: the 27 scans of R1.2 of Wong et al., BrainLes 2021.
    """

    def __init__(self, root: str | Path, *, release: str | float = "1.2", named_split: str | None = None, **options: Any) -> None:
        if named_split is not None and named_split not in NAMED_SPLITS:
            raise unknown("named split (data.named_split)", named_split, NAMED_SPLITS)
        if str(release) not in RELEASES:
            raise unknown("ATLAS release (data.release)", str(release), RELEASES)
        self.release, self.named_split = str(release), named_split
        super().__init__(root, **options)
        if named_split is not None and self.split.file is not None:
            raise SuiteError(f"data.named_split={named_split} and data.split.file={self.split.file}: give one of them")

    def default_task(self) -> Task:
        return Task(("t1",), {"background": 0, "lesion": 1}, {"LESION": ("lesion",)})

    def materialize(self) -> None:
        for case, masks in find_atlas(self.root, self.release):
            if masks:
                merge_masks(masks, self._label(case))

    def find_cases(self) -> list[Case]:
        found = find_atlas(self.root, self.release)
        return [replace(case, label=self._label(case) if masks else None) for case, masks in found]

    def _label(self, case: Case) -> Path:
        return self.cache_root / "merged" / f"{case.id}.nii.gz"

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        if self.named_split is None:
            return super().divided(cases)
        listed = set(NAMED_SPLITS[self.named_split])
        test = [c for c in cases if c.id in listed]
        missing = sorted(listed - {c.id for c in test})
        if missing and (self.limit_cases is None or not test):
            raise SuiteError(
                f"data.named_split={self.named_split}: {len(missing)} of its {len(listed)} test scans are not under {self.root} "
                f"({', '.join(missing[:5])} ...); it belongs to ATLAS R1.2"
            )
        patients = {c.patient for c in test}
        rest = [c for c in cases if c.label is not None and c.patient not in patients]
        return {**replace(self.split, test=0, folds=None).divide(rest), "test": test}
