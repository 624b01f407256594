"""client.py beside an engine whose commands hang, end too early or say half a word: promises 2 to 6 hold."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import protocol
from tests.peers import ScriptedServer
from tests.stage import JOBS, Program, Server, Stage, Worker, meanwhile, until, until_file

LONG = "echo early; while [ ! -e {} ]; do sleep 0.05; done; echo late"


def limping(stage: Stage, first: str) -> tuple[str, str]:
    """Have a docker that does this first, in shell; HERE is the folder of the stand-in."""
    script = stage.docker.folder / "limping"
    script.write_text(f'#!/bin/sh\nHERE={stage.docker.folder}\n{first}\nexec $HERE/docker "$@"\n')
    script.chmod(0o755)
    return "--docker", str(script)


def adopt(stage: Stage, first: str) -> tuple[Server, Worker, int, Path]:
    """Have a job run whose worker was killed; another, with a docker that limps, is to be started."""
    server, go = stage.server("--grace", "300"), stage.folder / "go"
    worker = stage.worker(server, *limping(stage, first))
    job = server.sh(LONG.format(go))
    until(lambda: stage.docker.starts(job))
    worker.kill()
    return server, worker, job, go


class TestNothingIsSweptBeforeItIsHeld:
    @meanwhile
    def test_an_engine_that_comes_back_as_the_worker_sweeps(self, stage: Stage) -> None:
        server, go = stage.server("--grace", "300"), stage.folder / "go"
        worker = stage.worker(server, "--slots", "2")
        runs, ends = server.sh(LONG.format(go)), server.sh(f"while [ ! -e {go}2 ]; do sleep 0.05; done; echo result")
        until(lambda: stage.docker.starts(runs) and stage.docker.starts(ends))
        worker.kill()
        (stage.folder / "go2").touch()
        until(lambda: stage.docker.ledger("end", ends))
        # The worker's recovery takes longer than the half minute after which it sweeps for the first time.
        calls = {verb: len(stage.docker.calls(verb)) for verb in ("ps", "inspect")}
        for verb, seconds in (("ps", 28), ("inspect", 4)):
            stage.docker.delay(verb, seconds)
        Program.start(worker)
        for verb, before in calls.items():
            until(lambda verb=verb, before=before: len(stage.docker.calls(verb)) > before, 50)  # type: ignore[misc]
            stage.docker.delay(verb, 0)
        until(lambda: server.knows("worker"), 60)
        go.touch()
        assert server.ended(runs, 60)["success"]
        assert server.ended(ends, 60)["success"]
        assert server.log(ends) == b"result\n"


class TestOneThatCanNotBeInspected:
    """It holds up no other, and is neither gone nor ended because the engine does not tell of it."""

    @meanwhile
    def test_the_others_are_found_beside_it(self, stage: Stage) -> None:
        server, go = stage.server("--grace", "300"), stage.folder / "go"
        worker = stage.worker(server, "--slots", "3")
        broken, whole = server.sh(LONG.format(go)), server.sh(LONG.format(f"{go}2"))
        until(lambda: stage.docker.starts(broken) and stage.docker.starts(whole))
        worker.kill()
        [name] = [each for each in stage.docker.containers() if each.endswith(f"-{broken}-1")]
        mute = stage.docker.folder / f"mute-{name}"
        mute.touch()
        Program.start(worker)
        assert server.ended(server.post("quick"), 40)["success"]
        (stage.folder / "go2").touch()
        assert server.ended(whole)["success"]
        swept = len(stage.docker.calls("ps")) + 1
        until(lambda: len(stage.docker.calls("ps")) > swept, 90)
        until(lambda: stage.docker.containers() == [name], 30)
        assert server.state(broken) == "running"
        mute.unlink()
        until(lambda: server.log(broken) == b"early\n", 20)
        go.touch()
        assert server.ended(broken)["success"]
        assert server.log(broken) == b"early\nlate\n"
        assert stage.docker.starts(broken) == 1
        until(lambda: stage.docker.containers() == [])


class TestAdoption:
    def test_a_clock_that_was_set_ahead_does_not_end_a_job(self, stage: Stage) -> None:
        go = stage.folder / "go"
        limited = f"- {{name: limited, image: busybox, command: {until_file(stage)}, timeout: 1m}}\n"
        server = stage.server("--grace", "300", jobs=JOBS + limited)
        worker = stage.worker(server, "--slots", "2")
        job = server.post("limited")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        [name] = stage.docker.containers()
        told_start = stage.docker.folder / "containers" / name / "pid"  # by the time of this file
        os.utime(told_start, (0, time.time() - 3_600))
        worker.start()
        until(lambda: stage.docker.calls("logs"))
        assert server.ended(server.post("quick"))["success"]  # some ticks later
        go.touch()
        assert server.ended(job)["success"]


class TestHangingRuns:
    @meanwhile
    def test_one_without_a_container_ends_once_it_is_to_stop(self, stage: Stage) -> None:
        limited = "- {name: limited, image: busybox, command: [sleep, '1000'], timeout: 3s, stop_grace_period: 1s}\n"
        server = stage.server(jobs=JOBS + limited)
        stage.worker(server, "--slots", "3")
        removed = server.sh("sleep 1000")
        until(lambda: stage.docker.starts(removed))
        os.kill(stage.docker.clients(removed)[0], signal.SIGSTOP)
        subprocess.run([stage.docker.folder / "docker", "rm", "-f", *stage.docker.containers()], check=True)
        stage.docker.delay("run", 1000)
        late, deleted = server.post("limited"), server.sh("sleep 1000")
        until(lambda: len(stage.docker.calls("run")) == 3)
        stage.docker.delay("run", 0)
        for job in (removed, deleted):
            server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(server.post("quick"), 120)["success"]
        assert [server.ended(job, 60)["state"] for job in (removed, deleted)] == ["cancelled", "cancelled"]
        assert server.ended(late, 60)["reason"] == "timeout"

    def test_one_whose_worker_died_before_its_container_started_is_lost(self, stage: Stage) -> None:
        stage.docker.delay("start", 1000)
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("exit 4")
        until(stage.docker.containers)
        worker.kill()
        worker.start()
        ended = server.ended(job)
        assert (ended["exit_code"], ended["reason"]) == (None, "lost")
        assert stage.docker.starts(job) == 0
        until(lambda: stage.docker.containers() == [])

    @meanwhile
    def test_one_that_is_let_go_holds_up_no_other(self, stage: Stage) -> None:
        config = {"name": "a", "image": "busybox", "command": ["sleep", "1000"]}
        with ScriptedServer(config, version=2) as server:
            stage.worker(server)
            for job in (1, 2):
                server.send(protocol.Enqueue(job, "a", 1, {}))
                server.wait_for(protocol.JobRunning(job, 1))
                server.send(protocol.Go(job, 1))
                until(lambda job=job: stage.docker.starts(job))  # type: ignore[misc]
                if job == 1:
                    os.kill(stage.docker.clients(1)[0], signal.SIGSTOP)
                    server.send(protocol.Settled(1, 1))
                    until(lambda: stage.docker.containers() == [])
            # and it is ended in time, though nobody holds it
            until(lambda: not Path(f"/proc/{stage.docker.clients(1)[0]}").exists(), 100)


class TestLogsThatCanNotBeRead:
    @meanwhile
    def test_their_job_ends_and_says_so(self, stage: Stage) -> None:
        torn = 'if [ "$1" = logs ]; then echo early; echo "Error grabbing logs: unexpected EOF" >&2; exit 1; fi'
        server, worker, job, go = adopt(stage, torn)
        go.touch()
        until(lambda: stage.docker.ledger("end", job))
        worker.start()
        assert server.ended(job, 90)["success"]
        assert server.log(job).startswith(b"early\n")
        assert b"jobworker: docker can't read more of this log" in server.log(job)

    def test_a_command_that_ends_too_early_loses_none_of_it(self, stage: Stage) -> None:
        once = '[ "$1" = logs ] && mkdir $HERE/once 2>/dev/null && exec $HERE/docker logs "$3"'
        server, worker, job, go = adopt(stage, once)
        worker.start()
        until(lambda: stage.docker.calls("wait"))  # it has seen that the container runs on
        go.touch()
        assert server.ended(job, 20)["success"]
        assert server.log(job) == b"early\nlate\n"

    def test_nor_does_one_that_ends_a_moment_before_its_container(self, stage: Stage) -> None:
        moment = 'until [ -e $HERE/containers/"$3"/exit ]; do sleep 0.05; done'  # the state then tells of the end
        once = f'[ "$1" = logs ] && mkdir $HERE/once 2>/dev/null && $HERE/docker logs "$3" && {moment} && exit 0'
        server, worker, job, go = adopt(stage, once)
        worker.start()
        until(lambda: server.log(job) == b"early\n" and (stage.docker.folder / "once").exists())
        go.touch()
        assert server.ended(job, 20)["success"]
        assert server.log(job) == b"early\nlate\n"


class TestWordsOfAJob:
    @meanwhile
    def test_they_are_not_taken_for_dockers(self, stage: Stage) -> None:
        """The engine goes away, and `docker run` with it; the container, which wrote such words, runs on."""
        server, go, cut = stage.server(), stage.folder / "go", stage.docker.folder / "cut"
        lost = f"""if [ "$1" = run ]; then
            $HERE/docker "$@" & until [ -e {cut} ] || ! kill -0 $!; do sleep 0.1; done
            kill -9 $!; echo "unexpected EOF" >&2; exit 125; fi"""
        worker = stage.worker(server, *limping(stage, lost))
        job = server.sh(LONG.format(go).replace("early", "connection refused"))
        until(lambda: server.log(job) == b"connection refused\n")
        (stage.docker.folder / "down").touch()
        cut.touch()
        until(lambda: worker.said("docker inspect did not get an answer"), 60)  # first it asks for the image
        time.sleep(35)  # longer than what was not reached is waited for
        assert server.state(job) == "running"
        (stage.docker.folder / "down").unlink()
        go.touch()
        assert server.ended(job, 60)["success"]
        assert server.log(job) == b"connection refused\nlate\n"


class TestStatesThatCanNotBeRead:
    def test_half_an_answer_is_not_there_is_none(self, stage: Stage) -> None:
        server, go = stage.server(), stage.folder / "go"
        spoilt = stage.docker.folder / "spoilt"
        first = f'[ "$1" = inspect ] && [ -e {spoilt} ] && rm {spoilt} && echo "[{{" && exit 0'
        worker = stage.worker(server, *limping(stage, first))
        server.ended(server.sh("exit 3"))  # its end is read from a state: this engine tells them
        job = server.sh(LONG.format(go))
        until(lambda: stage.docker.starts(job))
        spoilt.touch()
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: worker.said("docker inspect did not get an answer"))
        assert server.state(job) == "running"
        go.touch()
        assert server.ended(job, 20)["success"]
        assert server.log(job) == b"early\nlate\n"
