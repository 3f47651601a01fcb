"""Measures of two papers: VR70, the share of volumes with enough recall, and Q-Dice, Dice of graded maps from several raters."""

from collections.abc import Iterable, Sequence

import numpy as np

CHALLENGE_THRESHOLDS = tuple(i / 10 for i in range(1, 10))
PAPER_THRESHOLDS = tuple(i / 10 for i in range(10))


def recall_reached(recall: float, threshold: float = 0.7) -> float:
    """1.0 where `recall` is at least `threshold`, 0.0 where it is below, NaN where it is NaN (nothing to recall)."""
    return float(recall >= threshold) if recall == recall else float("nan")


def volume_recall_rate(recalls: Iterable[float], threshold: float = 0.7) -> float:
    """VR70 of the UMM paper: share of (volume, class) pairs with recall of at least `threshold`, in [0, 1]; NaN recalls are left out.

    NaN without a recall. The mean over cases of `CaseMetrics`' column `vr70` is the same number.
    """
    reached = np.array([recall_reached(r, threshold) for r in recalls])
    reached = reached[~np.isnan(reached)]
    return float(reached.mean()) if reached.size else float("nan")


def q_dice(
    prediction: np.ndarray,
    truth: np.ndarray,
    thresholds: Sequence[float] = CHALLENGE_THRESHOLDS,
    strict: bool = False,
    empty: float = 1.0,
) -> float:
    """Q-Dice of the QUBIQ challenge, in [0, 1]: Dice of the two maps cut at each threshold, averaged over the thresholds.

    Args:
        prediction: graded map U in [0, 1], any shape.
        truth: share of raters who marked the voxel, V = votes / raters, same shape.
        thresholds: `CHALLENGE_THRESHOLDS` 0.1 ... 0.9, or `PAPER_THRESHOLDS` 0.0 ... 0.9 of Zukovec et al. (2022), which at 0 cuts both maps
            to all ones and so adds a Dice of 1 for free.
        strict: cut with > instead of >=. Either way with a tolerance of 1e-6, for 3/5 and 6 * 0.1 are different numbers in floating point.
        empty: Dice at a threshold that leaves both maps empty; NaN leaves it out of the average.
    """
    margin = 1e-6 if strict else -1e-6
    scores = []
    for threshold in thresholds:
        ours, theirs = (x > threshold + margin for x in (prediction, truth))
        size = np.count_nonzero(ours) + np.count_nonzero(theirs)
        scores.append(2 * np.count_nonzero(ours & theirs) / size if size else empty)
    counted = [s for s in scores if s == s]
    return float(np.mean(counted)) if counted else float("nan")
