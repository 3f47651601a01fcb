"""Finds the cases of the BraTS data sets (2018 to 2026) on disk, under the names that they were published with."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.readers.tables import ABSENT, read_table
from lesionbench.case import Case
from lesionbench.errors import Incomplete, SuiteError, unknown
from lesionbench.geometry import volume_file
from lesionbench.task import Task

CHANNELS = ("t1", "t1ce", "t2", "flair")
SUFFIXES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}

_GLIOMA = {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)}
_CAVITY = {"netc": (1,), "snfh": (2,), "et": (3,), "rc": (4,)}
_METASTASES = {"WT": ("netc", "snfh", "et"), "TC": ("netc", "et"), "ET": ("et",), "RC": ("rc",)}


@dataclass(frozen=True)
class Layout:
    """How one of the published sets names its folders and files, and what its labels mean.

    Attributes:
        about: what it holds.
        names: of a case folder, with the group `patient`, and `site` where the name tells it.
        classes: foreground class -> its values on disk, the first is the one written.
        regions: region -> classes.
        suffixes: channel -> end of the file name behind `joint`.
        label: end of the file name of the label map.
        example: a file of it, below the root.
    """

    about: str
    names: re.Pattern[str]
    example: str
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"ncr": (1,), "ed": (2,), "et": (4, 3)})
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _GLIOMA)
    suffixes: Mapping[str, str] = field(default_factory=lambda: {c: c for c in CHANNELS})
    joint: str = "_"
    label: str = "seg"

    def fits(self, values: Iterable[int]) -> bool:
        """Whether label values could be of this set."""
        return set(values) <= {0, *(v for known in self.classes.values() for v in known)}


def _layout(about: str, names: str, example: str, **options: Any) -> Layout:
    return Layout(about, re.compile(names, re.IGNORECASE), example, **options)


def _from_2023(about: str, names: str, case: str, **options: Any) -> Layout:
    newer = {"suffixes": SUFFIXES_2023, "joint": "-", "classes": {"ncr": (1,), "ed": (2,), "et": (3,)}, **options}
    return _layout(about, names, f"{case}/{case}-t1n.nii.gz", **newer)


# 2018 and 2019 name the site in the middle and the time point last; from 2023 on the time point is last, but for GoAT, which has none.
# Sets that may share names come with the one of fewer classes first. Sources of the values: docs/data.md.
LAYOUTS = {
    "2018": _layout("glioma", r"(?P<patient>brats18_(?P<site>[^_]+)_.+)_\d+", "HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz"),
    "2019": _layout("glioma", r"(?P<patient>brats19_(?P<site>[^_]+)_.+)_\d+", "HGG/BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_t1.nii.gz"),
    "2020": _layout(
        "glioma", r"(?P<patient>brats20_(?:training|validation|testing)_\d+)", "BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz"
    ),
    "2021": _layout("glioma", r"(?P<patient>brats2021_\d+)", "BraTS2021_00000/BraTS2021_00000_t1.nii.gz"),
    "2023": _from_2023(
        "glioma before treatment, Africa, meningioma, metastases of 2023, GoAT",
        r"(?P<patient>brats-(?:gli-\d+(?=-0\d\d$)|(?:ssa|men|met)-\d+(?=-\d+$)|goat-\d+))(?:-\d+)?",
        "BraTS-GLI-00000-000",
    ),
    "2023_ped": _from_2023("pediatric tumors of 2023", r"(?P<patient>brats-ped-\d+)-\d+", "BraTS-PED-00001-000"),
    "2024": _from_2023(
        "glioma, also after treatment, 2024 to 2026",
        r"(?P<patient>brats-gli-\d+)-\d+",
        "BraTS-GLI-00005-100",
        classes=_CAVITY,
        regions={**{k: v for k, v in _METASTASES.items() if k != "RC"}, "NETC": ("netc",), "SNFH": ("snfh",), "RC": ("rc",)},
    ),
    "2024_ped": _from_2023(
        "pediatric tumors, 2024 to 2026",
        r"(?P<patient>brats-ped-\d+)-\d+",
        "BraTS-PED-00001-000",
        classes={"et": (1,), "netc": (2,), "cc": (3,), "ed": (4,)},
        regions={
            "WT": ("et", "netc", "cc", "ed"), "TC": ("et", "netc", "cc"), "ET": ("et",), "NETC": ("netc",), "CC": ("cc",), "ED": ("ed",),
        },
    ),
    "2024_men_rt": _layout(
        "meningioma before radiotherapy, 2024 to 2026, native space, one channel",
        r"(?P<patient>brats-men-rt-\d+)-\d+",
        "BraTS-MEN-RT-0000-1/BraTS-MEN-RT-0000-1_t1c.nii.gz",
        classes={"gtv": (1,)},
        regions={"GTV": ("gtv",)},
        suffixes={"t1ce": "t1c"},
        label="gtv",
    ),
    "2025_met": _from_2023(
        "metastases, also after treatment, 2025 and 2026",
        r"(?P<patient>brats-met-\d+)-\d+",
        "BraTS-MET-00000-000",
        classes=_CAVITY,
        regions=_METASTASES,
    ),
}  # fmt: skip
_MISNAMED_LABELS = {"BraTS20_Training_355": "W39_1998.09.19_Segm"}  # published under this name in the 2020 training set
_SURVIVAL_TABLES = ("survival_data.csv", "survival_info.csv", "survival_evaluation.csv")


def brats_task(layout: str) -> Task:
    """The task of a BraTS set: its channels, classes with their values on disk, and regions.

    Up to 2021 enhancing tumor is written as 4, and 3 is read as well, so that sets can be mixed. From 2023 on 4 is another class, or none.

    Raises:
        SuiteError: unknown layout.
    """
    known = LAYOUTS[_known(layout)]
    return Task(channels=tuple(known.suffixes), classes={"background": (0,), **known.classes}, regions=known.regions)


def detect_layout(root: Path) -> str:
    """The layout (see `LAYOUTS`) of the case folders under `root`, told by their names. Of two that could be, the one of fewer classes.

    Raises:
        SuiteError: no such folder, no BraTS case in it, cases of several layouts, or names that two layouts share whose labels differ.
    """
    root = require_root(root, "BraTS")
    names = [folder.name for folder in _scan(root)[0]]
    fitting = [key for key, known in LAYOUTS.items() if names and all(known.names.fullmatch(name) for name in names)]
    if not fitting:
        counts = {key: sum(bool(known.names.fullmatch(name)) for name in names) for key, known in LAYOUTS.items()}
        found = ", ".join(f"{n} of {layout}" for layout, n in counts.items() if n) or "none"
        fix = "choose one with data.layout" if names else _expected(root, LAYOUTS)
        raise SuiteError(f"{root}: expected the case folders of one BraTS year, found {found}; {fix}")
    first, *others = (LAYOUTS[key] for key in fitting)
    for other in others:
        if any(name in other.classes and other.classes[name] != values for name, values in first.classes.items()):
            raise SuiteError(
                f"{root}: {names[0]} could be of data.layout={' or '.join(fitting)}, whose label values mean other things; say which"
            )
    return fitting[0]


def other_layouts(case: str, layout: str, values: Iterable[int]) -> list[str]:
    """Layouts beside `layout` that a case of this name could be of and whose classes have these label values, with what they hold."""
    values = list(values)
    fitting = (key for key, known in LAYOUTS.items() if key != layout and known.names.fullmatch(case) and known.fits(values))
    return [f"data.layout={key} ({LAYOUTS[key].about})" for key in fitting]


def find_brats(root: Path, layout: str | None = None, allow_missing: bool = False, channels: Sequence[str] | None = None) -> list[Case]:
    """The cases of a BraTS folder, sorted by id. Channels are named t1, t1ce, t2, flair in every layout.

    Case folders may lie in `root`, in HGG/ and LGG/, or in the folder that the archive unpacks to. Attributes, where the set tells
    them: `grade` (HGG or LGG), `age` (years), `survival` (days), `event` (1 died, 0 censored), `resection`. A case without a
    segmentation (validation sets) has label None.

    Args:
        root: folder with the unpacked archive.
        layout: a key of `LAYOUTS`; None detects it from the names.
        allow_missing: accept cases that lack channels (absent from `Case.images`), as long as one is there.
        channels: those that cases must have; None = all of the layout.

    Raises:
        SuiteError: missing folder, no cases, missing channels (all listed at once), or an unreadable survival value.
    """
    root = require_root(root, "BraTS")
    layout = detect_layout(root) if layout is None else _known(layout)
    folders, tables = _scan(root)
    there = [f for f in folders if LAYOUTS[layout].names.fullmatch(f.name)]
    if not there:
        others = [key for key, known in LAYOUTS.items() if any(known.names.fullmatch(f.name) for f in folders)]
        hint = f" (there are cases of data.layout={' or '.join(others)})" if others else ""
        raise SuiteError(f"{root}: no BraTS {layout} case folders{hint}; {_expected(root, [layout])}")
    folders = there
    cases = [_case(folder, layout) for folder in sorted(folders, key=lambda f: (f.name, str(f)))]
    by_id = {case.id: case for case in cases}
    for table in tables:
        add = _add_survival if table.name in _SURVIVAL_TABLES else _add_mapping
        add(table, by_id)
    return require_channels(cases, tuple(LAYOUTS[layout].suffixes) if channels is None else channels, allow_missing)


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
    """`cases` if each has all `channels` (with `allow_missing`: at least one); else one `Incomplete` that lists every gap."""
    if gaps := lacking_channels(cases, channels, allow_missing):
        raise Incomplete(gaps, cases)
    return cases


def lacking_channels(cases: list[Case], channels: Sequence[str], allow_missing: bool) -> str:
    """Every gap of `require_channels` as one message; "" where there is none."""
    missing = {case.id: [c for c in channels if c not in case.images] for case in cases}
    refused = {case: gaps for case, gaps in missing.items() if gaps and (not allow_missing or len(gaps) == len(channels))}
    if refused:
        lines = "\n".join(f"  {case}: {', '.join(gaps)}" for case, gaps in refused.items())
        return (
            f"{len(refused)} of {len(cases)} cases lack channels:\n{lines}\n"
            "Add the files, narrow the task (task.channels=[...]), or accept cases with at least one channel (data.preprocessing.allow_missing=true)."
        )
    return ""


def _known(layout: str) -> str:
    if str(layout) not in LAYOUTS:
        raise unknown("BraTS layout", str(layout), LAYOUTS)
    return str(layout)


def _is_case(name: str) -> bool:
    return any(known.names.fullmatch(name) for known in LAYOUTS.values())


def _scan(root: Path) -> tuple[list[Path], list[Path]]:
    """Case folders and tables under `root`, at most three folders deep (archive folder, grade, case)."""
    cases, tables, level = [], [], [root]
    for _ in range(3):
        children = sorted(child for folder in level for child in folder.iterdir() if not child.name.startswith("."))
        tables += [c for c in children if c.name in (*_SURVIVAL_TABLES, "name_mapping.csv")]
        folders = [c for c in children if c.is_dir()]
        cases += [f for f in folders if _is_case(f.name)]
        level = [f for f in folders if not _is_case(f.name)]
    return cases, tables


def _expected(root: Path, layouts: Iterable[str]) -> str:
    there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
    lines = "".join(f"\n  {key}: {LAYOUTS[key].example}" for key in layouts)
    return f"the folder holds {there}. Expected one of:{lines}\ndocs/data.md says where to get the data sets."


def _case(folder: Path, layout: str) -> Case:
    name, known = folder.name, LAYOUTS[layout]
    files = {channel: volume_file(folder, f"{name}{known.joint}{suffix}") for channel, suffix in known.suffixes.items()}
    label = volume_file(folder, f"{name}{known.joint}{known.label}")
    if label is None and name in _MISNAMED_LABELS:
        label = volume_file(folder, _MISNAMED_LABELS[name])
    return Case(
        id=name,
        images={channel: path for channel, path in files.items() if path},
        label=label,
        patient=known.names.fullmatch(name)["patient"],
        site=_site(name),
        attributes={"grade": folder.parent.name} if folder.parent.name in ("HGG", "LGG") else {},
    )


def _site(name: str) -> str:
    """The site that a 2018 or 2019 case name holds (`CBICA`, `TCIA01`, `2013` ...); empty for other names."""
    match = LAYOUTS["2018"].names.fullmatch(name) or LAYOUTS["2019"].names.fullmatch(name)
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
