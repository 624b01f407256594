"""HTTP/1.1 on `http.server`, read strictly: whatever two readers could understand differently is refused.

Every connection to the server's port arrives here and has a thread of its own. It does not know what a request is
answered with: it is given a function for that. A connection that asks for /runner is handed, unread, to the websockets
server on the loop.

    accept ─▶ peek ─┬─▶ /runner: RunnerListener ─▶ websockets
               ▲    └─▶ parse_head ─▶ Access.check ─▶ body ─▶ answer ─▶ response ─┐
               └──────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import math
import queue
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

MAX_CONNECTIONS = 1_024
SPARE_THREADS = 256  # for connections that were evicted and have not noticed yet
MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 8 * 1024 * 1024
LARGE_BODY_BYTES = 256 * 1024
LARGE_BODIES = 4  # read at once; one at a time is answered, as a list of 8 MiB takes 150 MiB
IDLE_SECONDS = 30
HEAD_SECONDS = 10
BODY_SECONDS = 30
SEND_SECONDS = 30
LINGER_SECONDS = 1
CHECK_SECONDS = 0.25
RUNNER_START = re.compile(rb"GET /runner[? ]")
UPGRADE_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

Place = tuple[float, float]  # from when a connection may be evicted (0 where it waits for a request), its deadline

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
    caller_is_gone: Callable[[], bool] = bool  # a long answer may ask it now and then, and end early

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


class HttpServer(ThreadingHTTPServer):
    """Accepts connections and gives each a thread; the accept loop never waits for a connection.

    `places` is the one table of connections: from when each may be evicted, and until when it may wait. Entries are
    in the order in which the waits began. A connection that is no longer in it was evicted. Each entry is changed by
    popping it, which is atomic, so that a request is either answered or evicted, never both.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(
        self, address: tuple[str, int], answer: Callable[[Request], Response], runner: RunnerListener, access: Access
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.answer, self.runner, self.access = answer, runner, access
        self.places: dict[HttpConnection, Place] = {}
        self.threads = threading.Semaphore(MAX_CONNECTIONS + SPARE_THREADS)
        self.reading = threading.Semaphore(LARGE_BODIES)
        self.answering = threading.Semaphore(1)
        self.next_check = 0.0
        super().__init__(address, HttpConnection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's look-up of the host's name

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.places) >= MAX_CONNECTIONS:
            self._evict_one()
        if not self.threads.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self.threads.release()
            self.shutdown_request(request)

    def _evict_one(self) -> None:
        """End the longest wait for a request, or else the oldest answer that has taken over a second."""
        now = time.monotonic()
        longest, (evictable_from, _) = min(
            list(self.places.items()), key=lambda item: item[1][0], default=(None, (now, now))
        )
        if longest and evictable_from < now and self.places.pop(longest, None):
            longest.shut(socket.SHUT_RDWR)

    def service_actions(self) -> None:
        """End the waits that are past their deadline. Called by serve_forever after each accept and each poll."""
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check = now + CHECK_SECONDS
        for connection, place in list(self.places.items()):
            if place[1] < now and self.places.get(connection) is place:
                # Shut for reading only, a late request can still be answered with 408.
                connection.shut(socket.SHUT_RDWR if place[0] else socket.SHUT_RD)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.threads.release()

    def shutdown_request(self, request: Any) -> None:
        if request.fileno() >= 0:  # else the loop has it now
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away is no event
            log.error("internal error", exc_info=error)


class HttpConnection(BaseHTTPRequestHandler):
    """One connection: its requests, one after another, until either side ends it.

    Nothing is read beyond the request being served: heads are peeked at, so any request can be handed over unread.
    """

    server: HttpServer
    connection: socket.socket
    rbufsize = 0
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.places[self] = (0.0, time.monotonic() + IDLE_SECONDS)

    def finish(self) -> None:
        self.server.places.pop(self, None)
        super().finish()

    def shut(self, how: int) -> None:
        """End a wait from another thread: its system call returns at once."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(how)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # it went away, or was evicted
            super().handle()

    def handle_one_request(self) -> None:
        self.close_connection, request = True, None
        try:
            head = self._peek_head()
            if head is None or self._hand_over(head):
                return
            self.rfile.read(len(head) + 4)
            request = parse_head(head)
            self.server.access.check(request)
            request.caller_is_gone = self._caller_is_gone
            if request.content_length > LARGE_BODY_BYTES:
                response = self._answer_large(request)
            else:
                request.body = self._read_body(request)
                self._wait_until(math.inf, time.monotonic() + 1)
                response = self.server.answer(request)
        except BadFraming as error:
            self._respond(problem(error))
            self._linger()
            return
        except ApiError as error:
            response = problem(error)
        unread = not request or len(request.body) < request.content_length
        self.close_connection = not request or not request.keep_alive or unread
        self._respond(response, request)
        if unread:
            self._linger()

    def _answer_large(self, request: Request) -> Response:
        """Answer a request with a large body, when it has room in memory. Raises ApiError where that takes too long."""
        with contextlib.ExitStack() as stack:
            for room in (self.server.reading, self.server.answering):
                if not room.acquire(timeout=BODY_SECONDS):
                    detail = "too many large requests at once: try again, or send smaller ones"
                    raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, detail, **{"Retry-After": "5"})
                stack.callback(room.release)
                if room is self.server.reading:
                    request.body = self._read_body(request)
            self._wait_until(math.inf, time.monotonic() + 1)
            return self.server.answer(request)

    def _wait_until(self, until: float, evictable_from: float = 0.0) -> None:
        """Begin the next wait. Raises ConnectionAbortedError where this connection was evicted."""
        if not self.server.places.pop(self, None):
            raise ConnectionAbortedError
        self.server.places[self] = (evictable_from, until)

    def _peek_head(self) -> bytes | None:
        """Wait for a request's head and leave it unread; None where the client has gone or was idle for too long.

        Raises BadFraming where it is too long or too slow.
        """
        self._wait_until(time.monotonic() + IDLE_SECONDS)
        seen = self.connection.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
        end = seen.find(b"\r\n\r\n")
        if end < 0 and seen:
            self._wait_until(time.monotonic() + HEAD_SECONDS)
            seen = self._peek_further(seen)
            end = seen.find(b"\r\n\r\n")
        if end < 0 and len(seen) >= MAX_HEAD_BYTES:
            raise BadFraming(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head may have {MAX_HEAD_BYTES} bytes")
        if end < 0 and seen.strip():
            raise BadFraming(HTTPStatus.REQUEST_TIMEOUT, "the head did not come in time, or not whole")
        return seen[:end] if end >= 0 else None

    def _peek_further(self, seen: bytes) -> bytes:
        """Peek until the head is whole, too long, or no more comes. The kernel wakes us only when there is more."""
        while b"\r\n\r\n" not in seen and len(seen) < MAX_HEAD_BYTES:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)
            more = self.connection.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
            if len(more) <= len(seen):
                break
            seen = more
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return seen

    def _hand_over(self, head: bytes) -> bool:
        """Give the connection to the websockets server if this is an opening handshake for /runner."""
        if not RUNNER_START.match(head) or not UPGRADE_HEADER.search(head + b"\r\n"):
            return False
        if self.server.places.pop(self, None):
            self.server.runner.hand_over(self.connection)
        return True

    def _read_body(self, request: Request) -> bytes:
        if not request.content_length:
            return b""
        self._wait_until(time.monotonic() + BODY_SECONDS)
        if "expect" in request.headers:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        while more := self.rfile.read(min(request.content_length - len(body), 65536)):
            body += more
        if len(body) < request.content_length:
            raise BadFraming(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time, or not whole")
        return bytes(body)

    def _respond(self, response: Response, request: Request | None = None) -> None:
        now = time.monotonic()
        with_body = not request or request.method != "HEAD"
        if isinstance(response.body, bytes):
            head = response.head(self.close_connection, f"Content-Length: {len(response.body)}\r\n")
            self._wait_until(now + SEND_SECONDS, now + 1)
            self.wfile.write(head + response.body if with_body else head)
            return
        chunked = not request or request.http_1_1
        self._send(response.head(self.close_connection, "Transfer-Encoding: chunked\r\n" * chunked), now + 1)
        if with_body:
            self._stream(response.body, chunked, now + 1)

    def _stream(self, body: Iterator[bytes], chunked: bool, evictable_from: float) -> None:
        for piece in body:
            if piece:
                self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece, evictable_from)
            elif self._caller_is_gone():
                raise ConnectionAbortedError
        if chunked:
            self._send(b"0\r\n\r\n", evictable_from)

    def _send(self, data: bytes, evictable_from: float) -> None:
        """Send a piece of a streamed answer; the reader has SEND_SECONDS to take it, the next may take for ever."""
        self._wait_until(time.monotonic() + SEND_SECONDS, evictable_from)
        self.wfile.write(data)
        self._wait_until(math.inf, evictable_from)

    def _caller_is_gone(self) -> bool:
        """Whether the caller of the request being answered has hung up, or was evicted."""
        try:
            return self not in self.server.places or not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _linger(self) -> None:
        """Read on for a moment: closing with bytes unread would reset the connection under the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self._wait_until(time.monotonic() + LINGER_SECONDS)
        left = MAX_BODY_BYTES
        while left > 0 and (more := self.rfile.read(65536)):
            left -= len(more)


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

    def close(self) -> None:
        self._bell.close()
        super().close()

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
            if "authorization" in request.headers:
                detail = "this is not a token of the API; is it whole, and is it the worker's?"
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
        given = value.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        return not tokens or sum(hmac.compare_digest(given, token.encode()) for token in tokens) > 0

    def check_runner(self, connection: Any, request: Any) -> Any:
        """Answer a worker's opening handshake with 401 where its token is not right."""
        given = request.headers.get_all("Authorization")
        if self.allows("worker", given[0] if len(given) == 1 else None):
            return None
        log.warning("a worker at %s was refused: %s token", connection.remote_address[0], "a wrong" if given else "no")
        detail = (
            "this is not a worker's token: see its --token-file"
            if given
            else "this needs a worker's token: --token-file"
        )
        return connection.respond(HTTPStatus.UNAUTHORIZED, f"{detail}\n")


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
