"""/api/events: what a listener may rely on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jobworker import events as events_module
from jobworker import state as state_module
from jobworker.message import parse_head
from jobworker.past import Past
from jobworker.state import Arrival
from jobworker.store import Store
from tests.peers import (
    Events,
    ScriptedWorker,
)
from tests.stage import (
    Server,
    Stage,
    until,
)
from tests.test_state import RULES


def events_of(stream: Iterator[bytes], count: int) -> list[tuple[str, Any, str | None]]:
    """The next `count` events of a stream: kind, data and id each; comments are ("", None, None)."""
    found: list[tuple[str, Any, str | None]] = []
    while len(found) < count:
        for block in next(stream).decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            data = json.loads(fields["data"]) if fields else None
            found.append((fields.get("event", ""), data, fields.get("id")))
    return found


class Ring:
    """A store's ticks, and who listens to them; what changes is a worker, number by number."""

    def __init__(self) -> None:
        self.store = Store(":memory:").start()
        self.events = events_module.Events(self.store, lambda _rows: [])
        self.now = 1.0
        self.tick()

    def stream(self, last_id: int | None) -> Iterator[bytes]:
        return self.events.stream(last_id, parse_head(b"GET /api/events HTTP/1.1\r\nHost: localhost"))

    def tick(self) -> None:
        self.store.do(state_module.tick, self.now).result()

    def publish(self, number: int) -> None:
        """A worker of this number changes, and a moment ends."""
        about = Arrival(f"w{number}", 2, 0, (), "127.0.0.1:5", "0", 0.0, ())
        self.store.do(state_module.attach, about, self.now, RULES).result()
        self.tick()

    @property
    def ticks(self) -> list[state_module.Tick]:
        ticks: list[state_module.Tick] = self.store.do(lambda db: list(db.ticks)).result()
        return ticks

    def close(self) -> None:
        self.store.close()


