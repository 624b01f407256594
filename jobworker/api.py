"""What each HTTP request is answered with: the JSON API, its events and its metrics, from the store.

Every method of Api runs on an HTTP thread of web.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import sqlite3
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from jobworker import VERSION, state
from jobworker.config import JobConfig, check_parameters
from jobworker.state import MAX_JOB_ID, NewJob
from jobworker.store import Store, StoreError
from jobworker.web import ApiError, Request, Response, as_json

if TYPE_CHECKING:
    from server import Dispatcher

HEARTBEAT_SECONDS = 15
FOLLOW_CHECK_SECONDS = 5
MAX_WAIT_SECONDS = 3_600
MAX_DELAY_SECONDS = 366 * 86400
PAGE_JOBS = 1_000
MAX_PAGE_JOBS = 10_000
MAX_EVENT_JOBS = 250
RING_TICKS = 1_000
UNBUFFERED = {"X-Accel-Buffering": "no"}  # a proxy shall pass on each piece as it comes
HERE = Path(__file__).resolve().parent

log = logging.getLogger("server")


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

    def __init__(self, store_: Store, dispatcher: Dispatcher, events: Events, metrics: Metrics, hold: bool) -> None:
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
        except state.Conflict as error:
            raise ApiError(HTTPStatus.CONFLICT, str(error)) from error

    # Jobs

    def post_job(self, request: Request, name: str) -> Response:
        query = request.query("wait", "full")
        wait, full = seconds(query, "wait"), flag(query, "full")
        key = idempotency_key(request)
        job = self._new_job(name, read_json(request.body) if request.body else {}, key)
        self._check_workers()
        (id_,) = self._do(state.add, [job], time.time())
        if not wait and not full and key is None:
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
            self._new_job(item.pop("name", None), item, f"{key}/{number}" if key else None, number)
            for number, item in enumerate(items)
        ]
        self._check_workers()
        ids = self._do(state.add, jobs, time.time())
        made = [job_json(id_, job.name, "queued") for id_, job in zip(ids, jobs, strict=True)]
        return Response(as_json(made))

    def _new_job(self, name: object, body: object, key: str | None, number: int | None = None) -> NewJob:
        """Give the job that a body asks for; number: of the item in a list, where it is one."""
        configs = self.dispatcher.configs.by_name
        config = configs.get(name) if isinstance(name, str) else None
        if config and body == {} and not config.parameters:
            return NewJob(config.name, {}, config.priority, 0, key)
        where = "" if number is None else f"item {number}: "
        if config is None:
            known = ", ".join(list(configs)[:20]) or "none"
            detail = f"{where}there is no job named {name!r} in jobs.yaml; there are: {known}"
            raise ApiError(HTTPStatus.NOT_FOUND, detail)
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
        for wanted in states:
            if wanted not in state.STATES:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"no state {wanted!r}; there are: {', '.join(state.STATES)}")
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
            yield self._do(state.page, states, name, after, before, min(limit or PAGE_JOBS, MAX_PAGE_JOBS))
            return
        left = MAX_JOB_ID if limit is None else limit
        while left > 0 and (rows := self._do(state.page, states, name, after, None, min(left, PAGE_JOBS))):
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
            row, changed = self._do(state.get_and_watch, job, wait > 0)
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
        if config.concurrency and (active := self._do(state.count_active, name)) >= config.concurrency:
            return f"{active} of {config.concurrency} running"
        return "all slots are busy"

    def delete_job(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(state.cancel, job_id(id_), time.time())
        if row["worker"] is not None:
            running = row["state"] == "running"
            stop = self.dispatcher.stop
            self.loop.call_soon_threadsafe(stop, row["worker"], row["id"], row["attempt"], running)
        return Response(as_json(self.show(self._do(state.get, row["id"]))))

    def retry_job(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(state.get, job_id(id_))
        if row["state"] not in state.FINAL_STATES:
            raise ApiError(HTTPStatus.CONFLICT, f"job {row['id']} has not ended: it is {row['state']}")
        body = {"environment": json.loads(row["environment"] or "{}"), "priority": row["priority"]}
        job = self._new_job(row["name"], body, idempotency_key(request))
        self._check_workers()
        (new_id,) = self._do(state.add, [job], time.time())
        return Response(as_json(job_json(new_id, job.name, "queued")))

    def get_attempts(self, request: Request, id_: str) -> Response:
        request.query()
        row = self._do(state.get, job_id(id_))
        attempts = [*self._do(state.attempts, row["id"]), *([row] if row["attempt"] else [])]
        keys = ("attempt", "worker_name", "started_at", "finished_at", "exit_code", "reason", "log_bytes")
        shown = [{key.removesuffix("_name"): attempt[key] for key in keys} for attempt in attempts]
        for attempt in shown:
            attempt["started_at"], attempt["finished_at"] = map(
                timestamp, (attempt["started_at"], attempt["finished_at"])
            )
        return Response(as_json(shown))

    def get_log(self, request: Request, id_: str) -> Response:
        query = request.query("follow", "tail", "offset", "attempt")
        row = self._do(state.get, job_id(id_))
        attempt = integer(query, "attempt", 1, MAX_JOB_ID) or row["attempt"]
        offset, tail = integer(query, "offset", 0, 2**62) or 0, integer(query, "tail", 0, MAX_JOB_ID)
        if tail is not None:
            offset = max(offset, self._do(state.tail_offset, row["id"], attempt, tail))
        follow = flag(query, "follow")
        pieces = self._follow(row["id"], attempt, offset) if follow else self._read_log(row["id"], attempt, offset)
        return Response(pieces, content_type="text/plain; charset=utf-8", headers=UNBUFFERED if follow else {})

    def _read_log(self, job: int, attempt: int, offset: int) -> Generator[bytes, None, int]:
        """Give an attempt's output from an offset on, with a line where some was cut; return the offset of its end."""
        while pieces := self._do(state.read_log, job, attempt, offset):
            for start, data in pieces:
                if start > offset:
                    yield b"\n[jobworker: %d bytes cut]\n" % (start - offset)
                yield data
                offset = start + len(data)
        return offset

    def _follow(self, job: int, attempt: int, offset: int) -> Iterator[bytes]:
        while True:
            row, changed = self._do(state.get_and_watch, job, True)
            if not attempt:
                attempt = row["attempt"]
            offset = yield from self._read_log(job, attempt, offset)
            if changed is None or row["attempt"] > attempt:
                return
            try:
                while not changed.done():
                    yield b""  # is the reader still there?
                    with contextlib.suppress(TimeoutError):
                        changed.result(FOLLOW_CHECK_SECONDS)
            finally:
                changed.cancel()

    # Workers, events, health

    def get_workers(self, request: Request) -> Response:
        full = flag(request.query("full"), "full")
        workers = sorted(self.dispatcher.workers.values(), key=lambda worker: worker.id)
        return Response(as_json([worker.as_json() if full else worker.as_listed() for worker in workers]))

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
        oldest = self._do(state.oldest_ready)
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
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # half a surrogate pair is no character
            as_json(value)
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
        self._condition = threading.Condition()
        self._ticks: deque[Tick] = deque([Tick(int(time.time() * 1000), frozenset(), [], {})], maxlen=RING_TICKS)
        self._rendering = threading.Lock()
        self._rendered = functools.lru_cache(maxsize=8)(self._render)

    def publish(self, jobs: Iterable[int], workers: list[dict[str, Any]], stats: dict[str, Any]) -> None:
        """Add a tick where anything changed, and wake who listens. Called on the event loop."""
        jobs = frozenset(itertools.islice(jobs, MAX_EVENT_JOBS + 1))  # more are told as a reset
        last = self._ticks[-1]
        if jobs or workers or stats != last.stats:
            with self._condition:
                self._ticks.append(Tick(max(int(time.time() * 1000), last.id + 1), jobs, workers, stats))
                self._condition.notify_all()

    def stream(self, last_id: int | None) -> Iterator[bytes]:
        """Give events from after `last_id`, for ever; b"" now and then. Ids go on growing across server starts."""
        position = self._ticks[-1].id
        yield event("stats", self._ticks[-1].stats, None if last_id else position)
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
                with self._rendering:  # one renders, the others take what it made
                    piece = self._rendered(position, newest)
                yield piece
            position = newest

    def _is_newer(self, position: int) -> bool:
        return self._ticks[-1].id > position

    def _render(self, after: int, until: int) -> bytes:
        ticks = [tick for tick in list(self._ticks) if after < tick.id <= until]
        jobs = frozenset[int]().union(*(tick.jobs for tick in ticks))
        workers = {worker["id"]: worker for tick in ticks for worker in tick.workers}
        parts = [event("worker", worker) for worker in workers.values()]
        if len(jobs) > MAX_EVENT_JOBS:
            parts.append(event("reset", {}))
        else:
            rows = self.store.do(state.get_many, jobs).result() if jobs else []
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

    def observe(self, finished: Iterable[state.Finished]) -> None:
        """Count jobs that ended. Called on the event loop."""
        for _id, name, ended, created_at, started_at, finished_at in finished:
            self.finished[name, ended] += 1
            if started_at is not None:  # by a clock that may have jumped meanwhile
                self._add(self.durations, name, max(finished_at - started_at, 0))
                self._add(self.waits, name, max(started_at - created_at, 0))

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
