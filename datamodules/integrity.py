"""The integrity check: what is wrong with the files of a data set, all at once, before anything is trained on them."""

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import TOLERANCE, Geometry, displacement, header_doubt, read_volume
from lesionbench.progress import tracked
from lesionbench.task import BACKGROUND, Task

ERROR, WARNING = "error", "warning"
UNLABELED_SPLITS = ("unlabeled", "predict")  # splits whose cases need no label
SHOWN = 4  # findings of one kind that `render` lists

UNREADABLE = "unreadable, truncated or not a 3D volume: copy, download or export it again"
NOT_FINITE = "NaN or infinite values: export the file again, or leave the case out"
CONSTANT = "constant image: export it again, or leave the channel out (data.preprocessing.allow_missing=true)"
NO_CHANNEL = "missing channel: add the file, narrow task.channels, or set data.preprocessing.allow_missing=true"
NO_LABEL = "missing label: add it, or take the case out of training, validation and test"
SHAPE = "shape differs from the case's first image: resample to one grid"
ORIENTATION = (
    "orientation differs from the case's first image: reorient to one grid, or take the first one's (data.preprocessing.grid=first)"
)
AFFINE = "affine differs from the case's first image: resample to one grid, repair the header, or take the first one's (data.preprocessing.grid=first)"
SINGULAR = "affine is not a voxel-to-world matrix: repair the header"
NOT_INTEGER = "label holds values that are not integers: export it without interpolation, and without a scale factor (scl_slope 1)"
UNKNOWN_VALUE = "label holds values of no class: correct it, or declare them (data=folder: data.classes or data.ignore)"
SAME_ID = "case id appears twice: rename or remove one"
SAME_IMAGE = "same image content as another case: remove one"
TWO_SPLITS = "patient in two splits: split by patient"
NOT_FOUND = "split names a case that was not found: correct the split"
EMPTY_LABEL = "empty label: make sure that the case has no lesion"
EMPTY_REGION = "empty region: fine for some cases, else check the values of its classes"
TWO_HEADERS = (
    "header holds two different voxel sizes: look which is right, and repair the other, or say which counts (data.preprocessing.header)"
)
ASTRAY = "files that do not go together: mend their names, or take them out"
ODD_SPACING = "odd voxel size: check the header, or resample (data.preprocessing.spacing)"


@dataclass(frozen=True)
class Finding:
    """One thing wrong: `message` names the kind and what to do, `value` what was found; `file` is None for what is no single file's fault."""

    level: str
    case: str
    file: Path | None
    message: str
    value: str = ""


@dataclass
class _Report:
    """What one case contributes: its findings, and what is compared between cases."""

    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)
    grid: tuple[Path, np.ndarray, tuple[int, ...]] | None = None  # first readable file, its affine and shape


def check_cases(
    cases: Sequence[Case],
    task: Task,
    *,
    splits: Mapping[str, Sequence[str]] | None = None,
    allow_missing: bool = False,
    workers: int = 0,
    progress: bool = True,
    header: str = "auto",
    grid: str = "same",
) -> list[Finding]:
    """Reads every file of every case in full and returns all findings, in the order of the cases, then those between cases.

    Args:
        cases: the cases to check; one bad file does not stop the check of the others.
        task: channels that must be there, label values that are known.
        splits: split name -> case ids; each patient belongs to one of them. Cases need a label unless their split is called
            `unlabeled` or `predict`, or they are in no split. Without `splits` every case needs one.
        allow_missing: cases may lack channels, as long as one is there.
        workers: threads that read files; 0 reads in the calling one.
        progress: draw a progress bar if the terminal is interactive.
        header: see `geometry.read_volume`; with another one than `auto` two voxel sizes in a header are no finding.
        grid: with `first` headers that put the voxels of a case elsewhere are warned of and no errors (see `Preprocessing`).
    """
    labeled = {c.id for c in cases} if splits is None else {i for s, ids in splits.items() if s not in UNLABELED_SPLITS for i in ids}

    def check(case: Case) -> _Report:
        return _check_case(case, task, allow_missing, header, grid, needs_label=case.id in labeled)

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            reports = list(tracked(pool.map(check, cases), len(cases), "Checking cases", progress))
    else:
        reports = list(tracked(map(check, cases), len(cases), "Checking cases", progress))
    findings = [f for report in reports for f in report.findings]
    predicted = set((splits or {}).get("predict", ()))
    return findings + _duplicates(cases, reports, predicted) + _shared_patients(cases, splits or {}) + _odd_spacing(cases, reports)


