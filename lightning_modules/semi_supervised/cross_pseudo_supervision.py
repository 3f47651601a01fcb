"""Cross pseudo supervision (Chen et al., CVPR 2021)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.task import Task
from lightning_modules.semi_supervised.base import SemiSupervised


class CrossPseudoSupervision(SemiSupervised):
    """L_s + lambda L_cps: two networks of one layout and different initial weights teach each other (Chen et al., Eq. 1-4).

    L_s is the supervised loss of both; L_cps the loss of each against the hard answer of the other, over unlabeled and labeled images
    alike. Where the paper has the cross-entropy, `loss` is used for all of them. The first network answers.
    """

    terms: Mapping[str, float] = {"cps": 1.5}

    def __init__(self, task: Task, *, network: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__(task, network=network, **options)
        self.second = network(in_channels=task.in_channels, out_channels=self.target.out_channels)

    def students(self) -> dict[str, nn.Module]:
        return {"student1": self.network, "student2": self.second}

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        images = labeled["image"], unlabeled["image"]
        outputs = [self.together(student, *images) for student in self.students().values()]
        terms = {"supervised": sum(self.supervised(mine, labeled) for mine, _ in outputs)}
        if self.weights["cps"]:
            (mine1, others1), (mine2, others2) = outputs
            pairs = [(mine1, mine2), (mine2, mine1), (others1, others2), (others2, others1)]
            terms["cps"] = sum(self.loss(taught, self.hard(teaching)) for taught, teaching in pairs)
        return terms
