"""Fusing the answers of several models about one case, one model at a time.

Each fusion takes region maps (R, *spatial) with `add` and gives what they say together with `result`. The mean and the vote keep running
sums, so that their memory does not grow with the number of models; STAPLE keeps one bit per model, region and voxel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from lesionbench.errors import unknown
from lesionbench.target import atoms, nesting
from lesionbench.task import Task
from lightning_modules.raters.staple import VotePatterns, staple_of, vote_codes


@dataclass
class Fused:
    """What several models say together.

    Attributes:
        regions: probabilities (R, *spatial), float32.
        disagreement: (*spatial), float32, in [0, 0.5]: root of the mean over regions of the variance over models (weighted as they are).
        table: name -> number, such as what STAPLE estimates of each model.
    """

    regions: torch.Tensor
    disagreement: torch.Tensor
    table: dict[str, float] = field(default_factory=dict)


class Mean:
    """Weighted mean of the probabilities (Wang et al., BrainLes 2020, Eq. 6)."""

    def __init__(self, task: Task) -> None:
        self._sum: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None  # over models and regions
        self._weight = 0.0

    def add(self, regions: torch.Tensor, labels: torch.Tensor, weight: float = 1.0, name: str = "") -> None:
        """One model: region probabilities (R, *spatial) and class indices (*spatial)."""
        self._count(regions.detach().float(), weight)

    def _count(self, maps: torch.Tensor, weight: float) -> None:
        if self._sum is None:
            self._sum, self._squares = torch.zeros_like(maps), torch.zeros_like(maps[0])
        self._sum.add_(maps, alpha=weight)
        for region in maps:
            self._squares.addcmul_(region, region, value=weight / len(maps))
        self._weight += weight

    def result(self) -> Fused:
        """All models together; ends the fusion."""
        regions = self._sum.div_(self._weight)
        variance = self._squares.div_(self._weight)
        for region in regions:
            variance.addcmul_(region, region, value=-1 / len(regions))
        return Fused(regions, variance.clamp_(min=0).sqrt_())


class Vote(Mean):
    """Weighted share of the models whose labels lie in the region; with the threshold 1/2 the majority, a tie is none."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.task = task

    def add(self, regions: torch.Tensor, labels: torch.Tensor, weight: float = 1.0, name: str = "") -> None:
        self._count(self.task.region_masks(labels).float(), weight)


class LabelVote(Mean):
    """The class that most models give a voxel; regions follow from it, as masks.

    Unlike `Vote`, which asks for each region whether most models are inside, this compares classes: of three models that say three different
    things none has a majority.

    Args:
        tie: what is said where several classes have the most votes: `mean` = of all classes the most probable in the mean over models,
            `first` = what the first of the models says, `background`.

    Raises:
        SuiteError: another tie; for `mean`, regions that do not tell all classes apart.
    """

    def __init__(self, task: Task, tie: str = "mean") -> None:
        super().__init__(task)
        if tie not in TIES:
            raise unknown("ensemble.tie", tie, TIES)
        self.task, self.tie = task, tie
        self._atoms = torch.from_numpy(atoms(task)).float() if tie == "mean" else None
        self._votes: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._classes: torch.Tensor | None = None  # sums of probabilities of the foreground classes

    def add(self, regions: torch.Tensor, labels: torch.Tensor, weight: float = 1.0, name: str = "") -> None:
        labels = labels.long().clamp_min(0)
        if self._votes is None:
            self._votes, self._first = labels.new_zeros((len(self.task.classes), *labels.shape), dtype=torch.float32), labels
        self._votes.scatter_add_(0, labels[None], torch.full_like(labels[None], weight, dtype=torch.float32))
        if self._atoms is not None:
            classes = torch.einsum("cr,r...->c...", self._atoms.to(regions.device), regions.detach().float())
            self._classes = weight * classes if self._classes is None else self._classes.add_(classes, alpha=weight)
        self._count(self.task.region_masks(labels).float(), weight)

    def result(self) -> Fused:
        most = self._votes.amax(dim=0)
        labels = self._votes.argmax(dim=0)
        tied = (self._votes > most - 1e-6).sum(dim=0) > 1
        if self.tie == "mean":
            every = torch.cat([self._weight - self._classes.sum(dim=0, keepdim=True), self._classes])
            other = every.argmax(dim=0)
        else:
            other = self._first if self.tie == "first" else torch.zeros_like(labels)
        labels = torch.where(tied, other, labels)
        return Fused(self.task.region_masks(labels).float(), super().result().disagreement)


