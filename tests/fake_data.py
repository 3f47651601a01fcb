"""Writes small, learnable data sets under the true names and layouts of real ones."""

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lesionbench.geometry import write_volume

SHAPE = (24, 24, 20)
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
BRATS_CHANNELS = ("t1", "t1ce", "t2", "flair")
NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}


def fake_case(channels: Sequence[str], values: Sequence[int], shape: Sequence[int] = SHAPE, seed: Sequence[int] = (0,)):
    """Images {channel: int16 (X, Y, Z)} and a label of the same shape: a brain with one blob of nested shells.

    `values` are the foreground values from the blob's core outwards. Every channel shows the shells, each channel with its own
    brightness for each, so a few steps of training find them.
    """
    rng = np.random.default_rng(list(seed))
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij"))
    brain = (grid**2).sum(axis=0) < 0.9
    center = rng.uniform(-0.25, 0.25, size=3)[:, None, None, None]
    distance = np.sqrt(((grid - center) ** 2).sum(axis=0)) / rng.uniform(0.45, 0.6)
    shell = np.minimum((distance * len(values)).astype(int), len(values))  # 0 = core ... len(values) = outside
    label = np.array([*values, 0], dtype=np.int16)[shell] * brain
    images = {}
    for m, channel in enumerate(channels):
        brightness = np.array([300 + 250 * (1 + (s + m) % len(values)) for s in range(len(values))] + [300])
        image = brightness[shell] + rng.normal(0, 20, size=shape)
        images[channel] = (np.maximum(image, 1) * brain).astype(np.int16)
    return images, label.astype(np.int16)


def write_fake_brats(
    root: Path,
    layout: str,
    count: int = 6,
    shape: Sequence[int] = SHAPE,
    missing: Sequence[tuple[int, str]] = (),
    seed: int = 0,
    extension: str = ".nii.gz",
) -> Path:
    """Writes a BraTS training set with its tables under `root` and returns `root`.

    `missing` lists (case number, channel or `seg`) that are left out.
    """
    home = {"2020": Path(root) / "MICCAI_BraTS2020_TrainingData"}.get(layout, Path(root))
    folders = [home / name for name in _BRATS_NAMES[layout](count)]
    joint, names = ("-", NAMES_2023) if layout == "2023" else ("_", {c: c for c in BRATS_CHANNELS})
    for number, folder in enumerate(folders):
        images, label = fake_case(BRATS_CHANNELS, (1, 3 if layout == "2023" else 4, 2), shape, (seed, number))
        files = {c: (f"{folder.name}{joint}{names[c]}", image) for c, image in images.items()}
        stem = "W39_1998.09.19_Segm" if folder.name == "BraTS20_Training_355" else f"{folder.name}{joint}seg"
        for key, (name, array) in {**files, "seg": (stem, label)}.items():
            if (number, key) not in missing:
                write_volume(folder / f"{name}{extension}", array, LPS)
    _write_brats_tables(home, layout, [f.name for f in folders])
    return Path(root)


def _names_with_sites(prefix: str, count: int) -> list[str]:
    sites = ("CBICA", "TCIA01", "2013")
    grades = ["LGG" if n % 3 == 2 else "HGG" for n in range(count)]
    return [f"{grade}/{prefix}_{sites[n % 3]}_{100 + n}_1" for n, grade in enumerate(grades)]


_BRATS_NAMES: dict[str, Callable[[int], list[str]]] = {
    "2018": partial(_names_with_sites, "Brats18"),
    "2019": partial(_names_with_sites, "BraTS19"),
    "2020": lambda count: [f"BraTS20_Training_{n:03d}" for n in [*range(1, count), 355]],  # 355: the misnamed segmentation
    "2021": lambda count: [f"BraTS2021_{n:05d}" for n in range(count)],
    "2023": lambda count: [f"BraTS-GLI-{max(n - 1, 0):05d}-{n == 1:03d}" for n in range(count)],  # the first patient came twice
}


def _write_brats_tables(home: Path, layout: str, names: Sequence[str]) -> None:
    """The survival tables with the strings that they really hold, and the grades of 2020."""
    ages = [f"{60 + n}.{n}" for n in range(len(names))]
    if layout in ("2018", "2019"):
        odd = ["289", "NA", "", "ALIVE (361 days later)"]
        header = [f"{'Brats18' if layout == '2018' else 'BraTS19'}ID", "Age", "Survival", "ResectionStatus"]
        rows = [[name, age, odd[n] if n < 4 else 100 + n, "GTR"] for n, (name, age) in enumerate(zip(names, ages, strict=True))]
        _write_csv(home / "survival_data.csv", header, rows)
    if layout == "2020":
        odd = ["289", "ALIVE (361 days later)", "NA", ""]
        header = ["Brats20ID", "Age", "Survival_days", "Extent_of_Resection"]
        rows = [[name, age, odd[n] if n < 4 else 100 + n, "NA"] for n, (name, age) in enumerate(zip(names, ages, strict=True))]
        _write_csv(home / "survival_info.csv", header, rows[:5])
        years = [f"BraTS_{y}_subject_ID" for y in (2017, 2018)] + ["TCGA_TCIA_subject_ID"] + [f"BraTS_{y}_subject_ID" for y in (2019, 2020)]
        rows = [["LGG" if n % 3 == 2 else "HGG", "NA", "NA", "NA", f"BraTS19_CBICA_A{n}_1", name] for n, name in enumerate(names)]
        _write_csv(home / "name_mapping.csv", ["Grade", *years], rows)


def write_fake_folder(
    root: Path,
    count: int = 6,
    channels: Sequence[str] = ("t1", "flair"),
    classes: Mapping[str, int] | None = None,
    raters: int = 0,
    shape: Sequence[int] = SHAPE,
    seed: int = 0,
    survival: bool = False,
) -> Path:
    """Writes `images/`, `labels/` and `attributes.csv` (with `survival`, also days and events) under `root` and returns `root`.

    `classes` maps names to values on disk (default background 0, lesion 1). With `raters`, every second case has one rater fewer
    (but at least one); raters differ by a shift of one voxel.
    """
    root = Path(root)
    values = [v for v in (classes or {"background": 0, "lesion": 1}).values() if v]
    names = [f"case_{n:02d}" for n in range(count)]
    for number, name in enumerate(names):
        images, label = fake_case(channels, values, shape, (seed, number))
        for channel, image in images.items():
            write_volume(root / "images" / f"{name}_{channel}.nii.gz", image, LPS)
        write_volume(root / "labels" / f"{name}.nii.gz", label, LPS)
        for rater in range(max(raters - number % 2, min(raters, 1))):
            write_volume(root / "labels" / f"{name}_rater{rater + 1}.nii.gz", np.roll(label, rater, axis=0), LPS)
    rows = [[name, f"patient_{n:02d}", "north" if n % 2 else "south", 50 + n, "" if n == 0 else f"{n}.5"] for n, name in enumerate(names)]
    rows = [[*row, 100 + 37 * n, int(n % 3 > 0)] for n, row in enumerate(rows)] if survival else rows
    _write_csv(root / "attributes.csv", ["case", "patient", "site", "age", "score", *(["survival", "event"] if survival else [])], rows)
    return root


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


# Data set name -> function that writes it under a folder and returns what to pass as data.root.
WRITERS: dict[str, Callable[[Path], Path]] = {
    **{f"brats{layout}": partial(write_fake_brats, layout=layout) for layout in _BRATS_NAMES},
    "folder": partial(write_fake_folder, survival=True),
}
