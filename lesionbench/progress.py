"""How far a stage is that goes over cases without a trainer, at a terminal and in log files."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")


def progressed(items: Iterable[Item], what: str, total: int, patience: float = 10.0) -> Iterator[Item]:
    """The same items, with a bar at an interactive terminal, else with a line for each tenth: `cubes  40 of 400 cases (10 %)  ETA 0:04:10`.

    Args:
        what: is done.
        patience: seconds without lines.
    """
    from rich import get_console
    from rich.progress import track

    if get_console().is_terminal:
        yield from track(items, what, total=total, transient=True)
        return
    began, told = time.monotonic(), 0
    for done, item in enumerate(items, 1):
        yield item  # what follows is after the work on it
        tenth, took = 10 * done // total, time.monotonic() - began
        if tenth > told and (took > patience or told):
            told = tenth
            left = timedelta(seconds=round(took / done * (total - done)))
            print(f"{what}  {done} of {total} cases ({100 * done // total} %)  ETA {left}", flush=True)
