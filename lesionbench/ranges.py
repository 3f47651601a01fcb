"""Ranges of options, said where an option is: `dropout: Share = 0.1`. The program refuses other values before it builds anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` to `high` (None = without end), both included unless `above` or `below` leaves that end out."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        """Whether a finite number lies in the range."""
        least = self.low is None or (number > self.low if self.above else number >= self.low)
        return least and (self.high is None or (number < self.high if self.below else number <= self.high))

    def __str__(self) -> str:
        low = None if self.low is None else f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = None if self.high is None else f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return " and ".join(end for end in (low, high) if end)


@dataclass(frozen=True)
class Ascending:
    """Two numbers, of which the second is not the smaller one."""

    def holds(self, numbers: Sequence[float]) -> bool:
        """Whether these are two in that order."""
        return len(numbers) == 2 and numbers[0] <= numbers[1]

    def __str__(self) -> str:
        return "two of them in ascending order"


Rule = Range | Ascending
ASCENDING = Ascending()

Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
AtLeastOne = Annotated[float, Range(1)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Between = Annotated[float, Range(0, 1, above=True, below=True)]
Real = Annotated[float, Range()]  # any, on purpose
AnyWhole = Annotated[int, Range()]
AtLeastTwo = Annotated[int, Range(2)]
Percent = Annotated[float, Range(0, 100)]
Axis = Annotated[int, Range(0, 2)]
Dimensions = Annotated[int, Range(2, 3)]
Connectivity = Annotated[int, Range(1, 3)]
