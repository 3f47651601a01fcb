"""Intensity augmentation that TorchIO lacks, as TorchIO transforms."""

from typing import Any

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

from lesionbench.errors import SuiteError


class RandomScaleShift(RandomTransform, IntensityTransform):
    """Multiplies all channels by one factor and adds one number, as MONAI's RandScaleIntensity and RandShiftIntensity in turn.

    Args:
        scale: the factor is uniform in [1 - scale, 1 + scale].
        shift: the number is uniform in [-shift, shift], in units of the normalized image.

    Raises:
        SuiteError: a negative scale or shift.
    """

    def __init__(self, scale: float = 0.1, shift: float = 0.1, **options: Any) -> None:
        if scale < 0 or shift < 0:
            raise SuiteError(f"augmentation: scale={scale} and shift={shift} must not be negative")
        super().__init__(**options)
        self.scale, self.shift = scale, shift

    def apply_transform(self, subject: Subject) -> Subject:
        factor, offset = 1 + self.scale * (2 * torch.rand(1) - 1), self.shift * (2 * torch.rand(1) - 1)
        for image in self.get_images(subject):
            image.set_data(image.data * factor + offset)
        return subject
