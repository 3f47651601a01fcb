"""A network that sees worse than others: for experiments with a peer that cannot be trusted."""

from collections.abc import Callable

import torch
from torch import nn

from lesionbench.ranges import NotNegative
from lightning_modules.networks.contract import describe, parts_of, within


class NoisyInput(nn.Module):
    """A network whose input gets Gaussian noise, drawn anew at every pass, in training and at inference.

    Args:
        in_channels, out_channels: of the network.
        network: its factory, called with both.
        sigma: standard deviation of the noise, in units of the normalized image.

    Shapes: those of the network.
    """

    def __init__(self, in_channels: int, out_channels: int, *, network: Callable[..., nn.Module], sigma: NotNegative) -> None:
        super().__init__()
        self.network, self.sigma = network(in_channels, out_channels), sigma
        inner = self.network
        parts = within(parts_of(inner), "network")
        describe(self, inner.dimensions, inner.divisor, inner.min_size, inner.fixed_size, inner.slab, parts)

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict:
        return self.network(image + self.sigma * torch.randn_like(image))
