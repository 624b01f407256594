"""Peers by script, on either side of the wire, and what a test sends as raw HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server as WebSocketServer
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

import protocol
from tests.stage import (
    Server,
    Value,
    until,
)

VERSION_2 = Subprotocol("jobworker.2")


class ScriptedWorker:
    """A worker that does what the test says; version 1 like the original program, or, with a name, version 2."""

    def __init__(self, server: Server, name: str | None = None, **hello: Any) -> None:
        protocols = [VERSION_2] if name else None
        url = f"ws://127.0.0.1:{server.port}/runner"
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(connect(url, proxy=None, subprotocols=protocols, compression=None))
        self.inbox: list[Any] = []
        if name:
            plain: dict[str, Any] = {"name": name, "slots": 1, "tags": (), "version": "0", "jobs": ()}
            self.send(protocol.Hello(**(plain | hello)))
        self.configs = self.next(protocol.JobConfigs).configs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, bytes | str) else protocol.encode(message))

    def next(self, kind: type[Value], seconds: float = 5) -> Value:
        """The next message of this kind; others stay in the inbox."""
        deadline = time.monotonic() + seconds
        while True:
            for message in self.inbox:
                if isinstance(message, kind):
                    self.inbox.remove(message)
                    return message
            data = self.socket.recv(max(0.01, deadline - time.monotonic()))
            self.inbox += protocol.decode_from_server(data, 2 if self.socket.subprotocol else 1)

    def gets_nothing(self, kind: type[Any], seconds: float = 0.3) -> bool:
        with contextlib.suppress(TimeoutError):
            return self.next(kind, seconds) is None
        return True

    def runs(self) -> protocol.Enqueue:
        """Take the next job as far as its container's start."""
        job = self.next(protocol.Enqueue)
        self.send(protocol.JobRunning(job=job.job, attempt=job.attempt))
        if job.attempt:
            self.next(protocol.Go)
        return job

    def is_closed(self) -> bool:
        return is_closed(self.socket)


def is_closed(peer: ClientConnection, seconds: float = 5) -> bool:
    """Whether the server ends this connection; what it still sends is read away."""
    try:
        while peer.recv(seconds) is not None:
            pass
    except (TimeoutError, ConnectionClosed) as end:
        return isinstance(end, ConnectionClosed)
    return False


def let_go(server: Server) -> None:
    """End all jobs of a server that tests share, and at once those that a scripted worker took along when it left."""
    if server.process.poll() is not None:
        server.start()
    until(lambda: server.get("/api/workers") == [])
    server.http("DELETE", "/api/jobs?state=queued,assigned,running")
    for name in {job["worker"] for job in server.get("/api/jobs?state=running&full=1")}:
        with ScriptedWorker(server, name):  # it knows none of its jobs any more
            pass
    until(lambda: server.get("/api/jobs?state=queued,assigned,running&limit=1") == [])


