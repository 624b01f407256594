"""ends.py: the line that a job's end is in the logs of server and worker."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import protocol
from jobworker.api import description
from jobworker.ends import REASONS, End, how_long, line_of, why
from tests.peers import ScriptedServer, ScriptedWorker
from tests.stage import JOBS, ROOT, Server, Stage, Worker, until

# fmt: off
DEFAULT: dict[str, Any] = {
    "id": 12, "name": "nightly-backup", "state": "failure", "attempt": 1, "failures": 0, "worker": "build-2",
    "exit_code": None, "reason": None, "created_at": 900.0, "started_at": 1000.0, "finished_at": 1252.0,
}
# fmt: on


def line(retries: int = 0, **changes: Any) -> str:
    return line_of(End(**(DEFAULT | changes)), retries)


class TestLine:
    """Who, how long, why, and what next."""

    def test_a_success(self) -> None:
        assert line(state="success", exit_code=0) == "job 12 (nightly-backup) succeeded on build-2 after 4m 12s"
        assert line(state="success", attempt=3).endswith(" after 4m 12s, attempt 3")

    def test_a_failure_that_is_tried_again(self) -> None:
        said = line(3, state="running", attempt=2, failures=1, reason="exit", exit_code=1, retry_in=60)
        words = "failed on build-2 after 4m 12s: exit 1, attempt 2 of 4, again in 60s"
        assert said == f"job 12 (nightly-backup) {words}"

    def test_a_failure_that_is_not(self) -> None:
        assert line(reason="exit", exit_code=1).endswith(" failed on build-2 after 4m 12s: exit 1")
        assert line(3, attempt=4, failures=3, reason="exit", exit_code=1).endswith(": exit 1, attempt 4 of 4")

    def test_an_attempt_that_never_started_is_none_of_the_failures(self) -> None:
        said = line(3, attempt=2, failures=0, reason="exit", exit_code=1, retry_in=1)
        assert said.endswith("attempt 2 of 5, again in 1.0s")

    def test_fewer_retries_by_now_than_it_had(self) -> None:
        assert ", attempt 2 of 3, again" in line(0, attempt=2, failures=1, reason="exit", exit_code=1, retry_in=1)

    def test_a_lost_one(self) -> None:
        words = "failed on build-2 after 4m 12s: lost (its worker went and did not come back)"
        assert line(reason="lost") == f"job 12 (nightly-backup) {words}"

    def test_one_whose_entry_is_gone(self) -> None:
        said = line(worker=None, started_at=None, reason="gone", attempt=2)
        assert said == "job 12 (nightly-backup) failed: gone (its entry left jobs.yaml)"

    def test_a_cancelled_one(self) -> None:
        said = line(state="cancelled", reason="cancelled")
        assert said == "job 12 (nightly-backup) was cancelled on build-2 after 4m 12s"
        waited = line(state="cancelled", reason="cancelled", started_at=None)
        assert waited == "job 12 (nightly-backup) was cancelled while it waited"

    def test_a_reason_cannot_make_a_line_of_its_own(self) -> None:
        assert why(1, "odd\njob 13 (x) succeeded") == r"'odd\njob 13 (x) succeeded'"
        assert len(why(1, "x" * 1000)) == 200

    def test_version_1_says_no_exit_code(self) -> None:
        assert why(None, "exit") == "no exit code"

    def test_the_page_and_the_description_know_each_reason(self) -> None:
        page = (ROOT / "jobworker/dashboard.html").read_text().partition("const REASONS = {")[2].partition("};")[0]
        assert set(re.findall(r"(\w+): \"", page)) == REASONS.keys()
        full_job = json.loads(description())["components"]["schemas"]["FullJob"]
        told = full_job["properties"]["reason"]["description"].partition("Of a failure: ")[2]
        assert set(re.findall(r"`(\w+)`", told)) == REASONS.keys() | {"exit"}

    def test_every_reason_of_the_reference_is_explained(self) -> None:
        table = (ROOT / "docs/reference.md").read_text().partition("The reasons of a failure:")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == REASONS.keys() | {"exit"}

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [(-5, "0.0s"), (0.44, "0.4s"), (12.3, "12s"), (60, "60s"), (119, "119s"), (120, "2m 0s"), (252, "4m 12s"),
         (7_199, "119m 59s"), (3 * 3600 + 300, "3h 5m"), (2 * 86_400 + 4 * 3600, "2d 4h")],
    )  # fmt: skip
    def test_how_long(self, seconds: float, words: str) -> None:
        assert how_long(seconds) == words


def said(program: Any, words: str) -> None:
    """Wait for a line of exactly these words, but for numbers given as patterns."""
    until(lambda: program.said(rf"(?m)^\S+ \S+ INFO {words}$"))


class TestServersLog:
    """`grep failed` tells what failed last night."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("server"))) as stage:
            yield stage.server("--hold")

    def test_each_end_is_a_line(self, stage: Stage) -> None:
        server = stage.server(jobs=f"{JOBS}- {{name: again, image: busybox, command: sh -c 'exit 7', retries: 1}}\n")
        stage.worker(server, name="build-2")
        good, bad, again = server.sh("true"), server.sh("exit 3"), server.post("again")
        said(server, rf"job {good} \(sh\) succeeded on build-2 after \d\.\ds")
        said(server, rf"job {bad} \(sh\) failed on build-2 after \d\.\ds: exit 3")
        said(
            server,
            rf"job {again} \(again\) failed on build-2 after \d\.\ds: exit 7, attempt 1 of 2, again in [01]\.\ds",
        )
        said(server, rf"job {again} \(again\) failed on build-2 after \d\.\ds: exit 7, attempt 2 of 2")
        assert len(re.findall(r"\bfailed\b", server.stderr)) == 3

    def test_it_is_written_once_the_end_is_on_disk(self, server: Server) -> None:
        with ScriptedWorker(server, "one") as worker:
            job = server.post("quick")
            worker.runs()
            assert f"job {job} " not in server.stderr
            worker.send(protocol.JobFailure(job, 1, None, "docker"))
            said(server, rf"job {job} \(quick\) failed on one after \d\.\ds: docker \(.*\)")
            assert server.state(job) == "failure"
            worker.send(protocol.JobFailure(job, 1, None, "docker"))  # a stale one is no end
            worker.next(protocol.Settled)
            worker.next(protocol.Settled)
        assert server.stderr.count(f"job {job} ") == 1

    def test_a_lost_one_is_a_line(self, stage: Stage) -> None:
        server = stage.server("--grace", "0")
        with ScriptedWorker(server, "one") as worker:
            job = server.post("quick")
            worker.runs()
        said(
            server, rf"job {job} \(quick\) failed on one after \d\.\ds: lost \(its worker went and did not come back\)"
        )

    def test_one_that_its_worker_forgot_is_a_line(self, server: Server) -> None:
        with ScriptedWorker(server, "one") as worker:
            job = server.post("quick")
            worker.runs()
            with ScriptedWorker(server, "one"):
                said(server, rf"job {job} \(quick\) failed on one after \d\.\ds: lost \(.*\)")

    def test_a_cancelled_one_is_a_line(self, server: Server) -> None:
        job = server.post("quick")
        server.http("DELETE", f"/api/jobs/{job}")
        said(server, rf"job {job} \(quick\) was cancelled while it waited")

    def test_one_that_is_gone_is_a_line(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        stage.jobs.write_text("- {name: other, image: busybox}\n")
        server.signal(signal.SIGHUP)
        said(server, rf"job {job} \(quick\) failed: gone \(its entry left jobs.yaml\)")

    def test_the_start_says_where_things_are(self, stage: Stage) -> None:
        server = stage.server()
        database = stage.jobs.parent / "jobs.db"
        page = f"page and API: listening on http://127.0.0.1:{server.port}"
        said(server, rf"jobworker \S+: 3 jobs in {stage.jobs}; database {database}; {page}")
        memory = stage.server("--database", ":memory:")
        assert memory.said("; no database: all is forgotten at the end; ")

    def test_a_worker_that_drains_is_said_to(self, server: Server) -> None:
        with ScriptedWorker(server, "last") as worker:
            said(server, r"worker last connected from \S+, 1 slots")
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.Hello("last", 0, (), "0", ((job, 1, "running"),)))
            said(server, r"worker last at \S+ is draining: it takes no new job and ends with the 1 it has")
        assert "0 slots" not in server.stderr


