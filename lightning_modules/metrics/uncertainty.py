"""How far probabilities can be believed (calibration), and how well a map of scores finds what it should (ranking)."""

import numpy as np

from lesionbench.score_counts import Ranking


def calibration_error(probability: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None, bins: int = 15) -> float:
    """Expected calibration error of a region's probability, in [0, 1] (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    Voxels are grouped by probability into `bins` of equal width; the error is the mean of |mean probability - share of true voxels| over
    the bins, weighted by their voxels. The two-class form, of the probability itself and not of the larger of p and 1 - p.

    Args:
        probability: in [0, 1], any shape.
        truth: bool, same shape.
        mask: bool, same shape: the voxels that count; default all. NaN when it holds none.
    """
    probability, truth = _inside(probability, mask), _inside(truth, mask)
    if not probability.size:
        return float("nan")
    index = np.minimum((probability * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=probability, minlength=bins) - np.bincount(index[truth], minlength=bins)
    return float(np.abs(gap).sum() / probability.size)


def brier_score(probability: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean of (probability - truth)^2 over the voxels of `mask`, in [0, 1] (Brier 1950); arguments as in `calibration_error`."""
    difference = np.subtract(_inside(probability, mask), _inside(truth, mask), dtype=np.float64)
    return float(np.mean(difference**2)) if difference.size else float("nan")


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """`ScoreCounts.auroc` for a single question, such as whether an uncertainty map finds the wrong voxels."""
    return Ranking(scores).auroc(positive)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """`ScoreCounts.average_precision` for a single question."""
    return Ranking(scores).average_precision(positive)


def _inside(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return values.ravel() if mask is None else values[mask]
