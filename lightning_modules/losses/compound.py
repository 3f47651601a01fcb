"""Weighted sums of a Dice term and a voxel-wise term."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from lesionbench.ranges import NotNegative, PositiveShare
from lightning_modules.losses.cross_entropy import CrossEntropy, RegionBCE, RegionTopK, TopK
from lightning_modules.losses.dice import RegionDice, SoftDice


class DiceCE(nn.Module):
    """dice_weight * SoftDice + ce_weight * CrossEntropy (Isensee et al., Nature Methods 2021).

    Args:
        weights: class weights of the cross-entropy, see `CrossEntropy`.
        dice_weight, ce_weight: weights of the two terms.
        include_background, batch, squared, smooth: see `SoftDice`.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "softmax"

    def __init__(
        self,
        weights: Sequence[NotNegative] | Literal["balanced"] | None = None,
        dice_weight: NotNegative = 1.0,
        ce_weight: NotNegative = 1.0,
        include_background: bool = False,
        batch: bool = False,
        squared: bool = False,
        smooth: NotNegative = 1e-5,
    ) -> None:
        super().__init__()
        self.dice, self.ce = SoftDice(include_background, batch, squared, smooth), CrossEntropy(weights)
        self.dice_weight, self.ce_weight = dice_weight, ce_weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dice_weight * self.dice(logits, target) + self.ce_weight * self.ce(logits, target)


class DiceTopK(nn.Module):
    """dice_weight * SoftDice + topk_weight * TopK (Ma et al., Medical Image Analysis 2021).

    Args:
        fraction: share of the voxels in the top-k term, see `TopK`.
        dice_weight, topk_weight: weights of the two terms.
        include_background, batch, squared, smooth: see `SoftDice`.

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "softmax"

    def __init__(
        self,
        fraction: PositiveShare = 0.1,
        dice_weight: NotNegative = 1.0,
        topk_weight: NotNegative = 1.0,
        include_background: bool = False,
        batch: bool = False,
        squared: bool = False,
        smooth: NotNegative = 1e-5,
    ) -> None:
        super().__init__()
        self.dice, self.topk = SoftDice(include_background, batch, squared, smooth), TopK(fraction)
        self.dice_weight, self.topk_weight = dice_weight, topk_weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dice_weight * self.dice(logits, target) + self.topk_weight * self.topk(logits, target)


class RegionBCEDice(nn.Module):
    """bce_weight * RegionBCE + dice_weight * RegionDice: region-based training of nnU-Net (Isensee et al., BrainLes 2020).

    Args:
        bce_weight, dice_weight: weights of the two terms.
        batch, squared, smooth: see `RegionDice`.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "sigmoid"

    def __init__(
        self,
        bce_weight: NotNegative = 1.0,
        dice_weight: NotNegative = 1.0,
        batch: bool = False,
        squared: bool = False,
        smooth: NotNegative = 1e-5,
    ) -> None:
        super().__init__()
        self.bce, self.dice = RegionBCE(), RegionDice(batch, squared, smooth)
        self.bce_weight, self.dice_weight = bce_weight, dice_weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.bce_weight * self.bce(logits, target) + self.dice_weight * self.dice(logits, target)


class RegionTopKDice(nn.Module):
    """topk_weight * RegionTopK + dice_weight * RegionDice: the DiceTopK of region-based training (Ma & Chen, BrainLes 2021).

    Args:
        fraction, pool: of the top-k term, see `RegionTopK`. The printed formula divides by all voxels instead of the chosen ones, which is
            `topk_weight` = `fraction`.
        topk_weight, dice_weight: weights of the two terms.
        batch, squared, smooth: see `RegionDice`.

    Shapes: logits (B, R, *spatial), target region masks (B, R, *spatial) with -1 = ignore -> scalar >= 0, float32.
    """

    kind = "sigmoid"

    def __init__(
        self,
        fraction: PositiveShare = 0.1,
        pool: str = "all",
        topk_weight: NotNegative = 1.0,
        dice_weight: NotNegative = 1.0,
        batch: bool = False,
        squared: bool = False,
        smooth: NotNegative = 1e-5,
    ) -> None:
        super().__init__()
        self.topk, self.dice = RegionTopK(fraction, pool), RegionDice(batch, squared, smooth)
        self.topk_weight, self.dice_weight = topk_weight, dice_weight

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.topk_weight * self.topk(logits, target) + self.dice_weight * self.dice(logits, target)
