"""The API's description, mutated raw requests, metrics, the event stream, and who may do what."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema_rs
import pytest
import schemathesis
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

import protocol
from jobworker import VERSION
from jobworker import api as api_module
from jobworker import state as state_module
from jobworker.metrics import metrics_text
from jobworker.state import Arrival, Totals
from jobworker.store import Store
from test_jobworker import (
    JOBS,
    SMUGGLED,
    VERSION_2,
    Events,
    ScriptedServer,
    ScriptedWorker,
    Server,
    Stage,
    Worker,
    bearer,
    head,
    problem,
    read_to_end,
    until,
)

# -- the description ---------------------------------------------------------------------------------------------------

OPENAPI = json.loads(api_module.description())
OPERATIONS = {
    (method.upper(), path): operation for path, item in OPENAPI["paths"].items() for method, operation in item.items()
}
SCHEMATHESIS_HOOKS = '''
"""Waits are cut short, no log is followed whose job may never end, and most names are of jobs that there are."""
import schemathesis

NAMES = ["hello-world", "greeting", "missing", "later"]


@schemathesis.hook
def before_call(context, case, kwargs):
    name = str(case.path_parameters.get("job", ""))
    if case.method == "POST" and case.path == "/api/jobs/{job}" and len(name) % 5 < 4 and 1 <= len(name) <= 128:
        case.path_parameters["job"] = NAMES[len(name) % 5]
    query = case.query if isinstance(case.query, dict) else {}
    if isinstance(query.get("wait"), (int, float)) and 0.2 < query["wait"] <= 3600:
        query["wait"] = 0.2
    if query.get("follow") == "1":
        query["follow"] = "0"
'''
SCHEMATHESIS_CONFIG = """
request-timeout = 5
[generation]
deterministic = true
database = "none"
[checks.positive_data_acceptance] # a name, an id or a parameter that is well-formed need not be there
expected-statuses = ["2xx", "400", "404", "409"]
[checks.use_after_free] # DELETE cancels a job, which is still there to be seen
enabled = false
"""
EVERY_KIND_OF_JOB = """
- {name: hello-world, image: hello-world}
- {name: greeting, image: busybox, command: "true", parameters: {NAME: {default: world}, ROOM: {pattern: "[a-z]+"}}}
- {name: missing, image: missing, command: [a, b], retries: 1, retry_delay: 1}
- {name: later, image: busybox, tags: [gpu], concurrency: 2, timeout: 1m, priority: -1}
"""


def resolve(node: Any) -> Any:
    """What a reference of the description stands for."""
    while isinstance(node, dict) and "$ref" in node:
        pointer = node["$ref"].removeprefix("#/").split("/")
        node = OPENAPI
        for key in pointer:
            node = node[key]
    return node


def nodes(node: Any) -> Iterator[Any]:
    """The description's every part."""
    yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(child)


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    whole = {**schema, "components": OPENAPI["components"]}
    jsonschema_rs.validator_for(whole, validate_formats=True).validate(value)
    return True


