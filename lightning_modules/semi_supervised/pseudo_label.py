"""Pseudo-label (Lee, ICML workshop on challenges in representation learning, 2013)."""

from collections.abc import Mapping
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Share
from lesionbench.task import IGNORE, Task
from lightning_modules.networks.contract import Output
from lightning_modules.semi_supervised.base import SemiSupervised

LABELS = ("online", "stored")


class PseudoLabel(SemiSupervised):
    """Supervised loss + alpha(t) times the same loss on unlabeled images against the network's own hard answer (Lee, Eq. 15).

    alpha(t) is 0 up to T1 (`warm_start`), rises linearly until T2 (`ramp`) and stays at alpha_f (`weights.pseudo`), Eq. 16.

    Args:
        labels: `online`: the answer of this very pass, renewed at every step (Lee); `stored`: made for all unlabeled cases at ends of
            epochs and kept in the map store until the next labeling (`relabel_every`).
        threshold: voxels whose answer is less probable than this are left out, in [0, 1); 0 = none.

    Raises:
        SuiteError: an unknown choice, a threshold out of range.
    """

    terms: Mapping[str, float] = {"pseudo": 1.0}

    @classmethod
    def maps_of(cls, options: Mapping[str, Any]) -> dict[str, str]:
        return {"pseudo_label": cls.map_interpolation} if options.get("labels") == "stored" else {}

    def __init__(self, task: Task, *, labels: str = "online", threshold: Share = 0.0, **options: Any) -> None:
        super().__init__(task, **options)
        if labels not in LABELS:
            raise unknown("model.labels", labels, LABELS)
        if not 0 <= threshold < 1:
            raise SuiteError(f"model.threshold={threshold}: at least 0 and below 1")
        self.labels, self.threshold = labels, threshold
        self.writes_maps = tuple(self.maps_of({"labels": labels}))

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        mine, others = self.together(self.network, labeled["image"], unlabeled["image"])
        terms = {"supervised": self.supervised(mine, labeled)}
        target = self._pseudo(others, unlabeled) if self.weights["pseudo"] else None
        if target is not None:
            terms["pseudo"] = self.loss(others, target)
        return terms

    def _pseudo(self, output: Output, unlabeled: Batch) -> torch.Tensor | None:
        if self.labels == "online":
            sure = self._sure(self.probabilities(output).detach())
            return torch.where(sure, self.hard(output), IGNORE)
        return self.target.encode(unlabeled["pseudo_label"]) if "pseudo_label" in unlabeled else None

    def _sure(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Where the answer is at least as probable as the threshold: (B, 1, *spatial), or (B, R, *spatial) for regions."""
        if self.target.kind == "sigmoid":
            return torch.maximum(probabilities, 1 - probabilities) >= self.threshold
        return probabilities.amax(dim=1, keepdim=True) >= self.threshold

    def case_maps(self, batch: Batch) -> dict[str, torch.Tensor]:
        maps = self.infer(batch, self.predict_maps)["probabilities"]
        sure = self._sure(maps).all(dim=1)[0]
        return {"pseudo_label": torch.where(sure, self.decode(maps).labels, IGNORE)[None].to(torch.int8)}
