"""Inferers: run a predictor over a whole case, one place for windows, overlap and blending.

A predictor takes a view of the image and returns a dict of maps (B, K, *spatial of the view); an inferer returns the same dict for the
whole volume (B, K, X, Y, Z), every map blended in the same pass. Which inferer fits is a matter of the network's dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, product
from typing import Literal, Protocol

import torch
from torch.nn.functional import pad

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import BelowOne, Count
from lesionbench.ranges import Whole as WholeNumber
from lesionbench.views import from_slices, to_slabs, to_slices

Predictor = Callable[[torch.Tensor], dict[str, torch.Tensor]]


class Inferer(Protocol):
    """What runs a predictor over the image (B, M, X, Y, Z) of whole cases.

    Args:
        axis: the one that slices are cut along.
        outside: what lies beyond the border (B, M); None = 0.
    """

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]: ...

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        """How often the predictor is called for a case of this shape (X, Y, Z)."""
        ...


_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


def watch(say: Callable[[int, int], None] | None) -> None:
    """From now on calls `say(done, all)` after every pass of a predictor over a part of a case (see `Method.infer`); None ends it."""
    _watcher.set(say)


def counted(predictor: Predictor, passes: int) -> Predictor:
    """A predictor that tells who watches, if somebody does, how many of so many passes are done."""
    say, done = _watcher.get(), count(1)
    if say is None:
        return predictor

    def told(view: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = predictor(view)
        say(next(done), passes)
        return maps

    return told


class Whole:
    """The whole volume in one forward pass, padded at the far end to a multiple of `divisor`; None = what the network needs."""

    def __init__(self, divisor: Count | Sequence[Count] | None = None) -> None:
        self.divisor = divisor

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return padded(image, self.divisor, predictor, outside=outside)

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        return 1


class Window:
    """Overlapping 3D windows (B, C, x, y, z), blended.

    Args:
        patch: window size in voxels; an axis on which the case is smaller is padded with what lies outside.
        overlap: share of a window that its neighbor covers, 0 <= overlap < 1.
        blending: `gaussian` (sigma = 1/8 of the window, as nnU-Net, Isensee et al. 2021) or `constant`.
        batch: windows per forward pass.
        starts: `even` = windows are spread evenly, so that neighbors may overlap more than asked; `clamped` = each begins one step after
            the one before it, and the last ends at the border (as MONAI's sliding windows).
    """

    def __init__(
        self, patch: Sequence[Count], overlap: BelowOne = 0.5, blending: str = "gaussian", batch: Count = 1, starts: str = "even"
    ) -> None:
        if starts not in ("even", "clamped"):
            raise SuiteError(f"model.inferer.starts={starts}: expected even or clamped")
        if not 0 <= overlap < 1:
            raise SuiteError(f"model.inferer.overlap={overlap}: expected 0 <= overlap < 1")
        if blending not in ("gaussian", "constant"):
            raise SuiteError(f"model.inferer.blending={blending}: expected gaussian or constant")
        if patch is None:
            raise SuiteError("model.inferer.patch is null: windows need a size; for whole volumes use model/inferer=whole")
        self.patch, self.overlap, self.blending, self.batch, self.starts = tuple(patch), overlap, blending, batch, starts

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        shape = image.shape[2:]
        short = [max(p - s, 0) for p, s in zip(self.patch, shape, strict=True)]
        near = [s // 2 for s in short]
        margins = [m for a in (2, 1, 0) for m in (near[a], short[a] - near[a])]
        image = _grown(image, margins, outside) if any(short) else image
        weight = self._weight().to(image.device)
        total: dict[str, torch.Tensor] = {}
        norm = image.new_zeros(image.shape[2:], dtype=torch.float32)
        for boxes in self._batches(image.shape[2:]):
            views = torch.cat([image[:, :, x, y, z] for x, y, z in boxes])
            for name, maps in predictor(views).items():
                if name not in total:
                    total[name] = maps.new_zeros((image.shape[0], maps.shape[1], *image.shape[2:]), dtype=torch.float32)
                for (x, y, z), part in zip(boxes, maps.float().split(image.shape[0]), strict=True):
                    total[name][:, :, x, y, z] += part * weight
            for box in boxes:
                norm[box] += weight
        crop = (..., *(slice(n, n + s) for n, s in zip(near, shape, strict=True)))
        return {name: maps.div_(norm)[crop] for name, maps in total.items()}

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        return sum(1 for _ in self._batches([max(s, p) for s, p in zip(shape, self.patch, strict=True)]))

    def _weight(self) -> torch.Tensor:
        if self.blending == "constant":
            return torch.ones(self.patch)
        lines = [torch.exp(-0.5 * ((torch.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in self.patch]
        weight = lines[0][:, None, None] * lines[1][:, None] * lines[2]
        return weight.clamp(min=1e-4)  # far corners still count, so that no voxel is divided by nothing

    def _batches(self, shape: Sequence[int]) -> Iterator[list[tuple[slice, ...]]]:
        starts = []
        for size, p in zip(shape, self.patch, strict=True):
            step = max(int(p * (1 - self.overlap)), 1)
            number = -(-(size - p) // step) + 1
            even = self.starts == "even"
            starts.append([round(i * (size - p) / max(number - 1, 1)) if even else min(i * step, size - p) for i in range(number)])
        boxes = [tuple(slice(s, s + p) for s, p in zip(corner, self.patch, strict=True)) for corner in product(*starts)]
        yield from (boxes[i : i + self.batch] for i in range(0, len(boxes), self.batch))


class Central:
    """Windows (B, C, x, y, z) of which only the middle is kept, where a network sees all around (Fonov et al., BrainLes 2021, Section 2.5).

    Args:
        patch: window size in voxels.
        rim: voxels cut off on each side; the case is padded by as many, so that middles reach its borders.
        overlap: share of a middle that the next one covers, 0 <= overlap < 1; the last one ends at the border.
        blending: of overlapping middles: `mean`, or `running`: 0.5 of what was there and 0.5 of the new one, in the order of windows.

    Raises:
        SuiteError: a rim that leaves no middle.
    """

    def __init__(
        self, patch: Sequence[Count], rim: WholeNumber = 8, overlap: BelowOne = 0.5, blending: Literal["mean", "running"] = "mean"
    ) -> None:
        if patch is None:
            raise SuiteError("model.inferer.patch is null: windows need a size; for whole volumes use model/inferer=whole")
        if 2 * rim >= min(patch):
            raise SuiteError(f"model.inferer.rim={rim}: leaves nothing of windows of {list(patch)}")
        if blending not in ("mean", "running"):
            raise unknown("model.inferer.blending", blending, ["mean", "running"])
        self.patch, self.rim, self.blending = tuple(patch), rim, blending
        self.keep = tuple(p - 2 * rim for p in patch)
        self.step = tuple(max(int(k * (1 - overlap)), 1) for k in self.keep)

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        shape, rim = image.shape[2:], self.rim
        sizes = [max(n, k) for n, k in zip(shape, self.keep, strict=True)]  # that middles cover
        image = _grown(image, [m for a in (2, 1, 0) for m in (rim, rim + sizes[a] - shape[a])], outside)
        middle = (..., *(slice(rim, rim + k) for k in self.keep))
        total: dict[str, torch.Tensor] = {}
        seen = image.new_zeros(sizes)
        for corner in self._corners(sizes):
            window = (..., *(slice(c, c + p) for c, p in zip(corner, self.patch, strict=True)))
            box = tuple(slice(c, c + k) for c, k in zip(corner, self.keep, strict=True))
            place = (..., *box)
            seen[box] += 1
            share = 1 / seen[box] if self.blending == "mean" else torch.where(seen[box] > 1, 0.5, 1.0)
            for name, maps in predictor(image[window]).items():
                if name not in total:
                    total[name] = maps.new_zeros((*maps.shape[:2], *sizes), dtype=torch.float32)
                total[name][place].lerp_(maps.float()[middle], share)
        inside = (..., *(slice(0, n) for n in shape))
        return {name: maps[inside] for name, maps in total.items()}

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        return sum(1 for _ in self._corners([max(n, k) for n, k in zip(shape, self.keep, strict=True)]))

    def _corners(self, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        lines = zip(sizes, self.keep, self.step, strict=True)
        return product(*([min(start, n - k) for start in range(0, n - k + s, s)] for n, k, s in lines))


class SliceWise:
    """Every slice (B, C, H, W) of the volume, whole, padded to a multiple of `divisor` (None = what the network needs); `batch` slices per forward pass."""

    def __init__(self, divisor: Count | Sequence[Count] | None = None, batch: Count = 16) -> None:
        self.divisor, self.batch = divisor, batch

    def views(self, image: torch.Tensor, axis: int) -> torch.Tensor:
        """The slices of a volume, in order."""
        return to_slices(image, axis)

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        views, size = self.views(image, axis), self.batch
        if outside is not None:
            outside = outside.repeat_interleave(len(views) // len(image), dim=0)
        parts = [
            padded(views[i : i + size], self.divisor, predictor, axes=2, outside=None if outside is None else outside[i : i + size])
            for i in range(0, len(views), size)
        ]
        return {name: from_slices(torch.cat([p[name] for p in parts]), axis, image.shape[0]) for name in parts[0]}

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        return -(-shape[axis] // self.batch)


class SlabWise(SliceWise):
    """Every slice with its neighbors as a slab (B, C, H, W, k), end slices repeated; the network answers for the middle slice."""

    def __init__(self, k: Count = 3, divisor: Count | Sequence[Count] | None = None, batch: Count = 16) -> None:
        super().__init__(divisor, batch)
        self.k = k

    def views(self, image: torch.Tensor, axis: int) -> torch.Tensor:
        return to_slabs(image, axis, self.k)


@dataclass(frozen=True)
class Move:
    """Mirrors a volume along `flips`, then turns it by `quarters` of a turn in the plane of its slices; moves every voxel onto a voxel."""

    flips: tuple[int, ...] = ()
    quarters: int = 0

    def __call__(self, volume: torch.Tensor, axis: int) -> torch.Tensor:
        """(B, C, X, Y, Z), moved; `axis` is the one that slices are cut along."""
        return volume.flip([2 + a for a in self.flips]).rot90(self.quarters, _plane(axis))

    def back(self, volume: torch.Tensor, axis: int) -> torch.Tensor:
        """The inverse: turned back first, then mirrored."""
        return volume.rot90(-self.quarters, _plane(axis)).flip([2 + a for a in self.flips])


def _plane(axis: int) -> list[int]:
    return [2 + a for a in range(3) if a != axis]


def flips(axes: Sequence[int] = (0, 1, 2)) -> list[Move]:
    """The 2^n ways to mirror along n axes, alone and together, not at all among them."""
    return [Move(tuple(a for a, there in zip(axes, chosen, strict=True) if there)) for chosen in product((False, True), repeat=len(axes))]


def dihedral(axis: int) -> list[Move]:
    """The 16 different quarter turns and mirror images that leave slices slices: eight of the plane, each also with the slices in reverse."""
    first = 0 if axis else 1  # one axis of the plane: mirrored along the other, a slice is the same but for a half turn
    return [Move(m.flips, quarters) for quarters in range(4) for m in flips(sorted((first, axis)))]


GROUPS: dict[str, Callable[[int], list[Move]]] = {"flips": lambda axis: flips(), "dihedral": dihedral}


class Transformed:
    """The mean over moved copies of the case, each predicted and its maps moved back (test-time augmentation).

    One copy is held at a time. Over a group, the result of a moved case is the moved result, whatever the predictor does.

    Args:
        inferer: predicts each of the copies.
        group: axis that slices are cut along -> moves; or a name of `GROUPS`: `flips` (8), `dihedral` (16).

    Raises:
        SuiteError: no such group.
    """

    def __init__(self, inferer: Inferer, group: str | Callable[[int], list[Move]]) -> None:
        if isinstance(group, str) and group not in GROUPS:
            raise unknown("test_time", group, GROUPS)
        self.inferer, self.group = inferer, GROUPS[group] if isinstance(group, str) else group

    def __call__(
        self, image: torch.Tensor, predictor: Predictor, axis: int = 2, outside: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        moves = self.group(axis)
        for move in moves:
            for name, maps in self.inferer(move(image, axis), predictor, axis, outside).items():
                back = move.back(maps.float(), axis)
                total[name] = total[name].add_(back) if name in total else back
        return {name: maps.div_(len(moves)) for name, maps in total.items()}

    def passes(self, shape: Sequence[int], axis: int = 2) -> int:
        moved = (move(torch.empty(1, 1, *shape, device="meta"), axis).shape[2:] for move in self.group(axis))
        return sum(self.inferer.passes(turned, axis) for turned in moved)


class Mirrored(Transformed):
    """Test-time mirroring: the mean over the case and its mirror images, each predicted and mirrored back (nnU-Net, Isensee et al. 2021).

    Args:
        inferer: predicts each of the 2^n images.
        axes: n different axes (0 = left to right, 1 = back to front, 2 = bottom to top), mirrored alone and together.

    Raises:
        SuiteError: no axis, or one that does not exist or stands twice.
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int] = (0, 1, 2)) -> None:
        if not axes or len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
            raise SuiteError(f"mirror={list(axes)}: expected some of the axes 0, 1 and 2, each once")
        super().__init__(inferer, lambda axis: flips(axes))


