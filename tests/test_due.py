"""due.py: a due time is a fact in the store, dealt with once, whatever is killed, full, set or restored."""

import random
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jobworker import due, lists, retention, state
from jobworker.due import Scheduled, Scheduler
from jobworker.schedule import Schedule
from jobworker.state import FreeSlots, NewJob
from jobworker.store import Commit, Store
from tests.stage import Stage, until
from tests.test_state import RULES, arrival

HOUR = 3600.0
MORNING = 1_780_000_200.0 - 1_780_000_200.0 % 86400 + 6 * HOUR  # 06:00 of a day, UTC


def deliver(commit: Commit) -> None:
    """Call back who waits for a commit, as the loop does."""
    for callback, result in commit.calls:
        callback(result)


class Desk:
    """A scheduler at its store, without threads; `now` is what its clock shows."""

    def __init__(self, path: str = ":memory:") -> None:
        self.store = Store(path, deliver, random.Random(0))
        self.now = MORNING
        self.scheduler = Scheduler(self.store, lambda: self.now)

    def commit(self) -> None:
        while not self.store._requests.empty():
            self.store.commit_waiting()

    def adopt(self, texts: dict[str, str] | None = None, zone: str = "UTC", most: int = 1) -> None:
        texts = {"hourly": "0 * * * *"} if texts is None else texts
        entries = {name: Scheduled(Schedule.parse([text], zone), NewJob(name), most) for name, text in texts.items()}
        self.scheduler.adopt(entries)
        self.commit()
        self.tick()

    def tick(self, seconds: float = 0) -> None:
        self.now += seconds
        self.scheduler.tick()
        self.commit()

    def do(self, function: Any, *args: Any) -> Any:
        future = self.store.do(function, *args)
        self.commit()
        return future.result()

    def rows(self) -> list[sqlite3.Row]:
        rows: list[sqlite3.Row] = self.do(lists.page, lists.Wanted(), 10**6)
        return rows

    def dues(self) -> list[float]:
        return [row["due_at"] - MORNING for row in self.rows()]

    def counted(self, name: str = "hourly") -> tuple[int, int]:
        row = self.store._database.one("SELECT missed, skipped FROM schedule WHERE name = ?", name)
        return row["missed"], row["skipped"]

    def end_all(self) -> None:
        for row in self.rows():
            if row["state"] == "queued":
                self.do(state.cancel, row["id"], self.now)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.store.close()