class TestOpenApi:
    """openapi.json says what the API does, all of it, and nothing else."""

    @pytest.fixture(scope="class")
    @classmethod
    def stage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("openapi"))) as stage:
            (stage.folder / "tokens").write_text("letmein\n")
            token = ("--token-file", str(stage.folder / "tokens"))
            server = stage.server("--hold", *token, jobs=EVERY_KIND_OF_JOB)
            stage.worker(server, "--slots", "2", *token)
            yield stage

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, stage: Stage) -> Server:
        server = stage.programs[0]
        assert isinstance(server, Server)
        return server

    def test_every_route_is_described_and_every_description_has_its_route(self) -> None:
        assert sorted((route.method, route.path) for route in api_module.ROUTES) == sorted(OPERATIONS)

    def test_every_parameter_of_a_route_is_described_and_no_other(self) -> None:
        for route in api_module.ROUTES:
            described = OPERATIONS[route.method, route.path].get("parameters", [])
            assert [(each["name"], each["in"], each["description"]) for each in described] == [
                (parameter.name, parameter.place, parameter.sentence) for parameter in route.parameters
            ]

    def test_a_parameter_out_of_its_described_range_is_refused(self, server: Server) -> None:
        """What the description says of a number's range is what the reader of it refuses."""
        checked = 0
        for (method, path), operation in OPERATIONS.items():
            for parameter in operation.get("parameters", []):
                schema = resolve(parameter["schema"])
                if method == "GET" and parameter["in"] == "query" and "maximum" in schema:
                    checked += 1
                    filled = path.replace("{job}", "1")
                    for value in (schema["minimum"] - 1, schema["maximum"] + 1):
                        query = f"{filled}?{parameter['name']}={value}"
                        assert parameter["name"] in problem(server.http("GET", query, headers=bearer("letmein")), 400)
        assert checked >= 6

    def test_it_is_valid(self) -> None:
        schemathesis.openapi.from_dict(OPENAPI).validate()
        for schema in OPENAPI["components"]["schemas"].values():
            jsonschema_rs.meta.validate(schema)

    def test_every_reference_leads_somewhere_and_every_component_is_used(self) -> None:
        references = {node["$ref"] for node in nodes(OPENAPI) if isinstance(node, dict) and "$ref" in node}
        assert all(resolve({"$ref": reference}) for reference in references)
        pieces = {
            f"#/components/{kind}/{name}"
            for kind in ("links", "responses", "schemas")
            for name in OPENAPI["components"][kind]
        }
        in_prose = {"#/components/schemas/Stats"}  # the data of an event is text to JSON Schema
        assert pieces - references == in_prose

    def test_every_example_is_one(self) -> None:
        shown = [node for node in nodes(OPENAPI) if isinstance(node, dict) and {"example", "schema"} <= node.keys()]
        assert len(shown) > 10
        assert all(conforms(node["example"], node["schema"]) for node in shown)

    def test_every_operation_has_a_name_and_says_what_it_is_for(self) -> None:
        assert len({operation["operationId"] for operation in OPERATIONS.values()}) == len(OPERATIONS)
        assert all(operation["summary"] and operation["tags"] for operation in OPERATIONS.values())
        names = {tag["name"] for tag in OPENAPI["tags"]}
        assert {tag for operation in OPERATIONS.values() for tag in operation["tags"]} == names
        assert OPENAPI["info"]["version"] == VERSION

    def test_every_parameter_in_a_path_is_described(self) -> None:
        for (_, path), operation in OPERATIONS.items():
            described = map(resolve, operation.get("parameters", ()))
            in_path = [parameter["name"] for parameter in described if parameter["in"] == "path"]
            assert in_path == re.findall(r"\{(\w+)\}", path)

    def test_every_query_parameter_is_known_and_no_other(self, server: Server) -> None:
        for (method, path), operation in OPERATIONS.items():
            if method == "GET" and path not in ("/", "/api/events"):
                described = [p["name"] for p in map(resolve, operation.get("parameters", ())) if p["in"] == "query"]
                filled = path.replace("{job}", "1").replace("{worker}", "1")
                server.http("POST", "/api/jobs/hello-world", headers=bearer("letmein"))
                detail = problem(server.http("GET", f"{filled}?colour=red", headers=bearer("letmein")), 400)
                assert detail.endswith("there are: " + ", ".join(described)), (path, detail)

    def test_it_is_served_as_it_is(self, server: Server) -> None:
        reply = server.http("GET", "/openapi.json", headers=bearer("letmein"))
        assert reply.body == api_module.description()
        assert reply.headers["Content-Type"] == "application/json"

    def test_every_key_of_every_object_is_described(self, server: Server) -> None:
        def get(path: str) -> Any:
            return server.http("GET", path, headers=bearer("letmein")).json

        job = server.http("POST", "/api/jobs/missing?wait=10&full=1", headers=bearer("letmein")).json
        objects = {
            "Job": get(f"/api/jobs?after={job['id'] - 1}")[0],
            "FullJob": job,
            "Attempt": get(f"/api/jobs/{job['id']}/attempts")[0],
            "Worker": get("/api/workers")[0],
            "FullWorker": get("/api/workers?full=1")[0],
            "Config": get("/api/configs")[1],
            "Parameter": get("/api/configs")[1]["parameters"]["ROOM"],
            "Health": get("/healthz"),
            "Problem": get("/nothing"),
        }
        for name, found in objects.items():
            schema = OPENAPI["components"]["schemas"][name]
            assert list(found) == list(schema["properties"]), name
            assert set(schema["required"]) == set(found), name
            assert conforms(found, schema)

    def test_events_are_as_described(self, server: Server) -> None:
        kinds = {"job": "FullJob", "worker": "FullWorker", "stats": "Stats"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/api/events", headers=bearer("letmein"))
            stream = connection.getresponse()
            assert stream.headers["Content-Type"] in OPERATIONS["GET", "/api/events"]["responses"]["200"]["content"]
            server.http("POST", "/api/jobs/hello-world", headers=bearer("letmein"))
            seen: set[str] = set()
            while seen != set(kinds):
                kind, data = b"", b""
                while (line := stream.readline()) != b"\n":
                    kind = line[7:].strip() if line.startswith(b"event: ") else kind
                    data = line[6:] if line.startswith(b"data: ") else data
                assert conforms(json.loads(data), OPENAPI["components"]["schemas"][kinds[kind.decode()]])
                seen.add(kind.decode())

    def test_a_missing_worker_is_the_one_documented_500(self, tmp_path: Path) -> None:
        with contextlib.closing(Stage(tmp_path)) as stage:
            server = stage.server()
            for path, body in (("/api/jobs/quick", None), ("/api/jobs", [{"name": "quick"}])):
                reply = server.http("POST", path, body)
                assert problem(reply, 500).startswith("worker is not exist.")
                documented = resolve(OPERATIONS["POST", path.replace("quick", "{job}")]["responses"]["500"])
                assert "--hold" in documented["description"]
                [media] = documented["content"].values()
                assert conforms(reply.json, media["schema"])

    def test_schemathesis_finds_nothing(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "hooks.py").write_text(SCHEMATHESIS_HOOKS)
        (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS_CONFIG)
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run"]
        (tmp_path / "openapi.json").write_bytes(api_module.description())
        command += ["openapi.json", "--url", f"http://127.0.0.1:{server.port}", "--no-color"]
        command += ["--header", "Authorization: Bearer letmein", "--exclude-path", "/api/events"]
        command += ["--max-examples", "40", "--seed", "1"]
        found = subprocess.run(
            command,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks.py"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        assert re.search(r"[0-9]{3,} generated", found.stdout)


# -- mutated raw requests ----------------------------------------------------------------------------------------------

BODY = b'{"environment": {"COLOUR": "red"}, "priority": 5, "delay": 0.5}'
WEBSOCKET = [
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
]
REQUESTS = [
    head(b"GET /api/jobs?limit=3&after=5"),
    head(b"GET /api/jobs?state=queued,running&name=quick&limit=2&full=1", b"Accept: */*", b"User-Agent: curl/8"),
    head(b"GET /api/jobs?before=9&limit=2"),
    head(b"GET /api/jobs/1", b"Connection: keep-alive"),
    head(b"GET /api/jobs/1/log?tail=3&offset=0&attempt=1"),
    head(b"GET /api/jobs/1/attempts", b"X: y", b"X: z"),
    head(b"GET /api/workers?full=1"),
    head(b"GET /api/workers/1"),
    head(b"GET /api/configs", b"Sec-Fetch-Site: same-origin"),
    head(b"GET /healthz"),
    head(b"GET /metrics"),
    head(b"GET /"),
    head(b"POST /api/jobs/strict", b"Content-Length: %d" % len(BODY)) + BODY,
    head(b"POST /api/jobs/quick", b"Idempotency-Key: abc", b"Content-Length: 2", b"Expect: 100-continue") + b"{}",
    head(b"POST /api/jobs", b"Content-Length: 18", b"Origin: http://localhost") + b'[{"name":"quick"}]',
    head(b"POST /api/jobs/quick", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
    head(b"PUT /api/jobs", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
    head(b"POST /api/jobs/1/retry", b"Authorization: Bearer abc"),
    head(b"DELETE /api/jobs/2"),
    head(b"GET /runner", *WEBSOCKET),
    head(b"GET /runner", *WEBSOCKET, b"Sec-WebSocket-Protocol: jobworker.2", b"Authorization: Bearer abc"),
    head(b"GET /runner"),
]
SPICES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"\xc3\x28"),
    *(b"%00", b"%ff", b"%2f", b"%", b"?", b"&", b"#", b"//", b"/.."),
    *(b"-1", b"0", b"1e9", b"99999999999999999999", b"null", b"[" * 3000, b'"', b"{", b"}", b"\\ud800"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length:\t7\r\n", b"content-length: 61\r\n"),
    *(b"Content-Length: +2\r\n", b"Content-Length: -1\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: 2, 2\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Host: localhost\r\n"),
    *(b"Authorization: Bearer x\r\n", b"Origin: null\r\n", b"Upgrade: websocket\r\n", b"Last-Event-ID: 1\r\n"),
    *(b"Sec-WebSocket-Key: x\r\n", b"Sec-WebSocket-Protocol: ,\r\n", b"Sec-WebSocket-Extensions: =;\r\n"),
    *(b"HTTP/1.0", b"HTTP/1.1\r\n", b"0\r\n\r\n", b"5\r\nabcde\r\n"),
    *(b"X: " + b"y" * 20_000 + b"\r\n", b"X: y\r\n" * 200),
]
CLEAR_HEAD = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*)\r\n"
)
RESPONSE = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n((?:[A-Za-z-]+: [^\r\n]*\r\n)*)\r\n")
FIRST_MUTATION = int(os.environ.get("RAW_SEED", "0"))
MUTATIONS = int(os.environ.get("RAW_REQUESTS", "2000"))


def mutated(dice: random.Random) -> bytes:
    """A request that was damaged in one to four places, and perhaps another behind it."""
    data = bytearray(dice.choice(REQUESTS))
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(min(len(data), dice.choice((50, len(data)))) + 1)
        end = min(len(data), start + dice.choice((0, 1, 1, 2, 5, 20, 80)))
        piece = bytes(data[start:end])
        match dice.randrange(7):
            case 0:
                data[start:start] = dice.choice(SPICES)
            case 1:
                data[start:end] = dice.choice(SPICES)
            case 2:
                data[start:end] = dice.randbytes(len(piece))
            case 3:
                data[start:end] = piece * dice.choice((0, 2, 3, 50))
            case 4:
                data[start:end] = piece.swapcase()
            case 5:
                lines = data.split(b"\r\n")
                dice.shuffle(lines)
                data = bytearray(b"\r\n".join(lines))
            case 6:
                line_end = data.find(b"\r\n", start) + 2
                data[line_end:line_end] = dice.choice([spice for spice in SPICES if spice.endswith(b"\r\n")])
    return bytes(data) + dice.choice((b"", SMUGGLED, dice.choice(REQUESTS)))


def clear_requests(data: bytes) -> tuple[list[str], bool]:
    """The requests at the start of a stream whose ends are beyond doubt (RFC 9112), and whether anything follows."""
    found = []
    while match := CLEAR_HEAD.match(data):
        method, target, minor, lines = match.groups()
        fields = [line.partition(b":")[::2] for line in lines.split(b"\r\n")[:-1]]
        values: dict[bytes, list[bytes]] = {}
        for name, value in fields:
            values.setdefault(name.lower(), []).append(value.strip(b" \t"))
        lengths = values.get(b"content-length", [b"0"])
        clear = len(lengths) == len(values.get(b"host", ())) == 1 and re.fullmatch(rb"\d+", lengths[0])
        end = match.end() + int(lengths[0]) if clear else 0
        if not clear or b"transfer-encoding" in values or end > len(data):
            break
        found.append(f"{method.decode()} {unquote(target.decode())}")
        data = data[end:]
        if minor == b"0" or b"close" in b",".join(values.get(b"connection", ())).lower():
            return found, False
    return found, bool(data)


def responses(data: bytes) -> list[int]:
    """The statuses of the responses in a stream, which must be whole and well-formed to its end."""
    statuses: list[int] = []
    while data:
        match = RESPONSE.match(data)
        assert match, data[:300]
        status, fields = int(match[1]), match[2].lower()
        data = data[match.end() :]
        if status == 101:
            return [*statuses, status]
        if status < 200:
            continue
        statuses.append(status)
        if length := re.search(rb"^content-length: (\d+)\r$", fields, re.MULTILINE):
            assert len(data) >= int(length[1])
            data = data[int(length[1]) :]
        elif b"transfer-encoding: chunked" in fields:
            while (size := int((line := data.partition(b"\r\n")[0]), 16)) > 0:
                data = data[len(line) + size + 4 :]
            assert data.startswith(b"0\r\n\r\n")
            data = data[5:]
        else:
            return statuses
    return statuses


def answer_to(server: Server, data: bytes, patience: float = 0.01) -> bytes:
    """All that is answered to a request and the end of the stream behind it; TimeoutError where that takes long.

    patience: how many seconds a handshake is given before its stream ends, which ends it.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as peer:
        with contextlib.suppress(ConnectionError):
            peer.sendall(data)
            if b"/runner" in data:
                select.select([peer], [], [], patience)
            peer.shutdown(socket.SHUT_WR)
        return read_to_end(peer)


class TestRawRequests:
    """Thousands of damaged requests: each is answered or refused once, soon, and what may be smuggled in is not.

    RAW_REQUESTS=50000 sends more of them, RAW_SEED=7 begins elsewhere.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("raw"))) as stage:
            colours = '- {name: strict, image: busybox, parameters: {COLOUR: {required: true, pattern: "red|green"}}}\n'
            server = stage.server("--hold", "--database", ":memory:", jobs=JOBS + colours)
            server.http("POST", "/api/jobs", [{"name": "quick"}] * 10)
            server.http("DELETE", "/api/jobs/1")
            yield server

    def test_each_is_answered_or_refused_and_nothing_is_smuggled_in(self, server: Server) -> None:
        asked = SMUGGLED.partition(b" HTTP")[0].decode()
        may_be_queued = 0
        for seed in range(FIRST_MUTATION, FIRST_MUTATION + MUTATIONS):
            data = mutated(random.Random(seed))
            clear, more = clear_requests(data)
            may_be_queued += sum(request.partition("?")[0] == asked for request in clear)
            received = answer_to(server, data)
            statuses = responses(received)
            told = f"RAW_SEED={seed}: {data[:2000]!r} was answered {received[:2000]!r}"
            assert all(status < 500 for status in statuses), told
            assert len(statuses) <= len(clear) + more, told
            assert all(status >= 400 or status == 101 for status in statuses[len(clear) :]), told
            assert statuses or b"/runner" in data or not data.strip(), told
        queued = len(server.get("/api/jobs?name=hello-world"))
        assert queued <= may_be_queued
        assert "Traceback" not in server.stderr
        assert "internal error" not in server.stderr

    def test_those_that_are_not_damaged_are_answered(self, server: Server) -> None:
        for request in REQUESTS:
            clear, more = clear_requests(request)
            assert (len(clear), more) == (1, False)
            assert len(responses(answer_to(server, request, patience=10))) == 1, request

    def test_the_reader_of_this_test_sees_what_would_be_smuggled(self) -> None:
        clear, more = clear_requests(head(b"POST /api/jobs/quick", b"Content-Length: 0") + SMUGGLED)
        assert (len(clear), more) == (2, False)
        for field in (b"Content-Length: 9" * 2, b"Transfer-Encoding: chunked", b"Content-Length : 5"):
            assert clear_requests(head(b"POST /api/jobs/quick", field) + SMUGGLED) == ([], True)


