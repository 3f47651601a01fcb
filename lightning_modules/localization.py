"""Where a lesion is, and how a box around it is cut out and pasted back."""

from collections.abc import Sequence

import numpy as np
import torch

from lightning_modules.components import largest_component

CENTERS = ("box", "centroid")
Slices = tuple[slice, ...]


def center_of(mask: torch.Tensor, kind: str = "box") -> tuple[int, ...] | None:
    """Middle voxel of the largest component (26 neighbors) of a mask (X, Y, Z); None where the mask is empty.

    Args:
        kind: `box` = the middle of the box around it, `centroid` = the mean of its voxels.
    """
    inside = mask.cpu().numpy().astype(bool)
    if not inside.any():
        return None
    voxels = np.argwhere(largest_component(inside, 3))
    if kind == "centroid":
        return tuple(int(v) for v in np.floor(voxels.mean(axis=0) + 0.5))
    return tuple(int(v) for v in (voxels.min(axis=0) + voxels.max(axis=0) + 1) // 2)


def box_around(center: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Slices:
    """The box of `size` voxels around a voxel, moved so that it lies inside of `shape`; along an axis shorter than it, the whole axis."""
    starts = [min(max(c - want // 2, 0), max(side - want, 0)) for c, want, side in zip(center, size, shape, strict=True)]
    return tuple(slice(start, start + min(want, side)) for start, want, side in zip(starts, size, shape, strict=True))


def pasted(part: torch.Tensor, box: Slices, shape: Sequence[int]) -> torch.Tensor:
    """Maps (B, K, *box) at their place in a volume (B, K, X, Y, Z) that is 0 elsewhere."""
    whole = part.new_zeros(*part.shape[:2], *shape)
    whole[(..., *box)] = part
    return whole
