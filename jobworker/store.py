"""The store's thread: the one that owns the database, and commits for all others.

It knows the file, the transaction and the queue; what a job is, it does not know: that is in state.py.

One thread owns the one SQLite connection. The others hand it functions, `store.do(function, *args)`; it runs all that
are waiting in one transaction, makes that durable with one fsync, and only then lets anyone see a result:

    HTTP threads ── do ──▶ ┌───────┐                                       ┌─▶ futures of the HTTP threads
    event loop ── tell ──▶ │ queue │ ──▶ BEGIN, f, g, h …, COMMIT (fsync) ─┼─▶ deliver(): callbacks of the loop
                           └───────┘                                       └─▶ watchers of the jobs that changed

A function either returns a result or raises: then nothing of it happens. A group in which one raises is rolled back and
run again one by one.
"""

import contextlib
import logging
import queue
import sqlite3
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from jobworker.state import (
    APPLICATION_ID,
    COUNT_STATES,
    LAST_ID,
    SCHEMA,
    SCHEMA_VERSION,
    STATES,
    Database,
    Finished,
)

GROUP_LIMIT = 1_000

_log = logging.getLogger("store")
Callback = Callable[[Any], None]


class StoreError(Exception):
    """The database could not do it: disk full, an I/O error, another server on the file."""


class _Request(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    future: Future[Any] | None
    callback: Callback | None


class Commit(NamedTuple):
    """What one commit did: callbacks to call with their results, whether a claim may find more now, jobs that ended."""

    calls: list[tuple[Callback, Any]]
    ready: bool
    finished: list[Finished]


class Store:
    """The thread, its queue and its connection. `error` says what is wrong with the disk, None while all is well."""

    def __init__(self, path: str, deliver: Callable[[Commit], object] = id) -> None:
        """Open or create the database at `path` (":memory:" for none).

        deliver: called by the store's thread after each commit. Raises StoreError where the file can't be used.
        """
        self.error: str | None = None
        self.broken = False
        self._deliver = deliver
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        try:
            self._database = _open(path)
        except sqlite3.Error as error:
            raise StoreError(_explain(path, error)) from error
        self.server_id: str = self._database.one("SELECT id FROM server")[0]
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs are in each state, as of the last commit."""
        return {state: self._database.counts[state] for state in STATES}

    def do(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Have function(database, *args) run; the future has its result once that is on disk.

        It raises what the function raised, or StoreError where the database could not do it.
        """
        future: Future[Any] = Future()
        self._requests.put(_Request(function, args, future, None))
        return future

    def tell(self, callback: Callback, function: Callable[..., Any], *args: Any) -> None:
        """Have function(database, *args) run; its result, or exception, goes to the callback through `deliver`."""
        self._requests.put(_Request(function, args, None, callback))

    def close(self) -> None:
        """Finish what is queued and close the file."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            group = [self._requests.get()]
            group += [self._requests.get() for _ in range(min(self._requests.qsize(), GROUP_LIMIT))]
            closing = None in group
            requests = [request for request in group if request is not None]
            if requests and not self._commit(requests):
                for request in requests:
                    self._commit([request], alone=True)
        self._database.connection.close()

    def _commit(self, group: list[_Request], alone: bool = False) -> bool:
        """Run a group in one transaction and hand out the results; False: it failed and nothing of it happened."""
        database = self._database
        if self.broken:
            self._hand_out(group, [StoreError(self.error)] * len(group))
            return True
        try:
            database.begin()
            before = database.connection.total_changes
            results = [request.function(database, *request.args) for request in group]
            database.commit()
        except Exception as error:  # noqa: BLE001 - whatever it was, it must not end the one thread that can write
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            failure = self._failure(error)
            if alone or self.broken:
                self._hand_out(group, [failure] * len(group))
            return alone or self.broken
        if self.error and database.connection.total_changes > before:
            self.error = None
        self._hand_out(group, results)
        return True

    def _failure(self, error: Exception) -> Exception:
        if not isinstance(error, sqlite3.Error):
            return error
        self.error = f"database: {error}"
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        # After a failed write or fsync nobody knows what is on disk: only a restart reads it anew.
        self.broken = self.broken or code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        _log.error("%s", self.error)
        return StoreError(self.error)

    def _hand_out(self, group: list[_Request], results: list[Any]) -> None:
        database = self._database
        failed = isinstance(results[0], Exception)
        changed = set() if failed else database.changed
        calls = [(request.callback, result) for request, result in zip(group, results, strict=True) if request.callback]
        # The loop first: what a caller does on seeing its future done comes after it there.
        if failed:
            self._deliver(Commit(calls, False, []))
        elif calls or database.ready:
            self._deliver(Commit(calls, database.ready, database.finished))
        for request, result in zip(group, results, strict=True):
            if request.future and request.future.set_running_or_notify_cancel():
                if isinstance(result, Exception):
                    request.future.set_exception(result)
                else:
                    request.future.set_result(result)
        for job in changed & database.watchers.keys():
            for watcher in database.watchers.pop(job):
                if watcher.set_running_or_notify_cancel():
                    watcher.set_result(None)


def _open(path: str) -> Database:
    connection = sqlite3.connect(path, timeout=2, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    # One connection for ever: no other may open the file, and SQLite needs no shared memory for the WAL.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        _create(connection)
    elif version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it has schema version {version}; this jobworker knows {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    last = connection.execute(LAST_ID).fetchone()
    counts = {row["state"]: row["jobs"] for row in connection.execute(COUNT_STATES)}
    return Database(connection, last[0] if last else 0, Counter(counts))


def _create(connection: sqlite3.Connection) -> None:
    if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise sqlite3.DatabaseError("it is not a database of jobworker")
    for statement in filter(str.strip, SCHEMA.split(";")):
        connection.execute(statement)
    connection.execute("INSERT INTO server VALUES (?)", (uuid.uuid4().hex[:8],))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _explain(path: str, error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f"{path}: another server is running on this database; stop it or give --database another file"
    return f"{path}: can't use it as the database: {error}"
