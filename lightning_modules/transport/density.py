"""Densities of brains: what is to be magnified, and the map that does it (Lin, Li, Huang, Lin, Yueh, Yau, BrainLes 2021, section 2.2)."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from lesionbench.keyed import key
from lesionbench.ranges import AtLeastTwo, Count, NotNegative, Positive, Whole
from lightning_modules.transport.knothe import nodes as rearranged
from lightning_modules.transport.mesh import Mesh
from lightning_modules.transport.warp import Box, Warp, hats

Backend = Literal["vsem", "knothe", "resize"]
CLIP = 2.5  # deviations from the mean beyond which gray values are cut


@dataclass(frozen=True)
class Transport:
    """How the map of a brain to the cube is made; plain data.

    Args:
        backend: `vsem` = optimal mass transport by projected gradients (`Mesh.transport`), `knothe` = the Knothe-Rosenblatt rearrangement,
            `resize` = the box of the brain is resized to the cube, without any density.
        grid: vertices of the mesh along each axis; fewer along an axis of fewer voxels.
        gain: gamma of the density exp(gamma I).
        background: density of the box outside of the brain; that of the brain is 1 and more.
        dilation: voxels by which the tumor is grown.
        equalize: gray values by histogram equalization instead of by mean and deviation.
        iterations, steps: of VSEM and of projected gradients, at most.
    """

    backend: Backend = "vsem"
    grid: AtLeastTwo = 24
    gain: NotNegative = 2.0
    background: Positive = 0.1
    dilation: Whole = 5
    equalize: bool = False
    iterations: Count = 20
    steps: Whole = 3

    @property
    def key(self) -> str:
        """Sixteen characters that tell these settings from others."""
        return f"{key(sorted(asdict(self).items())):016x}"

    def density(self, gray: np.ndarray, brain: np.ndarray, tumor: np.ndarray | None = None) -> np.ndarray:
        """The density (X, Y, Z): exp(gamma I) in the brain (eq. 6) or, with a tumor, in the grown tumor alone, and 1 elsewhere in the brain
        (eq. 7); `background` outside.

        Args:
            gray: values of the guiding modality, on any scale.
            brain, tumor: masks, bool.
        """
        density = np.full(gray.shape, self.background)
        if not brain.any():
            return density
        raised = brain if tumor is None else brain & grown(tumor, self.dilation)
        density[brain] = 1
        density[raised] = np.exp(self.gain * unit_gray(gray, brain, self.equalize)[raised])
        return density

    def warp(self, gray: torch.Tensor, brain: torch.Tensor, tumor: torch.Tensor | None = None) -> Warp:
        """The map of the box around a brain to the cube, computed on the CPU and kept on the device of `gray`; arguments as of `density`.

        Raises:
            SuiteError: the map came out with tetrahedra that are turned over.
        """
        box = bounding_box(brain.cpu().numpy())
        inside = tuple(slice(a, b) for a, b in box)
        shape = (2, 2, 2) if self.backend == "resize" else tuple(min(self.grid, b - a + 1) for a, b in box)
        vertices, places = np.ones(shape), mesh_of(shape).vertices
        if self.backend != "resize":
            masks = [None if m is None else m[inside].cpu().numpy() for m in (brain, tumor)]
            density = self.density(gray[inside].double().cpu().numpy(), masks[0], masks[1])
            vertices = at_vertices(density, shape)
            if self.backend == "knothe":
                places = rearranged(averaged(density, tuple(n - 1 for n in shape))).reshape(-1, 3)
            else:
                places = mesh_of(shape).transport(vertices, self.iterations, self.steps)
        nodes = torch.from_numpy(np.ascontiguousarray(places.T, dtype=np.float32)).reshape(3, *shape).to(gray.device)
        return Warp(nodes, box, tuple(brain.shape), torch.from_numpy(vertices.astype(np.float32)).to(gray.device))


@lru_cache(maxsize=4)
def mesh_of(shape: tuple[int, ...]) -> Mesh:
    """The mesh of this shape; most cases have the same."""
    return Mesh(shape)


def unit_gray(gray: np.ndarray, brain: np.ndarray, equalize: bool = False) -> np.ndarray:
    """Gray values in [0, 1]: by mean and deviation of the brain, cut at `CLIP`, shifted and scaled; or their rank in the brain."""
    values = gray[brain]
    if equalize:
        return np.searchsorted(np.sort(values), gray, side="right") / len(values)
    deviation = values.std()
    if deviation == 0:
        return np.full(gray.shape, 0.5)
    return (np.clip((gray - values.mean()) / deviation, -CLIP, CLIP) + CLIP) / (2 * CLIP)


def grown(mask: np.ndarray, voxels: int) -> np.ndarray:
    """A mask with everything that is at most so many voxels away."""
    if voxels == 0 or not mask.any():
        return mask
    around = tuple(slice(max(start - voxels, 0), stop + voxels) for start, stop in bounding_box(mask))
    result = np.zeros_like(mask)
    result[around] = distance_transform_edt(~mask[around]) <= voxels
    return result


def bounding_box(mask: np.ndarray) -> Box:
    """(start, stop) of what is True along each axis, at least two voxels; of everything where there is nothing."""
    if not mask.any():
        return tuple((0, n) for n in mask.shape)
    box = []
    for axis, n in enumerate(mask.shape):
        there = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        start, stop = int(there[0]), int(there[-1]) + 1
        box.append((max(min(start, n - 2), 0), max(stop, min(start + 2, n))))
    return tuple(box)


def at_vertices(density: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Voxels (X, Y, Z) averaged around each vertex of a grid, by the weights of linear interpolation; keeps the mass."""
    for axis, n in enumerate(shape):
        count = density.shape[axis]
        weights = hats(n, (torch.arange(count, dtype=torch.float64) + 0.5) / count).numpy()
        density = np.moveaxis(np.tensordot(weights / weights.sum(axis=0), density, axes=(0, axis)), 0, axis)
    return density


def averaged(density: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Voxels (X, Y, Z) averaged over the cells of a coarser grid, borders in shares of voxels; keeps the mass."""
    for axis, n in enumerate(shape):
        count = density.shape[axis]
        borders, edges = np.linspace(0, count, n + 1), np.arange(count)[:, None]
        weights = np.clip(np.minimum(edges + 1, borders[1:]) - np.maximum(edges, borders[:-1]), 0, None)
        density = np.moveaxis(np.tensordot(weights / weights.sum(axis=0), density, axes=(0, axis)), 0, axis)
    return density
