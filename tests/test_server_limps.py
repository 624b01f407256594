"""server.py, while workers, the disk, clocks or callers limp: what that takes from others is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import protocol
from client import Session
from jobworker import api, state
from jobworker.clock import CLOCK_JUMP_SECONDS, DISTRUST_SECONDS, WatchedClock
from jobworker.config import Configs, JobConfig
from jobworker.message import parse_head
from jobworker.store import Store
from server import MAX_FRAME_MESSAGES, MAX_UNSTORED_BYTES, Dispatcher
from tests.peers import VERSION_2, WEBSOCKET, ScriptedWorker, head, is_closed
from tests.stage import Program, Server, Stage, all_ended, meanwhile, passes, problem, until
from tests.test_due import deliver

MEMORY_LIMIT_KIB = 200 * 1024


class TestFrames:
    """Either side cuts its frames at 512 KiB, so that no number of jobs is too large a frame."""

    def test_many_large_jobs_reach_a_worker_with_many_slots(self, stage: Stage) -> None:
        server = stage.server("--hold")
        script = "x" * 30_000
        jobs = [{"name": "sh", "environment": {"SCRIPT": script}}] * 200
        ids = [job["id"] for _ in range(3) for job in server.http("POST", "/api/jobs", jobs, 30).json]
        with ScriptedWorker(server, "wide", slots=1_000) as worker:  # it takes frames of up to 1 MiB
            assert sorted(worker.next(protocol.Enqueue, 20).job for _ in ids) == ids

    def test_none_is_longer_than_the_limit_unless_one_message_is(self) -> None:
        messages = [protocol.Log(1, 1, 0, b"x" * size) for size in (1, 600_000, 200_000, 200_000, 200_000)]
        frames = list(protocol.encode_batches(messages))
        assert [m for frame in frames for m in protocol.decode_from_worker(frame, 2)] == messages
        assert [len(frame) > protocol.BATCH_BYTES for frame in frames] == [False, True, False, False]

    def test_a_worker_that_has_much_to_say_says_it_in_many(self) -> None:
        class Link:
            subprotocol, response = VERSION_2, None

            def __init__(self) -> None:
                self.frames: asyncio.Queue[bytes] = asyncio.Queue()

            async def send(self, frame: bytes) -> None:
                self.frames.put_nowait(frame)

            def __aiter__(self) -> Self:
                return self

            async def __anext__(self) -> bytes:
                """Nothing comes; the connection ends once all was sent."""
                while sum(map(len, sent)) < sum(len(log.data) for log in said):
                    sent.append(await self.frames.get())
                raise StopAsyncIteration

        said = [protocol.Log(1, 1, number * 65_536, b"x" * 65_536) for number in range(160)]
        sent: list[bytes] = []

        async def play() -> None:
            session = Session(Link())  # type: ignore[arg-type]
            for message in said:
                session.send(message)
            await asyncio.wait_for(session.run(lambda _message: None), 20)

        asyncio.run(play())
        assert [message for frame in sent for message in protocol.decode_from_worker(frame, 2)] == said
        assert max(map(len, sent)) < protocol.BATCH_BYTES + 2 * 65_536


class TestMemory:
    """What one worker sends, or does not read, costs the server little, and the others nothing."""

    def test_log_faster_than_the_disk_is_waited_for(self) -> None:
        """A store that commits nothing is the slowest disk there is."""

        class Flood:
            subprotocol, remote_address, close_code = VERSION_2, ("127.0.0.1", 5), 1006
            sent = 0

            async def recv(self) -> bytes:
                return protocol.encode(protocol.Hello("chatty", 1, (), "0", ()))

            async def __aiter__(self) -> AsyncIterator[bytes]:
                while self.sent < 1_000:
                    self.sent += 1
                    yield protocol.encode(protocol.Log(1, 1, 0, b"x" * 500_000))
                    await asyncio.sleep(0)

        async def flood() -> int:
            store, flooded = Store(":memory:", deliver), Flood()
            dispatcher = Dispatcher(store, Configs([]), 60, time.time, write=lambda *_: None)
            serving = asyncio.ensure_future(dispatcher.serve(flooded))  # type: ignore[arg-type]
            async with asyncio.timeout(10):
                while not dispatcher.workers:
                    await asyncio.sleep(0)
                    if store._requests.qsize():
                        store.commit_waiting()
            for _ in range(5_000):
                await asyncio.sleep(0)
            serving.cancel()
            return flooded.sent * 500_000

        assert asyncio.run(flood()) < 2 * MAX_UNSTORED_BYTES

    def test_a_frame_of_too_many_messages_ends_its_connection(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with ScriptedWorker(server, "flood") as flood:
            flood.send(protocol.encode_batch([protocol.JobRunning(1, 1)] * (MAX_FRAME_MESSAGES + 1)))
            assert flood.is_closed()
        until(lambda: server.said("a batch may have 20,000 messages"))

    @meanwhile
    def test_what_workers_write_does_not_stay_in_memory(self, stage: Stage) -> None:
        server = stage.server()
        with ScriptedWorker(server, "chatty") as worker:
            server.post("quick")
            job = worker.runs()
            largest = 0
            for number in range(300):
                worker.send(protocol.Log(job.job, job.attempt, number * 500_000, b"x" * 500_000))
                largest = max(largest, server.memory_kib() if number % 20 == 0 else 0)
            assert server.get("/healthz")["status"] == "ok"
        assert largest < MEMORY_LIMIT_KIB

    def test_the_configs_go_out_once_and_at_each_change(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with ScriptedWorker(server, "asks") as worker:
            for _ in range(3):
                worker.send(protocol.Hello("asks", 1, (), "0", ((9, 9, "running"),)))
                worker.next(protocol.Settled)
            assert not [message for message in worker.inbox if isinstance(message, protocol.JobConfigs)]
            server.signal(signal.SIGHUP)
            worker.next(protocol.JobConfigs)

    def test_a_worker_that_reads_nothing_is_left(self, stage: Stage) -> None:
        server = stage.server("--hold")
        unknown = tuple((job, 1, "running") for job in range(1, 20_001))
        hello = protocol.encode(protocol.Hello("deaf", 1, (), "0", unknown))
        url = f"ws://127.0.0.1:{server.port}/runner"
        ear = socket.socket()
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel takes many answers
        ear.connect(("127.0.0.1", server.port))
        with connect(url, sock=ear, subprotocols=[VERSION_2], compression=None, ping_interval=None) as deaf:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(2_000):  # each is answered by 20,000 Settled
                    deaf.send(hello)
            assert is_closed(deaf)
        until(lambda: server.said("does not read what it is sent"))
        assert server.memory_kib() < MEMORY_LIMIT_KIB

    @pytest.mark.parametrize(
        "hello", [{"tags": ["t"] * 101}, {"tags": ["t" * 129]}, {"jobs": [[1, 1, "running"]] * 20_001}]
    )
    def test_a_hello_has_caps(self, idle: Server, hello: dict[str, Any]) -> None:
        before = len(idle.stderr)
        url = f"ws://127.0.0.1:{idle.port}/runner"
        plain = {"name": "big", "slots": 1, "tags": [], "version": "0", "jobs": []}
        with connect(url, proxy=None, subprotocols=[VERSION_2], compression=None) as peer:
            peer.send(b"\x10" + json.dumps(plain | hello).encode())
            assert is_closed(peer)
        until(lambda: "must be at most" in idle.stderr[before:])

    def test_the_tags_that_workers_say_are_not_kept_for_ever(self) -> None:
        configs = Configs([JobConfig("a", "busybox")])
        for number in range(5_000):
            assert configs.names_for((str(number),), 2) == {"a"}
        assert len(configs._names) <= 1_000

    def test_they_are_told_from_others_though_another_thread_forgets_them_meanwhile(self) -> None:
        class Forgetful(dict[Any, frozenset[str]]):
            def __setitem__(self, *_: object) -> None:
                """As if another thread had emptied it right after that."""

        configs = Configs([JobConfig("a", "busybox")])
        configs._names = Forgetful()
        assert configs.names_for(("t",), 2) == {"a"}


class TestHealth:
    def test_a_disk_that_stalls_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A store whose thread has not begun is the slowest disk there is."""
        monkeypatch.setattr(api, "HEALTH_SECONDS", 0.1)
        stalled = api.Api(Store(":memory:"), Configs([]), False, time.time)
        reply = api.get_health(stalled, parse_head(b"GET /healthz HTTP/1.1\r\nHost: localhost"))
        assert reply.status == 503
        assert b"its disk stalls" in bytes(reply.body)  # type: ignore[arg-type]


