"""A toy of context: images of 64 x 64 with lesions whose class shows somewhere else in the image alone, or by their size. No anatomy in it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.errors import unknown
from lesionbench.geometry import write_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.ranges import Count, Whole
from lesionbench.task import Task

SIZE = 64
NOISE = 0.5
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE]
GENERATOR = 1  # raised whenever the same seed gives other cases

Sample = tuple[np.ndarray, np.ndarray]  # image (64, 64), float32, and label, uint8: 0, 1 = a, 2 = b

# Cues: every lesion is brighter by 1 than noise of deviation 0.5, and a disc of radius 4 to 6 where nothing else is said. `other` gives the
# other class with the same draws.


class ContextToy(CaseDataModule):
    """`count` images under `root/<key of the settings>`, each with one lesion of class `a` or `b`, as likely, or with one of both.

    Args:
        cue: what tells the class, a function of this module. `background`: the far side of the image is darker (a) or brighter (b).
            `corner`: so is a patch in the corner. `mirror`: so is a marker across. `order`: of a dark and a bright
            marker, the left one is dark (a) or bright (b). `sizes`: of two lesions, a is the small one.
        count: number of cases.
        simulation_seed: of the images.

    Raises:
        SuiteError: an unknown cue.
    """

    def __init__(
        self, root: str | Path, *, cue: str = "background", count: Count = 360, simulation_seed: Whole = 0, **options: Any
    ) -> None:
        if cue not in CUES:
            raise unknown("data.cue", cue, CUES)
        limit = options.get("limit_cases")
        self.cue, self.count, self.simulation_seed = cue, count if limit is None else min(count, limit), simulation_seed
        super().__init__(Path(root) / f"{key('context toy', GENERATOR, cue, simulation_seed) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return Task(("image",), {"background": 0, "a": 1, "b": 2}, {"LESION": ("a", "b"), "A": ("a",), "B": ("b",)}, unit="vox")

    def materialize(self) -> None:
        for number in range(self.count):
            name = f"{self.cue}_{number:04d}"
            label_path = self.root / "labels" / f"{name}.nii.gz"
            if label_path.exists():  # written last
                continue
            image, label = CUES[self.cue](numpy_generator("context", GENERATOR, self.cue, self.simulation_seed, number))
            write_volume(self.root / "images" / f"{name}_image.nii.gz", image[..., None], np.eye(4))
            write_volume(label_path, label[..., None], np.eye(4))

    def find_cases(self) -> list[Case]:
        return [c for c in find_folder(self.root, ["image"]) if int(c.id.rpartition("_")[2]) < self.count]


def background(rng: np.random.Generator, other: bool = False) -> Sample:
    """The class is the sign of the brightness 28 to 36 pixels away, and at least 24 rows away from the lesion's pixels.

    A disc whose center lies in the rows 8 to 16; all rows above 44 are darker by 0.6 (a) or brighter by 0.6 (b).
    """
    center, radius, bright = (rng.uniform(8, 16), rng.uniform(8, SIZE - 9)), rng.uniform(4, 6), (rng.random() < 0.5) != other
    lesion = disc(center, radius)
    image = noise(rng) + lesion + (0.6 if bright else -0.6) * (ROWS > 44)
    return image.astype(np.float32), ((1 + bright) * lesion).astype(np.uint8)


def corner(rng: np.random.Generator, other: bool = False) -> Sample:
    """The class is the sign of a patch in the corner, whose pixels are at least 28 rows and columns away from those of the lesion.

    A disc whose center lies in the rows and columns 40 to 54; the first 8 rows and columns are darker by 1 (a) or brighter by 1 (b).
    """
    center, radius, bright = rng.uniform(40, 54, size=2), rng.uniform(4, 6), (rng.random() < 0.5) != other
    lesion = disc(center, radius)
    image = noise(rng) + lesion + (1 if bright else -1) * ((ROWS < 8) & (COLUMNS < 8))
    return image.astype(np.float32), ((1 + bright) * lesion).astype(np.uint8)


def mirror(rng: np.random.Generator, other: bool = False) -> Sample:
    """The class is the sign of a marker across, at the mirrored place, whose pixels are at least 29 columns away from those of the lesion.

    A disc whose center lies in the rows 8 to 55 and 8 to 13 columns from the left or from the right; around the same place on the other
    side a marker darker by 1.5 (a) or brighter by 1.5 (b).
    """
    row, column, radius, bright = rng.uniform(8, 55), rng.uniform(8, 13), rng.uniform(4, 6), (rng.random() < 0.5) != other
    columns = (column, SIZE - 1 - column) if rng.random() < 0.5 else (SIZE - 1 - column, column)
    lesion = disc((row, columns[0]), radius)
    image = noise(rng) + lesion + (1.5 if bright else -1.5) * square((row, columns[1]))
    return image.astype(np.float32), ((1 + bright) * lesion).astype(np.uint8)


def order(rng: np.random.Generator, other: bool = False) -> Sample:
    """The class is the order of two markers along a line, whose pixels are at least 27 rows away from those of the lesion.

    A disc whose center lies in the rows 8 to 16; in one of the rows 51 to 58 a marker darker by 1.5 and one brighter by 1.5, 16 to 30
    columns apart: dark and bright (a), or bright and dark (b), from left to right. The brightness of the image tells nothing, nor does
    what is there without where it is.
    """
    center, radius, bright_first = (rng.uniform(8, 16), rng.uniform(8, SIZE - 9)), rng.uniform(4, 6), (rng.random() < 0.5) != other
    row, first, gap = rng.uniform(51, 58), rng.uniform(4, 28), rng.uniform(16, 30)
    lesion, step = disc(center, radius), 1.5 if bright_first else -1.5
    image = noise(rng) + lesion + step * square((row, first)) - step * square((row, first + gap))
    return image.astype(np.float32), ((1 + bright_first) * lesion).astype(np.uint8)


def sizes(rng: np.random.Generator, other: bool = False) -> Sample:
    """Two lesions that differ in size alone: a radius of 4 to 5 (a) and of 8 to 10 (b).

    One on each side, whose centers lie in the rows 12 to 51 and 12 to 19 columns from the left and from the right. A reader that sees two
    pixels to each side finds the same around the centers of both.
    """
    left, right = ((rng.uniform(12, 51), rng.uniform(12, 19)) for _ in range(2))
    small, large, large_is_left = rng.uniform(4, 5), rng.uniform(8, 10), (rng.random() < 0.5) != other
    lesions = disc(left, large if large_is_left else small), disc((right[0], SIZE - 1 - right[1]), small if large_is_left else large)
    image = noise(rng) + lesions[0] + lesions[1]
    return image.astype(np.float32), (lesions[0] * (1 + large_is_left) + lesions[1] * (2 - large_is_left)).astype(np.uint8)


def disc(center: Sequence[float], radius: float) -> np.ndarray:
    """Pixels closer to the center than the radius, bool."""
    return np.hypot(ROWS - center[0], COLUMNS - center[1]) < radius


def square(center: Sequence[float]) -> np.ndarray:
    """A marker: 7 x 7 pixels, bool."""
    return np.maximum(abs(ROWS - round(center[0])), abs(COLUMNS - round(center[1]))) <= 3


def noise(rng: np.random.Generator) -> np.ndarray:
    """White, of deviation 0.5."""
    return NOISE * rng.standard_normal((SIZE, SIZE))


CUES: dict[str, Callable[..., Sample]] = {"background": background, "corner": corner, "mirror": mirror, "order": order, "sizes": sizes}
