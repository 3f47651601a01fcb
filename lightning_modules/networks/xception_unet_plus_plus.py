"""UNet++ with an Xception encoder, for slices (Xception: Chollet, CVPR 2017; nested decoder: Zhou et al., DLMIA 2018)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import Count, Whole
from lightning_modules.networks.contract import describe

WIDTHS = (32, 64, 128, 256, 728, 1024, 1536, 2048)
DECODER = (256, 128, 64, 32, 16)


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and batch normalization."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution of each channel, one of 1 x 1 over channels, and batch normalization."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Separable convolutions, each after a ReLU, around a shortcut; with `stride` 2 both ways halve the resolution.

    Args:
        widths: of the input, and behind each of the separable convolutions.
        stride: 1 or 2.
        relu_first: whether a ReLU comes before the first of them.
    """

    def __init__(self, widths: Sequence[int], stride: int = 1, relu_first: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [*([nn.ReLU()] if place or relu_first else []), separable(inputs, outputs)]
        self.body = nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, 1)] if stride == 2 else []))
        self.shortcut = nn.Identity() if stride == 1 and widths[0] == widths[-1] else convolution(widths[0], widths[-1], 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


class Xception(nn.Module):
    """Features at strides 2, 4, 8, 16 and 32, of the widths 64, 128, 256, 728 and 2048 by default.

    Args:
        widths: the eight widths of Xception.
        middle: blocks at stride 16 that keep their width.
    """

    def __init__(self, in_channels: int, widths: Sequence[int] = WIDTHS, middle: int = 8) -> None:
        super().__init__()
        w = list(widths)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(convolution(in_channels, w[0], stride=2), nn.ReLU(), convolution(w[0], w[1]), nn.ReLU()),
                Block([w[1], w[2], w[2]], 2, relu_first=False),
                Block([w[2], w[3], w[3]], 2),
                nn.Sequential(Block([w[3], w[4], w[4]], 2), *(Block([w[4]] * 4) for _ in range(middle))),
                nn.Sequential(Block([w[4], w[4], w[5]], 2), separable(w[5], w[6]), nn.ReLU(), separable(w[6], w[7])),
            ]
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Node(nn.Module):
    """Upsampled features of the level below joined with earlier ones of this level, then two convolutions."""

    def __init__(self, below: int, same: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(below + same, outputs), nn.ReLU(), convolution(outputs, outputs), nn.ReLU())

    def forward(self, below: torch.Tensor, same: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        return self.body(torch.cat([F.interpolate(below, scale_factor=2, mode="nearest"), *same], dim=1))


class XceptionUNetPlusPlus(nn.Module):
    """2D UNet++ whose encoder is Xception, as in the multi-plane ensemble (BrainLes 2021, LNCS 12962, chapter 23, Section 2.2).

    Node (i, j) of the decoder, level i from the finest (stride 2) and column j, joins node (i + 1, j - 1), upsampled, with all earlier
    nodes (i, k < j) of its level; nodes (i, 0) are the encoder. The last node of every level has a width of its own, inner nodes that of
    the encoder at their level; one more node brings the result to full size. Only that is supervised. 34,007,628 parameters for four
    channels and four classes.

    Args:
        in_channels, out_channels: of image and logits.
        widths: of Xception; eight numbers.
        decoder: widths of the final path, from coarse to fine; five numbers.
        middle: blocks of Xception at stride 16 that keep their width.
        size: slices are resized to this before (bilinear), and logits back; None = they stay as they are, with sides divisible by 32.

    Raises:
        SuiteError: another number of widths, or a size that is not divisible by 32.

    Shapes: (B, M, H, W) -> logits (B, K, H, W). Batch normalization cannot be trained on one slice of 32 x 32, which has one voxel at stride 32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[Count] = WIDTHS,
        decoder: Sequence[Count] = DECODER,
        middle: Whole = 8,
        size: Sequence[Count] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != 8 or len(decoder) != 5:
            raise SuiteError(f"model.network: expected 8 widths and 5 decoder widths, got {len(widths)} and {len(decoder)}")
        if size is not None and (len(size) != 2 or any(s % 32 for s in size)):
            raise SuiteError(f"model.network.size={list(size)}: expected two sides divisible by 32, or null")
        self.size = None if size is None else tuple(size)
        self.encoder = Xception(in_channels, widths, middle)
        levels = [widths[1], widths[2], widths[3], widths[4], widths[7]]  # of the encoder, from fine to coarse
        self.nodes = nn.ModuleDict()
        for level in range(3, -1, -1):
            last = 4 - level
            for column in range(1, last + 1):
                below = levels[level + 1] if column < last or level == 3 else decoder[2 - level]
                outputs = decoder[3 - level] if column == last else levels[level]
                self.nodes[f"{level}_{column}"] = Node(below, levels[level] * column, outputs)
        self.last = Node(decoder[3], 0, decoder[4])
        self.head = nn.Conv2d(decoder[4], out_channels, 3, padding=1)
        describe(
            self,
            2,
            32 if size is None else 1,
            parts={"encoder": ("encoder",), "decoder": ("nodes", "last"), "heads": ("head",)},
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.shape[2:]
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        grid = [[feature] for feature in self.encoder(x)]
        for column in range(1, 5):
            for level in range(5 - column):
                grid[level].append(self.nodes[f"{level}_{column}"](grid[level + 1][column - 1], grid[level]))
        logits = self.head(self.last(grid[0][-1]))
        return logits if self.size is None else F.interpolate(logits, given, mode="bilinear", align_corners=False)
