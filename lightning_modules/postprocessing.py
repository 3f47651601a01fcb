"""Rules on finished label maps: small components and regions that are too small as a whole go.

Both are those of the BraTS entries: components below a few voxels are removed, then all enhancing tumor becomes necrosis where there is
less of it than a threshold, since a case without any scores 0 for a single false voxel (Isensee et al., BrainLes 2020; Wang et al.,
BrainLes 2020).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.target import nesting
from lesionbench.task import Task
from lightning_modules.components import without_small_components


class PostProcessing:
    """Changes the labels of a prediction and of all its members; probabilities, scores and uncertainty stay as they are.

    What is taken from a region goes to the region that holds it: to background from the outermost one, to the class of necrosis from
    enhancing tumor, so that neither the core nor the whole tumor changes.

    Args:
        min_component: region -> smallest component that stays, in voxels of the native grid; outer regions come first.
        min_volume: region -> smallest whole volume that stays, in voxels of the native grid; after all components.
        connectivity: of components, see `without_small_components`; 3 = 26 neighbors.
        thresholds: JSON file that `job=tune` wrote; its volumes go before those of `min_volume`. Rows of the cases that they were tuned
            on are marked `oracle`.

    Raises:
        SuiteError: a size below 0, a file that cannot be read; when called, a region that the task does not have.
    """

    def __init__(
        self,
        min_component: Mapping[str, int] | None = None,
        min_volume: Mapping[str, int] | None = None,
        connectivity: int = 3,
        thresholds: str | Path | None = None,
    ) -> None:
        self.min_component, self.min_volume, self.connectivity = dict(min_component or {}), dict(min_volume or {}), connectivity
        self.chosen_on: frozenset[str] = frozenset()
        if thresholds is not None:
            tuned, self.chosen_on = _tuned(thresholds)
            self.min_volume |= tuned
        for option, sizes in (("min_component", self.min_component), ("min_volume", self.min_volume)):
            for region, size in sizes.items():
                if size < 0:
                    raise SuiteError(f"postprocessing.{option}.{region}={size}: a number of voxels from 0")

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self.min_component or self.min_volume)

    def check(self, task: Task) -> None:
        """Refuses rules for regions that the task does not have."""
        for region in (*self.min_component, *self.min_volume):
            if region not in task.regions:
                raise unknown("region (postprocessing)", region, task.regions)

    def __call__(self, prediction: Prediction, task: Task) -> Prediction:
        """The prediction on the native grid with its rules applied to every label map."""
        members = {name: self(member, task) for name, member in prediction.members.items()}
        labels = None if prediction.labels is None else self.labels(prediction.labels, task)
        return replace(prediction, labels=labels, members=members)

    def labels(self, labels: torch.Tensor, task: Task) -> torch.Tensor:
        """Class indices (X, Y, Z) -> a changed copy."""
        self.check(task)
        result = labels.cpu().numpy().copy()
        order = nesting(task)
        heirs = {r: 0 if parent is None else next(own for s, _, own in order if s == parent) for r, parent, _ in order}
        places = [(r, task.region_names[r]) for r, _, _ in order]
        for r, name in places:
            if name in self.min_component:
                mask = _mask(result, task, r)
                kept = without_small_components(mask, self.min_component[name], self.connectivity)
                result[mask & ~kept] = heirs[r]
        for r, name in places:
            if name in self.min_volume:
                mask = _mask(result, task, r)
                if np.count_nonzero(mask) < self.min_volume[name]:
                    result[mask] = heirs[r]
        return torch.from_numpy(result).to(labels.device)


def _mask(labels: np.ndarray, task: Task, region: int) -> np.ndarray:
    """Voxels (X, Y, Z), bool, of the classes of one region."""
    return np.isin(labels, np.flatnonzero(task.region_matrix[region]))


def _tuned(path: str | Path) -> tuple[dict[str, int], frozenset[str]]:
    """The volumes that were chosen, and the patients that they were chosen on."""
    try:
        found = json.loads(Path(path).expanduser().read_text())
        return {str(k): int(v) for k, v in found["min_volume"].items()}, frozenset(found["patients"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuiteError(f"postprocessing.thresholds={path}: not a file that job=tune left ({error})") from None
