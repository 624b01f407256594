"""What each HTTP request is answered with: routes with their parameters, the JSON of jobs and workers, events, metrics.

Every method of Api runs on an HTTP thread of web.py and has all that it tells from the store. ROUTES is the one place
that says which requests there are: they are read, refused and described (`/openapi.json`) by it.
"""

import base64
import contextlib
import functools
import hashlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from jobworker import VERSION, logs, state
from jobworker.config import Configs, JobConfig, check_parameters
from jobworker.message import ApiError, Request, Response, as_json, read_items, read_json
from jobworker.metrics import metrics_text
from jobworker.routes import Parameter, Route, flag, integer
from jobworker.state import FINAL_STATES, MAX_JOB_ID, MAX_TICK_JOBS, STATES, Key, NewJob, Refusal, Tick
from jobworker.store import Store, StoreError
from jobworker.web import take_turn

HEARTBEAT_SECONDS = 15
CALLER_CHECK_SECONDS = 3  # how often one that waits looks whether its caller is still there
MAX_WAIT_SECONDS = 3_600
MAX_DELAY_SECONDS = 366 * 86400
MAX_LOG_OFFSET = 2**62
PAGE_JOBS = 250
PAGES_AT_ONCE = 2  # made; sent are as many as there are readers
COPY_PIECE_BYTES = 256 * 1024
SLOWEST_COPY_BYTES = 256 * 1024  # a second, once COPY_SECONDS are over
COPY_SECONDS = 60
MAX_PAGE_JOBS = 10_000
MAX_LIST_JOBS = 20_000  # a transaction of so many holds up the others for a fifth of a second
SHORT_LIST_BYTES = 1_024  # longer ones are read and queued one at a time
UNBUFFERED = {"X-Accel-Buffering": "no"}  # a proxy shall pass on each piece as it comes
HERE = Path(__file__).resolve().parent
STATUS_OF = {
    "unknown": HTTPStatus.NOT_FOUND,
    "conflict": HTTPStatus.CONFLICT,
    "no worker": HTTPStatus.INTERNAL_SERVER_ERROR,
}
START_ONE = ". Start one: python client.py HOST:PORT/runner, or run the server with --hold"

TEXT = "text/plain; charset=utf-8"
EVENTS = "text/event-stream; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
HTML = "text/html; charset=utf-8"
SQLITE = "application/vnd.sqlite3"

log = logging.getLogger("server")


# Parameters


def read_wait(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,30})?(e-[0-9]{1,3})?", text) or float(text) > MAX_WAIT_SECONDS:
        raise ValueError(f"wait must be a number of seconds from 0 to {MAX_WAIT_SECONDS}")
    return float(text)


def read_states(text: str) -> list[str]:
    states = list(dict.fromkeys(text.split(",")))
    for each in states:
        if each not in STATES:
            raise ValueError(f"no state {each!r}; there are: {', '.join(STATES)}")
    return states


