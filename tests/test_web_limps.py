"""web.py and api.py, while callers hang up, do not read, or send much: everybody else is served as before."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker import web
from tests.peers import ScriptedWorker, head
from tests.stage import Server, Stage, until

MANY = web.MAX_CONNECTIONS + 36
MEMORY_LIMIT_KIB = 260 * 1024


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """As many descriptors as the system gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def dialled(server: Server, count: int, request: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent a request and read nothing."""
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            peer.sendall(request)
            peers.append(peer)
        yield peers


def is_served(server: Server, seconds: float = 2) -> bool:
    """Whether a quick request is answered soon, and a worker may connect."""
    begin = time.monotonic()
    assert server.get("/healthz")["status"] == "ok"
    with ScriptedWorker(server, "another"):
        pass
    return time.monotonic() - begin < seconds


def threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


class TestHangUp:
    """A caller who hangs up while an answer is waited for takes no place."""

    @pytest.mark.parametrize(
        "request_", [b"GET /api/jobs/1?wait=3600", b"GET /api/jobs/1/log?follow=1", b"GET /api/events"]
    )
    def test_its_thread_ends_within_seconds(self, stage: Stage, request_: bytes) -> None:
        server = stage.server("--hold")
        server.post("quick")
        before = threads(server)
        with dialled(server, 300, head(request_)):
            until(lambda: threads(server) >= before + 300)
            assert is_served(server)
        until(lambda: threads(server) <= before + 5, 15)

    def test_more_than_there_are_places_keep_nobody_out(self, stage: Stage) -> None:
        server = stage.server("--hold")
        server.post("quick")
        with dialled(server, MANY, head(b"GET /api/jobs/1?wait=3600")):
            until(lambda: threads(server) > web.MAX_CONNECTIONS // 2)
        assert is_served(server)
        until(lambda: threads(server) < 50, 30)

    def test_one_who_stays_is_answered(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        answers: list[str] = []
        waiting = threading.Thread(
            target=lambda: answers.append(server.http("GET", f"/api/jobs/{job}?wait=60", seconds=70).json["state"])
        )
        waiting.start()
        server.http("DELETE", f"/api/jobs/{job}")
        waiting.join(10)
        assert answers == ["cancelled"]


class TestSlowReaders:
    """A reader who takes nothing of a long answer."""

    def test_as_many_as_there_are_places_keep_nobody_out(self, stage: Stage) -> None:
        server = stage.server("--hold")
        server.http("POST", "/api/jobs", [{"name": "quick"}] * 60_000, 30)
        with dialled(server, MANY, head(b"GET /api/jobs?full=1")):
            until(lambda: threads(server) > web.MAX_CONNECTIONS // 2, 30)
            until(lambda: is_served(server), 30)
        assert server.memory_kib() < MEMORY_LIMIT_KIB


class TestLargeBodies:
    """Lists of 8 MiB, many at once."""

    def test_one_at_a_time_is_in_memory(self, stage: Stage) -> None:
        server = stage.server("--hold")
        body = json.dumps([{"name": "quick", "priority": 1}] * 200_000).encode()
        assert 4 * web.LARGE_BODY_BYTES < len(body) < web.MAX_BODY_BYTES
        statuses: list[int] = []
        senders = [
            threading.Thread(target=lambda: statuses.append(server.http("POST", "/api/jobs", body, 60).status))
            for _ in range(6)
        ]
        for sender in senders:
            sender.start()
        largest = 0
        while any(sender.is_alive() for sender in senders):
            largest = max(largest, server.memory_kib())
            begin = time.monotonic()
            assert server.get("/healthz")["status"] == "ok"
            assert time.monotonic() - begin < 5
            senders[0].join(0.05)
        assert set(statuses) <= {200, 503}
        assert 200 in statuses
        assert largest < 2 * MEMORY_LIMIT_KIB
