# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16,<18", "pyyaml>=6"]
# ///
"""The job server: reads jobs.yaml, serves the HTTP API and /runner on one port, matches queued jobs with free workers.

Its threads, and what they may touch:

    main thread      the event loop: Dispatcher (worker connections, claims, timers). Everything of it runs here.
    http.server      accepts every connection, then one thread a connection: reads requests, strictly; answers them from
                     the store. One that asks for /runner is handed, unread, to the websockets server on the loop.
    store            the database (store.py), where the two meet

A job is claimed late: when a worker has a free slot. What a worker reports is written by one transaction a frame, and
answered when that is on disk.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import os
import queue
import random
import re
import signal
import socket
import socketserver
import sqlite3
import struct
import sys
import threading
import time
import uuid
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import websockets.http11
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

import protocol
import store
from config import ConfigError, JobConfig, check_parameters, load_jobs, parse_duration
from protocol import (
    MAX_JOB_ID,
    VERSION_2,
    Enqueue,
    Go,
    Hello,
    JobConfigs,
    JobFailure,
    JobRunning,
    JobSuccess,
    Log,
    Logged,
    Settled,
    Stop,
)
from store import Database, NewJob, Offer, RetryDelay, Store, StoreError

VERSION = "1.0.0"
HERE = Path(__file__).resolve().parent

MAX_CONNECTIONS = 1_024
MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_FRAME_BYTES = 4 * 1024 * 1024
IDLE_SECONDS = 30
HEAD_SECONDS = 10
BODY_SECONDS = 30
LINGER_SECONDS = 1
HELLO_SECONDS = 10
# The peer's silence is noticed after at most the sum of both: within 30 s.
PING_SECONDS = 15
PONG_SECONDS = 14
TICK_SECONDS = 0.25
HEARTBEAT_SECONDS = 15
FOLLOW_CHECK_SECONDS = 5
PRUNE_SECONDS = 10
PRUNE_JOBS = 50
MAX_WAIT_SECONDS = 3_600
MAX_DELAY_SECONDS = 366 * 86400
MAX_RETRY_DELAY_SECONDS = 3_600
PAGE_JOBS = 1_000
MAX_PAGE_JOBS = 10_000
MAX_EVENT_JOBS = 250
RING_TICKS = 1_000
UNBUFFERED = {"X-Accel-Buffering": "no"}  # a proxy shall pass on each piece as it comes

CLOSE_REPLACED = 4001
VERSION_1_PREFIX = "version-1-"
RUNNER_START = re.compile(rb"GET /runner[? ]")
UPGRADE_HEADER = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

log = logging.getLogger("server")


def version_1_config(job: JobConfig) -> dict[str, Any]:
    command = job.command if isinstance(job.command, str) else next(iter(job.command or ()), None)
    return {"command": command, "image": job.image, "name": job.name}


class Configs:
    """The jobs of jobs.yaml, in the forms that the server needs them in."""

    def __init__(self, jobs: Iterable[JobConfig]) -> None:
        self.by_name = {job.name: job for job in jobs}
        self.limits = {job.name: job.concurrency for job in self.by_name.values() if job.concurrency}
        old = [job for job in self.by_name.values() if not job.needs_version_2]
        self.frames = {
            1: protocol.encode(JobConfigs(tuple(version_1_config(job) for job in old))),
            2: protocol.encode(JobConfigs(tuple(job.to_wire() for job in self.by_name.values()))),
        }
        self._names: dict[tuple[tuple[str, ...], int], frozenset[str]] = {}

    def names_for(self, tags: tuple[str, ...], version: int) -> frozenset[str]:
        """Which jobs a worker with these tags may take that speaks this version."""
        if (tags, version) not in self._names:
            jobs = [job for job in self.by_name.values() if version > 1 or not job.needs_version_2]
            self._names[tags, version] = frozenset(job.name for job in jobs if set(job.tags) <= set(tags))
        return self._names[tags, version]

    def retry_delay(self, name: str, failures: int) -> float | None:
        """How long to wait after a job's so-manieth failure before it is tried again, in seconds; None: no more."""
        job = self.by_name.get(name)
        if job is None or failures > job.retries:
            return None
        delay = min(job.retry_delay * 2.0 ** min(failures - 1, 40), MAX_RETRY_DELAY_SECONDS)
        return delay * random.uniform(0.75, 1.25)


# The workers' side: everything here runs on the event loop


@dataclass
class Worker:
    """A connected worker. `jobs` holds what it was sent and has not finished: attempt by job id."""

    id: int
    name: str
    slots: int
    tags: tuple[str, ...]
    version: str
    socket: ServerConnection
    address: str
    jobs: dict[int, int]
    connected_at: float = field(default_factory=time.time)

    @property
    def protocol_version(self) -> int:
        return 2 if self.socket.subprotocol == VERSION_2 else 1

    def send(self, *messages: protocol.FromServer) -> None:
        """Write messages without waiting: they are small, and a worker that reads none is soon pinged out."""
        if self.protocol_version == 2:
            broadcast([self.socket], protocol.encode_batch(messages))
            return
        for message in messages:
            if isinstance(message, Enqueue):
                broadcast([self.socket], protocol.encode(Enqueue(message.job, message.name)))

    def send_configs(self, configs: Configs) -> None:
        broadcast([self.socket], configs.frames[self.protocol_version])

    def as_json(self, connected: bool = True) -> dict[str, Any]:
        return {
            **worker_json(self),
            "name": self.name,
            "slots": self.slots,
            "tags": list(self.tags),
            "jobs": sorted(self.jobs),
            "address": self.address,
            "connected_at": timestamp(self.connected_at),
            "protocol": self.protocol_version,
            "latency": round(self.socket.latency, 6) or None,
            "version": self.version,
            "connected": connected,
        }


def address(socket: ServerConnection) -> str:
    host, port = socket.remote_address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def worker_json(worker: Worker) -> dict[str, Any]:
    return {"id": worker.id, "working": bool(worker.jobs)}


