"""What a job comes to is what its container did, and only that, whatever command, engine or server did beside it."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import protocol
from jobworker.container import part_of, read_found, read_state
from tests.peers import ScriptedServer
from tests.stage import Stage, meanwhile, passes, until
from tests.test_client_hangs import limping

ONE = "- {name: one, image: busybox, command: [sh, -c, 'sleep 0.5; echo done'], timeout: 2s, retries: 1}\n"


# An engine's words on a container, of which the memory ran out.
OOM_TOLD = """$HERE/docker "$@" | sed 's/"OOMKilled": false/"OOMKilled": true/'; exit"""


class TestTimeout:
    """It is for what takes too long, not for what ended in time and was told of late."""

    def test_what_ended_in_time_while_its_worker_was_away(self, stage: Stage) -> None:
        server = stage.server(jobs=ONE)
        worker = stage.worker(server)
        job = server.post("one")
        until(lambda: stage.docker.starts(job) == 1)
        worker.kill()
        until(lambda: stage.docker.ledger("end", job))
        passes(2)
        worker.start()
        end = server.ended(job)
        assert (end["state"], end["attempt"], end["exit_code"], end["reason"]) == ("success", 1, 0, None)
        assert stage.docker.starts(job) == 1

    def test_what_ended_in_time_while_its_command_hung(self, stage: Stage) -> None:
        server = stage.server(jobs=ONE)
        stage.worker(server)
        job = server.post("one")
        until(lambda: stage.docker.starts(job) == 1)
        [command] = stage.docker.clients(job)
        os.kill(command, signal.SIGSTOP)
        until(lambda: stage.docker.ledger("end", job))
        passes(3)
        os.kill(command, signal.SIGCONT)
        end = server.ended(job)
        assert (end["state"], end["attempt"], end["exit_code"], end["reason"]) == ("success", 1, 0, None)

    @meanwhile
    def test_one_that_can_not_be_looked_at_is_stopped(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: one, image: busybox, command: [sleep, '600'], timeout: 2s}\n")
        stage.worker(server)
        job = server.post("one")
        until(lambda: stage.docker.starts(job) == 1)
        [name] = stage.docker.containers()
        mute = stage.docker.folder / f"mute-{name}"
        mute.touch()
        until(lambda: stage.docker.ledger("end", job), 50)
        mute.unlink()
        assert server.ended(job)["reason"] == "timeout"

    def test_a_pull_between_two_tries_has_a_limit_of_its_own(self, stage: Stage) -> None:
        server = stage.server(jobs=ONE)
        stage.worker(server)
        assert server.ended(server.post("one"))["success"]
        stage.docker.allow("hello-world")  # the image that was here at the last job was removed
        stage.docker.offer("busybox", 4)
        end = server.ended(server.post("one"), 20)
        assert (end["state"], end["reason"], end["attempt"]) == ("success", None, 1)


class TestLetGo:
    """A container that is only about to be created never starts once its server has let go of it."""

    @pytest.mark.parametrize("drains", [False, True], ids=["goes on", "drains"])
    def test_it_does_not_start_later(self, stage: Stage, drains: bool) -> None:
        with ScriptedServer({"name": "one", "image": "busybox", "command": ["sleep", "60"]}, version=2) as server:
            worker = stage.worker(server)
            stage.docker.delay("run", 3)
            server.send(protocol.Enqueue(1, "one", 1, {}))
            server.wait_for(protocol.JobRunning(1, 1))
            server.send(protocol.Go(1, 1))
            until(lambda: stage.docker.calls("run"))
            server.send(protocol.Settled(1, 1))
            if drains:
                worker.signal(signal.SIGTERM)
                assert worker.exit_code() == 0
            passes(4)
            assert stage.docker.starts() == 0
            assert stage.docker.containers() == []


class TestRunAgain:
    """Only where docker's own words say that the image was not there, and nothing else was written."""

    def test_a_job_that_exits_125_while_its_image_goes(self, stage: Stage) -> None:
        go = stage.folder / "go"
        wait = f"echo precious; while [ ! -e {go} ]; do sleep 0.05; done; exit 125"
        server = stage.server(jobs=f"- {{name: one, image: busybox, command: [sh, -c, '{wait}']}}\n")
        stage.worker(server)
        job = server.post("one")
        until(lambda: stage.docker.starts(job) == 1)
        stage.docker.allow("hello-world")
        stage.docker.offer("busybox")
        go.touch()
        end = server.ended(job)
        assert (end["exit_code"], server.log(job)) == (125, b"precious\n")
        assert len(stage.docker.clients(job)) == 1

    def test_a_job_whose_engine_comes_back_empty(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: one, image: busybox, command: [sh, -c, 'echo begun; sleep 1000']}\n")
        stage.worker(server)
        job = server.post("one")
        until(lambda: server.log(job) == b"begun\n")
        down, [name], container = stage.docker.folder / "down", stage.docker.containers(), stage.docker.pid(job)
        down.touch()
        stage.docker.allow("hello-world")
        stage.docker.offer("busybox")
        parent = re.findall(r"PPid:\t(\d+)", Path(f"/proc/{container}/status").read_text())
        os.kill(int(parent[0]), signal.SIGKILL)
        os.killpg(container, signal.SIGKILL)
        (stage.docker.folder / "containers" / name).rename(stage.docker.folder / "lost")
        down.unlink()
        assert server.ended(job)["state"] == "failure"
        assert stage.docker.starts(job) == 1

    def test_an_image_that_a_pull_does_not_bring_is_an_end(self, stage: Stage) -> None:
        """The engine takes it away again before each start."""
        server = stage.server()
        stage.docker.offer("busybox")
        stage.worker(server, *limping(stage, "[ $1 = run ] && echo hello-world >$HERE/images"))
        end = server.ended(server.sh("true"))
        assert (end["state"], end["reason"]) == ("failure", "image")


