"""Volumetric stretch energy on a tetrahedral mesh, and the optimal mass transport map by projected gradients (Lin, Li, Huang, Lin, Yueh, Yau,
BrainLes 2021, section 2.1).

The mesh is a regular grid of vertices over the unit cube, to which the box of the brain is scaled, every cell of it six tetrahedra. A map f
gives every vertex a place in the unit cube C; mu is the mass of a tetrahedron, the sum over all of them 1. The paper takes the Laplacian L(f)
from elsewhere; its standard form is the stiffness matrix of linear elements on f(tau), every tetrahedron weighted by |f(tau)| / mu(tau).
With the normal N_i of the face opposite of vertex i, as long as twice its area, the volume cancels:

    L_ij(f) = sum over tau of N_i . N_j / (36 mu(tau)),    E(f) = 1/2 trace(f^T L(f) f) = 3/2 sum |f(tau)|^2 / mu(tau) >= 3/2,

with equality where f preserves mass.
"""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
from scipy.sparse import csr_matrix

STALLED = 1e-4  # relative change of the energy below which iterations end
PROJECTION = 5  # VSEM iterations that bring a moved map back to one that preserves mass
SLACK = 1.005  # by which a projection may leave the energy above the lowest so far
SETTLED = 1e-2  # relative fall of the cost below which gradient steps end
ORDERS = tuple(permutations(range(3)))  # of axes, along which the edges of a cell's tetrahedra lead from its lowest corner to its highest


class Mesh:
    """A regular grid of vertices over the unit cube, every cell split into six tetrahedra around its diagonal (Freudenthal).

    Args:
        shape: vertices along each axis, at least 2.

    Attributes:
        vertices: (n, 3), the last axis of the grid runs fastest.
        tetrahedra: (t, 4) vertex numbers, positively oriented; all have the volume `volume`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        lines = [np.linspace(0, 1, n) for n in self.shape]
        self.vertices = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 3)
        numbers = np.arange(len(self.vertices)).reshape(1, *self.shape)
        self.tetrahedra = np.ascontiguousarray(self._corners(numbers)[:, 0].T)
        self.volume = 1 / (6 * np.prod([n - 1 for n in self.shape]))
        # a coordinate is held where its vertex lies on one of the two faces of the cube that are normal to it, and free to slide elsewhere
        self.free = (self.vertices > 0) & (self.vertices < 1)
        self._by_corner = np.ascontiguousarray(self.tetrahedra.T)
        self._pairs()

    def _pairs(self) -> None:
        """Where the product of two normals of a tetrahedron goes in the matrix, above and below its diagonal."""
        n = len(self.vertices)
        pairs = [(self._by_corner[i], self._by_corner[j]) for i, j in combinations(range(4), 2)]
        off = np.concatenate([i * n + j for i, j in (*pairs, *(pair[::-1] for pair in pairs))])
        places, slots = np.unique(np.concatenate([off, np.arange(n) * (n + 1)]), return_inverse=True)
        self._slots, self._diagonal = slots[: len(off)], slots[len(off) :]
        self._columns = (places % n).astype(np.int32)
        self._starts = np.searchsorted(places, np.arange(n + 1) * n).astype(np.int32)

    def masses(self, density: np.ndarray) -> np.ndarray:
        """Density of the vertices (grid), > 0 -> mass mu of every tetrahedron (t,), of sum 1 (eq. 1a)."""
        mean = density.reshape(-1)[self._by_corner].mean(axis=0)
        return mean / mean.sum()

    def vertex_masses(self, density: np.ndarray) -> np.ndarray:
        """Density of the vertices (grid) -> their masses (n,), of sum 1 (eq. 1b)."""
        around = np.bincount(self.tetrahedra.reshape(-1), minlength=len(self.vertices))
        mass = density.reshape(-1) * around
        return mass / mass.sum()

    def volumes(self, f: np.ndarray) -> np.ndarray:
        """Signed volumes |f(tau)| of the images (t,) of the tetrahedra under f (n, 3)."""
        grid = self._grid(f)
        low = _corner(grid, ())
        edges = {axes: _corner(grid, axes) - low for axes in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))}
        normals = {axes: _cross(edges[axes], edges[0, 1, 2]) for axes in ((0, 1), (0, 2), (1, 2))}  # the long diagonal is in all of a cell
        found = [(edges[order[:1]] * normals[tuple(sorted(order[:2]))]).sum(axis=0) for order in ORDERS]
        return np.concatenate([volume if _even(order) else -volume for order, volume in zip(ORDERS, found, strict=True)]) / 6

    def _grid(self, f: np.ndarray) -> np.ndarray:
        """Places of the vertices (n, 3) as a grid (3, n0, n1, n2)."""
        return np.ascontiguousarray(f.T).reshape(3, *self.shape)

    def _corners(self, grid: np.ndarray) -> np.ndarray:
        """Values (C, n0, n1, n2) of the vertices at the corners of the tetrahedra (4, C, t)."""
        cells = int(np.prod([n - 1 for n in self.shape]))
        corners = np.empty((4, len(grid), len(ORDERS), cells), grid.dtype)
        for number, order in enumerate(ORDERS):
            path = [order[:steps] for steps in range(4)]
            for place, axes in zip(corners, path if _even(order) else (path[0], path[2], path[1], path[3]), strict=True):
                place[:, number] = _corner(grid, axes)
        return corners.reshape(4, len(grid), -1)

    def energy(self, f: np.ndarray, mu: np.ndarray) -> float:
        """E(f) = 3/2 sum |f(tau)|^2 / mu(tau)."""
        return _energy(self.volumes(f), mu)

    def laplacian(self, f: np.ndarray, mu: np.ndarray) -> csr_matrix:
        """L(f) (n, n)."""
        n = normals(self._corners(self._grid(f)))
        scaled = n / (36 * mu)
        values = np.concatenate([(n[i] * scaled[j]).sum(axis=0) for i, j in combinations(range(4), 2)])
        data = np.bincount(self._slots, weights=np.concatenate([values, values]), minlength=len(self._columns))
        data[self._diagonal] = -np.add.reduceat(data, self._starts[:-1])  # constants are stretched by nothing
        return csr_matrix((data, self._columns, self._starts), shape=(len(self.vertices),) * 2)

    def minimize(self, f: np.ndarray, mu: np.ndarray, iterations: int) -> np.ndarray:
        """VSEM: L(f) is built and its linear systems solved for the free coordinates, over and over (eq. 5), until the energy stalls.

        A step that would turn a tetrahedron over or raise the energy is halved.
        """
        energy = self.energy(f, mu)
        for _ in range(iterations):
            step = _solve(self.laplacian(f, mu), f, self.free)
            for _ in range(6):
                moved = f + step
                volumes = self.volumes(moved)
                after = _energy(volumes, mu)
                if after <= energy and volumes.min() > 0:
                    break
                step = step / 2
            else:
                return f
            stalled = energy - after < STALLED * energy
            f, energy = moved, after
            if stalled:
                break
        return f

    def transport(self, density: np.ndarray, iterations: int, steps: int, start: np.ndarray | None = None) -> np.ndarray:
        """The map f (n, 3) of a density (grid) > 0 to the density 1 of the cube: VSEM, then projected gradients (eqs. 3 to 5).

        The gradient step is taken in the metric of mass, f - s (f - v), with s = 1/2, halved until the cost falls; its projection is VSEM.

        Args:
            iterations: of VSEM before the first gradient step, at most.
            steps: gradient steps, at most.
            start: a map to begin with; None = the identity.
        """
        mu, mass = self.masses(density), self.vertex_masses(density)
        f = self.minimize(self.vertices if start is None else start, mu, iterations)
        cost, energy = self.cost(f, mass), self.energy(f, mu)
        for _ in range(steps):
            moved = self._descended(f, mu, mass, energy)
            if moved is None:
                break
            before, f, cost = cost, moved, self.cost(moved, mass)
            energy = min(energy, self.energy(f, mu))
            if before - cost < SETTLED * before:
                break
        return f

    def _descended(self, f: np.ndarray, mu: np.ndarray, mass: np.ndarray, energy: float) -> np.ndarray | None:
        """One projected gradient step; None where no length of it lowers the cost without raising the energy."""
        for share in (0.5, 0.25, 0.125):
            moved = f - share * (f - self.vertices)
            if self.volumes(moved).min() > 0:
                moved = self.minimize(moved, mu, PROJECTION)
                if self.cost(moved, mass) < self.cost(f, mass) and self.energy(moved, mu) <= SLACK * energy:
                    return moved
        return None

    def cost(self, f: np.ndarray, mass: np.ndarray) -> float:
        """c(f) = sum of ||v - f(v)||^2 m(v) over vertices (eq. 3)."""
        return float((((self.vertices - f) ** 2).sum(axis=1) * mass).sum())


def _corner(grid: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Values (C, cells) at the corner of every cell that lies a step along each of these axes from its lowest."""
    return grid[(slice(None), *(slice(1, None) if axis in axes else slice(-1) for axis in range(3)))].reshape(len(grid), -1)


