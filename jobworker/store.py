"""The store's thread: the one that owns the database, and commits for all others.

It knows the file, the transaction and the queue; what a job is, it does not know: that is in state.py.

One thread owns the one SQLite connection. The others hand it functions, `store.do(function, *args)`; it runs all that
are waiting in one transaction, makes that durable with one fsync, and only then lets anyone see a result:

    HTTP threads ── do ──▶ ┌───────┐                                       ┌─▶ futures of the HTTP threads
    event loop ─ do_then ─▶ │ queue │ ──▶ BEGIN, f, g, …, claim, COMMIT ────┼─▶ deliver(): callbacks of the loop
                           └───────┘                                       └─▶ watchers of the jobs that changed

A function either returns a result or raises: then nothing of it happens. A group in which one raises is rolled back and
run again one by one, without the claim: should that be what failed, the group stands, and a later one tries again.
"""

import contextlib
import logging
import queue
import random
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jobworker.backup import copy_of
from jobworker.ends import End
from jobworker.schema import APPLICATION_ID, MIGRATIONS, SCHEMA, SCHEMA_VERSION
from jobworker.state import Claimed, Database, Notes, Order, fill_slots

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
    """What one commit did: callbacks with their results, orders to workers, claims for them, ends."""

    calls: list[tuple[Callback, Any]]
    orders: Sequence[Order] = ()
    claimed: Sequence[Claimed] = ()
    ends: Sequence[End] = ()


