"""Targets for cases that several raters drew: each says what a network learns from them, and how its maps are read as rater agreement.

All speak of one region. Region "probabilities" are U in [0, 1], the share of raters expected to mark a voxel, as Q-Dice and the QUBIQ
challenge score it; labels are where U is above 1/2.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative
from lesionbench.target import Target, nesting
from lesionbench.task import IGNORE, Task
from lightning_modules.metrics.lesions import components
from lightning_modules.raters.simple_fusion import simple
from lightning_modules.raters.staple import staple


@dataclass(frozen=True)
class Votes:
    """What the raters of a batch marked.

    Attributes:
        marks: (B, R, *spatial), bool; False for raters that a case does not have.
        present: (B, R), bool, which raters a case has.
        cases: ids.
        generator: keyed to the iteration, for targets that draw.
    """

    marks: torch.Tensor
    present: torch.Tensor
    cases: list[str]
    generator: torch.Generator | None = None

    @property
    def share(self) -> torch.Tensor:
        """V = marks / raters (B, 1, *spatial), float32, in [0, 1]."""
        return self.marks.sum(dim=1, keepdim=True) / _spread(self.present.sum(dim=1, keepdim=True), self.marks)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_i weights_i * vote_i (B, 1, *spatial), float32; weights (B, R)."""
        return torch.einsum("br,br...->b...", weights.to(self.marks.device), self.marks.float())[:, None]


