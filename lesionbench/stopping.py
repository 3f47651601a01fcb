"""Signals that ask the program to stop: SIGTERM (schedulers, `timeout`, `kill`) and SIGINT (Ctrl-C)."""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """The program ends because a signal asked for it; the exit status is 128 plus the signal's number, as in a shell.

    Args:
        number: the signal.
        left: what there is of the work and how it goes on, for the line that the user sees.
    """

    def __init__(self, number: int, left: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.left = number, left

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.left and ': '}{self.left}"


class StopRequest:
    """What signals have asked of this process: to stop, by the first of them; by another of `STOPS` a second later, to end at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def ends(self, number: int) -> bool:
        """Whether this signal, which has just come, is a second one: `timeout` sends one signal twice, to the program and to its group."""
        return number in STOPS and self.number in STOPS and time.monotonic() - self._since >= 1

    def made(self, number: int) -> bool:
        """Notes a signal and says whether it is the first; a second one ends this process here."""
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            return True
        if self.ends(number):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return False


request = StopRequest()
"""That of this process."""


def stop_at_signals() -> None:
    """Has the signals raise `Stopped` wherever the program is; a handler of a launcher's, or a signal that the shell has ignored, stays."""
    program = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != program:
            end_forked(number)
        if request.made(number):
            raise Stopped(number)

    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def end_forked(number: int) -> NoReturn:
    """Ends a forked process; an exception could go on into what the program was doing when it forked."""
    os._exit(128 + number)
