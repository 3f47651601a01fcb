"""The bodies that simulated cases are made of: a deformed standard brain, and the lesions that are planted in it.

Positions are millimetres from the center of the template's first voxel, axes right, anterior, superior. Every random part draws from its
own generator (`Draw`), so leaving one out, or asking for another voxel size, leaves the others as they were. Only NumPy and SciPy
functions that do not use threads are called, so a case is the same to the last bit wherever it is made.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from scipy import ndimage

from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator

if TYPE_CHECKING:
    from datamodules.simulated.difficulty import Difficulty

Draw = Callable[[str], np.random.Generator]  # name of a random part -> its generator
Axes = Sequence[np.ndarray]  # three vectors of positions in mm
Paint = list[tuple[np.ndarray, dict[str, float]]]  # (weight (N,) in [0, 1], channel -> value in units of white matter), in order

EXTENT = (197, 233, 189)  # mm, of the template
ORIGIN = (-98.0, -134.0, -72.0)  # MNI position of the template's first voxel
MIDDLE = (98.0, 116.0, 78.0)  # about the middle of the brain
FAR = 25.0  # mm; distances on the template are kept up to here
RATER_SHIFTS = (-1.5, 1.5, 0.0, -3.0, 3.0)  # mm by which rater 1, 2 ... draws outside of the boundary
HABITAT_RISK = (-1.0, 1.2, 0.3, 0.8)  # log hazard per share of habitat 1, 2 ...


def draw_for(seed: int, index: int) -> Draw:
    """The generators of case `index`."""
    return lambda name: numpy_generator("simulation", seed, index, name)


@dataclass(frozen=True)
class Template:
    """The standard brain, blurred to a voxel size; maps are uint8 (1 mm: 255 = 1; distances: 10 = 1 mm).

    `distances` (to the ventricles; to the brain's surface, inside) lie on every second voxel. `white` lists points (N, 3) in white matter.
    """

    gm: np.ndarray
    wm: np.ndarray
    brain: np.ndarray
    texture: np.ndarray
    ventricle: np.ndarray
    depth: np.ndarray
    white: np.ndarray


def packaged(what: str) -> Path:
    """File of the template inside nilearn: `t1` (skull-stripped), `gm` or `wm` (tissue probability).

    Raises:
        SuiteError: the installed nilearn does not hold it.
    """
    found = importlib.util.find_spec("nilearn")
    folder = Path(found.origin).parent / "datasets" / "data" if found else Path("nilearn/datasets/data")
    file = folder / f"mni_icbm152_{what}_tal_nlin_sym_09a_converted.nii.gz"
    if not file.is_file():
        raise SuiteError(f"no ICBM 152 template in {folder}; install it with: pip install 'nilearn>=0.11'")
    return file


@lru_cache(maxsize=2)
def template(spacing: float) -> Template:
    """ICBM 152 2009a nonlinear symmetric (Fonov et al., NeuroImage 2011), as packaged with nilearn; no download.

    Raises:
        SuiteError: the installed nilearn does not hold it.
    """
    t1, gm, wm = (np.asanyarray(nib.load(packaged(k)).dataobj) for k in ("t1", "gm", "wm"))
    blur = 0.42 * spacing if spacing > 1 else 0.0
    closed = ndimage.gaussian_filter((t1 > 0).astype(np.float32), 2.5, truncate=2) > 0.45  # the tight mask leaves out the fluid of sulci
    coarse, tissue = closed[::2, ::2, ::2], (gm.astype(np.int16) + wm)[::2, ::2, ::2]
    depth = ndimage.distance_transform_edt(coarse) * 2
    ventricle = ndimage.distance_transform_edt(~((tissue < 128) & (depth > 18))) * 2
    expected = (167.0 * gm + 220.0 * wm + 76.0 * (255.0 - np.minimum(gm.astype(np.int16) + wm, 255))).astype(np.float32) / 255
    texture = np.where(t1 > 0, np.clip((t1 - expected) / 200, -0.25, 0.25), 0).astype(np.float32)
    white = np.argwhere((wm[::4, ::4, ::4] > 128) & (depth[::2, ::2, ::2] > 10)[: -(-197 // 4)]) * 4
    return Template(
        gm=_blurred(gm, blur),
        wm=_blurred(wm, blur),
        brain=_blurred(closed.astype(np.uint8) * 255, max(blur, 0.7)),
        texture=_blurred(((texture + 0.25) * 510).astype(np.uint8), blur),
        ventricle=np.minimum(ventricle, FAR).astype(np.float32),
        depth=np.minimum(depth, FAR).astype(np.float32),
        white=white[white[:, 2] > 50].astype(np.float32),  # above the brain stem
    )


def _blurred(array: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(array, sigma, output=np.uint8, truncate=3) if sigma else array


def grid(spacing: float) -> tuple[np.ndarray, ...]:
    """Voxel centers along the three axes, in mm; covers the template."""
    return tuple(((np.arange(int(np.ceil(e / spacing))) + 0.5) * spacing - 0.5).astype(np.float32) for e in EXTENT)


class Smooth:
    """A smooth random function of position with mean 0 and standard deviation about 1: cubic B-splines with knots every `scale` mm."""

    def __init__(self, rng: np.random.Generator, scale: float) -> None:
        self.scale = scale
        self.knots = rng.standard_normal([int(e / scale) + 5 for e in EXTENT], dtype=np.float32) * np.float32(3.0)

    def __call__(self, axes: Axes) -> np.ndarray:
        """Values on the grid of `axes`, (X, Y, Z) float32. Explicit sums: a matrix product could depend on the number of threads."""
        values = self.knots
        for axis, positions in enumerate(axes):
            t = np.clip(positions / self.scale, -0.5, self.knots.shape[axis] - 4.5) + 0.5
            start = np.floor(t).astype(np.intp)
            f = (t - start).astype(np.float32)
            weights = ((1 - f) ** 3 / 6, (3 * f**3 - 6 * f**2 + 4) / 6, (-3 * f**3 + 3 * f**2 + 3 * f + 1) / 6, f**3 / 6)
            shape = [-1 if k == axis else 1 for k in range(3)]
            values = sum(np.take(values, start + j, axis=axis) * w.astype(np.float32).reshape(shape) for j, w in enumerate(weights))
        return values


@dataclass(frozen=True)
class Blob:
    """Where a lesion is and how large: center (template mm), radius (mm), stretch of the three axes (their product is 1)."""

    center: tuple[float, ...]
    radius: float
    stretch: tuple[float, ...]

    @classmethod
    def drawn(cls, rng: np.random.Generator, radius: Sequence[float], white: np.ndarray) -> "Blob":
        """A blob in white matter, away from the midline so that it belongs to one hemisphere."""
        size = float(radius[0] + (radius[1] - radius[0]) * rng.random())
        lateral = white[np.abs(white[:, 0] - MIDDLE[0]) > min(10 + 0.4 * size, 24)]
        stretch = np.exp(rng.uniform(-0.25, 0.25, 3))
        return cls(tuple(lateral[rng.integers(len(lateral))].tolist()), size, tuple((stretch / np.cbrt(stretch.prod())).tolist()))


class Deformation:
    """Subject position -> template position: rotation and scaling, a coarse and a fine smooth displacement, a lesion that pushes."""

    def __init__(self, draw: Draw, difficulty: "Difficulty") -> None:
        rng = draw("pose")
        turn, grow = rng.uniform(-0.08, 0.08, 3), rng.uniform(-0.05, 0.05, 3)
        x, y, z = turn if difficulty.deformation else (0.0, 0.0, 0.0)
        size = 1 + grow if difficulty.deformation else np.ones(3)
        self.matrix = np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]]) * size  # small angles
        self.fields = [
            (amount, [Smooth(draw(f"displacement {scale} {k}"), scale) for k in range(3)])
            for scale, amount in ((45.0, difficulty.deformation), (18.0, 0.3 * difficulty.deformation))
            if amount
        ]
        self.push: tuple[np.ndarray, float, float] | None = None

    def __call__(self, axes: Axes) -> list[np.ndarray]:
        """Template coordinates (three arrays (X, Y, Z), float32) of the grid of `axes`."""
        parts = [(a - m).reshape([-1 if k == j else 1 for k in range(3)]) for j, (a, m) in enumerate(zip(axes, MIDDLE, strict=True))]
        target = [sum(np.float32(row[k]) * parts[k] for k in range(3)) + np.float32(m) for row, m in zip(self.matrix, MIDDLE, strict=True)]
        for amount, smooth in self.fields:
            target = [t + np.float32(amount) * f(axes) for t, f in zip(target, smooth, strict=True)]
        if self.push:
            center, radius, strength = self.push
            offset = [t - np.float32(c) for t, c in zip(target, center, strict=True)]
            pull = np.float32(strength) * np.exp(-(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) / np.float32(2 * radius**2))
            target = [t - pull * o for t, o in zip(target, offset, strict=True)]
        return target

    def place(self, point: Sequence[float]) -> np.ndarray:
        """Subject position (3,) of a template position, by fixed-point iteration."""
        position = np.array(point, dtype=np.float32)
        for _ in range(5):
            position += np.array(point, np.float32) - np.array(
                [t.item() for t in self([position[k : k + 1] for k in range(3)])], np.float32
            )
        return position


@dataclass
class Subject:
    """A brain on a grid. `inside` is the brain mask (X, Y, Z); the maps below list its voxels, (N,) float32."""

    axes: Axes
    deformation: Deformation
    inside: np.ndarray
    gm: np.ndarray
    wm: np.ndarray
    csf: np.ndarray
    texture: np.ndarray
    ventricle: np.ndarray
    depth: np.ndarray

    @classmethod
    def made(cls, draw: Draw, difficulty: "Difficulty", spacing: float, blob: Blob | None) -> "Subject":
        """The brain of one case; `blob` pushes the tissue around it away (mass effect)."""
        axes, source, deformation = grid(spacing), template(spacing), Deformation(draw, difficulty)
        if blob and difficulty.mass_effect:
            deformation.push = (np.array(blob.center), blob.radius, difficulty.mass_effect)
        target = deformation(axes)
        inside = _sample(source.brain, target) > 127
        listed = [t[inside] for t in target]
        gm, wm = _sample(source.gm, listed) / 255, _sample(source.wm, listed) / 255
        total = np.maximum(gm + wm, 1)
        half = [t / 2 for t in listed]
        return cls(
            axes=axes, deformation=deformation, inside=inside, gm=gm / total, wm=wm / total, csf=np.maximum(1 - gm - wm, 0),
            texture=_sample(source.texture, listed) / 510 - 0.25, ventricle=_sample(source.ventricle, half), depth=_sample(source.depth, half),
        )  # fmt: skip

    def field(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """A smooth random map (N,)."""
        return Smooth(rng, scale)(self.axes)[self.inside]

    def distance(self, draw: Draw, name: str, blob: Blob, irregularity: float, reach: float) -> np.ndarray:
        """Distance from the blob's center in units of its radius (N,), perturbed by smooth noise; infinite beyond `reach` mm."""
        center = self.deformation.place(blob.center)
        box = tuple(slice(*np.searchsorted(a, (c - reach, c + reach))) for a, c in zip(self.axes, center, strict=True))
        near = [a[s] for a, s in zip(self.axes, box, strict=True)]
        parts = [((a - c) / np.float32(s * blob.radius)) ** 2 for a, c, s in zip(near, center, blob.stretch, strict=True)]
        distance = np.sqrt(parts[0][:, None, None] + parts[1][:, None] + parts[2])
        for part, scale in enumerate((blob.radius, 0.4 * blob.radius)):
            bumps = Smooth(draw(f"{name} shape {part}"), max(scale, 5.0))(near)
            distance = distance * np.exp(np.float32(irregularity * (0.5, 0.3)[part]) * np.clip(bumps, -2, 2))
        full = np.full(self.inside.shape, np.inf, np.float32)
        full[box] = distance
        return full[self.inside]

    def connected(self, mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
        """The parts of `mask` (N,) that touch `seed` (N,)."""
        full = np.zeros(self.inside.shape, bool)
        full[self.inside] = mask
        labels = ndimage.label(full)[0][self.inside]
        kept = np.zeros(int(labels.max(initial=0)) + 1, bool)
        kept[labels[mask & seed]] = True
        kept[0] = False
        return kept[labels]


def _sample(array: np.ndarray, coordinates: list[np.ndarray]) -> np.ndarray:
    return ndimage.map_coordinates(array, coordinates, order=1, output=np.float32, mode="constant")


@dataclass
class Lesion:
    """What a variant adds to a subject.

    Attributes:
        label: values on disk of the subject's voxels (N,), uint8; None where only raters draw.
        paint: what it looks like.
        raters: one label (N,) per rater.
        habitats: habitat numbers (N,), 0 outside the tumor.
        risk: log hazard of death.
    """

    label: np.ndarray | None
    paint: Paint = field(default_factory=list)
    raters: list[np.ndarray] = field(default_factory=list)
    habitats: np.ndarray | None = None
    risk: float = 0.0


EDEMA = {"t1": 0.76, "t1ce": 0.76, "t2": 1.75, "flair": 1.5}
RIM = {"t1": 0.72, "t1ce": 1.75, "t2": 1.4, "flair": 1.3}
NECROSIS = {"t1": 0.48, "t1ce": 0.45, "t2": 1.9, "flair": 0.9}
SCAR = {"t1": 0.42}
HABITATS = (  # signature of habitat 1, 2 ...: factors on the channels
    {"t1": 0.85, "t1ce": 0.85, "t2": 1.15, "flair": 1.15},
    {"t1": 1.15, "t1ce": 1.3, "t2": 0.85, "flair": 0.9},
    {"t1": 0.9, "t1ce": 1.25, "t2": 1.2, "flair": 0.8},
    {"t1": 1.2, "t1ce": 0.8, "t2": 0.8, "flair": 1.2},
)


def blob_of(variant: str, draw: Draw, difficulty: "Difficulty", spacing: float) -> Blob | None:
    """The main lesion of a case; None for variants that have none."""
    if variant in ("spots", "tissue", "healthy"):
        return None
    return Blob.drawn(draw("blob"), difficulty.radius, template(spacing).white)


def soft(depth: np.ndarray, width: float) -> np.ndarray:
    """Membership in [0, 1] of voxels `depth` mm inside a boundary that is `width` mm wide."""
    return 1 / (1 + np.exp(-np.clip(depth / np.float32(width), -8, 8) * 2))


def tumor(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: Blob, grade: str) -> Lesion:
    """Glioma: edema along white matter (2), enhancing rim (4) around necrosis (1). Low grades enhance in patches or not at all."""
    rng, radius = draw("tumor"), np.float32(blob.radius)
    d = subject.distance(draw, "tumor", blob, difficulty.irregularity, 2.6 * blob.radius)
    size, thickness = rng.uniform(0.35, 0.65), rng.uniform(0.2, 0.45)  # of the radius, of the core
    lumps = np.clip(subject.field(draw("core"), max(0.5 * blob.radius, 6.0)), -1.5, 1.5)
    core = np.maximum((size - d * np.exp(np.float32(0.5 * difficulty.irregularity) * lumps)) * radius, -99)
    outer = np.maximum((0.62 + 0.5 * subject.wm - d) * radius, -99)
    in_core = core > 0
    reached = subject.connected(in_core | ((outer > -2) & (subject.csf < 0.5)), in_core)  # fluid stops edema
    whole = in_core | ((outer > 0) & (subject.csf < 0.5) & reached)
    rim = np.float32(thickness * size) * radius * np.exp(np.clip(0.35 * subject.field(draw("rim"), 9.0), -0.6, 0.4)) - core
    if grade == "LGG":
        rim = np.minimum(rim, 4 * (subject.field(draw("patchy rim"), 12.0) - (0.3 if rng.random() < 0.5 else 99)))
    edema = soft(outer, 1.5) * np.where(in_core, 1, 1 - subject.csf) * reached
    label = np.where(in_core, np.where(rim > 0, 4, 1), np.where(whole, 2, 0)).astype(np.uint8)
    paint = [(edema, EDEMA), (soft(core, 0.8), NECROSIS), (soft(core, 0.8) * soft(rim, 0.8), RIM)]
    return Lesion(label, paint, risk=float((blob.radius - 19) / 10))


def habitats(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: Blob, grade: str) -> Lesion:
    """A tumor whose tissue falls into 2 to 4 habitats, each with its own intensities; the shares decide the risk of death."""
    lesion = tumor(subject, draw, difficulty, blob, grade)
    count = int(draw("habitat count").integers(2, 5))
    favor = draw("habitat shares").normal(0, 0.6, count)
    number, tumorous = np.zeros(len(lesion.label), np.uint8), lesion.label > 0
    fields = [subject.field(draw(f"habitat {h}"), max(0.5 * blob.radius, 6.0))[tumorous] for h in range(count)]
    number[tumorous] = np.argmax([(f - f.mean()) / f.std() + np.float32(b) for f, b in zip(fields, favor, strict=True)], axis=0) + 1
    shares = np.bincount(number[number > 0], minlength=5)[1:] / max((number > 0).sum(), 1)
    lesion.habitats, lesion.risk = number, float(5 * (shares @ np.array(HABITAT_RISK)) - 1.0)
    return lesion


def stroke(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: Blob, grade: str) -> Lesion:
    """Chronic infarct (1), dark on T1: a wedge of cortex and white matter that opens outwards, or a deep irregular cavity."""
    rng = draw("stroke")
    d = subject.distance(draw, "stroke", blob, difficulty.irregularity, 2.6 * blob.radius)
    edge = (1 - d) * np.float32(blob.radius)
    if rng.random() < 0.6:
        edge = np.minimum(edge, _wedge(subject, blob, rng.uniform(0.5, 0.9)) + 2 * subject.field(draw("wedge"), 9.0))
    edge = np.maximum(edge, -99)
    label = subject.connected(edge > 0, d < 0.7).astype(np.uint8)
    return Lesion(label, [(soft(np.where(label > 0, edge, np.minimum(edge, -2)), 1.2), SCAR)])


def _wedge(subject: Subject, blob: Blob, angle: float) -> np.ndarray:
    """Signed distance (mm, inside positive) to a cone with half-angle `angle` (rad) from within the blob outwards from the brain's middle."""
    center, middle = subject.deformation.place(blob.center), np.array(MIDDLE, np.float32)
    outwards = (center - middle) / np.float32(max(float(np.sqrt(((center - middle) ** 2).sum())), 1.0))
    apex = center - outwards * np.float32(0.8 * blob.radius)
    x, y, z = (a[i] - p for a, i, p in zip(subject.axes, np.nonzero(subject.inside), apex, strict=True))
    along = x * outwards[0] + y * outwards[1] + z * outwards[2]
    across = np.sqrt(np.maximum(x**2 + y**2 + z**2 - along**2, 0))
    return along * np.float32(np.sin(angle)) - across * np.float32(np.cos(angle))


def raters(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: Blob, grade: str) -> Lesion:
    """A lesion with a blurred boundary (1), drawn by 2 to 5 raters, each always inside or always outside of it, with a shaky hand."""
    d = subject.distance(draw, "raters", blob, difficulty.irregularity, 2.6 * blob.radius)
    edge = np.maximum((1 - d) * np.float32(blob.radius), -99)
    contours = []
    for rater in range(int(draw("rater count").integers(2, 6))):
        shift = max(RATER_SHIFTS[rater], -0.4 * blob.radius) + 0.8 * subject.field(draw(f"rater {rater}"), 10.0)
        drawn = (edge + np.clip(shift, -0.6 * blob.radius, 6) > 0) & (subject.csf < 0.7)
        contours.append(subject.connected(drawn, d < 0.5).astype(np.uint8))
    return Lesion(None, [(soft(edge, 3.5) * (subject.csf < 0.7), EDEMA)], raters=contours)


def spots(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: None, grade: str) -> Lesion:
    """MS-like white-matter lesions (1), more of them near the ventricles; bright on FLAIR, dark on T1."""
    count = int(draw("spot count").integers(5, 31))
    weight = spot_map(subject, draw, "lesion", count, (2.0, 6.0), difficulty.irregularity, near_ventricle=0.6)
    weight = weight * (subject.csf < 0.5)
    return Lesion((weight > 0.5).astype(np.uint8), [(weight, EDEMA)])


def spot_map(
    subject: Subject, draw: Draw, name: str, count: int, radius: Sequence[float], irregularity: float, near_ventricle: float
) -> np.ndarray:
    """Membership (N,) in `count` small blobs in white matter; a share `near_ventricle` of them lies close to the ventricles."""
    rng, source = draw(f"{name} spots"), template(float(subject.axes[0][1] - subject.axes[0][0]))
    white = source.white[source.depth[tuple((source.white / 2).astype(int).T)] > 4]
    close = white[source.ventricle[tuple((white / 2).astype(int).T)] < 10]
    weight = np.zeros(len(subject.gm), np.float32)
    for spot in range(count):
        points = close if rng.random() < near_ventricle else white
        point, size = points[rng.integers(len(points))] + rng.uniform(-2, 2, 3), float(rng.uniform(*radius))
        blob = Blob(tuple(point.tolist()), size, tuple(np.exp(rng.uniform(-0.3, 0.3, 3)).tolist()))
        d = subject.distance(draw, f"{name} {spot}", blob, irregularity, 3 * size + 2)
        weight = np.maximum(weight, soft(np.maximum((1 - d) * np.float32(size), -99), 0.8))
    return weight


def healthy(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: None, grade: str) -> Lesion:
    """No lesion; the brain of the tumor case of the same number, before it was ill."""
    return Lesion(np.zeros(len(subject.gm), np.uint8))


def tissue(subject: Subject, draw: Draw, difficulty: "Difficulty", blob: None, grade: str) -> Lesion:
    """No lesion; the label is the tissue that fills most of the voxel: CSF (1), gray matter (2), white matter (3)."""
    return Lesion((np.argmax([subject.csf, subject.gm, subject.wm], axis=0) + 1).astype(np.uint8))


PLANTED: dict[str, Callable[..., Lesion]] = {
    "tumor": tumor, "stroke": stroke, "spots": spots, "tissue": tissue, "raters": raters, "healthy": healthy, "habitats": habitats,
}  # fmt: skip
