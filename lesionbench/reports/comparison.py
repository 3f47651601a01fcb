"""Comparison of runs: reads run folders and nothing else; tables, paired tests against a baseline, files.

`compare` finds and reads the runs, groups them, pools folds, checks that all groups were tested on the same cases, and sums up.
The result is a `Comparison`, which prints (`table`) and writes (`write`) itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionbench.errors import SuiteError, unknown
from lesionbench.reports.group_names import GroupName, group_names
from lesionbench.reports.paired import TEST_COLUMNS, tests_against
from lesionbench.reports.runs import (
    ABSENT,
    COST,
    DEFAULT_METRICS,
    FOLD,
    SIMULATED,
    Cell,
    Groups,
    Record,
    Run,
    Values,
    as_list,
    check_keys,
    common_objective,
    count_replicates,
    find_runs,
    indented,
    lower_is_better,
    mean_of_known,
    read_run,
    runs_of,
    setting,
    shortened,
    sorted_cells,
    value_text,
    without_nan,
    without_repetitions,
)
from lesionbench.reports.sheets import (
    Sheet,
    dataset_sheet,
    fold_sheet,
    group_sheet,
    markdown_cell,
    metric_sheet,
    test_sheet,
    write_table,
)
from lesionbench.results import KEYS, depends_on_oracle, is_oracle, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass
class Comparison:
    """Groups of runs side by side, best first (see `order`) in all that follows.

    Attributes:
        group_by: the config keys whose values name the groups.
        baseline: the group that the others are tested against; None = no tests.
        cells: one record per group, member, region and metric: `mean`, `std` (over seeds, of the per-seed means over cases; NaN for one
            seed), `std_cases`, `median`, `q25`, `q75` (of all values of all seeds and folds), `n_seeds`, `n_folds`, `n_cases`, `missing` (values that
            are NaN or absent), `oracle` (a threshold was chosen on test labels).
        dataset: what was measured over all test voxels as one set: one record per group, member, region and metric, with `mean` and `std`
            over seeds (of the mean over a seed's folds), `n_seeds`, `n_folds` and `oracle`.
        folds: one record per group of several folds, member, region, metric and fold: `mean` over the cases of the fold (then over seeds)
            and `n_cases`.
        tests: one record per group other than the baseline, member, region and metric, see `lesionbench.reports.paired`.
        groups: one record per group: `runs`, `seeds`, `folds`, `cases`, and the mean over runs of every cost in `COST`.
        folders: group -> the run folders that count.
        left_out: run folder -> why it does not count.
        notes: what the reader has to know.
        caption: stands under every table; says where the data are simulated.
        order: how the groups are ordered, a sentence; "" for one group.
        values: what every cell sums up, seed -> case -> value (NaN where there is none); not written to comparison.json.
        objectives: group -> name of the validation curve that its runs optimize, or None; not written to comparison.json.
    """

    group_by: list[str]
    baseline: str | None
    cells: list[Record]
    dataset: list[Record]
    folds: list[Record]
    tests: list[Record]
    groups: list[Record]
    folders: dict[str, list[str]]
    left_out: dict[str, str]
    notes: list[str]
    caption: str
    order: str
    values: dict[Cell, Values]
    objectives: dict[str, str | None]

    def table(self, width: int | None = 100) -> "RenderableType":
        """Tables for a terminal of `width` columns (None: as wide as they are), for `rich.print`: one per metric with regions as columns,
        costs, tests, notes."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        for sheet in self.sheets():
            for part in [sheet] if width is None else sheet.split(width):
                table = Table(show_lines=True)
                for place, name in enumerate(part.columns):
                    table.add_column(Text(name), no_wrap=place >= part.fixed, overflow="fold", justify="left")
                for row in part.rows:
                    table.add_row(*(Text(cell) for cell in row))
                parts += [Text(part.title, style="bold"), table, Text(f"{self.caption}\n")]
        return Group(*parts, *(Text(line) for line in self.remarks()))

    def markdown(self) -> str:
        """The same tables and remarks as Markdown."""
        blocks = ["# Comparison by " + ", ".join(self.group_by)]
        for sheet in self.sheets():
            lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
            blocks.append(f"## {sheet.title}")
            blocks.append("\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines))
            blocks += [f"*{self.caption}*"] if self.caption else []
        blocks += [markdown_cell(line) for line in self.remarks()]
        return "\n\n".join(blocks) + "\n"

    def write(self, out: Path | str) -> list[Path]:
        """Writes comparison.csv (one line per cell, with the costs of its group), dataset.csv (the same for what was measured over all
        test voxels), folds.csv (where there are several), comparison.md, tests.csv and comparison.json."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        costs = {g["group"]: {name: g[name] for name in COST} for g in self.groups}
        write_table(out / "comparison.csv", _CELL_COLUMNS, [{**cell, **costs[cell["group"]], "note": self.caption} for cell in self.cells])
        write_table(out / "dataset.csv", _DATASET_COLUMNS, [{**record, "note": self.caption} for record in self.dataset])
        write_table(out / "tests.csv", TEST_COLUMNS, self.tests)
        if self.folds:
            write_table(out / "folds.csv", _FOLD_COLUMNS, [{**record, "note": self.caption} for record in self.folds])
        (out / "comparison.md").write_text(self.markdown(), encoding="utf-8")
        write_json(out / "comparison.json", {k: v for k, v in vars(self).items() if k not in ("values", "objectives")})
        names = ["comparison.csv", "dataset.csv", *(["folds.csv"] if self.folds else []), "comparison.md", "tests.csv", "comparison.json"]
        return [out / name for name in names]

    def sheets(self) -> list["Sheet"]:
        """The tables as text: one per metric, one more where it was cross-validated, one per data-set-wise metric, the groups with their costs, one of tests per metric."""
        metrics = list(dict.fromkeys(cell["metric"] for cell in self.cells))
        results = [metric_sheet(metric, [c for c in self.cells if c["metric"] == metric]) for metric in metrics]
        tests = [test_sheet(metric, [t for t in self.tests if t["metric"] == metric]) for metric in metrics if self.tests]
        whole = [
            dataset_sheet(metric, [r for r in self.dataset if r["metric"] == metric])
            for metric in dict.fromkeys(r["metric"] for r in self.dataset)
        ]
        folded = [fold_sheet(metric, self.cells, self.folds) for metric in dict.fromkeys(f["metric"] for f in self.folds)]
        return [*results, *folded, *whole, group_sheet(self.groups), *tests]

    def remarks(self) -> list[str]:
        """How the groups are ordered, notes, and what was left out and why, a line each."""
        excluded = [f"Left out: {folder} ({why})" for folder, why in self.left_out.items()]
        return [*([self.order] if self.order else []), *(f"Note: {note}" for note in self.notes), *excluded]


@np.errstate(invalid="ignore")  # an infinite value, a distance where nothing was found, leaves no deviation
def compare(
    runs: Path | str | Sequence[Path | str],
    group_by: str | Sequence[str] = ("experiment",),
    baseline: str | None = None,
    metrics: str | Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    members: Sequence[str] | None = None,
    out: Path | str | None = None,
) -> Comparison:
    """Compares groups of runs on the test cases that they share.

    Seeds and folds are replicates inside a group. Folds are pooled first: the cases of all folds of a group and seed stand together.
    Then every group and seed must have been tested on the same cases. Runs that are not finished or not tested are left out and listed.

    Args:
        runs: run folders, folders that hold some at any depth, or glob patterns.
        group_by: dotted config keys; the name of a group is what sets their values on the command line, see `group_names`.
        baseline: the group that every other is tested against: its name, or the bare values in it (`dice_ce` for `model/loss=dice_ce`).
        metrics: names or patterns such as `hd95*`, the main metric first; default `dice` and every `hd95*` there is.
        regions: region names; "" stands for values of the whole case; default all.
        members: member names; "" is the main prediction; default all.
        out: folder for the files of `Comparison.write`.

    Raises:
        SuiteError: nothing to compare; an unknown key, group, metric, region or member; a case tested twice for one group and seed by
            runs whose configs differ; groups or seeds with different test cases.
    """
    keys = as_list(group_by)
    found = [read_run(folder) for folder in find_runs(runs)]
    finished = [run for run in found if run.status == "finished"]
    left_out = {str(run.folder): run.status for run in found if run.status != "finished"}
    if not finished:
        raise SuiteError("no finished and tested run among the folders:\n" + indented(f"{k}: {v}" for k, v in left_out.items()))
    check_keys([run.settings for run in finished], keys)
    named = group_names([run.settings for run in finished], keys)
    groups = _grouped(finished, [name.text for name in named], left_out)
    if baseline is not None:
        baseline = _named(baseline, named)
    _check_cases(groups, left_out)
    pool, oracle = _pooled(groups)
    whole, tuned = _dataset_values(groups)
    wanted, everything = as_list(metrics), [*pool, *whole]
    _check_names(everything, wanted, regions, members)
    pool, whole = _chosen(pool, wanted or DEFAULT_METRICS, regions, members), _chosen(whole, wanted or ("*",), regions, members)
    if not pool and not whole:
        raise SuiteError(
            f"no run has any of the metrics {', '.join(wanted or DEFAULT_METRICS)} for these members and regions; "
            f"there are {', '.join(dict.fromkeys(cell[3] for cell in everything)) or 'none'}: choose with metrics=[...]"
        )
    scores = _scores(pool or whole, groups)
    main = next(iter(pool or whole))[3]
    groups = {name: groups[name] for name in sorted(groups, key=lambda name: _rank(name, scores[name], lower_is_better(main)))}
    pool, whole = sorted_cells(pool, groups), sorted_cells(whole, groups)
    comparison = Comparison(
        group_by=keys,
        baseline=baseline,
        cells=[_summed_up(cell, values, groups[cell[0]], cell in oracle) for cell, values in pool.items()],
        dataset=[_dataset_record(cell, values, groups[cell[0]], cell in tuned) for cell, values in whole.items()],
        folds=[record for cell, values in pool.items() for record in _fold_records(cell, values, groups[cell[0]])],
        tests=[] if baseline is None else tests_against(pool, baseline, oracle),
        groups=[_group_record(name, seeds) for name, seeds in groups.items()],
        folders={name: [str(run.folder) for run in runs_of(seeds)] for name, seeds in groups.items()},
        left_out=left_out,
        notes=_notes(groups, keys),
        caption=_caption(groups),
        order=_order(main) if len(groups) > 1 else "",
        values=pool,
        objectives={name: common_objective(runs_of(seeds)) for name, seeds in groups.items()},
    )
    if out is not None:
        comparison.write(out)
    return comparison


# --- grouping and pooling --------------------------------------------------------------------------------------------------------


def _grouped(runs: Sequence[Run], names: Sequence[str], left_out: dict[str, str]) -> Groups:
    """The runs by the name of their group, then by seed."""
    groups: Groups = {}
    for run, name in zip(runs, names, strict=True):
        groups.setdefault(name, {}).setdefault(run.settings.get("seed"), []).append(run)
    return {name: {seed: without_repetitions(name, seed, same, left_out) for seed, same in seeds.items()} for name, seeds in groups.items()}


def _named(wanted: str, names: Sequence[GroupName]) -> str:
    """The one group that is called `wanted`, by its name or else by its values alone.

    Raises:
        SuiteError: there is none, or several have these values.
    """
    known = dict.fromkeys(name.text for name in names)
    found = [wanted] if wanted in known else list(dict.fromkeys(name.text for name in names if wanted in name.values))
    if len(found) != 1:
        raise unknown("baseline", wanted, known)
    return found[0]


def _check_cases(groups: Groups, left_out: Mapping[str, str]) -> None:
    """Every group and seed must have been tested on all cases that any of them was tested on."""
    tested = {(g, seed): set().union(*(run.cases for run in runs)) for g, seeds in groups.items() for seed, runs in seeds.items()}
    everything = set().union(*tested.values())
    lacking: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (group, seed), cases in tested.items():
        if cases != everything:
            lacking.setdefault((group, frozenset(everything - cases)), []).append(str(seed))
    if not lacking:
        return
    lines = [f"'{g}', seed {', '.join(seeds)}: lacks {len(m)} of {len(everything)}: {shortened(m)}" for (g, m), seeds in lacking.items()]
    unfinished = f"\nLeft out were:\n{indented(f'{k} ({v})' for k, v in left_out.items())}" if left_out else ""
    raise SuiteError(
        "the groups were not tested on the same cases, which makes them incomparable:\n"
        f"{indented(lines)}\nRun the missing folds, or leave the incomplete groups or seeds out.{unfinished}"
    )


def _pooled(groups: Groups) -> tuple[dict[Cell, Values], set[Cell]]:
    """Values of every cell, with the folds of a seed together, and the cells whose threshold was chosen on the test labels."""
    pool: dict[Cell, Values] = {}
    oracle: set[Cell] = set()
    for group, seeds in groups.items():
        for seed, run in ((seed, run) for seed, runs in seeds.items() for run in runs):
            for row in run.rows:
                case, place, tuned = row["case"], (group, row["member"], row["region"]), is_oracle(row)
                for metric, value in row.items():
                    if metric in KEYS or metric == "oracle" or isinstance(value, str):
                        continue
                    values = pool.setdefault((*place, metric), {}).setdefault(seed, {})
                    if case in values:
                        raise SuiteError(
                            f"{run.folder / 'test' / 'cases.csv'}: case {case} has two rows for member '{place[1]}', region '{place[2]}'"
                        )
                    values[case] = float(value)
                    if depends_on_oracle(metric, tuned):
                        oracle.add((*place, metric))
    return pool, oracle


def _dataset_values(groups: Groups) -> tuple[dict[Cell, Values], set[Cell]]:
    """What was measured over all test voxels as one set: seed -> run folder -> value of every cell, and the cells that are test-tuned."""
    whole: dict[Cell, Values] = {}
    tuned: set[Cell] = set()
    for group, seeds in groups.items():
        for seed, run in ((seed, run) for seed, runs in seeds.items() for run in runs):
            for member, region, found in ((m, r, f) for m, regions in run.dataset.items() for r, f in regions.items()):
                for metric, value in found.items():
                    if metric != "oracle":
                        cell = (group, member, region, metric)
                        whole.setdefault(cell, {}).setdefault(seed, {})[str(run.folder)] = math.nan if value is None else float(value)
                        if depends_on_oracle(metric, is_oracle(found)):
                            tuned.add(cell)
    return whole, tuned


def _chosen(
    pool: dict[Cell, Values], metrics: Sequence[str], regions: Sequence[str] | None, members: Sequence[str] | None
) -> dict[Cell, Values]:
    """The cells of the wanted metrics, in the order of these; within a metric of the wanted regions and members, in their order of appearance."""
    names = dict.fromkeys(cell[3] for cell in pool)
    rank = {name: i for i, name in enumerate(dict.fromkeys(n for pattern in metrics for n in names if fnmatchcase(n, pattern)))}
    chosen = [
        cell for cell in pool if cell[3] in rank and (members is None or cell[1] in members) and (regions is None or cell[2] in regions)
    ]
    return {cell: pool[cell] for cell in sorted(chosen, key=lambda cell: rank[cell[3]])}


def _check_names(cells: Iterable[Cell], metrics: Sequence[str], regions: Sequence[str] | None, members: Sequence[str] | None) -> None:
    """Refuses members, regions and metrics that no cell has."""
    known = {kind: list(dict.fromkeys(cell[place] for cell in cells)) for place, kind in enumerate(("group", "member", "region", "metric"))}
    for kind, wanted in (("member", members), ("region", regions)):
        for name in wanted or ():
            if name not in known[kind]:
                raise unknown(kind, name, known[kind])
    for pattern in metrics:
        if not any(fnmatchcase(name, pattern) for name in known["metric"]):
            raise unknown("metric", pattern, known["metric"])


# --- order -----------------------------------------------------------------------------------------------------------------------


def _scores(pool: dict[Cell, Values], groups: Iterable[str]) -> dict[str, float]:
    """Group -> its mean over seeds and regions of the first metric in `pool`, of the main prediction where it has one; NaN where it has none."""
    main = next(iter(pool))[3]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in groups}
    for (group, member, _, metric), values in pool.items():
        if metric == main:
            found[group].setdefault(member, []).append(_mean(values))
    return {name: mean_of_known(members.get("", [m for means in members.values() for m in means])) for name, members in found.items()}


def _rank(name: str, score: float, lower: bool) -> tuple[bool, float, str]:
    return math.isnan(score), score if lower else -score, name


def _order(metric: str) -> str:
    return f"Groups stand best first, by their mean {metric} over regions ({'lower' if lower_is_better(metric) else 'higher'} is better)."


# --- summing up ------------------------------------------------------------------------------------------------------------------


_CELL_COLUMNS: tuple[str, ...] = ("group", "member", "region", "metric", "mean", "std", "median", "q25", "q75", "n_seeds", "n_folds")
_CELL_COLUMNS += ("n_cases", "missing", "std_cases", "oracle", *COST, "note")


def _mean(values: Values) -> float:
    """Over seeds, of each seed's mean over cases."""
    return mean_of_known(mean_of_known(cases.values()) for cases in values.values())


def _summed_up(cell: Cell, values: Values, seeds: Mapping[Any, Sequence[Run]], oracle: bool) -> Record:
    per_seed = without_nan(mean_of_known(cases.values()) for cases in values.values())
    pooled = without_nan(value for cases in values.values() for value in cases.values())
    median, q25, q75 = np.percentile(pooled, [50, 25, 75]).tolist() if pooled.size else [math.nan] * 3
    folds, n_cases = count_replicates(seeds)
    return {
        **dict(zip(_CELL_COLUMNS, cell, strict=False)),
        "mean": mean_of_known(per_seed),
        "std": float(per_seed.std(ddof=1)) if per_seed.size > 1 else math.nan,
        "median": median,
        "q25": q25,
        "q75": q75,
        "n_seeds": len(values),
        "n_folds": folds,
        "n_cases": n_cases,
        "missing": len(values) * n_cases - int(pooled.size),
        "std_cases": float(pooled.std(ddof=1)) if pooled.size > 1 else math.nan,
        "oracle": oracle,
    }


_FOLD_COLUMNS = ("group", "member", "region", "metric", "fold", "mean", "n_cases", "note")


def _fold_records(cell: Cell, values: Values, seeds: Mapping[Any, Sequence[Run]]) -> list[Record]:
    """The mean of every fold; nothing for a group of one fold."""
    cases: dict[str, dict[Any, set[str]]] = {}
    for seed, run in ((seed, run) for seed, runs in seeds.items() for run in runs):
        cases.setdefault(value_text(setting(run.settings, FOLD)), {}).setdefault(seed, set()).update(run.cases)
    if len(cases) < 2:
        return []
    records = []
    for fold, tested in sorted(cases.items(), key=lambda item: (len(item[0]), item[0])):
        per_seed = [
            mean_of_known(values[seed].get(case, math.nan) for case in sorted(own)) for seed, own in tested.items() if seed in values
        ]
        n_cases = len(set().union(*tested.values()))
        records.append(dict(zip(_FOLD_COLUMNS, (*cell, fold, mean_of_known(per_seed), n_cases), strict=False)))
    return records


_DATASET_COLUMNS = ("group", "member", "region", "metric", "mean", "std", "n_seeds", "n_folds", "oracle", "note")


def _dataset_record(cell: Cell, values: Values, seeds: Mapping[Any, Sequence[Run]], oracle: bool) -> Record:
    per_seed = without_nan(mean_of_known(runs.values()) for runs in values.values())
    std = float(per_seed.std(ddof=1)) if per_seed.size > 1 else math.nan
    folds, _ = count_replicates(seeds)
    return dict(zip(_DATASET_COLUMNS, (*cell, mean_of_known(per_seed), std, len(values), folds, oracle), strict=False))


def _group_record(name: str, seeds: Mapping[Any, Sequence[Run]]) -> Record:
    runs = runs_of(seeds)
    folds, cases = count_replicates(seeds)
    costs = {key: mean_of_known(run.cost[key] for run in runs if run.cost.get(key) is not None) for key in COST}
    return {"group": name, "runs": len(runs), "seeds": len(seeds), "folds": folds, "cases": cases, **costs}


def _data(seeds: Mapping[Any, Sequence[Run]]) -> frozenset[str]:
    """What the configs of a group call their data."""
    return frozenset(value_text(setting(run.settings, f"data.{key}")) for run in runs_of(seeds) for key in ("name", "_target_"))


def _caption(groups: Groups) -> str:
    return SIMULATED if any("simulated" in text.lower() for seeds in groups.values() for text in _data(seeds)) else ""


def _notes(groups: Groups, keys: Sequence[str]) -> list[str]:
    absent = [key for key in keys if any(setting(run.settings, key) is ABSENT for seeds in groups.values() for run in runs_of(seeds))]
    notes = [f"some configs have no key {key}; the names of their groups leave it out" for key in absent]
    if len({_data(seeds) for seeds in groups.values()}) > 1:
        notes.append("the groups differ in data.name or data._target_; their cases are taken to be the same because their names are")
    return notes
