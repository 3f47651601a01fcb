"""DICOM series as volumes, read by SimpleITK (GDCM); what is no complete, evenly spaced stack of slices is refused by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesionbench.errors import SuiteError

POSITION, ORIENTATION, ROWS, COLUMNS = "0020|0032", "0020|0037", "0028|0010", "0028|0011"
UNEVEN = 0.02  # of the distance of slices, by which single ones may differ
TILT = 0.02  # of the distance of slices, by which their corners may move sideways from one to the next
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class _Slice:
    path: Path
    position: np.ndarray  # of its first voxel, mm, LPS
    axes: np.ndarray  # directions of a row and of a column, (2, 3)
    size: tuple[str, ...]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, GDCM does not warn of every file that is no DICOM."""
    import SimpleITK as sitk

    known = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(known)


def series_in(folder: Path) -> list[str]:
    """The UIDs of the DICOM series whose files lie in this very folder."""
    import SimpleITK as sitk

    with _quiet():
        return list(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def series_files(folder: Path) -> list[Path]:
    """The files of the first series in a folder, in no special order."""
    import SimpleITK as sitk

    with _quiet():
        return [Path(name) for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))]


def ordered_files(folder: Path) -> list[Path]:
    """The files of the one series in a folder that `read_series` accepts, in the order of its slices."""
    return [s.path for s in _ordered([_slice(path) for path in series_files(folder)])]


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The one series in a folder: array (X, Y, slices) in the units of its rescaling, and the voxel-to-world matrix (RAS), 4 x 4, in mm.

    Raises:
        SuiteError: no series or several, several frames in a file, slices of different size or direction, two at one place, uneven
            distances (a missing slice), a tilted stack, or what cannot be read; names the folder, and the files where it can.
    """
    import SimpleITK as sitk

    found = series_in(folder)
    if len(found) != 1:
        raise SuiteError(f"{folder}: holds {len(found) or 'no'} DICOM series; a folder of its own for each is needed")
    try:
        with _quiet():
            slices = [_slice(path) for path in series_files(folder)]
            spacing = _distance(folder, slices)
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames([str(s.path) for s in _ordered(slices)])
            image = reader.Execute()
    except RuntimeError as error:
        raise SuiteError(f"{folder}: the DICOM series cannot be read ({str(error).strip().splitlines()[-1]})") from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise SuiteError(f"{folder}: holds colors, not intensities; export gray values")
    first, affine = _ordered(slices)[0], np.eye(4)
    normal = np.cross(*first.axes)
    affine[:3, :3] = np.stack([*first.axes, normal], axis=1) * [*image.GetSpacing()[:2], spacing]
    affine[:3, 3] = first.position
    return sitk.GetArrayFromImage(image).T, _LPS_TO_RAS @ affine


def _slice(path: Path) -> _Slice:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetDimension() > 2 and reader.GetSize()[2] > 1:
        raise SuiteError(f"{path}: holds {reader.GetSize()[2]} frames; a series of single slices is needed (dcm2niix makes NIfTI of it)")
    lacking = [name for name, tag in (("position", POSITION), ("orientation", ORIENTATION)) if not reader.HasMetaDataKey(tag)]
    if lacking:
        raise SuiteError(f"{path}: the header has no image {' and no '.join(lacking)}; where the slice lies is not known")
    numbers = {tag: np.array([float(v) for v in reader.GetMetaData(tag).split("\\")]) for tag in (POSITION, ORIENTATION)}
    size = tuple(reader.GetMetaData(tag).strip() for tag in (ROWS, COLUMNS))
    return _Slice(path, numbers[POSITION], numbers[ORIENTATION].reshape(2, 3), size)


def _ordered(slices: Sequence[_Slice]) -> list[_Slice]:
    normal = np.cross(*slices[0].axes)
    return sorted(slices, key=lambda s: float(s.position @ normal))


def _distance(folder: Path, slices: Sequence[_Slice]) -> float:
    """Between neighbors, in mm; raises where the slices are no even stack."""
    if len(slices) < 2:
        raise SuiteError(f"{folder}: the series has one slice; a volume needs two or more")
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size:
            raise SuiteError(f"{other.path}: has {' x '.join(other.size)} pixels, {first.path.name} has {' x '.join(first.size)}")
        if np.abs(other.axes - first.axes).max() > 1e-3:
            raise SuiteError(
                f"{other.path}: lies in another direction than {first.path.name}; the folder mixes stacks, such as a localizer"
            )
    stack, normal = _ordered(slices), np.cross(*first.axes)
    steps = np.diff([s.position for s in stack], axis=0)
    along = steps @ normal
    typical = float(np.sort(along)[(len(along) - 1) // 2])
    if along.min() < 0.01:
        place = int(along.argmin())
        raise SuiteError(
            f"{folder}: {stack[place].path.name} and {stack[place + 1].path.name} lie at one place; the series holds several volumes (echoes, times)"
        )
    if np.abs(along - typical).max() > UNEVEN * typical:
        place = int(np.abs(along - typical).argmax())
        names = f"{stack[place].path.name} and {stack[place + 1].path.name}"
        raise SuiteError(f"{folder}: {names} lie {along[place]:.4g} mm apart, slices elsewhere {typical:.4g} mm; is a slice missing?")
    sideways = np.linalg.norm(steps - along[:, None] * normal, axis=1).max()
    if sideways > TILT * typical:
        raise SuiteError(
            f"{folder}: slices move {sideways:.3g} mm sideways from one to the next (a tilted gantry); resample the series to a straight stack"
        )
    return float(along.mean())
