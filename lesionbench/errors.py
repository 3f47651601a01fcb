"""Errors meant for the user: one screen that names the file, the value and the fix. The program prints them without a traceback."""

import difflib
from collections.abc import Iterable


class SuiteError(Exception):
    """Something the user can mend (input, configuration, checkpoint); the message says what, where and how."""


class Incomplete(SuiteError):
    """A data set whose files do not go together, with the cases that were found all the same, for a check that goes on.

    Attributes:
        cases: what was found, as far as it goes.
    """

    def __init__(self, message: str, cases: list) -> None:
        super().__init__(message)
        self.cases = cases


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'dice'? Known: ce, dice"`` for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else "."
    return f"{guess} Known: {', '.join(known) or '(none)'}"


def unknown(kind: str, name: str, known: Iterable[str]) -> SuiteError:
    """The error for a `name` that is not one of the `known` names of its `kind`."""
    return SuiteError(f"Unknown {kind} '{name}'{nearest(name, known)}")
