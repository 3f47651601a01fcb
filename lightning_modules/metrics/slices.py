"""Overlap of slices, stratified by the size of the lesions that they show (Wong et al., BrainLes 2021, Table 3)."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from lightning_modules.metrics.overlap import overlap_metrics

MEASURES = ("dice", "jaccard", "sensitivity", "precision")


def largest_components(mask: np.ndarray, axis: int | None) -> np.ndarray:
    """Pixels of the largest 8-connected component of every slice, (N,); 0 for a slice without any.

    Args:
        mask: bool, 3D, or 2D where it is a single slice.
        axis: along which a 3D mask is sliced; None for a single slice.
    """
    planes = mask[None] if axis is None else np.moveaxis(mask, axis, 0)
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = True
    labels, _ = ndimage.label(planes, structure=in_plane)
    sizes = np.bincount(labels.ravel(), minlength=1)
    sizes[0] = 0
    return sizes[labels].max(axis=(1, 2), initial=0)


def slice_metrics(prediction: np.ndarray, truth: np.ndarray, axis: int | None, bounds: Sequence[int] = (100,)) -> dict[str, float]:
    """Overlap of the slices of a case in strata by the largest true component that a slice shows; slices without lesion are in none.

    With bounds (100,) the strata are `le100` (1 to 100 pixels: only small lesions) and `gt100`; with (25, 100) `le25`, `le100` (26 to
    100) and `gt100`.

    Args:
        prediction, truth: boolean masks of one shape, see `largest_components`.
        bounds: pixels, ascending.

    Returns:
        For each stratum `slices_<stratum>_{dice, jaccard, sensitivity, precision}` over all its slices together (NaN without any), and the
        counts `slices_<stratum>_{n, hit, predicted, true}` (slices; pixels in both masks, in the prediction, in the truth), whose sums
        over cases give the pooled measures (`lesionbench.results.pool_slices`).
    """
    sizes = largest_components(truth, axis)
    ours, theirs = (m[None] if axis is None else np.moveaxis(m, axis, 0) for m in (prediction, truth))
    values: dict[str, float] = {}
    for low, high in zip([0, *bounds], [*bounds, np.inf], strict=True):
        name = f"slices_{f'gt{low}' if high == np.inf else f'le{high}'}"
        chosen = (sizes > low) & (sizes <= high)
        p, t = ours[chosen], theirs[chosen]
        found = overlap_metrics(p, t) if chosen.any() else dict.fromkeys(MEASURES, float("nan"))
        values |= {f"{name}_{measure}": found[measure] for measure in MEASURES}
        counts = {"n": chosen, "hit": p & t, "predicted": p, "true": t}
        values |= {f"{name}_{count}": int(np.count_nonzero(x)) for count, x in counts.items()}
    return values
