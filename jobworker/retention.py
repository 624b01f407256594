"""What goes with time: jobs that ended long ago. Functions for the store, as those of state.py."""

from collections.abc import Iterable

from jobworker.state import NEWEST_JOB, NEWEST_SUCCESS, Database

PRUNED_BYTES = 1024 * 1024  # of logs, in one transaction: others wait for it
FREE_PAGES_LIMIT = 300  # as many as those logs leave
WORKERS_AT_ONCE = 500

LAST_MOMENT = "SELECT max((SELECT created_at FROM job ORDER BY id DESC LIMIT 1), (SELECT max(finished_at) FROM job))"
OLD_JOBS = "SELECT id, state FROM job WHERE finished_at < ? ORDER BY finished_at LIMIT ?"
OLDEST_LOG = "SELECT attempt, total(length(data)) FROM log WHERE job = ? GROUP BY attempt LIMIT 1"
DELETE_LOG = "DELETE FROM log WHERE job = ? AND attempt = ?"
DELETE_ATTEMPTS = "DELETE FROM attempt WHERE job = ?"
# With the last of its jobs: as long as there is one, a request that is repeated is answered with it.
DELETE_REQUEST = """DELETE FROM request WHERE first = (SELECT max(first) FROM request WHERE first <= ?)
    AND NOT EXISTS (SELECT 1 FROM job WHERE id >= request.first AND id < request.first + request.jobs)"""
DELETE_JOB = "DELETE FROM job WHERE id = ?"
DELETE_WORKERS = """DELETE FROM worker WHERE id IN (SELECT id FROM worker INDEXED BY worker_gone
    WHERE gone_at < ? AND protocol = 1 AND expected = 0
    AND NOT EXISTS (SELECT 1 FROM job WHERE job.finished_at IS NOT NULL AND job.worker = worker.id) LIMIT ?)"""
COUNT_FREE_PAGES = "PRAGMA freelist_count"
FREE_PAGE = "PRAGMA incremental_vacuum(1)"


def last_moment(db: Database) -> float | None:
    """When a job came or ended last, in seconds since the epoch; None where none has ended."""
    moment: float | None = db.one(LAST_MOMENT)[0]
    return moment


def prune(db: Database, before: float, names: Iterable[str], limit: int) -> int:
    """Delete up to `limit` jobs that ended before a time, with their logs, and shrink the file; how many those were.

    Fewer where their logs are large, the last perhaps only in part: whoever commits meanwhile waits. 0: there are none
    left. Of each of the names the newest job and the newest success stay: when did it last succeed? Workers of version
    1 that went before that time are deleted with the last of their jobs: they never come back.
    """
    kept = {db.one(sql, name)[0] for name in names for sql in (NEWEST_JOB, NEWEST_SUCCESS)}
    rows = db.execute(OLD_JOBS, (before, limit + len(kept))).fetchall()
    rows = [row for row in rows if row["id"] not in kept][:limit]
    count, freed = 0, 0.0
    for job, state in rows:
        if freed >= PRUNED_BYTES:
            break
        count += 1
        while freed < PRUNED_BYTES and (log := db.one(OLDEST_LOG, job)):
            db.execute(DELETE_LOG, (job, log[0]))
            freed += log[1]
        if not db.one(OLDEST_LOG, job):
            for statement in (DELETE_ATTEMPTS, DELETE_JOB, DELETE_REQUEST):
                db.execute(statement, (job,))
            db.notes.moved[state] -= 1
    db.execute(DELETE_WORKERS, (before, WORKERS_AT_ONCE))
    for _ in range(min(db.one(COUNT_FREE_PAGES)[0], FREE_PAGES_LIMIT)):
        db.execute(FREE_PAGE)
    return count
