"""NRRD and MetaImage files, read and written by SimpleITK; axes and world of the suite (RAS) instead of ITK's (LPS)."""

from pathlib import Path

import numpy as np

from lesionbench.errors import SuiteError

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk(path: Path, header_only: bool = False) -> tuple[np.ndarray | None, np.ndarray, tuple[int, ...]]:
    """As `geometry.read_volume`: (array (X, Y, Z) in its stored type; affine; shape). Trailing axes of length one are dropped.

    Raises:
        SuiteError: missing, unreadable, several values in a voxel, or not three-dimensional; names the file.
    """
    import SimpleITK as sitk

    if not Path(path).is_file():
        raise SuiteError(f"{path}: no such file")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        count, shape = reader.GetNumberOfComponents(), tuple(reader.GetSize())
        array = None if header_only else sitk.GetArrayFromImage(reader.Execute()).T
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        name = "MetaImage" if str(path).lower().endswith((".mha", ".mhd")) else "NRRD"
        raise SuiteError(
            f"{path}: cannot be read as {name} ({reason}); truncated, or its data file is missing? Copy or download it again"
        ) from None
    if count != 1:
        raise SuiteError(f"{path}: holds {count} values in every voxel, not intensities or labels; export one channel, or a label map")
    full, shape = shape, _without_trailing(shape)
    if len(shape) != 3 or 0 in shape:
        raise SuiteError(f"{path}: expected one 3D volume, got shape {full}")
    axes = np.reshape(reader.GetDirection(), (len(full), len(full)))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * reader.GetSpacing()[:3], reader.GetOrigin()[:3]
    return None if array is None else array.reshape(shape), _LPS_TO_RAS @ affine, shape


def itk_type_fits_int16(path: Path) -> bool:
    """Whether every value of the file's type is a value of int16."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkInt16)


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Writes an array (X, Y, Z) with its voxel-to-world matrix, 4 x 4, in mm, compressed."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    world = _LPS_TO_RAS @ np.asarray(affine)
    sizes = np.linalg.norm(world[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetOrigin(world[:3, 3].tolist())
    image.SetDirection((world[:3, :3] / sizes).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _without_trailing(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
