"""SPiN: segmentation of small lesions with subpixel embedding (Wong et al., BrainLes 2021)."""

import torch
from torch.nn.functional import avg_pool2d

from lesionbench.batch import Batch
from lightning_modules.losses.deep_supervision import resized
from lightning_modules.segmentation import SegmentationMethod


class SPiN(SegmentationMethod):
    """2.5D segmentation with `SubpixelNet`. Without its downsampler the network answers on a grid of twice the resolution: it is then
    trained against labels repeated by nearest neighbor, and the probabilities of the four subpixels are averaged for prediction.
    """

    def compute_loss(self, batch: Batch) -> torch.Tensor:
        """The loss on the grid of the logits, 1x or 2x."""
        logits = self(batch["image"])
        return self.loss(logits, resized(self.target.encode(batch["label"]), logits.shape[2:]))

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = super().predict_maps(view)["probabilities"]
        return {"probabilities": maps if maps.shape[2:] == view.shape[2:4] else avg_pool2d(maps, 2)}
