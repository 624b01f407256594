"""What each HTTP request is answered with: a function a route, and what these share.

All of it runs on HTTP threads of web.py and has all that it tells from the store. ROUTES is the one place that says
which requests there are: they are read, refused and described (`/openapi.json`) by it.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

from jobworker import VERSION, lists, logs, state
from jobworker.config import Configs, JobConfig, check_parameters
from jobworker.due import schedules
from jobworker.events import Events
from jobworker.hints import near_name
from jobworker.lists import Wanted
from jobworker.message import (
    CALLER_CHECK_SECONDS,
    ApiError,
    Request,
    Response,
    answer_json,
    as_json,
    read_form,
    read_items,
    read_json,
)
from jobworker.metrics import metrics_text
from jobworker.parameters import (
    AFTER,
    ATTEMPT,
    BEFORE,
    CANCEL_STATES,
    CAUSE,
    ENDED_AFTER,
    FOLLOW,
    FULL,
    GONE,
    JOB_ID,
    JOB_NAME,
    KEY,
    LAST_EVENT_ID,
    LIMIT,
    NAME,
    OFFSET,
    REQUIRE,
    RETRY_STATES,
    STATE,
    TAIL,
    WAIT,
    WORKER,
    WORKER_ID,
    Q,
)
from jobworker.pattern import Matching
from jobworker.routes import Route
from jobworker.shapes import (
    attempt_json,
    config_json,
    full_job_json,
    full_worker_json,
    job_json,
    reason_of,
    worker_json,
)
from jobworker.state import FINAL_STATES, MAX_JOB_ID, NEWEST_SUCCESS, Key, NewJob, Refusal
from jobworker.store import Store, StoreError
from jobworker.web import take_turn

MAX_DELAY_SECONDS = 366 * 86400
PAGE_JOBS = 250
PAGE_CONFIGS = 100
PAGES_AT_ONCE = 2  # made; sent are as many as there are readers
COPY_PIECE_BYTES = 256 * 1024
SLOWEST_COPY_BYTES = 256 * 1024  # a second, once COPY_SECONDS are over
COPY_SECONDS = 60
MAX_PAGE_JOBS = 10_000
BULK_JOBS = 500  # in a transaction
MAX_REFUSED = 1_000  # that a bulk's answer names one by one
HEALTH_SECONDS = 5
GONE_SECONDS = 3_600
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


def new_job(
    configs: Configs, name: object, body: object, number: int | None = None, matching: Matching | None = None
) -> NewJob:
    """Give the job that a body asks for. Raises ApiError.

    number: of the item in a list, where it is one; matching: the list's.
    """
    config = configs.by_name.get(name) if isinstance(name, str) else None
    if config and body == {} and not config.parameters:
        return NewJob(config.name, {}, config.priority)
    where = "" if number is None else f"item {number}: "
    if not isinstance(name, str):
        raise ApiError(HTTPStatus.BAD_REQUEST, f'{where}it must have a name, a string such as "hello-world"')
    if config is None:
        known = ", ".join(list(configs.by_name)[:20]) or "none"
        meant = near_name(name[:128], configs.by_name)
        detail = f"{where}there is no job named {name!r} in jobs.yaml{meant and f'; {meant}'}; there are: {known}"
        raise ApiError(HTTPStatus.NOT_FOUND, detail)
    try:
        return _checked(config, body, "" if number is None else "name, ", matching)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{where}{error}") from error


def read_job(request: Request) -> Any:
    """Give what a POST asks for: its JSON, or a form's fields as its environment. Raises ApiError."""
    body = request.body
    if not body:
        return {}
    if "form-urlencoded" in request.headers.get("content-type", "") and not re.match(rb"\s*[\[{\"]", body):
        return {"environment": read_form(body)}  # curl -d calls everything a form
    return read_json(body)


