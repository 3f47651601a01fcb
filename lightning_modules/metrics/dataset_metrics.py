"""Data-set-wise measures: the voxels of all test cases on all ranks taken as one set, in bounded memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torchmetrics import Metric

from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.score_counts import ScoreCounts, dice
from lesionbench.task import IGNORE, Task

KNOWN = ("dice", "dice_best", "auprc", "ap", "auroc", "brain_auroc")

Key = tuple[str, str]  # member, region
Values = dict[str, dict[str, dict[str, float]]]


class DatasetMetrics(Metric):
    """Dice of masks, and best Dice, AUPRC and AUROC of anomaly scores, over the voxels of all cases as one set.

    Every voxel weighs the same, so large lesions decide; the measures of unsupervised anomaly segmentation (Baur et al., Medical Image
    Analysis 69, 2021; Meissen et al., BrainLes 2021). Voxels of -1 count nowhere. Scores may have any range: they are counted in bins of
    equal relative width (see `ScoreCounts`), at most `max_bins` of them whatever the number of cases, so the result does not depend on
    the order of the cases or their division over ranks.

    `compute()` is a collective call where `torch.distributed` runs: every rank must make it, also one that saw no case.

    Args:
        names: from masks `dice`; from scores `dice_best` (the best Dice that one threshold reaches, chosen on these very cases, with
            `threshold_best` beside it), `auprc` (trapezoids), `ap` (average precision), `auroc`, and `brain_auroc` inside the brain alone.
        thresholds: tried for `dice_best`, evenly spaced from the lowest to the highest score; None = all that make a difference.
        max_bins: bounds memory to about 20 bytes x bins, for each member, region and kind of measure.

    Raises:
        SuiteError: an unknown metric.
    """

    full_state_update = False

    def __init__(
        self, names: Sequence[str] = ("dice_best", "auprc", "auroc"), thresholds: int | None = None, max_bins: int = 2**17
    ) -> None:
        super().__init__(
            sync_on_compute=False, compute_with_cache=False
        )  # counts differ in length: gathered in `compute`, see PerCaseResults
        for name in names:
            if name not in KNOWN:
                raise unknown("data-set-wise metric", name, KNOWN)
        self.names, self.thresholds, self.max_bins = tuple(names), thresholds, max_bins
        self.reset()

    def reset(self) -> None:
        """Forgets all cases."""
        super().reset()
        self.everywhere: dict[Key, ScoreCounts] = {}
        self.brain: dict[Key, ScoreCounts] = {}
        self.masks: dict[Key, np.ndarray] = {}  # hits, marked, true voxels
        self.tuned: set[Key] = set()

    def update(
        self, prediction: Prediction, truth: torch.Tensor, task: Task, brain: torch.Tensor | None = None, tuned: bool = False
    ) -> None:
        """Adds one case.

        Args:
            prediction: its scores and labels, and those of its members, on the grid of `truth`.
            truth: class indices, any shape; -1 = ignore.
            task: names the regions.
            brain: bool, the shape of `truth`; needed for `brain_auroc`.
            tuned: the labels come from a threshold that was chosen on this case.

        Raises:
            SuiteError: scores that are NaN, or on another grid.
        """
        counted = truth != IGNORE
        regions = task.region_masks(truth)[:, counted].cpu().numpy()
        within = None if brain is None else brain[counted].cpu().numpy().astype(bool)
        for member, part in prediction.flat():
            for kind, maps in (("scores", part.scores), ("labels", part.labels)):
                if maps is not None and maps.shape != truth.shape:
                    raise SuiteError(
                        f"{kind} have the shape {tuple(maps.shape)}, the truth {tuple(truth.shape)}: they must lie on one grid"
                    )
            marked = task.region_masks(part.labels)[:, counted].cpu().numpy() if part.labels is not None and "dice" in self.names else None
            scores = part.scores[counted].float().cpu().numpy() if part.scores is not None else None
            for place, (region, true) in enumerate(zip(task.region_names, regions, strict=True)):
                if marked is not None:
                    self._add_mask((member, region), marked[place], true, tuned)
                if scores is not None:
                    self._add_scores((member, region), scores, true, within)

    def _add_mask(self, key: Key, marked: np.ndarray, true: np.ndarray, tuned: bool) -> None:
        sizes = np.array([np.count_nonzero(m) for m in (marked & true, marked, true)])
        self.masks[key] = self.masks.get(key, 0) + sizes
        if tuned:
            self.tuned.add(key)

    def _add_scores(self, key: Key, scores: np.ndarray, true: np.ndarray, within: np.ndarray | None) -> None:
        if set(self.names) & {"dice_best", "auprc", "ap", "auroc"}:
            self._add_counts(self.everywhere, key, ScoreCounts.of(scores, true))
        if "brain_auroc" in self.names and within is not None:
            self._add_counts(self.brain, key, ScoreCounts.of(scores[within], true[within]))

    def _add_counts(self, store: dict[Key, ScoreCounts], key: Key, counts: ScoreCounts) -> None:
        try:
            counts = counts.limited(self.max_bins)
        except ValueError as error:
            raise SuiteError(f"{error}; member '{key[0]}', region {key[1]}") from None
        store[key] = (store[key] + counts).limited(self.max_bins) if key in store else counts

    def compute(self) -> Values:
        """{member: {region: {metric: value}}} over the cases of all ranks; `oracle` is 1 where labels come from a threshold that was
        chosen on one of these cases."""
        whole = DatasetMetrics(self.names, self.thresholds, self.max_bins)
        for everywhere, brain, masks, tuned in self._gathered():
            for store, part in ((whole.everywhere, everywhere), (whole.brain, brain)):
                for key, counts in part.items():
                    whole._add_counts(store, key, counts)
            for key, sizes in masks.items():
                whole.masks[key] = whole.masks.get(key, 0) + sizes
            whole.tuned |= tuned
        found: Values = {}
        for member, region in dict.fromkeys([*whole.masks, *whole.everywhere, *whole.brain]):
            found.setdefault(member, {})[region] = dict(whole._measured((member, region)))
        return found

    def _gathered(self) -> list[tuple]:
        own = (self.everywhere, self.brain, self.masks, self.tuned)
        if not (dist.is_available() and dist.is_initialized()):
            return [own]
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return parts

    def _measured(self, key: Key) -> Iterator[tuple[str, float]]:
        counts, brain, masks = self.everywhere.get(key), self.brain.get(key), self.masks.get(key)
        for name in self.names:
            if name == "dice" and masks is not None:
                yield name, float(dice(*masks))
            elif name == "dice_best" and counts is not None:
                yield from zip((name, "threshold_best"), counts.best_dice(self.thresholds), strict=True)
            elif name == "brain_auroc" and brain is not None:
                yield name, brain.auroc()
            elif name in ("auprc", "auroc") and counts is not None:
                yield name, getattr(counts, name)()
            elif name == "ap" and counts is not None:
                yield name, counts.average_precision()
        if key in self.tuned:
            yield "oracle", 1.0
