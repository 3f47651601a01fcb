"""The table and the figure of docs/uncertainty.md: methods that have uncertainty maps, on the same held-out cases.

    python benchmarks/uncertainty_table.py run <folder for runs>       # trains and tests all of them, about half an hour on one core; finished runs are kept
    python benchmarks/uncertainty_table.py table <folder of runs> docs/results/uncertainty_simulated.csv docs/images/uncertainty_risk.png

`conf/sweep/uncertainty.yaml` has the data, the metrics and the seeds that all share. An ensemble is of two plain networks, and the plain networks of both
ensembles are a row of their own.
"""

import csv
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from lesionbench.results import read_rows

ROOT = Path(__file__).parent.parent
BASE = ("experiment=unet_context_encoding_uncertainty/simulated", "epochs=8", "asked.passes=8")
U_NET = (*BASE, "model.network.codes=0", "model.presence_weight=0")  # the same network without its encoding
PLAIN = (*U_NET, "model.network.dropout=0", "stages=[{name:fit,run:fit},{name:test,run:test}]")
METHODS = {  # name -> what is run besides the sweep
    "plain U-Net": (*PLAIN, "hydra.sweeper.params.seed='0,1,2,3'"),
    "U-Net, dropout": (*U_NET, "asked.noise=0", "asked.moves=null"),
    "context encoding, all draws": BASE,
    "reciprocal": ("experiment=reciprocal_adversarial/simulated", "epochs=3"),
    "CoraNet, 4 labels": ("experiment=coranet/simulated_few_labels", "epochs=16", "model.predict_members=true"),
    "UMM": ("experiment=umm/simulated", "patch=[32,32,32]", "epochs=4", "model.mc_samples=2"),
}
ENSEMBLES = {0: (0, 1), 1: (2, 3)}  # seed of the ensemble -> seeds of its members
SCORES = ("auroc", "qu_brats", "qu_dice", "qu_ftp", "qu_ftn")
OF_REGIONS = ("dice", "ece", "brier")
COLUMNS = ["method", "member", "map", "runs", *(f"{name}{end}" for name in (*OF_REGIONS, *SCORES) for end in ("", "_std"))]


def run(root: Path) -> None:
    """Trains and tests what has no finished run yet."""
    for name, words in METHODS.items():
        if len(folders(place(root, name))) < 2:
            start("sweep=uncertainty", *words, f"runs={place(root, name)}")
    for seed, members in ENSEMBLES.items():
        target = place(root, f"ensemble {seed}")
        if not folders(target):
            trained = [next(place(root, "plain U-Net").rglob(f"seed={member}/checkpoints/best.ckpt")) for member in members]
            quoted = ",".join(f"'{path}'" for path in trained)
            start("sweep=uncertainty", "hydra.mode=RUN", *PLAIN, "job=test", f"ckpt=[{quoted}]", f"runs={target}", f"seed={seed}")


def place(root: Path, name: str) -> Path:
    """Folder of a method's runs."""
    return root / name.replace(",", "").replace(" ", "_")


def start(*words: str) -> None:
    print("python run.py", *words, flush=True)
    subprocess.run([sys.executable, str(ROOT / "run.py"), "trainer=cpu", *words], check=True, cwd=ROOT)


def folders(root: Path) -> list[Path]:
    """Run folders below `root` that were tested."""
    return sorted(path.parent.parent for path in root.rglob("test/cases.csv"))


def groups(root: Path) -> dict[str, list[Path]]:
    """Method -> its run folders."""
    found = {name: folders(place(root, name)) for name in METHODS}
    return {**found, "ensemble of two": [folder for seed in ENSEMBLES for folder in folders(place(root, f"ensemble {seed}"))]}


def measured(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(member, map) -> means over cases and regions of one run; NaN left out."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder / "test" / "cases.csv"):
        known = {k: v for k, v in row.items() if isinstance(v, float | int) and v == v} if row["region"] else {}
        for name in {k.removeprefix("qu_brats_") for k in known if k.startswith("qu_brats_")}:
            of_map = {score: known.get(f"{score}_{name}") for score in SCORES} | {k: known.get(k) for k in OF_REGIONS}
            for key, value in of_map.items():
                if value is not None:
                    values[row["member"], name][key].append(value)
    return {key: {name: statistics.mean(v) for name, v in found.items()} for key, found in values.items()}


def table(root: Path) -> list[dict[str, object]]:
    """A row for every method, member and map: mean and standard deviation over runs."""
    rows = []
    for method, runs in groups(root).items():
        of_runs = [measured(folder) for folder in runs]
        for member, name in dict.fromkeys(key for found in of_runs for key in found):
            found = [one[member, name] for one in of_runs if (member, name) in one]
            row: dict[str, object] = {"method": method, "member": member, "map": name, "runs": len(found)}
            for score in (*OF_REGIONS, *SCORES):
                known = [one[score] for one in found if score in one]
                row[score] = f"{statistics.mean(known):.4f}" if known else ""
                row[f"{score}_std"] = f"{statistics.stdev(known):.4f}" if len(known) > 1 else ""
            rows.append(row)
    return rows


def draw(root: Path, path: Path) -> None:
    """Risk against the share of voxels left out: the entropy of the probabilities, and every other map of the main predictions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for color, (method, runs) in enumerate(groups(root).items()):
        curves: dict[str, list[np.ndarray]] = defaultdict(list)
        for folder in runs:
            with (folder / "test" / "risk_coverage.csv").open() as file:
                rows = [row for row in csv.DictReader(file) if row["member"] == "" and float(row["left_out"])]
            for name in {row["map"] for row in rows}:
                curves[name].append(np.array([[float(row[k]) for k in ("left_out", "risk")] for row in rows if row["map"] == name]).T)
        own = [name for name in sorted(curves) if name in ("entropy", "mutual_information", "disagreement", "critic")]
        for place, name in [(0, "region_entropy"), *((1, name) for name in own)]:
            x, y = np.mean(curves[name], axis=0)
            style = {"mutual_information": "--", "critic": "--"}.get(name, "-")
            axes[place].plot(x, y, style, color=f"C{color}", lw=1.3, label=method if place == 0 else f"{method}: {name.replace('_', ' ')}")
    for axis, title in zip(axes, ("entropy of the region probabilities", "the method's own maps"), strict=True):
        axis.set(title=title, xscale="log", xlabel="share of voxels left out, most uncertain first")
        axis.legend(fontsize=7)
        axis.set_ylim(0)
    axes[0].set_ylabel("share of wrong voxels among the others")
    figure.savefig(path, dpi=110)


def main(task: str, root: str, *out: str) -> None:
    """Runs, or reads what was run."""
    if task == "run":
        run(Path(root).absolute())
        return
    rows = table(Path(root))
    with open(out[0], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(Path(root), Path(out[1]))
    for row in rows:
        print(
            *(
                f"{row[name]!s:>20}" if name in ("method", "map", "member") else f"{row[name]!s:>8}"
                for name in COLUMNS
                if not name.endswith("_std")
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
