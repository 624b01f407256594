"""The server's clock, and whether somebody has set it."""

import threading
import time
from collections.abc import Callable

CLOCK_JUMP_SECONDS = 2
DISTRUST_SECONDS = 3_600

Clock = Callable[[], float]


def steady_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class WatchedClock:
    """Seconds since the epoch, and a look at whether somebody has set the clock.

    clock: what may be set; steady: seconds that go on also while the machine sleeps. on_jump: called with the seconds
    by which it was set and the time it shows now, before that is given. May be read from any thread.
    """

    def __init__(
        self, on_jump: Callable[[float, float], object], clock: Clock = time.time, steady: Clock = steady_clock
    ) -> None:
        self._on_jump, self._clock, self._steady = on_jump, clock, steady
        self._offset = clock() - steady()
        self._trusted_from = steady()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            offset = now - self._steady()
            jump, self._offset = offset - self._offset, offset
            if abs(jump) >= CLOCK_JUMP_SECONDS:
                self.distrust()
                self._on_jump(jump, now)
            return now

    def distrust(self) -> None:
        """Take it for set: what is pruned for its age is not to be had back."""
        self._trusted_from = self._steady() + DISTRUST_SECONDS

    def was_set_lately(self) -> bool:
        """Whether it was set within the last hour."""
        return self._steady() < self._trusted_from
