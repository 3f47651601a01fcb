"""TorchIO transforms for brightness, which it lacks."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

from lesionbench.ranges import ASCENDING, NotNegative


class RandomBrightness(RandomTransform, IntensityTransform):
    """Multiplies every channel by a uniform number and adds a normal one, both drawn per channel (nnU-Net v1's brightness transforms).

    Args:
        factor: (low, high) of the factor.
        shift: standard deviation of what is added, in units of the normalized image.
        p: probability that it is applied.
    """

    def __init__(self, factor: Annotated[Sequence[NotNegative], ASCENDING] = (1.0, 1.0), shift: NotNegative = 0.0, **options) -> None:
        super().__init__(**options)
        self.factor, self.shift = tuple(factor), shift

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            data = image.data.float()
            each = (len(data), *[1] * (data.ndim - 1))
            factor = torch.empty(each).uniform_(*self.factor)
            image.set_data(data * factor + self.shift * torch.randn(each))
        return subject
