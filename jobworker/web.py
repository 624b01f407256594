"""HTTP/1.1 on `http.server`, read strictly: whatever two readers could understand differently is refused.

Every connection to the server's port arrives here and has a thread of its own. It does not know what a request is
answered with: it is given a function for that. A connection that asks for /runner is handed, unread, to the websockets
server on the loop.

    accept ─▶ peek ─┬─▶ /runner: RunnerListener ─▶ websockets
                    └─▶ parse_head ─▶ Access.check ─▶ body ─▶ answer ─▶ response, and the next request
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import queue
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

MAX_CONNECTIONS = 1_024
MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 8 * 1024 * 1024
IDLE_SECONDS = 30
HEAD_SECONDS = 10
BODY_SECONDS = 30
LINGER_SECONDS = 1
RUNNER_START = re.compile(rb"GET /runner[? ]")
UPGRADE_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

log = logging.getLogger("server")


class ApiError(Exception):
    """The caller's mistake, or our inability: answered with application/problem+json (RFC 9457)."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class BadFraming(ApiError):
    """What came is not clearly one HTTP request: answered, then the connection is closed, since its end is unknown."""


@dataclass(slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    http_1_1: bool
    keep_alive: bool
    content_length: int
    body: bytes = b""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def query(self, *known: str) -> dict[str, str]:
        """Give the query's parameters by name. Raises ApiError for one that is not `known`, or given twice."""
        pairs = parse_qsl(self.target.partition("?")[2], keep_blank_values=True)
        query = dict(pairs)
        if len(query) < len(pairs):
            raise ApiError(HTTPStatus.BAD_REQUEST, "a query parameter is given twice")
        for name in query.keys() - set(known):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"no query parameter {name!r} here; there are: {', '.join(known)}")
        return query


REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
SINGLE_HEADERS = {
    "authorization",
    "content-length",
    "content-type",
    "expect",
    "host",
    "idempotency-key",
    "last-event-id",
    "origin",
    "sec-fetch-site",
    "transfer-encoding",
    "upgrade",
}


