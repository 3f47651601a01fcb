"""The residual 3D U-Net of the localization method: blocks of three convolutions whose first result is added to the last."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe
from lightning_modules.networks.multi_head import normalization

GROUPS = 8


class PreNormBlock(nn.Module):
    """ReLU(c3(c2(r)) + r) with r = c1(x): c1 and c2 are normalization, convolution of side 3 without bias and ReLU, c3 is one without ReLU.

    Args:
        n_in, n_out: channels.
        dimensions: 2 or 3.
        norm: `group` (8 groups, one where there are fewer than 8 channels), or as in `multi_head.normalization`.
        residual: without it r is not added.
    """

    def __init__(self, n_in: int, n_out: int, dimensions: int = 3, norm: str = "group", residual: bool = True) -> None:
        super().__init__()
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self.first = nn.Sequential(_norm(norm, n_in, dimensions), convolution(n_in, n_out, 3, padding=1, bias=False), nn.ReLU())
        self.second = nn.Sequential(_norm(norm, n_out, dimensions), convolution(n_out, n_out, 3, padding=1, bias=False), nn.ReLU())
        self.third = nn.Sequential(_norm(norm, n_out, dimensions), convolution(n_out, n_out, 3, padding=1, bias=False))
        self._residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.first(x)
        y = self.third(self.second(r))
        return torch.relu(y + r if self._residual else y)


def _norm(name: str, channels: int, dimensions: int) -> nn.Module:
    if name != "group":
        return normalization(name, channels, dimensions)
    if channels >= GROUPS and channels % GROUPS:
        raise SuiteError(
            f"network.features: {channels} channels do not divide into {GROUPS} groups; take a multiple, or less than {GROUPS}"
        )
    return nn.GroupNorm(GROUPS if channels >= GROUPS else 1, channels)


class ResidualUNet(nn.Module):
    """U-Net of `PreNormBlock`s, after the network of Lee et al. (arXiv:1706.00120, 2017), as in "Residual 3D U-Net with Localization for
    Brain Tumor Segmentation" (BrainLes 2021, Section 2.2).

    Max-pooling halves the resolution; a transposed convolution of side 3 and stride 2 brings it back, keeps the number of channels' half and
    is joined with the encoder's features.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution, finest first: 24 and its doubles in the paper's first stage, 64 in the second.
        norm: `group`, `instance`, `batch` or `none`.
        residual: false: blocks without their residual connection.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (resolutions - 1).

    Raises:
        SuiteError: fewer than two resolutions, widths that groups do not divide, an unknown norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (64, 128, 256, 512),
        norm: str = "group",
        residual: bool = True,
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise SuiteError(f"network.features={list(features)}: two resolutions at least")
        if norm not in ("group", "instance", "batch", "none"):
            raise unknown("network.norm", norm, ("group", "instance", "batch", "none"))
        divisor = 2 ** (len(features) - 1)
        parts = {"encoder": ("encoder",), "bottleneck": ("bottom",), "decoder": ("up", "decoder"), "heads": ("out",)}
        describe(self, dimensions, divisor, divisor * (2 if norm in ("batch", "instance") else 1), parts=parts)
        transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2]
        options = {"dimensions": dimensions, "norm": norm, "residual": residual}
        *finer, lowest = features
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](2)
        self.encoder = nn.ModuleList(
            PreNormBlock(n_in, width, **options) for n_in, width in zip([in_channels, *finer], finer, strict=False)
        )
        self.bottom = PreNormBlock(finer[-1], lowest, **options)
        steps = list(reversed(list(pairwise(features))))
        self.up = nn.ModuleList(transposed(below, width, 3, stride=2, padding=1, output_padding=1) for width, below in steps)
        self.decoder = nn.ModuleList(PreNormBlock(2 * width, width, **options) for width, _ in steps)
        self.out = (nn.Conv2d, nn.Conv3d)[dimensions - 2](features[0], out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips, x = [], image
        for level in self.encoder:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = self.bottom(x)
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(torch.cat([up(x), skips.pop()], dim=1))
        return self.out(x)
