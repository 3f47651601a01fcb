"""Images without labels, as a user brings them to a trained model."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.readers.folder_files import find_images
from lesionbench.case import Case
from lesionbench.task import Task


class Images(CaseDataModule):
    """Every case under `root`, named `<case>_<channel>.nii.gz` (see `find_images`); preprocessed as the checkpoint says.

    `labels` is a folder of masks `<case>.nii.gz`, for methods that work inside of a mask.

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
    ) -> None:
        self._task = Task.from_dict(task)
        self._temporary = TemporaryDirectory(prefix="lesionbench-")
        super().__init__(root, preprocessing=preprocessing, cache=self._temporary.name, check=True, labels=labels)
        self.statistics = statistics
        self.predict_cases = self.cases()

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()  # every process that was started on its own has a temporary folder of its own
        super().setup(stage)

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        return find_images(self.root, list(self._task.channels), self.allow_missing)

    def findings(self, cases: Any = None, progress: bool = True) -> list:
        from datamodules.integrity import check_cases

        return check_cases(
            self.predict_cases, self.task, splits={"predict": self.predict_ids()}, allow_missing=self.allow_missing, progress=progress
        )
