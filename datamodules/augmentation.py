"""Augmentation chains: TorchIO transforms named in the configuration, applied in the order given."""

from collections.abc import Callable
from typing import Any

from datamodules.placement import RandomPlacement


class Chain:
    """TorchIO transforms in a row, and how the samples they get are placed in their volumes.

    Intensity transforms that do not say what they apply to get the image only, not the maps that go with it. Samples are made for one use,
    so no transform copies them first.
    """

    def __init__(self, transforms: list[Callable], placement: RandomPlacement | None = None) -> None:
        import torchio

        for transform in transforms:
            if isinstance(transform, torchio.Transform):
                transform.copy = False
            if isinstance(transform, torchio.IntensityTransform) and transform.include is None:
                transform.include = ["image"]
        self.placement = placement
        self.transforms = torchio.Compose(transforms, copy=False)

    def __call__(self, subject: Any) -> Any:
        return self.transforms(subject)


def chain(placement: RandomPlacement | None = None, **transforms: Callable[[Any], Any] | None) -> Chain | None:
    """One augmentation out of named transforms, so that each can be changed or removed (set to null) by its name; None when empty."""
    kept = [t for t in transforms.values() if t is not None]
    return Chain(kept, placement) if kept or placement is not None else None
