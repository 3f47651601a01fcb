"""What a UMM step costs, against the plain steps of its branches: `python benchmarks/umm_step.py [rounds] [x,y,z] [cpu|cuda]`.

All times are of one process (processor time on a CPU, where one thread is used), interleaved: in each round a step of UMM, then for each branch a plain step (forward, loss, backward) and a
forward pass without gradient, dropout on. The bound is 1.05 (sum of plain + 7 x sum of passes without gradient) / sum of plain: T = 8
passes, one of them with gradient. Memory is the peak of a step above what there was before it, each in a process of its own: resident
memory on a CPU, allocated memory on a GPU (where bfloat16 is used).
"""

import multiprocessing
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system at once: resident memory follows them

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lesionbench.task import Task
from lightning_modules import UMM
from lightning_modules.inferers import Whole
from lightning_modules.losses import ClassBalancedCE
from lightning_modules.networks import PackUNet, basic_unet

PAPER = {"features": (16, 16, 32, 64, 128, 16), "dropout": 0.1}
BRANCHES = {"s": partial(basic_unet, dimensions=2, **PAPER), "p": partial(PackUNet, **PAPER), "v": partial(basic_unet, **PAPER)}
TASK = Task(channels=("t1", "t1ce", "t2", "flair"), classes={"background": 0, "ncr": 1, "ed": 2, "et": 4})


class Bench:
    """UMM with the networks of the paper and one batch of random numbers."""

    def __init__(self, size: tuple[int, ...], device: str, passes_at_once: int = 1) -> None:
        torch.manual_seed(0)
        self.device, self.method = (
            device,
            UMM(TASK, branches=BRANCHES, loss=ClassBalancedCE(), inferer=Whole(), passes_at_once=passes_at_once).to(device),
        )
        self.method.ramp_progress, self.method.log_terms = lambda: 1.0, lambda **_: None
        self.batch = {"image": torch.randn(1, 4, *size, device=device), "label": torch.randint(0, 4, (1, 1, *size), device=device)}

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def step(self) -> None:
        with self.cast():
            loss = self.method.training_step(self.batch, 0)
        loss.backward()
        self.method.zero_grad()

    def plain(self, name: str) -> None:
        with self.cast():
            loss = self.method.loss(self.method.network[name](self.batch["image"]), self.batch["label"])
        loss.backward()
        self.method.zero_grad()

    @torch.no_grad()
    def forward(self, name: str) -> None:
        with self.cast():
            self.method.network[name](self.batch["image"])

    def seconds(self, work: Callable[[], None]) -> float:
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        start = clock()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def memory(size: tuple[int, ...], device: str, name: str | None) -> float:
    """Peak of a plain step of branch `name`, or of a UMM step, in MiB."""
    bench = Bench(size, device)
    small = Bench((32, 32, 4), device)  # loads every kernel
    work = bench.step if name is None else partial(bench.plain, name)
    (small.step if name is None else partial(small.plain, name))()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    import resource

    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def measured(size: tuple[int, ...], device: str, name: str | None) -> float:
    """`memory`, on a CPU in a process of its own: the peak of a process never falls."""
    if device == "cuda":
        return memory(size, device, name)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(memory, (size, device, name))


def main(rounds: int = 5, sizes: str = "48,48,32", device: str = "cpu") -> None:
    size = tuple(int(s) for s in sizes.split(","))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    print(f"{where}, torch {torch.__version__}; one sample of 4 x {' x '.join(map(str, size))}, T = 8, dropout 0.1")
    torch.set_num_threads(1)
    peaks = {name: measured(size, device, name) for name in (None, *BRANCHES)}
    bench, fused = Bench(size, device), Bench(size, device, passes_at_once=7)
    times: dict[str, list[float]] = {}
    for _ in range(int(rounds) + 1):  # the first warms up
        for name, work in {
            "step": bench.step,
            "fused": fused.step,
            **{f"plain {b}": partial(bench.plain, b) for b in BRANCHES},
            **{f"forward {b}": partial(bench.forward, b) for b in BRANCHES},
        }.items():
            times.setdefault(name, []).append(bench.seconds(work))
    t = {name: statistics.median(values[1:]) for name, values in times.items()}
    plain, forward = (sum(t[f"{kind} {b}"] for b in BRANCHES) for kind in ("plain", "forward"))
    print("  ".join(f"{name} {1000 * value:.0f} ms" for name, value in t.items()))
    print(f"UMM step / sum of plain steps: {t['step'] / plain:.2f}; bound {1.05 * (plain + 7 * forward) / plain:.2f}")
    print(
        f"step / (plain + 7 passes): {t['step'] / (plain + 7 * forward):.3f}; with the seven passes as one batch: {t['fused'] / (plain + 7 * forward):.3f}"
    )
    total = sum(peaks[b] for b in BRANCHES)
    print(
        "  ".join(f"peak {b} {peaks[b]:.0f} MiB" for b in BRANCHES) + f"  UMM {peaks[None]:.0f} MiB: {peaks[None] / total:.2f} x their sum"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
