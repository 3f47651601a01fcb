"""A stand-in for a blurry autoencoder: how much the image differs from a blurred copy of itself."""

from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from lesionbench.batch import Batch
from lesionbench.ranges import NotNegative
from lesionbench.task import Task
from lightning_modules.anomaly.base import AnomalyMethod
from lightning_modules.anomaly.flair_threshold import minmax


class BlurResidual(AnomalyMethod):
    """|image - blurred image| of the brain, whose range is scaled to [0, 1]. No parameters.

    Reconstructions of autoencoders are blurred, so that their residuals also mark every edge (Meissen, Kaissis and Rueckert, BrainLes
    2021, and "On the Pitfalls of Using the Residual Error as Anomaly Score", MIDL 2022); this is that effect alone. The blur looks at
    brain voxels only: an autoencoder does reconstruct the border of the brain, and with the background in it that border outshines any
    lesion.

    Args:
        sigma: of the Gaussian, in voxels of the network grid.
    """

    def __init__(self, task: Task, *, sigma: NotNegative = 4.0, **options: Any) -> None:
        super().__init__(task, **options)
        self.sigma = sigma

    def score_map(self, batch: Batch) -> torch.Tensor:
        brain = batch["brain_mask"][0, 0]
        inside = brain.cpu().numpy()
        image = minmax(batch["image"][0, self.channel].float().cpu().numpy(), inside)
        weight = gaussian_filter(inside.astype(np.float32), self.sigma)
        blurred = gaussian_filter(image, self.sigma) / np.where(inside, weight, 1)
        return torch.from_numpy(abs(image - blurred) * inside).to(brain.device)
