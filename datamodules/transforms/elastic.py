"""A TorchIO transform for elastic deformation by a coarse grid of normal displacements; TorchIO's own draws uniform ones."""

import numpy as np
import torch
import torch.nn.functional as F
import torchio
from scipy.ndimage import zoom
from torchio.data.subject import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform

from lesionbench.errors import SuiteError
from lesionbench.ranges import AtLeastTwo, NotNegative


class RandomElastic(RandomTransform, SpatialTransform):
    """Moves the points of a regular grid, whose outermost lie on the border, by normal displacements, and all voxels between them smoothly.

    Displacements are interpolated by cubic splines, images linearly, maps of labels by the nearest voxel; what comes from outside is 0, in a chain the background.
    An axis of one or two voxels stays as it is. Image and maps of a sample are moved by the same field.

    Args:
        points: of the grid along each axis, at least 2.
        std: standard deviation of the displacement of each point along each axis, in voxels.
        p: probability that it is applied.

    Raises:
        SuiteError: fewer than two points, a negative deviation.
    """

    def __init__(self, points: AtLeastTwo = 3, std: NotNegative = 2.0, **options) -> None:
        super().__init__(**options)
        if points < 2 or std < 0:
            raise SuiteError(
                f"elastic deformation (augmentation): points={points} std={std}: expected at least 2 points and no negative std"
            )
        self.points, self.std = points, std

    def apply_transform(self, subject: Subject) -> Subject:
        size = subject.spatial_shape
        grid = self.std * torch.randn(3, *(self.points,) * 3)
        steps = [torch.from_numpy(_interpolation(self.points, n)) for n in size]
        moved = torch.einsum("cijk,xi,yj,zk->cxyz", grid, *steps)
        places = []
        for axis, n in enumerate(size):
            shape = [n if a == axis else 1 for a in range(3)]
            voxels = torch.arange(n, dtype=torch.float32).reshape(shape) + (moved[axis] if n > 2 else torch.zeros_like(moved[axis]))
            places.append((2 * voxels + 1) / n - 1)
        where = torch.stack(places[::-1], dim=-1)[None]
        for image in self.get_images(subject):
            mode = "nearest" if isinstance(image, torchio.LabelMap) else "bilinear"
            data = F.grid_sample(image.data[None].float(), where, mode=mode, padding_mode="zeros", align_corners=False)[0]
            image.set_data(data.to(image.data.dtype))
        return subject


def _interpolation(points: int, voxels: int) -> np.ndarray:
    """(voxels, points), float32: cubic splines from values at points that span the voxels to values at the voxels."""
    return zoom(np.eye(points), (voxels / points, 1), order=3, mode="mirror").astype(np.float32)
