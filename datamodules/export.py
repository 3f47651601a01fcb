"""Writes a data set of the suite in nnU-Net's raw format, with the same folds, so that both can be compared on the same cases."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from datamodules.base import CaseDataModule
from datamodules.preprocessing import Preprocessing, check_channels, geometry_of, read_label
from datamodules.readers.nnunet_files import SPLITS
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_header, read_volume, write_native, write_volume
from lesionbench.target import nesting
from lesionbench.task import BACKGROUND, IGNORE, Task
from lesionbench.written import whole

LAYOUTS = ("nnunet",)
ENDING = ".nii.gz"


def export_nnunet(data: CaseDataModule, out: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Writes `dataset.json`, `imagesTr`, `labelsTr`, `imagesTs` (cases without a label) and `splits_final.json` to `out`.

    Images that are NIfTI files of three axes are copied as they are, others are rewritten on their grid. Labels hold the class indices of
    the task, since nnU-Net wants values without gaps. Regions that are not single classes make nnU-Net train on regions. Of every fold
    of `data.split` what is tested here is `val`, and all others that have a label are `train`.

    Args:
        out: a folder that is not there, or empty.
        tell: gets a line at every tenth of the cases.

    Raises:
        SuiteError: `out` holds something, several raters without a label, missing channels, or what reading a case finds wrong.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SuiteError(f"out={out} is not empty; name a new folder, such as nnUNet_raw/Dataset001_Name")
    data.materialize()
    cases, task = data.cases(), data.task
    if not cases:
        raise SuiteError(f"{data.root}: no cases found")
    rated = [case.id for case in cases if case.label is None and case.raters]
    if rated:
        raise SuiteError(
            f"{len(rated)} case(s) have raters and no label ({', '.join(rated[:5])}); give data.labels=<folder> with one label map each"
        )
    for case in cases:
        check_channels(case, task, replace(data.preprocessing, allow_missing=False))
    folds = _folds(data, cases)
    for number, case in enumerate(cases, start=1):
        _write_case(case, task, data.preprocessing, out)
        if number * 10 // len(cases) > (number - 1) * 10 // len(cases):
            tell(f"{number} of {len(cases)} cases written to {out}")
    _write(out / SPLITS, folds)
    labeled = sum(case.label is not None for case in cases)
    _write(out / "dataset.json", {**description(task), "numTraining": labeled, "file_ending": ENDING})
    return out


def description(task: Task) -> dict[str, Any]:
    """`channel_names`, `labels` and, for regions, `regions_class_order` of a task as nnU-Net has them."""
    values = {name: [task.class_names.index(c) for c in members] for name, members in task.regions.items()}
    found: dict[str, Any] = {"channel_names": {str(n): name for n, name in enumerate(task.channels)}, "labels": {BACKGROUND: 0}}
    if sorted(values.values()) == [[n] for n in range(1, len(task.classes))]:
        found["labels"] |= {name: inside[0] for name, inside in sorted(values.items(), key=lambda item: item[1])}
    else:  # nnU-Net paints regions in this order, the first lowest
        order = nesting(task)
        names = list(task.regions)
        found["labels"] |= {names[r]: values[names[r]] for r, _, _ in order}
        found["regions_class_order"] = [own for _, _, own in order]
    if task.ignore:
        found["labels"]["ignore"] = len(task.classes)
    return found


def _folds(data: CaseDataModule, cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    split, folds = data.split, []
    try:
        for fold in range(split.folds or 1):
            data.split = replace(split, fold=fold) if split.folds else split
            parts = data.divided(cases)
            folds.append(
                {"train": sorted(c.id for part in ("train", "val") for c in parts[part]), "val": sorted(c.id for c in parts["test"])}
            )
    finally:
        data.split = split
    return folds


def _write_case(case: Case, task: Task, settings: Preprocessing, out: Path) -> None:
    folder = out / ("imagesTr" if case.label is not None else "imagesTs")
    for number, channel in enumerate(task.channels):
        source, target = case.images[channel], folder / f"{case.id}_{number:04d}{ENDING}"
        if source.name.endswith(ENDING) and len(nib.load(source).shape) == 3:
            with whole(target) as temporary:
                shutil.copyfile(source, temporary)
        else:
            array, affine, _ = read_volume(source, header=settings.header)
            own = read_header(source)
            write_volume(target, array, None if own else affine, own)
    if case.label is not None:
        geometry = geometry_of(case, task, settings.header)
        labels = read_label(case, case.label, task, geometry, settings)
        labels = np.where(labels == IGNORE, len(task.classes), labels).astype(np.uint8)
        write_native(out / "labelsTr" / f"{case.id}{ENDING}", labels, geometry)


def _write(path: Path, content: Any) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
