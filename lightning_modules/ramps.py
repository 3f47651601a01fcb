"""Ramps: weights of loss terms that grow over training, by the share of it that is done; lengths in batches or as a share of a run."""

import math

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative


def gaussian_ramp(progress: float) -> float:
    """exp(-5 (1 - progress)^2) for progress in [0, 1]: from 0.0067 to 1 (Laine & Aila, ICLR 2017). Values outside are clipped."""
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)


def linear_ramp(progress: float) -> float:
    """progress, clipped to [0, 1]."""
    return min(max(progress, 0.0), 1.0)


def batches(length: float, total: int) -> float:
    """A length that is given in batches, or below 1 as a share of all `total` of them -> batches, not rounded."""
    return length * total if length < 1 else length


def whole_batches(length: float, total: int) -> int:
    """The same, in whole batches."""
    return round(length * total) if length < 1 else int(length)


SHAPES = {"none": lambda progress: 1.0, "linear": linear_ramp, "gaussian": gaussian_ramp}


class Ramp:
    """Weight in [0, 1] of a loss term: rises over the first `length` batches and stays at 1.

    Args:
        shape: `gaussian`, `linear`, or `none` (1 from the start).
        length: in batches, or below 1 as a share of all of them; 0 = no ramp.

    Raises:
        SuiteError: an unknown shape, a negative length.
    """

    def __init__(self, shape: str = "gaussian", length: NotNegative = 0.4) -> None:
        if shape not in SHAPES:
            raise unknown("model.ramp.shape", shape, SHAPES)
        if length < 0:
            raise SuiteError(f"model.ramp.length={length}: at least 0")
        self.shape, self.length = shape, length

    def __call__(self, done: int, total: int) -> float:
        """The weight in a batch before which `done` of `total` batches were trained on."""
        length = batches(self.length, total)
        return SHAPES[self.shape](done / length if length else 1.0)