class TestEnd:
    def test_a_server_ends_though_a_read_of_its_jobs_hangs(self, stage: Stage) -> None:
        server = stage.server()
        stage.jobs.unlink()
        os.mkfifo(stage.jobs)
        server.signal(signal.SIGHUP)
        until(lambda: server.get("/healthz")["status"] == "ok")
        server.signal(signal.SIGTERM)
        assert server.exit_code(20) == 0

    @pytest.mark.parametrize("which", ["server", "worker"])
    def test_who_does_not_read_the_log_holds_up_nothing(self, which: str, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server, "--slots", "4")
        program: Program = server if which == "server" else worker
        program.stop()
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        command = [str(server.port) if word == "0" and which == "server" else word for word in program.command]
        unread = subprocess.Popen(
            command, env=program.environment, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, cwd=stage.folder
        )

        def is_there() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                return bool(server.knows("worker"))
            return False

        try:
            until(is_there, 20)
            for _ in range(80):  # a line an end, of 60 characters and more
                assert server.ended(server.post("quick"))["success"]
            os.set_blocking(writing, False)
            with pytest.raises(BlockingIOError):
                os.write(writing, b"x" * 4096)
            unread.send_signal(signal.SIGTERM)
            assert unread.wait(20) == 0
        finally:
            unread.kill()
            unread.wait()
        os.close(reading)
        os.close(writing)


class TestReload:
    """A jobs.yaml of 1 MB is read beside the loop."""

    @pytest.mark.alone
    def test_workers_and_callers_are_served_meanwhile(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with ScriptedWorker(server, "pings") as worker:
            entry = "- name: job-{}\n  image: busybox\n  command: [sh, -c, 'echo {}']\n  environment: {{A: b, C: d}}\n"
            stage.jobs.write_text("".join(entry.format(n, n) for n in range(10_000)))
            server.signal(signal.SIGHUP)
            longest, start = 0.0, time.monotonic()
            while not server.said("read .* again: 10000 jobs"):
                begin = time.monotonic()
                assert worker.socket.ping().wait(10)
                server.get("/healthz")
                longest = max(longest, time.monotonic() - begin)
            assert longest < (time.monotonic() - start) / 2  # a second of several, or less

    def test_of_two_files_the_later_one_counts_also_where_it_is_read_sooner(self, stage: Stage) -> None:
        server = stage.server("--hold")
        stage.jobs.unlink()
        os.mkfifo(stage.jobs)
        server.signal(signal.SIGHUP)
        with stage.jobs.open("w") as long:  # once it is opened there, too
            short = stage.folder / "short.yaml"
            short.write_text("- {name: short, image: busybox}\n")
            short.rename(stage.jobs)
            server.signal(signal.SIGHUP)
            long.write("".join(f"- {{name: long-{n}, image: busybox}}\n" for n in range(10_000)))
        until(lambda: server.said("read .* again: 10000 jobs") and server.said("read .* again: 1 jobs"), 30)
        assert [config["name"] for config in server.get("/api/configs")] == ["short"]


class TestGroups:
    """Who asks for what is not there costs who writes nothing."""

    @pytest.fixture
    def store(self) -> Store:
        return Store(":memory:")

    def test_a_refusal_does_not_undo_its_group(self, store: Store) -> None:
        said: list[str] = []
        store._database.connection.set_trace_callback(said.append)
        missing = [store.do(state.get_and_watch, 7, False), store.do(state.cancel, 7, 1.0), store.do(state.get, 7)]
        added = store.do(state.add, [state.NewJob("a")], 1.0)
        store.commit_waiting()
        assert [future.result(0).kind for future in missing] == ["unknown"] * 3
        assert added.result(0) == [1]
        assert [sql for sql in said if "BEGIN" in sql or "COMMIT" in sql or "ROLLBACK" in sql] == [
            "BEGIN IMMEDIATE",
            "COMMIT",
        ]
        store.close()

    def test_a_change_does_not_wake_who_waits_for_the_end(self, store: Store) -> None:
        store.do(state.add, [state.NewJob("a")], 1.0)
        waits = [store.do(state.get_and_watch, 1, its_end) for its_end in (False, True)]
        store.commit_waiting()
        store.do(state.claim, [state.FreeSlots(1, 1, frozenset({"a"}))], {})
        store.commit_waiting()
        assert [wait.result(0)[1].done() for wait in waits] == [True, False]
        store.close()

    def test_waits_that_end_leave_nothing(self, store: Store) -> None:
        store.do(state.add, [state.NewJob("a")], 1.0)
        store.commit_waiting()
        waits = [store.do(state.get_and_watch, 1, its_end) for its_end in (False, True) for _ in range(100)]
        store.commit_waiting()
        watcher, ender = dict.fromkeys(wait.result(0)[1] for wait in waits)
        assert list(store._database.watchers.values()) == [watcher]
        assert list(store._database.enders.values()) == [ender]
        del waits, watcher, ender
        assert not store._database.watchers  # though the job has not changed
        assert not store._database.enders
        waits = [store.do(state.get_and_watch, 1, its_end) for its_end in (False, True)]
        store.do(state.cancel, 1, 1.0)
        store.commit_waiting()
        assert all(wait.result(0)[1].done() for wait in waits)
        assert not store._database.watchers
        assert not store._database.enders
        store.close()


class TestNames:
    """What a worker is called decides nothing."""

    def test_a_name_like_those_of_version_1_keeps_its_grace(self, stage: Stage) -> None:
        server = stage.server()
        with ScriptedWorker(server, "version-1-0a1b2c3d") as worker:
            job = server.post("quick")
            attempt = worker.runs().attempt
        server.kill()
        server.start()
        until(lambda: server.get("/healthz"))
        assert server.state(job) == "running"
        for _ in range(2):  # after the server's restart, and after the connection's end
            with ScriptedWorker(server, "version-1-0a1b2c3d", jobs=((job, attempt, "running"),)) as worker:
                assert worker.next(protocol.Logged).job == job
            until(lambda: server.get("/api/workers") == [])


class TestClock:
    """Somebody sets the clock."""

    class Clocks:
        def __init__(self) -> None:
            self.now, self.steady_now = 1_000_000.0, 5.0
            self.jumps: list[tuple[float, float]] = []
            self.watched = WatchedClock(
                lambda jump, now: self.jumps.append((jump, now)), lambda: self.now, lambda: self.steady_now
            )

        def passes(self, seconds: float) -> None:
            self.now += seconds
            self.steady_now += seconds

    @pytest.mark.parametrize("jump", [-3600.0, 40 * 86400.0, -CLOCK_JUMP_SECONDS])
    def test_it_is_seen_before_the_next_time_is_given(self, jump: float) -> None:
        clocks = self.Clocks()
        clocks.passes(10)
        assert (clocks.watched(), clocks.jumps) == (1_000_010.0, [])
        clocks.now += jump
        assert (clocks.watched(), clocks.jumps) == (1_000_010.0 + jump, [(jump, 1_000_010.0 + jump)])
        clocks.passes(10)
        clocks.watched()
        assert len(clocks.jumps) == 1

    def test_nothing_is_pruned_for_a_while(self) -> None:
        clocks = self.Clocks()
        assert not clocks.watched.was_set_lately()
        clocks.now += 40 * 86400
        clocks.watched()
        assert clocks.watched.was_set_lately()
        clocks.passes(DISTRUST_SECONDS)
        assert not clocks.watched.was_set_lately()

    def test_one_that_runs_a_little_fast_is_none_that_was_set(self) -> None:
        clocks = self.Clocks()
        for _ in range(1000):
            clocks.passes(1)
            clocks.now += 0.01
            clocks.watched()
        assert clocks.jumps == []

    def test_a_delay_goes_on_as_long_as_it_was_to_be(self) -> None:
        store = Store(":memory:")
        store.do(state.add, [state.NewJob("a", delay=3), state.NewJob("b")], 5_000.0)
        store.do(state.shift_delays, -3600.0, 1_400.0)
        store.commit_waiting()
        row = store._database.one(state.GET_JOB, 1)
        assert row["not_before"] == 5_000.0 + 3 - 3600
        store.close()

    def test_a_clock_set_back_while_the_server_was_down_makes_no_delay_longer(self) -> None:
        store = Store(":memory:")
        store.do(state.add, [state.NewJob("a", delay=3)], 5_000.0)
        store.do(state.resume, 1_400.0)
        store.commit_waiting()
        assert store._database.one(state.GET_JOB, 1)["not_before"] == 1_403.0
        store.do(state.resume, 1_401.0)  # killed, and started again
        store.commit_waiting()
        assert store._database.one(state.GET_JOB, 1)["not_before"] == 1_403.0
        store.close()

    def test_nor_does_one_set_ahead_while_it_was_up_and_back_while_it_was_down(self) -> None:
        store = Store(":memory:")
        store.do(state.add, [state.NewJob("a", delay=3)], 1_400.0)
        store.do(state.shift_delays, 3600.0, 5_000.0)
        store.do(state.resume, 1_400.0)
        store.commit_waiting()
        assert store._database.one(state.GET_JOB, 1)["not_before"] == 1_403.0
        store.close()


class TestIdempotency:
    """A key belongs to a route and a body, compared as values, and is looked up before anything else."""

    @pytest.fixture(autouse=True)
    def keys_of_its_own(self, request: pytest.FixtureRequest) -> None:
        self.prefix = request.node.name

    def ask(self, server: Server, path: str, body: Any, key: str = "k", status: int = 200) -> Any:
        reply = server.http("POST", path, body, headers={"Idempotency-Key": f"{self.prefix}/{key}"})
        return reply.json if reply.status == status == 200 else problem(reply, status)

    def test_the_same_body_in_other_words_is_the_same(self, idle: Server) -> None:
        job = self.ask(idle, "/api/jobs/quick", b'{"priority": 5, "delay": 1.5}')
        assert self.ask(idle, "/api/jobs/quick", b'{"delay": 1.50, "priority":5}') == job
        assert idle.get(f"/api/jobs?after={job['id'] - 1}") == [job]

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/api/jobs/quick", {"priority": 6}),
            ("/api/jobs/quick", {"delay": 60, "priority": 5}),
            ("/api/jobs/hello-world", {"priority": 5}),
            ("/api/jobs", [{"name": "quick", "priority": 5}]),
            ("/api/jobs/1/retry", None),
        ],
    )
    def test_another_request_is_a_conflict(self, idle: Server, path: str, body: Any) -> None:
        job = self.ask(idle, "/api/jobs/quick", {"priority": 5})["id"]
        idle.http("DELETE", f"/api/jobs/{job}")
        path = path.replace("/1/", f"/{job}/")
        assert "which is another request" in self.ask(idle, path, body, status=409)
        assert [each["id"] for each in idle.get(f"/api/jobs?after={job - 1}")] == [job]

    def test_a_number_may_be_written_in_any_way_and_a_text_may_not(self, idle: Server) -> None:
        job = self.ask(idle, "/api/jobs/sh", b'{"environment": {"SCRIPT": "echo 1.0, 2"}, "delay": 100}')
        assert self.ask(idle, "/api/jobs/sh", b'{"environment": {"SCRIPT": "echo 1.0, 2"}, "delay": 1e2}') == job
        self.ask(idle, "/api/jobs/sh", b'{"environment": {"SCRIPT": "echo 1, 2"}, "delay": 100}', status=409)

    def test_a_list_and_its_entries_have_keys_of_their_own(self, idle: Server) -> None:
        listed = self.ask(idle, "/api/jobs", [{"name": "quick"}, {"name": "quick"}], "L")
        single = self.ask(idle, "/api/jobs/quick", None, "L/0")
        assert single["id"] not in [job["id"] for job in listed]
        assert self.ask(idle, "/api/jobs", [{"name": "quick"}, {"name": "quick"}], "L") == listed
        self.ask(idle, "/api/jobs", [{"name": "quick"}] * 3, "L", 409)
        assert len(idle.get(f"/api/jobs?after={listed[0]['id'] - 1}")) == 3

    def test_a_repeat_is_answered_also_when_nothing_new_would_be_taken(self, stage: Stage) -> None:
        server = stage.server()
        with ScriptedWorker(server) as worker:
            job = self.ask(server, "/api/jobs/quick", None)
            worker.runs()
        until(lambda: not server.get("/api/workers"))
        assert server.ended(job["id"])["reason"] == "lost"
        problem(server.http("POST", "/api/jobs/quick"), 500)
        stage.jobs.write_text("- {name: other, image: busybox}")
        server.signal(signal.SIGHUP)
        until(lambda: server.said("again: 1 jobs"))
        again = self.ask(server, "/api/jobs/quick", None)
        assert (again["id"], again["running"]) == (job["id"], False)


class TestVersion1Configs:
    """What a version 1 worker is told."""

    def test_an_empty_command_is_one(self, stage: Stage) -> None:
        server = stage.server("--hold", jobs="- {name: a, image: busybox, command: ''}\n- {name: b, image: busybox}\n")
        with ScriptedWorker(server) as worker:
            assert [config["command"] for config in worker.configs] == ["", None]


def test_chance_is_an_argument() -> None:
    """The same chance gives the same delays: what a simulation relies on."""
    config = JobConfig("a", "busybox", retries=9)
    first, second = (
        [Configs([config], random.Random(4)).retry_delay("a", failures) for failures in range(1, 9)] for _ in range(2)
    )
    assert first == second


class TestWorkersThatTakeNothing:
    """One that is silent is found so, whatever waits for it, and costs no memory."""

    @meanwhile
    def test_a_frozen_one_is_noticed_though_much_waits_for_it(self, stage: Stage) -> None:
        jobs = '- {name: big, image: busybox, command: "true", parameters: {TEXT: {}}}\n'
        server = stage.server("--hold", "--grace", "2s", jobs=jobs)
        frozen = stage.worker(server, "--slots", "300")
        frozen.freeze()
        server.http("POST", "/api/jobs", [{"name": "big", "environment": {"TEXT": "x" * 30_000}}] * 100)
        until(lambda: server.get("/api/workers") == [], 60)
        stage.worker(server, "--slots", "4", name="other")
        assert {job["state"] for job in all_ended(server)} == {"success"}
        frozen.thaw()

    def test_one_that_pings_and_reads_nothing_is_ended(self, stage: Stage) -> None:
        server = stage.server("--hold")
        ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
        hello = protocol.encode(protocol.Hello("w", 0, (), "1", ()))
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(head(b"GET /runner", *WEBSOCKET, b"Sec-WebSocket-Protocol: " + VERSION_2.encode()))
            peer.sendall(b"\x82" + bytes([0x80 | len(hello)]) + b"\0\0\0\0" + hello)
            with contextlib.suppress(ConnectionError):
                while True:
                    peer.sendall(ping * 1_000)
        assert server.memory_kib() < MEMORY_LIMIT_KIB
        until(lambda: "does not read what it is sent" in server.stderr)

    @meanwhile
    def test_a_server_that_stood_still_gives_who_is_away_that_time(self, stage: Stage) -> None:
        server = stage.server("--grace", "8s")
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.05; done")
        until(lambda: stage.docker.starts(job) and server.state(job) == "running")
        worker.kill()
        until(lambda: server.get("/api/workers") == [])
        server.freeze()
        Program.start(worker)  # it waits to be taken
        passes(10)
        server.thaw()
        until(lambda: server.get("/api/workers"))
        (stage.folder / "go").touch()
        assert server.ended(job)["success"]
