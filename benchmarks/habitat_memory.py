"""Memory and time of one evaluation of FAE's joint loss on a store of voxels on disk, for one million and eleven million voxels.

    python benchmarks/habitat_memory.py [voxels of each patient]

37 and 367 patients of 30,000 voxels in three modalities. The encoder and the clusters are fitted to 2000 voxels of each patient, as by
default; maps and texture are made of all. Memory is what the process holds besides mapped files, at its largest.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from fae_effects import simulate_patients
from interleaved import machine

from lesionbench.geometry import Geometry
from lesionbench.voxels import VoxelRecord, VoxelStore
from lightning_modules.habitats import HabitatObjective, HabitatSettings, Theta
from lightning_modules.habitats.stages import tumors_of

COUNTS = (37, 367)


def write(folder: str, patients: int, voxels: int) -> None:
    """Simulated patients as the stage `voxels` leaves them."""
    store = VoxelStore(folder)
    for tumor in simulate_patients(patients, voxels, 0)[0]:
        shape = tuple(int(n) + 1 for n in tumor.positions.max(axis=0))
        grid = Geometry.of(np.eye(4), shape)
        survival = {"survival": tumor.days, "event": int(tumor.died)}
        store.write(VoxelRecord(tumor.case, tumor.case, "", shape, grid, survival), tumor.values, tumor.positions)


def evaluate(folder: str) -> None:
    """Prints voxels, MB before, MB at most, and seconds of processor time."""
    tumors = tumors_of(VoxelStore(folder), "survival", "event")
    peak, before, done = [anonymous()], anonymous(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(anonymous())

    threading.Thread(target=watch, daemon=True).start()
    start = time.process_time()
    row = HabitatObjective(tumors, HabitatSettings(), 0)(Theta(0.9, 5))
    done.set()
    count = sum(len(t.values) for t in tumors)
    print(
        f"{count / 1e6:.1f} M voxels  {before:.0f} MB before  {max(peak):.0f} MB at most  {time.process_time() - start:.0f} s  Ls {row['stability_loss']:.3f}"
    )


def anonymous() -> float:
    """MB of memory that is not a mapped file."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) / 1024


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["evaluate"]:
        evaluate(sys.argv[2])
    else:
        voxels = sys.argv[1] if len(sys.argv) > 1 else "30000"
        print(machine())
        with tempfile.TemporaryDirectory() as scratch:
            for count in COUNTS:
                folder = str(Path(scratch) / str(count))
                subprocess.run([sys.executable, __file__, "write", folder, str(count), voxels], check=True)
                subprocess.run([sys.executable, __file__, "evaluate", folder], check=True)


if __name__ == "__main__":
    main()
