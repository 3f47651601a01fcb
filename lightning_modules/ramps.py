"""Ramps: weights of loss terms that grow over training, by the share of it that is done."""

import math


def gaussian_ramp(progress: float) -> float:
    """exp(-5 (1 - progress)^2) for progress in [0, 1]: from 0.0067 to 1 (Laine & Aila, ICLR 2017). Values outside are clipped."""
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)
