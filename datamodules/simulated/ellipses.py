"""A toy with many raters: blurred ellipses whose border each rater draws at a brightness of their own. No anatomy in it."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from scipy.ndimage import gaussian_filter

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.geometry import write_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.ranges import ASCENDING, Count, NotNegative, Whole
from lesionbench.task import Task

RATERS = 5
BIASES = np.linspace(0.2, 0.8, RATERS)  # brightness at which each rater draws the border
GENERATOR = 1  # raised whenever the same settings give other cases


class Ellipses(CaseDataModule):
    """`count` images of `size` x `size` pixels under `root/<key of the settings>`: the noisy image of an ellipse, drawn by five raters.

    Args:
        count: number of cases.
        size: side of an image in pixels.
        blur: (low, high) pixels, width of the border, uniform and different for every image; where it is narrow raters agree.
        simulation_seed: of the images.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        count: Count = 60,
        size: Count = 64,
        blur: Annotated[tuple[NotNegative, NotNegative], ASCENDING] = (1.5, 5.0),
        simulation_seed: Whole = 0,
        **options: Any,
    ) -> None:
        self.count, self.size, self.blur, self.simulation_seed = count, size, tuple(blur), simulation_seed
        settings = (GENERATOR, size, *self.blur, simulation_seed)
        super().__init__(Path(root) / f"{key('ellipses', *settings) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return Task(("image",), {"background": 0, "ellipse": 1}, {"ELLIPSE": ("ellipse",)}, raters=RATERS, unit="vox")

    def materialize(self) -> None:
        for number in range(self.count):
            name = f"ellipse_{number:03d}"
            image_path = self.root / "images" / f"{name}_image.nii.gz"
            if image_path.exists():  # written last
                continue
            image, raters = ellipse(numpy_generator("ellipse", self.simulation_seed, number), self.size, self.blur)
            for rater, mask in enumerate(raters, start=1):
                write_volume(self.root / "labels" / f"{name}_rater{rater}.nii.gz", mask.astype(np.uint8)[..., None], np.eye(4))
            write_volume(image_path, image[..., None], np.eye(4))

    def find_cases(self) -> list[Case]:
        return [c for c in find_folder(self.root, ["image"]) if int(c.id.rpartition("_")[2]) < self.count]


def ellipse(rng: np.random.Generator, size: int, blur: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """One image (size, size), float32, and its raters (RATERS, size, size), bool.

    The profile is s = sigmoid((r - d) / w) with a mean radius r of 9 to 15 pixels (at a size of 64); rater k marks s > b_k + N(0, 0.04).
    Onto the image come white noise of 0.1 and smooth noise of 0.1.
    """
    scale = size / 64
    center = size / 2 + rng.uniform(-8, 8, 2) * scale
    angle, squeeze, radius = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.25, 0.25)), rng.uniform(9, 15) * scale
    y, x = np.mgrid[:size, :size] - center[:, None, None]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    distance = np.hypot(u * squeeze, v / squeeze)
    profile = 1 / (1 + np.exp(np.clip((distance - radius) / (rng.uniform(*blur) * scale), -50, 50)))
    smooth = gaussian_filter(rng.normal(size=(size, size)), 4 * scale)
    image = profile + 0.1 * rng.normal(size=(size, size)) + 0.1 * smooth / smooth.std()
    return image.astype(np.float32), profile > (BIASES + rng.normal(0, 0.04, RATERS))[:, None, None]
