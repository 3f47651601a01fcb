"""SIMPLE: fuses binary masks after leaving out, again and again, the raters who agree least with the estimate."""

import torch

from lightning_modules.raters.staple import VotePatterns


def simple(masks: torch.Tensor, valid: torch.Tensor | None = None, deviations: float = 1.0, iterations: int = 100) -> torch.Tensor:
    """Weights (R,), float64, that sum to 1; a voxel is foreground where the weights of those who marked it exceed 1/2.

    Selective and iterative method for performance level estimation (Langerak et al., IEEE TMI 29, 2010): starts from the majority,
    weighs each rater by Dice with the estimate, drops for good those below mean - `deviations` * standard deviation of those still in,
    and fuses again, until nothing changes.

    Args:
        masks: (R, *spatial), bool, one per rater.
        valid: (*spatial), bool, voxels that count.
        deviations: k >= 0; larger keeps more raters. (Nobody falls below the mean by more than sqrt(R - 1) deviations.)
        iterations: at most so many.

    Raises:
        ValueError: no or too many raters, or no valid voxel (see `VotePatterns`).
    """
    patterns = VotePatterns.of(masks, valid)
    votes, counts = patterns.votes, patterns.counts
    kept = torch.ones(votes.shape[1], dtype=torch.bool, device=votes.device)
    weights = kept.double() / len(kept)
    for _ in range(iterations):
        estimate = (votes @ weights > 0.5).double()
        sizes = counts @ votes + counts @ estimate
        dice = torch.where(sizes > 0, 2 * (counts * estimate) @ votes / sizes.clamp_min(1), 1.0)
        spread = dice[kept].std(correction=0)
        stays = kept & (dice >= dice[kept].mean() - deviations * spread - 1e-9)
        weighed = dice * stays
        weighed = (weighed if weighed.any() else stays.double()) / (weighed.sum() if weighed.any() else stays.sum())
        if torch.equal(stays, kept) and torch.allclose(weighed, weights, atol=1e-9):
            break
        kept, weights = stays, weighed
    return weights
