"""Temporal ensembling (Laine & Aila, ICLR 2017, Algorithm 2)."""

from collections.abc import Mapping
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative, Share
from lesionbench.task import Task
from lightning_modules.losses.gated_consistency import squared_error
from lightning_modules.semi_supervised.base import SemiSupervised


class TemporalEnsembling(SemiSupervised):
    """Supervised loss + w(t) mean || z - z~ ||^2, z~ a moving average over epochs of the network's own answers (Laine & Aila, Alg. 2).

    Z <- alpha Z + (1 - alpha) z and z~ = Z / (1 - alpha^t) after the t-th labeling. For images that are cut and moved, z is the answer for
    the whole unlabeled case at the end of an epoch, and z~ lies in the map store (`ensemble`, half precision), cut and augmented with the
    image (`data.extra_maps={ensemble: linear}`). Unlike in the paper the labeled images, which have their labels, are not averaged.

    Args:
        alpha: momentum of the average, in [0, 1).
        noise: standard deviation of the noise on unlabeled images in training, clipped at twice that.

    Raises:
        SuiteError: alpha out of range.
    """

    terms: Mapping[str, float] = {"consistency": 1.0}
    writes_maps = ("ensemble",)
    map_interpolation = "linear"

    def __init__(self, task: Task, *, alpha: Share = 0.6, noise: NotNegative = 0.1, **options: Any) -> None:
        super().__init__(task, **options)
        if not 0 <= alpha < 1:
            raise SuiteError(f"model.alpha={alpha}: at least 0 and below 1")
        self.alpha, self.noise = alpha, noise
        self.register_buffer("labelings", torch.tensor(0))

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        image = self.noisy(unlabeled["image"], "noise", self.noise, 2 * self.noise)
        mine, others = self.together(self.network, labeled["image"], image)
        terms = {"supervised": self.supervised(mine, labeled)}
        if self.weights["consistency"] and "ensemble" in unlabeled:
            ensemble = unlabeled["ensemble"].float()
            answered = (ensemble.sum(dim=1, keepdim=True) > 0).float()  # not where a sample reaches beyond its volume
            terms["consistency"] = squared_error(self.probabilities(others), ensemble, answered)
        return terms

    def relabel(self) -> None:
        self.labelings += 1
        super().relabel()

    def case_maps(self, batch: Batch) -> dict[str, torch.Tensor]:
        now = self.infer(batch, self.predict_maps)["probabilities"][0].float()
        maps, case, t = self.trainer.datamodule.maps, batch["case"][0], int(self.labelings)
        if t > 1 and maps.has("ensemble", case):
            before = torch.from_numpy(maps.read("ensemble", case)).to(now)
            now = (self.alpha * (1 - self.alpha ** (t - 1)) * before + (1 - self.alpha) * now) / (1 - self.alpha**t)
        return {"ensemble": now.half()}
