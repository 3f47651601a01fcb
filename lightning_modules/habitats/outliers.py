"""Outlier voxels: heavy tails are kept out of what is fitted, and clipped where everything is labeled."""

import numpy as np

from lesionbench.errors import SuiteError, unknown

MODES = ("upper", "two_sided")


class OutlierFilter:
    """Cut-offs at a quantile of every modality (the data filter of Li et al., BrainLes 2021, Sect. 2.4).

    A voxel beyond the cut-off of any modality is an outlier: `keep` leaves it out of what is fitted. `clip` brings it to the cut-off
    instead, so that a map has no holes.

    Args:
        quantile: gamma in [0, 1]; 1 keeps everything.
        mode: `upper` cuts above the quantile; `two_sided` cuts (1 - gamma) / 2 at either end.

    Attributes:
        low, high: cut-offs (M,) after `fit`.
    """

    def __init__(self, quantile: float, mode: str = "upper") -> None:
        if mode not in MODES:
            raise unknown("filter mode (habitats.filter_mode)", mode, MODES)
        if not 0 <= quantile <= 1:
            raise SuiteError(f"quantile={quantile}: expected a value in [0, 1]")
        self.quantile, self.mode = float(quantile), mode

    def fit(self, voxels: np.ndarray) -> "OutlierFilter":
        """Finds the cut-offs of voxels (N, M)."""
        if self.mode == "upper":
            self.low, self.high = np.full(voxels.shape[1], -np.inf), np.quantile(voxels, self.quantile, axis=0)
        else:
            tail = (1 - self.quantile) / 2
            self.low, self.high = np.quantile(voxels, [tail, 1 - tail], axis=0)
        return self

    def keep(self, voxels: np.ndarray) -> np.ndarray:
        """Which voxels (N, M) are no outliers: (N,), bool."""
        return ((voxels >= self.low) & (voxels <= self.high)).all(axis=1)

    def clip(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (N, M) with outliers brought to the cut-offs."""
        return np.clip(voxels, self.low, self.high)
