"""Finds the cases of the QUBIQ challenges 2020 and 2021 on disk, and brings their 2D images to volumes of one slice."""

import re
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from datamodules.provenance import derive
from datamodules.readers.brats_files import require_root
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import volume_file, write_volume
from lesionbench.task import Task

PARTS = ("Training", "Validation")
_MASK = re.compile(r"task0*(\d+)_seg0*(\d+)\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class QubiqSet:
    """One data set of the challenge: its channels, number of tasks (structures), largest number of raters, and 2 or 3 dimensions."""

    channels: tuple[str, ...]
    tasks: int
    raters: int
    dimensions: int


SETS = {
    "prostate": QubiqSet(("mr",), 2, 6, 2),
    "brain-growth": QubiqSet(("mr",), 1, 7, 2),
    "brain-tumor": QubiqSet(("mr1", "mr2", "mr3", "mr4"), 3, 3, 2),
    "kidney": QubiqSet(("ct",), 1, 3, 2),
    "pancreas": QubiqSet(("ct",), 1, 2, 3),
    "pancreatic-lesion": QubiqSet(("ct",), 1, 2, 3),
}


def qubiq_task(dataset: str, number: int) -> Task:
    """The task `number` (from 1) of a data set; 2D sets count in pixels.

    Raises:
        SuiteError: an unknown data set or task.
    """
    if dataset not in SETS:
        raise unknown("QUBIQ data set (data.dataset)", dataset, SETS)
    known = SETS[dataset]
    if not 1 <= number <= known.tasks:
        raise SuiteError(f"data.number={number}: {dataset} has the tasks 1 to {known.tasks}")
    unit = "vox" if known.dimensions == 2 else "mm"
    return Task(known.channels, {"background": 0, "structure": (1, 255)}, {f"TASK{number}": ("structure",)}, known.raters, unit=unit)


def find_qubiq(root: Path, dataset: str, number: int) -> dict[str, list[Case]]:
    """`Training` and `Validation` -> cases, sorted by id; images and raters are the files of the challenge, as they are.

    Layout: `<root>/<dataset>/{Training,Validation}/case01/image.nii.gz` beside `task01_seg01.nii.gz`, one file per task and rater;
    `root` may also be the folder of the data set itself. Raters come in the order of their numbers. Every channel of a multi-channel
    image names the same file. A case without raters for the task has none (`Case.raters` empty).

    Raises:
        SuiteError: missing folders or images (all at once), no case, or more raters than the data set has.
    """
    root = require_root(root, "QUBIQ")
    home = root / dataset if (root / dataset).is_dir() else root
    if not (home / PARTS[0]).is_dir():
        raise SuiteError(
            f"{root}: no folder {dataset}/{PARTS[0]}; expected {dataset}/Training/case01/image.nii.gz and task01_seg01.nii.gz ..."
        )
    found = {part: [_case(f, part, dataset, number) for f in _case_folders(home / part)] for part in PARTS}
    lost = [case.id for cases in found.values() for case in cases if not case.images]
    if lost:
        raise SuiteError(f"{home}: no image.nii.gz in {len(lost)} case folder(s): {', '.join(lost[:5])}")
    if not found[PARTS[0]]:
        raise SuiteError(f"{home / PARTS[0]}: no case folder; expected case01, case02 ...")
    return found


def _case_folders(part: Path) -> list[Path]:
    return sorted(f for f in part.iterdir() if f.is_dir() and f.name.lower().startswith("case")) if part.is_dir() else []


def _case(folder: Path, part: str, dataset: str, number: int) -> Case:
    image = volume_file(folder, "image")
    masks = {int(m[2]): f for f in folder.iterdir() if (m := _MASK.fullmatch(f.name)) and int(m[1]) == number}
    if len(masks) > SETS[dataset].raters:
        raise SuiteError(f"{folder}: {len(masks)} raters of task {number}; {dataset} has at most {SETS[dataset].raters}")
    return Case(
        id=f"{part.lower()}_{folder.name}",
        images={} if image is None else dict.fromkeys(SETS[dataset].channels, image),
        raters=[masks[n] for n in sorted(masks)],
    )


def as_volumes(case: Case, folder: Path) -> Case:
    """The case with the files that `write_volumes` makes of it under `folder`, there or not."""

    def moved(path: Path, name: str) -> Path:
        return folder / case.id / f"{name}.nii.gz"

    images = {channel: moved(path, channel) for channel, path in case.images.items()}
    return Case(case.id, images, raters=[moved(path, path.name.removesuffix(".gz").removesuffix(".nii")) for path in case.raters])


def write_volumes(case: Case, folder: Path) -> None:
    """Writes every channel and mask of a 2D case as a volume (H, W, 1) of unit voxels under `folder`, unless made from it before.

    In the challenge a 2D file may have two axes or a further one of length one, and a multi-channel image has its channels on the first
    axis. Headers say nothing that can be relied on, so that axes are kept and sizes count in pixels. Masks become 0 and 1.

    Raises:
        SuiteError: an unreadable file, or one that is no 2D image with these channels; names the file.
    """
    target = as_volumes(case, folder)
    for number, (channel, source) in enumerate(case.images.items()):
        image = target.images[channel]
        derive([image], [source], partial(_write_plane, image, source, len(case.images), number))
    for source, mask in zip(case.raters, target.raters, strict=True):
        derive([mask], [source], partial(_write_mask, mask, source))


def _write_plane(target: Path, source: Path, channels: int, number: int) -> None:
    write_volume(target, _planes(source, channels)[number][..., None], np.eye(4))


def _write_mask(target: Path, source: Path) -> None:
    write_volume(target, (_planes(source, 1)[0] > 0)[..., None].astype(np.uint8), np.eye(4))


def _planes(path: Path, channels: int) -> np.ndarray:
    """(C, H, W) of a 2D file."""
    try:
        array = np.squeeze(np.asanyarray(nib.load(path).dataobj))
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error) as error:
        raise SuiteError(f"{path}: cannot be read as a NIfTI image ({error})") from None
    if channels == 1 and array.ndim == 2:
        return array[None]
    if channels > 1 and array.ndim == 3 and channels in (array.shape[0], array.shape[-1]):
        return array if array.shape[0] == channels else np.moveaxis(array, -1, 0)
    raise SuiteError(f"{path}: expected a 2D image with {channels} channel(s) on the first axis, got shape {array.shape}")
