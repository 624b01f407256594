"""What a server did: totals since its start, for the metrics; the last five minutes, for the charts of the page."""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from jobworker.ends import End

BIN_SECONDS = 5
BINS = 60
HISTOGRAM_SECONDS = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)


class Totals:
    """Counters and histograms of the jobs that ended since the server's start.

    A histogram holds a count for each of HISTOGRAM_SECONDS, one for more, and the sum of all.
    """

    def __init__(self) -> None:
        self.finished: Counter[tuple[str, str]] = Counter()
        self.durations: dict[str, list[float]] = {}
        self.waits: dict[str, list[float]] = {}

    def observe(self, finished: Iterable[End]) -> None:
        for end in finished:
            self.finished[end.name, end.state] += 1
            if end.started_at is not None:  # by a clock that may have jumped meanwhile
                self._add(self.durations, end.name, max(end.finished_at - end.started_at, 0))
                self._add(self.waits, end.name, max(end.started_at - end.created_at, 0))

    def copy(self) -> "Totals":
        copied = Totals()
        copied.finished = self.finished.copy()
        copied.durations = {name: counts[:] for name, counts in self.durations.items()}
        copied.waits = {name: counts[:] for name, counts in self.waits.items()}
        return copied

    def _add(self, histograms: dict[str, list[float]], name: str, value: float) -> None:
        counts = histograms.setdefault(name, [0] * (len(HISTOGRAM_SECONDS) + 2))
        counts[bisect_left(HISTOGRAM_SECONDS, value)] += 1
        counts[-1] += value


class Past:
    """Bins of BIN_SECONDS, oldest first: [when it began, jobs that ended, that failed, longest wait, most slots busy].

    Only the store's thread calls it. A time without a tick has no bin. Of constant size.
    """

    def __init__(self) -> None:
        self.bins: deque[list[float]] = deque(maxlen=BINS)
        self._before: dict[str, Any] | None = None

    def note(self, overview: dict[str, Any], now: float) -> None:
        """Add how things stand at a time, in seconds since the epoch. overview: as of state.overview."""
        before, self._before = self._before or overview, overview
        began = now // BIN_SECONDS * BIN_SECONDS
        if not self.bins or self.bins[-1][0] != began:
            self.bins.append([began, 0, 0, 0, 0])
        ended, failed = (count(overview) - count(before) for count in (_ended, _failed))
        _, had_ended, had_failed, latency, busy = self.bins[-1]
        self.bins[-1][1:] = [
            had_ended + ended,
            had_failed + max(failed, 0),  # fewer than before: some were pruned
            max(latency, overview["queue_latency"]),
            max(busy, overview["busy"]),
        ]

    def recent(self) -> list[list[float]]:
        """The bins of the last five minutes."""
        return [list(each) for each in self.bins if 0 <= self.bins[-1][0] - each[0] < BINS * BIN_SECONDS]


def _ended(overview: dict[str, Any]) -> int:
    return int(overview["finished"])


def _failed(overview: dict[str, Any]) -> int:
    return int(overview["jobs"]["failure"])
