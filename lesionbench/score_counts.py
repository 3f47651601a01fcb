"""What scores are worth for finding positives: counts per score, exact or binned, and the measures that follow from them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_MASK = np.int32(0x7FFFFFFF)


class Ranking:
    """Scores sorted once, to be asked how well they rank different sets of positives.

    Args:
        scores: any shape, any range; higher should mean positive.
    """

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores.ravel()
        ordered = np.sort(self.scores)
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if ordered.size else np.zeros(0, np.int64)
        self._values, self._totals = ordered[starts], np.diff(starts, append=ordered.size)

    def counts(self, positive: np.ndarray) -> "ScoreCounts":
        """Counts per distinct score. `positive`: bool, as many as there are scores."""
        hits = np.sort(self.scores[positive.ravel()])
        positives = np.bincount(self._values.searchsorted(hits), minlength=self._values.size)
        return ScoreCounts(self._values, positives, self._totals - positives)

    def auroc(self, positive: np.ndarray) -> float:
        """`ScoreCounts.auroc` for these positives."""
        return self.counts(positive).auroc()

    def average_precision(self, positive: np.ndarray) -> float:
        """`ScoreCounts.average_precision` for these positives."""
        return self.counts(positive).average_precision()


@dataclass(frozen=True)
class ScoreCounts:
    """How many positives and how many negatives have each score.

    Counts of several cases are added with `+`. `limited` bounds their number by dropping the last bits of the scores' mantissas, so bins
    have a relative width (2^(bits - 23) of their value), need no range, and lie where they would whatever came before: the counts of a
    set of scores are the same in any order and any division of the set. Scores with few distinct values stay exact.

    Attributes:
        values: distinct scores, ascending (K,); of a bin the lower edge.
        positives, negatives: voxels with that score (K,), int64.
        bits: number of mantissa bits dropped; 0 = exact.
    """

    values: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    bits: int = 0

    @classmethod
    def of(cls, scores: np.ndarray, positive: np.ndarray) -> "ScoreCounts":
        """Exact counts of one set of scores; `positive` is bool and as large."""
        return Ranking(scores).counts(positive)

    def __add__(self, other: "ScoreCounts") -> "ScoreCounts":
        values, positives, negatives = (
            np.concatenate([getattr(c, n) for c in (self, other)]) for n in ("values", "positives", "negatives")
        )
        return ScoreCounts(values, positives, negatives)._binned(max(self.bits, other.bits))

    def limited(self, most: int) -> "ScoreCounts":
        """The counts in the finest bins of which at most `most` are filled. Scores must be float32 and no NaN.

        Raises:
            ValueError: a score is NaN.
        """
        if self.values.size and np.isnan(self.values[-1]):
            raise ValueError("scores hold NaN")
        counts = self
        while counts.values.size > most:
            counts = counts._binned(counts.bits + 1)
        return counts

    def _binned(self, bits: int) -> "ScoreCounts":
        keys, places = np.unique(_ordered(self.values) >> bits << bits, return_inverse=True)
        positives, negatives = (
            np.bincount(places, weights=c, minlength=keys.size).astype(np.int64) for c in (self.positives, self.negatives)
        )
        return ScoreCounts(_scores(keys), positives, negatives, bits)

    # measures

    @cached_property
    def positive(self) -> int:
        """Number of positives."""
        return int(self.positives.sum())

    @cached_property
    def _reached(self) -> tuple[np.ndarray, np.ndarray]:
        """Positives and all voxels with at least each score (K,)."""
        hits, marked = (np.cumsum(c[::-1])[::-1] for c in (self.positives, self.positives + self.negatives))
        return hits, marked

    def auroc(self) -> float:
        """Area under the ROC curve, in [0, 1]: the chance that a positive outscores a negative, ties counted half (Mann-Whitney).

        NaN where all are positive or none is.
        """
        negative = int(self.negatives.sum())
        if not self.positive or not negative:
            return float("nan")
        below = np.cumsum(self.negatives) - self.negatives / 2
        return float((self.positives * below).sum() / self.positive / negative)

    def average_precision(self) -> float:
        """Average precision, in [0, 1]: precision at every distinct score, weighted by the recall it adds; NaN without positives."""
        if not self.positive:
            return float("nan")
        hits, marked = self._reached
        return float((self.positives * (hits / marked)).sum() / self.positive)

    def auprc(self) -> float:
        """Area under the precision-recall curve by trapezoids over recall, from (0, 1), in [0, 1]; NaN without positives.

        The form that `sklearn.metrics.auc` of `precision_recall_curve` has; it lies above `average_precision` where scores are few.
        """
        if not self.positive:
            return float("nan")
        hits, marked = self._reached
        precision = np.append(hits / marked, 1.0)
        return float((self.positives * (precision[:-1] + precision[1:]) / 2).sum() / self.positive)

    def risk(self, coverage: np.ndarray) -> np.ndarray:
        """Share of positives among the lowest scores that make up each share `coverage` of all, in [0, 1]; of scores that tie, the same part of
        positives and negatives is kept. With errors as positives and an uncertainty as score: the risk at a coverage (El-Yaniv & Wiener, JMLR
        2010).

        Args:
            coverage: in (0, 1]; NaN for all of them where there are no scores.
        """
        totals = np.append(0, np.cumsum(self.positives + self.negatives))
        if not totals[-1]:
            return np.full(np.shape(coverage), np.nan)
        kept = np.asarray(coverage) * totals[-1]
        return np.interp(kept, totals, np.append(0, np.cumsum(self.positives))) / kept

    def above(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positives, and all voxels, with a score above each threshold."""
        places = self.values.searchsorted(thresholds, side="right")
        hits, marked = (np.append(c, 0)[places] for c in self._reached)
        return hits, marked

    def best_dice(self, thresholds: int | None = None) -> tuple[float, float]:
        """(Dice, threshold): the best Dice of all masks `score > threshold`; of equal ones the lowest threshold.

        The threshold is chosen with the truth in hand, so the Dice is an oracle's: an upper bound for thresholding these very scores.
        Dice is 1 where truth and mask are both empty. NaN where there are no scores.

        Args:
            thresholds: tried, evenly spaced from the lowest to the highest score; None = every mask that a threshold can make.
        """
        if not self.values.size:
            return float("nan"), float("nan")
        if thresholds is None:
            tried = np.append(np.nextafter(self.values, self.values.dtype.type(-np.inf)), self.values[-1])
            hits, marked = (np.append(c, 0) for c in self._reached)
        else:
            tried = np.linspace(self.values[0], self.values[-1], thresholds)
            hits, marked = self.above(tried)
        found = dice(hits, marked, self.positive)
        best = int(np.argmax(found))
        return float(found[best]), float(tried[best])


def dice(hits: np.ndarray, marked: np.ndarray, true: int | np.ndarray) -> np.ndarray:
    """Dice from counts, 2 hits / (marked + true); 1 where nothing is marked and nothing true."""
    size = np.asarray(marked) + true
    return np.where(size == 0, 1.0, 2 * np.asarray(hits) / np.maximum(size, 1))


def _ordered(scores: np.ndarray) -> np.ndarray:
    """float32 -> int32 in the same order."""
    bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)  # + 0 makes one zero of two
    return np.where(bits < 0, bits ^ _MASK, bits)


def _scores(keys: np.ndarray) -> np.ndarray:
    """The inverse of `_ordered`; the lower edge of a bin that reaches below minus infinity is minus infinity."""
    keys = np.maximum(keys, _ordered(np.array([-np.inf], np.float32)))
    return np.where(keys < 0, keys ^ _MASK, keys).astype(np.int32).view(np.float32)
