"""Nine texture features of a label map, from its co-occurrence and run-length matrices, in 2D and 3D.

Definitions are those of PyRadiomics (van Griethuysen et al., Cancer Research 2017) with labels for gray levels: distance 1, symmetric,
all directions, background left out, every feature computed per direction and averaged. Relative mutual information, which PyRadiomics
lacks, is that of Li et al., BrainLes 2021, Table 2. No feature changes when labels change names.
"""

import math
from itertools import product

import numpy as np

FEATURES = ("rmi", "entropy", "joint_energy", "imc1", "lre", "sre", "non_uniformity", "run_variance", "run_entropy")
EPS = np.spacing(1.0)


def directions(shape: tuple[int, ...], plane: int | None = None) -> list[tuple[int, ...]]:
    """Unit steps, one of each pair of opposites: 4 in 2D, 13 in 3D; none along an axis of length 1, none that leaves the slices of `plane`.

    Every step is lexicographically positive.
    """
    steps = (s for s in product((-1, 0, 1), repeat=len(shape)) if s > (0,) * len(shape))
    return [s for s in steps if all(not d or (n > 1 and axis != plane) for axis, (d, n) in enumerate(zip(s, shape, strict=True)))]


def cooccurrence(labels: np.ndarray, levels: int, steps: list[tuple[int, ...]]) -> np.ndarray:
    """Symmetric co-occurrence counts (directions, levels, levels) of labels 1..levels; pairs with background (0) do not count.

    scikit-image counts in 2D. A volume is laid out in one line, with a background voxel behind every row, where a direction is a
    distance along the line: one call counts them all.
    """
    from skimage.feature import graycomatrix

    if not steps:
        return np.zeros((0, levels, levels), np.int64)
    if labels.ndim == 2:
        counts = graycomatrix(labels.astype(np.uint8, copy=False), [1], [math.atan2(*s) for s in steps], levels + 1, symmetric=True)
        return counts[1:, 1:, 0].transpose(2, 0, 1)
    line, strides = _line(labels, before=0)
    distances = [sum(d * s for d, s in zip(step, strides, strict=True)) for step in steps]
    return graycomatrix(line[None], distances, [0], levels + 1, symmetric=True)[1:, 1:, :, 0].transpose(2, 0, 1)


def run_lengths(labels: np.ndarray, levels: int, steps: list[tuple[int, ...]]) -> np.ndarray:
    """Run counts (directions, levels, longest): [d, i, j] runs of j + 1 voxels of label i + 1 along direction d.

    In a padded map laid out in one line a direction is a distance. Cut into rows of that length and read column by column, the voxels
    of every line along the direction follow each other, with background between the lines, so a run is a stretch of equal values.
    """
    line, strides = _line(labels, before=1)
    longest = max(labels.shape, default=1)
    counts = np.zeros((len(steps), (levels + 1) * (longest + 1)), np.int64)
    for count, step in zip(counts, steps, strict=True):
        distance = sum(d * s for d, s in zip(step, strides, strict=True))
        rows = np.zeros((-(-len(line) // distance), distance), np.uint8)
        rows.ravel()[: len(line)] = line
        columns = rows.T.ravel()
        ends = np.flatnonzero(columns[1:] != columns[:-1])
        value, length = columns[ends[1:]].astype(np.intp), np.diff(ends)
        foreground = value > 0
        count[...] = np.bincount(value[foreground] * (longest + 1) + length[foreground], minlength=counts.shape[1])
    return counts.reshape(len(steps), levels + 1, longest + 1)[:, 1:, 1:]


def _line(labels: np.ndarray, before: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """A map in one line of bytes, with background behind every row (and `before` it), and the distance along it of a step on each axis."""
    padded = np.zeros([n + 1 + before for n in labels.shape], np.uint8)
    padded[tuple(slice(before, before + n) for n in labels.shape)] = labels
    return padded.ravel(), padded.strides


def texture_features(labels: np.ndarray, levels: int | None = None, plane: int | None = None) -> dict[str, float]:
    """The nine features (`FEATURES`) of a label map.

    Args:
        labels: integers (X, Y) or (X, Y, Z); 0 = background, which is left out.
        levels: number of labels; None = the largest.
        plane: axis along which a volume is cut into slices, for texture within slices; None = in all directions.

    Raises:
        ValueError: nothing but background.
    """
    found = np.nonzero(labels)
    if not len(found[0]):
        raise ValueError("texture of a label map without labels")
    box = labels[tuple(slice(i.min(), i.max() + 1) for i in found)]
    levels = int(box.max()) if levels is None else levels
    steps = directions(box.shape, plane)
    share = np.bincount(labels[found], minlength=levels + 1)[1:] / len(found[0])
    features = {"entropy": float(-(share * np.log2(share + EPS)).sum())}
    features |= _of_pairs(cooccurrence(box, levels, steps)) | _of_runs(run_lengths(box, levels, steps), box)
    return {name: features[name] for name in FEATURES}


def _of_pairs(counts: np.ndarray) -> dict[str, float]:
    """Features of co-occurrence counts (directions, Ng, Ng); directions without pairs are left out, without any the map is a constant."""
    counts = counts[counts.any(axis=(1, 2))]
    if not len(counts):
        return {"rmi": 0.0, "joint_energy": 1.0, "imc1": 0.0}
    p = counts / counts.sum(axis=(1, 2), keepdims=True)
    px, py = p.sum(axis=2, keepdims=True), p.sum(axis=1, keepdims=True)
    hx, hy = (-(q * np.log2(q + EPS)).sum(axis=(1, 2)) for q in (px, py))
    hxy = -(p * np.log2(p + EPS)).sum(axis=(1, 2))
    hxy1 = -(p * np.log2(px * py + EPS)).sum(axis=(1, 2))
    conditional = -(p * np.log2(p / np.maximum(px, EPS) + EPS)).sum(axis=(1, 2))
    varied = np.maximum(hx, hy) > 1e-9
    divisor = np.where(varied, np.maximum(hx, hy), 1)
    rmi, imc1 = (hy - conditional) / np.where(varied, hy, 1) * varied, (hxy - hxy1) / divisor * varied
    return {"rmi": float(rmi.mean()), "joint_energy": float((p**2).sum(axis=(1, 2)).mean()), "imc1": float(imc1.mean())}


def _of_runs(counts: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Features of run counts (directions, Ng, lengths); a map without directions (one voxel) is a run of one."""
    if not len(counts):
        counts = np.zeros((1, int(labels.max()), 1))
        counts[0, int(labels.max()) - 1, 0] = 1
    runs = counts.sum(axis=(1, 2), keepdims=True)
    p, length = counts / runs, np.arange(1, counts.shape[2] + 1)
    mean = (p * length).sum(axis=(1, 2), keepdims=True)
    values = {
        "lre": (p * length**2).sum(axis=(1, 2)),
        "sre": (p / length**2).sum(axis=(1, 2)),
        "non_uniformity": (p.sum(axis=2) ** 2).sum(axis=1),
        "run_variance": (p * (length - mean) ** 2).sum(axis=(1, 2)),
        "run_entropy": -(p * np.log2(p + EPS)).sum(axis=(1, 2)),
    }
    return {name: float(v.mean()) for name, v in values.items()}
