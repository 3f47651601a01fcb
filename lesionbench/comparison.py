"""Comparison of runs: reads run folders and nothing else; tables, paired tests against a baseline, files.

`compare` finds and reads the runs, groups them, pools folds, checks that all groups were tested on the same cases, and sums up.
The result is a `Comparison`, which prints (`table`) and writes (`write`) itself.
"""

import csv
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lesionbench.errors import SuiteError, unknown
from lesionbench.results import KEYS, TUNED, depends_on_oracle, is_oracle, read_rows, write_json
from lesionbench.statistics import MIN_PAIRS, bootstrap_interval, differences, holm, paired_tests

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_METRICS = ("dice", "hd95*")
COST = ("parameters", "wall_s", "peak_memory_mb", "samples_per_s")
LOWER_IS_BETTER = ("hd", "asd", "volume_difference", "ece", "brier", "loss")  # beginnings of metric names
SIMULATED = "simulated data: a stand-in, not a benchmark"
FOLD = "data.split.fold"
_ABSENT = "(none)"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Record = dict[str, Any]
Groups = dict[str, dict[Any, list["Run"]]]  # group -> seed -> runs
Values = dict[Any, dict[str, float]]  # seed -> case -> value
Cell = tuple[str, str, str, str]  # group, member, region, metric


