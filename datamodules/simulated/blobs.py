"""A toy for semi-supervised learning: irregular blobs with a dark core, small look-alikes beside them. No anatomy in it."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.geometry import write_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.ranges import Count, Whole
from lesionbench.task import Task

SIZE = 48
VERSION = 1  # raised whenever the same settings give other cases
CONTRAST = (0.8, 1.6)
LABELED_CONTRAST = (1.25, 1.6)  # with a gap


class Blobs(CaseDataModule):
    """`count` images of 48 x 48 pixels with one object each, under `root/<key of the settings>`; labeled and unlabeled by `split.labeled`.

    Args:
        count: number of cases: labeled, unlabeled, validation and test together.
        gap: the labeled images show only bright objects (contrast 1.25 to 1.6), all others 0.8 to 1.6.
        draw: which training images are drawn; validation and test images are the same for every draw.
        simulation_seed: of everything.
    """

    def __init__(
        self, root: str | Path, *, count: Count = 134, gap: bool = False, draw: Whole = 0, simulation_seed: Whole = 0, **options: Any
    ) -> None:
        limit = options.get("limit_cases")
        self.count = count if limit is None else min(count, limit)
        self.gap, self.draw, self.simulation_seed = gap, draw, simulation_seed
        super().__init__(root, **options)
        settings = (VERSION, self.count, gap, draw, simulation_seed, *(f"{k}={v}" for k, v in sorted(vars(self.split).items())))
        self.root = self.root / f"{key('blobs', *settings) % 16**8:08x}"
        self.cache_root = Path(options["cache"]).expanduser() if options.get("cache") else self.root / ".cache"

    def default_task(self) -> Task:
        return Task(("image",), {"background": 0, "blob": 1}, {"BLOB": ("blob",)}, unit="vox")

    def materialize(self) -> None:
        cases = [Case(f"blob_{number:04d}", {}, label=Path()) for number in range(self.count)]
        part_of = {case.id: name for name, part in self.split.divide(cases).items() for case in part if name != "train"}
        for number, case in enumerate(cases):
            image_path = self.root / "images" / f"{case.id}_image.nii.gz"
            if image_path.exists():  # written last
                continue
            part = part_of.get(case.id, "unlabeled")
            drawn = self.draw if part in ("labeled", "unlabeled") else "held out"
            contrast = LABELED_CONTRAST if self.gap and part == "labeled" else CONTRAST
            image, mask = blob(numpy_generator("blob", VERSION, self.simulation_seed, drawn, number), contrast)
            write_volume(self.root / "labels" / f"{case.id}.nii.gz", mask.astype(np.uint8)[..., None], np.eye(4))
            write_volume(image_path, image[..., None], np.eye(4))

    def find_cases(self) -> list[Case]:
        return find_folder(self.root, ["image"])


def blob(rng: np.random.Generator, contrast: tuple[float, float] = CONTRAST) -> tuple[np.ndarray, np.ndarray]:
    """One image (48, 48), float32, mean 0 and variance 1, and the mask of its object, bool.

    Background: 0.35 x a Gaussian field of width 12 and 0.15 x one of width 2, each of unit deviation. Object: radius 6 to 11 with a
    wavy border, of a contrast drawn from `contrast`, and in its middle (0.4 of the radius) a core darker by up to 0.9 of it. Beside it
    one or two discs of radius 2.5 to 4.5 with 0.7 to 1.1 of its contrast, which do not belong to it. Blur 0.8, noise 0.3.
    """
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    radius, height = rng.uniform(6, 11), rng.uniform(*contrast)
    cx, cy = rng.uniform(15, SIZE - 16, 2)
    angle = np.arctan2(y - cy, x - cx)
    wave = 1 + sum(rng.uniform(-0.3, 0.3) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    distance = np.hypot(x - cx, y - cy) / wave
    mask = distance < radius
    signal = height * mask
    signal = np.where(distance < 0.4 * radius, height * (1 - rng.uniform(0, 0.9)), signal)
    for _ in range(rng.integers(1, 3)):
        small, share = rng.uniform(2.5, 4.5), rng.uniform(0.7, 1.1)
        for _ in range(100):
            px, py = rng.uniform(4, SIZE - 5, 2)
            disc = np.hypot(x - px, y - py) < small
            if not (mask & (np.hypot(x - px, y - py) < small + 3)).any():
                signal = np.maximum(signal, height * share * disc)
                break
    image = gaussian_filter(signal, 0.8) + 0.35 * _field(rng, 12) + 0.15 * _field(rng, 2) + 0.3 * rng.normal(size=(SIZE, SIZE))
    return ((image - image.mean()) / image.std()).astype(np.float32), mask


def _field(rng: np.random.Generator, width: float) -> np.ndarray:
    field = gaussian_filter(rng.normal(size=(SIZE + 8 * 12, SIZE + 8 * 12)), width)  # large enough that its deviation is steady
    return (field / field.std())[48 : 48 + SIZE, 48 : 48 + SIZE]
