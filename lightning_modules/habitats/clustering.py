"""K-means on latent features: the habitats."""

import warnings

import numpy as np

from lesionbench.keyed import key


class HabitatClustering:
    """K-means with k-means++ and a single initialization, so that what instability there is can be seen (ten would hide it).

    Clusters are numbered by their centroids' first coordinate until `reorder` gives them another order.

    Args:
        clusters: eta, number of habitats.
        seed: of the initialization; any printable parts.

    Attributes:
        centroids: (eta, L) after `fit`.
    """

    def __init__(self, clusters: int, *seed: object) -> None:
        self.clusters, self.seed = int(clusters), seed

    def fit(self, latent: np.ndarray) -> "HabitatClustering":
        """Clusters latent features (N, L)."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct voxels than clusters: some stay empty
            found = KMeans(self.clusters, init="k-means++", n_init=1, random_state=key("k-means", *self.seed) % 2**32).fit(latent)
        self.centroids = found.cluster_centers_[np.argsort(found.cluster_centers_[:, 0], kind="stable")].astype(np.float32)
        return self

    def reorder(self, order: np.ndarray) -> None:
        """Puts cluster `order[i]` in place i."""
        self.centroids = self.centroids[order]

    def predict(self, latent: np.ndarray) -> np.ndarray:
        """Number of the nearest centroid of latent features (N, L): (N,), from 0."""
        return nearest(latent, self.centroids)


def nearest(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Index of the nearest of `centers` (K, L) for every point (N, L); the first one where two are equally near."""
    squared = np.stack([np.square(points - center).sum(axis=1) for center in centers])
    return squared.argmin(axis=0)
