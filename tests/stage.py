"""The stage of the tests: a folder in which servers and workers run as real processes, beside a `docker` stand-in.

Instead of a sleep, a test waits with `until` for what it wants to see. A test that only waits runs `meanwhile`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tests import docker_stand_in

ROOT = Path(__file__).resolve().parent.parent
FINAL = {"success", "failure", "cancelled"}
AT_ONCE_SECONDS = 5  # far below what a place, a head or a body may take, and enough for a busy machine


JOBS = """
- name: hello-world
  image: hello-world
- name: sh
  image: busybox
  command: [sh, -c, 'eval "$SCRIPT"']
  parameters: {SCRIPT: {required: true}}
  stop_grace_period: 1s
- name: quick
  image: busybox
  command: "true"
"""

Value = TypeVar("Value")


def until(condition: Callable[[], Value | None], seconds: float = 10) -> Value:
    """Wait until `condition` is true and return what it gave; fail when that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s this is still {value!r}"
        time.sleep(0.01)
    return value


def passes(seconds: float) -> None:
    """Wait until a time is over, for what must not come of it."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, seconds + 5)


# -- programs ----------------------------------------------------------------------------------------------------------


class Program:
    """One of our two programs as a real process; what it writes to stderr is in a file that outlives restarts."""

    def __init__(self, folder: Path, path: str, *arguments: str, **environment: str) -> None:
        self.command = [sys.executable, str(ROOT / path), *arguments]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_") and "proxy" not in k.lower()}
        self.environment = kept | {"TMPDIR": str(folder)} | environment
        self.file = folder / f"{path}-{len(list(folder.glob('*.stderr')))}.stderr"
        self.file.touch()

    def start(self) -> None:
        self.before = self.file.stat().st_size
        with self.file.open("ab") as stderr:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.file.parent,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        """What it wrote since its last start."""
        return self.file.read_bytes()[self.before :].decode()

    def said(self, pattern: str) -> re.Match[str] | None:
        assert self.process.poll() is None or re.search(pattern, self.stderr), self.stderr
        return re.search(pattern, self.stderr)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds: float = 10) -> int:
        self.signal(signal.SIGTERM)
        return self.exit_code(seconds)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server(Program):
    """`python server.py` on a free port, which it keeps when it is started again."""

    port = 0

    def start(self) -> None:
        if self.port:
            self.command[self.command.index("-p") + 1] = str(self.port)
        super().start()
        found = until(lambda: self.said(r"listening on http://127\.0\.0\.1:(\d+)"))
        self.port = int(found[1])

    def http(
        self, method: str, path: str, body: Any = None, seconds: float = 10, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def get(self, path: str) -> Any:
        reply = self.http("GET", path)
        assert reply.status == 200, reply
        return reply.json

    def post(self, name: str, **options: Any) -> int:
        """Ask for a job and return its id."""
        reply = self.http("POST", f"/api/jobs/{name}", options or None)
        assert reply.status == 200, reply
        return int(reply.json["id"])

    def sh(self, script: str, name: str = "sh", **options: Any) -> int:
        return self.post(name, environment={"SCRIPT": script}, **options)

    def memory_kib(self) -> int:
        [size] = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(size)

    def knows(self, worker: str) -> bool:
        """Whether a worker of this name is connected; yes where that is not for us to know."""
        reply = self.http("GET", "/api/workers?full=1")
        return reply.status == 401 or worker in [one["name"] for one in reply.json]

    def job(self, job: int) -> Any:
        return self.get(f"/api/jobs/{job}")

    def state(self, job: int) -> str:
        return str(self.job(job)["state"])

    def ended(self, job: int, seconds: float = 20) -> Any:
        """Wait for a job's final state and return the job."""
        return until(lambda: found if (found := self.job(job))["state"] in FINAL else None, seconds)

    def log(self, job: int, query: str = "") -> bytes:
        reply = self.http("GET", f"/api/jobs/{job}/log{query}")
        assert reply.status == 200, reply
        return reply.body

    def raw(self, data: bytes, half_close: bool = False, seconds: float = 8) -> bytes:
        """Send bytes as they are; return all that comes back before the server closes, which it must."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as peer:
            with contextlib.suppress(ConnectionError):
                peer.sendall(data)
                if half_close:
                    peer.shutdown(socket.SHUT_WR)
            return read_to_end(peer)


def read_to_end(peer: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := peer.recv(65536):
            received += data
    return received


class Worker(Program):
    """`python client.py`, connected."""

    def start(self) -> None:
        super().start()
        until(lambda: self.said("connected to "))


class Docker:
    """The `docker` stand-in: a script to be put first on PATH, its containers, and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        docker_stand_in.install(str(folder))
        self.allow("hello-world busybox oom")

    def allow(self, images: str) -> None:
        (self.folder / "images").write_text(images + "\n")

    def ledger(self, event: str, job: int | None = None) -> list[list[str]]:
        """The lines about an event, each [name, detail, ...]; those of one job, or of all."""
        path = self.folder / "ledger"
        lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
        return [rest for what, *rest in lines if what == event and (job is None or rest[0].split("-")[-2] == str(job))]

    def starts(self, job: int | None = None) -> int:
        return len(self.ledger("start", job))

    def pid(self, job: int) -> int:
        """The process id of the container of this job that started last."""
        return int(self.ledger("start", job)[-1][1])

    def clients(self, job: int) -> list[int]:
        """The process ids of all `docker run` of this job."""
        return [int(line[1]) for line in self.ledger("run", job)]

    def delay(self, verb: str, seconds: float) -> None:
        """Let every `docker VERB` take longer; for "start", every container between its creation and its start."""
        (self.folder / f"{verb}-delay").write_text(str(seconds))

    def offer(self, image: str, seconds: float = 0) -> None:
        """Have an image in the registry, from which it is pulled in so many seconds."""
        (self.folder / "registry").write_text(image)
        self.delay("pull", seconds)

    def calls(self, verb: str) -> list[int]:
        """The process ids of all calls of `docker VERB`."""
        return [int(pid) for called, pid in self.ledger("call") if called == verb]

    def containers(self) -> list[str]:
        """What `docker ps -a` shows."""
        return sorted(path.name for path in (self.folder / "containers").iterdir() if path.name[0] != ".")

    def close(self) -> None:
        (self.folder / "containers").rename(self.folder / "closed")  # nothing starts any more
        for pid_file in self.folder.glob("closed/*/pid"):
            with contextlib.suppress(OSError, ValueError):
                if not (pid_file.parent / "exit").exists():
                    os.killpg(int(pid_file.read_text()), signal.SIGKILL)


