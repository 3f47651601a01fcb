"""Mean teacher (Tarvainen & Valpola, NeurIPS 2017)."""

from collections.abc import Mapping
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.ranges import NotNegative, Share
from lesionbench.task import Task
from lightning_modules.losses.gated_consistency import gated_consistency
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.teachers import Teacher


class MeanTeacher(SemiSupervised):
    """Supervised loss + w(t) J, J = E || f(x, theta', eta') - f(x, theta, eta) ||^2 over all images (Tarvainen & Valpola, Eq. 1).

    theta' follows theta by Eq. 2, eta and eta' are dropout and independent noise on the images. The squared difference of the
    probabilities is summed over classes and averaged over voxels. The teacher answers unless `predict_with` says otherwise.

    Args:
        decay: of the moving average, in [0, 1).
        ema_warmup: see `Teacher`.
        noise: standard deviation of the noise on the images, clipped at twice that; 0 = none.
    """

    terms: Mapping[str, float] = {"consistency": 1.0}

    def __init__(self, task: Task, *, decay: Share = 0.99, ema_warmup: bool = True, noise: NotNegative = 0.1, **options: Any) -> None:
        super().__init__(task, **options)
        self.teacher = Teacher(self.network, 1 - decay, ema_warmup)
        self.noise = noise

    def predictors(self) -> dict[str, torch.nn.Module]:
        return {"teacher": self.teacher, "student": self.network}

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        sizes = [len(labeled["image"]), len(unlabeled["image"])]
        image = torch.cat([labeled["image"], unlabeled["image"]])
        noisy = self.noisy(image, "student", self.noise, 2 * self.noise)
        mine, others = self.together(self.network, *noisy.split(sizes))
        terms = {"supervised": self.supervised(mine, labeled)}
        if self.weights["consistency"]:
            teacher = self.target.activate(
                self.no_grad_logits(self.teacher, self.noisy(image, "teacher", self.noise, 2 * self.noise), "teacher")
            )
            student = torch.cat([self.probabilities(mine), self.probabilities(others)])
            terms["consistency"] = gated_consistency(student, teacher, self.certainty_mask(image))
        return terms

    def certainty_mask(self, image: torch.Tensor) -> torch.Tensor | None:
        """Where the teacher counts, bool (B, 1, *spatial); None = everywhere."""
        return None
