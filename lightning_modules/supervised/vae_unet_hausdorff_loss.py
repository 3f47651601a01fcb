"""Cross-entropy with one-sided Hausdorff losses on distance maps, and an auto-encoder branch (Fonov et al., BrainLes 2021)."""

from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative, Positive
from lesionbench.task import Task
from lightning_modules.distance_supervised import DistanceSupervised
from lightning_modules.losses.distance import one_sided_hausdorff
from lightning_modules.networks.contract import logits_of


class VAEUNetHausdorff(DistanceSupervised):
    """Any softmax network whose probability of each label also costs by its distance to the true structure, with a variational branch.

    Fonov, Rosa-Neto, Collins, "3D MRI brain tumour segmentation with autoencoder regularization and Hausdorff distance loss function",
    BrainLes 2021: L = L_CE + 0.1 L_mean + 0.01 L_max + 0.1 L_VAE + 0.1 L_KL. The distance map has a channel for each class, background
    included (`distance.of=classes distance.background=true`).

    Args:
        loss: L_CE.
        mean_weight, max_weight: of the two distance losses (`losses.one_sided_hausdorff`).
        reconstruction_weight, kl_weight: of the two terms of the branch, `reconstruction` and `kl` of the network's output
            (`networks.segresnet_vae`); both 0 for a network without one.
        alpha, beta: exponents of distance and probability.
        include_background: the background is one of the labels of the distance losses.

    Raises:
        SuiteError: a target of other outputs than classes, or weights of a branch that the network does not have.
    """

    def __init__(
        self,
        task: Task,
        *,
        mean_weight: NotNegative = 0.1,
        max_weight: NotNegative = 0.01,
        reconstruction_weight: NotNegative = 0.1,
        kl_weight: NotNegative = 0.1,
        alpha: Positive = 1.0,
        beta: Positive = 1.0,
        include_background: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if self.target.kind != "softmax":
            raise SuiteError(f"model.target={type(self.target).__name__}: distance losses weigh classes; use model/target=softmax")
        if (reconstruction_weight or kl_weight) and not hasattr(self.network, "vae_weight"):
            raise SuiteError(
                f"model.reconstruction_weight={reconstruction_weight} model.kl_weight={kl_weight}: {type(self.network).__name__} has no "
                "auto-encoder; set both to 0, or use model/network=segresnet_vae"
            )
        self.mean_weight, self.max_weight = mean_weight, max_weight
        self.reconstruction_weight, self.kl_weight = reconstruction_weight, kl_weight
        self.alpha, self.beta, self.first = alpha, beta, 0 if include_background else 1

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        output = self(batch["image"])
        probabilities = self.target.activate(logits_of(output))
        distances = self.distances(batch, probabilities.shape[1])[:, self.first :]
        valid = (batch["label"] >= 0).float()
        mean, largest = one_sided_hausdorff(probabilities[:, self.first :], distances, valid, self.alpha, self.beta)
        terms = {"cross_entropy": self.loss(output, self.training_target(batch)), "mean": mean, "max": largest}
        total = terms["cross_entropy"] + self.mean_weight * mean + self.max_weight * largest
        for name, weight in (("reconstruction", self.reconstruction_weight), ("kl", self.kl_weight)):
            if weight:
                terms[name] = output[name]
                total = total + weight * output[name]
        self.log_terms(loss=total, **terms)
        return total
