"""The 2018 left-atrium challenge: late gadolinium-enhanced MRI of the heart."""

from pathlib import Path
from typing import Any

from datamodules.published import PublishedSplit
from datamodules.readers.left_atrium_files import FILES, NAMED_SPLITS, as_case, find_left_atrium, write_scan
from lesionbench.case import Case
from lesionbench.errors import unknown
from lesionbench.task import Task


class LeftAtrium(PublishedSplit):
    """100 scans of 0.625 mm with the cavity of the left atrium drawn (Xiong et al., Medical Image Analysis 67, 2021).

    Files are copied once as NIfTI volumes beside the cache, see `write_scan`.

    Args:
        files: `h5` (as the semi-supervised literature keeps them: cropped around the atrium, z-scores of the whole scan) or `nrrd` (the
            challenge's own; give a crop).
        named_split: `yu2019` (80 to train on and 20 to test on, in the order of Yu et al., MICCAI 2019), or None. See `PublishedSplit`.
        unit: of distances: `vox`, as in the tables of the literature, or `mm`.
    """

    named_splits = NAMED_SPLITS

    def __init__(
        self, root: str | Path, *, files: str = "h5", named_split: str | None = "yu2019", unit: str = "vox", **options: Any
    ) -> None:
        if files not in FILES:
            raise unknown("form of the left-atrium files (data.files)", files, FILES)
        self.files = files
        self._task = Task(("mri",), {"background": 0, "atrium": (1, 255)}, {"LA": ("atrium",)}, unit=unit)
        super().__init__(root, named_split=named_split, **options)

    def default_task(self) -> Task:
        return self._task

    @property
    def _volumes(self) -> Path:
        return self.cache_root / "volumes" / self.files

    def materialize(self) -> None:
        wanted = {case.id for case in self.cases()}
        for scan in find_left_atrium(self.root, self.files):
            if scan.id in wanted:
                write_scan(scan, self._volumes)

    def find_cases(self) -> list[Case]:
        return [as_case(scan, self._volumes) for scan in find_left_atrium(self.root, self.files)]
