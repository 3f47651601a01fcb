"""Finds the cases of ACDC on disk: the challenge's NIfTI folders, or the HDF5 volumes and slices of the semi-supervised literature."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.provenance import derive
from datamodules.readers.array_files import h5_array, h5_names, write_pair
from datamodules.readers.brats_files import require_root
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import NIFTI_ENDINGS, volume_file

FILES = ("h5", "nifti")

_TRAIN = (
    "099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 043 041 063 037 "
    "095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 062 034 076 092 070 077 067 003 "
    "091 016 014 044 042 090 053 027 035 086 023 009 079 015"
)
_VAL = "028 085 082 087 019 030 078 045 002 039"
_TEST = "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052"


def _patients(numbers: str) -> tuple[str, ...]:
    return tuple(f"patient{n}" for n in numbers.split())


# 70 / 10 / 20 patients (Luo et al., MIDL 2022, and the semi-supervised ACDC tables since); the first 3, 7 or 14 are labeled. The published
# lists number the two frames of a patient 01 and 02, others by their place in the cycle: patients are what counts.
NAMED_SPLITS = {"luo2022": {"train": _patients(_TRAIN), "val": _patients(_VAL), "test": _patients(_TEST)}}

_VOLUME = re.compile(r"(?P<frame>(?P<patient>patient\d{3})_frame\d+)\.h5")
_SLICE = re.compile(r"(?P<frame>(?P<patient>patient\d{3})_frame\d+)_slice_(?P<number>\d+)\.h5")
_FRAME = re.compile(r"(?P<patient>patient\d{3})_frame(?P<number>\d+)\.nii(\.gz)?")
EXPECTED = {
    "h5": "data/patient001_frame01.h5, or data/slices/patient001_frame01_slice_1.h5 ...",
    "nifti": "patient001/Info.cfg, patient001/patient001_frame01.nii.gz, patient001/patient001_frame01_gt.nii.gz",
}


@dataclass(frozen=True)
class Stack:
    """One frame in HDF5: a file with the whole volume, or one file per slice in ascending order."""

    id: str
    patient: str
    files: tuple[Path, ...]
    labeled: bool

    @property
    def is_volume(self) -> bool:
        """Whether one file holds all slices."""
        return _VOLUME.fullmatch(self.files[0].name) is not None


def find_stacks(root: Path) -> list[Stack]:
    """The frames in HDF5 under `root`, at most three folders deep, sorted by id; a volume file is preferred to the slices of its frame.

    Files are opened to see whether they hold a label (one slice for its stack); no voxels are read.

    Raises:
        SuiteError: a missing folder, no frames, one frame in two places, slices missing in between.
    """
    root = require_root(root, "ACDC")
    found = sorted(p for up in ("", "*/", "*/*/", "*/*/*/") for p in root.glob(f"{up}patient*.h5"))
    volumes: dict[str, list[Path]] = {}
    slices: dict[str, dict[int, Path]] = {}
    for path in found:
        if match := _VOLUME.fullmatch(path.name):
            volumes.setdefault(match["frame"], []).append(path)
        elif match := _SLICE.fullmatch(path.name):
            numbered = slices.setdefault(match["frame"], {})
            if other := numbered.get(int(match["number"])):
                raise SuiteError(f"{root}: one slice twice: {other} and {path}; keep one")
            numbered[int(match["number"])] = path
    if not volumes and not slices:
        raise _nothing(root, "h5")
    if twice := next((paths for paths in volumes.values() if len(paths) > 1), None):
        raise SuiteError(f"{root}: one frame twice: {twice[0]} and {twice[1]}; keep one")
    stacks = {frame: (paths[0],) for frame, paths in volumes.items()}
    stacks |= {frame: _in_order(frame, numbered) for frame, numbered in slices.items() if frame not in volumes}
    return [Stack(f, f.partition("_")[0], stacks[f], "label" in h5_names(stacks[f][0])) for f in sorted(stacks)]


def _in_order(frame: str, numbered: dict[int, Path]) -> tuple[Path, ...]:
    first, last = min(numbered), max(numbered)
    if gaps := [n for n in range(first, last + 1) if n not in numbered]:
        raise SuiteError(f"{numbered[first].parent}: {frame} has the slices {first} to {last} without {gaps}; copy them again")
    return tuple(numbered[n] for n in sorted(numbered))


def stack_case(stack: Stack, folder: Path) -> Case:
    """The case with the files that `write_stack` makes of the frame under `folder`, there or not."""
    home = folder / stack.id
    return Case(stack.id, {"mri": home / "mri.nii"}, label=home / "label.nii" if stack.labeled else None, patient=stack.patient)


def write_stack(stack: Stack, folder: Path) -> None:
    """Writes image and label as NIfTI (X, Y, slices) under `folder`, unless made from these files before.

    The files hold (slices, Y, X), the axes of the challenge's NIfTI files reversed; voxel sizes they do not hold: voxels have unit size.

    Raises:
        SuiteError: an unreadable file, wrong dimensions, slices of different shapes; names the file.
    """
    targets = stack_case(stack, folder).files
    derive(targets, stack.files, lambda: _write_stack(stack, targets))


def _write_stack(stack: Stack, targets: Sequence[Path]) -> None:
    def volume(name: str) -> np.ndarray:
        if stack.is_volume:
            return h5_array(stack.files[0], name, 3).T
        planes = [h5_array(path, name, 2) for path in stack.files]
        for path, plane in zip(stack.files, planes, strict=True):
            if plane.shape != planes[0].shape:
                raise SuiteError(f"{path}: '{name}' has shape {plane.shape}, {stack.files[0].name} has {planes[0].shape}")
        return np.stack(planes).T

    write_pair(volume("image"), volume("label") if stack.labeled else None, np.eye(4), targets, stack.files[0])


@dataclass
class _Info:
    """What `Info.cfg` says: frame number -> `ED` or `ES`, and the patient's attributes."""

    phases: dict[int, str] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def find_niftis(root: Path) -> list[Case]:
    """The two frames of each patient folder under `root` (or `training/`, `testing/` below it, at most two folders deep), sorted by id.

    End diastole (`ED`) and end systole (`ES`) are those that `Info.cfg` names; without that file, all frames that are there. Attributes:
    `phase`, `group` (NOR, MINF, DCM, HCM, RV), `height` (cm), `weight` (kg). A frame without `_gt` file has no label.

    Raises:
        SuiteError: a missing folder, no cases, one patient twice, frames that `Info.cfg` names and that are not there (all at once).
    """
    root = require_root(root, "ACDC")
    folders = [f for up in ("", "*/", "*/*/") for f in sorted(root.glob(f"{up}patient[0-9][0-9][0-9]")) if f.is_dir()]
    cases = [case for folder in folders for case in _frames(folder)]
    if not cases:
        raise _nothing(root, "nifti")
    if lost := [case.id for case in cases if not case.images]:
        raise SuiteError(
            f"{root}: {len(lost)} frame(s) named by Info.cfg are not there: {', '.join(lost[:5])}; expected {EXPECTED['nifti']}"
        )
    ids = [case.id for case in cases]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SuiteError(f"{root}: two scans of one name: {twice[:5]}; is the data set unpacked twice?")
    return sorted(cases, key=lambda c: c.id)


