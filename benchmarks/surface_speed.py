"""Dice, HD95 and average surface distance of three regions on 240 x 240 x 155 grids: this suite against MONAI.

    python benchmarks/surface_speed.py [folder with BraTS cases; default: simulated ones]

Six cases; each is compared with a distorted copy of its label, as a prediction of middling quality. Median over cases of the ratio, and the
largest difference of the distances. With `surface-distance` installed its time is shown too; it defines surfaces differently, so its
values are not compared.
"""

import importlib.util
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from interleaved import machine, medians, seconds
from scipy.ndimage import gaussian_filter

from datamodules.brats import BraTS
from datamodules.simulated.brats_layout import write_brats
from datamodules.simulated.simulation import Simulation
from lesionbench.geometry import read_volume
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.metrics.surface import surface_metrics

GRID, SPACING, ROUNDS = (240, 240, 155), (1.0, 1.0, 1.0), 3


def masks(label: np.ndarray) -> np.ndarray:
    """WT, TC, ET (3, X, Y, Z) of a BraTS label, on the BraTS grid."""
    padded = np.zeros(GRID, label.dtype)
    box = tuple(slice(0, min(a, b)) for a, b in zip(label.shape, GRID, strict=True))
    padded[box] = label[box]
    return np.stack([padded > 0, (padded == 1) | (padded == 4), padded == 4])


def distorted(truth: np.ndarray, seed: int) -> np.ndarray:
    """A smooth random threshold moves every border by some voxels, and specks are added far away."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.normal(size=GRID), 4) * 30
    result = np.stack([gaussian_filter(mask.astype(np.float32), 2) + 0.15 * noise > 0.5 for mask in truth])
    result |= gaussian_filter(rng.normal(size=GRID), 1.5) > 0.24
    return result


def ours(prediction: np.ndarray, truth: np.ndarray) -> list[list[float]]:
    return [
        [overlap_metrics(p, t)["dice"], *surface_metrics(p, t, SPACING, ("hd95", "asd")).values()]
        for p, t in zip(prediction, truth, strict=True)
    ]


def monai(prediction: np.ndarray, truth: np.ndarray) -> list[list[float]]:
    from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

    p, t = (torch.from_numpy(m)[None] for m in (prediction, truth))
    dice = compute_dice(p, t)[0]
    hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=SPACING)[0]
    asd = compute_average_surface_distance(p, t, include_background=True, symmetric=True, spacing=SPACING)[0]
    return torch.stack([dice, hd95, asd], dim=1).tolist()


def surface_distance(prediction: np.ndarray, truth: np.ndarray) -> None:
    import surface_distance as other

    for p, t in zip(prediction, truth, strict=True):
        distances = other.compute_surface_distances(t, p, SPACING)
        other.compute_robust_hausdorff(distances, 95)
        other.compute_average_surface_distance(distances)
        other.compute_dice_coefficient(t, p)


def main() -> None:
    torch.set_num_threads(1)
    ways = {"suite": ours, "MONAI": monai}
    if importlib.util.find_spec("surface_distance"):
        ways["surface-distance"] = surface_distance
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(sys.argv[1]) if len(sys.argv) > 1 else write_brats(Path(scratch) / "brats", Simulation(spacing=1.0), 6, progress=False)
        cases = BraTS(root, layout="2018" if len(sys.argv) > 1 else "2020").cases()[:6]
        truths = [masks(read_volume(case.label)[0]) for case in cases]
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    worst = 0.0
    print(machine())
    for number, truth in enumerate(truths):
        prediction = distorted(truth, number)
        a, b = np.array(ours(prediction, truth)), np.array(monai(prediction, truth))
        worst = max(worst, float(np.abs(a - b).max()))
        times = medians({name: partial(seconds, way, prediction, truth) for name, way in ways.items()}, ROUNDS)
        for name, value in times.items():
            ratios[name].append(value / times["suite"])
        print(
            cases[number].id,
            "  ".join(f"{name} {value * 1e3:.0f} ms" for name, value in times.items()),
            f"WT Dice {a[0, 0]:.3f} HD95 {a[0, 1]:.1f}",
        )
    for name in list(ways)[1:]:
        print(f"{name}: the suite is {statistics.median(ratios[name]):.1f} x as fast (median over cases)")
    print(f"largest difference to MONAI over Dice, HD95 (mm), ASD (mm): {worst:.2g}")


if __name__ == "__main__":
    main()
