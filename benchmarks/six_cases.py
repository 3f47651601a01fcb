"""How far six real cases carry: intervals of means and of paired differences, for the pages that have tables of six cases.

    python benchmarks/six_cases.py docs/results [<folder that holds runs of the FLAIR threshold>]

Reads the tables of single cases (`modality_pairing_brats18_weight.csv`, `supervised_brats18.csv`, `umm_tissue_slabs.csv`,
`flair_threshold_brats18_cases.csv`) and writes `six_cases.csv`: the mean of every group and its mean difference to the baseline on the same
cases, each with Student's 95 % interval, and for differences the percentile bootstrap's, p of the t-test and of Wilcoxon's. All of them take
the cases as drawn from a population of patients, and the trainings (one seed, each on the other five cases) as they are: what another
seed would change is in none. With a folder of runs it first writes `flair_threshold_brats18_cases.csv` from their tested cases.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml

from lesionbench.reports.statistics import bootstrap_interval, differences, paired_tests, t_interval
from lesionbench.results import read_rows

Values = dict[tuple[str, str, str], dict[str, float]]  # (group, region, metric) -> case -> value
COLUMNS = (
    "table",
    "metric",
    "region",
    "group",
    "baseline",
    "n",
    "mean",
    "t_low",
    "t_high",
    "bootstrap_low",
    "bootstrap_high",
    "p_ttest",
    "p_wilcoxon",
)
BASELINES = {
    "modality_pairing_brats18_weight": "model=supervised",
    "umm_tissue_slabs": "pure",
    "flair_threshold_brats18_cases": "Experiment I",
}
USUAL = {"equalize": "brain", "min_component": 20, "connectivity": 3, "channel": "flair"}  # of Experiment I


def by_fold(path: Path) -> Values:
    """A table of job=compare with one case in each fold."""
    found: Values = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["group"], row["region"], row["metric"]][row["fold"]] = float(row["mean"])
    return found


def by_column(path: Path) -> Values:
    """The table of the slabs: a column for each fold; what is compared is one member in different modes."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    return {(row["mode"], row["member"], "dice"): {fold: float(row[fold]) for fold in "012345"} for row in rows}


def tested(runs: Path) -> list[tuple[str, str, float]]:
    """(variant, case, Dice of the whole tumor) of every tested case, cases numbered in the order of their ids."""
    found = []
    for config in sorted(runs.rglob("config.yaml")):
        cases = config.parent / "test" / "cases.csv"
        if cases.exists():
            name = variant(yaml.safe_load(config.read_text()))
            found += [(name, row["case"], float(row["dice"])) for row in read_rows(cases) if row["region"] == "WT"]
    number = {case: str(place) for place, case in enumerate(sorted({case for _, case, _ in found}))}
    return [(name, number[case], dice) for name, case, dice in sorted(found)]


def variant(config: Mapping) -> str:
    """What a run of the FLAIR threshold changes, as a person types it."""
    model = config["model"]
    if not model["_target_"].endswith("FlairThreshold"):
        return "model=blur_residual"
    if config["experiment_name"].endswith("brats2018"):
        return "whole volume, leave one out" if config["data"]["split"]["folds"] else "whole volume"
    changed = [f"model.{key}={model[key]}" for key, usual in USUAL.items() if model[key] != usual]
    return " ".join(changed) or "Experiment I"


def intervals(table: str, values: Values) -> list[dict]:
    """The mean of every group, and its difference to the baseline of the table where there is one."""
    rows = []
    for (group, region, metric), cases in values.items():
        baseline = "whole volume" if group == "whole volume, leave one out" else BASELINES.get(table)
        known = {"table": table, "metric": metric, "region": region, "group": group}
        rows.append({**known, "n": len(cases), "mean": sum(cases.values()) / len(cases), **ends("t", t_interval(list(cases.values())))})
        reference = values.get((str(baseline), region, metric), {})
        if baseline is not None and group != baseline and reference.keys() == cases.keys():
            pairs = [(value, reference[case]) for case, value in cases.items()]
            ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
            difference, test = differences(ours, theirs), paired_tests(ours, theirs)
            rows.append(
                {
                    **known, "baseline": baseline, "n": test.n, "mean": test.mean_difference, **ends("t", t_interval(difference)),
                    **ends("bootstrap", bootstrap_interval(difference, "/".join((str(baseline), group, region, metric)))),
                    "p_ttest": test.p_ttest, "p_wilcoxon": test.p_wilcoxon,
                }
            )  # fmt: skip
    return rows


def ends(name: str, interval: tuple[float, float]) -> dict[str, float]:
    """The ends of an interval as two columns."""
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """A table; numbers with four significant digits behind the point."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(results: Path, runs: Path | None = None) -> None:
    single = results / "flair_threshold_brats18_cases.csv"
    if runs is not None:
        columns = ("group", "region", "metric", "fold", "mean")
        write(single, columns, [dict(zip(columns, (name, "WT", "dice", case, dice), strict=True)) for name, case, dice in tested(runs)])
    rows = []
    for path in (results / "modality_pairing_brats18_weight.csv", results / "supervised_brats18.csv", single):
        rows += intervals(path.stem, by_fold(path))
    rows += intervals("umm_tissue_slabs", by_column(results / "umm_tissue_slabs.csv"))
    write(results / "six_cases.csv", COLUMNS, rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
