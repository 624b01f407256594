"""Every job's state: transitions, SQL statements and the functions that run them; the tables are in schema.py.

It must not know of HTTP, WebSockets, jobs.yaml or threads, and never asks for the time: it is given it.

A function takes a `Database` first and reads and writes through it alone; the store runs each in a transaction. What it
is asked and can't do it returns as a Refusal: an exception would undo all that was grouped with it.

Two rules for states: only `_move` changes one, and only along TRANSITIONS. A job in a final state never changes again.
"""

import json
import random
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

from jobworker.ends import End
from jobworker.past import Past, Totals

TRANSITIONS = {
    ("queued", "claim"): "assigned",
    ("queued", "cancel"): "cancelled",
    ("queued", "gone"): "failure",
    ("assigned", "start"): "running",
    ("assigned", "requeue"): "queued",
    ("assigned", "cancel"): "cancelled",
    ("running", "succeed"): "success",
    ("running", "fail"): "failure",
    ("running", "lose"): "failure",
    ("running", "retry"): "queued",
    ("running", "cancel"): "cancelled",
}
STATES = ("queued", "assigned", "running", "success", "failure", "cancelled")
ACTIVE_STATES = ("assigned", "running")
FINAL_STATES = ("success", "failure", "cancelled")

RING_TICKS = 1_000
MAX_TICK_JOBS = 250
MAX_JOB_ID = 2**31 - 1


def _each_name(index: str, condition: str) -> str:
    """Give the statement for each name that jobs have, a seek a name.

    Left to itself, SQLite's planner walks all jobs that there are.
    """
    first = f"SELECT min(name) FROM job INDEXED BY {index} WHERE {condition}"
    return f"""WITH RECURSIVE each (name) AS (
        {first} UNION ALL SELECT ({first} AND name > each.name) FROM each WHERE name IS NOT NULL)
        SELECT name FROM each WHERE name IS NOT NULL"""


JOB_WITH_WORKER = "job.*, worker.name AS worker_name FROM job LEFT JOIN worker ON worker.id = job.worker"
_READY = "state = 'queued' AND not_before IS NULL"
_ACTIVE = f"state IN {ACTIVE_STATES}"
_GUARD = "id = :id AND attempt = :attempt AND worker = :worker AND state = :from_state"

GET_JOB = f"SELECT {JOB_WITH_WORKER} WHERE job.id = ?"
GET_STATE = "SELECT id, name, attempt, failures, cancelling, worker, state FROM job WHERE id = ?"
INSERT_JOB = """INSERT INTO job
    (id, name, state, priority, environment, not_before, created_at, cause, due_at, variables)
    VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?)"""
FIND_REQUEST = "SELECT content, first, jobs FROM request WHERE key = ?"
INSERT_REQUEST = "INSERT INTO request VALUES (?, ?, ?, ?)"
LAST_ID = "SELECT seq FROM sqlite_sequence WHERE name = 'job'"
QUEUED_NAMES = _each_name("job_queued", "state = 'queued'")
READY_JOBS = f"""SELECT id, priority, name, attempt FROM job INDEXED BY job_queued
    WHERE {_READY} AND name = ? ORDER BY priority DESC, id LIMIT ?"""
ACTIVE_NAMES = f"SELECT name FROM job WHERE {_ACTIVE}"  # by state: few are active
ACTIVE_OF_WORKER = f"""SELECT id, name, attempt, failures, cancelling, worker, state, log_bytes, reading FROM job
    WHERE {_ACTIVE} AND worker = ?"""
MAY_COME_BACK = f"""SELECT id, name, protocol FROM worker
    WHERE expected = 1 OR id IN (SELECT worker FROM job WHERE {_ACTIVE})"""
EXPECTED_WORKERS = "SELECT * FROM worker WHERE expected = 1 ORDER BY id"
GONE_WORKERS = "SELECT * FROM worker WHERE gone_at > ? ORDER BY id"
ANY_EXPECTED = "SELECT 1 FROM worker WHERE expected = 1 LIMIT 1"
GET_WORKER = "SELECT * FROM worker WHERE id = ?"
HELD_JOBS = f"SELECT worker, id FROM job WHERE {_ACTIVE}"
COUNT_CONNECTED = "SELECT count(*), total(slots) FROM worker WHERE expected = 1 AND connected"
COUNT_BUSY = f"""SELECT count(*) FROM job JOIN worker ON worker.id = job.worker
    WHERE {_ACTIVE} AND worker.connected"""
