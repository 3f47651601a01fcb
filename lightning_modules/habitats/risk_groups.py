"""Two groups of patients by K-medoids on their features."""

from collections.abc import Sequence

import numpy as np

from lesionbench.errors import SuiteError
from lightning_modules.habitats.clustering import nearest


def two_medoids(points: np.ndarray) -> tuple[int, int]:
    """The two of the points (N, F) with the smallest sum of distances from every point to the nearer one.

    Exact: all pairs are tried (3321 for the 82 patients of the paper); the first of equally good pairs wins.

    Raises:
        SuiteError: fewer than two points.
    """
    if len(points) < 2:
        raise SuiteError(f"two risk groups need two training patients or more with tumor voxels, got {len(points)}")
    distance = np.sqrt(np.square(points[:, None] - points[None]).sum(axis=2))
    best, pair = np.inf, (0, 1)
    for first in range(len(points) - 1):
        sums = np.minimum(distance[first], distance[first + 1 :]).sum(axis=1)
        second = int(sums.argmin())
        if sums[second] < best - 1e-9:
            best, pair = float(sums[second]), (first, first + 1 + second)
    return pair


class RiskGroups:
    """Z-scored features, two medoids: a patient belongs to the nearer one.

    Attributes:
        mean, std: of the features of the training patients (F,); a feature without spread counts for nothing.
        medoids: z-scored features (2, F); the first is the low-risk group once `orient` has been told the events. Where they
            cannot tell (no survival times), it is the group of the medoid that comes first among the patients, and says nothing of risk.
    """

    def fit(self, features: np.ndarray) -> "RiskGroups":
        """Finds the medoids of training features (N, F)."""
        self.mean, self.std = features.mean(axis=0), features.std(axis=0)
        self.medoids = self._scaled(features)[list(two_medoids(self._scaled(features)))]
        return self

    def orient(self, observed_less_expected: Sequence[float]) -> None:
        """Makes the group with more deaths than expected (log-rank, training patients) the second one, high risk."""
        if observed_less_expected[0] > observed_less_expected[1]:
            self.medoids = self.medoids[::-1].copy()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Features (N, F) -> 0 (low risk) or 1 (high risk), (N,)."""
        return nearest(self._scaled(features), self.medoids)

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        spread = self.std > 1e-12
        return np.where(spread, (features - self.mean) / np.where(spread, self.std, 1), 0.0)
