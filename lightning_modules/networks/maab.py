"""The MAAB U-Net: blocks of chained dilated convolutions with spatial attention, gated skip connections, a pyramid of decoder features."""

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe

COMBINATIONS = ("sum", "first_and_last", "last")


def preactivated(n_in: int, n_out: int, dimensions: int, *, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Group normalization (8 groups, or the largest common divisor of 8 and the channels), ReLU, convolution that keeps the size."""
    convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.GroupNorm(gcd(8, n_in), n_in), nn.ReLU(inplace=True), convolution(n_in, n_out, kernel, padding=padding, dilation=dilation)
    )


class MAAB(nn.Module):
    """Multiple atrous convolutions attention block (Akbar et al., BrainLes 2021, Section 2.3, Fig. 2).

    Convolutions in a row, pre-activated, whose outputs are added up and weighted by a map of attention, one for all channels.

    Args:
        in_channels, out_channels: of the block.
        dilations: of the convolutions; their number is the level of the block.
        dimensions: 2 or 3.
        combine: what is added up, see `MAABUNet`.
        attention: weight the sum with the map.

    Shapes: (B, in_channels, *spatial) -> (B, out_channels, *spatial).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int],
        *,
        dimensions: int = 3,
        combine: str = "sum",
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * len(dilations)]
        self.convolutions = nn.ModuleList(
            preactivated(i, o, dimensions, dilation=d) for i, o, d in zip(widths, widths[1:], dilations, strict=False)
        )
        self.combine = combine
        self.attention = preactivated(out_channels, 1, dimensions) if attention else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *more = self.convolutions
        x = total = first(x)
        for convolution in more:
            x = convolution(x)
            total = total + x if self.combine == "sum" else total
        if more and self.combine != "sum":
            total = total + x if self.combine == "first_and_last" else x
        return total if self.attention is None else total * self.attention(total).sigmoid()


class SkipGate(nn.Module):
    """Attention on a skip connection, driven by decoder features of half its resolution (Akbar et al., BrainLes 2021, Fig. 3).

    Args:
        gating_channels: of the decoder features.
        channels: of the skip connection.

    Shapes: gating (B, gating_channels, *half), skip (B, channels, *spatial) -> (B, channels, *spatial).
    """

    def __init__(self, gating_channels: int, channels: int, dimensions: int = 3) -> None:
        super().__init__()
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self.gating = convolution(gating_channels, channels, 1)
        self.skip = convolution(channels, channels, 2, stride=2)
        self.attention = preactivated(channels, 1, dimensions, kernel=1)
        self.mode = ("bilinear", "trilinear")[dimensions - 2]

    def forward(self, gating: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        attention = self.attention(self.gating(gating) + self.skip(skip)).sigmoid()
        return skip * F.interpolate(attention, scale_factor=2, mode=self.mode)


class MAABUNet(nn.Module):
    """U-Net with two poolings whose blocks see wider the deeper they lie (Akbar et al., BrainLes 2021, Fig. 1).

    Levels of the blocks: 1 and 2 at full resolution, 3 at a half, 4 at a quarter, there twice; 3 and 2 in the decoder; the last block, on
    the features of all three resolutions brought to full size, is of level 1.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: channels at full, half and quarter resolution; the last block has those of the quarter.
        dilations: of the four convolutions of a block of level 4, in their order; a block of level k has the first k.
        combine: what a block adds up: `sum`, all its convolutions; `first_and_last`; `last`, that one alone.
        attention: the spatial attention at the end of a block.
        gates: the attention on skip connections.
        pyramid: the last block sees the decoder's features of all resolutions; without, those of the full one.
        dropout: rate on the image, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 4.

    Raises:
        SuiteError: an unknown combination; not three widths or not four dilations, or such below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (16, 32, 64),
        dilations: Sequence[Count] = (1, 2, 4, 8),
        combine: str = "sum",
        attention: bool = True,
        gates: bool = True,
        pyramid: bool = True,
        dropout: BelowOne = 0.2,
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise unknown("network.combine", combine, COMBINATIONS)
        for name, values, count in (("features", features, 3), ("dilations", dilations, 4)):
            if len(values) != count or min(values) < 1:
                raise SuiteError(f"network.{name}={list(values)}: MAABUNet takes {count} numbers of at least 1")
        parts = {
            "encoder": ("encoder1", "encoder2", "encoder3", "encoder4"),
            "bottleneck": ("bottom",),
            "decoder": ("up3", "gate3", "decoder3", "up2", "gate2", "decoder2", "lateral3", "lateral_bottom", "last"),
            "heads": ("out",),
        }
        if not gates:
            parts["decoder"] = tuple(path for path in parts["decoder"] if not path.startswith("gate"))
        if not pyramid:
            parts["decoder"] = tuple(path for path in parts["decoder"] if not path.startswith("lateral"))
        describe(self, dimensions, 4, 8, parts=parts)  # two voxels at the bottom, for widths whose groups are single channels

        def block(n_in: int, n_out: int, level: int) -> MAAB:
            return MAAB(n_in, n_out, dilations[:level], dimensions=dimensions, combine=combine, attention=attention)

        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2]
        a, b, c = features
        self.dropout = nn.Dropout(dropout)
        self.encoder1 = block(in_channels, a, 1)
        self.encoder2 = block(a, a, 2)
        self.encoder3 = block(a, b, 3)
        self.encoder4 = block(b, c, 4)
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](2)
        self.bottom = block(c, c, 4)
        self.up3 = transposed(c, b, 2, stride=2)
        self.gate3 = SkipGate(c, b, dimensions) if gates else None
        self.decoder3 = block(2 * b, b, 3)
        self.up2 = transposed(b, a, 2, stride=2)
        self.gate2 = SkipGate(b, a, dimensions) if gates else None
        self.decoder2 = block(2 * a, a, 2)
        self.lateral3 = convolution(b, b, 3, padding=1) if pyramid else None
        self.lateral_bottom = convolution(c, c, 3, padding=1) if pyramid else None
        self.last = block(a + b + c if pyramid else a, c, 1)
        self.out = convolution(c, out_channels, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        full = self.encoder2(self.encoder1(self.dropout(image)))
        half = self.encoder3(self.pool(full))
        bottom = self.bottom(self.encoder4(self.pool(half)))
        half = half if self.gate3 is None else self.gate3(bottom, half)
        half = self.decoder3(torch.cat([self.up3(bottom), half], dim=1))
        full = full if self.gate2 is None else self.gate2(half, full)
        full = self.decoder2(torch.cat([self.up2(half), full], dim=1))
        if self.lateral3 is not None and self.lateral_bottom is not None:
            coarse = F.interpolate(self.lateral3(half), scale_factor=2), F.interpolate(self.lateral_bottom(bottom), scale_factor=4)
            full = torch.cat([full, *coarse], dim=1)
        return self.out(self.last(full))
