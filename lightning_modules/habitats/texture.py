"""Nine texture features of a label map, from its co-occurrence and run-length matrices, in 2D and 3D.

Definitions are those of PyRadiomics (van Griethuysen et al., Cancer Research 2017) with labels for gray levels: distance 1, symmetric,
all directions, background left out, every feature computed per direction and averaged. Relative mutual information, which PyRadiomics
lacks, is that of Li et al., BrainLes 2021, Table 2. No feature changes when labels change names.
"""

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
    """Symmetric co-occurrence counts (directions, levels, levels) of labels 1..levels; pairs with background (0) do not count."""
    width = levels + 1
    labels = labels.astype(np.intp, copy=False)
    rows = labels * width
    counts = np.empty((len(steps), width, width), np.int64)
    for count, step in zip(counts, steps, strict=True):
        here, there = _overlap(step)
        count[...] = np.bincount((rows[here] + labels[there]).ravel(), minlength=width**2).reshape(width, width)
    inner = counts[:, 1:, 1:]
    return inner + inner.transpose(0, 2, 1)


def run_lengths(labels: np.ndarray, levels: int, steps: list[tuple[int, ...]]) -> np.ndarray:
    """Run counts (directions, levels, longest): [d, i, j] runs of j + 1 voxels of label i + 1 along direction d.

    A run is followed from its first voxel, all runs of a direction at once, so the work is the number of voxels.
    """
    padded = np.pad(labels, 1).astype(np.intp, copy=False)
    flat = padded.ravel()
    strides = np.array([int(np.prod(padded.shape[axis + 1 :])) for axis in range(padded.ndim)])
    inside = np.flatnonzero(flat)
    longest = max(labels.shape, default=1)
    counts = np.zeros((len(steps), longest, levels + 1), np.int64)
    for count, step in zip(counts, steps, strict=True):
        offset = int(strides @ np.array(step))
        voxel = inside[flat[inside - offset] != flat[inside]]
        for length in range(longest):
            goes_on = flat[voxel + offset] == flat[voxel]
            count[length] = np.bincount(flat[voxel[~goes_on]], minlength=levels + 1)
            voxel = voxel[goes_on] + offset
            if not len(voxel):
                break
    return counts[:, :, 1:].transpose(0, 2, 1)


def _overlap(step: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    here = tuple(slice(max(-d, 0), -d if d > 0 else None) for d in step)
    there = tuple(slice(max(d, 0), d if d < 0 else None) for d in step)
    return here, there


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
