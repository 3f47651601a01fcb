"""How far information travels in two layers: the first table of docs/methods/swin_unetr.md.

    python benchmarks/swin_reach.py TABLE.csv [SEED ...]

The share of 14 x 14 x 14 tokens whose gradient of the token (6, 6, 6) behind two layers is not 0: the first stage of Swin UNETR (windows of
7^3) with shifted windows and without, and two convolutions of 3 x 3 x 3. Weights are as they are drawn.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lightning_modules.networks import swin_unetr

SIDE, TOKEN, WIDTH = 14, (6, 6, 6), 12


def first_stage(shift: bool) -> nn.Module:
    """The two transformer blocks of the first stage, without the merging of tokens behind them."""
    stage = swin_unetr(1, 1, feature_size=WIDTH, shift=shift).swinViT.layers1[0]
    stage.downsample = None
    return stage


def convolutions() -> nn.Module:
    """Two convolutions with what is between them."""
    return nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.GELU(), nn.Conv3d(WIDTH, WIDTH, 3, padding=1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "two blocks, shifted": partial(first_stage, True),
    "two blocks, not shifted": partial(first_stage, False),
    "two convolutions": convolutions,
}


def reach(layers: nn.Module, token: tuple[int, int, int] = TOKEN) -> torch.Tensor:
    """Tokens (14, 14, 14), bool, that the output token depends on."""
    x = torch.randn(1, WIDTH, SIDE, SIDE, SIDE, requires_grad=True)
    layers(x)[(0, slice(None), *token)].square().sum().backward()
    return x.grad[0].abs().sum(dim=0) > 0


def main(table: str, *seeds: str) -> None:
    """Writes and prints a row per kind of layers and seed."""
    torch.set_num_threads(1)
    with Path(table).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layers", "seed", "share"])
        for name, made in LAYERS.items():
            for seed in seeds or "012":
                torch.manual_seed(int(seed))
                row = [name, seed, f"{reach(made()).float().mean():.4f}"]
                writer.writerow(row)
                print(*row, sep=" | ")


if __name__ == "__main__":
    main(*sys.argv[1:])
