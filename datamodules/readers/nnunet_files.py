"""Data sets described by a `dataset.json`: nnU-Net's raw format (version 2) and that of the Medical Segmentation Decathlon."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.provenance import derive
from datamodules.readers.brats_files import require_channels, require_root
from datamodules.readers.folder_files import add_attributes
from datamodules.readers.tables import read_json
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.geometry import ENDINGS, read_channels, stem_of, write_volume
from lesionbench.task import BACKGROUND, Task

SPLITS = "splits_final.json"


def read_description(root: Path, name: str, needed: Sequence[str]) -> dict[str, Any]:
    """The `dataset.json` in `root`.

    Args:
        name: of the format, for errors.
        needed: keys that it must have.

    Raises:
        SuiteError: no folder, no such file, no JSON object, or keys that it lacks.
    """
    path = require_root(root, name) / "dataset.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in Path(root).iterdir())[:5]) or "nothing"
        raise SuiteError(f"{root}: no dataset.json; the folder holds {there}. A data set of {name} has it beside imagesTr/ and labelsTr/")
    found = read_json(path)
    if not isinstance(found, dict) or (lacking := [key for key in needed if not isinstance(found.get(key), dict | list | str)]):
        raise SuiteError(
            f"{path}: expected a JSON object with {', '.join(needed)}"
            + (f"; it lacks {', '.join(lacking)}" if isinstance(found, dict) else "")
        )
    return found


def described_task(path: Path, channels: Mapping[str, str], labels: Mapping[str, Any], slice_axis: int) -> Task:
    """The task of a description.

    Args:
        path: of the description, for errors.
        channels: number -> name; a name that comes twice gets its number.
        labels: name -> value, or values of a region; the value of `ignore` is left out.

    A value that is a region by itself is a class of that name, any other is `label_<value>`. Without regions every class is one.

    Raises:
        SuiteError: channels that are not numbered from 0, values that are no whole numbers, no background, or regions that `Task` refuses.
    """
    if sorted(channels, key=_number(path)) != [str(n) for n in range(len(channels))]:
        raise SuiteError(f"{path}: channels are numbered from 0, here {list(channels)}")
    names = [str(channels[str(n)]) for n in range(len(channels))]
    names = [f"{name}_{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    sets = {str(name): _values(path, name, value) for name, value in labels.items()}
    ignore = sets.pop("ignore", ())
    background = next((name for name, values in sets.items() if values == (0,)), None)
    if background is None:
        raise SuiteError(f"{path}: labels have no background of value 0: {dict(labels)}")
    del sets[background]
    alone = {values[0]: name for name, values in sets.items() if len(values) == 1}
    classes = {BACKGROUND: (0,)} | {alone.get(v, f"label_{v}"): (v,) for v in sorted({v for values in sets.values() for v in values})}
    named = {values[0]: name for name, values in classes.items()}
    regions = {name: tuple(named[v] for v in values) for name, values in sorted(sets.items(), key=lambda item: -len(item[1]))}
    try:
        return Task(tuple(names), classes, regions, slice_axis=slice_axis, ignore=ignore)
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None


def find_nnunet(root: Path, channels: Sequence[str], every: Sequence[str], allow_missing: bool = False) -> list[Case]:
    """The training cases of an nnU-Net raw data set, sorted by id; those of `imagesTs` are not read.

    `imagesTr/<case>_0000<ending>` ... with `labelsTr/<case><ending>`, or what `dataset` in the description lists. An `attributes.csv` as of
    `data=folder` may say patients and sites, which the format does not know.

    Args:
        channels: those that cases must have.
        every: all of the data set, in the order of their numbers.
        allow_missing: accept cases that lack channels, as long as one is there.

    Raises:
        SuiteError: an ending that is not read, no cases, missing channels (all listed at once), rows of attributes that belong to no case.
    """
    found = read_description(root, "nnU-Net", ("channel_names", "labels", "file_ending"))
    root, ending = Path(root), str(found["file_ending"])
    if ending not in ENDINGS:
        raise SuiteError(f"{root / 'dataset.json'}: file_ending {ending} is not read here; known: {', '.join(ENDINGS)}")
    if isinstance(found.get("dataset"), dict):
        cases = [_listed(root, name, entry, every) for name, entry in sorted(found["dataset"].items())]
    else:
        numbered = {f"_{number:04d}{ending}": channel for number, channel in enumerate(every)}
        images: dict[str, dict[str, Path]] = {}
        for path in sorted((root / "imagesTr").glob(f"*{ending}")):
            for suffix, channel in numbered.items():
                if path.name.endswith(suffix):
                    images.setdefault(path.name.removesuffix(suffix), {})[channel] = path
        labels = {name: root / "labelsTr" / f"{name}{ending}" for name in images}
        cases = [Case(name, files, labels[name] if labels[name].is_file() else None) for name, files in sorted(images.items())]
    if not cases:
        raise SuiteError(f"{root}: no case in imagesTr; expected imagesTr/<case>_0000{ending} and labelsTr/<case>{ending}")
    add_attributes(root / "attributes.csv", cases)
    kept = [Case(**{**vars(case), "images": {c: p for c, p in case.images.items() if c in channels}}) for case in cases]
    return require_channels(kept, channels, allow_missing)


def find_decathlon(root: Path, every: Sequence[str]) -> list[Case]:
    """The training cases of a Decathlon task, sorted by id; all channels of a case name the one file that holds them.

    Raises:
        SuiteError: no cases, or files that are not there (all listed at once).
    """
    path = Path(root) / "dataset.json"
    entries = read_description(root, "the Medical Segmentation Decathlon", ("modality", "labels", "training"))["training"]
    cases = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise SuiteError(f"{path}: training lists {entry!r}, expected an object with image and label")
        image = Path(root) / str(entry["image"])
        cases.append(Case(stem_of(image), dict.fromkeys(every, image), Path(root) / str(entry["label"])))
    lost = [file for case in cases for file in dict.fromkeys(case.files) if not file.is_file()]
    if lost or not cases:
        raise SuiteError(
            f"{path}: training names {len(lost)} file(s) that are not there: {', '.join(map(str, lost[:5]))}"
            if cases
            else f"{path}: training is empty"
        )
    return sorted(cases, key=lambda case: case.id)


def split_channels(case: Case, every: Sequence[str], folder: Path) -> Case:
    """The case with a file for each channel under `folder`, there or not."""
    return Case(**{**vars(case), "images": {channel: folder / f"{case.id}_{n:04d}.nii.gz" for n, channel in enumerate(every)}})


def write_channels(case: Case, every: Sequence[str], folder: Path) -> None:
    """Writes those files, unless made from this image before.

    Raises:
        SuiteError: an image that cannot be read, or with another number of channels than the description names.
    """
    source, targets = next(iter(case.images.values())), list(split_channels(case, every, folder).images.values())

    def make() -> None:
        array, affine, header = read_channels(source)
        if array.shape[3] != len(every):
            raise SuiteError(f"{source}: holds {array.shape[3]} channel(s), dataset.json names {len(every)}: {', '.join(every)}")
        for number, target in enumerate(targets):
            write_volume(target, np.ascontiguousarray(array[..., number]), affine, header)

    derive(targets, [source], make)


def nnunet_split(path: Path, fold: int) -> dict[str, list[str]]:
    """Case ids of one fold of a `splits_final.json`: its `train`, and under `test` what nnU-Net validates on.

    Raises:
        SuiteError: no list of objects with `train` and `val`, or no such fold.
    """
    folds = read_json(path)
    if not isinstance(folds, list) or not all(isinstance(f, dict) and {"train", "val"} <= set(f) for f in folds):
        raise SuiteError(f"{path}: expected a list of objects with train and val, one for each fold")
    if not 0 <= fold < len(folds):
        raise SuiteError(f"data.split.fold={fold}: {path} has {len(folds)} folds, from 0")
    return {"train": list(folds[fold]["train"]), "test": list(folds[fold]["val"])}


def _listed(root: Path, name: str, entry: Any, every: Sequence[str]) -> Case:
    files = entry.get("images") if isinstance(entry, dict) else None
    if not isinstance(files, list) or len(files) != len(every):
        raise SuiteError(f"{root / 'dataset.json'}: dataset.{name} needs images, a list of {len(every)} files, one for each channel")
    label = entry.get("label")
    return Case(name, {c: root / str(f) for c, f in zip(every, files, strict=True)}, root / str(label) if label else None)


def _number(path: Path) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not str(text).isdecimal():
            raise SuiteError(f"{path}: channel number {text!r} is no whole number")
        return int(text)

    return number


def _values(path: Path, name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise SuiteError(f"{path}: label {name} is {value!r}, expected a whole number from 0, or a list of them")
    return tuple(values)
