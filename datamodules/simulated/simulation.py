"""Simulated cases: real anatomy (ICBM 152), synthesized contrasts, planted pathology. A stand-in, never a benchmark.

    case = simulate(Simulation(variant="tumor", seed=0), 7)   # arrays
    write_folder(Path("cases"), Simulation(), range(24))       # images/, labels/, attributes.csv
    write_brats(Path("brats"), Simulation(spacing=1), 10, layout="2020")

A case depends on (settings, index) and on nothing else, to the last bit.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from datamodules.simulated.difficulty import PRESETS, Difficulty
from datamodules.simulated.simulation_variants import (
    EDEMA,
    HABITATS,
    MIDDLE,
    ORIGIN,
    PLANTED,
    Draw,
    Lesion,
    Paint,
    Subject,
    blob_of,
    draw_for,
    grid,
    soft,
    spot_map,
)
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import write_volume
from lesionbench.keyed import numpy_generator
from lesionbench.task import Task
from lesionbench.written import clear, prefix

VARIANTS = ("tumor", "stroke", "spots", "tissue", "raters", "healthy", "habitats")
GENERATOR = 1  # raised whenever the same settings give other cases
SITES = ("A", "B", "C")
BRATS_CHANNELS = ("t1", "t1ce", "t2", "flair")
CHANNELS = {"stroke": ("t1",), "tissue": ("t1",), "spots": ("t1", "flair"), "raters": ("t1", "flair")}
CONTRAST = {  # gray matter, white matter, CSF; white matter = 1
    "t1": (0.76, 1.0, 0.34),
    "t1ce": (0.76, 1.0, 0.36),
    "t2": (1.25, 1.0, 2.1),
    "flair": (1.18, 1.0, 0.42),
}
TEXTURE = {"t1": 1.0, "t1ce": 1.0, "t2": -0.6, "flair": -0.3}  # how the template's fine structure shows


@dataclass(frozen=True)
class Simulation:
    """Settings of the generator.

    Attributes:
        variant: one of `VARIANTS`.
        seed: of the whole set of cases.
        spacing: voxel size in mm, 0.5 to 8; a case is the same subject at any spacing.
        difficulty: `easy`, `default`, `hard`, or a mapping that changes single values of `default`; held as a `Difficulty`.
        generator: version of the generator, so that files of an older one are not taken for these.

    Raises:
        SuiteError: unknown variant, preset or value name, or a value out of range.
    """

    variant: str = "tumor"
    seed: int = 0
    spacing: float = 2.0
    difficulty: "str | Mapping[str, Any] | Difficulty" = "default"
    generator: int = field(default=GENERATOR, init=False)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("variant (data.variant)", self.variant, VARIANTS)
        if not 0.5 <= self.spacing <= 8:
            raise SuiteError(f"data.spacing={self.spacing}: voxel size in mm, from 0.5 to 8")
        object.__setattr__(self, "spacing", float(self.spacing))
        object.__setattr__(self, "difficulty", _resolved(self.difficulty))


def _resolved(difficulty: "str | Mapping[str, Any] | Difficulty") -> Difficulty:
    if isinstance(difficulty, Difficulty):
        return difficulty
    if isinstance(difficulty, str):
        if difficulty not in PRESETS:
            raise unknown("difficulty (data.difficulty)", difficulty, PRESETS)
        return PRESETS[difficulty]
    names = [f.name for f in fields(Difficulty)]
    for name in difficulty:
        if name not in names:
            raise unknown("value of data.difficulty", name, names)
    return replace(PRESETS["default"], **difficulty)


def task_of(variant: str) -> Task:
    """The task of a variant: channels, classes with their values on disk, regions.

    Raises:
        SuiteError: unknown variant.
    """
    if variant not in VARIANTS:
        raise unknown("variant (data.variant)", variant, VARIANTS)
    channels = CHANNELS.get(variant, BRATS_CHANNELS)
    if variant == "tissue":
        return Task(channels, {"background": 0, "csf": 1, "gm": 2, "wm": 3}, {"CSF": ("csf",), "GM": ("gm",), "WM": ("wm",)})
    if variant in CHANNELS:
        return Task(channels, {"background": 0, "lesion": 1}, {"LESION": ("lesion",)}, raters=5 if variant == "raters" else 0)
    classes = {"background": 0, "ncr": 1, "ed": 2, "et": 4}
    return Task(channels, classes, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})


@dataclass
class SimulatedCase:
    """One case; arrays (X, Y, Z) with axes left, posterior, superior.

    Attributes:
        id: such as `sim_0007`.
        images: channel -> int16, 0 outside of the brain and above 0 inside.
        label: values on disk, uint8; None where raters draw.
        raters: label of rater 1, 2 ... (variant `raters`: 2 to 5).
        habitats: habitat numbers, uint8, 0 outside of the tumor (variant `habitats`).
        affine: voxel to world (MNI, mm), 4 x 4.
        site: scanner site; decides part of the contrast.
        attributes: `age` (years); for tumors also `grade`, `survival` (days) and `event` (1 died, 0 censored).
    """

    id: str
    images: dict[str, np.ndarray]
    label: np.ndarray | None
    raters: list[np.ndarray]
    habitats: np.ndarray | None
    affine: np.ndarray
    site: str
    attributes: dict[str, Any]


def simulate(settings: Simulation, index: int) -> SimulatedCase:
    """Case number `index`. Under a second at 2 mm; time grows with the number of voxels."""
    draw, difficulty = draw_for(settings.seed, index), settings.difficulty
    site = SITES[int(draw("site").integers(len(SITES)))]
    blob = blob_of(settings.variant, draw, difficulty, settings.spacing)
    subject = Subject.made(draw, difficulty, settings.spacing, blob)
    grade = "LGG" if draw("grade").random() < 0.25 else "HGG"
    lesion = PLANTED[settings.variant](subject, draw, difficulty, blob, grade)
    channels = task_of(settings.variant).channels
    strength = np.float32(draw("lesion contrast").uniform(*difficulty.lesion_contrast))
    paint = [] if channels == ("t1",) else _distractors(subject, draw, settings)
    paint += [(strength * weight, signature) for weight, signature in lesion.paint]
    images = {c: _image(c, subject, paint, lesion.habitats, draw, settings, site) for c in channels}

    def volume(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else _volume(values, subject.inside)

    return SimulatedCase(
        id=case_name(index),
        images={c: volume(v) for c, v in images.items()},
        label=volume(lesion.label),
        raters=[volume(r) for r in lesion.raters],
        habitats=volume(lesion.habitats),
        affine=_affine(settings.spacing),
        site=site,
        attributes=_attributes(settings.variant, draw, lesion, grade),
    )


def case_name(index: int) -> str:
    """The id of case number `index`."""
    return f"sim_{index:04d}"


def _volume(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Brain voxels (N,) -> volume (X, Y, Z) with axes left, posterior, superior, as BraTS files have them."""
    full = np.zeros(inside.shape, values.dtype)
    full[inside] = values
    return np.ascontiguousarray(full[::-1, ::-1])


