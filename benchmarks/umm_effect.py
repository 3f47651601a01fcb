"""Tables and curves of the small experiments of docs/methods/umm.md, from their run folders.

    python benchmarks/umm_effect.py <folder of runs> <name>

Writes docs/results/<name>.csv (mode, member, Dice and mean entropy of every seed, mean and deviation), prints it as Markdown, and draws
docs/images/<name>.png: the branches' mean uncertainty and the share of voxels that the gate keeps, over the gated training, and the mean
entropy on test cases in every mode.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from lesionbench.reports.report import curve
from lesionbench.results import read_rows

ROOT = Path(__file__).parent.parent
MODES = {"none": "pure", "plain": "ml", "gated": "ml+u"}
NAMES = {"": "fused, softmin", "mean": "fused, mean", "s": "2D", "p": "2.5D", "v": "3D"}
COLORS = {"s": "#E69F00", "p": "#009E73", "v": "#0072B2", "": "#000000", "mean": "#999999"}


def finished(folder: Path) -> dict[str, dict[int, Path]]:
    """Mode -> seed (or fold, where there is more than one) -> run folder."""
    runs: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.rglob("test/cases.csv")):
        config = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
        split = config["data"]["split"]
        runs[config["model"]["mutual"]][split["fold"] if split["folds"] else config["seed"]] = path.parent.parent
    return runs


def means(run: Path, metric: str) -> dict[str, float]:
    """Member -> mean of `metric` over test cases and regions."""
    values = defaultdict(list)
    for row in read_rows(run / "test" / "cases.csv"):
        if metric in row:
            values[row["member"]].append(row[metric])
    return {member: statistics.mean(found) for member, found in values.items()}


def table(runs: dict[str, dict[int, Path]]) -> list[dict]:
    """One row per mode, member and metric."""
    rows = []
    for metric in ("dice", "mean_entropy"):
        for mode in (m for m in MODES if m in runs):
            measured = {key: means(run, metric) for key, run in sorted(runs[mode].items())}
            for member in sorted(next(iter(measured.values())), key=list(NAMES).index):
                values = {key: found[member] for key, found in measured.items()}
                spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
                row = {"metric": metric, "mode": MODES[mode], "member": NAMES[member], **values}
                rows.append({**row, "mean": statistics.mean(values.values()), "std": spread})
    return rows


def draw(runs: dict[str, dict[int, Path]], rows: list[dict], path: Path) -> None:
    """Curves of the gated runs, averaged over seeds, and test entropies of all modes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for ax, name, title in (
        (left, "uncertainty", "mean uncertainty (nats), training"),
        (middle, "certain", "share of voxels that the gate lets through"),
    ):
        for branch in "spv":
            curves = [curve(run, f"train/{name}_{branch}") for run in runs["gated"].values()]
            if all(curves):
                values = np.array([[value for _, value in one] for one in curves])
                steps = [step for step, _ in curves[0]]
                ax.plot(steps, values.mean(axis=0), color=COLORS[branch], label=NAMES[branch])
                ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLORS[branch], alpha=0.15, linewidth=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("iteration", fontsize=8)
        ax.legend(fontsize=7)
    entropy = [row for row in rows if row["metric"] == "mean_entropy" and row["member"] != NAMES["mean"]]
    members = list(dict.fromkeys(row["member"] for row in entropy))
    modes = list(dict.fromkeys(row["mode"] for row in entropy))
    for row in entropy:
        place = modes.index(row["mode"]) + 0.8 * (members.index(row["member"]) / len(members) - 0.4)
        color = COLORS[next(k for k, v in NAMES.items() if v == row["member"])]
        label = row["member"] if row["mode"] == modes[0] else None
        right.bar(place, row["mean"], 0.8 / len(members), yerr=row["std"], color=color, label=label, error_kw={"linewidth": 0.8})
    right.set_xticks(range(len(modes)), modes)
    right.set_title("mean entropy (nats), test cases", fontsize=9)
    right.margins(y=0.3)
    right.legend(fontsize=7, loc="upper center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(folder: str, name: str) -> None:
    """Table and figure of the runs under `folder`."""
    runs = finished(Path(folder))
    rows = table(runs)
    path = ROOT / "docs" / "results" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    keys = [k for k in rows[0] if isinstance(k, int)]
    print("| metric | mode | member | " + " | ".join(map(str, keys)) + " | mean ± std |\n" + "|---" * (len(keys) + 4) + "|")
    for row in rows:
        cells = " | ".join(f"{row[k]:.3f}" for k in keys)
        print(f"| {row['metric']} | {row['mode']} | {row['member']} | {cells} | {row['mean']:.3f} ± {row['std']:.3f} |")
    if "gated" in runs:
        draw(runs, rows, ROOT / "docs" / "images" / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
