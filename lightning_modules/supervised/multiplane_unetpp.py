"""Dice loss that gives way to a boundary loss, on the slices of one plane (multi-plane ensemble, BrainLes 2021)."""

from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.ranges import Share
from lesionbench.task import Task
from lightning_modules.distance_supervised import DistanceSupervised
from lightning_modules.losses.distance import boundary_loss
from lightning_modules.networks.contract import logits_of


class MultiplaneUNetPP(DistanceSupervised):
    """A network for the slices of one plane, trained with (1 - a) L_Dice + a L_boundary, a rising from epoch to epoch.

    "Multi-plane UNet++ ensemble for glioblastoma segmentation", BrainLes 2021, Section 2.2. The plane is `task.slice_axis`; three
    such networks vote as an ensemble (`ensemble.fusion=label_vote`). The distance map has the signed distance of every tumor class, within
    slices, in voxels (`distance.of=classes distance.signed=true distance.in_plane=true distance.unit=vox`).

    Args:
        loss: L_Dice.
        alpha, alpha_step, alpha_max: a in the first epoch, what every epoch adds, and where it stays; `alpha_max=0` is Dice alone.

    Raises:
        SuiteError: a target of other outputs than classes.
    """

    def __init__(self, task: Task, *, alpha: Share = 0.01, alpha_step: Share = 0.01, alpha_max: Share = 0.5, **options: Any) -> None:
        super().__init__(task, **options)
        if self.target.kind != "softmax":
            raise SuiteError(f"model.target={type(self.target).__name__}: the boundary loss is one of classes; use model/target=softmax")
        self.alpha, self.alpha_step, self.alpha_max = alpha, alpha_step, alpha_max

    def share(self) -> float:
        """a in this batch; epochs are counted from its iteration."""
        epoch = self.iteration // int(self.trainer.num_training_batches)
        return min(self.alpha + self.alpha_step * epoch, self.alpha_max)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        output, share = self(batch["image"]), self.share()
        probabilities = self.target.activate(logits_of(output))[:, 1:]
        boundary = boundary_loss(probabilities, self.distances(batch, probabilities.shape[1]), (batch["label"] >= 0).float())
        dice = self.loss(output, self.training_target(batch))
        total = (1 - share) * dice + share * boundary
        self.log_terms(loss=total, dice=dice, boundary=boundary, alpha=torch.tensor(share))
        return total