class Staple:
    """STAPLE of each region on its own (Warfield et al., IEEE TMI 23, 2004; used so by Zeineldin et al., BrainLes 2021).

    A region is at least as probable as any inside it, which estimates region by region do not guarantee. The table has each model's
    estimated sensitivity and specificity.

    Args:
        task: whose regions.
        margin: the estimate looks at the box around all that any model marked as the region, and so many voxels around it, so that
            background far away does not decide the prior; None = the whole volume.
    """

    def __init__(self, task: Task, margin: int | None = 5) -> None:
        self.task, self.margin = task, margin
        self._bits: list[np.ndarray] = []  # per model (R, bytes)
        self._names: list[str] = []

    def add(self, regions: torch.Tensor, labels: torch.Tensor, weight: float = 1.0, name: str = "") -> None:
        """One model; only its labels count. There are no weights: they are what STAPLE estimates."""
        self._shape, self._device = tuple(labels.shape), labels.device
        self._bits.append(np.stack([np.packbits(mask) for mask in self.task.region_masks(labels).cpu().numpy()]))
        self._names.append(name)

    def _masks(self, region: int, box: tuple[slice, ...] = ()) -> Iterator[torch.Tensor]:
        """The mask of every model, unpacked one at a time."""
        for bits in self._bits:
            mask = np.unpackbits(bits[region], count=int(np.prod(self._shape))).reshape(self._shape)
            yield torch.from_numpy(np.ascontiguousarray(mask[box])).bool()

    def result(self) -> Fused:
        """All models together."""
        regions = torch.zeros(len(self.task.regions), *self._shape)
        variance = torch.zeros(self._shape)
        table = {}
        for r, name in enumerate(self.task.region_names):
            box = self._box(r)
            if box is None:  # nobody marked anything: STAPLE has nothing to estimate
                continue
            codes = vote_codes(self._masks(r, box), len(self._bits))
            found = staple_of(VotePatterns.of_codes(codes, len(self._bits)))
            regions[r][box] = found.posterior_of(codes)
            share = sum((codes >> place) & 1 for place in range(len(self._bits))).float() / len(self._bits)
            variance[box] += share * (1 - share) / len(regions)
            for model, p, q in zip(self._names, found.sensitivity.tolist(), found.specificity.tolist(), strict=True):
                table |= {f"staple_sensitivity_{name}_{model}": p, f"staple_specificity_{name}_{model}": q}
        for r, parent, _ in reversed(nesting(self.task)):
            if parent is not None:
                regions[parent] = torch.maximum(regions[parent], regions[r])
        return Fused(regions.to(self._device), variance.sqrt_().to(self._device), table)

    def _box(self, region: int) -> tuple[slice, ...] | None:
        """Around what any model marked, with the margin; None where there is nothing."""
        marked = np.bitwise_or.reduce([bits[region] for bits in self._bits])
        mask = np.unpackbits(marked, count=int(np.prod(self._shape))).reshape(self._shape)
        if not mask.any():
            return None
        if self.margin is None:
            return tuple(slice(0, n) for n in self._shape)
        box = []
        for axis, n in enumerate(self._shape):
            inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
            box.append(slice(max(int(inside[0]) - self.margin, 0), min(int(inside[-1]) + 1 + self.margin, n)))
        return tuple(box)


FUSIONS: dict[str, Callable[..., Mean | Staple]] = {"mean": Mean, "vote": Vote, "label_vote": LabelVote, "staple": Staple}
TIES = ("mean", "first", "background")
