"""client.py beside an engine that refuses, hangs, is away, or won't remove: promises 2 to 7 hold."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import client
import protocol
from jobworker.cleaner import GATHER_SECONDS
from jobworker.container import NotStarted
from tests.peers import ScriptedServer, StallingRelay
from tests.stage import ROOT, Program, Server, Stage, Worker, meanwhile, passes, until

DENIED = "permission denied while trying to connect to the Docker daemon socket"
LONG = "echo early; while [ ! -e {} ]; do sleep 0.05; done; echo late"


def refuse(stage: Stage, text: str = DENIED) -> Path:
    """Let the engine say this to everything; the file whose removal ends it."""
    path = stage.docker.folder / "refuse"
    path.write_text(text)
    return path


def by_path(stage: Stage) -> tuple[str, str]:
    """The stand-in named by its path: where that is away, no other docker on PATH is taken instead."""
    return "--docker", str(stage.docker.folder / "docker")


def is_gone(docker: Path) -> Path:
    """Let the docker command be away, as in an upgrade."""
    return docker.rename(docker.with_name("away"))


class WithAJob:
    """A job that runs until `end` says so."""

    @staticmethod
    def begin(stage: Stage, *arguments: str) -> tuple[Server, Worker, int]:
        server = stage.server()
        worker = stage.worker(server, *arguments)
        job = server.sh(LONG.format(stage.folder / "go"))
        until(lambda: stage.docker.starts(job))
        return server, worker, job

    @staticmethod
    def end(stage: Stage, server: Server, job: int, seconds: float = 20) -> None:
        (stage.folder / "go").touch()
        assert server.ended(job, seconds)["success"]
        assert server.log(job) == b"early\nlate\n"
        assert stage.docker.starts(job) == 1
        until(lambda: stage.docker.containers() == [])


class TestNoAnswer(WithAJob):
    """No answer is never "there is none"."""

    @pytest.mark.parametrize("words", [DENIED, 'context "remote" not found', "template parsing error"])
    def test_a_worker_that_may_not_ask_says_no_hello(self, stage: Stage, words: str) -> None:
        server, worker, job = self.begin(stage)
        worker.kill()
        refusal = refuse(stage, words)
        Program.start(worker)  # it does not connect yet
        until(lambda: worker.said("docker ps did not get an answer"))
        time.sleep(0.5)
        assert server.job(job)["state"] == "running"
        refusal.unlink()
        self.end(stage, server, job)

    def test_a_state_that_can_not_be_had_is_asked_for_again(self, stage: Stage) -> None:
        server, worker, job = self.begin(stage)
        refusal = refuse(stage)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: worker.said("docker inspect did not get an answer"))
        refusal.unlink()
        self.end(stage, server, job)

    @meanwhile
    def test_what_has_started_is_waited_for_as_long_as_it_takes(self, stage: Stage) -> None:
        server, worker, job = TestNoAnswer.begin(stage)
        down = stage.docker.folder / "down"
        down.touch()
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: worker.said("docker inspect did not get an answer"))
        time.sleep(35)
        assert server.job(job)["state"] == "running"
        down.unlink()
        TestNoAnswer.end(stage, server, job, 40)


class TestHangingCommands(WithAJob):
    """Every short command has a deadline, and only the container that it is about waits."""

    @meanwhile
    def test_one_that_asks_for_a_state_is_killed_and_asked_again(self, stage: Stage) -> None:
        server, worker, job = TestHangingCommands.begin(stage)
        stage.docker.delay("inspect", 1000)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: stage.docker.calls("inspect"))
        stage.docker.delay("inspect", 0)
        assert server.http("DELETE", f"/api/jobs/{job}").status == 200
        assert server.ended(job, 60)["state"] == "cancelled"
        assert worker.said("took more than 30 s")
        until(lambda: stage.docker.containers() == [])

    @meanwhile
    def test_one_that_stops_is_killed_and_said_again(self, stage: Stage) -> None:
        server, _worker, job = TestHangingCommands.begin(stage)
        stage.docker.delay("stop", 1000)
        server.http("DELETE", f"/api/jobs/{job}")
        until(lambda: stage.docker.calls("stop"))
        stage.docker.delay("stop", 0)
        assert server.ended(job, 80)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])

    @meanwhile
    def test_a_run_whose_container_has_ended_is_ended(self, stage: Stage) -> None:
        server, worker, job = TestHangingCommands.begin(stage)
        [client] = stage.docker.clients(job)
        os.kill(client, signal.SIGSTOP)
        TestHangingCommands.end(stage, server, job, 100)
        assert worker.said("its docker command has not")

    @meanwhile
    def test_so_is_one_that_reads_the_log(self, stage: Stage) -> None:
        server, worker, job = TestHangingCommands.begin(stage)
        worker.kill()
        worker.start()
        until(lambda: stage.docker.calls("logs"))
        [reader] = stage.docker.calls("logs")
        os.kill(reader, signal.SIGSTOP)
        TestHangingCommands.end(stage, server, job, 100)

    @meanwhile
    def test_one_that_removes_holds_up_no_other(self, stage: Stage) -> None:
        server, _worker, job = TestHangingCommands.begin(stage)
        [name] = stage.docker.containers()
        (stage.docker.folder / f"hang-{name}").touch()
        (stage.folder / "go").touch()
        server.ended(job)
        until(lambda: stage.docker.calls("rm"))
        for _ in range(3):
            server.ended(server.post("quick"))
        until(lambda: stage.docker.containers() == [name])
        (stage.docker.folder / f"hang-{name}").unlink()
        until(lambda: stage.docker.containers() == [], 50)


class TestNoCommand(WithAJob):
    """The docker command can't be started for a moment."""

    def test_its_job_is_stopped_all_the_same(self, stage: Stage) -> None:
        server, worker, job = self.begin(stage, *by_path(stage))
        docker = stage.docker.folder / "docker"
        away = is_gone(docker)
        server.http("DELETE", f"/api/jobs/{job}")
        until(lambda: worker.said("docker stop did not work"))
        away.rename(docker)
        assert server.ended(job)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])

    def test_a_removal_does_not_end_the_worker(self, stage: Stage) -> None:
        server, worker, job = self.begin(stage, *by_path(stage))
        docker = stage.docker.folder / "docker"
        away = is_gone(docker)
        (stage.folder / "go").touch()
        assert server.ended(job)["success"]
        until(lambda: worker.said("can't remove jobworker-"))
        away.rename(docker)
        until(lambda: stage.docker.containers() == [])
        assert worker.process.poll() is None

    def test_an_adopted_job_goes_on(self, stage: Stage) -> None:
        server, worker, job = self.begin(stage, *by_path(stage))
        docker = stage.docker.folder / "docker"
        worker.kill()
        stage.docker.delay("inspect", 0.3)
        worker.start()
        away = is_gone(docker)
        until(lambda: worker.said("docker (inspect|logs) (did not get|could not be started)"))
        away.rename(docker)
        stage.docker.delay("inspect", 0)
        self.end(stage, server, job)

    def test_a_job_starts_when_it_is_there_again(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server, *by_path(stage))
        server.ended(server.post("quick"))
        until(lambda: stage.docker.containers() == [])
        docker = stage.docker.folder / "docker"
        away = is_gone(docker)
        job = server.post("quick")
        until(lambda: server.job(job)["state"] == "running")
        time.sleep(0.5)
        away.rename(docker)
        assert server.ended(job)["success"]
        assert worker.process.poll() is None

    def test_a_job_that_waits_for_it_is_cancelled_at_once(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, *by_path(stage))
        server.ended(server.post("quick"))
        until(lambda: stage.docker.containers() == [])
        is_gone(stage.docker.folder / "docker")
        job = server.post("quick")
        until(lambda: server.job(job)["state"] == "running")
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job)["state"] == "cancelled"
        assert stage.docker.starts(job) == 0

    def test_commands_that_can_not_be_looked_for_do_not_end_the_worker(self) -> None:
        """To look into /proc takes a descriptor, too."""
        options = argparse.Namespace(docker="docker", uri="ws://nowhere/runner", token=None)

        async def look() -> None:
            world = client.real_world(options)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                with pytest.raises(NotStarted):
                    await world.end_commands([{"no such word"}])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        asyncio.run(look())


