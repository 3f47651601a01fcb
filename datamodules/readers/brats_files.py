"""Finds the cases of the BraTS glioma data sets (2018 to 2021, 2023) on disk, under the names that they were published with."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.tables import ABSENT, read_table
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.task import Task

CHANNELS = ("t1", "t1ce", "t2", "flair")
SUFFIXES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
EXTENSIONS = (".nii.gz", ".nii")

# Case names by layout. 2018 and 2019 name the site in the middle and the time point last; 2023 has the time point last.
_NAMES = {
    "2018": re.compile(r"(?P<patient>brats18_(?P<site>[^_]+)_.+)_\d+", re.IGNORECASE),
    "2019": re.compile(r"(?P<patient>brats19_(?P<site>[^_]+)_.+)_\d+", re.IGNORECASE),
    "2020": re.compile(r"(?P<patient>brats20_(?:training|validation|testing)_\d+)", re.IGNORECASE),
    "2021": re.compile(r"(?P<patient>brats2021_\d+)", re.IGNORECASE),
    "2023": re.compile(r"(?P<patient>brats-[a-z]+-\d+)-\d+", re.IGNORECASE),
}
_MISNAMED_LABELS = {"BraTS20_Training_355": "W39_1998.09.19_Segm"}  # published under this name in the 2020 training set
_SURVIVAL_TABLES = ("survival_data.csv", "survival_info.csv", "survival_evaluation.csv")


def brats_task(layout: str) -> Task:
    """The BraTS task: regions WT (whole tumor), TC (core), ET (enhancing tumor) over necrosis (1), edema (2), enhancing tumor.

    Enhancing tumor is written as 4 up to 2021 and as 3 in 2023; both values are read in every layout, so that sets can be mixed.

    Raises:
        SuiteError: unknown layout.
    """
    et = (3, 4) if _known(layout) == "2023" else (4, 3)
    return Task(
        channels=CHANNELS,
        classes={"background": (0,), "ncr": (1,), "ed": (2,), "et": et},
        regions={"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
    )


def detect_layout(root: Path) -> str:
    """The layout (`2018` ... `2023`) of the case folders under `root`, told by their names.

    Raises:
        SuiteError: no such folder, no BraTS case in it, or cases of several layouts.
    """
    root = require_root(root, "BraTS")
    counts = Counter(_layout_of(folder.name) for folder in _scan(root)[0])
    if len(counts) != 1:
        found = ", ".join(f"{n} of {layout}" for layout, n in sorted(counts.items())) or "none"
        fix = "choose one with data.layout" if counts else _expected(root, _NAMES)
        raise SuiteError(f"{root}: expected the case folders of one BraTS year, found {found}; {fix}")
    return next(iter(counts))


def find_brats(root: Path, layout: str | None = None, allow_missing: bool = False, channels: Sequence[str] = CHANNELS) -> list[Case]:
    """The cases of a BraTS folder, sorted by id. Channels are named t1, t1ce, t2, flair in every layout.

    Case folders may lie in `root`, in HGG/ and LGG/, or in the folder that the archive unpacks to. Attributes, where the set tells
    them: `grade` (HGG or LGG), `age` (years), `survival` (days), `event` (1 died, 0 censored), `resection`. A case without a
    segmentation (validation sets) has label None.

    Args:
        root: folder with the unpacked archive.
        layout: `2018`, `2019`, `2020`, `2021` or `2023`; None detects it from the names.
        allow_missing: accept cases that lack channels (absent from `Case.images`), as long as one is there.
        channels: those that cases must have.

    Raises:
        SuiteError: missing folder, no cases, missing channels (all listed at once), or an unreadable survival value.
    """
    root = require_root(root, "BraTS")
    layout = detect_layout(root) if layout is None else _known(layout)
    folders, tables = _scan(root)
    folders = [f for f in folders if _layout_of(f.name) == layout]
    if not folders:
        raise SuiteError(f"{root}: no BraTS {layout} case folders; {_expected(root, [layout])}")
    cases = [_case(folder, layout) for folder in sorted(folders, key=lambda f: (f.name, str(f)))]
    by_id = {case.id: case for case in cases}
    for table in tables:
        add = _add_survival if table.name in _SURVIVAL_TABLES else _add_mapping
        add(table, by_id)
    return require_channels(cases, channels, allow_missing)


def require_root(root: Path, name: str, option: str = "data.root") -> Path:
    """`root` if it is a folder; else an error that names the `option` that points at it and, for data sets, where to get them."""
    root = Path(root)
    if not root.is_dir() and option != "data.root":
        raise SuiteError(f"{option}={root}: no such folder ({name})")
    if not root.is_dir():
        raise SuiteError(
            f"{name} data: no such folder: {root}\n"
            "Set data.root=<folder>, or the environment variable LESIONBENCH_DATA to the folder that holds all data sets.\n"
            "docs/data.md says where to get each data set and how its folder looks."
        )
    return root


def require_channels(cases: list[Case], channels: Sequence[str], allow_missing: bool) -> list[Case]:
    """`cases` if each has all `channels` (with `allow_missing`: at least one); else one error that lists every gap."""
    missing = {case.id: [c for c in channels if c not in case.images] for case in cases}
    refused = {case: gaps for case, gaps in missing.items() if gaps and (not allow_missing or len(gaps) == len(channels))}
    if refused:
        lines = "\n".join(f"  {case}: {', '.join(gaps)}" for case, gaps in refused.items())
        raise SuiteError(
            f"{len(refused)} of {len(cases)} cases lack channels:\n{lines}\n"
            "Add the files, narrow the task (task.channels=[...]), or accept cases with at least one channel (data.preprocessing.allow_missing=true)."
        )
    return cases


def nifti(folder: Path, stem: str) -> Path | None:
    """The file `<stem>.nii.gz` or `<stem>.nii` in `folder`, if it is there."""
    return next((path for e in EXTENSIONS if (path := folder / f"{stem}{e}").is_file()), None)


def _known(layout: str) -> str:
    if str(layout) not in _NAMES:
        raise unknown("BraTS layout", str(layout), _NAMES)
    return str(layout)


def _layout_of(name: str) -> str | None:
    return next((layout for layout, pattern in _NAMES.items() if pattern.fullmatch(name)), None)


def _scan(root: Path) -> tuple[list[Path], list[Path]]:
    """Case folders and tables under `root`, at most three folders deep (archive folder, grade, case)."""
    cases, tables, level = [], [], [root]
    for _ in range(3):
        children = sorted(child for folder in level for child in folder.iterdir() if not child.name.startswith("."))
        tables += [c for c in children if c.name in (*_SURVIVAL_TABLES, "name_mapping.csv")]
        folders = [c for c in children if c.is_dir()]
        cases += [f for f in folders if _layout_of(f.name)]
        level = [f for f in folders if not _layout_of(f.name)]
    return cases, tables


def _expected(root: Path, layouts: Iterable[str]) -> str:
    examples = {
        "2018": "HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz",
        "2019": "HGG/BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_t1.nii.gz",
        "2020": "BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz",
        "2021": "BraTS2021_00000/BraTS2021_00000_t1.nii.gz",
        "2023": "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz",
    }
    there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
    lines = "".join(f"\n  {layout}: {examples[layout]}" for layout in layouts)
    return f"the folder holds {there}. Expected one of:{lines}\ndocs/data.md says where to get the data sets."


def _case(folder: Path, layout: str) -> Case:
    name = folder.name
    joint, suffixes = ("-", SUFFIXES_2023) if layout == "2023" else ("_", {c: c for c in CHANNELS})
    files = {channel: nifti(folder, f"{name}{joint}{suffix}") for channel, suffix in suffixes.items()}
    label = nifti(folder, f"{name}{joint}seg")
    if label is None and name in _MISNAMED_LABELS:
        label = nifti(folder, _MISNAMED_LABELS[name])
    return Case(
        id=name,
        images={channel: path for channel, path in files.items() if path},
        label=label,
        patient=_NAMES[layout].fullmatch(name)["patient"],
        site=_site(name),
        attributes={"grade": folder.parent.name} if folder.parent.name in ("HGG", "LGG") else {},
    )


def _site(name: str) -> str:
    """The site that a 2018 or 2019 case name holds (`CBICA`, `TCIA01`, `2013` ...); empty for other names."""
    match = _NAMES["2018"].fullmatch(name) or _NAMES["2019"].fullmatch(name)
    return match["site"] if match else ""


def _rows(table: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with lower-case column names."""
    return [{k.lower(): v for k, v in row.items()} for row in read_table(table)]


