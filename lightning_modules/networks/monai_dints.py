"""MONAI's DiNTS networks (He et al., CVPR 2021), brought to the suite's form: a search space of paths and operations, and what is found in it.

Where MONAI says on the standard output how long a patch should be, keeps stems that an architecture does not use (whose parameters get no
gradient, which stops distributed training), ties a search space to the device it was built for, or cannot be built on the `meta` device, it
is mended here.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Annotated, Any

import numpy as np
import torch
from monai.networks.nets.dints import Cell, DiNTS, TopologyInstance, TopologySearch
from torch import nn

from lesionbench.ranges import Count, Dimensions, Range
from lightning_modules.networks.contract import describe, per_axis
from lightning_modules.networks.topology import parsed, paths

WIDTH = 32  # of MONAI's networks, which are made narrower or wider by a factor


class MixedCell(Cell):
    """A cell with all operations, whatever the code of the architecture says."""

    def __init__(self, c_prev: int, c: int, rate: int, arch_code_c: Any = None, *options: Any) -> None:
        super().__init__(c_prev, c, rate, None, *options)


class SearchSpace(TopologySearch):
    """All paths, each with all operations: what comes out is their sum weighted by `log_alpha_a` (B, P) and `log_alpha_c` (B, P, O)."""

    @property
    def device(self) -> torch.device | None:
        """Of its parameters; None before there are any."""
        found = self._parameters.get("log_alpha_a")
        return None if found is None else found.device

    @device.setter
    def device(self, device: Any) -> None:
        pass


class DiNTSNet(DiNTS):
    """Stems, a search space or an architecture, and stems back, without those that lead nowhere.

    Args:
        node_a: (blocks + 1, depths) 1 where a scale is in use, before the first block and after each.
    """

    def __init__(self, space: nn.Module, in_channels: int, out_channels: int, node_a: np.ndarray, **options: Any) -> None:
        super().__init__(space, in_channels, out_channels, node_a=node_a.tolist(), **options)
        self.entered = [scale for scale in range(self.num_depths) if node_a[0, scale]]
        self.coarsest = max(scale for scale in range(self.num_depths) if node_a[-1, scale])
        for scale in range(self.num_depths):
            if scale not in self.entered:
                del self.stem_down[str(scale)]
            if scale > self.coarsest:
                del self.stem_up[str(scale)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nothing = x.new_zeros(())
        scales = [self.stem_down[str(scale)](x) if scale in self.entered else nothing for scale in range(self.num_depths)]
        found = self.dints_space(scales)
        up = nothing
        for scale in range(self.coarsest, -1, -1):
            up = self.stem_up[str(scale)](found[scale] + up)
        return self.stem_finals(up)


def dints_search(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    blocks: Count = 12,
    depths: Annotated[int, Range(2, 5)] = 4,
    width: Count = 16,
    downsample: bool = True,
) -> DiNTSNet:
    """The search space of DiNTS: every path between neighboring scales, every operation on each (He et al., CVPR 2021).

    `dints_space.log_alpha_a` (blocks, 3 * depths - 2) holds the logits of the paths, `dints_space.log_alpha_c` those of the operations.

    Args:
        blocks: how many steps lead from the first feature maps to the last.
        depths: scales; each halves the resolution and doubles the channels.
        width: channels of the stem at full resolution.
        downsample: the finest scale has half of the resolution of the image, and 2 * width channels.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (depths - 1), twice that with `downsample`.
    """
    count = len(paths(depths))
    every = [np.ones((blocks, count)), np.zeros((blocks, count), dtype=np.int64)]
    space = _built(SearchSpace, every, dimensions, blocks, depths, width, downsample, cell=MixedCell)
    return _network(space, in_channels, out_channels, np.ones((blocks + 1, depths)), dimensions, downsample)


def dints(
    in_channels: int,
    out_channels: int,
    *,
    architecture: Sequence[str],
    dimensions: Dimensions = 3,
    width: Count = 32,
    downsample: bool = True,
) -> DiNTSNet:
    """One network of the search space of DiNTS (He et al., CVPR 2021).

    Args:
        architecture: a row for each block, a character for each path of it: `.` or the number of its operation, see
            `lightning_modules.networks.topology`. For four scales the paths are 0-0, 1-0, 0-1, 1-1, 2-1, 1-2, 2-2, 3-2, 2-3, 3-3; the
            operations are 0 skip, 1 convolution of 3 x 3 x 3, 2 to 4 one of 3 x 3 x 1, 3 x 1 x 3, 1 x 3 x 3 and one along the axis left
            out (in 2D: 0 skip, 1 convolution).
        width, downsample: as of `dints_search`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (scales - 1), twice that with `downsample`.

    Raises:
        SuiteError: no architecture, or an infeasible one.
    """
    chosen, operations = parsed(architecture, dimensions)
    blocks, depths = len(chosen), (chosen.shape[1] + 2) // 3
    space = _built(TopologyInstance, [chosen, operations], dimensions, blocks, depths, width, downsample, device=None)
    nodes = np.zeros((blocks + 1, depths))
    for path, (source, to) in enumerate(paths(depths)):
        nodes[0, source] += chosen[0, path]
        nodes[1:, to] += chosen[:, path]
    return _network(space, in_channels, out_channels, nodes, dimensions, downsample)


def _built(
    kind: Any, code: list[np.ndarray], dimensions: int, blocks: int, depths: int, width: int, downsample: bool, **options: Any
) -> nn.Module:
    with redirect_stdout(io.StringIO()):
        return kind(
            arch_code=code,
            channel_mul=width / WIDTH,
            num_blocks=blocks,
            num_depths=depths,
            spatial_dims=dimensions,
            use_downsample=downsample,
            **options,
        )


def _network(space: nn.Module, in_channels: int, out_channels: int, nodes: np.ndarray, dimensions: int, downsample: bool) -> DiNTSNet:
    network = DiNTSNet(space, in_channels, out_channels, nodes, spatial_dims=dimensions, use_downsample=downsample)
    divisor = per_axis(2 ** (space.num_depths - 1 + downsample), dimensions)
    parts = {"encoder": ["stem_down"], "blocks": ["dints_space.cell_tree"], "decoder": ["stem_up"], "heads": ["stem_finals"]}
    return describe(network, dimensions, divisor, [2 * d for d in divisor], parts=parts)
