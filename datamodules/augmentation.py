"""Augmentation chains: TorchIO transforms named in the configuration, applied in the order given."""

from collections.abc import Callable
from typing import Any


def chain(**transforms: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """One TorchIO transform out of named ones, so that each can be changed or removed (set to null) by its name; None when empty."""
    kept = [t for t in transforms.values() if t is not None]
    if not kept:
        return None
    import torchio

    return torchio.Compose(kept)
