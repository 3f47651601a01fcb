"""Writes small, learnable data sets under the true names and layouts of real ones."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
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
    joint, names = ("-", NAMES_2023) if layout >= "2023" else ("_", {c: c for c in BRATS_CHANNELS})
    if layout == "2024_men_rt":
        joint, names = "_", {"t1ce": "t1c"}
    for number, folder in enumerate(folders):
        images, label = fake_case(tuple(names), (1, 3 if layout >= "2023" else 4, 2), shape, (seed, number))
        if layout in ("2024", "2024_ped", "2025_met"):
            label[-2:, -2:] = 4  # off the tumor: a resection cavity, edema
        if layout == "2024_men_rt":
            label = (label > 0).astype(label.dtype)
        files = {c: (f"{folder.name}{joint}{names[c]}", image) for c, image in images.items()}
        end = "gtv" if layout == "2024_men_rt" else "seg"
        stem = "W39_1998.09.19_Segm" if folder.name == "BraTS20_Training_355" else f"{folder.name}{joint}{end}"
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
    "2023_ped": lambda count: [f"BraTS-PED-{n:05d}-000" for n in range(count)],
    "2024": lambda count: [f"BraTS-GLI-{max(n - 1, 0):05d}-{100 + (n == 1)}" for n in range(count)],
    "2024_ped": lambda count: [f"BraTS-PED-{n:05d}-000" for n in range(count)],
    "2024_men_rt": lambda count: [f"BraTS-MEN-RT-{n:04d}-1" for n in range(count)],
    "2025_met": lambda count: [f"BraTS-MET-{n:05d}-000" for n in range(count)],
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


def write_fake_pancreas(root: Path) -> Path:
    """Writes a folder of CT with the list of its division under `root` and returns `root`."""
    write_fake_folder(root, channels=("ct",))
    lists = {"train": [f"case_{n:02d}" for n in range(5)], "test": ["case_05"]}
    (Path(root) / "split.json").write_text(json.dumps(lists))
    return Path(root)


QUBIQ_SETS = {  # folder -> channels, tasks, raters, shape (the layout of the challenge)
    "prostate": (1, 2, 6, (40, 36)),
    "brain-growth": (1, 1, 7, (40, 40)),
    "brain-tumor": (4, 3, 3, (40, 40)),
    "kidney": (1, 1, 3, (44, 40)),
    "pancreas": (1, 1, 2, (36, 34, 20)),
    "pancreatic-lesion": (1, 1, 2, (36, 34, 16)),
}


def write_fake_qubiq(root: Path, count: int = 5, seed: int = 0) -> Path:
    """Writes all data sets of QUBIQ under `root` and returns it: `count` cases each, the last two for validation.

    Every rater draws the same blob shifted by one pixel. 2D files have two axes, those of the kidney a third of length one, the brain
    tumor image four channels on the first; the second prostate case has five raters instead of six.
    """
    for dataset, (channels, tasks, raters, shape) in QUBIQ_SETS.items():
        for number in range(count):
            folder = Path(root) / dataset / ("Validation" if number >= count - 2 else "Training") / f"case{number + 1:02d}"
            names = [f"m{c}" for c in range(channels)]
            images, label = fake_case(names, (3, 2, 1), (*shape, 3)[:3], (seed, number, raters))
            flat = len(shape) == 2 and dataset != "kidney"
            stacked = np.stack([images[n] for n in names])
            if len(shape) == 2:
                stacked, label = stacked[..., 1:2], label[..., 1:2]
            image = stacked[0] if channels == 1 else stacked
            write_volume(folder / "image.nii.gz", image.squeeze(-1) if flat else image, np.eye(4))
            for task in range(1, tasks + 1):
                for rater in range(raters - (dataset == "prostate" and number == 1)):
                    mask = np.roll(label >= task, rater, axis=0).astype(np.uint8)
                    write_volume(folder / f"task{task:02d}_seg{rater + 1:02d}.nii.gz", mask.squeeze(-1) if flat else mask, np.eye(4))
    return Path(root)


ATLAS_TEST = (
    "c0008s0028t01 c0004s0011t01 c0004s0022t01 c0003s0034t01 c0006s0006t01 c0003s0021t01 c0003s0030t01 c0004s0017t01 c0008s0003t01 "
    "c0007s0001t01 c0007s0013t01 c0005s0007t01 c0004s0001t01 c0010s0021t01 c0007s0015t01 c0004s0019t01 c0009s0011t01 c0006s0008t01 "
    "c0010s0038t01 c0005s0011t01 c0003s0054t01 c0004s0021t01 c0010s0002t02 c0009s0007t01 c0005s0036t01 c0007s0032t01 c0003s0023t01"
)


def write_fake_atlas(root: Path, release: str = "1.2", count: int = 4, shape: Sequence[int] = (24, 24, 10), seed: int = 0) -> Path:
    """Writes ATLAS under `root` and returns `root`; every second scan has two masks (R1.2: of value 255, with an overlap).

    R1.2: `count` scans that the published split trains on and its 27 test scans, in folders of cohorts. R2.0: `count` scans with a mask
    (the last one in a second session), and a test scan without.
    """
    root = Path(root)
    names = [f"c0001s{n:04d}t01" for n in range(count)] + ATLAS_TEST.split() if release == "1.2" else [f"{n:03d}" for n in range(count + 1)]
    for number, name in enumerate(names):
        images, label = fake_case(("t1",), (1,), shape, (seed, number))
        if release == "1.2":
            folder = root / "standard" / name[:5] / name
            stem, image, ending = name, "_t1w_stx.nii.gz", ["_LesionSmooth_stx.nii.gz", "_LesionSmooth_1_stx.nii.gz"]
            value = 255
        else:
            subject, session = f"sub-r009s{name}", 2 if number == count - 1 else 1
            folder = root / "ATLAS_2" / ("Training" if number < count else "Testing") / "R009" / subject / f"ses-{session}" / "anat"
            stem, image = f"{subject}_ses-{session}_space-MNI152NLin2009aSym", "_T1w.nii.gz"
            ending, value = [f"_label-{side}_desc-T1lesion_mask.nii.gz" for side in "LR"], 1
        write_volume(folder / f"{stem}{image}", images["t1"], LPS)
        middle = int(np.median(np.nonzero(label)[0]))
        halves = [
            np.where(np.arange(shape[0])[:, None, None] <= middle, label, 0),
            np.where(np.arange(shape[0])[:, None, None] >= middle, label, 0),
        ]
        masks = [] if release == "2.0" and number == count else halves if number % 2 else [label]
        for end, mask in zip(ending, masks, strict=False):
            write_volume(folder / f"{stem}{end}", (mask * value).astype(np.uint8), LPS)
    return root


def write_fake_masks(root: Path, count: int = 4, seed: int = 0) -> Path:
    """Writes `masks/lesion_<n>.nii.gz`, balls in MNI space on a grid of 2 mm, in the left or right white matter; returns `root`."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    x, y, z = np.meshgrid(*(np.arange(n) * 2 + o for n, o in zip((91, 109, 91), affine[:3, 3], strict=True)), indexing="ij")
    rng = np.random.default_rng(seed)
    for number in range(count):
        side, radius = (-30, 30)[number % 2], rng.uniform(6, 14)
        mask = (x - side) ** 2 + (y + 20 * number - 20) ** 2 + (z - 25) ** 2 < radius**2
        write_volume(Path(root) / "masks" / f"lesion_{number}.nii.gz", mask.astype(np.float32), affine)
    return Path(root)