def absorb(
    db: Database, worker: int, messages: list[protocol.FromWorker], now: float, retry: RetryDelay
) -> list[protocol.FromServer]:
    """Write what a worker's frame says; give the answers. A stale message changes nothing and is answered Settled."""
    replies: list[protocol.FromServer] = []
    for message in messages:
        match message:
            case JobRunning(job, attempt):
                replies.append((Go if store.start(db, worker, job, attempt, now) else Settled)(job, attempt))
            case Log(job, attempt, offset, data):
                kept = store.append_log(db, worker, job, attempt, offset, data)
                replies.append(Settled(job, attempt) if kept is None else Logged(job, attempt, kept))
            case JobSuccess(job, attempt):
                store.succeed(db, worker, job, attempt, now)
                replies.append(Settled(job, attempt))
            case JobFailure(job, attempt, exit_code, reason):
                store.fail(db, worker, job, attempt, exit_code, reason, now, retry)
                replies.append(Settled(job, attempt))
    return replies


class Away(NamedTuple):
    """A worker that may come back until a deadline, on the monotonic clock."""

    name: str
    deadline: float


class Dispatcher:
    """Knows who is connected and what they were sent; gives queued jobs to free slots."""

    def __init__(self, configs: Configs, grace: float) -> None:
        self.configs = configs
        self.grace = grace
        self.workers: dict[int, Worker] = {}
        self.away: dict[int, Away] = {}
        self.changed_workers: dict[int, dict[str, Any]] = {}
        self.store: Store
        self.has_room = False  # whether a commit that makes jobs ready is worth waking for; read by the store's thread
        self._claiming = False
        self._claim_again = False
        self._closing: set[asyncio.Future[None]] = set()

    @property
    def expects_workers(self) -> bool:
        """Whether a worker is connected or may come back within its grace. May be read from any thread."""
        return bool(self.workers or self.away)

    def resume(self, expected: list[tuple[int, str]]) -> None:
        """After a server start: give the workers of before a fresh grace. Version 1 workers never come back."""
        for worker, name in expected:
            gone = name.startswith(VERSION_1_PREFIX)
            self.away[worker] = Away(name, time.monotonic() + (0 if gone else self.grace))

    async def serve(self, socket: ServerConnection) -> None:
        """Serve one connection of a worker, from its handshake to its end."""
        try:
            worker = await self._attach(socket, await self._hello(socket))
            try:
                async for data in socket:
                    messages = protocol.decode_from_worker(data, worker.protocol_version)
                    if messages and isinstance(messages[0], Hello):
                        if messages[0].name != worker.name:
                            raise protocol.ProtocolError("a second Hello must have the first one's name")
                        worker = await self._attach(socket, messages[0])
                    else:
                        self._receive(worker, messages)
            finally:
                self._detach(worker)
        except protocol.ProtocolError as error:
            log.warning("worker at %s: %s; closing its connection", address(socket), error)
            await socket.close(CloseCode.INVALID_DATA, str(error).encode()[:120].decode(errors="ignore"))
        except TimeoutError:
            await socket.close(CloseCode.POLICY_VIOLATION, f"no Hello within {HELLO_SECONDS} s")
        except (ConnectionClosed, StoreError):
            pass  # reported by _detach, or by the store

    def _attach(self, socket: ServerConnection, hello: Hello) -> "asyncio.Future[Worker]":
        # Its callback comes in the order of the commits, so no claim for this worker can fall between.
        attached: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        callback = functools.partial(self._attached, socket, hello, attached)
        self.store.tell(callback, store.attach, hello.name, hello.jobs, time.time(), self.configs.retry_delay)
        return attached

    def _attached(
        self,
        socket: ServerConnection,
        hello: Hello,
        attached: "asyncio.Future[Worker]",
        result: tuple[int, list[store.Held]] | Exception,
    ) -> None:
        if isinstance(result, Exception):
            attached.set_exception(result)
            return
        id_, wanted = result
        jobs = {held.id: held.attempt for held in wanted}
        worker = Worker(id_, hello.name, hello.slots, hello.tags, hello.version, socket, address(socket), jobs)
        self._replace(self.workers.get(id_), worker)
        self.away.pop(id_, None)
        self.workers[id_] = worker
        log.info("worker %s connected from %s, %d slots", worker.name, worker.address, worker.slots)
        self._greet(worker, hello, wanted)
        self._note(worker)
        attached.set_result(worker)
        self.dispatch()

    def _replace(self, old: Worker | None, worker: Worker) -> None:
        if old and old.socket is not worker.socket:
            log.warning("worker %s: a newer connection of that name takes over", worker.name)
            old.send(*(Settled(*job) for job in old.jobs.items() if job not in worker.jobs.items()))
            self._close(old, CLOSE_REPLACED, "a newer connection of this name took over")

    async def _hello(self, socket: ServerConnection) -> Hello:
        if socket.subprotocol != VERSION_2:
            return Hello(VERSION_1_PREFIX + uuid.uuid4().hex[:8], 1, (), "1", ())
        async with asyncio.timeout(HELLO_SECONDS):
            messages = protocol.decode_from_worker(await socket.recv(), 2)
        if len(messages) != 1 or not isinstance(messages[0], Hello):
            raise protocol.ProtocolError("the first frame must be Hello")
        return messages[0]

    def _greet(self, worker: Worker, hello: Hello, wanted: list[store.Held]) -> None:
        worker.send_configs(self.configs)
        replies: list[protocol.FromServer] = [
            Settled(job, attempt) for job, attempt, _state in hello.jobs if worker.jobs.get(job) != attempt
        ]
        for held in wanted:
            replies.append(Logged(held.id, held.attempt, held.log_bytes))
            if held.cancelling:
                replies.append(Stop(held.id, held.attempt))
        if replies:
            worker.send(*replies)

    def _receive(self, worker: Worker, messages: list[protocol.FromWorker]) -> None:
        if worker.protocol_version == 1:
            messages = [
                replace(message, attempt=worker.jobs[message.job])
                for message in messages
                if isinstance(message, JobRunning | JobSuccess | JobFailure) and message.job in worker.jobs
            ]
        if not messages or self.workers.get(worker.id) is not worker:
            return
        answered = functools.partial(self._answer, worker)
        self.store.tell(answered, absorb, worker.id, messages, time.time(), self.configs.retry_delay)
        # The claim that fills the slot goes into the same transaction as the result that frees it.
        ended = [message for message in messages if isinstance(message, JobSuccess | JobFailure)]
        if ended:
            for message in ended:
                self._release(worker, message.job, message.attempt)
            self.dispatch()

    def _answer(self, worker: Worker, replies: list[protocol.FromServer] | Exception) -> None:
        if isinstance(replies, Exception):
            # Its connection closed, the worker keeps what it has to say and says it again later.
            self._report(replies)
            self._close(worker, CloseCode.TRY_AGAIN_LATER, "the result could not be stored")
            return
        if replies:
            worker.send(*replies)
        settled = [reply for reply in replies if isinstance(reply, Settled)]
        if sum(self._release(worker, reply.job, reply.attempt) for reply in settled):
            self.dispatch()

    def _release(self, worker: Worker, job: int, attempt: int) -> bool:
        if worker.jobs.get(job) != attempt:
            return False
        del worker.jobs[job]
        self._note(worker)
        return True

    def stop(self, worker_id: int, job: int, attempt: int, running: bool) -> None:
        """Tell a worker to stop a running attempt, or to let go one that it had not started."""
        worker = self.workers.get(worker_id)
        if worker and worker.jobs.get(job) == attempt:
            worker.send(Stop(job, attempt) if running else Settled(job, attempt))
            if not running and self._release(worker, job, attempt):
                self.dispatch()

    def _detach(self, worker: Worker) -> None:
        if self.workers.get(worker.id) is not worker:
            return
        del self.workers[worker.id]
        self.changed_workers[worker.id] = worker.as_json(connected=False)
        log.info("worker %s disconnected, %d jobs held", worker.name, len(worker.jobs))
        leaves = worker.protocol_version == 1 or (
            not worker.jobs and worker.socket.close_code == CloseCode.NORMAL_CLOSURE
        )
        self.away[worker.id] = Away(worker.name, time.monotonic() + (0 if leaves else self.grace))
        self.store.tell(self._report, store.detach, worker.id)
        if leaves:
            self.lose_overdue()

    def lose_overdue(self) -> None:
        """Give up the workers whose grace is over."""
        now = time.monotonic()
        for worker_id, away in [(id_, away) for id_, away in self.away.items() if away.deadline <= now]:
            del self.away[worker_id]
            lost = functools.partial(self._lost, worker_id, away)
            self.store.tell(lost, store.lose, worker_id, time.time(), self.configs.retry_delay)

    def _lost(self, worker_id: int, away: Away, result: int | Exception) -> None:
        if isinstance(result, Exception):  # the next tick tries again
            self._report(result)
            if worker_id not in self.workers:
                self.away.setdefault(worker_id, away)

    def dispatch(self) -> None:
        """Have free slots filled; one claim is under way at a time."""
        if self._claiming:
            self._claim_again = True
            return
        offers = [
            Offer(worker.id, free, self.configs.names_for(worker.tags, worker.protocol_version))
            for worker in self.workers.values()
            if (free := worker.slots - len(worker.jobs)) > 0
        ]
        self.has_room = bool(offers)
        if offers:
            self._claiming = True
            self.store.tell(self._claimed, store.claim, offers, self.configs.limits)

    def _claimed(self, claims: list[store.Claimed] | Exception) -> None:
        self._claiming = False
        if isinstance(claims, Exception):
            self._report(claims)  # the next tick tries again
            return
        messages: dict[int, list[Enqueue]] = {}
        for worker_id, job, name, attempt, environment in claims:
            messages.setdefault(worker_id, []).append(Enqueue(job, name, attempt, environment))
        for worker_id, enqueues in messages.items():
            # Where the worker went meanwhile, its detach comes after the claim and queues the jobs again.
            if worker := self.workers.get(worker_id):
                worker.jobs.update((enqueue.job, enqueue.attempt) for enqueue in enqueues)
                worker.send(*enqueues)
                self._note(worker)
        if self._claim_again:
            self._claim_again = False
            self.dispatch()

    def reload(self, configs: Configs) -> None:
        """Take a new configuration: for jobs not yet started, and to all workers."""
        self.configs = configs
        for worker in self.workers.values():
            worker.send_configs(configs)
        self.dispatch()

    def _note(self, worker: Worker) -> None:
        self.changed_workers[worker.id] = {}

    def take_changed_workers(self) -> list[dict[str, Any]]:
        """Give the workers that changed since the last call."""
        changed, self.changed_workers = self.changed_workers, {}
        return [gone or self.workers[id_].as_json() for id_, gone in changed.items() if gone or id_ in self.workers]

    def _close(self, worker: Worker, code: int, reason: str) -> None:
        task = asyncio.ensure_future(worker.socket.close(code, reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _report(self, result: object) -> None:
        if isinstance(result, Exception) and not isinstance(result, StoreError):
            log.error("internal error", exc_info=result)


# The HTTP side: one thread a connection


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
    *(
        "authorization",
        "content-length",
        "content-type",
        "expect",
        "host",
        "idempotency-key",
        "last-event-id",
        "origin",
    ),
    *("sec-fetch-site", "transfer-encoding", "upgrade"),
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

    def __init__(self, address: tuple[str, int], api: "Api", runner: "RunnerListener", access: "Access") -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.api, self.runner, self.access = api, runner, access
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
        super().process_request(request, client_address)

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
            response = self.server.api.answer(request)
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

    def _respond(self, response: "Response", close: bool, request: Request | None = None) -> None:
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

    def check_runner(self, connection: ServerConnection, request: websockets.http11.Request) -> Any:
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


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339, UTC, with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_json(id_: int, name: str, state: str) -> dict[str, Any]:
    """A job as the original's API shows it, key for key."""
    queuing = state in ("queued", "assigned")
    return {"id": id_, "name": name, "queuing": queuing, "running": state == "running", "success": state == "success"}


class Api:
    """What each request is answered with. Every method here runs on an HTTP thread."""

    def __init__(self, store_: Store, dispatcher: Dispatcher, events: "Events", metrics: "Metrics", hold: bool) -> None:
        self.store, self.dispatcher, self.events, self.metrics, self.hold = store_, dispatcher, events, metrics, hold
        self.loop = asyncio.get_running_loop()

    def answer(self, request: Request) -> Response:
        """Answer a request; never raises but for ApiError, whatever it holds."""
        try:
            method = "GET" if request.method == "HEAD" else request.method
            allowed = []
            for route_method, pattern, function in ROUTES:
                if match := pattern.fullmatch(request.path):
                    if route_method == method:
                        return function(self, request, *map(unquote_strictly, match.groups()))
                    allowed.append(route_method)
            raise self._no_route(request, allowed)
        except ApiError:
            raise
        except StoreError as error:
            raise ApiError(HTTPStatus.INSUFFICIENT_STORAGE, f"nothing was changed: {error}") from error
        except Exception as error:
            log.error("internal error at %s %s", request.method, request.path, exc_info=error)
            raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log says more") from error

    def _no_route(self, request: Request, allowed: list[str]) -> ApiError:
        if request.path == "/runner":
            detail = "workers connect here by WebSocket: python client.py HOST:PORT/runner"
            return ApiError(HTTPStatus.UPGRADE_REQUIRED, detail, Upgrade="websocket", Connection="Upgrade")
        if allowed:
            methods = ", ".join(allowed + ["HEAD"] * ("GET" in allowed))
            return ApiError(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes {methods}", Allow=methods)
        return ApiError(HTTPStatus.NOT_FOUND, f"nothing is at {request.path}; /openapi.json tells what there is")

    def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.store.do(function, *args).result()
        except KeyError as error:
            raise ApiError(HTTPStatus.NOT_FOUND, f"there is no job with id {error.args[0]}") from error
        except store.Conflict as error:
            raise ApiError(HTTPStatus.CONFLICT, str(error)) from error

    # Jobs

    def post_job(self, request: Request, name: str) -> Response:
        query = request.query("wait", "full")
        wait, full = seconds(query, "wait"), flag(query, "full")
        job = self._new_job(name, read_json(request.body) if request.body else {}, idempotency_key(request), "")
        self._check_workers()
        (id_,) = self._do(store.add, [job], time.time())
        if not wait and not full:
            return Response(as_json(job_json(id_, name, "queued")))
        row = self._wait(id_, wait)
        return Response(as_json(self.show(row) if full else job_json(id_, name, row["state"])))

    def post_jobs(self, request: Request) -> Response:
        request.query()
        items = read_json(request.body)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ApiError(HTTPStatus.BAD_REQUEST, 'the body must be a JSON list such as [{"name": "hello-world"}]')
        key = idempotency_key(request)
        jobs = [
            self._new_job(item.pop("name", None), item, f"{key}/{number}" if key else None, f"item {number}: ")
            for number, item in enumerate(items)
        ]
        self._check_workers()
        ids = self._do(store.add, jobs, time.time())
        made = [job_json(id_, job.name, "queued") for id_, job in zip(ids, jobs, strict=True)]
        return Response(as_json(made))

    def _new_job(self, name: object, body: object, key: str | None, where: str) -> NewJob:
        configs = self.dispatcher.configs
        config = configs.by_name.get(name) if isinstance(name, str) else None
        if config is None:
            known = ", ".join(list(configs.by_name)[:20]) or "none"
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"{where}there is no job named {name!r} in jobs.yaml; there are: {known}"
            )
        if body == {} and not config.parameters:
            return NewJob(config.name, {}, config.priority, 0, key)
        try:
            return self._checked(config, body, key)
        except ValueError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{where}{error}") from error

    def _checked(self, config: JobConfig, body: object, key: str | None) -> NewJob:
        if not isinstance(body, dict):
            raise ValueError('the body must be a JSON object such as {"environment": {"NAME": "value"}}')
        for unknown in body.keys() - {"environment", "priority", "delay"}:
            raise ValueError(f"no key {unknown!r} here; there are: environment, priority, delay")
        priority, delay = body.get("priority", config.priority), body.get("delay", 0)
        if type(priority) is not int or abs(priority) >= 2**31:
            raise ValueError("priority must be an integer of 32 bits")
        if type(delay) not in (int, float) or not 0 <= delay <= MAX_DELAY_SECONDS:
            raise ValueError(f"delay must be a number of seconds from 0 to {MAX_DELAY_SECONDS}")
        return NewJob(config.name, check_parameters(config, body.get("environment", {})), priority, delay, key)

    def _check_workers(self) -> None:
        if not self.hold and not self.dispatcher.expects_workers:
            detail = "worker is not exist. Start one: python client.py HOST:PORT/runner, or run the server with --hold"
            raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, detail)

    def get_jobs(self, request: Request) -> Response:
        query = request.query("state", "name", "limit", "after", "before", "full")
        states = list(dict.fromkeys(query["state"].split(","))) if "state" in query else []
        for state in states:
            if state not in store.STATES:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"no state {state!r}; there are: {', '.join(store.STATES)}")
        limit = integer(query, "limit", 1, MAX_JOB_ID)
        before, after = integer(query, "before", 0, MAX_JOB_ID), integer(query, "after", 0, MAX_JOB_ID) or 0
        if before is not None and limit is None:
            raise ApiError(HTTPStatus.BAD_REQUEST, "before needs a limit: how many of the newest below it")
        pages = self._pages(states, query.get("name"), after, before, limit)
        return Response(self._list(pages, flag(query, "full")))

    def _pages(
        self, states: list[str], name: str | None, after: int, before: int | None, limit: int | None
    ) -> Iterator[list[sqlite3.Row]]:
        if before is not None:
            yield self._do(store.page, states, name, after, before, min(limit or PAGE_JOBS, MAX_PAGE_JOBS))
            return
        left = MAX_JOB_ID if limit is None else limit
        while left > 0 and (rows := self._do(store.page, states, name, after, None, min(left, PAGE_JOBS))):
            yield rows
            after, left = rows[-1]["id"], left - len(rows)

    def _list(self, pages: Iterator[list[sqlite3.Row]], full: bool) -> Iterator[bytes]:
        separator = b"["
        for rows in pages:
            show = self.show if full else lambda row: job_json(row["id"], row["name"], row["state"])
            yield separator + as_json([show(row) for row in rows])[1:-1]
            separator = b","
        yield b"[]" if separator == b"[" else b"]"

    def get_job(self, request: Request, id_: str) -> Response:
        query = request.query("wait")
        return Response(as_json(self.show(self._wait(job_id(id_), seconds(query, "wait")))))

    def _wait(self, job: int, wait: float) -> sqlite3.Row:
        """Give a job's row once it is final, or as it is after `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            row: sqlite3.Row
            row, changed = self._do(store.get_and_watch, job, wait > 0)
            if changed is None:
                return row
            try:
                changed.result(max(deadline - time.monotonic(), 0))
            except TimeoutError:
                changed.cancel()
                wait = 0

    def show(self, row: sqlite3.Row) -> dict[str, Any]:
        reason = row["reason"]
        if row["state"] == "queued":
            reason = self._why_it_waits(row)
        elif row["state"] == "running" and row["cancelling"]:
            reason = "cancelling"
        return {
            **job_json(row["id"], row["name"], row["state"]),
            "state": row["state"],
            "attempt": row["attempt"],
            "worker": row["worker_name"],
            "exit_code": row["exit_code"],
            "reason": reason,
            "environment": json.loads(row["environment"] or "{}"),
            "priority": row["priority"],
            "created_at": timestamp(row["created_at"]),
            "started_at": timestamp(row["started_at"]),
            "finished_at": timestamp(row["finished_at"]),
            "log_bytes": row["log_bytes"],
        }

    def _why_it_waits(self, row: sqlite3.Row) -> str | None:
        name, configs = row["name"], self.dispatcher.configs
        config, workers = configs.by_name.get(name), list(self.dispatcher.workers.values())
        if config is None:
            return f"jobs.yaml has no job named {name} any more"
        if row["not_before"] is not None:
            return f"waits until {timestamp(row['not_before'])}"
        if not workers:
            return "no worker is connected"
        if not any(set(config.tags) <= set(worker.tags) for worker in workers):
            return f"no worker has the tag{'s' * (len(config.tags) > 1)} {', '.join(config.tags)}"
        if not any(name in configs.names_for(worker.tags, worker.protocol_version) for worker in workers):
            return "no connected worker speaks version 2 of the protocol, which this job needs"
        if config.concurrency and (active := self._do(store.count_active, name)) >= config.concurrency:
            return f"{active} of {config.concurrency} running"
        return "all slots are busy"

    def delete_job(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(store.cancel, job_id(id_), time.time())
        if row["worker"] is not None:
            running = row["state"] == "running"
            stop = self.dispatcher.stop
            self.loop.call_soon_threadsafe(stop, row["worker"], row["id"], row["attempt"], running)
        return Response(as_json(self.show(self._do(store.get, row["id"]))))

    def retry_job(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(store.get, job_id(id_))
        if row["state"] not in store.FINAL_STATES:
            raise ApiError(HTTPStatus.CONFLICT, f"job {row['id']} has not ended: it is {row['state']}")
        body = {"environment": json.loads(row["environment"] or "{}"), "priority": row["priority"]}
        job = self._new_job(row["name"], body, idempotency_key(request), "")
        self._check_workers()
        (new_id,) = self._do(store.add, [job], time.time())
        return Response(as_json(job_json(new_id, job.name, "queued")))

    def get_attempts(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(store.get, job_id(id_))
        attempts = [*self._do(store.attempts, row["id"]), *([row] if row["attempt"] else [])]
        keys = ("attempt", "worker_name", "started_at", "finished_at", "exit_code", "reason", "log_bytes")
        shown = [{key.removesuffix("_name"): attempt[key] for key in keys} for attempt in attempts]
        for attempt in shown:
            attempt["started_at"], attempt["finished_at"] = map(
                timestamp, (attempt["started_at"], attempt["finished_at"])
            )
        return Response(as_json(shown))

    def get_log(self, request: Request, id_: str) -> Response:
        query = request.query("follow", "tail", "offset", "attempt")
        row = self._do(store.get, job_id(id_))
        attempt = integer(query, "attempt", 1, MAX_JOB_ID) or row["attempt"]
        offset, tail = integer(query, "offset", 0, 2**62) or 0, integer(query, "tail", 0, MAX_JOB_ID)
        if tail is not None:
            offset = max(offset, self._do(store.tail_offset, row["id"], attempt, tail))
        follow = flag(query, "follow")
        pieces = self._follow(row["id"], attempt, offset) if follow else self._read_log(row["id"], attempt, offset)
        return Response(pieces, content_type="text/plain; charset=utf-8", headers=UNBUFFERED if follow else {})

    def _read_log(self, job: int, attempt: int, offset: int) -> Generator[bytes, None, int]:
        """Give an attempt's output from an offset on, with a line where some was cut; return the offset of its end."""
        while pieces := self._do(store.read_log, job, attempt, offset):
            for start, data in pieces:
                if start > offset:
                    yield b"\n[jobworker: %d bytes cut]\n" % (start - offset)
                yield data
                offset = start + len(data)
        return offset

    def _follow(self, job: int, attempt: int, offset: int) -> Iterator[bytes]:
        while True:
            row, changed = self._do(store.get_and_watch, job, True)
            if not attempt:
                attempt = row["attempt"]
            offset = yield from self._read_log(job, attempt, offset)
            if changed is None or row["attempt"] > attempt:
                return
            while not changed.done():
                yield b""  # is the reader still there?
                with contextlib.suppress(TimeoutError):
                    changed.result(FOLLOW_CHECK_SECONDS)

    # Workers, events, health

    def get_workers(self, request: Request) -> Response:
        full = flag(request.query("full"), "full")
        workers = sorted(self.dispatcher.workers.values(), key=lambda worker: worker.id)
        return Response(as_json([worker.as_json() if full else worker_json(worker) for worker in workers]))

    def get_worker(self, request: Request, id_: str) -> Response:
        request.query()
        worker = self.dispatcher.workers.get(job_id(id_))
        if worker is None:
            raise ApiError(HTTPStatus.NOT_FOUND, f"no worker with id {id_} is connected")
        return Response(as_json(worker.as_json()))

    def get_configs(self, request: Request) -> Response:
        request.query()
        return Response(as_json([public_config(config) for config in self.dispatcher.configs.by_name.values()]))

    def get_events(self, request: Request) -> Response:
        request.query()
        last = request.headers.get("last-event-id", "")
        stream = self.events.stream(int(last) if re.fullmatch("[0-9]{1,18}", last) else None)
        return Response(stream, content_type="text/event-stream; charset=utf-8", headers=UNBUFFERED)

    def get_health(self, request: Request) -> Response:
        request.query()
        health = {
            "status": "ok",
            "version": VERSION,
            "workers": len(self.dispatcher.workers),
            "jobs": self.store.counts,
        }
        if self.store.error:
            health = {"status": "failing", "detail": self.store.error, "version": VERSION}
        return Response(as_json(health), HTTPStatus.SERVICE_UNAVAILABLE if self.store.error else HTTPStatus.OK)

    def get_metrics(self, request: Request) -> Response:
        request.query()
        oldest = self._do(store.oldest_ready)
        latency = 0.0 if oldest is None else max(time.time() - oldest, 0)
        text = self.metrics.text(self.store.counts, self.dispatcher, latency)
        return Response(text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def get_dashboard(self, request: Request) -> Response:  # noqa: ARG002
        page, policy = dashboard()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(page, content_type="text/html; charset=utf-8", headers=headers)

    def get_openapi(self, request: Request) -> Response:
        request.query()
        return Response((HERE / "openapi.json").read_bytes())


ROUTES = [
    (method, re.compile(pattern), function)
    for method, pattern, function in (
        ("POST", "/api/jobs/([^/]+)", Api.post_job),
        ("GET", "/api/jobs", Api.get_jobs),
        ("POST", "/api/jobs", Api.post_jobs),
        ("GET", "/api/jobs/([^/]+)", Api.get_job),
        ("DELETE", "/api/jobs/([^/]+)", Api.delete_job),
        ("POST", "/api/jobs/([^/]+)/retry", Api.retry_job),
        ("GET", "/api/jobs/([^/]+)/log", Api.get_log),
        ("GET", "/api/jobs/([^/]+)/attempts", Api.get_attempts),
        ("GET", "/api/workers", Api.get_workers),
        ("GET", "/api/workers/([^/]+)", Api.get_worker),
        ("GET", "/api/configs", Api.get_configs),
        ("GET", "/api/events", Api.get_events),
        ("GET", "/healthz", Api.get_health),
        ("GET", "/metrics", Api.get_metrics),
        ("GET", "/openapi.json", Api.get_openapi),
        ("GET", "/", Api.get_dashboard),
    )
]


def unquote_strictly(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from error


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Idempotency-Key must have 1 to 255 characters")
    return key


def read_json(body: bytes) -> Any:
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
        as_json(value)  # lone surrogates can't be stored
    except (ValueError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {str(error)[:200]}") from error
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def job_id(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise ApiError(HTTPStatus.NOT_FOUND, f"there is no id {text!r}: ids are numbers")
    return int(text)


def integer(query: dict[str, str], name: str, low: int, high: int) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{name} must be an integer from {low} to {high}")
    return int(text)


def flag(query: dict[str, str], name: str) -> bool:
    text = query.get(name, "0")
    if text not in ("0", "1"):
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{name} must be 0 or 1")
    return text == "1"


def seconds(query: dict[str, str], name: str) -> float:
    text = query.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,30})?(e-[0-9]{1,3})?", text) or float(text) > MAX_WAIT_SECONDS:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{name} must be a number of seconds from 0 to {MAX_WAIT_SECONDS}")
    return float(text)


def public_config(config: JobConfig) -> dict[str, Any]:
    """A job of jobs.yaml as the API shows it: what one needs to run it, and no environment, which may hold secrets."""
    parameters = {
        name: {"required": parameter.required, "default": parameter.default, "pattern": parameter.pattern}
        for name, parameter in config.parameters.items()
    }
    keys = ("name", "image", "command", "tags", "concurrency", "priority", "timeout", "retries")
    return {**{key: getattr(config, key) for key in keys}, "parameters": parameters}


@functools.cache
def dashboard() -> tuple[bytes, str]:
    """The dashboard's page, and a policy that lets nothing but its own script and style run."""
    page = (HERE / "dashboard.html").read_bytes()
    hashes = {}
    for tag in (b"script", b"style"):
        element = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        digest = hashlib.sha256(element[1] if element else b"").digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        f"default-src 'none'; script-src {hashes[b'script']}; style-src {hashes[b'style']}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


class Tick(NamedTuple):
    """What changed in a moment: job ids, workers as JSON, and the counts where they changed."""

    id: int
    jobs: frozenset[int]
    workers: list[dict[str, Any]]
    stats: dict[str, Any]


class Events:
    """Server-sent events: a ring of the last ticks, rendered once for all who listen."""

    def __init__(self, store_: Store) -> None:
        self.store = store_
        self.listeners = 0
        self._condition = threading.Condition()
        self._ticks: deque[Tick] = deque([Tick(int(time.time() * 1000), frozenset(), [], {})], maxlen=RING_TICKS)
        self._render = functools.lru_cache(maxsize=8)(self._render_uncached)

    def publish(self, jobs: frozenset[int], workers: list[dict[str, Any]], stats: dict[str, Any]) -> None:
        """Add a tick where anything changed, and wake who listens. Called on the event loop."""
        last = self._ticks[-1]
        if jobs or workers or stats != last.stats:
            with self._condition:
                self._ticks.append(Tick(max(int(time.time() * 1000), last.id + 1), jobs, workers, stats))
                self._condition.notify_all()

    def stream(self, last_id: int | None) -> Iterator[bytes]:
        """Give events from after `last_id`, for ever; b"" now and then. Ids go on growing across server starts."""
        position = self._ticks[-1].id
        yield event("stats", self._ticks[-1].stats, position)
        if last_id is not None and self._ticks[0].id <= last_id <= position:
            position = last_id
        elif last_id is not None:
            yield event("reset", {}, position)
        while True:
            with self._condition:
                news = self._condition.wait_for(functools.partial(self._is_newer, position), HEARTBEAT_SECONDS)
                newest, oldest = self._ticks[-1].id, self._ticks[0].id
            if not news:
                yield b":\n\n"
            elif position < oldest:
                yield event("reset", {}, newest)
            else:
                yield self._render(position, newest)
            position = newest

    def _is_newer(self, position: int) -> bool:
        return self._ticks[-1].id > position

    def _render_uncached(self, after: int, until: int) -> bytes:
        ticks = [tick for tick in list(self._ticks) if after < tick.id <= until]
        jobs = frozenset[int]().union(*(tick.jobs for tick in ticks))
        workers = {worker["id"]: worker for tick in ticks for worker in tick.workers}
        parts = [event("worker", worker) for worker in workers.values()]
        if len(jobs) > MAX_EVENT_JOBS:
            parts.append(event("reset", {}))
        else:
            rows = self.store.do(store.get_many, jobs).result() if jobs else []
            parts += [event("job", self.show(row)) for row in rows]
        return b"".join(parts) + event("stats", ticks[-1].stats, until)

    show: Callable[[sqlite3.Row], dict[str, Any]]


def event(kind: str, data: object, id_: int | None = None) -> bytes:
    """One server-sent event; an id on the last of a tick, so that who resumes after it has missed nothing."""
    return (f"id: {id_}\n" if id_ else "").encode() + b"event: %b\ndata: %b\n\n" % (kind.encode(), as_json(data))


class Metrics:
    """Counters and histograms since the server's start, in Prometheus' text format."""

    BUCKETS = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)

    def __init__(self) -> None:
        self.finished: Counter[tuple[str, str]] = Counter()
        self.durations: dict[str, list[float]] = {}
        self.waits: dict[str, list[float]] = {}

    def observe(self, finished: Iterable[store.Finished]) -> None:
        """Count jobs that ended. Called on the event loop."""
        for _id, name, state, created_at, started_at, finished_at in finished:
            self.finished[name, state] += 1
            if started_at is not None:
                self._add(self.durations, name, finished_at - started_at)
                self._add(self.waits, name, started_at - created_at)

    def _add(self, histograms: dict[str, list[float]], name: str, value: float) -> None:
        counts = histograms.setdefault(name, [0] * (len(self.BUCKETS) + 2))
        counts[bisect_left(self.BUCKETS, value)] += 1
        counts[-1] += value

    def text(self, counts: dict[str, int], dispatcher: Dispatcher, latency: float) -> str:
        """Give all metrics. latency: how long the oldest job that could run has waited, in seconds."""
        workers = list(dispatcher.workers.values())
        up = [({"worker": worker.name}, 1.0) for worker in workers]
        up += [({"worker": worker.name}, 0.0) for worker in list(dispatcher.away.values())]
        lines = [
            *family("build_info", "gauge", "What runs here.", [({"version": VERSION}, 1)]),
            *family("jobs", "gauge", "Jobs by state.", [({"state": state}, count) for state, count in counts.items()]),
            *family("queue_latency_seconds", "gauge", "How long the oldest ready job has waited.", [({}, latency)]),
            *family("worker_up", "gauge", "1: connected; 0: within its grace.", up),
            *family("worker_jobs", "gauge", "Jobs held.", [({"worker": w.name}, len(w.jobs)) for w in workers]),
            *family("worker_slots", "gauge", "Slots.", [({"worker": worker.name}, worker.slots) for worker in workers]),
            *family(
                "jobs_finished_total",
                "counter",
                "Jobs that ended, since the server's start.",
                [({"name": name, "state": state}, count) for (name, state), count in list(self.finished.items())],
            ),
            *self._histogram("job_duration_seconds", "From start to end.", self.durations),
            *self._histogram("job_queue_duration_seconds", "From POST to start.", self.waits),
        ]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, text: str, histograms: dict[str, list[float]]) -> Iterator[str]:
        yield from family(name, "histogram", text, [])
        for job, (*counts, total) in list(histograms.items()):
            label = {"name": job}
            for bound, count in zip((*self.BUCKETS, "+Inf"), itertools.accumulate(counts), strict=True):
                yield sample(f"{name}_bucket", {**label, "le": str(bound)}, count)
            yield sample(f"{name}_sum", label, total)
            yield sample(f"{name}_count", label, sum(counts))


