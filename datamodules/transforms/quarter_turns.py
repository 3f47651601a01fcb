"""A TorchIO transform for rotations by multiples of 90 degrees, which it lacks."""

from collections.abc import Sequence

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform

from lesionbench.errors import SuiteError
from lesionbench.ranges import Axis


class RandomQuarterTurns(RandomTransform, SpatialTransform):
    """Turns image and maps by 0, 90, 180 or 270 degrees in one plane, each as likely; nothing is interpolated.

    Samples whose sides in the plane differ are turned by 0 or 180 degrees, so that their shape stays.

    Args:
        axes: the two spatial axes of the plane, of 0, 1, 2.
        p: probability that it is applied.
    """

    def __init__(self, axes: Sequence[Axis] = (0, 1), **options) -> None:
        super().__init__(**options)
        if sorted({*axes} & {0, 1, 2}) != sorted(axes) or len(axes) != 2:
            raise SuiteError(f"quarter turns (augmentation): axes={list(axes)}: expected two of 0, 1, 2")
        self.axes = tuple(axes)

    def apply_transform(self, subject: Subject) -> Subject:
        a, b = (1 + axis for axis in self.axes)
        turns = int(torch.randint(4, ()))
        for image in self.get_images(subject):
            if image.data.shape[a] != image.data.shape[b]:
                turns = turns // 2 * 2
            image.set_data(torch.rot90(image.data, turns, (a, b)).contiguous())
        return subject
