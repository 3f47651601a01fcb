"""Learning-rate schedules: `schedule(optimizer, total_iterations) -> scheduler`, meant as Hydra partials.

All but `plateau` are stepped after every iteration; `plateau` after every epoch with a validation, with the monitored metric. Where a
schedule warms up, `warmup_iterations` is a count, or below 1 a share of `total_iterations`; iteration t of a warm-up of W uses
(t + 1) / (W + 1) of the learning rate, so that it starts above 0 and reaches the full rate at iteration W.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from lesionbench.errors import SuiteError
from lesionbench.ranges import AtLeastOne, BelowOne, Between, Count, NotNegative, Positive, Share, Whole
from lightning_modules.ramps import whole_batches


def poly(optimizer: Optimizer, total_iterations: int, power: NotNegative = 0.9, warmup_iterations: NotNegative = 0) -> LambdaLR:
    """(1 - progress) ** power (nnU-Net: power 0.9); progress runs from 0 after the warm-up to 1 at `total_iterations`."""
    return _per_iteration(optimizer, total_iterations, warmup_iterations, lambda progress: (1 - progress) ** power)


def warmup_poly(
    optimizer: Optimizer, total_iterations: int, epochs: Count | None = None, warmup_epochs: NotNegative = 20, power: NotNegative = 0.9
) -> LambdaLR:
    """Linear warm-up to the full rate, then (1 - epoch / epochs) ** power of the whole training (Wang et al., BrainLes 2020).

    Epoch e of a warm-up of W uses (e + 1) / W of the learning rate. Unlike in `poly`, the decay counts from the start of the training
    (and so begins below 1), and the rate is constant within an epoch.

    Args:
        epochs: equal parts of the training in which the rate is constant; None = every iteration is one.
        warmup_epochs: W, or below 1 a share of `epochs`.

    Raises:
        SuiteError: more epochs than iterations, or a warm-up that leaves none.
    """
    epochs = total_iterations if epochs is None else epochs
    count = whole_batches(warmup_epochs, epochs)
    if not 0 <= count < epochs <= total_iterations:
        raise SuiteError(
            f"scheduler: epochs={epochs} warmup_epochs={warmup_epochs} do not fit total_iterations={total_iterations}: "
            "an epoch needs an iteration, and the warm-up must leave epochs to train"
        )

    def factor(iteration: int) -> float:
        epoch = iteration * epochs // total_iterations
        return (epoch + 1) / count if epoch < count else max(0.0, 1 - epoch / epochs) ** power

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, total_iterations: int, warmup_iterations: NotNegative = 0, final: Share = 0.0) -> LambdaLR:
    """Half a cosine from 1 down to `final` (a share of the learning rate) (Loshchilov & Hutter, ICLR 2017, without restarts)."""
    return _per_iteration(
        optimizer,
        total_iterations,
        warmup_iterations,
        lambda progress: final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
    )


def flat_cosine(optimizer: Optimizer, total_iterations: int, flat: BelowOne = 0.5, final: Share = 0.0) -> LambdaLR:
    """The learning rate as it is for the share `flat` of all iterations, then half a cosine down to `final` (a share of the learning rate).

    Raises:
        SuiteError: `flat` is no share below 1.
    """
    if not 0 <= flat < 1:
        raise SuiteError(f"scheduler.flat={flat}: expected 0 <= flat < 1, a share of all iterations")

    def factor(progress: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * max(0.0, progress - flat) / (1 - flat))) / 2

    return _per_iteration(optimizer, total_iterations, 0, factor)


def one_cycle(
    optimizer: Optimizer,
    total_iterations: int,
    pct_start: Share = 0.3,
    div_factor: Positive = 25.0,
    final_div_factor: Positive = 1e4,
    cycle_momentum: bool = True,
) -> OneCycleLR:
    """Up from 1 / `div_factor` of the learning rate within the share `pct_start` of all iterations, then down to 1 / `final_div_factor` of
    where it began, both by half cosines (Smith & Topin, 2019; torch's). `cycle_momentum` moves the momentum, or Adam's first beta, the other way."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer,
        peaks,
        total_steps=total_iterations + 1,  # the rate after the last iteration counts as a step
        pct_start=pct_start,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        cycle_momentum=cycle_momentum,
    )


