"""Cost of semi-supervised steps against the plain supervised step: `python benchmarks/semi_step.py [rounds] [side]`.

Counts in passes of one patch through the network: forward 1, backward 2 (image and weights). A plain step of 2 labeled patches is 6. The
mean teacher has the student on 2 + 2 patches, 12, and the teacher forward on 4: 16, or 16/6 = 2.67 plain steps. Co-learning has each of
two students on 2 + 2 patches and one mixed patch, 2 x 15, and the teacher forward on 2: 32, or 32/6 = 5.33. Steps (losses, backward,
optimizer, teacher's average; no data) take turns within a round; CPU time on a CPU, wall time on a GPU.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from interleaved import machine, medians
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.task import Task
from lightning_modules import CoLearning, MeanTeacher, SemiSupervised
from lightning_modules.inferers import Whole
from lightning_modules.losses import SoftDice
from lightning_modules.networks import MultiHeadVNet

TASK = Task(("image",), {"background": 0, "atrium": 1}, {"LA": ("atrium",)})
PASSES = {"plain": 6, "mean teacher": 16, "co-learning": 32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Plain(SemiSupervised):
    """The supervised step in the same surroundings."""

    def losses(self, labeled, unlabeled):
        return {"supervised": self.supervised(self.network(labeled["image"]), labeled)}


def step_of(name: str, side: int) -> Callable[[], None]:
    """One training step on 2 + 2 patches."""
    torch.manual_seed(0)
    kind = {"plain": Plain, "mean teacher": MeanTeacher, "co-learning": CoLearning}[name]
    more = {"variants": [{"upsampling": "linear"}, {"upsampling": "nearest"}]} if kind is CoLearning else {}
    network = partial(MultiHeadVNet, upsampling="linear", norm="instance")
    method = kind(TASK, network=network, loss=SoftDice(squared=True), inferer=Whole(), **more).to(DEVICE)
    method._trainer = SimpleNamespace(num_training_batches=100, max_epochs=10, global_rank=0)
    method.log_terms = lambda **terms: None
    optimizer = torch.optim.SGD(method.optimizer_groups()["main"], lr=0.01, momentum=0.9)
    image, label = torch.randn(4, 1, side, side, side, device=DEVICE), torch.randint(0, 2, (2, 1, side, side, side), device=DEVICE)
    batch = {"labeled": {"image": image[:2], "label": label}, "unlabeled": {"image": image[2:]}}

    def step() -> None:
        method.training_step(batch, 0).backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.on_train_batch_end(None, batch, 0)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Time of one step: on a CPU that of this process, so that other processes' turns do not count."""
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    start = clock()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main(rounds: int = 5, side: int = 32) -> None:
    """Prints passes, convolution arithmetic and time of every step, relative to the plain one."""
    torch.set_num_threads(1)
    print(f"{machine()}, {DEVICE}, patches of {side}^3")
    steps, operations = {name: step_of(name, side) for name in PASSES}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        operations[name] = counter.get_total_flops()
    found = medians({name: partial(seconds, step) for name, step in steps.items()}, rounds)
    for name in PASSES:
        count, flops, spent = PASSES[name] / PASSES["plain"], operations[name] / operations["plain"], found[name] / found["plain"]
        print(
            f"{name:13s} {found[name]:6.2f} s  passes {count:.2f}  operations {flops:.2f}  time {spent:.2f} ({spent / count - 1:+.0%} of the passes)"
        )


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
