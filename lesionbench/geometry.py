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
from lesionbench.itk_files import ENDINGS as ITK_ENDINGS
from lesionbench.itk_files import itk_type_fits_int16, read_itk, write_itk
from lesionbench.written import whole

NIFTI_ENDINGS = (".nii.gz", ".nii")
ENDINGS = (*NIFTI_ENDINGS, *ITK_ENDINGS, ".img")  # of files that `read_volume` reads, the likeliest first
WRITTEN = (*NIFTI_ENDINGS, ".nrrd", ".mha")  # of files that `write_volume` writes


@dataclass(frozen=True)
class Geometry:
    """How one case lies on disk and inside the suite; plain numbers only.

    Attributes:
        affine: native voxel-to-world matrix, 4 x 4, in mm.
        shape: native array shape.
        orientation: nibabel orientation transform native -> canonical, 3 x 2.
        spacing: canonical voxel size, before any resampling.
        resampled: canonical shape after resampling (equal to the canonical shape where nothing was resampled).
        crop: (start, stop) for each canonical axis, on the resampled grid.
        header: the NIfTI header of the file it was read from, in hexadecimal; "" where there is none.
        ending: of that file's name, one of `ENDINGS`.
    """

    affine: tuple[tuple[float, ...], ...]
    shape: tuple[int, ...]
    orientation: tuple[tuple[float, ...], ...]
    spacing: tuple[float, ...]
    resampled: tuple[int, ...]
    crop: tuple[tuple[int, int], ...]
    header: str = ""
    ending: str = ".nii.gz"

    @classmethod
    def of(cls, affine: np.ndarray, shape: Sequence[int], header: str = "", ending: str = ".nii.gz") -> "Geometry":
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
            header=header,
            ending=ending,
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
        fields: dict[str, Any] = {
            k: tuple(map(tuple, v)) if k in nested else v if isinstance(v, str) else tuple(v) for k, v in data.items()
        }
        return cls(**fields)


TOLERANCE = 0.05  # voxels by which the corners of two grids that count as one may lie apart


def displacement(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """How far the voxels of two grids of one shape lie apart at most, in voxels (of the smallest side of the first one).

    The difference of two affine maps is largest at a corner.

    Args:
        first, second: voxel-to-world matrices, 4 x 4.
    """
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.asarray(shape) - 1)
    apart = corners @ (np.asarray(first) - np.asarray(second))[:3, :3].T + (np.asarray(first) - np.asarray(second))[:3, 3]
    return float(np.linalg.norm(apart, axis=1).max() / np.linalg.norm(np.asarray(first)[:3, :3], axis=0).min())


def resample(maps: torch.Tensor, shape: Sequence[int], discrete: bool = False) -> torch.Tensor:
    """Resizes maps (C, X, Y, Z) to `shape` over the same field of view; linear, or nearest for labels. Keeps the dtype."""
    if tuple(maps.shape[1:]) == tuple(shape):
        return maps
    mode = {"mode": "nearest-exact"} if discrete else {"mode": "trilinear", "align_corners": False}
    return torch.nn.functional.interpolate(maps[None].float(), size=tuple(shape), **mode)[0].to(maps.dtype)


HEADERS = ("auto", "sform", "qform", "pixdim")  # what of a NIfTI header says where the voxels lie


def read_volume(path: Path, header_only: bool = False, header: str = "auto") -> tuple[np.ndarray | None, np.ndarray, tuple[int, ...]]:
    """Reads a NIfTI, Analyze, NRRD or MetaImage volume: (array in its stored type where unscaled, else float32; affine; shape).

    A trailing axis of length one is dropped. With `header_only` the array is None. The affine leads from voxels to mm. With `header="auto"`
    it is the sform, without one the qform, without both the header's voxel sizes, as nibabel reads it. Where the sform has other voxel sizes than `pixdim`
    (by more than 1 %), sizes of exactly 1 are taken for never set; of two others `pixdim` counts, as in ITK: with the directions of the
    qform, or of the sform where there is no qform. `sform` and `qform` take that one; `pixdim` takes the voxel sizes, along right, anterior
    and superior. Units of meters and micrometers become mm.

    Raises:
        SuiteError: missing, unreadable, truncated, not three-dimensional, or colors or complex numbers, or without the form that is asked
            for; names the file.
    """
    if ending_of(path) in ITK_ENDINGS:
        array, affine, shape = read_itk(path, header_only)
        return array.astype(np.float32) if array is not None and array.dtype == np.float64 else array, affine, shape
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
        affine = _header_affine(image)[0] if header == "auto" else _form(path, image, header)
        if header_only:
            return None, affine, shape
        slope, inter = image.dataobj.slope, image.dataobj.inter
        scaled = (slope, inter) != (1, 0)
        array = np.asarray(image.dataobj, dtype=np.float32) if scaled else np.asanyarray(image.dataobj)
        if array.dtype.byteorder not in "=|" or array.dtype == np.float64:
            array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("="))
        return array.reshape(shape), affine, shape
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file") from None
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise SuiteError(
            f"{path}: cannot be read as a NIfTI or Analyze volume ({error or type(error).__name__}); truncated or not an image?"
        ) from None