def family(name: str, kind: str, text: str, samples: list[tuple[dict[str, str], float]]) -> list[str]:
    lines = [f"# HELP jobworker_{name} {text}", f"# TYPE jobworker_{name} {kind}"]
    return lines + [sample(name, labels, value) for labels, value in samples]


def sample(name: str, labels: dict[str, str], value: float) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    shown = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in labels.items())
    return f"jobworker_{name}{{{shown}}} {value}" if shown else f"jobworker_{name} {value}"


class Server:
    """Puts the parts together, runs them, and takes them down again."""

    def __init__(self, options: argparse.Namespace, jobs: Iterable[JobConfig]) -> None:
        self.options = options
        self.loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[int] = self.loop.create_future()
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(Configs(jobs), options.grace)
        self.store = Store(str(options.database), self._deliver)
        self.dispatcher.store = self.store
        self.events = Events(self.store)
        self.api = Api(self.store, self.dispatcher, self.events, self.metrics, options.hold)
        self.events.show = self.api.show
        self.access = Access(options.host, options.tokens)

    def _deliver(self, commit: store.Commit) -> None:
        """Wake the loop for what it waits for. Called by the store's thread."""
        if commit.calls or commit.finished or self.dispatcher.has_room:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._committed, commit)

    async def run(self) -> int:
        """Serve until a signal or a broken database; the exit code."""
        self.dispatcher.resume(await asyncio.wrap_future(self.store.do(store.expected_workers)))
        self._publish((set(), None))
        listener = RunnerListener()
        front = Front((self.options.host, self.options.port), self.api, listener, self.access)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop, 0)
        self.loop.add_signal_handler(signal.SIGHUP, self._reload)
        async with serve_websockets(
            self.dispatcher.serve,
            sock=listener,
            subprotocols=[Subprotocol(VERSION_2)],
            select_subprotocol=select_version,
            origins=[None],
            process_request=self.access.check_runner,
            process_response=self._introduce,
            server_header=None,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            ping_interval=PING_SECONDS,
            ping_timeout=PONG_SECONDS,
            close_timeout=2,
            logger=quiet_logger(),
        ):
            threading.Thread(target=front.serve_forever, name="http", daemon=True).start()
            host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
            log.info("listening on http://%s:%d", host, front.server_address[1])
            ticks = asyncio.ensure_future(self._tick_for_ever())
            code = await self.stopped
            await asyncio.to_thread(front.shutdown)
            front.server_close()
            ticks.cancel()
        await asyncio.to_thread(self.store.close)
        return code

    def _introduce(self, _connection: object, _request: object, response: websockets.http11.Response) -> None:
        response.headers[protocol.SERVER_HEADER] = self.store.server_id

    def _stop(self, code: int) -> None:
        if not self.stopped.done():
            log.info("stopping")
            self.stopped.set_result(code)

    def _reload(self) -> None:
        try:
            jobs = load_jobs(self.options.jobs)
        except ConfigError as error:
            log.error("nothing changed; the new jobs.yaml has errors:\n%s", error)
            return
        self.dispatcher.reload(Configs(jobs))
        log.info("read %s again: %d jobs", self.options.jobs, len(jobs))

    def _committed(self, commit: store.Commit) -> None:
        for callback, result in commit.calls:
            try:
                callback(result)
            except Exception as error:  # the others' results still count
                log.error("internal error", exc_info=error)
        self.metrics.observe(commit.finished)
        if commit.ready:
            self.dispatcher.dispatch()

    async def _tick_for_ever(self) -> None:
        prune_at = 0.0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                if time.monotonic() >= prune_at:
                    prune_at = time.monotonic() + PRUNE_SECONDS
                    self._prune()
                self._tick()
            except Exception as error:
                log.error("internal error", exc_info=error)

    def _tick(self) -> None:
        if self.store.broken:
            log.critical("the database is not to be trusted until it is opened anew: %s; exiting", self.store.error)
            self._stop(1)
        self.store.tell(self._ignore, store.probe if self.store.error else store.make_due, time.time())
        self.dispatcher.lose_overdue()
        self.dispatcher.dispatch()
        self.store.tell(self._publish, store.news)

    def _publish(self, news: tuple[set[int], float | None] | Exception) -> None:
        if isinstance(news, Exception):
            return
        changed, oldest = news
        workers = list(self.dispatcher.workers.values())
        stats = {
            "jobs": self.store.counts,
            "finished": self.metrics.finished.total(),
            "queue_latency": round(max(time.time() - oldest, 0), 1) if oldest else 0,
            "workers": len(workers),
            "slots": sum(worker.slots for worker in workers),
            "busy": sum(len(worker.jobs) for worker in workers),
        }
        self.events.publish(frozenset(changed), self.dispatcher.take_changed_workers(), stats)

    def _prune(self) -> None:
        if self.options.keep:
            self.store.tell(self._pruned, store.prune, time.time() - self.options.keep, PRUNE_JOBS)

    def _pruned(self, count: int | Exception) -> None:
        if count == PRUNE_JOBS:  # a little at a time, with room for others between
            self._prune()

    def _ignore(self, _result: object) -> None:
        """Errors of the database have been logged by the store."""


