"""The last five minutes of what a server did, for the charts of whoever begins to listen. Of constant size."""

from collections import deque
from typing import Any

BIN_SECONDS = 5
BINS = 60


class Past:
    """Bins of BIN_SECONDS, oldest first: [when it began, jobs that ended, that failed, longest wait, most slots busy].

    Only the store's thread calls it. A time without a tick has no bin.
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
