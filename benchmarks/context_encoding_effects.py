"""The table of docs/methods/unet_context_encoding_uncertainty.md from run folders.

    python run.py -m experiment=unet_context_encoding_uncertainty/toy callbacks=[default,risk_coverage] seed=0,1,2 model.presence_weight=1,0
    python benchmarks/context_encoding_effects.py runs/unet_context_encoding_uncertainty/toy docs/results/unet_context_encoding_uncertainty_toy.csv

A row for every run: the weight of the loss of presence, the Dice of both regions, of one plain answer and of the mean of passes, how well the head ranks images with and without
an enhancing part (`presence_auroc`), in how many of the images without one some is predicted (`false_et`), how well the maps find wrong voxels (AUROC, mean over cases and regions),
the QU-BraTS score, and the share of wrong voxels when 0, 1, 2 and 5 % of the voxels are left out, the most uncertain first.
"""

import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lesionbench.results import read_rows
from lightning_modules.metrics import auroc

MAPS = ("entropy", "expected_entropy", "mutual_information")
SHARES = (0.0, 0.01, 0.02, 0.05)


def mean(values: Iterable[Any]) -> float:
    """Of what is a number."""
    return statistics.mean(float(v) for v in values if v is not None and v == v)


def measured(folder: Path) -> dict[str, float]:
    """One run."""
    rows = list(read_rows(folder / "test" / "cases.csv"))
    tables = [row for row in rows if row["region"] == ""]
    asked = [row for row in rows if row["region"] and row["member"] == ""]
    found: dict[str, float] = {}
    absent = {row["case"] for row in tables if not row["present_et"]}
    for member, name in (("plain", "plain"), ("", "mean")):
        for region in ("WT", "ET"):
            found[f"dice_{region}_{name}"] = mean(r["dice"] for r in rows if r["region"] == region and r["member"] == member)
    found["without_et"] = len(absent)
    found["presence_auroc"] = auroc(np.array([t["presence_et"] for t in tables]), np.array([t["present_et"] > 0 for t in tables]))
    found["presence_accuracy"] = mean(t["presence_accuracy"] for t in tables)
    found["false_et"] = mean(r["volume_vox"] > 0 for r in asked if r["region"] == "ET" and r["case"] in absent)
    for name in MAPS:
        found[f"auroc_{name}"] = mean(r[f"auroc_{name}"] for r in asked)
    found["qu_brats_entropy"] = mean(r["qu_brats_entropy"] for r in asked)
    with (folder / "test" / "risk_coverage.csv").open() as file:
        curve = np.array(
            [[float(r["left_out"]), float(r["risk"])] for r in csv.DictReader(file) if (r["member"], r["map"]) == ("", "entropy")]
        )
    return found | {f"wrong_{share:g}": float(np.interp(share, *curve.T)) for share in SHARES}


def main(root: str, out: str) -> None:
    """Writes the table and prints its means."""
    rows = []
    for path in sorted(Path(root).rglob("test/cases.csv")):
        config = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
        rows.append({"presence_weight": float(config["model"]["presence_weight"]), "seed": config["seed"], **measured(path.parent.parent)})
    rows.sort(key=lambda row: (-row["presence_weight"], row["seed"]))
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for weight in sorted({row["presence_weight"] for row in rows}, reverse=True):
        of_weight = [row for row in rows if row["presence_weight"] == weight]
        print(f"weight {weight:g}, seeds {[row['seed'] for row in of_weight]}")
        for name in [name for name in rows[0] if name not in ("presence_weight", "seed")]:
            values = [row[name] for row in of_weight]
            print(f"  {name:28} {statistics.mean(values):8.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
