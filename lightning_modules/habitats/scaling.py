"""Scaling of the modalities before they are encoded: fitted on training voxels, the same constants for every patient."""

import numpy as np

from lesionbench.errors import SuiteError, unknown

KINDS = ("minmax", "zscore", "robust")


class Scaling:
    """`(x - shift) / scale` per modality.

    Args:
        kind: `minmax` maps the range to [-1, 1] (what a tanh output can reproduce), `zscore` to mean 0 and deviation 1, `robust` to
            median 0 and interquartile range 1.
        names: of the modalities, for error messages.

    Attributes:
        shift, scale: constants (M,) after `fit`.
    """

    def __init__(self, kind: str = "minmax", names: tuple[str, ...] | None = None) -> None:
        if kind not in KINDS:
            raise unknown("scaling", kind, KINDS)
        self.kind, self.names = kind, names

    def fit(self, voxels: np.ndarray) -> "Scaling":
        """Finds the constants of voxels (N, M).

        Raises:
            SuiteError: a modality that is constant; names it.
        """
        low, high = voxels.min(axis=0).astype(np.float64), voxels.max(axis=0).astype(np.float64)
        if self.kind == "minmax":
            self.shift, self.scale = (low + high) / 2, (high - low) / 2
        elif self.kind == "zscore":
            self.shift, self.scale = voxels.mean(axis=0, dtype=np.float64), voxels.std(axis=0, dtype=np.float64)
        else:
            first, self.shift, third = np.quantile(voxels.astype(np.float64), [0.25, 0.5, 0.75], axis=0)
            self.scale = third - first
        for m in np.flatnonzero(~(self.scale > 1e-12 * np.maximum(np.abs(low), np.abs(high)))):
            name = self.names[m] if self.names else f"number {m}"
            raise SuiteError(
                f"modality {name}: scaling '{self.kind}' finds no spread in the {len(voxels)} tumor voxels of the training patients "
                f"(range {low[m]:g} to {high[m]:g}); leave the modality out with task.channels=[...]"
            )
        return self

    def transform(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (N, M) -> scaled, float32."""
        return ((voxels - self.shift) / self.scale).astype(np.float32)
