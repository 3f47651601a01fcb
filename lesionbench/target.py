"""Targets: how labels become what a network is trained on, and how its output becomes region probabilities and labels again.

Owned by the model. `encode` makes the training target, `activate` turns logits into maps that may be averaged (over windows, mirrored
copies, ensemble members), `decode` turns averaged maps into region probabilities in the task's order, `labels` turns those into class
indices. Everything after `decode` is the same for every method.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping

import numpy as np
import torch
from torch.nn.functional import one_hot

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Share
from lesionbench.task import IGNORE, Task


class Target(ABC):
    """Base of all targets. `out_channels` is the number of logit channels K that the network must return.

    `kind` says what the channels are, and so which losses fit: `softmax`, exclusive classes, encoded as class indices (B, 1, *spatial);
    `sigmoid`, channels of their own, encoded as maps (B, K, *spatial) in [0, 1]; -1 = ignore in both. A target of a third kind defines
    `harden` and `as_maps` itself, and trains only with methods and losses that know its kind.
    """

    kind: str

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    @abstractmethod
    def out_channels(self) -> int: ...

    @abstractmethod
    def encode(self, label: torch.Tensor) -> torch.Tensor:
        """Class indices (B, 1, *spatial), -1 = ignore -> what the loss compares logits with."""

    @abstractmethod
    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *spatial) -> probabilities (B, K, *spatial) that can be averaged, float32."""

    @abstractmethod
    def decode(self, maps: torch.Tensor) -> torch.Tensor:
        """Averaged maps (B, K, *spatial) -> region probabilities (B, R, *spatial)."""

    @abstractmethod
    def labels(self, regions: torch.Tensor) -> torch.Tensor:
        """Region probabilities (B, R, *spatial) -> class indices (B, *spatial), int8."""

    @property
    def labeling(self) -> Hashable:
        """What `labels` depends on beside the task: targets that are equal in it make the same labels of the same probabilities."""
        return type(self).__qualname__

    def harden(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, *spatial) -> what is decided, as the loss takes it: class indices (B, 1, *spatial), or masks (B, K, *spatial), int8."""
        if self._exclusive("harden"):
            return logits.argmax(dim=1, keepdim=True)
        return (logits > 0).to(torch.int8)

    def as_maps(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded labels -> maps (B, K, *spatial) that probabilities compare with, and which voxels count (float, broadcasts to them)."""
        valid = (target != IGNORE).float()
        if self._exclusive("as_maps"):
            return one_hot(target[:, 0].long().clamp_min(0), self.out_channels).movedim(-1, 1).float(), valid
        return target.clamp_min(0).float(), valid

    def _exclusive(self, what: str) -> bool:
        if self.kind not in ("softmax", "sigmoid"):
            raise TypeError(f"{type(self).__name__} of kind '{self.kind}' must define {what}()")
        return self.kind == "softmax"


class ClassSoftmax(Target):
    """Mutually exclusive classes: softmax over all C classes; a region's probability is the sum over its classes.

    Needs regions that tell every class apart (`Task.narrowed` merges those that do not), so that class probabilities can be recovered
    from region probabilities and `labels` is the arg-max over classes.
    """

    kind = "softmax"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._atoms = atoms(task)

    @property
    def out_channels(self) -> int:
        return len(self.task.classes)

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        return label.long()

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(dim=1)

    def decode(self, maps: torch.Tensor) -> torch.Tensor:
        matrix = torch.from_numpy(self.task.region_matrix).to(maps)
        return torch.einsum("rc,bc...->br...", matrix, maps)

    def labels(self, regions: torch.Tensor) -> torch.Tensor:
        atom = torch.from_numpy(self._atoms).to(regions)
        best = (1 - torch.einsum("ar,br...->ba...", atom, regions).sum(dim=1)).clone()  # background
        labels = torch.zeros_like(best, dtype=torch.int8)
        for index in range(len(self.task.classes) - 1):
            probability = torch.einsum("r,br...->b...", atom[index], regions)
            wins = probability > best
            best = torch.where(wins, probability, best)
            labels[wins] = index + 1
        return labels


DECODINGS = ("nested", "paint", "supported")


