"""Two-dimensional toy brains: slices of 32 x 32 with a lesion of nested regions, for experiments of seconds. A toy, never a benchmark."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from datamodules.base import CaseDataModule
from datamodules.readers.folder_files import find_folder
from datamodules.simulated.simulation import task_of
from lesionbench.case import Case
from lesionbench.geometry import write_volume
from lesionbench.keyed import numpy_generator
from lesionbench.ranges import Count, Whole
from lesionbench.task import Task
from lesionbench.written import clear, prefix

SIZE = 32
VERSION = 1  # raised whenever the same seed gives other cases
LIFT = {"t1": (0.0, -0.10, 0.0), "t1ce": (0.0, 0.0, 0.18), "t2": (0.12, 0.0, 0.0), "flair": (0.15, 0.0, 0.0)}  # of WT, TC, ET


class ToyBrains(CaseDataModule):
    """`count` toy cases, each a stack of unrelated slices with values in [0, 1], under `root`; the task is that of the BraTS challenge.

    Args:
        count: number of cases.
        slices: slices of a case.
        simulation_seed: of the generator; training seeds leave the cases as they are.
    """

    def __init__(self, root: str | Path, *, count: Count = 12, slices: Count = 4, simulation_seed: Whole = 0, **options: Any) -> None:
        limit = options.get("limit_cases")
        self.count = count if limit is None else min(count, limit)
        self.slices, self.simulation_seed = slices, simulation_seed
        super().__init__(Path(root) / f"v{VERSION}-seed{simulation_seed}-{self.count}x{slices}", **options)

    def default_task(self) -> Task:
        return task_of("tumor")

    def materialize(self) -> None:
        if self.root.exists():
            return
        self.root.parent.mkdir(parents=True, exist_ok=True)
        clear(self.root.parent)
        with TemporaryDirectory(dir=self.root.parent, prefix=prefix()) as folder:
            whole = Path(folder) / "whole"
            for index in range(self.count):
                slices = [toy_brain(self.simulation_seed, index * self.slices + n) for n in range(self.slices)]
                for channel in LIFT:
                    image = np.stack([images[channel] for images, _ in slices], axis=-1)
                    write_volume(whole / "images" / f"toy_{index:04d}_{channel}.nii.gz", image, np.eye(4))
                label = np.stack([label for _, label in slices], axis=-1)
                write_volume(whole / "labels" / f"toy_{index:04d}.nii.gz", label, np.eye(4))
            try:
                whole.rename(self.root)
            except OSError:
                if not self.root.exists():  # else another process was faster, with the same cases
                    raise

    def find_cases(self) -> list[Case]:
        return find_folder(self.root, list(self.default_task().channels))


def toy_brain(seed: int, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images {channel: float32 (32, 32) in [0, 1], 0 outside of the brain} and the label (1 necrosis, 2 edema, 4 enhancing), uint8.

    A disc with smooth texture and noise; the whole tumor is a wobbly ellipse of radius 6 to 12, the core 0.55 to 0.75 of it, necrosis 0.45
    to 0.7 of the core. T1 darkens the core, T1ce lifts the enhancing ring, T2 and FLAIR the whole tumor, each by its own random factor.
    """
    rng = numpy_generator("toy brain", VERSION, seed, index)
    x, y = np.meshgrid(*(np.arange(SIZE) - (SIZE - 1) / 2,) * 2, indexing="ij")
    brain = np.hypot(x, y) < SIZE / 2 - 1
    cx, cy = rng.uniform(-4, 4, 2)
    angle = np.arctan2(y - cy, x - cx)
    wobble = 1 + sum(rng.uniform(-0.12, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    stretch, turn = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
    u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    distance = np.hypot(u, v / stretch) / wobble
    whole = rng.uniform(6, 12)
    core = whole * rng.uniform(0.55, 0.75)
    necrosis = core * rng.uniform(0.45, 0.7)
    regions = [brain & (distance < whole), brain & (distance < core), brain & (distance < core) & (distance >= necrosis)]
    label = np.select([regions[2], regions[1], regions[0]], [4, 1, 2], 0).astype(np.uint8)
    texture = gaussian_filter(rng.standard_normal((SIZE, SIZE)), 3)
    texture *= 0.07 / texture.std()
    images = {}
    for channel, lifts in LIFT.items():
        lift = rng.uniform(0.8, 1.2) * sum(a * r for a, r in zip(lifts, regions, strict=True))
        image = 0.5 + texture + lift + 0.05 * rng.standard_normal((SIZE, SIZE))
        images[channel] = np.where(brain, image.clip(1e-3, 1), 0).astype(np.float32)
    return images, label
