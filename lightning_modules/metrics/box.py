"""Bounding boxes: most of a volume is background, and what is measured on a crop costs a fraction."""

import numpy as np


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds every True voxel of `mask` (any number of axes); empty slices where there is none."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not used.size:
            return (slice(0, 0),) * mask.ndim
        box.append(slice(int(used[0]), int(used[-1]) + 1))
        mask = mask[(slice(None),) * axis + (box[-1],)]  # the axes that follow need look only inside
    return tuple(box)