CLAIM = "UPDATE job SET state = :to_state, worker = :worker, attempt = :attempt WHERE id = :id AND state = :from_state"
START = f"UPDATE job SET state = :to_state, started_at = :now WHERE {_GUARD}"
_END = """id, name, state, attempt, failures, (SELECT worker.name FROM worker WHERE worker.id = job.worker), exit_code,
    reason, created_at, started_at, finished_at"""
GET_END = f"SELECT {_END} FROM job WHERE id = ?"
FINISH = f"""UPDATE job SET state = :to_state, exit_code = :exit_code, reason = :reason, finished_at = :now
    WHERE {_GUARD} RETURNING {_END}"""
END_WAITING = f"""UPDATE job SET state = :to_state, reason = :reason, finished_at = :now, not_before = NULL
    WHERE id = :id AND state = :from_state RETURNING {_END}"""
REQUEUE = f"""UPDATE job SET state = :to_state, worker = NULL, failures = :failures, not_before = :not_before,
    started_at = NULL, reason = NULL, log_bytes = 0, reading = 0 WHERE {_GUARD}"""
SET_REASON = "UPDATE job SET reason = ? WHERE id = ? AND attempt = ? AND worker = ? AND state = 'running'"
KEEP_ATTEMPT = """INSERT INTO attempt (job, attempt, worker, started_at, finished_at, exit_code, reason, log_bytes)
    SELECT id, attempt, worker, started_at, :now, :exit_code, :reason, log_bytes FROM job WHERE id = :id"""
ATTEMPTS = """SELECT attempt.*, worker.name AS worker_name FROM attempt
    LEFT JOIN worker ON worker.id = attempt.worker WHERE job = ? ORDER BY attempt"""
SET_CANCELLING = "UPDATE job SET cancelling = 1 WHERE id = ? AND state = 'running'"
GET_CLOCK = "SELECT clock FROM server"  # at least that of the latest delay
SET_CLOCK = "UPDATE server SET clock = ?"
SHIFT_DELAYS = "UPDATE job SET not_before = not_before + ? WHERE not_before IS NOT NULL"
ALL_NAMES = _each_name("job_name", "1")
QUEUED_OF_NAME = "SELECT id FROM job INDEXED BY job_queued WHERE state = 'queued' AND name = ? LIMIT ?"
MAKE_DUE = """UPDATE job SET not_before = NULL
    WHERE id IN (SELECT id FROM job WHERE not_before <= ? ORDER BY not_before, id LIMIT ?)"""
IS_CONNECTED = "SELECT 1 FROM worker WHERE name = ? AND connected AND connected_at = ?"
FIND_WORKER = "SELECT id FROM worker WHERE name = ?"
INSERT_WORKER = "INSERT INTO worker (name) VALUES (?)"
CONNECT_WORKER = """UPDATE worker SET expected = 1, connected = 1, protocol = :protocol, slots = :slots, tags = :tags,
    address = :address, version = :version, connected_at = :since, gone_at = NULL, held = NULL WHERE id = :id"""
DISCONNECT_WORKER = "UPDATE worker SET connected = 0, gone_at = ? WHERE id = ? AND connected_at = ?"
DISCONNECT_ALL = "UPDATE worker SET connected = 0, gone_at = ? WHERE expected = 1 AND connected"
KEEP_HELD = "UPDATE worker SET held = ? WHERE id = ?"
FORGET_WORKER = "UPDATE worker SET expected = 0 WHERE id = ? AND NOT connected"
LOG_STATE = "SELECT log_bytes, reading FROM job WHERE id = ? AND attempt = ? AND worker = ? AND state = 'running'"
NEWEST_JOB = "SELECT max(id) FROM job WHERE name = ?"
NEWEST_SUCCESS = """SELECT max(id) FROM job INDEXED BY job_ended
    WHERE finished_at IS NOT NULL AND state = 'success' AND name = ?"""
OLDEST_READY = f"""SELECT min(created_at) FROM (SELECT * FROM job WHERE state = 'queued' ORDER BY id LIMIT 1000)
    WHERE {_READY}"""
WRITE_SOMETHING = "UPDATE server SET id = id"
GET_VARIABLES = "SELECT environment, variables, due_at FROM job WHERE id = ?"
COUNT_STATES = "SELECT state, count(*) AS jobs FROM job GROUP BY state"