def _affine(spacing: float) -> np.ndarray:
    last = [float(axis[-1]) for axis in grid(spacing)]
    first = float(grid(spacing)[2][0])
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = (ORIGIN[0] + last[0], ORIGIN[1] + last[1], ORIGIN[2] + first)
    return affine


# images


def _image(
    channel: str, subject: Subject, paint: Paint, habitats: np.ndarray | None, draw: Draw, settings: Simulation, site: str
) -> np.ndarray:
    """Brain voxels (N,) of one channel, int16."""
    difficulty = settings.difficulty
    image = _tissue(channel, subject, draw, settings, site)
    for weight, signature in paint:
        if channel in signature:
            image += weight * (np.float32(signature[channel]) - image)
    if habitats is not None:
        image *= np.array([1.0, *(h[channel] for h in HABITATS)], np.float32)[habitats]
    if difficulty.bias:
        image *= np.exp(np.float32(difficulty.bias) * subject.field(draw(f"bias {channel}"), 70.0))
    if difficulty.noise:
        rng, sd = draw(f"noise {channel}"), np.float32(difficulty.noise)
        real, imaginary = (sd * rng.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
        image = np.sqrt((image + real) ** 2 + imaginary**2)
    scanner = numpy_generator("simulation", settings.seed, "site gain", site, channel)
    gain = draw(f"gain {channel}").uniform(250, 600) * scanner.uniform(0.7, 1.4)
    return np.clip(np.rint(image * np.float32(gain)), 1, 32000).astype(np.int16)


def _tissue(channel: str, subject: Subject, draw: Draw, settings: Simulation, site: str) -> np.ndarray:
    """The healthy brain: tissue contrast of the channel, site and case, the template's fine structure, vessels with contrast agent."""
    difficulty = settings.difficulty
    own = draw(f"contrast {channel}").normal(0, 1, 3) * difficulty.contrast
    scanner = numpy_generator("simulation", settings.seed, "site", site, channel).normal(0, 1, 3) * difficulty.site
    gm, wm, csf = (np.float32(c) for c in np.array(CONTRAST[channel]) * np.exp(own + scanner))
    image = gm * subject.gm + wm * subject.wm + csf * subject.csf
    image += np.float32(TEXTURE[channel]) * subject.texture
    if channel == "t1ce":
        first, second = (subject.field(draw(f"vessels {k}"), 14.0) for k in range(2))  # two zero surfaces meet in curves
        image += np.float32(0.9) * np.exp(-(first**2 + second**2) / np.float32(0.012)) * (subject.depth < 22)
    return image


def _distractors(subject: Subject, draw: Draw, settings: Simulation) -> Paint:
    """What is bright on FLAIR and no lesion: diffuse patches (on FLAIR alone), ventricle caps and small spots (on T2 as well)."""
    difficulty, rng = settings.difficulty, draw("patches")
    patches = [_patch(subject, rng) * np.float32(difficulty.patch_contrast) for _ in range(int(rng.integers(difficulty.patches + 1)))]
    paint: Paint = [(patch, {"flair": 2.0}) for patch in patches]
    if difficulty.caps:
        strength = np.float32(draw("caps").uniform(0, difficulty.caps))
        width = 4 * np.exp(0.4 * subject.field(draw("cap width"), 30.0))  # mm
        paint.append((np.minimum(strength * np.exp(-((subject.ventricle / width) ** 2)), 1) * (1 - subject.csf), EDEMA))
    count = int(draw("distractor count").integers(difficulty.spots + 1))
    if count and settings.variant != "spots":
        paint.append((spot_map(subject, draw, "distractor", count, (1.5, 4.5), 0.3, near_ventricle=0.3) * (1 - subject.csf), EDEMA))
    return paint


def _patch(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """A diffuse patch (N,) in [0, 1] somewhere in the brain."""
    center = np.array(MIDDLE) + rng.uniform(-1, 1, 3) * (55, 70, 50)
    size = rng.uniform(10, 22)
    x, y, z = ((a - np.float32(c)) for a, c in zip(subject.axes, center, strict=True))
    distance = np.sqrt((x**2)[:, None, None] + (y**2)[:, None] + z**2)
    return soft(np.float32(size) - distance, 4.0)[subject.inside]


def _attributes(variant: str, draw: Draw, lesion: Lesion, grade: str) -> dict[str, Any]:
    """Age, and for tumors grade and survival: exponential with a hazard that grows with age and `Lesion.risk`, independently censored."""
    age = float(np.clip(draw("age").normal(58, 12), 18, 90).round(2))
    if variant not in ("tumor", "habitats"):
        return {"age": age}
    risk = lesion.risk * 0.8 + (age - 58) / 24 - (1.5 if grade == "LGG" else 0)
    rng = draw("survival")
    death, censored = rng.exponential(450 * np.exp(-risk)), rng.exponential(1500)
    return {"age": age, "grade": grade, "survival": max(int(min(death, censored)), 5), "event": int(death <= censored)}


# files


def write_folder(out: Path, settings: Simulation, indices: Iterable[int]) -> None:
    """Writes cases as `images/<case>_<channel>.nii.gz`, `labels/<case>.nii.gz` (raters: `labels/<case>_rater1.nii.gz` ...) and `attributes.csv`.

    Habitat maps go to `habitats/<case>.nii.gz`. A case that is there already is left as it is: its file in `attributes/` is written
    last. Every file appears whole or not at all, also with several processes at work and after a kill.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    wanted = [i for i in indices if not (out / "attributes" / f"{case_name(i)}.json").exists()]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda index: _write_case(out, simulate(settings, index)), wanted))
    if wanted or not (out / "attributes.csv").exists():
        rows = [json.loads(f.read_text()) for f in sorted((out / "attributes").glob("sim_*.json"))]
        _place(out, {"attributes.csv": lambda path: _write_table(path, list(rows[0]) if rows else ["case"], rows)})


def _write_case(out: Path, case: SimulatedCase) -> None:
    files = {f"images/{case.id}_{c}.nii.gz": image for c, image in case.images.items()}
    files |= {f"labels/{case.id}_rater{r}.nii.gz": label for r, label in enumerate(case.raters, start=1)}
    files |= {} if case.label is None else {f"labels/{case.id}.nii.gz": case.label}
    files |= {} if case.habitats is None else {f"habitats/{case.id}.nii.gz": case.habitats}
    row = {"case": case.id, "patient": case.id, "site": case.site, **case.attributes}
    writers = {name: partial(write_volume, array=array, affine=case.affine) for name, array in files.items()}
    _place(out, {**writers, f"attributes/{case.id}.json": lambda path: path.write_text(json.dumps(row))})


def _place(out: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Writes files into a folder of this process's own, then moves them to `out` in order; the same file of another process is replaced."""
    with TemporaryDirectory(dir=out, prefix=prefix()) as own:
        for name, write in writers.items():
            (Path(own) / name).parent.mkdir(parents=True, exist_ok=True)
            write(Path(own) / name)
        for name in writers:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(own) / name).replace(out / name)


def _write_table(path: Path, header: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, header, restval="NA")
        table.writeheader()
        table.writerows(rows)


def _resection(seed: int, index: int) -> str:
    return ("GTR", "STR", "NA")[int(draw_for(seed, index)("resection").integers(3))]
