"""Spacing, patch, batch and depth of a U-Net from the data, by nnU-Net's rules (Isensee et al., Nature Methods 2021, Supplementary Note 2; version 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.preprocessing import Preprocessing, preprocess
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lesionbench.written import whole

ANISOTROPIC = 3  # spacing of one axis through the largest of the others from which it is treated on its own
MIN_EDGE = 4  # voxels along an axis at the lowest resolution
BASE_FEATURES, MAX_FEATURES, CONVOLUTIONS = 32, 320, 2  # per level
REFERENCE, REFERENCE_GIB, REFERENCE_BATCH = 560_000_000, 8.0, 2  # values in feature maps that fit into so much memory with such a batch
COVERED = 0.05  # of the voxels of the data set that a batch may hold


@dataclass(frozen=True)
class Fingerprint:
    """What the plan depends on, axes along right, anterior, superior.

    Attributes:
        spacings: mm, (N, 3).
        shapes: of the boxes around the foreground, (N, 3).
        shrinks: median volume of those boxes as a share of the whole volumes.
        channels: names.
        classes: with background.
    """

    spacings: np.ndarray
    shapes: np.ndarray
    shrinks: float
    channels: tuple[str, ...]
    classes: int


@dataclass(frozen=True)
class Plan:
    """A configuration and its reasons.

    Attributes:
        spacing: mm to resample to; shape: median of the resampled boxes; patch, batch_size: of training.
        strides, kernels, features: of every level, finest first.
        normalize: see `Preprocessing`.
        reasons: what was decided and why, in order.
    """

    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    patch: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    normalize: str
    reasons: tuple[tuple[str, str, str], ...]

    def experiment(self) -> dict[str, Any]:
        """As an experiment's configuration, for `model/network=dynunet`."""
        return {
            "patch": list(self.patch),
            "model": {"network": {"features": list(self.features), "kernels": _lists(self.kernels), "strides": _lists(self.strides)}},
            "data": {
                "batch_size": self.batch_size,
                "preprocessing": {"spacing": [round(float(v), 6) for v in self.spacing], "crop": "foreground", "normalize": self.normalize},
            },
        }


def fingerprint(cases: Sequence[Case], task: Task, header: str = "auto", tell: Callable[[int], None] = lambda count: None) -> Fingerprint:
    """Reads every case once. `tell` gets the number of cases read.

    Raises:
        SuiteError: no cases, and what `preprocess` finds wrong.
    """
    if not cases:
        raise SuiteError("a plan needs cases, and there are none")
    spacings, shapes, shares = [], [], []
    for number, case in enumerate(cases, start=1):
        geometry = preprocess(case, task, Preprocessing(header=header), with_label=False).geometry
        box = [stop - start for start, stop in geometry.crop]
        spacings.append(geometry.spacing)
        shapes.append(box)
        shares.append(np.prod(box) / np.prod(geometry.canonical))
        tell(number)
    return Fingerprint(np.array(spacings), np.array(shapes), float(np.median(shares)), task.channels, len(task.classes))


def plan(found: Fingerprint, memory_gib: float = REFERENCE_GIB) -> Plan:
    """The configuration of nnU-Net's `3d_fullres` for this memory of a GPU.

    Raises:
        SuiteError: memory that is no positive number, or too little for the smallest patch.
    """
    if not memory_gib > 0:
        raise SuiteError(f"plan.memory_gib={memory_gib}: a positive number of GiB")
    # nnU-Net's axes: those of the file backwards, the coarsest first; they decide which of equal axes is shortened
    spacings, shapes = found.spacings[:, ::-1], found.shapes[:, ::-1]
    target, why = _target_spacing(spacings, shapes)
    order = [int(np.argmax(target)), *(a for a in range(3) if a != int(np.argmax(target)))]
    spacing = target[order]
    resampled = np.array([np.round(s * old / target).astype(int) for s, old in zip(shapes, spacings, strict=True)])
    shape = np.median(resampled[:, order], axis=0)
    first = _first_patch(spacing, shape)
    topology = _topology(spacing, first)
    limit, reduced = REFERENCE * memory_gib / REFERENCE_GIB, 0
    while (used := _feature_values(topology, found.classes)) > limit:
        patch = list(topology.patch)
        axis = int(np.argsort([p / s for p, s in zip(patch, shape, strict=True)])[-1])
        shorter = [p - topology.divisor[axis] if a == axis else p for a, p in enumerate(patch)]
        divisor = _topology(spacing, shorter).divisor if min(shorter) > 0 else (0, 0, 0)
        patch[axis] -= divisor[axis]
        if divisor[axis] == 0 or min(patch) < MIN_EDGE:
            raise SuiteError(f"plan.memory_gib={memory_gib}: too little for any patch of these data")
        topology, reduced = _topology(spacing, patch), reduced + 1
    fitting = round(limit / used * REFERENCE_BATCH)
    covered = round(len(shapes) * float(np.prod(shape)) * COVERED / float(np.prod(topology.patch)))
    batch = max(min(fitting, covered), REFERENCE_BATCH)
    back = [order.index(axis) for axis in range(3)][::-1]  # to right, anterior, superior

    def ours(values: Sequence[Any]) -> tuple:
        return tuple(values[a] for a in back)

    features = tuple(min(MAX_FEATURES, BASE_FEATURES * 2**level) for level in range(len(topology.strides)))
    normalize, of_channel = _normalization(found.channels)
    shown = tuple(int(v) for v in ours(shape))
    patch = tuple(int(v) for v in ours(topology.patch))
    reasons = (
        ("spacing", " x ".join(f"{v:.4g}" for v in ours(spacing)) + " mm", why),
        ("median shape", " x ".join(map(str, shown)), f"of the boxes around the foreground, {found.shrinks:.0%} of the volumes, resampled"),
        ("patch", " x ".join(map(str, patch)), f"begins at {' x '.join(str(int(v)) for v in ours(first))}, as much of the median shape as 256^3 voxels show"
            + (f"; shortened {reduced} times, where it covers most, until it fits into {memory_gib:g} GiB" if reduced else "")),
        ("levels", str(len(topology.strides)), f"halved along axes whose spacing is below twice the finest, down to {MIN_EDGE} voxels"),
        ("batch size", str(batch), f"{fitting} would fit" + (f", {covered} are {COVERED:.0%} of all voxels" if covered < fitting else "") + (f", {REFERENCE_BATCH} are the least" if batch == REFERENCE_BATCH else "")),
        ("features", ", ".join(map(str, features)), f"doubled from {BASE_FEATURES} to at most {MAX_FEATURES}"),
        ("normalization", normalize, of_channel),
        ("feature maps", f"{used / 1e6:.0f} M values", f"{REFERENCE / 1e6:.0f} M count as {REFERENCE_GIB:g} GiB for a batch of {REFERENCE_BATCH}"),
    )  # fmt: skip
    return Plan(
        spacing=tuple(float(v) for v in ours(spacing)),
        shape=shown,
        patch=patch,
        batch_size=batch,
        strides=tuple(ours(s) for s in topology.strides),
        kernels=tuple(ours(k) for k in topology.kernels),
        features=features,
        normalize=normalize,
        reasons=reasons,
    )


