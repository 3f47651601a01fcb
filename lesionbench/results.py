"""Result rows: how they are summed up, written and read. A row is a flat mapping with `case, patient, site, member, region` and metrics.

`member` is "" for the main prediction, `region` is "" for values of the whole case. A row with `oracle` holds masks from a threshold that
was chosen on the truth of this very case.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from lesionbench.errors import SuiteError
from lesionbench.written import whole

KEYS = ("case", "patient", "site", "member", "region")

TUNED = " (test-tuned)"  # stands in every table beside a number whose threshold was chosen on the cases that it was measured on
_WITHOUT_THRESHOLD = ("auroc", "brain_auroc", "ap", "auprc", "ece", "brier")

Row = dict[str, Any]
Summary = dict[str, dict[str, dict[str, dict[str, float | int | None]]]]


def depends_on_oracle(metric: str, oracle: bool = False) -> bool:
    """Whether a metric's value depends on a threshold that was chosen on the truth it is measured against: all that end in `_best` do,
    and in a row marked `oracle` all that have a threshold."""
    return metric.endswith("_best") or (oracle and metric not in _WITHOUT_THRESHOLD)


def is_oracle(row: Mapping[str, Any]) -> bool:
    """Whether a row is marked `oracle`, read back from a file or not."""
    return str(row.get("oracle", "")).lower() in ("1", "1.0", "true")


def summarize(rows: Iterable[Mapping[str, Any]], bootstrap: int = 1000, seed: int = 0) -> Summary:
    """Statistics over cases: `{member: {region: {metric: {mean, std, median, q25, q75, ci_low, ci_high, n, missing}}}}`.

    NaN and None are left out and counted in `missing`; `n` counts what is left. `std` has ddof 1. `ci_low` and `ci_high` bound the 95 %
    percentile-bootstrap interval of the mean. A number that does not exist (`std` of one case, everything of none) is None, so that the
    summary is valid JSON. The order of the rows does not matter; columns that hold text are left out. Statistics of a metric that is
    `depends_on_oracle` in any row say so by `oracle: true`.

    Args:
        rows: at most one row per case, member and region.
        bootstrap: number of resamples.
        seed: of the resamples.
    """
    columns: dict[str, dict[str, dict[str, list[float]]]] = {}
    tuned = set()
    for row in rows:
        member, region = row.get("member", ""), row.get("region", "")
        metrics = columns.setdefault(member, {}).setdefault(region, {})
        for name, value in row.items():
            if name not in (*KEYS, "oracle") and not isinstance(value, str):
                metrics.setdefault(name, []).append(math.nan if value is None else float(value))
                if depends_on_oracle(name, is_oracle(row)):
                    tuned.add((member, region, name))

    def statistics(values: list[float], place: tuple[str, str, str]) -> dict[str, Any]:
        return {**_statistics(np.array(values), bootstrap, seed), **({"oracle": True} if place in tuned else {})}

    return {
        member: {
            region: {name: statistics(values, (member, region, name)) for name, values in metrics.items()}
            for region, metrics in regions.items()
        }
        for member, regions in columns.items()
    }


def _statistics(values: np.ndarray, bootstrap: int, seed: int) -> dict[str, float | int | None]:
    from lesionbench.keyed import numpy_generator  # brings torch, which reading and writing rows do without

    known = np.sort(values[~np.isnan(values)])  # sorted: the same resamples whatever the order of the rows
    names = ("mean", "std", "median", "q25", "q75", "ci_low", "ci_high")
    numbers: Sequence[float | None] = (None,) * len(names)
    if known.size:
        picks = numpy_generator("bootstrap", seed, known.size).integers(known.size, size=(bootstrap, known.size))
        with np.errstate(invalid="ignore"):  # an infinite value leaves no std, nor a quantile between two of them
            std = known.std(ddof=1) if known.size > 1 else None
            numbers = (known.mean(), std, *np.percentile(known, [50, 25, 75]), *np.percentile(known[picks].mean(axis=1), [2.5, 97.5]))
    statistics = {name: None if x is None or np.isnan(x) else float(x) for name, x in zip(names, numbers, strict=True)}
    return {**statistics, "n": int(known.size), "missing": int(values.size - known.size)}


def pool_slices(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Overlap pooled over cases, from the counts that the metric `slices` leaves in result rows: one row per member, region and stratum.

    Returns:
        `{"member", "region", "stratum", "slices", "dice", "jaccard", "sensitivity", "precision"}`; 0/0 is NaN. Empty without such counts.
    """
    totals: dict[tuple[str, str, str], dict[str, int]] = {}
    for row in rows:
        for name, value in row.items():
            prefix, _, count = name.rpartition("_")
            if prefix.startswith("slices_") and count in ("n", "hit", "predicted", "true"):
                sums = totals.setdefault((row.get("member", ""), row.get("region", ""), prefix.removeprefix("slices_")), {})
                sums[count] = sums.get(count, 0) + int(value)

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return [
        {
            "member": member, "region": region, "stratum": stratum, "slices": s["n"],
            "dice": ratio(2 * s["hit"], s["predicted"] + s["true"]), "jaccard": ratio(s["hit"], s["predicted"] + s["true"] - s["hit"]),
            "sensitivity": ratio(s["hit"], s["true"]), "precision": ratio(s["hit"], s["predicted"]),
        }
        for (member, region, stratum), s in totals.items()
    ]  # fmt: skip


def write_rows(path: Path | str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = KEYS) -> Path:
    """Writes rows as CSV, atomically: the columns of `keys`, then the metrics in the order of their first appearance.

    Numbers keep their full precision, NaN is `nan`, and a metric that a row lacks is an empty cell.
    """
    metrics = dict.fromkeys(name for row in rows for name in row if name not in keys)
    with _text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, *metrics])
        writer.writerows([*(row.get(k, "") for k in keys), *(_cell(row.get(m)) for m in metrics)] for row in rows)
    return Path(path)


def read_rows(path: Path | str) -> list[Row]:
    """The inverse of `write_rows`: keys as text, metrics as numbers, empty cells left out.

    Raises:
        SuiteError: no such file, or not a table of result rows.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lacking = [k for k in KEYS if k not in (reader.fieldnames or [])]
            if lacking:
                raise SuiteError(f"{path}: no table of results; it lacks the column(s) {', '.join(lacking)}")
            return [{k: v if k in KEYS else _number(v) for k, v in row.items() if k in KEYS or v} for row in reader]
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file; a run writes it when its test stage is done") from None


def write_json(path: Path | str, data: Any) -> Path:
    """Writes plain data (also NumPy scalars) as JSON, atomically; numbers that are not finite become null."""
    with _text(path) as file:
        json.dump(_plain(data), file, indent=2, allow_nan=False)
        file.write("\n")
    return Path(path)


@contextmanager
def _text(path: Path | str) -> Iterator[IO[str]]:
    """A text file that appears at `path` once it is complete."""
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        yield file


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return str(int(value)) if isinstance(value, (int, np.integer, np.bool_)) else repr(float(value))


def _number(text: str) -> float | int | str:
    for kind in (float,) if "." in text else (int, float):
        try:
            return kind(text) if "_" not in text else text
        except ValueError:
            continue
    return text


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(v) for v in data]
    if isinstance(data, np.generic):
        return _plain(data.item())
    return None if isinstance(data, float) and not math.isfinite(data) else data
