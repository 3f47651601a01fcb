"""Anomalies as what an autoencoder of lesion-free brains cannot reconstruct."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.prediction import Prediction
from lesionbench.ranges import NotNegative
from lesionbench.task import Task
from lightning_modules.anomaly.base import AnomalyMethod


class Autoencoder(AnomalyMethod):
    """Trained to reconstruct one channel of lesion-free brains; the score of a voxel is |image - reconstruction|.

    Baur et al., "Autoencoders for unsupervised anomaly segmentation in brain MR images: A comparative study", Medical Image Analysis 69,
    2021. The loss is the mean absolute error over all pixels, for a network that returns `kl` plus `kl_weight` times its divergence per
    pixel. Training reads no label. The mean absolute error inside the brain is the case's `reconstruction_error`.

    Args:
        network: called with (in_channels, out_channels); see `lightning_modules.networks.SpatialAutoencoder`.
        inferer: see `lightning_modules.inferers`.
        kl_weight: of the divergence.
    """

    def __init__(
        self, task: Task, *, network: Callable[..., nn.Module], inferer: Callable, kl_weight: NotNegative = 1.0, **options: Any
    ) -> None:
        super().__init__(task, **options)
        self.network = network(in_channels=1, out_channels=1)
        self.inferer, self.kl_weight = copy(inferer), kl_weight
        if getattr(inferer, "divisor", 0) is None:
            self.inferer.divisor = self.network.divisor

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        image = batch["image"][:, self.channel : self.channel + 1]
        output = self.network(image, self.generator("latent"))
        terms = {"reconstruction": (image - output["logits"]).abs().mean()}
        if "kl" in output:
            terms["kl"] = self.kl_weight * output["kl"].sum() / image.numel()
        self.log_terms(**terms)
        return sum(terms.values())

    def score_map(self, batch: Batch) -> torch.Tensor:
        channel = slice(self.channel, self.channel + 1)
        maps = self.infer(batch, lambda view: {"reconstruction": self.network(view)["logits"]}, channel)
        return (batch["image"][:, channel] - maps["reconstruction"]).abs()[0, 0] * batch["brain_mask"][0, 0]

    def predict_case(self, batch: Batch) -> Prediction:
        prediction = super().predict_case(batch)
        error = prediction.scores.sum() / batch["brain_mask"].sum().clamp(min=1)
        return replace(prediction, table={"reconstruction_error": float(error)})
