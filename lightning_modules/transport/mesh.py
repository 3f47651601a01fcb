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
        corner = np.stack(np.meshgrid(*(np.arange(n - 1) for n in self.shape), indexing="ij"), axis=-1).reshape(-1, 1, 3)
        steps = []
        for order in permutations(range(3)):
            path = np.zeros((4, 3), int)
            for step, axis in enumerate(order):
                path[step + 1 :, axis] += 1
            steps.append(path if round(np.linalg.det(path[1:])) > 0 else path[[0, 2, 1, 3]])
        self.tetrahedra = np.concatenate([np.ravel_multi_index(tuple((corner + s).T), self.shape).T for s in steps])
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
        a, b, c = self._corners(f)[1:] - self._corners(f)[0]
        return (a * _cross(b, c)).sum(axis=0) / 6

    def _corners(self, f: np.ndarray) -> np.ndarray:
        """Places (4, 3, t) of the corners of the tetrahedra under f (n, 3)."""
        columns = np.ascontiguousarray(f.T)
        return np.stack([columns[:, corner] for corner in self._by_corner])

    def energy(self, f: np.ndarray, mu: np.ndarray) -> float:
        """E(f) = 3/2 sum |f(tau)|^2 / mu(tau)."""
        return float(1.5 * (self.volumes(f) ** 2 / mu).sum())

    def laplacian(self, f: np.ndarray, mu: np.ndarray) -> csr_matrix:
        """L(f) (n, n)."""
        n = normals(self._corners(f))
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
                after = self.energy(moved, mu)
                if after <= energy and self.volumes(moved).min() > 0:
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


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross products of vectors (3, t); several times faster than that of NumPy."""
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def normals(corners: np.ndarray) -> np.ndarray:
    """Inward normals (4, 3, t) of the face opposite of each corner of tetrahedra (4, 3, t), as long as twice its area."""
    a, b, c = corners[1:] - corners[0]
    rest = np.stack([_cross(b, c), _cross(c, a), _cross(a, b)])
    return np.concatenate([-rest.sum(axis=0, keepdims=True), rest])


def _solve(matrix: csr_matrix, f: np.ndarray, free: np.ndarray, tolerance: float = 1e-2, most: int = 200) -> np.ndarray:
    """The change of the free coordinates of f (n, 3) after which L f is 0 there: conjugate gradients, scaled by the diagonal, three at once."""
    weight = free / matrix.diagonal()[:, None]
    residual = -(matrix @ f) * free
    change = np.zeros_like(f)
    scaled = weight * residual
    direction, product_ = scaled, (residual * scaled).sum(axis=0)
    enough = tolerance**2 * product_
    for _ in range(most):
        if (product_ <= enough).all():
            break
        image = (matrix @ direction) * free
        curvature = (direction * image).sum(axis=0)
        length = np.where(curvature > 0, product_ / np.where(curvature > 0, curvature, 1), 0)
        change = change + length * direction
        residual = residual - length * image
        scaled = weight * residual
        after = (residual * scaled).sum(axis=0)
        direction = scaled + np.where(product_ > 0, after / np.where(product_ > 0, product_, 1), 0) * direction
        product_ = after
    return change
