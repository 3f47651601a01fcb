"""What a finished run prints: what it did, how good it is, where it is, what next."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from lesionbench.installation import command
from lesionbench.reports.sheets import console
from lesionbench.results import TUNED, depends_on_oracle, is_oracle

ZEROS = 3  # named in the report


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of one curve of a run, from its metrics.csv."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(row["iteration"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]


def curve_names(folder: Path) -> list[str]:
    """Names of the curves in a run's metrics.csv, in order of appearance."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(dict.fromkeys(row["name"] for row in csv.DictReader(file)))


def print_run(folder: Path) -> None:
    """Prints the results table of a run folder, the paths in it, and the commands that go on from it."""
    summary = json.loads((folder / "summary.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    out = console()
    cost, test = summary.get("cost") or {}, summary.get("test") or {}
    done = f"{config['model']['_target_'].rsplit('.', 1)[-1]} on {config['data']['_target_'].rsplit('.', 1)[-1]}"
    trained = ""
    if cost.get("iterations"):
        work = f"tested after {cost['iterations']} iterations," if config["job"] == "test" else f"{cost['iterations']} iterations"
        trained = f", {work} in {cost.get('wall_s', 0):.0f} s, {cost.get('parameters', 0) / 1e6:.2f} M parameters"
    out.print(f"\n[bold]{summary['experiment']}[/bold] seed {summary['seed']}: {done}{trained}")
    for member, regions in test.items():
        out.print(_results(member, regions))
    for member, regions in (summary.get("dataset") or {}).items():
        out.print(_dataset_table(member, regions))
    _baseline(out, folder)
    _zeros(out, folder)
    for line in warned_kinds(summary):
        out.print(f"The integrity check of the data: {line}", soft_wrap=True, highlight=False, markup=False)
    for line in _paths(folder, config["runs"], config.get("select")):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    if "imulated" in config["data"]["_target_"]:
        out.print("Simulated data is a stand-in: these figures say that the pipeline works, not how a method does on patients.")
        if trained:
            out.print(
                "The same command may give other figures on another processor or with other threads, which add in another order "
                "(measured for `make run`: mean Dice by up to 0.02, mean HD95 by up to 21 mm)."
            )


def warned_kinds(summary: dict[str, Any]) -> list[str]:
    """What the integrity check of a run's data warned of, a line for each kind; the cases are in `data_warnings` of its summary."""
    return [line for line in summary.get("data_warnings", "").splitlines() if line.startswith("warning x ")]


def _results(member: str, regions: dict[str, Any]) -> Any:
    """Regions in rows and metrics in columns; the other way round for a method with many case-level results."""
    from rich.table import Table

    table = Table(title=f"test cases{f', {member}' if member else ''}: mean ± std (median)")
    measured = list(dict.fromkeys(m for values in regions.values() for m in values))
    metrics = [m for m in measured if m.startswith(("dice", "hd95"))] or measured  # the rest is in summary.json
    tuned = {m: any(values.get(m, {}).get("oracle") for values in regions.values()) for m in metrics}
    count = {region: str(max((v["n"] + v["missing"] for v in values.values()), default=0)) for region, values in regions.items()}
    rows = [[region or "case", *(_cell(values.get(m)) for m in metrics), count[region]] for region, values in regions.items()]
    columns = ["region", *(m + TUNED * tuned[m] for m in metrics), "cases"]
    if len(metrics) > 8:
        columns, *rows = (list(line) for line in zip(columns, *rows, strict=True))
    for column in columns:
        table.add_column(column, justify="left" if column == "region" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _dataset_table(member: str, regions: dict[str, dict[str, float | None]]) -> Any:
    from rich.table import Table

    table = Table("", *regions, title=f"all test voxels as one set{f', {member}' if member else ''}")
    for metric in (m for m in dict.fromkeys(m for values in regions.values() for m in values) if m != "oracle"):
        tuned = any(depends_on_oracle(metric, is_oracle(values)) for values in regions.values())
        table.add_row(metric + TUNED * tuned, *("-" if (v := values.get(metric)) is None else f"{v:.3f}" for values in regions.values()))
    return table


def _cell(values: dict[str, Any] | None) -> str:
    if not values or values.get("mean") is None:
        return "-"
    spread = "" if values.get("std") is None else f" ± {values['std']:.3f}"
    return f"{values['mean']:.3f}{spread} ({values['median']:.3f})"


def _baseline(console: Any, folder: Path) -> None:
    path = folder / "test" / "baseline.json"
    if path.exists():
        found = json.loads(path.read_text())
        console.print(
            f"For scale: the best single threshold on histogram-equalized FLAIR, chosen on these very cases, has a {found['region']} Dice of "
            f"{found['dice']:.3f}{TUNED}."
        )


def _zeros(console: Any, folder: Path) -> None:
    """Why cases have a Dice of 0 in a region: pictures show at most one of truth and prediction there, or none where they were cut."""
    path = folder / "test" / "cases.csv"
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["member"] == "" and row.get("dice") and float(row["dice"]) == 0]
    if rows:
        named = [f"{row['region']} of {row['case']} ({_why_zero(row)})" for row in rows[:ZEROS]]
        more = f", and {len(rows) - ZEROS} more in {path.name}" if len(rows) > ZEROS else ""
        console.print(f"Dice 0, and why: {', '.join(named)}{more}.", highlight=False, markup=False)


def _why_zero(row: dict[str, str]) -> str:
    """In the terms of a picture; a ratio that is 0/0 is NaN."""
    if row.get("sensitivity") == "nan":
        return "the truth has none; the picture has the prediction alone"
    if row.get("precision") == "nan":
        return "nothing predicted; the picture has the truth alone"
    return "prediction and truth do not overlap"


def _paths(folder: Path, runs: str, select: str | None) -> list[str]:
    wanted = {
        "results per case": folder / "test" / "cases.csv",
        "summary": folder / "summary.json",
        "curves": folder / "metrics.csv",
        "figures": folder / "figures",
        "predictions": folder / "predictions",
        "checkpoints": folder / "checkpoints",
    }
    lines = [f"  {title:17s} {path}" for title, path in wanted.items() if path.exists()]
    names = ("last.ckpt",) if select == "last" else ("best.ckpt", "last.ckpt")  # the one that was tested
    tested = next((p for p in (folder / "checkpoints" / name for name in names) if p.exists()), None)
    follow = ["What next:", f"  {command()} job=compare compare.runs=[{runs}]"]
    if tested:
        follow.append(f"  {command()} job=predict ckpt={tested} input=<folder of NIfTI files> out=<new folder>")
    return ["Where it is:", *lines, *follow]
