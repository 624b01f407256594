"""The plans that SQLite makes of state.py's statements: none that runs on a hot path may walk the jobs there are."""

import contextlib
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobworker import lists, state, store

NAMED = {
    name: sql
    for name, sql in vars(state).items()
    if re.fullmatch("[A-Z][A-Z_]*", name)
    and isinstance(sql, str)
    and re.match(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b", sql)
}
# Once, at the server's start: it counts what there is.
ONCE = {"COUNT_STATES"}


class TestQueryPlans:
    """A million jobs, queued or finished, cost a claim, a result and a page nothing."""

    @pytest.fixture
    def database(self) -> Iterator[sqlite3.Connection]:
        database = store._open(":memory:", random.Random()).connection
        yield database
        database.close()

    def plan(self, database: sqlite3.Connection, sql: str) -> list[str]:
        parameters = dict.fromkeys(re.findall(r":(\w+)", sql)) or [None] * sql.count("?")
        return [row["detail"] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]

    def test_there_are_statements_to_look_at(self) -> None:
        assert {"QUEUED_NAMES", "READY_JOBS", "CLAIM", "START", "FINISH", "GET_JOB"} <= NAMED.keys()

    @pytest.mark.parametrize("name", sorted(NAMED.keys() - ONCE))
    def test_no_statement_scans_jobs_logs_or_attempts(self, database: sqlite3.Connection, name: str) -> None:
        scans = [step for step in self.plan(database, NAMED[name]) if re.match(r"SCAN (job|log|attempt)\b", step)]
        assert not scans

    @pytest.mark.parametrize("name", sorted(NAMED.keys() - ONCE))
    def test_no_statement_sorts_jobs(self, database: sqlite3.Connection, name: str) -> None:
        assert not [step for step in self.plan(database, NAMED[name]) if "TEMP B-TREE" in step]

    @pytest.mark.parametrize("name", ["QUEUED_NAMES", "READY_JOBS"])
    def test_a_claim_seeks_among_what_is_ready(self, database: sqlite3.Connection, name: str) -> None:
        searches = [step for step in self.plan(database, NAMED[name]) if step.startswith("SEARCH job")]
        assert searches
        assert all("INDEX job_queued" in step for step in searches)

    @pytest.mark.parametrize("states", [(), ("queued",), ("success", "failure")])
    @pytest.mark.parametrize(
        "wishes",
        [{}, {"name": "backup"}, {"q": "ack"}, {"worker": "w"}, {"cause": 3}, {"worker": "w", "name": "backup"},
         {"ended_after": 5.0}],
    )  # fmt: skip
    @pytest.mark.parametrize("before", [None, 1_000])
    def test_a_page_of_jobs_walks_along_an_index(
        self, database: sqlite3.Connection, states: tuple[str, ...], wishes: dict[str, Any], before: int | None
    ) -> None:
        statements: list[str] = []
        db = state.Database(database, random.Random())
        database.set_trace_callback(statements.append)
        wanted = lists.Wanted(states, before=before, **wishes)
        lists.page(db, wanted, 50)
        if before:
            lists.start_of_newest(db, wanted, 50)
        database.set_trace_callback(None)
        assert statements or (states, wishes.get("worker")) == (("queued",), "w")  # there are none
        for sql in statements:
            steps = self.plan(database, sql)
            assert any(step.startswith("SEARCH job") for step in steps)
            assert not any(step.startswith("SCAN job") or "TEMP B-TREE" in step for step in steps)

    def test_a_claim_among_many_costs_what_it_costs_among_few(self) -> None:
        """In steps of SQLite's virtual machine, which no load of the machine changes."""
        assert self.steps_of_a_claim(20_000) < self.steps_of_a_claim(200) * 1.5

    def steps_of_a_claim(self, queued: int) -> int:
        db = store._open(":memory:", random.Random())
        db.begin()
        state.add(db, [state.NewJob(name) for name in ("a", "b")] * (queued // 2), 0.0)
        with counted_steps(db) as steps:
            assert len(state.claim(db, [state.FreeSlots(1, 4, frozenset({"a", "b"}))], {})) == 4
        db.connection.close()
        return len(steps)

    @pytest.mark.parametrize(
        "look",
        [
            lambda db: lists.page(db, lists.Wanted(("failure",), name="common"), 50),
            lambda db: lists.page(db, lists.Wanted(("failure",), q="omm"), 50),
            lambda db: lists.page(db, lists.Wanted(("failure", "cancelled"), worker="busy"), 50),
            lambda db: lists.page(db, lists.Wanted(("running",), worker="busy", name="common"), 50),
            lambda db: lists.page(db, lists.Wanted(("running",), name="common"), 50),
            lambda db: lists.page(db, lists.Wanted(("queued",), name="common"), 50),
            lambda db: lists.page(db, lists.Wanted(("failure",), ended_after=2.0), 50),
            lambda db: lists.start_of_newest(db, lists.Wanted(q="c", ended_after=2.0, before=10**6), 50),
            lambda db: lists.page(db, lists.Wanted(("queued",), worker="busy"), 50),
            lambda db: lists.start_of_newest(db, lists.Wanted(("failure",), name="common", before=10**6), 50),
            lambda db: lists.start_of_newest(db, lists.Wanted(worker="idle", before=10**6), 50),
            lambda db: db.execute(state.ACTIVE_OF_WORKER, (1,)).fetchall(),
            lambda db: db.one(state.NEWEST_SUCCESS, "rare"),
        ],
    )  # fmt: skip
    def test_a_few_among_many_cost_what_they_cost_among_few(self, look: Callable[[state.Database], Any]) -> None:
        """Where all jobs that there are have one name, one worker, and succeeded."""
        assert self.steps_beside(20_000, look) < self.steps_beside(200, look) * 1.5 + 100

    def steps_beside(self, finished: int, look: Callable[[state.Database], Any]) -> int:
        db = store._open(":memory:", random.Random())
        db.begin()
        db.connection.executemany("INSERT INTO worker (id, name) VALUES (?, ?)", [(1, "busy"), (2, "idle")])
        row = "INSERT INTO job (name, state, worker, attempt, created_at, finished_at) VALUES (?, ?, ?, 1, 1, ?)"
        db.connection.executemany(row, [("common", "success", 1, 2.0)] * finished)
        db.connection.executemany(row, [("common", "failure", 2, 3.0), ("common", "running", 1, None)])
        db.connection.execute("INSERT INTO job (name, state, created_at) VALUES ('common', 'queued', 1)")
        with counted_steps(db) as steps:
            look(db)
        db.connection.close()
        return len(steps)


@contextlib.contextmanager
def counted_steps(db: state.Database) -> Iterator[list[None]]:
    """Give a list that gets an item for each step of SQLite's virtual machine."""
    steps: list[None] = []
    db.connection.set_progress_handler(lambda: steps.append(None), 1)
    yield steps
    db.connection.set_progress_handler(None, 1)
