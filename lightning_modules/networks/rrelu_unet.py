"""The modified 3D U-Net of Luu and Pavlovskiy: group normalization and a leaky ReLU whose slope is drawn."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe
from lightning_modules.networks.multi_head import normalization

ACTIVATIONS = {"rrelu": nn.RReLU, "leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class RReLUUNet(nn.Module):
    """U-Net of pairs of convolutions of side 3, each with normalization and activation (Luu & Pavlovskiy, BrainLes 2021, Section 3.2).

    Max-pooling halves the resolution, linear interpolation brings it back; joined with the encoder's features, a pair of convolutions leads
    to the width of these. The randomized leaky ReLU draws the slope of every element uniformly from 1/8 to 1/3 in training mode and has
    their mean, 0.2292, in evaluation mode.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution, finest first. The paper has them in a figure only.
        norm: `group` (8 groups, 4 of 8 channels), `instance`, `batch` or `none`.
        activation: `rrelu`, `leaky_relu` (slope 0.01) or `relu`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (resolutions - 1).

    Raises:
        SuiteError: fewer than two resolutions, an unknown norm or activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (16, 32, 64, 128, 256),
        norm: str = "group",
        activation: str = "rrelu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("network.activation", activation, ACTIVATIONS)
        if len(features) < 2:
            raise SuiteError(f"network.features={list(features)}: two resolutions at least")
        divisor = 2 ** (len(features) - 1)
        parts = {"encoder": ("encoder",), "bottleneck": ("bottom",), "decoder": ("decoder",), "heads": ("out",)}
        describe(self, dimensions, divisor, divisor * (2 if norm in ("batch", "instance") else 1), parts=parts)
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self._pool, self._mode = ((F.max_pool2d, "bilinear"), (F.max_pool3d, "trilinear"))[dimensions - 2]

        def pair(n_in: int, width: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for n in (n_in, width):
                layers += [convolution(n, width, 3, padding=1), normalization(norm, width, dimensions), ACTIVATIONS[activation]()]
            return nn.Sequential(*layers)

        *finer, lowest = features
        self.encoder = nn.ModuleList(pair(n_in, width) for n_in, width in zip([in_channels, *finer], finer, strict=False))
        self.bottom = pair(finer[-1], lowest)
        self.decoder = nn.ModuleList(pair(below + width, width) for width, below in reversed(list(pairwise(features))))
        self.out = convolution(features[0], out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips, x = [], image
        for level in self.encoder:
            skips.append(level(x))
            x = self._pool(skips[-1], 2)
        x = self.bottom(x)
        for level in self.decoder:
            x = F.interpolate(x, scale_factor=2, mode=self._mode, align_corners=False)
            x = level(torch.cat([x, skips.pop()], dim=1))
        return self.out(x)
