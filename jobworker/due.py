"""Jobs that come due: how far each schedule has been dealt with, and what is to be queued now.

The functions are for the store, as those of state.py; a Scheduler belongs to the loop. When a schedule is due is
schedule.py's matter.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jobworker.schedule import Schedule
from jobworker.state import Database, Key, NewJob, add, moment
from jobworker.store import Store

TOO_FAR_SECONDS = 86400.0  # ahead of now: no clock was right when that was written
MISSED_LIMIT = 1_000  # counted; beyond it "more than 1,000"
LOOK_SECONDS = 0.05  # a look at what is due goes on for; the rest is for the next one
KEY_PREFIX = "schedule/"  # of the idempotency keys of due jobs, which no request may use

KNOWN_SCHEDULES = "SELECT name, text, upto FROM schedule"
FORGET_SCHEDULE = "DELETE FROM schedule WHERE name = ?"
BEGIN_SCHEDULE = """INSERT INTO schedule (name, text, upto) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET text = excluded.text, upto = excluded.upto"""
MOVE_UPTO = "UPDATE schedule SET upto = ?, missed = missed + ? WHERE name = ? AND text = ? AND upto < ?"
COUNT_SKIPPED = "UPDATE schedule SET skipped = skipped + 1 WHERE name = ?"
COUNT_OPEN = "SELECT count(*) FROM job WHERE name = ? AND due_at IS NOT NULL AND finished_at IS NULL"
SCHEDULES = "SELECT * FROM schedule"

log = logging.getLogger("server")


class Scheduled(NamedTuple):
    """What jobs.yaml says of a job with a schedule. most: how many of its due jobs may be there at once."""

    schedule: Schedule
    job: NewJob
    most: int


class Due(NamedTuple):
    """A due time to be dealt with, in seconds since the epoch; missed: how many before it get no job."""

    text: str
    instant: float
    missed: int
    job: NewJob
    most: int


class Dealt(NamedTuple):
    """What became of a due time; skipped: as many jobs of the schedule as may be had not ended."""

    name: str
    instant: float
    missed: int
    skipped: bool


def adopt_schedules(db: Database, texts: Mapping[str, str], now: float) -> tuple[dict[str, float], dict[str, float]]:
    """Take over the schedules of jobs.yaml, by name; give up to when each has been dealt with.

    One that is new or has changed begins now. Those that were dealt with up to a time more than a day ahead begin now
    as well, as a clock was wrong; also gives these, with that time: it may be this clock that is wrong.
    """
    known = {name: (text, upto) for name, text, upto in db.execute(KNOWN_SCHEDULES).fetchall()}
    for name in known.keys() - texts.keys():
        db.execute(FORGET_SCHEDULE, (name,))
    too_far = now + TOO_FAR_SECONDS
    ahead = {name: upto for name, (text, upto) in known.items() if texts.get(name) == text and upto > too_far}
    cursors = {}
    for name, text in texts.items():
        known_text, cursors[name] = known.get(name, ("", now))
        if known_text != text or name in ahead:
            db.execute(BEGIN_SCHEDULE, (name, text, now))
            cursors[name] = now
    return cursors, ahead


def go_on(db: Database, moves: Mapping[str, tuple[str, float]]) -> None:
    """Take schedules, by name with their text, for dealt with up to a time."""
    for name, (text, upto) in moves.items():
        db.execute(MOVE_UPTO, (upto, 0, name, text, upto))


def schedules(db: Database) -> dict[str, sqlite3.Row]:
    """Give by name up to when each schedule is dealt with, how many due times it missed, and how many it skipped."""
    return {row["name"]: row for row in db.execute(SCHEDULES)}


def queue_due(db: Database, dues: Sequence[Due], now: float) -> list[Dealt]:
    """Deal with due times: the job and the cursor are one transaction. What has been dealt with is left out.

    now: seconds since the epoch.
    """
    dealt = []
    for text, instant, missed, job, most in dues:
        if db.execute(MOVE_UPTO, (instant, missed, job.name, text, instant)).rowcount == 0:
            continue
        skipped = db.one(COUNT_OPEN, job.name)[0] >= most
        if skipped:
            db.execute(COUNT_SKIPPED, (job.name,))
        else:
            key = Key(f"{KEY_PREFIX}{job.name}/{moment(instant)}", "")
            add(db, [job._replace(due_at=instant)], now, key=key)
        dealt.append(Dealt(job.name, instant, missed, skipped))
    return dealt


class Scheduler:
    """Has jobs queued when they are due. Belongs to the loop; what is dealt with, the store knows."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        """clock: gives seconds since the epoch."""
        self._store, self._clock = store, clock
        self._entries: dict[str, Scheduled] = {}
        self._cursors: dict[str, float] = {}
        self._next: dict[str, float] = {}  # not due before: the cursor, until the next due time is computed from it
        self._ahead: dict[str, float] = {}  # the cursors of before a clock that is, or was, wrong
        self._is_adopted = True
        self._waiting = False  # for the store

    def adopt(self, entries: dict[str, Scheduled]) -> None:
        """Go by these schedules, by name; those that have not changed go on where they were."""
        self._entries, self._cursors, self._next = entries, {}, {}
        self._is_adopted = False
        self.tick()

    def _adopt(self, now: float) -> None:
        entries = self._entries

        def adopted(result: tuple[dict[str, float], dict[str, float]] | Exception) -> None:
            self._waiting = False
            if isinstance(result, Exception) or entries is not self._entries:
                return  # the next tick tries again
            self._is_adopted = True
            cursors, ahead = result
            for name, upto in cursors.items():
                self._move(name, upto)
            self._ahead = {name: upto for name, upto in (self._ahead | ahead).items() if name in cursors}
            for name in sorted(ahead):
                log.warning("%s: was dealt with up to more than a day ahead of now; its schedule begins now", name)

        self._waiting = True
        texts = {name: entry.schedule.text for name, entry in entries.items()}
        self._store.do_then(adopted, adopt_schedules, texts, now)

    def _move(self, name: str, upto: float) -> None:
        self._cursors[name] = self._next[name] = upto

    def tick(self) -> None:
        """Have queued what is due now."""
        if self._waiting:
            return
        now = self._clock()
        was_set_back = any(upto > now + TOO_FAR_SECONDS for upto in self._cursors.values())
        if was_set_back or not self._is_adopted:
            self._adopt(now)
        elif reached := {name: upto for name, upto in self._ahead.items() if self._cursors[name] < upto <= now}:
            self._go_on(reached)
        elif dues := self._dues(now):
            self._queue(dues, now)

    def _go_on(self, reached: dict[str, float]) -> None:
        """The clock is right again: what was dealt with before it was wrong is not due once more."""
        entries = self._entries

        def moved(result: Exception | None) -> None:
            self._waiting = False
            if not isinstance(result, Exception) and entries is self._entries:
                for name, upto in reached.items():
                    self._move(name, upto)

        self._waiting = True
        moves = {name: (entries[name].schedule.text, upto) for name, upto in reached.items()}
        self._store.do_then(moved, go_on, moves)

    def _dues(self, now: float) -> list[Due]:
        """Give what is due: of several due times of a schedule the latest."""
        begin, found = time.perf_counter(), []
        for name, not_before in self._next.items():
            if not_before <= now:
                self._next[name] = next_due = self._entries[name].schedule.next_due(self._cursors[name])
                if next_due <= now:
                    found.append(self._due(name, now))
                if time.perf_counter() - begin > LOOK_SECONDS:
                    break
        return found

    def _due(self, name: str, now: float) -> Due:
        schedule, job, most = self._entries[name]
        upto = self._cursors[name]
        latest = schedule.latest_due(upto, now) or now  # there is one: the next due time is not after now
        missed = schedule.count_due(upto, latest, MISSED_LIMIT + 1) - 1
        return Due(schedule.text, latest, missed, job, most)

    def _queue(self, dues: list[Due], now: float) -> None:
        entries = self._entries

        def queued(result: list[Dealt] | Exception) -> None:
            self._waiting = False
            if isinstance(result, Exception):
                return  # all of it is due again at the next tick
            if entries is self._entries:
                for due in dues:
                    self._move(due.job.name, due.instant)
            for dealt in result:
                _log_dealt(dealt)

        self._waiting = True
        self._store.do_then(queued, queue_due, dues, now)


def _log_dealt(dealt: Dealt) -> None:
    due = f"{dealt.name}: due at {moment(dealt.instant)}"
    if dealt.missed:
        count = f"more than {MISSED_LIMIT:,}" if dealt.missed > MISSED_LIMIT else dealt.missed
        log.warning("%s; missed before it: %s", due, count)
    if dealt.skipped:
        log.warning("%s, and skipped: an earlier one has not ended", due)