class TestRemoval:
    """What went is gone, many in one call; what failed waits longer each time, by itself."""

    def test_while_jobs_run_those_that_ended_are_removed_together(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "2")
        long = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.05; done")
        began = time.monotonic()
        for _ in range(40):
            server.ended(server.post("quick"))
        until(lambda: len(stage.docker.containers()) == 1)
        assert len(stage.docker.calls("rm")) <= 1 + (time.monotonic() - began) / GATHER_SECONDS
        (stage.folder / "go").touch()
        server.ended(long)
        until(lambda: stage.docker.containers() == [])

    def test_one_that_is_busy_holds_up_no_other_and_is_said_once(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server, "--slots", "2")
        first = server.sh("sleep 0.5")
        until(lambda: stage.docker.starts(first))
        [name] = stage.docker.containers()
        busy = stage.docker.folder / f"busy-{name}"
        busy.touch()
        server.ended(first)
        until(lambda: worker.said("device or resource busy"))
        for _ in range(5):
            server.ended(server.post("quick"))
        until(lambda: stage.docker.containers() == [name])
        time.sleep(3)
        assert worker.stderr.count("device or resource busy") == 1
        assert len(stage.docker.calls("rm")) <= 5 + 4
        busy.unlink()
        until(lambda: stage.docker.containers() == [], 20)


