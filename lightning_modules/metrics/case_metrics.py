"""One case in, result rows out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count, NotNegative, Positive, Share, Whole
from lesionbench.score_counts import Ranking
from lesionbench.task import IGNORE, Task
from lightning_modules.metrics.agreement import PAPER_THRESHOLDS, q_dice, recall_reached
from lightning_modules.metrics.box import bounding_box
from lightning_modules.metrics.brats import JOINED_BY, brats2023, brats2026, tissue_lesions
from lightning_modules.metrics.lesions import lesion_dice, lesion_f1
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.metrics.slices import slice_metrics
from lightning_modules.metrics.surface import SURFACE_METRICS, grid_diagonal, surface_metrics
from lightning_modules.metrics.uncertainty import brier_score, calibration_error, qu_brats

OVERLAP = ("dice", "jaccard", "sensitivity", "precision", "specificity", "volume_difference")
BRATS = ("brats2023", "brats2024", "brats2026", "brats2026_mets")
MASK_METRICS = (*OVERLAP, "vr70", "volume", *SURFACE_METRICS, "lesion_dice", "lesion_f1", *BRATS, "slices")
DISTANCES = ("hd95", "hd95_pooled", "hd", "asd", "asd_directed")
SCORE_METRICS = ("auroc", "brain_auroc", "ap", "auprc", "dice_best")
UNCERTAINTY = ("error_auroc", "qu_brats")
KNOWN = (*MASK_METRICS, "ece", "brier", "q_dice", "q_dice_paper", *SCORE_METRICS, *UNCERTAINTY)
DEFAULT = ("dice", "hd95", "sensitivity", "specificity", "precision", "volume_difference", "auroc", "ap", "error_auroc")

Values = dict[str, float]


class CaseMetrics:
    """Measures a prediction and all its members against the truth of one case, region by region.

    Args:
        names: what to measure; a metric whose input a prediction lacks is left out for it.
            From `labels`: `dice`, `jaccard`, `sensitivity`, `precision`, `specificity`, `volume_difference`, `vr70` (1 where sensitivity is
            at least 0.7), `volume` (columns `volume_*` and `truth_volume_*`, ml or voxels), `hd95`, `hd95_pooled`, `hd`, `asd`,
            `asd_directed` (columns end in the task's unit, `_mm` or `_vox`), `surface_dice`, `lesion_dice`, `lesion_f1`, `brats2023`,
            `brats2024`, `brats2026` and `brats2026_mets` (columns of the challenge's table, see `brats2023`, `tissue_lesions` and
            `brats2026`), `slices` (columns `slices_*`, see `slice_metrics`).
            From `regions`: `ece`, `brier`; with raters also `q_dice` and `q_dice_paper` (from masks where there are no probabilities).
            From `scores`, for finding each region: `auroc`, `brain_auroc` (inside the brain alone), `ap` (average precision), `auprc`
            (trapezoids), `dice_best` (the best Dice that a threshold reaches on this very case: an oracle's).
            From `uncertainty` and `labels`: `error_auroc`, one column `auroc_<map>` for finding the voxels where a region is wrong;
            `qu_brats`, columns `qu_brats_<map>` and its parts `qu_dice_<map>`, `qu_ftp_<map>` and `qu_ftn_<map>` (see `qu_brats`).
        empty_distance: surface distance when one of two masks is empty: `diagonal` of the whole grid, `nan`, or a number in the unit.
        surface_tolerance: for `surface_dice`, in the unit.
        lesion_min_iou: for `lesion_f1`; 0 means any overlap.
        lesion_dilation: for `lesion_dice`, `brats2023` and `brats2024`, in voxels.
        lesion_min_volume: for `brats2023` and `brats2024`, in mm^3: true lesions up to it do not count. A number, or one per region name (in capitals or not)
            with one under `default` for the others.
        bins: for `ece`.
        region_entropy: `error_auroc` and `qu_brats` also measure `region_entropy`, the entropy of each region's own probability: an uncertainty
            map that every prediction with `regions` and `labels` has.
        uncertainty_top: the uncertainty that is 100 in `qu_brats`, what is above counts as 100; None = the largest of the case, map by map.
        slice_bounds: for `slices`: lesion sizes, in pixels of a slice, that divide slices with small lesions from others.
        space: grid that the caller measures on: `native`, that of the file, or `network`, where a paper's protocol says so.
        dataset: names of what the caller measures over the voxels of all cases as one set (see `DatasetMetrics`).
        thresholds: tried for the data-set-wise `dice_best`; None = all.

    Raises:
        SuiteError: an unknown metric, `empty_distance` or `space`; `lesion_min_volume` without `default`.
    """

    def __init__(
        self,
        names: Sequence[str] = DEFAULT,
        empty_distance: NotNegative | str = "diagonal",
        surface_tolerance: NotNegative = 1.0,
        lesion_min_iou: Share = 0.0,
        lesion_dilation: Whole = 0,
        lesion_min_volume: NotNegative | Mapping[str, NotNegative] = 50.0,
        bins: Count = 15,
        region_entropy: bool = False,
        uncertainty_top: Positive | None = None,
        slice_bounds: Sequence[Count] = (100,),
        space: str = "native",
        dataset: Sequence[str] = (),
        thresholds: Count | None = None,
    ) -> None:
        for name in names:
            if name not in KNOWN:
                raise unknown("metric", name, KNOWN)
        if isinstance(empty_distance, str) and empty_distance not in ("diagonal", "nan"):
            raise unknown("empty_distance", empty_distance, ["diagonal", "nan", "<a number>"])
        if space not in ("native", "network"):
            raise unknown("space", space, ["native", "network"])
        self.space = space
        self.dataset, self.thresholds = tuple(dataset), thresholds
        self.names = tuple(names)
        self.empty_distance = empty_distance
        self.surface_tolerance = surface_tolerance
        self.lesion_min_iou = lesion_min_iou
        self.lesion_dilation = lesion_dilation
        volumes = lesion_min_volume if isinstance(lesion_min_volume, Mapping) else {"default": lesion_min_volume}
        self.lesion_min_volume = {region.lower(): float(volume) for region, volume in volumes.items()}
        if "default" not in self.lesion_min_volume:
            raise SuiteError(
                f"metrics.lesion_min_volume={self.lesion_min_volume}: add `default`, the volume for regions that are not named"
            )
        self.bins = bins
        self.region_entropy, self.uncertainty_top = region_entropy, uncertainty_top
        if not slice_bounds or list(slice_bounds) != sorted(set(slice_bounds)) or slice_bounds[0] < 1:
            raise SuiteError(f"metrics.slice_bounds={list(slice_bounds)}: expected numbers of pixels, ascending")
        self.slice_bounds = tuple(slice_bounds)

    def check(self, task: Task) -> None:
        """Refuses a task that lacks what a metric is about, before anything is measured.

        Raises:
            SuiteError: `brats2024` and a task without the tissues across which it joins lesions.
        """
        lacking = [tissue for tissue in JOINED_BY if tissue not in task.classes]
        if "brats2024" in self.names and lacking:
            raise SuiteError(
                f"metrics.names: brats2024 joins lesions across the classes {', '.join(JOINED_BY)}, the task has no {', '.join(lacking)}; "
                "for other data than glioma after treatment: metrics=brats2023, with metrics.lesion_min_volume=20 for the volumes of 2024"
            )

    def columns(self, unit: str) -> list[str]:
        """Names of the values that a region may have, in a task with this unit of length; of those that only the case tells, patterns of
        `fnmatch`: `slices_*`, and `auroc_*` and `qu_*` of uncertainty maps."""
        size = "ml" if unit == "mm" else "vox"
        several = {
            "volume": [f"volume_{size}", f"truth_volume_{size}"],
            "slices": ["slices_*"],
            "error_auroc": ["auroc_*"],
            "qu_brats": ["qu_*"],
        }
        several |= {name: [f"{name}_{unit}"] for name in DISTANCES}
        return [column for name in self.names for column in several.get(name, [name])]

    def __call__(
        self,
        prediction: Prediction,
        truth: torch.Tensor | None,
        task: Task,
        spacing: Sequence[float],
        raters: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        brain: torch.Tensor | None = None,
        slice_axis: int | None = None,
    ) -> list[dict[str, Any]]:
        """Rows `{"member", "region", <metric>: value}`: one per member and region, and one with region "" where a member has a table.

        Args:
            prediction: maps on the grid of `truth`.
            truth: class indices (X, Y, Z) or (X, Y); None leaves only the tables. Voxels of -1 count nowhere. An axis of length one is dropped, so that a slice has
                in-plane surfaces and an in-plane diagonal.
            spacing: voxel size along the axes of `truth`; not used for distances of a task in voxels.
            raters: class indices (R, X, Y, Z), for `q_dice`; a rater who is -1 throughout is absent, a voxel of -1 does not count.
            mask: bool (X, Y, Z), such as the brain: where calibration and AUROC are measured; default everywhere.
            brain: bool (X, Y, Z), needed for `brain_auroc`.
            slice_axis: axis of `truth` along which `slices` cuts; default: the task's, which is right for canonical axes.

        Raises:
            SuiteError: a map that is not on the grid of `truth`.
        """
        case = (
            None if truth is None else _Truth(truth.detach().cpu(), task, tuple(float(s) for s in spacing), raters, mask, brain, slice_axis)
        )
        rows = []
        for member, part in prediction.flat():
            for region, values in self._regions(part, case).items() if case else ():
                rows.append({"member": member, "region": region, **values})
            if part.table:
                rows.append({"member": member, "region": "", **{k: float(v) for k, v in part.table.items()}})
        return rows

    def _regions(self, part: Prediction, case: "_Truth") -> dict[str, Values]:
        """Values of one member by region; regions without any are left out."""
        values: dict[str, Values] = {region: {} for region in case.task.region_names}
        for measured in (self._masks(part, case), self._probabilities(part, case), self._agreement(part, case), self._rankings(part, case)):
            for region, more in zip(values, measured, strict=False):
                values[region].update(more)
        return {region: found for region, found in values.items() if found}

    def _masks(self, part: Prediction, case: "_Truth") -> list[Values]:
        if part.labels is None:
            return []
        ours, theirs, box = case.cropped_masks(part.labels)
        lesions: dict[tuple[str, ...], np.ndarray] = {}  # of regions that are one tissue
        if "brats2024" in self.names:
            lesions = {(tissue,): numbers[box] for tissue, numbers in case.tissue_lesions(self.lesion_dilation).items()}
        regions = case.task.regions.items()
        return [
            self._mask(region, *masks, case, lesions.get(tuple(classes)))
            for (region, classes), *masks in zip(regions, ours, theirs, strict=True)
        ]

    def _mask(self, region: str, ours: np.ndarray, theirs: np.ndarray, case: "_Truth", lesions: np.ndarray | None) -> Values:
        """Everything that compares two masks, in the order of `names`; `lesions` as of `brats2023`, for `brats2024`."""
        unit, found = case.task.unit, overlap_metrics(ours, theirs, case.voxels)
        surfaces = [n for n in self.names if n in SURFACE_METRICS]
        if surfaces:
            empty = grid_diagonal(case.shape, case.steps) if self.empty_distance == "diagonal" else float(self.empty_distance)
            found |= surface_metrics(ours, theirs, case.steps, surfaces, self.surface_tolerance, empty)
        values = {}
        for name in self.names:
            if name in DISTANCES:
                values[f"{name}_{unit}"] = found[name]
            elif name in found:
                values[name] = found[name]
            elif name == "vr70":
                values[name] = recall_reached(found["sensitivity"])
            elif name == "volume":
                size, suffix = (np.prod(case.spacing) / 1000, "ml") if unit == "mm" else (1, "vox")
                for column, mask in ((f"volume_{suffix}", ours), (f"truth_volume_{suffix}", theirs)):
                    values[column] = float(np.count_nonzero(mask) * size)
            elif name == "lesion_dice":
                values[name] = lesion_dice(ours, theirs, self.lesion_dilation)
            elif name == "lesion_f1":
                values[name] = lesion_f1(ours, theirs, self.lesion_min_iou)
            elif name in ("brats2023", "brats2024"):
                smallest = self.lesion_min_volume.get(region.lower(), self.lesion_min_volume["default"])
                values |= brats2023(ours, theirs, case.steps, self.lesion_dilation, smallest, lesions if name == "brats2024" else None)
            elif name in BRATS:
                values |= brats2026(ours, theirs, case.steps, unit, metastases=name == "brats2026_mets")
            elif name == "slices":
                values |= slice_metrics(ours, theirs, case.slice_axis, self.slice_bounds)
        return values

    def _probabilities(self, part: Prediction, case: "_Truth") -> list[Values]:
        wanted = [n for n in self.names if n in ("ece", "brier")]
        if part.regions is None or not wanted:
            return []
        measures = {"ece": lambda p, t: calibration_error(p, t, bins=self.bins), "brier": brier_score}
        return [{n: measures[n](p, t) for n in wanted} for p, t in zip(case.counted(part.regions), case.regions, strict=True)]

    def _agreement(self, part: Prediction, case: "_Truth") -> list[Values]:
        wanted = [n for n in self.names if n in ("q_dice", "q_dice_paper")]
        maps = part.regions if part.regions is not None else part.labels
        if case.raters is None or maps is None or not wanted:
            return []
        share, rated = case.rated
        maps = case.fit(maps if part.regions is not None else case.task.region_masks(maps).float()).reshape(len(share), -1)[:, rated]
        extra = {"q_dice": {}, "q_dice_paper": {"thresholds": PAPER_THRESHOLDS}}
        return [{n: q_dice(ours, theirs, **extra[n]) for n in wanted} for ours, theirs in zip(maps, share, strict=True)]

    def _rankings(self, part: Prediction, case: "_Truth") -> list[Values]:
        """Scores against regions, and uncertainty maps against the errors of regions; every map is sorted once."""
        values: list[Values] = [{} for _ in case.task.regions]
        wanted = [n for n in self.names if n in SCORE_METRICS and (n != "brain_auroc" or case.brain is not None)]
        if part.scores is not None and wanted:
            scores = case.counted(part.scores[None])[0]
            ranking = Ranking(scores)
            inside = case.counted(case.brain[None])[0].astype(bool) if "brain_auroc" in wanted else None
            within = None if inside is None else Ranking(scores[inside])
            for one, region in zip(values, case.regions, strict=True):
                counts = ranking.counts(region)
                measures = {"auroc": counts.auroc, "ap": counts.average_precision, "auprc": counts.auprc}
                measures |= {"dice_best": lambda c=counts: c.best_dice()[0]}
                measures |= {"brain_auroc": lambda r=region: within.auroc(r[inside])}
                one |= {name: measures[name]() for name in wanted}
        if part.labels is not None and any(name in self.names for name in UNCERTAINTY):
            ours = case.counted(case.task.region_masks(part.labels))
            for name, maps in self._uncertain(part, case).items():
                for one, more in zip(values, self._uncertainty(name, maps, ours, case.regions), strict=True):
                    one |= more
        return values

    def _uncertain(self, part: Prediction, case: "_Truth") -> dict[str, np.ndarray]:
        """Uncertainty maps at the voxels that count, (1, N), or (R, N) where every region has its own."""
        maps = {name: case.counted(uncertainty[None]) for name, uncertainty in part.uncertainty.items()}
        if self.region_entropy and part.regions is not None:
            maps["region_entropy"] = case.counted(part.region_entropy())
        return maps

    def _uncertainty(self, name: str, maps: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list[Values]:
        """What one uncertainty map is worth for each region; a map of all regions is sorted once."""
        values: list[Values] = [{} for _ in theirs]
        if "error_auroc" in self.names:
            rankings = [Ranking(one) for one in maps] * (len(theirs) if len(maps) == 1 else 1)
            for one, ranking, predicted, truth in zip(values, rankings, ours, theirs, strict=True):
                one[f"auroc_{name}"] = ranking.auroc(predicted != truth)
        if "qu_brats" in self.names:
            top = self.uncertainty_top or float(maps.max(initial=0)) or 1.0
            percent = np.broadcast_to((100 * (maps / top)).clip(0, 100), theirs.shape)
            for one, uncertainty, predicted, truth in zip(values, percent, ours, theirs, strict=True):
                found = qu_brats(uncertainty, predicted, truth)
                one |= {f"qu_{'brats' if part == 'score' else part}_{name}": value for part, value in found.items()}
        return values


@dataclass
class _Truth:
    """The truth of one case, with axes of length one dropped from every array that leaves it."""

    labels: torch.Tensor
    task: Task
    spacing: tuple[float, ...]
    raters: torch.Tensor | None
    mask: torch.Tensor | None
    brain: torch.Tensor | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        kept = [axis for axis, n in enumerate(self.labels.shape) if n > 1] or [0]
        self.shape = tuple(self.labels.shape[axis] for axis in kept)
        self.steps = tuple(self.spacing[axis] if self.task.unit == "mm" else 1.0 for axis in kept)
        self.grid = tuple(self.labels.shape)
        axis = self.task.slice_axis if self.axis is None else self.axis
        self.slice_axis = kept.index(axis) if axis in kept and len(kept) == 3 else None
        self.truth = self.fit(self.labels[None])[0]
        ignored = self.truth == IGNORE
        self.voxels = ignored.size - int(np.count_nonzero(ignored))
        self.ignored = ignored if self.voxels < ignored.size else None
        self._lesions: dict[int, dict[str, np.ndarray]] = {}  # of every member the same

    def fit(self, maps: torch.Tensor) -> np.ndarray:
        """Maps (C, X, Y, Z) as an array without axes of length one."""
        if tuple(maps.shape[1:]) != self.grid:
            raise SuiteError(f"prediction has the shape {tuple(maps.shape[1:])}, the truth {self.grid}: they must lie on one grid")
        maps = maps.detach().cpu()
        return (maps.float() if maps.is_floating_point() else maps).reshape(len(maps), *self.shape).numpy()

    def tissue_lesions(self, dilation: int) -> dict[str, np.ndarray]:
        """Numbers of the true lesions of each tissue on the whole grid, see `tissue_lesions`."""
        if dilation not in self._lesions:
            tissues = {tissue: self.truth == self.task.class_names.index(tissue) for tissue in JOINED_BY}
            self._lesions[dilation] = tissue_lesions(tissues, dilation)
        return self._lesions[dilation]

    def cropped_masks(self, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
        """Region masks (R, *box) of `labels` and of the truth, False where ignored; and the box, which holds the foreground of both."""
        ours = self.fit(labels[None])[0]
        if self.ignored is not None:
            ours = np.where(self.ignored, IGNORE, ours)
        whole = self.task.region_matrix[:, 0].any()  # a region that holds background reaches everywhere
        box = (slice(None),) * ours.ndim if whole else bounding_box((ours > 0) | (self.truth > 0))
        masks = [self.task.region_masks(torch.from_numpy(np.ascontiguousarray(x[box]))).numpy() for x in (ours, self.truth)]
        return masks[0], masks[1], box

    @cached_property
    def selected(self) -> np.ndarray | None:
        """Flat bool map of the voxels where calibration and rankings are measured; None where all are."""
        chosen = None if self.ignored is None else ~self.ignored
        if self.mask is not None:
            mask = self.fit(self.mask[None])[0].astype(bool)
            chosen = mask if chosen is None else mask & chosen
        return None if chosen is None else chosen.ravel()

    def counted(self, maps: torch.Tensor) -> np.ndarray:
        """Maps (C, X, Y, Z) at the `selected` voxels, (C, N)."""
        flat = self.fit(maps).reshape(len(maps), -1)
        return flat if self.selected is None else flat[:, self.selected]

    @cached_property
    def regions(self) -> np.ndarray:
        """True regions at the `selected` voxels, (R, N)."""
        return self.counted(self.task.region_masks(self.labels))

    @cached_property
    def rated(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of raters (R, N) who marked a voxel as a region, and the flat bool map of the N voxels that count."""
        raters = self.fit(self.raters).reshape(len(self.raters), -1)
        raters = raters[(raters != IGNORE).any(axis=1)]
        rated = (raters != IGNORE).all(axis=0) & (self.truth.ravel() != IGNORE)
        return self.task.region_masks(torch.from_numpy(raters[:, rated])).float().mean(dim=1).numpy(), rated
