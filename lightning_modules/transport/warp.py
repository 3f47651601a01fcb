"""Carries images and labels from the box of a brain to a cube and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch.nn.functional import grid_sample

from lesionbench.errors import SuiteError
from lightning_modules.transport.mesh import ORDERS

Box = tuple[tuple[int, int], ...]
EXACT = 1e-5  # largest distance between f(psi(y)) and y, in sides of the cube
WALKS = 8  # from a tetrahedron to the next one, before those around are looked through
PIECE = 2**17  # places that are worked on at a time, to stay in the cache of the processor
# number of the order whose coordinates fall, by (x >= y, y >= z, x >= z) in bits
_FALLING = torch.zeros(8, dtype=torch.int32)
for _number, _order in enumerate(ORDERS):
    _x, _y, _z = (_order.index(axis) for axis in range(3))
    _FALLING[4 * (_x < _y) + 2 * (_y < _z) + (_x < _z)] = _number


@dataclass
class Warp:
    """A piecewise linear bijection f from a box of voxels to the unit cube, and its inverse psi.

    The tetrahedra are those of `mesh.Mesh`: of the six in a cell, the one of an order of the axes holds the places whose coordinates within
    the cell fall in that order. Places in the box are shares of its sides, so that voxel i of n lies at (i + 1/2) / n.

    Attributes:
        nodes: f at the vertices (3, n0, n1, n2) float32, whose first and last lie on the faces of the box.
        box: (start, stop) along each axis of the volume (X, Y, Z).
        shape: of the volume.
        density: at the vertices (n0, n1, n2), on any scale: what f preserves the mass of.

    Raises:
        SuiteError: a tetrahedron is turned over or flat: f cannot be inverted.
    """

    nodes: torch.Tensor
    box: Box
    shape: tuple[int, ...]
    density: torch.Tensor

    def __post_init__(self) -> None:
        self._cells = [n - 1 for n in self.nodes.shape[1:]]
        maps = self._pieces().double()
        turned = int((torch.linalg.det(maps[..., :3]) <= 0).sum())
        if turned:
            raise SuiteError(
                f"the map from the brain to the cube turns {turned} of {len(maps)} tetrahedra over; "
                "take a smaller model.transport.gain, a larger background, or another grid"
            )
        back = torch.linalg.inv(maps[..., :3])
        back = torch.cat([back, -back @ maps[..., 3:]], dim=2)
        self._forward, self._backward = (m.float().flatten(1).T.contiguous() for m in (maps, back))

    def _pieces(self) -> torch.Tensor:
        """The affine map (t, 3, 4) of every tetrahedron; its number is 6 * cell + order."""
        cells = self._corners(())
        origin = torch.stack([c / n for c, n in zip(cells, self._cells, strict=True)], dim=1)[..., None]
        maps = []
        for order in ORDERS:
            matrix = self.nodes.new_empty(cells.shape[1], 3, 3)
            path = [self.nodes[(slice(None), *self._corners(order[:steps]))].T for steps in range(4)]
            for axis, before, after in zip(order, path, path[1:], strict=False):
                matrix[:, :, axis] = (after - before) * self._cells[axis]
            maps.append(torch.cat([matrix, path[0][..., None] - matrix @ origin], dim=2))
        return torch.stack(maps, dim=1).flatten(0, 1)

    def _corners(self, axes: Sequence[int]) -> torch.Tensor:
        """Indices (3, cells) of the corner of every cell that lies a step along each of these axes from its lowest."""
        lines = [torch.arange(n, device=self.nodes.device) + (axis in axes) for axis, n in enumerate(self._cells)]
        return torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)

    def mass(self, masks: torch.Tensor) -> torch.Tensor:
        """Shares (R,) of the mass in masks (R, X, Y, Z), which is that of the tetrahedra that hold their voxels (eq. 1a)."""
        paths = [[self.density[tuple(self._corners(order[:steps]))] for steps in range(4)] for order in ORDERS]
        means = torch.stack([torch.stack(path).double().mean(dim=0) for path in paths], dim=1).flatten()
        density = means[self._tetrahedra(_centers(self.sides, self.nodes))]
        return (masks[(slice(None), *self.inside)].flatten(1) * density).sum(dim=1) / density.sum()

    @property
    def sides(self) -> tuple[int, ...]:
        """Voxels along each side of the box."""
        return tuple(b - a for a, b in self.box)

    @property
    def inside(self) -> tuple[slice, ...]:
        """The box as an index of the volume."""
        return tuple(slice(a, b) for a, b in self.box)

    def forward(self) -> torch.Tensor:
        """f at the centers of the voxels of the box, (3, x, y, z)."""
        return self.at(_centers(self.sides, self.nodes)).reshape(3, *self.sides)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """f (3, N) at places (3, N) of the box."""
        return torch.cat([_applied(self._forward, self._tetrahedra(p), p) for p in places.split(PIECE, dim=1)], dim=1)

    def inverse(self, size: Sequence[int]) -> torch.Tensor:
        """psi at the centers of the voxels of a cube, (3, *size): where in the box each comes from.

        A place goes where the inverse of its tetrahedron sends it, over and over, until that lies in the same tetrahedron; it begins between
        the places found for a coarse grid.
        """
        lines = [torch.linspace(0, 1, n + 1, device=self.nodes.device) for n in self._cells]
        corners = torch.stack(torch.meshgrid(*lines, indexing="ij"))
        coarse = self._walked(corners.flatten(1), self._near(corners.flatten(1))).reshape(corners.shape)
        start = _enlarged(coarse, [_line(n, self.nodes) for n in size]).flatten(1)
        pieces = zip(_centers(size, self.nodes).split(PIECE, dim=1), start.split(PIECE, dim=1), strict=True)
        return torch.cat([self._walked(targets, places) for targets, places in pieces], dim=1).reshape(3, *size)

    def pull(self, image: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        """A volume (C, X, Y, Z) in the cube (C, *size): its value at psi (3, *size), linear between voxels."""
        values = image[(slice(None), *self.inside)].to(psi.dtype)
        # from shares of a side to what `grid_sample` takes: -1 and 1 at the outer borders, axes in reverse
        grid = torch.stack([2 * p - 1 for p in psi.flip(0)], dim=-1)
        return grid_sample(values[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]

    def pull_labels(self, labels: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        """Labels (X, Y, Z) in the cube: that of the voxel in which psi lies."""
        return labels[self.inside].reshape(-1)[_voxels(psi, self.sides)]

    def push(self, cube: torch.Tensor) -> torch.Tensor:
        """Maps or labels of the cube (C, *size) on the volume (C, X, Y, Z): of the cube's voxel that holds f of the center of each of the
        volume's voxels; 0 outside of the box."""
        volume = cube.new_zeros((len(cube), *self.shape))
        volume[(slice(None), *self.inside)] = cube.flatten(1)[:, _voxels(self.forward(), cube.shape[1:])]
        return volume

    def _near(self, targets: torch.Tensor) -> torch.Tensor:
        """The vertex (3, N) whose image is nearest to each target (3, N)."""
        _, numbers = cKDTree(self.nodes.flatten(1).T.cpu().numpy()).query(targets.T.cpu().numpy())
        index = np.stack(np.unravel_index(numbers, tuple(self.nodes.shape[1:])))
        return torch.from_numpy(index / np.array(self._cells)[:, None]).to(targets)

    def _tetrahedra(self, places: torch.Tensor) -> torch.Tensor:
        """The number (N,) int32 of the tetrahedron that holds each place (3, N)."""
        cell, rests = torch.zeros_like(places[0], dtype=torch.int32), []
        for place, count in zip(places, self._cells, strict=True):
            scaled = place * count
            low = scaled.int().clamp_(0, count - 1)
            rests.append(scaled.sub_(low))
            cell = cell.mul_(count).add_(low)
        x, y, z = rests
        order = (x >= y).int().mul_(2).add_(y >= z).mul_(2).add_(x >= z)
        return cell.mul_(6).add_(_FALLING.to(cell.device).index_select(0, order))

    def _walked(self, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """psi (3, N) of targets (3, N), from places near by."""
        found, left = places.clone(), torch.arange(targets.shape[1], device=targets.device)
        here = self._tetrahedra(places)
        for _ in range(WALKS):
            after = _applied(self._backward, here, targets[:, left]).clamp_(0, 1)
            there = self._tetrahedra(after)
            found[:, left] = after
            off = (there != here).nonzero()[:, 0]
            off = off[(_applied(self._forward, there[off], after[:, off]) - targets[:, left[off]]).abs().amax(dim=0) > EXACT]
            left, here = left[off], there[off]
            if not len(left):
                return found
        for one in left:  # led around in circles
            found[:, one] = self._searched(targets[:, one], found[:, one])
        return found

    def _searched(self, target: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """psi (3,) of a target (3,): of the tetrahedron around the place, else of any, whose inverse sends it least far outside of itself."""
        lows = [int(p * n) for p, n in zip(place.tolist(), self._cells, strict=True)]
        lines = [torch.arange(max(low - 1, 0), min(low + 2, n), device=place.device) for low, n in zip(lows, self._cells, strict=True)]
        i, j, k = torch.meshgrid(*lines, indexing="ij")
        around = 6 * ((i * self._cells[1] + j) * self._cells[2] + k).reshape(-1, 1) + torch.arange(6, device=place.device)
        for numbers in (around.reshape(-1), torch.arange(self._backward.shape[1], device=place.device)):
            candidates = _applied(self._backward, numbers, target[:, None].expand(3, len(numbers))).clamp_(0, 1)
            apart = (self.at(candidates) - target[:, None]).abs().amax(dim=0)
            if apart.min() <= EXACT:
                break
        return candidates[:, apart.argmin()]


def hats(count: int, places: torch.Tensor) -> torch.Tensor:
    """Weights (N, count) of nodes along one axis, the first at 0 and the last at 1, for linear interpolation at places (N,)."""
    apart = places[:, None] * (count - 1) - torch.arange(count, device=places.device, dtype=places.dtype)
    return (1 - apart.abs()).clamp_min(0)


def _applied(maps: torch.Tensor, numbers: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The affine maps (12, t), row by row, of these numbers (N,) at places (3, N)."""
    x, y, z = places
    chosen = (m.index_select(0, numbers) for m in maps)
    return torch.stack([next(chosen).mul_(x).add_(next(chosen).mul_(y)).add_(next(chosen).mul_(z)).add_(next(chosen)) for _ in range(3)])


def _line(count: int, like: torch.Tensor) -> torch.Tensor:
    """The centers of so many voxels, as shares of their side."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _centers(size: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The centers (3, N) of all voxels of a grid."""
    return torch.stack(torch.meshgrid(*(_line(n, like) for n in size), indexing="ij")).flatten(1)


def _enlarged(nodes: torch.Tensor, lines: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of nodes (C, n0, n1, n2) at all places of three lines, (C, len, len, len)."""
    a, b, c = (hats(n, line) for n, line in zip(nodes.shape[1:], lines, strict=True))
    return torch.einsum("cxjk,yj->cxyk", torch.einsum("cijk,xi->cxjk", nodes, a), b) @ c.T


def _voxels(places: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The flat index (*spatial) int32 of the voxel of a grid that holds each place (3, *spatial)."""
    index = torch.zeros_like(places[0], dtype=torch.int32)
    for place, count in zip(places, size, strict=True):
        index = index.mul_(count).add_((place * count).int().clamp_(0, count - 1))
    return index
