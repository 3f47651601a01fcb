"""Semi-real stroke cases: real lesion masks painted as T1 hypointensities into real T1 brains, everything in MNI space.

    case = insert_lesion(LesionInsertion(seed=0), brain(None, 2.0), Path("masks/Subject_001.nii.gz"), name="icbm152")

Every case (mask, brain) has its own deformation, contrast, lesion strength, bias field and noise. A stand-in: shape, size and place of the
lesions are real, their appearance is not. A case depends on (settings, mask, brain) and on nothing else.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy import ndimage

from datamodules.simulated.simulation_variants import ORIGIN, SCAR, Deformation, Draw, Smooth, grid, packaged, template
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume
from lesionbench.keyed import numpy_generator
from lesionbench.ranges import ASCENDING, NotNegative, Positive, Share, Whole

GENERATOR = 1  # raised whenever the same settings give other cases
GRAY = 0.76  # gray matter on T1, in units of white matter


@dataclass(frozen=True)
class LesionInsertion:
    """Settings. Numbers are standard deviations unless said otherwise; intensities count in units of white matter.

    Attributes:
        seed: of the whole set of cases.
        spacing: voxel size in mm, 0.5 to 8.
        deformation: displacement of the anatomy, and of the mask with it, mm (0: also no rotation and scaling).
        contrast: relative change of gray matter (by a power of the intensity).
        strength: (low, high) share of the way from the tissue's intensity to that of a scar, uniform.
        patchiness: relative change of the strength within a lesion.
        bias: logarithm of the bias field.
        noise: Rician noise.

    Raises:
        SuiteError: a value out of range.
    """

    seed: Whole = 0
    spacing: Positive = 2.0
    deformation: NotNegative = 3.5
    contrast: NotNegative = 0.05
    strength: Annotated[tuple[Share, Share], ASCENDING] = (0.5, 1.0)
    patchiness: NotNegative = 0.2
    bias: NotNegative = 0.08
    noise: NotNegative = 0.045

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", tuple(float(s) for s in self.strength))
        if not 0.5 <= self.spacing <= 8:
            raise SuiteError(f"data.insertion.spacing={self.spacing}: voxel size in mm, from 0.5 to 8")
        if len(self.strength) != 2 or not 0 <= self.strength[0] <= self.strength[1] <= 1:
            raise SuiteError(f"data.insertion.strength={list(self.strength)}: [low, high] with 0 <= low <= high <= 1")
        for part in fields(self):
            if part.name not in ("seed", "spacing", "strength") and getattr(self, part.name) < 0:
                raise SuiteError(f"data.insertion.{part.name}={getattr(self, part.name)}: a number of 0 or more")


@dataclass(frozen=True)
class Brain:
    """A T1 in MNI space, in units of its white matter, blurred to a voxel size; `to_voxel` (4 x 4) leads from MNI mm to its voxels."""

    t1: np.ndarray
    to_voxel: np.ndarray


@lru_cache(maxsize=4)
def brain(path: Path | None, spacing: float) -> Brain:
    """The T1 at `path`, or the ICBM 152 2009a template that comes with nilearn.

    Raises:
        SuiteError: unreadable, or nothing bright where white matter should be (not a T1 in MNI space).
    """
    path = packaged("t1") if path is None else Path(path)
    values, affine, _ = read_volume(path)
    t1, to_voxel = np.maximum(values.astype(np.float32), 0), np.linalg.inv(affine)
    white = template(1.0).white  # points in white matter, mm from the template's first voxel
    reference = float(np.median(_sample(t1, _voxels(to_voxel, list((white + np.float32(ORIGIN)).T)))))
    if reference <= 0:
        raise SuiteError(f"{path}: dark where MNI space has white matter; a brain must be a T1 in MNI space")
    return Brain(_blurred(t1 / np.float32(reference), affine, spacing), to_voxel)


def insert_lesion(settings: LesionInsertion, into: Brain, mask: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One case: (T1, int16, 0 outside of the brain; label, uint8, 0 and 1; affine), axes right, anterior, superior.

    Args:
        into: see `brain`.
        mask: lesion mask in MNI space; whatever is above 0.
        name: of the brain, for the case's randomness.

    Raises:
        SuiteError: an unreadable or empty mask.
    """

    def draw(what: str) -> np.random.Generator:
        return numpy_generator("planting", settings.seed, _stem(mask), name, what)

    axes = grid(settings.spacing)
    target = Deformation(draw, settings)(axes)
    inside = _sample(template(settings.spacing).brain, target) > 127
    world = [t[inside] + np.float32(o) for t, o in zip(target, ORIGIN, strict=True)]
    image = _sample(into.t1, _voxels(into.to_voxel, world))
    image **= np.float32(np.exp(settings.contrast * draw("contrast").standard_normal() / -np.log(GRAY)))
    lesion = _lesion(mask, world, settings.spacing)
    patches = 1 + settings.patchiness * Smooth(draw("patches"), 14.0)(axes)[inside]
    weight = np.float32(draw("strength").uniform(*settings.strength)) * np.clip(patches, 0, 1.5) * lesion
    image += np.clip(weight, 0, 1) * (np.float32(SCAR["t1"]) - image)
    image = _scanned(image, axes, inside, settings, draw)
    t1, label = np.zeros(inside.shape, np.int16), np.zeros(inside.shape, np.uint8)
    t1[inside], label[inside] = image, lesion > 0.5
    affine = np.diag([settings.spacing] * 3 + [1.0])
    affine[:3, 3] = [o + float(a[0]) for o, a in zip(ORIGIN, axes, strict=True)]
    return t1, label, affine