def _checked(config: JobConfig, body: object, others: str, matching: Matching | None) -> NewJob:
    if not isinstance(body, dict):
        raise ValueError('the body must be a JSON object such as {"environment": {"NAME": "value"}}')
    for unknown in body.keys() - {"environment", "priority", "delay"}:
        raise ValueError(f"no key {unknown!r} here; there are: {others}environment, priority, delay")
    priority, delay = body.get("priority", config.priority), body.get("delay", 0)
    if type(priority) is not int or abs(priority) >= 2**31:
        raise ValueError("priority must be an integer of 32 bits")
    if type(delay) not in (int, float) or not 0 <= delay <= MAX_DELAY_SECONDS:
        raise ValueError(f"delay must be a number of seconds from 0 to {MAX_DELAY_SECONDS}")
    environment = check_parameters(config, body.get("environment", {}), matching)
    return NewJob(config.name, environment, priority, delay)


def read_list(
    configs: Configs, body: bytes | bytearray, key: str | None
) -> tuple[Callable[[], list[NewJob]], Key | None]:
    """Give what gives the jobs that a list asks for, or raises ApiError, and its mark: mark(key, "POST", LIST)."""
    jobs: list[NewJob] = []
    matching = Matching()
    wrong: list[ApiError] = []  # raised when the key has been looked up
    content = hashlib.sha256(b'["POST", [')
    for n, item in enumerate(read_items(body, MAX_LIST_JOBS)):
        if key is not None:
            content.update(b", " * (n > 0) + as_compared(item))
        try:
            if not wrong:
                jobs.append(new_job(configs, item.pop("name", None), item, n, matching))
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