# -- metrics -----------------------------------------------------------------------------------------------------------


class Metrics:
    """What Prometheus reads: the value of a sample by its name and labels."""

    def __init__(self, server: Server) -> None:
        reply = server.http("GET", "/metrics")
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        self.families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, /, **labels: str) -> float | None:
        return self.samples.get((f"jobworker_{name}", frozenset(labels.items())))

    def buckets(self, name: str, job: str) -> list[tuple[float, float]]:
        """The buckets of a histogram, each with its bound, in the order in which they stand."""
        samples = self.families[f"jobworker_{name}"].samples
        found = [sample for sample in samples if sample.name.endswith("_bucket") and sample.labels["name"] == job]
        return [(float(sample.labels["le"]), sample.value) for sample in found]


ODD_NAME = 'o"d\\d n{a}m,e=日本'
FAMILIES = {
    "build_info": ("gauge", {"version"}),
    "jobs": ("gauge", {"state"}),
    "jobs_finished": ("counter", {"name", "state"}),
    "job_duration_seconds": ("histogram", {"name", "le"}),
    "job_queue_duration_seconds": ("histogram", {"name", "le"}),
    "queue_latency_seconds": ("gauge", set()),
    "worker_up": ("gauge", {"worker"}),
    "worker_jobs": ("gauge", {"worker"}),
}


