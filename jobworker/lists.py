"""Which jobs a list shows, and what is done to all of them. Functions for the store, as those of state.py."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import Any, NamedTuple

from jobworker.state import (
    ACTIVE_STATES,
    ALL_NAMES,
    FINAL_STATES,
    FIND_WORKER,
    GET_JOB,
    JOB_WITH_WORKER,
    MAX_JOB_ID,
    NEWEST_JOB,
    STATES,
    Database,
    cancel,
)

OPEN_QUERIES = 50  # each slows all others down: 2,500 at once took a second and a half
PAGE_CHARACTERS = 32 * 1024  # of environment, which a reader that does not read keeps in memory

NAMES_WITH = f"{ALL_NAMES} AND instr(lower(name), lower(?))"
RECENT_STATES = "SELECT state FROM job WHERE name = ? ORDER BY id DESC LIMIT 10"
# Left to itself, SQLite's planner looks for the least id among all jobs.
FIRST_ENDED_AFTER = "SELECT min(id) FROM job INDEXED BY job_finished WHERE finished_at > ?"
FIRST_QUEUED = "SELECT min(id) FROM job WHERE state = 'queued'"


class Wanted(NamedTuple):
    """The jobs that all of these admit. after, before: ids; ended_after: seconds since the epoch; q: in the name."""

    states: Sequence[str] = ()
    name: str | None = None
    after: int = 0
    before: int | None = None
    q: str | None = None
    worker: str | None = None
    cause: int | None = None
    ended_after: float | None = None


def page(db: Database, wanted: Wanted, limit: int) -> list[sqlite3.Row]:
    """Up to `limit` jobs, oldest first; fewer, but one at least, where they are long."""
    rows, characters = [], 0
    for row in _walk(db, f"SELECT {JOB_WITH_WORKER}", "ASC", wanted, limit):
        rows.append(row)
        characters += len(row["environment"] or "")
        if characters > PAGE_CHARACTERS:
            break
    return rows


def start_of_newest(db: Database, wanted: Wanted, count: int) -> int:
    """The id after which the newest `count` of the jobs come."""
    newest = _walk(db, "SELECT job.id FROM job", "DESC", wanted, count)
    return min((row["id"] for row in newest), default=wanted.before or 0) - 1


def _walk(db: Database, select: str, order: str, wanted: Wanted, limit: int) -> Iterator[sqlite3.Row]:
    """One query a state and name, each along an index in the order of ids: a few among millions cost the same.

    Only what a worker had, or what follows a job, is looked through for a part of a name.
    """
    by_cause, by_worker, queries = wanted.cause is not None, wanted.worker is not None, []
    names, after = (wanted.name,) if by_cause or by_worker else _names(db, wanted), _after(db, wanted)
    states = _states(wanted)
    before_queued = _before_queued(db) if "queued" in states else 0
    for state in states:
        # A plus keeps a column from its index, where another admits fewer; those of what has ended say that it has.
        ended = "job.finished_at IS NOT NULL AND " if state in FINAL_STATES else ""
        is_few = by_cause or state in ACTIVE_STATES
        # In the text: where a state is bound, SQLite plans each query anew.
        of_state = f"{ended}{'+' * by_cause}job.state = '{state}' AND " if state else ""
        for name in names:
            where = {
                "job.id > ?": max(after, before_queued) if state == "queued" else after,
                "job.id < ?": wanted.before,
                "job.finished_at > ?": wanted.ended_after,
                "job.cause = ?": wanted.cause,
                f"{'+' * by_cause}job.worker = ({FIND_WORKER})": wanted.worker,
                f"{'+' * is_few}job.name = ?": name,
                "instr(lower(job.name), lower(?))": wanted.q if by_cause or by_worker else None,
            }
            where = {condition: value for condition, value in where.items() if value is not None}
            queries.append((f"{select} WHERE {of_state}{' AND '.join(where)} ORDER BY job.id {order} LIMIT ?", where))
    if len(queries) <= OPEN_QUERIES:
        found: list[Iterator[sqlite3.Row]] = [db.execute(sql, [*where.values(), limit]) for sql, where in queries]
    else:
        bound = "job.id > ?" if order == "ASC" else "job.id < ?"
        found = [_one_by_one(db, sql, where, bound) for sql, where in queries]
    return islice(merge(*found, key=lambda row: row["id"], reverse=order == "DESC"), limit)


def _one_by_one(db: Database, sql: str, where: dict[str, Any], bound: str) -> Iterator[sqlite3.Row]:
    """The rows of a query, each by one that has ended before the next."""
    while row := db.one(sql, *where.values(), 1):
        where[bound] = row["id"]
        yield row


def _states(wanted: Wanted) -> Sequence[str | None]:
    """The states to look for, without those in which no job can have what is wanted. None is any."""
    possible: Sequence[str] = STATES if wanted.worker is None else ACTIVE_STATES + FINAL_STATES
    if wanted.ended_after is not None:
        possible = FINAL_STATES
    if possible == STATES and not wanted.states:
        return (None,)
    return [state for state in wanted.states or possible if state in possible]


def _names(db: Database, wanted: Wanted) -> Sequence[str | None]:
    if wanted.q is None:
        return (wanted.name,)
    return [name for (name,) in db.execute(NAMES_WITH, (wanted.q,)).fetchall() if wanted.name in (None, name)]


def _after(db: Database, wanted: Wanted) -> int:
    """The id after which to look: that before the first job that ended late enough is found by its end's index."""
    if wanted.ended_after is not None and not wanted.after:
        return int(db.one(FIRST_ENDED_AFTER, wanted.ended_after)[0] or MAX_JOB_ID) - 1
    return wanted.after


def _before_queued(db: Database) -> int:
    """The id after which the queued jobs come: few of a name's oldest jobs still are."""
    return int(db.one(FIRST_QUEUED)[0] or MAX_JOB_ID) - 1


def last_id(db: Database) -> int:
    """The id of the newest job that there ever was."""
    return db.notes.last_id


def newest(db: Database, names: Iterable[str], sql: str = NEWEST_JOB) -> dict[str, sqlite3.Row]:
    """The newest job of each of the names that has one; or, by NEWEST_SUCCESS, the newest that succeeded."""
    ids = {name: db.one(sql, name)[0] for name in names}
    return {name: db.one(GET_JOB, id_) for name, id_ in ids.items() if id_}


def recent(db: Database, names: Iterable[str]) -> dict[str, list[str]]:
    """The states of the newest ten jobs of each of the names, oldest first."""
    return {name: [state for (state,) in db.execute(RECENT_STATES, (name,))][::-1] for name in names}


def cancel_all(db: Database, wanted: Wanted, limit: int, now: float) -> tuple[int, int | None]:
    """Cancel up to `limit` of the jobs; give how many, and the id after which to go on: None when that was all."""
    rows = page(db, wanted, limit)
    for row in rows:
        cancel(db, row["id"], now)
    return len(rows), rows[-1]["id"] if rows else None
