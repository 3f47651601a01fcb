"""Positive mining: now and then a sample shows the tumor alone."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

from datamodules.transforms.intensity import background, filled
from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import ASCENDING, Positive, Share

CENTERS = ("lesion", "volume")


class PositiveMining(RandomTransform, IntensityTransform):
    """Multiplies the image by the mask of all that is labeled, a little larger or smaller than it is (Singh, BrainLes 2021, Section 2.6).

    The label stays as it is. A sample without label, or in which nothing is labeled, stays as a whole. What is outside of the mask becomes
    the background, so the transform belongs behind those that change intensities.

    Args:
        scale: (low, high) of the factor on every side of the mask, drawn uniformly for each sample; above 0.
        center: what stays in place: the middle of the box around all that is labeled (`lesion`), or of the sample (`volume`).
        scale_label: change the label as the mask is.
        p: probability of each sample.

    Raises:
        SuiteError: a scale that is not above 0 or out of order, an unknown center.
    """

    def __init__(
        self,
        scale: Annotated[Sequence[Positive], ASCENDING] = (0.9, 1.1),
        center: str = "lesion",
        scale_label: bool = False,
        p: Share = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(p=p, **options)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise SuiteError(f"positive mining (augmentation): scale={list(scale)}: expected [low, high] with 0 < low <= high")
        if center not in CENTERS:
            raise unknown("augmentation.mining.center", center, CENTERS)
        self.scale, self.center, self.scale_label = tuple(scale), center, scale_label

    def apply_transform(self, subject: Subject) -> Subject:
        if "label" not in subject or not (subject["label"].data > 0).any():
            return subject
        label = subject["label"].data
        moved = scaled(label, self.sample_uniform(*self.scale), self._middle(label[0] > 0))
        for image in self.get_images(subject):
            image.set_data(filled(image.data, moved[0] <= 0, background(subject, len(image.data))))
        if self.scale_label:
            subject["label"].set_data(moved)
        return subject

    def _middle(self, mask: torch.Tensor) -> list[float]:
        """What stays in place, in voxels from the first."""
        if self.center == "volume":
            return [(n - 1) / 2 for n in mask.shape]
        reached = (mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1), mask.flatten(0, 1).any(0))
        ends = (r.nonzero() for r in reached)
        return [float(e[0] + e[-1]) / 2 for e in ends]


def scaled(label: torch.Tensor, factor: float, middle: Sequence[float]) -> torch.Tensor:
    """A label map (1, x, y, z) as many times as large, by nearest neighbors, `middle` (voxels from the first) in place; 0 where it does not reach."""
    for axis, (size, center) in enumerate(zip(label.shape[1:], middle, strict=True), start=1):
        source = (center + (torch.arange(size) - center) / factor).round().long()
        outside = (source < 0) | (source >= size)
        label = label.index_select(axis, source.clamp(0, size - 1)).index_fill(axis, outside.nonzero()[:, 0], 0)
    return label
