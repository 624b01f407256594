"""The API as people use it by curl: forms, bulk, what fails, what was meant, and what one script needs."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from jobworker import api, lists, retention, state
from jobworker.config import Configs, JobConfig
from jobworker.message import parse_head
from jobworker.store import Store
from tests.peers import ScriptedWorker
from tests.stage import ROOT, Server, Stage, all_ended, problem, until
from tests.test_state import arrival

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JOBS = """
- {name: quick, image: busybox, command: "true", on_success: told}
- {name: fails, image: busybox, command: "false", on_failure: told}
- {name: told, image: busybox, command: env}
- name: sh
  image: busybox
  command: [sh, -c, 'eval "$SCRIPT"']
  parameters: {SCRIPT: {required: true}, NAME: {default: world, pattern: '[A-Za-z ]+'}}
- {name: greeting, image: busybox, command: [sh, -c, 'echo "Hello, $NAME"'], parameters: {NAME: {default: world}}}
"""


@pytest.fixture
def fresh(stage: Stage) -> Server:
    return stage.server("--hold", jobs=JOBS)


@pytest.fixture(scope="module")
def held(shared: Stage) -> Server:
    return shared.server("--hold", jobs=JOBS)


@pytest.fixture
def server(held: Server) -> Iterator[Server]:
    """One that no worker takes a job from; those of other tests are final."""
    yield held
    held.http("DELETE", "/api/jobs?state=queued")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("box"))) as stage:
        server = stage.server("--hold", jobs=JOBS)
        stage.worker(server, "--slots", "4", name="box-1")
        yield server


@pytest.fixture
def worked(box: Server) -> Iterator[Server]:
    """One with a worker; the jobs of other tests are final."""
    yield box
    box.http("DELETE", "/api/jobs?state=queued,assigned,running")
    all_ended(box)


class TestForm:
    """curl -d NAME=Ada sets a parameter."""

    def ask(self, server: Server, body: bytes, status: int = 200) -> Any:
        reply = server.http("POST", "/api/jobs/greeting?full=1", body, headers=FORM)
        return reply.json if status == 200 == reply.status else problem(reply, status)

    def test_its_fields_are_the_environment(self, server: Server) -> None:
        assert self.ask(server, b"NAME=Ada+Lovelace%21")["environment"] == {"NAME": "Ada Lovelace!"}
        assert self.ask(server, b"NAME=")["environment"] == {"NAME": ""}

    def test_what_curl_calls_a_form_and_is_json_is_json(self, server: Server) -> None:
        assert self.ask(server, b' {"environment": {"NAME": "Ada"}}')["environment"] == {"NAME": "Ada"}

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"NAME=a&NAME=b", "twice"),
            (b"NAME", "neither a JSON object nor a form such as NAME=Ada: bad field"),
            (b"NAME=%ff", "neither a JSON object nor a form"),
            (b"COLOUR=red", '"COLOUR" is no parameter of greeting, which takes NAME'),
        ],
    )
    def test_what_it_can_not_be_is_said(self, server: Server, body: bytes, words: str) -> None:
        assert words in self.ask(server, body, 400)

    def test_one_that_does_not_say_it_is_a_form_is_not_taken_for_one(self, server: Server) -> None:
        reply = server.http("POST", "/api/jobs/greeting", b"NAME=Ada", headers={"Content-Type": "text/plain"})
        assert "not JSON" in problem(reply, 400)


class TestRequire:
    """With require=success, what is no success is an error for curl -f."""

    @pytest.mark.parametrize(
        ("name", "status", "state"), [("quick", 200, "success"), ("fails", 424, "failure"), ("told", 200, "success")]
    )
    def test_the_status_tells_and_the_body_is_the_job(self, worked: Server, name: str, status: int, state: str) -> None:
        reply = worked.http("POST", f"/api/jobs/{name}?wait=20&require=success&full=1", seconds=30)
        assert (reply.status, reply.json["state"]) == (status, state)
        again = worked.http("GET", f"/api/jobs/{reply.json['id']}?require=success")
        assert (again.status, again.json) == (status, reply.json)

    @pytest.mark.parametrize("wait", ["", "&wait=0.05"])
    def test_one_that_has_not_ended_is_504(self, server: Server, wait: str) -> None:
        reply = server.http("POST", f"/api/jobs/quick?require=success{wait}")
        assert (reply.status, reply.json["queuing"]) == (504, True)

    def test_a_cancelled_one_is_424(self, server: Server) -> None:
        job = server.post("quick")
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.http("GET", f"/api/jobs/{job}?require=success").status == 424

    def test_nothing_else_can_be_required(self, server: Server) -> None:
        assert "require must be success" in problem(server.http("GET", "/api/jobs/1?require=1"), 400)


class TestFilters:
    """Which jobs a list shows."""

    def names(self, server: Server, query: str) -> list[str]:
        return [job["name"] for job in server.get(f"/api/jobs?{query}")]

    def test_a_part_of_the_name_in_capitals_or_not(self, server: Server) -> None:
        first, *_, last = [server.post(name) for name in ("quick", "told", "greeting", "quick")]
        assert self.names(server, f"q=I&after={first - 1}") == ["quick", "greeting", "quick"]
        assert self.names(server, "q=i&name=quick&limit=1") == ["quick"]
        assert self.names(server, f"q=i&before={last}&limit=1") == ["greeting"]
        assert self.names(server, "q=%25") == self.names(server, "q=i&state=running") == []

    def test_its_worker(self, worked: Server) -> None:
        job = worked.post("told")
        worked.ended(job)
        assert self.names(worked, f"worker=box-1&after={job - 1}") == ["told"]
        assert self.names(worked, "worker=box-2") == self.names(worked, "worker=box-1&state=queued") == []

    def test_its_cause(self, worked: Server) -> None:
        job = worked.post("quick")
        worked.ended(job)
        worked.post("told")
        (follower,) = worked.get(f"/api/jobs?cause={job}&full=1")
        assert (follower["name"], follower["cause"]) == ("told", job)
        assert self.names(worked, f"cause={follower['id']}") == []

    def test_when_it_ended(self, worked: Server) -> None:
        first = worked.post("told")
        worked.ended(first)
        between = datetime.now(UTC)
        until(lambda: datetime.now(UTC) > between)
        worked.post("told", delay=100)
        job = worked.ended(worked.post("fails"))
        until(lambda: len(worked.get(f"/api/jobs?state=success&after={first - 1}")) == 2)
        assert self.names(worked, f"ended_after={quote(between.isoformat())}") == ["fails", "told"]
        assert self.names(worked, f"state=failure&ended_after={quote(between.isoformat())}") == ["fails"]
        assert self.names(worked, "ended_after=2100-01-01T00:00Z") == []
        assert job["finished_at"] > between.isoformat()

    @pytest.mark.parametrize("moment", ["yesterday", "2026-13-01", "", "1e9"])
    def test_what_is_no_time_is_said(self, server: Server, moment: str) -> None:
        assert "such as 2026-11-25T22:00:00Z" in problem(server.http("GET", f"/api/jobs?ended_after={moment}"), 400)


class TestBulk:
    """Many jobs at once."""

    def test_all_that_failed_run_again(self, stage: Stage, fresh: Server) -> None:
        stage.worker(fresh, "--slots", "4")
        failed = [fresh.post("fails") for _ in range(3)]
        for job in failed:
            fresh.ended(job)
        until(lambda: len(fresh.get("/api/jobs?state=success&name=told")) == 3)
        reply = fresh.http("POST", "/api/jobs?retry=failure,cancelled&name=fails")
        assert (reply.status, reply.json) == (200, {"queued": 3, "refused": []})
        until(lambda: len(fresh.get("/api/jobs?state=failure&name=fails")) == 6)

    def test_more_than_a_piece_and_none_of_those_that_it_makes(self, fresh: Server) -> None:
        fresh.http("POST", "/api/jobs", [{"name": "quick"}] * 1_100)
        assert fresh.http("DELETE", "/api/jobs?state=queued&name=told").json == {"cancelled": 0}
        assert fresh.http("DELETE", "/api/jobs?state=queued&name=quick").json == {"cancelled": 1_100}
        assert fresh.http("POST", "/api/jobs?retry=cancelled").json == {"queued": 1_100, "refused": []}
        assert len(fresh.get("/api/jobs?state=queued")) == 1_100

    def test_what_jobs_yaml_has_no_more_is_refused_one_by_one(self, stage: Stage, fresh: Server) -> None:
        first = fresh.http("POST", "/api/jobs", [{"name": "quick"}, {"name": "told"}]).json[0]["id"]
        fresh.http("DELETE", "/api/jobs?state=queued")
        fresh.kill()
        stage.jobs.write_text("- {name: told, image: busybox}")
        fresh.start()
        reply = fresh.http("POST", "/api/jobs?retry=cancelled").json
        assert reply["queued"] == 1
        assert [each["id"] for each in reply["refused"]] == [first]
        assert "no job named 'quick'" in reply["refused"][0]["detail"]

    def test_the_refused_are_named_up_to_a_thousand_and_then_counted(self) -> None:
        with contextlib.closing(Store(":memory:").start()) as store:
            ids = store.do(state.add, [state.NewJob("gone")] * (1_502), 0.0, True).result()
            store.do(lists.cancel_all, lists.Wanted(), len(ids), 0.0).result()
            answer = api._retry_all(api.Api(store, Configs([]), True), lists.Wanted(("cancelled",)))
        assert isinstance(answer.body, bytes)
        told = json.loads(answer.body)
        assert [each["id"] for each in told["refused"]] == ids[:1_000]
        assert (told["queued"], told["more_refused"]) == (0, 502)

    def test_what_was_queued_is_counted_though_the_last_worker_goes_meanwhile(self) -> None:
        with contextlib.closing(Store(":memory:").start()) as store:
            configs = Configs([JobConfig(name="once", image="busybox")])
            worker, _held = store.do(state.attach, arrival("w"), 0.0, configs).result()
            ids = store.do(state.add, [state.NewJob("once")] * (api.BULK_JOBS + 2), 0.0).result()
            store.do(lists.cancel_all, lists.Wanted(), len(ids), 0.0).result()
            pieces = iter([0.0, 1.0])

            def clock() -> float:
                if now := next(pieces):
                    store.do(state.detach, worker, 0.0, now).result()
                    store.do(state.lose, worker, now, configs).result()
                return now

            answer = api._retry_all(api.Api(store, configs, False, clock), lists.Wanted(("cancelled",)))
        assert isinstance(answer.body, bytes)
        told = json.loads(answer.body)
        assert told["queued"] == api.BULK_JOBS
        assert [each["id"] for each in told["refused"]] == ids[api.BULK_JOBS :]
        assert "worker is not exist" in told["refused"][0]["detail"]

    def test_running_ones_are_asked_to_stop(self, worked: Server) -> None:
        job = worked.sh("while :; do sleep 0.05; done")
        until(lambda: worked.job(job)["state"] == "running")
        assert worked.http("DELETE", "/api/jobs?state=queued,assigned,running").json == {"cancelled": 1}
        assert worked.ended(job)["state"] == "cancelled"

    @pytest.mark.parametrize(
        ("method", "query", "words"),
        [
            ("DELETE", "", "state is missing"),
            ("DELETE", "?name=quick", "state is missing"),
            ("DELETE", "?state=success", "'success' is not"),
            ("POST", "?retry=running", "'running' is not"),
            ("POST", "?name=quick", "name needs retry"),
            ("POST", "?worker=worker", "worker needs retry"),
            ("POST", "?retry=", "'' is not"),
        ],
    )
    def test_states_that_do_not_fit_are_400(self, server: Server, method: str, query: str, words: str) -> None:
        assert words in problem(server.http(method, f"/api/jobs{query}"), 400)

    def test_a_retried_follow_up_keeps_its_cause(self, stage: Stage, fresh: Server) -> None:
        stage.worker(fresh, "--slots", "4")
        job = fresh.post("quick")
        until(lambda: fresh.get(f"/api/jobs?cause={job}&state=success"))
        fresh.http("POST", "/api/jobs?retry=success&name=told")
        until(lambda: len(fresh.get(f"/api/jobs?cause={job}&state=success")) == 2)
        for follower in fresh.get(f"/api/jobs?cause={job}"):
            assert f"JOBWORKER_CAUSE_ID={job}".encode() in fresh.log(follower["id"])


class TestMeant:
    """An error says what may have been meant."""

    def test_the_near_name(self, server: Server) -> None:
        assert "did you mean greeting?" in problem(server.http("POST", "/api/jobs/greting"), 404)
        assert "did you mean" not in problem(server.http("POST", "/api/jobs/zzz"), 404)

    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    def test_a_name_where_an_id_belongs(self, server: Server, method: str) -> None:
        detail = problem(server.http(method, "/api/jobs/greeting"), 404)
        assert "POST /api/jobs/greeting; its runs: GET /api/jobs?name=greeting" in detail
        detail = problem(server.http(method, "/api/jobs/two%20words"), 404)
        assert "POST /api/jobs/two%20words; its runs: GET /api/jobs?name=two%20words" in detail

    def test_a_workers_name_where_its_id_belongs(self, server: Server) -> None:
        detail = problem(server.http("GET", "/api/workers/box-1"), 404)
        assert detail.endswith("Who has which name: GET /api/workers?full=1; its jobs: GET /api/jobs?worker=box-1")


class TestGoneWorkers:
    """Who went within the hour, and what it held."""

    def test_they_are_shown_with_what_they_held(self, stage: Stage) -> None:
        server = stage.server("--grace", "0.3s", jobs=JOBS)
        with ScriptedWorker(server, "box-1") as worker:
            job = server.post("quick")
            worker.runs()
        until(lambda: server.job(job)["state"] == "failure")
        assert server.get("/api/workers?full=1") == []
        (gone,) = server.get("/api/workers?gone=1&full=1")
        assert (gone["name"], gone["connected"], gone["jobs"]) == ("box-1", False, [job])
        assert gone["gone_at"] <= server.job(job)["finished_at"]
        with ScriptedWorker(server, "box-1"):
            (back,) = server.get("/api/workers?gone=1&full=1")
            assert (back["connected"], back["jobs"], back["gone_at"]) == (True, [], None)


class TestConfigs:
    """GET /api/configs tells what is due, and how the newest run stands."""

    def test_next_due_and_last(self, stage: Stage) -> None:
        scheduled = "- {name: late, image: busybox, schedule: '0 0 1 1 *', timezone: Europe/Berlin, on_failure: told}"
        server = stage.server("--hold", jobs=JOBS + scheduled)
        stage.worker(server)
        assert {config["last"] for config in server.get("/api/configs")} == {None}
        job = server.ended(server.post("fails"))
        configs = {config["name"]: config for config in server.get("/api/configs")}
        late = configs["late"]
        assert (late["schedule"], late["timezone"], late["on_failure"]) == (["0 0 1 1 *"], "Europe/Berlin", "told")
        assert re.fullmatch(r"20\d\d-12-31T23:00:00\.000Z", late["next_due_at"])
        last = configs["fails"]["last"]
        assert last == {key: job[key] for key in last}
        assert (last["state"], configs["quick"]["next_due_at"], configs["quick"]["last"]) == ("failure", None, None)


class TestEveryAnswer:
    """Each JSON answer ends its line."""

    @pytest.mark.parametrize(
        "path", ["/api/jobs", "/api/jobs?full=1", "/api/workers", "/api/configs", "/healthz", "/openapi.json", "/x"]
    )
    def test_with_one_line_feed(self, server: Server, path: str) -> None:
        body = server.http("GET", path).body
        assert body.endswith((b"}\n", b"]\n"))
        json.loads(body)


class TestScript:
    """The three lines of the reference run a job, show its log as it comes, and exit 0 only where it succeeded."""

    LINES = re.search(r"```sh\n(id=.*?)```", (ROOT / "docs" / "reference.md").read_text(), re.DOTALL)

    def run(self, server: Server, name: str, field: str) -> subprocess.CompletedProcess[str]:
        assert self.LINES
        script = self.LINES[1].replace("localhost:8080", f"127.0.0.1:{server.port}").replace("greeting", name)
        script = script.replace("-d NAME=Ada", f"--data-urlencode '{field}'")
        words = ["sh", "-c", script]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=False, env={"PATH": "/usr/bin:/bin"}
        )

    def test_a_success_is_0(self, worked: Server) -> None:
        done = self.run(worked, "greeting", "NAME=Ada")
        assert (done.returncode, done.stdout) == (0, "Hello, Ada\n")

    def test_a_failure_is_not(self, worked: Server) -> None:
        done = self.run(worked, "sh", "SCRIPT=echo said; exit 3")
        assert done.stdout == "said\n"
        assert done.returncode == 22
        assert "424" in done.stderr

    def test_the_log_comes_as_it_is_written(self, worked: Server, tmp_path: Path) -> None:
        flag = tmp_path / "go-on"
        start = time.monotonic()
        assert self.LINES
        script = self.LINES[1].replace("localhost:8080", f"127.0.0.1:{worked.port}").replace("greeting", "sh")
        wait = f"SCRIPT=echo first; while [ ! -e {flag} ]; do sleep 0.05; done; echo second"
        script = script.replace("-d NAME=Ada", f"--data-urlencode '{wait}'")
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout
            assert running.stdout.readline() == "first\n"
            flag.touch()
            assert running.stdout.readline() == "second\n"
            assert running.wait(20) == 0
        assert time.monotonic() - start < 30


class TestFollowedLog:
    """`curl -N …/log?follow=1` ends with the job, whatever becomes of it meanwhile."""

    def test_a_log_is_followed_through_all_attempts_or_the_one_that_is_named(self, stage: Stage) -> None:
        go = stage.folder / "go"
        script = f"echo begins $JOBWORKER_ATTEMPT; until [ -e {go} ]; do sleep 0.05; done; echo ends; exit 3"
        entry = f"{{name: again, image: busybox, retries: 2, retry_delay: 100ms, command: [sh, -c, '{script}']}}"
        server = stage.server(jobs=f"- {entry}\n")
        stage.worker(server)
        job = server.post("again")
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(server.log, job, "?follow=1")
            until(lambda: server.log(job) == b"begins 1\n")
            first = pool.submit(server.log, job, "?follow=1&attempt=1")
            go.touch()
            assert first.result(20) == b"begins 1\nends\n"
            assert whole.result(20) == b"".join(b"begins %d\nends\n" % attempt for attempt in (1, 2, 3))
        assert server.job(job)["state"] == "failure"

    def test_a_log_that_is_followed_ends_with_its_job_also_where_that_is_deleted(self) -> None:
        with contextlib.closing(Store(":memory:").start()) as store:
            (job,) = store.do(state.add, [state.NewJob("once")], 0.0, True).result()
            pieces = api.Api(store, Configs([]), True).follow(
                parse_head(b"GET / HTTP/1.1\r\nHost: localhost"), job, 0, 0, on=True
            )
            assert next(pieces) == b""
            store.do(state.cancel, job, 0.0).result()
            store.do(retention.prune, 1.0, [], 10).result()
            assert list(pieces) == []