def _frames(folder: Path) -> list[Case]:
    info = _info(folder / "Info.cfg")
    there = {int(m["number"]) for f in folder.iterdir() if (m := _FRAME.fullmatch(f.name)) and m["patient"] == folder.name}
    return [_frame(folder, number, info) for number in sorted(info.phases or there)]


def _frame(folder: Path, number: int, info: _Info) -> Case:
    name = f"{folder.name}_frame{number:02d}"
    image = volume_file(folder, name)
    phase = {"phase": info.phases[number]} if number in info.phases else {}
    return Case(
        name,
        {} if image is None else {"mri": image},
        volume_file(folder, f"{name}_gt"),
        patient=folder.name,
        attributes=phase | info.attributes,
    )


def _info(path: Path) -> _Info:
    info = _Info()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for key, _, value in (line.partition(":") for line in lines):
        key, value = key.strip(), value.strip()
        try:
            if key in ("ED", "ES"):
                info.phases[int(value)] = key
            elif key in ("Height", "Weight"):
                info.attributes[key.lower()] = float(value)
            elif key == "Group":
                info.attributes["group"] = value
        except ValueError:
            raise SuiteError(f"{path}: {key} is '{value}', expected a number") from None
    return info


def _nothing(root: Path, files: str) -> SuiteError:
    endings = {"h5": (".h5",), "nifti": NIFTI_ENDINGS}
    fits = next((f"; what is there fits data.files={k}" for k in FILES if k != files and _holds(root, endings[k])), "")
    there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
    return SuiteError(f"{root}: no ACDC frames, it holds {there}; expected files such as {EXPECTED[files]}{fits}")


def _holds(root: Path, endings: Iterable[str]) -> bool:
    return any(p.name.endswith(tuple(endings)) for up in ("", "*/", "*/*/", "*/*/*/") for p in root.glob(f"{up}patient*_frame*"))


def check_files(files: str) -> None:
    """Refuses an unknown form of the files.

    Raises:
        SuiteError: names the known ones.
    """
    if files not in FILES:
        raise unknown("form of the ACDC files (data.files)", files, FILES)