def render(findings: Sequence[Finding]) -> str:
    """All findings on one screen: errors first, grouped by kind, the first few of each kind and the count of the rest."""
    if not findings:
        return "Integrity check: nothing found."
    levels = Counter(f.level for f in findings)
    lines = [f"Integrity check: {levels[ERROR]} error(s), {levels[WARNING]} warning(s)"]
    for level in (ERROR, WARNING):
        for message in dict.fromkeys(f.message for f in findings if f.level == level):
            kind = [f for f in findings if (f.level, f.message) == (level, message)]
            lines.append(f"{level} x {len(kind)}: {message}")
            lines += ["  " + ": ".join(str(part) for part in (f.case, f.file, f.value) if part) for f in kind[:SHOWN]]
            if len(kind) > SHOWN:
                lines.append(f"  ... and {len(kind) - SHOWN} more")
    return "\n".join(lines)


def raise_on_errors(findings: Sequence[Finding]) -> None:
    """Raises a SuiteError with everything found if there is an error among it; warnings alone pass."""
    if any(f.level == ERROR for f in findings):
        raise SuiteError(render(findings))


def _check_case(case: Case, task: Task, allow_missing: bool, header: str, grid: str, needs_label: bool) -> _Report:
    report = _Report()
    missing = [c for c in task.channels if c not in case.images]
    if missing and (not allow_missing or len(missing) == len(task.channels)):
        report.findings.append(Finding(ERROR, case.id, None, NO_CHANNEL, ", ".join(missing)))
    if needs_label and case.label is None and not case.raters:
        report.findings.append(Finding(ERROR, case.id, None, NO_LABEL))
    for channel in (c for c in task.channels if c in case.images):
        path = case.images[channel]
        array = _read(case, path, report, header, grid)
        if array is not None:
            _check_image(case, channel, path, array, report)
    for path in [*([case.label] if case.label else []), *case.raters]:
        array = _read(case, path, report, header, grid)
        if array is not None:
            report.findings += [Finding(level, case.id, path, message, value) for level, message, value in _label_faults(array, task)]
    return report


def _read(case: Case, path: Path, report: _Report, header: str, grid: str) -> np.ndarray | None:
    """The volume, if its content can be judged; reports an unreadable file, NaN and what differs from the case's grid."""
    try:
        array, affine, shape = read_volume(path, header=header)
        _read_to_end(path)
    except (SuiteError, HeaderDataError, OSError, EOFError, zlib.error, MemoryError) as error:
        value = str(error).removeprefix(f"{path}: ") or type(error).__name__
        report.findings.append(Finding(ERROR, case.id, path, UNREADABLE, value))
        return None
    faults = [(SINGULAR, f"{affine[:3].tolist()}")] if _singular(affine) else []
    if not faults and report.grid is None:
        report.grid = (path, affine, shape)
    elif not faults:
        faults = _grid_faults(affine, shape, *report.grid[1:])
    low, high = (array.min(), array.max()) if array.dtype.kind in "biuf" else (np.nan, np.nan)
    finite = bool(np.isfinite(low) and np.isfinite(high))
    if not finite:
        bad = int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else array.size
        faults.append((NOT_FINITE, f"{bad} of {array.size} voxels"))
    accepted = (ORIENTATION, AFFINE) if grid == "first" else ()
    report.findings += [Finding(WARNING if message in accepted else ERROR, case.id, path, message, value) for message, value in faults]
    if header == "auto" and (doubt := header_doubt(path)):
        report.findings.append(Finding(WARNING, case.id, path, TWO_HEADERS, doubt))
    return array if finite else None


def _read_to_end(path: Path) -> None:
    """Reading the voxels stops short of a gzip file's checksum; this does not."""
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass


def _singular(affine: np.ndarray) -> bool:
    return not np.isfinite(affine).all() or None in aff2axcodes(affine)  # no axis code: a voxel axis without a direction of its own


def _grid_faults(affine: np.ndarray, shape: tuple[int, ...], first: np.ndarray, first_shape: tuple[int, ...]) -> list[tuple[str, str]]:
    faults = []
    if shape != first_shape:
        faults.append((SHAPE, f"{shape} against {first_shape}"))
    codes, first_codes = "".join(aff2axcodes(affine)), "".join(aff2axcodes(first))
    apart = displacement(first, affine, first_shape)
    if apart > TOLERANCE and codes != first_codes:
        faults.append((ORIENTATION, f"{codes} against {first_codes}"))
    elif apart > TOLERANCE:
        faults.append((AFFINE, f"corners lie up to {apart:.3g} voxels apart, {TOLERANCE} are accepted"))
    return faults