def write_experiment(made: Plan, path: Path, root: Path) -> Path:
    """Writes a plan as the configuration of an experiment, reasons as comments.

    Args:
        root: of the data set, for its first line.
    """
    from omegaconf import OmegaConf

    lines = ["# @package _global_", f"# Planned by nnU-Net's rules for the data under {root.name}"]
    lines += [f"# {name}: {value} ({reason})" for name, value, reason in made.reasons]
    lines += ["defaults: [override /model/network: dynunet]", OmegaConf.to_yaml(OmegaConf.create(made.experiment())).rstrip()]
    with whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return Path(path)


@dataclass(frozen=True)
class _Topology:
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]  # padded to what the strides divide
    divisor: tuple[int, ...]


def _target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, str]:
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPIC * max(target[others])
    few = size[worst] * ANISOTROPIC < min(size[others])
    if not (coarse and few):
        return target, "the median of the cases"
    tenth = float(np.percentile(spacings[:, worst], 10))
    if tenth < max(target[others]):
        tenth = max(max(target[others]), tenth) + 1e-5
    target = target.copy()
    target[worst] = tenth
    return target, "the median of the cases, of the coarse axis the 10th percentile"


def _first_patch(spacing: np.ndarray, shape: np.ndarray) -> list[float]:
    """Half a voxel of a median between two shapes stays, as in nnU-Net: it is filled up to what the strides divide."""
    ratio = 1 / spacing
    wanted = [round(float(v)) for v in ratio * (256**3 / np.prod(ratio)) ** (1 / 3)]
    return [float(min(w, s)) for w, s in zip(wanted, shape, strict=True)]


def _topology(spacing: Sequence[float], patch: Sequence[float]) -> _Topology:
    """Where to halve: while an axis has twice the least edge, those whose spacing is below twice the finest of them."""
    now, size = [float(v) for v in spacing], [float(v) for v in patch]
    strides, kernels, kernel, pools = [(1, 1, 1)], [], [1, 1, 1], [0, 0, 0]
    while True:
        large = [a for a in range(3) if size[a] >= 2 * MIN_EDGE]
        halved = [a for a in large if now[a] / min(now[b] for b in large) < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if k == 3 or now[a] / min(now) < 2 else 1 for a, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        for a in halved:
            pools[a], now[a], size[a] = pools[a] + 1, now[a] * 2, -(-size[a] // 2)
        strides.append(tuple(2 if a in halved else 1 for a in range(3)))
    kernels.append((3, 3, 3))
    divisor = tuple(2**p for p in pools)
    return _Topology(tuple(strides), tuple(kernels), tuple(int(-(-p // d)) * d for p, d in zip(patch, divisor, strict=True)), divisor)


def _feature_values(topology: _Topology, classes: int) -> int:
    """Values in the feature maps of a pass of one patch through nnU-Net's plain U-Net, as nnU-Net counts them (one head)."""
    size, sizes, total = list(topology.patch), [], 0
    features = [min(MAX_FEATURES, BASE_FEATURES * 2**level) for level in range(len(topology.strides))]
    for width, stride in zip(features, topology.strides, strict=True):
        size = [s // t for s, t in zip(size, stride, strict=True)]
        sizes.append(int(np.prod(size)))
        total += CONVOLUTIONS * width * sizes[-1]
    for width, voxels in zip(features[-2::-1], sizes[-2::-1], strict=True):
        total += (CONVOLUTIONS + 1) * width * voxels  # with the transposed convolution
    return total + classes * sizes[0]


def _normalization(channels: Sequence[str]) -> tuple[str, str]:
    if all(channel.lower() == "ct" for channel in channels):
        return "ct", "the channel is CT: clipped and scaled by what is labeled in the training cases"
    return "zscore", "no CT: mean and deviation of every case and channel, over its foreground"


def _lists(values: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(v) for v in values]
