"""Tables and figures of docs/methods/reciprocal_adversarial.md from run folders.

    python benchmarks/reciprocal_effects.py <folder that holds runs> <folder for tables> <folder for pictures> [prefix]

Reads `test/cases.csv` (and `robustness/test/cases.csv`), `config.yaml` and `metrics.csv` of every finished run of the reciprocal method
and writes, for every experiment, `<prefix>_<experiment>.csv`: per variant the mean over cases and regions of every member's Dice, HD95,
AUROC of the uncertainty maps, and nesting violations, each as mean and standard deviation over seeds. Draws Dice against the size of
the change, and the reliability curves of the critic's map.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from lesionbench.results import read_rows

TAIL = 10  # validations at the end whose nesting violations are averaged


def variant(model: dict) -> str:
    """What was trained, in words."""
    vat, critic = model["weights"]["vat"], model["weights"]["critic"]
    parts = []
    if vat:
        parts.append("VAT" if model["vat"]["iterations"] else "random direction")
    if critic:
        parts.append("critic" if model["instance_noise"] else "critic without noise")
    name = " + ".join(parts) or "plain"
    return f"{name}, published gradients" if model["gradients"] == "published" else name


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """(member, metric) -> mean over cases and regions of one run; NaN left out."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for table, prefix in (("test", ""), ("robustness/test", "attacked cases ")):
        path = folder / table / "cases.csv"
        for row in read_rows(path) if path.exists() else []:
            for name in ("dice", "hd95_mm", "auroc_critic", "auroc_entropy", "nesting_violations"):
                value = row.get(name)
                if value is not None and value == value:
                    values[prefix + row["member"], name].append(float(value))
    if (folder / "metrics.csv").exists():
        with (folder / "metrics.csv").open() as file:
            curve = [float(r["value"]) for r in csv.DictReader(file) if r["name"] == "val/nesting_violations"]
        values["", "val_nesting_violations"] = curve[-TAIL:]
    return {key: statistics.mean(v) for key, v in values.items() if v}


def collected(root: Path) -> dict[str, dict[str, dict[int, dict[tuple[str, str], float]]]]:
    """experiment -> variant -> seed -> values, of finished runs."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted(root.rglob("summary.json")):
        summary = json.loads(path.read_text())
        if summary.get("status") == "finished" and "experiment" in summary:
            model = yaml.safe_load((path.parent / "config.yaml").read_text())["model"]
            found[summary["experiment"]][variant(model)][summary["seed"]] = measured(path.parent)
    return {experiment: dict(sorted(variants.items(), key=lambda item: (len(item[0]), item[0]))) for experiment, variants in found.items()}


def write_table(path: Path, variants: dict[str, dict[int, dict[tuple[str, str], float]]]) -> None:
    """One row per variant, member and metric: mean, standard deviation over seeds, number of seeds, values by seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "member", "metric", "mean", "std", "seeds", "values"])
        for name, seeds in variants.items():
            for key in dict.fromkeys(k for values in seeds.values() for k in values):
                numbers = [values[key] for _, values in sorted(seeds.items()) if key in values]
                spread = statistics.stdev(numbers) if len(numbers) > 1 else float("nan")
                writer.writerow(
                    [name, *key, f"{statistics.mean(numbers):.4f}", f"{spread:.4f}", len(numbers), " ".join(f"{n:.4f}" for n in numbers)]
                )


def print_table(variants: dict[str, dict[int, dict[tuple[str, str], float]]]) -> None:
    """The table of the page: a column per variant; rows are the Dice of every member, and whatever else the clean prediction has."""
    keys = dict.fromkeys(k for seeds in variants.values() for values in seeds.values() for k in values)
    print("| | " + " | ".join(f"{name} ({len(seeds)} seeds)" for name, seeds in variants.items()) + " |")
    print("|---" * (1 + len(variants)) + "|")
    for member, metric in (k for k in keys if k[1] == "dice" or (k[0] == "" and k[1] != "nesting_violations")):
        cells = []
        for seeds in variants.values():
            numbers = [values[member, metric] for values in seeds.values() if (member, metric) in values]
            spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.3f}{spread}" if numbers else "")
        print(f"| {metric}{', ' if member else ''}{member} | " + " | ".join(cells) + " |")


def draw_robustness(path: Path, variants: dict[str, dict[int, dict[tuple[str, str], float]]], scale: float) -> None:
    """Dice against the size of the change, in units of [0, 1] (`scale` = standard deviation of brain voxels there).

    Seeds differ more than variants do, so a variant without some of the seeds is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = set().union(*variants.values())
    variants = {name: seeds for name, seeds in variants.items() if set(seeds) == every}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, steps, title in zip(axes, (0, 20), ("random noise", "L2 attack, 20 steps"), strict=True):
        for name, seeds in variants.items():
            points = {0.0: [v["", "dice"] for v in seeds.values()]}
            for member in sorted({k[0] for v in seeds.values() for k in v}):
                if member.startswith(f"l2-{steps}-") and member.count("-") == 2:
                    points[float(member.rpartition("-")[2])] = [v[member, "dice"] for v in seeds.values()]
            sizes = sorted(points)
            means = [statistics.mean(points[s]) for s in sizes]
            spread = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0 for s in sizes]
            axis.errorbar([s * scale for s in sizes], means, spread, marker="o", capsize=3, label=name)
        axis.set(title=title, xlabel="RMS of the change, in [0, 1]")
    axes[0].set(ylabel="Dice, mean ± std over seeds", ylim=(0, 1))
    axes[1].legend()
    figure.savefig(path, dpi=110)


def draw_reliability(path: Path, root: Path) -> None:
    """Share of correct voxels against confidence, all runs with a critic that learned pooled; a calibrated map lies on the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    tables = (
        table for table in sorted(root.rglob("test/uncertainty_calibration.csv")) if (table.parent.parent / "config.yaml").exists()
    )  # no stages
    for table in tables:
        model = yaml.safe_load((table.parent.parent / "config.yaml").read_text())["model"]
        if not model["weights"]["critic"] or model["gradients"] != "real":
            continue
        with table.open() as file:
            for row in csv.DictReader(file):
                if int(row["voxels"]):
                    voxels = int(row["voxels"])
                    more = (voxels, voxels * float(row["confidence"]), voxels * float(row["correct"]))
                    total = counts[row["map"]][float(row["low"])]
                    counts[row["map"]][float(row["low"])] = [a + b for a, b in zip(total, more, strict=True)]
    if not counts:
        return
    figure, axis = plt.subplots(figsize=(4, 3.6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    for name, bins in counts.items():
        points = [(c / n, r / n, n) for n, c, r in (bins[low] for low in sorted(bins))]
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=f"1 - {name}")
    axis.set(xlabel="confidence", ylabel="share of correct voxels", xlim=(0, 1), ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=110)


def main(root: str, tables: str, pictures: str, prefix: str = "reciprocal") -> None:
    """Writes everything and prints what was found."""
    for experiment, variants in collected(Path(root)).items():
        name = experiment.rpartition("/")[2]
        write_table(Path(tables) / f"{prefix}_{name}.csv", variants)
        print(f"\n{experiment}: seeds { ({v: sorted(seeds) for v, seeds in variants.items()}) }\n")
        print_table(variants)
        if name == "toy2d_robustness":
            draw_robustness(Path(pictures) / f"{prefix}_robustness.png", variants, scale=0.0952)
    draw_reliability(Path(pictures) / f"{prefix}_reliability.png", Path(root))


if __name__ == "__main__":
    main(*sys.argv[1:])
