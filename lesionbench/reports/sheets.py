"""Tables as a comparison prints and writes them."""

import csv
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionbench.reports.runs import COST, Record
from lesionbench.results import TUNED

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Sheet:
    """A table as text. The first `fixed` columns name a row; the columns after them may move to a further table where space is short.

    `name` is short for `title`, as a table of contents has it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    fixed: int
    name: str = ""

    def split(self, width: int) -> list["Sheet"]:
        """The sheet as one or more that fit a terminal of `width` columns, each with the columns that name a row."""
        lines = [self.columns, *self.rows]
        needed = [3 + max(len(part) for line in lines for part in line[i].split("\n")) for i in range(len(self.columns))]
        left = width - 1 - sum(min(n, 27) for n in needed[: self.fixed])  # names longer than that are folded
        parts: list[list[int]] = [[]]
        for column in range(self.fixed, len(self.columns)):
            if parts[-1] and sum(needed[c] for c in [*parts[-1], column]) > left:
                parts.append([])
            parts[-1].append(column)
        names = list(range(self.fixed))
        return [
            Sheet(self.title, [self.columns[c] for c in names + part], [[row[c] for c in names + part] for row in self.rows], self.fixed)
            for part in parts
        ]


def metric_sheet(metric: str, cells: Sequence[Record]) -> Sheet:
    """One metric, per group, member and region."""
    return _sheet(metric, f"{metric}: mean ± std over seeds, median [quartiles] over all cases", cells, _cell_text)


def fold_sheet(metric: str, cells: Sequence[Record], folds: Sequence[Record]) -> Sheet:
    """Cross-validation as challenge papers report it: statistics over the pooled cases of all folds, then the mean of each fold."""
    folds = [f for f in folds if f["metric"] == metric]
    pooled = {(c["group"], c["member"], c["region"]): c for c in cells if c["metric"] == metric}
    regions = list(dict.fromkeys(f["region"] for f in folds))
    with_members = any(f["member"] for f in folds)
    statistics = {"mean": "mean", "std": "std_cases", "median": "median", "25 %": "q25", "75 %": "q75"}
    body = []
    for group, member in dict.fromkeys((f["group"], f["member"]) for f in folds):
        own = [f for f in folds if (f["group"], f["member"]) == (group, member)]
        found = {r: pooled[group, member, r] for r in regions if (group, member, r) in pooled}
        label = [group + TUNED * any(c["oracle"] for c in found.values()), *([member or "(main)"] if with_members else [])]
        for title, key in statistics.items():
            body.append([*label, title, *(_number(found[r][key]) if r in found else "" for r in regions)])
        for fold in dict.fromkeys(f["fold"] for f in own):
            means = {f["region"]: _number(f["mean"]) for f in own if f["fold"] == fold}
            body.append([*label, f"fold {fold}", *(means.get(r, "") for r in regions)])
    names = ["group", "member"] if with_members else ["group"]
    columns = [*names, "over cases", *(region or "(case)" for region in regions)]
    title = f"{metric} in cross-validation: statistics over the cases of all folds, means of folds"
    return Sheet(title, columns, body, len(names) + 1, f"{metric}, folds")


def dataset_sheet(metric: str, records: Sequence[Record]) -> Sheet:
    """One metric that was measured over all test voxels as one set."""
    folds = ", of the mean over folds" if any(r["n_folds"] > 1 for r in records) else ""
    return _sheet(f"{metric}, all voxels", f"{metric} over all test voxels as one set: mean ± std over seeds{folds}", records, _mean_text)


def _sheet(name: str, title: str, cells: Sequence[Record], text: Callable[[Record], str]) -> Sheet:
    """One row per group and member, one column per region."""
    regions = list(dict.fromkeys(cell["region"] for cell in cells))
    with_members = any(cell["member"] for cell in cells)
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for cell in cells:
        rows.setdefault((cell["group"], cell["member"]), {})[cell["region"]] = cell
    names = ["group", "member"] if with_members else ["group"]
    body = []
    for (group, member), found in rows.items():
        label = group + TUNED * any(cell["oracle"] for cell in found.values())
        texts = [text(found[region]) if region in found else "" for region in regions]
        body.append([label, *([member or "(main)"] if with_members else []), *texts])
    return Sheet(title, [*names, *(region or "(case)" for region in regions)], body, len(names), name)


def _mean_text(cell: Record) -> str:
    return _number(cell["mean"]) + ("" if math.isnan(cell["std"]) else f" ± {_number(cell['std'])}")


def _cell_text(cell: Record) -> str:
    missing = f"\n{cell['missing']} missing" if cell["missing"] else ""
    return f"{_mean_text(cell)}\n{_number(cell['median'])} [{_number(cell['q25'])}, {_number(cell['q75'])}]{missing}"


def group_sheet(groups: Sequence[Record]) -> Sheet:
    """What every group consists of and what its runs cost."""
    counts = ("runs", "seeds", "folds", "cases")
    rows = [[g["group"], *(str(g[name]) for name in counts), *(_number(g[name]) for name in COST)] for g in groups]
    columns = ["group", *counts, *(name.replace("_", " ") for name in COST)]
    return Sheet("runs, and their cost (mean over runs)", columns, rows, 1, "runs and cost")


def test_sheet(metric: str, tests: Sequence[Record]) -> Sheet:
    """Tests of one metric against the baseline."""
    rows = []
    with_members = any(test["member"] for test in tests)
    for test in tests:
        interval = f"[{_number(test['ci_low'], '+')}, {_number(test['ci_high'], '+')}]"
        rows.append(
            [
                test["group"] + TUNED * test["oracle"],
                *([test["member"] or "(main)"] if with_members else []),
                test["region"] or "(case)",
                f"{_number(test['mean_difference'], '+')}\n{interval}",
                _number(test["dz"], "+"),
                f"{test['wins']}/{test['ties']}/{test['losses']}",
                str(test["n"]) + (f"\n{test['missing']} missing" if test["missing"] else ""),
                _p_text(test, "p_wilcoxon_holm"),
                _p_text(test, "p_ttest_holm"),
            ]
        )
    names = ["group", "member", "region"] if with_members else ["group", "region"]
    baseline = tests[0]["baseline"] if tests else ""
    better = tests[0]["better"] if tests else ""
    title = f"{metric} against {baseline} ({better} is better; p corrected by Holm over the {len(tests)} comparisons of this table)"
    columns = [*names, "difference\n[95 % CI]", "dz", "win/\ntie/\nloss", "pairs", "p\nWilcoxon", "p\nt-test"]
    return Sheet(title, columns, rows, len(names), f"{metric}, tests")


def _p_text(test: Record, name: str) -> str:
    if test["note"] or math.isnan(test[name]):
        return test["note"] or "-"
    return "<0.001" if test[name] < 0.001 else f"{test[name]:.3f}"


def _number(value: float, sign: str = "") -> str:
    """Three decimals below 10, two below 1,000, none above; "-" for a number that does not exist."""
    if math.isnan(value):
        return "-"
    return f"{value:{sign},.{3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def terminal_width() -> int | None:
    """Columns that tables have to fit into: those of the terminal, or COLUMNS; None where the output goes to a file or a program."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def console() -> "Console":
    """A console that folds lines in a terminal and leaves them whole elsewhere, where rich alone would take 80 columns."""
    from rich.console import Console

    return Console(width=terminal_width() or 100_000)


def markdown_cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")


def write_table(path: Path, columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
