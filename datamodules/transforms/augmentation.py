"""Augmentation: chains of TorchIO transforms named in the configuration, and a gate that opens less often late in training."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datamodules.transforms.placement import NormalPlacement, RandomPlacement
from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative, Share, Whole


class Chain:
    """TorchIO transforms in a row, and how the samples they get are placed in their volumes.

    Intensity transforms that do not say what they apply to get the image only, not the maps that go with it. What spatial transforms fill
    with 0 is the background of the case, as it is normalized (`outside` of the sample). Samples are made for one use, so no transform
    copies them first.

    Attributes:
        needs: maps of the sample that a transform reads by name.
    """

    def __init__(self, transforms: list[Callable], placement: NormalPlacement | RandomPlacement | None = None) -> None:
        import torchio

        for transform in transforms:
            _set_up(transform)
        self.needs = {name for transform in transforms for name in needs(transform)}
        self.placement = placement
        self.transforms = torchio.Compose(transforms, copy=False)

    def __call__(self, subject: Any) -> Any:
        return self.transforms(subject)


def chain(placement: NormalPlacement | RandomPlacement | None = None, **transforms: Callable[[Any], Any] | None) -> Chain | None:
    """One augmentation out of named transforms, so that each can be changed or removed (set to null) by its name; None when empty."""
    kept = [t for t in transforms.values() if t is not None]
    return Chain(kept, placement) if kept or placement is not None else None


def needs(augmentation: Any) -> set[str]:
    """The maps of a sample that an augmentation reads by name."""
    inner = getattr(augmentation, "transform", None)
    own = {augmentation.mask} if isinstance(getattr(augmentation, "mask", None), str) else set()
    return own | getattr(augmentation, "needs", set()) | (needs(inner) if inner is not None else set())


def as_chain(augmentation: Callable | Sequence[Callable] | None) -> Callable | None:
    """A TorchIO transform, or a list of them, as a chain; what is one already, or something else that is called with samples, as it is."""
    if augmentation is None or isinstance(augmentation, Chain | Gate):
        return augmentation
    if not callable(augmentation):
        return Chain(list(augmentation))
    import torchio

    return Chain([augmentation]) if isinstance(augmentation, torchio.Transform) else augmentation


def one_of(transforms: Sequence[Callable], weights: Sequence[NotNegative] | None = None, p: Share = 1.0) -> Callable:
    """With probability `p` one of the TorchIO transforms, drawn by its weight.

    Args:
        weights: divided by their sum; None = equal ones.

    Raises:
        SuiteError: not a weight for each, or weights below 0 or all 0.
    """
    import torchio

    weights = [1.0] * len(transforms) if weights is None else list(weights)
    if len(weights) != len(transforms) or min(weights) < 0 or sum(weights) <= 0:
        raise SuiteError(f"augmentation: weights={weights} of {len(transforms)} transforms: one for each, at least 0 and not all 0")
    return torchio.OneOf(dict(zip(transforms, weights, strict=True)), p=p)


def _set_up(transform: Callable) -> None:
    """Has a transform work in place, and an intensity transform on the image alone where it does not say on what."""
    import torchio

    if isinstance(transform, torchio.Transform):
        transform.copy = False
    if isinstance(transform, torchio.IntensityTransform | torchio.RandomAnisotropy) and transform.include is None:
        transform.include = ["image"]
    for inner in getattr(transform, "transforms_dict", None) or getattr(transform, "transforms", ()):
        _set_up(inner)
    if isinstance(transform, torchio.SpatialTransform):
        transform.apply_transform = partial(_from_background, type(transform).apply_transform, transform)


def _from_background(apply: Callable, transform: Any, subject: Any) -> Any:
    """Applies a spatial transform to the image less its background, so that the 0 that comes from beyond the border is background.

    TorchIO's elastic deformation brings in the least value of a channel instead: two ramps that sum up to 1 tell where, as both have a 0.
    """
    import torch
    import torchio

    beyond = subject.get("outside", torch.zeros(subject["image"].data.shape[0]))[:, None, None, None]
    least = isinstance(transform, torchio.RandomElasticDeformation)
    if not (least or beyond.any()):
        return apply(transform, subject)
    if least:
        ramp = torch.linspace(0, 1, subject.spatial_shape[0])[None, :, None, None].expand(1, *subject.spatial_shape)
        subject.add_image(torchio.ScalarImage(tensor=torch.cat([ramp, 1 - ramp])), "ramps")
    subject["image"].set_data(subject["image"].data - beyond)
    subject = apply(transform, subject)
    image = subject["image"].data
    if least:
        image = image * (subject["ramps"].data.sum(dim=0) > 0.5)
        subject.remove_image("ramps")
    subject["image"].set_data(image + beyond)
    return subject


class Gate:
    """Applies `transform` with probability `before` up to epoch `epoch`, with `after` from then on, so that late in training the samples
    come nearer to the true distribution (Wong et al., BrainLes 2021).

    Args:
        transform: called with a TorchIO subject; None = none.
        before, after: probabilities.
        epoch: first epoch (from 0) of `after`.
    """

    def __init__(self, transform: Callable[[Any], Any] | None, before: Share = 1.0, after: Share = 0.5, epoch: Whole = 0) -> None:
        self.transform, self.before, self.after, self.epoch = transform, before, after, epoch

    def __call__(self, subject: Any) -> Any:
        """`subject["epoch"]` says which epoch the sample belongs to."""
        import torch

        chance = self.before if subject["epoch"] < self.epoch else self.after
        return self.transform(subject) if self.transform is not None and torch.rand(()) < chance else subject
