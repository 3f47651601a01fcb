"""Voxel-wise losses: cross-entropy, focal and top-k, for classes (softmax) and for regions (sigmoid)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative, Positive, PositiveShare, Share
from lesionbench.task import IGNORE

POOLS = ("all", "per_channel", "per_sample")


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum(w v) / sum(w); 0 (with a gradient path) where all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp_min(1e-8)


def voxel_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of the true class, (B, C, *spatial) and class indices (B, 1, *spatial) -> (B, *spatial), float32; 0 where ignored."""
    return F.cross_entropy(logits.float(), target[:, 0].long(), ignore_index=IGNORE, reduction="none")


def balanced_weights(target: torch.Tensor, classes: int) -> torch.Tensor:
    """Inverse frequency of each class (C,) among the labeled voxels of the batch; 0 for a class that is absent."""
    labeled = target[target != IGNORE].long()
    counts = torch.bincount(labeled, minlength=classes).float()
    return torch.where(counts > 0, labeled.numel() / counts.clamp_min(1), 0)


class _ClassWeighted(nn.Module):
    """Holds class weights and spreads them over voxels."""

    kind = "softmax"

    def __init__(self, weights: Sequence[NotNegative] | Literal["balanced"] | None) -> None:
        super().__init__()
        self.balanced = isinstance(weights, str)
        if self.balanced and weights != "balanced":
            raise SuiteError(f"loss.weights={weights!r}: must be null, 'balanced' or a list with one number per class")
        given = None if weights is None or self.balanced else torch.tensor([float(w) for w in weights])
        self.register_buffer("weights", given, persistent=False)

    def voxel_weights(self, target: torch.Tensor, classes: int) -> torch.Tensor:
        """Weight of every voxel (B, *spatial): that of its class, 0 where ignored."""
        valid = (target[:, 0] != IGNORE).float()
        if self.weights is None and not self.balanced:
            return valid
        weights = balanced_weights(target, classes) if self.balanced else self.weights
        if len(weights) != classes:
            raise SuiteError(f"loss.weights has {len(weights)} numbers, but the task has {classes} classes (background is the first)")
        return weights[target[:, 0].long().clamp_min(0)] * valid


class CrossEntropy(_ClassWeighted):
    """Cross-entropy: weighted mean of -log p over labeled voxels, divided by the sum of their weights.

    Args:
        weights: one weight per class, background first; `balanced` for inverse class frequency in the batch (each class present then
            has the same share); None for equal weights.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32.

    Raises:
        SuiteError: weights that do not fit the number of classes.
    """

    def __init__(self, weights: Sequence[NotNegative] | Literal["balanced"] | None = None) -> None:
        super().__init__(weights)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return weighted_mean(voxel_cross_entropy(logits, target), self.voxel_weights(target, logits.shape[1]))


