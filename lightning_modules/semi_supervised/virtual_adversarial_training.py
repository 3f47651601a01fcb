"""Virtual adversarial training as a semi-supervised method (Miyato et al., IEEE TPAMI 41, 2019)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.task import Task
from lightning_modules.losses.vat import VAT
from lightning_modules.semi_supervised.base import SemiSupervised


class VirtualAdversarialTraining(SemiSupervised):
    """Supervised loss + alpha R_vadv, the mean divergence under the image change that raises it most (Miyato et al., Eq. 5-8).

    R_vadv runs over labeled and unlabeled images alike and compares with the network's own answer on the clean image, so it needs no
    label; see `losses.VAT`.

    Args:
        vat: called with `kind`, returns the `losses.VAT`; its sizes count in units of the image, whose variance should be about 1.
    """

    terms: Mapping[str, float] = {"vat": 1.0}

    def __init__(self, task: Task, *, vat: Callable[..., VAT], **options: Any) -> None:
        super().__init__(task, **options)
        self.vat = vat(kind=self.target.kind)

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        terms = {"supervised": self.supervised(self.network(labeled["image"]), labeled)}
        if self.weights["vat"]:
            image = torch.cat([labeled["image"], unlabeled["image"]])
            terms["vat"] = self.vat(self.network, image, generator=self.generator("vat"))
        return terms
