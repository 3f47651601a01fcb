"""The V-Net of the semi-supervised literature, with one or several heads."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, numbered
from lightning_modules.networks.multi_head import Heads, normalization, units
from lightning_modules.networks.multi_head import dropout as channel_dropout
from lightning_modules.networks.multi_head import upsampling as upsample


class MultiHeadVNet(nn.Module):
    """V-Net of plain blocks with convolutions of side 3, as UA-MT (Yu et al., MICCAI 2019) and what followed it use.

    Strided convolutions of side 2 down, transposed ones up, each with normalization and ReLU; skips are added. A head is the last block (one
    convolution) and a 1x1 convolution (Shi et al., IEEE TMI 2022). One channel, two outputs, instance norm: 9 443 266 parameters with one
    head, 9 457 190 with three. It differs from `networks.vnet` (Milletari et al., 2016), whose blocks are residual with side 5.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K of every head.
        dimensions: 2 or 3.
        features: width of each level, finest first.
        convolutions: per block of each level, down and up alike.
        heads: number of heads.
        norm: `instance` (without parameters), `batch`, `group` or `none`.
        dropout: rate of dropout of channels at the bottom and before every head's last convolution, in [0, 1]; 0.5 in UA-MT.
        upsampling: `transposed`, `linear` or `nearest` (the latter two followed by a convolution).

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), with several heads {"logits", "heads"}; sides divisible by 2 ** (levels - 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (16, 32, 64, 128, 256),
        convolutions: Sequence[Count] = (1, 2, 3, 3, 3),
        heads: Count = 1,
        norm: str = "instance",
        dropout: BelowOne = 0.0,
        upsampling: str = "transposed",
    ) -> None:
        super().__init__()
        divisor = 2 ** (len(features) - 1)
        coarsest = len(features) - 1
        parts = {
            "encoder": (*numbered("encoder", coarsest), *numbered("downs", coarsest - 1)),
            "bottleneck": (f"encoder.{coarsest}", f"downs.{coarsest - 1}"),
            "decoder": ("ups", "decoder"),
            "heads": ("branches",),
        }
        describe(self, dimensions, divisor, divisor * (2 if norm in ("batch", "instance") else 1), parts=parts)
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        levels = list(zip(features, convolutions, strict=True))
        steps = list(pairwise(features))

        def block(width: int, count: int) -> nn.Module:
            return units(width, width, dimensions, norm, count)

        def resized(layer: nn.Module, width: int) -> nn.Module:
            return nn.Sequential(layer, normalization(norm, width, dimensions), nn.ReLU(inplace=True))

        def head() -> nn.Module:
            last = block(features[0], convolutions[0])
            return nn.Sequential(*last, channel_dropout(dropout, dimensions), convolution(features[0], out_channels, 1))

        self.encoder = nn.ModuleList([units(in_channels, features[0], dimensions, norm, convolutions[0])])
        self.encoder.extend(block(width, count) for width, count in levels[1:])
        self.downs = nn.ModuleList(resized(convolution(wide, deep, 2, stride=2), deep) for wide, deep in steps)
        self.bottom = channel_dropout(dropout, dimensions)
        self.ups = nn.ModuleList(resized(upsample(upsampling, deep, wide, dimensions), wide) for wide, deep in reversed(steps))
        self.decoder = nn.ModuleList(block(width, count) for width, count in levels[-2:0:-1])
        self.branches = Heads(head, heads)

    def forward(self, image: torch.Tensor) -> torch.Tensor | Mapping[str, Any]:
        skips = [self.encoder[0](image)]
        for down, block in zip(self.downs, self.encoder[1:], strict=True):
            skips.append(block(down(skips[-1])))
        x = self.bottom(skips.pop())
        for up, block in zip(self.ups, [*self.decoder, self.branches], strict=True):
            x = block(up(x) + skips.pop())
        return x