@dataclass(eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        settings: its `config.yaml`, with `experiment` and `seed` as the summary names them.
        status: "finished", or why the run cannot be compared.
        cost: the `cost` of its summary.
        rows: test result rows; empty unless finished.
        dataset: what was measured over all test voxels as one set, {member: {region: {metric: value}}}.
    """

    folder: Path
    settings: Record
    status: str
    cost: Record
    rows: list[Record] = field(default_factory=list)
    dataset: Record = field(default_factory=dict)

    @cached_property
    def cases(self) -> set[str]:
        """Cases that the run was tested on."""
        return {row["case"] for row in self.rows}


@dataclass
class Comparison:
    """Groups of runs side by side.

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
        tests: one record per group other than the baseline, member, region and metric, see `_test`.
        groups: one record per group: `runs`, `seeds`, `folds`, `cases`, and the mean over runs of every cost in `COST`.
        folders: group -> the run folders that count.
        left_out: run folder -> why it does not count.
        notes: what the reader has to know.
        caption: stands under every table; says where the data are simulated.
        values: what every cell sums up, over all cases, seeds and folds; not written to comparison.json.
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
    values: dict[Cell, list[float]]
    objectives: dict[str, str | None]

    def table(self, width: int = 100) -> "RenderableType":
        """Tables for a terminal of `width` columns, for `rich.print`: one per metric with regions as columns, costs, tests, notes."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        for sheet in self.sheets():
            for part in sheet.split(width):
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
            blocks.append("\n".join("| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines))
            blocks += [f"*{self.caption}*"] if self.caption else []
        blocks += [_markdown(line) for line in self.remarks()]
        return "\n\n".join(blocks) + "\n"

    def write(self, out: Path | str) -> list[Path]:
        """Writes comparison.csv (one line per cell, with the costs of its group), dataset.csv (the same for what was measured over all
        test voxels), folds.csv (where there are several), comparison.md, tests.csv and comparison.json."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        costs = {g["group"]: {name: g[name] for name in COST} for g in self.groups}
        _write_table(out / "comparison.csv", _CELL_COLUMNS, [{**cell, **costs[cell["group"]], "note": self.caption} for cell in self.cells])
        _write_table(out / "dataset.csv", _DATASET_COLUMNS, [{**record, "note": self.caption} for record in self.dataset])
        _write_table(out / "tests.csv", _TEST_COLUMNS, self.tests)
        if self.folds:
            _write_table(out / "folds.csv", _FOLD_COLUMNS, [{**record, "note": self.caption} for record in self.folds])
        (out / "comparison.md").write_text(self.markdown(), encoding="utf-8")
        write_json(out / "comparison.json", {k: v for k, v in vars(self).items() if k not in ("values", "objectives")})
        names = ["comparison.csv", "dataset.csv", *(["folds.csv"] if self.folds else []), "comparison.md", "tests.csv", "comparison.json"]
        return [out / name for name in names]

    def sheets(self) -> list["Sheet"]:
        """The tables as text: one per metric, one more where it was cross-validated, one per data-set-wise metric, the groups with their costs, one of tests per metric."""
        metrics = list(dict.fromkeys(cell["metric"] for cell in self.cells))
        results = [_metric_sheet(metric, [c for c in self.cells if c["metric"] == metric]) for metric in metrics]
        tests = [_test_sheet(metric, [t for t in self.tests if t["metric"] == metric]) for metric in metrics if self.tests]
        whole = [
            _dataset_sheet(metric, [r for r in self.dataset if r["metric"] == metric])
            for metric in dict.fromkeys(r["metric"] for r in self.dataset)
        ]
        folded = [_fold_sheet(metric, self.cells, self.folds) for metric in dict.fromkeys(f["metric"] for f in self.folds)]
        return [*results, *folded, *whole, _group_sheet(self.groups), *tests]

    def remarks(self) -> list[str]:
        """Notes, and what was left out and why, a line each."""
        excluded = [f"Left out: {folder} ({why})" for folder, why in self.left_out.items()]
        return [*(f"Note: {note}" for note in self.notes), *excluded]


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
        group_by: dotted config keys; the name of a group is their values, joined by ", ".
        baseline: name of the group that every other is tested against.
        metrics: names or patterns such as `hd95*`; default `dice` and every `hd95*` there is.
        regions: region names; "" stands for values of the whole case; default all.
        members: member names; "" is the main prediction; default all.
        out: folder for the files of `Comparison.write`.

    Raises:
        SuiteError: nothing to compare; an unknown key, group, metric, region or member; a case tested twice for one group and seed by
            runs whose configs differ; groups or seeds with different test cases.
    """
    keys = _listed(group_by)
    found = [read_run(folder) for folder in find_runs(runs)]
    finished = [run for run in found if run.status == "finished"]
    left_out = {str(run.folder): run.status for run in found if run.status != "finished"}
    if not finished:
        raise SuiteError("no finished and tested run among the folders:\n" + _lines(f"{k}: {v}" for k, v in left_out.items()))
    check_keys([run.settings for run in finished], keys)
    groups = _grouped(finished, keys, left_out)
    if baseline is not None and baseline not in groups:
        raise unknown("baseline", baseline, groups)
    _check_cases(groups, left_out)
    pool, oracle = _pooled(groups)
    whole, tuned = _dataset_values(groups)
    wanted, everything = _listed(metrics), [*pool, *whole]
    _check_names(everything, wanted, regions, members)
    pool, whole = _chosen(pool, wanted or DEFAULT_METRICS, regions, members), _chosen(whole, wanted or ("*",), regions, members)
    if not pool and not whole:
        raise SuiteError(
            f"no run has any of the metrics {', '.join(wanted or DEFAULT_METRICS)} for these members and regions; "
            f"there are {', '.join(dict.fromkeys(cell[3] for cell in everything)) or 'none'}: choose with metrics=[...]"
        )
    cells = [_summed_up(cell, values, groups[cell[0]], cell in oracle) for cell, values in _ordered(pool, baseline)]
    comparison = Comparison(
        group_by=keys,
        baseline=baseline,
        cells=cells,
        dataset=[_dataset_record(cell, values, groups[cell[0]], cell in tuned) for cell, values in _ordered(whole, baseline)],
        folds=[record for cell, values in _ordered(pool, baseline) for record in _fold_records(cell, values, groups[cell[0]])],
        tests=[] if baseline is None else _tests(pool, baseline, oracle),
        groups=[_group_record(name, groups[name]) for name in sorted(groups, key=lambda g: (g != baseline, g))],
        folders={name: [str(run.folder) for run in _runs(seeds)] for name, seeds in groups.items()},
        left_out=left_out,
        notes=_notes(groups, keys),
        caption=_caption(groups),
        values={cell: _known(v for cases in values.values() for v in cases.values()).tolist() for cell, values in _ordered(pool, baseline)},
        objectives={name: _objective(_runs(seeds)) for name, seeds in groups.items()},
    )
    if out is not None:
        comparison.write(out)
    return comparison


# --- finding and reading ---------------------------------------------------------------------------------------------------------


def find_runs(runs: Path | str | Sequence[Path | str]) -> list[Path]:
    """Run folders among `runs` (see `compare`), each once: folders with `config.yaml` and the `summary.json` of a run that got to its end
    or the `environment.json` of one that was killed before.

    Raises:
        SuiteError: a path that does not exist, a pattern that matches nothing, or no run folder under it.
    """
    found: dict[Path, Path] = {}
    for item in _listed(runs):
        places = [item] if os.path.exists(item) else sorted(glob.glob(str(item), recursive=True))
        if not places:
            raise SuiteError(f"{item}: no such folder, and no folder matches it as a pattern")
        folders = [folder for place in places for folder in _walk(place)]
        if not folders:
            raise SuiteError(f"{item}: no run folder here (one holds config.yaml, summary.json and test/cases.csv)")
        found |= {folder.resolve(): folder for folder in folders if folder.resolve() not in found}
    if not found:
        raise SuiteError("no run folders to compare were given; name some, such as runs/")
    return list(found.values())


def _walk(place: Path | str) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(place):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if "config.yaml" in files and ("summary.json" in files or "environment.json" in files):
            subfolders.clear()
            yield Path(folder)


def read_run(folder: Path) -> Run:
    """Reads one run folder; result rows only where it is finished.

    Raises:
        SuiteError: a file that cannot be read; names it.
    """
    summary = _parsed(folder / "summary.json", json.loads) if (folder / "summary.json").exists() else {"status": "no summary.json"}
    config = read_config(folder)
    status = str(summary.get("status"))
    table = folder / "test" / "cases.csv"
    if status == "finished" and not table.exists():
        status = "finished without test/cases.csv"
    settings = {**config, **{key: summary[key] for key in ("experiment", "seed") if key in summary}}
    whole = folder / "test" / "dataset.json"
    run = Run(folder, settings, status, summary.get("cost") or {})
    if status == "finished":
        run.rows, run.dataset = read_rows(table), _parsed(whole, json.loads) if whole.exists() else {}
    if status == "finished" and not run.rows:
        run.status = "no case in test/cases.csv"
    return run


def read_config(folder: Path) -> Record:
    """The `config.yaml` of a run folder.

    Raises:
        SuiteError: it cannot be read.
    """
    return _parsed(folder / "config.yaml", _config)


def _config(text: str) -> Any:
    """Parses a config block by block (a top-level key with what belongs to it): the runs of a sweep share most blocks, each is read once."""
    try:
        blocks = [_block(block) for block in re.split(r"^(?=[^\s#-])", text, flags=re.MULTILINE) if block.strip()]
        return {key: value for block in blocks for key, value in (block or {}).items()}
    except (yaml.YAMLError, AttributeError):  # blocks that refer to each other, or another style of writing
        return yaml.load(text, _Loader)


@lru_cache(maxsize=4096)
def _block(text: str) -> Any:
    return yaml.load(text, _Loader)


def _parsed(path: Path, parse: Any) -> Record:
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SuiteError(f"{path}: cannot be read ({error}); mend or remove the run folder") from None
    if not isinstance(data, dict):
        raise SuiteError(f"{path}: expected a mapping, got {type(data).__name__}; mend or remove the run folder")
    return data


# --- grouping and pooling --------------------------------------------------------------------------------------------------------


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, `_ABSENT` where the config has no such key."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def check_keys(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Refuses dotted keys that no config has; a key may be missing in some (an option of one method).

    Raises:
        SuiteError: such a key.
    """
    for key in keys:
        if any(_setting(config, key) is not _ABSENT for config in configs):
            continue
        parts = key.split(".")
        for depth in range(len(parts)):  # the first part that no config has, and what there is in its place
            prefix = ".".join(parts[:depth])
            levels = [_setting(config, prefix) if prefix else config for config in configs]
            known = {f"{prefix}.{name}".lstrip(".") for level in levels if isinstance(level, Mapping) for name in level}
            if ".".join(parts[: depth + 1]) not in known:
                raise unknown("config key", ".".join(parts[: depth + 1]), known)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)