def _spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, C) -> (B, C, 1 ...), with as many axes as `like`."""
    return values.reshape(*values.shape, *[1] * (like.ndim - 2))


class RaterTarget(Target):
    """Base of the rater targets.

    Args:
        task: with one region and `raters` N >= 1.
        decode: how maps are read as U, one of `decodings`; the first by default.

    Raises:
        SuiteError: several regions, no raters, an unknown decoding.
    """

    kind = "sigmoid"
    decodings: tuple[str, ...] = ("probability", "binary")
    loss_terms = 1  # the loss is multiplied by it, where a paper sums what the losses of the suite average

    def __init__(self, task: Task, decode: str | None = None) -> None:
        super().__init__(task)
        if len(task.regions) != 1:
            raise SuiteError(f"rater targets are for one region, the task has {list(task.regions)}; narrow it with task.regions=[...]")
        if task.raters < 1:
            raise SuiteError("rater targets need a data set with raters (data.raters of `folder`); this task has none")
        self.decoding = self.decodings[0] if decode is None else decode
        self.check(self.decoding)
        self._foreground = nesting(task)[0][2]

    def check(self, decoding: str) -> None:
        """Refuses a decoding that the target does not have."""
        if decoding not in self.decodings:
            raise unknown(f"decoding (model.target.decode, model.decodings) of {type(self).__name__}", decoding, self.decodings)

    @property
    def out_channels(self) -> int:
        return 1

    def learn(self, case: str, raters: torch.Tensor) -> None:
        """Takes in a training case before training; `raters` class indices (R, x, y, z) of the whole case, all present."""

    def state(self) -> dict:
        """What `learn` found that prediction needs, plain data for checkpoints."""
        return {}

    def load(self, state: dict) -> None:
        """The inverse of `state`."""

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        raise SuiteError(f"{type(self).__name__} learns from raters: use model=multi_rater")

    def encode_raters(
        self, raters: torch.Tensor, present: torch.Tensor, cases: list[str], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """What the loss compares logits with (B, 1 or K, *spatial); -1 where a rater who is present says -1.

        Args:
            raters: class indices (B, R, *spatial), -1 = ignore; raters a case lacks come last and are False in `present` (B, R).
            cases: ids; targets that fuse know them from `learn`.
        """
        there = _spread(present, raters)
        marks = self.task.region_masks(raters)[0] & there
        target = self.combine(Votes(marks, present, cases, generator))
        return torch.where(((raters == IGNORE) & there).any(dim=1, keepdim=True), IGNORE, target)

    @abstractmethod
    def combine(self, votes: Votes) -> torch.Tensor:
        """The target without regard to ignored voxels: class indices (B, 1, *spatial), or (B, K, *spatial) in [0, 1] with -1 = ignore."""

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()

    def decode(self, maps: torch.Tensor) -> torch.Tensor:
        return self.read(maps, self.decoding)

    def read(self, maps: torch.Tensor, decoding: str) -> torch.Tensor:
        """Maps (B, K, *spatial) of whole cases -> U (B, 1, *spatial) in [0, 1] by one of `decodings`."""
        return (maps > 0.5 if decoding == "binary" else maps).float().mean(dim=1, keepdim=True)

    def labels(self, regions: torch.Tensor) -> torch.Tensor:
        return ((regions[:, 0] > 0.5) * self._foreground).to(torch.int8)


class AgreementClasses(RaterTarget):
    """Each number of agreeing raters is a class (Zukovec et al., BrainLes 2021, Eq. 1-2): N + 1 softmax classes "marked by exactly c".

    A case with n of the N raters is stretched: class round(M * N / n), halves to the even class.

    Args:
        decode: `argmax` (the paper: U = arg-max / N), `expectation` (U = sum_c c p_c / N, its future work) or `median` (the first c
            whose cumulative probability reaches 1/2).
        keep_largest: `auto`: of class c only the largest component is kept where class c is one component in every training case
            that has it (the paper's rule); `all`: of every class; `off`. What is dropped becomes class 0. Components touch by face,
            edge or corner. For `argmax` and `median`; an expectation has no classes and is left as it is.

    Raises:
        SuiteError: an unknown `decode` or `keep_largest`.
    """

    kind = "softmax"
    decodings = ("argmax", "expectation", "median")

    def __init__(self, task: Task, decode: str = "argmax", keep_largest: str = "auto") -> None:
        super().__init__(task, decode)
        if keep_largest not in ("auto", "off", "all"):
            raise unknown("model.target.keep_largest", keep_largest, ["auto", "off", "all"])
        self.keep_largest = keep_largest
        self._pieces: dict[int, int] = {}  # class -> most components of it in a training case

    @property
    def out_channels(self) -> int:
        return self.task.raters + 1

    def learn(self, case: str, raters: torch.Tensor) -> None:
        if self.keep_largest != "auto":
            return
        level = self.encode_raters(raters[None], torch.ones(1, len(raters), dtype=torch.bool), [case])[0, 0].numpy()
        for c in np.unique(level[level > 0]).tolist():
            self._pieces[c] = max(self._pieces.get(c, 0), components(level == c)[1])

    def state(self) -> dict:
        return {"pieces": dict(self._pieces)}

    def load(self, state: dict) -> None:
        self._pieces = dict(state["pieces"])

    def single(self) -> list[int]:
        """The classes of which only the largest component is kept."""
        if self.keep_largest == "auto":
            return sorted(c for c, most in self._pieces.items() if most == 1)
        return list(range(1, self.out_channels)) if self.keep_largest == "all" else []

    def combine(self, votes: Votes) -> torch.Tensor:
        return (votes.share * self.task.raters).round().long()

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(dim=1)

    def read(self, maps: torch.Tensor, decoding: str) -> torch.Tensor:
        if decoding == "expectation":
            values = torch.arange(self.out_channels, device=maps.device, dtype=maps.dtype)
            return torch.einsum("c,bc...->b...", values, maps)[:, None].div(self.task.raters).clamp(0, 1)
        median = (maps.cumsum(dim=1)[:, :-1] < 0.5).sum(dim=1, keepdim=True)
        level = maps.argmax(dim=1, keepdim=True) if decoding == "argmax" else median
        for c in self.single():
            for one in level[:, 0]:
                one[_minor_components(one == c)] = 0
        return level / self.task.raters


def _minor_components(mask: torch.Tensor) -> torch.Tensor:
    """All of a mask (*spatial), bool, but its largest component."""
    found, count = components(mask.cpu().numpy())
    if count < 2:
        return torch.zeros_like(mask)
    largest = np.bincount(found.ravel())[1:].argmax() + 1
    return torch.from_numpy((found > 0) & (found != largest)).to(mask.device)


class AtLeast(RaterTarget):
    """One mask: what enough raters marked.

    Args:
        level: `majority` (more than half of a case's raters), `consensus` (all of them), or k: at least k of the N raters, in a case
            with n of them at least the share k / N.

    Raises:
        SuiteError: a level that is neither, or outside of 1 to N.
    """

    def __init__(self, task: Task, level: str | int = "majority", decode: str | None = None) -> None:
        super().__init__(task, decode)
        if level not in ("majority", "consensus") and not (isinstance(level, int) and 1 <= level <= task.raters):
            raise SuiteError(f"model.target.level={level}: expected majority, consensus, or a number from 1 to {task.raters}")
        self.level = level

    def combine(self, votes: Votes) -> torch.Tensor:
        if self.level == "majority":
            return (votes.share > 0.5).float()
        share = 1.0 if self.level == "consensus" else self.level / self.task.raters
        return (votes.share > share - 1e-6).float()


class Fused(RaterTarget):
    """Base of targets that weigh the raters of a case by what `learn` finds in the whole case: crops and augmentation change nothing."""

    def __init__(self, task: Task, decode: str | None = None) -> None:
        super().__init__(task, decode)
        self._fitted: dict[str, tuple[float, torch.Tensor]] = {}

    def learn(self, case: str, raters: torch.Tensor) -> None:
        valid = (raters != IGNORE).all(dim=0)
        self._fitted[case] = self.fit(self.task.region_masks(raters)[0], valid)

    @abstractmethod
    def fit(self, masks: torch.Tensor, valid: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Bias and weights (R,) of one case from its masks (R, *spatial)."""

    def evidence(self, votes: Votes) -> torch.Tensor:
        """bias + sum_i weights_i * vote_i (B, 1, *spatial), float32."""
        bias, weights = zip(*(self._fitted[case] for case in votes.cases), strict=True)
        padded = torch.zeros(votes.present.shape)
        for row, own in zip(padded, weights, strict=True):
            row[: len(own)] = own
        return _spread(torch.tensor(bias, device=votes.marks.device)[:, None], votes.marks) + votes.weighted(padded)


class Staple(Fused):
    """The STAPLE estimate of each training case (Warfield et al., IEEE TMI 23, 2004).

    Args:
        soft: learn its probability instead of where that is above 1/2.
    """

    def __init__(self, task: Task, soft: bool = False, decode: str | None = None) -> None:
        super().__init__(task, decode)
        self.soft = soft

    def fit(self, masks: torch.Tensor, valid: torch.Tensor) -> tuple[float, torch.Tensor]:
        fitted = staple(masks, valid)
        return fitted.bias, fitted.weights.float()

    def combine(self, votes: Votes) -> torch.Tensor:
        evidence = self.evidence(votes)
        return evidence.sigmoid() if self.soft else (evidence > 0).float()


class Simple(Fused):
    """The SIMPLE estimate of each training case (Langerak et al., IEEE TMI 29, 2010).

    Args:
        deviations: raters whose Dice is so many standard deviations below the mean are dropped.
    """

    def __init__(self, task: Task, deviations: NotNegative = 1.0, decode: str | None = None) -> None:
        super().__init__(task, decode)
        self.deviations = deviations

    def fit(self, masks: torch.Tensor, valid: torch.Tensor) -> tuple[float, torch.Tensor]:
        return -0.5, simple(masks, valid, self.deviations).float()

    def combine(self, votes: Votes) -> torch.Tensor:
        return (self.evidence(votes) > 1e-6).float()


class SoftLabel(RaterTarget):
    """The share of raters V itself."""

    def combine(self, votes: Votes) -> torch.Tensor:
        return votes.share


class RandomRater(RaterTarget):
    """One rater, drawn anew for every sample and iteration: each (image, rater) pair is a sample of its own."""

    def combine(self, votes: Votes) -> torch.Tensor:
        chosen = torch.multinomial(votes.present.float(), 1, generator=votes.generator)[:, 0]
        return votes.marks[torch.arange(len(chosen), device=chosen.device), chosen][:, None].float()


class DecoderPerRater(RaterTarget):
    """Every rater has an output (and, with `own_decoders`, a decoder) of its own, the encoder is shared; the loss is summed over raters.

    "U-Net-and-a-half" (Zhang et al., arXiv:2108.04658, 2021). Raters are told apart by their order; those a case lacks teach nothing (the others then weigh more). U is the mean
    over the outputs, of probabilities or of masks.
    """

    @property
    def out_channels(self) -> int:
        return self.task.raters

    @property
    def loss_terms(self) -> int:
        """One for each decoder: the losses of the suite average over channels, the paper adds."""
        return self.task.raters

    def combine(self, votes: Votes) -> torch.Tensor:
        shape = (votes.marks.shape[0], self.task.raters, *votes.marks.shape[2:])
        target = torch.full(shape, float(IGNORE), device=votes.marks.device)
        target[:, : votes.marks.shape[1]] = torch.where(_spread(votes.present, votes.marks), votes.marks.float(), IGNORE)
        return target
