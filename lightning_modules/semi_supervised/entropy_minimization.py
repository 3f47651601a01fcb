"""Entropy minimization (Grandvalet & Bengio, NeurIPS 2004) for segmentation (Vu et al., ADVENT, CVPR 2019)."""

import math
from collections.abc import Mapping

import torch

from lesionbench.batch import Batch
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.uncertainty import entropy


class EntropyMinimization(SemiSupervised):
    """Supervised loss + lambda times the mean entropy of the answers for unlabeled images (Grandvalet & Bengio; Vu et al., Eq. 2-3).

    The entropy of a voxel, -1 / log C sum_c p_c log p_c, is in [0, 1] whatever the number of classes C; for regions it is the mean of
    their binary entropies.
    """

    terms: Mapping[str, float] = {"entropy": 0.1}

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        mine, others = self.together(self.network, labeled["image"], unlabeled["image"])
        terms = {"supervised": self.supervised(mine, labeled)}
        if self.weights["entropy"]:
            p = self.probabilities(others)
            if self.target.kind == "sigmoid":
                p = torch.stack([p, 1 - p], dim=1)
            terms["entropy"] = entropy(p).mean() / math.log(p.shape[1])
        return terms
