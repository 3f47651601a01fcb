"""Images without labels, as a user brings them to a trained model."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.readers.folder_files import find_images, images_below
from lesionbench.case import Case
from lesionbench.task import Task


class Images(CaseDataModule):
    """Every case under `root`, named `<case>_<channel>.nii.gz` (see `find_images`); preprocessed as the checkpoint says.

    `labels` is a folder of masks `<case>.nii.gz`, for methods that work inside of a mask.

    With `incomplete`, cases that lack a channel are found too, for `leave_out_unusable` to name.

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
        super().__init__(root, preprocessing=preprocessing, cache=self._temporary.name, check=check, labels=labels)
        self.statistics, self.incomplete = statistics, incomplete
        self.predict_cases = self.cases()

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()  # every process that was started on its own has a temporary folder of its own
        super().setup(stage)

    def default_task(self) -> Task:
        return self._task

    def find_cases(self) -> list[Case]:
        cases = find_images(self.root, list(self._task.channels), self.allow_missing or self.incomplete)
        used = {path for case in cases for path in case.images.values()}
        self.unused = [path for path in images_below(Path(self.root)) if path not in used]
        return cases

    def findings(self, cases: Any = None, progress: bool = True) -> list:
        from datamodules.integrity import check_cases

        options: dict[str, Any] = {"allow_missing": self.allow_missing, "progress": progress, "header": self.preprocessing.header}
        return check_cases(self.predict_cases, self.task, splits={"predict": self.predict_ids()}, **options)