def _grouped(runs: Sequence[Run], keys: Sequence[str], left_out: dict[str, str]) -> Groups:
    groups: Groups = {}
    for run in runs:
        name = ", ".join(_text(_setting(run.settings, key)) for key in keys)
        groups.setdefault(name, {}).setdefault(run.settings.get("seed"), []).append(run)
    return {name: {seed: _unique(name, seed, same, left_out) for seed, same in seeds.items()} for name, seeds in groups.items()}


def _unique(group: str, seed: Any, runs: Sequence[Run], left_out: dict[str, str]) -> list[Run]:
    """The runs of one group and seed, less repetitions of the same command, of which the newest counts."""
    kept: list[Run] = []
    for run in sorted(runs, key=_age):
        for older in [other for other in kept if other.cases & run.cases]:
            if not _same_config(older, run):
                raise _tested_twice(group, seed, older, run)
            kept.remove(older)
            left_out[str(older.folder)] = f"repeated by {run.folder}, which is newer"
        kept.append(run)
    return kept


def _age(run: Run) -> tuple[int, int]:
    """Sorts older runs first: by the time of the summary, then by the number that a repetition gets (`seed=0`, `seed=0-2`)."""
    repetition = re.search(r"-(\d+)$", run.folder.name)
    return (run.folder / "summary.json").stat().st_mtime_ns, int(repetition[1]) if repetition else 1


