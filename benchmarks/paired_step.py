"""A training step of the paired U-Net against an ordinary U-Net of equal parameter count: `python benchmarks/paired_step.py [rounds] [side] [base]`.

The paired network has the widths base x (1, 2, 4, 8); the plain one is its own early-fusion form with the widths that come nearest in
parameters. A step is forward, Dice + cross-entropy (and, for the method, the pairing loss), backward and SGD, on one sample of four
channels. Steps alternate within a round, one thread. Memory is the peak of a process of its own over what it held before the step.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system at once: resident memory follows them

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from interleaved import machine, medians, seconds
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.task import Task
from lightning_modules import ModalityPairing
from lightning_modules.inferers import Whole
from lightning_modules.losses import DiceCE
from lightning_modules.networks import PairedUNet

TASK = Task(("t1", "t1ce", "t2", "flair"), {"background": 0, "ncr": 1, "ed": 2, "et": 4})
WAYS = ("plain", "late", "paired", "paired, loss")


def widths(base: int) -> list[int]:
    return [base * factor for factor in (1, 2, 4, 8)]


def parameters(base: int, fusion: str) -> int:
    with torch.device("meta"):
        network = PairedUNet(4, 4, channels=TASK.channels, widths=widths(base), fusion=fusion)
    return sum(p.numel() for p in network.parameters())


def base_of(way: str, base: int) -> tuple[int, str]:
    """Base width and fusion with which `way` has about the parameters of the paired network of width `base`."""
    fusion = {"plain": "early", "late": "late"}.get(way, "paired")
    wanted = parameters(base, "paired")
    return min(range(base, 3 * base), key=lambda b: abs(parameters(b, fusion) - wanted)), fusion


def step_of(way: str, side: int, base: int) -> Callable[[], None]:
    """One training step on one patch."""
    torch.manual_seed(0)
    wide, fusion = base_of(way, base)
    network = partial(PairedUNet, widths=widths(wide), fusion=fusion)
    method = ModalityPairing(TASK, network=network, loss=DiceCE(), inferer=Whole(), mp_weight=0.5 if way.endswith("loss") else 0.0)
    method.log_terms = lambda **_: None
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    batch = {"image": torch.randn(1, 4, side, side, side), "label": torch.randint(0, 4, (1, 1, side, side, side))}

    def step() -> None:
        optimizer.zero_grad()
        method.training_step(batch, 0).backward()
        optimizer.step()

    return step


def status(name: str) -> int:
    """A line of this process's memory account, in KiB (Linux)."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def peak(way: str, side: int, base: int) -> None:
    """Prints the peak of this process's memory during its second step, in MiB over what it held before."""
    step = step_of(way, side, base)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    step()
    print((status("VmHWM") - before) / 1024)


def main(rounds: int = 3, side: int = 48, base: int = 16) -> None:
    """Prints parameters, operations, time and memory of every way, relative to the plain network."""
    torch.set_num_threads(1)
    print(f"{machine()}; one sample of 4 x {side}^3")
    steps = {way: step_of(way, side, base) for way in WAYS}
    operations, memory = {}, {}
    for way, step in steps.items():
        with FlopCounterMode(display=False) as counter:  # warms up, too
            step()
        operations[way] = counter.get_total_flops()
        command = [sys.executable, __file__, "peak", way, str(side), str(base)]
        memory[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    times = medians({way: partial(seconds, step) for way, step in steps.items()}, rounds)
    for way in WAYS:
        wide, fusion = base_of(way, base)
        print(
            f"{way:12s} widths {'-'.join(map(str, widths(wide)))}  {parameters(wide, fusion) / 1e6:.2f} M parameters"
            f"  operations {operations[way] / operations['plain']:.2f}  time {times[way]:.2f} s = {times[way] / times['plain']:.2f}"
            f"  memory {memory[way]:.0f} MiB = {memory[way] / memory['plain']:.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(*map(int, sys.argv[1:]))
