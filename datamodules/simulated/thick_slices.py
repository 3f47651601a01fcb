"""Synthetic volumes of few, thick slices: a lesion goes on over several slices, its look-alikes are on one slice only.

In the plane the two look the same, so a network that sees one slice cannot tell them apart and one that sees the neighbors can. Small
enough to train on within a minute; made for experiments with networks of several dimensions. A stand-in, never a benchmark.
"""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.geometry import write_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.ranges import Count, NotNegative, Whole
from lesionbench.task import Task

SIZE, SLICES = 24, 10
AFFINE = np.diag([1.0, 1.0, 6.0, 1.0])
CHANNEL = "t1gd"


class ThickSlices(CaseDataModule):
    """`count` volumes of 24 x 24 x 10 voxels of 1 x 1 x 6 mm under `root/<key of the settings>`; one channel, one class, `lesion`.

    Args:
        count: number of cases.
        noise: standard deviation of the noise; the contrast of lesions and look-alikes is 1 to 1.6.
        simulation_seed: of the cases; training seeds leave them as they are.
    """

    def __init__(
        self, root: str | Path, *, count: Count = 50, noise: NotNegative = 0.25, simulation_seed: Whole = 0, **options: Any
    ) -> None:
        self.count, self.noise, self.simulation_seed = count, noise, simulation_seed
        super().__init__(Path(root) / f"{key(noise, simulation_seed) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return Task(channels=(CHANNEL,), classes={"background": 0, "lesion": 1})

    def materialize(self) -> None:
        for index in range(self.count):
            label_file = self.root / "labels" / f"thick_{index:03d}.nii.gz"
            if not label_file.exists():  # written last
                image, label = thick_slices(self.simulation_seed, index, self.noise)
                write_volume(self.root / "images" / f"thick_{index:03d}_{CHANNEL}.nii.gz", image, AFFINE)
                write_volume(label_file, label, AFFINE)

    def find_cases(self) -> list[Case]:
        return [c for c in find_folder(self.root, [CHANNEL]) if int(c.id.rsplit("_", 1)[1]) < self.count]


def thick_slices(seed: int, index: int, noise: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Case `index` of a seed: image (24, 24, 10), float32, and label of that shape, uint8; slices along the last axis.

    The lesion fills 4 or 5 neighboring slices, 3.5 to 5.5 voxels in radius at its widest and rounded in depth, its outline redrawn on
    every slice; 3 to 5 look-alikes, outside of the lesion's cylinder, have the outline and contrast of a lesion's slice.
    """
    from scipy.ndimage import gaussian_filter

    rng = numpy_generator("thick slices", seed, index)
    background = gaussian_filter(rng.normal(size=(SIZE, SIZE, SLICES)), (4, 4, 2))
    image, label = 0.3 * background / background.std(), np.zeros((SIZE, SIZE, SLICES), np.uint8)
    center, widest, depth = rng.uniform(6, SIZE - 6, 2), rng.uniform(3.5, 5.5), int(rng.integers(4, 6))
    first, contrast = int(rng.integers(0, SLICES - depth + 1)), rng.uniform(1, 1.6)
    for n in range(depth):
        off = (n - (depth - 1) / 2) / (depth / 2)  # in (-1, 1)
        outline = _outline(rng, center, widest * np.sqrt(1 - off**2))
        label[..., first + n] = outline
        image[..., first + n] += contrast * outline
    for _ in range(int(rng.integers(3, 6))):
        radius = rng.uniform(3.5, 5.5) * np.sqrt(1 - rng.uniform(0, 0.8) ** 2)
        place = center
        while np.linalg.norm(place - center) < widest + radius:
            place = rng.uniform(3, SIZE - 3, 2)
        image[..., int(rng.integers(SLICES))] += rng.uniform(1, 1.6) * _outline(rng, place, radius)
    image = gaussian_filter(image, (0.6, 0.6, 0)) + rng.normal(0, noise, image.shape)
    return image.astype(np.float32), label


def _outline(rng: np.random.Generator, center: np.ndarray, radius: float) -> np.ndarray:
    """An irregular disc on a slice, bool (24, 24): its radius changes by some ten percent around it."""
    x, y = np.meshgrid(*(np.arange(SIZE) - c for c in center), indexing="ij")
    angle, waves = np.arctan2(y, x), np.arange(2, 5)[:, None, None]
    change = (rng.normal(0, 0.1, (3, 1, 1)) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi, (3, 1, 1)))).sum(axis=0)
    return np.hypot(x, y) < radius * (1 + change)
