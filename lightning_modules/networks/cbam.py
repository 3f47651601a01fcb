"""CBAM, the convolutional block attention module: features are weighed by channel, then by place (Woo et al., ECCV 2018)."""

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lightning_modules.networks.conv_unit import convolution, normalization

COMBINATIONS = ("sum", "product")
KINDS = ("cbam", "channel", "spatial")


class ChannelGate(nn.Module):
    """sigmoid(MLP(mean over space) + MLP(largest over space)), one shared MLP of a hidden layer (Woo et al., Eq. 2).

    Args:
        channels: C.
        reduction: the hidden layer has C / reduction units, at least one.
        combine: `sum`, or `product` of the two answers, after which two negative ones open the gate like two positive ones.

    Shapes: (B, C, *spatial) -> (B, C, 1, ...), in [0, 1].

    Raises:
        SuiteError: an unknown way to combine, a reduction below 1.
    """

    def __init__(self, channels: int, *, reduction: int = 16, combine: str = "sum") -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise unknown("network.combine", combine, COMBINATIONS)
        if reduction < 1:
            raise SuiteError(f"network.reduction={reduction}: must be at least 1")
        self.combine = combine
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(2)
        mean, largest = self.mlp(flat.mean(dim=2)), self.mlp(flat.amax(dim=2))
        answer = mean + largest if self.combine == "sum" else mean * largest
        return answer.sigmoid().reshape(*answer.shape, *(1,) * (features.ndim - 2))


class SpatialGate(nn.Module):
    """sigmoid(convolution of the mean and the largest over channels) (Woo et al., Eq. 3).

    Args:
        dimensions: 2 or 3.
        kernel: side of the convolution, odd.
        norm: normalizes what the convolution says (see `conv_unit.normalization`); None = not at all, which is the formula as printed.
        relu: a ReLU before the sigmoid, so that no place is weighed below 1/2.

    Shapes: (B, C, *spatial) -> (B, 1, *spatial), in [0, 1].

    Raises:
        SuiteError: an unknown norm.
    """

    def __init__(self, *, dimensions: int = 3, kernel: int = 7, norm: str | None = "group", relu: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(dimensions)(2, 1, kernel, padding=kernel // 2, bias=False)]
        layers += [normalization(dimensions, norm, 1)] if norm is not None else []
        layers += [nn.ReLU(inplace=True)] if relu else []
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        described = torch.cat([features.mean(dim=1, keepdim=True), features.amax(dim=1, keepdim=True)], dim=1)
        return self.layers(described).sigmoid()


class CBAM(nn.Module):
    """Features times their `ChannelGate`, then times the `SpatialGate` of the result.

    Args:
        channels: C.
        dimensions: 2 or 3.
        kind: `cbam`, or one of the gates alone: `channel`, `spatial`.
        reduction, combine: see `ChannelGate`.
        kernel, norm, relu: see `SpatialGate`.

    Shapes: (B, C, *spatial) -> the same.

    Raises:
        SuiteError: an unknown kind.
    """

    def __init__(
        self,
        channels: int,
        *,
        dimensions: int = 3,
        kind: str = "cbam",
        reduction: int = 16,
        combine: str = "sum",
        kernel: int = 7,
        norm: str | None = "group",
        relu: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("network.attention", kind, KINDS)
        self.channel = None if kind == "spatial" else ChannelGate(channels, reduction=reduction, combine=combine)
        self.spatial = None if kind == "channel" else SpatialGate(dimensions=dimensions, kernel=kernel, norm=norm, relu=relu)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for gate in (self.channel, self.spatial):
            if gate is not None:
                features = features * gate(features)
        return features