def _add_survival(table: Path, cases: dict[str, Case]) -> None:
    """Age, survival, event and resection from a survival table; the years name the columns a little differently."""
    for row in _rows(table):
        identifier = next((v for k, v in row.items() if k.startswith("brats") and k.endswith("id")), "")
        if identifier not in cases:
            continue
        attributes = cases[identifier].attributes
        for column, value in row.items():
            if value.lower() in ABSENT:
                continue
            if column == "age":
                attributes["age"] = _number(value, f"{table}, {identifier}, age")
            elif column.startswith("survival"):
                attributes.update(_survival(value, f"{table}, {identifier}, {column}"))
            elif "resection" in column:
                attributes["resection"] = value


def _survival(value: str, where: str) -> dict[str, Any]:
    """A plain number of days is a death; `ALIVE (361 days later)` is censored after 361 days."""
    if not value.lower().startswith("alive"):
        return {"survival": _number(value, where), "event": 1}
    days = re.search(r"\d+(\.\d+)?", value)
    return {"survival": float(days[0]), "event": 0} if days else {}


def _number(value: str, where: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SuiteError(f"{where}: expected a number, 'NA' or (for survival) 'ALIVE (<n> days later)', got '{value}'") from None


def _add_mapping(table: Path, cases: dict[str, Case]) -> None:
    """Grade, and the site in a case's name of an earlier year, from `name_mapping.csv`."""
    for row in _rows(table):
        for case in (cases[name] for name in row.values() if name in cases):
            if row.get("grade", "").lower() not in ABSENT:
                case.attributes.setdefault("grade", row["grade"])
            case.site = case.site or next((site for name in row.values() if (site := _site(name))), "")