class Rules(Protocol):
    """What jobs.yaml asks for, as far as it decides on states; a Configs is one."""

    def retry_delay(self, name: str, failures: int) -> float | None: ...

    def follow_up(self, name: str, final_state: str) -> tuple[str, dict[str, str], int] | None:
        """Give the name, variables and priority of the job that follows one that has ended so."""

    def names_for(self, tags: tuple[str, ...], protocol: int) -> frozenset[str]:
        """Give the names of the jobs that such a worker may take."""

    @property
    def limits(self) -> Mapping[str, int]:
        """How many jobs of a name may be assigned or running at once."""


class Refusal(NamedTuple):
    """What was asked can't be done, and nothing was changed. kind: "unknown", "conflict" or "no worker"."""

    kind: str
    detail: str


class NewJob(NamedTuple):
    """A job to be queued. cause: the job that it follows; variables: what it is told of that one, as JSON."""

    name: str
    environment: dict[str, str] | None = None
    priority: int = 0
    delay: float = 0
    cause: int | None = None
    due_at: float | None = None
    variables: str | None = None


class Key(NamedTuple):
    """An idempotency key, and what the request that has it asks for, in a form in which equals are the same text."""

    text: str
    content: str


class FreeSlots(NamedTuple):
    """A connected worker, how many jobs it may take now, and the names of those; below 0: it ends with what it has.

    frames: how many of its connection's are stored.
    """

    worker: int
    free: int
    names: frozenset[str]
    tags: tuple[str, ...] = ()
    protocol: int = 2
    frames: int = 0


class Claimed(NamedTuple):
    worker: int
    id: int
    name: str
    attempt: int
    environment: dict[str, str]


class Order(NamedTuple):
    """Someone cancelled an attempt: its worker has to stop it, or to let it go where it had not started it."""

    worker: int
    job: int
    attempt: int
    started: bool


class Arrival(NamedTuple):
    """What a worker that connects says of itself; held: (job, attempt, state) as the worker has them."""

    name: str
    protocol: int
    slots: int
    tags: tuple[str, ...]
    address: str
    version: str
    since: float
    held: tuple[tuple[int, int, str], ...]


class HeldAttempt(NamedTuple):
    """An attempt that a returned worker still holds and shall go on with."""

    id: int
    attempt: int
    log_bytes: int
    cancelling: bool
    reading: int


class Tick:
    """What changed in a moment: ids of jobs and of workers, and how things stand. `next` is done with the next tick."""

    def __init__(self, id_: int, jobs: frozenset[int], workers: frozenset[int], overview: dict[str, Any]) -> None:
        self.id, self.jobs, self.workers, self.overview = id_, jobs, workers, overview
        self.next: Future[Tick] = Future()


@dataclass
class Notes:
    """What the transaction under way has changed. A rollback forgets it."""

    last_id: int
    slots: dict[int, FreeSlots]
    ready: bool  # a claim may find more than the last one did
    moved: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    jobs: set[int] = field(default_factory=set)
    workers: set[int] = field(default_factory=set)
    claimed: list[Claimed] = field(default_factory=list)
    finished: list[End] = field(default_factory=list)
    retried: list[End] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    tick: tuple[dict[str, Any], float] | None = None