class TestLogReadAgain(WithAJob):
    """What the docker command says on its own never takes the place of a job's bytes."""

    def test_an_image_that_was_removed_between_two_jobs(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: busybox, command: [echo, a line of the job itself]}")
        stage.worker(server)
        server.ended(server.post("a"))
        stage.docker.allow("")
        stage.docker.offer("busybox")
        stage.docker.delay("image inspect", 1)
        job = server.post("a")
        until(lambda: b"No such image" in server.log(job))
        assert server.ended(job)["success"]
        assert server.log(job) == b"a line of the job itself\n"

    def test_a_worker_that_comes_back_twice(self, stage: Stage) -> None:
        server, worker, job = self.begin(stage)
        for _ in range(2):
            until(lambda: server.log(job) == b"early\n")
            worker.kill()
            worker.start()
        server.kill()
        server.start()
        self.end(stage, server, job)

    def test_an_older_server_is_not_told(self, stage: Stage) -> None:
        config = {"name": "a", "image": "busybox", "command": ["sh", "-c", LONG.format(stage.folder / "go")]}
        with ScriptedServer(config, version=2) as server:
            worker = stage.worker(server)
            server.send(protocol.Enqueue(5, "a", 1))
            server.wait_for(protocol.JobRunning(5, 1))
            server.send(protocol.Go(5, 1))
            server.wait_for(protocol.Log(5, 1, 0, b"early\n"))
            worker.kill()
            server.received.clear()
            worker.start()
            server.send(protocol.Logged(5, 1, 6))
            (stage.folder / "go").touch()
            server.wait_for(protocol.JobSuccess(5, 1, 0))
            logged = [message for message in server.received if isinstance(message, protocol.Log)]
            assert logged[-1].offset + len(logged[-1].data) == len(b"early\nlate\n")
            assert not any(isinstance(message, protocol.ReadAgain) for message in server.received)


class TestChattyJobs:
    """A job that writes all the time leaves the others their share of the connection."""

    def test_they_hold_up_no_others_log(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "3")
        chatty = [server.sh("while :; do echo chatty; sleep 0.001; done") for _ in range(2)]
        for job in chatty:
            until(lambda job=job: server.log(job))  # type: ignore[misc]
        quiet = server.sh("echo quiet; sleep 60")
        until(lambda: server.log(quiet) == b"quiet\n")


