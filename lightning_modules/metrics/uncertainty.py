"""How far probabilities can be believed (calibration), how well a map of scores finds what it should (ranking), and what filtering by
uncertainty does to a mask."""

from collections.abc import Sequence

import numpy as np

from lesionbench.score_counts import Ranking, dice


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


def qu_brats(
    uncertainty: np.ndarray, predicted: np.ndarray, truth: np.ndarray, thresholds: Sequence[float] = range(101)
) -> dict[str, float]:
    """The score of the BraTS challenge on uncertainty and its three parts, all in [0, 1] (Mehta et al., MELBA 2022:026, QU-BraTS).

    At a threshold, voxels of a higher uncertainty are left out. What that does is a curve over the thresholds, and its area, by trapezoids and
    divided by their range, is

    - `dice`: of the Dice of what is kept, 1 where neither predicted nor true voxels are;
    - `ftp`: of the share of true positives that is left out, 0 where there are none (lower is better);
    - `ftn`: of the share of true negatives that is left out, 0 where there are none (lower is better);
    - `score` = (dice + 1 - ftp + 1 - ftn) / 3.

    The number of thresholds and what holds for empty masks are decisions made here.

    Args:
        uncertainty: in [0, 100], any shape; all NaN without voxels.
        predicted, truth: bool, same shape.
        thresholds: ascending, at least two.
    """
    names = ("score", "dice", "ftp", "ftn")
    if not uncertainty.size:
        return dict.fromkeys(names, float("nan"))
    grid = np.asarray(thresholds, np.float64)
    first = grid.searchsorted(uncertainty.ravel())  # place of the lowest threshold that keeps the voxel
    kind = 2 * predicted.ravel().astype(np.int64) + truth.ravel()
    counts = np.bincount(4 * first + kind, minlength=4 * (grid.size + 1)).reshape(-1, 4)
    kept = counts.cumsum(axis=0)[:-1].T  # true negatives, missed, false and true positives at every threshold
    fn, fp, tp = kept[1:]
    everything = counts.sum(axis=0)
    lost = 1 - kept / np.where(everything == 0, 1, everything)[:, None]
    lost[everything == 0] = 0
    areas = [
        float((np.diff(grid) * (c[1:] + c[:-1]) / 2).sum() / (grid[-1] - grid[0])) for c in (dice(tp, tp + fp, tp + fn), lost[3], lost[0])
    ]
    return dict(zip(names, [(areas[0] + 2 - areas[1] - areas[2]) / 3, *areas], strict=True))


def _inside(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return values.ravel() if mask is None else values[mask]
