"""A TorchIO transform for permutations of the axes, which it lacks."""

from itertools import permutations

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform


class RandomAxisPermutation(RandomTransform, SpatialTransform):
    """Puts the three axes of image and maps into a random order, each order as likely (Akbar et al., BrainLes 2021, Section 2.5).

    Only orders that keep the shape are drawn: all six of a cube, two where one side differs, none where all differ.

    Args:
        p: probability that it is applied; one of the orders leaves everything as it is.
    """

    def apply_transform(self, subject: Subject) -> Subject:
        shape = subject.spatial_shape
        orders = [order for order in permutations(range(3)) if tuple(shape[axis] for axis in order) == tuple(shape)]
        order = orders[int(torch.randint(len(orders), ()))]
        for image in self.get_images(subject):
            image.set_data(image.data.permute(0, *(1 + axis for axis in order)).contiguous())
        return subject
