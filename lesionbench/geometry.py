"""Geometry: read a volume into canonical RAS axes, and bring maps back to the grid it came from.

Inside the suite every array is (X, Y, Z) with axes along right, anterior, superior. A `Geometry` remembers what was done to one case
(reorientation, resampling, cropping) and undoes it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation
from nibabel.spatialimages import HeaderDataError

from lesionbench.errors import SuiteError


@dataclass(frozen=True)
class Geometry:
    """How one case lies on disk and inside the suite; plain numbers only.

    Attributes:
        affine: native voxel-to-world matrix, 4 x 4.
        shape: native array shape.
        orientation: nibabel orientation transform native -> canonical, 3 x 2.
        spacing: canonical voxel size, before any resampling.
        resampled: canonical shape after resampling (equal to the canonical shape where nothing was resampled).
        crop: (start, stop) for each canonical axis, on the resampled grid.
    """

    affine: tuple[tuple[float, ...], ...]
    shape: tuple[int, ...]
    orientation: tuple[tuple[float, ...], ...]
    spacing: tuple[float, ...]
    resampled: tuple[int, ...]
    crop: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, affine: np.ndarray, shape: Sequence[int]) -> "Geometry":
        """Geometry of an untouched volume."""
        orientation = io_orientation(affine)
        canonical = tuple(int(shape[int(np.where(orientation[:, 0] == axis)[0][0])]) for axis in range(3))
        sizes = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))
        spacing = tuple(float(sizes[int(np.where(orientation[:, 0] == axis)[0][0])]) for axis in range(3))
        return cls(
            affine=tuple(tuple(float(v) for v in row) for row in affine),
            shape=tuple(int(s) for s in shape),
            orientation=tuple(tuple(float(v) for v in row) for row in orientation),
            spacing=spacing,
            resampled=canonical,
            crop=tuple((0, s) for s in canonical),
        )

    @property
    def canonical(self) -> tuple[int, ...]:
        """Shape after reorientation, before resampling."""
        order = np.argsort([row[0] for row in self.orientation])
        return tuple(self.shape[i] for i in order)

    @property
    def native_spacing(self) -> tuple[float, ...]:
        """Voxel size along the native axes."""
        return tuple(float(v) for v in np.sqrt((np.asarray(self.affine)[:3, :3] ** 2).sum(axis=0)))

    @property
    def network_spacing(self) -> tuple[float, ...]:
        """Voxel size on the grid that the network sees."""
        return tuple(s * c / r for s, c, r in zip(self.spacing, self.canonical, self.resampled, strict=True))

    def native_axis(self, axis: int) -> int:
        """The native axis that lies along canonical axis `axis`."""
        return next(native for native, row in enumerate(self.orientation) if int(row[0]) == axis)

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """Native (X, Y, Z) -> canonical axes, a view where possible."""
        return apply_orientation(array, np.asarray(self.orientation))

    def to_native(self, maps: torch.Tensor, discrete: bool = False, outside: float = 0) -> torch.Tensor:
        """Network grid (C, x, y, z) -> native grid (C, X, Y, Z): undo the crop (`outside` beyond it), the resampling, the reorientation."""
        full = maps.new_full((maps.shape[0], *self.resampled), outside)
        inside = (slice(None), *(slice(a, b) for a, b in self.crop))
        full[inside] = maps
        if self.resampled != self.canonical:
            full = resample(full, self.canonical, discrete)
        order = [int(row[0]) for row in self.orientation]
        flips = [1 + axis for axis, row in enumerate(self.orientation) if row[1] < 0]
        full = full.permute(0, *(1 + axis for axis in order))
        return full.flip(flips).contiguous() if flips else full.contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for caches and batches."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Geometry":
        """The inverse of `to_dict` (also after JSON)."""
        nested = {"affine", "orientation", "crop"}
        fields: dict[str, Any] = {k: tuple(map(tuple, v)) if k in nested else tuple(v) for k, v in data.items()}
        return cls(**fields)


def resample(maps: torch.Tensor, shape: Sequence[int], discrete: bool = False) -> torch.Tensor:
    """Resizes maps (C, X, Y, Z) to `shape` over the same field of view; linear, or nearest for labels. Keeps the dtype."""
    if tuple(maps.shape[1:]) == tuple(shape):
        return maps
    mode = {"mode": "nearest-exact"} if discrete else {"mode": "trilinear", "align_corners": False}
    return torch.nn.functional.interpolate(maps[None].float(), size=tuple(shape), **mode)[0].to(maps.dtype)


def read_volume(path: Path, header_only: bool = False) -> tuple[np.ndarray | None, np.ndarray, tuple[int, ...]]:
    """Reads a NIfTI or Analyze volume: (array in its stored type where unscaled, else float32; affine; shape).

    A trailing axis of length one is dropped. With `header_only` the array is None.

    Raises:
        SuiteError: missing, unreadable, truncated, not three-dimensional, or colors or complex numbers; names the file.
    """
    try:
        image = nib.load(path)
        shape = tuple(image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        stored = image.get_data_dtype()
        if stored.fields:
            raise SuiteError(
                f"{path}: holds colors ({'/'.join(stored.fields)} in every voxel), not intensities or labels; export gray values"
            )
        if stored.kind == "c":
            raise SuiteError(f"{path}: holds complex numbers ({stored}), not intensities or labels; export the magnitude")
        if len(shape) != 3 or 0 in shape:
            raise SuiteError(f"{path}: expected one 3D volume, got shape {tuple(image.shape)}")
        if header_only:
            return None, image.affine, shape
        slope, inter = image.dataobj.slope, image.dataobj.inter
        scaled = (slope, inter) != (1, 0)
        array = np.asarray(image.dataobj, dtype=np.float32) if scaled else np.asanyarray(image.dataobj)
        if array.dtype.byteorder not in "=|" or array.dtype == np.float64:
            array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("="))
        return array.reshape(shape), image.affine, shape
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file") from None
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise SuiteError(
            f"{path}: cannot be read as a NIfTI or Analyze volume ({error or type(error).__name__}); truncated or not an image?"
        ) from None


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Writes a NIfTI file atomically (a reader never sees half of it)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    nib.Nifti1Image(np.ascontiguousarray(array), np.asarray(affine)).to_filename(temporary)
    temporary.replace(path)
    return path
