"""Networks of one output each, side by side."""

from collections.abc import Callable

import torch
from torch import nn

from lightning_modules.networks.contract import describe, logits_of, parts_of, within


class OnePerOutput(nn.Module):
    """A network of its own for every logit channel; they share nothing, so that trained together with one loss per channel and an optimizer
    that treats every weight alone they learn what each would alone.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K, and so networks.
        network: factory of each, called with (M, 1).

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial); what else the networks return is left out.
    """

    def __init__(self, in_channels: int, out_channels: int, *, network: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network(in_channels, 1) for _ in range(out_channels))
        one = self.networks[0]
        each = [within(parts_of(n), f"networks.{number}") for number, n in enumerate(self.networks)]
        parts = {name: tuple(path for parts in each for path in parts[name]) for name in each[0]}
        describe(self, one.dimensions, one.divisor, one.min_size, one.fixed_size, one.slab, parts)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits_of(network(image)) for network in self.networks], dim=1)
