"""What all anomaly methods share: from a map of scores to a mask by a threshold and a rule on components, and how a threshold is chosen."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.ranges import Connectivity, NotNegative, Whole
from lesionbench.score_counts import ScoreCounts, dice
from lesionbench.target import nesting
from lesionbench.task import IGNORE, Task
from lightning_modules.base import Method
from lightning_modules.components import without_small_components


class AnomalyMethod(Method):
    """Scores every voxel of one channel; a threshold, where there is one, makes a mask of them. Subclasses define `score_map`.

    Args:
        channel: name of the channel that is scored.
        threshold: the mask is `score > threshold`; a number, or the JSON file that `choose_threshold` wrote; None = scores only. Test
            cases that the threshold of a file was chosen on have rows marked `oracle`.
        min_component: components of the mask with fewer voxels are dropped (20: Meissen et al., BrainLes 2021).
        connectivity: of components, see `without_small_components`.
        slice_range: (first, last + 1) along the slice axis of the network grid: nothing is marked or measured outside; None = all.

    Raises:
        SuiteError: a task without the channel, or with several regions; a threshold file that cannot be read; a slice range where metrics
            are measured on the native grid.
    """

    def __init__(
        self,
        task: Task,
        *,
        channel: str = "flair",
        threshold: NotNegative | str | None = None,
        min_component: Whole = 20,
        connectivity: Connectivity = 3,
        slice_range: Sequence[Whole] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if channel not in task.channels:
            raise unknown("channel (model.channel)", channel, task.channels)
        if len(task.regions) != 1:
            raise SuiteError(f"an anomaly is one region, the task has {', '.join(task.regions)}: choose with task.regions=[...]")
        if slice_range is not None and self.metrics.space != "network":
            raise SuiteError("model.slice_range counts slices of the network grid: it needs metrics.space=network")
        self.channel = task.channels.index(channel)
        self.label = nesting(task)[0][2]
        self.threshold, self.chosen_on = _threshold(threshold)
        self.min_component, self.connectivity = min_component, connectivity
        self.slice_range = None if slice_range is None else tuple(slice_range)

    def score_map(self, batch: Batch) -> torch.Tensor:
        """Scores (X, Y, Z) of the one whole case of `batch`, higher = more abnormal, 0 outside the brain."""
        raise TypeError(f"{type(self).__name__} must define score_map()")

    def predict_case(self, batch: Batch) -> Prediction:
        scores = self.score_map(batch)
        marked = None if self.threshold is None else torch.from_numpy(self.mask(scores, self.threshold))
        return Prediction(scores=scores, labels=None if marked is None else marked.to(scores.device, torch.int8) * self.label)

    def mask(self, scores: torch.Tensor, threshold: float, filtered: bool = True) -> np.ndarray:
        """Scores (X, Y, Z) -> bool (X, Y, Z): above the threshold, within the slices, and where `filtered` in no small component."""
        mask = (scores > threshold).cpu().numpy()
        if self.slice_range is not None:
            mask &= self._within(mask.shape)
        return without_small_components(mask, self.min_component, self.connectivity) if filtered else mask

    def _within(self, shape: Sequence[int]) -> np.ndarray:
        """Bool, broadcast to `shape`: the slices that count."""
        numbers = np.arange(shape[self.task.slice_axis])
        first, end = self.slice_range or (0, numbers.size)
        inside = (numbers >= first) & (numbers < end)
        return inside.reshape([-1 if axis == self.task.slice_axis else 1 for axis in range(3)])

    def truth(self, batch: Batch) -> torch.Tensor:
        """Class indices (X, Y, Z) of the one case on the network grid, -1 outside of the slices that count."""
        label = batch["label"][0, 0]
        if self.slice_range is None:
            return label
        return torch.where(torch.from_numpy(self._within(label.shape)).to(label.device), label, torch.full_like(label, IGNORE))

    def tuned_on(self, batch: Batch) -> bool:
        return batch["patient"][0] in self.chosen_on

    def _evaluate(self, batch: Batch, *results: Any) -> CaseResult | None:
        if self.slice_range is not None and "label" in batch:
            batch = {**batch, "label": self.truth(batch)[None, None]}
        return super()._evaluate(batch, *results)


def _threshold(given: float | str | None) -> tuple[float | None, frozenset[str]]:
    """The threshold, and the patients that it was chosen on."""
    if given is None or isinstance(given, (int, float)):
        return given, frozenset()
    try:
        found = json.loads(Path(given).read_text())
        return float(found["threshold"]), frozenset(found["patients"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuiteError(f"model.threshold={given}: neither a number nor a file that choosing a threshold left ({error})") from None


class Scored:
    """The score maps of labeled cases, made one at a time.

    Args:
        run: data module and method of a stage (`lesionbench.jobs.assembled.Assembled`).
        cases: the cases.
    """

    def __init__(self, run: Any, cases: Sequence[Any]) -> None:
        self.data, self.cases = run.data, cases
        self.device = run.trainer.strategy.root_device
        self.method: AnomalyMethod = run.method.to(self.device).eval()

    def maps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores and class indices of every case, both (X, Y, Z)."""
        for batch in self.data.case_loader(self.cases):
            batch = self.data.transfer_batch_to_device(batch, self.device, 0)
            with torch.no_grad():
                yield self.method.score_map(batch), self.method.truth(batch)

    def counts(self, most: int = 2**17) -> ScoreCounts:
        """Counts per score over the voxels of all cases, in at most `most` bins.

        Raises:
            ValueError: no cases.
        """
        total: ScoreCounts | None = None
        for scores, truth in self.maps():
            counted = truth != IGNORE
            positive = self.method.task.region_masks(truth)[0][counted]
            counts = ScoreCounts.of(scores[counted].cpu().numpy(), positive.cpu().numpy()).limited(most)
            total = counts if total is None else (total + counts).limited(most)
        if total is None:
            raise ValueError("no cases to count the scores of")
        return total

    def best_filtered(self, thresholds: int | None) -> tuple[float, float]:
        """(Dice, threshold) of the best masks after the rule on components.

        Raises:
            SuiteError: `thresholds` is None; every mask would have to be filtered.
        """
        if thresholds is None:
            raise SuiteError("calibration.filter_in_search needs a number of thresholds: metrics.thresholds=100")
        values = self.counts().values
        tried = np.linspace(values[0], values[-1], thresholds)
        sizes = np.zeros((3, thresholds))  # hits, marked, true
        for scores, truth in self.maps():
            positive = self.method.task.region_masks(truth)[0].cpu().numpy()
            for place, threshold in enumerate(tried):
                marked = self.method.mask(scores, threshold)
                sizes[:, place] += [np.count_nonzero(m) for m in (marked & positive, marked, positive)]
        hits, marked, true = sizes
        found = dice(hits, marked, true)
        return float(found.max()), float(tried[int(found.argmax())])