def write_fake_ibsr(
    root: Path,
    files: str = "nifti",
    count: int = 6,
    shape: Sequence[int] = (24, 16, 24),
    seed: int = 0,
) -> Path:
    """Writes the first `count` cases of IBSR-18 under `root` and returns `root`; `shape` is that of the NIfTI form, the middle axis thick.

    NIfTI files have a fourth axis of length one and the first axis from right to left. The Analyze form has the same volume with the
    thick axis last, upside down, big-endian, without orientation, and the skull in its images.
    """
    for number in range(count):
        name = f"IBSR_{number + 1:02d}"
        images, label = fake_case(("t1",), (3, 2, 1), shape, (seed, number))
        brain = images["t1"] > 0
        maps = {
            "ana": images["t1"] + 90 * ~brain,
            "ana_strip": images["t1"],
            "ana_brainmask": brain,
            "segTRI_ana": label,
            "segTRI_fill_ana": np.where(brain & (label == 0), 1, label),
        }
        for kind, array in maps.items():
            if files == "nifti":
                write_volume(Path(root) / name / f"{name}_{kind}.nii.gz", array.astype(np.int16)[..., None], np.diag([-0.94, 1.5, 0.94, 1]))
            elif kind in ("ana", "segTRI_ana", "segTRI_fill_ana"):
                place = Path(root) / name / ("images" if kind == "ana" else "segmentation") / "analyze"
                _write_analyze(
                    place / f"{name}_{kind}.img", array.swapaxes(1, 2)[:, ::-1].astype(np.int16)[..., None], (0.94, 0.94, 1.5, 1)
                )
    return Path(root)