class TestEvents:
    """/api/events: what a listener may rely on."""

    @pytest.fixture
    def ring(self) -> Iterator[Ring]:
        """The ring of events alone, without a server and its clock."""
        with contextlib.closing(Ring()) as ring:
            yield ring

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("events"))) as stage:
            yield stage.server("--hold")

    def test_who_resumes_misses_nothing_and_hears_nothing_twice(self, server: Server) -> None:
        with Events(server) as events:
            first = server.post("quick")
            events.next("job", id=first)
            events.next("stats")
            last_id = events.last_id
        missed = []
        for _ in range(4):
            missed += [server.post("quick"), server.post("quick")]
            time.sleep(0.3)
        heard: list[int] = []
        with Events(server, last_id) as events:
            last = server.post("quick")
            while not heard or heard[-1] != last:
                heard.append(events.next("job")["id"])
        assert heard == [*missed, last]

    def test_every_id_along_the_way_is_a_place_to_resume(self, ring: Ring) -> None:
        for number in range(1, 6):
            ring.publish(number)
        ids = [tick.id for tick in ring.ticks][1:]
        for position, last_id in enumerate(ids[:-1]):
            stream = ring.stream(last_id)
            kinds = events_of(stream, 1 + len(ids) - 1 - position)
            assert [data["id"] for kind, data, _ in kinds if kind == "worker"] == list(range(position + 1, 6))

    @pytest.mark.parametrize("last_id", ["1", "999999999999999999"])
    def test_an_id_that_it_does_not_know_is_answered_with_a_reset(self, server: Server, last_id: str) -> None:
        with Events(server, last_id) as events:
            assert events.next("reset") == {}
            assert events.last_id != last_id
            job = server.post("quick")
            assert events.next("job")["id"] == job

    def test_an_id_from_before_a_restart_is_answered_with_a_reset(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with Events(server) as events:
            server.post("quick")
            events.next("job")
            events.next("stats")
            last_id = events.last_id
        server.kill()
        server.start()
        with Events(server, last_id) as events:
            assert events.next("reset") == {}

    def test_an_id_that_has_left_the_ring_is_answered_with_a_reset(self, ring: Ring) -> None:
        oldest = ring.ticks[0].id
        for number in range(state_module.RING_TICKS - len(ring.ticks)):
            ring.publish(number)
        assert events_of(ring.stream(oldest), 2)[1][0] == "worker"
        ring.publish(0)
        assert [kind for kind, _, _ in events_of(ring.stream(oldest), 2)] == ["stats", "reset"]

    def test_a_listener_too_slow_for_the_ring_is_told_to_reset(self, ring: Ring) -> None:
        stream = ring.stream(None)
        events_of(stream, 1)
        for number in range(state_module.RING_TICKS + 1):
            ring.publish(number)
        [(kind, _, last_id)] = events_of(stream, 1)
        assert kind == "reset"
        assert last_id == str(ring.ticks[-1].id)
        ring.publish(6)
        [(kind, worker, _), *_] = events_of(stream, 2)
        assert (kind, worker["name"]) == ("worker", "w6")

    def test_too_many_changed_jobs_are_a_reset(self, server: Server) -> None:
        with Events(server) as events:
            server.http("POST", "/api/jobs", [{"name": "quick"}] * 300)
            assert events.next("reset") == {}
            assert events.next("stats")["jobs"]["queued"] >= 300

    def test_ids_go_on_growing_over_a_restart(self, ring: Ring) -> None:
        for number in range(3):
            ring.publish(number)
        ids = [tick.id for tick in ring.ticks]
        assert ids == sorted(set(ids))
        with contextlib.closing(Ring()) as again:
            again.now = ring.now + 0.01
            again.publish(0)
            assert again.ticks[-1].id > ids[-1]

    def test_silence_is_broken_by_comments(self, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        assert events_module.HEARTBEAT_SECONDS <= 15
        monkeypatch.setattr(events_module, "HEARTBEAT_SECONDS", 0.05)
        stream = ring.stream(None)
        events_of(stream, 1)
        for _ in range(3):
            comment = next(stream)
            assert comment.startswith(b":")
            assert comment.endswith(b"\n\n")
            assert b"event" not in comment

    def test_what_changes_nothing_is_no_event(self, ring: Ring) -> None:
        ring.publish(1)
        for _ in range(3):
            ring.tick()
        assert [tick.overview.get("workers") for tick in ring.ticks] == [None, 0, 1]

    def test_the_changes_of_a_moment_are_one_event_with_the_latest_state(self, server: Server) -> None:
        def events_of_20_changes() -> int:
            jobs = [server.post("quick", delay=100) for _ in range(10)]
            for job in jobs:
                server.http("DELETE", f"/api/jobs/{job}")
            last = server.post("quick", delay=100)
            heard: list[Any] = []
            while not heard or heard[-1]["id"] != last:
                heard.append(events.next("job"))
            assert {job["id"] for job in heard} == {*jobs, last}
            latest = {job["id"]: job["state"] for job in heard}
            assert all(latest[job] == "cancelled" for job in jobs)
            return len(heard) - 1

        with Events(server) as events:
            until(lambda: events_of_20_changes() < 20)  # a busy machine may need several moments for them

    def test_a_burst_is_at_most_about_four_batches_a_second(self, server: Server) -> None:
        with Events(server) as events:
            events.next("stats")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                server.post("quick", delay=100)
                time.sleep(0.01)
            last = server.post("quick", delay=100)
            batches: set[str | None] = set()
            while events.next("job")["id"] != last:
                batches.add(events.last_id)
        assert 2 <= len(batches) <= 9

    def test_no_value_can_end_an_event(self, stage: Stage) -> None:
        server = stage.server("--hold", jobs="- {name: a, image: busybox, parameters: {V: {}}}")
        value = "a\nb\r\n\nevent: stats\ndata: {}\n\n\u2028\x85"
        with Events(server) as events:
            job = server.post("a", environment={"V": value})
            assert events.next("job", id=job)["environment"] == {"V": value}


class TestListener:
    """A listener beside other work on the same server."""

    def test_events_tell_what_changes(self, idle: Server) -> None:
        with Events(idle) as events:
            stats = events.next("stats")
            assert stats["workers"] == 0
            job = idle.post("quick")
            assert events.next("job", id=job)["state"] == "queued"
            with ScriptedWorker(idle, "seen", tags=("never",)):
                assert events.next("worker", name="seen")["connected"] is True
            assert events.next("worker", name="seen", connected=False)
            idle.http("DELETE", f"/api/jobs/{job}")
            assert events.next("job", id=job, state="cancelled")

    @pytest.mark.parametrize("last_id", ["", "-1", "x", "\xb2", "9" * 20, "9" * 5000])
    def test_events_with_an_id_that_never_was_begin_now(self, idle: Server, last_id: str) -> None:
        with Events(idle, last_id) as events:
            assert events.next("stats")

    def test_events_resume_where_they_were_left(self, idle: Server) -> None:
        with Events(idle) as events:
            job = idle.post("quick")
            events.next("job", id=job)
            missed = idle.post("quick")
            last_id = events.last_id
            events.next("job", id=missed)
        with Events(idle, last_id) as events:
            assert events.next("job", id=missed)["state"] == "queued"


class TestPast:
    """Who begins to listen is told the last five minutes."""

    def test_the_first_stats_have_the_last_five_minutes(self) -> None:
        ring = Ring()
        ring.now = 1_000.0
        ring.tick()
        [(kind, stats, _)] = events_of(ring.stream(None), 1)
        assert (kind, stats["past"]) == ("stats", [[1_000, 0, 0, 0, 0]])
        ring.store.close()

    def test_bins_count_ends_keep_peaks_and_are_few(self) -> None:
        past = Past()
        for now, finished, failed, latency, busy in [
            (0, 5, 2, 0, 1),
            (1, 7, 3, 4.5, 2),
            (4, 8, 1, 0, 0),
            (5, 9, 2, 0, 0),
        ]:
            overview = {"finished": finished, "jobs": {"failure": failed}, "queue_latency": latency, "busy": busy}
            past.note(overview, now)
        assert past.recent() == [[0, 3, 1, 4.5, 2], [5, 1, 1, 0, 0]]
        for now in range(10, 10_000):
            past.note(overview, now)
        assert len(past.bins) == 60
        past.note(overview, 20_000)
        assert past.recent() == [[20_000, 0, 0, 0, 0]]
