"""What dilated convolutions reach: the table of docs/methods/maab_unet.md that needs no images.

    python benchmarks/maab_effects.py TABLE.csv [SEED ...]

A block of level 4 with 8 channels sees white noise of 6 x 6 x 40 voxels and has to say for every voxel whether the one 8 voxels further along
the last axis is positive. With dilations 1, 2, 4, 8 a voxel sees 15 voxels to each side, with four convolutions of dilation 1, which have as
many parameters, 4. Accuracy on voxels whose cue lies inside of the image, after 240 steps of eight images, Adam with one cycle of the learning
rate up to 0.01, on one thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.networks.maab import MAAB

FAR = 8
DILATIONS = {"1, 2, 4, 8": (1, 2, 4, 8), "1, 1, 1, 1": (1, 1, 1, 1)}


def cue_network(dilations: Sequence[int]) -> nn.Module:
    """A block and a 1 x 1 x 1 convolution."""
    return nn.Sequential(MAAB(1, 8, dilations), nn.Conv3d(8, 1, 1))


def cue_accuracy(dilations: Sequence[int], seed: int, steps: int = 240) -> float:
    """Share of voxels of 64 new images whose far cue is told rightly."""
    torch.manual_seed(seed)
    network = cue_network(dilations)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.randn(size, 1, 6, 6, 40)
        return image, (image[..., FAR:] > 0).float()

    for _ in range(steps):
        image, cue = batch(8)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(image)[..., :-FAR], cue).backward()
        optimizer.step()
        schedule.step()
    image, cue = batch(64)
    with torch.no_grad():
        return float(((network(image)[..., :-FAR] > 0) == cue.bool()).float().mean())


def main(table: str, *seeds: str) -> None:
    """Writes and prints a row per dilations."""
    torch.set_num_threads(1)
    with Path(table).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dilations", "parameters", "mean", "std", "seeds", "values"])
        for name, dilations in DILATIONS.items():
            found = [cue_accuracy(dilations, int(seed)) for seed in seeds or "012"]
            count = sum(p.numel() for p in cue_network(dilations).parameters())
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            row = [name, count, f"{statistics.mean(found):.4f}", f"{spread:.4f}", len(found), " ".join(f"{v:.4f}" for v in found)]
            writer.writerow(row)
            print(*row, sep=" | ")


if __name__ == "__main__":
    main(*sys.argv[1:])
