"""What jobworker promises, each promise a class of tests: real processes, real sockets, kill -9.

 1. A job that was accepted is on disk and will reach a final state.                        TestPromise01Accepted
 2. Any process may be killed at any moment, any number of times; no job is left open.      TestPromise02Kills
 3. A job without retries is started at most once; its attempts never overlap.              TestPromise03AtMostOnce
 4. A job succeeds if and only if its container exits 0; a failure has a code or a reason.  TestPromise04Results
 5. A job's output is in its log, in order, up to the limit.                                TestPromise05Logs
 6. A job that is cancelled or past its timeout is stopped: TERM, a pause, KILL.            TestPromise06Stop
 7. When all is quiet, no container is left behind.                                         TestPromise07NothingLeft
 8. No input ends the server or a worker.                                                   TestPromise08NoInputEnds
 9. Nothing is done for strangers: without the token, or for another site's page.           TestPromise09Strangers
10. SIGTERM lets a worker finish its jobs; a second one leaves them to its next start.      TestPromise10Drain
11. A full disk refuses new jobs and loses no old one.                                      TestPromise11DiskFull
12. A due time makes exactly one job; what follows an end is queued with it.               TestPromise12Schedules
13. A part that limps takes nothing else with it.                   tests/test_*_limps.py, test_limits_http.py
14. A copy of everything can be taken while the server runs.                                tests/test_backup.py

And all of them together, over histories played on a virtual clock: checks/simulate.py, tests/test_torments.py.

Before them stands TestTranscript, the session of the original program; after them TestRealEngine, with Docker itself.
All others run beside a `docker` stand-in (tests/docker_stand_in.py), on the stage that tests/stage.py sets. What these
promises leave open about one file of the code is in the file of its name in tests/.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.engines import Engine
from tests.peers import (
    HANDSHAKE,
    POST,
    Events,
    Relay,
    ScriptedWorker,
    head,
    statuses_of,
)
from tests.stage import (
    FINAL,
    JOBS,
    Docker,
    Program,
    Server,
    Stage,
    Worker,
    all_ended,
    bearer,
    meanwhile,
    problem,
    read_to_end,
    until,
    until_file,
)


class TestTranscript:
    """The original's README, played: the same requests give the same bytes."""

    def test_the_session_of_the_original(self, stage: Stage) -> None:
        server = stage.server(jobs=JOBS + f"- {{name: until, image: busybox, command: {until_file(stage)}}}\n")
        assert server.http("GET", "/api/workers").body == b"[]\n"
        refused = server.http("POST", "/api/jobs/hello-world")
        assert (refused.status, b"worker is not exist." in refused.body) == (500, True)
        assert server.http("GET", "/api/jobs").body == b"[]\n"

        stage.worker(server)
        assert server.http("GET", "/api/workers").body == b'[{"id":1,"working":false}]\n'
        accepted = server.http("POST", "/api/jobs/hello-world")
        assert accepted.headers["Content-Type"] == "application/json"
        assert accepted.body == b'{"id":1,"name":"hello-world","queuing":true,"running":false,"success":false}\n'
        server.ended(1)
        done = b'{"id":1,"name":"hello-world","queuing":false,"running":false,"success":true}'
        assert server.http("GET", "/api/jobs").body == b"[" + done + b"]\n"

        server.post("until")
        server.post("quick")
        until(lambda: server.state(2) == "running")
        assert server.http("GET", "/api/workers").body == b'[{"id":1,"working":true}]\n'
        running = b'{"id":2,"name":"until","queuing":false,"running":true,"success":false}'
        queued = b'{"id":3,"name":"quick","queuing":true,"running":false,"success":false}'
        assert server.http("GET", "/api/jobs").body == b"[" + b",".join((done, running, queued)) + b"]\n"
        (stage.folder / "go").touch()
        assert server.ended(2)["success"]
        assert server.ended(3)["success"]
        assert server.log(1) == b"Hello from Docker!\n"


class TestPromise01Accepted:
    """A 2xx to POST means that the job is on disk and will reach a final state."""

    def test_it_survives_the_servers_death_at_once(self, stage: Stage) -> None:
        server = stage.server("--hold")
        accepted = []
        for _ in range(5):
            accepted.append(server.post("quick"))
            server.kill()
            server.start()
        assert [job["id"] for job in server.get("/api/jobs")] == accepted

    def test_what_was_accepted_from_many_at_once_survives(self, stage: Stage) -> None:
        server = stage.server("--hold")
        accepted: list[int] = []

        def post_until_it_dies(_: int) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    accepted.append(server.post("quick"))

        with ThreadPoolExecutor(8) as pool:
            posts = pool.map(post_until_it_dies, range(8))
            until(lambda: len(accepted) > 300)
            server.kill()
            list(posts)
        server.start()
        assert set(accepted) <= {job["id"] for job in server.get("/api/jobs")}

    def test_ids_are_never_used_again(self, stage: Stage) -> None:
        server = stage.server("--hold")
        first = server.post("quick")
        stage.worker(server)
        server.ended(first)
        server.kill()
        server.start()
        assert server.post("quick") > first
        until(lambda: server.get("/api/workers"))
        stage.worker(server, name="other")
        assert [worker["id"] for worker in server.get("/api/workers")] == [1, 2]

    @meanwhile
    def test_ids_are_never_used_again_after_pruning(self, stage: Stage) -> None:
        server = stage.server("--keep", "1")
        stage.worker(server)
        last = [server.post("hello-world") for _ in range(3)][-1]
        server.ended(last)
        stage.jobs.write_text(stage.jobs.read_text().replace("hello-world", "hello-there"))
        server.signal(signal.SIGHUP)  # of what jobs.yaml names, the newest stays
        until(lambda: server.get("/api/jobs") == [], 30)
        server.stop()
        server.start()
        until(lambda: server.get("/api/workers"))
        assert server.post("quick") == last + 1

    def test_a_database_has_one_server(self, stage: Stage) -> None:
        server = stage.server()
        second = stage.run("server.py", "-p", "0", str(stage.jobs))
        assert second.returncode == 1
        assert "jobs.db" in second.stderr
        assert "Traceback" not in second.stderr
        assert server.get("/healthz")["status"] == "ok"


