"""Reliability of a confidence map: how often voxels of a given confidence are right."""

import numpy as np


def calibration_counts(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> np.ndarray:
    """Counts (bins, 3) for bins of equal width in confidence: voxels, sum of their confidence, correct ones (Guo et al., ICML 2017).

    Counts of cases add up. A calibrated map has as large a share of correct voxels in every bin as its mean confidence.

    Args:
        confidence: in [0, 1], any shape.
        correct: bool, same shape.
    """
    confidence, correct = confidence.ravel().astype(np.float64), correct.ravel()
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    sums = [np.bincount(index, weights=w, minlength=bins) for w in (np.ones_like(confidence), confidence, correct.astype(np.float64))]
    return np.stack(sums, axis=1)
