"""Seconds per step of one full evaluation L(theta), and texture features against scikit-image's co-occurrence matrix.

`python benchmarks/habitat_speed.py [patients] [voxels]` (100 patients x 20,000 voxels by default). A second setting with the same quantile
shows what the cached encoder saves. Texture is measured in turns in one run, in CPU time.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import sys
import time

import numpy as np
from fae_effects import simulate_patients

from lightning_modules.habitats import HabitatObjective, HabitatSettings, Theta
from lightning_modules.habitats.texture import cooccurrence, directions, texture_features


def evaluation(patients: int, voxels: int) -> None:
    """One evaluation with the default settings (2000 voxels of each patient for what is fitted, maps and texture of all)."""
    import torch

    torch.set_num_threads(1)
    objective = HabitatObjective(simulate_patients(patients, voxels, 0)[0], HabitatSettings(), 0)
    for title, theta in (("first of its quantile", Theta(0.9, 5)), ("encoder from the cache", Theta(0.9, 6))):
        start, busy = time.perf_counter(), time.process_time()
        row = objective(theta)
        busy = time.process_time() - busy
        steps = ", ".join(f"{name.removeprefix('s_')} {value:.2f}" for name, value in row.items() if name.startswith("s_"))
        print(f"L(theta), {patients} patients x {voxels} voxels, {title}: {time.perf_counter() - start:.1f} s, CPU {busy:.1f} s ({steps})")


def texture(size: int, levels: int = 5, rounds: int = 30) -> None:
    """Co-occurrence counts of a 2D map in four directions, with scikit-image and here, in turns."""
    from skimage.feature import graycomatrix
    from skimage.filters import gaussian

    noise = np.stack([gaussian(np.random.default_rng(k).normal(size=(size, size)), 2) for k in range(levels)])
    labels = (noise.argmax(axis=0) + 1).astype(np.uint8)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    ours, theirs, features, steps = [], [], [], directions(labels.shape)
    clock = time.process_time  # what else the machine does takes no part in the ratio
    for _ in range(rounds):
        start = clock()
        reference = graycomatrix(labels, [1], angles, levels=levels + 1, symmetric=True)
        middle = clock()
        found = cooccurrence(labels, levels, steps)
        end = clock()
        texture_features(labels, levels)
        features.append(clock() - end)
        ours.append(end - middle)
        theirs.append(middle - start)
    assert found.sum() == reference[1:, 1:].sum()
    here, there, nine = (statistics.median(seconds) * 1e3 for seconds in (ours, theirs, features))
    print(
        f"{size} x {size}: co-occurrence {here:.3f} ms, scikit-image {there:.3f} ms, ratio {here / there:.2f}; all nine features {nine:.2f} ms"
    )


def main(patients: int = 100, voxels: int = 20000) -> None:
    """Prints everything."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}")
    for size in (48, 128, 512):
        texture(size)
    evaluation(patients, voxels)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