def read_channels(path: Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    """A NIfTI file of several channels: array (X, Y, Z, C) in its stored type where unscaled, else float32; and affine and header of one
    channel, as `write_volume` takes them.

    Raises:
        SuiteError: as of `read_volume`, or neither three- nor four-dimensional; names the file.
    """
    try:
        image = nib.load(path)
        if len(image.shape) not in (3, 4):
            raise SuiteError(f"{path}: expected one volume for each channel, got shape {tuple(image.shape)}")
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
        array = np.asarray(image.dataobj, dtype=np.float32) if scaled else np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file") from None
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise SuiteError(f"{path}: cannot be read as NIfTI ({error or type(error).__name__}); truncated or not an image?") from None
    header = read_header(path)
    return array if array.ndim == 4 else array[..., None], None if header else np.asarray(image.affine, dtype=float), header


def fits_int16(path: Path) -> bool:
    """Whether the stored type of a volume's values, which are unscaled, is told by the header to fit int16."""
    if ending_of(path) in ITK_ENDINGS:
        return itk_type_fits_int16(path)
    proxy = nib.load(path).dataobj
    return bool(np.can_cast(proxy.dtype, np.int16)) and (proxy.slope, proxy.inter) == (1, 0)


def ending_of(path: Path | str) -> str:
    """The ending of a file's name that `read_volume` knows; "" of others."""
    return next((ending for ending in ENDINGS if str(path).lower().endswith(ending)), "")


def stem_of(path: Path) -> str:
    """A file's name without the ending that `read_volume` knows."""
    return path.name[: len(path.name) - len(ending_of(path))]


def volume_file(folder: Path, stem: str) -> Path | None:
    """The file in `folder` with this name and an ending that `read_volume` knows, if there is one; the first of `ENDINGS` counts."""
    return next((path for ending in ENDINGS if (path := folder / f"{stem}{ending}").is_file()), None)


def _header_affine(image: Any) -> tuple[np.ndarray, str]:
    """The affine of `read_volume`, 4 x 4, and what the header says twice and differently ("" where it does not)."""
    affine, header = np.asarray(image.affine, dtype=float), image.header
    if not isinstance(header, nib.Nifti1Header):
        return affine, ""
    doubt, stated = "", np.asarray(header["pixdim"][1:4], dtype=float)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if np.isfinite([*stated, *sizes]).all() and (stated > 0).all() and (sizes > 0).all() and np.abs(sizes / stated - 1).max() > 0.01:
        taken = "sform"
        if (stated != 1).any():
            taken = "pixdim"
            qform = header.get_qform(coded=True)[0]
            affine = affine * [*(stated / sizes), 1] if qform is None else qform
        doubt = f"sform {_sizes(sizes)}, pixdim {_sizes(stated)}: {taken} counts"
    return _in_millimeters(header) @ affine, doubt


def _form(path: Path, image: Any, header: str) -> np.ndarray:
    """The affine, 4 x 4, in mm, that one part of a NIfTI header tells; of other formats the only one."""
    known = image.header
    if not isinstance(known, nib.Nifti1Header):
        return _header_affine(image)[0]
    if header == "pixdim":
        affine = np.diag([*np.asarray(known["pixdim"][1:4], dtype=float), 1])
    else:
        affine, code = known.get_sform(coded=True) if header == "sform" else known.get_qform(coded=True)
        if affine is None:
            raise SuiteError(f"{path}: has no {header} (code {int(code)}), which data.preprocessing.header={header} asks for")
    return _in_millimeters(known) @ np.asarray(affine, dtype=float)


def _in_millimeters(header: Any) -> np.ndarray:
    scale = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    return np.diag([scale, scale, scale, 1.0])


def header_doubt(path: Path) -> str:
    """What the header of a volume says twice and differently, and which counts; "" where there is nothing."""
    if ending_of(path) in ITK_ENDINGS:
        return ""
    return _header_affine(nib.load(path))[1]


def _sizes(values: np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def read_header(path: Path) -> str:
    """The NIfTI header of a file that `read_volume` reads, in hexadecimal; "" where there is none to keep, or nothing but the grid."""
    if ending_of(path) in ITK_ENDINGS:
        return ""
    header = nib.load(path).header
    return header.binaryblock.hex() if isinstance(header, nib.Nifti1Header) else ""


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray | None, header: str = "") -> Path:
    """Writes a file atomically (a reader never sees half of it), in the format that the ending of `path` says (one of `WRITTEN`).

    Args:
        affine: voxel-to-world matrix, 4 x 4, in mm; None with a header.
        header: of `read_header`, for NIfTI: its grid, codes, units and description are kept, so that every program sees both files on one grid.
    """
    with whole(path) as temporary:
        if ending_of(path) in ITK_ENDINGS:
            write_itk(temporary, array, np.asarray(affine))
        else:
            _image(np.ascontiguousarray(array), affine, bytes.fromhex(header)).to_filename(temporary)
    return Path(path)


def write_native(path: Path, array: np.ndarray, geometry: Geometry) -> Path:
    """Writes an array (X, Y, Z) on the native grid of a case, as NIfTI with the header of its first image where that has one."""
    kept = geometry.header if ending_of(path) not in ITK_ENDINGS else ""
    return write_volume(path, array, None if kept else np.asarray(geometry.affine), kept)


def _image(array: np.ndarray, affine: np.ndarray | None, header: bytes) -> Any:
    if not header:
        return nib.Nifti1Image(array, np.asarray(affine))
    kind = nib.Nifti2Image if len(header) == nib.Nifti2Header.sizeof_hdr else nib.Nifti1Image
    kept = kind.header_class(header, check=False)
    kept.set_data_dtype(array.dtype)
    kept.set_slope_inter(1, 0)
    kept["cal_min"] = kept["cal_max"] = 0  # a window of gray values
    kept.set_intent("none")
    return kind(array, None, kept)