def read_id(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise ApiError(HTTPStatus.NOT_FOUND, f"there is no id {text!r}: ids are numbers")
    return int(text)


def read_key(text: str) -> str:
    if not 1 <= len(text) <= 255:
        raise ValueError("Idempotency-Key must have 1 to 255 characters")
    return text


def read_event_id(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


ID = {"$ref": "#/components/schemas/Id"}
JOB_ID = Parameter("job", "The job's id.", read_id, ID, place="path", argument="id_", example=1)
WORKER_ID = Parameter("worker", "The worker's id.", read_id, ID, place="path", argument="id_")
JOB_NAME = Parameter(
    "job",
    "The job's name in jobs.yaml, percent-encoded.",
    str,
    {"$ref": "#/components/schemas/Name"},
    place="path",
    argument="name",
    example="hello-world",
)
WAIT_SCHEMA = {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS}
WAIT = Parameter("wait", "How many seconds to wait for the job's end.", read_wait, WAIT_SCHEMA, 0.0)
FULL = flag("full", "1: every job or worker with all that is known of it.")
KEY = Parameter(
    "Idempotency-Key",
    "A request repeated with the same key queues nothing: it is answered with the job that the first one queued.",
    read_key,
    {"type": "string", "minLength": 1, "maxLength": 255},
    place="header",
    argument="key",
    example="backup-2026-11-24",
)
STATE = Parameter(
    "state",
    "Only jobs in one of these states.",
    read_states,
    {"type": "array", "items": {"$ref": "#/components/schemas/State"}},
    (),
    argument="states",
    example=["queued", "running"],
)
NAME = Parameter("name", "Only jobs of this name.", str, {"type": "string"})
LIMIT = integer("limit", "At most so many; with `before` never more than 10,000.", 1, MAX_JOB_ID)
AFTER = integer("after", "Only ids greater than this: the next page.", 0, MAX_JOB_ID, 0)
BEFORE = integer(
    "before",
    "The newest `limit` jobs of those with a smaller id, still oldest first: the page before. "
    f"{MAX_JOB_ID} gives the newest of all. Needs `limit`.",
    0,
    MAX_JOB_ID,
)
FOLLOW = flag("follow", "1: go on sending what is written until the attempt ends.")
TAIL = integer("tail", "Only so many last lines.", 0, MAX_JOB_ID)
OFFSET = integer("offset", "Only from this byte of the output on.", 0, MAX_LOG_OFFSET, 0)
ATTEMPT = integer(
    "attempt", "Of this attempt; otherwise of the latest. Empty for one that there was not.", 1, MAX_JOB_ID
)
LAST_EVENT_ID = Parameter(
    "Last-Event-ID",
    "The last `id` received: the stream goes on after it, or says `reset` where that was too long ago.",
    read_event_id,
    {"type": "string"},
    place="header",
    argument="last_id",
)


# JSON


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339, UTC, with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_json(id_: int, name: str, job_state: str) -> dict[str, Any]:
    """A job as the original's API shows it, key for key."""
    queuing, running = job_state in ("queued", "assigned"), job_state == "running"
    return {"id": id_, "name": name, "queuing": queuing, "running": running, "success": job_state == "success"}


def full_job_json(row: sqlite3.Row, reason: str | None) -> dict[str, Any]:
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


def attempt_json(row: sqlite3.Row) -> dict[str, Any]:
    """An attempt; row: of the attempts that were followed by another, or of the job, for its latest."""
    times = {key: timestamp(row[key]) for key in ("started_at", "finished_at")}
    rest = {key: row[key] for key in ("exit_code", "reason", "log_bytes")}
    return {"attempt": row["attempt"], "worker": row["worker_name"], **times, **rest}


def worker_json(row: sqlite3.Row, jobs: list[int]) -> dict[str, Any]:
    """A worker as the original's API shows it."""
    return {"id": row["id"], "working": bool(jobs)}


def full_worker_json(row: sqlite3.Row, jobs: list[int]) -> dict[str, Any]:
    return {
        **worker_json(row, jobs),
        "name": row["name"],
        "slots": row["slots"],
        "tags": json.loads(row["tags"]),
        "jobs": jobs,
        "address": row["address"],
        "connected_at": timestamp(row["connected_at"]),
        "protocol": row["protocol"],
        "version": row["version"],
        "connected": bool(row["connected"]),
    }


def config_json(config: JobConfig) -> dict[str, Any]:
    """A job of jobs.yaml: what one needs to run it, and no environment, which may hold secrets."""
    parameters = {
        name: {"required": parameter.required, "default": parameter.default, "pattern": parameter.pattern}
        for name, parameter in config.parameters.items()
    }
    keys = ("name", "image", "command", "tags", "concurrency", "priority", "timeout", "retries")
    return {**{key: getattr(config, key) for key in keys}, "parameters": parameters}


def mark(key: str | None, *content: object) -> Key | None:
    """Give an idempotency key with what it belongs to: a route and a body, which are compared as values."""
    if key is None:
        return None
    return Key(key, hashlib.sha256(as_compared(content)).hexdigest())


def as_compared(value: object) -> bytes:
    """Give JSON that is the same for equal values."""
    value = json.loads(json.dumps(value), parse_float=whole_if_it_is)
    return json.dumps(value, sort_keys=True).encode()


def whole_if_it_is(text: str) -> float:
    """Give the value of a JSON number: 1.0 and 1e0 are 1."""
    number = float(text)
    return int(number) if number.is_integer() else number


def new_job(configs: Configs, name: object, body: object, number: int | None = None) -> NewJob:
    """Give the job that a body asks for; number: of the item in a list, where it is one. Raises ApiError."""
    config = configs.by_name.get(name) if isinstance(name, str) else None
    if config and body == {} and not config.parameters:
        return NewJob(config.name, {}, config.priority)
    where = "" if number is None else f"item {number}: "
    if config is None:
        known = ", ".join(list(configs.by_name)[:20]) or "none"
        detail = f"{where}there is no job named {name!r} in jobs.yaml; there are: {known}"
        raise ApiError(HTTPStatus.NOT_FOUND, detail)
    try:
        return _checked(config, body)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{where}{error}") from error


def _checked(config: JobConfig, body: object) -> NewJob:
    if not isinstance(body, dict):
        raise ValueError('the body must be a JSON object such as {"environment": {"NAME": "value"}}')
    for unknown in body.keys() - {"environment", "priority", "delay"}:
        raise ValueError(f"no key {unknown!r} here; there are: environment, priority, delay")
    priority, delay = body.get("priority", config.priority), body.get("delay", 0)
    if type(priority) is not int or abs(priority) >= 2**31:
        raise ValueError("priority must be an integer of 32 bits")
    if type(delay) not in (int, float) or not 0 <= delay <= MAX_DELAY_SECONDS:
        raise ValueError(f"delay must be a number of seconds from 0 to {MAX_DELAY_SECONDS}")
    return NewJob(config.name, check_parameters(config, body.get("environment", {})), priority, delay)


# Answers


class Api:
    """What each route is answered with. `configs` is replaced when jobs.yaml is read again."""

    def __init__(self, store: Store, configs: Configs, hold: bool, clock: Callable[[], float] = time.time) -> None:
        self.store, self.configs, self.hold, self.clock = store, configs, hold, clock
        self.events = Events(store, self._show)
        self.paging = threading.Semaphore(PAGES_AT_ONCE)
        self.long_lists = threading.Semaphore(1)
        self.copying = threading.Lock()  # until it is sent: it takes room on the disk

    def answer(self, request: Request) -> Response:
        """Answer a request. Raises ApiError, ConnectionAbortedError where the caller has gone, and nothing else."""
        try:
            method = "GET" if request.method == "HEAD" else request.method
            allowed = []
            for route in ROUTES:
                if match := route.pattern.fullmatch(request.path):
                    if route.method == method:
                        return route.answer(self, request, match.groups())
                    allowed.append(route.method)
            raise _no_route(request, allowed)
        except (ApiError, ConnectionAbortedError):
            raise
        except StoreError as error:
            raise ApiError(HTTPStatus.INSUFFICIENT_STORAGE, f"nothing was changed: {error}") from error
        except Exception as error:
            log.error("internal error at %s %s", request.method, request.path, exc_info=error)
            raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log says more") from error

    def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Have the store do something and give the result. Raises ApiError for what it refuses."""
        result = self.store.do(function, *args).result()
        if isinstance(result, Refusal):
            raise ApiError(STATUS_OF[result.kind], result.detail + START_ONE * (result.kind == "no worker"))
        return result

    def queue_job(self, request: Request, name: str, wait: float, full: bool, key: str | None) -> Response:
        """Queue a job.

        A 200 means that the job is on disk and will come to an end. With `wait` the answer comes when the job is final,
        or after that time with the job as it then is.
        """
        body = read_json(request.body) if request.body else {}
        marked = mark(key, "POST", name, body)
        (id_,) = self._queue(lambda: [new_job(self.configs, name, body)], marked)
        if not wait and not full and key is None:
            return Response(as_json(job_json(id_, name, "queued")))
        request.drop_body()
        row = self._wait(request, id_, wait)
        return Response(as_json(self._show([row])[0] if full else job_json(id_, name, row["state"])))

    def list_jobs(
        self,
        request: Request,  # noqa: ARG002
        states: Sequence[str],
        name: str | None,
        limit: int | None,
        after: int,
        before: int | None,
        full: bool,
    ) -> Response:
        """List jobs, oldest first.

        All that there are, or those that every given parameter admits. The list is sent as it is read, so a million
        jobs are no burden.
        """
        if before is not None and limit is None:
            raise ApiError(HTTPStatus.BAD_REQUEST, "before needs a limit: how many of the newest below it")
        return Response(self._list(states, name, after, before, limit, full))

    def _list(
        self, states: Sequence[str], name: str | None, after: int, before: int | None, limit: int | None, full: bool
    ) -> Iterator[bytes]:
        left = MAX_JOB_ID if limit is None else limit
        if before is not None:
            left = min(left, MAX_PAGE_JOBS)
            with self.paging:
                after = self._do(state.start_of_newest, states, name, after, before, left)
        separator = b"["
        while left > 0:
            with self.paging:  # many readers at once queue here, where they are in nobody's way
                rows = self._do(state.page, states, name, after, before, min(left, PAGE_JOBS))
                page = [separator + as_json(self._list_json(rows, full))[1:-1]]
            if not rows:
                break
            separator, left, after = b",", left - len(rows), rows[-1]["id"]
            del rows
            yield page.pop()  # nothing here keeps it while it waits for its reader
        yield b"[]" if separator == b"[" else b"]"

    def _list_json(self, rows: Sequence[sqlite3.Row], full: bool) -> list[dict[str, Any]]:
        return self._show(rows) if full else [job_json(row["id"], row["name"], row["state"]) for row in rows]

    def queue_jobs(self, request: Request, key: str | None) -> Response:
        """Queue many jobs at once.

        All of them or none, in one transaction. A list has at most 20,000 jobs: send several lists.
        """
        with contextlib.ExitStack() as turn:
            if len(request.body) > SHORT_LIST_BYTES:
                take_turn(self.long_lists, turn, "too many lists at once")
            ids = self._queue(*self._read_list(request.body, key))
        request.drop_body()
        pages = self._list((), None, ids[0] - 1 if ids else 0, None, len(ids), full=False)
        return Response(pages if len(ids) > PAGE_JOBS else b"".join(pages))

    def _read_list(self, body: bytes | bytearray, key: str | None) -> tuple[Callable[[], list[NewJob]], Key | None]:
        """Give what gives the jobs that a list asks for, or raises ApiError, and its mark: mark(key, "POST", LIST)."""
        jobs: list[NewJob] = []
        wrong: list[ApiError] = []  # raised when the key has been looked up
        content = hashlib.sha256(b'["POST", [')
        for n, item in enumerate(read_items(body, MAX_LIST_JOBS)):
            if key is not None:
                content.update(b", " * (n > 0) + as_compared(item))
            try:
                if not wrong:
                    jobs.append(new_job(self.configs, item.pop("name", None), item, n))
            except ApiError as error:
                wrong = [error]
                if key is None:
                    raise
        content.update(b"]]")

        def checked() -> list[NewJob]:
            for error in wrong:
                raise error
            return jobs

        return checked, None if key is None else Key(key, content.hexdigest())

    def _queue(self, jobs: Callable[[], list[NewJob]], key: Key | None) -> list[int]:
        """Queue jobs and give their ids; a repeated request's are given before anything else is looked at."""
        ids: list[int] | None = self._do(state.find_request, key) if key else None
        if ids is None:
            ids = self._do(state.add, jobs(), self.clock(), self.hold, key)
        return ids

    def get_job(self, request: Request, id_: int, wait: float) -> Response:
        """A job in full.

        With `wait` the answer comes when the job is final, or after that time with the job as it then is.
        """
        return Response(as_json(self._show([self._wait(request, id_, wait)])[0]))

    def _wait(self, request: Request, job: int, wait: float) -> sqlite3.Row:
        """Give a job's row once it is final, or as it is after `wait` seconds or when the caller has hung up."""
        deadline = time.monotonic() + wait
        while True:
            row: sqlite3.Row
            row, changed = self._do(state.get_and_watch, job, wait > 0)
            if changed is None:
                return row
            while not changed.done() and wait:
                request.wait_for(changed, min(max(deadline - time.monotonic(), 0), CALLER_CHECK_SECONDS))
                if time.monotonic() >= deadline or request.caller_is_gone():
                    wait = 0

    def _show(self, rows: Sequence[sqlite3.Row]) -> list[dict[str, Any]]:
        """Give jobs in full, with why each of them waits."""
        configs = self.configs
        waiting = {row["name"] for row in rows if row["state"] == "queued"}
        limited = waiting & configs.limits.keys()
        connected, active = self._do(state.what_waits_for, limited) if waiting else (set(), {})
        kinds = {(protocol, tuple(json.loads(tags))) for protocol, tags in connected}
        return [full_job_json(row, reason_of(row, configs, kinds, active)) for row in rows]

    def cancel_job(self, request: Request, id_: int) -> Response:  # noqa: ARG002
        """Cancel a job.

        One that waits is cancelled at once. One that runs is asked to stop (TERM, its `stop_grace_period`, KILL): the
        answer shows it still `running` with the reason `cancelling`, and it is `cancelled` once its container is gone.
        """
        return Response(as_json(self._show([self._do(state.cancel, id_, self.clock())])[0]))

    def retry_job(self, request: Request, id_: int, key: str | None) -> Response:  # noqa: ARG002
        """Run a job that has ended again, as a new job with the same environment and priority."""

        def jobs() -> list[NewJob]:
            row = self._do(state.get, id_)
            if row["state"] not in FINAL_STATES:
                raise ApiError(HTTPStatus.CONFLICT, f"job {row['id']} has not ended: it is {row['state']}")
            body = {"environment": json.loads(row["environment"] or "{}"), "priority": row["priority"]}
            return [new_job(self.configs, row["name"], body)]

        (new_id,) = self._queue(jobs, mark(key, "retry", id_))
        row = self._do(state.get, new_id)
        return Response(as_json(job_json(new_id, row["name"], row["state"])))

    def get_attempts(self, request: Request, id_: int) -> Response:  # noqa: ARG002
        """The attempts of a job so far, oldest first.

        None for a job that no worker has been given yet.
        """
        row = self._do(state.get, id_)
        rows = [*self._do(state.attempts, id_), *([row] if row["attempt"] else [])]
        return Response(as_json([attempt_json(attempt) for attempt in rows]))

    def get_log(
        self,
        request: Request,
        id_: int,
        follow: bool,
        tail: int | None,
        offset: int,
        attempt: int | None,
    ) -> Response:
        """What a job wrote to stdout and stderr.

        The bytes as they were written, so there may be some that are not UTF-8. Of more than 1 MiB the first and the
        last 512 KiB are kept, and a line tells how much is missing between.
        """
        row = self._do(state.get, id_)
        wanted: int = attempt or row["attempt"]
        if tail is not None:
            offset = max(offset, self._do(logs.tail_offset, id_, wanted, tail))
        pieces = self._follow(request, id_, wanted, offset) if follow else self._read_log(id_, wanted, offset)
        return Response(pieces, content_type=TEXT, headers=UNBUFFERED if follow else {})

    def _read_log(self, job: int, attempt: int, offset: int) -> Generator[bytes, None, int]:
        """Give an attempt's output from an offset on, with a line where some was cut; return the offset of its end."""
        while pieces := self._do(logs.read_log, job, attempt, offset):
            for start, data in pieces:
                if start > offset:
                    yield b"\n[jobworker: %d bytes cut]\n" % (start - offset)
                yield data
                offset = start + len(data)
        return offset

    def _follow(self, request: Request, job: int, attempt: int, offset: int) -> Iterator[bytes]:
        while True:
            row, changed = self._do(state.get_and_watch, job, True)
            attempt = attempt or row["attempt"]
            offset = yield from self._read_log(job, attempt, offset)
            if changed is None or row["attempt"] > attempt:
                return
            while not changed.done():
                yield b""  # is the reader still there?
                request.wait_for(changed, CALLER_CHECK_SECONDS)

    def list_workers(self, request: Request, full: bool) -> Response:  # noqa: ARG002
        """List the connected workers, by id."""
        show = full_worker_json if full else worker_json
        return Response(as_json([show(row, jobs) for row, jobs in self._do(state.workers) if row["connected"]]))

    def get_worker(self, request: Request, id_: int) -> Response:  # noqa: ARG002
        """A connected worker in full."""
        found = [(row, jobs) for row, jobs in self._do(state.workers, [id_]) if row["connected"]]
        if not found:
            raise ApiError(HTTPStatus.NOT_FOUND, f"no worker with id {id_} is connected")
        return Response(as_json(full_worker_json(*found[0])))

    def list_configs(self, request: Request) -> Response:  # noqa: ARG002
        """The jobs of jobs.yaml, in its order.

        What one needs to run them. Their `environment`, which may hold secrets, is not shown.
        """
        return Response(as_json([config_json(config) for config in self.configs.by_name.values()]))

    def listen(self, request: Request, last_id: int | None) -> Response:
        """Follow what changes, as server-sent events.

        An endless stream in the format of the HTML standard. It begins with `stats`; after that up to four times a
        second what changed since, many changes of one job or worker as one event with its latest state, and `stats`
        where they differ. The last event of each such batch has an `id`. A comment line comes after 15 s of silence.

        | event | data |
        | --- | --- |
        | `job` | FullJob |
        | `worker` | FullWorker; `connected` is false for one that left |
        | `stats` | Stats |
        | `reset` | `{}`: too much has changed to be told; fetch anew what you show |
        """
        return Response(self.events.stream(last_id, request), content_type=EVENTS, headers=UNBUFFERED)

    def get_health(self, request: Request) -> Response:  # noqa: ARG002
        """Whether the server can do its work."""
        if self.store.error:
            failing = {"status": "failing", "detail": self.store.error, "version": VERSION}
            return Response(as_json(failing), HTTPStatus.SERVICE_UNAVAILABLE)
        overview = self._do(state.overview, self.clock())
        health = {"status": "ok", "version": VERSION, "workers": overview["workers"], "jobs": overview["jobs"]}
        return Response(as_json(health))

    def get_metrics(self, request: Request) -> Response:  # noqa: ARG002
        """Metrics for Prometheus.

        `jobworker_build_info{version}`, `jobworker_jobs{state}`, `jobworker_queue_latency_seconds`,
        `jobworker_worker_up{worker}`, `jobworker_worker_jobs{worker}`, `jobworker_worker_slots{worker}`, and, counted
        since the server's start, `jobworker_jobs_finished_total{name,state}` and the histograms
        `jobworker_job_duration_seconds{name}` and `jobworker_job_queue_duration_seconds{name}`.
        """
        overview = self._do(state.overview, self.clock())
        text = metrics_text(overview, self._do(state.workers), self._do(state.totals))
        return Response(text.encode(), content_type=METRICS)

    def get_backup(self, request: Request) -> Response:
        """A copy of the database, to be put in place of a lost one.

        It holds every job accepted before this request, and most of those accepted while it is made; nobody has to wait
        for it. It has a server identity of its own. One copy is made and sent at a time; a reader that takes less than
        256 KiB a second is left after a minute.
        """
        headers = {"Content-Disposition": time.strftime('attachment; filename="jobs-%Y%m%dT%H%M%SZ.db"', time.gmtime())}
        if request.method == "HEAD":
            return Response(iter(()), content_type=SQLITE, headers=headers)
        copy = self._copy(request)
        next(copy)  # makes it: from now on its end, whatever that is, makes room for the next one
        return Response(copy, content_type=SQLITE, headers=headers)

    def _copy(self, request: Request) -> Iterator[bytes]:
        if not self.copying.acquire(blocking=False):
            raise ApiError(HTTPStatus.CONFLICT, "another copy is being made or sent; ask again in a moment")
        try:
            with self.store.backup(request.caller_is_gone) as file:
                yield b""
                slow_from = time.monotonic() + COPY_SECONDS
                while piece := file.read(COPY_PIECE_BYTES):
                    yield piece
                    slow_from += len(piece) / SLOWEST_COPY_BYTES
                    if time.monotonic() > slow_from:
                        raise ConnectionAbortedError
        finally:
            self.copying.release()

    def get_description(self, request: Request) -> Response:  # noqa: ARG002
        """This description, as OpenAPI 3.1."""
        return Response(description())

    def get_dashboard(self, request: Request) -> Response:  # noqa: ARG002
        """The dashboard, a page for browsers."""
        page, policy = dashboard()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(page, content_type=HTML, headers=headers)


def _no_route(request: Request, allowed: list[str]) -> ApiError:
    if request.path == "/runner":
        detail = "workers connect here by WebSocket: python client.py HOST:PORT/runner"
        return ApiError(HTTPStatus.UPGRADE_REQUIRED, detail, Upgrade="websocket", Connection="Upgrade")
    if allowed:
        methods = ", ".join(allowed + ["HEAD"] * ("GET" in allowed))
        return ApiError(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes {methods}", Allow=methods)
    return ApiError(HTTPStatus.NOT_FOUND, f"nothing is at {request.path}; /openapi.json tells what there is")


def reason_of(
    row: sqlite3.Row, configs: Configs, connected: set[tuple[int, tuple[str, ...]]], active: dict[str, int]
) -> str | None:
    """Say why a job failed, or why it waits. connected: protocol and tags of who is; active: how many of a name run."""
    name, config = row["name"], configs.by_name.get(row["name"])
    if row["state"] == "running" and row["cancelling"]:
        return "cancelling"
    if row["state"] != "queued":
        reason: str | None = row["reason"]
        return reason
    if config is None:
        return f"jobs.yaml has no job named {name} any more"
    if row["not_before"] is not None:
        return f"waits until {timestamp(row['not_before'])}"
    if not connected:
        return "no worker is connected"
    if not any(set(config.tags) <= set(tags) for _protocol, tags in connected):
        return f"no worker has the tag{'s' * (len(config.tags) > 1)} {', '.join(config.tags)}"
    if not any(name in configs.names_for(tags, protocol) for protocol, tags in connected):
        return "no connected worker speaks version 2 of the protocol, which this job needs"
    if config.concurrency and active[name] >= config.concurrency:
        return f"{active[name]} of {config.concurrency} running"
    return "all slots are busy"


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


# Routes and their description

UNKNOWN = {404: "NotFound"}
OPEN = {401: None, 507: None}
ROUTES = [
    Route(
        "POST",
        "/api/jobs/{job}",
        Api.queue_job,
        (JOB_NAME, WAIT, FULL, KEY),
        "Job|FullJob",
        refuses={404: "NoSuchName", 409: "KeyConflict", 500: "NoWorker", 503: "Busy"},
        body="NewJob?",
    ),
    Route("GET", "/api/jobs", Api.list_jobs, (STATE, NAME, LIMIT, AFTER, BEFORE, FULL), "Job[]|FullJob[]"),
    Route(
        "POST",
        "/api/jobs",
        Api.queue_jobs,
        (KEY,),
        "Job[]",
        refuses={404: "NoSuchName", 409: "KeyConflict", 500: "NoWorker", 503: "Busy"},
        body="NewNamedJob[]",
    ),
    Route("GET", "/api/jobs/{job}", Api.get_job, (JOB_ID, WAIT), "FullJob", refuses=UNKNOWN),
    Route("DELETE", "/api/jobs/{job}", Api.cancel_job, (JOB_ID,), "FullJob", refuses=UNKNOWN | {409: "HasEnded"}),
    Route(
        "POST",
        "/api/jobs/{job}/retry",
        Api.retry_job,
        (JOB_ID, KEY),
        refuses={404: "NotFound", 409: "HasNotEnded", 500: "NoWorker"},
    ),
    Route("GET", "/api/jobs/{job}/log", Api.get_log, (JOB_ID, FOLLOW, TAIL, OFFSET, ATTEMPT), TEXT, refuses=UNKNOWN),
    Route("GET", "/api/jobs/{job}/attempts", Api.get_attempts, (JOB_ID,), "Attempt[]", refuses=UNKNOWN),
    Route("GET", "/api/workers", Api.list_workers, (FULL,), "Worker[]|FullWorker[]", "workers"),
    Route("GET", "/api/workers/{worker}", Api.get_worker, (WORKER_ID,), "FullWorker", "workers", {404: "NoSuchWorker"}),
    Route("GET", "/api/configs", Api.list_configs, (), "Config[]", "server", {507: None}),
    Route("GET", "/api/events", Api.listen, (LAST_EVENT_ID,), EVENTS, "server"),
    Route("GET", "/healthz", Api.get_health, (), "Health", "server", OPEN | {503: "Failing"}),
    Route("GET", "/api/backup", Api.get_backup, (), SQLITE, "server", {409: "CopyUnderWay"}),
    Route("GET", "/metrics", Api.get_metrics, (), METRICS, "server"),
    Route("GET", "/openapi.json", Api.get_description, (), "Description", "server", {507: None}),
    Route("GET", "/", Api.get_dashboard, (), HTML, "server", OPEN),
]


@functools.cache
def description() -> bytes:
    """The OpenAPI description of ROUTES; what is not a route's stands in openapi.json."""
    whole = json.loads((HERE / "openapi.json").read_bytes())
    whole["info"]["version"] = VERSION
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = route.describe(whole["components"])
    del whole["components"]["examples"]
    return as_json(whole | {"paths": paths})


# Events


class Events:
    """Server-sent events, made of the store's ticks; one listener renders a tick, the others take what it made."""

    def __init__(self, store: Store, show: Callable[[Sequence[sqlite3.Row]], list[dict[str, Any]]]) -> None:
        self._store, self._show = store, show
        self._rendering = threading.Lock()
        self._rendered: tuple[int, int, bytes] = (0, 0, b"")  # after which tick, up to which, what

    def stream(self, last_id: int | None, request: Request) -> Iterator[bytes]:
        """Give events from after `last_id`, for ever; a comment now and then. Ids grow, also across server starts."""
        newest: Tick
        tick: Tick | None
        newest, tick = self._store.do(state.listen, last_id).result()
        yield server_sent("stats", newest.overview, None if last_id else newest.id)
        if tick is None:
            yield server_sent("reset", {}, newest.id)
            tick = newest
        said = time.monotonic()
        while True:
            request.wait_for(tick.next, min(HEARTBEAT_SECONDS, CALLER_CHECK_SECONDS))
            if not tick.next.done():
                is_silent = time.monotonic() - said >= HEARTBEAT_SECONDS
                said = time.monotonic() if is_silent else said
                yield b":\n\n" if is_silent else b""  # b"": is the listener still there?
                continue
            said = time.monotonic()
            ticks = list(ticks_after(tick))
            yield self._render(tick.id, ticks)
            tick = ticks[-1]

    def _render(self, after: int, ticks: list[Tick]) -> bytes:
        with self._rendering:
            if self._rendered[:2] != (after, ticks[-1].id):
                self._rendered = after, ticks[-1].id, self._events_of(ticks)
            return self._rendered[2]

    def _events_of(self, ticks: list[Tick]) -> bytes:
        jobs = frozenset[int]().union(*(tick.jobs for tick in ticks))
        workers = frozenset[int]().union(*(tick.workers for tick in ticks))
        if len(ticks) > state.RING_TICKS:
            return server_sent("reset", {}, ticks[-1].id)
        rows = self._store.do(state.workers, workers).result() if workers else []
        parts = [server_sent("worker", full_worker_json(row, held)) for row, held in rows]
        if len(jobs) > MAX_TICK_JOBS:
            parts.append(server_sent("reset", {}))
        else:
            rows = self._store.do(state.get_many, jobs).result() if jobs else []
            parts += [server_sent("job", shown) for shown in self._show(rows)]
        return b"".join(parts) + server_sent("stats", ticks[-1].overview, ticks[-1].id)


def ticks_after(tick: Tick) -> Iterator[Tick]:
    while tick.next.done():
        tick = tick.next.result()
        yield tick


def server_sent(kind: str, data: object, id_: int | None = None) -> bytes:
    """One server-sent event; an id on the last of a tick, so that who resumes after it has missed nothing."""
    return (f"id: {id_}\n" if id_ else "").encode() + b"event: %b\ndata: %b\n\n" % (kind.encode(), as_json(data))
