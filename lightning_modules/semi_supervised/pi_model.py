"""Pi-model (Laine & Aila, Temporal ensembling for semi-supervised learning, ICLR 2017, Algorithm 1)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lesionbench.batch import Batch
from lesionbench.ranges import NotNegative
from lesionbench.task import Task
from lightning_modules.semi_supervised.base import SemiSupervised


class PiModel(SemiSupervised):
    """Supervised loss + w(t) 1 / (C |B|) sum || z - z~ ||^2 over all images (Laine & Aila, Algorithm 1).

    z and z~ are the probabilities of two passes of the network, each with its own noise and dropout; both are differentiated. The square
    is averaged over voxels as well. The supervised loss is that of the first pass.

    Args:
        noise: standard deviation of the noise on the images, clipped at twice that; 0 leaves the passes to differ by dropout alone.
    """

    terms: Mapping[str, float] = {"consistency": 1.0}

    def __init__(self, task: Task, *, noise: NotNegative = 0.1, **options: Any) -> None:
        super().__init__(task, **options)
        self.noise = noise

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        sizes = [len(labeled["image"]), len(unlabeled["image"])]
        image = torch.cat([labeled["image"], unlabeled["image"]])
        first, second = (self.noisy(image, name, self.noise, 2 * self.noise) for name in ("first pass", "second pass"))
        if not self.weights["consistency"]:
            return {"supervised": self.supervised(self.together(self.network, *first.split(sizes))[0], labeled)}
        mine, others, again = self.together(self.network, *first.split(sizes), second)
        z = torch.cat([self.probabilities(mine), self.probabilities(others)])
        return {"supervised": self.supervised(mine, labeled), "consistency": F.mse_loss(self.probabilities(again), z)}
