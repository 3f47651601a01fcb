"""DeepSeg in three dimensions: a U-Net of batch-normalized convolutions with max pooling and dropout at the bottom."""

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import AtLeastTwo, BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe


class DeepSeg(nn.Module):
    """The U-Net of DeepSeg with 3D convolutions and all modalities (Zeineldin et al., BrainLes 2021, Section 2.3).

    Five levels of two convolutions of side 3, each followed by batch normalization and ReLU; max pooling of side 2 down, transposed convolution
    of side 2 to half the width up, next to the level's own output. Widths double from level to level; they and the place of the
    dropout are those of the authors' network for slices, since the paper gives none.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of the finest level.
        levels: resolutions, 2 at least.
        dropout: rate behind the lowest level, of single values.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1), 16 in the paper.

    Raises:
        SuiteError: fewer than two levels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Count = 32,
        levels: AtLeastTwo = 5,
        dropout: BelowOne = 0.5,
    ) -> None:
        super().__init__()
        if levels < 2:
            raise SuiteError(f"network.levels={levels}: expected 2 or more")
        divisor = 2 ** (levels - 1)
        parts = {"encoder": ("encoder",), "bottleneck": ("bottom",), "decoder": ("up", "decoder"), "heads": ("out",)}
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # one voxel at the bottom is too few to normalize by
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2]
        *finer, lowest = (features * 2**level for level in range(levels))
        self.max_pool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](2)
        self.encoder = nn.ModuleList(_block(i, o, dimensions) for i, o in zip([in_channels, *finer], finer, strict=False))
        self.bottom = nn.Sequential(_block(finer[-1], lowest, dimensions), nn.Dropout(dropout))
        self.up = nn.ModuleList(transposed(2 * width, width, 2, stride=2) for width in finer[::-1])
        self.decoder = nn.ModuleList(_block(2 * width, width, dimensions) for width in finer[::-1])
        self.out = convolution(features, out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, skips = image, []
        for block in self.encoder:
            skips.append(block(x))
            x = self.max_pool(skips[-1])
        x = self.bottom(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


def _block(n_in: int, n_out: int, dimensions: int) -> nn.Sequential:
    """Twice convolution, batch normalization, ReLU."""
    convolution, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dimensions - 2]
    layers: list[nn.Module] = []
    for width in (n_in, n_out):
        layers += [convolution(width, n_out, 3, padding=1), norm(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
