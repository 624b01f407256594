"""A copy of the database, made while it is in use."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PAGES_A_STEP = 64


def copy_of(
    source: sqlite3.Connection, path: Path | None, server_id: str, between_steps: Callable[..., object]
) -> BinaryIO:
    """Give a file, positioned at its start, with a copy of the database; it is gone from the disk once it is closed.

    path: of the database; None: it is in memory. server_id: the copy's own, so that workers don't take a server on it
    for the one they know. between_steps: called every 64 pages; it may commit to `source`, which the copy then holds,
    and ends the copy by raising. Raises sqlite3.Error and OSError.
    """
    folder, name = (path.parent, path.name) if path else (Path(tempfile.gettempdir()), "jobs.db")
    pages, page_bytes = (source.execute(f"PRAGMA {each}").fetchone()[0] for each in ("page_count", "page_size"))
    if shutil.disk_usage(folder).free < pages * page_bytes * 1.1:
        raise OSError(f"{folder} has no room for another {pages * page_bytes:,} bytes")
    number, temporary = tempfile.mkstemp(prefix=f"{name}.copy-", dir=folder)
    file = os.fdopen(number, "r+b")
    try:
        target = sqlite3.connect(temporary, isolation_level=None)
        Path(temporary).unlink()  # SQLite has it open: now nothing is left of it, whatever ends us
        try:
            target.execute("PRAGMA synchronous = OFF")
            target.execute("PRAGMA journal_mode = OFF")
            source.backup(target, pages=PAGES_A_STEP, progress=between_steps)
            _end_wal(number)
            target.execute("UPDATE server SET id = ?", (server_id,))
        finally:
            target.close()
    except BaseException:
        file.close()
        raise
    return file


def _end_wal(number: int) -> None:
    """Let the copied header say that there is no WAL: SQLite would make one, and can't beside a file without a name.

    https://www.sqlite.org/fileformat.html#the_database_header: the versions are at 18. The change counter at 24 has
    the connection read the header again.
    """
    os.pwrite(number, b"\1\1", 18)
    counter = int.from_bytes(os.pread(number, 4, 24))
    os.pwrite(number, ((counter + 1) % 2**32).to_bytes(4), 24)
