"""Exact Euclidean distance maps of label maps: how far each voxel is from a structure, for losses that need to know."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Positive
from lesionbench.task import Task
from lightning_modules.metrics.box import bounding_box
from lightning_modules.metrics.surface import grid_diagonal


def distance_outside(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every voxel to the nearest voxel of a mask, center to center: 0 inside, float32, in the unit of `spacing`.

    Args:
        mask: bool, two or three axes, not empty.
        spacing: voxel size along each axis.

    Returns:
        an array of the shape of `mask`; within 1e-3 mm of SciPy's `distance_transform_edt` on heads.
    """
    from edt import edt

    outside = ~np.ascontiguousarray(mask)
    result = np.zeros(mask.shape, np.float32)
    box = tuple(
        slice(max(s.start - 1, 0), s.stop + 1) for s in bounding_box(outside)
    )  # around a mask that has little outside, like background
    if outside.any():
        result[box] = edt(np.ascontiguousarray(outside[box]).view(np.uint8), anisotropy=spacing)  # bytes: half the time of bool
    return result


def signed_distance(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Signed distance to the border of a mask: `distance_outside` outside, inside minus the distance to what is outside less one voxel.

    The voxels at the border are 0 (as in MONAI's BoundaryLoss), one voxel is the smallest side. A mask that is empty, or has no outside, has
    no border: 0 everywhere.

    Args:
        mask: bool, two or three axes.
        spacing: voxel size along each axis.

    Returns:
        float32, the shape of `mask`, in the unit of `spacing`.
    """
    if not mask.any() or mask.all():
        return np.zeros(mask.shape, np.float32)
    inside = distance_outside(~mask, spacing)
    return distance_outside(mask, spacing) - np.where(mask, inside - np.float32(min(spacing)), np.float32(0))


@dataclass(frozen=True)
class DistanceMaps:
    """What the distance maps of a case are: one channel for each class or region.

    Args:
        name: of the map in the store.
        of: `regions` of the task, or its `classes`.
        background: with `classes`, the background has a channel too, the first.
        signed: see `signed_distance`; else `distance_outside`.
        in_plane: distances within each slice along the task's slice axis, instead of in the volume.
        unit: `mm`, or `vox` for voxels of the network grid.
        absent: distance to what the volume (the slice) does not hold: `zero`, or the `diagonal` of its grid. Signed maps are always 0 there.
        limit: larger distances (of either sign) are this; None = none.

    Raises:
        SuiteError: `background` without `classes`, `diagonal` for signed maps.
    """

    name: str = "distance"
    of: Literal["classes", "regions"] = "regions"
    background: bool = False
    signed: bool = False
    in_plane: bool = False
    unit: Literal["mm", "vox"] = "mm"
    absent: Literal["zero", "diagonal"] = "zero"
    limit: Positive | None = None

    def __post_init__(self) -> None:
        for option, known in [("of", ("classes", "regions")), ("unit", ("mm", "vox")), ("absent", ("zero", "diagonal"))]:
            if getattr(self, option) not in known:
                raise unknown(f"distance.{option}", getattr(self, option), known)
        if self.background and self.of != "classes":
            raise SuiteError("distance.background=true: the background is a class, not a region; use distance.of=classes")
        if self.signed and self.absent == "diagonal":
            raise SuiteError("distance.absent=diagonal: the signed distance to what is not there is 0; use distance.absent=zero")

    def channels(self, task: Task) -> list[str]:
        """Name of every channel."""
        return list(task.region_names) if self.of == "regions" else list(task.class_names[0 if self.background else 1 :])

    def __call__(self, label: np.ndarray, task: Task, spacing: tuple[float, ...]) -> np.ndarray:
        """Class indices (x, y, z), -1 = ignore (which belongs to nothing) -> distances (C, x, y, z), float16.

        Args:
            spacing: voxel size in mm, for `unit=mm`.

        Float16 holds whole numbers up to 2048 and rounds by 0.05 % at most: by 0.06 below 128, by 0.125 below 256.
        """
        if self.of == "regions":
            masks = task.region_masks(torch.from_numpy(np.asarray(label))).numpy()
        else:
            masks = np.stack([label == index for index in range(0 if self.background else 1, len(task.classes))])
        sides = spacing if self.unit == "mm" else (1.0,) * len(spacing)
        maps = np.stack([self._of_mask(mask, sides, task.slice_axis) for mask in masks])
        return (maps if self.limit is None else maps.clip(-self.limit, self.limit)).astype(np.float16)

    def _of_mask(self, mask: np.ndarray, spacing: tuple[float, ...], axis: int) -> np.ndarray:
        if not self.in_plane:
            return self._of_grid(mask, spacing)
        plane = tuple(s for a, s in enumerate(spacing) if a != axis)
        return np.stack([self._of_grid(part, plane) for part in np.moveaxis(mask, axis, 0)], axis=axis)

    def _of_grid(self, mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
        if self.signed:
            return signed_distance(mask, spacing)
        if not mask.any():
            return np.full(mask.shape, grid_diagonal(mask.shape, spacing) if self.absent == "diagonal" else 0, np.float32)
        return distance_outside(mask, spacing)
