"""client.py: a worker beside servers by script, of either version of the wire."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from websockets.protocol import State

import protocol
import server as server_module
from tests.peers import (
    ScriptedServer,
    ScriptedWorker,
)
from tests.stage import (
    Docker,
    Server,
    Stage,
    Worker,
    until,
)


def said_about(server: ScriptedServer, *jobs: int) -> list[Any]:
    return [message for message in server.received if message.job in jobs]


class TestVersion1Server:
    """Our worker against the original's server."""

    IMAGES: ClassVar = {"a": "hello-world", "missing": "missing", "oom": "oom"}

    @pytest.fixture(scope="class")
    @classmethod
    def both(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedServer, Docker]]:
        """A server and its worker, for tests whose jobs have ids of their own and that leave the two connected."""
        configs = [{"name": name, "image": image, "command": None} for name, image in cls.IMAGES.items()]
        configs.append({"name": "words", "image": "busybox", "command": "echo 'a b' c"})
        with contextlib.closing(Stage(tmp_path_factory.mktemp("both"))) as stage, ScriptedServer(*configs) as server:
            stage.worker(server)
            yield server, stage.docker

    def test_it_runs_what_it_is_told_and_says_so(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, docker = both
        server.send(protocol.Enqueue(7, "a"))
        server.wait_for(protocol.JobSuccess(7))
        assert said_about(server, 7) == [protocol.JobRunning(7), protocol.JobSuccess(7)]
        [run] = docker.ledger("run", 7)
        assert run[-2:] == ["--", "hello-world"]
        until(lambda: docker.containers() == [])

    def test_a_command_is_one_argument_whatever_it_holds(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, docker = both
        server.send(protocol.Enqueue(8, "words"))
        server.wait_for(protocol.JobFailure(8))
        assert docker.ledger("run", 8)[0][-3:] == ["--", "busybox", "echo 'a b' c"]

    @pytest.mark.parametrize(("image", "job"), [("missing", 9), ("oom", 10)], ids=["missing", "oom"])
    def test_a_job_that_fails_is_a_failure(self, both: tuple[ScriptedServer, Docker], image: str, job: int) -> None:
        server, docker = both
        server.send(protocol.Enqueue(job, image))
        server.wait_for(protocol.JobFailure(job))
        until(lambda: docker.containers() == [])

    def test_an_unknown_name_is_a_failure(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, docker = both
        server.send(protocol.Enqueue(11, "unknown"))
        server.wait_for(protocol.JobFailure(11))
        assert docker.starts(11) == 0

    def test_jobs_run_one_after_the_other(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, _ = both
        jobs = (12, 13, 14)
        for job in jobs:
            server.send(protocol.Enqueue(job, "a"))
        server.wait_for(protocol.JobSuccess(14))
        assert said_about(server, *jobs) == [
            kind(job) for job in jobs for kind in (protocol.JobRunning, protocol.JobSuccess)
        ]

    def test_text_frames_are_read_like_binary_ones(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, _ = both
        server.send(protocol.encode(protocol.Enqueue(15, "a")).decode())
        server.wait_for(protocol.JobSuccess(15))

    def test_unknown_tags_and_empty_frames_are_ignored(self, both: tuple[ScriptedServer, Docker]) -> None:
        server, _ = both
        for frame in (
            b"",
            b"\0",
            b"\3\0\0\0\1",
            b"\x10\0",
            b"\xff",
            protocol.encode(protocol.Enqueue(16, "a")) + b"zz",
        ):
            server.send(frame)
        server.wait_for(protocol.JobSuccess(16))
        assert len(server.dials) == 1

    def test_the_same_id_from_a_restarted_server_runs_again(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            for runs in (1, 2):
                server.send(protocol.Enqueue(1, "a"))
                until(lambda runs=runs: server.received.count(protocol.JobSuccess(1)) == runs)  # type: ignore[misc]
                server.hang_up()
                until(lambda runs=runs: len(server.dials) > runs)  # type: ignore[misc]
            assert stage.docker.starts() == 2

    def test_the_same_id_at_two_workers_of_a_host_runs_twice(self, stage: Stage) -> None:
        """As from two servers, or from one that was restarted while a job ran."""
        program = stage.folder / "program"
        program.write_text("#!/bin/sh\nsleep 60\n")
        program.chmod(0o755)
        with ScriptedServer({"name": "a", "image": "busybox", "command": str(program)}) as server:
            for number in (1, 2):
                stage.worker(server, name=f"worker-{number}")
                until(lambda number=number: len(server.dials) == number)  # type: ignore[misc]
                server.send(protocol.Enqueue(1, "a"))
                until(lambda number=number: stage.docker.starts(1) == number)  # type: ignore[misc]

    @pytest.mark.parametrize(
        "frame", [b"\1", b"\1[{]", b"\2\0", b"\2\0\0\0\1\x40\0\0\0\0\0\0\0hello", b"\1" + b"[" * 100_000]
    )
    def test_a_malformed_frame_ends_the_connection_but_not_the_worker(self, stage: Stage, frame: bytes) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            worker = stage.worker(server)
            server.send(frame)
            until(lambda: len(server.dials) == 2)
            until(lambda: server.peer and server.peer.state == State.OPEN)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobSuccess(1))
            assert "Traceback" not in worker.stderr

    def test_a_server_that_hangs_up_at_once_is_not_dialled_in_a_frenzy(self, stage: Stage) -> None:
        with ScriptedServer(hangs_up=True) as server:
            stage.worker(server, connects=False)
            until(lambda: len(server.dials) >= 2)
            time.sleep(3)
            assert 2 <= len(server.dials) <= 10

    def test_a_server_that_is_not_there_yet_is_waited_for(self, stage: Stage) -> None:
        server = stage.server()
        server.kill()
        worker = stage.worker(server, connects=False)
        until(lambda: worker.stderr)
        server.start()
        until(lambda: server.get("/api/workers"), 20)
        assert server.ended(server.post("quick"))["success"]


class TestVersion2Server:
    """Our worker does nothing before it is told, and forgets nothing before it may."""

    CONFIG: ClassVar = {"name": "a", "image": "busybox", "command": ["sh", "-c", "echo out; exit 3"]}

    @pytest.fixture
    def server(self) -> Iterator[ScriptedServer]:
        with ScriptedServer(
            self.CONFIG, {"name": "long", "image": "busybox", "command": "sleep 60"}, version=2
        ) as server:
            yield server

    def test_it_says_hello_first(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server, "--slots", "3", "--tag", "x", "--tag", "y")
        until(lambda: server.received)
        hello = server.received[0]
        assert (hello.name, hello.slots, hello.tags, hello.jobs) == ("worker", 3, ("x", "y"), ())

    def test_it_starts_nothing_before_go(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        time.sleep(0.3)
        assert stage.docker.ledger("run") == []
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        assert protocol.Log(5, 1, 0, b"out\n") in server.received

    def test_it_drops_what_is_settled_instead(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Settled(5, 1))
        server.send(protocol.Go(5, 1))
        server.send(protocol.Enqueue(6, "a", 1))
        server.wait_for(protocol.JobRunning(6, 1))
        assert stage.docker.ledger("run") == []

    def test_it_starts_once_when_told_twice(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server, "--slots", "2")
        for _ in range(3):
            for message in (protocol.Enqueue(5, "a", 1), protocol.Go(5, 1)):
                server.send(message)
                server.send(message)
            server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        server.send(protocol.Enqueue(5, "a", 1))
        server.send(protocol.Go(5, 1))
        time.sleep(0.2)
        assert len(stage.docker.ledger("run", 5)) == stage.docker.starts(5) == 1

    def test_it_takes_nothing_more_when_it_drains(self, server: ScriptedServer, stage: Stage) -> None:
        worker = stage.worker(server, "--slots", "2")
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        worker.signal(signal.SIGTERM)
        until(lambda: "finishing" in worker.stderr)
        server.send(protocol.Enqueue(6, "a", 1))
        time.sleep(0.3)
        assert protocol.JobRunning(6, 1) not in server.received

    def test_it_keeps_the_container_until_it_is_settled(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        time.sleep(0.2)
        assert stage.docker.containers() == [f"jobworker-{server.id}-5-1"]
        server.send(protocol.Settled(5, 1))
        until(lambda: stage.docker.containers() == [])

    def test_it_sends_a_result_again_on_the_next_connection(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        server.received.clear()
        server.hang_up()
        until(lambda: len(server.dials) == 2)
        until(lambda: server.received)
        assert server.received[0].jobs == ((5, 1, "finished"),)
        server.send(protocol.Logged(5, 1, 2))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        logs = [message for message in server.received if isinstance(message, protocol.Log)]
        assert logs == [protocol.Log(5, 1, 2, b"t\n")]

    def test_it_stops_what_it_is_told_to_stop(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        server.send(protocol.Stop(5, 1))
        until(lambda: stage.docker.ledger("end", 5))
        until(lambda: any(isinstance(message, protocol.JobFailure) for message in server.received))

    def test_it_stops_and_removes_what_is_settled_while_it_runs(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        server.send(protocol.Settled(5, 1))
        until(lambda: stage.docker.containers() == [], 15)

    def test_it_tells_a_restarted_server_what_it_holds(self, server: ScriptedServer, stage: Stage) -> None:
        worker = stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        worker.kill()
        server.received.clear()
        worker.start()
        until(lambda: server.received)
        assert server.received[0].jobs == ((5, 1, "running"),)

    def test_it_takes_another_servers_containers_for_none_of_its_business(self, stage: Stage) -> None:
        with ScriptedServer(self.CONFIG, version=2) as server:
            worker = stage.worker(server)
            server.send(protocol.Enqueue(5, "a", 1))
            server.wait_for(protocol.JobRunning(5, 1))
            server.send(protocol.Go(5, 1))
            server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
            worker.kill()
        other = stage.server()
        stage.worker(other)
        assert other.ended(other.post("quick"))["success"]
        until(lambda: stage.docker.containers() == [f"jobworker-{server.id}-5-1"])


def leaves_at_once(stage: Stage, worker: Worker, job: int) -> bool:
    """Whether a worker has exited though `docker run` blocked a thread of it, and the container runs on."""
    assert worker.exit_code() == 1
    return stage.docker.starts(job) == 1 and len(stage.docker.containers()) == 1 and not stage.docker.ledger("end", job)


class TestGivingUp:
    """A worker that gives up leaves at once; its container runs on."""

    def with_a_job(self, stage: Stage) -> tuple[Server, Worker, int]:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 1000")
        until(lambda: stage.docker.starts(job) == 1)
        return server, worker, job

    def test_one_that_is_replaced(self, stage: Stage) -> None:
        server, worker, job = self.with_a_job(stage)
        with ScriptedWorker(server, "worker", jobs=((job, 1, "running"),)):
            assert leaves_at_once(stage, worker, job)
        assert worker.said("another worker named worker connected")

    def test_one_that_the_server_refuses(self, stage: Stage) -> None:
        server, worker, job = self.with_a_job(stage)
        tokens = stage.folder / "tokens"
        tokens.write_text("worker secret-0123456789\napi other-0123456789\n")
        server.kill()
        server.command[2:2] = ["--token-file", str(tokens)]
        server.start()
        assert leaves_at_once(stage, worker, job)
        assert worker.said("refuses this worker: HTTP 401")


class TestTerminal:
    """A terminal that closes ends a worker cleanly, unless it was started to outlive it."""

    def test_its_hangup_drains(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo whole")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGHUP)
        until(lambda: worker.said("draining: taking no new job"))
        (stage.folder / "go").touch()
        assert worker.exit_code() == 0
        assert (server.job(job)["state"], server.log(job)) == ("success", b"whole\n")

    def test_one_under_nohup_stays(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server, connects=False)
        worker.stop()
        worker.command[:0] = ["nohup"]
        worker.start()
        worker.signal(signal.SIGHUP)
        assert server.ended(server.post("quick"))["success"]
        assert not worker.said("draining")


class TestSettings:
    """What a variable says counts, or is refused: it is never taken for something else."""

    @pytest.mark.parametrize(("text", "holds"), [("True", True), ("on", True), ("1", True), ("No", False), ("", False)])
    def test_hold_is_yes_or_no(self, text: str, holds: bool) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("JOBWORKER_HOLD", text)
            assert server_module.parse_options(["jobs.yaml"]).hold is holds

    @pytest.mark.parametrize(
        ("program", "arguments", "environment", "complaint"),
        [
            ("server.py", ["jobs.yaml"], {"JOBWORKER_HOLD": "maybe"}, "JOBWORKER_HOLD must be yes or no, not 'maybe'"),
            ("client.py", ["box:1"], {"JOBWORKER_ALLOW_IMAGE": ""}, "JOBWORKER_ALLOW_IMAGE names no image"),
            ("client.py", ["box:1"], {"JOBWORKER_ALLOW_IMAGE": ","}, "JOBWORKER_ALLOW_IMAGE names no image"),
            ("client.py", ["box:1", "--tag", ""], {}, "--tag: it is empty"),
        ],
    )
    def test_another_is_refused(
        self, stage: Stage, program: str, arguments: list[str], environment: dict[str, str], complaint: str
    ) -> None:
        refused = stage.run(program, *arguments, **environment)
        assert refused.returncode == 2
        assert complaint in refused.stderr


class TestPull:
    """While an image is pulled, the job's reason says so."""

    def test_it_is_the_reason_until_the_container_starts(self, stage: Stage) -> None:
        server = stage.server()
        stage.docker.allow("")
        stage.docker.offer("busybox", 1)
        stage.worker(server)
        job = server.sh("while :; do sleep 0.05; done")
        until(lambda: server.job(job)["reason"] == "pulling busybox")
        until(lambda: server.job(job)["reason"] is None)
        assert server.job(job)["state"] == "running"
        server.http("DELETE", f"/api/jobs/{job}")

    def test_who_connects_again_says_it_again(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: far}")
        stage.docker.offer("far", 2)
        stage.worker(server)
        job = server.post("a")
        until(lambda: server.job(job)["reason"] == "pulling far")
        server.kill()
        server.start()
        assert server.job(job)["reason"] == "pulling far"
        assert server.ended(job)["reason"] is None