class TestPromise02Kills:
    """Kill -9 of anything, at any moment: every job is final once all is up again, and none ran twice."""

    def test_a_thousand_jobs_survive_the_servers_death(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        server.http("POST", "/api/jobs", [{"name": "quick"}] * 1000, 30)
        until(lambda: stage.docker.starts() >= 300, 60)
        server.kill()
        server.start()
        jobs = all_ended(server, 300)
        assert [job["state"] for job in jobs] == ["success"] * 1000
        assert sorted(line[0].split("-")[-2] for line in stage.docker.ledger("start")) == sorted(
            map(str, range(1, 1001))
        )
        until(lambda: stage.docker.containers() == [])

    def test_all_kinds_of_deaths_at_once(self, stage: Stage) -> None:
        server = stage.server("--grace", "3")
        worker = stage.worker(server, "--slots", "4")
        jobs = [server.sh(f"echo {n}; sleep 0.1; echo {n}; exit {n % 3}") for n in range(60)]
        for at in (5, 15, 25, 35, 45):
            until(lambda at=at: stage.docker.starts() >= at, 30)  # type: ignore[misc]
            for job in jobs[at - 3 : at]:
                for pid in stage.docker.clients(job):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for program in (worker, server) if at % 10 else (server, worker):
                program.kill()
                time.sleep(0.1)
            server.start()
            worker.start()
        all_ended(server)
        never_started = [job for job in jobs if not stage.docker.starts(job)]
        assert len(never_started) < 10  # those whose worker died between Go and the container's start
        assert {server.job(job)["reason"] for job in never_started} <= {"lost"}
        for n, job in enumerate(jobs):
            if job not in never_started:
                found = server.job(job)
                assert (found["exit_code"], found["reason"]) == (n % 3, "exit" if n % 3 else None)
                assert (server.log(job), stage.docker.starts(job)) == (b"%d\n%d\n" % (n, n), 1)
        until(lambda: stage.docker.containers() == [])

    @pytest.mark.parametrize("delay", [0.5, 0])
    def test_a_worker_that_dies_between_the_creation_and_the_start(self, stage: Stage, delay: float) -> None:
        stage.docker.delay("start", delay)
        server = stage.server("--grace", "1")
        worker = stage.worker(server)
        job = server.sh("exit 4")
        until(lambda: stage.docker.ledger("run", job))
        worker.kill()
        worker.start()
        ended = server.ended(job)
        assert (ended["exit_code"], ended["reason"]) in ((4, "exit"), (None, "lost"))
        assert stage.docker.starts(job) <= 1
        until(lambda: stage.docker.containers() == [])


class TestPromise03AtMostOnce:
    """With retries 0 a container is started at most once; attempts never overlap."""

    def test_a_killed_worker_adopts_what_runs(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 7")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["state"], ended["exit_code"], ended["reason"], ended["attempt"]) == ("failure", 7, "exit", 1)
        assert server.log(job) == b"before\nafter\n"
        assert stage.docker.starts(job) == 1
        until(lambda: stage.docker.containers() == [])

    def test_a_killed_worker_reports_what_ended_meanwhile(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 0.3; echo done; exit 5")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        until(lambda: stage.docker.ledger("end", job))
        worker.start()
        assert (server.ended(job)["exit_code"], server.log(job)) == (5, b"done\n")
        assert stage.docker.starts(job) == 1

    def test_a_killed_docker_client_costs_nothing(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: server.log(job) == b"before\n")
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        time.sleep(0.2)
        assert server.state(job) == "running"
        (stage.folder / "go").touch()
        assert (server.ended(job)["exit_code"], server.log(job)) == (6, b"before\nafter\n")
        assert stage.docker.starts(job) == 1

    def test_a_docker_run_that_outlives_its_worker_starts_nothing(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        stage.docker.delay("run", 5)
        job = server.sh("true")
        until(lambda: stage.docker.calls("run"))
        worker.kill()
        worker.start()
        assert server.ended(job)["reason"] == "lost"
        time.sleep(1)
        assert (stage.docker.starts(job), stage.docker.containers()) == (0, [])

    def test_a_killed_inspection_is_no_result(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: server.log(job) == b"before\n")
        stage.docker.delay("inspect", 0.3)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        for seen in (0, 1):
            until(lambda seen=seen: len(stage.docker.calls("inspect")) > seen)  # type: ignore[misc]
            os.kill(stage.docker.calls("inspect")[-1], signal.SIGKILL)
        time.sleep(0.2)
        (stage.folder / "go").touch()
        assert (server.ended(job)["exit_code"], server.log(job)) == (6, b"before\nafter\n")

    def test_a_killed_list_of_containers_forgets_none(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 6")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        stage.docker.delay("ps", 0.3)
        before = len(stage.docker.calls("ps"))
        Program.start(worker)
        until(lambda: len(stage.docker.calls("ps")) > before)
        os.kill(stage.docker.calls("ps")[-1], signal.SIGKILL)
        (stage.folder / "go").touch()
        assert server.ended(job)["exit_code"] == 6

    def test_a_worker_that_never_comes_back_loses_its_job(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: server.state(job) == "running")
        worker.kill()
        assert (server.ended(job, 5)["state"], server.job(job)["reason"]) == ("failure", "lost")

    def test_a_cut_off_worker_that_wakes_after_its_grace_lets_go(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        with Relay(server) as relay:
            worker = stage.worker(relay)
            job = server.sh("sleep 60")
            until(lambda: stage.docker.starts(job))
            worker.freeze()
            relay.cut()
            assert server.ended(job, 5)["reason"] == "lost"
            worker.thaw()
            until(lambda: stage.docker.containers() == [], 15)
            assert (server.job(job)["reason"], stage.docker.starts(job)) == ("lost", 1)
            assert server.ended(server.post("quick"))["success"]

    def test_a_lost_job_with_retries_runs_elsewhere(self, stage: Stage) -> None:
        jobs = f"- {{name: until, image: busybox, command: {until_file(stage)}, retries: 1, retry_delay: 100ms}}"
        server = stage.server("--grace", "1", jobs=jobs)
        worker = stage.worker(server)
        job = server.post("until")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        stage.worker(server, name="other")
        until(lambda: stage.docker.starts(job) == 2)
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["success"], ended["attempt"], ended["worker"]) == (True, 2, "other")
        assert [one["reason"] for one in server.get(f"/api/jobs/{job}/attempts")] == ["lost", None]
        worker.start()
        until(lambda: stage.docker.containers() == [])

    def test_a_second_worker_of_one_name_on_a_host_is_refused(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        path = f"{stage.docker.folder}:{os.environ['PATH']}"
        target = f"127.0.0.1:{server.port}/runner"
        second = stage.run("client.py", "--name", "worker", target, PATH=path, TMPDIR=str(stage.folder))
        assert second.returncode in (1, 2)
        assert "worker" in second.stderr

    def test_two_hosts_of_one_name_do_not_run_a_job_twice(self, stage: Stage, tmp_path: Path) -> None:
        server = stage.server()
        first = stage.worker(server)
        jobs = [server.sh("sleep 0.1") for _ in range(10)]
        until(stage.docker.starts)
        (tmp_path / "elsewhere").mkdir()
        stage.worker(server, TMPDIR=str(tmp_path / "elsewhere"))
        assert first.exit_code() == 1
        for job in jobs:
            assert server.ended(job, 30)["state"] in FINAL
            assert stage.docker.starts(job) <= 1

    def test_two_workers_without_a_name_are_two(self, stage: Stage) -> None:
        server = stage.server()
        for _ in range(2):
            worker = Worker(
                stage.folder,
                "client.py",
                f"127.0.0.1:{server.port}/runner",
                PATH=f"{stage.docker.folder}:{os.environ['PATH']}",
            )
            stage.programs.append(worker)
            worker.start()
        host = socket.gethostname()
        assert [worker["name"] for worker in server.get("/api/workers?full=1")] == [f"{host}-1", f"{host}-2"]
        worker.kill()
        worker.start()
        until(lambda: len(server.get("/api/workers")) == 2)
        assert {worker["name"] for worker in server.get("/api/workers?full=1")} == {f"{host}-1", f"{host}-2"}

    @meanwhile
    def test_a_dead_line_is_found_by_both_sides(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        with Relay(server) as relay:
            stage.worker(relay)
            relay.dead = True
            until(lambda: server.get("/api/workers") == [], 35)
            relay.dead = False
            until(lambda: server.get("/api/workers"), 35)
            assert relay.dials >= 2

    def test_a_killed_docker_inspect_costs_nothing(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: stage.docker.starts(job) == 1)
        stage.docker.delay("inspect", 0.5)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: stage.docker.calls("inspect"))
        os.kill(stage.docker.calls("inspect")[0], signal.SIGKILL)
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["exit_code"], ended["reason"], server.log(job)) == (6, "exit", b"after\n")


class TestPromise04Results:
    """Success if and only if the container exited 0; a failure carries its exit code or the reason."""

    @pytest.mark.parametrize("code", [0, 1, 2, 3, 125, 126, 127, 128, 137, 143, 255])
    def test_an_exit_code_is_reported(self, busy_stage: tuple[Server, Docker], code: int) -> None:
        server, docker = busy_stage
        job = server.ended(server.sh(f"exit {code}"))
        assert (job["success"], job["exit_code"], job["reason"]) == (code == 0, code, "exit" if code else None)
        assert docker.starts(job["id"]) == 1

    def test_a_signal_is_a_failure(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.ended(server.sh("kill -9 $$"))
        assert (job["state"], job["exit_code"]) == ("failure", 137)

    def test_a_missing_image_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: missing}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")
        assert b"manifest unknown" in server.log(job["id"])

    def test_an_image_that_may_not_be_pulled_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: missing, pull_policy: never}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")
        assert stage.docker.calls("pull") == []

    def test_an_image_is_pulled_once_for_all_that_wait_for_it(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: far}")
        stage.docker.offer("far", 0.3)
        stage.worker(server, "--slots", "4")
        assert all(server.ended(job)["success"] for job in [server.post("a") for _ in range(4)])
        assert len(stage.docker.ledger("pull")) == 1

    def test_running_out_of_memory_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: oom}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", 137, "oom")

    @meanwhile
    def test_an_engine_that_is_not_there_is_the_reason(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        (stage.docker.folder / "down").touch()
        job = server.ended(server.post("quick"), 40)
        assert (job["state"], job["reason"]) == ("failure", "docker")
        (stage.docker.folder / "down").unlink()
        assert server.ended(server.post("quick"))["success"]

    def test_a_docker_that_is_not_there_is_said_at_once(self, stage: Stage) -> None:
        worker = stage.worker(stage.server(), "--docker", "/nowhere/docker", connects=False)
        assert worker.process.wait(10) == 2
        assert worker.said("there is no command '/nowhere/docker'")

    def test_an_image_that_the_workers_owner_does_not_allow_is_refused(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--allow-image", "busy*")
        refused = server.ended(server.post("hello-world"))
        assert (refused["state"], refused["reason"]) == ("failure", "refused")
        assert server.ended(server.post("quick"))["success"]
        assert stage.docker.starts(refused["id"]) == 0

    def test_a_docker_that_only_exits_counts_by_its_exit_code(self, stage: Stage) -> None:
        server = stage.server()
        for code in (0, 9):
            (stage.folder / f"docker{code}").write_text(f"#!/bin/sh\n[ $1 = run ] && exit {code}\nexit 0\n")
            (stage.folder / f"docker{code}").chmod(0o755)
            worker = stage.worker(server, "--docker", str(stage.folder / f"docker{code}"), name=f"w{code}")
            job = server.ended(server.post("quick"))
            assert (job["success"], job["exit_code"]) == (code == 0, code)
            worker.stop()


class TestPromise05Logs:
    """What a job wrote is in its log, in order, up to the limit; a lost connection loses none of it."""

    LINES = b"".join(b"line %d\n" % n for n in range(1, 301))
    SLOWLY = "for i in $(seq 1 300); do echo line $i; sleep 0.005; done"

    def test_it_is_whole_and_in_order(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 50000")
        assert server.ended(job)["log_bytes"] == 288_894
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 50_001))

    @pytest.mark.parametrize(
        "script", ["printf abc", "printf '\\000\\377\\r\\n\\033[1m'", "true", "printf '\\n\\n'", "echo e >&2"]
    )
    def test_every_byte_counts(self, busy_stage: tuple[Server, Docker], script: str) -> None:
        server, _ = busy_stage
        job = server.sh(script)
        server.ended(job)
        wanted = subprocess.run(["sh", "-c", f"{{ {script}; }} 2>&1"], check=True, capture_output=True)
        assert server.log(job) == wanted.stdout
        reply = server.http("GET", f"/api/jobs/{job}/log")
        assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"

    def test_head_and_tail_of_a_long_one_are_kept(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 600000")
        assert server.ended(job, 30)["success"]
        log = server.log(job)
        assert 900_000 < len(log) <= 1_049_000
        assert log.startswith(b"1\n2\n3\n")
        assert log.endswith(b"\n599999\n600000\n")
        notes = [line for line in log.split(b"\n") if re.search(rb"[a-z]", line)]
        assert len(notes) == 1

    def test_one_endless_line_is_cut_as_well(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("head -c 5000000 /dev/zero | tr '\\0' x")
        assert server.ended(job, 30)["success"]
        assert 900_000 < len(server.log(job)) <= 1_049_000

    @pytest.mark.parametrize("victim", ["server", "worker", "docker", "line"])
    def test_a_death_in_the_middle_loses_none_of_it(self, stage: Stage, victim: str) -> None:
        server = stage.server()
        with Relay(server) as relay:
            worker = stage.worker(relay)
            job = server.sh(self.SLOWLY)
            until(lambda: b"line 50\n" in server.log(job))
            if victim == "docker":
                os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
            elif victim == "line":
                relay.cut()
            else:
                program: Program = server if victim == "server" else worker
                program.kill()
                time.sleep(0.3)
                program.start()
            assert server.ended(job)["success"]
            assert server.log(job) == self.LINES

    def test_a_killed_docker_logs_loses_none_of_it(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(self.SLOWLY)
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        until(lambda: stage.docker.calls("logs"))
        until(lambda: b"line 50\n" in server.log(job))
        os.kill(stage.docker.calls("logs")[-1], signal.SIGKILL)
        assert server.ended(job)["success"]
        assert server.log(job) == self.LINES

    def test_a_docker_killed_just_before_the_end_loses_none_of_it(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh("echo early; sleep 0.3; echo late")
        until(lambda: server.log(job) == b"early\n")
        stage.docker.delay("inspect", 0.6)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        assert server.ended(job)["success"]
        assert server.log(job) == b"early\nlate\n"

    def test_it_is_followed_to_its_end(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh(self.SLOWLY)
        assert server.log(job, "?follow=1") == self.LINES
        assert server.job(job)["success"]

    def test_it_is_followed_as_it_is_written(self, stage: Stage) -> None:
        server = stage.server(
            jobs=f"- {{name: a, image: busybox, command: [sh, -c, 'echo early; cat {stage.folder}/fifo']}}"
        )
        os.mkfifo(stage.folder / "fifo")
        stage.worker(server)
        job = server.post("a")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.request("GET", f"/api/jobs/{job}/log?follow=1")
            stream = connection.getresponse()
            assert stream.readline() == b"early\n"
            with (stage.folder / "fifo").open("w") as fifo:
                fifo.write("late\n")
            assert stream.read() == b"late\n"

    def test_parts_of_it_can_be_had(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 100")
        server.ended(job)
        assert server.log(job, "?tail=2") == b"99\n100\n"
        assert server.log(job, "?tail=0") == b""
        assert server.log(job, "?tail=1000") == server.log(job)
        assert server.log(job, "?offset=288") == b"100\n"
        assert server.log(job, "?offset=292") == b""
        assert server.log(job, "?attempt=1") == server.log(job)

    def test_each_attempt_has_its_own(self, stage: Stage) -> None:
        command = json.dumps(["sh", "-c", "echo try $JOBWORKER_ATTEMPT; [ $JOBWORKER_ATTEMPT = 2 ]"])
        server = stage.server(jobs=f"- {{name: a, image: busybox, command: {command}, retries: 3, retry_delay: 100ms}}")
        stage.worker(server)
        job = server.post("a")
        assert (server.ended(job)["success"], server.job(job)["attempt"]) == (True, 2)
        assert [server.log(job, f"?attempt={n}") for n in (1, 2)] == [b"try 1\n", b"try 2\n"]
        assert server.log(job) == b"try 2\n"


class TestPromise06Stop:
    """After DELETE, or past its timeout, the container is gone: TERM, a grace period, KILL."""

    def test_a_queued_job_is_cancelled_at_once(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        assert server.http("DELETE", f"/api/jobs/{job}").json["state"] == "cancelled"
        stage.worker(server)
        assert server.ended(server.post("quick"))["success"]
        assert stage.docker.starts(job) == 0

    def test_a_running_job_is_asked_before_it_is_killed(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.02; done")
        until(lambda: server.log(job) == b"ready\n")
        assert server.http("DELETE", f"/api/jobs/{job}").status == 200
        assert server.ended(job)["state"] == "cancelled"
        assert server.log(job) == b"ready\nasked\n"
        until(lambda: not any(f"-{job}-" in name for name in docker.containers()))

    def test_a_deaf_job_is_killed_after_its_grace_period(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("trap '' TERM; echo ready; while :; do sleep 0.02; done")
        until(lambda: server.log(job) == b"ready\n")
        start = time.monotonic()
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job)["state"] == "cancelled"
        assert 0.9 < time.monotonic() - start < 6
        until(lambda: not any(f"-{job}-" in name for name in docker.containers()))

    @pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; while :; do sleep 0.02; done"])
    def test_a_job_past_its_timeout_is_stopped(self, stage: Stage, script: str) -> None:
        jobs = [
            {
                "name": "a",
                "image": "busybox",
                "command": ["sh", "-c", script],
                "timeout": "1s",
                "stop_grace_period": "1s",
            }
        ]
        server = stage.server(jobs=json.dumps(jobs))
        stage.worker(server)
        start = time.monotonic()
        job = server.ended(server.post("a"))
        assert (job["state"], job["reason"]) == ("failure", "timeout")
        assert 1 <= time.monotonic() - start < 6
        until(lambda: stage.docker.containers() == [])

    def test_a_timeout_counts_from_the_start_over_a_workers_death(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: busybox, command: sleep 60, timeout: 2s, stop_grace_period: 1s}")
        worker = stage.worker(server)
        job = server.post("a")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        assert server.ended(job, 8)["reason"] == "timeout"

    def test_a_job_cancelled_while_its_worker_is_away_is_stopped_when_it_is_back(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        assert server.http("DELETE", f"/api/jobs/{job}").status == 200
        worker.start()
        assert server.ended(job)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])

    def test_a_job_cancelled_while_its_image_is_pulled_never_starts(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: far}")
        stage.docker.offer("far", 1)
        stage.worker(server)
        job = server.post("a")
        until(lambda: stage.docker.calls("pull"))
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])
        assert stage.docker.starts(job) == 0


class TestPromise07NothingLeft:
    """When all is quiet, no container with our label is left behind."""

    def test_not_after_successes_failures_and_cancels(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        jobs = [
            server.sh(script) for script in ("true", "exit 1", "exit 125", "kill -9 $$", "sleep 60", "seq 1 100000")
        ]
        until(lambda: server.state(jobs[4]) == "running")
        server.http("DELETE", f"/api/jobs/{jobs[4]}")
        all_ended(server)
        until(lambda: stage.docker.containers() == [])

    def test_not_after_the_servers_database_is_gone(self, stage: Stage) -> None:
        server = stage.server("--database", ":memory:")
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: stage.docker.starts(job))
        server.kill()
        worker.kill()
        server.start()
        worker.start()
        assert server.ended(server.post("quick"))["success"]

    def test_not_when_the_engine_fails_to_remove_at_first(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh("sleep 0.3")
        until(lambda: stage.docker.starts(job))
        (stage.docker.folder / "down").touch()
        until(lambda: stage.docker.ledger("end", job))
        time.sleep(0.5)
        (stage.docker.folder / "down").unlink()
        assert server.ended(job)["success"]
        until(lambda: stage.docker.containers() == [], 30)


class TestPromise08NoInputEnds:
    """No input ends the server or a worker: what strangers send to /runner."""

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0" * 1000,
            b"\x81\x05hello",
            b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x88\x82aaaa\0\0",
            b"\xff" * 99,
        ],
    )
    def test_bytes_after_the_handshake_that_are_no_websocket_end_only_themselves(
        self, idle: Server, data: bytes
    ) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            peer.sendall(HANDSHAKE)
            assert peer.recv(1000).startswith(b"HTTP/1.1 101 ")
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            read_to_end(peer)
        until(lambda: idle.get("/api/workers") == [])
        assert "Traceback" not in idle.stderr

    def test_a_handshake_in_pieces_is_a_handshake(self, idle: Server) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            for at in range(0, len(HANDSHAKE), 20):
                peer.sendall(HANDSHAKE[at : at + 20])
                time.sleep(0.01)
            assert peer.recv(100).startswith(b"HTTP/1.1 101 ")

    @meanwhile
    def test_a_request_that_never_ends_is_ended(self, stage: Stage) -> None:
        server = stage.server("--hold")
        runner = head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: websocket")[:-2]
        slow_body = head(POST, b"Content-Length: 5") + b"{"
        with contextlib.ExitStack() as stack:
            peers = []
            for data in (b"GET /api", head(b"GET /healthz")[:-2], runner, slow_body):
                peers.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=35)))
                peers[-1].sendall(data)
            for peer in peers:
                assert statuses_of(read_to_end(peer)) in ([], [400], [408])
        assert server.get("/api/jobs") == []

    @meanwhile
    def test_a_head_that_drips_is_ended(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as peer:

            def is_ended() -> bool:
                try:
                    peer.sendall(b"X")
                    return peer.recv(1000) == b"" or is_ended()
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True

            peer.sendall(b"GET /api/workers HTTP/1.1\r\n")
            assert until(is_ended, 20)

    def test_a_hundred_workers_come_and_go(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for n in range(100):
                stack.enter_context(ScriptedWorker(idle, f"worker-{n}", tags=("never",)))
            until(lambda: len(idle.get("/api/workers")) == 100)
        until(lambda: idle.get("/api/workers") == [])

    def test_sighup_with_a_bad_file_changes_nothing(self, stage: Stage) -> None:
        server = stage.server("--hold")
        stage.jobs.write_text("- {name: new, image: busybox, colour: red}")
        server.signal(signal.SIGHUP)
        until(lambda: "colour" in server.stderr)
        assert server.http("POST", "/api/jobs/quick").status == 200
        stage.jobs.write_text("- {name: new, image: busybox}")
        server.signal(signal.SIGHUP)
        until(lambda: server.http("POST", "/api/jobs/new").status == 200)
        assert server.http("POST", "/api/jobs/quick").status == 404

    def test_a_queued_job_whose_config_is_gone_does_not_wait_for_ever(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        stage.jobs.write_text("- {name: new, image: busybox}")
        server.signal(signal.SIGHUP)
        until(lambda: server.http("POST", "/api/jobs/new").status == 200)
        stage.worker(server)
        ended = server.ended(job)
        assert (ended["state"], ended["reason"], ended["exit_code"]) == ("failure", "gone", None)


class TestPromise09Strangers:
    """Nothing is done without the token where one is set, nor for a web page of another site."""

    @pytest.fixture(scope="class")
    @classmethod
    def guarded(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("guarded"))) as stage:
            (stage.folder / "tokens").write_text("api letmein-0123456789\nworker iamone-0123456789\n")
            yield stage.server("--hold", "--token-file", str(stage.folder / "tokens"))

    @pytest.mark.parametrize(
        "path", ["/api/jobs", "/api/workers", "/api/configs", "/api/events", "/metrics", "/api/jobs/1/log"]
    )
    def test_a_request_without_the_token_is_unauthorised(self, guarded: Server, path: str) -> None:
        for headers in (
            {},
            bearer("iamone-0123456789"),
            bearer(""),
            bearer("letmein-012345678"),
            {"Authorization": "letmein-0123456789"},
        ):
            reply = guarded.http("GET", path, headers=headers)
            problem(reply, 401)
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")

    def test_nothing_is_queued_without_the_token(self, guarded: Server) -> None:
        before = guarded.http("GET", "/api/jobs", headers=bearer("letmein-0123456789")).body
        problem(guarded.http("POST", "/api/jobs/quick"), 401)
        problem(guarded.http("POST", "/api/jobs", [{"name": "quick"}]), 401)
        assert guarded.http("GET", "/api/jobs", headers=bearer("letmein-0123456789")).body == before
        assert guarded.http("POST", "/api/jobs/quick", headers=bearer("letmein-0123456789")).status == 200

    def test_health_and_page_need_no_token(self, guarded: Server) -> None:
        assert guarded.http("GET", "/healthz").status == 200
        assert guarded.http("GET", "/").status == 200

    @pytest.mark.parametrize("token", [None, "letmein-0123456789", "wrong-0123456789ab"])
    def test_a_worker_with_a_wrong_token_is_told_so_and_ends(
        self, guarded: Server, stage: Stage, token: str | None
    ) -> None:
        arguments = []
        if token:
            (stage.folder / "token").write_text(token)
            arguments = ["--token-file", str(stage.folder / "token")]
        path = f"{stage.docker.folder}:{os.environ['PATH']}"
        ended = stage.run("client.py", "--name", "w", *arguments, f"127.0.0.1:{guarded.port}/runner", PATH=path)
        assert ended.returncode == 1
        assert "401" in ended.stderr or "token" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_worker_with_its_token_works(self, guarded: Server, stage: Stage) -> None:
        (stage.folder / "token").write_text("iamone-0123456789\n")
        stage.worker(guarded, "--token-file", str(stage.folder / "token"))
        reply = guarded.http("POST", "/api/jobs/quick?wait=10", headers=bearer("letmein-0123456789"))
        assert reply.json["success"]
        everything = guarded.stderr + "".join(program.stderr for program in stage.programs)
        assert "letmein-0123456789" not in everything
        assert "iamone-0123456789" not in everything

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost.evil.example"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Host": "evil.example"},
            {"Host": "localhost.evil.example"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": "evil@localhost"},
        ],
        ids=str,
    )
    def test_a_page_of_another_site_gets_nothing_done(self, idle: Server, headers: dict[str, str]) -> None:
        reply = idle.http("POST", "/api/jobs/quick", headers=headers)
        assert reply.status in (400, 403, 421)
        assert problem(reply, reply.status)
        assert idle.get("/api/jobs") == []

    @pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
    def test_our_own_page_may_ask(self, idle: Server, name: str) -> None:
        host = f"{name}:{idle.port}"
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert idle.http("POST", "/api/jobs/nothing", headers=headers).status == 404

    def test_a_page_cannot_be_a_worker(self, idle: Server) -> None:
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{idle.port}/runner", proxy=None, origin=Origin(f"http://localhost:{idle.port}"))
        assert refused.value.response.status_code == 403

    def test_the_page_cannot_be_framed(self, idle: Server) -> None:
        policy = idle.http("GET", "/").headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        assert "Access-Control-Allow-Origin" not in idle.http("GET", "/api/jobs").headers

    def test_the_world_needs_a_token(self, stage: Stage) -> None:
        stage.jobs.write_text(JOBS)
        refused = stage.run("server.py", "-p", "0", "--host", "0.0.0.0", str(stage.jobs))
        assert refused.returncode == 2
        assert "--token-file" in refused.stderr


class TestPromise10Drain:
    """SIGTERM lets a worker finish what runs; a second one ends it at once; the server closes cleanly."""

    def test_the_first_sigterm_finishes_what_runs_and_takes_no_more(self, stage: Stage) -> None:
        server = stage.server("--hold")
        worker = stage.worker(server, "--slots", "2")
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo whole")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        until(lambda: worker.stderr.count("\n") > 1)
        time.sleep(0.2)
        later = server.post("quick")
        time.sleep(0.3)
        assert (server.state(later), server.state(job)) == ("queued", "running")
        (stage.folder / "go").touch()
        assert worker.exit_code() == 0
        assert (server.job(job)["state"], server.log(job)) == ("success", b"whole\n")
        assert stage.docker.containers() == []
        worker.start()
        assert server.ended(later)["success"]

    def test_an_idle_worker_ends_at_once(self, stage: Stage) -> None:
        worker = stage.worker(stage.server())
        assert worker.stop(3) == 0

    @pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
    def test_the_second_signal_leaves_the_container_running_and_says_so(self, stage: Stage, second: int) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 9")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        time.sleep(0.3)
        worker.signal(second)
        worker.exit_code(3)
        [name] = stage.docker.containers()
        assert name in worker.stderr
        worker.start()
        (stage.folder / "go").touch()
        assert server.ended(job)["exit_code"] == 9
        assert stage.docker.starts(job) == 1

    def test_ctrl_c_in_the_terminal_does_not_reach_the_container(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("trap 'echo interrupted; exit 3' INT TERM; echo ready; sleep 0.7; exit 0")
        until(lambda: server.log(job) == b"ready\n")
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGINT)
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.exit_code(0.3)
        if worker.process.poll() is not None:
            worker.start()
        assert server.ended(job)["success"]
        assert server.log(job) == b"ready\n"

    def test_a_draining_worker_survives_its_servers_restart(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        server.kill()
        (stage.folder / "go").touch()
        until(lambda: stage.docker.ledger("end", job))
        server.start()
        assert worker.exit_code(20) == 0
        assert server.job(job)["success"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_server_closes_cleanly(self, stage: Stage, number: int) -> None:
        server = stage.server("--hold")
        stage.worker(server)
        job = server.sh("sleep 0.5; exit 2")
        until(lambda: server.state(job) == "running")
        with (
            socket.create_connection(("127.0.0.1", server.port)) as idle_peer,
            Events(server),
            ThreadPoolExecutor(1) as pool,
        ):
            waiting = pool.submit(server.http, "GET", f"/api/jobs/{job}?wait=9")
            idle_peer.sendall(b"GET /")
            time.sleep(0.1)
            server.signal(number)
            assert server.exit_code(5) == 0
            assert waiting.exception(5) is None or isinstance(waiting.exception(), OSError | http.client.HTTPException)
        server.start()
        assert server.ended(job)["exit_code"] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
class TestPromise11DiskFull:
    """Disk full: POST is refused with 507, what was accepted stays, results are kept until they can be stored."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)

    @staticmethod
    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"\0" * 4096)

    def test_posts_are_refused_until_there_is_room(self, stage: Stage, disk: Path) -> None:
        server = stage.server("--hold", "--database", str(disk / "jobs.db"))
        accepted = [server.post("quick") for _ in range(3)]
        self.fill(disk)
        until(lambda: self.is_refused(server, accepted), 20)
        assert "disk" in problem(server.http("POST", "/api/jobs/quick"), 507)
        assert server.http("GET", "/healthz").status == 503
        assert "disk" in server.stderr
        assert [job["id"] for job in server.get("/api/jobs")] == accepted
        (disk / "filler").unlink()
        until(lambda: not self.is_refused(server, accepted), 15)
        until(lambda: server.http("GET", "/healthz").status == 200)
        server.kill()
        server.start()
        assert [job["id"] for job in server.get("/api/jobs")] == accepted

    def test_a_result_is_kept_until_there_is_room(self, stage: Stage, disk: Path) -> None:
        server = stage.server("--database", str(disk / "jobs.db"))
        stage.worker(server)
        job = server.sh(f"echo out; until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 3")
        until(lambda: stage.docker.starts(job))
        self.fill(disk)
        until(lambda: self.is_refused(server, []), 20)
        (stage.folder / "go").touch()
        until(lambda: stage.docker.ledger("end", job))
        time.sleep(0.5)
        assert stage.docker.containers()
        (disk / "filler").unlink()
        assert (server.ended(job, 30)["exit_code"], server.log(job)) == (3, b"out\n")
        assert stage.docker.starts(job) == 1
        until(lambda: stage.docker.containers() == [])

    @staticmethod
    def is_refused(server: Server, accepted: list[int]) -> bool:
        """Whether a POST is refused; the ids of what is accepted instead are added to the list."""
        reply = server.http("POST", "/api/jobs", [{"name": "quick"}] * 200)
        accepted += [job["id"] for job in reply.json] if reply.status == 200 else []
        return reply.status != 200


class TestPromise12Schedules:
    """A due time makes exactly one job, whatever is killed; what follows a job's end is queued with that end."""

    JOBS = """
- {name: each, image: busybox, command: env, schedule: '* * * * *', on_success: told}
- {name: fails, image: busybox, command: "false", on_failure: told}
- {name: told, image: busybox, command: env}
"""

    def start_after(self, server: Server, minutes: int) -> None:
        """Kill the server, and start it as if it had been down for some minutes."""
        until(lambda: server.get("/api/configs")[0]["next_due_at"])
        server.kill()
        with contextlib.closing(sqlite3.connect(server.file.parent / "jobs.db")) as connection, connection:
            connection.execute("UPDATE schedule SET upto = upto - ?", (60 * minutes,))
        server.start()

    @pytest.mark.parametrize("minutes", [1, 2, 200])
    def test_of_several_missed_due_times_the_latest_gets_one(self, stage: Stage, minutes: int) -> None:
        server = stage.server(jobs=self.JOBS)
        self.start_after(server, minutes)
        (job,) = until(lambda: server.get("/api/jobs?full=1"))
        assert job["due_at"].endswith(":00.000Z")
        assert server.said(rf"due at .*; missed before it: ({minutes - 1}|{minutes})\b") or minutes == 1

    def test_a_server_killed_around_due_times_and_ends_makes_each_job_once(self, stage: Stage) -> None:
        server = stage.server(jobs=self.JOBS)
        stage.worker(server, "--slots", "4")
        chance = random.Random(12)
        for _ in range(10):
            self.start_after(server, 1)
            until(lambda: chance.random() < 0.05)
        until(lambda: all(job["state"] == "success" for job in server.get("/api/jobs?full=1")))
        jobs = server.get("/api/jobs?full=1")
        dues = [job["due_at"] for job in jobs if job["name"] == "each"]
        assert dues == sorted(set(dues))
        causes = sorted(job["cause"] for job in jobs if job["name"] == "told")
        assert causes == [job["id"] for job in jobs if job["name"] == "each"]

    def test_containers_are_told_when_they_were_due_and_what_they_follow(self, stage: Stage) -> None:
        server = stage.server("--hold", jobs=self.JOBS)
        self.start_after(server, 1)
        stage.worker(server)
        job = server.ended(server.post("fails"))
        due = until(lambda: server.get("/api/jobs?name=each&state=success&full=1"))[0]
        assert f"JOBWORKER_DUE_AT={due['due_at'].replace('.000', '')}\n".encode() in server.log(due["id"])
        (told,) = server.get(f"/api/jobs?cause={job['id']}")
        server.ended(told["id"])
        for key, value in (("ID", job["id"]), ("NAME", "fails"), ("STATE", "failure"), ("REASON", "exit")):
            assert f"JOBWORKER_CAUSE_{key}={value}\n".encode() in server.log(told["id"])
        assert b"JOBWORKER_CAUSE_EXIT_CODE=1\n" in server.log(told["id"])


class TestRealEngine:
    """The same, with Docker itself, and with podman."""

    def test_hello_world_says_hello(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.post("hello-world")
        assert server.ended(job, 30)["success"]
        assert b"Hello from Docker!" in server.log(job)

    @pytest.mark.parametrize("code", [1, 125, 127, 255])
    def test_an_exit_code_is_reported(self, real: tuple[Server, Worker], code: int) -> None:
        server, _ = real
        job = server.ended(server.sh(f"echo out; echo err >&2; exit {code}"), 30)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", code, "exit")
        assert sorted(server.log(job["id"]).split()) == [b"err", b"out"]

    def test_running_out_of_memory_is_the_reason(self, real: tuple[Server, Worker], engine: Engine) -> None:
        server, _ = real
        job = server.ended(server.post("greedy"), 60)
        tells = engine.name == "docker" or Path("/sys/fs/cgroup/cgroup.controllers").exists()  # podman: cgroups 2 only
        assert (job["exit_code"], job["reason"]) == (137, "oom" if tells else "exit")

    def test_a_missing_image_is_the_reason(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.ended(server.post("missing"), 60)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")

    def test_a_program_that_is_not_there_is_a_failure(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.ended(server.post("nothing"), 30)
        assert (job["state"], job["reason"]) == ("failure", "docker")
        assert b"no such file" in server.log(job["id"])

    def test_a_variable_that_docker_has_itself_is_the_containers(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.post("own", environment={"DOCKER_HOST": "tcp://nowhere:1", "PATH": "/bin:/nowhere"})
        assert server.ended(job, 30)["success"]
        assert server.log(job) == b"tcp://nowhere:1 /bin:/nowhere\n"

    def test_a_killed_worker_adopts_what_runs(self, real: tuple[Server, Worker]) -> None:
        server, worker = real
        job = server.sh("for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.2; done; exit 3")
        until(lambda: b"2\n" in server.log(job))
        worker.kill()
        worker.start()
        assert server.ended(job, 30)["exit_code"] == 3
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 11))

    def test_a_killed_docker_client_costs_nothing(self, real: tuple[Server, Worker], engine: Engine) -> None:
        server, _ = real
        job = server.sh("for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.2; done; exit 4")
        until(lambda: b"2\n" in server.log(job))
        [name] = engine.containers(server, job)
        os.kill(engine.client(name), signal.SIGKILL)
        assert server.ended(job, 30)["exit_code"] == 4
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 9))

    def test_a_running_job_is_asked_before_it_is_killed(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.sh("trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done")
        until(lambda: server.log(job) == b"ready\n")
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job, 30)["state"] == "cancelled"
        assert server.log(job) == b"ready\nasked\n"

    def test_nothing_is_left_behind(self, real: tuple[Server, Worker], engine: Engine) -> None:
        server, _ = real
        all_ended(server)
        until(lambda: engine.containers(server) == [], 20)
