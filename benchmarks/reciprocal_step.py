"""Cost of a full step of the reciprocal method against the plain supervised step: `python benchmarks/reciprocal_step.py [rounds]`.

Counts in passes of the segmentation network: a forward pass is 1, its backward pass 1 for the image and 1 for the weights. The plain step
has 1 + 1 (weights) + 1 (inner gradients) = 3. VAT adds the probe, 1 + 1 (no gradients of weights), and the loss at the changed image,
1 + 2, together 8 / 3 of the plain step; a reference of its own prediction adds one forward pass, 9 / 3. The critic's share is counted
with convolution arithmetic. Steps alternate within a round, so that they share whatever else the machine does; the ratio is the median over rounds
of each round's ratio. Peak memory is measured in processes of their own, over the memory before the step.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import ReciprocalAdversarial
from lightning_modules.inferers import Whole
from lightning_modules.losses import VAT, RegionDice
from lightning_modules.networks import DilatedUNet, PixelCritic

TASK = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "ncr": 1, "ed": 2, "et": 4},
    {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
)
VARIANTS = {"plain": {}, "VAT": {"vat": 0.2}, "critic": {"critic": 0.3}, "full": {"vat": 0.2, "critic": 0.3}}
PASSES = {"plain": 3, "VAT": 8, "critic": 3, "full": 8}  # of the segmentation network


class Bare(ReciprocalAdversarial):
    """The method's own training step with bare optimizers, so that nothing of a trainer is timed."""

    def optimizing(self, name: str, advance: bool = True):
        from contextlib import contextmanager

        @contextmanager
        def phase():
            mine, other = (self.network, self.critic) if name == "network" else (self.critic, self.network)
            other.requires_grad_(False)
            yield lambda loss: self.stepped(name, mine, loss)
            other.requires_grad_(True)

        return phase()

    def stepped(self, name, network, loss):
        loss.backward()
        self.bare[name].step()
        self.bare[name].zero_grad()

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def log_terms(self, **terms: torch.Tensor) -> None:
        """Nothing is logged here."""


def step_of(name: str, side: int = 16, width: int = 32) -> Callable[[], None]:
    """One training step on a batch of two patches."""
    torch.manual_seed(0)
    network = partial(DilatedUNet, width=width)
    method = Bare(TASK, network=network, loss=RegionDice(batch=True, smooth=1.0), inferer=Whole(), target=RegionSigmoid, critic=PixelCritic, vat=partial(VAT), weights=VARIANTS[name])  # fmt: skip
    method.bare = {"network": torch.optim.Adam(method.network.parameters()), "critic": torch.optim.RMSprop(method.critic.parameters())}
    image, label = torch.randn(2, 4, side, side, side), torch.randint(0, 4, (2, 1, side, side, side))
    batch = {"image": image, "label": label, "brain_mask": torch.ones_like(label, dtype=torch.bool)}
    return lambda: method.training_step(batch, 0)


def status(name: str) -> int:
    """A line of this process's memory account, in KiB (Linux)."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def peak(name: str) -> None:
    """Prints the peak of this process's memory during a step, in MiB over what it held before."""
    step = step_of(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    step()
    print((status("VmHWM") - before) / 1024)


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one step: other processes' turns do not count."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main(rounds: int = 3) -> None:
    """Prints floating-point operations, time and memory of every variant, relative to the plain step."""
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, torch {torch.__version__}")
    steps, operations, memory = {n: step_of(n) for n in VARIANTS}, {}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        operations[name] = counter.get_total_flops()
        memory[name] = float(subprocess.run([sys.executable, __file__, "peak", name], capture_output=True, text=True, check=True).stdout)
    measured = [{n: seconds(step) for n, step in steps.items()} for _ in range(rounds)]
    for name in VARIANTS:
        ratio = statistics.median(m[name] / m["plain"] for m in measured)
        theory = operations[name] / operations["plain"]
        print(
            f"{name:7s} passes {PASSES[name]}/3 = {PASSES[name] / 3:.2f}  operations {theory:.2f}  time {ratio:.2f} ({ratio / theory - 1:+.0%} of the operations)"
            f"  memory {memory[name]:.0f} MiB = {memory[name] / memory['plain']:.2f}"
        )


if __name__ == "__main__":
    peak(sys.argv[2]) if sys.argv[1:2] == ["peak"] else main(*map(int, sys.argv[1:]))
