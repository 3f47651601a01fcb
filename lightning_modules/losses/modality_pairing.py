"""The correlation of two branches' features as a loss."""

from itertools import combinations

import torch
from torch import nn

from lesionbench.errors import unknown

MODES = ("flat", "per_channel")
EPS = 1e-8  # under the root: a constant map correlates with nothing, and has a finite gradient


class PairingLoss(nn.Module):
    """Modality-pairing loss: the negative Pearson correlation of two feature maps (Wang et al., BrainLes 2020, Eq. 4).

    Args:
        mode: `flat`, one correlation per sample over channels and voxels together, as printed; `per_channel`, the mean over channels of
            the correlation of channel c with channel c.

    Shapes: list of features (B, C, *spatial), one per branch -> scalar in [-1, 1], float32; mean over samples and, with more than two
    branches, over their pairs. One branch has no pairs: 0, without gradient.

    Raises:
        SuiteError: an unknown mode.
    """

    def __init__(self, mode: str = "flat") -> None:
        super().__init__()
        if mode not in MODES:
            raise unknown("model.mp.mode", mode, MODES)
        self.mode = mode

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        pairs = [self._correlation(a, b) for a, b in combinations(features, 2)]
        return -torch.stack(pairs).mean() if pairs else features[0].new_zeros((), dtype=torch.float32)

    def _correlation(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        start = 1 if self.mode == "flat" else 2
        a, b = (x.float().flatten(start) for x in (a, b))  # sums over millions of voxels overflow in half precision
        a, b = (x - x.mean(dim=-1, keepdim=True) for x in (a, b))
        deviations = (a.square().sum(dim=-1) * b.square().sum(dim=-1) + EPS).sqrt()
        return ((a * b).sum(dim=-1) / deviations).mean()
