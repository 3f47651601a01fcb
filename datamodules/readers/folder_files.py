"""Finds cases in a user's own folder or list, and the images to predict.

Folder: `images/<case>_<channel>.nii.gz`, `labels/<case>.nii.gz`, optional `labels/<case>_rater1.nii.gz` ..., optional `attributes.csv`.
List: a CSV or JSON file with one row per case. NIfTI (`.nii.gz`, `.nii`), NRRD, MetaImage and Analyze are as good everywhere.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.brats_files import SUFFIXES_2023, lacking_channels, require_channels, require_root
from datamodules.readers.tables import ABSENT, parsed, read_json, read_table
from lesionbench.case import Case
from lesionbench.dicom_files import series_in
from lesionbench.errors import Incomplete, SuiteError
from lesionbench.geometry import ending_of, stem_of

_RATER = re.compile(r"rater(\d+)")


def find_folder(
    root: Path, channels: Sequence[str] | None = None, list_file: Path | None = None, allow_missing: bool = False
) -> list[Case]:
    """The cases of a folder, sorted by id, or of a list, in its order.

    `attributes.csv` has the column `case`, optional `patient` and `site`; every other column is an attribute (numbers parsed, empty
    and NA left out). A list has the same columns plus one per channel, `label` and `rater1`, `rater2` ... with paths relative to
    the list; JSON is an array of objects with these keys.

    Args:
        root: the data folder; a relative `list_file` is looked for here and in the working folder.
        channels: channel names, which may hold underscores (the longest that fits the file name wins); files of other channels
            are left out. None takes the part after the last underscore (in a list: every column of paths to images).
        list_file: CSV or JSON list.
        allow_missing: accept cases that lack channels, as long as one is there.

    Raises:
        SuiteError: missing folder or files, no cases, missing channels, labels or rows of attributes that belong to no case; each names
            all at once.
    """
    if list_file is not None:
        return _from_list(_located(Path(list_file), Path(root)), channels, allow_missing)
    root = require_root(root, "folder")
    images = root / "images"
    if not images.is_dir():
        raise SuiteError(f"{root}: no folder images/{_recognized(root)}; {_expected(channels or ['flair'])}")
    files = _volumes(images)
    if channels is None:
        channels = sorted({stem_of(f).rpartition("_")[2] for f in files if "_" in stem_of(f)})
    cases = _cases(files, channels, {f"_{c}": c for c in channels})
    if not cases:
        raise SuiteError(f"{images}: no image of channels {list(channels)} among {_listed(files)}; {_expected(channels)}")
    problems = [lacking_channels(cases, channels, allow_missing)]
    for add, path in ((_add_labels, root / "labels"), (add_attributes, root / "attributes.csv")):
        try:
            add(path, cases)
        except Incomplete as error:
            problems.append(str(error))
    if any(problems):
        raise Incomplete("\n".join(filter(None, problems)), cases)
    return cases


def find_images(root: Path, channels: Sequence[str], allow_missing: bool = False) -> list[Case]:
    """The cases to predict, sorted by id, without labels.

    Accepted, under `root/images` if there is one, else `root`, in folders of any depth: `<case>_<channel>.nii.gz`, the suffixes of BraTS
    2023 (`<case>-t1n.nii.gz`, `<case>_t1c.nii.gz` ...), and channels numbered in the order of `channels` (`<case>_0000.nii.gz` ...).

    Raises:
        SuiteError: missing folder, nothing that fits, missing channels, two files for one channel of a case, or more numbered channels
            than `channels`.
    """
    root = require_root(root, "of images to predict", "input")
    files = images_below(root)
    newer = {c: s for c, s in SUFFIXES_2023.items() if c in channels}
    suffixes = {f"_{s}": c for c, s in newer.items()} | {f"_{c}": c for c in channels} | {f"-{s}": c for c, s in newer.items()}
    numbered = {f"_{i:04d}": c for i, c in enumerate(channels)}
    named = [file for file in files if stem_of(file).endswith(tuple(suffixes))]
    beside = {file.parent for file in named}  # where channels have names, a number belongs to the case
    by_number = [file for file in files if file.parent not in beside]
    if any(stem_of(file).endswith(tuple(numbered)) for file in by_number):
        _refuse_more_numbers(by_number, channels)
    cases = _cases([*named, *by_number], channels, {**suffixes, **numbered})
    if not cases:
        raise SuiteError(f"{root}: nothing to predict for channels {list(channels)} among {_listed(files)}; {_expected(channels)}")
    return require_channels(cases, channels, allow_missing)


def find_series(root: Path, channels: Sequence[str]) -> list[Case]:
    """Cases of DICOM series, sorted by id: `<case>/<channel>/` with the files of a series each, or `<case>/` where there is one channel.

    What `images` names are the folders. Channel folders may have any case; folders of no channel are left out.

    Raises:
        SuiteError: a folder with series of several channels that is not divided by channels.
    """
    folders = [Path(folder) for folder, _, names in walked(Path(root)) if names and series_in(Path(folder))]
    by_name = {channel.lower(): channel for channel in channels}
    found: dict[str, dict[str, Path]] = {}
    for folder in folders:
        channel = by_name.get(folder.name.lower())
        if channel is None and len(channels) == 1:
            channel, home = channels[0], folder
        elif channel is None:
            continue
        else:
            home = folder.parent
        name = "_".join(home.relative_to(root).parts) or home.name
        if channel in found.setdefault(name, {}):
            raise SuiteError(f"two series for channel {channel}: {found[name][channel]} and {folder}; keep one")
        found[name][channel] = folder
    if folders and not found:
        example = ", ".join(f"<case>/{channel}/" for channel in channels)
        raise SuiteError(f"{root}: holds DICOM series ({folders[0]} ...), but in no folder named for a channel; expected {example}")
    return [Case(name, {c: images[c] for c in channels if c in images}) for name, images in sorted(found.items())]


def images_below(root: Path) -> list[Path]:
    """Every image file that `find_images` looks at, in folders of any depth, hidden ones left out."""
    start = root / "images" if (root / "images").is_dir() else root
    found = (Path(folder) / name for folder, folders, names in walked(start) for name in names)
    return sorted(path for path in found if ending_of(path) and not path.name.startswith("."))


def walked(start: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders below `start`, each once: of several links to one folder, or a link back to where it lies, the first counts."""
    seen = set()
    for folder, folders, names in os.walk(start, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield folder, folders, names


def _volumes(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if ending_of(p) and p.is_file())
    return [p for p in files if not p.name.startswith(".")]  # also the ._ files that macOS leaves


def _cases(files: Iterable[Path], channels: Sequence[str], suffixes: dict[str, str]) -> list[Case]:
    """Groups files into cases by the longest suffix that ends their name; other files are left out."""
    longest_first = sorted(suffixes, key=len, reverse=True)
    found: dict[str, dict[str, Path]] = {}
    for path in files:
        suffix = next((s for s in longest_first if stem_of(path).endswith(s) and stem_of(path) != s), None)
        if suffix is None:
            continue
        images, channel = found.setdefault(stem_of(path).removesuffix(suffix), {}), suffixes[suffix]
        if channel in images:
            raise SuiteError(f"two files for one channel: {images[channel]} and {path}; keep one")
        images[channel] = path
    return [Case(id=name, images={c: images[c] for c in channels if c in images}) for name, images in sorted(found.items())]


def _refuse_more_numbers(files: Iterable[Path], channels: Sequence[str]) -> None:
    """A set with more numbered channels was numbered for another list of channels: 0000 would be the wrong image."""
    beyond = [f for f in files if (m := re.search(r"_(\d{4})$", stem_of(f))) and int(m[1]) >= len(channels)]
    if beyond:
        raise SuiteError(
            f"{beyond[0]}: numbered channel, but only {len(channels)} are wanted ({', '.join(channels)}); "
            f"rename the files, e.g. <case>_{channels[0]}.nii.gz"
        )


def _recognized(root: Path) -> str:
    """What else the folder looks like, and how that is read."""
    description = root / "dataset.json"
    if description.is_file():
        of_nnunet = "channel_names" in (read_json(description) or {})
        return (
            f", but a dataset.json of {'nnU-Net' if of_nnunet else 'the Decathlon'}: data={'nnunet' if of_nnunet else 'decathlon'} reads it"
        )
    if (root / "imagesTr").is_dir():
        return ", but imagesTr/: data=nnunet and data=decathlon read such folders with their dataset.json"
    if any(root.glob("sub-*/**/anat")):
        return ", but sub-*/anat as in BIDS: data=bids reads it"
    return ""


def _expected(channels: Sequence[str]) -> str:
    def example(names: Iterable[str]) -> str:
        return ", ".join(f"{name}.nii.gz" for name in names)

    return (
        "expected files such as\n"
        f"  images/: {example(f'case01_{c}' for c in channels)} (labels/: case01.nii.gz)\n"
        f"or, for prediction, also the same names directly in the folder or in case01/, or numbered in the order of the channels:\n"
        f"  {example(f'case01_{i:04d}' for i in range(len(channels)))}"
    )


def _listed(files: Sequence[Path]) -> str:
    names = ", ".join(f.name for f in files[:5])
    return (
        f"{len(files)} image files ({names}{', ...' if len(files) > 5 else ''})"
        if files
        else "no image files (.nii.gz, .nii, .nrrd, .mha ...)"
    )


def _add_labels(folder: Path, cases: list[Case]) -> None:
    by_id = {case.id: case for case in cases}
    raters: dict[str, dict[int, Path]] = {}
    strangers = []
    for path in _volumes(folder) if folder.is_dir() else []:
        name, _, rater = stem_of(path).rpartition("_")
        if stem_of(path) in by_id:
            by_id[stem_of(path)].label = path
        elif name in by_id and (match := _RATER.fullmatch(rater)):
            raters.setdefault(name, {})[int(match[1])] = path
        else:
            strangers.append(path)
    for name, numbered in raters.items():
        by_id[name].raters = [numbered[n] for n in sorted(numbered)]
    if strangers:
        what = f"labels that belong to no case: {_listed(strangers)}; name them <case>.nii.gz or <case>_rater1.nii.gz"
        raise Incomplete(f"{folder}: {what}", cases)


def add_attributes(table: Path, cases: list[Case]) -> None:
    """Patients, sites and attributes from a table with the column `case`, where it is there.

    Raises:
        SuiteError: rows that belong to no case, all at once.
    """
    by_id = {case.id: case for case in cases}
    rows = _rows(table) if table.is_file() else []
    strangers = [row["case"] for row in rows if row["case"] not in by_id]
    for row in rows:
        if row["case"] not in by_id:
            continue
        case = by_id[row.pop("case")]
        case.patient = row.pop("patient", "") or case.id
        case.site = row.pop("site", "")
        case.attributes = _attributes(row)
    if strangers:  # its patient, left unsaid, could stand in training and test
        listed = "\n".join(f"  {name}{_meant(name, by_id)}" for name in strangers[:10])
        raise Incomplete(f"{table}: {len(strangers)} row(s) belong to no case; mend the names, or remove the rows:\n{listed}", cases)


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _rows(table: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, or of a JSON array of objects; each has a non-empty `case`."""
    rows = read_json(table) if table.suffix == ".json" else read_table(table)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if not isinstance(row, dict) or row.get("case") in ("", None):
            raise SuiteError(
                f"{table}, row {number}: no 'case'; every row needs one (a CSV column, or a key of each object of a JSON array)"
            )
        row["case"] = str(row["case"])
    return rows if isinstance(rows, list) else [rows]


def _attributes(row: dict[str, Any]) -> dict[str, Any]:
    return {k: parsed(v) for k, v in row.items() if v is not None and str(v).lower() not in ABSENT}


def _located(list_file: Path, root: Path) -> Path:
    for path in (root / list_file, list_file):
        if path.is_file():
            return path
    raise SuiteError(f"no such list: {list_file} (looked in {root} and in the working folder); set data.list_file")


def _from_list(table: Path, channels: Sequence[str] | None, allow_missing: bool) -> list[Case]:
    rows = _rows(table)
    paths = {k for row in rows for k, v in row.items() if isinstance(v, str) and ending_of(v)}
    raters = sorted((k for k in paths if _RATER.fullmatch(k)), key=lambda k: int(_RATER.fullmatch(k)[1]))
    if channels is None:
        channels = [k for k in dict.fromkeys(k for row in rows for k in row) if k in paths and k != "label" and k not in raters]
    if not rows or not channels:
        raise SuiteError(f"{table}: no cases with paths to images; expected columns case, {', '.join(channels or ['flair'])}, label")
    plain = {*channels, *paths, "label", "case", "patient", "site"}

    def files(row: dict[str, Any], columns: Iterable[str]) -> dict[str, Path]:
        return {c: table.parent / str(row[c]) for c in columns if row.get(c)}

    cases = [
        Case(
            id=row["case"],
            images=files(row, channels),
            label=files(row, ["label"]).get("label"),
            raters=list(files(row, raters).values()),
            patient=str(row.get("patient") or ""),
            site=str(row.get("site") or ""),
            attributes=_attributes({k: v for k, v in row.items() if k not in plain}),
        )
        for row in rows
    ]
    lost = [f"{case.id}: {path}" for case in cases for path in case.files if not path.is_file()]
    if lost:
        raise SuiteError(f"{table}: {len(lost)} files do not exist (paths are relative to the list):\n  " + "\n  ".join(lost))
    return require_channels(cases, channels, allow_missing)