class Database:
    """What a function sees of the store: the connection, and notes of what its transaction changes.

    slots: by worker, those of all that are connected. limits: as Rules has them.
    """

    def __init__(self, connection: sqlite3.Connection, chance: random.Random) -> None:
        self.connection, self.chance = connection, chance
        self.counts = dict.fromkeys(STATES, 0) | dict(self.execute(COUNT_STATES).fetchall())
        self.last_id: int = (self.one(LAST_ID) or [0])[0]
        self.slots: dict[int, FreeSlots] = {}
        self.limits: Mapping[str, int] = {}
        self.ready = False
        self.notes = Notes(self.last_id, {}, False)
        self.totals, self.past = Totals(), Past()
        # By job, the futures that are done with its next change, and with its end: each goes with who waits.
        self.watchers: WeakValueDictionary[int, Future[None]] = WeakValueDictionary()
        self.enders: WeakValueDictionary[int, Future[None]] = WeakValueDictionary()
        self.ticks = deque([Tick(0, frozenset(), frozenset(), {})], maxlen=RING_TICKS)
        self.untold_jobs: set[int] = set()
        self.untold_workers: set[int] = set()

    def execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, parameters)

    def one(self, sql: str, *parameters: Any) -> Any:
        return self.connection.execute(sql, parameters).fetchone()

    def begin(self) -> None:
        self.notes = Notes(self.last_id, self.slots.copy(), self.ready)
        self.execute("BEGIN IMMEDIATE")

    def commit(self) -> Notes:
        """Commit, and take over what the transaction noted."""
        self.execute("COMMIT")
        notes = self.notes
        self.last_id, self.slots, self.ready = notes.last_id, notes.slots, notes.ready
        for state, count in notes.moved.items():
            self.counts[state] += count
        self.totals.observe(notes.finished)
        self.untold_jobs |= notes.jobs
        self.untold_workers |= notes.workers
        if notes.tick:
            self._add_tick(*notes.tick)
        return notes

    def rollback(self) -> None:
        if self.connection.in_transaction:
            self.execute("ROLLBACK")

    def _add_tick(self, overview: dict[str, Any], now: float) -> None:
        """Tell who listens what has changed since the last tick, if anything did. Ids grow, also across restarts."""
        self.past.note(overview, now)
        last = self.ticks[-1]
        if self.untold_jobs or self.untold_workers or overview != last.overview:
            jobs = frozenset(islice(self.untold_jobs, MAX_TICK_JOBS + 1))  # more are told as a reset
            tick = Tick(max(int(now * 1000), last.id + 1), jobs, frozenset(self.untold_workers), overview)
            self.ticks.append(tick)
            self.untold_jobs, self.untold_workers = set(), set()
            last.next.set_result(tick)


def _move(db: Database, statement: str, event: str, from_state: str, job: int, **values: Any) -> bool:
    """Move a job along TRANSITIONS with a guarded statement; False for a stale move, which changes nothing."""
    to_state = TRANSITIONS[from_state, event]
    cursor = db.execute(statement, {"id": job, "from_state": from_state, "to_state": to_state, **values})
    if to_state in FINAL_STATES:
        ended = [End(*row) for row in cursor]
        db.notes.finished += ended
        moved = bool(ended)
    else:
        moved = cursor.rowcount == 1
    if moved:
        db.notes.moved[from_state] -= 1
        db.notes.moved[to_state] += 1
        db.notes.jobs.add(job)
        if worker := values.get("worker"):
            db.notes.workers.add(worker)
            _count_slots(db, worker, (from_state in ACTIVE_STATES) - (to_state in ACTIVE_STATES))
        db.notes.ready = db.notes.ready or to_state not in ACTIVE_STATES
    return moved


def _count_slots(db: Database, worker: int, more: int) -> None:
    if more and (slots := db.notes.slots.get(worker)):
        db.notes.slots[worker] = slots._replace(free=slots.free + more)


# Jobs come in


def add(
    db: Database, jobs: Sequence[NewJob], now: float, hold: bool = True, key: Key | None = None
) -> list[int] | Refusal:
    """Queue jobs; give their ids, all or none.

    now: seconds since the epoch. hold: also where no worker is connected or within its grace. Where the key is known
    nothing is queued: the ids are those of the request that had it; refused as a conflict if that was another one.
    """
    if key and (known := find_request(db, key)) is not None:
        return known
    if not hold and not db.one(ANY_EXPECTED):
        return Refusal("no worker", "worker is not exist")
    first = db.notes.last_id + 1
    ids = list(range(first, first + len(jobs)))
    db.connection.executemany(INSERT_JOB, (_row(id_, job, now) for id_, job in zip(ids, jobs, strict=True)))
    if any(job.delay > 0 for job in jobs):
        db.execute(SET_CLOCK, (now,))
    if key:
        db.execute(INSERT_REQUEST, (*key, first, len(jobs)))
    db.notes.last_id += len(jobs)
    db.notes.moved["queued"] += len(jobs)
    db.notes.jobs.update(ids)
    db.notes.ready = True
    return ids


def _row(id_: int, job: NewJob, now: float) -> tuple[object, ...]:
    name, environment, priority, delay, *rest = job
    return id_, name, priority, _as_json(environment), now + delay if delay > 0 else None, now, *rest


def _as_json(variables: dict[str, str] | None) -> str | None:
    return json.dumps(variables, ensure_ascii=False) if variables else None


