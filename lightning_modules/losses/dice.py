"""Soft Dice losses for classes (softmax) and for regions (sigmoid); both stand on `soft_dice`."""

from collections.abc import Sequence

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative
from lesionbench.task import IGNORE
from lightning_modules.losses.cross_entropy import weighted_mean


def soft_dice(
    probabilities: torch.Tensor,
    truth: torch.Tensor,
    valid: torch.Tensor,
    *,
    batch: bool = False,
    squared: bool = False,
    smooth: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft Dice coefficients 2 sum(p g) / (sum p + sum g), over the valid voxels.

    Args:
        probabilities, truth: (B, K, *spatial), in [0, 1].
        valid: (B, K or 1, *spatial), 1 where a voxel counts, else 0.
        batch: one coefficient per channel over the whole batch, instead of one per sample and channel.
        squared: sum p^2 and g^2 in the denominator (Milletari et al., 3DV 2016).
        smooth: added to numerator and denominator.

    Returns:
        Coefficients in [0, 1] and whether each has any valid voxel, both (B, K), or (K,) with `batch`.
    """
    axes = [*([0] if batch else []), *range(2, probabilities.dim())]
    valid = valid.to(probabilities)
    probabilities, truth = probabilities * valid, truth * valid
    overlap = (probabilities * truth).sum(axes)
    total = (probabilities.square() + truth.square()).sum(axes) if squared else (probabilities + truth).sum(axes)
    dice = (2 * overlap + smooth) / (total + smooth).clamp_min(1e-8)
    return dice, (valid.amax(axes) > 0).expand_as(dice)


def dice_loss(dice: torch.Tensor, known: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Mean of 1 - Dice, weighted by channel, over the coefficients that have valid voxels; 0 (with a gradient path) where none has."""
    return weighted_mean(1 - dice, known.to(dice) * weights)


class SoftDice(nn.Module):
    """1 - mean soft Dice over classes (and samples), on softmax probabilities (Milletari et al., 3DV 2016; Isensee et al., 2021).

    Args:
        include_background: count class 0 too.
        batch: sums run over the whole batch (nnU-Net's batch Dice) instead of each sample.
        squared: squared terms in the denominator (V-Net).
        smooth: added to numerator and denominator; a class that is neither present nor predicted then has Dice 1.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar in [0, 1], float32. A sample
    (with `batch`: a batch) without any labeled voxel adds nothing.
    """

    kind = "softmax"

    def __init__(self, include_background: bool = False, batch: bool = False, squared: bool = False, smooth: NotNegative = 1e-5) -> None:
        super().__init__()
        self.include_background = include_background
        self.batch, self.squared, self.smooth = batch, squared, smooth

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        first = 0 if self.include_background else 1
        probabilities = logits.float().softmax(dim=1)[:, first:]
        valid = target != IGNORE
        truth = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, target.long().clamp_min(0), 1.0)[:, first:]
        return dice_loss(*soft_dice(probabilities, truth, valid, batch=self.batch, squared=self.squared, smooth=self.smooth))


class RegionDice(nn.Module):
    """1 - mean soft Dice over regions (and samples), on sigmoid probabilities (region-based training, Isensee et al., BrainLes 2020).

    Args:
        batch, squared, smooth: as `SoftDice`.
        weights: of the regions in the mean, in the task's order; None for equal ones.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar in [0, 1], float32.

    Raises:
        SuiteError: weights below 0 or all 0, or of another number than the regions.
    """

    kind = "sigmoid"

    def __init__(
        self, batch: bool = False, squared: bool = False, smooth: NotNegative = 1e-5, weights: Sequence[NotNegative] | None = None
    ) -> None:
        super().__init__()
        self.batch, self.squared, self.smooth = batch, squared, smooth
        if weights is not None and (min(weights) < 0 or max(weights) <= 0):
            raise SuiteError(f"loss.weights={list(weights)}: numbers of at least 0, not all 0; null for equal ones")
        given = None if weights is None else torch.tensor([float(w) for w in weights])
        self.register_buffer("weights", given, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.weights is not None and len(self.weights) != logits.shape[1]:
            raise SuiteError(f"loss.weights has {len(self.weights)} numbers, but the task has {logits.shape[1]} regions")
        probabilities = logits.float().sigmoid()
        valid = target != IGNORE
        dice, known = soft_dice(probabilities, target.float(), valid, batch=self.batch, squared=self.squared, smooth=self.smooth)
        return dice_loss(dice, known, 1.0 if self.weights is None else self.weights)


class GeneralizedDice(nn.Module):
    """Generalized Dice loss, 1 - 2 sum_l w_l sum p g / sum_l w_l sum (p + g) over all classes l (Sudre et al., DLMIA 2017), mean over samples.

    The weight w_l = V_l ** -power falls with the number of voxels V_l of the class in the sample; a class that is absent weighs as much as
    the smallest one that is there. Only ratios of weights count: they are taken so that the largest is 1, for `smooth` to mean the same
    whatever the size of the image.

    Args:
        power: 1 inverse volume, 2 its square (Sudre et al.), 0 equal weights.
        smooth: added to numerator and denominator.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar in [0, 1], float32. A sample without
    any labeled voxel adds nothing.
    """

    kind = "softmax"

    def __init__(self, power: NotNegative = 1.0, smooth: NotNegative = 1e-5) -> None:
        super().__init__()
        self.power, self.smooth = power, smooth

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        valid = (target != IGNORE).float()
        probabilities = (logits.float().softmax(dim=1) * valid).flatten(2)
        truth = (torch.zeros_like(logits, dtype=torch.float32).scatter_(1, target.long().clamp_min(0), 1.0) * valid).flatten(2)
        volume = truth.sum(dim=2)
        smallest = torch.where(volume > 0, volume, torch.inf).amin(dim=1, keepdim=True)
        weights = torch.where(volume > 0, smallest / volume, 1.0) ** self.power
        overlap = (weights * (probabilities * truth).sum(dim=2)).sum(dim=1)
        total = (weights * (probabilities.sum(dim=2) + volume)).sum(dim=1)
        return dice_loss((2 * overlap + self.smooth) / (total + self.smooth), valid.flatten(1).amax(dim=1) > 0)
