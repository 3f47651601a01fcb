"""Which sequence shows what: the light U-Net on every subset of the four, on drawn images; the table of docs/methods/modality_ablation_unet.md.

    python benchmarks/modality_effects.py TABLE.csv [SEED ...]

An image is 16 x 16 x 16 voxels with a sphere of edema, in it a core of enhancing tumor and in that one of necrosis; centers and radii are drawn
independently, so that one class cannot be guessed from another. T1ce shows enhancing tumor bright and necrosis dark, FLAIR and T2 show the
whole tumor bright, T1 next to nothing; all have noise. Model 1 is trained for 160 steps of four images on each of the 15 subsets (SGD, 0.05,
momentum 0.9; cross-entropy and Dice over the batch), and measured on 40 other images: mean Dice of the regions WT, TC, ET.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from lightning_modules.losses import DiceCE
from lightning_modules.networks import LightUNet

SIDE, TEST, BATCH, STEPS, RATE = 16, 40, 4, 160, 0.05
CHANNELS = ("t1", "t1ce", "t2", "flair")
SHOWN = {  # brightness of healthy tissue, necrosis, edema, enhancing tumor
    "t1": (0.0, -0.15, -0.1, -0.1),
    "t1ce": (0.0, -1.0, -0.1, 2.0),
    "t2": (0.0, 1.0, 1.5, 1.0),
    "flair": (0.0, 1.0, 2.0, 1.2),
}
NOISE = 0.5
SUBSETS = [subset for size in range(1, 5) for subset in combinations(CHANNELS, size)]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def drawn(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 4, 16, 16, 16) of all sequences and labels (count, 1, 16, 16, 16), 0 healthy, 1 necrosis, 2 edema, 3 enhancing tumor."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(SIDE))] * 3, indexing="ij"))
    labels = torch.zeros(count, 1, SIDE, SIDE, SIDE, dtype=torch.long)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    for label in labels:
        center, radius = uniform(5, 10, 3), uniform(4, 5.5, 1).item()
        for value, share in ((2, 1.0), (3, 0.7), (1, 0.65)):
            center = center + uniform(-0.25, 0.25, 3) * radius if value != 2 else center
            radius = radius * (share + uniform(-0.1, 0.1, 1).item() if value != 2 else 1)
            label[0][((grid - center[:, None, None, None]) ** 2).sum(dim=0) <= radius**2] = value
    images = torch.cat([torch.tensor(SHOWN[c])[labels] for c in CHANNELS], dim=1)
    return images + NOISE * torch.randn(images.shape, generator=generator), labels


def dice(predicted: torch.Tensor, truth: torch.Tensor, classes: Sequence[int]) -> float:
    """Mean over images of the Dice of the union of some classes."""
    a, b = (torch.isin(x, torch.tensor(classes)).flatten(1) for x in (predicted, truth))
    return float((2 * (a & b).sum(dim=1) / (a.sum(dim=1) + b.sum(dim=1)).clamp_min(1)).mean())


def trained(subset: Sequence[str], seed: int, steps: int = STEPS) -> dict[str, float]:
    """Dice of every region after training on these sequences; images and initial weights are those of the seed, whatever the subset."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [CHANNELS.index(channel) for channel in subset]
    torch.manual_seed(seed)
    network, loss = LightUNet(len(subset), 4), DiceCE(batch=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
    for _ in range(steps):
        images, labels = drawn(BATCH, generator)
        optimizer.zero_grad()
        loss(network(images[:, chosen]), labels).backward()
        optimizer.step()
    images, labels = drawn(TEST, generator)
    with torch.no_grad():
        predicted = network.eval()(images[:, chosen]).argmax(dim=1, keepdim=True)
    return {name: dice(predicted, labels, classes) for name, classes in REGIONS.items()}


def main(table: str, *seeds: str) -> None:
    """Writes and prints a row per subset."""
    torch.set_num_threads(1)
    with Path(table).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sequences", *(f"{region}{kind}" for region in REGIONS for kind in ("", "_sd", "_values")), "seeds"])
        for subset in SUBSETS:
            found = [trained(subset, int(seed)) for seed in seeds or "012"]
            cells, shown = [], []
            for region in REGIONS:
                values = [one[region] for one in found]
                mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
                cells += [f"{mean:.4f}", f"{spread:.4f}", " ".join(f"{v:.4f}" for v in values)]
                shown.append(f"{mean:.3f} ± {spread:.3f}")
            writer.writerow(["+".join(subset), *cells, len(found)])
            file.flush()
            print("| " + " | ".join([", ".join(subset), *shown]) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
