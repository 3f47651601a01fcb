"""Table of docs/methods/attention_unet_positive_mining.md: what mining and attention change, from run folders.

    python benchmarks/mining_effects.py <folder of runs> <file of the table>

Of every finished run: the Dice of validation, mean over all validations (higher where learning is faster) and after the first quarter of
them; the Dice of the test cases, mean over regions; the same of these cases mined (multiplied by their own mask), and how much brighter the
spatial gates of the encoder are inside of the tumor than in the rest of the brain. Validation and test never see mined cases.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lesionbench.checkpoint import load_method
from lesionbench.results import read_rows
from lightning_modules.networks.cbam import SpatialGate


def finished(folder: Path) -> dict[tuple[str, float], dict[int, Path]]:
    """(attention, p of mining) -> seed -> run folder."""
    runs: dict[tuple[str, float], dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.rglob("test/cases.csv")):
        config = OmegaConf.load(path.parent.parent / "config.yaml")
        runs[config.model.network.attention, config.augmentation.mining.p][config.seed] = path.parent.parent
    return {key: dict(sorted(runs[key].items())) for key in sorted(runs)}


def curve(run: Path) -> list[float]:
    """Mean Dice of the validation cases, one value a validation."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "val/dice"]


def dice(said: torch.Tensor, truth: torch.Tensor) -> float:
    """Of two masks; 1 where both are empty."""
    total = int(said.sum() + truth.sum())
    return 2 * int((said & truth).sum()) / total if total else 1.0


@torch.no_grad()
def seen(run: Path) -> dict[str, float]:
    """Dice of mined test cases, and the ratio of the mean spatial gates inside and outside of the tumor."""
    config = OmegaConf.load(run / "config.yaml")
    data = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("test")
    method, _ = load_method(run / "checkpoints" / "last.ckpt")
    gates: list[torch.Tensor] = []
    for block in getattr(method.network, "attention", ()):
        if isinstance(getattr(block, "spatial", None), SpatialGate):
            block.spatial.register_forward_hook(lambda _, __, gate: gates.append(gate))
    mined, ratios = [], []
    for batch in data.case_loader(data.parts["test"]):
        truth, brain = data.task.region_masks(batch["label"][0, 0]), batch["brain_mask"][0, 0].bool()
        tumor = batch["label"][0, 0] > 0
        gates.clear()
        method.predict_case(batch)
        for gate in gates:
            size = [-(-n // d) * d for n, d in zip(tumor.shape, method.network.divisor, strict=True)]
            full = F.interpolate(gate, size)[0, 0, : tumor.shape[0], : tumor.shape[1], : tumor.shape[2]]
            ratios.append(float(full[tumor].mean() / full[brain & ~tumor].mean()))
        said = method.predict_case({**batch, "image": batch["image"] * tumor})
        masks = data.task.region_masks(said.labels)
        mined.append(statistics.mean(dice(a.bool(), b.bool()) for a, b in zip(masks, truth, strict=True)))
    return {"mined": statistics.mean(mined), **({"gates": statistics.mean(ratios)} if ratios else {})}


def measured(run: Path) -> dict[str, float]:
    """All that is told of one run."""
    values = curve(run)
    rows = [row["dice"] for row in read_rows(run / "test" / "cases.csv") if row["member"] == "" and row["region"]]
    return {
        "validation, mean over epochs": statistics.mean(values),
        "validation, after a quarter": values[-(-len(values) // 4) - 1],
        "test": statistics.mean(rows),
        **seen(run),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """One per variant and measure: the values by seed, their mean and standard deviation."""
    table = []
    for (attention, p), runs in finished(folder).items():
        found = {seed: measured(run) for seed, run in runs.items()}
        for what in next(iter(found.values())):
            values = {seed: of[what] for seed, of in found.items()}
            spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            head = {"attention": attention, "mining": p, "measure": what}
            table.append({**head, "mean": statistics.mean(values.values()), "std": spread, **values})
    return table


def main(folder: str, out: str) -> None:
    """Writes the table as CSV and prints it as Markdown, a row for each variant."""
    table = lines(Path(folder))
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) and k != "mining" else v for k, v in line.items()} for line in table)
    measures = list(dict.fromkeys(line["measure"] for line in table))
    print("| attention, mining | " + " | ".join(measures) + " |\n" + "|---" * (1 + len(measures)) + "|")
    for variant in dict.fromkeys((line["attention"], line["mining"]) for line in table):
        cells = {
            line["measure"]: f"{line['mean']:.3f} ± {line['std']:.3f}" for line in table if (line["attention"], line["mining"]) == variant
        }
        print(f"| {variant[0]}, {variant[1]:g} | " + " | ".join(cells.get(m, "") for m in measures) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:3])
