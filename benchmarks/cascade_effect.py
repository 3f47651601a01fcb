"""What a mask of the whole tumor does for the network of the core behind it: the table of docs/methods/cascaded_3d_unet.md.

    python benchmarks/cascade_effect.py cascade_early.csv [seed ...]

Drawn volumes of 16^3 voxels: a tumor that is bright in FLAIR at its rim alone, a core in it, bright in T1ce with an enhancing shell, and outside of
the tumor four balls that look like the core, two of them within a ring that is bright in FLAIR and too small for a tumor. Round 1 learns the tumor
for 200 steps. Then the network of the core is trained, from the same initial weights and on the same samples, shown the tumor that round 1 finds
(`cascade`), or an empty map in its place (`plain`). Measured on 16 other volumes after 25, 50, 100 and 200 steps: Dice of the core, and voxels marked
outside of the tumor. Seeds 0, 1, 2 unless given.
"""

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import CascadedUNet3D
from lightning_modules.inferers import Whole
from lightning_modules.losses import RegionDice
from lightning_modules.networks import RReLUUNet

SIDE, TRAINED, TESTED, BATCH, RATE = 16, 24, 16, 2, 3e-3
STEPS, FIRST = (25, 50, 100, 200), 200
TASK = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "ncr": 1, "ed": 2, "et": 4},
    {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
)


def volumes(count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Images (B, 4, 16, 16, 16) and labels (B, 1, 16, 16, 16)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(SIDE))] * 3, indexing="ij"))

    def uniform(low: float, high: float, size: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=draw)

    def distance(center: torch.Tensor) -> torch.Tensor:
        return (grid - center[:, None, None, None]).square().sum(dim=0).sqrt()

    images, labels = [], []
    for _ in range(count):
        image = 0.5 * torch.randn(4, *(SIDE,) * 3, generator=draw)
        middle, radius, core = uniform(5, 10, 3), uniform(3.5, 5), uniform(1.8, 2.6)
        tumor, inner = distance(middle), distance(middle + uniform(-0.7, 0.7, 3))
        label = torch.zeros((SIDE,) * 3, dtype=torch.long)
        label[tumor < radius] = 2
        label[inner < core] = 3
        label[inner < 0.6 * core] = 1
        swollen, bright = (tumor < radius) & (tumor > radius - 1.2), inner < core
        for number in range(4):
            other = distance(uniform(1, SIDE - 2, 3))
            bright |= (other < uniform(1.8, 2.6)) & (tumor > radius + 1)
            if number % 2:  # a ring as thick as the tumor's, but too small
                swollen |= (other < 3.2) & (other > 2) & (tumor > radius + 1)
        image[3][swollen] += 2
        image[1][bright] += 2
        images.append(image)
        labels.append(label[None])
    return {"image": torch.stack(images), "label": torch.stack(labels)}


def a_round(region: str, forerunners: Mapping[str, Any] | None = None) -> CascadedUNet3D:
    """A round in small; `forerunners` in place of paths as a checkpoint has them."""
    network = partial(RReLUUNet, features=(8, 16, 32))
    loss = RegionDice(squared=True, smooth=1e-6)
    return CascadedUNet3D(TASK, network=network, loss=loss, inferer=Whole(4), target=RegionSigmoid, region=region, forerunners=forerunners)


def train(
    method: CascadedUNet3D, data: Mapping[str, torch.Tensor], steps: int, draw: torch.Generator, optimizer: torch.optim.Optimizer
) -> None:
    """So many steps on samples that `draw` chooses; slopes of the network are drawn from torch's own generator."""
    method.train()
    for _ in range(steps):
        chosen = torch.randint(len(data["image"]), (BATCH,), generator=draw)
        loss = method.compute_loss({name: values[chosen] for name, values in data.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def probabilities(method: CascadedUNet3D, data: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the network of the round says about every volume (B, 1, 16, 16, 16), given the maps in `data`."""
    method.eval()
    with torch.no_grad():
        return method.network(method.shown(data["image"], data)).sigmoid()


def measures(method: CascadedUNet3D, data: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean Dice of the core, and mean number of voxels marked outside of the tumor."""
    marked, label = probabilities(method, data) > 0.5, data["label"]
    core, axes = (label == 1) | (label == 3), (1, 2, 3, 4)
    dice = 2 * (marked & core).sum(axes) / (marked.sum(axes) + core.sum(axes))
    return {"dice": round(float(dice.mean()), 4), "outside": round(float((marked & (label == 0)).sum(axes).float().mean()), 2)}


def curves(seed: int) -> list[dict[str, Any]]:
    """A row for each arm and number of steps."""
    draw = torch.Generator().manual_seed(seed)
    train_set, test_set = volumes(TRAINED, draw), volumes(TESTED, draw)
    torch.manual_seed(seed)
    first = a_round("WT")
    train(first, train_set, FIRST, torch.Generator().manual_seed(seed), torch.optim.Adam(first.network.parameters(), lr=RATE))
    options = {
        "network": partial(RReLUUNet, features=(8, 16, 32)),
        "loss": RegionDice(),
        "inferer": Whole(4),
        "target": RegionSigmoid,
        "region": "WT",
    }
    given = {"wt": {"method": partial(CascadedUNet3D, **options), "task": TASK.to_dict(), "patients": []}}
    found = {name: probabilities(first, data) for name, data in (("train", train_set), ("test", test_set))}
    rows = []
    for arm in ("plain", "cascade"):
        torch.manual_seed(seed + 1000)
        method = a_round("TC", given)
        share = 1.0 if arm == "cascade" else 0.0
        seen = {**train_set, "wt": share * found["train"]}, {**test_set, "wt": share * found["test"]}
        chosen = torch.Generator().manual_seed(seed + 1000)
        optimizer, done = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=RATE), 0
        torch.manual_seed(seed + 2000)
        for steps in STEPS:
            train(method, seen[0], steps - done, chosen, optimizer)
            done = steps
            rows.append({"seed": seed, "arm": arm, "steps": steps, **measures(method, seen[1])})
    return rows


def main(path: str, seeds: Sequence[int]) -> None:
    """Writes and prints the rows of all seeds, then their means and standard deviations."""
    torch.set_num_threads(1)
    rows = [row for seed in seeds for row in curves(seed)]
    for arm in ("plain", "cascade"):
        for steps in STEPS:
            of = [row for row in rows if (row["arm"], row["steps"]) == (arm, steps) and row["seed"] not in ("mean", "std")]
            for name, summary in (("mean", statistics.mean), ("std", statistics.stdev)):
                if len(of) > 1:
                    rows.append(
                        {"seed": name, "arm": arm, "steps": steps, **{m: round(summary(r[m] for r in of), 4) for m in ("dice", "outside")}}
                    )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
