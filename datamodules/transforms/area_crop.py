"""A TorchIO transform that cuts a random part out of a slice and resizes it to the size of the slice."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torchio.data.image import LabelMap
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform

from lesionbench.errors import SuiteError
from lesionbench.ranges import ASCENDING, PositiveShare


class RandomAreaCrop(RandomTransform, SpatialTransform):
    """Cuts a box of the slice's own proportions, at a random place, out of the first two axes of image and maps, and resizes it to the whole
    (the image linearly, maps by the nearest voxel).

    Args:
        area: smallest and largest share of the slice that is kept, drawn uniformly.
        p: probability that it is applied.

    Raises:
        SuiteError: shares out of order or out of (0, 1].
    """

    def __init__(self, area: Annotated[Sequence[PositiveShare], ASCENDING] = (0.85, 0.95), **options) -> None:
        super().__init__(**options)
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise SuiteError(f"augmentation: area={list(area)}: expected the smallest and the largest share kept, in (0, 1]")
        self.area = tuple(area)

    def apply_transform(self, subject: Subject) -> Subject:
        side = float(torch.empty(()).uniform_(*self.area)) ** 0.5
        shape = subject.spatial_shape[:2]
        sizes = [max(1, round(side * length)) for length in shape]
        starts = [int(torch.randint(length - size + 1, ())) for length, size in zip(shape, sizes, strict=True)]
        for image in self.get_images(subject):
            part = image.data[:, starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]].movedim(3, 1)
            how = {"mode": "nearest-exact"} if isinstance(image, LabelMap) else {"mode": "bilinear", "align_corners": False}
            image.set_data(F.interpolate(part.float(), tuple(shape), **how).movedim(1, 3).to(image.data.dtype).contiguous())
        return subject
