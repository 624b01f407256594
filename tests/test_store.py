"""store.py: a commit is on disk before its result is seen, and the commands of one moment share it."""

import contextlib
import random
import shutil
import sqlite3
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker import lists, logs
from jobworker import state as state_module
from jobworker import store as store_module
from jobworker.config import Configs, JobConfig
from jobworker.schema import SCHEMA_VERSION
from jobworker.state import NewJob
from jobworker.store import Store
from tests.stage import ROOT
from tests.test_state import RULES, Rules, arrival

SCHEMA_1 = ROOT / "tests" / "schema-1.sqlite"  # made by jobworker 1.0.0


class TestDurability:
    """A commit is on disk before anyone sees its result."""

    def test_each_commit_is_synced(self, tmp_path: Path) -> None:
        connection = store_module._open(str(tmp_path / "jobs.db"), random.Random()).connection
        settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
        connection.close()
        assert settings == [2, "wal"]  # 2: FULL, an fsync a commit


class TestClaim:
    """What a transaction makes ready is claimed by its end."""

    class AnyName(Rules):
        def names_for(self, _tags: tuple[str, ...], _protocol: int) -> frozenset[str]:
            return frozenset({"once"})

    @pytest.fixture
    def claimed(self) -> list[int]:
        return []

    @pytest.fixture
    def store(self, tmp_path: Path, claimed: list[int]) -> Iterator[Store]:
        def deliver(commit: store_module.Commit) -> None:
            claimed.extend(claim.id for claim in commit.claimed)

        with contextlib.closing(Store(str(tmp_path / "jobs.db"), deliver).start()) as store:
            store.do(state_module.attach, arrival("w"), 0.0, self.AnyName()).result()
            yield store

    def test_a_new_job_is_claimed_by_the_commit_that_adds_it(self, store: Store, claimed: list[int]) -> None:
        store.do(state_module.add, [NewJob("once")], 0.0).result()
        assert claimed == [1]

    def test_a_result_and_the_claim_of_the_slot_it_frees_are_one_commit(self, store: Store, claimed: list[int]) -> None:
        store.do(state_module.add, [NewJob("once")] * 2, 0.0).result()
        assert claimed == [1]
        store.do(state_module.succeed, 1, 1, 1, 1.0, RULES).result()
        assert claimed == [1, 2]

    def test_where_it_fails_all_else_stands_and_a_later_one_tries_again(
        self, store: Store, claimed: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        def spoil(db: state_module.Database, environment: str) -> None:
            db.execute("UPDATE job SET environment = ?", (environment,))

        store.do(state_module.attach, arrival("w"), 0.0, RULES).result()  # it takes nothing
        store.do(state_module.add, [NewJob("once")], 0.0).result()
        store.do(spoil, "{").result()
        store.do(state_module.attach, arrival("w"), 0.0, self.AnyName()).result()
        assert store.do(state_module.get, 1).result()["state"] == "queued"
        assert "nothing was claimed" in caplog.text
        assert claimed == []
        store.do(spoil, "{}").result()
        assert claimed == [1]

    def test_variables_are_read_of_what_is_claimed_alone(self) -> None:
        names = [f"job-{number}" for number in range(20)]
        rules, long = Configs(JobConfig(name, "busybox") for name in names), {"SCRIPT": "x" * 30_000}
        with contextlib.closing(Store(":memory:").start()) as store:
            store.do(state_module.add, [NewJob(name, long) for name in names * 50], 1.0, True).result()
            tracemalloc.start()
            store.do(state_module.attach, arrival("w")._replace(slots=50), 2.0, rules).result()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(store.do(lists.page, lists.Wanted(("assigned",)), 100).result()) > 0
        assert peak < 10_000_000  # all that was ready is 30 MB, the claimed 1.5

    def test_what_runs_is_counted_once_however_many_names_are_limited(self) -> None:
        names = [f"job-{number}" for number in range(50)]
        rules = Configs(JobConfig(name, "busybox", concurrency=1) for name in names)
        with contextlib.closing(Store(":memory:").start()) as store:
            store.do(state_module.adopt, rules).result()
            store.do(state_module.attach, arrival("w")._replace(slots=100), 0.0, rules).result()
            asked: list[str] = []
            store._database.connection.set_trace_callback(asked.append)
            store.do(state_module.add, [NewJob(name) for name in names * 2], 1.0).result()  # nothing runs yet
            assert asked.count(state_module.ACTIVE_NAMES) == 1
            assert store.do(state_module.what_waits_for, []).result()[1] == {}
            assert asked.count(state_module.ACTIVE_NAMES) == 1
            asked.clear()
            store.do(state_module.add, [NewJob("job-0")], 2.0).result()
            counts = store.do(state_module.what_waits_for, names).result()[1]
        assert counts == dict.fromkeys(names, 1)
        assert asked.count(state_module.ACTIVE_NAMES) == 2


class TestMigration:
    """A database of the release before is taken over as it stands."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        shutil.copy(SCHEMA_1, tmp_path / "jobs.db")
        with contextlib.closing(Store(str(tmp_path / "jobs.db")).start()) as store:
            yield store

    def test_its_schema_is_that_of_a_new_database(self, store: Store, tmp_path: Path) -> None:
        def tables(path: Path) -> list[tuple[Any, ...]]:
            with contextlib.closing(sqlite3.connect(path)) as connection:
                names = connection.execute("SELECT name FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")
                rows = [
                    row for (name,) in names.fetchall() for row in connection.execute(f"PRAGMA table_xinfo({name})")
                ]
                indexes = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
                return rows + connection.execute(indexes).fetchall()

        store.close()
        with contextlib.closing(Store(str(tmp_path / "new.db")).start()):
            pass
        assert tables(tmp_path / "jobs.db") == tables(tmp_path / "new.db")

    def test_its_jobs_attempts_and_logs_are_there(self, store: Store) -> None:
        rows = store.do(lists.page, lists.Wanted(), 100).result()
        shown = [(row["name"], row["state"], row["attempt"], row["worker_name"], row["environment"]) for row in rows]
        assert shown == [
            ("hello-world", "queued", 1, None, None),
            ("greeting", "success", 1, "box-1", '{"NAME": "Ada"}'),
            ("sandbox", "running", 1, "box-1", None),
            ("later", "cancelled", 0, None, None),
            ("greeting", "assigned", 1, "version-1-0a1b2c3d", '{"NAME": "Bob"}'),
            ("hello-world", "queued", 0, None, None),
        ]
        assert store.do(logs.read_log, 2, 1, 0).result() == [(0, b"Hello, Ada!\n")]
        [attempt] = store.do(state_module.attempts, 1).result()
        assert (attempt["exit_code"], attempt["reason"], attempt["log_bytes"]) == (3, "exit", 10)

    def test_its_workers_may_come_back_and_are_not_connected(self, store: Store) -> None:
        assert store.do(state_module.resume, 1e10).result() == [(1, "box-1", 2), (2, "version-1-0a1b2c3d", 1)]
        assert not [row for row, _ in store.do(state_module.workers).result() if row["connected"]]
        assert store.do(state_module.attach, arrival("box-1", [(3, 1, "running")]), 1.0, RULES).result() == (
            1,
            [(3, 1, 0, False, 0)],
        )

    def test_it_is_migrated_once(self, store: Store, tmp_path: Path) -> None:
        store.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        with contextlib.closing(Store(str(tmp_path / "jobs.db")).start()) as again:
            assert again.server_id == store.server_id

    def test_a_database_of_a_later_release_is_refused(self, tmp_path: Path) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        with pytest.raises(store_module.StoreError, match="schema version"):
            Store(str(tmp_path / "jobs.db"))


class TestGroups:
    """What shares a transaction with a function that fails loses nothing by it."""

    def test_news_are_told_although_their_group_failed(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path / "jobs.db")).start()
        first, *_ = store.do(state_module.listen, None).result()
        (job,) = store.do(state_module.add, [NewJob("once")], 0.0).result()

        def tick_then_fail(db: state_module.Database) -> None:
            state_module.tick(db, 1.0)
            raise KeyError

        with pytest.raises(KeyError):
            store.do(tick_then_fail).result()
        assert not first.next.done()
        store.do(state_module.tick, 2.0).result()
        assert first.next.result(0).jobs == {job}
        store.do(state_module.tick, 2.0).result()
        assert not first.next.result(0).next.done()
        store.close()

    def test_a_database_that_failed_takes_nothing_more(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path / "jobs.db")).start()

        def fail(_db: state_module.Database) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

        for function in (fail, state_module.probe):
            with pytest.raises(store_module.StoreError):
                store.do(function).result()
        assert store.broken
        store.close()
