"""Paired tests of groups of runs against a baseline."""

import math

import numpy as np

from lesionbench.reports.runs import Cell, Record, Values, lower_is_better, mean_of_known
from lesionbench.reports.statistics import MIN_PAIRS, bootstrap_interval, differences, holm, paired_tests

TEST_COLUMNS: tuple[str, ...] = ("metric", "group", "baseline", "member", "region", "n", "missing", "mean_difference", "ci_low")
TEST_COLUMNS += ("ci_high", "dz", "better", "wins", "ties", "losses", "p_wilcoxon", "p_wilcoxon_holm", "p_ttest", "p_ttest_holm")
TEST_COLUMNS += ("note", "oracle")


def tests_against(pool: dict[Cell, Values], baseline: str, oracle: set[Cell]) -> list[Record]:
    """Every group against the baseline. Holm's correction takes all comparisons of one metric (all groups, members, regions) as a family,
    for each of the two tests. Tests stand in the order of `pool`."""
    tests = []
    for cell, values in pool.items():
        reference = (baseline, *cell[1:])
        if cell[0] != baseline and reference in pool:
            tuned = bool({cell, reference} & oracle)
            tests.append({**_test(cell, values, baseline, pool[reference]), "oracle": tuned})
    for metric in dict.fromkeys(test["metric"] for test in tests):
        family = [test for test in tests if test["metric"] == metric]
        for name in ("p_wilcoxon", "p_ttest"):
            for test, adjusted in zip(family, holm([test[name] for test in family]), strict=True):
                test[f"{name}_holm"] = float(adjusted)
    return tests


def _test(cell: Cell, values: Values, baseline: str, reference: Values) -> Record:
    """One group against the baseline: values are averaged over the seeds of a case first (those that are not NaN), then paired by case.

    The difference is group - baseline; a win is a case where the group is better. `n` counts pairs, `missing` pairs left out for a NaN.
    """
    group, member, region, metric = cell
    ours, theirs = _per_case(values), _per_case(reference)
    cases = sorted(ours.keys() | theirs.keys())
    a, b = ([side.get(case, math.nan) for case in cases] for side in (ours, theirs))
    result = paired_tests(a, b)
    low, high = bootstrap_interval(differences(a, b), "/".join((baseline, *cell)))
    lower = lower_is_better(metric)
    return {
        "metric": metric,
        "group": group,
        "baseline": baseline,
        "member": member,
        "region": region,
        "n": result.n,
        "missing": result.missing,
        "mean_difference": result.mean_difference,
        "ci_low": low,
        "ci_high": high,
        "dz": result.dz,
        "better": "lower" if lower else "higher",
        "wins": result.lower if lower else result.higher,
        "ties": result.equal,
        "losses": result.higher if lower else result.lower,
        "p_wilcoxon": result.p_wilcoxon,
        "p_ttest": result.p_ttest,
        "note": f"n<{MIN_PAIRS}" if result.n < MIN_PAIRS else "",
    }


def _per_case(values: Values) -> dict[str, float]:
    """Case -> mean over the seeds that have a value; NaN where none has."""
    cases = list(dict.fromkeys(case for seed in values.values() for case in seed))
    table = np.array([[seed.get(case, math.nan) for seed in values.values()] for case in cases])
    means = table.mean(axis=1)
    for place in np.flatnonzero(np.isnan(means)):
        means[place] = mean_of_known(table[place])
    return dict(zip(cases, means.tolist(), strict=True))
