"""Rules on connected components of a mask."""

import numpy as np
from scipy import ndimage


def without_small_components(mask: np.ndarray, min_size: int, connectivity: int | None = None) -> np.ndarray:
    """The mask without the connected components that have fewer than `min_size` voxels.

    Args:
        mask: bool, any number of axes.
        min_size: smallest number of voxels that stays; up to 1 changes nothing.
        connectivity: 1 = voxels touch by faces, 2 = also by edges, 3 = also by corners (26 neighbors); None = all that the axes allow.
    """
    if min_size <= 1 or not mask.any():
        return mask
    labels, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim))
    kept = np.bincount(labels.ravel()) >= min_size
    kept[0] = False
    return kept[labels]


def largest_component(mask: np.ndarray, connectivity: int | None = None) -> np.ndarray:
    """The largest connected component of a mask (the first of equals); `connectivity` as above."""
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim))
    if count <= 1:
        return mask
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()
