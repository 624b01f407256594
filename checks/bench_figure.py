"""One line of the benchmarks' table."""

import functools
import statistics
from dataclasses import dataclass, field

FSYNC = "fsync before the answer"
STEPS = "fsync at each of 3 steps"
NOTHING = "nothing is kept"


@dataclass
class Figure:
    """One line of the table: what was measured, in turns, and what the budget says of it."""

    what: str
    unit: str
    kept: str = ""  # what a power cut leaves
    at_least: float | None = None
    at_most: float | None = None
    is_limit: bool = False
    samples: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.samples.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def budget(self) -> str:
        if self.at_least is not None:
            return f">= {number(self.at_least)} {'ok' if self.median >= self.at_least else 'MISSED'}"
        if self.at_most is not None:
            return f"<= {number(self.at_most)} {'ok' if self.median <= self.at_most else 'MISSED'}"
        return ""


Limit = functools.partial(Figure, is_limit=True)  # or a peer: what the line of ours before it is compared with


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
