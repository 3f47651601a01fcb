"""Cross-entropy balanced by how rare a class is in the batch, as edge detection does it."""

import torch
from torch import nn

from lesionbench.ranges import NotNegative
from lesionbench.task import IGNORE
from lightning_modules.losses.cross_entropy import voxel_cross_entropy, weighted_mean


def complement_weights(target: torch.Tensor, classes: int, background: float = 1.0) -> torch.Tensor:
    """1 - share of each class (C,) among the labeled voxels of the batch, that of class 0 times `background`; 1 for an absent class."""
    labeled = target[target != IGNORE].long()
    weights = 1 - torch.bincount(labeled, minlength=classes).float() / max(labeled.numel(), 1)
    weights[0] *= background
    return weights


class ClassBalancedCE(nn.Module):
    """Cross-entropy in which a class weighs the share of voxels that are not of it, divided by the sum of the weights.

    With two classes this is the class-balanced loss of edge detection (Liu et al., "Richer convolutional features for edge detection",
    CVPR 2017, Eq. 1), which Zhao et al. (JBHI 2023, Eq. 1) cite.

    Args:
        background: factor of the background's weight (lambda, 1.1 in CVPR 2017).

    Shapes: logits (B, C, *spatial), target class indices (B, 1, *spatial) with -1 = ignore -> scalar >= 0, float32. A batch of one class
    only has no voxel that weighs anything: 0.
    """

    kind = "softmax"

    def __init__(self, background: NotNegative = 1.0) -> None:
        super().__init__()
        self.background = background

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = complement_weights(target, logits.shape[1], self.background)
        valid = (target[:, 0] != IGNORE).float()
        return weighted_mean(voxel_cross_entropy(logits, target), weights[target[:, 0].long().clamp_min(0)] * valid)