def _lesion(path: Path, world: list[np.ndarray], spacing: float) -> np.ndarray:
    """Membership in [0, 1] of positions (mm) in the lesion; its boundary is about as wide as a voxel."""
    values, affine, _ = read_volume(path)
    mask = values > 0
    if not mask.any():
        raise SuiteError(f"{path}: an empty lesion mask")
    margin = int(np.ceil(3 * spacing)) + 1
    box = [slice(max(s.start - margin, 0), s.stop + margin) for s in ndimage.find_objects(mask.astype(np.uint8))[0]]
    soft = _blurred(mask[tuple(box)].astype(np.float32), affine, spacing)
    coordinates = _voxels(np.linalg.inv(affine), world)
    return _sample(soft, [c - np.float32(s.start) for c, s in zip(coordinates, box, strict=True)])


def _scanned(image: np.ndarray, axes: tuple[np.ndarray, ...], inside: np.ndarray, settings: LesionInsertion, draw: Draw) -> np.ndarray:
    """Bias field, Rician noise and gain: int16, at least 1."""
    image = image * np.exp(np.float32(settings.bias) * Smooth(draw("bias"), 70.0)(axes)[inside])
    rng = draw("noise")
    real, imaginary = (np.float32(settings.noise) * rng.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
    gain = np.float32(draw("gain").uniform(250, 600))
    return np.clip(np.rint(np.sqrt((image + real) ** 2 + imaginary**2) * gain), 1, 32000).astype(np.int16)


def _blurred(volume: np.ndarray, affine: np.ndarray, spacing: float) -> np.ndarray:
    """Smoothed as much as voxels of `spacing` mm do, where these are larger than the volume's own."""
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return ndimage.gaussian_filter(volume, np.where(spacing > 1.01 * sizes, 0.42 * spacing / sizes, 0.0), truncate=3)


def _voxels(to_voxel: np.ndarray, world: list[np.ndarray]) -> list[np.ndarray]:
    """World positions (three arrays of one shape, mm) -> voxel coordinates."""
    return [sum(np.float32(row[k]) * world[k] for k in range(3)) + np.float32(row[3]) for row in to_voxel[:3]]


def _sample(array: np.ndarray, coordinates: list[np.ndarray]) -> np.ndarray:
    return ndimage.map_coordinates(array, coordinates, order=1, output=np.float32, mode="constant")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