def focal_factor(cross_entropy: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p)^gamma of the true class, from -log p. Kept off 0, where a power below 1 has no finite gradient."""
    return (-torch.expm1(-cross_entropy)).clamp_min(1e-8) ** gamma


class Focal(_ClassWeighted):
    """Focal loss (1 - p)^gamma (-log p) (Lin et al., ICCV 2017, Eq. 4-5), averaged over labeled voxels as `CrossEntropy` is.

    Args:
        gamma: focusing power >= 0; 0 is cross-entropy.
        weights: class weights (the paper's alpha), as in `CrossEntropy`.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    def __init__(self, gamma: NotNegative = 2.0, weights: Sequence[NotNegative] | Literal["balanced"] | None = None) -> None:
        super().__init__(weights)
        self.gamma = gamma

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = voxel_cross_entropy(logits, target)
        return weighted_mean(values * focal_factor(values, self.gamma), self.voxel_weights(target, logits.shape[1]))


class TopK(nn.Module):
    """Cross-entropy averaged over the worst voxels only (Wu et al., 2016; the TopK loss of nnU-Net).

    Args:
        fraction: share of the batch's labeled voxels that counts, in (0, 1]; at least one voxel. 1 is cross-entropy.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32.

    Raises:
        SuiteError: a fraction outside (0, 1].
    """

    kind = "softmax"

    def __init__(self, fraction: PositiveShare = 0.1) -> None:
        super().__init__()
        self.fraction = _checked_fraction(fraction)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = voxel_cross_entropy(logits, target)
        return worst_mean(values, target[:, 0] != IGNORE, self.fraction)


def worst_mean(values: torch.Tensor, valid: torch.Tensor, fraction: float) -> torch.Tensor:
    """Mean of the largest `fraction` of the valid values, at least one of them; 0 (with a gradient path) where none is valid."""
    kept = values[valid]
    if kept.numel() == 0:
        return (values * 0).sum()
    return kept.topk(max(1, int(fraction * kept.numel())), sorted=False).values.mean()


def _checked_fraction(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise SuiteError(f"loss.fraction={fraction}: must be above 0 and at most 1 (0.1 = the worst 10 % of the voxels)")
    return fraction


def voxel_binary_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of the true side of each region, (B, R, *spatial) both -> (B, R, *spatial), float32; meaningless where target is -1."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float().clamp_min(0), reduction="none")


class RegionBCE(nn.Module):
    """Binary cross-entropy of every region, averaged over regions and labeled voxels (Isensee et al., BrainLes 2020).

    Args:
        positive_weight: factor of voxels inside the region; the mean still divides by the number of voxels.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "sigmoid"

    def __init__(self, positive_weight: Positive = 1.0) -> None:
        super().__init__()
        self.positive_weight = positive_weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = voxel_binary_cross_entropy(logits, target)
        if self.positive_weight != 1:
            values = torch.where(target > 0, self.positive_weight * values, values)
        return weighted_mean(values, (target != IGNORE).float())


class RegionTopK(nn.Module):
    """Binary cross-entropy of the regions, averaged over the worst voxels only (Ma & Chen, BrainLes 2021; `TopK` for region targets).

    Args:
        fraction: share of the labeled values that counts, in (0, 1]; at least one. 1 is `RegionBCE`.
        pool: what the worst are chosen among: `all` values of the batch together, those of each region (`per_channel`) or of each sample
            (`per_sample`), over which the mean is then taken. The paper does not say; nnU-Net's softmax TopK pools the whole batch.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar >= 0, float32.

    Raises:
        SuiteError: a fraction outside (0, 1], an unknown pool.
    """

    kind = "sigmoid"

    def __init__(self, fraction: PositiveShare = 0.1, pool: str = "all") -> None:
        super().__init__()
        if pool not in POOLS:
            raise unknown("loss.pool", pool, POOLS)
        self.fraction, self.pool = _checked_fraction(fraction), pool

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values, valid = voxel_binary_cross_entropy(logits, target), target != IGNORE
        if self.pool == "all":
            return worst_mean(values, valid, self.fraction)
        axis = 1 if self.pool == "per_channel" else 0
        labeled = [(v, m) for v, m in zip(values.unbind(axis), valid.unbind(axis), strict=True) if m.any()]
        if not labeled:
            return (values * 0).sum()
        return torch.stack([worst_mean(v, m, self.fraction) for v, m in labeled]).mean()


class RegionFocal(nn.Module):
    """Binary focal loss of every region (Lin et al., ICCV 2017, Eq. 4-5), averaged over regions and labeled voxels.

    Args:
        gamma: focusing power >= 0; 0 is binary cross-entropy.
        alpha: factor of voxels inside the region, 1 - alpha outside, in [0, 1]; None for neither.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "sigmoid"

    def __init__(self, gamma: NotNegative = 2.0, alpha: Share | None = None) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        values = voxel_binary_cross_entropy(logits, target)
        values = values * focal_factor(values, self.gamma)
        if self.alpha is not None:
            values = values * torch.where(target > 0, self.alpha, 1 - self.alpha)
        return weighted_mean(values, (target != IGNORE).float())
