"""Distances between the surfaces of two masks: Hausdorff distances, average surface distance, surface Dice.

A surface voxel is a mask voxel with a face neighbor outside the mask; what lies beyond the grid is outside. Distances go from voxel
center to voxel center. All measures come from one computation on the box that holds both masks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.spatial import KDTree

from lightning_modules.metrics.box import bounding_box

SURFACE_METRICS = ("hd95", "hd95_pooled", "hd", "asd", "asd_directed", "surface_dice")
TREE_LIMIT = 40_000
SPARSE = 25
"""Trees grow with the surface, distance transforms with the box. Transforms are cheaper above `TREE_LIMIT` surface voxels (of both masks,
those not shared) where the box holds less than `SPARSE` times as many voxels."""


def grid_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the diagonal of a grid with `shape` voxels of size `spacing`: 373.13 mm for 240 x 240 x 155 at 1 mm (BraTS)."""
    return float(np.sqrt(sum((n * s) ** 2 for n, s in zip(shape, spacing, strict=True))))


def surface_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    names: Iterable[str] = SURFACE_METRICS,
    tolerance: float = 1.0,
    empty: float | None = None,
) -> dict[str, float]:
    """Surface measures of two boolean masks of one shape, in the unit of `spacing`, >= 0.

    - `hd95`: the larger of the two directed 95th percentiles (linear interpolation); `hd`: of the maxima.
    - `hd95_pooled`: the 95th percentile of both directions pooled, as in medpy's `hd95`.
    - `asd`: mean of both directions pooled (average symmetric surface distance).
    - `asd_directed`: mean from the surface of `prediction` to that of `truth` alone, medpy's `asd(result, reference)`.
    - `surface_dice`: share of surface voxels, of both surfaces, within `tolerance` of the other one, in [0, 1] (Nikolov et al. 2018,
      arXiv:1809.04430, with surface voxels counted instead of surface area).

    Args:
        prediction, truth: masks; in a mask one voxel thick every voxel is surface, so drop such an axis for in-plane surfaces.
        spacing: voxel size along each axis.
        names: which to return.
        tolerance: distance for `surface_dice`.
        empty: the distance when one mask is empty; default: the diagonal of the masks' grid. Both empty gives 0. `surface_dice` is then
            0 and 1.
    """
    full = [bool(prediction.any()), bool(truth.any())]
    if not all(full):
        if empty is None:
            empty = grid_diagonal(truth.shape, spacing)
        distance, agreement = (empty, 0.0) if any(full) else (0.0, 1.0)
        return {name: agreement if name == "surface_dice" else distance for name in names}
    forth, back = surface_distances(prediction, truth, spacing)
    both = np.concatenate([forth, back])
    measures = {
        "hd95": lambda: max(np.percentile(forth, 95), np.percentile(back, 95)),
        "hd95_pooled": lambda: np.percentile(both, 95),
        "hd": lambda: both.max(),
        "asd": lambda: both.mean(),
        "asd_directed": lambda: forth.mean(),
        "surface_dice": lambda: within(both, tolerance).mean(),
    }
    return {name: float(measures[name]()) for name in names}


def within(distances: np.ndarray, tolerance: float) -> np.ndarray:
    """Which distances are at most `tolerance`, a bool array of their shape."""
    return distances <= tolerance * (1 + 1e-5)  # those of the transform are float32


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface voxel of `prediction` to the surface of `truth`, and of every one of `truth` to that of `prediction`.

    Args:
        prediction, truth: boolean masks of one shape, neither empty.
        spacing: voxel size along each axis.

    Returns:
        two arrays (number of surface voxels,), in the unit of `spacing`.
    """
    box = bounding_box(prediction | truth)
    return _between(surface(prediction[box]), surface(truth[box]), spacing)


def surface_hd95_by_area(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """HD95 of the package `surface-distance` (Nikolov et al. 2018), in the unit of `spacing`: surface elements lie between voxels, distances
    go from element to element, and each percentile is the distance within which 95 % of the area of a surface lies; the larger of the two.

    Args:
        prediction, truth: boolean masks (X, Y, Z) or (X, Y) of one shape, neither empty.
        spacing: voxel size along each axis.
    """
    from monai.metrics.utils import get_code_to_measure_table

    box = bounding_box(prediction | truth)
    areas, kernel = (table.numpy() for table in get_code_to_measure_table(tuple(spacing)))
    codes = [_corner_codes(mask[box], kernel.reshape((2,) * mask.ndim)) for mask in (prediction, truth)]
    first, second = ((code > 0) & (code < len(areas) - 1) for code in codes)
    shared = first & second
    percentiles = []
    for code, own, distances in zip(codes, (first, second), _between(first, second, spacing), strict=True):
        area = areas[np.concatenate([code[shared], code[own & ~shared]])].astype(float)
        order = np.lexsort((area, distances))
        share = np.cumsum(area[order]) / area[order].sum()
        percentiles.append(distances[order][min(np.searchsorted(share, 0.95), len(order) - 1)])
    return float(max(percentiles))


def _corner_codes(mask: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Which of the voxels around each voxel corner are in a mask (n, ...), as one number: the sum of their `kernel` entries (n + 1, ...)."""
    padded = np.pad(mask, 1)
    codes = np.zeros([n + 1 for n in mask.shape], np.int64)
    for place in np.ndindex(kernel.shape):
        codes += int(kernel[place]) * padded[tuple(slice(i, i + n) for i, n in zip(place, codes.shape, strict=True))]
    return codes


def _between(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every point of `first` to the nearest of `second`, and the other way around: the common points first, then the others, in
    the order of the array."""
    shared = first & second
    ours, theirs = first ^ shared, second ^ shared
    counts = [np.count_nonzero(m) for m in (ours, theirs)]
    measure = _by_tree if sum(counts) < max(TREE_LIMIT, first.size / SPARSE) else _by_transform
    zeros = np.zeros(np.count_nonzero(shared))
    return tuple(
        np.concatenate([zeros, measure(start, end, spacing) if count else zeros[:0]])
        for start, end, count in [(ours, second, counts[0]), (theirs, first, counts[1])]
    )


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a boolean `mask` that have a face neighbor outside of it."""
    inner = (slice(1, -1),) * mask.ndim
    padded = np.zeros([n + 2 for n in mask.shape], bool)  # in C order, whatever the order of `mask`
    padded[inner] = mask
    flat = padded.ravel()
    core = flat.copy()
    for step in padded.strides:  # bytes are voxels: a neighbor along an axis is one stride away, and the padding parts the rows
        core[step:] &= flat[:-step]
        core[:-step] &= flat[step:]
    return (padded ^ core.reshape(padded.shape))[inner]


def _by_tree(start: np.ndarray, end: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    tree = KDTree(_points(end, spacing), leafsize=32, balanced_tree=False, compact_nodes=False)
    return tree.query(_points(start, spacing))[0]


def _points(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    places = np.unravel_index(np.flatnonzero(mask), mask.shape)  # many times faster than `argwhere` where few voxels are set
    return np.stack(places, axis=1) * np.asarray(spacing)


def _by_transform(start: np.ndarray, end: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    from edt import edt

    distances = edt(~end, anisotropy=tuple(spacing), order="C")[start].astype(float)
    if len(set(spacing)) > 1:
        return distances
    return spacing[0] * np.sqrt(
        np.rint((distances / spacing[0]) ** 2)
    )  # squares are whole numbers of voxels: undoes the rounding to float32
