"""Images without labels, as a user brings them to a trained model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.readers.brats_files import require_channels
from datamodules.readers.folder_files import find_images, find_series, images_below
from lesionbench.case import Case
from lesionbench.dicom_files import read_series
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from lesionbench.progress import tracked
from lesionbench.task import Task


class Images(CaseDataModule):
    """Every case under `root`, named `<case>_<channel>.nii.gz` (see `find_images`); preprocessed as the checkpoint says.

    `labels` is a folder of masks `<case>.nii.gz`, for methods that work inside of a mask.

    With `incomplete`, cases that lack a channel are found too, for `leave_out_unusable` to name.

    Where there is no image file, DICOM series are looked for (`find_series`) and read into the temporary folder.

    `unused` lists the files below `root` that belong to no case, such as masks that lie beside the images.

    The preprocessed copies live in a temporary folder that goes away with the object, so that nothing is left beside the user's files.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        task: Mapping[str, Any],
        preprocessing: Preprocessing,
        statistics: dict | None = None,
        labels: str | Path | None = None,
        check: bool = True,
        incomplete: bool = False,
    ) -> None:
        self._task = Task.from_dict(task)
        self._temporary = TemporaryDirectory(prefix="lesionbench-")
        self.series: list[Case] = []
        super().__init__(root, preprocessing=preprocessing, cache=self._temporary.name, check=check, labels=labels)
        if self.root.is_dir() and not images_below(self.root):
            channels = list(self._task.channels)
            self.series = require_channels(find_series(self.root, channels), channels, self.allow_missing or incomplete)
            self.unused: list[Path] = []
        self.statistics, self.incomplete = statistics, incomplete
        self.predict_cases = self.cases()

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()  # every process that was started on its own has a temporary folder of its own
        super().setup(stage)

    def default_task(self) -> Task:
        return self._task

    def materialize(self) -> None:
        for case in tracked(self.series, len(self.series), "Reading series"):
            self._convert(case)

    def not_made(self) -> dict[str, str]:
        failed = {}
        for case in self.series:
            try:
                self._convert(case)
            except SuiteError as error:
                failed[case.id] = str(error)
        return failed

    def _convert(self, case: Case) -> None:
        for channel, folder in case.images.items():
            write_volume(self._converted(case, channel), *read_series(folder))

    def _converted(self, case: Case, channel: str) -> Path:
        return Path(self._temporary.name) / "series" / f"{case.id}_{channel}.nii.gz"

    def series_of(self, case: str) -> Path | None:
        """The folder of the DICOM series on whose grid a case lies, that of its first channel; None where its images are files."""
        return next((next(iter(known.images.values())) for known in self.series if known.id == case), None)

    def find_cases(self) -> list[Case]:
        if self.series:
            return [replace(case, images={c: self._converted(case, c) for c in case.images}) for case in self.series]
        cases = find_images(self.root, list(self._task.channels), self.allow_missing or self.incomplete)
        used = {path for case in cases for path in case.images.values()}
        self.unused = [path for path in images_below(Path(self.root)) if path not in used]
        return cases

    def findings(self, cases: Any = None, progress: bool = True) -> list:
        from datamodules.integrity import check_cases

        options: dict[str, Any] = {
            "allow_missing": self.allow_missing,
            "progress": progress,
            "header": self.preprocessing.header,
            "grid": self.preprocessing.grid,
        }
        return check_cases(self.predict_cases, self.task, splits={"predict": self.predict_ids()}, **options)
