"""Who may do what: tokens, other sites' pages, images that are not allowed, secrets."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

import protocol
from jobworker.api import description
from jobworker.web import REFUSALS_SECONDS, REFUSALS_TOLD, Refusals
from tests.peers import (
    VERSION_2,
    WEBSOCKET,
    ScriptedServer,
    head,
)
from tests.stage import (
    JOBS,
    Server,
    Stage,
    Worker,
    bearer,
    problem,
    until,
)

OPERATIONS = [(method.upper(), path) for path, item in json.loads(description())["paths"].items() for method in item]


OPEN_PATHS = {"/", "/healthz"}
GUARDED = [(method, path.replace("{job}", "1").replace("{worker}", "1")) for method, path in OPERATIONS]
GUARDED = [(method, path) for method, path in GUARDED if path not in OPEN_PATHS]
KEY = "letmein-0123456789"
SECRET = "tellnoone-4711"
SECRETIVE = f"""
- name: secretive
  image: busybox
  command: [sh, -c, 'test "$PASSWORD" = {SECRET[::-1]} && exit 1; sleep 0.5; exit 3']
  environment: {{PASSWORD: {SECRET}, FROM_WORKER: }}
  parameters: {{GIVEN: {{pattern: "[a-z0-9-]+"}}}}
- name: absent
  image: absent
  environment: {{PASSWORD: {SECRET}}}
"""


def command_lines() -> str:
    """What `ps` shows of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("guarded"))) as stage:
        tokens = f"# who may what\napi {KEY}\napi other-0123456789\n\nworker iamone-0123456789\n"
        (stage.folder / "tokens").write_text(tokens)
        server = stage.server("--hold", "--token-file", str(stage.folder / "tokens"))
        server.http("POST", "/api/jobs/quick", headers=bearer(KEY))
        yield server