def cosine_cycles(optimizer: Optimizer, total_iterations: int, cycles: Count = 5, stretch: AtLeastOne = 4 / 3) -> LambdaLR:
    """The training in `cycles` equal parts, each with the first 1 / `stretch` of half a cosine from 1 to 0 (Loshchilov & Hutter, ICLR 2017).

    Args:
        cycles: their number.
        stretch: length of half a cosine in cycles, at least 1, where it ends at 0; at 4/3 a cycle ends at 0.146.

    Raises:
        SuiteError: values out of these ranges.
    """
    if cycles < 1 or stretch < 1:
        raise SuiteError(f"scheduler: cycles={cycles} stretch={stretch}: both must be at least 1")
    return LambdaLR(optimizer, lambda done: (1 + math.cos(math.pi * (done * cycles % total_iterations) / total_iterations / stretch)) / 2)


def warmup(optimizer: Optimizer, total_iterations: int, warmup_iterations: NotNegative = 0.05) -> LambdaLR:
    """Linear warm-up, then constant."""
    return _per_iteration(optimizer, total_iterations, warmup_iterations, lambda progress: 1.0)


def held(optimizer: Optimizer, total_iterations: int, iterations: NotNegative = 100, rate: NotNegative = 1e-7) -> LambdaLR:
    """The learning rate is `rate` for the first iterations (a count, or below 1 a share of all), then constant (Fonov et al., BrainLes 2021).

    In a training of less than twice as many it is that for the first half.
    """
    count = min(whole_batches(iterations, total_iterations), total_iterations // 2)
    share = rate / optimizer.defaults["lr"]
    return LambdaLR(optimizer, lambda iteration: share if iteration < count else 1.0)


def steps(
    optimizer: Optimizer, total_iterations: int, stairs: Sequence[Sequence[NotNegative]], warmup_iterations: NotNegative = 0
) -> LambdaLR:
    """Piecewise constant after a linear warm-up: `stairs` are (share of the iterations after it, factor on the learning rate from there on),
    in order."""
    return _per_iteration(
        optimizer, total_iterations, warmup_iterations, lambda progress: [1.0, *(f for share, f in stairs if progress >= share)][-1]
    )


def step_decay(optimizer: Optimizer, total_iterations: int, epochs: Count, every: Count = 3, factor: Positive = 0.7) -> LambdaLR:
    """factor ** (epoch // every), where the training is divided into `epochs` equal parts.

    Raises:
        SuiteError: `every` below 1.
    """
    if every < 1:
        raise SuiteError(f"scheduler.every={every}: a number of epochs, at least 1")
    return _per_iteration(optimizer, total_iterations, 0, lambda progress: factor ** (math.floor(progress * epochs + 1e-9) // every))


def constant(optimizer: Optimizer, total_iterations: int) -> LambdaLR:
    """The learning rate as it is."""
    return _per_iteration(optimizer, total_iterations, 0, lambda progress: 1.0)


def plateau(
    optimizer: Optimizer,
    total_iterations: int,
    factor: Between = 0.2,
    patience: Whole = 10,
    mode: Literal["min", "max"] = "max",
    min_lr: NotNegative = 0.0,
    cooldown: Whole = 0,
) -> ReduceLROnPlateau:
    """Multiplies the learning rate by `factor` when the monitored metric has not improved for `patience` validations; the `cooldown`
    validations after that do not count.

    `mode` is `max` where higher is better, `min` where lower is. `total_iterations` is there because every schedule is called with it;
    this one has no planned end.
    """
    return ReduceLROnPlateau(optimizer, mode=mode, factor=factor, patience=patience, min_lr=min_lr, cooldown=cooldown)


def _per_iteration(optimizer: Optimizer, total_iterations: int, warmup_iterations: float, decay: Callable[[float], float]) -> LambdaLR:
    """`decay(progress)` after a linear warm-up. The factor is a function, which LambdaLR leaves out of its state: plain data only.

    Raises:
        SuiteError: no iterations, or a warm-up that leaves none.
    """
    count = whole_batches(warmup_iterations, total_iterations)
    if not 0 <= count < total_iterations:
        raise SuiteError(f"scheduler: warmup_iterations={warmup_iterations} of total_iterations={total_iterations} leaves none to train")

    def factor(iteration: int) -> float:
        if iteration < count:
            return (iteration + 1) / (count + 1)
        return decay(min(1.0, (iteration - count) / (total_iterations - count)))

    return LambdaLR(optimizer, factor)