def parse_head(head: bytes) -> Request:
    """Read a request's head, without the empty line that ends it; strict where leniency lets requests be smuggled.

    Raises BadFraming for anything that two readers could understand differently (RFC 9112, sections 2.2 to 6.3).
    """
    line, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadFraming(HTTPStatus.BAD_REQUEST, "the request line must be METHOD /PATH HTTP/1.1")
    if len(lines) > MAX_HEADERS:
        raise BadFraming(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEADERS} header lines")
    headers: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        header = HEADER_LINE.fullmatch(line)
        if not header:
            raise BadFraming(HTTPStatus.BAD_REQUEST, f"line {number} of the head is not a header")
        name, value = header[1].decode().lower(), header[2].decode("latin-1")
        if name in headers and name in SINGLE_HEADERS:
            raise BadFraming(HTTPStatus.BAD_REQUEST, f"the header {name} is there twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return _check_framing(match[1].decode(), match[2].decode(), match[3] == b"1", headers)


def _check_framing(method: str, target: str, http_1_1: bool, headers: dict[str, str]) -> Request:
    if not headers.get("host"):
        raise BadFraming(HTTPStatus.BAD_REQUEST, "the Host header is missing")
    if "transfer-encoding" in headers:
        raise BadFraming(HTTPStatus.LENGTH_REQUIRED, "Transfer-Encoding is not read here; send Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadFraming(HTTPStatus.BAD_REQUEST, "Content-Length must be digits")
    if int(length) > MAX_BODY_BYTES:
        raise BadFraming(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {MAX_BODY_BYTES} bytes")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise BadFraming(HTTPStatus.EXPECTATION_FAILED, "the only expectation known is 100-continue")
    connection = headers.get("connection", "keep-alive" if http_1_1 else "close").lower()
    keep_alive = "close" not in connection and (http_1_1 or "keep-alive" in connection)
    return Request(method, target, headers, http_1_1, keep_alive, int(length))


class Front(ThreadingHTTPServer):
    """Accepts connections; a thread each, at most MAX_CONNECTIONS.

    At the cap, the connection that has waited longest for a whole request gives up its place, so that slow and idle
    ones can't keep a quick one out.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(
        self, address: tuple[str, int], answer: Callable[[Request], Response], runner: RunnerListener, access: Access
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.answer, self.runner, self.access = answer, runner, access
        self.waiting: OrderedDict[socket.socket, None] = OrderedDict()
        self.open = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, Connection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's look-up of the host's name

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.open.acquire(blocking=False):
            self._make_room()
            if not self.open.acquire(timeout=1):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.shutdown_request(request)
                return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self.open.release()
            self.shutdown_request(request)

    def _make_room(self) -> None:
        while self.waiting:
            with contextlib.suppress(KeyError, OSError):
                longest, _ = self.waiting.popitem(last=False)
                longest.shutdown(socket.SHUT_RDWR)
                return

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.open.release()

    def shutdown_request(self, request: Any) -> None:
        if request.fileno() >= 0:  # else the loop has it now
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away is no event
            log.error("internal error", exc_info=error)


class Connection(BaseHTTPRequestHandler):
    """One connection: its requests, one after another, until either side ends it."""

    server: Front
    connection: socket.socket

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.received = bytearray()
        self.patience = 0.0
        self._wait_at_most(IDLE_SECONDS)

    def finish(self) -> None:
        self.server.waiting.pop(self.connection, None)

    def handle(self) -> None:
        if self._is_for_runner():
            self.server.runner.hand_over(self.connection)
            return
        with contextlib.suppress(OSError):  # it went away, or was too slow
            while self._serve_request():
                pass

    def _wait_at_most(self, seconds: float) -> None:
        """Have the kernel bound each wait; Python's own timeout would cost a poll before each call."""
        if seconds != self.patience:
            self.patience = seconds
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _is_for_runner(self) -> bool:
        """Look at the first request without taking it: is it a WebSocket's opening handshake for /runner?"""
        self.server.waiting[self.connection] = None
        head, deadline = self._peek(IDLE_SECONDS, 1), time.monotonic() + HEAD_SECONDS
        if not RUNNER_START.match(head):
            return False
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
            more = self._peek(deadline - time.monotonic(), len(head) + 1)
            if len(more) <= len(head):
                break
            head = more
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return bool(UPGRADE_HEADER.search(head)) and self._stays()

    def _peek(self, seconds: float, at_least: int) -> bytes:
        """Give what has come once it is `at_least` so many bytes; b"" where it does not in time."""
        try:
            self._wait_at_most(max(seconds, 0.001))
            if at_least > 1:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_least)
            return self.connection.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
        except OSError:
            return b""

    def _stays(self) -> bool:
        """End the wait for a request; False where this connection had to give up its place."""
        return self.server.waiting.pop(self.connection, True) is None

    def _serve_request(self) -> bool:
        request = None
        try:
            head = self._read_head()
            if head is None:
                return False
            request = parse_head(head)
            self.server.access.check(request)
            request.body = self._read_body(request)
            if not self._stays():
                return False
            response = self.server.answer(request)
        except BadFraming as error:
            self._respond(problem(error), close=True)
            self._linger()
            return False
        except ApiError as error:
            response = problem(error)
        close = not request or not request.keep_alive or len(request.body) < request.content_length
        self._respond(response, close, request)
        if close and request and len(request.body) < request.content_length:
            self._linger()
        return not close

    def _read_head(self) -> bytes | None:
        """Give the next request's head; None where the client has gone, or was idle for too long."""
        self.server.waiting[self.connection] = None
        deadline = None
        while (end := self.received.find(b"\r\n\r\n")) < 0:
            if len(self.received) > MAX_HEAD_BYTES:
                raise BadFraming(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head may have {MAX_HEAD_BYTES} bytes"
                )
            if self.received and deadline is None:
                deadline = time.monotonic() + HEAD_SECONDS
            if not self._receive_more(deadline):
                if self.received.strip():
                    raise BadFraming(HTTPStatus.REQUEST_TIMEOUT, "the head did not come in time, or not whole")
                return None
        head = bytes(self.received[:end])
        del self.received[: end + 4]
        return head

    def _read_body(self, request: Request) -> bytes:
        if request.content_length > len(self.received) and "expect" in request.headers:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_SECONDS
        while len(self.received) < request.content_length:
            if not self._receive_more(deadline):
                raise BadFraming(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time, or not whole")
        body = bytes(self.received[: request.content_length])
        del self.received[: request.content_length]
        return body

    def _receive_more(self, deadline: float | None) -> bool:
        left = IDLE_SECONDS if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return False
        self._wait_at_most(left)
        try:
            more = self.connection.recv(65536)
        except BlockingIOError:
            return False
        self.received += more
        return bool(more)

    def _respond(self, response: Response, close: bool, request: Request | None = None) -> None:
        self._wait_at_most(IDLE_SECONDS)
        with_body = not request or request.method != "HEAD"
        if isinstance(response.body, bytes):
            head = response.head(close, f"Content-Length: {len(response.body)}\r\n")
            self.connection.sendall(head + response.body if with_body else head)
            return
        chunked = not request or request.http_1_1
        self.connection.sendall(response.head(close, "Transfer-Encoding: chunked\r\n" * chunked))
        if with_body:
            for piece in response.body:
                if piece:
                    self.connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                elif self._client_is_gone():
                    raise ConnectionAbortedError
            self.connection.sendall(b"0\r\n\r\n" * chunked)

    def _client_is_gone(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _linger(self) -> None:
        """Read on for a moment: closing with bytes unread would reset the connection under the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_SECONDS
        while self._receive_more(deadline) and len(self.received) < MAX_BODY_BYTES:
            self.received.clear()


class RunnerListener(socket.socket):
    """A listening socket for the websockets server whose connections come from the HTTP side.

    It is one end of a socket pair: a byte on the other end makes it readable, `accept` takes the connection.
    """

    def __init__(self) -> None:
        ours, self._bell = socket.socketpair()
        super().__init__(ours.family, ours.type, fileno=ours.detach())
        self._handed_over: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def hand_over(self, connection: socket.socket) -> None:
        """Give the websockets server a connection of which nothing was read. Called from HTTP threads."""
        self._handed_over.put(socket.socket(fileno=connection.detach()))
        self._bell.send(b"!")

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: there is nothing to bind or to listen to."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Give the next connection that was handed over; BlockingIOError where there is none."""
        self.recv(1)
        connection = self._handed_over.get_nowait()
        try:
            return connection, connection.getpeername()
        except OSError as error:
            connection.close()
            raise ConnectionAbortedError from error


class Access:
    """Who may do what: tokens, and what protects a browser's user from pages of other sites."""

    def __init__(self, host: str, tokens: dict[str, set[str]]) -> None:
        self.tokens = tokens
        self.hosts = {"localhost", host.lower(), socket.gethostname().lower()}

    def check(self, request: Request) -> None:
        """Raise ApiError for a request that must not be served."""
        page = request.path == "/" and request.method == "GET"  # anyone may link to the dashboard
        host, origin = request.headers["host"], request.headers.get("origin")
        if not self.tokens["api"] and not self._knows(host):
            raise ApiError(
                HTTPStatus.FORBIDDEN, f"the Host {host!r} is not served; use localhost, an address, or a token"
            )
        foreign = origin is not None and origin.partition("://")[2] != host
        if not page and (foreign or request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")):
            raise ApiError(HTTPStatus.FORBIDDEN, "a page of another site may not do this")
        if not page and request.path != "/healthz" and not self.allows("api", request.headers.get("authorization")):
            detail = "this needs a token: Authorization: Bearer TOKEN"
            raise ApiError(HTTPStatus.UNAUTHORIZED, detail, **{"WWW-Authenticate": "Bearer"})

    def _knows(self, host: str) -> bool:
        name = re.sub(r":[0-9]*$", "", host).lower()
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True  # a page can give its own name another address, but can't have an address for a name

    def allows(self, scope: str, authorization: str | None) -> bool:
        """Whether a request with this Authorization header may use "api" or "worker"; all may where no token is set."""
        tokens = self.tokens[scope]
        scheme, _, value = (authorization or "").partition(" ")
        given = value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        return not tokens or sum(hmac.compare_digest(given, token.encode()) for token in tokens) > 0

    def check_runner(self, connection: Any, request: Any) -> Any:
        """Answer a worker's opening handshake with 401 where its token is not right."""
        given = request.headers.get_all("Authorization")
        if self.allows("worker", given[0] if len(given) == 1 else None):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "this needs a worker's token: --token-file\n")


@dataclass(slots=True)
class Response:
    body: bytes | Iterator[bytes]
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    def head(self, close: bool, length: str) -> bytes:
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nContent-Type: {self.content_type}\r\n{length}"
            f"Date: {http_date(int(time.time()))}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
            f"{extra}{'Connection: close' + chr(13) + chr(10) if close else ''}\r\n"
        ).encode("latin-1", "replace")


@functools.lru_cache(maxsize=2)
def http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def as_json(value: object) -> bytes:
    return JSON_ENCODER.encode(value).encode()


def problem(error: ApiError) -> Response:
    status = error.status
    body = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": error.detail}
    return Response(as_json(body), status, "application/problem+json", error.headers)
