"""store.py: a commit is on disk before its result is seen, and the commands of one moment share it."""

import sqlite3
from pathlib import Path

import pytest

from jobworker import state as state_module
from jobworker import store as store_module
from jobworker.state import NewJob
from jobworker.store import Store


class TestDurability:
    """A commit is on disk before anyone sees its result."""

    def test_each_commit_is_synced(self, tmp_path: Path) -> None:
        connection = store_module._open(str(tmp_path / "jobs.db")).connection
        settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
        connection.close()
        assert settings == [2, "wal"]  # 2: FULL, an fsync a commit


class TestGroups:
    """What shares a transaction with a function that fails loses nothing by it."""

    def test_news_are_told_although_their_group_failed(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path / "jobs.db"))
        (job,) = store.do(state_module.add, [NewJob("once")], 0.0).result()

        def news_then_fail(db: state_module.Database) -> None:
            state_module.news(db)
            raise KeyError

        with pytest.raises(KeyError):
            store.do(news_then_fail).result()
        assert store.do(state_module.news).result() == ({job}, 0.0)
        assert store.do(state_module.news).result() == (set(), 0.0)
        store.close()

    def test_a_database_that_failed_takes_nothing_more(self, tmp_path: Path) -> None:
        store = Store(str(tmp_path / "jobs.db"))

        def fail(_db: state_module.Database) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

        for function in (fail, state_module.probe):
            with pytest.raises(store_module.StoreError):
                store.do(function, *[0.0] * (function is state_module.probe)).result()
        assert store.broken
        store.close()