def select_version(_connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol(VERSION_2) if VERSION_2 in offered else None


def quiet_logger() -> logging.Logger:
    """What websockets logs: failed handshakes are no errors of ours, and its debug log would show tokens."""
    logger = logging.getLogger("websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


class LineFormatter(logging.Formatter):
    """A line an event: control characters, which a terminal might obey, are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: repr(m[0])[1:-1], text)


def start_logging(verbose: bool) -> None:
    """Write the log to stderr."""
    stream = logging.StreamHandler()
    stream.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[stream])


def config_error(where: object, message: str) -> ConfigError:
    error = ConfigError((0, 0, message))
    error.path = str(where)
    return error


def read_tokens(path: Path | None) -> dict[str, set[str]]:
    """Read a token file: a line each, `api TOKEN`, `worker TOKEN`, or `TOKEN` for both; `#` begins a comment.

    Raises ConfigError where it can't be read, or has none.
    """
    tokens: dict[str, set[str]] = {"api": set(), "worker": set()}
    if path is None:
        return tokens
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    except (OSError, UnicodeDecodeError) as error:
        raise config_error(path, f"can't be read as a token file: {error}") from error
    for words in lines:
        scopes = [words[0]] if len(words) == 2 and words[0] in tokens else list(tokens) if len(words) == 1 else []
        if not scopes:
            raise config_error(path, "each line must be 'api TOKEN', 'worker TOKEN' or 'TOKEN'")
        for scope in scopes:
            tokens[scope].add(words[-1])
    if not all(tokens.values()):
        raise config_error(path, "it must hold a token for the API and one for workers")
    return tokens


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    def default(name: str, otherwise: str | None = None) -> str | None:
        return os.environ.get(f"JOBWORKER_{name}") or otherwise

    parser = argparse.ArgumentParser(description="The jobworker server.", epilog="Options may be set as JOBWORKER_….")
    parser.add_argument("jobs", metavar="JOBS_YAML", type=Path, help="the jobs there are")
    parser.add_argument("-V", "--version", action="version", version=f"jobworker {VERSION}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser.add_argument("-p", "--port", type=port_number, default=default("PORT", "8080"), help="8080; 0: a free one")
    parser.add_argument("--host", default=default("HOST", "127.0.0.1"), help="the address to listen on (127.0.0.1)")
    parser.add_argument("--database", default=default("DATABASE"), help="jobs.db beside JOBS_YAML; :memory: for none")
    parser.add_argument("--token-file", type=Path, default=default("TOKEN_FILE"), help="tokens for API and workers")
    parser.add_argument("--insecure", action="store_true", help="allow another --host without tokens")
    parser.add_argument(
        "--hold",
        action="store_true",
        default=default("HOLD") in ("1", "true", "yes"),
        help="keep jobs until a worker comes",
    )
    parser.add_argument(
        "--grace", type=duration, default=default("GRACE", "60"), help="how long a worker may be away (60s)"
    )
    parser.add_argument(
        "--keep", type=duration, default=default("KEEP", "30d"), help="how long ended jobs stay (30d); 0: ever"
    )
    parser.add_argument("--check", action="store_true", help="only check JOBS_YAML")
    options = parser.parse_args(arguments)
    options.database = options.database or str(options.jobs.parent / "jobs.db")
    return options


def duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def check_host(options: argparse.Namespace) -> None:
    """Refuse to be open to a network without tokens."""
    try:
        loopback = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not options.tokens["api"] and not options.insecure:
        raise config_error("--host", f"{options.host} is open to the network: give --token-file, or --insecure")


def main() -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a configuration to read again
    os.umask(0o077)  # the database holds what jobs wrote
    options = parse_options()
    start_logging(options.verbose)
    try:
        jobs = load_jobs(options.jobs)
        if options.check:
            print(f"{options.jobs}: {len(jobs)} jobs, no errors")
            return 0
        options.tokens = read_tokens(options.token_file)
        check_host(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return asyncio.run(serve(options, jobs))
    except StoreError as error:
        log.critical("%s", error)
    except OSError as error:
        log.critical("can't listen on %s port %d: %s", options.host, options.port, error.strerror or error)
    return 1


async def serve(options: argparse.Namespace, jobs: Iterable[JobConfig]) -> int:
    return await Server(options, jobs).run()


if __name__ == "__main__":
    sys.exit(main())
