"""U-Net and V-Net that go up by interpolation and a convolution: linear and nearest up-sampling have the very same parameters.

That is what the average of two networks needs which are to differ all the same (`CoLearning`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lightning_modules.networks.contract import describe, per_axis

UPSAMPLINGS = ("linear", "nearest")
NORMS = {"instance": "InstanceNorm", "batch": "BatchNorm", "group": "GroupNorm"}


class Stack(nn.Sequential):
    """`count` times convolution of 3 voxels a side, normalization, ReLU."""

    def __init__(self, dimensions: int, width_in: int, width: int, count: int, norm: str, groups: int) -> None:
        layers: list[nn.Module] = []
        for number in range(count):
            layers.append(_layer("Conv", dimensions)(width if number else width_in, width, 3, padding=1))
            layers.append(nn.GroupNorm(groups, width) if norm == "group" else _layer(NORMS[norm], dimensions)(width, affine=True))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Up(nn.Module):
    """Twice the resolution by interpolation, then a `Stack` of one."""

    def __init__(self, dimensions: int, width_in: int, width: int, norm: str, groups: int, upsampling: str) -> None:
        super().__init__()
        self.mode = "nearest" if upsampling == "nearest" else {2: "bilinear", 3: "trilinear"}[dimensions]
        self.conv = Stack(dimensions, width_in, width, 1, norm, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode=self.mode))


class UpsampledUNet(nn.Module):
    """See `upsampled_unet` (skips are concatenated) and `upsampled_vnet` (skips are added, levels change by strided convolutions)."""

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        convolutions: Sequence[int],
        add: bool,
        norm: str,
        groups: int,
        upsampling: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.add = add
        self.down, self.encoder, self.up, self.decoder = (nn.ModuleList() for _ in range(4))
        stack = (norm, groups)
        for level, (width, count) in enumerate(zip(channels, convolutions, strict=True)):
            before = channels[level - 1] if level else in_channels
            if level:
                self.down.append(_strided(dimensions, before, width, *stack) if add else _layer("MaxPool", dimensions)(2))
            self.encoder.append(Stack(dimensions, width if add and level else before, width, count, *stack))
        for level in reversed(range(len(channels) - 1)):
            width = channels[level]
            self.up.append(Up(dimensions, channels[level + 1], width, *stack, upsampling))
            self.decoder.append(Stack(dimensions, width if add else 2 * width, width, convolutions[level], *stack))
        self.dropout = nn.Dropout(dropout)
        self.head = _layer("Conv", dimensions)(channels[0], out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, stack in enumerate(self.encoder):
            x = stack(self.down[level - 1](x) if level else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, stack in zip(self.up, self.decoder, strict=True):
            x, skip = up(x), skips.pop()
            x = stack(x + skip if self.add else torch.cat([skip, x], dim=1))
        return self.head(self.dropout(x))


def upsampled_unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128),
    norm: str = "group",
    groups: int = 4,
    upsampling: str = "linear",
    dropout: float = 0.0,
) -> UpsampledUNet:
    """Plain U-Net: two convolutions per level, max pooling down, interpolation and a convolution up, concatenated skips.

    Args:
        channels: width of each level, finest first; every level halves the resolution.
        norm: `instance`, `batch` or `group`.
        groups: of group normalization; divides every width.
        upsampling: `linear` or `nearest`; the parameters are the same.
        dropout: rate of dropout (of single values) at the coarsest level and before the last convolution, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).

    Raises:
        SuiteError: an unknown norm or up-sampling, groups that do not divide the widths.
    """
    convolutions = [2] * len(channels)
    return _build(in_channels, out_channels, dimensions, channels, convolutions, False, norm, groups, upsampling, dropout)


def upsampled_vnet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: int = 3,
    channels: Sequence[int] = (16, 32, 64, 128, 256),
    convolutions: Sequence[int] = (1, 2, 3, 3, 3),
    norm: str = "instance",
    groups: int = 8,
    upsampling: str = "linear",
    dropout: float = 0.0,
) -> UpsampledUNet:
    """V-Net of the left-atrium literature (Yu et al., MICCAI 2019, after Milletari et al., 3DV 2016), with interpolation on the way up.

    Convolutions of 3 voxels a side without residuals, strided convolutions down, skips added. The literature's has transposed
    convolutions up and batch normalization, whose statistics cannot be averaged over networks.

    Args:
        channels: width of each level, finest first; every level halves the resolution.
        convolutions: per level, on the way down and on the way up.
        norm, groups, upsampling, dropout: as `upsampled_unet`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).

    Raises:
        SuiteError: as `upsampled_unet`, or lists of different lengths.
    """
    if len(channels) != len(convolutions):
        raise SuiteError(f"network: channels {list(channels)} and convolutions {list(convolutions)} must be equally many")
    return _build(in_channels, out_channels, dimensions, channels, convolutions, True, norm, groups, upsampling, dropout)


def _build(
    in_channels: int,
    out_channels: int,
    dimensions: int,
    channels: Sequence[int],
    convolutions: Sequence[int],
    add: bool,
    norm: str,
    groups: int,
    upsampling: str,
    dropout: float,
) -> UpsampledUNet:
    divisor = per_axis(2 ** (len(channels) - 1), dimensions)
    for name, value, known in (("norm", norm, NORMS), ("upsampling", upsampling, UPSAMPLINGS)):
        if value not in known:
            raise unknown(f"network.{name}", value, known)
    if norm == "group" and any(width % groups for width in channels):
        raise SuiteError(f"network.groups={groups} must divide every one of network.channels={list(channels)}")
    network = UpsampledUNet(dimensions, in_channels, out_channels, channels, convolutions, add, norm, groups, upsampling, dropout)
    return describe(network, dimensions, divisor, [d * (1 if norm == "group" else 2) for d in divisor])


def _layer(name: str, dimensions: int) -> type[nn.Module]:
    return getattr(nn, f"{name}{dimensions}d")


def _strided(dimensions: int, width_in: int, width: int, norm: str, groups: int) -> nn.Sequential:
    """Half the resolution by a convolution of 2 voxels a side, normalization, ReLU."""
    stack = Stack(dimensions, width_in, width, 1, norm, groups)
    stack[0] = _layer("Conv", dimensions)(width_in, width, 2, stride=2)
    return stack
