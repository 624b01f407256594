"""Thousands of random histories of the state against a simple model of it, looked at after every step."""

import random
import re
import shutil
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from jobworker import lists, logs, retention
from jobworker import state as state_module
from jobworker.state import Arrival, FreeSlots, Key, NewJob
from jobworker.store import Store

RETRIES = {"once": 0, "again": 2, "alone": 0}
LIMITS = {"alone": 1}
EDGES = {  # section 2 of the design
    ("queued", "assigned"),
    ("assigned", "running"),
    ("running", "success"),
    ("running", "failure"),
    ("assigned", "queued"),
    ("running", "queued"),
    ("queued", "cancelled"),
    ("queued", "failure"),
    ("assigned", "cancelled"),
    ("running", "cancelled"),
}
FINAL = {"success", "failure", "cancelled"}
ACTIVE = {"assigned", "running"}


FOLLOW_UPS = {("again", "failure"): ("once", {"A": "1"}, 1), ("alone", "success"): ("again", {}, 0)}


class Rules:
    """What a jobs.yaml would say."""

    def retry_delay(self, name: str, failures: int) -> float | None:
        return 2.0**failures if failures <= RETRIES[name] else None

    def follow_up(self, name: str, final_state: str) -> tuple[str, dict[str, str], int] | None:
        return FOLLOW_UPS.get((name, final_state))

    def names_for(self, _tags: tuple[str, ...], _protocol: int) -> frozenset[str]:
        return frozenset()  # the tests claim by themselves

    @property
    def limits(self) -> dict[str, int]:
        return LIMITS


RULES = Rules()


@dataclass
class Model:
    """What a job should be."""

    id: int
    name: str
    priority: int
    not_before: float | None
    state: str = "queued"
    attempt: int = 0
    failures: int = 0
    cancelling: bool = False
    worker: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    cause: int | None = None
    starts: int = 0
    log_bytes: int = 0
    kept: list[tuple[int, int | None, str]] = field(default_factory=list)
    logs: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def begin(self, now: float) -> None:
        if self.state == "assigned":
            self.state, self.started_at = "running", now
            self.starts += 1

    def holds(self, worker: int, attempt: int, state: str) -> bool:
        return (self.worker, self.attempt, self.state) == (worker, attempt, state)

    def requeue(self, not_before: float | None) -> None:
        self.state, self.worker, self.started_at, self.log_bytes = "queued", None, None, 0
        self.not_before = not_before

    def finish(self, state: str, now: float, exit_code: int | None, reason: str | None) -> None:
        self.state, self.finished_at, self.exit_code, self.reason = state, now, exit_code, reason

    def end_attempt(self, now: float, exit_code: int | None, reason: str) -> None:
        delay = RULES.retry_delay(self.name, self.failures + 1)
        if self.cancelling:
            self.finish("cancelled", now, exit_code, "cancelled")
        elif delay is None:
            self.finish("failure", now, exit_code, reason)
        else:
            self.kept.append((self.attempt, exit_code, reason))
            self.failures += 1
            self.requeue(now + delay)

    def lose(self, now: float) -> None:
        if self.state == "assigned":
            self.requeue(None)
        else:
            self.end_attempt(now, None, "lost")


def arrival(name: str, held: Any = (), since: float = 0.0) -> Arrival:
    return Arrival(name, 2, 1, (), "127.0.0.1:5", "0", since, tuple(held))


