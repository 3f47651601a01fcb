"""Finds the cases of ATLAS, Anatomical Tracings of Lesions After Stroke, in the layouts of releases 1.2 and 2.0."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datamodules.provenance import derive
from datamodules.readers.brats_files import require_root
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import read_volume, write_volume

_IMAGES = {  # release -> name of a T1; `id` is what the names of its masks begin with
    "1.2": re.compile(r"(?P<id>(?P<subject>.+?))_t1w(_deface)?_stx\.nii(\.gz)?"),
    "2.0": re.compile(r"(?P<id>(?P<subject>sub-\w+?)_ses-(?P<session>\w+?)(_space-\w+?)?)_T1w\.nii(\.gz)?"),
}
RELEASES = tuple(_IMAGES)
_MASKS = {"1.2": r"_LesionSmooth(_\d+)?_stx\.nii(\.gz)?", "2.0": r"(_\w+-\w+)*_mask\.nii(\.gz)?"}
_PATIENT = re.compile(r"(?P<patient>c\d+s\d+)t\d+")  # R1.2: cohort, subject, time point
_EXPECTED = {
    "1.2": "c0003s0002t01_t1w_stx.nii.gz with c0003s0002t01_LesionSmooth_stx.nii.gz, c0003s0002t01_LesionSmooth_1_stx.nii.gz ... in one folder",
    "2.0": "sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz with ..._label-L_desc-T1lesion_mask.nii.gz",
}

NAMED_SPLITS = {  # test scans; all other patients train
    "wong2021": (
        "c0008s0028t01", "c0004s0011t01", "c0004s0022t01", "c0003s0034t01", "c0006s0006t01", "c0003s0021t01", "c0003s0030t01",
        "c0004s0017t01", "c0008s0003t01", "c0007s0001t01", "c0007s0013t01", "c0005s0007t01", "c0004s0001t01", "c0010s0021t01",
        "c0007s0015t01", "c0004s0019t01", "c0009s0011t01", "c0006s0008t01", "c0010s0038t01", "c0005s0011t01", "c0003s0054t01",
        "c0004s0021t01", "c0010s0002t02", "c0009s0007t01", "c0005s0036t01", "c0007s0032t01", "c0003s0023t01",
    ),
}  # fmt: skip


def find_atlas(root: Path, release: str) -> list[tuple[Case, list[Path]]]:
    """The cases under `root`, without labels, each with its lesion masks (none, one, or several to be merged), sorted by id.

    R1.2 (`standard`, MNI space): any folder that holds one `<id>_t1w_stx.nii.gz` (or `_t1w_deface_stx`); the id is that of the file, with
    the folder of the time point where only that tells scans apart (`031768_t01`). The site is the cohort of a `c0003s0002t01` id, or the
    folder `Site1`. R2.0: BIDS-like, `sub-*/ses-*/anat/`, at any depth; the site is the folder `R001` that holds the subject. A scan of
    R2.0 is named by its subject, and by its session where that is not `1`.

    Raises:
        SuiteError: missing folder, unknown release, no cases, or two cases of one id.
    """
    if release not in _IMAGES:
        raise unknown("ATLAS release (data.release)", release, _IMAGES)
    root = require_root(root, "ATLAS")
    files = sorted(p for p in root.rglob("*.nii*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    found = [(_case(match, path, release), _masks(match["id"], folders[path.parent], release)) for path, match in _images(files, release)]
    if not found:
        raise SuiteError(f"{root}: no scan of ATLAS R{release}; expected files such as\n  {_EXPECTED[release]}\ndocs/data.md says more.")
    ids = [case.id for case, _ in found]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SuiteError(f"{root}: two scans of one name: {twice[:5]}; is the data set unpacked twice?")
    return sorted(found, key=lambda pair: pair[0].id)


def _images(files: Iterable[Path], release: str) -> list[tuple[Path, re.Match]]:
    return [(path, match) for path in files if (match := _IMAGES[release].fullmatch(path.name))]


def _case(match: re.Match, path: Path, release: str) -> Case:
    subject = match["subject"]
    if release == "2.0":
        session = match["session"]
        site = next((p.name for p in path.parents if re.fullmatch(r"R\d+", p.name)), "")
        return Case(subject if session == "1" else f"{subject}_ses-{session}", {"t1": path}, patient=subject, site=site)
    if known := _PATIENT.fullmatch(subject):
        return Case(subject, {"t1": path}, patient=known["patient"], site=subject.partition("s")[0])
    time = path.parent.name if re.fullmatch(r"t\d+", path.parent.name) else ""
    site = next((p.name for p in path.parents if re.fullmatch(r"Site\d+", p.name)), "")
    return Case(f"{subject}_{time}" if time else subject, {"t1": path}, patient=subject, site=site)


def _masks(identifier: str, neighbors: Sequence[Path], release: str) -> list[Path]:
    pattern = re.compile(re.escape(identifier) + _MASKS[release])
    return [path for path in neighbors if pattern.fullmatch(path.name)]


def merge_masks(masks: Sequence[Path], out: Path) -> Path:
    """Writes the union of the masks (whatever is above 0) as 0 and 1 to `out`, unless it is that of just these masks; returns `out`.

    Raises:
        SuiteError: masks of different shapes, or one that cannot be read.
    """
    derive([out], masks, lambda: write_volume(out, *_union(masks)))
    return out


def _union(masks: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The union (X, Y, Z), uint8, and the affine of the last mask."""
    union, affine, shape = None, None, None
    for mask in masks:
        values, affine, size = read_volume(mask)
        if shape not in (None, size):
            raise SuiteError(f"{mask} has shape {size}, {masks[0]} has {shape}: the masks of a scan lie on one grid")
        shape, union = size, (values > 0) if union is None else union | (values > 0)
    return union.astype(np.uint8), affine
