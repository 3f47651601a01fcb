"""Bidirectional copy-paste (Bai et al., CVPR 2023)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.ranges import PositiveShare, Share
from lesionbench.task import IGNORE, Task
from lightning_modules.components import largest_component
from lightning_modules.networks.contract import with_own_loss
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.mixing import box_mask, halves, mix
from lightning_modules.semi_supervised.teachers import Teacher


class CopyPaste(SemiSupervised):
    """The student learns from mixed images only: an unlabeled box in a labeled image, and the other way round (Bai et al., Eq. 1-8).

    X_in = X_l1 M + X_u1 (1 - M) and X_out = X_u2 M + X_l2 (1 - M), M = 0 in a box and 1 elsewhere. `supervised` is the loss of both over
    their labeled voxels, `pseudo` (alpha of the paper, 0.5) over the others, against the teacher's hard answer for the unlabeled images.
    l1, u1 are the first and l2, u2 the second half of their batches; of a single image, itself. During the warm start boxes are pasted
    from one labeled image into another.

    Args:
        decay: of the teacher, in [0, 1).
        ema_warmup: see `Teacher`.
        box: side of the box over side of the patch, in (0, 1); 2/3 in the paper.
        largest: keep only the largest component of every class (or region) of a pseudo label.
        box_in_brain: draw the middle of a box inside the brain mask.

    Raises:
        SuiteError: a box out of range.
    """

    terms: Mapping[str, float] = {"pseudo": 0.5}

    def __init__(
        self,
        task: Task,
        *,
        decay: Share = 0.99,
        ema_warmup: bool = True,
        box: PositiveShare = 2 / 3,
        largest: bool = True,
        box_in_brain: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if not 0 < box < 1:
            raise SuiteError(f"model.box={box}: above 0 and below 1")
        self.teacher = Teacher(self.network, 1 - decay, ema_warmup)
        self.box, self.largest, self.box_in_brain = box, largest, box_in_brain

    def warm_losses(self, labeled: Batch) -> dict[str, torch.Tensor]:
        image, target = labeled["image"], self.training_target(labeled)
        mask = self._masks(labeled, len(image))
        output = self.network(mix(image, image.roll(1, 0), mask))
        return {"supervised": with_own_loss(self.loss(output, mix(target, target.roll(1, 0), mask)), output)}

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        truth = self.training_target(labeled)
        pseudo = self.pseudo_labels(unlabeled["image"]).to(truth.dtype)
        (image1, image2), (truth1, truth2) = halves(labeled["image"], unlabeled["image"]), halves(truth, pseudo)
        mask = self._masks(labeled, len(image1[0]))
        into, out = self.together(self.network, mix(*image1, mask), mix(*reversed(image2), mask))
        nowhere = torch.full_like(truth1[0], IGNORE)
        supervised = self.loss(into, mix(truth1[0], nowhere, mask)) + self.loss(out, mix(nowhere, truth2[0], mask))
        terms = {"supervised": with_own_loss(supervised, into)}  # that of the joint pass stays with its first part
        if self.weights["pseudo"]:
            terms["pseudo"] = self.loss(into, mix(nowhere, truth1[1], mask)) + self.loss(out, mix(truth2[1], nowhere, mask))
        return terms

    def pseudo_labels(self, image: torch.Tensor) -> torch.Tensor:
        """The teacher's hard answer in the form that the loss takes, of every class the largest component if so asked."""
        hard = self.hard(self.no_grad_logits(self.teacher, image, "teacher"))
        return largest_components(hard, self.target.kind == "sigmoid") if self.largest else hard

    def _masks(self, labeled: Batch, count: int) -> torch.Tensor:
        brain = labeled["brain_mask"][:count].bool() if self.box_in_brain and "brain_mask" in labeled else None
        return box_mask(count, labeled["image"].shape[2:], self.box, self.generator("box"), brain)


def largest_components(labels: torch.Tensor, regions: bool) -> torch.Tensor:
    """Every sample's class (indices (B, 1, *spatial); 0 stays) or region (masks (B, R, *spatial)) reduced to its largest component."""
    values = labels.cpu().numpy()
    kept = np.zeros_like(values)
    for place in np.ndindex(values.shape[:2]):
        for label in (1,) if regions else np.unique(values[place][values[place] > 0]):
            kept[place][largest_component(values[place] == label)] = label
    return torch.from_numpy(kept).to(labels)