class TestWorkersLog:
    """The worker has its own line of a job's start and its end."""

    @pytest.fixture(scope="class")
    @classmethod
    def both(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Worker]]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("both"))) as stage:
            server = stage.server(jobs=f"{JOBS}- {{name: away, image: missing}}\n")
            yield server, stage.worker(server)

    def test_start_and_end_are_lines(self, both: tuple[Server, Worker]) -> None:
        server, worker = both
        good, bad = server.sh("true"), server.sh("exit 3")
        for job, words in ((good, "succeeded after 0.\\ds"), (bad, r"failed after 0.\ds: exit 3")):
            said(worker, rf"job {job} \(sh\) starts, as jobworker-\w+-{job}-1")
            said(worker, rf"job {job} \(sh\) {words}")

    def test_a_cancelled_one_is_a_line(self, both: tuple[Server, Worker]) -> None:
        server, worker = both
        job = server.sh("echo started; sleep 100")
        until(lambda: server.log(job))
        server.http("DELETE", f"/api/jobs/{job}")
        said(worker, rf"job {job} \(sh\) was cancelled after \d\.\ds")

    def test_one_that_never_started_is_a_line(self, both: tuple[Server, Worker]) -> None:
        server, worker = both
        job = server.post("away")
        said(worker, rf"job {job} \(away\) failed: image \(the image is not there .*\)")

    def test_one_that_is_not_wanted_any_more_is_a_line(self, stage: Stage) -> None:
        with ScriptedServer({"name": "long", "image": "busybox", "command": "sleep 60"}, version=2) as server:
            worker = stage.worker(server)
            server.send(protocol.Enqueue(5, "long", 1))
            server.wait_for(protocol.JobRunning(5, 1))
            server.send(protocol.Go(5, 1))
            until(lambda: stage.docker.starts(5))
            server.send(protocol.Settled(5, 1))
            said(worker, r"job 5 \(long\) is not wanted any more: stopping it")

    def test_draining_is_said(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        said(worker, "draining: taking no new job, finishing 1; .*")
        self.reconnect(server)
        until(lambda: worker.said(r"connected to \S+ as worker, draining$"))
        (stage.folder / "go").touch()
        assert worker.exit_code() == 0

    def reconnect(self, server: Server) -> None:
        server.kill()
        server.start()
