"""What one-sided Hausdorff losses do on drawn images: an ellipse, and small specks far from it that look the same and are background.

    python benchmarks/hausdorff_effects.py docs/results/vae_unet_hausdorff_loss_drawn.csv 0 1 2 3 4

Images of 64 x 64 pixels with noise, a small U-Net, AdamW; per seed, cross-entropy alone, with the mean loss, and with mean and maximum. 16
new images of each seed are tested: mean Dice and HD95 in pixels.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

from lesionbench.keyed import numpy_generator
from lightning_modules.distances import distance_outside
from lightning_modules.losses import CrossEntropy, one_sided_hausdorff
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.metrics.surface import surface_metrics
from lightning_modules.networks import basic_unet

SIDE, NOISE, STEPS, BATCH, RATE, TRAIN, TEST = 64, 0.6, 250, 4, 2e-3, 24, 16
WAYS = {"cross_entropy": (0.0, 0.0), "mean": (0.1, 0.0), "mean_and_max": (0.1, 0.01)}


def drawn(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (1, 64, 64) and label (64, 64), bool."""
    rng = numpy_generator("hausdorff effects", seed, index)
    grid = np.indices((SIDE, SIDE))
    center, radii = rng.uniform(20, 44, 2), rng.uniform(6, 11, 2)
    label = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii, strict=True)) < 1
    bright = label.copy()
    far = np.argwhere(distance_outside(label, (1.0, 1.0)) > 8)
    for x, y in far[rng.choice(len(far), int(rng.integers(3, 8)), replace=False)]:
        bright |= (grid[0] - x) ** 2 + (grid[1] - y) ** 2 <= 4
    bright &= (distance_outside(label, (1.0, 1.0)) > 4) | label
    return (bright + NOISE * rng.standard_normal(label.shape)).astype(np.float32)[None], label


def trained(seed: int, weights: tuple[float, float], cases: list[tuple[np.ndarray, np.ndarray]]) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = basic_unet(1, 2, dimensions=2, features=[8, 8, 16, 16, 32, 8], norm="instance")
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    images = torch.from_numpy(np.stack([image for image, _ in cases]))
    labels = torch.from_numpy(np.stack([label for _, label in cases]))[:, None].long()
    maps = torch.from_numpy(np.stack([[distance_outside(~label, (1.0, 1.0)), distance_outside(label, (1.0, 1.0))] for _, label in cases]))
    order = numpy_generator("batches", seed)
    for _ in range(STEPS):
        chosen = order.choice(len(cases), BATCH, replace=False)
        logits = network(images[chosen])
        mean, largest = one_sided_hausdorff(logits.softmax(1), maps[chosen], torch.ones(BATCH, 1, SIDE, SIDE))
        loss = CrossEntropy()(logits, labels[chosen]) + weights[0] * mean + weights[1] * largest
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def main() -> None:
    torch.set_num_threads(1)
    out, seeds = Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]]
    rows = []
    for seed in seeds:
        cases = [drawn(seed, index) for index in range(TRAIN + TEST)]
        for way, weights in WAYS.items():
            network = trained(seed, weights, cases[:TRAIN])
            dice, distances = [], []
            for image, label in cases[TRAIN:]:
                with torch.no_grad():
                    found = network(torch.from_numpy(image)[None])[0].argmax(dim=0).numpy() == 1
                dice.append(overlap_metrics(found, label)["dice"])
                distances.append(surface_metrics(found, label, (1.0, 1.0), ("hd95",))["hd95"])
            rows.append({"seed": seed, "loss": way, "dice": round(float(np.mean(dice)), 4), "hd95_px": round(float(np.mean(distances)), 3)})
            print(rows[-1], flush=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for way in WAYS:
        dice, distances = (np.array([row[key] for row in rows if row["loss"] == way]) for key in ("dice", "hd95_px"))
        print(f"{way}: Dice {dice.mean():.3f} +- {dice.std(ddof=1):.3f}, HD95 {distances.mean():.2f} +- {distances.std(ddof=1):.2f} px")


if __name__ == "__main__":
    main()
