"""Losses that weigh probabilities by distance: how far a wrong voxel lies from where it would be right. Distances depend on labels alone."""

import torch

from lightning_modules.losses.cross_entropy import weighted_mean


def one_sided_hausdorff(
    probabilities: torch.Tensor, distances: torch.Tensor, valid: torch.Tensor, alpha: float = 1.0, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum over the voxels of q_l^beta u_l^alpha, then the mean over labels l (Fonov et al., BrainLes 2021, Section 2.1).

    Args:
        probabilities: q (B, L, *spatial), in [0, 1].
        distances: u >= 0, of every voxel to the structure of its label, 0 inside; same shape.
        valid: 1 where a voxel counts, else 0; (B, 1, *spatial).
        alpha, beta: exponents of the distance and of the probability.

    Returns:
        L_mean and L_max, each of every sample on its own, then averaged; scalars >= 0 in the unit of distance^alpha.
    """
    weighed = (probabilities**beta * distances**alpha * valid).flatten(2)
    counts = valid.flatten(2).sum(dim=2).clamp_min(1)
    return (weighed.sum(dim=2) / counts).mean(), weighed.amax(dim=2).mean()


def boundary_loss(probabilities: torch.Tensor, distances: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of p_i phi_i over voxels, classes and samples: the boundary loss (Kervadec et al., MIDL 2019), linear in p.

    Args:
        probabilities: p (B, K, *spatial), in [0, 1].
        distances: phi, signed distance to the border of the true region, positive outside; same shape.
        valid: 1 where a voxel counts, else 0; (B, 1, *spatial).

    Returns:
        a scalar in the unit of the distance, negative where the probabilities lie inside.
    """
    return weighted_mean(probabilities * distances, valid.expand_as(probabilities))
