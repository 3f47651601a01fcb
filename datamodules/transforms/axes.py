"""TorchIO transforms that flip one axis or exchange two, which it lacks; nothing is interpolated."""

from itertools import combinations

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
