"""What a container writes, on its way to the server: a pipe that the loop reads, and the pieces not on disk yet.

It knows no engine, no job and no session.
"""

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator

LOG_HEAD_BYTES = 512 * 1024
LOG_BUFFER_BYTES = 1024 * 1024
LOG_PIECE_BYTES = 64 * 1024
LOG_FLUSH_SECONDS = 0.2


class Output:
    """What a container wrote and the server does not have on disk yet: pieces with their byte offset.

    At most LOG_BUFFER_BYTES: past the head, the oldest pieces are dropped; the server shows how much is missing.

    When it is read again from its start, what was read before stays in force until the new reading has its first bytes,
    or is whole. reading: how many were begun before this one; None where a former life of the worker may have begun
    some.
    """

    def __init__(self, reading: int | None = 0) -> None:
        self.end = 0
        self.reading = reading
        self._servers: int | None = reading  # the reading that the server has, as far as this connection knows
        self._announced: int | None = None
        self._again = False  # the next bytes are the first of a new reading
        self._is_new = False  # this life of the worker has begun this reading
        self._head: deque[tuple[int, bytes]] = deque()  # pieces that begin before LOG_HEAD_BYTES
        self._tail: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._sent = 0
        self._kept = 0

    def add(self, data: bytes) -> None:
        if self._again:
            self._begin()
        start, self.end = self.end, self.end + len(data)
        if self.end <= self._kept:
            return
        data = data[max(self._kept - start, 0) :]
        self._size += len(data)
        start = self.end - len(data)
        last = self._tail or self._head
        if last and self._is_open(last[-1], start):
            start, before = last.pop()
            data = before + data
        (self._head if start < LOG_HEAD_BYTES else self._tail).append((start, data))
        while self._size > LOG_BUFFER_BYTES:
            self._size -= len((self._tail or self._head).popleft()[1])

    def add_rest(self) -> Callable[[bytes], None]:
        """Give an `add` for output that is read from its start once more: what is there already is left out."""
        known = self.end

        def add(data: bytes) -> None:
            nonlocal known
            rest, known = data[known:], max(known - len(data), 0)
            if rest:
                self.add(rest)

        return add

    def _is_open(self, piece: tuple[int, bytes], end: int) -> bool:
        start, data = piece
        return start >= self._sent and start + len(data) == end and len(data) < LOG_PIECE_BYTES // 2

    def kept(self, offset: int) -> None:
        """Forget what the server has on disk, up to an offset."""
        self._kept = max(self._kept, offset)
        self._sent = max(self._sent, self._kept)
        for pieces in (self._head, self._tail):
            while pieces and pieces[0][0] + len(pieces[0][1]) <= self._kept:
                self._size -= len(pieces.popleft()[1])

    def resend(self) -> None:
        """On a new connection: everything that is not on disk has to be sent again."""
        self._sent = self._kept
        self._servers = self._announced = None

    def read_again(self) -> None:
        """The output will be added again from its start."""
        self._again = True

    def is_whole(self) -> None:
        """It was read to its end, though perhaps nothing was there."""
        if self._again:
            self._begin()

    def say(self, text: str) -> None:
        """Add a word of the worker's own behind what is there."""
        self._again = False
        self.end = max(self.end, self._kept)
        self.add(text.encode())

    def _begin(self) -> None:
        self._again, self._is_new = False, True
        if self.reading is not None:
            self.reading += 1
        self.end = self._size = self._sent = self._kept = 0
        self._head.clear()
        self._tail.clear()

    def server_has(self, reading: int) -> None:
        """The server's log is of this reading."""
        self._servers = reading
        if self.reading is None or self.reading < reading:
            self.reading = reading + self._is_new

    @property
    def in_force(self) -> bool:
        """Whether the server is known to have this reading, so that offsets mean the same on both sides."""
        return self._servers is not None and self._servers == self.reading

    def to_announce(self) -> int | None:
        """Give the number of this reading where the server has to be told of it, once a connection."""
        if self._servers is None or self._servers == self.reading or self._announced == self.reading:
            return None
        self._announced = self.reading
        return self.reading

    def unsent(self, limit: int) -> Iterator[tuple[int, bytes]]:
        """Give up to about `limit` bytes that were not sent on this connection, as (offset, bytes)."""
        for start, data in itertools.chain(self._head, self._tail):
            if limit <= 0:
                return
            if start + len(data) > self._sent:
                skip = max(self._sent - start, 0)
                self._sent = start + len(data)
                limit -= len(data) - skip
                yield start + skip, data[skip:]


def pipe(output: Callable[[bytes], None]) -> tuple[int, Callable[[], None]]:
    """Give a pipe's end for a command to write to, and what reads the last of it.

    Most of what ends at once costs the loop no more than that last read: it listens from the first flush on.
    """
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def read() -> bool:
        try:
            data = os.read(reading, LOG_PIECE_BYTES)
        except BlockingIOError:
            return False
        if data:
            output(data)
        else:
            loop.remove_reader(reading)
        return bool(data)

    def drain() -> None:
        listening.cancel()
        while read():
            pass
        loop.remove_reader(reading)
        os.close(reading)

    listening = loop.call_later(LOG_FLUSH_SECONDS / 2, loop.add_reader, reading, read)
    return writing, drain
