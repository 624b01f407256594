"""HTTP/1.1 on `http.server`: connections, how long each may wait, and which of them ends when there are too many.

Every connection to the server's port arrives here and has a thread of its own. It does not know what a request is
answered with: it is given a function for that. A connection that asks for /runner is handed, unread, to the websockets
server on the loop.

    accept ─▶ peek ─┬─▶ /runner: RunnerListener ─▶ websockets
               ▲    └─▶ parse_head ─▶ Access.check ─▶ body ─▶ answer ─▶ response ─┐
               └──────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import logging
import math
import queue
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from jobworker.message import MAX_BODY_BYTES, ApiError, BadFraming, Request, Response, parse_head, problem
from jobworker.options import UNSENT_BYTES

MAX_CONNECTIONS = 1_024
MAX_STRANGERS = 128  # of these, once all are taken: for connections without a valid token, where tokens are set
SPARE_THREADS = 256  # for connections that were evicted and have not noticed yet
MAX_HANDED_OVER = 512  # handshakes that the loop has not taken yet; of more, the oldest are ended
MAX_HEAD_BYTES = 16 * 1024
LARGE_BODY_BYTES = 64 * 1024
LARGE_BODIES = 4  # in memory at a time; one of them is answered at a time
TURN_SECONDS = 1  # a caller waits for its turn among those who send or ask much
IDLE_SECONDS = 30
HEAD_SECONDS = 10
BODY_SECONDS = 30
FRESH_UPLOAD_SECONDS = 1
SLOWEST_UPLOAD_BYTES = 1024 * 1024  # a second: a large body that comes slower gives its place to one that waits for it
SEND_SECONDS = 30
SLOWEST_BYTES = 4 * 1024  # a second: what a reader must take once it has made us wait for SEND_SECONDS
LINGER_SECONDS = 1
UNSENT_TO_CALLER_BYTES = 256 * 1024  # else the kernel takes up to 4 MiB for each reader that does not read
CHECK_SECONDS = 0.25
FRESH_REQUEST_SECONDS = 0.1  # no wait is ended that has just begun
FRESH_ANSWER_SECONDS = 1
CLOSING_SECONDS = 0.01  # what an evicted connection may take to be closed
REFUSALS_SECONDS = 60
REFUSALS_TOLD = 10  # in this time
TOO_MANY_LARGE = f"too many bodies of over {LARGE_BODY_BYTES} bytes at once"
RUNNER_START = re.compile(rb"GET /runner[? ]")
RESET = struct.pack("ii", True, 0)  # to close without waiting for what is unsent
HANG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)
UPGRADE_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

log = logging.getLogger("server")


class Place(NamedTuple):
    """What a connection waits for: a request, or its answer's end; since when, and until when it may."""

    for_request: bool
    since: float
    until: float