class TestTokens:
    """Each test tries to get in where it should not."""

    @pytest.mark.parametrize(("method", "path"), GUARDED)
    def test_no_route_is_open_without_a_token(self, guarded: Server, method: str, path: str) -> None:
        body = [{"name": "quick"}] if (method, path) == ("POST", "/api/jobs") else None
        before = guarded.http("GET", "/api/jobs?full=1", headers=bearer(KEY)).body
        reply = guarded.http(method, path, body)
        problem(reply, 401)
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert guarded.http("GET", "/api/jobs?full=1", headers=bearer(KEY)).body == before

    @pytest.mark.parametrize(
        "path",
        [
            f"/api/jobs?token={KEY}",
            f"/api/jobs?access_token={KEY}",
            "//api/jobs",
            "/healthz/../api/jobs",
            "/healthz%2f..%2fapi/jobs",
            "/healthz?/api/jobs",
            "/%61pi/jobs",
            "/?/api/jobs",
            "/;/api/jobs",
            "/runner/api/jobs",
        ],
    )
    def test_no_spelling_of_a_path_goes_round_the_token(self, guarded: Server, path: str) -> None:
        for method in ("GET", "HEAD", "POST", "OPTIONS", "TRACE"):
            reply = guarded.http(method, path)
            assert reply.status in (401, 404, 405) or path.startswith(("/healthz?", "/?"))
            assert b'"queuing"' not in reply.body

    @pytest.mark.parametrize(
        "authorization",
        [
            f"Basic {base64.b64encode(b':' + KEY.encode()).decode()}",
            f"Bearer{KEY}",
            f"Token {KEY}",
            f"Bearer {KEY},{KEY}",
            f"Bearer {KEY} other",
            f"Bearer {KEY}\x00",
            f"Bearer {KEY.upper()}",
            f"Bearer api {KEY}",
            "Bearer *",
            "Bearer #",
            "Bearer",
            "",
        ],
        ids=repr,
    )
    def test_what_is_not_the_token_does_not_open(self, guarded: Server, authorization: str) -> None:
        request = head(b"GET /api/jobs", b"Authorization: " + authorization.encode("latin-1"), b"Connection: close")
        assert re.findall(rb"^HTTP/1.1 (\d+)", guarded.raw(request)) in ([b"401"], [b"400"])

    def test_a_wrong_one_is_logged_but_not_its_words_and_no_flood_of_them(self, stage: Stage) -> None:
        (stage.folder / "tokens").write_text(f"api {KEY}\nworker iamone-0123456789\n")
        server = stage.server("--hold", "--token-file", str(stage.folder / "tokens"))
        problem(server.http("GET", "/api/jobs"), 401)  # as a browser does before it is told a token
        for number in range(5 * REFUSALS_TOLD):
            problem(server.http("GET", "/api/jobs", headers=bearer(f"{SECRET}-{number}")), 401)
        until(lambda: server.said("; more within a minute are only counted"))
        lines = re.findall(".*127.0.0.1 was refused: a wrong token.*", server.stderr)
        assert len(lines) == REFUSALS_TOLD
        assert lines[-1].endswith("; more within a minute are only counted")
        assert SECRET not in server.stderr

    def test_after_a_flood_it_is_told_how_many_there_were(self, caplog: pytest.LogCaptureFixture) -> None:
        times = [*range(REFUSALS_TOLD + 3), REFUSALS_SECONDS]
        refusals = Refusals(iter(times).__next__)
        for _ in times:
            refusals.tell("a request of ::1 was refused: a wrong token")
        assert caplog.messages[-2:] == ["3 more were refused", "a request of ::1 was refused: a wrong token"]
        assert len(caplog.messages) == REFUSALS_TOLD + 2

    def test_two_tokens_are_no_token(self, guarded: Server) -> None:
        fields = [b"Authorization: Bearer " + token for token in (KEY.encode(), b"wrong")]
        for order in (fields, fields[::-1]):
            assert guarded.raw(head(b"GET /api/jobs", *order)).startswith(b"HTTP/1.1 400 ")

    def test_every_token_of_the_file_opens_and_the_scheme_has_no_case(self, guarded: Server) -> None:
        for authorization in (f"Bearer {KEY}", "Bearer other-0123456789", f"bearer {KEY}", f"BEARER  {KEY}"):
            assert guarded.http("GET", "/api/jobs", headers={"Authorization": authorization}).status == 200

    def test_a_bare_token_opens_both(self, stage: Stage) -> None:
        (stage.folder / "tokens").write_text("both-0123456789abc\n")
        token = ("--token-file", str(stage.folder / "tokens"))
        server = stage.server(*token)
        stage.worker(server, *token)
        assert server.http("POST", "/api/jobs/quick?wait=10", headers=bearer("both-0123456789abc")).json["success"]

    def test_a_wrong_token_is_told_from_a_missing_one(self, guarded: Server) -> None:
        assert "needs a token" in problem(guarded.http("GET", "/api/jobs"), 401)
        assert "not a token" in problem(guarded.http("GET", "/api/jobs", headers=bearer(f"{KEY}x")), 401)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "# none\n",
            f"api {KEY}",
            f"worker {KEY}",
            f"admin {KEY}",
            f"api worker {KEY}",
            f"api {KEY}\nworker",
            "api\nworker",
            f"api {KEY}\nworker short",
            f"api {KEY}\nworker clé-{KEY}",
            None,
        ],
    )
    def test_a_token_file_that_leaves_a_door_open_is_refused(self, stage: Stage, content: str | None) -> None:
        stage.jobs.write_text(JOBS)
        path = stage.folder / "tokens"
        if content is not None:
            path.write_text(content)
        refused = stage.run("server.py", "-p", "0", "--token-file", str(path), str(stage.jobs))
        assert refused.returncode == 2
        assert str(path) in refused.stderr
        assert KEY not in refused.stderr
        assert "Traceback" not in refused.stderr


class TestAddresses:
    """Who is not on this machine, or calls it by another's name."""

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "jobs.example"])
    def test_no_address_but_loopback_is_served_without_tokens(self, stage: Stage, host: str) -> None:
        stage.jobs.write_text(JOBS)
        refused = stage.run("server.py", "-p", "0", str(stage.jobs), JOBWORKER_HOST=host)
        assert refused.returncode == 2
        assert "--insecure" in refused.stderr

    def test_it_listens_on_loopback_alone(self, idle: Server) -> None:
        table = Path("/proc/net/tcp").read_text()
        local = re.findall(rf" ([0-9A-F]{{8}}):{idle.port:04X} [0-9A-F]+:0000 0A ", table)
        assert local == ["0100007F"]

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example:80",
            "localhost.",
            "localhost:80@evil.example",
            "evil.example#localhost",
            "localhost,evil.example",
            "127.0.0.1.nip.example",
            "2130706433",
            "0x7f.1",
            "127.1",
            "[::1].evil.example",
            "xn--localhost",
            "localhost:1:2",
        ],
    )
    def test_a_name_of_anothers_is_not_served(self, idle: Server, host: str) -> None:
        for method, path in (("GET", "/api/jobs"), ("POST", "/api/jobs/quick"), ("GET", "/")):
            problem(idle.http(method, path, headers={"Host": host}), 403)
        assert idle.get("/api/jobs") == []

    @pytest.mark.parametrize("host", ["localhost", "LocalHost:8080", "127.0.0.1", "[::1]:9", "192.0.2.7:80"])
    def test_a_name_or_address_of_its_own_is_served(self, idle: Server, host: str) -> None:
        assert idle.http("GET", "/api/jobs", headers={"Host": host}).status == 200


