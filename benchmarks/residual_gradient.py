"""The gradient that reaches the first convolution of an untrained residual U-Net, with and without shortcuts.

    python benchmarks/residual_gradient.py <CSV>

Norm of the gradient of cross-entropy for its weights, on random images and labels of 8^3 voxels, three seeds; networks of three resolutions with
8, 16 and 32 features. Writes the table of docs/methods/resunet3d_pei.md and prints it.
"""

import csv
import sys

import torch

from lightning_modules.losses import CrossEntropy
from lightning_modules.networks import ResUNet

SEEDS = range(3)


def gradient(norm: str, blocks: int, residual: bool, seed: int) -> float:
    """The norm for one network."""
    torch.manual_seed(seed)
    network = ResUNet(4, 4, features=(8, 16, 32), blocks=blocks, norm=norm, residual=residual)
    image, target = torch.randn(1, 4, 8, 8, 8), torch.randint(0, 4, (1, 1, 8, 8, 8))
    CrossEntropy()(network(image), target).backward()
    return float(network.first[0].body[0].weight.grad.norm())


def main(path: str) -> None:
    """Writes and prints the table."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["norm", "blocks", "residual", *(f"seed {seed}" for seed in SEEDS)])
        for norm in ("group", "none"):
            for blocks in (1, 4):
                for residual in (True, False):
                    row = [norm, blocks, str(residual).lower(), *(f"{gradient(norm, blocks, residual, seed):.3g}" for seed in SEEDS)]
                    writer.writerow(row)
                    print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
