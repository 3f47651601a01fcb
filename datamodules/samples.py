"""Keyed training samples: patches, slices and slabs cut from cached cases."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing, foreground, normalize_patch, outside
from datamodules.sampling import Box, Sampling
from datamodules.transforms.placement import Placement
from lesionbench.case import Case
from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator, torch_seeded
from lesionbench.maps import MapStore
from lesionbench.task import Task

VIEWS = ("patch", "slice", "slab", "voxels")


class KeyedSampler(Sampler):
    """Yields (epoch, position): all that a sample depends on besides the seed.

    Rank r of W gets positions r, r + W, ...: the union of all ranks' n-th batches is the n-th batch of one process with W times the
    batch size. `start()` gives (epoch, batches already done), so a run resumed in mid-epoch goes on with the next batch.
    """

    def __init__(self, batches: int, batch_size: int, rank: int, world: int, start: Callable[[], tuple[int, int]]) -> None:
        self.length, self.batch_size, self.rank, self.world, self.start = batches * batch_size, batch_size, rank, world, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, done = self.start()
        for local in range(done * self.batch_size, self.length):
            yield epoch, local * self.world + self.rank


class TrainingSamples(Dataset):
    """Training samples of one stream. Item (epoch, position) depends on nothing but (seed, stream, epoch, position).

    Args:
        patch: size of the sample along X, Y, Z; None = the whole volume. The slice axis is ignored by 2D and 2.5D views.
        view: `patch` (M, x, y, z), `slice` (M, H, W), `slab` (M, H, W, k) with the middle slice's label, `voxels` (N, M).
        maps: per-case map name -> interpolation under augmentation (`nearest` or `linear`), read from `store`.
        channel_dropout: probability with which each channel that the case has is missing from a sample: 0, and False in `channel_mask`, as
            of a case without its file. One channel at least is kept.
        repeat: None, or the number of samples drawn again and again without augmentation (to see whether a method can overfit).
    """

    def __init__(
        self,
        stream: str,
        cases: Sequence[Case],
        cache: CaseCache,
        task: Task,
        preprocessing: Preprocessing,
        sampling: Sampling,
        *,
        seed: int,
        labeled: bool = True,
        view: str = "patch",
        patch: Sequence[int] | None = None,
        slab: int = 3,
        voxels: int = 4096,
        augmentation: Callable | None = None,
        maps: Mapping[str, str] | None = None,
        store: MapStore | None = None,
        statistics: dict | None = None,
        channel_dropout: float = 0.0,
        repeat: int | None = None,
    ) -> None:
        self.channel_dropout = channel_dropout
        self.stream, self.cases, self.cache, self.task, self.preprocessing, self.sampling = (
            stream,
            list(cases),
            cache,
            task,
            preprocessing,
            sampling,
        )
        self.seed, self.labeled, self.view, self.patch, self.slab, self.voxels = seed, labeled, view, patch, slab, voxels
        self.augmentation, self.maps, self.store, self.statistics, self.repeat = augmentation, dict(maps or {}), store, statistics, repeat

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        epoch, position = where
        if self.repeat is not None:
            epoch, position = 0, position % self.repeat
        rng = numpy_generator(self.seed, "sample", self.stream, epoch, position)
        turn, place = divmod(position, len(self.cases))
        case = self.cases[numpy_generator(self.seed, "order", self.stream, epoch, turn).permutation(len(self.cases))[place]]
        sample = self._cut(case, rng, self._placement(epoch, position))
        if self.augmentation is not None and self.repeat is None:
            with torch_seeded(self.seed, "augment", self.stream, epoch, position):
                sample = self._augmented(sample, epoch)
        if self.channel_dropout and self.repeat is None:
            sample = self._without_channels(sample, numpy_generator(self.seed, "channel dropout", self.stream, epoch, position))
        sample = with_inputs(sample, self.task, case.id)
        known = {"attributes": case.attributes} if self.labeled else {}
        return {**self._viewed(sample, rng), "case": case.id, **known}

    def _placement(self, epoch: int, position: int) -> Placement:
        """How the sample will lie in its volume, where the augmentation says so."""
        placing = getattr(self.augmentation, "placement", None)
        if placing is None or self.repeat is not None:
            return Placement()
        with torch_seeded(self.seed, "placement", self.stream, epoch, position):
            return placing.draw(self.task.slice_axis if self.view in ("slice", "slab") else None)

    def _cut(self, case: Case, rng: np.random.Generator, placement: Placement) -> dict[str, torch.Tensor]:
        """One box out of a case: image, label, raters, brain mask, declared maps; all (C, x, y, z)."""
        cached = self.cache.open(case)
        voxels = cached.foreground if self.labeled else {}
        box = self.sampling.box(rng, cached.shape, self._size(cached.shape), voxels, self.task.class_names, self.task.slice_axis)
        box, repeats = self._slab_box(box, cached.shape)
        size = [b - a + (sum(repeats) if axis == self.task.slice_axis else 0) for axis, (a, b) in enumerate(box)]
        box = placement.grown(box)

        def read(f: Callable[[Box], np.ndarray]) -> torch.Tensor:
            array = f(box)
            array = array if array.ndim == 4 else array[None]
            if any(repeats):
                width = [(0, 0)] * 4
                width[1 + self.task.slice_axis] = repeats
                array = np.pad(array, width, mode="edge")
            return torch.from_numpy(np.ascontiguousarray(placement.mirror(array)))

        raw = read(cached.read)
        sample = {"brain_mask": torch.from_numpy(foreground(raw.numpy(), self.preprocessing.background))[None]}
        sample["image"] = torch.from_numpy(normalize_patch(raw.numpy(), cached.stats, self.preprocessing, self.statistics))
        if self.labeled and case.label is not None:
            sample["label"] = read(cached.label)
        if self.labeled and case.raters:
            sample["raters"] = read(cached.raters)
        for name in self.maps:
            if self.store is not None and self.store.has(name, case.id):
                sample[name] = read(lambda b, n=name: self.store.read(n, case.id, b))
        if placement.matrix is not None:
            linear = self._interpolated_linearly
            sample = {k: placement.resample(v, size, k in linear) for k, v in sample.items()}
        sample["outside"] = torch.from_numpy(outside(cached.stats, self.preprocessing, self.statistics))
        sample["channel_mask"] = torch.as_tensor(np.asarray(cached.channel_mask, dtype=bool))
        return sample

    def _size(self, shape: Sequence[int]) -> list[int]:
        size = list(shape if self.patch is None else self.patch)
        if len(size) == 2:
            size.insert(self.task.slice_axis, 1)
        if self.view in ("slice", "slab"):
            size[self.task.slice_axis] = 1
        return size

    def _slab_box(self, box: Box, shape: Sequence[int]) -> tuple[Box, tuple[int, int]]:
        """Widens a slice to a slab; returns how often the end slices must be repeated."""
        if self.view != "slab":
            return box, (0, 0)
        axis, half = self.task.slice_axis, self.slab // 2
        middle = box[axis][0]
        start, stop = max(middle - half, 0), min(middle + half + 1, shape[axis])
        widened = [*box[:axis], (start, stop), *box[axis + 1 :]]
        return tuple(widened), (start - (middle - half), (middle + half + 1) - stop)

    @property
    def _interpolated_linearly(self) -> set[str]:
        return {"image", *(n for n, mode in self.maps.items() if mode == "linear")}

    def _augmented(self, sample: dict[str, torch.Tensor], epoch: int) -> dict[str, torch.Tensor]:
        import torchio

        linear = self._interpolated_linearly
        spatial = {k: v for k, v in sample.items() if v.ndim == 4}
        thin = [axis for axis in (1, 2, 3) if sample["image"].shape[axis] == 1]
        for axis in thin:  # TorchIO cannot flip an axis of length one; two equal slices it can
            spatial = {k: v.repeat_interleave(2, dim=axis) for k, v in spatial.items()}
        make = {True: torchio.ScalarImage, False: torchio.LabelMap}
        images = {k: make[k in linear](tensor=_as_torchio(v, k in linear)) for k, v in spatial.items()}
        subject = torchio.Subject(**images, epoch=epoch, outside=sample["outside"])
        augmented = self.augmentation(subject)
        changed = {k: augmented[k].data.to(v.dtype) for k, v in spatial.items()}
        for axis in thin:
            changed = {k: v.narrow(axis, 0, 1) for k, v in changed.items()}
        return {**sample, **changed}

    def _without_channels(self, sample: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The sample with some of its channels missing; if all were to be, one that is drawn stays."""
        present = sample["channel_mask"].numpy()
        kept = present & (rng.random(len(present)) >= self.channel_dropout)
        spared = rng.choice(np.flatnonzero(present))
        if not kept.any():
            kept[spared] = True
        mask = torch.from_numpy(kept)
        image = sample["image"] * mask[:, None, None, None]
        return {**sample, "image": image, "outside": sample["outside"] * mask, "channel_mask": mask}

    def _viewed(self, sample: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        axis = 1 + self.task.slice_axis
        if self.view == "voxels":
            inside = sample["brain_mask"][0].nonzero()
            if not len(inside):
                inside = torch.ones_like(sample["brain_mask"][0]).nonzero()
            chosen = inside[torch.from_numpy(rng.integers(len(inside), size=self.voxels))]
            pick = (slice(None), *chosen.T)
            return {k: v[pick].T if v.ndim == 4 else v for k, v in sample.items()}
        result = {}
        for name, value in sample.items():
            if value.ndim != 4 or self.view == "patch":
                result[name] = value
            elif self.view == "slice":
                result[name] = value.select(axis, 0)
            else:
                moved = value.movedim(axis, -1)
                result[name] = moved if name == "image" else moved[..., self.slab // 2]
        return {k: v.contiguous() for k, v in result.items()}


def with_inputs(sample: dict[str, Any], task: Task, case: str) -> dict[str, Any]:
    """The sample with the task's further inputs as channels of `image` behind the others; False in `channel_mask`, which tells of
    modalities, and 0 in `outside`.

    Args:
        sample: `image` (M, *spatial), and each input (1, *spatial) under its name; changed copies only.

    Raises:
        SuiteError: an input that the sample lacks or that has several channels; names it and the case.
    """
    if not task.inputs:
        return sample
    maps = []
    for name in task.inputs:
        if name not in sample:
            raise SuiteError(f"case {case}: task.inputs names {name}, of which there is no map for this case")
        if len(sample[name]) != 1:
            raise SuiteError(f"case {case}: the map {name} of task.inputs has {len(sample[name])} channels; an input has one")
        maps.append(sample[name].to(sample["image"]))
    none = torch.zeros(len(maps), dtype=torch.bool)
    more = {"outside": torch.cat([sample["outside"], torch.zeros(len(maps))])} if "outside" in sample else {}
    image = torch.cat([sample["image"], *maps])
    return {**sample, "image": image, "channel_mask": torch.cat([sample["channel_mask"], none]), **more}


def _as_torchio(values: torch.Tensor, linear: bool) -> torch.Tensor:
    """The smallest type that TorchIO can resample and that holds every value: labels fit 16 bits, supervoxel numbers do not."""
    if linear or values.is_floating_point():
        return values.float()
    return values.short() if values.dtype in (torch.bool, torch.int8, torch.uint8, torch.int16) else values.int()


def _padded_raters(values: Sequence[torch.Tensor], axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raters of the cases of a batch, filled up with -1 along `axis` and stacked, and which of them are real (B, R)."""
    counts = [v.shape[axis] for v in values]
    most = max(counts)
    filler = [list(v.shape) for v in values]
    for shape, count in zip(filler, counts, strict=True):
        shape[axis] = most - count
    stacked = torch.stack([torch.cat([v, v.new_full(shape, -1)], dim=axis) for v, shape in zip(values, filler, strict=True)])
    return stacked, torch.tensor([[r < count for r in range(most)] for count in counts])


_LISTED = ("case", "patient", "site", "attributes", "geometry", "native_label", "native_raters")


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks tensors; ids, geometry and native labels stay lists. Raters are padded to the largest number, told apart by `rater_mask`.

    A key that only some samples of the batch have (a map not yet written) is left out. Voxel samples are concatenated, with the index of
    their case under `case_index`.
    """
    keys = [k for k in items[0] if all(k in item for item in items)]
    batch: dict[str, Any] = {}
    voxels = items[0]["image"].ndim == 2
    for k in keys:
        values = [item[k] for item in items]
        if k in _LISTED or not torch.is_tensor(values[0]):
            batch[k] = values
        elif k == "raters":
            batch[k], batch["rater_mask"] = _padded_raters(values, axis=1 if voxels else 0)
            batch[k] = batch[k].flatten(0, 1) if voxels else batch[k]
        elif voxels and k not in ("channel_mask", "outside"):
            batch[k] = torch.cat(values)
        else:
            batch[k] = torch.stack(values)
    if voxels:
        batch["case_index"] = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(i["image"]) for i in items]))
    return batch
