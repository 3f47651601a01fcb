"""Table and picture of CoraNet's toy (docs/methods/coranet.md), from the run folders of `sweep=coranet_toy`.

    python benchmarks/coranet_effect.py <folder of runs>

Writes docs/results/coranet_blobs.csv (mean test Dice of every row and seed, and mean and deviation of its difference to the labeled images
alone on the same seeds), docs/results/coranet_blobs_regions.csv (the stored labels inside
and outside of the uncertain region at the first and last labeling, its distance to the boundary, and, of the final network, the error
rate inside it and inside a mask of the same size where the softmax is least confident), and docs/images/coranet_masks.png (labels and
uncertain region of unlabeled cases over the labelings). Prints all of it as Markdown.
"""

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lesionbench.checkpoint import load_method
from lesionbench.results import read_rows
from lightning_modules.semi_supervised.certainty_masks import confidence

ROOT = Path(__file__).parent.parent
ROWS = {
    "supervised": "supervised only, one head",
    "seg": "seg: L_crm on labels",
    "st": "seg + st: self-training on all pixels",
    "st_mask": "seg + st (mask): on certain pixels",
    "mt": "seg + mt: mean teacher on all pixels",
    "mt_mask": "seg + mt (mask)",
    "all": "CoraNet",
    "equal_costs": "CoraNet, alpha = 1",
    "full_supervision": "all 64 labels, one head",
}


def finished(folder: Path) -> dict[str, dict[int, Path]]:
    """Row -> seed -> run folder."""
    runs: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.rglob("test/cases.csv")):
        config = OmegaConf.load(path.parent.parent / "config.yaml")
        runs[config.row][config.seed] = path.parent.parent
    return {row: dict(sorted(runs[row].items())) for row in ROWS if row in runs}


def scores(run: Path, metric: str = "dice") -> dict[str, float]:
    """Member -> mean over test cases; NaN (no prediction to be precise about) is left out."""
    values = defaultdict(list)
    for row in read_rows(run / "test" / "cases.csv"):
        if row.get(metric) is not None and row[metric] == row[metric]:
            values[row["member"]].append(row[metric])
    return {member: statistics.mean(found) for member, found in values.items()}


def summary(values: Mapping[int, float]) -> dict[str, Any]:
    """The values by seed, their mean and standard deviation."""
    found = list(values.values())
    return {**values, "mean": statistics.mean(found), "std": statistics.stdev(found) if len(found) > 1 else 0.0}


def dice_table(runs: Mapping[str, Mapping[int, Path]]) -> list[dict[str, Any]]:
    """One line per row of the sweep."""
    dice = {row: {seed: scores(run)[""] for seed, run in of.items()} for row, of in runs.items()}
    seeds, alone = sorted({seed for found in dice.values() for seed in found}), dice.get("supervised", {})
    lines = []
    for row, found in dice.items():
        gain = summary({seed: value - alone[seed] for seed, value in found.items() if seed in alone} or {0: float("nan")})
        lines.append({"row": ROWS[row], **dict.fromkeys(seeds, ""), **summary(found), "gain": gain["mean"], "gain_std": gain["std"]})
    return lines


def region_table(runs: Mapping[str, Mapping[int, Path]]) -> list[dict[str, Any]]:
    """Lines (row, what) with a value per seed, for rows that keep an uncertain region."""
    lines = []
    for row in ("all", "equal_costs"):
        measured = {seed: regions(run) for seed, run in runs.get(row, {}).items()}
        for what in next(iter(measured.values()), {}):
            lines.append({"row": ROWS[row], "what": what, **summary({seed: found[what] for seed, found in measured.items()})})
    return lines


def regions(run: Path) -> dict[str, float]:
    """What is said of the uncertain region of one run."""
    quality, places = curves(run / "pseudo_labels.csv"), curves(run / "uncertain_region.csv")
    found = {}
    for when, version in (("first", quality[0]["version"]), ("last", quality[-1]["version"])):
        of = {row["where"]: row for row in quality if row["version"] == version}
        place = next(row for row in places if row["version"] == version)
        inside, outside = of["inside"], of["outside"]
        wrong = inside["error"] * inside["voxels"]
        found |= {
            f"{when}: share of pixels": inside["share"],
            f"{when}: error rate inside": inside["error"],
            f"{when}: error rate outside": outside["error"],
            f"{when}: share of all errors": wrong / (wrong + outside["error"] * outside["voxels"]),
            f"{when}: median distance to the boundary": place["distance"],
            f"{when}: mean distance to the boundary": place["mean_distance"],
        }
    return found | same_size(run)


