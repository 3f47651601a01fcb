"""What every network says about its input, so that data views, patches and inferers can fit it without knowing it, and how it answers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lesionbench.errors import SuiteError

N = TypeVar("N", bound=nn.Module)
Output = torch.Tensor | Mapping[str, Any]  # logits (B, K, *spatial), or a mapping with `logits` and extras


def logits_of(output: Output) -> torch.Tensor:
    """The logits (B, K, *spatial) of a network's output."""
    return output["logits"] if isinstance(output, Mapping) else output


def with_own_loss(loss: torch.Tensor, output: Output) -> torch.Tensor:
    """A loss of an output plus the network's own scalar term (`loss` of the output), where it has one."""
    return loss + output["loss"] if isinstance(output, Mapping) and "loss" in output else loss


def describe(
    network: N,
    dimensions: int,
    divisor: int | Sequence[int],
    min_size: int | Sequence[int] | None = None,
    fixed_size: Sequence[int] | None = None,
    slab: int | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> N:
    """Writes the input contract on `network` as plain attributes and returns it.

    Attributes written:
        dimensions: 2 or 3, the number of spatial axes of input and logits.
        divisor: per axis, every side must be a multiple of it.
        min_size: per axis, sides of at least this always work. (Instance and batch normalization need more than one voxel at the
            bottleneck; it is enough that one axis reaches its `min_size` and the others their `divisor`.)
        fixed_size: the only size accepted, or None where any size that fits `divisor` and `min_size` is.
        slab: slices k per sample of a 2.5D network (B, M, H, W, k), else None.
        parts: name of a part -> the modules (or parameters) of it, by their paths in the network; `encoder`, `bottleneck`, `decoder` and
            `heads` where it has them. None = its children, each a part of its own name (see `parts_of`).
    """
    network.dimensions = dimensions
    network.divisor = per_axis(divisor, dimensions)
    network.min_size = network.divisor if min_size is None else per_axis(min_size, dimensions)
    network.fixed_size = None if fixed_size is None else per_axis(fixed_size, dimensions)
    network.slab = slab
    if parts is not None:
        network.parts = {name: tuple(paths) for name, paths in parts.items()}
    return network


def parts_of(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a part -> the paths of its modules and parameters; of a network that tells none, its children with parameters."""
    told = getattr(network, "parts", None)
    return {name: (name,) for name, child in network.named_children() if any(True for _ in child.parameters())} if told is None else told


def within(parts: Mapping[str, Sequence[str]], path: str) -> dict[str, tuple[str, ...]]:
    """The parts of a network as those of one that holds it under `path`."""
    return {name: tuple(f"{path}.{inner}" for inner in paths) for name, paths in parts.items()}


def numbered(path: str, count: int) -> tuple[str, ...]:
    """`path.0`, `path.1`, ... of the first `count` members of a list."""
    return tuple(f"{path}.{number}" for number in range(count))


def per_axis(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number for every axis, from one number for all or one for each.

    Raises:
        SuiteError: `dimensions` is not 2 or 3, or the number of values is neither 1 nor `dimensions`.
    """
    if dimensions not in (2, 3):
        raise SuiteError(f"network.dimensions={dimensions}: must be 2 or 3 (2.5D: SlabChannels around a network of 2)")
    values = (int(value),) * dimensions if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != dimensions:
        raise SuiteError(f"network: {list(values)} has {len(values)} numbers, but dimensions={dimensions}")
    return values
