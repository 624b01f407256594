"""Server-sent events: what changed, as the store's ticks tell it."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobworker import state
from jobworker.message import CALLER_CHECK_SECONDS, Request, as_json
from jobworker.shapes import full_worker_json
from jobworker.state import MAX_TICK_JOBS, Tick
from jobworker.store import Store

HEARTBEAT_SECONDS = 15
MAX_BATCH_CHARACTERS = 256 * 1024  # of environment, which a listener that does not read keeps in memory


class Events:
    """Server-sent events, made of the store's ticks; one listener renders a tick, the others take what it made."""

    def __init__(self, store: Store, show: Callable[[Sequence[sqlite3.Row]], list[dict[str, Any]]]) -> None:
        self._store, self._show = store, show
        self._rendering = threading.Lock()
        self._rendered: tuple[int, int, bytes] = (0, 0, b"")  # after which tick, up to which, what

    def stream(self, last_id: int | None, request: Request) -> Iterator[bytes]:
        """Give events from after `last_id`, for ever; a comment now and then. Ids grow, also across server starts."""
        newest: Tick
        tick: Tick | None
        newest, tick, past = self._store.do(state.listen, last_id).result()
        yield server_sent("stats", newest.overview | {"past": past}, None if last_id else newest.id)
        if tick is None:
            yield server_sent("reset", {}, newest.id)
            tick = newest
        said = time.monotonic()
        while True:
            request.wait_for(tick.next, min(HEARTBEAT_SECONDS, CALLER_CHECK_SECONDS))
            if not tick.next.done():
                is_silent = time.monotonic() - said >= HEARTBEAT_SECONDS
                said = time.monotonic() if is_silent else said
                yield b":\n\n" if is_silent else b""  # b"": is the listener still there?
                continue
            said = time.monotonic()
            ticks = list(ticks_after(tick))
            yield self._render(tick.id, ticks)
            tick = ticks[-1]

    def _render(self, after: int, ticks: list[Tick]) -> bytes:
        with self._rendering:
            if self._rendered[:2] != (after, ticks[-1].id):
                self._rendered = after, ticks[-1].id, self._events_of(ticks)
            return self._rendered[2]

    def _events_of(self, ticks: list[Tick]) -> bytes:
        jobs = frozenset[int]().union(*(tick.jobs for tick in ticks))
        workers = frozenset[int]().union(*(tick.workers for tick in ticks))
        if len(ticks) > state.RING_TICKS:
            return server_sent("reset", {}, ticks[-1].id)
        rows = self._store.do(state.workers, workers).result() if workers else []
        parts = [server_sent("worker", full_worker_json(row, held)) for row, held in rows]
        too_many = len(jobs) > MAX_TICK_JOBS
        changed = self._store.do(state.get_many, jobs).result() if jobs and not too_many else []
        if too_many or sum(len(row["environment"] or "") for row in changed) > MAX_BATCH_CHARACTERS:
            parts.append(server_sent("reset", {}))
        else:
            parts += [server_sent("job", shown) for shown in self._show(changed)]
        return b"".join(parts) + server_sent("stats", ticks[-1].overview, ticks[-1].id)


def ticks_after(tick: Tick) -> Iterator[Tick]:
    while tick.next.done():
        tick = tick.next.result()
        yield tick


def server_sent(kind: str, data: object, id_: int | None = None) -> bytes:
    """One server-sent event; an id on the last of a tick, so that who resumes after it has missed nothing."""
    return (f"id: {id_}\n" if id_ else "").encode() + b"event: %b\ndata: %b\n\n" % (kind.encode(), as_json(data))
