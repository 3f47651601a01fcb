"""Survival of groups of patients: log-rank test, significance loss, and which habitats matter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lesionbench.errors import SuiteError, unknown

MIN_GROUP = 3  # patients; below, a log-rank test says nothing
SIGNIFICANCE_SCALES = ("unit", "raw", "as_printed")


@dataclass(frozen=True)
class Survival:
    """Time to death or censoring of patients.

    Attributes:
        days: (N,) float; NaN where it is not known, and the patient then counts in no test.
        died: (N,) bool; False = censored.
    """

    days: np.ndarray
    died: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Who has a survival time: (N,), bool."""
        return np.isfinite(self.days)

    def require_events(self) -> None:
        """Refuses survival data that no test can use.

        Raises:
            SuiteError: no times, a time that is not positive, or no death.
        """
        known = self.known
        hint = "give the columns in habitats.time and habitats.event, or search by stability alone with habitats.alpha=1"
        if not known.any():
            raise SuiteError(f"none of the {len(known)} training patients has a survival time; {hint}")
        if (self.days[known] <= 0).any():
            raise SuiteError(f"a survival time of {self.days[known].min():g}: times are positive")
        if not self.died[known].any():
            raise SuiteError(f"all {known.sum()} training patients with a survival time are censored (event=0); {hint}")


def survival_time(case: str, attributes: Mapping[str, Any], time: str, event: str) -> tuple[float, bool]:
    """Days and whether the patient died, from a case's attributes of these names; NaN and False where either is lacking.

    Raises:
        SuiteError: days that are no positive number, an event that is neither 0 nor 1 (codes 1 and 2 of other software included).
    """
    if time not in attributes or event not in attributes:
        return float("nan"), False
    found = {k: attributes[k] for k in (time, event)}
    try:
        days, died = (float(v) for v in found.values())
    except (TypeError, ValueError):
        days, died = float("nan"), float("nan")
    if not 0 < days < float("inf") or died not in (0, 1):
        raise SuiteError(f"case {case}: expected a positive number of days and an event of 0 (censored) or 1 (died), got {found}")
    return days, bool(died)


def testable(survival: Survival, high: np.ndarray) -> bool:
    """Whether a log-rank test between patients with `high` (N,) bool and the others can say anything.

    Needs `MIN_GROUP` patients with a survival time in either group, and a death.
    """
    known = survival.known
    return bool(min((known & high).sum(), (known & ~high).sum()) >= MIN_GROUP and survival.died[known].any())


def log_rank(survival: Survival, high: np.ndarray) -> float:
    """p of the two-sided log-rank test between patients with `high` (N,) bool and the others; 1.0 where they are not `testable`.

    Patients without a survival time are left out.
    """
    if not testable(survival, high):
        return 1.0
    from lifelines.statistics import logrank_test

    high, low = survival.known & high, survival.known & ~high
    days, died = survival.days, survival.died
    p = float(logrank_test(days[high], days[low], died[high], died[low]).p_value)
    return p if np.isfinite(p) else 1.0


def excess_deaths(survival: Survival, high: np.ndarray) -> tuple[float, float]:
    """Observed less expected deaths (log-rank) of the others and of the patients with `high` (N,) bool; they add up to 0."""
    known = survival.known
    days, died, high = survival.days[known], survival.died[known], high[known]
    excess = 0.0
    for time in np.unique(days[died]):
        at_risk, dead = days >= time, (days == time) & died
        excess += (dead & high).sum() - dead.sum() * (at_risk & high).sum() / at_risk.sum()
    return -float(excess), float(excess)


def significance_loss(p: float, scale: str = "unit", *, tau: float = 0.05, p_floor: float = 1e-4) -> float:
    """Lp, small where p is small.

    Eq. 2 of Li et al. (BrainLes 2021) prints log(tau / p), which grows as p falls although the joint loss is minimized: `as_printed`.
    `raw` is log(p / tau). `unit` brings `raw` from [log(p_floor / tau), log(1 / tau)] to [0, 1], in which the stability loss lies; tau
    is a constant that cancels there and changes no minimum anywhere.

    Args:
        p_floor: a smaller p counts as this one.

    Raises:
        SuiteError: an unknown scale.
    """
    if scale not in SIGNIFICANCE_SCALES:
        raise unknown("significance scale", scale, SIGNIFICANCE_SCALES)
    raw = float(np.log(max(p, p_floor) / tau))
    if scale == "raw":
        return raw
    if scale == "as_printed":
        return -raw
    low, high = np.log(p_floor / tau), np.log(1 / tau)
    return float(np.clip((raw - low) / (high - low), 0, 1))


def significant_habitats(fractions: np.ndarray, survival: Survival) -> tuple[int, int]:
    """The two habitats whose fraction (N, K), split at its median over the training patients, separates survival best (smallest log-rank p).

    The paper takes two "significant" sub-regions without saying which. With equal p the lower number wins.
    """
    p = [log_rank(survival, f > np.median(f)) for f in fractions.T]
    first, second = sorted(np.argsort(p, kind="stable")[:2])
    return int(first), int(second)
