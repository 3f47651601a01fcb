"""Distance maps of three regions on a 240 x 240 x 155 grid: this suite against SciPy's `distance_transform_edt`, one thread each.

    python benchmarks/distance_speed.py [rounds]

Four simulated cases at 1 mm. One-sided maps take SciPy one transform per region, signed ones two; in-plane signed maps two per slice that
has the region. Median over cases of the ratio of times, measured in turn, and the largest difference. The conversion to float16 is not
part of it.
"""

import statistics
import sys
from functools import partial

import numpy as np
import torch
from interleaved import machine, medians, seconds
from scipy.ndimage import distance_transform_edt

from datamodules.simulated.simulation import Simulation, simulate
from lightning_modules.distances import distance_outside, signed_distance

GRID, SPACING = (240, 240, 155), (1.0, 1.0, 1.0)


def masks(number: int) -> np.ndarray:
    """WT, TC, ET (3, X, Y, Z) of a simulated case, on the BraTS grid."""
    label = simulate(Simulation(spacing=1.0), number).label
    padded = np.zeros(GRID, label.dtype)
    padded[tuple(slice(0, min(a, b)) for a, b in zip(label.shape, GRID, strict=True))] = label[tuple(slice(0, n) for n in GRID)]
    return np.stack([padded > 0, (padded == 1) | (padded == 4), padded == 4])


def scipy_outside(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return distance_transform_edt(~mask, sampling=spacing)


def scipy_signed(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    inside = distance_transform_edt(mask, sampling=spacing)
    return scipy_outside(mask, spacing) - np.where(mask, inside - min(spacing), 0)


def in_slices(of_grid, mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    result = np.zeros(mask.shape, np.float32)
    for z in np.flatnonzero(mask.any(axis=(0, 1))):
        result[:, :, z] = of_grid(np.ascontiguousarray(mask[:, :, z]), spacing[:2])
    return result


KINDS = {
    "one-sided": (distance_outside, scipy_outside),
    "signed": (signed_distance, scipy_signed),
    "signed, in slices": (partial(in_slices, signed_distance), partial(in_slices, scipy_signed)),
}


def every(way, regions: np.ndarray) -> list[np.ndarray]:
    return [way(mask, SPACING) for mask in regions]


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(machine())
    cases = [case for case in map(masks, range(12)) if all(mask.any() for mask in case)][:4]
    for kind, (ours, scipy) in KINDS.items():
        ratios, worst = [], 0.0
        for number, regions in enumerate(cases):
            worst = max(worst, *(float(np.abs(a - b).max()) for a, b in zip(every(ours, regions), every(scipy, regions), strict=True)))
            times = medians({"suite": partial(seconds, every, ours, regions), "SciPy": partial(seconds, every, scipy, regions)}, rounds)
            ratios.append(times["suite"] / times["SciPy"])
            print(f"{kind}, case {number}: suite {times['suite']:.3f} s, SciPy {times['SciPy']:.3f} s, ratio {ratios[-1]:.3f}")
        print(f"{kind}: {statistics.median(ratios):.3f} of SciPy's time (median over cases), largest difference {worst:.2g} mm")


if __name__ == "__main__":
    main()
