"""Deep supervision: one loss on every head of a network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative


class DeepSupervision(nn.Module):
    """Weighted sum of a loss over the heads of a network (Isensee et al., Nature Methods 2021).

    The target is brought to each head's resolution by nearest neighbor, so that ignored voxels and region masks stay what they are.

    Args:
        loss: any loss of the suite.
        weights: one per head, the full-resolution one first; divided by their sum. Default 1, 1/2, 1/4, ...

    Shapes: outputs logits (B, K, *spatial), or a dict with `logits` and `deep` (list of logits, coarsest last); target as `loss` takes
    it, at the resolution of `logits` -> scalar. Without `deep` it is the plain loss. Other extras of the dict are left alone.

    Raises:
        SuiteError: weights that do not fit the number of heads.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[NotNegative] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.weights = None if weights is None else [float(w) for w in weights]

    @property
    def kind(self) -> str:
        """Kind of target that the loss takes: `softmax` or `sigmoid`."""
        return self.loss.kind

    def forward(self, outputs: torch.Tensor | Mapping[str, Any], target: torch.Tensor) -> torch.Tensor:
        if isinstance(outputs, torch.Tensor):
            return self.loss(outputs, target)
        heads = [outputs["logits"], *outputs.get("deep", ())]
        if len(heads) == 1:
            return self.loss(heads[0], target)
        weights = self.weights or [0.5**i for i in range(len(heads))]
        if len(weights) != len(heads):
            raise SuiteError(f"loss.weights has {len(weights)} numbers, but the network returns {len(heads)} heads")
        losses = [w * self.loss(head, resized(target, head.shape[2:])) for w, head in zip(weights, heads, strict=True)]
        return torch.stack(losses).sum() / sum(weights)


def resized(target: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Target (B, C, *spatial) at another resolution over the same field of view, by nearest neighbor; keeps the dtype."""
    if tuple(target.shape[2:]) == tuple(size):
        return target
    return F.interpolate(target.float(), size=tuple(size), mode="nearest-exact").to(target.dtype)
