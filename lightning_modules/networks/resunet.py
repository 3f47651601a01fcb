"""A plain 3D U-Net of residual blocks, to be a reference without any further idea."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe
from lightning_modules.networks.multi_head import normalization

SLOPE = 0.01  # of the leaky ReLU


class ResidualBlock(nn.Module):
    """act(norm(conv(act(norm(conv(x))))) + shortcut(x)) with convolutions of side 3 and leaky ReLU.

    Args:
        n_in, n_out: channels; where they differ the shortcut is a convolution of side 1.
        dimensions: 2 or 3.
        norm: see `multi_head.normalization`.
        residual: without it there is no shortcut.
    """

    def __init__(self, n_in: int, n_out: int, dimensions: int = 3, norm: str = "group", residual: bool = True) -> None:
        super().__init__()
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        layers: list[nn.Module] = []
        for width in (n_in, n_out):
            layers += [convolution(width, n_out, 3, padding=1), normalization(norm, n_out, dimensions), nn.LeakyReLU(SLOPE, inplace=True)]
        self.body = nn.Sequential(*layers[:-1])  # the last activation comes after the sum
        self.shortcut = (nn.Identity() if n_in == n_out else convolution(n_in, n_out, 1)) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return F.leaky_relu(y if self.shortcut is None else y + self.shortcut(x), SLOPE)


class ResUNet(nn.Module):
    """U-Net of residual blocks, after Pei and Liu, BrainLes 2021, who give no number of their Fig. 1: all widths are decisions of the suite.

    Strided convolutions halve the resolution and widen; linear interpolation and a convolution of side 1 bring back resolution and width.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution, finest first.
        blocks: residual blocks at every resolution, in the encoder and in the decoder.
        norm: `group` (8 groups), `instance`, `batch` or `none`.
        residual: false leaves out the shortcuts, and with them their convolutions.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (resolutions - 1).

    Raises:
        SuiteError: no block, an unknown norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (16, 32, 64, 128, 256),
        blocks: Count = 1,
        norm: str = "group",
        residual: bool = True,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise SuiteError(f"network.blocks={blocks}: expected 1 or more residual blocks at every resolution")
        divisor = 2 ** (len(features) - 1)
        parts = {"encoder": ("first", "down", "encoder"), "bottleneck": ("bottom",), "decoder": ("up", "decoder"), "heads": ("out",)}
        describe(self, dimensions, divisor, divisor * (2 if norm in ("batch", "instance") else 1), parts=parts)
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self._mode = ("bilinear", "trilinear")[dimensions - 2]
        widths = list(features)
        finer = list(pairwise(widths))

        def level(n_in: int, width: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(width if n else n_in, width, dimensions, norm, residual) for n in range(blocks)))

        self.first = level(in_channels, widths[0])
        self.down = nn.ModuleList(convolution(i, o, 3, stride=2, padding=1) for i, o in finer)
        self.encoder = nn.ModuleList(level(width, width) for width in widths[1:-1])
        self.bottom = level(widths[-1], widths[-1])
        self.up = nn.ModuleList(convolution(below, width, 1) for width, below in reversed(finer))
        self.decoder = nn.ModuleList(level(2 * width, width) for width, _ in reversed(finer))
        self.out = convolution(widths[0], out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips = [self.first(image)]
        for down, level in zip(self.down, self.encoder, strict=False):
            skips.append(level(down(skips[-1])))
        x = self.bottom(self.down[-1](skips[-1]))
        for up, level in zip(self.up, self.decoder, strict=True):
            x = F.interpolate(
                up(x), scale_factor=2, mode=self._mode, align_corners=False
            )  # as convolving after it, on an eighth of the voxels
            x = level(torch.cat([skips.pop(), x], dim=1))
        return self.out(x)