def in_pieces(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while piece := list(islice(rest, size)):
        yield piece


# Answers


def as_they_are(rows: Sequence[sqlite3.Row]) -> list[dict[str, Any]]:
    return [job_json(row["id"], row["name"], row["state"]) for row in rows]


def as_accepted(rows: Sequence[sqlite3.Row]) -> list[dict[str, Any]]:
    """Give jobs that a request queued: as it left them, however fast a worker was since."""
    return [job_json(row["id"], row["name"], "queued") for row in rows]


class Api:
    """What the answers share. `configs` is replaced when jobs.yaml is read again."""

    def __init__(self, store: Store, configs: Configs, hold: bool, clock: Callable[[], float] = time.time) -> None:
        self.store, self.configs, self.hold, self.clock = store, configs, hold, clock
        self.events = Events(store, self.show)
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
        except RecursionError as error:  # read, but not written again
            raise ApiError(HTTPStatus.BAD_REQUEST, "the body is nested too deep") from error
        except Exception as error:
            log.error("internal error at %s %s", request.method, request.path, exc_info=error)
            raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log says more") from error

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Have the store do something and give the result. Raises ApiError for what it refuses."""
        result = self.store.do(function, *args).result()
        if isinstance(result, Refusal):
            raise ApiError(STATUS_OF[result.kind], result.detail + START_ONE * (result.kind == "no worker"))
        return result

    def pages(
        self, wanted: Wanted, limit: int | None, show: Callable[[Sequence[sqlite3.Row]], list[dict[str, Any]]]
    ) -> Iterator[bytes]:
        left = MAX_JOB_ID if limit is None else limit
        separator = b"["
        while left > 0:
            with self.paging:  # many readers at once queue here, where they are in nobody's way
                rows = self.do(lists.page, wanted, min(left, PAGE_JOBS))
                page = [separator + as_json(show(rows))[1:-1]]
            if not rows:
                break
            separator, left, wanted = b",", left - len(rows), wanted._replace(after=rows[-1]["id"])
            del rows
            yield page.pop()  # nothing here keeps it while it waits for its reader
        yield b"[]\n" if separator == b"[" else b"]\n"

    def config_pages(self) -> Iterator[bytes]:
        configs, dealt = self.configs, self.do(schedules)
        separator = b"["
        for names in in_pieces(configs.by_name, PAGE_CONFIGS):  # thousands at once would hold the store up for seconds
            last, recent = self.do(lists.newest, names), self.do(lists.recent, names)
            due_next = {
                name: configs.schedules[name].next_due(dealt[name]["upto"])
                for name in names
                if name in configs.schedules and name in dealt
            }
            shown = [
                config_json(configs.by_name[name], due_next.get(name), last.get(name), recent[name]) for name in names
            ]
            yield separator + as_json(shown)[1:-1]
            separator = b","
        yield b"[]\n" if separator == b"[" else b"]\n"

    def queue(self, jobs: Callable[[], list[NewJob]], key: Key | None) -> list[int]:
        """Queue jobs and give their ids; a repeated request's are given before anything else is looked at."""
        ids: list[int] | None = self.do(state.find_request, key) if key else None
        if ids is None:
            ids = self.do(state.add, jobs(), self.clock(), self.hold, key)
        return ids

    def wait(self, request: Request, job: int, wait: float) -> sqlite3.Row:
        """Give a job's row once it is final, or as it is after `wait` seconds or when the caller has hung up."""
        deadline = time.monotonic() + wait
        while True:
            row: sqlite3.Row
            row, ended = self.do(state.get_and_watch, job, True) if wait else (self.do(state.get, job), None)
            if ended is None:
                return row
            while not ended.done() and wait:
                request.wait_for(ended, min(max(deadline - time.monotonic(), 0), CALLER_CHECK_SECONDS))
                if time.monotonic() >= deadline or request.caller_is_gone():
                    wait = 0

    def show(self, rows: Sequence[sqlite3.Row]) -> list[dict[str, Any]]:
        """Give jobs in full, with why each of them waits."""
        configs = self.configs
        waiting = {row["name"] for row in rows if row["state"] == "queued"}
        limited = waiting & configs.limits.keys()
        connected, active = self.do(state.what_waits_for, limited) if waiting else (set(), {})
        kinds = {(protocol, tuple(json.loads(tags))) for protocol, tags in connected}
        return [full_job_json(row, reason_of(row, configs, kinds, active)) for row in rows]

    def again(self, row: sqlite3.Row) -> NewJob:
        """Give the job that runs one that has ended again. Raises ApiError where jobs.yaml has changed meanwhile."""
        body = {"environment": json.loads(row["environment"] or "{}"), "priority": row["priority"]}
        return new_job(self.configs, row["name"], body)._replace(cause=row["cause"], variables=row["variables"])

    def read_log(self, job: int, attempt: int, offset: int) -> Generator[bytes, None, int]:
        """Give an attempt's output from an offset on, with a line where some was cut; return the offset of its end."""
        while pieces := self.do(logs.read_log, job, attempt, offset):
            for start, data in pieces:
                if start > offset:
                    yield b"\n[jobworker: %d bytes cut]\n" % (start - offset)
                yield data
                offset = start + len(data)
        return offset

    def follow(self, request: Request, job: int, attempt: int, offset: int, on: bool) -> Iterator[bytes]:
        """Give an attempt's log until it ends; or, to go `on`, those of all after it, too, until the job does."""
        while True:
            found = self.store.do(state.get_and_watch, job, False).result()
            if isinstance(found, Refusal):  # deleted meanwhile: it has ended long ago
                return
            row, changed = found
            attempt = attempt or row["attempt"]
            offset = yield from self.read_log(job, attempt, offset)
            while on and row["attempt"] > attempt:
                attempt += 1
                offset = yield from self.read_log(job, attempt, 0)
            if changed is None or row["attempt"] > attempt:
                return
            while not changed.done():
                yield b""  # is the reader still there?
                request.wait_for(changed, CALLER_CHECK_SECONDS)


def queue_job(
    api: Api, request: Request, name: str, wait: float, require: bool, full: bool, key: str | None
) -> Response:
    """Queue a job.

    A 200 means that the job is on disk and will come to an end. With `wait` the answer comes when the job is final,
    or after that time with the job as it then is. A form's fields, as of `curl -d NAME=Ada`, are its `environment`.
    """
    body = read_job(request)
    marked = mark(key, "POST", name, body)
    (id_,) = api.queue(lambda: [new_job(api.configs, name, body)], marked)
    if not wait and not require and not full and key is None:
        return answer_json(job_json(id_, name, "queued"))
    request.drop_body()
    row = api.wait(request, id_, wait)
    return answer_json(api.show([row])[0] if full else job_json(id_, name, row["state"]), _status(row, require))


def list_jobs(api: Api, _request: Request, limit: int | None, full: bool, **wishes: Any) -> Response:
    """List jobs, oldest first.

    All that there are, or those that every given parameter admits. The list is sent as it is read, so a million
    jobs are no burden.
    """
    wanted = Wanted(**wishes)
    if wanted.before is not None:
        if limit is None:
            raise ApiError(HTTPStatus.BAD_REQUEST, "before needs a limit: how many of the newest below it")
        limit = min(limit, MAX_PAGE_JOBS)
        with api.paging:
            wanted = wanted._replace(after=api.do(lists.start_of_newest, wanted, limit))
    return Response(api.pages(wanted, limit, api.show if full else as_they_are))


def queue_jobs(api: Api, request: Request, key: str | None, states: Sequence[str], **wishes: Any) -> Response:
    """Queue many jobs at once.

    All of them or none, in one transaction. A list has at most 20,000 jobs: send several lists. With `retry` there
    is no body: every job that ended in one of these states, and that the other parameters admit, runs again as a new
    job; the answer says how many, and which could not, in pieces of 500 jobs.
    """
    if states:
        if request.body or key is not None:
            raise ApiError(HTTPStatus.BAD_REQUEST, "with retry there is neither a body nor an Idempotency-Key")
        return _retry_all(api, Wanted(states, **wishes))
    for wish in (wish for wish, value in wishes.items() if value is not None):
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{wish} needs retry: the states of the jobs to run again")
    with contextlib.ExitStack() as turn:
        if len(request.body) > SHORT_LIST_BYTES:
            take_turn(api.long_lists, turn, "too many lists at once")
        ids = api.queue(*read_list(api.configs, request.body, key))
    request.drop_body()
    # By an upper bound, too: where some were pruned since, others' must not take their places.
    wanted = Wanted(after=ids[0] - 1, before=ids[-1] + 1) if ids else Wanted()
    pages = api.pages(wanted, len(ids), as_accepted if key is None else as_they_are)
    return Response(pages if len(ids) > PAGE_JOBS else b"".join(pages))


def _retry_all(api: Api, wanted: Wanted) -> Response:
    wanted = wanted._replace(before=api.do(lists.last_id) + 1)  # none of those that this makes
    queued, refused, more = 0, [], 0
    while rows := api.do(lists.page, wanted, BULK_JOBS):
        wanted = wanted._replace(after=rows[-1]["id"])
        jobs = {}
        for row in rows:
            try:
                jobs[row["id"]] = api.again(row)
            except ApiError as error:
                refused.append({"id": row["id"], "detail": error.detail})
        try:
            queued += len(api.do(state.add, list(jobs.values()), api.clock(), api.hold))
        except ApiError as error:
            if not queued:
                raise
            refused += [{"id": id_, "detail": error.detail} for id_ in jobs]  # the last worker went meanwhile
        more, refused = more + len(refused[MAX_REFUSED:]), refused[:MAX_REFUSED]
    return answer_json({"queued": queued, "refused": refused} | ({"more_refused": more} if more else {}))


def cancel_jobs(api: Api, _request: Request, states: Sequence[str], **wishes: Any) -> Response:
    """Cancel many jobs at once.

    All in one of the states that the other parameters admit, in pieces of 500 jobs. The answer says how many.
    Those that run are asked to stop, as by `DELETE /api/jobs/{job}`.
    """
    if not states:
        raise ApiError(HTTPStatus.BAD_REQUEST, "state is missing: which jobs to cancel, such as ?state=queued")
    wanted, cancelled = Wanted(states, **wishes)._replace(before=api.do(lists.last_id) + 1), 0
    while True:
        count, after = api.do(lists.cancel_all, wanted, BULK_JOBS, api.clock())
        if after is None:
            return answer_json({"cancelled": cancelled})
        wanted, cancelled = wanted._replace(after=after), cancelled + count


def get_job(api: Api, request: Request, id_: int, wait: float, require: bool) -> Response:
    """A job in full.

    With `wait` the answer comes when the job is final, or after that time with the job as it then is.
    """
    row = api.wait(request, id_, wait)
    return answer_json(api.show([row])[0], _status(row, require))


def cancel_job(api: Api, _request: Request, id_: int) -> Response:
    """Cancel a job.

    One that waits is cancelled at once. One that runs is asked to stop (TERM, its `stop_grace_period`, KILL): the
    answer shows it still `running` with the reason `cancelling`, and it is `cancelled` once its container is gone.
    """
    return answer_json(api.show([api.do(state.cancel, id_, api.clock())])[0])


def retry_job(api: Api, _request: Request, id_: int, key: str | None) -> Response:
    """Run a job that has ended again, as a new job with the same environment and priority."""

    def jobs() -> list[NewJob]:
        row = api.do(state.get, id_)
        if row["state"] not in FINAL_STATES:
            raise ApiError(HTTPStatus.CONFLICT, f"job {row['id']} has not ended: it is {row['state']}")
        return [api.again(row)]

    (new_id,) = api.queue(jobs, mark(key, "retry", id_))
    row = api.do(state.get, new_id)
    return answer_json(job_json(new_id, row["name"], "queued" if key is None else row["state"]))


def get_attempts(api: Api, _request: Request, id_: int) -> Response:
    """The attempts of a job so far, oldest first.

    None for a job that no worker has been given yet.
    """
    row = api.do(state.get, id_)
    rows = [*api.do(state.attempts, id_), *([row] if row["attempt"] else [])]
    return answer_json([attempt_json(attempt) for attempt in rows])


def get_log(
    api: Api,
    request: Request,
    id_: int,
    follow: bool,
    tail: int | None,
    offset: int,
    attempt: int | None,
) -> Response:
    """What a job wrote to stdout and stderr.

    The bytes as they were written, so there may be some that are not UTF-8. Of more than 1 MiB the first
    512 KiB and up to as much of the end are kept, and a line tells how much is missing between.
    """
    row = api.do(state.get, id_)
    wanted: int = attempt or row["attempt"]
    if tail is not None:
        offset = max(offset, api.do(logs.tail_offset, id_, wanted, tail))
    if follow:
        pieces: Iterator[bytes] = api.follow(request, id_, wanted, offset, on=attempt is None)
    else:
        pieces = api.read_log(id_, wanted, offset)
    return Response(pieces, content_type=TEXT, headers=UNBUFFERED if follow else {})


def list_workers(api: Api, _request: Request, full: bool, gone: bool) -> Response:
    """List the connected workers, by id."""
    show = full_worker_json if full else worker_json
    found = api.do(state.workers, None, api.clock() - GONE_SECONDS if gone else None)
    return answer_json([show(row, jobs) for row, jobs in found if gone or row["connected"]])


def get_worker(api: Api, _request: Request, id_: int) -> Response:
    """A connected worker in full."""
    found = [(row, jobs) for row, jobs in api.do(state.workers, [id_]) if row["connected"]]
    if not found:
        raise ApiError(HTTPStatus.NOT_FOUND, f"no worker with id {id_} is connected")
    return answer_json(full_worker_json(*found[0]))


def list_configs(api: Api, _request: Request) -> Response:
    """The jobs of jobs.yaml, in its order.

    What one needs to run them, when they are due next, and how the newest run of each stands. Their `environment`,
    which may hold secrets, is not shown.
    """
    pages = api.config_pages()
    return Response(pages if len(api.configs.by_name) > PAGE_CONFIGS else b"".join(pages))


def listen(api: Api, request: Request, last_id: int | None) -> Response:
    """Follow what changes, as server-sent events.

    An endless stream in the format of the HTML standard. It begins with `stats`, which then has the last five minutes
    too; after that up to four times a second what changed since, many changes of one job or worker as one event with
    its latest state, and `stats` where they differ. The last event of each such batch has an `id`. A comment line
    comes after 15 s of silence.

    | event | data |
    | --- | --- |
    | `job` | FullJob |
    | `worker` | FullWorker; `connected` is false for one that left |
    | `stats` | Stats |
    | `reset` | `{}`: too much has changed to be told; fetch anew what you show |
    """
    return Response(api.events.stream(last_id, request), content_type=EVENTS, headers=UNBUFFERED)


def get_health(api: Api, _request: Request) -> Response:
    """Whether the server can do its work."""
    problem = api.store.error
    if problem is None:
        try:
            overview = api.store.do(state.overview, api.clock()).result(HEALTH_SECONDS)
            counts = {key: overview[key] for key in ("workers", "jobs")}
            return answer_json({"status": "ok", "version": VERSION, **counts})
        except TimeoutError:
            problem = f"the database has not answered for {HEALTH_SECONDS} s: its disk stalls"
    failing = {"status": "failing", "detail": problem, "version": VERSION}
    return answer_json(failing, HTTPStatus.SERVICE_UNAVAILABLE)


def get_metrics(api: Api, _request: Request) -> Response:
    """Metrics for Prometheus.

    `jobworker_build_info{version}`, `jobworker_jobs{state}`, `jobworker_queue_latency_seconds`,
    `jobworker_worker_up{worker}`, `jobworker_worker_jobs{worker}`, `jobworker_worker_slots{worker}`, and, counted
    since the server's start, `jobworker_jobs_finished_total{name,state}` and the histograms
    `jobworker_job_duration_seconds{name}` and `jobworker_job_queue_duration_seconds{name}`. Of jobs in jobs.yaml:
    `jobworker_job_last_success_timestamp_seconds{name}`, and of schedules `jobworker_schedule_missed_total{name}`
    and `jobworker_schedule_skipped_total{name}`.
    """
    overview = api.do(state.overview, api.clock())
    successes: dict[str, sqlite3.Row] = {}
    for names in in_pieces(api.configs.by_name, PAGE_CONFIGS):
        successes |= api.do(lists.newest, names, NEWEST_SUCCESS)
    text = metrics_text(overview, api.do(state.workers), api.do(state.totals), successes, api.do(schedules).values())
    return Response(text.encode(), content_type=METRICS)


def get_backup(api: Api, request: Request) -> Response:
    """A copy of the database, to be put in place of a lost one.

    It holds every job accepted before this request, and most of those accepted while it is made; nobody has to wait
    for it. It has a server identity of its own. One copy is made and sent at a time; a reader that takes less than
    256 KiB a second is left after a minute.
    """
    headers = {"Content-Disposition": time.strftime('attachment; filename="jobs-%Y%m%dT%H%M%SZ.db"', time.gmtime())}
    if request.method == "HEAD":
        return Response(iter(()), content_type=SQLITE, headers=headers)
    copy = copy_in_pieces(api.store, api.copying, request.caller_is_gone)
    next(copy)  # makes it: from now on its end, whatever that is, makes room for the next one
    return Response(copy, content_type=SQLITE, headers=headers)


def get_description(_api: Api, _request: Request) -> Response:
    """This description, as OpenAPI 3.1."""
    return Response(description())


def get_dashboard(_api: Api, _request: Request) -> Response:
    """The dashboard, a page for browsers."""
    page, policy = dashboard()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(page, content_type=HTML, headers=headers)


def copy_in_pieces(store: Store, place: threading.Lock, caller_is_gone: Callable[[], bool]) -> Iterator[bytes]:
    """Make a copy of the database, then give it. Raises ApiError where another has the place."""
    if not place.acquire(blocking=False):
        raise ApiError(HTTPStatus.CONFLICT, "another copy is being made or sent; ask again in a moment")
    try:
        with store.backup(caller_is_gone) as file:
            yield b""
            slow_from = time.monotonic() + COPY_SECONDS
            while piece := file.read(COPY_PIECE_BYTES):
                yield piece
                slow_from += len(piece) / SLOWEST_COPY_BYTES
                if time.monotonic() > slow_from:
                    raise ConnectionAbortedError
    finally:
        place.release()


def _status(row: sqlite3.Row, require: bool) -> HTTPStatus:
    """Give the status of an answer about a job; require: that it has succeeded."""
    if not require or row["state"] == "success":
        return HTTPStatus.OK
    return HTTPStatus.FAILED_DEPENDENCY if row["state"] in FINAL_STATES else HTTPStatus.GATEWAY_TIMEOUT


def _no_route(request: Request, allowed: list[str]) -> ApiError:
    if request.path == "/runner":
        detail = "workers connect here by WebSocket: python client.py HOST:PORT/runner"
        return ApiError(HTTPStatus.UPGRADE_REQUIRED, detail, Upgrade="websocket", Connection="Upgrade")
    if allowed:
        methods = ", ".join(allowed + ["HEAD"] * ("GET" in allowed))
        return ApiError(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes {methods}", Allow=methods)
    return ApiError(HTTPStatus.NOT_FOUND, f"nothing is at {request.path}; /openapi.json tells what there is")


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
REQUIRED = {424: "NoSuccess", 504: "NotEnded"}
FILTERS = (NAME, Q, WORKER, CAUSE, ENDED_AFTER)
LIST = (STATE, *FILTERS, LIMIT, AFTER, BEFORE, FULL)
OPEN = {401: None, 507: None}
ROUTES = [
    Route(
        "POST",
        "/api/jobs/{job}",
        queue_job,
        (JOB_NAME, WAIT, REQUIRE, FULL, KEY),
        "Job|FullJob",
        refuses={404: "NoSuchName", 409: "KeyConflict", 500: "NoWorker", 503: "Busy"} | REQUIRED,
        body="NewJob?",
    ),
    Route("GET", "/api/jobs", list_jobs, LIST, "Job[]|FullJob[]"),
    Route(
        "POST",
        "/api/jobs",
        queue_jobs,
        (KEY, RETRY_STATES, *FILTERS),
        "Job[]|Retried",
        refuses={404: "NoSuchName", 409: "KeyConflict", 500: "NoWorker", 503: "Busy"},
        body="NewNamedJob[]?",
    ),
    Route("GET", "/api/jobs/{job}", get_job, (JOB_ID, WAIT, REQUIRE), "FullJob", refuses=UNKNOWN | REQUIRED),
    Route("DELETE", "/api/jobs", cancel_jobs, (CANCEL_STATES, *FILTERS), "Cancelled"),
    Route("DELETE", "/api/jobs/{job}", cancel_job, (JOB_ID,), "FullJob", refuses=UNKNOWN | {409: "HasEnded"}),
    Route(
        "POST",
        "/api/jobs/{job}/retry",
        retry_job,
        (JOB_ID, KEY),
        refuses={404: "NotFound", 409: "HasNotEnded", 500: "NoWorker"},
    ),
    Route("GET", "/api/jobs/{job}/log", get_log, (JOB_ID, FOLLOW, TAIL, OFFSET, ATTEMPT), TEXT, refuses=UNKNOWN),
    Route("GET", "/api/jobs/{job}/attempts", get_attempts, (JOB_ID,), "Attempt[]", refuses=UNKNOWN),
    Route("GET", "/api/workers", list_workers, (FULL, GONE), "Worker[]|FullWorker[]", "workers"),
    Route("GET", "/api/workers/{worker}", get_worker, (WORKER_ID,), "FullWorker", "workers", {404: "NoSuchWorker"}),
    Route("GET", "/api/configs", list_configs, (), "Config[]", "server", {507: None}),
    Route("GET", "/api/events", listen, (LAST_EVENT_ID,), EVENTS, "server"),
    Route("GET", "/healthz", get_health, (), "Health", "server", OPEN | {503: "Failing"}),
    Route("GET", "/api/backup", get_backup, (), SQLITE, "server", {409: "CopyUnderWay"}),
    Route("GET", "/metrics", get_metrics, (), METRICS, "server"),
    Route("GET", "/openapi.json", get_description, (), "Description", "server", {507: None}),
    Route("GET", "/", get_dashboard, (), HTML, "server", OPEN),
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
    return as_json(whole | {"paths": paths}) + b"\n"