class HasPort(Protocol):
    """What a worker can dial: a server, or a peer by script."""

    port: int


class Stage:
    """A folder in which programs run, and one host's docker. At the end all is killed, and no traceback was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.docker = Docker(folder / "docker")
        self.programs: list[Program] = []
        self.jobs = folder / "jobs.yaml"

    def server(self, *arguments: str, jobs: str = JOBS, **environment: str) -> Server:
        self.jobs.write_text(jobs)
        server = Server(self.folder, "server.py", "-p", "0", *arguments, str(self.jobs), **environment)
        self.programs.append(server)
        server.start()
        return server

    def worker(
        self,
        server: HasPort,
        *arguments: str,
        name: str = "worker",
        connects: bool = True,
        target: str | None = None,
        **environment: str,
    ) -> Worker:
        target = target or f"127.0.0.1:{server.port}/runner"
        environment = {"PATH": f"{self.docker.folder}:{os.environ['PATH']}"} | environment
        worker = Worker(self.folder, "client.py", "--name", name, *arguments, target, **environment)
        self.programs.append(worker)
        worker.start() if connects else Program.start(worker)
        if connects and isinstance(server, Server):
            until(lambda: server.knows(name))
        return worker

    def run(self, path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of our programs to its end, which must come soon."""
        command = [sys.executable, str(ROOT / path), *arguments]
        environment = {**os.environ, **environment}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=10)

    def close(self) -> None:
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()
        self.docker.close()
        for program in self.programs:
            assert "Traceback" not in program.file.read_text()


def meanwhile(scenario: Callable[[Any, Stage], None]) -> Callable[..., None]:
    """Let a test that only waits run beside the others of its file; in its place its result is waited for."""

    def test(self: object, results: dict[Any, Future[None]]) -> None:  # noqa: ARG001
        results[scenario].result()

    test.__name__, test.scenario = scenario.__name__, scenario  # type: ignore[attr-defined]
    return test


def play(scenario: Callable[[Any, Stage], None], folder: Path) -> None:
    with contextlib.closing(Stage(folder)) as stage:
        scenario(None, stage)


def until_file(stage: Stage) -> str:
    """A command, as YAML, that runs until the file `go` is there."""
    return json.dumps(["sh", "-c", f"until [ -e {stage.folder}/go ]; do sleep 0.02; done"])


# -- the HTTP API ------------------------------------------------------------------------------------------------------


def problem(reply: Reply, status: int) -> str:
    """The detail of an error, which must be a well-formed problem document of this status."""
    assert reply.status == status, reply
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert list(reply.json) == ["type", "title", "status", "detail"]
    assert reply.json["status"] == status
    return str(reply.json["detail"])


def all_ended(server: Server, seconds: float = 120) -> list[Any]:
    """Wait until no job is open and return them all."""
    until(lambda: server.get("/api/jobs?state=queued,assigned,running&limit=1") == [], seconds)
    return list(server.get("/api/jobs?full=1"))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