def moment(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find_request(db: Database, key: Key) -> list[int] | Refusal | None:
    """The ids of the jobs that a request with this key queued; None: there was none. A conflict if it was another."""
    known = db.one(FIND_REQUEST, key.text)
    if known is None:
        return None
    content, first, count = known
    if content not in (None, key.content):  # None: of a release that did not keep it
        return Refusal("conflict", f"this Idempotency-Key was used for job {first}, which is another request")
    return list(range(first, first + count))


def shift_delays(db: Database, seconds: float, now: float) -> None:
    """Move the times that delayed jobs wait for, as the clock was set to `now`: a delay is a duration."""
    db.execute(SHIFT_DELAYS, (seconds,))
    db.execute(SET_CLOCK, (now,))


def end_gone(db: Database, names: frozenset[str], now: float, limit: int) -> int:
    """End up to `limit` queued jobs whose entry has left jobs.yaml, which now has these names; how many those were."""
    count = 0
    for (name,) in db.execute(QUEUED_NAMES).fetchall():
        if name not in names and count < limit:
            for (job,) in db.execute(QUEUED_OF_NAME, (name, limit - count)).fetchall():
                count += _move(db, END_WAITING, "gone", "queued", job, reason="gone", now=now)
    return count


def make_due(db: Database, now: float, limit: int) -> int:
    """Let up to `limit` delayed jobs whose time has come be claimed; how many those were."""
    count = db.execute(MAKE_DUE, (now, limit)).rowcount
    db.notes.ready = db.notes.ready or count > 0
    return count


# Jobs go out


def fill_slots(db: Database) -> None:
    """Have claimed what free slots can take, where there may be something: the last of a transaction."""
    if db.notes.ready:
        offers = [slots for slots in db.notes.slots.values() if slots.free > 0]
        db.notes.claimed = claim(db, offers, db.limits) if offers else []
        db.notes.ready = False


def adopt(db: Database, rules: Rules) -> None:
    """Have claims go by the jobs.yaml now in force, also where this transaction fails."""
    db.limits = rules.limits
    for known in (db.slots, db.notes.slots):
        for worker, slots in known.items():
            known[worker] = slots._replace(names=rules.names_for(slots.tags, slots.protocol))
    db.notes.ready = True


def claim(db: Database, offers: Sequence[FreeSlots], limits: Mapping[str, int]) -> list[Claimed]:
    """Give queued jobs to workers with free slots, best first, and mark them assigned.

    limits: how many jobs of a name may be assigned or running at once. Of the workers that may take a job, the one
    with the most free slots gets it; among equals, chance decides. Returns the claimed, highest priority first, then
    oldest; fewer than there are slots, or none, where no more may run.
    """
    queued, ready, active = db.execute(QUEUED_NAMES).fetchall(), [], None
    # A heap for each set of names: thousands of jobs and workers would make too many pairs.
    heaps: defaultdict[frozenset[str], list[tuple[int, float, int]]] = defaultdict(list)
    for offer in offers if queued else ():
        heaps[offer.names].append((-offer.free, db.chance.random(), offer.worker))
    slots = {names: -sum(minus_free for minus_free, *_ in heap) for names, heap in heaps.items()}
    for (name,) in queued:
        room = sum(free for names, free in slots.items() if name in names)
        if room > 0 and name in limits:
            active = count_active(db) if active is None else active
            room = min(room, limits[name] - active[name])
        if room > 0:
            ready += db.execute(READY_JOBS, (name, room)).fetchall()
    ready.sort(key=lambda job: (-job["priority"], job["id"]))
    return list(_hand_to_workers(db, ready, heaps)) if ready else []


def count_active(db: Database) -> Counter[str]:
    """How many jobs of each name are assigned or running."""
    return Counter(name for (name,) in db.execute(ACTIVE_NAMES))


def _hand_to_workers(
    db: Database, ready: list[sqlite3.Row], heaps: Mapping[frozenset[str], list[tuple[int, float, int]]]
) -> Iterator[Claimed]:
    for heap in heaps.values():
        heapify(heap)
    for job in ready:
        takers = [heap for names, heap in heaps.items() if heap and job["name"] in names]
        if not takers:
            continue
        heap = min(takers, key=lambda taker: taker[0])
        minus_free, _, worker = heappop(heap)
        if minus_free < -1:
            heappush(heap, (minus_free + 1, db.chance.random(), worker))
        attempt = job["attempt"] + 1
        _move(db, CLAIM, "claim", "queued", job["id"], worker=worker, attempt=attempt)
        # Only now: of each name as many are ready as there are slots in all, and their variables may be long.
        yield Claimed(worker, job["id"], job["name"], attempt, _environment(db.one(GET_VARIABLES, job["id"])))


def _environment(job: sqlite3.Row) -> dict[str, str]:
    """What a worker sets in a job's container: what was asked for, and what the server tells it of its origin."""
    variables: dict[str, str] = {}
    for column in ("environment", "variables"):
        variables |= json.loads(job[column]) if job[column] else {}
    return variables | ({} if job["due_at"] is None else {"JOBWORKER_DUE_AT": moment(job["due_at"])})


def start(db: Database, worker: int, job: int, attempt: int, now: float) -> bool:
    """Note that an attempt is about to run; False where it is not this worker's any more. Twice is as good as once."""
    if _move(db, START, "start", "assigned", job, attempt=attempt, worker=worker, now=now):
        return True
    return db.one(LOG_STATE, job, attempt, worker) is not None


def note_pull(db: Database, worker: int, job: int, attempt: int, image: str) -> None:
    """Note which image a running attempt waits for; "": none any more."""
    if db.execute(SET_REASON, (f"pulling {image}" if image else None, job, attempt, worker)).rowcount:
        db.notes.jobs.add(job)


def succeed(db: Database, worker: int, job: int, attempt: int, now: float, rules: Rules) -> bool:
    """Note that an attempt's container exited 0; False for a stale message."""
    values = {"attempt": attempt, "worker": worker, "now": now, "exit_code": 0, "reason": None}
    ended = _move(db, FINISH, "succeed", "running", job, **values)
    if not ended and start(db, worker, job, attempt, now):  # by a version 1 worker, which never said so
        ended = _move(db, FINISH, "succeed", "running", job, **values)
    if ended:
        _follow(db, now, rules)
    return ended


def fail(
    db: Database, worker: int, job: int, attempt: int, exit_code: int | None, reason: str, now: float, rules: Rules
) -> bool:
    """Note that an attempt failed: it ends, is queued again while retries are left, or was being cancelled.

    False for a stale message.
    """
    if not start(db, worker, job, attempt, now):
        return False
    _end_attempt(db, db.one(GET_STATE, job), "fail", exit_code, reason, now, rules)
    return True


def _end_attempt(
    db: Database, row: sqlite3.Row, event: str, exit_code: int | None, reason: str, now: float, rules: Rules
) -> None:
    values = {"attempt": row["attempt"], "worker": row["worker"], "now": now, "exit_code": exit_code, "reason": reason}
    if row["cancelling"]:
        _move(db, FINISH, "cancel", "running", row["id"], **{**values, "reason": "cancelled"})
        return
    delay = rules.retry_delay(row["name"], row["failures"] + 1)
    if delay is None:
        _move(db, FINISH, event, "running", row["id"], **values)
        _follow(db, now, rules)
        return
    end = End(*db.one(GET_END, row["id"]))
    db.notes.retried.append(end._replace(exit_code=exit_code, reason=reason, finished_at=now, retry_in=delay))
    db.execute(KEEP_ATTEMPT, {"id": row["id"], "now": now, "exit_code": exit_code, "reason": reason})
    db.execute(SET_CLOCK, (now,))
    _requeue(db, row, "retry", row["failures"] + 1, now + delay)


def _follow(db: Database, now: float, rules: Rules) -> None:
    """Queue what follows the job that has just ended: a part of its end."""
    ended = db.notes.finished[-1]
    follower = rules.follow_up(ended.name, ended.state)
    if follower:
        told = ("id", "name", "state", "reason", "exit_code", "attempt", "worker")
        values = ((key, getattr(ended, key)) for key in told)
        cause = {f"JOBWORKER_CAUSE_{key.upper()}": "" if value is None else str(value) for key, value in values}
        add(db, [NewJob(*follower, cause=ended.id, variables=_as_json(cause))], now)


def _requeue(db: Database, row: sqlite3.Row, event: str, failures: int, not_before: float | None) -> None:
    values = {"attempt": row["attempt"], "worker": row["worker"], "failures": failures, "not_before": not_before}
    _move(db, REQUEUE, event, row["state"], row["id"], **values)


# Workers come and go


def resume(db: Database, now: float) -> list[tuple[int, str, int]]:
    """At the server's start nobody is connected; give id, name and protocol of each worker that may come back.

    now: seconds since the epoch. Where the clock was set back meanwhile, what is delayed is as many seconds earlier.
    """
    (clock,) = db.one(GET_CLOCK)
    if clock > now:
        shift_delays(db, now - clock, now)
    db.execute(DISCONNECT_ALL, (now,))
    return [(row["id"], row["name"], row["protocol"]) for row in db.execute(MAY_COME_BACK)]


def attach(
    db: Database, arrival: Arrival, now: float, rules: Rules, again: bool = False
) -> tuple[int, list[HeldAttempt]] | None:
    """Note that a worker is connected, and settle what it holds: give its id, and the attempts it shall go on with.

    What the store has for that worker beyond these is gone: it is queued again where it had not started, lost where it
    had. What the worker has beyond the store's is not returned. again: the connection was attached before; where a
    newer one has taken over, nothing changes, and the result is None.
    """
    if again and not db.one(IS_CONNECTED, arrival.name, arrival.since):
        return None
    known = db.one(FIND_WORKER, arrival.name)
    worker = int(known[0] if known else db.execute(INSERT_WORKER, (arrival.name,)).lastrowid or 0)
    values = arrival._asdict() | {"id": worker, "tags": json.dumps(arrival.tags, ensure_ascii=False)}
    del values["held"], values["name"]
    db.execute(CONNECT_WORKER, values)
    db.notes.workers.add(worker)
    kept = {(job, attempt) for job, attempt, _state in arrival.held}
    wanted = []
    for row in db.execute(ACTIVE_OF_WORKER, (worker,)).fetchall():
        key = row["id"], row["attempt"]
        if key in kept:
            wanted.append(HeldAttempt(*key, row["log_bytes"], bool(row["cancelling"]), row["reading"]))
        else:
            _lose(db, row, now, rules)
    names = rules.names_for(arrival.tags, arrival.protocol)
    free = arrival.slots - len(wanted)
    frames = db.notes.slots[worker].frames if again else 0
    db.notes.slots[worker] = FreeSlots(worker, free, names, arrival.tags, arrival.protocol, frames)
    db.notes.ready = True
    return worker, wanted


def is_next_frame(db: Database, worker: int, number: int) -> bool:
    """Count a frame of a worker's connection; False where one before it could not be stored."""
    slots = db.notes.slots.get(worker)
    if slots is None or number != slots.frames + 1:
        return False
    db.notes.slots[worker] = slots._replace(frames=number)
    return True


def detach(db: Database, worker: int, since: float, now: float) -> int:
    """Note that a worker's connection is gone, and queue again what it had not started.

    since: that of the connection's Arrival; where a newer one has taken over, nothing changes. Returns how many jobs
    the worker may still be running.
    """
    if db.execute(DISCONNECT_WORKER, (now, worker, since)).rowcount == 0:
        return 0
    db.notes.workers.add(worker)
    db.notes.slots.pop(worker, None)
    rows = db.execute(ACTIVE_OF_WORKER, (worker,)).fetchall()
    db.execute(KEEP_HELD, (json.dumps([row["id"] for row in rows]), worker))
    for row in rows:
        if row["state"] == "assigned":
            _requeue(db, row, "requeue", row["failures"], None)
    return sum(row["state"] == "running" for row in rows)


def lose(db: Database, worker: int, now: float, rules: Rules) -> int:
    """Give up what a worker was running, unless it is back; how many jobs that were."""
    if db.execute(FORGET_WORKER, (worker,)).rowcount == 0:
        return 0
    db.notes.workers.add(worker)
    rows = db.execute(ACTIVE_OF_WORKER, (worker,)).fetchall()
    for row in rows:
        _lose(db, row, now, rules)
    return len(rows)


def _lose(db: Database, row: sqlite3.Row, now: float, rules: Rules) -> None:
    if row["state"] == "assigned":
        _requeue(db, row, "requeue", row["failures"], None)
    else:
        _end_attempt(db, row, "lose", None, "lost", now, rules)


# People ask


def cancel(db: Database, job: int, now: float) -> sqlite3.Row | Refusal:
    """Cancel a job: at once where it does not run, else once its worker confirms; its row, as `get` gives it.

    Where a worker has it, an order for that worker is noted. Refused as unknown, or as a conflict where it has ended.
    """
    row: sqlite3.Row | None = db.one(GET_STATE, job)
    if row is None:
        return _unknown(job)
    if row["state"] in FINAL_STATES:
        return Refusal("conflict", f"job {job} has ended already: {row['state']}")
    if row["state"] == "running":
        db.execute(SET_CANCELLING, (job,))
        db.notes.jobs.add(job)
    else:
        _move(db, END_WAITING, "cancel", row["state"], job, reason="cancelled", now=now, worker=row["worker"])
    if row["worker"] is not None:
        db.notes.workers.add(row["worker"])
        db.notes.orders.append(Order(row["worker"], job, row["attempt"], row["state"] == "running"))
    return get(db, job)


def _unknown(job: int) -> Refusal:
    return Refusal("unknown", f"there is no job with id {job}")


def get(db: Database, job: int) -> sqlite3.Row | Refusal:
    """A job's row, with worker_name. Refused as unknown."""
    row: sqlite3.Row | None = db.one(GET_JOB, job)
    return _unknown(job) if row is None else row


def get_many(db: Database, jobs: Iterable[int]) -> list[sqlite3.Row]:
    """The rows of those jobs that exist, by id."""
    return [row for job in sorted(jobs) if (row := db.one(GET_JOB, job))]


def get_and_watch(db: Database, job: int, its_end: bool) -> tuple[sqlite3.Row, "Future[None] | None"] | Refusal:
    """A job's row, and a future that is done when it has next changed, or has ended; None where it is final.

    There is one for all who wait. Refused as unknown.
    """
    row = get(db, job)
    if isinstance(row, Refusal):
        return row
    watched = db.enders if its_end else db.watchers
    return row, watched.setdefault(job, Future()) if row["state"] not in FINAL_STATES else None


def attempts(db: Database, job: int) -> list[sqlite3.Row]:
    """The attempts of a job that were followed by another, oldest first."""
    return db.execute(ATTEMPTS, (job,)).fetchall()


# How things stand


def workers(
    db: Database, ids: Iterable[int] | None = None, gone_since: float | None = None
) -> list[tuple[sqlite3.Row, list[int]]]:
    """Workers' rows, each with the ids of the jobs it holds: those asked for, or all that are there or may come back.

    A row's `connected` is 0 for one that is away, its `tags` and `held` JSON lists; held: what it had when it went.
    gone_since: also those that went after this time, in seconds since the epoch.
    """
    rows = list(db.execute(EXPECTED_WORKERS) if ids is None else (db.one(GET_WORKER, id_) for id_ in sorted(ids)))
    if gone_since is not None:
        rows = list({row["id"]: row for row in (*rows, *db.execute(GONE_WORKERS, (gone_since,)))}.values())
    held: defaultdict[int, list[int]] = defaultdict(list)
    for worker, job in db.execute(HELD_JOBS):
        held[worker].append(job)
    return [(row, sorted(held[row["id"]])) for row in rows if row]


def what_waits_for(db: Database, limited: Collection[str]) -> tuple[set[tuple[int, str]], dict[str, int]]:
    """What decides whether a queued job may run: protocol and tags of who is connected, and how many of each name run.

    limited: the names to count. Tags are a JSON list.
    """
    connected = {(row["protocol"], row["tags"]) for row in db.execute(EXPECTED_WORKERS) if row["connected"]}
    active = count_active(db) if limited else Counter()
    return connected, {name: active[name] for name in limited}


def overview(db: Database, now: float) -> dict[str, Any]:
    """Jobs by state, how many ended, how long the oldest ready job has waited in seconds; workers, slots, busy ones."""
    connected, slots = db.one(COUNT_CONNECTED)
    oldest = db.one(OLDEST_READY)[0]
    return {
        "jobs": {state: db.counts[state] + db.notes.moved.get(state, 0) for state in STATES},
        "finished": db.totals.finished.total() + len(db.notes.finished),
        "queue_latency": round(max(now - oldest, 0), 1) if oldest else 0,
        "workers": connected,
        "slots": int(slots),
        "busy": db.one(COUNT_BUSY)[0],
    }


def tick(db: Database, now: float) -> None:
    """Have those who listen told what has changed, once that is on disk; and try to claim, whatever failed before."""
    db.notes.ready = True
    db.notes.tick = overview(db, now), now


def listen(db: Database, last_id: int | None) -> tuple[Tick, Tick | None, list[list[float]]]:
    """The newest tick, the one after which to go on (that of `last_id`; None where it is not known), and the past."""
    newest = db.ticks[-1]
    after = newest if last_id is None else next((tick for tick in db.ticks if tick.id == last_id), None)
    return newest, after, db.past.recent()


def totals(db: Database) -> Totals:
    """A copy of what was counted since the server's start."""
    return db.totals.copy()


def probe(db: Database) -> None:
    """Write something, to see whether the disk takes writes again."""
    db.execute(WRITE_SOMETHING)
