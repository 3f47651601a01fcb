"""HDF5 and NRRD files as NIfTI volumes, so that all that comes after reads one format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume


def h5_names(path: Path) -> set[str]:
    """Names of the arrays in an HDF5 file; the arrays are not read.

    Raises:
        SuiteError: an unreadable file; names it.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            return set(file)
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read as HDF5 ({error}); truncated? Copy or download it again") from None


def h5_array(path: Path, name: str, dimensions: int) -> np.ndarray:
    """One array of an HDF5 file, its axes as they are stored.

    Raises:
        SuiteError: an unreadable file, no such array, or another number of dimensions; names the file and what is in it.
    """
    import h5py

    names = h5_names(path)
    if name not in names:
        raise SuiteError(f"{path}: no array '{name}', it holds {sorted(names) or 'nothing'}")
    try:
        with h5py.File(path) as file:
            array = np.asarray(file[name])
    except (OSError, TypeError) as error:
        raise SuiteError(f"{path}: '{name}' cannot be read ({error}); truncated? Copy or download it again") from None
    if array.ndim != dimensions or 0 in array.shape:
        raise SuiteError(f"{path}: '{name}' has shape {array.shape}, expected {dimensions} dimensions")
    return array


def write_pair(image: np.ndarray, label: np.ndarray | None, affine: np.ndarray, targets: Sequence[Path], source: Path) -> None:
    """Writes an image and its label to `targets` (image, and label where there is one).

    Raises:
        SuiteError: their shapes differ; names the source.
    """
    if label is not None and label.shape != image.shape:
        raise SuiteError(f"{source}: the image has shape {image.shape}, its label {label.shape}; both must lie on one grid")
    for path, array in zip(targets, (image, label), strict=False):
        write_volume(path, array, affine)
