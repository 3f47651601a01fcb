"""Losses of conservative-radical learning: cross-entropy with costs of misclassification, consistency under a mask."""

import torch

from lesionbench.task import IGNORE
from lightning_modules.losses.cross_entropy import voxel_binary_cross_entropy, voxel_cross_entropy


def cost_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, background: float, foreground: float, kind: str = "softmax", by_weight: bool = True
) -> torch.Tensor:
    """Cross-entropy in which a voxel counts `background` or `foreground`, by its true class (Shi et al., IEEE TMI 2022, Eq. 1).

    With a weight a on the background a false positive costs a times a false negative. Of a sigmoid target every region is a problem of its
    own; of a softmax target class 0 is the background and all others are foreground.

    Args:
        logits: (B, K, *spatial).
        target: class indices (B, 1, *spatial), or for `sigmoid` region masks (B, K, *spatial); -1 = ignored.
        kind: `softmax` or `sigmoid`.
        by_weight: divide by the sum of the weights instead of the number of voxels that count.

    Returns:
        Scalar >= 0, float32; 0 (with a gradient path) where nothing counts.
    """
    values = voxel_cross_entropy(logits, target)[:, None] if kind == "softmax" else voxel_binary_cross_entropy(logits, target)
    valid = (target != IGNORE).float()
    weights = torch.where(target > 0, foreground, background) * valid
    return (values * weights).sum() / (weights if by_weight else valid).sum().clamp_min(1e-8)


def masked_consistency(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, kind: str = "softmax", norm: str = "all_pixels"
) -> torch.Tensor:
    """|| M (F - F') ||^2 of the probabilities, summed over classes (Shi et al., IEEE TMI 2022, Eq. 8).

    The paper's sum over pixels is divided by the number of `all_pixels`, or by that of the `mask` (as the code published with it does).
    A region of a sigmoid target counts as the two classes that it is: twice the square; regions are averaged.

    Args:
        student, teacher: (B, K, *spatial) in [0, 1].
        mask: bool (B, 1 or, for `sigmoid`, K, *spatial), where it counts; None = everywhere.
        kind: `softmax` or `sigmoid`.
        norm: `all_pixels` or `mask`.

    Returns:
        Scalar >= 0; 0 with an empty mask. Whether gradients reach the teacher is up to the caller.
    """
    squared = (student - teacher).square()
    squared = squared.sum(dim=1, keepdim=True) if kind == "softmax" else 2 * squared
    if mask is None:
        return squared.mean()
    mask = mask.to(squared).expand_as(squared)
    return (squared * mask).sum() / (mask.sum() + 1e-16 if norm == "mask" else mask.numel())
