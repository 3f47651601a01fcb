"""How far a long work is, at a terminal and in log files."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

PATIENCE = 10.0  # seconds of work without a word
Item = TypeVar("Item")


def tracked(items: Iterable[Item], total: int, label: str, shown: bool = True) -> Iterator[Item]:
    """The same items, cases of a long work, with word of it on standard error: a bar at an interactive terminal, else a line per tenth of them
    (see `Tenths`) and, if it took longer than `PATIENCE`, a last one.

    Args:
        shown: False leaves the items alone.
    """
    if not shown:
        yield from items
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total=total, console=Console(stderr=True), transient=True)
        return
    began, told = time.monotonic(), Tenths(label, "cases", _say, PATIENCE)
    for done, item in enumerate(items, 1):
        yield item
        told(done, total)
    took = time.monotonic() - began
    if took > PATIENCE:
        _say(f"{label}  {total} cases  {took:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Tenths:
    """Says of a long work, once for each tenth, `maps  wt  40 of 400 cases (10 %)  ETA 0:04:10`.

    Args:
        label, unit: of the work, and what is counted.
        say: called with the line.
        patience: seconds before the first one.
    """

    def __init__(self, label: str, unit: str, say: Callable[[str], Any], patience: float = PATIENCE) -> None:
        self.label, self.unit, self.say, self.patience = label, unit, say, patience
        self._began, self._told = time.monotonic(), 0

    def __call__(self, done: int, total: int) -> None:
        if done == 1 and self._told:
            self._began, self._told = time.monotonic(), 0  # the same work from its beginning
        tenth, took = 10 * done // total, time.monotonic() - self._began
        if tenth > self._told and (took > self.patience or self._told):
            self._told = tenth
            left = timedelta(seconds=round(took / done * (total - done)))
            self.say(f"{self.label}  {done} of {total} {self.unit} ({100 * done // total} %)  ETA {left}")
