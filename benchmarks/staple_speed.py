"""How fast is STAPLE on vote patterns against ITK's? Both fuse the same masks, in turn, on one thread; results must agree to 1e-3.

    python benchmarks/staple_speed.py [side of the volume, default 96]

Raters draw a ball each, shifted and scaled; what is timed is from masks in memory to the probability map.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import sys
import time

import numpy as np
import SimpleITK as sitk
import torch

from lightning_modules.raters.staple import staple

ROUNDS = 3


def masks(raters: int, side: int) -> np.ndarray:
    """(raters, side, side, side), bool."""
    rng = np.random.default_rng(raters)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    drawn = []
    for _ in range(raters):
        x, y, z = (axis - rng.normal(0, 0.05) for _ in range(3))
        drawn.append(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 < rng.uniform(0.1, 0.2))
    return np.stack(drawn)


def ours(drawn: np.ndarray) -> np.ndarray:
    """Vote patterns."""
    tensor = torch.from_numpy(drawn)
    return staple(tensor).posterior(tensor).numpy()


def itk(images: list) -> np.ndarray:
    """SimpleITK.STAPLEImageFilter."""
    fuse = sitk.STAPLEImageFilter()
    fuse.SetForegroundValue(1)
    return sitk.GetArrayFromImage(fuse.Execute(images))


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    print(
        f"{platform.machine()}, one thread, Python {platform.python_version()}, SimpleITK {sitk.Version.VersionString()}, {side}^3 voxels"
    )
    for raters in (2, 3, 5, 7):
        drawn = masks(raters, side)
        images = [sitk.GetImageFromArray(m.astype(np.uint8)) for m in drawn]
        times = {"ours": [], "itk": []}
        for _ in range(ROUNDS):
            for name, call in (("ours", lambda d=drawn: ours(d)), ("itk", lambda i=images: itk(i))):
                start = time.perf_counter()
                result = call()
                times[name].append(time.perf_counter() - start)
                if name == "ours":
                    own = result
        difference = float(np.abs(own - result).max())
        fast, slow = statistics.median(times["ours"]), statistics.median(times["itk"])
        print(f"{raters} raters  ours {fast:.3f} s  ITK {slow:.3f} s  ratio {slow / fast:.1f}  largest difference {difference:.1e}")
        if difference > 1e-3 or fast > slow:
            raise SystemExit("slower than ITK, or another result")


if __name__ == "__main__":
    main()
