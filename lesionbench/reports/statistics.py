"""Statistics for comparisons: paired tests, correction for multiplicity, bootstrap intervals. Pure functions on arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lesionbench.keyed import numpy_generator

Numbers = Sequence[float] | np.ndarray

MIN_PAIRS = 6  # with fewer, the exact two-sided Wilcoxon test cannot fall below 0.05


@dataclass(frozen=True)
class PairedTests:
    """What paired values say about the differences `a - b`; NaN where a number does not exist.

    Attributes:
        n: pairs used.
        missing: pairs left out because a value is NaN.
        mean_difference: mean of `a - b`, in the unit of the values.
        dz: Cohen's d for paired samples, the mean difference over its standard deviation (ddof 1).
        higher, equal, lower: number of pairs with a > b, a = b, a < b.
        p_wilcoxon: two-sided Wilcoxon signed-rank test (Wilcoxon 1945) in [0, 1]; NaN under `MIN_PAIRS` pairs.
        p_ttest: two-sided paired t-test in [0, 1]; NaN under `MIN_PAIRS` pairs, or where all differences are one number but 0.
    """

    n: int
    missing: int
    mean_difference: float
    dz: float
    higher: int
    equal: int
    lower: int
    p_wilcoxon: float
    p_ttest: float


def differences(a: Numbers, b: Numbers) -> np.ndarray:
    """`a - b` (n,) without the pairs that hold a NaN; values that are equal but for rounding differ by exactly 0."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    same = np.isclose(a, b, rtol=1e-9, atol=1e-12)
    return np.subtract(a, b, out=np.zeros_like(a), where=~same)


def paired_tests(a: Numbers, b: Numbers) -> PairedTests:
    """Compares values `a` (n,) and `b` (n,) of the same cases, in the same order.

    Where all differences are 0 nothing speaks against equality: both p-values are 1 and `dz` is 0.
    """
    difference = differences(a, b)
    n = difference.size
    mean = float(difference.mean()) if n else np.nan
    spread = float(difference.std(ddof=1)) if n > 1 else np.nan
    constant = n > 1 and spread <= 1e-9 * abs(mean)
    p_wilcoxon, p_ttest = _p_values(difference, constant)
    return PairedTests(
        n=n,
        missing=len(a) - n,
        mean_difference=mean,
        dz=(np.nan if mean else 0.0) if constant else mean / spread,
        higher=int((difference > 0).sum()),
        equal=int((difference == 0).sum()),
        lower=int((difference < 0).sum()),
        p_wilcoxon=p_wilcoxon,
        p_ttest=p_ttest,
    )


def _p_values(difference: np.ndarray, constant: bool) -> tuple[float, float]:
    if difference.size < MIN_PAIRS:
        return np.nan, np.nan
    if not difference.any():
        return 1.0, 1.0
    p_ttest = np.nan if constant else float(stats.ttest_1samp(difference, 0).pvalue)
    return float(stats.wilcoxon(difference).pvalue), p_ttest


def holm(pvalues: Numbers) -> np.ndarray:
    """Holm's step-down adjusted p-values (n,), in the given order (Holm 1979, Scand. J. Statist. 6).

    The i-th smallest of m p-values is multiplied by m - i + 1; no adjusted value is below that of a smaller p, or above 1. NaN is no
    test: it stays NaN and does not count in m.
    """
    pvalues = np.asarray(pvalues, dtype=float)
    known = np.flatnonzero(~np.isnan(pvalues))
    order = known[np.argsort(pvalues[known], kind="stable")]
    adjusted = np.full(pvalues.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(pvalues[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def bootstrap_interval(x: Numbers, seed: object, level: float = 0.95, draws: int = 5000) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of `x` (n,), (nan, nan) under two values (Efron 1979, Ann. Statist. 7).

    Args:
        x: values without NaN; resampled with replacement.
        seed: anything printable; the interval depends on it and `x` alone.
        level: coverage in (0, 1).
        draws: number of resamples.
    """
    x = np.asarray(x, dtype=float)
    if x.size < 2:
        return np.nan, np.nan
    generator = numpy_generator("bootstrap", seed)
    block = max(1, 1_000_000 // x.size)  # resamples at once: bounds the memory for long x
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    means = np.concatenate([x[generator.integers(x.size, size=(size, x.size))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(x: Numbers, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of the population that `x` (n,) is drawn from, (nan, nan) under two values (Student 1908, Biometrika 6).

    For a handful of values it is the wider and truer one: resampling six normal values covers the mean in 86 % of draws, not in 95.

    Args:
        x: values without NaN.
        level: coverage in (0, 1).
    """
    x = np.asarray(x, dtype=float)
    if x.size < 2:
        return np.nan, np.nan
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return float(x.mean()) - half, float(x.mean()) + half
