"""TorchIO transforms that flip one axis, exchange two or put all into another order, which it lacks; nothing is interpolated."""

from itertools import combinations, permutations

import torch
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform


class RandomFlipOfOneAxis(RandomTransform, SpatialTransform):
    """Flips image and maps along one axis, each as likely; unlike TorchIO's RandomFlip never along two.

    Args:
        p: probability that it is applied.
    """

    def apply_transform(self, subject: Subject) -> Subject:
        axis = 1 + int(torch.randint(3, ()))
        for image in self.get_images(subject):
            image.set_data(image.data.flip(axis))
        return subject


class RandomTransposition(RandomTransform, SpatialTransform):
    """Exchanges two axes of image and maps, each pair of axes of equal length as likely; without such a pair the sample stays as it is.

    Args:
        p: probability that it is applied.
    """

    def apply_transform(self, subject: Subject) -> Subject:
        images = self.get_images(subject)
        shape = images[0].data.shape
        pairs = [pair for pair in combinations((1, 2, 3), 2) if shape[pair[0]] == shape[pair[1]]]
        if pairs:
            pair = pairs[int(torch.randint(len(pairs), ()))]
            for image in images:
                image.set_data(image.data.transpose(*pair).contiguous())
        return subject


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
