"""2.5D: a 2D network that sees a slice with its neighbors."""

from collections.abc import Callable

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import Count
from lightning_modules.networks.contract import describe, parts_of, within


class SlabChannels(nn.Module):
    """Folds a slab of k slices into the channels of a 2D network, which segments the middle slice.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        network: factory of the 2D network, called with (M * k, K).
        slab: number of slices k, odd.

    Shapes: (B, M, H, W, k) -> what the 2D network returns, logits (B, K, H, W). Folded channels are ordered image channel first:
    channel m of slice s is at m * k + s.

    Raises:
        SuiteError: an even slab (no middle slice), a network that is not 2D, or an input with another number of slices.
    """

    def __init__(self, in_channels: int, out_channels: int, *, network: Callable[[int, int], nn.Module], slab: Count) -> None:
        super().__init__()
        if slab < 1 or slab % 2 == 0:
            raise SuiteError(f"network.slab={slab}: a slab needs a middle slice, use an odd number")
        self.network = network(in_channels * slab, out_channels)
        if self.network.dimensions != 2:
            raise SuiteError(f"network.network.dimensions={self.network.dimensions}: SlabChannels needs a 2D network, set it to 2")
        inner = self.network
        describe(self, 2, inner.divisor, inner.min_size, inner.fixed_size, slab, within(parts_of(inner), "network"))

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict:
        if image.dim() != 5 or image.shape[-1] != self.slab:
            raise SuiteError(f"SlabChannels takes (B, M, H, W, {self.slab}), got {tuple(image.shape)}: set the data view to this slab")
        return self.network(image.permute(0, 1, 4, 2, 3).flatten(1, 2))
