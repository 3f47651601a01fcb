"""Preprocessing of one case: files on disk -> arrays on the network grid, with the statistics that normalization needs later.

Normalization is applied when a patch is read (`normalize_patch`), so the stored image keeps its raw values, int16 where they fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from nibabel.orientations import aff2axcodes

from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import HEADERS, TOLERANCE, Geometry, displacement, ending_of, read_header, read_volume, resample
from lesionbench.ranges import ASCENDING, Count, Percent, Positive, Real, Whole
from lesionbench.task import Task

CROPS = ("foreground", "label", "center", "none")
NORMALIZATIONS = ("zscore", "zscore_all", "minmax", "percentile", "dataset", "ct", "histogram", "none")
INTERPOLATIONS = ("linear", "nearest")
GRIDS = ("same", "first")
CT_PERCENTILES = (0.5, 99.5)
LANDMARK_PERCENTILES = (1, *range(10, 100, 10), 99)
Stats = dict[str, list]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a case; plain data.

    Foreground is where any channel differs from the background value: 0, or the lower bound of `clip` where that is set.

    Args:
        spacing: voxel size in mm along the canonical axes to resample to; None keeps the grid.
        size: number of voxels along the canonical axes to resample every volume to, whatever its field of view; instead of `spacing`.
            null for an axis keeps it: `[256, 256, null]` resizes the slices of a stack.
        crop: `foreground` = the box around the foreground (the whole volume where there is none), `none` = the whole volume; `label` =
            the box around what is labeled, by any rater, or the whole volume of a case without a label. It looks at the truth, of test
            cases as well: for protocols that do so; `center` = a box of `crop_size` in the middle of the volume, whatever lies there.
        crop_size: of `center`: voxels along the canonical axes, of the resampled grid; null for an axis, or more than it has, keeps it.
        margin: voxels added around the box on both sides, within the volume: one number, or one per axis.
        normalize: applied when a patch is read. `zscore` over the case's foreground, per channel; `zscore_all` over all voxels of
            the stored box; `minmax` maps the foreground's range to [0, 1]; `percentile` clips at its `percentiles` first;
            `dataset` is a z-score with the mean and deviation over the training split's foreground; `ct` (nnU-Net's for CT) clips at the
            0.5 and 99.5 percentiles of what is labeled in the training split, then takes the z-score with its mean and deviation;
            `histogram` maps the deciles and the 1 and 99 percentiles of the case's foreground to those of the training split (Nyul et al.,
            IEEE TMI 2000), linearly between them and beyond, then takes the z-score over the case's foreground;
            `none` keeps raw values. All but `zscore_all`, `ct` and `none` leave the background 0.
        percentiles: (low, high) in percent, where `normalize="percentile"` clips.
        clip: (low, high) raw values to clip at before everything else, for CT-like units whose background is not 0.
        allow_missing: accept cases without some of the channels; these are 0 and False in `channel_mask`.
        interpolation: of the image where it is resampled: `linear`, or `nearest` (labels always are).
        header: what of a NIfTI header says where the voxels lie: `auto`, `sform`, `qform` or `pixdim` (see `geometry.read_volume`).
        grid: `same` = files of a case whose headers put their voxels elsewhere than the first image's are refused; `first` = the first
            image's grid counts for all, voxel by voxel, whatever the others say. Shapes are the same in either case.

    Raises:
        SuiteError: an unknown crop, normalization, interpolation, header or grid, a spacing, size, margin or clip that makes no sense, both a spacing and a
            size, a size of the crop without `center` or the other way round.
    """

    spacing: tuple[Positive, Positive, Positive] | None = None
    size: tuple[Count | None, Count | None, Count | None] | None = None
    crop: str = "foreground"
    crop_size: tuple[Count | None, Count | None, Count | None] | None = None
    margin: Whole | tuple[Whole, Whole, Whole] = 0
    normalize: str = "zscore"
    percentiles: Annotated[tuple[Percent, Percent], ASCENDING] = (0.5, 99.5)
    clip: Annotated[tuple[Real, Real], ASCENDING] | None = None
    allow_missing: bool = False
    interpolation: str = "linear"
    header: str = "auto"
    grid: str = "same"

    def __post_init__(self) -> None:
        for name in ("spacing", "percentiles", "clip"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        for name in ("size", "crop_size"):
            voxels = getattr(self, name)
            if voxels is not None:
                object.__setattr__(self, name, tuple(None if v is None else int(v) for v in voxels))
                if len(voxels) != 3 or any(v is not None and v < 1 for v in voxels):
                    raise SuiteError(f"data.preprocessing.{name}: three numbers of voxels, each or all null; got {voxels}")
        if self.size is not None and self.spacing is not None:
            raise SuiteError(f"data.preprocessing.size={self.size} does not go with spacing={self.spacing}: set one of them to null")
        if (self.crop == "center") != (self.crop_size is not None):
            raise SuiteError(
                f"data.preprocessing.crop={self.crop} with crop_size={self.crop_size}: crop=center takes a crop_size such as [128,128,null], and nothing else does"
            )
        if self.crop not in CROPS:
            raise unknown("crop", self.crop, CROPS)
        if self.normalize not in NORMALIZATIONS:
            raise unknown("normalization", self.normalize, NORMALIZATIONS)
        if self.grid not in GRIDS:
            raise unknown("grid (data.preprocessing.grid)", self.grid, GRIDS)
        if self.header not in HEADERS:
            raise unknown("header (data.preprocessing.header)", self.header, HEADERS)
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise SuiteError(f"data.preprocessing.spacing: three positive sizes in mm, or null; got {self.spacing}")
        if self.clip is not None and (len(self.clip) != 2 or self.clip[0] >= self.clip[1]):
            raise SuiteError(f"data.preprocessing.clip: (low, high) with low < high, or null; got {self.clip}")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise SuiteError(f"data.preprocessing.percentiles: (low, high) with 0 <= low < high <= 100; got {self.percentiles}")
        if not isinstance(self.margin, int):
            object.__setattr__(self, "margin", tuple(int(v) for v in self.margin))
        if min(self.margins) < 0 or len(self.margins) != 3:
            raise SuiteError(f"data.preprocessing.margin: one or three numbers of voxels, at least 0; got {self.margin}")

    @property
    def margins(self) -> tuple[int, ...]:
        """The margin along each axis."""
        return (self.margin,) * 3 if isinstance(self.margin, int) else self.margin

    @property
    def background(self) -> float:
        """The raw value of background voxels."""
        return self.clip[0] if self.clip else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`."""
        return cls(**data)


@dataclass
class Prepared:
    """A case on the network grid.

    Attributes:
        image: raw values (M, x, y, z), int16 where nothing is lost by it, else float32.
        label: class indices (x, y, z), int8, -1 = ignore; None where there is none.
        raters: class indices (R, x, y, z), int8, R = the raters present; None where there are none.
        channel_mask: per channel, whether the case has it.
        geometry: the way back to the native grid.
        stats: per-channel lists: `count`, `sum`, `sumsq`, `mean`, `std`, `min`, `max`, `percentiles` over the foreground, `mean_all`
            and `std_all` over all voxels; the count of a missing channel is 0. With `normalize="histogram"` also the foreground's
            `landmarks` (the `LANDMARK_PERCENTILES`) and `moments` (count, sum and sum of squares between each two of them).
    """

    image: np.ndarray
    label: np.ndarray | None
    raters: np.ndarray | None
    channel_mask: tuple[bool, ...]
    geometry: Geometry
    stats: Stats


def preprocess(case: Case, task: Task, settings: Preprocessing, with_label: bool = True) -> Prepared:
    """Reads one case, brings it to canonical axes, resamples and crops it, and measures it; labels only `with_label`.

    Raises:
        SuiteError: a missing channel or file, an unreadable file, NaN or infinite values, grids that differ between the files of the
            case, an unknown label value; names case, file and value.
    """
    check_channels(case, task, settings)
    image, geometry = _read_images(case, task, settings)
    body = foreground(image, settings.background)

    def whole(path: Path) -> np.ndarray:
        label = geometry.to_canonical(read_label(case, path, task, geometry, settings))
        return resample(torch.from_numpy(np.ascontiguousarray(label))[None], geometry.resampled, discrete=True)[0].numpy()

    if settings.crop == "foreground":
        geometry = replace(geometry, crop=_bounding_box(body, settings.margins))
    if settings.crop == "center":
        geometry = replace(geometry, crop=_middle(geometry.resampled, settings.crop_size or (None,) * 3))
    if settings.crop == "label":
        drawn = [whole(path) > 0 for path in ([case.label] if case.label else case.raters)]
        geometry = replace(geometry, crop=_bounding_box(np.any(drawn, axis=0) if drawn else np.zeros_like(body), settings.margins))
    box = tuple(slice(a, b) for a, b in geometry.crop)
    image, body = np.ascontiguousarray(image[(slice(None), *box)]), body[box]
    channel_mask = tuple(channel in case.images for channel in task.channels)

    def on_grid(path: Path) -> np.ndarray:
        return np.ascontiguousarray(whole(path)[box])

    return Prepared(
        image=image,
        label=on_grid(case.label) if with_label and case.label else None,
        raters=np.stack([on_grid(path) for path in case.raters]) if with_label and case.raters else None,
        channel_mask=channel_mask,
        geometry=geometry,
        stats=_statistics(image, body, channel_mask, settings),
    )


def check_channels(case: Case, task: Task, settings: Preprocessing) -> None:
    """Refuses a case that lacks channels where they are needed.

    Raises:
        SuiteError: channels are missing without `allow_missing`, or none is left; names case and channels.
    """
    missing = [channel for channel in task.channels if channel not in case.images]
    if missing and (not settings.allow_missing or len(missing) == len(task.channels)):
        has = ", ".join(case.images) or "none"
        raise SuiteError(
            f"case {case.id}: no file for channel(s) {', '.join(missing)} (it has: {has}). Add the file, leave the channel out with "
            "task.channels=[...], leave the case out, or accept it with data.preprocessing.allow_missing=true (needs one channel at least)."
        )


def read_label(case: Case, path: Path, task: Task, geometry: Geometry, settings: Preprocessing) -> np.ndarray:
    """A label map of the case on its native grid: class indices (X, Y, Z), int8, -1 = ignore.

    Raises:
        SuiteError: unreadable, on another grid than the images, or with an unknown value; names case, file and value.
    """
    values, affine, shape = read_volume(path, header=settings.header)
    _check_grid(case, path, affine, shape, geometry, settings)
    try:
        return task.from_disk(values)
    except SuiteError as error:
        raise SuiteError(f"case {case.id}: {path}: {error}") from None


def geometry_of(case: Case, task: Task, header: str = "auto") -> Geometry:
    """The native grid of a case, that of its first image; nothing is read but the header."""
    path = next(case.images[channel] for channel in task.channels if channel in case.images)
    _, affine, shape = read_volume(path, header_only=True, header=header)
    return _geometry(case, path, affine, shape)


def foreground(image: np.ndarray, background: float = 0) -> np.ndarray:
    """Where any channel of (M, x, y, z) differs from the background value: (x, y, z), bool."""
    mask = image[0] != background
    for channel in image[1:]:
        mask |= channel != background
    return mask


def normalize_patch(patch: np.ndarray, stats: Stats, settings: Preprocessing, dataset_stats: Stats | None = None) -> np.ndarray:
    """Raw values (M, x, y, z) of a patch or of a whole case -> normalized float32, a new array.

    `stats` are the case's; `dataset_stats` those over the training split, of `dataset_statistics` for `normalize="dataset"`, of
    `labeled_statistics` for "ct" and of `histogram_statistics` for "histogram". Missing channels stay 0; a channel without any contrast
    becomes 0.

    Raises:
        SuiteError: `normalize="dataset"`, "ct" or "histogram" without `dataset_stats`.
    """
    out = patch.astype(np.float32)
    kind = settings.normalize
    if kind == "histogram":
        pieces = _histogram_pieces(stats, dataset_stats)
        for channel, (knots, slopes, intercepts) in zip(out, pieces, strict=True):
            piece = np.zeros(channel.shape, np.int8)
            for knot in knots[1:-1].astype(np.float32):  # much faster than a search; a tie belongs to either piece
                piece += channel >= knot
            channel *= slopes.astype(np.float32)[piece]
            channel += intercepts.astype(np.float32)[piece]
        return out * foreground(patch, settings.background)
    if kind == "ct" and dataset_stats is not None:
        for channel, low, high in zip(out, dataset_stats["low"], dataset_stats["high"], strict=True):
            np.clip(channel, low, high, out=channel)
    shifts, scales = _shift_and_scale(kind, stats, dataset_stats)
    for channel, count, shift, scale in zip(out, stats["count"], shifts, scales, strict=True):
        if not count:
            channel[...] = 0
        elif kind != "none":
            channel -= np.float32(shift)
            channel *= np.float32(1 / scale if scale > 1e-8 * abs(shift) else 0)
    if kind in ("minmax", "percentile"):
        np.clip(out, 0, 1, out=out)
    if kind not in ("zscore_all", "ct", "none"):
        out *= foreground(patch, settings.background)
    return out


def outside(stats: Stats, settings: Preprocessing, dataset_stats: Stats | None = None) -> np.ndarray:
    """What lies beyond the border of a case, as a network sees it: the normalized background value of every channel (M,), float32.

    Arguments as in `normalize_patch`. All that fills a place where no voxel was measured takes this value.
    """
    beyond = np.full((len(stats["count"]), 1, 1, 1), settings.background, np.float32)
    return normalize_patch(beyond, stats, settings, dataset_stats)[:, 0, 0, 0]


def dataset_statistics(stats: Sequence[Stats]) -> Stats:
    """Mean and deviation per channel over the foreground voxels of many cases: {"mean": [M], "std": [M]}.

    Every voxel weighs the same; a case without a channel does not count for it.

    Raises:
        SuiteError: no cases.
    """
    if not stats:
        raise SuiteError("normalize=dataset: statistics need at least one training case, and the training split is empty")
    count, total, squares = (np.sum([s[name] for s in stats], axis=0) for name in ("count", "sum", "sumsq"))
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    return {"mean": mean.tolist(), "std": std.tolist()}


def histogram_statistics(stats: Sequence[Stats]) -> Stats:
    """The standard scale of many cases, {"landmarks": [M][11]}: their landmarks, each case's mapped to 0 ... 100, averaged (Nyul et al., 2000).

    A case without a channel does not count for it.

    Raises:
        SuiteError: no cases.
    """
    if not stats:
        raise SuiteError("normalize=histogram: the standard scale needs at least one training case, and the training split is empty")
    every = np.array([s["landmarks"] for s in stats], dtype=np.float64)  # (cases, M, 11)
    span = every[..., -1:] - every[..., :1]
    scaled = np.where(span > 0, 100 * (every - every[..., :1]) / np.where(span > 0, span, 1), np.nan)
    known = np.isfinite(scaled).all(axis=-1, keepdims=True)
    total = np.where(known, scaled, 0).sum(axis=0)
    return {"landmarks": (total / np.maximum(known.sum(axis=0), 1)).tolist()}


def labeled_statistics(values: Sequence[np.ndarray]) -> Stats:
    """Mean, deviation and 0.5 and 99.5 percentiles (`low`, `high`) per channel of raw values at labeled voxels, one (M, n) per case.

    Raises:
        SuiteError: nothing is labeled.
    """
    pooled = np.concatenate(list(values), axis=1) if len(values) else np.zeros((1, 0))
    if not pooled.size:
        raise SuiteError("normalize=ct: nothing is labeled in the training split")
    low, high = np.percentile(pooled, CT_PERCENTILES, axis=1)
    mean, std = pooled.mean(axis=1, dtype=np.float64), pooled.std(axis=1, dtype=np.float64)
    return {"mean": mean.tolist(), "std": std.tolist(), "low": low.tolist(), "high": high.tolist()}


def resampled_shape(geometry: Geometry, settings: Preprocessing) -> tuple[int, ...]:
    """Canonical shape after resampling: the wanted size (null keeps an axis), or the field of view divided by the wanted spacing, at least one voxel."""
    if settings.size is not None:
        return tuple(old if new is None else new for old, new in zip(geometry.canonical, settings.size, strict=True))
    if settings.spacing is None:
        return geometry.canonical
    sizes = zip(geometry.canonical, geometry.spacing, settings.spacing, strict=True)
    return tuple(max(1, round(count * old / new)) for count, old, new in sizes)


def _histogram_pieces(stats: Stats, dataset_stats: Stats | None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every channel its landmarks, and slopes and intercepts between each two of them: the way to the standard scale, then the z-score.

    Pieces without extent are flat, as is everything where the channel has no contrast.
    """
    if dataset_stats is None:
        raise SuiteError("normalize=histogram needs the standard scale of the training split, and got none")
    pieces = []
    for landmarks, scale, moments in zip(stats["landmarks"], dataset_stats["landmarks"], stats["moments"], strict=True):
        knots, values = np.array(landmarks, dtype=np.float64), np.array(scale, dtype=np.float64)
        extent = np.diff(knots)
        slopes = np.where(extent > 0, np.diff(values) / np.where(extent > 0, extent, 1), 0)
        intercepts = values[:-1] - slopes * knots[:-1]
        count, total, squares = np.array(moments, dtype=np.float64).T
        every = max(count.sum(), 1)
        mean = (slopes * total + intercepts * count).sum() / every
        square = (slopes**2 * squares + 2 * slopes * intercepts * total + intercepts**2 * count).sum() / every
        std = np.sqrt(max(square - mean**2, 0))
        factor = 1 / std if std > 1e-6 else 0
        pieces.append((knots, slopes * factor, (intercepts - mean) * factor))
    return pieces


def _shift_and_scale(kind: str, stats: Stats, dataset_stats: Stats | None) -> tuple[list[float], list[float]]:
    if kind in ("dataset", "ct"):
        if dataset_stats is None:
            raise SuiteError(f"normalize={kind} needs the statistics of the training split, and got none")
        return dataset_stats["mean"], dataset_stats["std"]
    if kind in ("minmax", "percentile"):
        low, high = (stats["min"], stats["max"]) if kind == "minmax" else zip(*stats["percentiles"], strict=True)
        return list(low), [b - a for a, b in zip(low, high, strict=True)]
    suffix = "_all" if kind == "zscore_all" else ""
    return stats[f"mean{suffix}"], stats[f"std{suffix}"]


def _read_images(case: Case, task: Task, settings: Preprocessing) -> tuple[np.ndarray, Geometry]:
    """All channels on the canonical, resampled, uncropped grid; missing ones hold the background value."""
    geometry, volumes = None, []
    for channel in task.channels:
        if channel not in case.images:
            volumes.append(None)
            continue
        path = case.images[channel]
        array, affine, shape = read_volume(path, header=settings.header)
        if geometry is None:
            geometry = _geometry(case, path, affine, shape)
        _check_grid(case, path, affine, shape, geometry, settings)
        volumes.append(_compact(case, path, geometry.to_canonical(array)))
    geometry = replace(geometry, resampled=resampled_shape(geometry, settings))
    whole_bounds = all(bound.is_integer() and abs(bound) < 2**15 for bound in settings.clip or ())
    small = whole_bounds and all(v is None or v.dtype == np.int16 for v in volumes)
    image = np.full((len(volumes), *geometry.canonical), settings.background, np.int16 if small else np.float32)
    for target, volume in zip(image, volumes, strict=True):
        if volume is not None:
            target[...] = volume
    if settings.clip:
        np.clip(image, *settings.clip, out=image, casting="unsafe")
    if geometry.resampled != geometry.canonical:
        # relative to the background: zeros stay exactly zero under interpolation, other constants may be off by a rounding
        relative = torch.from_numpy(image - np.float32(settings.background))
        moved = resample(relative, geometry.resampled, discrete=settings.interpolation == "nearest")
        image = moved.numpy() + np.float32(settings.background)
    return image, replace(geometry, crop=tuple((0, n) for n in geometry.resampled))


def _geometry(case: Case, path: Path, affine: np.ndarray, shape: Sequence[int]) -> Geometry:
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise SuiteError(f"case {case.id}: {path}: the affine in the header is no invertible matrix: {np.asarray(affine).tolist()}")
    return Geometry.of(affine, shape, read_header(path), ending_of(path))


def _check_grid(case: Case, path: Path, affine: np.ndarray, shape: Sequence[int], geometry: Geometry, settings: Preprocessing) -> None:
    if tuple(shape) != geometry.shape:
        raise SuiteError(f"case {case.id}: {path} has shape {tuple(shape)}, the first image has {geometry.shape}; bring both to one grid")
    apart = displacement(np.asarray(geometry.affine), affine, geometry.shape)
    if not apart <= TOLERANCE and settings.grid == "same":
        codes = ["".join(aff2axcodes(a)) for a in (affine, np.asarray(geometry.affine))]
        why = f"has axes {codes[0]}, the first image {codes[1]}" if codes[0] != codes[1] else "lies elsewhere than the first image"
        raise SuiteError(
            f"case {case.id}: {path} {why} (up to {apart:.3g} voxels apart); bring both to one grid, or, after a look at both, take the first one's: data.preprocessing.grid=first"
        )


def _compact(case: Case, path: Path, array: np.ndarray) -> np.ndarray:
    """The volume as int16 where its values are whole numbers that fit, else float32."""
    if array.dtype.kind not in "buif":
        raise SuiteError(f"case {case.id}: {path}: voxels of type {array.dtype} are no gray values")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = ~np.isfinite(array)
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise SuiteError(f"case {case.id}: {path}: {int(wrong.sum())} voxel(s) are not finite, first {array[where]} at {where} (RAS axes)")
    if np.can_cast(array.dtype, np.int16):
        return array.astype(np.int16)
    fits = array.min() >= -(2**15) and array.max() < 2**15
    whole = array.dtype.kind != "f" or (fits and np.array_equal(array, np.rint(array)))
    return array.astype(np.int16 if fits and whole else np.float32)


def _bounding_box(mask: np.ndarray, margins: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if not mask.any():
        return tuple((0, n) for n in mask.shape)
    box = []
    for axis, (size, margin) in enumerate(zip(mask.shape, margins, strict=True)):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append((max(0, int(hit[0]) - margin), min(size, int(hit[-1]) + 1 + margin)))
    return tuple(box)


def _middle(shape: Sequence[int], wanted: Sequence[int | None]) -> tuple[tuple[int, int], ...]:
    """The box of these sides in the middle; of an odd rest the larger half is cut off at the end."""
    sides = [size if side is None else min(side, size) for size, side in zip(shape, wanted, strict=True)]
    return tuple(((size - side) // 2, (size - side) // 2 + side) for size, side in zip(shape, sides, strict=True))


def _statistics(image: np.ndarray, mask: np.ndarray, present: Sequence[bool], settings: Preprocessing) -> Stats:
    nothing = np.zeros_like(mask)
    rows = [_channel_statistics(channel, mask if there else nothing, settings) for channel, there in zip(image, present, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _channel_statistics(channel: np.ndarray, mask: np.ndarray, settings: Preprocessing) -> dict[str, Any]:
    values = channel[mask].astype(np.float64)
    more = {"mean_all": float(channel.mean(dtype=np.float64)), "std_all": float(channel.std(dtype=np.float64))}
    if settings.normalize == "histogram":
        more |= _landmarks(values)
    if not values.size:
        return dict.fromkeys(("count", "sum", "sumsq", "mean", "std", "min", "max"), 0) | {"percentiles": [0, 0]} | more
    return {
        "count": int(values.size),
        "sum": float(values.sum()),
        "sumsq": float(np.square(values).sum()),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentiles": [float(v) for v in np.percentile(values, settings.percentiles)],
        **more,
    }


def _landmarks(values: np.ndarray) -> dict[str, list]:
    knots = np.percentile(values, LANDMARK_PERCENTILES) if values.size else np.zeros(len(LANDMARK_PERCENTILES))
    piece, count = np.searchsorted(knots[1:-1], values, side="right"), len(knots) - 1
    moments = [np.bincount(piece, weights, count) for weights in (None, values, np.square(values))]
    return {"landmarks": knots.tolist(), "moments": np.stack(moments, axis=1).tolist()}