class TestVersion1Server:
    """What was sent on an earlier connection is neither started nor reported on a later one."""

    def test_of_two_jobs_with_one_name_the_first_counts(self, stage: Stage) -> None:
        configs: list[dict[str, Any]] = [
            {"name": "a", "image": image, "command": None} for image in ("hello-world", "missing")
        ]
        with ScriptedServer(*configs) as server:
            stage.worker(server)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobSuccess(1))

    def test_a_result_of_an_earlier_connection_is_not_reported(self, stage: Stage) -> None:
        command = f"{stage.folder}/script"
        Path(command).write_text(f"#!/bin/sh\n{LONG.format(stage.folder / 'go')}\n")
        Path(command).chmod(0o755)
        configs: list[dict[str, Any]] = [
            {"name": "long", "image": "busybox", "command": command},
            {"name": "a", "image": "hello-world", "command": None},
        ]
        with ScriptedServer(*configs) as server:
            stage.worker(server)
            server.send(protocol.Enqueue(1, "long"))
            server.send(protocol.Enqueue(2, "a"))
            until(lambda: stage.docker.starts(1))
            first = server.peer
            server.hang_up()
            until(lambda: server.peer is not first)
            server.received.clear()
            server.send(protocol.Enqueue(3, "a"))
            passes(GATHER_SECONDS + 1)  # were the first not wanted, it would be gone
            assert stage.docker.starts(3) == 0
            (stage.folder / "go").touch()
            server.wait_for(protocol.JobSuccess(3))
            assert server.received == [protocol.JobRunning(3), protocol.JobSuccess(3)]
            assert (stage.docker.starts(1), stage.docker.starts(2)) == (1, 0)
            assert stage.docker.ledger("end", 1)[0][1] == "0"
            until(lambda: stage.docker.containers() == [])

    def test_a_thousand_names_it_does_not_have_are_answered_while_its_slot_is_busy(self, stage: Stage) -> None:
        program, go = stage.folder / "script", stage.folder / "go"
        program.write_text(f"#!/bin/sh\n{LONG.format(go)}\n")
        program.chmod(0o755)
        with ScriptedServer({"name": "long", "image": "busybox", "command": str(program)}) as server:
            worker = stage.worker(server)
            server.send(protocol.Enqueue(1, "long"))
            until(lambda: stage.docker.starts(1))
            for job in range(2, 1_002):
                server.send(protocol.Enqueue(job, f"unknown-{job}"))
            server.send(protocol.Enqueue(1_002, "long"))
            go.touch()
            server.wait_for(protocol.JobSuccess(1_002))
            ended = [each.job for each in server.received if isinstance(each, protocol.JobFailure)]
            assert ended == list(range(2, 1_002))
            assert "internal error" not in worker.stderr
            assert "Traceback" not in worker.stderr

    def test_a_drained_worker_leaves_though_its_server_is_gone(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            worker = stage.worker(server)
            stage.docker.delay("run", 2)
            for job in (1, 2):
                server.send(protocol.Enqueue(job, "a"))
            until(lambda: stage.docker.calls("run"))
            server.server.shutdown()
            server.hang_up()
        until(lambda: stage.docker.ledger("end", 1))
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert stage.docker.containers() == []
        assert not stage.docker.starts(2)


class TestStalledLink:
    """A link on which nothing goes on is left, though a ping waits behind what is written."""

    @meanwhile
    def test_a_worker_dials_anew_and_its_job_goes_on(self, stage: Stage) -> None:
        server, go = stage.server("--grace", "60s"), stage.folder / "go"
        with StallingRelay(server) as relay:
            stage.worker(relay)
            until(lambda: server.knows("worker"))
            job = server.sh(f"while [ ! -e {go} ]; do echo {'x' * 9_000}; sleep 0.01; done")
            until(lambda: server.job(job)["log_bytes"] > 50_000)
            relay.stalled, dials = set(relay.pairs), relay.dials
            until(lambda: relay.dials > dials, 60)
            until(lambda: server.knows("worker"), 30)
            go.touch()
            assert server.ended(job, 60)["success"]
            relay.stalled.clear()


class TestLimits:
    """What the worker needs of its host."""

    def test_it_takes_as_many_files_as_it_may(self, stage: Stage) -> None:
        server = stage.server()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))  # which a worker is started with
        try:
            worker = stage.worker(server)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)

    @pytest.mark.parametrize("trap", ["link", "link to nowhere", "file", "open", "another's"])
    def test_a_folder_for_locks_that_others_can_write_to_is_refused(self, tmp_path: Path, trap: str) -> None:
        folder = tmp_path / f"jobworker-{os.getuid()}"
        if trap == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to("elsewhere")
        elif trap == "link to nowhere":
            folder.symlink_to("nowhere")
        elif trap == "file":
            folder.touch()
        elif trap == "open":
            folder.mkdir()
            folder.chmod(0o777)
        elif os.getuid() == 0:
            folder.mkdir(mode=0o700)
            os.chown(folder, 65534, -1)
        else:
            pytest.skip("only root can make a folder another's")
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        command = [sys.executable, str(ROOT / "client.py"), "--docker", "true", "localhost:1/runner"]
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=10)
        assert ended.returncode == 2
        assert "set TMPDIR" in ended.stderr

    def test_the_folder_for_locks_has_a_lock_while_it_is_in_use(self, stage: Stage) -> None:
        """Else systemd deletes what is old there, locks that are held included."""
        stage.worker(stage.server())
        folder = os.open(stage.folder / f"jobworker-{os.getuid()}", os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(folder)

    def test_a_name_of_the_longest_has_a_lock_and_a_worker(self, stage: Stage) -> None:
        server, name = stage.server(), "ж" * 128
        stage.worker(server, name=name)
        second = stage.run("client.py", "--docker", "true", "--name", name, "localhost:1", TMPDIR=str(stage.folder))
        assert second.returncode == 2
        assert "runs on this host already" in second.stderr

    def test_a_link_in_the_place_of_a_lock_is_not_followed(self, tmp_path: Path) -> None:
        folder = tmp_path / f"jobworker-{os.getuid()}"
        folder.mkdir(mode=0o700)
        (folder / "a.lock").symlink_to(tmp_path / "made")
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        command = [sys.executable, str(ROOT / "client.py"), "--docker", "true", "--name", "a", "localhost:1/runner"]
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=10)
        assert ended.returncode == 2
        assert not (tmp_path / "made").exists()
        assert "Traceback" not in ended.stderr
