"""The modified U-Net of Singh and Phophalia: strided convolutions of side 4, and one more block on every skip connection."""

from collections.abc import Sequence

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe

SLOPE = 0.3  # of the leaky ReLU, Section 2.2


class HorizontalUNet(nn.Module):
    """Vox2Vox's generator with a convolution block on every encoder output (Singh and Phophalia, BrainLes 2021, Section 2.2).

    All convolutions have sides of 4 and are followed by instance normalization and leaky ReLU. Downward blocks halve the resolution,
    Horizontal1 blocks refine what they give, Horizontal2 blocks at the bottom each see the two outputs before them, Upward blocks double
    the resolution and are joined with the Horizontal1 block of their size.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution below the image's, finest first.
        blocks: Horizontal2 blocks, at least 1.
        dropout: rate in the Horizontal2 blocks, of single values.
        horizontal: Horizontal1 blocks; without them the encoder's outputs are the skip connections.
        final_norm: instance normalization of the logits, as in the paper. It gives every class map the mean and deviation of its own two
            parameters in every patch, so that no map can say that its class is absent.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** resolutions, 16 in the paper.

    Raises:
        SuiteError: no Horizontal2 block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (64, 128, 256, 512),
        blocks: Count = 3,
        dropout: BelowOne = 0.2,
        horizontal: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise SuiteError(f"network.blocks={blocks}: expected 1 or more blocks at the bottom (3 in the paper)")
        divisor = 2 ** len(features)
        parts = {"encoder": ("downward", "horizontal1"), "bottleneck": ("horizontal2",), "decoder": ("upward",), "heads": ("out",)}
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # one voxel at the bottom is too few to normalize by
        widths, lowest = list(features), features[-1]
        self.downward = nn.ModuleList(_block(i, o, dimensions, stride=2) for i, o in zip([in_channels, *widths], widths, strict=False))
        self.horizontal1 = nn.ModuleList(_block(w, w, dimensions) if horizontal else nn.Identity() for w in widths)
        self.horizontal2 = nn.ModuleList(_block(lowest * min(1 + n, 2), lowest, dimensions, dropout=dropout) for n in range(blocks))
        coarser = zip(widths[::-1], widths[-2::-1], strict=False)  # an upward block sees two maps of the width below it
        self.upward = nn.ModuleList(_up(2 * below, width, dimensions) for below, width in coarser)
        self.out = _up(2 * widths[0], out_channels, dimensions, act=False, norm=final_norm)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, skips = image, []
        for down, horizontal in zip(self.downward, self.horizontal1, strict=True):
            x = down(x)
            skips.append(horizontal(x))
        both = [skips.pop()]  # the newest and the one before it
        for block in self.horizontal2:
            both = [block(torch.cat(both, dim=1)), both[0]]
        for up in self.upward:
            both = [up(torch.cat(both, dim=1)), skips.pop()]
        return self.out(torch.cat(both, dim=1))


def _block(n_in: int, n_out: int, dimensions: int, stride: int = 1, dropout: float = 0.0) -> nn.Sequential:
    """Convolution, instance normalization, dropout, leaky ReLU. To keep the resolution, a side of 4 needs one more voxel at the end."""
    longer = [(nn.ZeroPad2d, nn.ZeroPad3d)[dimensions - 2]((0, 1) * dimensions)] if stride == 1 else []
    convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2](n_in, n_out, 4, stride=stride, padding=1)
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*longer, convolution, _norm(n_out, dimensions), *drop, nn.LeakyReLU(SLOPE, inplace=True))


def _up(n_in: int, n_out: int, dimensions: int, act: bool = True, norm: bool = True) -> nn.Sequential:
    """Transposed convolution to the double resolution, instance normalization, leaky ReLU."""
    convolution = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2](n_in, n_out, 4, stride=2, padding=1)
    return nn.Sequential(convolution, *([_norm(n_out, dimensions)] if norm else []), *([nn.LeakyReLU(SLOPE, inplace=True)] if act else []))


def _norm(channels: int, dimensions: int) -> nn.Module:
    return (nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 2](channels, affine=True)
