"""Squared differences of probabilities, everywhere or where a teacher is certain enough, and gates that say where that is."""

import math
from typing import Literal

import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import PositiveShare, Share
from lightning_modules.ramps import gaussian_ramp


def gated_consistency(student: torch.Tensor, teacher: torch.Tensor, certain: torch.Tensor | None = None) -> torch.Tensor:
    """Squared difference, summed over classes and averaged over the certain voxels of each case, then over cases (Zhao et al., JBHI 2023, Eq. 5).

    Args:
        student, teacher: probabilities (B, C, *spatial).
        certain: bool (B, 1, *spatial), where the teacher counts; None = everywhere. A case without a certain voxel counts 0.

    Returns:
        Scalar >= 0. Whether gradients reach the teacher is up to the caller (`teacher.detach()`).
    """
    squared = (student - teacher).square().sum(dim=1).flatten(1)
    if certain is None:
        return squared.mean()
    mask = certain[:, 0].flatten(1)
    return ((squared * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)).mean()


def squared_error(probabilities: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of (p - y)^2 over the voxels that count and all channels; 0 where none counts.

    Args:
        probabilities, target: (B, K, *spatial).
        weight: (B, 1 or K, *spatial), 1 where a voxel counts, else 0.
    """
    weight = weight.expand_as(probabilities)
    return ((probabilities - target).square() * weight).sum() / weight.sum().clamp_min(1)


class RelativeMax:
    """Keeps voxels below a share of the map's largest uncertainty: U < ratio * max U (Zhao et al., JBHI 2023, Eq. 5; ratio 1/3).

    The bar moves with the map: late in training, when uncertainty is low everywhere, the relatively uncertain voxels are still left out.
    A constant map has no voxel below its maximum times a ratio of at most 1.

    Args:
        ratio: in (0, 1].
        scope: whose maximum: of each `sample`, or of the `batch`.

    Raises:
        SuiteError: a ratio outside its range, an unknown scope.
    """

    def __init__(self, ratio: PositiveShare = 1 / 3, scope: Literal["sample", "batch"] = "sample") -> None:
        if scope not in ("sample", "batch"):
            raise unknown("model.gate.scope", scope, ["sample", "batch"])
        self.ratio, self.scope = _share("ratio", ratio), scope

    def __call__(self, uncertainty: torch.Tensor, classes: int, progress: float) -> torch.Tensor:
        """Entropy (B, 1, *spatial) -> certain, bool of that shape. `classes` and `progress` do not matter to this gate."""
        largest = uncertainty.flatten(1).amax(dim=1) if self.scope == "sample" else uncertainty.max().expand(len(uncertainty))
        return uncertainty < self.ratio * largest.view(-1, *[1] * (uncertainty.ndim - 1))


class FixedShare:
    """Keeps voxels below a fixed share of the largest possible entropy: U < share * ln C.

    Raises:
        SuiteError: a share outside (0, 1].
    """

    def __init__(self, share: PositiveShare = 1 / 3) -> None:
        self.share = _share("share", share)

    def __call__(self, uncertainty: torch.Tensor, classes: int, progress: float) -> torch.Tensor:
        """Entropy (B, 1, *spatial) of `classes` classes -> certain, bool of that shape."""
        return uncertainty < self.share * math.log(classes)


class RisingShare:
    """Keeps voxels below a rising share of the largest possible entropy: U < (start + (1 - start) ramp) ln C.

    The threshold of uncertainty-aware mean teachers (Yu et al., MICCAI 2019; start 3/4, ramp exp(-5 (1 - progress)^2)).

    Raises:
        SuiteError: a start outside (0, 1].
    """

    def __init__(self, start: Share = 0.75) -> None:
        self.start = _share("start", start)

    def __call__(self, uncertainty: torch.Tensor, classes: int, progress: float) -> torch.Tensor:
        """Entropy (B, 1, *spatial) of `classes` classes, share of training done in [0, 1] -> certain, bool of that shape."""
        return uncertainty < (self.start + (1 - self.start) * gaussian_ramp(progress)) * math.log(classes)


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise SuiteError(f"model.gate.{name}={value}: expected 0 < {name} <= 1")
    return value
