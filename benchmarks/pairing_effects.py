"""Tables and the figure of docs/methods/modality_pairing.md from run folders.

    python benchmarks/pairing_effects.py <folder that holds runs> <folder for tables> <folder for pictures>

Reads `config.yaml`, `test/cases.csv` and `metrics.csv` of every finished run of the modality-pairing method and writes, for every
experiment, `modality_pairing_<experiment>.csv`: per arm, member and region the mean Dice over cases, and the correlation of the two
branches' features over the last tenth of the training, each as mean and standard deviation over seeds. Arms are told apart by fusion,
widths and the pairing loss. Draws the correlation over the training of the toy.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from lesionbench.results import read_rows

Measured = dict[tuple[str, str], float]  # (member, measure) -> value


def arm(model: dict) -> str:
    """What was trained, in words."""
    network = model["network"]
    if network["fusion"] != "paired":
        return f"{network['fusion']} fusion {'-'.join(map(str, network['widths']))}"
    return f"paired, weight {model['mp_weight']:g}" + (f" {model['mp']['mode']}" if model["mp"]["mode"] != "flat" else "")


def correlations(folder: Path) -> list[tuple[int, float]]:
    """(batches, correlation) as they were logged; empty for a single branch."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(r["iteration"]), float(r["value"])) for r in csv.DictReader(file) if r["name"] == "train/correlation"]


def measured(folder: Path) -> Measured:
    """Mean Dice of every member and region over the test cases, and the last correlation."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in read_rows(folder / "test" / "cases.csv"):
        if row["region"]:
            values[row["member"], f"dice {row['region']}"].append(float(row["dice"]))
    curve = correlations(folder)
    if curve:
        values["", "correlation"] = [value for _, value in curve[-max(len(curve) // 10, 1) :]]
    return {key: statistics.mean(v) for key, v in values.items()}


def collected(root: Path) -> dict[str, dict[str, dict[int, Path]]]:
    """experiment -> arm -> seed -> folder, of finished runs."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted(root.rglob("summary.json")):
        summary = json.loads(path.read_text())
        if summary.get("status") == "finished" and str(summary.get("experiment")).startswith("modality_pairing/"):
            model = yaml.safe_load((path.parent / "config.yaml").read_text())["model"]
            found[summary["experiment"]][arm(model)][summary["seed"]] = path.parent
    return found


def write_table(path: Path, arms: dict[str, dict[int, Measured]]) -> None:
    """One row per arm, member and measure."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "member", "measure", "mean", "std", "seeds", "values"])
        for name, seeds in arms.items():
            for key in dict.fromkeys(k for values in seeds.values() for k in values):
                numbers = [values[key] for _, values in sorted(seeds.items()) if key in values]
                spread = f"{statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
                row = [name, *key, f"{statistics.mean(numbers):.4f}", spread, len(numbers), " ".join(f"{n:.4f}" for n in numbers)]
                writer.writerow(row)


def print_table(arms: dict[str, dict[int, Measured]]) -> None:
    """The table of the page: a row per arm and member, a column per measure."""
    measures = list(dict.fromkeys(k[1] for seeds in arms.values() for values in seeds.values() for k in values))
    members = list(dict.fromkeys(k[0] for seeds in arms.values() for values in seeds.values() for k in values))
    print("| | seeds | " + " | ".join(measures) + " |\n" + "|---" * (2 + len(measures)) + "|")
    for name, seeds in arms.items():
        for member in members:
            cells = []
            for measure in measures:
                numbers = [values[member, measure] for values in seeds.values() if (member, measure) in values]
                spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
                cells.append(f"{statistics.mean(numbers):.3f}{spread}" if numbers else "")
            print(f"| {name}{', ' if member else ''}{member} | {len(seeds)} | " + " | ".join(cells) + " |")


def draw(path: Path, arms: dict[str, dict[int, Path]]) -> None:
    """The correlation over the training, one thin line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    drawn = {name: curves for name, seeds in sorted(arms.items()) if all(curves := [correlations(f) for f in seeds.values()])}
    for number, (name, curves) in enumerate(drawn.items()):
        for n, curve in enumerate(curves):
            axis.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=0.9, label=None if n else name)
    axis.set(xlabel="iteration", ylabel="correlation of the branches", ylim=(-0.5, 1.02))
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(root: str, tables: str, pictures: str) -> None:
    """Writes everything and prints what was found."""
    for experiment, arms in collected(Path(root)).items():
        name = experiment.rpartition("/")[2]
        values = {a: {seed: measured(folder) for seed, folder in sorted(seeds.items())} for a, seeds in sorted(arms.items())}
        write_table(Path(tables) / f"modality_pairing_{name}.csv", values)
        print(f"\n{experiment}\n")
        print_table(values)
        if name == "toy":
            draw(Path(pictures) / "modality_pairing_correlation.png", arms)


if __name__ == "__main__":
    main(*sys.argv[1:])
