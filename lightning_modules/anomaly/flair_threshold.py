"""The anomaly baseline without training: FLAIR, histogram-equalized, is the anomaly map."""

from typing import Any

import numpy as np
import torch

from lesionbench.batch import Batch
from lesionbench.errors import unknown
from lesionbench.ranges import Count
from lesionbench.task import Task
from lightning_modules.anomaly.base import AnomalyMethod

EQUALIZATIONS = ("brain", "whole_image", "minmax", "none")


class FlairThreshold(AnomalyMethod):
    """Tumors and many other lesions are bright on FLAIR: the equalized image itself is the map of scores. No parameters.

    Meissen, Kaissis and Rueckert, "Challenging Current Semi-Supervised Anomaly Segmentation Methods for Brain MRI", BrainLes 2021. After
    equalization a score is the share of the brain that is not brighter, so one threshold means the same on any scanner.

    Args:
        equalize: `brain` = over the voxels of the brain; `whole_image` = over all voxels, background included; `minmax` = the brain's
            range to [0, 1]; `none` = the image as the data module normalizes it.
        bins: of the equalization; None = one per distinct value, which makes it invariant to any increasing change of the values.

    Raises:
        SuiteError: an unknown equalization.
    """

    def __init__(self, task: Task, *, equalize: str = "brain", bins: Count | None = None, **options: Any) -> None:
        super().__init__(task, **options)
        if equalize not in EQUALIZATIONS:
            raise unknown("equalization (model.equalize)", equalize, EQUALIZATIONS)
        self.equalize, self.bins = equalize, bins

    def score_map(self, batch: Batch) -> torch.Tensor:
        image = batch["image"][0, self.channel]
        brain = batch["brain_mask"][0, 0]
        if self.equalize == "none":
            return image * brain
        values, inside = image.float().cpu().numpy(), brain.cpu().numpy()
        if self.equalize == "minmax":
            scores = minmax(values, inside)
        else:
            scores = equalized(values, np.ones_like(inside) if self.equalize == "whole_image" else inside, self.bins) * inside
        return torch.from_numpy(scores).to(image.device)


def equalized(image: np.ndarray, mask: np.ndarray, bins: int | None = None) -> np.ndarray:
    """Histogram equalization inside a mask: the share of the mask's voxels that are not brighter, in (0, 1]; 0 outside.

    Args:
        image: any shape.
        mask: bool, same shape.
        bins: of equal width between the mask's extremes, with linear interpolation between them (as in `skimage.exposure.equalize_hist`);
            None = exact ranks. For whole-number images scikit-image uses exact ranks whatever its `nbins`.
    """
    scores = np.zeros(image.shape, np.float32)
    if not mask.any():
        return scores
    if bins is not None:
        from skimage.exposure import equalize_hist

        return (equalize_hist(image.astype(np.float64), nbins=bins, mask=mask) * mask).astype(np.float32)
    _, places, counts = np.unique(image[mask], return_inverse=True, return_counts=True)
    scores[mask] = (np.cumsum(counts) / counts.sum())[places.ravel()]
    return scores


def minmax(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The range of the image inside the mask mapped to [0, 1]; 0 outside, and everywhere where there is no contrast."""
    inside = image[mask]
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    scaled = (image - low) / (high - low) if high > low else np.zeros_like(image)
    return (scaled * mask).astype(np.float32)