class TestDueTimes:
    """Each gets one job, and what was missed gets none."""

    def test_a_new_schedule_begins_now(self, desk: Desk) -> None:
        desk.adopt()
        desk.tick()
        assert desk.rows() == []

    def test_each_gets_a_job(self, desk: Desk) -> None:
        desk.adopt()
        for _ in range(6):
            desk.tick(HOUR / 2)
            desk.end_all()
        assert desk.dues() == [HOUR, 2 * HOUR, 3 * HOUR]

    def test_a_look_twice_queues_once(self, desk: Desk) -> None:
        desk.adopt()
        desk.tick(HOUR)
        desk.end_all()
        desk.tick()
        assert desk.dues() == [HOUR]

    @pytest.mark.parametrize("missed", [0, 1, 199])
    def test_of_several_only_the_latest_gets_one(self, desk: Desk, missed: int) -> None:
        desk.adopt()
        desk.tick((missed + 1) * HOUR + 60)
        assert desk.dues() == [(missed + 1) * HOUR]
        assert desk.counted() == (missed, 0)

    def test_more_than_a_thousand_are_not_counted_on(self, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
        desk.adopt({"each": "* * * * *"})
        desk.tick(400 * 86400)
        assert len(desk.rows()) == 1
        assert "missed before it: more than 1,000" in caplog.text

    def test_thousands_at_once_are_dealt_with_some_at_a_time(self, desk: Desk) -> None:
        desk.adopt({f"job-{number}": "0 * * * *" for number in range(2_000)})
        desk.now += HOUR
        for _ in range(200):
            desk.tick()
        assert desk.dues() == [HOUR] * 2_000

    def test_a_clock_set_back_repeats_nothing(self, desk: Desk) -> None:
        desk.adopt()
        desk.tick(3 * HOUR)
        desk.end_all()
        desk.tick(-2 * HOUR)
        desk.tick(HOUR)
        assert desk.dues() == [3 * HOUR]
        desk.tick(2 * HOUR)
        assert desk.dues() == [3 * HOUR, 4 * HOUR]

    def test_a_cursor_more_than_a_day_ahead_is_set_to_now(self, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
        desk.adopt()
        desk.tick(40 * 24 * HOUR)
        desk.end_all()
        desk.tick(-40 * 24 * HOUR)
        assert "hourly: was dealt with up to more than a day ahead of now" in caplog.text
        desk.tick(HOUR)
        assert desk.dues()[1:] == [HOUR]


class TestOverlap:
    """Where the jobs of before have not ended, a due time is skipped."""

    def test_it_is_skipped_and_counted(self, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
        desk.adopt()
        desk.tick(HOUR)
        desk.tick(HOUR)
        assert desk.dues() == [HOUR]
        assert desk.counted() == (0, 1)
        assert "due at 2026-05-28T08:00:00Z, and skipped: an earlier one has not ended" in caplog.text

    def test_concurrency_says_how_many_may_be_there(self, desk: Desk) -> None:
        desk.adopt(most=2)
        for _ in range(3):
            desk.tick(HOUR)
        assert desk.dues() == [HOUR, 2 * HOUR]

    def test_what_people_post_does_not_count(self, desk: Desk) -> None:
        desk.adopt()
        desk.do(state.add, [NewJob("hourly")], desk.now)
        desk.tick(HOUR)
        assert [row["due_at"] for row in desk.rows()] == [None, MORNING + HOUR]

    def test_one_that_waits_for_its_retry_has_not_ended(self, desk: Desk) -> None:
        desk.adopt({"again": "0 * * * *"})
        desk.tick(HOUR)
        worker, _held = desk.do(state.attach, arrival("w"), desk.now, RULES)
        desk.do(state.claim, [FreeSlots(worker, 1, frozenset({"again"}))], {})
        desk.do(state.fail, worker, 1, 1, 1, "exit", desk.now, RULES)
        desk.tick(HOUR)
        assert [(row["state"], row["failures"]) for row in desk.rows()] == [("queued", 1)]
        assert desk.counted("again") == (0, 1)


class TestJobsYamlChanges:
    """The store knows each schedule by its name, text and zone."""

    def test_what_has_not_changed_goes_on_where_it_was(self, desk: Desk) -> None:
        desk.adopt()
        desk.now += HOUR
        desk.adopt()
        desk.tick()
        assert desk.dues() == [HOUR]

    @pytest.mark.parametrize(("text", "zone"), [("*/30 * * * *", "UTC"), ("0 * * * *", "Asia/Kolkata")])
    def test_another_text_or_zone_begins_now(self, desk: Desk, text: str, zone: str) -> None:
        desk.adopt()
        desk.now += HOUR
        desk.adopt({"hourly": text}, zone)
        desk.tick()
        assert desk.rows() == []

    def test_one_that_is_gone_is_forgotten(self, desk: Desk) -> None:
        desk.adopt()
        desk.adopt({})
        desk.now += HOUR
        desk.adopt()
        desk.tick()
        assert desk.rows() == []

    def test_what_was_due_as_the_file_changed_is_queued_once(self, desk: Desk) -> None:
        desk.adopt()
        desk.now += HOUR
        desk.scheduler.tick()  # on its way to the store
        desk.adopt({"hourly": "30 * * * *"})
        assert desk.dues() == [HOUR]
        desk.end_all()
        desk.tick(HOUR / 2)
        assert desk.dues() == [HOUR, 1.5 * HOUR]

    def test_thousands_are_taken_over_some_at_a_time(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loop goes on between them: no step of it takes as long as a fraction of all takes."""
        schedule = Schedule.parse(["17 3 29 2 *"], "Europe/Berlin")
        entries = {f"job-{number}": Scheduled(schedule, NewJob(f"job-{number}"), 1) for number in range(4_000)}
        begin = time.thread_time()
        for _ in entries:
            due_at = schedule.next_due(MORNING)
        all_at_once = time.thread_time() - begin
        steps = []

        def step(commit: Commit | None = None) -> None:
            begin = time.thread_time()
            deliver(commit) if commit else desk.scheduler.tick()
            steps.append(time.thread_time() - begin)

        def queued() -> int:
            step()
            desk.commit()
            return int(desk.store._database.one("SELECT count(*) FROM job")[0])

        monkeypatch.setattr(desk.store, "_deliver", step)
        desk.scheduler.adopt(entries)
        for _ in range(100):
            assert queued() == 0
        assert max(steps) < all_at_once / 3
        desk.now = due_at
        until(lambda: queued() == len(entries), 60)


class TestDisk:
    """Job and cursor are one transaction."""

    def test_a_disk_that_is_full_at_a_due_time_makes_it_late_and_no_more(self, desk: Desk) -> None:
        desk.adopt()
        execute = desk.store._database.execute

        def fails(sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            if sql == "COMMIT":
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return execute(sql, parameters)

        desk.store._database.execute = fails  # type: ignore[method-assign]
        desk.tick(HOUR)
        desk.store._database.execute = execute  # type: ignore[method-assign]
        assert desk.rows() == []
        desk.tick(60)
        assert desk.dues() == [HOUR]

    def test_an_old_cursor_queues_no_second_job(self, desk: Desk) -> None:
        desk.adopt()
        desk.tick(HOUR)
        desk.end_all()
        desk.store._database.connection.execute("UPDATE schedule SET upto = ?", (MORNING,))
        desk.adopt()
        desk.tick()
        assert desk.dues() == [HOUR]


def test_the_container_is_told_when_it_was_due(desk: Desk) -> None:
    desk.adopt()
    desk.tick(HOUR)
    worker, _held = desk.do(state.attach, arrival("w"), desk.now, RULES)
    (claimed,) = desk.do(state.claim, [FreeSlots(worker, 1, frozenset({"hourly"}))], {})
    assert claimed.environment == {"JOBWORKER_DUE_AT": "2026-05-28T07:00:00Z"}


def test_a_request_can_not_use_the_key_of_a_due_job(stage: Stage) -> None:
    server = stage.server("--hold")
    reply = server.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": f"{due.KEY_PREFIX}quick/2026"})
    assert reply.status == 400
    assert "begin with schedule/" in reply.json["detail"]


class TestAClockThatIsWrongForAMoment:
    """As of a machine that begins in 1970 until it has asked for the time: nothing is due twice, and nothing missed."""

    def wrong_for_a_minute(self, desk: Desk) -> None:
        right, desk.now = desk.now, 1_000.0
        desk.tick()
        desk.tick(60)
        desk.now = right + 61
        desk.tick()
        desk.tick()

    def test_a_due_time_whose_job_was_deleted_makes_no_second_one(self, desk: Desk) -> None:
        desk.adopt({"monthly": "0 0 1 * *"})
        while not desk.rows():
            desk.tick(3_600)
        desk.end_all()
        desk.do(state.add, [NewJob("monthly")], desk.now + 60, True)  # by hand: it is the one that stays
        desk.tick(120)
        desk.end_all()
        desk.do(retention.prune, desk.now, ["monthly"], 50)
        assert [row["due_at"] for row in desk.rows()] == [None]
        self.wrong_for_a_minute(desk)
        assert [row["due_at"] for row in desk.rows()] == [None]

    def test_nothing_is_counted_as_missed_and_the_next_is_due_in_time(self, desk: Desk) -> None:
        desk.adopt()
        for _ in range(3):
            desk.tick(3_600)
            desk.end_all()
        before = desk.dues()
        self.wrong_for_a_minute(desk)
        assert (desk.dues(), desk.counted()) == (before, (0, 0))
        desk.tick(3_600)
        assert (len(desk.dues()), desk.counted()) == (len(before) + 1, (0, 0))
