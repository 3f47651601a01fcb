"""The table and the figure of docs/uncertainty.md: methods that have uncertainty maps, on the same held-out images.

    python benchmarks/uncertainty_table.py run <folder for runs>       # trains and tests all of them, ten minutes on an idle core; what is there is kept
    python benchmarks/uncertainty_table.py table <folder of runs> docs/results/uncertainty_toy.csv docs/images/uncertainty_risk.png

`conf/sweep/uncertainty.yaml` has the data, the metrics and the seeds that all share.
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
SEEDS = (0, 1)
TOY = "experiment=unet_context_encoding_uncertainty/toy"
TRAINED = {  # name -> what is run besides the sweep
    "context encoding": (TOY,),  # asked with dropout, noise and flips at once
    "no presence loss": (TOY, "model.presence_weight=0"),
    "reciprocal": (
        "experiment=reciprocal_adversarial/toy2d",
        "epochs=10",
        "model.vat.eps=0.14",
        "stages=[{name:fit,run:fit},{name:test,run:test}]",
    ),
    "CoraNet, 20 labels": (
        "experiment=coranet/blobs",
        "epochs=14",
        "model.warm_start=100",
        "~data.draw",
        "data.split.labeled=20",
        "model.predict_members=true",
    ),
}
ASKED = {  # name -> how the trained "context encoding" is asked again
    "dropout alone": ("asked.noise=0", "asked.moves=null"),
    "flips alone": ("asked.dropout=false", "asked.noise=0"),
    "noise alone": ("asked.dropout=false", "asked.moves=null"),
}
ENSEMBLE = "ensemble of two"  # of "context encoding" and "no presence loss" of the same seed, one answer each
SCORES = ("auroc", "qu_brats", "qu_dice", "qu_ftp", "qu_ftn")
OF_REGIONS = ("dice", "ece", "brier")
COLUMNS = ["method", "member", "map", "runs", *(f"{name}{end}" for name in (*OF_REGIONS, *SCORES) for end in ("", "_std"))]


def run(root: Path) -> None:
    """Trains and tests what has no finished run yet."""
    for name, words in TRAINED.items():
        if missing := [str(seed) for seed in SEEDS if not folders(root, name, seed)]:
            start(root, name, *words, f"hydra.sweeper.params.seed='{','.join(missing)}'")
    for seed in SEEDS:
        first, second = (folders(root, name, seed)[0] / "checkpoints" / "last.ckpt" for name in ("context encoding", "no presence loss"))
        again = f"""stages=[{{name:test,run:test,override:{{asked:{{checkpoint:"{first}"}},model:"${{asked}}"}}}}]"""
        for name, words in ASKED.items():
            if not folders(root, name, seed):
                start(root, name, TOY, "hydra.mode=RUN", f"seed={seed}", again, *words)
        if not folders(root, ENSEMBLE, seed):
            start(root, ENSEMBLE, TOY, "hydra.mode=RUN", f"seed={seed}", "job=test", f'ckpt=["{first}","{second}"]')


def place(root: Path, name: str) -> Path:
    """Folder of a method's runs."""
    return root / name.replace(",", "").replace(" ", "_")


def start(root: Path, name: str, *words: str) -> None:
    words = ("trainer=cpu", "sweep=uncertainty", *words, f"runs={place(root, name)}")
    print("python run.py", *words, flush=True)
    subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True, cwd=ROOT)


def folders(root: Path, name: str, seed: int | None = None) -> list[Path]:
    """Run folders of a method that were tested, of one seed or of all."""
    found = sorted(path.parent.parent for path in place(root, name).rglob("test/cases.csv"))
    return [folder for folder in found if seed is None or folder.name.partition("-")[0] == f"seed={seed}"]


def groups(root: Path) -> dict[str, list[Path]]:
    """Method -> its run folders."""
    return {name: folders(root, name) for name in (*TRAINED, *ASKED, ENSEMBLE)}


def measured(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(member, map) -> means over cases and regions of one run; NaN left out."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder / "test" / "cases.csv"):
        known = {k: v for k, v in row.items() if isinstance(v, float | int) and v == v} if row["region"] else {}
        for name in sorted(k.removeprefix("qu_brats_") for k in known if k.startswith("qu_brats_")):
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
            if name.startswith("entropy_") or (member == "plain" and method not in TRAINED):
                continue  # a map of one region says nothing of the others; the plain answer of a network that is asked again is the same
            found = [one[member, name] for one in of_runs if (member, name) in one]
            row: dict[str, object] = {"method": method, "member": member, "map": name, "runs": len(found)}
            for score in (*OF_REGIONS, *SCORES):
                known = [one[score] for one in found if score in one]
                row[score] = f"{statistics.mean(known):.4f}" if known else ""
                row[f"{score}_std"] = f"{statistics.stdev(known):.4f}" if len(known) > 1 else ""
            rows.append(row)
    return rows


def risks(runs: list[Path], member: str) -> dict[str, np.ndarray]:
    """Map of a member -> (shares left out, risk) (2, N), mean over runs."""
    curves: dict[str, list[np.ndarray]] = defaultdict(list)
    for folder in runs:
        with (folder / "test" / "risk_coverage.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["member"] == member and float(row["left_out"])]
        for name in {row["map"] for row in rows}:
            curves[name].append(np.array([[float(row[k]) for k in ("left_out", "risk")] for row in rows if row["map"] == name]).T)
    return {name: np.mean(found, axis=0) for name, found in curves.items()}


def draw(root: Path, path: Path) -> None:
    """Risk against the share of voxels left out: the entropy of the probabilities, and every other map of the main predictions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {method: risks(runs, "") for method, runs in groups(root).items() if runs}
    plain = risks(folders(root, "context encoding"), "plain")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for color, (method, of_method) in enumerate(curves.items()):
        own = [name for name in sorted(of_method) if name in ("entropy", "mutual_information", "disagreement", "critic")]
        for panel, name in [(0, "region_entropy"), *((1, name) for name in own)]:
            style = {"mutual_information": "--", "critic": "--"}.get(name, "-")
            label = method if panel == 0 else f"{method}: {name.replace('_', ' ')}"
            axes[panel].plot(*of_method[name], style, color=f"C{color}", lw=1.3, label=label)
    if plain:
        axes[0].plot(*plain["region_entropy"], ":", color="black", lw=1.3, label="context encoding, one plain answer")
    for axis, title in zip(axes, ("entropy of the region probabilities", "the method's own maps"), strict=True):
        axis.set(title=title, xscale="log", yscale="log", xlabel="share of voxels left out, most uncertain first")
        axis.legend(fontsize=6, loc="lower left")
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
