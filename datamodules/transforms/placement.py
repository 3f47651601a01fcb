"""Rotation, scaling, elastic deformation and mirroring of training patches, drawn before the patch is read.

A transform of a finished patch has to fill its corners with background. Here the patch is placed in the volume first, and just the voxels that it
covers are read and resampled once, so that the corners show what is there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from datamodules.sampling import Box
from lesionbench.errors import SuiteError
from lesionbench.ranges import ASCENDING, Axis, NotNegative, Positive, Share

CONTROL_POINTS = 24  # of an elastic deformation, along each side of a patch


@dataclass(frozen=True)
class Placement:
    """How one patch lies in its volume.

    Attributes:
        matrix: (3, 3), takes an offset from the center of the patch to an offset in the volume, in voxels; None = upright.
        mirrored: axes along which the patch is read backwards.
        warp: (3, n, n, n), how far each of evenly spaced points of the patch is moved along each axis before `matrix` applies, in shares
            of the patch's side; needs a matrix. None = not at all.
    """

    matrix: np.ndarray | None = None
    mirrored: tuple[int, ...] = ()
    warp: torch.Tensor | None = None

    def margin(self, size: Sequence[int]) -> list[int]:
        """Voxels to read beyond each side of an upright box of this size."""
        if self.matrix is None:
            return [0, 0, 0]
        half = (np.asarray(size) - 1) / 2
        reach = half if self.warp is None else half + self.warp.abs().amax(dim=(1, 2, 3)).numpy() * np.asarray(size)
        return [max(0, math.ceil(m - 1e-5)) for m in np.abs(self.matrix) @ reach - half]  # not a voxel more for a rounding error

    def grown(self, box: Box) -> Box:
        """The upright box around all that a patch cut at `box` covers."""
        margin = self.margin([b - a for a, b in box])
        return tuple((a - m, b + m) for (a, b), m in zip(box, margin, strict=True))

    def mirror(self, array: np.ndarray) -> np.ndarray:
        """(C, x, y, z) read backwards along the mirrored axes, as a view."""
        return np.flip(array, [1 + axis for axis in self.mirrored])

    def resample(self, values: torch.Tensor, size: Sequence[int], linear: bool) -> torch.Tensor:
        """What the patch of this size shows of the grown box `values` (C, x, y, z) around the same center; same type."""
        grid = self._grid(tuple(values.shape[1:]), size)
        floating = values.to(torch.float32)[None]
        if linear:
            floating = floating.contiguous(memory_format=torch.channels_last_3d)  # faster than channel by channel
        sampled = F.grid_sample(floating, grid, mode="bilinear" if linear else "nearest", padding_mode="border", align_corners=True)
        return sampled[0].contiguous().to(values.dtype)

    def _grid(self, shape: tuple[int, ...], size: Sequence[int]) -> torch.Tensor:
        """Coordinates (1, *size, 3) for `grid_sample`: -1 .. 1 from the first to the last voxel, last axis first."""
        offsets = [torch.arange(n) - (n - 1) / 2 for n in size]
        x, y, z = offsets[0][:, None, None], offsets[1][None, :, None], offsets[2][None, None, :]
        if self.warp is not None:
            moved = F.interpolate(self.warp[None], tuple(size), mode="trilinear", align_corners=True)[0]
            x, y, z = x + moved[0] * size[0], y + moved[1] * size[1], z + moved[2] * size[2]
        rows = self.matrix / np.array([max(n - 1, 1) / 2 for n in shape])[:, None]
        return torch.stack([float(a) * x + float(b) * y + float(c) * z for a, b, c in rows[::-1]], dim=-1)[None]


class RandomPlacement:
    """Draws placements from torch's global generator.

    Args:
        degrees: rotation about each axis is uniform in [-degrees, degrees].
        scales: uniform factor, the same along all axes, by which the patch covers more of the volume (above 1 things look smaller).
        p_rotation, p_scaling: probabilities, independent of each other.
        mirror_axes: each is mirrored with probability 0.5.
        elongation: probability that a scaling draws a factor for each axis instead of one for all.
        p_elastic: probability of an elastic deformation, independent of the others.
        deformation: range of its smoothing length s (the standard deviation of the Gaussian that smooths random displacements), in shares
            of the patch's side; the largest displacement along each axis is uniform in [s / 8, s / 2].

    Raises:
        SuiteError: probabilities, scales or deformations out of range.
    """

    def __init__(
        self,
        degrees: NotNegative = 30,
        scales: Annotated[Sequence[Positive], ASCENDING] = (0.7, 1.4),
        p_rotation: Share = 0.2,
        p_scaling: Share = 0.2,
        mirror_axes: Sequence[Axis] = (0, 1, 2),
        elongation: Share = 0,
        p_elastic: Share = 0,
        deformation: Sequence[NotNegative] = (0, 0.25),
    ) -> None:
        chances = {"p_rotation": p_rotation, "p_scaling": p_scaling, "elongation": elongation, "p_elastic": p_elastic}
        for name, p in chances.items():
            if not 0 <= p <= 1:
                raise SuiteError(f"augmentation: {name}={p} is no probability")
        if not 0 < scales[0] <= scales[1]:
            raise SuiteError(f"augmentation: scales={list(scales)}: need 0 < smallest <= largest")
        if not 0 <= deformation[0] <= deformation[1] <= 1:
            raise SuiteError(f"augmentation: deformation={list(deformation)}: need 0 <= smallest <= largest <= 1")
        self.degrees, self.scales, self.p_rotation, self.p_scaling = degrees, tuple(scales), p_rotation, p_scaling
        self.mirror_axes, self.elongation = tuple(mirror_axes), elongation
        self.p_elastic, self.deformation = p_elastic, tuple(deformation)

    def draw(self, slice_axis: int | None = None) -> Placement:
        """One placement; with `slice_axis` (2D and 2.5D samples) all but mirroring stays in the plane."""
        turns = torch.rand(1).item() < self.p_rotation
        grows = torch.rand(1).item() < self.p_scaling
        mirrored = tuple(axis for axis in self.mirror_axes if torch.rand(1).item() < 0.5)
        matrix = np.eye(3)
        if turns:
            for axis in range(3):
                angle = math.radians(_uniform(-self.degrees, self.degrees))
                if slice_axis in (None, axis):
                    matrix = matrix @ _rotation(axis, angle)
        if grows:
            each = torch.rand(1).item() < self.elongation
            factors = [_uniform(*self.scales) for _ in range(3)] if each else [_uniform(*self.scales)] * 3
            matrix = matrix @ np.diag([1.0 if axis == slice_axis else f for axis, f in enumerate(factors)])
        # drawn last, and only where asked for: without it every other draw stays what it was
        warp = self._warp(slice_axis) if self.p_elastic > 0 and torch.rand(1).item() < self.p_elastic else None
        if not (turns or grows) and warp is None:
            return Placement(mirrored=mirrored)
        return Placement(matrix @ np.diag([-1.0 if axis in mirrored else 1.0 for axis in range(3)]), warp=warp)

    def _warp(self, slice_axis: int | None) -> torch.Tensor:
        """Smooth random displacements (3, n, n, n) in shares of the side; one point thick and unmoved along `slice_axis`."""
        length = _uniform(*self.deformation)
        sides = [1 if axis == slice_axis else CONTROL_POINTS for axis in range(3)]
        sigmas = [max(length * (n - 1), 1.0) if n > 1 else 0 for n in sides]  # at least a step between two points
        warp = np.zeros((3, *sides), np.float32)
        for axis in (a for a in range(3) if a != slice_axis):
            smooth = gaussian_filter(torch.rand(sides).numpy() * 2 - 1, sigmas, mode="constant")
            warp[axis] = smooth / max(np.abs(smooth).max(), 1e-8) * _uniform(length / 8, length / 2)
        return torch.from_numpy(warp)


class NormalPlacement:
    """Draws rotations and scalings from normal distributions, with torch's global generator (Fonov et al., BrainLes 2021, Section 2.3).

    Args:
        degrees: standard deviation of the rotation about each axis.
        scale: standard deviation of the factor along each axis, whose mean is 1; factors below 0.5 count as 0.5.
    """

    def __init__(self, degrees: NotNegative = 10.0, scale: NotNegative = 0.03) -> None:
        self.degrees, self.scale = degrees, scale

    def draw(self, slice_axis: int | None = None) -> Placement:
        """One placement; with `slice_axis` (2D and 2.5D samples) it stays in the plane."""
        angles = torch.randn(3).mul(math.radians(self.degrees)).tolist()
        factors = (1 + self.scale * torch.randn(3)).clamp_min(0.5).tolist()
        matrix = np.eye(3)
        for axis, angle in enumerate(angles):
            if slice_axis in (None, axis):
                matrix = matrix @ _rotation(axis, angle)
        return Placement(matrix @ np.diag([1.0 if axis == slice_axis else 1 / f for axis, f in enumerate(factors)]))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1).item()


def _rotation(axis: int, angle: float) -> np.ndarray:
    a, b = (i for i in range(3) if i != axis)
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix
