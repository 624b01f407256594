"""server.py: which worker gets which job, and what workers of either version may say."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import protocol
from tests.peers import (
    VERSION_2,
    ScriptedWorker,
    is_closed,
    let_go,
)
from tests.stage import (
    JOBS,
    Server,
    Stage,
    until,
)

QUEUES = (
    JOBS
    + """
- {name: words, image: busybox, command: echo 'a b'}
- {name: other, image: x}
- {name: 日本語, image: busybox}
- {name: a, image: busybox}
- {name: b, image: busybox}
- {name: urgent, image: busybox, priority: 5}
- {name: two, image: busybox, concurrency: 2}
- {name: gpu, image: busybox, tags: [gpu, big]}
- {name: again, image: busybox, retries: 2, retry_delay: 400ms}
- {name: strict, image: busybox, parameters: {COLOUR: {default: red}}}
"""
)


@pytest.fixture(scope="module")
def started(shared: Stage) -> Server:
    return shared.server("--hold", "--grace", "1", jobs=QUEUES)


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    """A server without workers and with no job that is not final."""
    yield started
    let_go(started)


class TestVersion1Worker:
    """The original's worker against our server."""

    def test_it_is_told_the_configs_as_the_original_tells_them(self, server: Server) -> None:
        with connect(f"ws://127.0.0.1:{server.port}/runner", proxy=None) as worker:
            frame = worker.recv(5)
            assert isinstance(frame, bytes)
            assert worker.subprotocol is None
            assert frame[:1] == b"\1"
            configs = json.loads(frame[1:])
            assert {"command": "echo 'a b'", "image": "busybox", "name": "words"} in configs
            assert {"command": None, "image": "x", "name": "other"} in configs
            assert all(list(config) == ["command", "image", "name"] for config in configs)

    @pytest.mark.parametrize("as_text", [False, True], ids=["binary", "text"])
    def test_its_job_runs_to_success(self, server: Server, as_text: bool) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            assert worker.next(protocol.Enqueue) == protocol.Enqueue(job, "quick")
            for message, state in ((protocol.JobRunning(job), "running"), (protocol.JobSuccess(job), "success")):
                frame = protocol.encode(message)
                worker.send(frame.decode() if as_text else frame)
                until(lambda state=state: server.state(job) == state)  # type: ignore[misc]

    def test_its_failure_is_a_failure(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobFailure(job))
            assert (server.ended(job)["state"], server.job(job)["exit_code"]) == ("failure", None)

    def test_it_gets_the_name_in_code_points(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            server.http("POST", "/api/jobs/%E6%97%A5%E6%9C%AC%E8%AA%9E")
            assert worker.next(protocol.Enqueue).name == "日本語"

    def test_it_gets_one_job_at_a_time(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            first, second = server.post("quick"), server.post("hello-world")
            assert worker.runs().job == first
            assert worker.gets_nothing(protocol.Enqueue)
            worker.send(protocol.JobSuccess(first))
            assert worker.runs().job == second

    def test_it_gets_no_job_with_parameters(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            waiting, taken = server.sh("true"), server.post("quick")
            assert worker.runs().job == taken
            worker.send(protocol.JobSuccess(taken))
            server.ended(taken)
            assert worker.gets_nothing(protocol.Enqueue)
            assert server.state(waiting) == "queued"

    def test_its_end_is_its_loss(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            running = server.post("quick")
            worker.runs()
        job = server.ended(running, seconds=3)
        assert (job["state"], job["reason"], job["exit_code"]) == ("failure", "lost", None)

    def test_a_job_that_it_did_not_say_to_have_started_is_queued_again(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server) as worker:
            assert worker.next(protocol.Enqueue).job == job

    def test_unknown_tags_and_empty_frames_are_ignored(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            for frame in (b"", "", b"\0", b"\4\0\0\0\1", b"\x10{}", b"\x1f\xff", b"\xff"):
                worker.send(frame)
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.encode(protocol.JobSuccess(job)) + b"trailing bytes")
            assert server.ended(job)["success"]

    @pytest.mark.parametrize("frame", [b"\1", b"\1\0\0\0", b"\0021"])
    def test_a_malformed_frame_closes_only_its_connection(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            bad.send(frame)
            assert bad.is_closed()
            job = server.post("quick")
            assert good.runs().job == job

    def test_a_text_frame_that_is_not_utf_8_closes_only_its_connection(self, server: Server) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            bad.socket.send(b"\1\xff\xff\xff\xff", text=True)
            assert bad.is_closed()
            server.post("quick")
            assert good.runs()

    def test_a_frame_too_large_closes_only_its_connection(self, server: Server) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            with contextlib.suppress(ConnectionClosed):
                bad.send(b"\1" * 50_000_000)
            assert bad.is_closed()
            server.post("quick")
            assert good.runs()

    @pytest.mark.parametrize("frame", [b"\1\xff\xff\xff\xff", b"\2\0\0\x27\x0f", b"\3\0\0\0\0", b"\3\x7f\xff\xff\xff"])
    def test_a_word_about_no_job_changes_nothing(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server) as worker:
            worker.send(frame)
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobSuccess(job))
            assert server.ended(job)["success"]

    def test_a_word_about_another_workers_job_changes_nothing(self, server: Server) -> None:
        with ScriptedWorker(server) as owner:
            job = server.post("quick")
            owner.runs()
            with ScriptedWorker(server) as other:
                other.send(protocol.JobSuccess(job))
                other.send(protocol.JobFailure(job))
                other.socket.ping().wait(5)
                assert server.state(job) == "running"
                owner.send(protocol.JobFailure(job))
                assert server.ended(job)["state"] == "failure"

    def test_a_finished_job_never_changes(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobFailure(job))
            before = server.ended(job)
            worker.send(protocol.JobSuccess(job))
            worker.send(protocol.JobRunning(job))
            worker.socket.ping().wait(5)
            time.sleep(0.1)
            assert server.job(job) == before

    def test_a_result_without_a_start_is_a_result(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.next(protocol.Enqueue)
            worker.send(protocol.JobFailure(job))
            assert server.ended(job)["state"] == "failure"


class TestDispatch:
    """Which worker gets which job, and when; a version 2 worker by script against our server."""

    def test_the_first_in_is_the_first_out(self, server: Server) -> None:
        jobs = [server.post(name) for name in "abab"]
        with ScriptedWorker(server, "w", slots=4) as worker:
            assert [worker.next(protocol.Enqueue).job for _ in jobs] == jobs

    def test_the_higher_priority_comes_first(self, server: Server) -> None:
        low, plain, raised = server.post("a", priority=-1), server.post("a"), server.post("b", priority=3)
        urgent = server.post("urgent")
        with ScriptedWorker(server, "w", slots=4) as worker:
            assert [worker.next(protocol.Enqueue).job for _ in range(4)] == [urgent, raised, plain, low]

    def test_a_worker_gets_as_many_as_it_has_slots(self, server: Server) -> None:
        jobs = [server.post("a") for _ in range(4)]
        with ScriptedWorker(server, "w", slots=3) as worker:
            assert [worker.runs().job for _ in range(3)] == jobs[:3]
            assert worker.gets_nothing(protocol.Enqueue)
            worker.send(protocol.JobSuccess(jobs[1], 1))
            assert worker.next(protocol.Enqueue).job == jobs[3]

    def test_a_worker_gets_only_what_its_tags_allow(self, server: Server) -> None:
        tagged, plain = server.post("gpu"), server.post("a")
        with ScriptedWorker(server, "small", slots=9, tags=("gpu",)) as worker:
            assert worker.next(protocol.Enqueue).job == plain
            assert worker.gets_nothing(protocol.Enqueue)
            assert "tag" in server.job(tagged)["reason"]
            with ScriptedWorker(server, "big", tags=("big", "gpu", "more")) as other:
                assert other.next(protocol.Enqueue).job == tagged

    def test_no_more_of_a_job_run_than_its_concurrency(self, server: Server) -> None:
        jobs = [server.post("two") for _ in range(3)]
        other = server.post("a")
        with ScriptedWorker(server, "one", slots=9) as one, ScriptedWorker(server, "two", slots=9) as two:
            assert one.runs().job == jobs[0]
            assert one.runs().job == jobs[1]
            assert one.runs().job == other
            assert one.gets_nothing(protocol.Enqueue)
            assert two.gets_nothing(protocol.Enqueue, 0.1)
            one.send(protocol.JobFailure(jobs[0], 1, 1))
            until(lambda: server.state(jobs[2]) == "assigned")

    def test_a_delayed_job_waits(self, server: Server) -> None:
        start = time.monotonic()
        late, soon = server.post("a", delay=0.5), server.post("b")
        with ScriptedWorker(server, "w", slots=2) as worker:
            assert worker.next(protocol.Enqueue).job == soon
            assert worker.next(protocol.Enqueue).job == late
            assert time.monotonic() - start >= 0.5

    def test_the_environment_is_sent_along(self, server: Server) -> None:
        job = server.post("strict")
        with ScriptedWorker(server, "w") as worker:
            assert worker.next(protocol.Enqueue) == protocol.Enqueue(job, "strict", 1, {"COLOUR": "red"})

    def test_a_failure_is_tried_again_as_often_as_asked_later_each_time(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            times = []
            for attempt in (1, 2, 3):
                assert worker.runs().attempt == attempt
                times.append(time.monotonic())
                worker.send(protocol.JobFailure(job, attempt, attempt))
            assert worker.gets_nothing(protocol.Enqueue)
            ended = server.ended(job)
            assert (ended["state"], ended["attempt"], ended["exit_code"], ended["reason"]) == ("failure", 3, 3, "exit")
            assert [one["exit_code"] for one in server.get(f"/api/jobs/{job}/attempts")] == [1, 2, 3]
            assert times[1] - times[0] > 0.29
            assert times[2] - times[1] > 0.59

    def test_a_retried_success_is_a_success(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 1))
            worker.runs()
            worker.send(protocol.JobSuccess(job, 2))
            ended = server.ended(job)
            assert (ended["success"], ended["attempt"], ended["exit_code"], ended["reason"]) == (True, 2, 0, None)

    def test_a_finished_job_is_run_again_as_a_new_job(self, server: Server) -> None:
        job = server.post("strict", environment={"COLOUR": "blue"}, priority=2)
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 1))
            server.ended(job)
            again = server.http("POST", f"/api/jobs/{job}/retry").json["id"]
            assert again > job
            assert worker.runs().job == again
            assert (server.job(again)["environment"], server.job(again)["priority"]) == ({"COLOUR": "blue"}, 2)
            assert server.state(job) == "failure"

    def test_a_repeated_retry_is_the_same_new_job(self, server: Server) -> None:
        job = server.post("a")
        server.http("DELETE", f"/api/jobs/{job}")
        key = {"Idempotency-Key": "again"}
        first, again = (server.http("POST", f"/api/jobs/{job}/retry", headers=key) for _ in range(2))
        assert (first.status, first.json) == (again.status, again.json) == (200, first.json)
        assert [each["id"] for each in server.get(f"/api/jobs?after={job - 1}")] == [job, first.json["id"]]
        other = server.http("POST", f"/api/jobs/{job}/retry", headers={"Idempotency-Key": "once more"})
        assert other.json["id"] > first.json["id"]

    def test_what_waits_under_a_name_that_left_while_the_server_was_down_ends(self, stage: Stage) -> None:
        server = stage.server("--hold", jobs=QUEUES)
        gone, stays = server.post("a"), server.post("b")
        server.kill()
        stage.jobs.write_text(QUEUES.replace("name: a,", "name: renamed,"))
        server.start()
        ended = server.ended(gone)
        assert (ended["state"], ended["reason"]) == ("failure", "gone")
        assert server.state(stays) == "queued"

    def test_a_wait_ends_with_the_job(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as worker, ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.http, "POST", "/api/jobs/a?wait=10")
            job = worker.runs().job
            assert not reply.done()
            worker.send(protocol.JobSuccess(job, 1))
            assert reply.result(2).json == {"id": job, "name": "a", "queuing": False, "running": False, "success": True}

    def test_a_worker_is_described(self, server: Server) -> None:
        with ScriptedWorker(server, "w", slots=2, tags=("x", "y")) as worker:
            job = server.post("a")
            worker.runs()
            [short] = server.get("/api/workers")
            assert short == {"id": short["id"], "working": True}
            full = server.get(f"/api/workers/{short['id']}")
            assert (full["name"], full["slots"], full["tags"], full["jobs"]) == ("w", 2, ["x", "y"], [job])
            assert (full["protocol"], full["version"]) == (2, "0")
            assert full["address"].startswith("127.0.0.1")


class TestVersion2Worker:
    """The two-phase start and its settlement, seen from a worker's end of the wire."""

    def test_go_comes_after_running_is_on_disk(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.kill()
        server.start()
        assert server.state(job) == "running"
        assert (server.ended(job)["state"], server.job(job)["reason"]) == ("failure", "lost")

    def test_settled_comes_after_the_result_is_on_disk(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 7, "exit"))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            server.kill()
        server.start()
        assert (server.job(job)["state"], server.job(job)["exit_code"]) == ("failure", 7)

    def test_every_message_may_be_sent_twice(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobRunning(job, 1))
            assert worker.next(protocol.Go) == protocol.Go(job, 1)
            for _ in range(2):
                worker.send(protocol.JobSuccess(job, 1))
                assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert server.job(job)["success"]

    @pytest.mark.parametrize("kind", [protocol.JobRunning, protocol.JobSuccess, protocol.JobFailure])
    def test_what_is_stale_is_settled(self, server: Server, kind: Any) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for stale in ((job, 2), (job + 1, 1), (-1, 1)):
                worker.send(kind(*stale))
                assert worker.next(protocol.Settled) == protocol.Settled(*stale)
            assert (server.state(job), server.job(job)["attempt"]) == ("running", 1)

    def test_a_worker_that_comes_back_within_its_grace_goes_on(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.Log(job, 1, 0, b"first "))
            until(lambda: server.log(job) == b"first ")
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            assert worker.next(protocol.Logged) == protocol.Logged(job, 1, 6)
            time.sleep(1.5)
            assert server.state(job) == "running"
            worker.send(protocol.Log(job, 1, 6, b"second"))
            worker.send(protocol.JobSuccess(job, 1))
            assert worker.next(protocol.Settled)
            assert (server.log(job), server.job(job)["success"]) == (b"first second", True)

    def test_a_log_sent_twice_is_kept_once(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for offset, data in ((0, b"0123"), (0, b"0123"), (2, b"2345"), (6, b"67"), (1, b"1")):
                worker.send(protocol.Log(job, 1, offset, data))
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            assert server.log(job) == b"01234567"

    def test_the_middle_of_a_flood_of_log_is_not_kept(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for n in range(64):
                worker.send(protocol.Log(job, 1, n * 65536, b"%05d " % n + b"x" * 65530))
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            log = server.log(job)
            assert (log[:5], log[-65536:-65531]) == (b"00000", b"00063")
            assert 900_000 < len(log) < 1_200_000

    def test_a_word_about_an_attempt_that_is_over_lets_its_worker_go(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
        server.ended(job)
        with ScriptedWorker(
            server, "w", jobs=((job, 1, "running"), (job + 1, 1, "finished"), (job, 9, "assigned"))
        ) as worker:
            settled = {worker.next(protocol.Settled) for _ in range(3)}
            assert settled == {protocol.Settled(job, 1), protocol.Settled(job + 1, 1), protocol.Settled(job, 9)}
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            assert (server.state(job), server.job(job)["reason"]) == ("failure", "lost")

    def test_a_failure_before_the_start_is_a_failure(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            worker.send(protocol.JobFailure(job, 1, None, "refused"))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert (server.ended(job, 3)["state"], server.job(job)["reason"]) == ("failure", "refused")

    def test_a_log_from_beyond_all_offsets_ends_only_its_connection(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.Log(job, 1, 2**63 - 1, b"far"))
            assert worker.is_closed()
        assert server.ended(job, 5)["reason"] == "lost"

    def test_a_worker_cannot_take_another_name_on_the_way(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as worker:
            worker.send(protocol.Hello("other", 1, (), "0", ()))
            until(lambda: [one["name"] for one in server.get("/api/workers?full=1")] != ["w"])
        until(lambda: server.get("/api/workers") == [])

    def test_no_job_falls_between_two_connections_of_one_name(self, server: Server) -> None:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
            posts = pool.submit(lambda: [server.post("a") for _ in range(150)])
            worker = stack.enter_context(ScriptedWorker(server, "w"))
            while not posts.done():
                worker = stack.enter_context(ScriptedWorker(server, "w", slots=1000))
            held = {worker.next(protocol.Enqueue).job for _ in posts.result()}
            assert held == {job["id"] for job in server.get("/api/jobs?state=assigned")} == set(posts.result())

    def test_an_unstarted_job_of_a_lost_worker_is_queued_again(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            assert worker.next(protocol.Enqueue).attempt == 1
        with ScriptedWorker(server, "other") as worker:
            again = worker.runs()
            worker.send(protocol.JobSuccess(job, again.attempt))
            assert server.ended(job)["success"]

    def test_a_running_job_has_its_whole_grace_after_a_restart_of_the_server(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.kill()
        server.start()
        assert server.get(f"/api/jobs/{job}?wait=1")["state"] == "running"
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            worker.send(protocol.JobSuccess(job, 1))
            assert server.ended(job)["success"]

    def test_an_unstarted_job_does_not_wait_for_the_grace(self, stage: Stage) -> None:
        server = stage.server("--hold", "--grace", "60")
        job = server.post("quick")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server, "other") as worker:
            assert worker.next(protocol.Enqueue).job == job

    def test_an_unstarted_job_of_a_lost_worker_is_queued_again_after_the_servers_death(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            server.kill()
        server.start()
        assert server.state(job) == "assigned"
        with ScriptedWorker(server, "other") as worker:
            assert worker.runs().job == job

    def test_an_unstarted_job_that_its_worker_no_longer_knows_is_queued_again(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server, "w") as worker:
            assert worker.runs().job == job

    def test_a_started_job_that_its_worker_no_longer_knows_is_lost(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
        with ScriptedWorker(server, "w"):
            assert server.ended(job, 5)["reason"] == "lost"

    def test_the_newest_connection_of_a_name_wins(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as old, ScriptedWorker(server, "w") as new:
            assert old.is_closed()
            job = server.post("a")
            assert new.runs().job == job
            assert len(server.get("/api/workers")) == 1

    def test_who_is_replaced_is_told_to_let_go(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as old:
            old.runs()
            with ScriptedWorker(server, "w"):
                assert old.next(protocol.Settled) == protocol.Settled(job, 1)

    def test_another_worker_cannot_end_a_job(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as owner:
            owner.runs()
            with ScriptedWorker(server, "other") as other:
                other.send(protocol.JobSuccess(job, 1))
                assert other.next(protocol.Settled) == protocol.Settled(job, 1)
                other.send(protocol.Log(job, 1, 0, b"forged"))
            owner.send(protocol.JobFailure(job, 1, 1))
            owner.next(protocol.Settled)
            assert (server.state(job), server.log(job)) == ("failure", b"")

    @pytest.mark.parametrize(
        "frame",
        [b"\x01", b"\x10{}", b"\x10[]", b"\x11\0\0\0\1", b"\x1f\0\0\0\x09\1", b"\x1f\0\0\0\1\x1f", b"\2\0\0\0\1{}"],
    )
    def test_a_malformed_frame_closes_only_its_connection(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server, "good") as good, ScriptedWorker(server, "bad", tags=("bad",)) as bad:
            bad.send(frame)
            assert bad.is_closed()
            server.post("a")
            assert good.runs()

    def test_a_worker_must_say_hello_first(self, server: Server) -> None:
        url = f"ws://127.0.0.1:{server.port}/runner"
        with connect(url, proxy=None, subprotocols=[VERSION_2]) as peer:
            peer.send(protocol.encode(protocol.JobRunning(1, 1)))
            assert is_closed(peer)

    def test_cancelling_a_running_job_asks_its_worker(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            reply = server.http("DELETE", f"/api/jobs/{job}").json
            assert (reply["state"], reply["reason"]) == ("running", "cancelling")
            assert worker.next(protocol.Stop) == protocol.Stop(job, 1)
            worker.send(protocol.JobFailure(job, 1, 143, "exit"))
            worker.next(protocol.Settled)
            assert server.state(job) == "cancelled"
            assert worker.gets_nothing(protocol.Enqueue)

    def test_cancelling_an_unstarted_job_never_starts_it(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            assert server.http("DELETE", f"/api/jobs/{job}").json["state"] == "cancelled"
            worker.send(protocol.JobRunning(job, 1))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert worker.gets_nothing(protocol.Go)
            assert server.state(job) == "cancelled"

    def test_a_cancelled_job_whose_worker_is_lost_is_cancelled(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job, 5)["state"] == "cancelled"

    def test_the_order_to_stop_is_repeated_to_a_worker_that_comes_back(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.http("DELETE", f"/api/jobs/{job}")
            server.kill()
        server.start()
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            assert worker.next(protocol.Stop) == protocol.Stop(job, 1)
