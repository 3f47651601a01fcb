"""A network that also tells which classes an image holds, with a loss for it (Rahman et al., BrainLes 2021)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.ranges import NotNegative
from lesionbench.task import IGNORE, Task
from lightning_modules.losses.cross_entropy import weighted_mean
from lightning_modules.metrics import CaseMetrics
from lightning_modules.segmentation import SegmentationMethod


class UNetContextEncoding(SegmentationMethod):
    """Segmentation loss + weight * binary cross-entropy of the presence of every class (the semantic error loss).

    Rahman, Sadique, Temtam, Farzana, Vidyaratne, Iftekharuddin, "Brain Tumor Segmentation Using UNet-Context Encoding Network", BrainLes
    2021, Eq. 1; the presence loss is that of Zhang et al., CVPR 2018. A class is present where a voxel of the training sample has it; a
    sample without any labeled voxel adds nothing. The table of a prediction has `presence_<class>`, the probability, of several windows the
    largest; where there is a truth, `present_<class>`, 0 or 1, and `presence_accuracy`, the share of classes told rightly at 0.5.

    Args:
        network: gives `presence` beside `logits`, such as `networks.ContextEncodingUNet`.
        presence_weight: of the loss of presence; 0 = the head is not trained, or there is none.

    Raises:
        SuiteError: a weight, and a network that tells the presence of another number of classes than the task has.
    """

    def __init__(self, task: Task, *, presence_weight: NotNegative = 1.0, **options: Any) -> None:
        super().__init__(task, **options)
        self.presence_weight = presence_weight
        self.told = task.class_names[1:]  # of these presence is told
        self.tables = [f"presence_{name}" for name in self.told]
        context = getattr(self.network, "context", None)
        heads = 0 if context is None else context.presence.out_features
        if presence_weight and heads != len(self.told):
            raise SuiteError(
                f"model.presence_weight={presence_weight}: {type(self.network).__name__} tells the presence of {heads} classes, the task has "
                f"{len(self.told)} ({', '.join(self.told)}); give model.network.presence={len(self.told)} with codes, or model.presence_weight=0"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        output = self(batch["image"])
        terms = {"segmentation": self.supervised(output, batch)}
        total = terms["segmentation"]
        if self.presence_weight:
            terms["presence"] = presence_loss(output["presence"], batch["label"])
            total = total + self.presence_weight * terms["presence"]
        self.log_terms(loss=total, **terms)
        return total

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """`probabilities`, and where the network tells presence, `presence` (B, classes, *spatial): that of the view at each of its voxels."""
        output = self(view)
        maps = {"probabilities": self.target.activate(output["logits"])}
        if "presence" in output:
            told = output["presence"].sigmoid()
            maps["presence"] = told.reshape(*told.shape, *[1] * (view.dim() - 2)).expand(-1, -1, *view.shape[2:])
        return maps

    def predict_case(self, batch: Batch) -> Prediction:
        maps = self.infer(batch, self.predict_maps)
        prediction = self.decode(maps["probabilities"])
        if "presence" not in maps or maps["presence"].shape[1] != len(self.told):
            return prediction
        told = maps["presence"][0].flatten(1).amax(dim=1)
        return replace(prediction, table={f"presence_{name}": float(p) for name, p in zip(self.told, told, strict=True)})

    def measure(
        self, prediction: Prediction, truth: torch.Tensor | None, batch: Batch, metrics: CaseMetrics, spacing: tuple[float, ...]
    ) -> list[dict]:
        rows = super().measure(prediction, truth, batch, metrics, spacing)
        if truth is None:
            return rows
        found = present(truth[None, None], len(self.told))[0].tolist()
        return [{**row, **self._judged(row, found)} if not row["region"] else row for row in rows]

    def _judged(self, row: Mapping[str, Any], found: list[bool]) -> dict[str, float]:
        """What the truth says of a table's presence."""
        right = [(row[f"presence_{name}"] > 0.5) == there for name, there in zip(self.told, found, strict=True)]
        return {
            **{f"present_{name}": float(there) for name, there in zip(self.told, found, strict=True)},
            "presence_accuracy": sum(right) / len(right),
        }


def present(label: torch.Tensor, classes: int) -> torch.Tensor:
    """Which of the classes 1 to `classes` a sample has: class indices (B, 1, *spatial) -> bool (B, classes)."""
    return torch.stack([(label == c).flatten(1).any(dim=1) for c in range(1, classes + 1)], dim=1)


def presence_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of presence, mean over classes and the samples that have a labeled voxel (Zhang et al., CVPR 2018, SE-loss).

    Args:
        logits: (B, classes), of the classes from 1 on.
        label: class indices (B, 1, *spatial), -1 = ignore.
    """
    truth = present(label, logits.shape[1]).to(logits)
    known = (label != IGNORE).flatten(1).any(dim=1).to(logits)
    return weighted_mean(F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=1), known)
