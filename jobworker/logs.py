"""The output of attempts: what of it is kept, and how it is read. Functions for the store, as those of state.py."""

from jobworker.state import LOG_STATE, Database

LOG_HEAD_BYTES = 512 * 1024
LOG_TAIL_BYTES = 512 * 1024
LOG_PIECE_BYTES = 128 * 1024  # at most in a row, so that what is cut is cut
LOG_PIECES_BYTES = 64 * 1024  # read at a time: a reader that does not read keeps them in memory
LOG_ROW_BYTES = 1_000  # a smaller last row takes what follows it, still in its page: a log has 2,100 rows at most

LOG_GROWS = "UPDATE job SET log_bytes = ? WHERE id = ?"
KEEP_LOG = "INSERT OR REPLACE INTO log (job, attempt, byte_offset, data) VALUES (?, ?, ?, ?)"
CUT_LOG = "DELETE FROM log WHERE job = ? AND attempt = ? AND byte_offset >= ? AND byte_offset < ?"
BEGIN_READING = "UPDATE job SET reading = ?, log_bytes = 0 WHERE id = ?"
DROP_LOG = "DELETE FROM log WHERE job = ? AND attempt = ?"
LOG_CHUNK_BEFORE = """SELECT max(byte_offset) FROM log WHERE job = ? AND attempt = ? AND byte_offset <= ?"""
LOG_END = """SELECT byte_offset, data FROM log WHERE job = ? AND attempt = ? AND byte_offset > ?
    ORDER BY byte_offset DESC LIMIT 1"""
LOG_BACKWARDS = "SELECT byte_offset, data FROM log WHERE job = ? AND attempt = ? ORDER BY byte_offset DESC"
READ_LOG = """SELECT byte_offset, data FROM log WHERE job = ? AND attempt = ? AND byte_offset > ?
    ORDER BY byte_offset LIMIT 16"""


def append_log(db: Database, worker: int, job: int, attempt: int, offset: int, data: bytes) -> int | None:
    """Keep a piece of an attempt's output; the offset up to which it is kept now, None for a stale message.

    What is there already is not written twice. Past head and tail, the middle goes.
    """
    if len(data) > LOG_PIECE_BYTES:  # our worker's are shorter
        append_log(db, worker, job, attempt, offset, data[:LOG_PIECE_BYTES])
        return append_log(db, worker, job, attempt, offset + LOG_PIECE_BYTES, data[LOG_PIECE_BYTES:])
    row = db.one(LOG_STATE, job, attempt, worker)
    if row is None:
        return None
    have: int = row["log_bytes"]
    if offset < have:
        data, offset = data[have - offset :], have
    if data:
        have = offset + len(data)
        db.execute(KEEP_LOG, (job, attempt, *_with_last_row(db, job, attempt, offset, data)))
        db.execute(LOG_GROWS, (have, job))
        if have > LOG_HEAD_BYTES + LOG_TAIL_BYTES:
            db.execute(CUT_LOG, (job, attempt, LOG_HEAD_BYTES, have - LOG_TAIL_BYTES))
        db.notes.jobs.add(job)
    return have


def _with_last_row(db: Database, job: int, attempt: int, offset: int, data: bytes) -> tuple[int, bytes]:
    """Give a piece with the last row before it, where both are small and nothing is, or will be, cut between them."""
    if len(data) < LOG_ROW_BYTES and (row := db.one(LOG_END, job, attempt, offset - LOG_ROW_BYTES)):
        start, last = row
        beside = start + len(last) == offset and not start < LOG_HEAD_BYTES <= offset
        if beside and len(last) + len(data) <= LOG_ROW_BYTES:
            return start, last + data
    return offset, data


def begin_reading(db: Database, worker: int, job: int, attempt: int, number: int) -> tuple[int, int] | None:
    """Begin an attempt's log anew, as a reading with this number; one not above the stored number changes nothing.

    Gives the number of the reading that the log is of now and the offset up to which it is kept, None for a stale
    message.
    """
    row = db.one(LOG_STATE, job, attempt, worker)
    if row is None:
        return None
    if number <= row["reading"]:
        return row["reading"], row["log_bytes"]
    db.execute(DROP_LOG, (job, attempt))
    db.execute(BEGIN_READING, (number, job))
    db.notes.jobs.add(job)
    return number, 0


def read_log(db: Database, job: int, attempt: int, offset: int) -> list[tuple[int, bytes]]:
    """Pieces of an attempt's output from a byte offset on, as (offset, bytes), some at a time; empty at its end."""
    first = db.one(LOG_CHUNK_BEFORE, job, attempt, offset)[0]
    pieces, size = [], 0
    for start_, data in db.execute(READ_LOG, (job, attempt, -1 if first is None else first - 1)):
        skip = max(offset - start_, 0)
        if skip < len(data):
            pieces.append((start_ + skip, data[skip:]))
            size += len(data)
        if size >= LOG_PIECES_BYTES:
            break
    return pieces


def tail_offset(db: Database, job: int, attempt: int, lines: int) -> int:
    """The byte offset at which the last `lines` lines of an attempt's output begin."""
    offset, wanted, last = 0, lines, True
    for offset, data in db.execute(LOG_BACKWARDS, (job, attempt)):
        if not lines:
            return int(offset) + len(data)
        end: int = len(data) - (last and data.endswith(b"\n"))
        last = False
        count = data.count(b"\n", 0, end)
        if count >= wanted:
            return int(offset) + len(data[:end].rsplit(b"\n", wanted)[0]) + 1
        wanted -= count
    return 0
