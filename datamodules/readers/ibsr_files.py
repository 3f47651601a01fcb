"""Finds the cases of IBSR-18 (IBSR V2.0) on disk, in the NIfTI and the Analyze form that it was published in."""

import re
from collections.abc import Iterable
from pathlib import Path

from datamodules.readers.brats_files import require_root
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import NIFTI_ENDINGS
from lesionbench.task import Task

FILES = {"nifti": NIFTI_ENDINGS, "analyze": (".img",)}
IMAGES = ("ana_strip", "ana")
LABELS = ("segTRI", "segTRI_fill")
THICK_AXIS = {"nifti": 1, "analyze": 2}  # of 1.5 mm; Analyze headers hold no orientation, so axes stay in the order of the file

_CASE = re.compile(r"IBSR_\d\d")
_FOLDERS = ("", "images/analyze", "segmentation/analyze")


def ibsr_task(files: str = "nifti", slice_axis: int | None = None, unit: str = "mm") -> Task:
    """The tissue task: CSF (1), GM (2) and WM (3) in one T1.

    Args:
        files: `nifti` or `analyze`.
        slice_axis: axis of the canonical array along which slices are cut; None = the axis of 128 slices, 1.5 mm apart.
        unit: `mm`, or `vox` for distances in voxels.

    Raises:
        SuiteError: unknown `files` or `unit`.
    """
    _check_known("files", files, FILES)
    axis = THICK_AXIS[files] if slice_axis is None else slice_axis
    return Task(channels=("t1",), classes={"background": 0, "CSF": 1, "GM": 2, "WM": 3}, slice_axis=axis, unit=unit)


def find_ibsr(root: Path, files: str = "nifti", image: str = "ana_strip", label: str = "segTRI") -> list[Case]:
    """The cases of an IBSR-18 folder, sorted by id (`IBSR_01` ... `IBSR_18`).

    Case folders may lie in `root` or up to two folders below it; files in the case folder, or in its `images/analyze/` and
    `segmentation/analyze/`. A case without the label map has label None, as long as another one has it.

    Args:
        root: folder with the unpacked archive.
        files: `nifti` (`.nii.gz` or `.nii`) or `analyze` (`.img` with `.hdr`).
        image: `ana_strip` (skull-stripped) or `ana` (whole head), of `IBSR_01_<image>`.
        label: `segTRI` (the tissues as drawn) or `segTRI_fill` (what is left of the brain mask counts as CSF), of
            `IBSR_01_<label>_ana`.

    Raises:
        SuiteError: unknown names, a missing folder, no cases, missing images or headers (all listed at once), no label at all.
    """
    for kind, name, known in (("files", files, FILES), ("image", image, IMAGES), ("label", label, LABELS)):
        _check_known(kind, name, known)
    root = require_root(root, "IBSR")
    folders = _case_folders(root)
    if not folders:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        raise SuiteError(f"{root}: no IBSR case folders, it holds {there}; {_expected(files, image, label)}")
    found = {f.name: (_file(f, image, files), _file(f, f"{label}_ana", files)) for f in folders}
    if lost := [f"{name}_{image}" for name, (path, _) in found.items() if path is None]:
        raise SuiteError(
            f"{root}: {len(lost)} of {len(found)} cases lack their image: {', '.join(lost)}; {_advice(folders, files, image, label)}"
        )
    if not any(path for _, path in found.values()):
        raise SuiteError(f"{root}: no case has a label {folders[0].name}_{label}_ana; {_advice(folders, files, image, label)}")
    cases = [Case(id=name, images={"t1": picture}, label=mask) for name, (picture, mask) in found.items()]
    if files == "analyze":
        _require_headers(path for case in cases for path in case.files)
    return cases


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown(f"IBSR {kind} (data.{kind})", name, known)


def _case_folders(root: Path) -> list[Path]:
    """Folders named like a case, at most two folders below `root`; the outer one where names repeat on the way down."""
    found: dict[str, Path] = {}
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(root.glob(pattern)):
            if _CASE.fullmatch(path.name) and path.is_dir():
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def _file(folder: Path, name: str, files: str) -> Path | None:
    paths = (folder / place / f"{folder.name}_{name}{extension}" for place in _FOLDERS for extension in FILES[files])
    return next((path for path in paths if path.is_file()), None)


def _require_headers(images: Iterable[Path]) -> None:
    if lost := [str(path) for path in images if not path.with_suffix(".hdr").is_file()]:
        raise SuiteError(f"{len(lost)} Analyze images lack their header (.hdr, same name):\n  " + "\n  ".join(lost))


def _advice(folders: list[Path], files: str, image: str, label: str) -> str:
    """What is expected, and the options that fit what is there instead."""
    fits = [
        f"data.files={f} data.image={i} data.label={t}"
        for f in FILES
        for i in IMAGES
        for t in LABELS
        if (f, i, t) != (files, image, label) and all(_file(folder, n, f) for folder in folders for n in (i, f"{t}_ana"))
    ]
    return _expected(files, image, label) + (f"\nWhat is there fits {' or '.join(fits)}" if fits else "")


def _expected(files: str, image: str, label: str) -> str:
    extension = FILES[files][0]
    places = ("", "") if files == "nifti" else ("images/analyze/", "segmentation/analyze/")
    examples = [f"IBSR_01/{p}IBSR_01_{n}{extension}" for p, n in zip(places, (image, f"{label}_ana"), strict=True)]
    return f"expected files such as {' and '.join(examples)}. docs/data.md says where to get the data."
