"""The job server: reads jobs.yaml, serves the HTTP API and /runner on one port, matches queued jobs with free workers.

Its threads, and what they may touch:

    main thread      the event loop: Dispatcher (worker connections, claims, timers). Everything in this file runs here.
    http.server      one thread a connection (api.py): answers requests from the store; hands those for /runner over
    store            the database (store.py), where the two meet

A job is claimed late: when a worker has a free slot. What a worker reports is written by one transaction a frame, and
answered when that is on disk.
"""

import argparse
import asyncio
import contextlib
import functools
import gc
import ipaddress
import logging
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import websockets.http11
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

import protocol
from jobworker import VERSION, state, store
from jobworker.api import Api, Events, Metrics, timestamp
from jobworker.config import ConfigError, JobConfig, load_jobs, parse_duration
from jobworker.options import OptionError, command_line, quiet_logger, read_tokens, setting, start_logging
from jobworker.state import Database, Offer, RetryDelay
from jobworker.store import Store, StoreError
from jobworker.web import Access, Front, RunnerListener
from protocol import (
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

MAX_FRAME_BYTES = 4 * 1024 * 1024
HELLO_SECONDS = 10
# The peer's silence is noticed after at most the sum of both: within 30 s.
PING_SECONDS = 15
PONG_SECONDS = 14
TICK_SECONDS = 0.25
PRUNE_SECONDS = 10
PRUNE_JOBS = 50
MAX_RETRY_DELAY_SECONDS = 3_600

VERSION_1_PREFIX = "version-1-"

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

    def as_listed(self) -> dict[str, Any]:
        """What the original's API shows of a worker."""
        return {"id": self.id, "working": bool(self.jobs)}

    def as_json(self, connected: bool = True) -> dict[str, Any]:
        return {
            **self.as_listed(),
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


def absorb(
    db: Database, worker: int, messages: list[protocol.FromWorker], now: float, retry: RetryDelay
) -> list[protocol.FromServer]:
    """Write what a worker's frame says; give the answers. A stale message changes nothing and is answered Settled."""
    replies: list[protocol.FromServer] = []
    for message in messages:
        match message:
            case JobRunning(job, attempt):
                replies.append((Go if state.start(db, worker, job, attempt, now) else Settled)(job, attempt))
            case Log(job, attempt, offset, data):
                kept = state.append_log(db, worker, job, attempt, offset, data)
                replies.append(Settled(job, attempt) if kept is None else Logged(job, attempt, kept))
            case JobSuccess(job, attempt):
                state.succeed(db, worker, job, attempt, now)
                replies.append(Settled(job, attempt))
            case JobFailure(job, attempt, exit_code, reason):
                state.fail(db, worker, job, attempt, exit_code, reason, now, retry)
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
        self.offers: dict[int, Offer] = {}  # of whoever has a free slot; whether any is there, the store's thread asks
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
                        if messages[0].name != worker.name or len(messages) > 1:
                            raise protocol.ProtocolError(
                                "a second Hello must have the first one's name, and no company"
                            )
                        worker.slots = messages[0].slots
                        self._note(worker)  # no claim by the old ones may follow
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
        for id_, away in self.away.items():
            if away.name == hello.name:  # its grace must not end while it is being attached
                self.away[id_] = Away(away.name, time.monotonic() + self.grace)
        # Its callback comes in the order of the commits: what is claimed for this worker later, it is sent.
        attached: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        callback = functools.partial(self._attached, socket, hello, attached)
        self.store.tell(callback, state.attach, hello.name, hello.jobs, time.time(), self.configs.retry_delay)
        return attached

    def _attached(
        self,
        socket: ServerConnection,
        hello: Hello,
        attached: "asyncio.Future[Worker]",
        result: tuple[int, list[state.Held]] | Exception,
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
            self._close(old, protocol.CLOSE_REPLACED, "a newer connection of this name took over")

    async def _hello(self, socket: ServerConnection) -> Hello:
        if socket.subprotocol != VERSION_2:
            return Hello(VERSION_1_PREFIX + uuid.uuid4().hex[:8], 1, (), "1", ())
        async with asyncio.timeout(HELLO_SECONDS):
            messages = protocol.decode_from_worker(await socket.recv(), 2)
        if len(messages) != 1 or not isinstance(messages[0], Hello):
            raise protocol.ProtocolError("the first frame must be Hello")
        return messages[0]

    def _greet(self, worker: Worker, hello: Hello, wanted: list[state.Held]) -> None:
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
        self.offers.pop(worker.id, None)
        self.changed_workers[worker.id] = worker.as_json(connected=False)
        log.info("worker %s disconnected, %d jobs held", worker.name, len(worker.jobs))
        leaves = worker.protocol_version == 1 or (
            not worker.jobs and worker.socket.close_code == CloseCode.NORMAL_CLOSURE
        )
        self.away[worker.id] = Away(worker.name, time.monotonic() + (0 if leaves else self.grace))
        self.store.tell(self._report, state.detach, worker.id)
        if leaves:
            self.lose_overdue()

    def lose_overdue(self) -> None:
        """Give up the workers whose grace is over."""
        now = time.monotonic()
        for worker_id, away in [(id_, away) for id_, away in self.away.items() if away.deadline <= now]:
            del self.away[worker_id]
            lost = functools.partial(self._lost, worker_id, away)
            self.store.tell(lost, state.lose, worker_id, time.time(), self.configs.retry_delay)

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
        if self.offers:
            self._claiming = True
            self.store.tell(self._claimed, state.claim, list(self.offers.values()), self.configs.limits)

    def _claimed(self, claims: list[state.Claimed] | Exception) -> None:
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
            self._note(worker)
        self.dispatch()

    def _note(self, worker: Worker) -> None:
        """Keep up with what has changed of a worker: its jobs, its slots or what it may run."""
        if self.workers.get(worker.id) is not worker:
            return
        self.changed_workers[worker.id] = {}
        self.offers.pop(worker.id, None)
        free = worker.slots - len(worker.jobs)
        if free > 0:
            names = self.configs.names_for(worker.tags, worker.protocol_version)
            self.offers[worker.id] = Offer(worker.id, free, names)

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
        if commit.calls or commit.finished or self.dispatcher.offers:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._committed, commit)

    async def run(self) -> int:
        """Serve until a signal or a broken database; the exit code."""
        self.dispatcher.resume(await asyncio.wrap_future(self.store.do(state.expected_workers)))
        self._publish((set(), None))
        listener = RunnerListener()
        front = Front((self.options.host, self.options.port), self.api.answer, listener, self.access)
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
        self.store.tell(self._ignore, state.probe if self.store.error else state.make_due, time.time())
        self.dispatcher.lose_overdue()
        self.dispatcher.dispatch()
        self.store.tell(self._publish, state.news)

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
        self.events.publish(changed, self.dispatcher.take_changed_workers(), stats)

    def _prune(self) -> None:
        if self.options.keep:
            self.store.tell(self._pruned, state.prune, time.time() - self.options.keep, PRUNE_JOBS)

    def _pruned(self, count: int | Exception) -> None:
        if count == PRUNE_JOBS:  # a little at a time, with room for others between
            self._prune()

    def _ignore(self, _result: object) -> None:
        """Errors of the database have been logged by the store."""


def select_version(_connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol(VERSION_2) if VERSION_2 in offered else None


def tokens_by_scope(path: Path | None) -> dict[str, set[str]]:
    """Read the token file, if there is one. Raises OptionError where a line is wrong or a scope has no token."""
    tokens: dict[str, set[str]] = {"api": set(), "worker": set()}
    if path is None:
        return tokens
    for *scope, token in read_tokens(path):
        if scope not in ([], ["api"], ["worker"]):
            raise OptionError(f"{path}: each line must be 'api TOKEN', 'worker TOKEN' or 'TOKEN'")
        for name in scope or tokens:
            tokens[name].add(token)
    if not all(tokens.values()):
        raise OptionError(f"{path}: it must hold a token for the API and one for workers")
    return tokens


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line("The jobworker server.", VERSION)
    parser.add_argument("jobs", metavar="JOBS_YAML", type=Path, help="the jobs there are")
    parser.add_argument("-p", "--port", type=port_number, default=setting("PORT", "8080"), help="8080; 0: a free one")
    parser.add_argument("--host", default=setting("HOST", "127.0.0.1"), help="the address to listen on (127.0.0.1)")
    parser.add_argument("--database", default=setting("DATABASE"), help="jobs.db beside JOBS_YAML; :memory: for none")
    parser.add_argument("--token-file", type=Path, default=setting("TOKEN_FILE"), help="tokens for API and workers")
    parser.add_argument("--insecure", action="store_true", help="allow another --host without tokens")
    hold = setting("HOLD") in ("1", "true", "yes")
    parser.add_argument("--hold", action="store_true", default=hold, help="keep jobs until a worker comes")
    parser.add_argument(
        "--grace", type=duration, default=setting("GRACE", "60"), help="how long a worker may be away (60s)"
    )
    parser.add_argument(
        "--keep", type=duration, default=setting("KEEP", "30d"), help="how long ended jobs stay (30d); 0: ever"
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
        raise OptionError(f"--host: {options.host} is open to the network: give --token-file, or --insecure")


def main() -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a configuration to read again
    os.umask(0o077)  # the database holds what jobs wrote
    raise_limit_of_files()
    options = parse_options()
    start_logging(options.verbose)
    try:
        jobs = load_jobs(options.jobs)
        if options.check:
            print(f"{options.jobs}: {len(jobs)} jobs, no errors")
            return 0
        options.tokens = tokens_by_scope(options.token_file)
        check_host(options)
    except (ConfigError, OptionError) as error:
        print(error, file=sys.stderr)
        return 2
    gc.freeze()  # what is imported stays: no collection has to walk it
    try:
        return asyncio.run(serve(options, jobs))
    except StoreError as error:
        log.critical("%s", error)
    except OSError as error:
        log.critical("can't listen on %s port %d: %s", options.host, options.port, error.strerror or error)
    return 1


def raise_limit_of_files() -> None:
    """Take as many descriptors as the system gives: each worker and each request has one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(options: argparse.Namespace, jobs: Iterable[JobConfig]) -> int:
    return await Server(options, jobs).run()


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16,<18", "pyyaml>=6"]
# ///