def _write_analyze(path: Path, array: np.ndarray, zooms: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape(array.shape)
    header.set_zooms(zooms)
    nib.AnalyzeImage(array, None, header).to_filename(path)


# the first cases of the published lists, in their order
_ATRIA = (
    "06SR5RBREL16DQ6M8LWS 0RZDK210BSMWAA6467LU 1D7CUD1955YZPGK8XHJX 1GU15S0GJ6PFNARO469W 1MHBF3G6DCPWHSKG7XCP "
    "23X6SY44VT9KFHR7S7OC 2XL5HSFSE93RMOJDRGR4 38CWS74285MFGZZXR09Z 3C2QTUNI0852XV7ZH4Q1 3DA0T2V6JJ2NLUAV6FWM"
)
LEFT_ATRIUM = {
    "train": _ATRIA.split(),
    "test": ["UPT6DX9IQY9JAZ7HJKA7", "UTBUJIWZMKP64E3N73YC"],
}
ACDC = {"train": [99, 38, 50, 100, 58, 21], "val": [28], "test": [11, 13]}


def fake_heart(count: int, shape: Sequence[int], seed: Sequence[int]):
    """Scan (X, Y, Z), int16, without a zero background, and a label of `count` classes, the first innermost."""
    images, label = fake_case(("mri",), tuple(range(1, count + 1)), shape, seed)
    return images["mri"] + np.random.default_rng([*seed, 1]).integers(20, 60, size=shape).astype(np.int16), label


def write_fake_left_atrium(
    root: Path, files: str = "h5", train: int = 7, test: int = 2, shape: Sequence[int] = SHAPE, seed: int = 0
) -> Path:
    """Writes the first cases of the published lists of the 2018 left-atrium challenge under `root` and returns `root`.

    `h5`: z-scores of the whole scan, then a box around the atrium; labels 0 and 1. `nrrd`: `lgemri.nrrd` and `laendo.nrrd` (0 and 255) in
    the folder that the archive unpacks to, 0.625 mm.
    """
    import SimpleITK as sitk

    for number, name in enumerate([*LEFT_ATRIUM["train"][:train], *LEFT_ATRIUM["test"][:test]]):
        image, label = fake_heart(1, shape, (seed, number))
        if files == "h5":
            folder = Path(root) / name
            box = tuple(slice(max(0, where.min() - 3), where.max() + 4) for where in np.nonzero(label)[:2])
            scores = ((image - image.mean()) / image.std()).astype(np.float32)
            _write_h5(folder / "mri_norm2.h5", {"image": scores[box], "label": label.astype(np.uint8)[box]})
            continue
        folder = Path(root) / "2018LA_Seg_Training Set" / name
        folder.mkdir(parents=True)
        for kind, array in {"lgemri": (image // 8).astype(np.uint8), "laendo": (label * 255).astype(np.uint8)}.items():
            volume = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
            volume.SetSpacing((0.625, 0.625, 0.625))
            volume.SetOrigin((-10.0, 20.0, 30.0))
            sitk.WriteImage(volume, str(folder / f"{kind}.nrrd"))
    return Path(root)


def write_fake_acdc(root: Path, files: str = "h5", shape: Sequence[int] = (22, 26, 5), seed: int = 0) -> Path:
    """Writes patients of all parts of the published ACDC lists under `root`, two frames each, and returns `root`.

    `h5`: `data/` with a volume (slices, Y, X) in 0..1 for each frame, and `data/slices/` with its slices; `slices`: the slices alone, in
    `ACDC_training_slices/`; `flat`: volumes alone, under the frame's number in the cycle and with scribbles; `nifti`: the challenge's
    folders with `Info.cfg`, the 4D file (empty here), and a test patient beyond the lists.
    """
    root = Path(root)
    patients = [n for part in ACDC.values() for n in part] + ([101] if files == "nifti" else [])
    for number in patients:
        es = 7 + number % 5 if files in ("flat", "nifti") else 2
        for frame in (1, es):
            patient, name = f"patient{number:03d}", f"patient{number:03d}_frame{frame:02d}"
            image, label = fake_heart(3, (shape[0] + number % 3, *shape[1:]), (seed, number, frame))
            if files == "nifti":
                folder = root / ("training" if number <= 100 else "testing") / patient
                write_volume(folder / f"{name}.nii.gz", image, np.diag([1.5, 1.5, 10, 1]))
                write_volume(folder / f"{name}_gt.nii.gz", label.astype(np.uint8), np.diag([1.5, 1.5, 10, 1]))
                (folder / f"{patient}_4d.nii.gz").touch()
                group = ("NOR", "DCM", "HCM")[number % 3]
                (folder / "Info.cfg").write_text(f"ED: 1\nES: {es}\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
                continue
            scaled = ((image - image.min()) / np.ptp(image)).astype(np.float32).T
            arrays = {"image": scaled, "label": label.astype(np.uint8).T, "scribble": np.full(scaled.shape, 4, np.uint16)}
            home = {"h5": root / "data", "flat": root, "slices": root}[files]
            slices = {"h5": home / "slices", "slices": home / "ACDC_training_slices"}.get(files)
            if files != "slices":
                _write_h5(home / f"{name}.h5", arrays)
            if slices:
                for k in range(len(scaled)):
                    _write_h5(slices / f"{name}_slice_{k + 1}.h5", {n: a[k] for n, a in arrays.items()})
    return root


def _write_h5(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


# Data set name -> function that writes it under a folder and returns what to pass as data.root.
WRITERS: dict[str, Callable[[Path], Path]] = {
    **{f"brats{layout}": partial(write_fake_brats, layout=layout) for layout in _BRATS_NAMES},
    "folder": partial(write_fake_folder, survival=True),
    "folder_ct": write_fake_pancreas,
    "folder_mr": partial(write_fake_folder, channels=("mr",), count=8),
    "qubiq": write_fake_qubiq,
    "atlas": write_fake_atlas,
    "semireal": write_fake_masks,
    "ibsr": write_fake_ibsr,
    "leftatrium": write_fake_left_atrium,
    "acdc": partial(write_fake_acdc, shape=(22, 26, 3)),  # networks on slices of 256 x 256 take their time
}
