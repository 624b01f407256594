"""One line of the benchmarks' table: ours beside a limit or a peer, and what the budget says of the ratio."""

import math
import statistics
from dataclasses import dataclass, field


class SkippedError(Exception):
    """A row can't be measured here; the message says what is missing."""


@dataclass
class Ratio:
    """What was measured in turns. Without `at_least` and `at_most` it has no budget and is only shown."""

    what: str
    beside: str
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        """Add a turn: the two were measured one right after the other."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def ratios(self) -> list[float]:
        """One per turn, so that other load on the machine, which hits both, is divided away."""
        return [ours / theirs if theirs else math.nan for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def verdict(self) -> str:
        ratio = statistics.median(self.ratios)
        if self.at_least is not None:
            return f">= {number(self.at_least):<7}{'met' if ratio >= self.at_least else 'MISSED'}"
        if self.at_most is not None:
            return f"<= {number(self.at_most):<7}{'met' if ratio <= self.at_most else 'MISSED'}"
        return ""

    def __str__(self) -> str:
        ratios = self.ratios
        spread = f"{number(min(ratios))} .. {number(max(ratios))}"
        ours, theirs = (number(statistics.median(side)) for side in (self.ours, self.theirs))
        return (
            f"{self.what:<44}{ours:>8}  {self.beside:<42}{theirs:>8} {self.unit:<10}"
            f"{number(statistics.median(ratios)):>7}  {spread:<19}{self.verdict}"
        ).rstrip()


HEAD = (
    f"{'ours':<44}{'median':>8}  {'beside it':<42}{'median':>8} {'':<10}{'ratio':>7}  {'least .. most':<19}"
    f"{'budget':<10}verdict"
)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
