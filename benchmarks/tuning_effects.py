"""What rules chosen on held-out cases give on other cases; drawn probabilities, nothing is trained. Each prints a table and writes it as CSV.

    python benchmarks/tuning_effects.py levels tuned_levels.csv
    python benchmarks/tuning_effects.py suppression suppressed.csv

`levels`: nested balls of 24^3 voxels; the logits of enhancing tumor are 1.5 too high, those of the core 1 too low, with smooth noise and radii that
differ. Thresholds are chosen on 12 cases (200 trials) and applied to 12 others, five seeds.
`suppression`: cases of which a third has no enhancing tumor but a false speck of about 50 voxels of it beside much necrosis. The tree is learned on
half of 60 cases and applied to the other half, five seeds; HD95 of enhancing tumor counts the diagonal of the volume for one empty mask.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEEDS = range(5)
SIDE = 24


def levels() -> Iterator[dict[str, Any]]:
    """A row per seed: the thresholds, mean Dice of the other cases at 1/2 and with them, and how many cases are better."""
    import numpy as np
    import torch
    from scipy import ndimage

    from datamodules.readers.brats_files import brats_task
    from lightning_modules.evaluation.probability_tuning import Scorer, _search, counted

    task = brats_task("2021")
    axes = np.indices((SIDE,) * 3) - (SIDE - 1) / 2

    def case(draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        radii = np.array([10, 7, 4.5]) * draw.uniform(0.7, 1.1)
        distance = np.sqrt((axes**2).sum(axis=0)) + 2 * ndimage.gaussian_filter(draw.normal(size=(SIDE,) * 3), 1.5) * 5
        labels = np.zeros((SIDE,) * 3, np.int8)
        for value, radius in zip((2, 1, 3), radii, strict=True):
            labels[distance < radius] = value
        noise = np.stack([ndimage.gaussian_filter(draw.normal(size=(SIDE,) * 3), 1) * 5 for _ in radii])
        logits = np.stack([2 * (radius - distance) for radius in radii]) + noise + np.array([0, -1, 1.5]).reshape(3, 1, 1, 1)
        return torch.from_numpy(1 / (1 + np.exp(-logits))), torch.from_numpy(labels)

    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        cases = [counted("drawn", str(n), task, *case(draw)) for n in range(24)]
        found = _search(Scorer(cases[:12], "paint", "regions"), 200, seed)
        others = Scorer(cases[12:], "paint", "regions")
        before, after = others(dict.fromkeys(task.regions, 500)), others(found)
        yield {
            "seed": seed,
            **{f"threshold {name}": step / 1000 for name, step in found.items()},
            "before": before.mean(),
            "after": after.mean(),
            "better of 12": int((after > before).sum()),
        }


def suppression() -> Iterator[dict[str, Any]]:
    """A row per seed: HD95 and Dice of the other half without and with the tree, cases that lose the region and those that have it."""
    import numpy as np

    from lightning_modules.evaluation.suppression_tuning import gone, learned
    from lightning_modules.evaluation.tuning import HeldOut
    from lightning_modules.metrics.surface import grid_diagonal

    diagonal = grid_diagonal((240, 240, 155), (1.0, 1.0, 1.0))
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        cases = []
        for number in range(60):
            present = number % 3 != 0
            necrosis = int(draw.lognormal(7.5, 1.2) if present else draw.lognormal(10, 0.5))
            volume = int(draw.lognormal(8.5, 1.5)) + 1 if present else int(draw.lognormal(np.log(50), 0.5)) + 1
            kept = (draw.uniform(1, 6), draw.uniform(0.7, 0.95)) if present else (diagonal, 0.0)
            dropped = (diagonal, 0.0) if present else (0.0, 1.0)
            classes = {"ncr": necrosis, "ed": int(draw.lognormal(10.5, 0.7)), "et": volume}
            cases.append((HeldOut("drawn", str(number), str(number), volume, kept[0], dropped[0], classes, present), kept[1], dropped[1]))
        boxes = learned([c for c, _, _ in cases[:30]])
        others = [(c, gone(c, boxes), kept, dropped) for c, kept, dropped in cases[30:]]
        yield {
            "seed": seed,
            "HD95 before": np.mean([c.kept for c, *_ in others]),
            "HD95 after": np.mean([c.dropped if out else c.kept for c, out, *_ in others]),
            "Dice before": np.mean([kept for *_, kept, _ in others]),
            "Dice after": np.mean([dropped if out else kept for _, out, kept, dropped in others]),
            "lose it": sum(out for _, out, *_ in others),
            "wrongly": sum(out and c.present for c, out, *_ in others),
        }


def main(what: str, out: str) -> None:
    """Prints the rows of one table and writes them."""
    rows = list({"levels": levels, "suppression": suppression}[what]())
    with Path(out).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
