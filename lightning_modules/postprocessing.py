"""Rules on a finished case: thresholds of probability, opening and closing, components, and regions that are too small or implausible.

Those of the BraTS entries: components below a few voxels are removed, then all enhancing tumor becomes necrosis where there is less of it
than a threshold, since a case without any scores 0 for a single false voxel (Isensee et al., BrainLes 2020; Wang et al., BrainLes 2020);
thresholds of probability and a tree on volumes that are chosen on held-out cases.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import Connectivity, NotNegative, Share, Whole
from lesionbench.target import DECODINGS, RegionSigmoid, nesting
from lesionbench.task import Task
from lightning_modules.components import largest_component, without_small_components

Box = Mapping[str, Sequence[NotNegative | None]]  # class -> (more than, at most) so many voxels; None = no bound


class PostProcessing:
    """Changes the labels of a prediction and of all its members; probabilities, scores and uncertainty stay as they are.

    What is taken from a region goes to the region that holds it: to background from the outermost one, to the class of necrosis from
    enhancing tumor, so that neither the core nor the whole tumor changes. Rules are applied in the order of the arguments, each to outer
    regions first. Sizes and distances count voxels of the native grid.

    Args:
        probability: region -> threshold; labels are made anew from region probabilities, 1/2 for regions that are left out. Only of what
            has probabilities.
        decoding: how they are made anew, see `RegionSigmoid`.
        opening, closing: region -> steps of binary opening or closing, in which voxels touch by faces.
        keep_largest: regions of which only the largest component stays.
        min_component: region -> smallest component that stays.
        min_volume: region -> smallest whole volume that stays.
        suppress: region -> boxes of volumes: class -> (more than, at most) so many voxels, None for no bound. The region goes where the case
            lies in one of the boxes; with `probability` labels are then made anew without it.
        connectivity: of components, see `without_small_components`; 3 = 26 neighbors.
        thresholds: JSON file, or several, that `job=tune` wrote; what they hold goes before the arguments above. Rows of the cases that
            it was tuned on are marked `oracle`.

    Raises:
        SuiteError: a value out of range, a file that cannot be read; when called, a region or class that the task does not have.
    """

    def __init__(
        self,
        min_component: Mapping[str, Whole] | None = None,
        min_volume: Mapping[str, Whole] | None = None,
        connectivity: Connectivity = 3,
        thresholds: str | Path | Sequence[str | Path] | None = None,
        *,
        probability: Mapping[str, Share] | None = None,
        decoding: str = "nested",
        opening: Mapping[str, Whole] | None = None,
        closing: Mapping[str, Whole] | None = None,
        keep_largest: Sequence[str] = (),
        suppress: Mapping[str, Sequence[Box]] | None = None,
    ) -> None:
        if decoding not in DECODINGS:
            raise unknown("decoding (postprocessing.decoding)", decoding, DECODINGS)
        self.connectivity, self.keep_largest = connectivity, tuple(keep_largest or ())
        self.decoding, self.chosen_on = decoding, frozenset[str]()
        self.rules: dict[str, dict[str, Any]] = {
            "probability": dict(probability or {}),
            "opening": dict(opening or {}),
            "closing": dict(closing or {}),
            "min_component": dict(min_component or {}),
            "min_volume": dict(min_volume or {}),
            "suppress": dict(suppress or {}),
        }
        for path in () if thresholds is None else [thresholds] if isinstance(thresholds, str | Path) else thresholds:
            tuned, patients = _tuned(path)
            self.decoding = tuned.pop("decoding", self.decoding)
            for name, found in tuned.items():
                self.rules[name] |= found
            self.chosen_on |= patients
        for option in ("opening", "closing", "min_component", "min_volume"):
            for region, size in self.rules[option].items():
                if size < 0:
                    raise SuiteError(f"postprocessing.{option}.{region}={size}: a number of voxels from 0")
        for region, boxes in self.rules["suppress"].items():
            if not all(isinstance(box, Mapping) and all(isinstance(b, Sequence) and len(b) == 2 for b in box.values()) for box in boxes):
                raise SuiteError(f"postprocessing.suppress.{region}={boxes}: expected a list of {{class: [more than, at most]}}")

    @property
    def active(self) -> bool:
        """Whether there is any rule."""
        return bool(self.keep_largest or any(self.rules.values()))

    def check(self, task: Task) -> None:
        """Refuses rules for regions and classes that the task does not have."""
        for region in {*self.keep_largest, *(r for rules in self.rules.values() for r in rules)}:
            if region not in task.regions:
                raise unknown("region (postprocessing)", region, task.regions)
        for name in (c for boxes in self.rules["suppress"].values() for box in boxes for c in box):
            if name not in task.classes:
                raise unknown("class (postprocessing.suppress)", name, task.classes)
        if self.rules["probability"]:
            self._decoder(task)

    def __call__(self, prediction: Prediction, task: Task) -> Prediction:
        """The prediction on the native grid with its rules applied to every label map."""
        members = {name: self(member, task) for name, member in prediction.members.items()}
        labels = None if prediction.labels is None else self.labels(prediction.labels, task, prediction.regions)
        return replace(prediction, labels=labels, members=members)

    def labels(self, labels: torch.Tensor, task: Task, regions: torch.Tensor | None = None) -> torch.Tensor:
        """Class indices (X, Y, Z), and region probabilities (R, X, Y, Z) where there are any -> a changed copy."""
        self.check(task)
        anew = bool(self.rules["probability"]) and regions is not None
        result = (self._decoder(task).labels(regions[None])[0] if anew and regions is not None else labels).cpu().numpy().copy()
        order = nesting(task)
        own = {r: label for r, _, label in order}
        heirs = {r: 0 if parent is None else own[parent] for r, parent, _ in order}
        places = [(r, task.region_names[r]) for r, _, _ in order]
        cross = ndimage.generate_binary_structure(3, 1)
        for option, change in (("opening", ndimage.binary_opening), ("closing", _closed)):
            for r, name in places:
                if steps := self.rules[option].get(name):
                    mask = _mask(result, task, r)
                    changed = change(mask, cross, iterations=steps)
                    result[mask & ~changed] = heirs[r]
                    result[changed & ~mask] = own[r]
        for r, name in places:
            if name in self.keep_largest:
                mask = _mask(result, task, r)
                result[mask & ~largest_component(mask, self.connectivity)] = heirs[r]
        for r, name in places:
            if name in self.rules["min_component"]:
                mask = _mask(result, task, r)
                kept = without_small_components(mask, self.rules["min_component"][name], self.connectivity)
                result[mask & ~kept] = heirs[r]
        for r, name in places:
            if name in self.rules["min_volume"]:
                mask = _mask(result, task, r)
                if np.count_nonzero(mask) < self.rules["min_volume"][name]:
                    result[mask] = heirs[r]
        for r, name in places:
            if any(inside(box, class_volumes(result, task)) for box in self.rules["suppress"].get(name, ())):
                mask = _mask(result, task, r)
                if anew and regions is not None:  # the most probable of what is left
                    without = regions.clone()
                    without[[s for s, inner in enumerate(task.regions.values()) if set(inner) <= set(task.regions[name])]] = 0
                    result[mask] = self._decoder(task).labels(without[None])[0].cpu().numpy()[mask]
                else:
                    result[mask] = heirs[r]
        return torch.from_numpy(result).to(labels.device)

    def _decoder(self, task: Task) -> RegionSigmoid:
        return RegionSigmoid(task, self.rules["probability"], self.decoding)


def class_volumes(labels: np.ndarray, task: Task) -> dict[str, int]:
    """Class -> its voxels in class indices (X, Y, Z), without background."""
    counts = np.bincount(labels[labels > 0].ravel(), minlength=len(task.classes))
    return {name: int(count) for name, count in list(zip(task.class_names, counts, strict=True))[1:]}


def inside(box: Box, volumes: Mapping[str, int]) -> bool:
    """Whether every volume that the box bounds is more than its lower and at most its upper bound."""
    return all((low is None or volumes[name] > low) and (high is None or volumes[name] <= high) for name, (low, high) in box.items())


def _closed(mask: np.ndarray, structure: np.ndarray, iterations: int) -> np.ndarray:
    """Binary closing as if the volume went on beyond its border: nothing at the border is lost."""
    padded = ndimage.binary_closing(np.pad(mask, iterations), structure, iterations=iterations)
    return padded[(slice(iterations, -iterations),) * mask.ndim]


def _mask(labels: np.ndarray, task: Task, region: int) -> np.ndarray:
    """Voxels (X, Y, Z), bool, of the classes of one region."""
    return np.isin(labels, np.flatnonzero(task.region_matrix[region]))


def _tuned(path: str | Path) -> tuple[dict[str, Any], frozenset[str]]:
    """The rules that were chosen, and the patients that they were chosen on."""
    try:
        found = json.loads(Path(path).expanduser().read_text())
        patients = frozenset(found["patients"])
        rules: dict[str, Any] = {name: found[name] for name in ("probability", "min_volume", "suppress", "decoding") if name in found}
        rules |= {"min_volume": {str(k): int(v) for k, v in rules["min_volume"].items()}} if "min_volume" in rules else {}
        if not rules or not all(isinstance(rule, dict) for name, rule in rules.items() if name != "decoding"):
            raise ValueError("no rule in it")
        return rules, patients
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuiteError(f"postprocessing.thresholds={path}: not a file that job=tune left ({error})") from None