def curves(path: Path) -> list[dict[str, Any]]:
    """Lines of a table over time; numbers where they are, 0 in empty cells."""
    with path.open(newline="") as file:
        return [{k: v if k in ("region", "where") else float(v or 0) for k, v in line.items()} for line in csv.DictReader(file)]


@torch.no_grad()
def same_size(run: Path) -> dict[str, float]:
    """Of the final network on the unlabeled cases: error rate inside the uncertain region, and inside as many least confident pixels."""
    config = OmegaConf.load(run / "config.yaml")
    data = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    method, _ = load_method(run / "checkpoints" / "last.ckpt")
    uncertain, confident, wrong = [], [], []
    for batch in data.case_loader(data.parts["unlabeled"]):
        maps = method.inferer(batch["image"], lambda view: method.mask.maps(method, view), method.task.slice_axis)
        uncertain.append(method.mask.uncertain(maps, method.target.kind).flatten())
        confident.append(confidence(maps["probabilities"], method.target.kind).flatten())
        wrong.append((method.decode(maps["probabilities"]).labels != batch["label"][0, 0]).flatten())
    uncertain, confident, wrong = (torch.cat(parts) for parts in (uncertain, confident, wrong))
    least = confident.argsort()[: int(uncertain.sum())]
    return {
        "final: error rate inside": float(wrong[uncertain].float().mean()),
        "final: error rate in a softmax mask of that size": float(wrong[least].float().mean()),
    }


def heads_table(runs: Mapping[str, Mapping[int, Path]]) -> list[dict[str, Any]]:
    """Precision and sensitivity of the three heads of the whole method, mean over seeds."""
    measured = {m: [scores(run, m) for run in runs["all"].values()] for m in ("precision", "sensitivity")}
    names = {"conservative": "conservative", "": "main", "radical": "radical"}
    return [{"head": title, **{m: statistics.mean(f[name] for f in of) for m, of in measured.items()}} for name, title in names.items()]


def draw(run: Path, path: Path, versions: Sequence[int] = (1, 2, 5, 10, 20)) -> None:
    """Images with the stored label's outline and the uncertain region, one line per case, one column per labeling."""
    import nibabel as nib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = np.load(run / "uncertain_region.npz")
    cases = sorted({name.partition("_v")[2][5:] for name in kept.files})
    config = OmegaConf.load(run / "config.yaml")
    root = instantiate(config.data, _convert_="all").root
    figure = Figure(figsize=(1.5 * len(versions), 1.5 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), len(versions), squeeze=False)
    for number, case in enumerate(cases):
        image = np.asarray(nib.load(root / "images" / f"{case}_image.nii.gz").dataobj)[..., 0]
        truth = np.asarray(nib.load(root / "labels" / f"{case}.nii.gz").dataobj)[..., 0]
        for ax, version in zip(axes[number], versions, strict=True):
            label, uncertain = (kept[f"{what}_v{version:04d}_{case}"][..., 0] for what in ("label", "uncertain"))
            ax.imshow(image, cmap="gray", vmin=-2, vmax=4)
            ax.imshow(np.ma.masked_equal(uncertain, 0), cmap="autumn", vmin=0, vmax=2, alpha=0.8)
            ax.contour(truth, [0.5], colors="#56B4E9", linewidths=0.8)
            if label.any():
                ax.contour(label, [0.5], colors="#009E73", linewidths=0.8)
            ax.set_axis_off()
            if number == 0:
                ax.set_title(f"labeling {version}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """CSV with four digits, and Markdown on the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    markdown(lines)


def markdown(lines: Sequence[Mapping[str, Any]]) -> None:
    """The lines as a table."""
    deviations = {"mean": "std", "gain": "gain_std"}
    keys = [k for k in lines[0] if k not in deviations.values()]
    print("| " + " | ".join(map(str, keys)) + " |\n" + "|---" * len(keys) + "|")
    for line in lines:
        cells = {k: f"{line[k]:{'+' if k == 'gain' else ''}.3f}" if isinstance(line[k], float) else str(line[k]) for k in keys}
        cells |= {k: f"{cells[k]} ± {line[std]:.3f}" for k, std in deviations.items() if std in line}
        print("| " + " | ".join(cells.values()) + " |")


def main(folder: str) -> None:
    """Tables and picture of the runs under `folder`."""
    runs = finished(Path(folder))
    results = ROOT / "docs" / "results"
    write(results / "coranet_blobs.csv", dice_table(runs))
    write(results / "coranet_blobs_regions.csv", region_table(runs))
    markdown(heads_table(runs))
    draw(next(iter(runs["all"].values())), ROOT / "docs" / "images" / "coranet_masks.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