class TestMetrics:
    """/metrics, read by Prometheus' own parser."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        jobs = json.dumps(
            [
                {"name": "good", "image": "busybox", "command": "true"},
                {"name": ODD_NAME, "image": "busybox", "command": ["sh", "-c", "sleep 0.15; exit 3"]},
                {"name": "waits", "image": "busybox", "tags": ["never"]},
            ]
        )
        with contextlib.closing(Stage(tmp_path_factory.mktemp("metrics"))) as stage:
            server = stage.server(jobs=jobs)
            stage.worker(server, "--slots", "2", name=ODD_NAME)
            for job in server.http("POST", "/api/jobs", [{"name": "good"}] * 3 + [{"name": ODD_NAME}] * 2).json:
                server.ended(job["id"])
            until(lambda: Metrics(server)("jobs_finished_total", name=ODD_NAME, state="failure") == 2)
            yield server

    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_family_has_its_kind_its_labels_and_a_text(self, server: Server, name: str) -> None:
        family = Metrics(server).families[f"jobworker_{name}"]
        kind, labels = FAMILIES[name]
        assert family.type == kind
        assert family.documentation
        assert family.samples
        assert set().union(*(sample.labels for sample in family.samples)) == labels

    def test_every_family_is_ours_and_every_sample_is_there_once(self, server: Server) -> None:
        metrics = Metrics(server)
        assert all(name.startswith("jobworker_") for name in metrics.families)
        assert len(metrics.samples) == sum(len(family.samples) for family in metrics.families.values())

    def test_jobs_are_counted_by_state(self, server: Server) -> None:
        metrics = Metrics(server)
        states = [job["state"] for job in server.get("/api/jobs?full=1")]
        for state in ("queued", "assigned", "running", "success", "failure", "cancelled"):
            assert metrics("jobs", state=state) == states.count(state)

    def test_ended_jobs_are_counted_by_name_and_state(self, server: Server) -> None:
        metrics = Metrics(server)
        assert metrics("jobs_finished_total", name="good", state="success") == 3
        assert metrics("jobs_finished_total", name=ODD_NAME, state="failure") == 2
        assert metrics("jobs_finished_total", name="good", state="failure") in (None, 0)

    def test_a_job_cancelled_before_its_start_has_ended_too(self, server: Server) -> None:
        job = server.post("waits")
        server.http("DELETE", f"/api/jobs/{job}")
        until(lambda: Metrics(server)("jobs_finished_total", name="waits", state="cancelled"), 2)

    @pytest.mark.parametrize("name", ["job_duration_seconds", "job_queue_duration_seconds"])
    def test_buckets_are_cumulative_and_end_with_all(self, server: Server, name: str) -> None:
        metrics = Metrics(server)
        for job, count in (("good", 3), (ODD_NAME, 2)):
            bounds, values = zip(*metrics.buckets(name, job), strict=True)
            assert list(bounds) == sorted(set(bounds))
            assert list(values) == sorted(values)
            assert bounds[-1] == float("inf")
            assert values[-1] == metrics(f"{name}_count", name=job) == count

    def test_a_duration_is_in_the_bucket_of_its_length(self, server: Server) -> None:
        metrics = Metrics(server)
        total = metrics("job_duration_seconds_sum", name=ODD_NAME) or 0
        assert 0.3 <= total < 10
        assert [value for bound, value in metrics.buckets("job_duration_seconds", ODD_NAME) if bound <= 0.1] == [0, 0]
        assert metrics("job_queue_duration_seconds_sum", name="waits") is None

    def test_a_worker_is_known_by_its_name_while_it_is_there(self, server: Server) -> None:
        with ScriptedWorker(server, "gone-soon", tags=("other",)):
            metrics = Metrics(server)
            for worker in (ODD_NAME, "gone-soon"):
                assert metrics("worker_up", worker=worker) == 1
                assert metrics("worker_jobs", worker=worker) == 0
        until(lambda: Metrics(server)("worker_up", worker="gone-soon") in (None, 0))

    def test_the_wait_of_the_oldest_ready_job_is_told(self, server: Server) -> None:
        assert Metrics(server)("queue_latency_seconds") == 0
        delayed = server.post("waits", delay=100)
        assert Metrics(server)("queue_latency_seconds") == 0
        job = server.post("waits")
        time.sleep(0.2)
        assert 0.2 <= (Metrics(server)("queue_latency_seconds") or 0) < 5
        for waiting in (job, delayed):
            server.http("DELETE", f"/api/jobs/{waiting}")
        assert Metrics(server)("queue_latency_seconds") == 0

    def test_the_build_is_told(self, server: Server) -> None:
        assert Metrics(server)("build_info", version=server.get("/healthz")["version"]) == 1

    def test_a_name_cannot_add_a_line(self) -> None:
        totals = Totals()
        name = 'a"} 1\njobworker_jobs{state="forged\\'
        totals.finished[name, "success"] = 1
        text = metrics_text({"jobs": {}, "queue_latency": 0}, [], totals)
        [family] = [one for one in text_string_to_metric_families(text) if one.name == "jobworker_jobs_finished"]
        assert [sample.labels["name"] for sample in family.samples] == [name]


# -- events ------------------------------------------------------------------------------------------------------------


def events_of(stream: Iterator[bytes], count: int) -> list[tuple[str, Any, str | None]]:
    """The next `count` events of a stream: kind, data and id each; comments are ("", None, None)."""
    found: list[tuple[str, Any, str | None]] = []
    while len(found) < count:
        for block in next(stream).decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            data = json.loads(fields["data"]) if fields else None
            found.append((fields.get("event", ""), data, fields.get("id")))
    return found


class Ring:
    """A store's ticks, and who listens to them; what changes is a worker, number by number."""

    def __init__(self) -> None:
        self.store = Store(":memory:").start()
        self.events = api_module.Events(self.store, lambda _rows: [])
        self.now = 1.0
        self.tick()

    def tick(self) -> None:
        self.store.do(state_module.tick, self.now).result()

    def publish(self, number: int) -> None:
        """A worker of this number changes, and a moment ends."""
        about = Arrival(f"w{number}", 2, 0, (), "127.0.0.1:5", "0", 0.0, ())
        self.store.do(state_module.attach, about, self.now, lambda *_: None).result()
        self.tick()

    @property
    def ticks(self) -> list[state_module.Tick]:
        ticks: list[state_module.Tick] = self.store.do(lambda db: list(db.ticks)).result()
        return ticks

    def close(self) -> None:
        self.store.close()


