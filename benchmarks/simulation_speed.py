"""Seconds per simulated case at 2 mm, for every variant: `python benchmarks/simulation_speed.py [cases]`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import sys
import time

from datamodules.simulated.simulation import VARIANTS, Simulation, simulate


def main(cases: int = 5) -> None:
    """Prints the median and the slowest of `cases` cases; the template, read once per process, is read before."""
    simulate(Simulation(), 0)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}")
    for variant in VARIANTS:
        seconds = []
        for index in range(cases):
            start = time.perf_counter()
            simulate(Simulation(variant=variant), index)
            seconds.append(time.perf_counter() - start)
        print(f"{variant:10s} median {statistics.median(seconds):.2f} s  slowest {max(seconds):.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
