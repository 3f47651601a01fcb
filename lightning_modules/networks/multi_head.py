"""What the branched networks share: normalized convolutions, upsampling, and several heads on one trunk."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown

NORMS = ("batch", "instance", "group", "none")
UPSAMPLINGS = ("transposed", "linear", "nearest")


def normalization(name: str, channels: int, dimensions: int) -> nn.Module:
    """Normalization layer by name: `batch` (scale and shift), `instance` (neither), `group` (both; 8 groups, fewer where a group would have
    less than two channels or the channels do not divide) or `none`.

    Raises:
        SuiteError: an unknown name.
    """
    if name not in NORMS:
        raise unknown("network.norm", name, NORMS)
    if name == "group":
        return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0 and (g == 1 or channels >= 2 * g)), channels)
    if name == "none":
        return nn.Identity()
    kinds = {"batch": (nn.BatchNorm2d, nn.BatchNorm3d), "instance": (nn.InstanceNorm2d, nn.InstanceNorm3d)}
    return kinds[name][dimensions - 2](channels)


def units(n_in: int, n_out: int, dimensions: int, norm: str, count: int = 1) -> nn.Sequential:
    """`count` times convolution of side 3, normalization, ReLU."""
    layers: list[nn.Module] = []
    for number in range(count):
        convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2](n_out if number else n_in, n_out, 3, padding=1)
        layers += [convolution, normalization(norm, n_out, dimensions), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def upsampling(kind: str, n_in: int, n_out: int, dimensions: int) -> nn.Module:
    """Doubles the resolution: `transposed` (convolution of side 2, stride 2), or `linear` or `nearest` interpolation and a convolution of
    side 3. The two interpolations have the same parameters, so that networks that differ in them can share or average weights.

    Raises:
        SuiteError: an unknown kind.
    """
    if kind not in UPSAMPLINGS:
        raise unknown("network.upsampling", kind, UPSAMPLINGS)
    if kind == "transposed":
        return (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2](n_in, n_out, 2, stride=2)
    linear = ("bilinear", "trilinear")[dimensions - 2]
    interpolation = nn.Upsample(scale_factor=2, mode=linear, align_corners=False) if kind == "linear" else nn.Upsample(scale_factor=2)
    return nn.Sequential(interpolation, (nn.Conv2d, nn.Conv3d)[dimensions - 2](n_in, n_out, 3, padding=1))


def dropout(rate: float, dimensions: int) -> nn.Module:
    """Dropout of whole channels; without parameters, so that weights fit networks with and without it."""
    return (nn.Dropout2d, nn.Dropout3d)[dimensions - 2](rate)


class Heads(nn.Module):
    """Several heads on the features of one trunk; the first is the main one.

    Args:
        make: makes one head, features -> logits (B, K, *spatial).
        heads: number of heads.

    Attributes:
        every: whether all heads answer; None = in training only, so that the others cost nothing when the network is used.

    Returns of `forward`: the main head's logits, or where several answer {"logits": of the main one, "heads": [of the others]}.

    Raises:
        SuiteError: no head.
    """

    def __init__(self, make: Callable[[], nn.Module], heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise SuiteError(f"network.heads={heads}: a network needs at least its main head")
        self.heads = nn.ModuleList(make() for _ in range(heads))
        self.every: bool | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor | Mapping[str, torch.Tensor | list[torch.Tensor]]:
        every = self.training if self.every is None else self.every
        main, *others = [head(features) for head in (self.heads if every else self.heads[:1])]
        return {"logits": main, "heads": others} if others else main


@contextmanager
def every_head(network: nn.Module) -> Iterator[None]:
    """Inside, all heads of a branched network answer, also in evaluation mode."""
    before, network.branches.every = network.branches.every, True
    try:
        yield
    finally:
        network.branches.every = before


def keep_main_head(network: nn.Module) -> nn.Module:
    """Removes all heads but the main one from a branched network and returns it; what the main head says does not change."""
    del network.branches.heads[1:]
    return network
