"""Predictions as image files on the grid and with the label values of the input."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from callbacks.case_callback import CaseCallback
from lesionbench import dicom_segmentation
from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import WRITTEN, write_native
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.results import write_rows
from lesionbench.task import Task

DEFAULT, SEGMENTATION = ".nii.gz", ".dcm"


class NiftiWriter(CaseCallback):
    """Writes `<case>.nii.gz` for every predicted case: label values on disk, on the native grid, with the header of the input.

    Predicted images that are NRRD or MetaImage files are answered in their own format; test cases always as NIfTI.

    On request also `<case>_prob_<region>.nii.gz` and `<case>_uncertainty_<name>.nii.gz` (float32), and `<case>_<member>.nii.gz`.
    Anomaly scores, where the method has them, go to `<case>_score.nii.gz`; case-level results of all cases to `table.csv`.

    Where predicted images are DICOM series, labels are also written as the DICOM segmentation `<case>.dcm` (see `dicom_segmentation`).

    Args:
        folder: run folder; files go to `<folder>/predictions`.
        labels, probabilities, uncertainty, members: which maps to write.
        on_test: also write the predictions of test cases; those of an earlier test of the run are replaced.
        overwrite: let prediction replace files.
        format: ending of the files of `job=predict`, one of `geometry.WRITTEN`; None = as the case's first image (`.nii.gz` for all
            but NRRD and MetaImage).
        dicom: DICOM segmentations too: None = where the input is DICOM and highdicom is installed.

    Raises:
        SuiteError: an unknown format, or prediction would replace a file; raised before any inference where the data module can tell the cases.
            With `dicom=True` also an input that is no DICOM, and highdicom that is not there.
    """

    def __init__(
        self,
        folder: str,
        labels: bool = True,
        probabilities: bool = False,
        uncertainty: bool = False,
        members: bool = False,
        on_test: bool = False,
        overwrite: bool = False,
        format: str | None = None,
        dicom: bool | None = None,
    ) -> None:
        if format is not None and format not in WRITTEN:
            raise unknown("writer.format", str(format), WRITTEN)
        if dicom and not dicom_segmentation.can_write():
            raise SuiteError(f"writer.dicom=true needs highdicom: {dicom_segmentation.how_to_install()}")
        self.format, self.dicom = format, dicom
        self.folder = Path(folder) / "predictions"
        self.labels, self.probabilities, self.uncertainty, self.members = labels, probabilities, uncertainty, members
        self.stages = ("test", "predict") if on_test else ("predict",)
        self.overwrite = overwrite

    def refuse_existing(self, method: Any, data: Any) -> None:
        """Looks, before anything is prepared or predicted, for files that `job=predict` would replace.

        Raises:
            SuiteError: names the first file in the way; or `dicom=True` and a case that is no DICOM series.
        """
        if self.dicom:
            for case in data.predict_ids():
                series = data.series_of(case) if hasattr(data, "series_of") else None
                if series is None:
                    raise SuiteError(f"writer.dicom=true: case {case} is no DICOM series; leave it out, or give input=<folder of series>")
                missing = dicom_segmentation.lacking(series)
                if missing:
                    raise SuiteError(
                        f"writer.dicom=true: {series}: files without {', '.join(missing)}, which a segmentation refers to; writer.dicom=false"
                    )
        if not self.overwrite:
            suffixes = ["", "_score", *(f"_prob_{r}" for r in method.task.region_names)]
            endings = [self.format] if self.format else WRITTEN
            files = [self._path(case, suffix, e) for case in data.predict_ids() for suffix in suffixes for e in endings]
            files += [self._path(case, "", SEGMENTATION) for case in data.predict_ids() if self._series(data, case) is not None]
            self._refuse([*files, self.folder / "table.csv"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict" and hasattr(trainer.datamodule, "predict_ids"):
            self.refuse_existing(pl_module, trainer.datamodule)

    def empty(self, method: Any) -> list[dict[str, Any]]:
        return []

    def add(self, result: CaseResult, batch: Batch, method: Any) -> None:
        prediction = result.prediction
        if not result.native:
            prediction = prediction.map(result.geometry.to_native, partial(result.geometry.to_native, discrete=True))
        if not self.members:
            prediction = replace(prediction, members={})
        ending = DEFAULT if method.trainer.testing else self.format or _answering(result.geometry.ending)
        files = {self._path(result.case, suffix, ending): array for suffix, array in self._arrays(prediction, method.task)}
        segmentation, series = self._path(result.case, "", SEGMENTATION), self._series(method.trainer.datamodule, result.case)
        if not (self.overwrite or method.trainer.testing):
            self._refuse(files if series is None else [*files, segmentation])
        for path, array in files.items():
            write_native(path, array, result.geometry)
        if series is not None and self.labels and prediction.labels is not None:
            dicom_segmentation.write_segmentation(
                segmentation, prediction.labels.cpu().numpy(), method.task, series, made_by=type(method).__name__
            )
        who = {"case": result.case, "patient": result.patient, "site": result.site, "region": ""}
        self.collected += [{**who, "member": name, **part.table} for name, part in prediction.flat() if part.table]

    def _arrays(self, prediction: Prediction, task: Task) -> Iterator[tuple[str, np.ndarray]]:
        for name, part in prediction.flat():
            member = f"_{name.replace('/', '_')}" if name else ""
            if self.labels and part.labels is not None:
                yield member, task.to_disk(part.labels.cpu().numpy())
            if self.probabilities and part.regions is not None:
                yield from ((f"{member}_prob_{r}", _float(p)) for r, p in zip(task.region_names, part.regions, strict=True))
            if self.uncertainty:
                yield from ((f"{member}_uncertainty_{n}", _float(u)) for n, u in part.uncertainty.items())
            if part.scores is not None:
                yield f"{member}_score", _float(part.scores)

    def _series(self, data: Any, case: str) -> Path | None:
        """The DICOM series that a case's segmentation refers to, if one is to be written."""
        if self.dicom is False or not hasattr(data, "series_of") or not dicom_segmentation.can_write():
            return None
        series = data.series_of(case)
        return None if series is None or dicom_segmentation.lacking(series) else series

    def _path(self, case: str, suffix: str, ending: str) -> Path:
        return self.folder / f"{case}{suffix}{ending}".replace("/", "_")

    def _refuse(self, files: Iterable[Path]) -> None:
        existing = next((file for file in files if file.exists()), None)
        if existing is not None:
            raise SuiteError(f"{existing} exists already; give another out=<folder>, or overwrite=true to replace it")

    def write(self, ranks: Sequence[Sequence[dict[str, Any]]], method: Any) -> None:
        rows = [row for rank in ranks for row in rank]
        if rows:
            write_rows(self.folder / "table.csv", sorted(rows, key=lambda row: row["case"]))


def _answering(ending: str) -> str:
    """The format in which an image of this ending is answered; NIfTI always compressed."""
    return {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}.get(ending, DEFAULT)


def _float(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