def padded(
    image: torch.Tensor,
    divisor: int | Sequence[int] | None,
    predictor: Predictor,
    axes: int | None = None,
    outside: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Pads the first `axes` spatial axes (default: all) of (B, M, *spatial) to a multiple of `divisor` with `outside` (B, M; None = 0),
    predicts, and cuts the padding off."""
    axes = image.ndim - 2 if axes is None else axes
    divisors = [divisor or 1] * axes if divisor is None or isinstance(divisor, int) else list(divisor)
    size = image.shape[2 : 2 + axes]
    more = [-s % d for s, d in zip(size, divisors, strict=True)]
    margins = [0, 0] * (image.ndim - 2 - axes) + [m for extra in reversed(more) for m in (0, extra)]
    maps = predictor(_grown(image, margins, outside) if any(more) else image)
    inside = (slice(None), slice(None), *(slice(0, s) for s in size))
    return {name: m[inside] for name, m in maps.items()}


def _grown(image: torch.Tensor, margins: Sequence[int], outside: torch.Tensor | None) -> torch.Tensor:
    """(B, M, *spatial) with margins as in `torch.nn.functional.pad`, filled with `outside` (B, M)."""
    grown = pad(image, margins)
    if outside is not None:
        beyond = pad(torch.ones_like(image[:1, :1]), margins) == 0
        values = outside.to(image.dtype).reshape(*outside.shape, *(1,) * (image.ndim - 2))
        grown = torch.where(beyond, values, grown)
    return grown
