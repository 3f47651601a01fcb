"""The Knothe-Rosenblatt rearrangement: mass-preserving, made of one-dimensional ones, not of least cost."""

import numpy as np


def boxes(mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes of the unit cube to which the cells (X, Y, Z) of a grid go, each of a volume that is its share of the mass.

    x goes by the distribution of the slabs, y by that within the slab, z by that within its column.

    Args:
        mass: of the cells, > 0.

    Returns:
        Borders of the slabs (X + 1,), of the columns in every slab (X, Y + 1) and of the cells in every column (X, Y, Z + 1).
    """
    columns = mass.sum(axis=2)
    return _shares(columns.sum(axis=1)), _shares(columns), _shares(mass)


def nodes(mass: np.ndarray) -> np.ndarray:
    """The rearrangement as a continuous map: the places (X + 1, Y + 1, Z + 1, 3) in the unit cube of the corners of the cells.

    `boxes` jump between neighboring slabs and columns; a corner lies at the mean of the borders on its sides, so that mass is preserved within
    what the distributions differ there. Grows along each axis.
    """
    x, y, z = boxes(mass)
    shape = tuple(n + 1 for n in mass.shape)
    place = np.empty((*shape, 3))
    place[..., 0] = x[:, None, None]
    place[..., 1] = _between(y)[:, :, None]
    place[..., 2] = _between(_between(z).swapaxes(0, 1)).swapaxes(0, 1)
    return place


def _shares(mass: np.ndarray) -> np.ndarray:
    """Cumulative shares along the last axis, from 0 to 1."""
    summed = np.cumsum(mass, axis=-1, dtype=float)
    shares = np.concatenate([np.zeros_like(summed[..., :1]), summed / summed[..., -1:]], axis=-1)
    shares[..., -1] = 1
    return shares


def _between(values: np.ndarray) -> np.ndarray:
    """Values of n cells along the first axis -> of their n + 1 borders: the mean of both sides, at the ends of the one."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return (padded[1:] + padded[:-1]) / 2
