"""Dice by lesion size, over seeds: reads finished runs that measured `slices` (and `volume`) and prints and writes a table.

    python benchmarks/small_lesions.py <runs> <table.csv> [configuration key that names the groups, default model.network.spg ...]

Rows: `cases` = per-case Dice of all test cases; `volume <low>-<high> ml` = per-case Dice of each third of the cases by true lesion
volume; `slices <stratum>` = Dice pooled over all slices of all cases that show lesions of that size (pixels of the largest component), as in
Table 3 of Wong et al., BrainLes 2021. Mean and standard deviation are over seeds.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from lesionbench.reports.runs import Run, find_runs, read_run
from lesionbench.results import pool_slices

KEYS = ("model.network.spg", "model.network.downsampler")
MEASURES = ("dice", "sensitivity", "precision")


def setting(run: Run, key: str) -> str:
    """The value of a dotted configuration key, `-` where the run has none."""
    value = run.settings
    for part in key.split("."):
        value = value.get(part, "-") if isinstance(value, dict) else "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def average(values: Iterable[float]) -> float:
    """Mean of the values that exist."""
    known = [v for v in values if not math.isnan(v)]
    return mean(known) if known else math.nan


def strata(runs: Sequence[Run]) -> dict[str, Callable[[Run], tuple[int, dict[str, float]]]]:
    """Name of a row -> what it says of one run: (number of cases or slices, measures)."""

    def cases(chosen: set[str]) -> Callable[[Run], tuple[int, dict[str, float]]]:
        def measured(run: Run) -> tuple[int, dict[str, float]]:
            rows = [r for r in run.rows if r["case"] in chosen]
            return len(rows), {m: average(r[m] for r in rows) for m in MEASURES}

        return measured

    def slices(stratum: str) -> Callable[[Run], tuple[int, dict[str, float]]]:
        def measured(run: Run) -> tuple[int, dict[str, float]]:
            (row,) = (r for r in pool_slices(run.rows) if r["stratum"] == stratum)
            return row["slices"], {m: row[m] for m in MEASURES}

        return measured

    rows = runs[0].rows
    found = {"cases": cases({r["case"] for r in rows})}
    if "truth_volume_ml" in rows[0]:
        ordered = sorted(rows, key=lambda r: r["truth_volume_ml"])
        thirds = [ordered[k * len(rows) // 3 : (k + 1) * len(rows) // 3] for k in range(3)]
        for part in thirds:
            low, high = (part[k]["truth_volume_ml"] for k in (0, -1))
            found[f"volume {low:.0f}-{high:.0f} ml"] = cases({r["case"] for r in part})
    return found | {f"slices {r['stratum']}": slices(r["stratum"]) for r in pool_slices(rows)}


def table(places: Sequence[str | Path], keys: Sequence[str] = KEYS) -> list[dict[str, str | int | float]]:
    """One row per group and stratum: mean and standard deviation over the runs (seeds) of the group."""
    runs = [run for run in map(read_run, find_runs(places)) if run.status == "finished"]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(setting(run, key) for key in keys), []).append(run)
    result = []
    for group, members in sorted(groups.items()):
        for name, measured in strata(members).items():
            found = [measured(run) for run in members]
            row = dict(zip(keys, group, strict=True)) | {"stratum": name, "n": found[0][0], "seeds": len(members)}
            for m in MEASURES:
                values = [v[m] for _, v in found if not math.isnan(v[m])]
                row |= {m: round(average(values), 4), f"{m}_std": round(stdev(values), 4) if len(values) > 1 else math.nan}
            result.append(row)
    return result


if __name__ == "__main__":
    found = table([sys.argv[1]], sys.argv[3:] or KEYS)
    with Path(sys.argv[2]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for row in found:
        print("  ".join(f"{v:.3f}" if isinstance(v, float) else f"{v:<14}" for v in row.values()))
