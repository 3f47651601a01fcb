"""U-Net whose last decoder block exists once per head."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, numbered
from lightning_modules.networks.multi_head import Heads, units
from lightning_modules.networks.multi_head import dropout as channel_dropout
from lightning_modules.networks.multi_head import upsampling as upsample


class MultiHeadUNet(nn.Module):
    """Plain U-Net; the decoder block at full resolution and the 1x1 convolution after it are replicated (Shi et al., IEEE TMI 2022, fig. 2).

    Two convolutions of side 3 with normalization and ReLU per level, max pooling, concatenated skips. With one head, 1 channel and 2
    outputs it has 31 042 434 parameters; the two further heads add 222 212.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K of every head.
        dimensions: 2 or 3.
        features: width of each level, finest first.
        heads: number of heads.
        norm: `batch`, `instance` (without parameters), `group` or `none`.
        dropout: rate of dropout of channels at the bottom and before every head's last convolution, in [0, 1].
        upsampling: `transposed`, `linear` or `nearest` (the latter two followed by a convolution).

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), with several heads {"logits", "heads"}; sides divisible by 2 ** (levels - 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 2,
        features: Sequence[Count] = (64, 128, 256, 512, 1024),
        heads: Count = 1,
        norm: str = "batch",
        dropout: BelowOne = 0.0,
        upsampling: str = "transposed",
    ) -> None:
        super().__init__()
        divisor = 2 ** (len(features) - 1)
        coarsest = len(features) - 1
        parts = {
            "encoder": numbered("encoder", coarsest),
            "bottleneck": (f"encoder.{coarsest}",),
            "decoder": ("ups", "decoder"),
            "heads": ("branches",),
        }
        describe(self, dimensions, divisor, divisor * (2 if norm in ("batch", "instance") else 1), parts=parts)
        widths = list(features)
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](2)
        self.encoder = nn.ModuleList(units(i, o, dimensions, norm, 2) for i, o in zip([in_channels, *widths], widths, strict=False))
        self.bottom = channel_dropout(dropout, dimensions)
        finer = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (width below, width of the level), coarsest first
        self.ups = nn.ModuleList(upsample(upsampling, deep, wide, dimensions) for deep, wide in finer)
        self.decoder = nn.ModuleList(units(2 * wide, wide, dimensions, norm, 2) for _, wide in finer[:-1])

        def head() -> nn.Module:
            block = units(2 * widths[0], widths[0], dimensions, norm, 2)
            return nn.Sequential(*block, channel_dropout(dropout, dimensions), convolution(widths[0], out_channels, 1))

        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self.branches = Heads(head, heads)

    def forward(self, image: torch.Tensor) -> torch.Tensor | Mapping[str, Any]:
        skips = [self.encoder[0](image)]
        for block in self.encoder[1:]:
            skips.append(block(self.pool(skips[-1])))
        x = self.bottom(skips.pop())
        for up, block in zip(self.ups, [*self.decoder, self.branches], strict=True):
            x = block(torch.cat([skips.pop(), up(x)], dim=1))
        return x