class StoreBesideModel(RuleBasedStateMachine):
    """The store, the model that it must equal, and what must hold after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(
            tempfile.mkdtemp(prefix="store-state-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        self.store = Store(str(self.folder / "jobs.db"), chance=random.Random(0)).start()
        self.now = 1_000.0
        self.since: dict[int, float] = {}
        self.requests: dict[str, tuple[str, list[int]]] = {}
        self.jobs: dict[int, Model] = {}
        self.last_id = 0
        self.forgotten_causes: set[int | None] = set()  # whose follow-ups were pruned
        self.connected: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.expected: set[int] = set()
        self.before: dict[int, tuple[str, int, Any]] = {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(logs, "LOG_HEAD_BYTES", 24)
        self.patch.setattr(logs, "LOG_TAIL_BYTES", 24)
        self.patch.setattr(logs, "LOG_ROW_BYTES", 6)  # shorter than a piece, as in truth

    def teardown(self) -> None:
        self.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    def do(self, function: Any, *args: Any) -> Any:
        self.orders: list[Any] = []

        def note_orders(db: state_module.Database) -> Any:
            result = function(db, *args)
            self.orders = [tuple(order) for order in db.notes.orders]
            return result

        return self.store.do(note_orders).result(10)

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.do(state_module.overview, self.now)["jobs"]
        return counts

    def follow(self) -> None:
        """What has ended by itself, and for good, has had its follow-up queued, once."""
        told = {job.cause for job in self.jobs.values()} | self.forgotten_causes
        for job in list(self.jobs.values()):
            follower = RULES.follow_up(job.name, job.state)
            if follower and job.reason != "gone" and job.id not in told:
                self.last_id += 1
                self.jobs[self.last_id] = Model(self.last_id, follower[0], follower[2], None, cause=job.id)

    @invariant()
    def the_workers_are_known(self) -> None:
        found = {row["id"]: (row["name"], jobs) for row, jobs in self.do(state_module.workers) if row["connected"]}
        active = [job for job in self.jobs.values() if job.state in ACTIVE]
        assert found == {
            worker: (name, sorted(job.id for job in active if job.worker == worker))
            for worker, name in self.connected.items()
        }

    @invariant()
    def free_slots_are_those_without_a_job(self) -> None:
        slots = self.store._database.slots
        held = Counter(job.worker for job in self.jobs.values() if job.state in ACTIVE)
        assert {w: slots[w].free for w in self.connected} == {w: 1 - held[w] for w in self.connected}

    @invariant()
    def rows_equal_the_model(self) -> None:
        rows = {row["id"]: row for row in self.do(lists.page, lists.Wanted(), 10**6)}
        assert list(rows) == sorted(self.jobs)
        for job in self.jobs.values():
            row = rows[job.id]
            for key in (
                "name",
                "priority",
                "state",
                "attempt",
                "failures",
                "worker",
                "exit_code",
                "reason",
                "not_before",
                "cause",
            ):
                assert row[key] == getattr(job, key), (job, dict(row))
            for key in ("started_at", "finished_at", "log_bytes"):
                assert row[key] == getattr(job, key), (job, dict(row))
            assert bool(row["cancelling"]) == job.cancelling
            kept = [(r["attempt"], r["exit_code"], r["reason"]) for r in self.do(state_module.attempts, job.id)]
            assert kept == job.kept
        assert self.counts() == {
            state: sum(j.state == state for j in self.jobs.values()) for state in state_module.STATES
        }
        self.promises(rows)

    def promises(self, rows: dict[int, Any]) -> None:
        for number, row in rows.items():
            state, attempt = row["state"], row["attempt"]
            whole = tuple(row)
            old_state, old_attempt, old = self.before.get(number, (state, attempt, whole))
            through = "running" if old_state == "assigned" else old_state  # a result may come without its start
            assert state == old_state or (old_state, state) in EDGES or (through, state) in EDGES
            assert attempt >= old_attempt
            assert old == whole or old_state not in FINAL, "a final job changed"
            assert (row["worker"] is not None) or state not in ACTIVE
            assert row["failures"] <= RETRIES[row["name"]]
            assert self.jobs[number].starts <= RETRIES[row["name"]] + 1, "started more often than allowed"
            assert (row["finished_at"] is not None) == (state in FINAL)
            assert state not in ACTIVE or row["worker"] in self.expected, (
                "a job waits for a worker that is not expected"
            )
            self.before[number] = state, attempt, whole
        for name, limit in LIMITS.items():
            assert sum(row["name"] == name and row["state"] in ACTIVE for row in rows.values()) <= limit
            assert self.do(state_module.what_waits_for, [name])[1][name] <= limit

    @invariant()
    def logs_hold_head_and_tail(self) -> None:
        for job in self.jobs.values():
            for attempt, wanted in job.logs.items():
                got: dict[int, bytes] = {}
                offset = 0
                while pieces := self.do(logs.read_log, job.id, attempt, offset):
                    for start, data in pieces:
                        assert start >= offset
                        got |= {start + n: data[n : n + 1] for n in range(len(data))}
                        offset = start + len(data)
                assert all(wanted.get(n) == byte for n, byte in got.items()), "a byte that was never written there"
                end = max(wanted) + 1
                for n in wanted:
                    if n < 24 or n >= end - (24 - 9) or end <= 48:
                        assert n in got, f"byte {n} of {end} is gone"
                assert len(got) <= 48 + 9 + 9


class WhatPeopleDo(StoreBesideModel):
    """Jobs are queued, cancelled, and gone from jobs.yaml."""

    @rule(
        jobs=st.lists(
            st.builds(
                NewJob,
                environment=st.just({}),
                name=st.sampled_from(sorted(RETRIES)),
                priority=st.integers(-1, 1),
                delay=st.sampled_from([0, 0, 0, 5]),
                cause=st.none(),
                due_at=st.none(),
                variables=st.none(),
            ),
            max_size=4,
        ),
        key=st.none() | st.builds(Key, st.sampled_from("kl"), st.sampled_from("xy")),
    )
    def add(self, jobs: list[NewJob], key: Key | None = None) -> None:
        known = self.requests.get(key.text) if key else None
        added = self.do(state_module.add, jobs, self.now, True, key)
        if known and key and known[0] != key.content:
            assert added.kind == "conflict"
            return
        if known:
            assert added == known[1]
            return
        assert added == list(range(self.last_id + 1, self.last_id + 1 + len(jobs)))
        for id_, job in zip(added, jobs, strict=True):
            due = self.now + job.delay if job.delay else None
            self.jobs[id_] = Model(id_, job.name, job.priority, due)
        self.last_id += len(jobs)
        if key:
            self.requests[key.text] = (key.content, added)

    @rule(names=st.sets(st.sampled_from(sorted(RETRIES)), min_size=1), limit=st.integers(1, 3))
    def reload_without_some(self, names: set[str], limit: int) -> None:
        gone = [job for job in self.jobs.values() if job.state == "queued" and job.name not in names]
        count = self.do(state_module.end_gone, frozenset(names), self.now, limit)
        assert count == min(limit, len(gone))
        ended = [job for job in gone if self.do(state_module.get, job.id)["state"] == "failure"]
        assert len(ended) == count
        for job in ended:
            job.not_before = None
            job.finish("failure", self.now, None, "gone")

    @rule(count=st.integers(1, 4), bad=st.integers(0, 3))
    def add_many_at_once_with_one_that_fails(self, count: int, bad: int) -> None:
        def add_and_raise(db: Any) -> None:
            state_module.add(db, [NewJob("once")], self.now)
            raise ZeroDivisionError

        futures = []
        for number in range(count):
            if number == bad:
                failing = self.store.do(add_and_raise)
            futures.append(self.store.do(state_module.add, [NewJob("once")], self.now))
        for future in futures:
            self.last_id += 1
            assert future.result(10) == [self.last_id]
            self.jobs[self.last_id] = Model(self.last_id, "once", 0, None)
        if bad < count:
            assert isinstance(failing.exception(10), ZeroDivisionError)

    @rule(pick=st.integers(0, 10**6))
    def cancel(self, pick: int) -> None:
        if not self.jobs:
            assert self.do(state_module.cancel, 1 + self.last_id, self.now).kind == "unknown"
            return
        job = list(self.jobs.values())[pick % len(self.jobs)]
        if job.state in FINAL:
            assert self.do(state_module.cancel, job.id, self.now).kind == "conflict"
            return
        row = self.do(state_module.cancel, job.id, self.now)
        order = (job.worker, job.id, job.attempt, job.state == "running")
        assert self.orders == ([order] if job.worker else [])
        assert (row["attempt"], row["worker"]) == (job.attempt, job.worker)
        if job.state == "running":
            job.cancelling = True
        else:
            job.not_before = None
            job.finish("cancelled", self.now, None, "cancelled")


class StoreHistories(WhatPeopleDo):
    """Workers come, work and go; time passes, and the server starts anew."""

    workers_seen = Bundle("workers_seen")
    attempts_seen = Bundle("attempts_seen")  # (worker, job, attempt), as a worker would name it; most go stale

    @initialize(target=attempts_seen)
    def two_workers_with_a_job_each(self) -> Any:
        """Begin where it gets interesting: random steps alone seldom come so far."""
        self.connect("a", [], True)
        self.connect("b", [], True)
        self.add([NewJob("once"), NewJob("again"), NewJob("alone")])
        held = self.claim([1, 1, 1], [set(RETRIES)] * 3)
        self.start(held.values[0])
        return held

    @rule(
        target=workers_seen,
        name=st.sampled_from(["a", "b", "c"]),
        held=st.lists(attempts_seen, max_size=4),
        forgets=st.booleans(),
    )
    def connect(self, name: str, held: list[tuple[int, int, int]], forgets: bool) -> int:
        own = (
            []
            if forgets
            else [(m.id, m.attempt, m.state) for m in self.jobs.values() if m.worker and self.names[m.worker] == name]
        )
        says = [*((job, attempt, "running") for _, job, attempt in held), *own]
        since = float(len(self.since) + max(self.since.values(), default=0.0) + 1)
        worker, wanted = self.do(state_module.attach, arrival(name, says, since), self.now, RULES)
        self.since[worker] = since
        pairs = {(job, attempt) for job, attempt, _ in says}
        expected = set()
        for job in self.jobs.values():
            if job.worker == worker and job.state in ACTIVE:
                if (job.id, job.attempt) in pairs:
                    expected.add((job.id, job.attempt, job.log_bytes, job.cancelling, 0))
                else:
                    job.lose(self.now)
        self.follow()
        assert {tuple(it) for it in wanted} == expected
        assert len(wanted) == len(expected)
        self.connected[worker] = self.names[worker] = name
        self.expected.add(worker)
        return int(worker)

    @rule(worker=workers_seen | st.integers(1, 2))
    def disconnect_late(self, worker: int) -> None:
        """The end of a connection that a newer one has replaced changes nothing."""
        assert self.do(state_module.detach, worker, self.since[worker] - 0.5, self.now) == 0

    @rule(worker=workers_seen | st.integers(1, 2))
    def disconnect(self, worker: int) -> None:
        self.connected.pop(worker, None)
        mine = [job for job in self.jobs.values() if job.worker == worker and job.state in ACTIVE]
        running = sum(job.state == "running" for job in mine)
        assert self.do(state_module.detach, worker, self.since[worker], self.now) == running
        for job in mine:
            if job.state == "assigned":
                job.requeue(None)

    @rule(worker=workers_seen | st.integers(1, 2), leaves=st.booleans())
    def lose(self, worker: int, leaves: bool) -> None:
        if leaves:
            self.disconnect(worker)
        if worker in self.connected:
            assert self.do(state_module.lose, worker, self.now, RULES) == 0
            return
        mine = [job for job in self.jobs.values() if job.worker == worker and job.state in ACTIVE]
        assert self.do(state_module.lose, worker, self.now, RULES) == len(mine)
        self.expected.discard(worker)
        for job in mine:
            job.lose(self.now)
        self.follow()

    @precondition(lambda self: self.connected)
    @rule(
        target=attempts_seen,
        free=st.lists(st.integers(1, 3), min_size=3, max_size=3),
        names=st.lists(st.sets(st.sampled_from(sorted(RETRIES)), min_size=1), min_size=3, max_size=3),
    )
    def claim(self, free: list[int], names: list[set[str]]) -> Any:
        offers = [FreeSlots(w, n, frozenset(t)) for w, n, t in zip(self.connected, free, names, strict=False)]
        ready = [job for job in self.jobs.values() if job.state == "queued" and job.not_before is None]
        claimed = self.do(state_module.claim, offers, LIMITS)
        by_worker = {offer.worker: offer for offer in offers}
        assert all(count <= by_worker[w].free for w, count in Counter(it.worker for it in claimed).items())
        order = [(-self.jobs[it.id].priority, it.id) for it in claimed]
        assert order == sorted(order)
        assert len(order) == len(set(order))
        for it in claimed:
            job = self.jobs[it.id]
            assert job in ready
            assert it.name == job.name
            assert it.name in by_worker[it.worker].names
            assert it.attempt == job.attempt + 1
            job.state, job.worker, job.attempt = "assigned", it.worker, it.attempt
        used = Counter(it.worker for it in claimed)
        for job in ready:  # none is left that could have been taken
            if job.state == "queued":
                able = [o for o in offers if job.name in o.names and o.free > used[o.worker]]
                active = sum(m.name == job.name and m.state in ACTIVE for m in self.jobs.values())
                assert not able or active >= LIMITS.get(job.name, 10**9)
                better = [
                    m for m in ready if m.state == "assigned" and m.name == job.name and m.priority < job.priority
                ]
                assert not better
        return multiple(*((it.worker, it.id, it.attempt) for it in claimed))

    @rule(it=attempts_seen)
    def start(self, it: tuple[int, int, int]) -> None:
        worker, number, attempt = it
        job = self.jobs.get(number)
        fresh = job is not None and job.holds(worker, attempt, "assigned")
        again = job is not None and job.holds(worker, attempt, "running")
        assert self.do(state_module.start, worker, number, attempt, self.now) == (fresh or again)
        if job and fresh:
            job.begin(self.now)

    def holds(self, job: Model, worker: int, attempt: int) -> bool:
        return job.holds(worker, attempt, "assigned") or job.holds(worker, attempt, "running")

    @rule(it=attempts_seen)
    def succeed(self, it: tuple[int, int, int]) -> None:
        worker, number, attempt = it
        job = self.jobs.get(number)
        wanted = job is not None and self.holds(job, worker, attempt)
        assert self.do(state_module.succeed, worker, number, attempt, self.now, RULES) == wanted
        if job and wanted:
            job.begin(self.now)
            job.finish("success", self.now, 0, None)
            self.follow()

    @rule(it=attempts_seen, code=st.none() | st.integers(1, 255))
    def fail(self, it: tuple[int, int, int], code: int | None) -> None:
        worker, number, attempt = it
        job, reason = self.jobs.get(number), "exit" if code else "docker"
        wanted = job is not None and self.holds(job, worker, attempt)
        given = worker, number, attempt, code, reason, self.now, RULES
        assert self.do(state_module.fail, *given) == wanted
        if job and wanted:
            job.begin(self.now)
            job.end_attempt(self.now, code, reason)
            self.follow()

    @rule(it=attempts_seen, size=st.integers(0, 9), jump=st.integers(-12, 4))
    def log(self, it: tuple[int, int, int], size: int, jump: int) -> None:
        worker, number, attempt = it
        job = self.jobs.get(number)
        have = job.log_bytes if job and job.holds(worker, attempt, "running") else 0
        offset = max(0, have + jump)
        whole = random.Random(f"{number} {attempt}").randbytes(2000)
        data = whole[offset : offset + size]
        kept = self.do(logs.append_log, worker, number, attempt, offset, data)
        if job is None or not job.holds(worker, attempt, "running"):
            assert kept is None
            return
        if data and offset + len(data) > have:
            job.logs.setdefault(attempt, {}).update(
                {n: whole[n : n + 1] for n in range(max(offset, have), offset + len(data))}
            )
            job.log_bytes = offset + len(data)
        assert kept == job.log_bytes

    # time, and the server

    @rule(seconds=st.sampled_from([0.5, 3, 10]), limit=st.sampled_from([1, 2, 1_000]))
    def time_passes(self, seconds: float, limit: int) -> None:
        self.now += seconds
        due = [(job.not_before, id_) for id_, job in self.jobs.items() if job.not_before and job.not_before <= self.now]
        assert self.do(state_module.make_due, self.now, limit) == min(len(due), limit)
        for _, id_ in sorted(due)[:limit]:
            self.jobs[id_].not_before = None

    @rule(seconds=st.sampled_from([-0.5, -3600, 3600]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def the_clock_is_seen_to_jump(self, seconds: float) -> None:
        self.now += seconds
        self.do(state_module.shift_delays, seconds, self.now)
        for job in self.jobs.values():
            if job.not_before is not None:
                job.not_before += seconds

    @rule(age=st.sampled_from([0.0, 10.0]), names=st.sets(st.sampled_from(sorted(RETRIES))), limit=st.integers(1, 3))
    def prune(self, age: float, names: set[str], limit: int) -> None:
        kept = set()
        for name in names:
            mine = [job for job in self.jobs.values() if job.name == name]
            kept |= {
                max((job.id for job in jobs), default=0) for jobs in (mine, [j for j in mine if j.state == "success"])
            }
        old = [
            job
            for job in self.jobs.values()
            if job.finished_at is not None and job.finished_at < self.now - age and job.id not in kept
        ]
        count = self.do(retention.prune, self.now - age, names, limit)
        assert count == min(limit, len(old))
        there = {row["id"] for row in self.do(lists.page, lists.Wanted(), 10**6)}
        gone = [job for job in self.jobs.values() if job.id not in there]
        assert len(gone) == count
        assert all(job in old for job in gone)
        kept_ends = [job.finished_at for job in old if job.id in there]
        for job in gone:
            assert all(job.finished_at <= end for end in kept_ends)  # type: ignore[operator]
            assert self.do(state_module.attempts, job.id) == []
            for attempt in range(1, job.attempt + 1):
                assert self.do(logs.read_log, job.id, attempt, 0) == []
            del self.jobs[job.id]
            self.forgotten_causes |= {job.cause}
            self.requests = {key: it for key, it in self.requests.items() if it[1][:1] != [job.id]}
            self.before.pop(job.id, None)

    @rule()
    def restart(self) -> None:
        identity, counts = self.store.server_id, self.counts()
        self.store.close()
        self.store = Store(str(self.folder / "jobs.db"), chance=random.Random(0)).start()
        self.connected.clear()
        assert (self.store.server_id, self.counts()) == (identity, counts)
        may_come_back = {(worker, self.names[worker], 2) for worker in self.expected}
        assert set(self.do(state_module.resume, 1e9)) == may_come_back


TestStoreHistories = StoreHistories.TestCase
TestStoreHistories.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestTransitions:
    """The table of transitions is the picture that the reference shows."""

    def test_the_picture_has_each_transition_and_no_other(self) -> None:
        drawn = edges_of_the_picture()
        assert drawn == {(before, after) for (before, _event), after in state_module.TRANSITIONS.items()}
        assert drawn == EDGES

    def test_a_final_state_is_never_left(self) -> None:
        assert not {before for before, _event in state_module.TRANSITIONS} & FINAL


def edges_of_the_picture() -> set[tuple[str, str]]:
    """Read the arrows of the reference's picture: along its first line, from its states down and back, and DELETE's."""
    text = (Path(state_module.__file__).parent.parent / "docs/reference.md").read_text()
    first, *lines = text[text.index("     POST ") :].partition("The reasons")[0].splitlines()
    states = {match.start(): match[0] for match in re.finditer(r"[a-z]{6,}", first)}

    def above(line: str, mark: str) -> str:
        column = line.index(mark)
        return next(state for start, state in states.items() if start <= column < start + len(state))

    edges = set(re.findall(r"(?=\b(queued|assigned|running) ─+\w+─+▶ (\w+))", first))
    for line in lines:
        for label, target in re.findall(r"├─+ (\w+) ─+▶ (\w+)", line):
            assert label in ("JobFailure", "lost")
            edges.add((above(line, f"├───── {label}"), target))
        if re.search("─ (requeue|retry)", line):
            edges.add((above(line, "┘"), "queued"))
        if '"gone"' in line:
            edges.add(("queued", "failure"))
        if "DELETE" in line:
            edges |= {(state, "cancelled") for state in re.findall("queued|assigned|running", line.partition("──")[0])}
    return edges


class TestClaim:
    """Who gets a job: the worker with the most free slots that may take it; among equals, chance decides."""

    def claim(self, tmp_path: Path, free: list[int], names: list[str]) -> list[int]:
        store = Store(str(tmp_path / f"{uuid.uuid4()}.db")).start()
        arrivals = [arrival(f"w{n}") for n in range(len(free))]
        workers = [store.do(state_module.attach, each, 0.0, RULES).result()[0] for each in arrivals]
        store.do(state_module.add, [NewJob("once")] * 6, 0.0).result()
        offers = [FreeSlots(w, n, frozenset(name.split())) for w, n, name in zip(workers, free, names, strict=True)]
        claimed = store.do(state_module.claim, offers, {}).result()
        store.close()
        return [workers.index(it.worker) for it in claimed]

    def test_the_most_free_slots_come_first(self, tmp_path: Path) -> None:
        for _ in range(5):
            takers = self.claim(tmp_path, [1, 4, 9, 2], ["once", "once other", "other", "once other"])
            assert takers[:2] == [1, 1]
            assert sorted(takers[2:4]) == [1, 3]  # both have two left
            assert sorted(takers[4:]) in ([0, 1], [0, 3], [1, 3])  # of three equals, two

    def test_among_equals_chance_decides(self, tmp_path: Path) -> None:
        first = {self.claim(tmp_path, [1] * 4, ["once"] * 4)[0] for _ in range(40)}
        assert len(first) > 1


class TestLogTail:
    """Where the last lines of a log begin."""

    @pytest.mark.parametrize(("lines", "offset"), [(0, 8), (1, 6), (2, 3), (3, 0), (9, 0)])
    def test_it_counts_from_the_end(self, tmp_path: Path, lines: int, offset: int) -> None:
        store = Store(str(tmp_path / "jobs.db")).start()
        worker, _ = store.do(state_module.attach, arrival("w"), 0.0, RULES).result()
        (job,) = store.do(state_module.add, [NewJob("once")], 0.0).result()
        store.do(state_module.claim, [FreeSlots(worker, 1, frozenset({"once"}))], {}).result()
        store.do(state_module.start, worker, job, 1, 0.0).result()
        for start, data in ((0, b"ab\ncd"), (5, b"\nef")):
            store.do(logs.append_log, worker, job, 1, start, data).result()
        assert store.do(logs.tail_offset, job, 1, lines).result() == offset
        store.close()


def test_a_tail_of_many_lines_costs_little_more_than_one_of_few() -> None:
    """In processor time: a search for each of a million lines held the store for seconds."""

    def seconds(text: bytes) -> float:
        db = Store(":memory:")._database
        db.execute("INSERT INTO log VALUES (1, 1, 0, ?)", (text,))
        begin = time.process_time()
        assert logs.tail_offset(db, 1, 1, 2_000_000) == 0
        return time.process_time() - begin

    many, few = b"\n" * 1_000_000, b"x" * 1_000_000
    assert min(seconds(many) for _ in range(3)) < 50 * min(seconds(few) for _ in range(3))


class TestLogLimit:
    """The head and the tail of a log are kept."""

    @pytest.mark.parametrize("size", [65_536, 40 * 65_536])
    def test_the_server_keeps_no_more_than_head_and_tail_whatever_a_worker_sends(
        self, tmp_path: Path, size: int
    ) -> None:
        jobs = Store(str(tmp_path / "jobs.db")).start()
        jobs.do(state_module.add, [state_module.NewJob("a")], 1.0).result()
        worker, _ = jobs.do(state_module.attach, arrival("w"), 1.0, RULES).result()
        jobs.do(state_module.claim, [FreeSlots(worker, 1, frozenset("a"))], {}).result()
        assert jobs.do(state_module.start, worker, 1, 1, 1.0).result()
        text = b"".join(bytes([number]) * 65_536 for number in range(40))
        for start in range(0, len(text), size):
            jobs.do(logs.append_log, worker, 1, 1, start, text[start : start + size]).result()
        kept, offset = b"", 0
        while pieces := jobs.do(logs.read_log, 1, 1, offset).result():
            offset = pieces[-1][0] + len(pieces[-1][1])
            kept += b"".join(data for _start, data in pieces)
        assert len(kept) <= logs.LOG_HEAD_BYTES + logs.LOG_TAIL_BYTES + logs.LOG_PIECE_BYTES
        assert (kept[:1], kept[-1:], offset) == (b"\x00", bytes([39]), len(text))
        jobs.close()