class RegionSigmoid(Target):
    """Each region its own sigmoid (region-based training); voxels to ignore stay -1 in every channel of the target.

    A region is reached where its probability is above its threshold. `decoding` says where a region that is reached counts:

    - `nested`: only where the smallest region around it counts too;
    - `paint`: everywhere; regions are written from the outermost inwards, so that an inner one overwrites (Singh, BrainLes 2021; Wu and
      Lin, BrainLes 2021);
    - `supported`: everywhere, but a region that holds no other only where one of those around it is reached (for WT, TC and ET the table of Luu
      and Pavlovskiy, BrainLes 2021).

    Of several in the same region that are reached, the most probable counts.

    Args:
        task: regions nested or disjoint.
        threshold: of all regions, or region -> its own, 1/2 for those that are left out; between 0 and 1.
        decoding: one of `DECODINGS`.
        background: an additional last channel, what is in no region: losses see it, decoding leaves it out.

    Raises:
        SuiteError: a threshold out of range or of no region, an unknown decoding.
    """

    kind = "sigmoid"

    def __init__(
        self, task: Task, threshold: Share | Mapping[str, Share] = 0.5, decoding: str = "nested", background: bool = False
    ) -> None:
        super().__init__(task)
        if decoding not in DECODINGS:
            raise unknown("decoding (model.target.decoding)", decoding, DECODINGS)
        self.thresholds = _thresholds(task, threshold)
        self.decoding, self.background = decoding, background
        self._order = nesting(task)

    @property
    def out_channels(self) -> int:
        return len(self.task.regions) + self.background

    @property
    def labeling(self) -> Hashable:
        return type(self).__qualname__, self.thresholds, self.decoding

    def encode(self, label: torch.Tensor) -> torch.Tensor:
        masks = self.task.region_masks(label[:, 0]).transpose(0, 1).float()  # (B, R, *spatial)
        if self.background:
            masks = torch.cat([masks, 1 - masks.amax(dim=1, keepdim=True)], dim=1)
        return torch.where(label == IGNORE, torch.full_like(masks, IGNORE), masks)

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()

    def decode(self, maps: torch.Tensor) -> torch.Tensor:
        return maps[:, : len(self.task.regions)]

    def labels(self, regions: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(regions.shape[0], *regions.shape[2:], dtype=torch.int8, device=regions.device)
        reached = [regions[:, r] > threshold for r, threshold in enumerate(self.thresholds)]
        counts = list(reached)
        holder = {r: parent for r, parent, _ in self._order}
        for r, parent, own in self._order:
            if parent is not None and self.decoding == "nested":
                counts[r] = counts[r] & counts[parent]
            elif parent is not None and self.decoding == "supported" and r not in holder.values():
                counts[r] = counts[r] & torch.stack([reached[o] for o in _around(r, holder)]).any(dim=0)
            for rival in (s for s, other, _ in self._order if other == parent and s != r):
                counts[r] = counts[r] & ~(reached[rival] & (regions[:, rival] > regions[:, r]))
            labels[counts[r]] = own
        return labels


def _thresholds(task: Task, given: float | Mapping[str, float]) -> tuple[float, ...]:
    """One threshold per region, in the task's order."""
    of_region = dict(given) if isinstance(given, Mapping) else dict.fromkeys(task.regions, given)
    for region, threshold in of_region.items():
        if region not in task.regions:
            raise unknown("region (model.target.threshold)", region, task.regions)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
            raise SuiteError(f"model.target.threshold={threshold} (of {region}): expected a number between 0 and 1")
    return tuple(float(of_region.get(region, 0.5)) for region in task.regions)


def _around(region: int, holder: Mapping[int, int | None]) -> Iterator[int]:
    """The regions that hold a region, from the inside out."""
    outer = holder[region]
    while outer is not None:
        yield outer
        outer = holder[outer]


def nesting(task: Task) -> list[tuple[int, int | None, int]]:
    """(region, smallest region that holds it or None, class written for its voxels) from the outermost region inwards.

    The class of a region is the first that no smaller region inside it claims; a region that its inner regions fill completely writes
    the first class of its own, which an inner region then overwrites.
    """
    sets = [set(m) for m in task.regions.values()]
    order = sorted(range(len(sets)), key=lambda r: (-len(sets[r]), r))
    result = []
    for place, r in enumerate(order):
        holders = [o for o in order[:place] if sets[r] <= sets[o]]
        inner = set().union(*(sets[o] for o in order[place + 1 :] if sets[o] <= sets[r]))
        own = [c for c in task.classes if c in sets[r] and c not in inner] or [c for c in task.classes if c in sets[r]]
        result.append((r, holders[-1] if holders else None, task.class_names.index(own[0])))
    return result


def atoms(task: Task) -> np.ndarray:
    """Signed sum (C-1, R) that gives each foreground class's probability from region probabilities.

    Raises:
        SuiteError: regions that do not tell all classes apart.
    """
    try:
        solution = np.linalg.pinv(task.region_matrix[:, 1:].astype(float))
        if not np.allclose(solution @ task.region_matrix[:, 1:], np.eye(len(task.classes) - 1), atol=1e-6):
            raise np.linalg.LinAlgError
    except np.linalg.LinAlgError:
        raise SuiteError(
            f"softmax over classes needs regions that tell every class apart; {dict(task.regions)} does not. "
            "Narrow the task with task.regions=[...] (classes then merge), or use a region target."
        ) from None
    return np.round(solution, 6)
