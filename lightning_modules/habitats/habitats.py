"""Fitted habitats applied to cases: a map, its features and the risk group, with nothing refitted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.task import Task
from lesionbench.voxels import tumor_mask
from lightning_modules.base import Method
from lightning_modules.habitats.pipeline import HabitatModel, HabitatPrediction
from lightning_modules.habitats.survival import survival_time
from lightning_modules.habitats.texture import FEATURES


class Habitats(Method):
    """Applies a fitted `HabitatModel` to the tumor voxels of whole cases. Has nothing to train; a checkpoint holds the model.

    The prediction's labels are habitats 1..eta (0 outside of the tumor); its table has `tumor_voxels`, the nine texture features, the
    fractions and `high_risk` (1 or 0). A case without tumor voxels gets an empty map and NaN.

    Args:
        region: tumor region that is partitioned; None = every foreground class.
        time, event: names of the survival attributes; result rows have `days` and `died` of cases that have both.
    """

    def __init__(self, task: Task, *, region: str | None = None, time: str = "survival", event: str = "event", **options: Any) -> None:
        super().__init__(task, **options)
        self.region, self.time, self.event = region, time, event
        self.data_task = task
        self.fitted: HabitatModel | None = None

    def fill(self, fitted: HabitatModel) -> None:
        """Takes a fitted model; from now on the task's classes are its habitats."""
        self.fitted = fitted
        self.task = habitat_task(self.data_task, fitted.theta.clusters)

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.fitted is None else self.fitted.state()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.fill(HabitatModel.from_state(state))

    def predict_case(self, batch: Batch) -> Prediction:
        if self.fitted is None:
            raise SuiteError("no fitted habitats: give ckpt=<run folder>/checkpoints/best.ckpt")
        if "label" not in batch:
            raise SuiteError(
                f"case {batch['case'][0]} has no tumor mask; give data.labels=<folder> with one mask <case>.nii.gz for each case"
            )
        mask = tumor_mask(batch["label"][0, 0], self.data_task, self.region).cpu()
        labels = torch.zeros(mask.shape, dtype=torch.int8)
        if not mask.any():
            return Prediction(labels=labels, table=case_table(None, 0, self.fitted.theta.clusters))
        found = self.fitted.predict(batch["image"][0].cpu()[:, mask].T.numpy(), mask.nonzero().numpy())
        labels[mask] = torch.from_numpy(found.labels)
        return Prediction(labels=labels, table=case_table(found, int(mask.sum()), self.fitted.theta.clusters))

    def measure(self, prediction: Prediction, truth: Any, batch: Batch, *_: Any) -> list[dict]:
        days, died = survival_time(batch["case"][0], batch["attributes"][0], self.time, self.event)
        survival = {"days": days, "died": float(died)} if days == days else {}
        return [{"member": "", "region": "", **prediction.table, **survival}]

    def _evaluate(self, *arguments: Any) -> CaseResult | None:
        result = super()._evaluate(*arguments)
        if result is not None:
            result.truth = None  # tumor classes are no truth for habitats
        return result


def habitat_task(task: Task, clusters: int) -> Task:
    """The channels of `task` with habitats for classes; `habitat_1` is written as 1."""
    classes = {"background": 0, **{f"habitat_{k}": k for k in range(1, clusters + 1)}}
    return Task(task.channels, classes, slice_axis=task.slice_axis, unit=task.unit)


def case_table(found: HabitatPrediction | None, voxels: int, clusters: int) -> dict[str, float]:
    """Case-level results by name; NaN for a case without tumor voxels."""
    names = [*FEATURES, *(f"fraction_{k + 1}" for k in range(clusters))]
    features = dict.fromkeys(names, float("nan")) if found is None else {n: found.features[n] for n in names}
    return {"tumor_voxels": float(voxels), **features, "high_risk": float("nan") if found is None else float(found.high_risk)}


def native_labels(labels: np.ndarray, positions: np.ndarray, shape: tuple[int, ...], geometry: Any) -> np.ndarray:
    """Labels (N,) at network-grid positions (N, 3) -> map on the native grid, int8."""
    full = torch.zeros(shape, dtype=torch.int8)
    full[tuple(torch.from_numpy(positions.astype(np.int64)).T)] = torch.from_numpy(labels)
    return geometry.to_native(full[None], discrete=True)[0].numpy()