def _even(order: Sequence[int]) -> bool:
    """Whether the path along the axes in this order turns to the right: the determinant of its steps is 1, not -1."""
    return sum(a > b for a, b in combinations(order, 2)) % 2 == 0


def _energy(volumes: np.ndarray, mu: np.ndarray) -> float:
    return float(1.5 * (volumes**2 / mu).sum())


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross products of vectors (3, t); several times faster than that of NumPy."""
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def normals(corners: np.ndarray) -> np.ndarray:
    """Inward normals (4, 3, t) of the face opposite of each corner of tetrahedra (4, 3, t), as long as twice its area."""
    a, b, c = corners[1:] - corners[0]
    rest = np.stack([_cross(b, c), _cross(c, a), _cross(a, b)])
    return np.concatenate([-rest.sum(axis=0, keepdims=True), rest])


def _solve(matrix: csr_matrix, f: np.ndarray, free: np.ndarray, tolerance: float = 1e-2, most: int = 200) -> np.ndarray:
    """The change of the free coordinates of f (n, 3) after which L f is 0 there: conjugate gradients, scaled by the diagonal, three at once.

    Vectors are held as (3, n), which is several times faster for all but the product with the matrix.
    """
    weight = np.ascontiguousarray((free / matrix.diagonal()[:, None]).T)  # 0 for what is held, which the residual is not asked for
    residual = np.ascontiguousarray(-(matrix @ f).T)
    change = np.zeros_like(residual)
    scaled = weight * residual
    direction, product_ = scaled.copy(), _products(residual, scaled)
    enough = tolerance**2 * product_
    for _ in range(most):
        if (product_ <= enough).all():
            break
        image = np.ascontiguousarray((matrix @ np.ascontiguousarray(direction.T)).T)
        curvature = _products(direction, image)
        length = np.where(curvature > 0, product_ / np.where(curvature > 0, curvature, 1), 0)[:, None]
        change += length * direction
        image *= length
        residual -= image
        np.multiply(weight, residual, out=scaled)
        after = _products(residual, scaled)
        direction *= np.where(product_ > 0, after / np.where(product_ > 0, product_, 1), 0)[:, None]
        direction += scaled
        product_ = after
    return change.T


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products of the rows of (3, n)."""
    return np.einsum("in,in->i", a, b)
