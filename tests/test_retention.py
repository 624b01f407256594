"""What goes with time goes a little at a time, and what is kept of a chatty job is few rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker import logs, retention, state
from jobworker.state import FreeSlots, NewJob
from jobworker.store import Store
from tests.test_state import RULES, arrival


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "jobs.db")).start()
    yield store
    store.close()


def running(store: Store, count: int) -> int:
    """Have jobs run at a worker, whose id this gives."""
    worker, _ = store.do(state.attach, arrival("w"), 1.0, RULES).result()
    store.do(state.add, [NewJob("once")] * count, 1.0).result()
    store.do(state.claim, [FreeSlots(worker, count, frozenset({"once"}))], {}).result()
    for job in range(1, count + 1):
        assert store.do(state.start, worker, job, 1, 1.0).result()
    return int(worker)


class TestPruning:
    """Whoever commits waits for what is pruned in one transaction."""

    def test_of_large_logs_few_go_at_a_time(self, store: Store) -> None:
        full = bytes(logs.LOG_HEAD_BYTES)
        worker = running(store, 5)
        for job in range(1, 6):
            for offset in (0, len(full)):
                store.do(logs.append_log, worker, job, 1, offset, full).result()
            store.do(state.succeed, worker, job, 1, 2.0, RULES).result()
        counts = [store.do(retention.prune, 3.0, ["once"], 50).result() for _ in range(5)]
        assert counts == [1, 1, 1, 1, 0]

    def test_of_a_job_with_many_logs_few_go_at_a_time(self, store: Store) -> None:
        worker = running(store, 1)
        rows = [(attempt, bytes(300_000)) for attempt in range(1, 41)]
        store.do(lambda db: db.connection.executemany("INSERT INTO log VALUES (1, ?, 0, ?)", rows)).result()
        store.do(state.succeed, worker, 1, 1, 2.0, RULES).result()
        left = [40]
        while store.do(retention.prune, 3.0, [], 50).result():
            left.append(store.do(lambda db: db.one("SELECT count(*) FROM log")[0]).result())
        assert left == list(range(40, -1, -4))
        assert store.do(state.get_many, [1]).result() == []

    def test_workers_that_never_come_back_go_with_their_jobs(self, store: Store) -> None:
        for name, protocol in (("version-1-a", 1), ("version-1-b", 1), ("w", 2)):
            worker, _ = store.do(state.attach, arrival(name)._replace(protocol=protocol), 1.0, RULES).result()
            if name == "version-1-a":
                store.do(state.add, [NewJob("once")] * 2, 1.0).result()
                store.do(state.claim, [FreeSlots(worker, 1, frozenset({"once"}))], {}).result()
                store.do(state.succeed, worker, 1, 1, 2.0, RULES).result()
            store.do(state.detach, worker, 0.0, 2.0).result()
            store.do(state.lose, worker, 2.0, RULES).result()
        left = []
        for names in (["once"], []):  # of these the newest success stays
            store.do(retention.prune, 3.0, names, 50).result()
            left.append(store.do(lambda db: [name for (name,) in db.execute("SELECT name FROM worker")]).result())
        assert left == [["version-1-a", "w"], ["w"]]

    def test_a_key_stays_as_long_as_any_of_its_jobs(self, store: Store) -> None:
        key, other = state.Key("key", "a"), state.Key("other", "b")
        first, second, third = store.do(state.add, [NewJob("once")] * 3, 1.0, True, key).result()
        (last,) = store.do(state.add, [NewJob("once")], 1.0, True, other).result()

        def known_after(job: int) -> list[object]:
            store.do(state.cancel, job, 2.0).result()
            store.do(retention.prune, 3.0, [], 50).result()
            return [store.do(state.find_request, each).result() for each in (key, other)]

        assert known_after(first) == [[first, second, third], [last]]
        assert known_after(last) == [[first, second, third], None]
        assert known_after(third) == [[first, second, third], None]
        assert known_after(second) == [None, None]

    def test_a_log_that_is_deleted_is_not_written_once_more(self, store: Store) -> None:
        fast = 2  # overwrites only what is written anyway
        assert store.do(lambda db: db.one("PRAGMA secure_delete")[0]).result() == fast


class TestSmallPieces:
    """A job that writes a little at a time leaves no more rows than one that writes much."""

    def test_they_come_together_in_rows(self, store: Store) -> None:
        worker, text = running(store, 1), bytes(range(256)) * 20
        for offset in range(len(text)):
            store.do(logs.append_log, worker, 1, 1, offset, text[offset : offset + 1])
        rows = store.do(lambda db: db.one("SELECT count(*) FROM log")[0]).result()
        assert rows <= len(text) / logs.LOG_ROW_BYTES + 1
        assert self.text(store) == [(0, text)]
        assert store.do(logs.tail_offset, 1, 1, 1).result() == text.rindex(b"\n") + 1

    def test_what_is_there_or_missing_between_them_stays_so(self, store: Store) -> None:
        worker = running(store, 1)
        for offset, data in ((0, b"ab"), (1, b"bc"), (3, b"d"), (9, b"xy"), (9, b"xyz"), (12, b"")):
            store.do(logs.append_log, worker, 1, 1, offset, data).result()
        assert self.text(store) == [(0, b"abcd"), (9, b"xyz")]

    def text(self, store: Store) -> list[tuple[int, bytes]]:
        """Give the log as it is read, in stretches without a gap."""
        stretches: list[tuple[int, bytes]] = []
        offset = 0
        while pieces := store.do(logs.read_log, 1, 1, offset).result():
            for start, data in pieces:
                if stretches and start == offset:
                    stretches[-1] = stretches[-1][0], stretches[-1][1] + data
                else:
                    stretches.append((start, data))
                offset = start + len(data)
        return stretches

    def test_no_row_has_of_the_head_and_of_what_is_cut_behind_it(self, store: Store) -> None:
        worker, head = running(store, 1), logs.LOG_HEAD_BYTES
        for offset in (head - 10, head):
            store.do(logs.append_log, worker, 1, 1, offset, b"x" * 10)
        store.do(logs.append_log, worker, 1, 1, head + 10 + logs.LOG_TAIL_BYTES, b"x")
        assert self.text(store)[0] == (head - 10, b"x" * 10)
