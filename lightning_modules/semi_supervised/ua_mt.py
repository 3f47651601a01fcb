"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lesionbench.errors import SuiteError
from lesionbench.ranges import Count
from lesionbench.task import Task
from lightning_modules.losses.gated_consistency import RisingShare
from lightning_modules.semi_supervised.mean_teacher import MeanTeacher
from lightning_modules.uncertainty import RunningMoments, entropy


class UAMT(MeanTeacher):
    """Mean teacher whose consistency counts only where the teacher is certain (Yu et al., Eq. 1-3).

    The teacher answers `passes` times with dropout and noise; the entropy u of its mean answer decides: voxels with u < H count, and the
    loss is sum_v I(u_v < H) || f'_v - f_v ||^2 / sum_v I(u_v < H), f' one more pass. For regions u is the mean of their binary entropies.

    Args:
        passes: T, at least 1 (8 in the paper).
        gate: called with (entropy, classes, share of training done), returns where the teacher counts; `RisingShare` is the paper's.

    Raises:
        SuiteError: no pass.
    """

    terms: Mapping[str, float] = {"consistency": 0.1}

    def __init__(self, task: Task, *, passes: Count = 8, gate: Callable | None = None, **options: Any) -> None:
        super().__init__(task, **options)
        if passes < 1:
            raise SuiteError(f"model.passes={passes}: at least 1")
        self.passes, self.gate = passes, gate or RisingShare()

    def certainty_mask(self, image: torch.Tensor) -> torch.Tensor:
        moments = RunningMoments()
        for number in range(self.passes):
            noisy = self.noisy(image, f"teacher, pass {number}", self.noise, 2 * self.noise)
            moments.update(self.target.activate(self.no_grad_logits(self.teacher, noisy, f"teacher, pass {number}")))
        progress = self.progress()
        if self.target.kind == "softmax":
            return self.gate(moments.entropy, moments.mean.shape[1], progress)
        both = torch.stack([moments.mean, 1 - moments.mean], dim=1)
        return self.gate(entropy(both).squeeze(1).mean(dim=1, keepdim=True), 2, progress)
