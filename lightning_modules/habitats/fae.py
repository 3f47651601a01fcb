"""The feature-enhanced auto-encoder, trained on voxel vectors (Li, Li, Wei, Price, Schönlieb, Chen, BrainLes 2021)."""

from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count, Share
from lesionbench.task import Task
from lightning_modules.base import Method
from lightning_modules.habitats.outliers import OutlierFilter
from lightning_modules.habitats.scaling import Scaling
from lightning_modules.networks.voxel_autoencoders import turns, voxel_encoder


class FAE(Method):
    """Trains an encoder of voxel vectors (N, M); its losses take turns, each with an optimizer of its own.

    Before training, cut-offs and scaling are fitted on a sample of the training voxels; both are kept with the weights. Voxels beyond
    a cut-off are left out of every batch.

    Args:
        encoder: `fae`, or what it is compared with: `ensemble` (no dual decoder), `ae`.
        hidden, latent_dim: nodes of the hidden layers; size of the latent space (None = M).
        update: `alternate_batch` (pair loss, then global loss on every batch), `alternate_epoch`, `joint`.
        quantile, filter_mode: of the `OutlierFilter`.
        scaling: see `Scaling`.
        sample: voxels per case from which cut-offs and scaling are fitted; None = all.
    """

    def __init__(
        self,
        task: Task,
        *,
        encoder: str = "fae",
        hidden: Count = 10,
        latent_dim: Count | None = None,
        update: str = "alternate_batch",
        quantile: Share = 0.95,
        filter_mode: str = "upper",
        scaling: str = "minmax",
        sample: Count | None = 2000,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        self.automatic_optimization = False
        self.network = voxel_encoder(encoder, len(task.channels), hidden, latent_dim)
        turns(self.network, update, 0)  # an unknown update is said now
        self.update, self.sample = update, sample
        self.outliers, self.scaling = OutlierFilter(quantile, filter_mode), Scaling(scaling, task.channels)
        for name in ("low", "high", "shift", "scale"):
            self.register_buffer(name, torch.full((len(task.channels),), float("nan")))

    def trained_networks(self) -> dict[str, nn.Module]:
        return {}  # its losses name the parameters that they train: there are no parts to freeze

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        names = ("joint",) if self.update == "joint" and len(self.network.turns) > 1 else self.network.turns
        return {name: self.network.trained_by(name) for name in names}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not hasattr(self.trainer.datamodule, "voxel_sample"):
            raise SuiteError("FAE trains on tumor voxels (datamodules.TumorVoxels); see the stages of conf/experiment/fae")
        if torch.isnan(self.high).any():  # a resumed run has them
            self.fit_scaling(self.trainer.datamodule.voxel_sample(self.sample, self.seed))

    def fit_scaling(self, voxels: Any) -> None:
        """Fits cut-offs and scaling on voxels (N, M), NumPy."""
        kept = voxels[self.outliers.fit(voxels).keep(voxels)]
        self.scaling.fit(kept)
        fitted = {"low": self.outliers.low, "high": self.outliers.high, "shift": self.scaling.shift, "scale": self.scaling.scale}
        for name, values in fitted.items():
            getattr(self, name).copy_(torch.from_numpy(values))

    def inliers(self, voxels: torch.Tensor) -> torch.Tensor:
        """Voxels (N, M) without outliers, scaled."""
        kept = voxels[((voxels >= self.low) & (voxels <= self.high)).all(dim=1)]
        return (kept - self.shift) / self.scale

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x = self.inliers(batch["image"])
        if not len(x):
            raise SuiteError(f"no voxel of a batch is left at quantile {self.outliers.quantile:g}; raise habitats.encoder.quantile")
        for name in turns(self.network, self.update, self.current_epoch):
            with self.optimizing(name) as step:
                loss = self.network.loss(name, x)
                step(loss)
            self.log_terms(**{name: loss})

    def predict_case(self, batch: Batch) -> Prediction:
        """An encoder alone draws no map.

        Raises:
            SuiteError: always.
        """
        raise SuiteError("this checkpoint holds the encoder alone; the fitted habitats are in checkpoints/best.ckpt of the run folder")
