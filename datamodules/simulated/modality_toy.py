"""A toy of conflicting modalities: two-dimensional images of 48 x 48 in which every contrast alone is misleading. No anatomy in it."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from lesionbench.case import Case
from lesionbench.geometry import write_volume
from lesionbench.keyed import key, numpy_generator
from lesionbench.ranges import Count, Whole
from lesionbench.task import Task

CHANNELS = ("flair", "t2", "t1", "t1ce")
SIZE = 48
WITHOUT_RIM = 0.25  # share of the images without enhancing tumor
GENERATOR = 1  # raised whenever the same seed gives other cases


class ModalityToy(CaseDataModule):
    """`count` images under `root/<key of the settings>`: a whole tumor (WT) that is bright in FLAIR and T2, in it an enhancing part (ET)
    that is bright in T1ce alone, and decoys that show the same brightness in other sets of contrasts: see `conflict`.

    Args:
        count: number of cases.
        simulation_seed: of the images.
    """

    def __init__(self, root: str | Path, *, count: Count = 84, simulation_seed: Whole = 0, **options: Any) -> None:
        self.count, self.simulation_seed = count, simulation_seed
        super().__init__(Path(root) / f"{key('modality toy', GENERATOR, simulation_seed) % 16**8:08x}", **options)

    def default_task(self) -> Task:
        return Task(CHANNELS, {"background": 0, "ed": 2, "et": 4}, {"WT": ("ed", "et"), "ET": ("et",)}, unit="vox")

    def materialize(self) -> None:
        for number in range(self.count):
            name = f"conflict_{number:03d}"
            label_path = self.root / "labels" / f"{name}.nii.gz"
            if label_path.exists():  # written last
                continue
            images, label = conflict(self.simulation_seed, number)
            for channel, image in images.items():
                write_volume(self.root / "images" / f"{name}_{channel}.nii.gz", image[..., None], np.eye(4))
            write_volume(label_path, label[..., None], np.eye(4))

    def find_cases(self) -> list[Case]:
        return [c for c in find_folder(self.root, list(CHANNELS)) if int(c.id.rpartition("_")[2]) < self.count]


def conflict(seed: int, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images {channel: float32 (48, 48)} and the label (2 edema, 4 enhancing), uint8.

    Every channel is its own multiple of a smooth background, with texture and noise (standard deviation 0.3). What is bright is brighter
    by U(0.9, 1.4), drawn for each channel and object:

        whole tumor, radius 8 to 12                       FLAIR, T2
        enhancing part in it, radius 3 to 5 (75 %)        T1ce
        two blobs elsewhere, two more elsewhere           FLAIR alone; T2 alone
        three vessels outside of the tumor                T1ce
        two hemorrhages in the tumor                      T1, T1ce

    So the whole tumor needs both of FLAIR and T2, and the enhancing part needs T1ce, T1 (no hemorrhage) and the whole tumor (no vessel).
    """
    rng = numpy_generator("conflict", GENERATOR, seed, number)
    background = _smooth(rng, 6)
    images = {c: rng.uniform(0.15, 0.35) * background + 0.1 * _smooth(rng, 1.5) + 0.3 * rng.standard_normal((SIZE, SIZE)) for c in CHANNELS}
    whole = _blob(rng, rng.uniform(16, 31, 2), rng.uniform(8, 12))
    everywhere, outside = np.ones((SIZE, SIZE), bool), ~whole
    rim = _placed(rng, (3, 5), binary_erosion(whole, iterations=4), whole) if rng.random() >= WITHOUT_RIM else ~everywhere
    objects = [
        (whole, ("flair", "t2")),
        (rim, ("t1ce",)),
        *((_placed(rng, (4, 7), outside, everywhere), (channel,)) for channel in ("flair", "flair", "t2", "t2")),
        *((_placed(rng, (2, 4), outside, outside), ("t1ce",)) for _ in range(3)),
        *((_placed(rng, (2, 4), whole & ~rim, whole & ~rim), ("t1", "t1ce")) for _ in range(2)),
    ]
    for mask, bright in objects:
        for channel in bright:
            images[channel] += rng.uniform(0.9, 1.4) * mask
    label = np.select([rim, whole], [4, 2], 0).astype(np.uint8)
    return {c: image.astype(np.float32) for c, image in images.items()}, label


def _smooth(rng: np.random.Generator, sigma: float) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma)
    return noise / noise.std()


def _blob(rng: np.random.Generator, center: np.ndarray, radius: float) -> np.ndarray:
    """A disc with a wobbly border."""
    x, y = np.mgrid[:SIZE, :SIZE] - center[:, None, None]
    angle = np.arctan2(y, x)
    wobble = 1 + sum(rng.uniform(-0.12, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    return np.hypot(x, y) < radius * wobble


def _placed(rng: np.random.Generator, radii: tuple[float, float], centers: np.ndarray, within: np.ndarray) -> np.ndarray:
    """A blob with its center on one of the voxels `centers`, cut to `within`."""
    places = np.argwhere(centers)
    return _blob(rng, places[rng.integers(len(places))].astype(float), rng.uniform(*radii)) & within
