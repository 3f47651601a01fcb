"""Parts of networks that stay as they are while the rest is trained."""

from collections.abc import Mapping, Sequence

from torch import nn

from lesionbench.errors import SuiteError, unknown
from lightning_modules.networks.contract import parts_of


def freeze(networks: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Parameters of the named parts need no gradient from now on, in every one of the networks.

    Raises:
        SuiteError: no network, a part that one of them does not have, or a network of which nothing is left to train.
    """
    if not networks:
        raise SuiteError(f"model.freeze={list(names)}: this method trains no network that has parts")
    for which, network in networks.items():
        for path in frozen_paths(network, names):
            _at(network, path).requires_grad_(False)
        if not any(p.requires_grad for p in network.parameters()):
            raise SuiteError(f"model.freeze={list(names)} leaves nothing to train of {which}; its parts are {', '.join(parts_of(network))}")


def frozen_paths(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules and parameters in the named parts of a network.

    Raises:
        SuiteError: a part that it does not have.
    """
    parts = parts_of(network)
    for name in names:
        if name not in parts:
            raise unknown(f"model.freeze (a part of {type(network).__name__})", name, parts)
    return [path for name in names for path in parts[name]]


def rest(network: nn.Module, names: Sequence[str]) -> None:
    """Puts the named parts into evaluation mode: batch normalization uses and keeps its running statistics, dropout is off."""
    for path in frozen_paths(network, names):
        part = _at(network, path)
        if isinstance(part, nn.Module):
            part.eval()


def _at(network: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The module or parameter of that path."""
    holder, _, last = path.rpartition(".")
    return getattr(network.get_submodule(holder), last)
