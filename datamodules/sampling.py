"""Sampling policies: where in a case a training patch, slice or slab is cut. Chosen by name; every draw comes from the generator given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative, Share, Whole

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sampling:
    """Args:
    name: `uniform`; `foreground` (with probability `share` the patch is centred on a random voxel of a random foreground class that the
        case has, as nnU-Net does with 0.33); `per_class` (a class is drawn by `weights`, then one of its voxels); `positive_slice` (for
        slices and slabs: with probability `share` a slice that holds foreground, else one that holds none); `lesion_center` (the patch is
        centered on the box around all foreground, moved by up to `jitter` voxels along each axis; a case without any is a uniform draw).
    share: probability of a foreground draw.
    weights: class name -> relative weight, for `per_class`; classes that a case lacks drop out; `background` is a uniform draw. Without
        weights all foreground classes weigh the same.
    jitter: largest move along each axis, in voxels, for `lesion_center`; every whole number up to it is as likely.
    """

    name: str = "foreground"
    share: Share = 0.33
    weights: Mapping[str, NotNegative] = field(default_factory=dict)
    jitter: Whole = 0

    def __post_init__(self) -> None:
        if self.name not in _POLICIES:
            raise unknown("sampling policy (data.sampling.name)", self.name, _POLICIES)
        if not 0 <= self.share <= 1:
            raise SuiteError(f"data.sampling.share={self.share} is a probability: expected 0..1")

    def box(
        self,
        rng: np.random.Generator,
        shape: Sequence[int],
        patch: Sequence[int],
        foreground: Mapping[int, np.ndarray],
        classes: Sequence[str],
        slice_axis: int,
    ) -> Box:
        """Where to cut: (start, stop) per axis, exactly `patch` large; reaches past the borders only where the case is smaller.

        `foreground` maps class index to voxel coordinates (n, 3); it is empty for unlabeled cases, and every policy is then uniform.
        """
        centre = _POLICIES[self.name](self, rng, shape, foreground, classes, slice_axis)
        box = []
        for axis, (size, want) in enumerate(zip(shape, patch, strict=True)):
            room = size - want
            if room < 0:  # smaller than the patch: centred, padded evenly
                start = room // 2
            elif centre is None or centre[axis] < 0:
                start = int(rng.integers(0, room + 1))
            else:
                start = int(np.clip(centre[axis] - want // 2, 0, room))
            box.append((start, start + want))
        return tuple(box)


def _uniform(policy: Sampling, rng: np.random.Generator, *_: object) -> np.ndarray | None:
    return None


def _foreground(
    policy: Sampling, rng: np.random.Generator, shape: Sequence[int], foreground: Mapping[int, np.ndarray], *_: object
) -> np.ndarray | None:
    present = [c for c in sorted(foreground) if c > 0 and len(foreground[c])]
    if rng.random() >= policy.share or not present:
        return None
    voxels = foreground[present[rng.integers(len(present))]]
    return voxels[rng.integers(len(voxels))]


def _per_class(
    policy: Sampling,
    rng: np.random.Generator,
    shape: Sequence[int],
    foreground: Mapping[int, np.ndarray],
    classes: Sequence[str],
    *_: object,
) -> np.ndarray | None:
    for name in policy.weights:
        if name not in classes:
            raise unknown("class in data.sampling.weights", name, classes)
    present = [0, *(c for c in sorted(foreground) if c > 0 and len(foreground[c]))]
    weights = [float(policy.weights.get(classes[c], 0.0 if policy.weights else c > 0)) for c in present]
    total = sum(weights)
    drawn = present[rng.choice(len(present), p=[w / total for w in weights])] if total else 0
    return foreground[drawn][rng.integers(len(foreground[drawn]))] if drawn else None


def _positive_slice(
    policy: Sampling,
    rng: np.random.Generator,
    shape: Sequence[int],
    foreground: Mapping[int, np.ndarray],
    classes: Sequence[str],
    axis: int,
) -> np.ndarray | None:
    if not foreground:
        return None
    voxels = [v[:, axis] for c, v in foreground.items() if c > 0 and len(v)]
    positive = np.unique(np.concatenate(voxels)) if voxels else np.array([], dtype=int)
    negative = np.setdiff1d(np.arange(shape[axis]), positive)
    wanted = positive if rng.random() < policy.share else negative
    wanted = wanted if len(wanted) else (positive if len(positive) else negative)
    centre = np.full(3, -1)
    centre[axis] = wanted[rng.integers(len(wanted))]
    return centre


def _lesion_center(
    policy: Sampling, rng: np.random.Generator, shape: Sequence[int], foreground: Mapping[int, np.ndarray], *_: object
) -> np.ndarray | None:
    voxels = [v for c, v in sorted(foreground.items()) if c > 0 and len(v)]
    if not voxels:
        return None
    found = np.concatenate(voxels)  # one of every slice that holds the class is among them, so that the box is exact
    middle = (found.min(axis=0).astype(int) + found.max(axis=0) + 1) // 2
    moved = middle + rng.integers(-policy.jitter, policy.jitter + 1, size=len(middle))
    return np.clip(moved, 0, np.asarray(shape) - 1)


_POLICIES: dict[str, Callable[..., np.ndarray | None]] = {
    "uniform": _uniform,
    "foreground": _foreground,
    "per_class": _per_class,
    "positive_slice": _positive_slice,
    "lesion_center": _lesion_center,
}
