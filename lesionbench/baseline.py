"""The baseline that any method must beat: one global threshold on FLAIR."""

from collections.abc import Iterable

import numpy as np


def flair_threshold_baseline(volumes: Iterable[np.ndarray], masks: Iterable[np.ndarray], steps: int = 100) -> tuple[float, list[float]]:
    """The single threshold with the best pooled Dice on these very cases, and each case's Dice at it.

    Tumors are bright on FLAIR, so a threshold alone already scores well (Meissen, Kaissis and Rueckert, "Challenging Current
    Semi-Supervised Anomaly Segmentation Methods for Brain MRI", BrainLes 2021). The threshold is chosen with the truth in hand, so the
    Dice is an oracle's: an upper bound for thresholding, never a result of a method. A voxel is marked where its value exceeds the
    threshold; of equal Dice the lowest threshold wins.

    Args:
        volumes: FLAIR per case, made comparable between cases (z-scored over the brain), any shape.
        masks: truth per case, bool, same shapes.
        steps: number of thresholds, evenly spaced from the smallest to the largest value of all volumes.

    Returns:
        The threshold, and the Dice of every case in [0, 1]; 1 where truth and marked voxels are both empty.

    Raises:
        ValueError: no volume, or not as many masks.
    """
    volumes = [np.asarray(v) for v in volumes]
    thresholds = np.linspace(min(float(v.min()) for v in volumes), max(float(v.max()) for v in volumes), steps)
    marked, hit, truth = [], [], []
    for volume, mask in zip(volumes, masks, strict=True):
        below = np.searchsorted(thresholds, volume.ravel(), side="left")  # thresholds that the voxel exceeds
        mask = np.asarray(mask, dtype=bool).ravel()
        marked.append(_exceeding(below, steps))
        hit.append(_exceeding(below[mask], steps))
        truth.append(int(mask.sum()))
    pooled = _dice(np.sum(hit, axis=0), np.sum(marked, axis=0), sum(truth))
    best = int(np.argmax(pooled))
    return float(thresholds[best]), [float(_dice(h[best], m[best], t)) for h, m, t in zip(hit, marked, truth, strict=True)]


def _exceeding(below: np.ndarray, steps: int) -> np.ndarray:
    """Number of voxels above threshold 0, 1 ... steps - 1."""
    return np.bincount(below, minlength=steps + 1)[::-1].cumsum()[::-1][1:]


def _dice(hit: np.ndarray, marked: np.ndarray, truth: int) -> np.ndarray:
    return np.where(marked + truth == 0, 1.0, 2 * hit / np.maximum(marked + truth, 1))