def _check_image(case: Case, channel: str, path: Path, array: np.ndarray, report: _Report) -> None:
    if array.min() == array.max():
        report.findings.append(Finding(ERROR, case.id, path, CONSTANT, f"every voxel is {array.flat[0]:g}"))
    else:  # float32, so that a copy saved in another type is the same content
        report.digests[channel] = hashlib.blake2b(np.ascontiguousarray(array.T, dtype=np.float32), digest_size=16).digest()


def _label_faults(array: np.ndarray, task: Task) -> Iterator[tuple[str, str, str]]:
    """(level, message, value) for what is wrong with the values of a finite label map."""
    values = np.unique(array)
    broken = values[values != np.rint(values)]
    known = [v for vs in task.classes.values() for v in vs]
    strange = np.setdiff1d(values, [*known, *task.ignore, *broken])
    if len(broken):
        yield ERROR, NOT_INTEGER, _some(broken)
    if len(strange):
        yield ERROR, UNKNOWN_VALUE, f"{_some(strange)}; known {sorted(known)}, ignored {list(task.ignore)}"
    present = {name for name, vs in task.classes.items() if np.isin(vs, values).any()}
    if not present - {BACKGROUND}:
        yield WARNING, EMPTY_LABEL, ""
        return
    for region, members in task.regions.items():
        if not present & set(members):
            yield WARNING, EMPTY_REGION, region


def _some(values: np.ndarray) -> str:
    return ", ".join(_exactly(v) for v in values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _exactly(value: float) -> str:
    """Few digits where they say all: 1.0000001 is not 1."""
    return f"{value:g}" if float(f"{value:g}") == float(value) else repr(float(value))


def _duplicates(cases: Sequence[Case], reports: Sequence[_Report], predicted: Container[str]) -> list[Finding]:
    """Cases with the id, or with an image, of an earlier case; a scan that is only predicted may well come twice."""
    findings = []
    by_id: dict[str, Case] = {}
    by_content: dict[bytes, str] = {}
    for case, report in zip(cases, reports, strict=True):
        if case.id in by_id:
            also = next(iter(by_id[case.id].files), "without files")
            findings.append(Finding(ERROR, case.id, next(iter(case.files), None), SAME_ID, f"also {also}"))
        by_id.setdefault(case.id, case)
        shared: dict[str, list[str]] = {}
        for channel, digest in report.digests.items():
            owner = by_content.setdefault(digest, case.id)
            if owner != case.id:
                shared.setdefault(owner, []).append(channel)
        for owner, channels in shared.items():
            level = WARNING if case.id in predicted else ERROR
            findings.append(Finding(level, case.id, case.images[channels[0]], SAME_IMAGE, f"{', '.join(channels)} as in {owner}"))
    return findings


def _shared_patients(cases: Sequence[Case], splits: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Patients with cases in more than one split, and split entries that are no case."""
    patients = {case.id: case.patient for case in cases}
    lost = [Finding(ERROR, i, None, NOT_FOUND, split) for split, ids in splits.items() for i in ids if i not in patients]
    places: dict[str, dict[str, str]] = {}
    for split, ids in splits.items():
        for identifier in ids:
            if identifier in patients:
                places.setdefault(patients[identifier], {}).setdefault(split, identifier)
    shared = [
        Finding(
            ERROR,
            next(iter(where.values())),
            None,
            TWO_SPLITS,
            f"patient {patient} in " + ", ".join(f"{s} ({i})" for s, i in where.items()),
        )
        for patient, where in places.items()
        if len(where) > 1
    ]
    return lost + shared


def _odd_spacing(cases: Sequence[Case], reports: Sequence[_Report]) -> list[Finding]:
    """Voxel sizes that differ by more than a factor of two from the set's median along an axis, or by more than ten between axes."""
    grids = [(case, *report.grid) for case, report in zip(cases, reports, strict=True) if report.grid]
    if not grids:
        return []
    spacings = np.array([Geometry.of(affine, shape).spacing for _, _, affine, shape in grids])
    median = np.median(spacings, axis=0)
    ratio = np.maximum(spacings / median, median / spacings).max(axis=1)
    anisotropy = spacings.max(axis=1) / spacings.min(axis=1)
    sizes = [" x ".join(f"{v:.3g}" for v in s) + " mm" for s in (*spacings, median)]
    findings = []
    for (case, path, _, _), size, r, a in zip(grids, sizes[:-1], ratio, anisotropy, strict=True):
        if r > 2 or a > 10:
            value = f"{size}, the set's median is {sizes[-1]}" if r > 2 else f"{size}, anisotropy {a:.3g}"
            findings.append(Finding(WARNING, case.id, path, ODD_SPACING, value))
    return findings
