"""Anisotropic 3D ResNet-18 with a light decoder, with one or several heads."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.ranges import BelowOne, Count
from lightning_modules.networks.contract import describe, numbered
from lightning_modules.networks.multi_head import Heads, normalization, units
from lightning_modules.networks.multi_head import dropout as channel_dropout


class _Residual(nn.Module):
    """Basic block of ResNet-18 whose convolutions act in the plane; a stride of 2 halves the plane by the convolution, the slices by pooling."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Sequential(_plane(n_in, n_out, stride), normalization(norm, n_out, 3), nn.ReLU(inplace=True))
        self.second = nn.Sequential(_plane(n_out, n_out), normalization(norm, n_out, 3))
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            convolution = nn.Conv3d(n_in, n_out, 1, stride=(stride, stride, 1), bias=False)
            self.shortcut = nn.Sequential(convolution, normalization(norm, n_out, 3))
        self.pool = nn.MaxPool3d((1, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(F.relu(self.second(self.first(x)) + self.shortcut(x)))


def _plane(n_in: int, n_out: int, stride: int = 1) -> nn.Module:
    return nn.Conv3d(n_in, n_out, (3, 3, 1), stride=(stride, stride, 1), padding=(1, 1, 0), bias=False)


class _Up(nn.Module):
    """Linear interpolation to the skip, which is added; then a convolution in the plane and one across the slices."""

    def __init__(self, n_in: int, n_out: int, norm: str) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(n_in, n_out, 1, bias=False)
        across = nn.Conv3d(n_out, n_out, (1, 1, 3), padding=(0, 0, 1), bias=False)
        parts = [[layer, normalization(norm, n_out, 3), nn.ReLU(inplace=True)] for layer in (_plane(n_out, n_out), across)]
        self.block = nn.Sequential(*parts[0], *parts[1])

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.block(F.interpolate(self.reduce(x), skip.shape[2:], mode="trilinear", align_corners=False) + skip)


class MultiHeadResNet(nn.Module):
    """3D ResNet-18 in which only the first convolution sees across slices: 7x7x3, all others 3x3x1 (Shi et al., IEEE TMI 2022, after AHNet,
    Liu et al., MICCAI 2018). The paper does not describe the decoder: here, as in AHNet, it adds the encoder's features after linear
    interpolation and convolves in the plane and across slices in turn. Every head is a convolution of side 3 and one of side 1.

    The slice axis is the last one.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K of every head.
        width: of the stem and the first stage; the further stages have 2, 4 and 8 times as many. 64 in ResNet-18.
        head_width: features that the heads see.
        heads: number of heads.
        norm: `batch`, `instance` (without parameters), `group` or `none`.
        dropout: rate of dropout of channels at the bottom and before every head's last convolution, in [0, 1].

    Shapes: (B, M, X, Y, Z) -> logits (B, K, X, Y, Z), with several heads {"logits", "heads"}; X, Y divisible by 32, Z by 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: Count = 64,
        head_width: Count = 16,
        heads: Count = 1,
        norm: str = "batch",
        dropout: BelowOne = 0.0,
    ) -> None:
        super().__init__()
        double = 2 if norm in ("batch", "instance") else 1
        parts = {
            "encoder": ("stem", *numbered("stages", 3)),
            "bottleneck": ("stages.3",),
            "decoder": ("ups", "reduce"),
            "heads": ("branches",),
        }
        describe(self, 3, (32, 32, 16), (32 * double, 32 * double, 16 * double), parts=parts)
        stem = nn.Conv3d(in_channels, width, (7, 7, 3), stride=(2, 2, 1), padding=(3, 3, 1), bias=False)
        self.stem = nn.Sequential(stem, normalization(norm, width, 3), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool3d(3, stride=2, padding=1)
        widths = [width * 2**level for level in range(4)]
        self.stages = nn.ModuleList()
        for level, (n_in, n_out) in enumerate(zip([width, *widths], widths, strict=False)):
            self.stages.append(nn.Sequential(_Residual(n_in, n_out, 2 if level else 1, norm), _Residual(n_out, n_out, 1, norm)))
        self.bottom = channel_dropout(dropout, 3)
        skips = [widths[2], widths[1], widths[0], width]
        self.ups = nn.ModuleList(_Up(n_in, n_out, norm) for n_in, n_out in zip([widths[3], *skips], skips, strict=False))
        self.reduce = nn.Conv3d(width, head_width, 1)

        def head() -> nn.Module:
            return nn.Sequential(
                *units(head_width, head_width, 3, norm), channel_dropout(dropout, 3), nn.Conv3d(head_width, out_channels, 1)
            )

        self.branches = Heads(head, heads)

    def forward(self, image: torch.Tensor) -> torch.Tensor | Mapping[str, Any]:
        skips = [self.stem(image)]
        x = self.pool(skips[0])
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        x = self.bottom(skips.pop())
        for up in self.ups:
            x = up(x, skips.pop())
        return self.branches(F.interpolate(self.reduce(x), image.shape[2:], mode="trilinear", align_corners=False))