class TestEvents:
    """/api/events: what a listener may rely on."""

    @pytest.fixture
    def ring(self) -> Iterator[Ring]:
        """The ring of events alone, without a server and its clock."""
        with contextlib.closing(Ring()) as ring:
            yield ring

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("events"))) as stage:
            yield stage.server("--hold")

    def test_who_resumes_misses_nothing_and_hears_nothing_twice(self, server: Server) -> None:
        with Events(server) as events:
            first = server.post("quick")
            events.next("job", id=first)
            events.next("stats")
            last_id = events.last_id
        missed = []
        for _ in range(4):
            missed += [server.post("quick"), server.post("quick")]
            time.sleep(0.3)
        heard: list[int] = []
        with Events(server, last_id) as events:
            last = server.post("quick")
            while not heard or heard[-1] != last:
                heard.append(events.next("job")["id"])
        assert heard == [*missed, last]

    def test_every_id_along_the_way_is_a_place_to_resume(self, ring: Ring) -> None:
        for number in range(1, 6):
            ring.publish(number)
        ids = [tick.id for tick in ring.ticks][1:]
        for position, last_id in enumerate(ids[:-1]):
            stream = ring.events.stream(last_id)
            kinds = events_of(stream, 1 + len(ids) - 1 - position)
            assert [data["id"] for kind, data, _ in kinds if kind == "worker"] == list(range(position + 1, 6))

    @pytest.mark.parametrize("last_id", ["1", "999999999999999999"])
    def test_an_id_that_it_does_not_know_is_answered_with_a_reset(self, server: Server, last_id: str) -> None:
        with Events(server, last_id) as events:
            assert events.next("reset") == {}
            assert events.last_id != last_id
            job = server.post("quick")
            assert events.next("job")["id"] == job

    def test_an_id_from_before_a_restart_is_answered_with_a_reset(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with Events(server) as events:
            server.post("quick")
            events.next("job")
            events.next("stats")
            last_id = events.last_id
        server.kill()
        server.start()
        with Events(server, last_id) as events:
            assert events.next("reset") == {}

    def test_an_id_that_has_left_the_ring_is_answered_with_a_reset(self, ring: Ring) -> None:
        oldest = ring.ticks[0].id
        for number in range(state_module.RING_TICKS - len(ring.ticks)):
            ring.publish(number)
        assert events_of(ring.events.stream(oldest), 2)[1][0] == "worker"
        ring.publish(0)
        assert [kind for kind, _, _ in events_of(ring.events.stream(oldest), 2)] == ["stats", "reset"]

    def test_a_listener_too_slow_for_the_ring_is_told_to_reset(self, ring: Ring) -> None:
        stream = ring.events.stream(None)
        events_of(stream, 1)
        for number in range(state_module.RING_TICKS + 1):
            ring.publish(number)
        [(kind, _, last_id)] = events_of(stream, 1)
        assert kind == "reset"
        assert last_id == str(ring.ticks[-1].id)
        ring.publish(6)
        [(kind, worker, _), *_] = events_of(stream, 2)
        assert (kind, worker["name"]) == ("worker", "w6")

    def test_too_many_changed_jobs_are_a_reset(self, server: Server) -> None:
        with Events(server) as events:
            server.http("POST", "/api/jobs", [{"name": "quick"}] * 300)
            assert events.next("reset") == {}
            assert events.next("stats")["jobs"]["queued"] >= 300

    def test_ids_go_on_growing_over_a_restart(self, ring: Ring) -> None:
        for number in range(3):
            ring.publish(number)
        ids = [tick.id for tick in ring.ticks]
        assert ids == sorted(set(ids))
        with contextlib.closing(Ring()) as again:
            again.now = ring.now + 0.01
            again.publish(0)
            assert again.ticks[-1].id > ids[-1]

    def test_silence_is_broken_by_comments(self, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        assert api_module.HEARTBEAT_SECONDS <= 15
        monkeypatch.setattr(api_module, "HEARTBEAT_SECONDS", 0.05)
        stream = ring.events.stream(None)
        events_of(stream, 1)
        for _ in range(3):
            comment = next(stream)
            assert comment.startswith(b":")
            assert comment.endswith(b"\n\n")
            assert b"event" not in comment

    def test_what_changes_nothing_is_no_event(self, ring: Ring) -> None:
        ring.publish(1)
        for _ in range(3):
            ring.tick()
        assert [tick.overview.get("workers") for tick in ring.ticks] == [None, 0, 1]

    def test_the_changes_of_a_moment_are_one_event_with_the_latest_state(self, server: Server) -> None:
        with Events(server) as events:
            jobs = [server.post("quick", delay=100) for _ in range(10)]
            for job in jobs:
                server.http("DELETE", f"/api/jobs/{job}")
            last = server.post("quick", delay=100)
            heard: list[Any] = []
            while not heard or heard[-1]["id"] != last:
                heard.append(events.next("job"))
        assert {job["id"] for job in heard} == {*jobs, last}
        assert len(heard) < 2 * len(jobs)
        latest = {job["id"]: job["state"] for job in heard}
        assert all(latest[job] == "cancelled" for job in jobs)

    def test_a_burst_is_at_most_about_four_batches_a_second(self, server: Server) -> None:
        with Events(server) as events:
            events.next("stats")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                server.post("quick", delay=100)
                time.sleep(0.01)
            last = server.post("quick", delay=100)
            batches: set[str | None] = set()
            while events.next("job")["id"] != last:
                batches.add(events.last_id)
        assert 2 <= len(batches) <= 9

    def test_no_value_can_end_an_event(self, stage: Stage) -> None:
        server = stage.server("--hold", jobs="- {name: a, image: busybox, parameters: {V: {}}}")
        value = "a\nb\r\n\nevent: stats\ndata: {}\n\n\u2028\x85"
        with Events(server) as events:
            job = server.post("a", environment={"V": value})
            assert events.next("job", id=job)["environment"] == {"V": value}


# -- who may do what ---------------------------------------------------------------------------------------------------

OPEN_PATHS = {"/", "/healthz"}
GUARDED = [(method, path.replace("{job}", "1").replace("{worker}", "1")) for method, path in OPERATIONS]
GUARDED = [(method, path) for method, path in GUARDED if path not in OPEN_PATHS]
KEY = "letmein"
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


class TestAccess:
    """Each test tries to get in where it should not, or to see what it should not."""

    @pytest.fixture(scope="class")
    @classmethod
    def guarded(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("guarded"))) as stage:
            (stage.folder / "tokens").write_text(f"# who may what\napi {KEY}\napi other\n\nworker iamone\n")
            server = stage.server("--hold", "--token-file", str(stage.folder / "tokens"))
            server.http("POST", "/api/jobs/quick", headers=bearer(KEY))
            yield server

    @pytest.fixture(scope="class")
    @classmethod
    def open_server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("open"))) as stage:
            yield stage.server("--hold")

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

    def test_two_tokens_are_no_token(self, guarded: Server) -> None:
        fields = [b"Authorization: Bearer " + token for token in (KEY.encode(), b"wrong")]
        for order in (fields, fields[::-1]):
            assert guarded.raw(head(b"GET /api/jobs", *order)).startswith(b"HTTP/1.1 400 ")

    def test_every_token_of_the_file_opens_and_the_scheme_has_no_case(self, guarded: Server) -> None:
        for authorization in (f"Bearer {KEY}", "Bearer other", f"bearer {KEY}", f"BEARER  {KEY}"):
            assert guarded.http("GET", "/api/jobs", headers={"Authorization": authorization}).status == 200

    def test_a_bare_token_opens_both(self, stage: Stage) -> None:
        (stage.folder / "tokens").write_text("both\n")
        token = ("--token-file", str(stage.folder / "tokens"))
        server = stage.server(*token)
        stage.worker(server, *token)
        assert server.http("POST", "/api/jobs/quick?wait=10", headers=bearer("both")).json["success"]

    @pytest.mark.parametrize(
        "content", ["", "# none\n", f"api {KEY}", f"worker {KEY}", f"admin {KEY}", f"api worker {KEY}", None]
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

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "jobs.example"])
    def test_no_address_but_loopback_is_served_without_tokens(self, stage: Stage, host: str) -> None:
        stage.jobs.write_text(JOBS)
        refused = stage.run("server.py", "-p", "0", str(stage.jobs), JOBWORKER_HOST=host)
        assert refused.returncode == 2
        assert "--insecure" in refused.stderr

    def test_it_listens_on_loopback_alone(self, open_server: Server) -> None:
        table = Path("/proc/net/tcp").read_text()
        local = re.findall(rf" ([0-9A-F]{{8}}):{open_server.port:04X} [0-9A-F]+:0000 0A ", table)
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
    def test_a_name_of_anothers_is_not_served(self, open_server: Server, host: str) -> None:
        for method, path in (("GET", "/api/jobs"), ("POST", "/api/jobs/quick"), ("GET", "/")):
            problem(open_server.http(method, path, headers={"Host": host}), 403)
        assert open_server.get("/api/jobs") == []

    @pytest.mark.parametrize("host", ["localhost", "LocalHost:8080", "127.0.0.1", "[::1]:9", "192.0.2.7:80"])
    def test_a_name_or_address_of_its_own_is_served(self, open_server: Server, host: str) -> None:
        assert open_server.http("GET", "/api/jobs", headers={"Host": host}).status == 200

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

    def test_no_page_is_told_that_it_may_read(self, open_server: Server) -> None:
        for method in ("GET", "OPTIONS"):
            headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            reply = open_server.http(method, "/api/jobs", headers=headers)
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
                    additional_headers=bearer("iamone"),
                )
            assert refused.value.response.status_code == 403
        assert guarded.http("GET", "/api/workers", headers=bearer(KEY)).json == []

    @pytest.mark.parametrize("headers", [{}, bearer(KEY), bearer(""), {"Authorization": "iamone"}], ids=str)
    def test_no_worker_without_a_workers_token(self, guarded: Server, headers: dict[str, str]) -> None:
        for protocols in (None, [VERSION_2]):
            with pytest.raises(InvalidStatus) as refused:
                connect(
                    f"ws://127.0.0.1:{guarded.port}/runner?token=iamone",
                    proxy=None,
                    subprotocols=protocols,
                    additional_headers=headers,
                )
            assert refused.value.response.status_code == 401

    def test_two_workers_tokens_are_refused_without_a_fuss(self, guarded: Server) -> None:
        tokens = [b"Authorization: Bearer iamone", b"Authorization: Bearer wrong"]
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
        api_token, worker_token = "apitoken-0815", "workertoken-0815"
        (stage.folder / "tokens").write_text(f"api {api_token}\nworker {worker_token}\n")
        (stage.folder / "token").write_text(f"{worker_token}\n")
        server = stage.server("--verbose", "--token-file", str(stage.folder / "tokens"))
        worker = stage.worker(server, "--verbose", "--token-file", str(stage.folder / "token"))
        body = {"environment": {"SCRIPT": "env"}}
        job = server.http("POST", "/api/jobs/sh?wait=10&full=1", body, headers=bearer(api_token))
        assert job.json["success"]
        server.http("GET", "/api/jobs", headers=bearer(f"{api_token}x"))
        assert "0815" not in command_lines()
        self.assert_unseen("0815", stage, server, worker, [job.json["id"]], bearer(api_token))

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
