"""The task: what goes in, what is to be segmented, and how it is written on disk. Owned by the data, read by everything else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from lesionbench.errors import SuiteError, unknown

BACKGROUND = "background"
IGNORE = -1


@dataclass(frozen=True)
class Task:
    """Channels, classes and regions of a segmentation task.

    Args:
        channels: input channel names, in the order of the image tensor.
        classes: class name -> its values on disk (the first is the one written). `background` comes first and holds 0. The index
            of a name is its class index inside the suite.
        regions: region name -> names of the classes it unites, outermost region first. Any two regions are nested or disjoint.
            Defaults to one region per foreground class.
        raters: largest number of raters per case; 0 where there is one label map.
        slice_axis: axis of the canonical (RAS) array along which 2D and 2.5D views are cut: 0 is sagittal, 1 coronal, 2 axial.
        unit: `mm` where the spacing is real, `vox` for data without geometry.
        ignore: values on disk that are left out of losses and metrics.
        inputs: further input channels, behind those of the image: `brain_mask`, or per-case maps by name (see `data.extra_maps`).

    Raises:
        SuiteError: a name that is a channel and an input, an axis that there is not, classes without background, shared disk values, unknown classes in a region, a region that is empty or holds
            background, or regions that overlap without nesting.
    """

    channels: tuple[str, ...]
    classes: Mapping[str, tuple[int, ...]]
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    raters: int = 0
    slice_axis: int = 2
    unit: str = "mm"
    ignore: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        classes = {k: _ints(v) for k, v in dict(self.classes).items()}
        regions = {k: tuple(v) for k, v in dict(self.regions).items()} or {k: (k,) for k in list(classes)[1:]}
        plain = {"channels": tuple(self.channels), "ignore": _ints(self.ignore), "inputs": tuple(self.inputs)}
        for name, value in {**plain, "classes": classes, "regions": regions}.items():
            object.__setattr__(self, name, value)
        if len({*self.channels, *self.inputs}) < len(self.channels) + len(self.inputs):
            raise SuiteError(f"task: a name stands twice in channels={list(self.channels)} and inputs={list(self.inputs)}")
        if not classes or next(iter(classes)) != BACKGROUND or 0 not in classes[BACKGROUND]:
            raise SuiteError(f"task.classes must begin with '{BACKGROUND}: 0'; got {classes}")
        values = [v for vs in classes.values() for v in vs] + list(self.ignore)
        if len(values) != len(set(values)):
            raise SuiteError(f"task.classes: a value on disk belongs to two classes: {classes}, ignore {self.ignore}")
        for region, members in regions.items():
            for member in members:
                if member not in classes:
                    raise unknown(f"class in region {region}", member, classes)
            if not members or BACKGROUND in members:
                raise SuiteError(f"task.regions.{region}: expected one foreground class or more, got {list(members)}")
        for a, first in regions.items():
            for b, second in regions.items():
                if set(first) & set(second) and not (set(first) <= set(second) or set(second) <= set(first)):
                    raise SuiteError(f"task.regions: {a} and {b} overlap without one holding the other")
        if self.slice_axis not in (0, 1, 2):
            raise SuiteError(f"task.slice_axis={self.slice_axis}: expected 0 (sagittal slices), 1 (coronal) or 2 (axial)")
        if self.unit not in ("mm", "vox"):
            raise unknown("task.unit", self.unit, ["mm", "vox"])

    @property
    def in_channels(self) -> int:
        """Channels that a network gets: those of the image and the further inputs."""
        return len(self.channels) + len(self.inputs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by class index; 0 is background."""
        return tuple(self.classes)

    @property
    def region_names(self) -> tuple[str, ...]:
        """Region names in the suite-wide order."""
        return tuple(self.regions)

    @property
    def region_matrix(self) -> np.ndarray:
        """Membership (R, C), bool: region r unites the classes with True."""
        return np.array([[c in members for c in self.classes] for members in self.regions.values()], dtype=bool).reshape(
            -1, len(self.classes)
        )

    def region_values(self) -> dict[str, set[int]]:
        """Region -> the values on disk of its voxels."""
        return {region: {value for c in members for value in self.classes[c]} for region, members in self.regions.items()}

    def region_masks(self, labels: torch.Tensor) -> torch.Tensor:
        """Class indices (...,) -> region masks (R, ...), bool; ignored voxels belong to no region."""
        table = torch.from_numpy(np.concatenate([self.region_matrix, np.zeros((len(self.regions), 1), bool)], axis=1)).to(labels.device)
        return table[:, labels.long()]  # index -1 (ignore) picks the appended False column

    def from_disk(self, values: np.ndarray) -> np.ndarray:
        """Values on disk -> class indices, int8 (-1 = ignore).

        Raises:
            SuiteError: a value that is no class; names the value and the known ones.
        """
        labels = np.full(values.shape, -2, dtype=np.int8)
        for index, known in enumerate(self.classes.values()):
            labels[np.isin(values, known)] = index
        if self.ignore:
            labels[np.isin(values, self.ignore)] = IGNORE
        if (labels == -2).any():
            strange = np.unique(values[labels == -2])[:8].tolist()
            raise SuiteError(f"unknown label value(s) {strange}; known: {dict(self.classes)}, ignored: {list(self.ignore)}")
        return labels

    def to_disk(self, labels: np.ndarray) -> np.ndarray:
        """Class indices -> values on disk, in the smallest integer type that holds every value of the task and that NIfTI-1 readers know."""
        first = np.array([v[0] for v in self.classes.values()])
        fitting = next(
            t
            for t in (np.uint8, np.int16, np.uint16, np.int32, np.int64)
            if np.iinfo(t).min <= first.min() and first.max() <= np.iinfo(t).max
        )
        return first.astype(fitting)[np.maximum(labels, 0)]

    def narrowed(
        self,
        channels: Sequence[str] | None = None,
        regions: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        inputs: Sequence[str] | None = None,
        slice_axis: int | None = None,
    ) -> "Task":
        """The task with only these channels and regions; regions may be new ones, name -> classes, as for `Task`. `inputs` are further ones,
        `slice_axis` is the axis to cut slices along instead of the data set's.

        Classes that no region tells apart become one class.

        Raises:
            SuiteError: an unknown channel or region; new regions or an axis that `Task` refuses.
        """
        if slice_axis is not None:
            return Task(**{**self.to_dict(), "slice_axis": slice_axis}).narrowed(channels, regions, inputs)
        if inputs is not None:
            return Task(**{**self.to_dict(), "inputs": tuple(inputs)}).narrowed(channels, regions)
        if isinstance(regions, Mapping):
            return Task(**{**self.to_dict(), "regions": regions}).narrowed(channels, list(regions))
        for kind, wanted, known in [("channel", channels, self.channels), ("region", regions, self.regions)]:
            for name in wanted or ():
                if name not in known:
                    raise unknown(kind, name, known)
        if regions is None:
            return self if channels is None else Task(**{**self.to_dict(), "channels": tuple(channels)})
        kept = {r: self.regions[r] for r in self.regions if r in regions}
        groups: dict[tuple[bool, ...], list[str]] = {(False,) * len(kept): []}
        for c in self.classes:
            groups.setdefault(tuple(c in members for members in kept.values()), []).append(c)
        name_of = {c: BACKGROUND if not any(k) else "+".join(cs) for k, cs in groups.items() for c in cs}
        classes = {name_of[cs[0]]: tuple(v for c in cs for v in self.classes[c]) for cs in groups.values()}
        merged = {r: tuple(dict.fromkeys(name_of[c] for c in members)) for r, members in kept.items()}
        return Task(**{**self.to_dict(), "channels": tuple(channels or self.channels), "classes": classes, "regions": merged})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for checkpoints and result files."""
        d = asdict(self)
        return {
            k: {n: list(v) for n, v in x.items()} if isinstance(x, dict) else list(x) if isinstance(x, tuple) else x for k, x in d.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Task":
        """The inverse of `to_dict`."""
        return cls(**data)


def _ints(values: int | Iterable[int]) -> tuple[int, ...]:
    return (int(values),) if isinstance(values, int) else tuple(int(v) for v in values)


def joined(tasks: Sequence[Task]) -> Task:
    """One task with the regions of several that were narrowed to some of them each (see `Task.narrowed`), larger ones first; the rest is that
    of the first task. Classes get back the names that they had, as far as regions tell them apart.

    Raises:
        SuiteError: a region that has other values in another task, two regions of the same values, or some that overlap without nesting.
    """
    regions: dict[str, set[int]] = {}
    names: dict[str, list[str]] = {}  # of the classes before they were merged
    for task in tasks:
        for region, values in task.region_values().items():
            if regions.setdefault(region, values) != values:
                raise SuiteError(f"region {region} has the values {sorted(values)} in one checkpoint, {sorted(regions[region])} in another")
            twin = next((other for other, held in regions.items() if held == values and other != region), None)
            if twin is not None:
                raise SuiteError(f"regions {twin} and {region} both have the values {sorted(values)}")
            names.setdefault(region, [name for merged in task.regions[region] for name in merged.split("+")])
    order = sorted(regions, key=lambda region: -len(regions[region]))
    known = dict.fromkeys(v for task in tasks for values in task.classes.values() for v in values)  # the first of a class is written
    found: dict[str, tuple[int, ...]] = {}
    for region in order:
        inner = [other for other in order if regions[other] < regions[region]]
        rest = tuple(v for v in known if v in regions[region] and not any(v in regions[other] for other in inner))
        own = [name for name in names[region] if not any(name in names[other] for other in inner)] or [region]
        if rest:
            found["+".join(own)] = rest
    places = list(dict.fromkeys(name for region in order for name in (*names[region], region)))
    classes = {BACKGROUND: tuple(v for v in known if not any(v in values for values in regions.values()))}
    classes |= dict(sorted(found.items(), key=lambda item: places.index(item[0].partition("+")[0])))
    members = {region: tuple(c for c, held in classes.items() if set(held) <= regions[region]) for region in order}
    return Task(**{**tasks[0].to_dict(), "classes": classes, "regions": members})
