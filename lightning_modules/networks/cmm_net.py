"""The network of 3D CMM-Net: dilated convolutions, and pyramids of pooled features that bring what is far away to every encoder level."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions, Whole
from lightning_modules.networks.contract import describe

POOLS = ("average", "max", "none")


class PyramidPooling(nn.Module):
    """Pools a map to several coarse grids, compresses each, and brings all of them back to its resolution (Choi et al., Section 2.3).

    Args:
        channels: C of the map, at least one for each grid.
        grids: cells along each axis, one number per grid; fewer where the map has fewer voxels.
        pool: `average`, `max`, or `none`: the same convolutions without pooling, so that no voxel learns of another.
        dimensions: 2 or 3.
        keep_input: the map itself is appended (PPM); without it half of that, the HPPM.

    Shapes: (B, C, *spatial) -> (B, 2 C, *spatial), without the input (B, C, *spatial). The C channels of the grids are shared out evenly.

    Raises:
        SuiteError: an unknown pooling, fewer channels than grids.
    """

    def __init__(self, channels: int, grids: Sequence[int], pool: str = "average", dimensions: int = 3, keep_input: bool = True) -> None:
        super().__init__()
        if pool not in POOLS:
            raise unknown("network.pool", pool, POOLS)
        if not 1 <= len(grids) <= channels or min(grids) < 1:
            raise SuiteError(
                f"network.grids={list(grids)}: expected one to {channels} numbers of cells, as many as there are features at most"
            )
        self.grids, self.keep_input = tuple(grids), keep_input
        pools = {"average": (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), "max": (F.adaptive_max_pool2d, F.adaptive_max_pool3d)}
        self._pool = pools[pool][dimensions - 2] if pool in pools else None
        self._mode = ("bilinear", "trilinear")[dimensions - 2]
        share, rest = divmod(channels, len(grids))
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2]
        self.compress = nn.ModuleList(convolution(channels, share + (number < rest), 1) for number in range(len(grids)))

    def _pooled(self, x: torch.Tensor, grid: int, compress: nn.Module) -> torch.Tensor:
        if self._pool is None:
            return compress(x)
        size = x.shape[2:]
        coarse = compress(self._pool(x, [min(grid, side) for side in size]))
        return F.interpolate(coarse, size=size, mode=self._mode, align_corners=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self._pooled(x, grid, compress) for grid, compress in zip(self.grids, self.compress, strict=True)]
        return torch.cat([*maps, x] if self.keep_input else maps, dim=1)


class CMMNet(nn.Module):
    """U-Net of dilated convolutions with a pyramid pooling module behind every encoder block (Choi et al., BrainLes 2021, Table 1).

    A block is twice convolution of side 3, ReLU, batch normalization; its convolutions are dilated most at full resolution. What a level
    hands on, down and across, is the block's output next to its pyramid (which holds that output once more, as in the table). At the lowest
    resolution further blocks follow, the first `hppm` of them behind a half pyramid.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution, finest first, halved between by max pooling; the decoder has the same.
        extra_features: widths of the additional blocks at the lowest resolution; none is the paper's smallest model.
        dilations: of each resolution.
        grids, pool: of the pyramids, see `PyramidPooling`.
        hppm: number of additional blocks, from the first on, with a half pyramid before them.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (resolutions - 1), 8 in the paper.

    Raises:
        SuiteError: not one dilation per resolution, more half pyramids than additional blocks, and what `PyramidPooling` raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (32, 96, 256, 1024),
        extra_features: Sequence[Count] = (1400, 2048),
        dilations: Sequence[Count] = (6, 5, 4, 3),
        grids: Sequence[Count] = (2, 4, 8, 16),
        pool: str = "average",
        hppm: Whole = 2,
    ) -> None:
        super().__init__()
        if len(dilations) != len(features) or min(dilations) < 1:
            raise SuiteError(f"network.dilations={list(dilations)}: expected one of 1 or more for each of the {len(features)} features")
        if not 0 <= hppm <= len(extra_features):
            raise SuiteError(f"network.hppm={hppm}: expected 0 to {len(extra_features)}, one per number in network.extra_features")
        divisor = 2 ** (len(features) - 1)
        parts = {"encoder": ("encoder", "pyramids"), "bottleneck": ("bottom",), "decoder": ("decoder",), "heads": ("out",)}
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # one voxel at the bottom is too few to normalize by
        self._mode = ("bilinear", "trilinear")[dimensions - 2]
        self.max_pool = (nn.MaxPool2d, nn.MaxPool3d)[dimensions - 2](2)
        *finer, lowest = features
        *rates, last_rate = dilations
        handed_on = [in_channels, *(3 * width for width in finer)]
        self.encoder = nn.ModuleList(_block(i, o, rate, dimensions) for i, o, rate in zip(handed_on, finer, rates, strict=False))
        self.pyramids = nn.ModuleList(PyramidPooling(width, grids, pool, dimensions) for width in finer)
        bottom: list[nn.Module] = [_block(handed_on[-1], lowest, last_rate, dimensions)]
        for number, width in enumerate(extra_features):
            if number < hppm:
                bottom.append(PyramidPooling(lowest, grids, pool, dimensions, keep_input=False))
            bottom.append(_block(lowest, width, last_rate, dimensions))
            lowest = width
        self.bottom = nn.Sequential(*bottom)
        self.decoder = nn.ModuleList()  # coarsest first
        for width, rate in zip(finer[::-1], rates[::-1], strict=True):
            self.decoder.append(_block(3 * width + lowest, width, rate, dimensions))
            lowest = width
        self.out = (nn.Conv2d, nn.Conv3d)[dimensions - 2](lowest, out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, skips = image, []
        for block, pyramid in zip(self.encoder, self.pyramids, strict=True):
            x = block(x)
            skips.append(torch.cat([x, pyramid(x)], dim=1))
            x = self.max_pool(skips[-1])
        x = self.bottom(x)
        for block in self.decoder:
            up = F.interpolate(x, scale_factor=2, mode=self._mode, align_corners=False)
            x = block(torch.cat([skips.pop(), up], dim=1))
        return self.out(x)


def _block(n_in: int, n_out: int, dilation: int, dimensions: int) -> nn.Sequential:
    """Twice dilated convolution, ReLU, batch normalization, in the order of the paper's Table 1."""
    convolution, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dimensions - 2]
    layers: list[nn.Module] = []
    for width in (n_in, n_out):
        layers += [convolution(width, n_out, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True), norm(n_out)]
    return nn.Sequential(*layers)