class TestOtherSites:
    """A page of another site, in the browser of somebody who may."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": ""},
            {"Origin": "file://"},
            {"Origin": "http://localhost"},
            {"Origin": "http://localhost:1"},
            {"Origin": "http://127.0.0.1"},
            {"Origin": "localhost"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"},
            {"Sec-Fetch-Site": "CROSS-SITE"},
            {"Sec-Fetch-Site": ""},
            {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
    def test_a_page_of_another_site_gets_nothing_even_with_the_token(
        self, guarded: Server, headers: dict[str, str], kind: str
    ) -> None:
        before = guarded.http("GET", "/api/jobs", headers=bearer(KEY)).body
        headers = {**bearer(KEY), **headers, "Content-Type": kind}
        problem(guarded.http("POST", "/api/jobs/quick", {}, headers=headers), 403)
        problem(guarded.http("GET", "/api/jobs", headers=headers), 403)
        assert guarded.http("GET", "/api/jobs", headers=bearer(KEY)).body == before

    def test_no_page_is_told_that_it_may_read(self, idle: Server) -> None:
        for method in ("GET", "OPTIONS"):
            headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            reply = idle.http(method, "/api/jobs", headers=headers)
            assert not [name for name in reply.headers if name.lower().startswith("access-control")]

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1"])
    def test_no_page_opens_a_workers_websocket(self, guarded: Server, origin: str) -> None:
        url = f"ws://127.0.0.1:{guarded.port}/runner"
        for protocols in (None, [VERSION_2]):
            with pytest.raises(InvalidStatus) as refused:
                connect(
                    url,
                    proxy=None,
                    origin=Origin(origin),
                    subprotocols=protocols,
                    additional_headers=bearer("iamone-0123456789"),
                )
            assert refused.value.response.status_code == 403
        assert guarded.http("GET", "/api/workers", headers=bearer(KEY)).json == []


class TestWorkers:
    """Who may be a worker, and what a worker's owner lets it run."""

    @pytest.mark.parametrize("headers", [{}, bearer(KEY), bearer(""), {"Authorization": "iamone-0123456789"}], ids=str)
    def test_no_worker_without_a_workers_token(self, guarded: Server, headers: dict[str, str]) -> None:
        for protocols in (None, [VERSION_2]):
            with pytest.raises(InvalidStatus) as refused:
                connect(
                    f"ws://127.0.0.1:{guarded.port}/runner?token=iamone-0123456789",
                    proxy=None,
                    subprotocols=protocols,
                    additional_headers=headers,
                )
            assert refused.value.response.status_code == 401

    def test_two_workers_tokens_are_refused_without_a_fuss(self, guarded: Server) -> None:
        tokens = [b"Authorization: Bearer iamone-0123456789", b"Authorization: Bearer wrong"]
        reply = guarded.raw(head(b"GET /runner", *WEBSOCKET, *tokens))
        assert re.findall(rb"^HTTP/1.1 (\d+)", reply) in ([b"400"], [b"401"])

    @pytest.mark.parametrize(
        ("globs", "image"),
        [
            (["busybox"], "busybox:latest"),
            (["busybox"], "evil/busybox"),
            (["busybox:*"], "evil.example/busybox:1"),
            (["registry.example/*"], "registry.example.evil/x"),
            (["busybox"], "BUSYBOX"),
            (["busybox"], "busybox\n"),
            (["a", "b"], "c"),
            ([""], "busybox"),
        ],
        ids=str,
    )
    def test_no_image_but_those_that_the_workers_owner_allows(self, stage: Stage, globs: list[str], image: str) -> None:
        stage.docker.allow(f"busybox {image}")
        allowed = [word for glob in globs for word in ("--allow-image", glob)]
        for version in (1, 2):
            with ScriptedServer({"command": None, "image": image, "name": "a"}, version=version) as server:
                stage.worker(server, *allowed, name=f"w{version}")
                until(lambda server=server: server.peer)  # type: ignore[misc]
                ask_for(server, version)
                ended(server)
        assert stage.docker.starts() == 0
        assert stage.docker.ledger("pull") == []

    @pytest.mark.parametrize("options", [["evil"], ["--", "evil"], ["--rm", "evil"], ["-i", "--", "evil"]], ids=str)
    def test_no_option_of_a_job_smuggles_in_another_image(self, stage: Stage, options: list[str]) -> None:
        stage.docker.allow("busybox evil")
        config = {"command": None, "image": "busybox", "name": "a", "options": options}
        with ScriptedServer(config, version=2) as server:
            stage.worker(server, "--allow-image", "busybox")
            until(lambda: server.peer)
            ask_for(server, 2)
            ended(server)
        run = [words for _, _, _, *words in stage.docker.ledger("run")]
        assert not [words for words in run if "evil" in words]


