"""What several U-shaped networks are made of, in 2D and 3D: convolution, normalization and activation; aligned upsampling."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import unknown

NORMS = ("group", "instance", "batch")
RELU = partial(nn.ReLU, inplace=True)


def convolution(dimensions: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution with so many spatial axes."""
    return (nn.Conv2d, nn.Conv3d)[dimensions - 2]


def normalization(dimensions: int, norm: str, channels: int) -> nn.Module:
    """`group` (16 groups, or the largest number up to 16 that divides the channels), `instance` or `batch`, all with a scale and a shift.

    Raises:
        SuiteError: an unknown norm.
    """
    if norm not in NORMS:
        raise unknown("network.norm", norm, NORMS)
    if norm == "group":
        return nn.GroupNorm(next(g for g in range(16, 0, -1) if channels % g == 0), channels)
    if norm == "instance":
        return (nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 2](channels, affine=True)
    return (nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 2](channels)


def unit(
    dimensions: int,
    n_in: int,
    n_out: int,
    *,
    norm: str,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] = RELU,
) -> nn.Sequential:
    """Convolution without bias, padded to keep the size (at stride 1), then normalization (see `normalization`), then activation."""
    padding = dilation * (kernel // 2)
    convolved = convolution(dimensions)(n_in, n_out, kernel, stride, padding=padding, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(convolved, normalization(dimensions, norm, n_out), activation())


def double(dimensions: int, n_in: int, n_mid: int, n_out: int, *, norm: str, dilation: int = 1) -> nn.Sequential:
    """Two units in a row."""
    return nn.Sequential(
        unit(dimensions, n_in, n_mid, norm=norm, dilation=dilation), unit(dimensions, n_mid, n_out, norm=norm, dilation=dilation)
    )


def upsampled(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, *spatial) at another size by linear interpolation, corners aligned."""
    return F.interpolate(x, tuple(size), mode=("bilinear", "trilinear")[x.ndim - 4], align_corners=True)


def start_from_kaiming(network: nn.Module) -> None:
    """Draws the weights of all convolutions anew (normal, fan out; He et al., ICCV 2015); their biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