class Store:
    """The queue, its thread and the connection. `error` says what is wrong with the disk, None while all is well.

    `start` has a thread commit what waits; without it, who calls `commit_waiting` is that thread.
    """

    def __init__(
        self, path: str, deliver: Callable[[Commit], object] | None = None, chance: random.Random | None = None
    ) -> None:
        """Open or create the database at `path` (":memory:" for none).

        deliver: called by the store's thread after each commit with something to tell. Raises StoreError where the
        file can't be used.
        """
        self.error: str | None = None
        self.broken = False
        self._path = None if path == ":memory:" else Path(path).absolute()
        self._copy: tuple[Future[BinaryIO], Callable[[], bool]] | None = None
        self._deliver = deliver
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._owed: list[_Request] = []  # insisted on, and not done yet
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        try:
            self._database = _open(path, chance or random.Random())
        except sqlite3.Error as error:
            raise StoreError(_explain(path, error)) from error
        self._files = {file: _identity(file) for file in self._own_files()}
        self.server_id: str = self._database.one("SELECT id FROM server")[0]

    def start(self) -> "Store":
        self._thread.start()
        return self

    def do(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Have function(database, *args) run; the future has its result once that is on disk.

        It raises what the function raised, or StoreError where the database could not do it.
        """
        future: Future[Any] = Future()
        self._requests.put(_Request(function, args, future, None))
        return future

    def do_then(self, callback: Callback, function: Callable[..., Any], *args: Any) -> None:
        """Have function(database, *args) run; its result, or exception, goes to the callback through `deliver`."""
        self._requests.put(_Request(function, args, None, callback))

    def insist(self, function: Callable[..., Any], *args: Any) -> None:
        """Have function(database, *args) run before all that is asked later, which fails as long as this does."""
        self._requests.put(_Request(function, args, None, None))

    def backup(self, caller_is_gone: Callable[[], bool]) -> BinaryIO:
        """Copy the database, and wait for it; the copy holds every job whose `do` was done before.

        To be called for one copy at a time. Raises StoreError where there is no room for it, and ConnectionAbortedError
        once the caller is gone.
        """
        copy: Future[BinaryIO] = Future()
        self._copy = copy, caller_is_gone
        self.do(lambda _database: None)  # wakes the thread
        return copy.result()

    def close(self) -> None:
        """Finish what is queued and close the file."""
        self._requests.put(None)
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def _run(self) -> None:
        while self.commit_waiting():
            if self._copy:
                self._make_copy(*self._copy)
        if self._copy:
            self._copy[0].set_exception(StoreError("the server stops"))
        if not self.broken:  # to close it is to write what the WAL holds, perhaps into a file that is another by now
            self._database.connection.close()

    def _make_copy(self, copy: "Future[BinaryIO]", caller_is_gone: Callable[[], bool]) -> None:
        """Copy the database step by step, and commit what waits between the steps."""
        self._copy = None

        def between_steps(*_pages: int) -> None:
            if caller_is_gone():
                raise ConnectionAbortedError
            if not self._requests.empty() and not self.commit_waiting():
                self._requests.put(None)
                raise StoreError("no copy was made: the server stops")
            if self.broken:
                raise StoreError(self.error)

        try:
            server_id = f"{self._database.chance.getrandbits(32):08x}"
            copy.set_result(copy_of(self._database.connection, self._path, server_id, between_steps))
        except (StoreError, ConnectionAbortedError) as error:
            copy.set_exception(error)
        except Exception as error:  # noqa: BLE001 - as for any other request
            _log.error("no copy was made: %s", error)
            copy.set_exception(StoreError(f"no copy was made: {error}"))

    def commit_waiting(self) -> bool:
        """Wait for a request, and commit it with all others that wait; False once the store is closed."""
        group = [self._requests.get()]
        group += [self._requests.get() for _ in range(min(self._requests.qsize(), GROUP_LIMIT))]
        requests = [request for request in group if request is not None]
        if requests and not self._commit(requests):
            for request in requests:
                self._commit([request], alone=True)
        return None not in group

    def _commit(self, group: list[_Request], alone: bool = False) -> bool:
        """Run a group in one transaction and hand out the results; False: it failed and nothing of it happened."""
        database, group = self._database, [*self._owed, *group]
        self._check_file()
        if self.broken:
            self._fail(group, StoreError(self.error))
            return True
        try:
            database.begin()
            before = database.connection.total_changes
            results = [request.function(database, *request.args) for request in group]
            if not alone:
                self._claim()
            notes = database.commit()
        except Exception as error:  # noqa: BLE001 - whatever it was, it must not end the one thread that can write
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            failure = self._failure(error)
            if alone or self.broken:
                self._owed = [request for request in group if not (request.future or request.callback)]
                self._fail(group, failure)
            return alone or self.broken
        self._owed = []
        if self.error and database.connection.total_changes > before:
            self.error = None
        self._hand_out(group, results, notes)
        return True

    def _claim(self) -> None:
        try:
            fill_slots(self._database)
        except Exception as error:
            if not isinstance(error, sqlite3.Error):  # what the disk refuses is told for the whole group
                _log.error("internal error: nothing was claimed", exc_info=error)
            raise

    def _check_file(self) -> None:
        """Take nothing more once the file is deleted or replaced: SQLite would go on writing to what nobody finds."""
        for file, identity in self._files.items():
            if not self.broken and _identity(file) != identity:
                self.error, self.broken = f"database: {file} was deleted or replaced", True
                _log.error("%s", self.error)

    def _own_files(self) -> list[Path]:
        return [self._path, self._path.with_name(f"{self._path.name}-wal")] if self._path else []

    def _failure(self, error: Exception) -> Exception:
        if not isinstance(error, sqlite3.Error):
            return error
        self.error = f"database: {error}"
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        # After a failed fsync nobody knows what is on disk: only a restart reads it anew. A write that fails is of a
        # quota or a limit, as of a full disk (which is SQLITE_FULL): nothing was committed, a later one may succeed.
        broken = code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        self.broken = self.broken or (broken and code != sqlite3.SQLITE_IOERR_WRITE)
        _log.error("%s", self.error)
        return StoreError(self.error)

    def _fail(self, group: list[_Request], error: Exception) -> None:
        self._tell_loop(Commit([(request.callback, error) for request in group if request.callback]))
        for request in group:
            if request.future and request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)

    def _hand_out(self, group: list[_Request], results: list[Any], notes: Notes) -> None:
        calls = [(request.callback, result) for request, result in zip(group, results, strict=True) if request.callback]
        # The loop first: what a caller does on seeing its future done comes after it there.
        self._tell_loop(Commit(calls, notes.orders, notes.claimed, notes.retried + notes.finished))
        for request, result in zip(group, results, strict=True):
            if request.future and request.future.set_running_or_notify_cancel():
                request.future.set_result(result)
        watchers, enders = self._database.watchers, self._database.enders
        for watched, jobs in ((watchers, notes.jobs), (enders, [end.id for end in notes.finished])):
            for job in jobs if watched else ():
                if future := watched.pop(job, None):
                    future.set_result(None)

    def _tell_loop(self, commit: Commit) -> None:
        if self._deliver and any(commit):
            self._deliver(commit)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open(path: str, chance: random.Random) -> Database:
    connection = sqlite3.connect(path, timeout=2, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    # One connection for ever: no other may open the file, and SQLite needs no shared memory for the WAL.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # Some builds, as Debian's, overwrite each deleted page with zeros: pruning then writes all logs once more.
    connection.execute("PRAGMA secure_delete = FAST")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        _create(connection, f"{chance.getrandbits(32):08x}")
    elif version != SCHEMA_VERSION:
        _migrate(connection, version)
    connection.execute("COMMIT")
    return Database(connection, chance)


def _create(connection: sqlite3.Connection, server_id: str) -> None:
    if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise sqlite3.DatabaseError("it is not a database of jobworker")
    _execute_all(connection, SCHEMA)
    connection.execute("INSERT INTO server (id) VALUES (?)", (server_id,))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    if version not in MIGRATIONS:
        raise sqlite3.DatabaseError(f"it has schema version {version}; this jobworker knows {SCHEMA_VERSION}")
    for step in range(version, SCHEMA_VERSION):
        _execute_all(connection, MIGRATIONS[step])
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _execute_all(connection: sqlite3.Connection, script: str) -> None:
    """Run statements in the transaction under way, which `executescript` would end."""
    for statement in filter(str.strip, script.split(";")):
        connection.execute(statement)


def _explain(path: str, error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f"{path}: another server is running on this database; stop it or give --database another file"
    return f"{path}: can't use it as the database: {error}"
