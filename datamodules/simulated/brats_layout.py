"""Simulated cases written in the true layout of a BraTS year."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from datamodules.simulated.simulation import BRATS_CHANNELS, SimulatedCase, Simulation, _resection, _write_table, simulate
from datamodules.simulated.simulation_variants import grid
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import write_volume
from lesionbench.progress import tracked
from lesionbench.written import clear, locked, prefix

BEGUN = ".simulating.json"  # what is being written to a folder, until all of it is there
BRATS_SUFFIXES = {"2023": {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}}


BRATS_NAMES: dict[str, Callable[[int, SimulatedCase], str]] = {  # (number from 0, case) -> folder below the root
    "2018": lambda n, case: f"{case.attributes['grade']}/Brats18_{case.site}_{n:03d}_1",
    "2019": lambda n, case: f"{case.attributes['grade']}/BraTS19_{case.site}_{n:03d}_1",
    "2020": lambda n, case: f"BraTS20_Training_{n + 1:03d}",
    "2021": lambda n, case: f"BraTS2021_{n:05d}",
    "2023": lambda n, case: f"BraTS-GLI-{n:05d}-000",
}


BRATS_SURVIVAL = {  # file and header of the year's survival table
    "2018": ("survival_data.csv", ("Brats18ID", "Age", "Survival", "ResectionStatus")),
    "2019": ("survival_data.csv", ("BraTS19ID", "Age", "Survival", "ResectionStatus")),
    "2020": ("survival_info.csv", ("Brats20ID", "Age", "Survival_days", "Extent_of_Resection")),
}


NAME_MAPPING = (
    "Grade",
    "BraTS_2017_subject_ID",
    "BraTS_2018_subject_ID",
    "TCGA_TCIA_subject_ID",
    "BraTS_2019_subject_ID",
    "BraTS_2020_subject_ID",
)


def write_brats(out: Path, settings: Simulation, count: int, layout: str = "2020", progress: bool = True) -> Path:
    """Writes `count` cases under the names, label values and tables of a BraTS year; returns `out`.

    A folder where this very call was interrupted is completed. The survival table lists high-grade cases only; a censored one reads `ALIVE (361 days later)`, as in the real tables.

    Args:
        out: a new or empty folder, or one that the same call has begun.
        settings: variant `tumor` or `habitats` (whose habitat maps are left out).
        count: number of cases, from index 0.
        layout: `2018`, `2019`, `2020`, `2021` or `2023`.
        progress: show a bar.

    Raises:
        SuiteError: a folder that holds something else or that another process is filling, too little free space, an unknown layout, or a variant that has no BraTS layout.
    """
    out, layout = Path(out), str(layout)
    if layout not in BRATS_NAMES:
        raise unknown("BraTS layout (simulate.layout)", layout, BRATS_NAMES)
    if settings.variant not in ("tumor", "habitats"):
        raise SuiteError(f"simulate.variant={settings.variant}: only tumor and habitats have a BraTS layout")
    own = json.dumps({"layout": layout, "count": count, **asdict(settings)})
    _require_room(out, settings, count, own)
    with locked(out / BEGUN, f"{out}: another process is writing these cases") as file:
        file.truncate(0)
        file.write(own)
        file.flush()
        clear(out)
        _write_cases(out, settings, count, layout, progress)
        (out / BEGUN).unlink()
    return out


def _write_cases(out: Path, settings: Simulation, count: int, layout: str, progress: bool) -> None:
    rows = []
    for number in tracked(range(count), count, "Simulating", progress):
        case = simulate(settings, number)
        name = BRATS_NAMES[layout](number, case)
        if not (out / name).exists():
            _write_brats_case(out, name, layout, case)
        rows.append((name.rpartition("/")[2], number, case))
    _write_brats_tables(out, layout, rows, settings.seed)


def _require_room(out: Path, settings: Simulation, count: int, own: str) -> None:
    begun = (out / BEGUN).exists() and (out / BEGUN).read_text() == own
    if out.exists() and not begun and (not out.is_dir() or any(path.name != BEGUN for path in out.iterdir())):
        raise SuiteError(f"{out}: not an empty folder; choose a new one with out=<folder>")
    out.mkdir(parents=True, exist_ok=True)
    voxels = np.prod([len(axis) for axis in grid(settings.spacing)])
    need, free = int(count * voxels * 9 * 0.25), shutil.disk_usage(out).free  # four int16 channels and a label; compressed to a quarter
    if need > free:
        raise SuiteError(
            f"{out}: {count} cases need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; fewer cases or a larger spacing"
        )


def _write_brats_case(out: Path, name: str, layout: str, case: SimulatedCase) -> None:
    """The case's folder, made aside and moved into place whole."""
    joint, suffixes = ("-", BRATS_SUFFIXES[layout]) if layout in BRATS_SUFFIXES else ("_", {c: c for c in BRATS_CHANNELS})
    label = np.where(case.label == 4, 3, case.label).astype(np.uint8) if layout == "2023" else case.label
    stem = name.rpartition("/")[2]
    with TemporaryDirectory(dir=out, prefix=prefix()) as own:
        folder = Path(own) / stem
        for suffix, array in [*((suffixes[c], image) for c, image in case.images.items()), ("seg", label)]:
            write_volume(folder / f"{stem}{joint}{suffix}.nii.gz", array, case.affine)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out / name)


def _write_brats_tables(out: Path, layout: str, rows: list[tuple[str, int, SimulatedCase]], seed: int) -> None:
    if layout not in BRATS_SURVIVAL:
        return
    table, header = BRATS_SURVIVAL[layout]
    high = [row for row in rows if row[2].attributes["grade"] == "HGG"]
    values = [(name, case.attributes["age"], survival_text(case.attributes), _resection(seed, number)) for name, number, case in high]
    _write_table(out / table, list(header), [dict(zip(header, v, strict=True)) for v in values])
    if layout == "2020":
        older = [(case.attributes["grade"], BRATS_NAMES["2019"](number, case).rpartition("/")[2], name) for name, number, case in rows]
        columns = ("Grade", "BraTS_2019_subject_ID", "BraTS_2020_subject_ID")
        _write_table(out / "name_mapping.csv", list(NAME_MAPPING), [dict(zip(columns, v, strict=True)) for v in older])


def survival_text(attributes: Mapping[str, Any]) -> str:
    """Survival as BraTS tables write it: days to death, or `ALIVE (361 days later)`."""
    return str(attributes["survival"]) if attributes["event"] else f"ALIVE ({attributes['survival']} days later)"
