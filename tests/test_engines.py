"""What a worker asks of an engine, of Docker and of podman alike: pulls, ends, output, environment, what is left."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.engines import Engine
from tests.stage import JOBS, Server, Stage, Worker, until

MORE = """
- name: slow
  image: busybox
  command: [sh, -c, "trap '' TERM; while :; do sleep 0.1; done"]
  timeout: 0.5
  stop_grace_period: 1
- {name: far, image: "%s/far:1", command: [echo, from afar]}
- {name: nowhere, image: "%s/nowhere:1"}
- {name: tell, image: busybox, command: [sh, -c, 'printf "%%s" "$VALUE"'], parameters: {VALUE: {}}}
"""


class Host(NamedTuple):
    """A server, and a worker on a real engine that can pull."""

    server: Server
    worker: Worker
    engine: Engine
    registry: str

    def offer(self) -> str:
        """Have the image of the job `far` in the registry, and here; give its name."""
        image = f"{self.registry}/far:1"
        self.engine("tag", "busybox", image)
        self.engine("push", image)
        return image


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, engine: Engine, registry: str) -> Iterator[Host]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("host"))) as stage:
        server = stage.server(jobs=JOBS + MORE % (registry, registry))
        options = "--slots=4", f"--docker={engine.name}"
        worker = stage.worker(server, *options, name=f"host-{os.getpid()}", PATH=os.environ["PATH"])
        yield Host(server, worker, engine, registry)
        until(lambda: not engine.containers(server), 20)


class TestPull:
    """An image that is not here is pulled, once for all that wait for it."""

    def test_a_missing_one_is_pulled(self, host: Host) -> None:
        image = host.offer()
        host.engine("rmi", image)
        jobs = [host.server.ended(job, 60) for job in [host.server.post("far") for _ in range(3)]]
        assert [job["state"] for job in jobs] == ["success"] * 3
        assert {host.server.log(job["id"]) for job in jobs} == {b"from afar\n"}
        host.engine("rmi", "--force", image)

    def test_one_that_nobody_has_is_a_failure_that_says_so(self, host: Host) -> None:
        job = host.server.ended(host.server.post("nowhere"), 60)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")
        assert b"nowhere" in host.server.log(job["id"])

    def test_one_that_was_removed_since_the_last_job_is_pulled_again(self, host: Host) -> None:
        image = host.offer()
        assert host.server.ended(host.server.post("far"), 60)["success"]
        until(lambda: not host.engine.containers(host.server))
        host.engine("rmi", "--force", image)
        job = host.server.ended(host.server.post("far"), 60)
        assert job["success"], host.server.log(job["id"])
        assert host.server.log(job["id"]) == b"from afar\n"


class TestEnds:
    """How a job ends is told as it is, and its container is gone."""

    def test_past_its_timeout(self, host: Host) -> None:
        job = host.server.ended(host.server.post("slow"), 30)
        assert (job["state"], job["reason"]) == ("failure", "timeout")
        until(lambda: not host.engine.containers(host.server, job["id"]))

    def test_by_a_signal(self, host: Host) -> None:
        job = host.server.ended(host.server.sh("sh -c 'kill -TERM $$'; exit $?"), 30)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", 143, "exit")

    def test_a_container_that_somebody_removed(self, host: Host) -> None:
        job = host.server.sh("while :; do sleep 0.1; done")
        [name] = until(lambda: host.engine.containers(host.server, job))
        until(lambda: host.server.job(job)["state"] == "running")
        host.engine("rm", "--force", name)
        assert host.server.ended(job, 60)["state"] == "failure"


class TestRemoval:
    """What went is gone, in whatever company it was removed."""

    def test_beside_a_job_that_never_had_a_container(self, host: Host) -> None:
        jobs = [host.server.sh("true"), host.server.post("nowhere"), host.server.sh("true")]
        assert [host.server.ended(job, 60)["state"] for job in jobs] == ["success", "failure", "success"]
        until(lambda: not host.engine.containers(host.server))


class TestOutput:
    """All that a job writes is in its log, in order."""

    LINES = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done"

    def test_of_one_stream(self, host: Host) -> None:
        job = host.server.sh(self.LINES)
        assert host.server.ended(job, 60)["success"]
        assert host.server.log(job) == b"".join(b"line %d\n" % n for n in range(1, 3001))

    def test_over_the_death_of_worker_and_command(self, host: Host) -> None:
        job = host.server.sh(f"{self.LINES}; sleep 2; echo end; exit 3")
        until(lambda: b"line 3000" in host.server.log(job))
        [name] = host.engine.containers(host.server, job)
        os.kill(host.engine.client(name), signal.SIGKILL)
        host.worker.kill()
        host.worker.start()
        assert host.server.ended(job, 60)["exit_code"] == 3
        assert host.server.log(job) == b"".join(b"line %d\n" % n for n in range(1, 3001)) + b"end\n"

    def test_of_one_that_ended_while_no_worker_was_there(self, host: Host) -> None:
        job = host.server.sh("sleep 1; echo late; exit 4")
        until(lambda: host.server.job(job)["state"] == "running")
        [name] = until(lambda: host.engine.containers(host.server, job))
        host.worker.kill()
        host.engine("wait", name)
        host.worker.start()
        assert host.server.ended(job, 60)["exit_code"] == 4
        assert host.server.log(job) == b"late\n"


class TestEnvironment:
    """A value arrives as it was sent."""

    @pytest.mark.parametrize("value", ["plain", "", "two\nlines\n", " a  b=c # ' \" $X ", "é 日本 🎉"])
    def test_byte_for_byte(self, host: Host, value: str) -> None:
        job = host.server.post("tell", environment={"VALUE": value})
        assert host.server.ended(job, 30)["success"]
        assert host.server.log(job) == value.encode()


def test_a_worker_whose_engine_is_not_there_says_so(stage: Stage, tmp_path: Path, engine: Engine) -> None:
    """No answer is never "there is none": it says no Hello, and goes on asking."""
    server = stage.server("--hold")
    command = tmp_path / f"{engine.name}-without-an-engine"
    command.write_text(f'#!/bin/sh\nexec {engine.name} --no-such-flag "$@"\n')
    command.chmod(0o755)
    worker = stage.worker(server, f"--docker={command}", connects=False, PATH=os.environ["PATH"])
    until(lambda: worker.said("ps did not get an answer; trying again: .*no-such-flag"))
    assert server.get("/api/workers") == []