class HttpServer(ThreadingHTTPServer):
    """Accepts connections and gives each a thread; the accept loop never waits for a connection.

    `places` is the one table of connections and their waits. A connection that is no longer in it was evicted. Each
    entry is changed by popping it, which is atomic, so that a request is either answered or evicted, never both. So is
    its copy; a list of its items is not: their tuples may start the garbage collector, and that another thread.
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
        self.large_bodies = threading.Semaphore(LARGE_BODIES)
        self.large_answers = threading.Semaphore(1)
        self.uploads: dict[HttpConnection, None] = {}  # whose large bodies are being read
        self.next_check = 0.0
        super().__init__(address, HttpConnection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's look-up of the host's name

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # this machine's cap is lower than ours
                self._evict_one()
                time.sleep(CLOSING_SECONDS)  # nobody can be accepted until then
            raise

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
        """End the connection that one can best do without, if there is one."""
        now, places = time.monotonic(), list(self.places.copy().items())
        crowded = sum(connection.stranger for connection, _ in places) > MAX_STRANGERS

        def worth(item: tuple[HttpConnection, Place]) -> tuple[bool, bool, bool, float]:
            connection, place = item
            fresh = now - place.since < (FRESH_REQUEST_SECONDS if place.for_request else FRESH_ANSWER_SECONDS)
            return not (crowded and connection.stranger), fresh, not place.for_request, place.since

        victim = min(places, key=worth, default=None)
        if victim and worth(victim)[:3] != (True, True, True) and self.places.pop(victim[0], None):
            victim[0].shut(socket.SHUT_RDWR)
            victim[0].evicted.set_result(None)

    def end_slow_upload(self) -> None:
        """Where uploads have all places for large bodies, answer the oldest slow one, if there is one, with 408."""
        now, uploads = time.monotonic(), list(self.uploads)
        slow = [connection for connection in uploads if connection.slow_from < now]
        if slow and len(uploads) >= LARGE_BODIES:
            self.uploads.pop(slow[0], None)
            slow[0].shut(socket.SHUT_RD)

    def service_actions(self) -> None:
        """End the waits that are past their deadline. Called by serve_forever after each accept and each poll."""
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check = now + CHECK_SECONDS
        for connection, place in self.places.copy().items():
            if place.until < now and self.places.get(connection) is place:
                # Shut for reading only, a late request can still be answered with 408.
                connection.shut(socket.SHUT_RD if place.for_request else socket.SHUT_RDWR)

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
        self.stranger = not self.server.access.allows("api", None)
        self.patience = float(SEND_SECONDS)
        self.slow_from = math.inf
        self.evicted: Future[None] = Future()
        self._limit_unsent(UNSENT_TO_CALLER_BYTES)
        now = time.monotonic()
        self.server.places[self] = Place(True, now, now + IDLE_SECONDS)

    def finish(self) -> None:
        self.server.places.pop(self, None)
        super().finish()

    def _limit_unsent(self, count: int) -> None:
        """Let the kernel hold so many bytes that are not sent yet. Unlike a send buffer's size it can be changed."""
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, count)

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
            self.stranger = not self.server.access.allows("api", request.headers.get("authorization"))
            self.server.access.check(request, self.client_address[0])
            response = self._answer(request)
        except BadFraming as error:
            self._respond(problem(error))
            self._linger()
            return
        except ApiError as error:
            response = problem(error)
        self.close_connection = not request or not request.keep_alive or request.unread
        self._respond(response, request)
        if not request or request.unread:
            self._linger()

    def _answer(self, request: Request) -> Response:
        """Read the body and give the answer. Raises ApiError, also where too many large bodies are there already."""
        try:
            if request.content_length > LARGE_BODY_BYTES:
                request.share = contextlib.ExitStack()
                self._take_place_for_upload(request.share)
            self._read_body(request)
            self.server.uploads.pop(self, None)
            if request.share:
                self._wait_for_answer()
                take_turn(self.server.large_answers, request.share, TOO_MANY_LARGE)
            self._wait_for_answer()
            request.caller_is_gone, request.evicted = self._caller_is_gone, self.evicted
            return self.server.answer(request)
        finally:
            request.drop_body()

    def _take_place_for_upload(self, share: contextlib.ExitStack) -> None:
        self._wait_for_answer()
        self.server.end_slow_upload()
        take_turn(self.server.large_bodies, share, TOO_MANY_LARGE)
        self.slow_from = time.monotonic() + FRESH_UPLOAD_SECONDS
        self.server.uploads[self] = None
        share.callback(self.server.uploads.pop, self, None)

    def _wait_for_request(self, seconds: float) -> None:
        now = time.monotonic()
        self._wait(Place(True, now, now + seconds))

    def _wait_for_answer(self) -> None:
        self._wait(Place(False, time.monotonic(), math.inf))

    def _wait(self, place: Place) -> None:
        """Begin the next wait. Raises ConnectionAbortedError where this connection was evicted."""
        if not self.server.places.pop(self, None):
            raise ConnectionAbortedError
        self.server.places[self] = place

    def _peek_head(self) -> bytes | None:
        """Wait for a request's head and leave it unread; None where the client has gone or was idle for too long.

        Raises BadFraming where it is too long or too slow.
        """
        self._wait_for_request(IDLE_SECONDS)
        seen = self.connection.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
        end = seen.find(b"\r\n\r\n")
        if end < 0 and seen:
            self._wait_for_request(HEAD_SECONDS)
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
            self._limit_unsent(UNSENT_BYTES)
            self.server.runner.hand_over(self.connection)
        return True

    def _read_body(self, request: Request) -> None:
        if not request.unread:
            return
        self._wait_for_request(BODY_SECONDS)
        if "expect" in request.headers and request.http_1_1:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = body = bytearray(request.content_length)
        left = memoryview(body)
        while left and (count := self.connection.recv_into(left)):
            left = left[count:]
            self.slow_from += count / SLOWEST_UPLOAD_BYTES
        if left:
            raise BadFraming(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time, or not whole")
        request.unread = False

    def _respond(self, response: Response, request: Request | None = None) -> None:
        since = time.monotonic()
        with_body = not request or request.method != "HEAD"
        if isinstance(response.body, bytes):
            head = response.head(self.close_connection, f"Content-Length: {len(response.body)}\r\n")
            self._send(head + response.body if with_body else head, since)
            return
        chunked = not request or request.http_1_1
        self.close_connection |= not chunked  # by which its end is known
        self._send(response.head(self.close_connection, "Transfer-Encoding: chunked\r\n" * chunked), since)
        if with_body:
            self._stream(response.body, chunked, since)

    def _stream(self, body: Iterator[bytes], chunked: bool, since: float) -> None:
        for piece in body:
            if piece:
                data = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
                del piece  # of what a reader does not read there is one copy
                self._send(data, since)
            elif self._caller_is_gone():
                raise ConnectionAbortedError
        if chunked:
            self._send(b"0\r\n\r\n", since)

    def _send(self, data: bytes, since: float) -> None:
        """Send an answer that began at `since`, or a piece of it; the next piece may take for ever to come.

        A reader that makes us wait uses up the connection's patience, and gets it back by the bytes that it takes.
        """
        start = time.monotonic()
        self.patience = min(self.patience + len(data) / SLOWEST_BYTES, SEND_SECONDS)
        self._wait(Place(False, since, start + self.patience))
        self.wfile.write(data)
        self.patience -= time.monotonic() - start
        self._wait(Place(False, since, math.inf))

    def _caller_is_gone(self) -> bool:
        """Whether the caller of the request being answered has hung up, or was evicted."""
        poll = select.poll()  # a peek would not see the end behind what was sent before it
        poll.register(self.connection, HANG_UP)
        return self not in self.server.places or bool(poll.poll(0))

    def _linger(self) -> None:
        """Read on for a moment: closing with bytes unread would reset the connection under the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self._wait_for_request(LINGER_SECONDS)
        left = MAX_BODY_BYTES
        while left > 0 and (more := self.rfile.read(65536)):
            left -= len(more)
        # Where its bytes have filled our side before we shut it, a peer is told of no room that gets free: unless a
        # reset tells it, it goes on asking for a minute. There is none where the peer has ended its side, too.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def take_turn(semaphore: threading.Semaphore, stack: contextlib.ExitStack, otherwise: str) -> None:
    """Take one of few places until the stack is closed. Raises ApiError where none gets free soon."""
    if not semaphore.acquire(timeout=TURN_SECONDS):
        headers = {"Retry-After": str(TURN_SECONDS)}
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, f"{otherwise}; ask again in a moment", **headers)
    stack.callback(semaphore.release)


class RunnerListener(socket.socket):
    """A listening socket for the websockets server whose connections come from the HTTP side.

    It is one end of a socket pair: a byte on the other end makes it readable, `accept` takes the connection.
    """

    def __init__(self) -> None:
        ours, self._bell = socket.socketpair()
        super().__init__(ours.family, ours.type, fileno=ours.detach())
        self._bell.setblocking(False)
        self._handed_over: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def hand_over(self, connection: socket.socket) -> None:
        """Give the websockets server a connection of which nothing was read. Called from HTTP threads."""
        self._handed_over.put(socket.socket(fileno=connection.detach()))
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._bell.send(b"!")
        if self._handed_over.qsize() > MAX_HANDED_OVER:
            with contextlib.suppress(queue.Empty):
                self._handed_over.get_nowait().close()

    def close(self) -> None:
        self._bell.close()
        super().close()

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: there is nothing to bind or to listen to."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Give the next connection that was handed over; BlockingIOError where there is none."""
        connection = self._next()
        try:
            return connection, connection.getpeername()
        except OSError as error:
            connection.close()
            raise ConnectionAbortedError from error

    def _next(self) -> socket.socket:
        with contextlib.suppress(queue.Empty):
            return self._handed_over.get_nowait()
        self.recv(4096)  # before the last look: who comes after it rings again
        with contextlib.suppress(queue.Empty):
            return self._handed_over.get_nowait()
        raise BlockingIOError


class Refusals:
    """Logs who was refused for a token, and of a flood of them how many they were. For any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._count, self._until = 0, -math.inf

    def tell(self, text: str) -> None:
        with self._lock:
            untold, now = 0, self._clock()
            if now >= self._until:
                untold, self._count, self._until = self._count - REFUSALS_TOLD, 0, now + REFUSALS_SECONDS
            self._count += 1
            count = self._count
        if untold > 0:
            log.warning("%d more were refused", untold)
        if count <= REFUSALS_TOLD:
            log.warning("%s%s", text, "; more within a minute are only counted" if count == REFUSALS_TOLD else "")


class Access:
    """Who may do what: tokens, and what protects a browser's user from pages of other sites."""

    def __init__(self, host: str, tokens: dict[str, set[str]]) -> None:
        self.tokens = tokens
        self._refusals = Refusals()
        self.hosts = {"localhost", host.lower(), socket.gethostname().lower()}

    def check(self, request: Request, address: str) -> None:
        """Raise ApiError for a request that must not be served. address: of its caller."""
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
                self._refusals.tell(f"a request of {address} was refused: a wrong token")
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
        which = "a wrong" if given else "no"
        self._refusals.tell(f"a worker at {connection.remote_address[0]} was refused: {which} token")
        words = ("this is not a worker's token: see its", "this needs a worker's token:")[not given]
        return connection.respond(HTTPStatus.UNAUTHORIZED, f"{words} --token-file\n")