class TestSecrets:
    """Each test tries to see what it should not."""

    def test_a_jobs_secrets_are_nowhere_to_be_seen(self, stage: Stage) -> None:
        server = stage.server("--verbose", jobs=SECRETIVE)
        worker = stage.worker(server, "--verbose", FROM_WORKER=f"{SECRET}-worker")
        job = server.post("secretive", environment={"GIVEN": "mine"})
        until(lambda: server.state(job) == "running" and stage.docker.starts(job))
        assert SECRET not in command_lines()
        absent = server.post("absent")
        assert server.ended(job)["exit_code"] == 3
        assert server.ended(absent)["reason"] == "image"
        self.assert_unseen(SECRET, stage, server, worker, [job, absent])

    def test_a_given_value_is_in_no_argument_list_and_no_log(self, stage: Stage) -> None:
        server = stage.server("--verbose", jobs=SECRETIVE)
        worker = stage.worker(server, "--verbose")
        job = server.post("secretive", environment={"GIVEN": SECRET})
        until(lambda: stage.docker.starts(job))
        assert SECRET not in command_lines()
        server.ended(job)
        problem(server.http("POST", "/api/jobs/secretive", {"environment": {"GIVEN": f"{SECRET}!"}}), 400)
        problem(server.http("POST", "/api/jobs/secretive", {"environment": {"OTHER": SECRET}}), 400)
        assert SECRET not in server.stderr + worker.stderr + (stage.docker.folder / "ledger").read_text()

    def test_tokens_are_nowhere_to_be_seen(self, stage: Stage) -> None:
        api_token, worker_token = "apitoken-apitoken-hush", "workertoken-hush"
        (stage.folder / "tokens").write_text(f"api {api_token}\nworker {worker_token}\n")
        (stage.folder / "token").write_text(f"{worker_token}\n")
        server = stage.server("--verbose", "--token-file", str(stage.folder / "tokens"))
        worker = stage.worker(server, "--verbose", "--token-file", str(stage.folder / "token"))
        body = {"environment": {"SCRIPT": "env"}}
        job = server.http("POST", "/api/jobs/sh?wait=10&full=1", body, headers=bearer(api_token))
        assert job.json["success"]
        server.http("GET", "/api/jobs", headers=bearer(f"{api_token}x"))
        assert "hush" not in command_lines()
        self.assert_unseen("hush", stage, server, worker, [job.json["id"]], bearer(api_token))

    def assert_unseen(
        self,
        secret: str,
        stage: Stage,
        server: Server,
        worker: Worker,
        jobs: list[int],
        headers: dict[str, str] | None = None,
    ) -> None:
        """Look for a secret in argument lists, logs, and all that can be asked for."""
        paths = ["/api/jobs?full=1", "/api/workers?full=1", "/api/configs", "/metrics", "/healthz", "/"]
        paths += [f"/api/jobs/{job}{rest}" for job in jobs for rest in ("", "/log", "/attempts")]
        for path in paths:
            reply = server.http("GET", path, headers=headers)
            assert reply.status == 200, path
            assert secret not in f"{reply.headers}{reply.body.decode()}", path
        assert secret not in server.stderr
        assert secret not in worker.stderr
        assert secret not in (stage.docker.folder / "ledger").read_text()


def ask_for(server: ScriptedServer, version: int) -> None:
    """Have the worker run job a to its start."""
    if version == 1:
        server.send(protocol.Enqueue(1, "a"))
        return
    server.send(protocol.Enqueue(1, "a", 1, {}))
    until(lambda: [one for one in server.received if isinstance(one, protocol.JobRunning)])
    server.send(protocol.Go(1, 1))


def ended(server: ScriptedServer) -> None:
    """Wait for the worker's word about job a, which must not be that it went well."""
    results = protocol.JobSuccess, protocol.JobFailure
    result = until(lambda: next((one for one in server.received if isinstance(one, results)), None))
    assert isinstance(result, protocol.JobFailure)