class TestOddAnswers:
    def test_an_exit_code_that_the_wire_has_no_room_for(self, stage: Stage) -> None:
        """As Windows' containers have them."""
        server = stage.server()
        edit = f's/"ExitCode": 58/"ExitCode": {0xC000013A}/'
        stage.worker(server, *limping(stage, f"[ $1 = inspect ] && {{ $HERE/docker \"$@\" | sed '{edit}'; exit; }}"))
        end = server.ended(server.sh("exit 58"))
        assert (end["state"], end["exit_code"], end["reason"]) == ("failure", None, "docker")
        assert server.ended(server.post("quick"))["success"]

    @meanwhile
    def test_a_job_that_outlives_one_of_its_own_that_ran_out_of_memory_is_a_success(self, stage: Stage) -> None:
        """Also where its exit code comes from the engine, not from the command."""
        server, go = stage.server(), stage.folder / "go"
        worker = stage.worker(server, *limping(stage, f"[ $1 = inspect ] && {{ {OOM_TOLD}; }}"))
        job = server.sh(f"while [ ! -e {go} ]; do sleep 0.05; done")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        go.touch()
        end = server.ended(job)
        assert (end["state"], end["exit_code"], end["reason"]) == ("success", 0, None)
        end = server.ended(server.sh("exit 7"))
        assert (end["state"], end["exit_code"], end["reason"]) == ("failure", 7, "oom")

    def test_an_engine_that_learns_late_of_it_is_asked_again(self, stage: Stage) -> None:
        server, late = stage.server(), stage.folder / "late"
        stage.worker(server, *limping(stage, f"[ $1 = inspect ] && [ -e {late} ] && {{ {OOM_TOLD}; }}"))
        asked = len(stage.docker.calls("inspect"))
        job = server.sh("exit 137")
        until(lambda: len(stage.docker.calls("inspect")) > asked + 2)
        late.touch()
        end = server.ended(job)
        assert (end["exit_code"], end["reason"]) == (137, "oom")

    @meanwhile
    def test_what_is_on_disk_of_a_log_that_can_not_be_read_again_stays(self, stage: Stage) -> None:
        """As with `--log-driver=none`."""
        refuses = "echo 'Error response from daemon: configured logging driver does not support reading' >&2; exit 1"
        server, go = stage.server(), stage.folder / "go"
        worker = stage.worker(server, "--slots", "2", *limping(stage, f"[ $1 = logs ] && {{ {refuses}; }}"))
        wait = f"while [ ! -e {go} ]; do sleep 0.05; done; echo late"
        first, second = server.sh(f"echo early; {wait}"), server.sh(f"echo early; {wait}")
        until(lambda: server.log(first) == server.log(second) == b"early\n")
        [command] = stage.docker.clients(second)
        os.kill(command, signal.SIGKILL)
        until(lambda: stage.docker.calls("wait"))
        worker.kill()
        worker.start()
        until(lambda: len(stage.docker.calls("wait")) > 2)
        go.touch()
        for job in (first, second):
            assert server.ended(job)["success"]
            assert server.log(job) == b"early\n"

    def test_half_a_state_as_the_first_one_is_asked_for_again(self, stage: Stage) -> None:
        server, go, spoilt = stage.server(), stage.folder / "go", stage.folder / "spoilt"
        first = f"[ $1 = inspect ] && [ -e {spoilt} ] && rm {spoilt} && echo '[{{' && exit 0"
        stage.worker(server, *limping(stage, first))
        job = server.sh(f"echo early; until [ -e {go} ]; do sleep 0.02; done; echo late")
        until(lambda: server.log(job) == b"early\n")
        spoilt.touch()
        [command] = stage.docker.clients(job)
        os.kill(command, signal.SIGKILL)
        until(lambda: not spoilt.exists())
        go.touch()
        assert server.ended(job)["success"]
        assert server.log(job) == b"early\nlate\n"

    def test_a_container_that_somebody_removes_is_said_to_be_gone(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh("echo begun; sleep 600")
        until(lambda: server.log(job) == b"begun\n")
        subprocess.run([stage.docker.folder / "docker", "rm", "--force", *stage.docker.containers()], check=True)
        end = server.ended(job)
        assert (end["state"], end["exit_code"], end["reason"]) == ("failure", 137, "exit")
        assert server.log(job) == b"begun\njobworker: its container is gone: somebody removed it\n"

    @pytest.mark.parametrize("key", ["timeout", "stop_grace_period", "pull_timeout"])
    @pytest.mark.parametrize("seconds", ["1e999", "-1", "1" + "0" * 400, "2147483648"], ids=lambda text: text[:10])
    def test_a_duration_that_no_timer_takes_is_refused(self, key: str, seconds: str) -> None:
        frame = f'\1[{{"name": "one", "image": "busybox", "{key}": {seconds}}}]'.encode()
        with pytest.raises(protocol.ProtocolError, match=key):
            list(protocol.decode_from_server(frame, 2))

    @pytest.mark.parametrize("code", [True, 2**31, -(2**31), 1.0, "0", None])
    def test_what_is_no_exit_code_is_no_success(self, code: object) -> None:
        assert read_state({"Status": "exited", "ExitCode": code}) == (None, "docker")

    def test_parts_that_are_no_objects_are_none(self) -> None:
        assert part_of({"State": "running"}, "State") == {}
        assert read_found({"State": "running", "Config": {"Labels": ["a=b"]}, "Name": "/x"}) is None

    def test_words_of_a_job_are_not_the_log_drivers(self, stage: Stage) -> None:
        server, go = stage.server(), stage.folder / "go"
        worker = stage.worker(server)
        words = "error: configured logging driver does not support reading"
        job = server.sh(f"echo one; while [ ! -e {go} ]; do sleep 0.05; done; echo {words}; echo two")
        until(lambda: server.log(job) == b"one\n")
        worker.kill()
        worker.start()
        until(lambda: stage.docker.calls("logs"))
        go.touch()
        assert server.ended(job)["success"]
        assert server.log(job) == f"one\n{words}\ntwo\n".encode()

    @pytest.mark.parametrize("target", ["ws://[", "ws://127.0.0.1:99999/", f"ws://{'a' * 70}.example/"])
    def test_a_redirection_to_what_is_no_address_is_said_and_tried_again(self, stage: Stage, target: str) -> None:
        with elsewhere(target) as server:
            worker = stage.worker(server, connects=False)
            until(lambda: server.asked > 1)
            assert worker.said("its answer can't be followed")
            assert worker.process.poll() is None


class Elsewhere(http.server.ThreadingHTTPServer):
    """A server that sends all who come to another place; those who hang up on it are only logged."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Redirect)
        self.target, self.port, self.asked = target, self.server_port, 0


class Redirect(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Elsewhere

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(302)
        self.send_header("Location", self.server.target)
        self.send_header("Connection", "close")
        self.end_headers()


@contextlib.contextmanager
def elsewhere(target: str) -> Iterator[Elsewhere]:
    with Elsewhere(target) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