def _same_config(a: Run, b: Run) -> bool:
    """Equal config, or equal config hash, which does not look at paths, logger and devices and is the name of the parent folder."""
    name = a.folder.parent.name
    return a.settings == b.settings or (name == b.folder.parent.name and re.fullmatch(r"[0-9a-f]{6,64}", name) is not None)


def _tested_twice(group: str, seed: Any, a: Run, b: Run) -> SuiteError:
    first, second = (_flat(_portable(run.settings)) for run in (a, b))
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key, _ABSENT) != second.get(key, _ABSENT))
    return SuiteError(
        f"group '{group}', seed {seed}: case(s) {_few(a.cases & b.cases)} were tested by two runs with different configs:\n"
        f"{_lines([a.folder, b.folder])}\nThey differ in {_few(keys)}. Add what tells them apart to group_by, or leave one out."
    )


def _portable(settings: Record) -> Record:
    """The settings less where the run lies, which many of them repeat and which never tells two runs apart."""
    text = json.dumps(settings, default=str)
    where = settings.get("run_folder")
    return json.loads(text.replace(json.dumps(where)[1:-1], "<run folder>") if where else text)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: settings}
    return {k: v for name, value in settings.items() for k, v in _flat(value, f"{prefix}.{name}" if prefix else str(name)).items()}


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
    lines = [f"'{g}', seed {', '.join(seeds)}: lacks {len(m)} of {len(everything)}: {_few(m)}" for (g, m), seeds in lacking.items()]
    unfinished = f"\nLeft out were:\n{_lines(f'{k} ({v})' for k, v in left_out.items())}" if left_out else ""
    raise SuiteError(
        "the groups were not tested on the same cases, which makes them incomparable:\n"
        f"{_lines(lines)}\nRun the missing folds, or leave the incomplete groups or seeds out.{unfinished}"
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
    """The cells of the wanted metrics, regions and members; in their order of appearance."""
    return {
        cell: values
        for cell, values in pool.items()
        if (members is None or cell[1] in members)
        and (regions is None or cell[2] in regions)
        and any(fnmatchcase(cell[3], pattern) for pattern in metrics)
    }


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


def _ordered(pool: dict[Cell, Values], baseline: str | None) -> list[tuple[Cell, Values]]:
    """By metric, baseline first, group, then member and region in their order of appearance."""
    places = [list(dict.fromkeys(cell[i] for cell in pool)) for i in range(4)]
    rank = [{name: i for i, name in enumerate(names)} for names in places]
    return sorted(pool.items(), key=lambda c: (rank[3][c[0][3]], c[0][0] != baseline, c[0][0], rank[1][c[0][1]], rank[2][c[0][2]]))


# --- summing up ------------------------------------------------------------------------------------------------------------------


def _runs(seeds: Mapping[Any, Sequence[Run]]) -> list[Run]:
    return [run for runs in seeds.values() for run in runs]


def _objective(runs: Sequence[Run]) -> str | None:
    """The validation curve that the runs optimize, if it is one and the same."""
    names = {_setting(run.settings, "objective.name") for run in runs}
    name = names.pop() if len(names) == 1 else None
    return None if name == _ABSENT else name


def _replicates(seeds: Mapping[Any, Sequence[Run]]) -> tuple[int, int]:
    """Number of folds and of cases of a group."""
    runs = _runs(seeds)
    return len({_text(_setting(run.settings, FOLD)) for run in runs}), len(set().union(*(run.cases for run in runs)))


def _known(values: Iterable[float]) -> np.ndarray:
    array = np.array(list(values), dtype=float)
    return array[~np.isnan(array)]


def _mean(values: Iterable[float]) -> float:
    known = _known(values)
    return float(known.mean()) if known.size else math.nan


_CELL_COLUMNS = ("group", "member", "region", "metric", "mean", "std", "median", "q25", "q75", "n_seeds", "n_folds", "n_cases", "missing")
_CELL_COLUMNS += ("std_cases", "oracle", *COST, "note")


def _summed_up(cell: Cell, values: Values, seeds: Mapping[Any, Sequence[Run]], oracle: bool) -> Record:
    per_seed = _known(_mean(cases.values()) for cases in values.values())
    pooled = _known(value for cases in values.values() for value in cases.values())
    median, q25, q75 = np.percentile(pooled, [50, 25, 75]).tolist() if pooled.size else [math.nan] * 3
    folds, n_cases = _replicates(seeds)
    return {
        **dict(zip(_CELL_COLUMNS, cell, strict=False)),
        "mean": _mean(per_seed),
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
        cases.setdefault(_text(_setting(run.settings, FOLD)), {}).setdefault(seed, set()).update(run.cases)
    if len(cases) < 2:
        return []
    records = []
    for fold, tested in sorted(cases.items(), key=lambda item: (len(item[0]), item[0])):
        per_seed = [_mean(values[seed].get(case, math.nan) for case in sorted(own)) for seed, own in tested.items() if seed in values]
        n_cases = len(set().union(*tested.values()))
        records.append(dict(zip(_FOLD_COLUMNS, (*cell, fold, _mean(per_seed), n_cases), strict=False)))
    return records


_DATASET_COLUMNS = ("group", "member", "region", "metric", "mean", "std", "n_seeds", "n_folds", "oracle", "note")


def _dataset_record(cell: Cell, values: Values, seeds: Mapping[Any, Sequence[Run]], oracle: bool) -> Record:
    per_seed = _known(_mean(runs.values()) for runs in values.values())
    std = float(per_seed.std(ddof=1)) if per_seed.size > 1 else math.nan
    folds, _ = _replicates(seeds)
    return dict(zip(_DATASET_COLUMNS, (*cell, _mean(per_seed), std, len(values), folds, oracle), strict=False))


def _group_record(name: str, seeds: Mapping[Any, Sequence[Run]]) -> Record:
    runs = _runs(seeds)
    folds, cases = _replicates(seeds)
    costs = {key: _mean(run.cost[key] for run in runs if run.cost.get(key) is not None) for key in COST}
    return {"group": name, "runs": len(runs), "seeds": len(seeds), "folds": folds, "cases": cases, **costs}


def _data(seeds: Mapping[Any, Sequence[Run]]) -> frozenset[str]:
    """What the configs of a group call their data."""
    return frozenset(_text(_setting(run.settings, f"data.{key}")) for run in _runs(seeds) for key in ("name", "_target_"))


def _caption(groups: Groups) -> str:
    return SIMULATED if any("simulated" in text.lower() for seeds in groups.values() for text in _data(seeds)) else ""


def _notes(groups: Groups, keys: Sequence[str]) -> list[str]:
    absent = [key for key in keys if any(_setting(run.settings, key) is _ABSENT for seeds in groups.values() for run in _runs(seeds))]
    notes = [f"some configs have no key {key}; its value stands as {_ABSENT}" for key in absent]
    if len({_data(seeds) for seeds in groups.values()}) > 1:
        notes.append("the groups differ in data.name or data._target_; their cases are taken to be the same because their names are")
    return notes


# --- tests -----------------------------------------------------------------------------------------------------------------------

_TEST_COLUMNS = ("metric", "group", "baseline", "member", "region", "n", "missing", "mean_difference", "ci_low", "ci_high", "dz", "better")
_TEST_COLUMNS += ("wins", "ties", "losses", "p_wilcoxon", "p_wilcoxon_holm", "p_ttest", "p_ttest_holm", "note", "oracle")


def _tests(pool: dict[Cell, Values], baseline: str, oracle: set[Cell]) -> list[Record]:
    """Every group against the baseline. Holm's correction takes all comparisons of one metric (all groups, members, regions) as a family,
    for each of the two tests."""
    tests = []
    for cell, values in _ordered(pool, baseline):
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
    lower = metric.startswith(LOWER_IS_BETTER)
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
        means[place] = _mean(table[place])
    return dict(zip(cases, means.tolist(), strict=True))


# --- text ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """A table as text. The first `fixed` columns name a row; the columns after them may move to a further table where space is short."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    fixed: int

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


def _metric_sheet(metric: str, cells: Sequence[Record]) -> Sheet:
    return _sheet(f"{metric}: mean ± std over seeds, median [quartiles] over all cases", cells, _cell_text)


def _fold_sheet(metric: str, cells: Sequence[Record], folds: Sequence[Record]) -> Sheet:
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
    return Sheet(f"{metric} in cross-validation: statistics over the cases of all folds, means of folds", columns, body, len(names) + 1)


def _dataset_sheet(metric: str, records: Sequence[Record]) -> Sheet:
    folds = ", of the mean over folds" if any(r["n_folds"] > 1 for r in records) else ""
    return _sheet(f"{metric} over all test voxels as one set: mean ± std over seeds{folds}", records, _mean_text)


def _sheet(title: str, cells: Sequence[Record], text: Callable[[Record], str]) -> Sheet:
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
    return Sheet(title, [*names, *(region or "(case)" for region in regions)], body, len(names))


def _mean_text(cell: Record) -> str:
    return _number(cell["mean"]) + ("" if math.isnan(cell["std"]) else f" ± {_number(cell['std'])}")


def _cell_text(cell: Record) -> str:
    missing = f"\n{cell['missing']} missing" if cell["missing"] else ""
    return f"{_mean_text(cell)}\n{_number(cell['median'])} [{_number(cell['q25'])}, {_number(cell['q75'])}]{missing}"


def _group_sheet(groups: Sequence[Record]) -> Sheet:
    counts = ("runs", "seeds", "folds", "cases")
    rows = [[g["group"], *(str(g[name]) for name in counts), *(_number(g[name]) for name in COST)] for g in groups]
    return Sheet("runs, and their cost (mean over runs)", ["group", *counts, *(name.replace("_", " ") for name in COST)], rows, 1)


def _test_sheet(metric: str, tests: Sequence[Record]) -> Sheet:
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
    return Sheet(title, columns, rows, len(names))


def _p_text(test: Record, name: str) -> str:
    if test["note"] or math.isnan(test[name]):
        return test["note"] or "-"
    return "<0.001" if test[name] < 0.001 else f"{test[name]:.3f}"


def _number(value: float, sign: str = "") -> str:
    """Three decimals below 10, two below 1,000, none above; "-" for a number that does not exist."""
    if math.isnan(value):
        return "-"
    return f"{value:{sign},.{3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Path)) else list(value or ())


def _few(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _lines(items: Iterable[object], limit: int = 10) -> str:
    items = [f"  {item}" for item in items]
    return "\n".join(items[:limit] + ([f"  and {len(items) - limit} more"] if len(items) > limit else []))


def _write_table(path: Path, columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
