"""How much a clustering depends on the patients it was made from."""

from collections.abc import Sequence

import numpy as np

from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator
from lightning_modules.habitats.clustering import HabitatClustering


def disagreement(first: np.ndarray, second: np.ndarray, clusters: int) -> float:
    """Share of voxels on which two labelings (N,) differ under the best matching of their labels: eq. 1 of Li et al., BrainLes 2021.

    The matching is the Hungarian one. In [0, 1 - 1 / clusters]; 0 = equal up to the names of the clusters.
    """
    from scipy.optimize import linear_sum_assignment

    table = np.bincount(first * clusters + second, minlength=clusters**2).reshape(clusters, clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(1 - table[rows, columns].sum() / len(first))


def stability_losses(
    latent: np.ndarray, patient: np.ndarray, clusters: int, *, repeats: int = 10, share: float = 0.7, seed: Sequence[object] = (0,)
) -> np.ndarray:
    """The stability loss of `repeats` random divisions of the patients, (repeats,); Ls is their mean.

    Each divides the patients, clusters both sides on their own, and compares the labels that the two give to the voxels of the smaller
    side. The encoder that made `latent` stays as it is.

    Args:
        latent: features (N, L) of the voxels of all patients.
        patient: number of the patient (N,) of each voxel.
        share: of the patients on the side that `C` is clustered from (57 of 82 in the paper).

    Raises:
        SuiteError: fewer than two patients, or a side with fewer voxels than clusters.
    """
    patients = np.unique(patient)
    if len(patients) < 2:
        raise SuiteError(f"stability needs two patients or more with tumor voxels, got {len(patients)}")
    count = min(max(round(share * len(patients)), 1), len(patients) - 1)
    losses = []
    for repeat in range(repeats):
        chosen = numpy_generator("patients", *seed, repeat).permutation(patients)[:count]
        inside = np.isin(patient, chosen)
        sides = latent[inside], latent[~inside]
        if min(map(len, sides)) < clusters:
            raise SuiteError(f"{clusters} clusters from {min(map(len, sides))} voxels: raise habitats.voxels_per_patient, or add patients")
        one, other = (HabitatClustering(clusters, *seed, repeat, side).fit(sides[side]) for side in range(2))
        losses.append(disagreement(one.predict(sides[1]), other.predict(sides[1]), clusters))
    return np.array(losses)
