"""Timing of several ways to do one thing, in turn: what slows the machine for a while slows all of them."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def machine() -> str:
    """What the figures were measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}"


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def medians(ways: Mapping[str, Callable[..., float]], rounds: int) -> dict[str, float]:
    """Median over `rounds` of what each way returns (seconds, say); every round calls all of them, each round starting with another one."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(ways[name]())
    return {name: statistics.median(values) for name, values in found.items()}
