"""Augmentation: chains of TorchIO transforms named in the configuration, and a gate that opens less often late in training."""

from collections.abc import Callable
from typing import Any


def chain(**transforms: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """One TorchIO transform out of named ones, so that each can be changed or removed (set to null) by its name; None when empty."""
    kept = [t for t in transforms.values() if t is not None]
    if not kept:
        return None
    import torchio

    return torchio.Compose(kept)


class Gate:
    """Applies `transform` with probability `before` up to epoch `epoch`, with `after` from then on, so that late in training the samples
    come nearer to the true distribution (Wong et al., BrainLes 2021).

    Args:
        transform: called with a TorchIO subject; None = none.
        before, after: probabilities.
        epoch: first epoch (from 0) of `after`.
    """

    def __init__(self, transform: Callable[[Any], Any] | None, before: float = 1.0, after: float = 0.5, epoch: int = 0) -> None:
        self.transform, self.before, self.after, self.epoch = transform, before, after, epoch

    def __call__(self, subject: Any) -> Any:
        """`subject["epoch"]` says which epoch the sample belongs to."""
        import torch

        chance = self.before if subject["epoch"] < self.epoch else self.after
        return self.transform(subject) if self.transform is not None and torch.rand(()) < chance else subject