class ScriptedServer:
    """A server that does what the test says; version 1 like the original program, or version 2."""

    def __init__(self, *configs: dict[str, Any], version: int = 1, hangs_up: bool = False) -> None:
        self.configs, self.version, self.hangs_up = configs, version, hangs_up
        # Of its own: a worker that meets a server it does not know ends all docker commands of that server's.
        self.id = secrets.token_hex(4)
        self.dials: list[float] = []
        self.received: list[Any] = []
        self.peer: ServerConnection | None = None
        self.server: WebSocketServer = serve(
            self.accept,
            "127.0.0.1",
            0,
            subprotocols=[VERSION_2] if version > 1 else None,
            process_response=self.identify,
            compression=None,
        )
        self.port = self.server.socket.getsockname()[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def identify(self, _peer: ServerConnection, _request: object, response: Response) -> None:
        if self.version > 1:
            response.headers["Jobworker-Server"] = self.id

    def accept(self, peer: ServerConnection) -> None:
        if not self.hangs_up:
            peer.send(protocol.encode(protocol.JobConfigs(configs=self.configs)))
            self.peer = peer
        self.dials.append(time.monotonic())  # last, so that a test that has seen it sends on this connection
        if self.hangs_up:
            return
        with contextlib.suppress(ConnectionClosed):
            for data in peer:
                self.received += protocol.decode_from_worker(data, self.version)

    def send(self, message: Any) -> None:
        peer = until(lambda: self.peer)
        peer.send(message if isinstance(message, bytes | str) else protocol.encode(message))

    def wait_for(self, message: Any, seconds: float = 10) -> None:
        until(lambda: message in self.received, seconds)

    def hang_up(self) -> None:
        peer, self.peer = until(lambda: self.peer), None
        peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        if self.peer:
            self.peer.close()


class Relay:
    """A TCP relay in front of a server, so that a test can cut the line or let it go dead."""

    def __init__(self, server: Server) -> None:
        self.target, self.dead, self.dials = server.port, False, 0
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads: list[threading.Thread] = []
        self.start(self.accept)

    def start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        self.threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self.threads[-1].start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                self.dials += 1
                with contextlib.suppress(ConnectionError):
                    far = socket.create_connection(("127.0.0.1", self.target))
                    self.pairs.append((near, far))
                    self.start(self.copy, near, far)
                    self.start(self.copy, far, near)
                    continue
                near.close()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self.read(source, sink):
                if not self.dead:
                    sink.sendall(data)
        self.cut([(source, sink)])

    def read(self, source: socket.socket, _sink: socket.socket) -> bytes:
        return source.recv(65536)

    def cut(self, pairs: list[tuple[socket.socket, socket.socket]] | None = None) -> None:
        """End all connections; a frozen process will see it when it wakes."""
        for pair in self.pairs if pairs is None else pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self.threads:
            thread.join(5)
        for each in (self.listener, *(end for pair in self.pairs for end in pair)):
            each.close()


class StallingRelay(Relay):
    """One that reads no more of some pairs, while new ones go through."""

    def __init__(self, server: Server) -> None:
        self.stalled: set[tuple[socket.socket, socket.socket]] = set()
        super().__init__(server)

    def read(self, source: socket.socket, sink: socket.socket) -> bytes:
        while self.stalled & {(source, sink), (sink, source)}:
            time.sleep(0.05)
        return super().read(source, sink)


class Events:
    """A listener of /api/events."""

    def __init__(self, server: Server, last_id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        self.connection.request("GET", "/api/events", headers={"Last-Event-ID": last_id} if last_id else {})
        self.stream = self.connection.getresponse()
        assert self.stream.headers["Content-Type"].startswith("text/event-stream")
        self.last_id = last_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.connection.close()

    def next(self, kind: str, **wanted: Any) -> Any:
        """The data of the next event of a kind in which these keys have these values."""
        event: dict[str, str] = {}
        deadline = time.monotonic() + 10
        while (line := self.stream.readline().decode()) and time.monotonic() < deadline:
            if line != "\n":
                key, _, value = line.rstrip("\n").partition(": ")
                event[key] = value
                continue
            self.last_id = event.get("id", self.last_id)
            if event.get("event") == kind:
                found = json.loads(event["data"])
                if all(found[key] == value for key, value in wanted.items()):
                    return found
            event = {}
        raise AssertionError(f"there was no {kind} {wanted}")


def head(request: bytes, *fields: bytes) -> bytes:
    """The head of a request that is well-formed as far as the given parts are."""
    return b"\r\n".join([request + b" HTTP/1.1", b"Host: localhost", *fields, b"", b""])


WEBSOCKET = [
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
]
HANDSHAKE = head(
    b"GET /runner",
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
POST = b"POST /api/jobs/quick"
SMUGGLED = b"POST /api/jobs/hello-world HTTP/1.1\r\nHost: localhost\r\n\r\n"


def statuses_of(reply: bytes) -> list[int]:
    """The statuses of the responses in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", reply)]
