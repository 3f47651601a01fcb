"""Cases for the official BraTS 2026 evaluation, and its numbers for them: by running the package in an interpreter of its own.

    LESIONBENCH_BRATS_PYTHON=<python with BraTS-evaluation 0.0.10 and panoptica 2.1.7> python -m tests.brats_official

writes `recorded/brats2026.csv`. The package is under the AGPL: it is run, never imported.
"""

import csv
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

RECORDED = Path(__file__).parent / "recorded" / "brats2026.csv"
SEEDS = (1, 2, 3, 4, 5, 7, 9, 21)  # recorded, of every task; 7 has no truth, 9 no prediction, 21 neither


class Official(NamedTuple):
    """A task of the challenge: the name of its configuration and of its table, and its regions with their values on disk."""

    config: str
    table: str
    regions: dict[str, list[int]]


ADULT = {"wt": [1, 2, 3], "tc": [1, 3], "et": [3]}
TASKS = {
    "gli": Official("gli", "seg", {**ADULT, "netc": [1], "snfh": [2], "rc": [4]}),
    "ped": Official("ped", "seg", {"wt": [1, 2, 3, 4], "tc": [1, 2, 3], "et": [1], "netc": [2], "cc": [3], "ed": [4]}),
    "mets": Official("mets", "mets", {**ADULT, "rc": [4]}),
    "men": Official("MenPre", "seg", ADULT),
    "menrt": Official("MenRT", "seg", {"gtv": [1]}),
    "goat": Official("GoAT", "seg", ADULT),
}
SPACINGS = ((1, 1, 1), (1, 1, 5), (0.5, 0.75, 2.5), (2, 1, 0.5), (1.25, 1.25, 1.25), (3, 1, 2))

Case = tuple[np.ndarray, np.ndarray, tuple[float, ...]]


def values_of(task: str) -> int:
    """The largest value on disk of a task."""
    return max(max(values) for values in TASKS[task].regions.values())


def random_case(seed: int, largest: int) -> Case:
    """Prediction and truth (X, Y, Z) with values 0 ... `largest`, and the voxel size: touching blobs, of which the prediction is a copy that is
    moved, grown, cut, speckled, has blobs of its own, or is empty. The same for ever: by `RandomState`, whose draws are frozen."""
    draw = np.random.RandomState(seed)
    empty = draw.rand()
    shape = tuple(draw.randint(10, 26, 3))
    truth = _blobs(draw, shape, draw.randint(0, 7), largest)
    prediction = np.roll(truth, draw.randint(-2, 3, 3), (0, 1, 2)) if draw.rand() < 0.5 else truth.copy()
    if draw.rand() < 0.25:
        prediction = ndimage.grey_dilation(prediction, size=3)
    for _ in range(draw.randint(0, 4)):
        axis = draw.randint(3)
        prediction[(slice(None),) * axis + (draw.randint(shape[axis]),)] = 0
    more = _blobs(draw, shape, draw.randint(0, 4), largest)
    prediction = np.where(more > 0, more, prediction)
    specks = draw.rand(*shape) < 0.003
    prediction[specks] = draw.randint(0, largest + 1, specks.sum())
    if empty < 0.06:
        prediction[:] = 0
    if 0.04 < empty < 0.1:
        truth[:] = 0
    return prediction, truth, SPACINGS[draw.randint(len(SPACINGS))]


def _blobs(draw: np.random.RandomState, shape: tuple[int, ...], number: int, largest: int) -> np.ndarray:
    blobs = np.zeros(shape, np.uint8)
    for _ in range(number):
        center, radius = draw.rand(3) * shape, 1 + draw.rand(3) * 3.5
        distance = sum(((x - c) / r) ** 2 for x, c, r in zip(np.indices(shape), center, radius, strict=True))
        blobs[distance <= 1] = draw.randint(0, largest + 1)
    return blobs


def official_rows(python: str, task: str, cases: Sequence[Case], folder: Path) -> list[dict[str, dict[str, float]]]:
    """The official table of some cases: per case `{region: {column: value}}`, column names without the region.

    Args:
        python: interpreter that has the package.
        task: of `TASKS`.
        cases: prediction, truth, voxel size.
        folder: where files may be written.
    """
    for number, (prediction, truth, spacing) in enumerate(cases):
        for name, labels in (("prediction", prediction), ("truth", truth)):
            (folder / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(labels.astype(np.uint8), np.diag([*spacing, 1.0]))
            image.to_filename(folder / name / f"{number:05d}.nii.gz")
    config, table, regions = TASKS[task]
    steps = [
        f"evaluation --config {config} --ref_path truth --pred_path prediction --summary_json found.json",
        f"metrics_parser {table} --json_path found.json --output_csv_path found.csv",
    ]
    for step in steps:
        subprocess.run([python, "-W", "ignore", "-m", *f"brats_evaluation.{step}".split()], cwd=folder, check=True, capture_output=True)
    with open(folder / "found.csv") as file:
        rows = list(csv.DictReader(file))[: len(cases)]  # mean, std and median follow
    assert [row["subject_id"] for row in rows] == [f"{number:05d}.nii.gz" for number in range(len(cases))]
    return [
        {
            region: {name.removesuffix(f"_{region}"): float(text or "nan") for name, text in row.items() if name.endswith(f"_{region}")}
            for region in regions
        }
        for row in rows
    ]


def recorded_rows() -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """The committed numbers by task and seed, as `official_rows` gives them."""
    found: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    with open(RECORDED) as file:
        for row in csv.DictReader(file):
            task, seed, region = (row.pop(name) for name in ("task", "seed", "region"))
            found.setdefault((task, int(seed)), {})[region] = {name: float(text) for name, text in row.items() if text}
    return found


def main() -> None:
    lines = []
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            cases = [random_case(seed, values_of(task)) for seed in SEEDS]
            rows = official_rows(os.environ["LESIONBENCH_BRATS_PYTHON"], task, cases, Path(folder))
        for seed, row in zip(SEEDS, rows, strict=True):
            lines += [{"task": task, "seed": seed, "region": region, **values} for region, values in row.items()]
    columns = dict.fromkeys(name for line in lines for name in line)
    with open(RECORDED, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.9g}" if isinstance(value, float) else value for name, value in line.items()} for line in lines)


if __name__ == "__main__":
    main()
