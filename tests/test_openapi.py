"""openapi.json: all that the API does, and nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from jobworker import VERSION, web
from jobworker import api as api_module
from tests.peers import ScriptedWorker
from tests.stage import (
    Server,
    Stage,
    bearer,
    problem,
)

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
expected-statuses = ["2xx", "400", "404", "409", "424", "504"] # the last two are what `require` asks for
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
[checks.use_after_free] # DELETE cancels a job, which is still there to be seen
enabled = false
"""
EVERY_KIND_OF_JOB = """
- {name: hello-world, image: hello-world}
- {name: greeting, image: busybox, command: "true", parameters: {NAME: {default: world}, ROOM: {pattern: "[a-z]+"}}}
- {name: missing, image: missing, command: [a, b], retries: 1, retry_delay: 1}
- {name: later, image: busybox, tags: [gpu], concurrency: 2, timeout: 1m, priority: -1}
"""


def test_the_times_that_a_caller_has_are_those_of_the_server() -> None:
    told = OPENAPI["info"]["description"]
    assert f"kept alive for {web.IDLE_SECONDS} s" in told
    assert f"{web.HEAD_SECONDS} s for a head, {web.BODY_SECONDS} s for a body" in told


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
            (stage.folder / "tokens").write_text("letmein-0123456789\n")
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
                        assert parameter["name"] in problem(
                            server.http("GET", query, headers=bearer("letmein-0123456789")), 400
                        )
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
                server.http("POST", "/api/jobs/hello-world", headers=bearer("letmein-0123456789"))
                detail = problem(server.http("GET", f"{filled}?colour=red", headers=bearer("letmein-0123456789")), 400)
                assert detail.endswith("there are: " + ", ".join(described)), (path, detail)

    def test_it_is_served_as_it_is(self, server: Server) -> None:
        reply = server.http("GET", "/openapi.json", headers=bearer("letmein-0123456789"))
        assert reply.body == api_module.description()
        assert reply.headers["Content-Type"] == "application/json"

    def test_every_key_of_every_object_is_described(self, server: Server) -> None:
        def get(path: str) -> Any:
            return server.http("GET", path, headers=bearer("letmein-0123456789")).json

        job = server.http("POST", "/api/jobs/missing?wait=10&full=1", headers=bearer("letmein-0123456789")).json
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

    def test_a_worker_that_drains_is_as_described(self, tmp_path: Path) -> None:
        with contextlib.closing(Stage(tmp_path)) as stage:
            server = stage.server()
            with ScriptedWorker(server, "drains", slots=0):
                [worker] = server.get("/api/workers?full=1")
                assert conforms(worker, OPENAPI["components"]["schemas"]["FullWorker"])

    def test_events_are_as_described(self, server: Server) -> None:
        kinds = {"job": "FullJob", "worker": "FullWorker", "stats": "Stats"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/api/events", headers=bearer("letmein-0123456789"))
            stream = connection.getresponse()
            assert stream.headers["Content-Type"] in OPERATIONS["GET", "/api/events"]["responses"]["200"]["content"]
            server.http("POST", "/api/jobs/hello-world", headers=bearer("letmein-0123456789"))
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
        command += ["--header", "Authorization: Bearer letmein-0123456789", "--exclude-path", "/api/events"]
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
