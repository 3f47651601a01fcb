"""A toy of context: images of 64 x 64 with one lesion, whose class shows somewhere else in the image alone. No anatomy in it."""

from collections.abc import Callable
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
GENERATOR = 1  # raised whenever the same seed gives other cases


class ContextToy(CaseDataModule):
    """`count` images under `root/<key of the settings>`, each with a lesion of class `a` or `b`, as likely, which look alike: see `CUES`.

    Args:
        cue: what tells the class. `background`: the far side of the image is darker (a) or brighter (b), see `background`.
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


def background(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (64, 64), float32, and label, uint8: the class is the sign of the brightness 28 to 36 pixels away.

    Noise of deviation 0.5; a disc of radius 4 to 6, brighter by 1, whose center lies in the rows 8 to 16; all rows above 44 are darker by 0.6
    (class 1) or brighter by 0.6 (class 2).
    """
    x, y = np.mgrid[:SIZE, :SIZE]
    center, radius, bright = (rng.uniform(8, 16), rng.uniform(8, SIZE - 9)), rng.uniform(4, 6), rng.random() < 0.5
    lesion = np.hypot(x - center[0], y - center[1]) < radius
    image = NOISE * rng.standard_normal((SIZE, SIZE)) + lesion + (0.6 if bright else -0.6) * (x > 44)
    return image.astype(np.float32), ((1 + bright) * lesion).astype(np.uint8)


CUES: dict[str, Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {"background": background}
