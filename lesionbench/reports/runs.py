"""Run folders as records: finding them, reading them, which of them are the same run."""

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lesionbench.errors import SuiteError, unknown
from lesionbench.moved import current
from lesionbench.results import read_rows

DEFAULT_METRICS = ("dice", "hd95*")
COST = ("parameters", "wall_s", "peak_memory_mb", "samples_per_s")
LOWER_IS_BETTER = ("hd", "asd", "volume_difference", "ece", "brier", "loss", "qu_ftp", "qu_ftn")  # beginnings of metric names
SIMULATED = "simulated data: a stand-in, not a benchmark"
FOLD = "data.split.fold"
ABSENT = "(none)"

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
        settings: its `config.yaml`, with `experiment` and `seed` as the summary names them, and `cases`, fingerprints by stage.
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


def find_runs(runs: Path | str | Sequence[Path | str]) -> list[Path]:
    """Run folders among `runs` (see `compare`), each once: folders with `config.yaml` and the `summary.json` of a run that got to its end
    or the `environment.json` of one that was killed before.

    Raises:
        SuiteError: a path that does not exist, a pattern that matches nothing, or no run folder under it.
    """
    found: dict[Path, Path] = {}
    for item in as_list(runs):
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
    summary: dict[str, Any] = (
        _parsed(folder / "summary.json", json.loads) if (folder / "summary.json").exists() else {"status": "no summary.json"}
    )
    config = read_config(folder)
    status = str(summary.get("status"))
    table = folder / "test" / "cases.csv"
    if status == "finished" and not table.exists():
        status = "finished without test/cases.csv"
    settings: Record = {**config, **{key: summary[key] for key in ("experiment", "seed", "cases") if key in summary}}
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
        return current(yaml.load(text, _Loader))


@lru_cache(maxsize=4096)
def _block(text: str) -> Any:
    return current(yaml.load(text, _Loader))


def _parsed(path: Path, parse: Any) -> Record:
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SuiteError(f"{path}: cannot be read ({error}); mend or remove the run folder") from None
    if not isinstance(data, dict):
        raise SuiteError(f"{path}: expected a mapping, got {type(data).__name__}; mend or remove the run folder")
    return data


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, `ABSENT` where the config has no such key."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def check_keys(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Refuses dotted keys that no config has; a key may be missing in some (an option of one method).

    Raises:
        SuiteError: such a key.
    """
    for key in keys:
        if any(setting(config, key) is not ABSENT for config in configs):
            continue
        parts = key.split(".")
        for depth in range(len(parts)):  # the first part that no config has, and what there is in its place
            prefix = ".".join(parts[:depth])
            levels = [setting(config, prefix) if prefix else config for config in configs]
            known = {f"{prefix}.{name}".lstrip(".") for level in levels if isinstance(level, Mapping) for name in level}
            if ".".join(parts[: depth + 1]) not in known:
                raise unknown("config key", ".".join(parts[: depth + 1]), known)


def lower_is_better(metric: str) -> bool:
    """Whether smaller values of a metric are the better ones."""
    return metric.startswith(LOWER_IS_BETTER) or "_hd95" in metric or metric.endswith(("_fp", "_fn"))


def value_text(value: Any) -> str:
    """A value of a config as text."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)


def without_repetitions(group: str, seed: Any, runs: Sequence[Run], left_out: dict[str, str]) -> list[Run]:
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
    """Equal config, or equal config hash, which does not look at paths, logger and devices and is the name of the parent folder; and not
    known to be computed on cases with other contents."""
    name, cases = a.folder.parent.name, [run.settings["cases"] for run in (a, b) if "cases" in run.settings]
    if len(cases) == 2 and cases[0] != cases[1]:
        return False
    return a.settings == b.settings or (name == b.folder.parent.name and re.fullmatch(r"[0-9a-f]{6,64}", name) is not None)


def _tested_twice(group: str, seed: Any, a: Run, b: Run) -> SuiteError:
    first, second = (flat(_portable(run.settings)) for run in (a, b))
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key, ABSENT) != second.get(key, ABSENT))
    return SuiteError(
        f"group '{group}', seed {seed}: case(s) {shortened(a.cases & b.cases)} were tested by two runs with different configs:\n"
        f"{indented([a.folder, b.folder])}\nThey differ in {shortened(keys)}. Add what tells them apart to group_by, or leave one out."
    )


def _portable(settings: Record) -> Record:
    """The settings less where the run lies, which many of them repeat and which never tells two runs apart."""
    text = json.dumps(settings, default=str)
    where = settings.get("run_folder")
    return json.loads(text.replace(json.dumps(where)[1:-1], "<run folder>") if where else text)


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: settings}
    return {k: v for name, value in settings.items() for k, v in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()}


def sorted_cells(pool: dict[Cell, Values], groups: Iterable[str]) -> dict[Cell, Values]:
    """By metric in order of appearance, then in the order of `groups`, then by member and region in their order of appearance."""
    places = [list(groups), *(list(dict.fromkeys(cell[i] for cell in pool)) for i in (1, 2, 3))]
    rank = [{name: i for i, name in enumerate(names)} for names in places]
    return {cell: pool[cell] for cell in sorted(pool, key=lambda c: (rank[3][c[3]], rank[0][c[0]], rank[1][c[1]], rank[2][c[2]]))}


def runs_of(seeds: Mapping[Any, Sequence[Run]]) -> list[Run]:
    """All runs of a group."""
    return [run for runs in seeds.values() for run in runs]


def common_objective(runs: Sequence[Run]) -> str | None:
    """The validation curve that the runs optimize, if it is one and the same."""
    names = {setting(run.settings, "objective.name") for run in runs}
    name = names.pop() if len(names) == 1 else None
    return None if name == ABSENT else name


def count_replicates(seeds: Mapping[Any, Sequence[Run]]) -> tuple[int, int]:
    """Number of folds and of cases of a group."""
    runs = runs_of(seeds)
    return len({value_text(setting(run.settings, FOLD)) for run in runs}), len(set().union(*(run.cases for run in runs)))


def without_nan(values: Iterable[float]) -> np.ndarray:
    """The values that are known."""
    array = np.array(list(values), dtype=float)
    return array[~np.isnan(array)]


def mean_of_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where none is known."""
    known = without_nan(values)
    return float(known.mean()) if known.size else math.nan


def as_list(value: Any) -> list[Any]:
    """One name or path, several, or none (None), as a list."""
    return [value] if isinstance(value, (str, Path)) else list(value or ())


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """Sorted names on one line, those beyond `limit` only counted."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def indented(items: Iterable[object], limit: int = 10) -> str:
    """One item a line, those beyond `limit` only counted."""
    lines = [f"  {item}" for item in items]
    return "\n".join(lines[:limit] + ([f"  and {len(lines) - limit} more"] if len(lines) > limit else []))
