"""The job server: reads jobs.yaml, serves the HTTP API and /runner on one port, sends jobs to workers.

Its threads, and what they may touch:

    main thread      the event loop: Dispatcher (worker connections, timers). Everything in this file runs here.
    http.server      one thread a connection (web.py, api.py): answers requests from the store; hands /runner over
    store            the database (store.py, state.py), where the two meet, and nowhere else

A job is claimed late, when a worker has a free slot: by the commit that made job or slot ready. What a worker reports
is written by one transaction a frame, and answered when that is on disk.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import websockets.http11
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

import protocol
from jobworker import VERSION, logs, retention, state
from jobworker.api import Api
from jobworker.clock import Clock, WatchedClock, steady_clock
from jobworker.config import ConfigError, Configs, JobConfig, load_jobs, parse_duration
from jobworker.due import Scheduled, Scheduler
from jobworker.ends import End, line_of
from jobworker.options import (
    UNSENT_BYTES,
    OptionError,
    check_host,
    command_line,
    end_at_once,
    port_number,
    quiet_logger,
    raise_limit_of_files,
    setting,
    start_logging,
    tokens_by_scope,
    yes_or_no,
)
from jobworker.state import Arrival, Claimed, Database, HeldAttempt, NewJob, Order, Rules
from jobworker.store import Commit, Store, StoreError
from jobworker.web import Access, HttpServer, RunnerListener
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
    Pulling,
    ReadAgain,
    Reading,
    Settled,
    Stop,
)

MAX_FRAME_BYTES = 1024 * 1024
MAX_FRAME_MESSAGES = 20_000  # our worker's have a quarter of that
MAX_SILENT = 512  # connections that have said nothing yet; of more, the oldest are ended
MAX_UNREAD_BYTES = 4 * 1024 * 1024
MAX_UNSTORED_BYTES = 8 * 1024 * 1024
MESSAGE_BYTES = 1_000  # of these each message counts as so many beside its own: it takes the store as long
HELLO_SECONDS = 10
TICK_SECONDS, STOOD_STILL_SECONDS = 0.25, 1
PRUNE_SECONDS = 10
PRUNE_JOBS = 50
QUIET_SECONDS = 86_400  # after so long without a job a server that starts prunes nothing for an hour
GONE_JOBS = 500
DUE_JOBS = 5_000

EXAMPLE = """\
  %(command)s jobs.yaml
  %(command)s --host 0.0.0.0 --token-file tokens --keep 90d jobs.yaml
"""

log = logging.getLogger("server")


Write = Callable[[ServerConnection, bytes], None]


def write_without_waiting(socket: ServerConnection, frame: bytes) -> None:
    """Write a frame."""
    broadcast([socket], frame)
    end_unread(socket)


def end_unread(socket: ServerConnection) -> None:
    """End the connection of a worker that lets too much lie unread."""
    if socket.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
        log.warning("a worker at %s does not read what it is sent; ending its connection", socket.remote_address[0])
        socket.transport.abort()


@dataclass(eq=False, slots=True)
class ConnectedWorker:
    """A worker's connection. `jobs` holds what it was sent and has not finished: attempt by job id."""

    socket: ServerConnection
    write: Write
    hello: Hello
    since: float
    id: int = 0
    jobs: dict[int, int] = field(default_factory=dict)
    configs: Configs | None = None  # those it was sent
    frames: int = 0  # that the store was given
    _claimed: list[bytes] = field(default_factory=list)  # frames that wait until it has read others

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def protocol_version(self) -> int:
        return 2 if self.socket.subprotocol == VERSION_2 else 1

    @property
    def address(self) -> str:
        host, port = self.socket.remote_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def arrival(self) -> Arrival:
        hello = self.hello
        about = (hello.name, self.protocol_version, hello.slots, hello.tags, self.address, hello.version, self.since)
        return Arrival(*about, held=hello.jobs)

    def arrival_in_words(self) -> str:
        if self.hello.slots == 0:
            return f"at {self.address} is draining: it takes no new job and ends with the {len(self.jobs)} it has"
        return f"connected from {self.address}, {self.hello.slots} slots"

    def send(self, *messages: protocol.FromServer) -> None:
        """Write messages, in as many frames as that takes."""
        for frame in self._frames(messages):
            self.write(self.socket, frame)

    def _frames(self, messages: Iterable[protocol.FromServer]) -> Iterable[bytes]:
        """Version 1 knows no other than Enqueue."""
        if self.protocol_version == 2:
            return protocol.encode_batches(messages)
        orders = (message for message in messages if isinstance(message, Enqueue))
        return (protocol.encode(Enqueue(order.job, order.name)) for order in orders)

    def send_jobs(self, jobs: Iterable[Enqueue]) -> None:
        """Write jobs at the pace at which they are read: on a slow link a thousand take minutes."""
        self._claimed += self._frames(jobs)
        self.send_claimed()

    def send_claimed(self) -> None:
        """Write what waits, up to UNSENT_BYTES. A job that is cancelled meanwhile goes out, and gets no Go."""
        while self._claimed and self.socket.transport.get_write_buffer_size() < UNSENT_BYTES:
            self.write(self.socket, self._claimed.pop(0))

    def forget_claimed(self) -> None:
        """What waits was claimed before the store settled what this worker holds: it is queued again."""
        self._claimed.clear()

    def send_configs(self, configs: Configs, frames: dict[int, bytes]) -> None:
        """Write the configuration, in the frame of its version, where it is not what was sent last."""
        if self.configs is not configs:
            self.configs = configs
            self.write(self.socket, frames[self.protocol_version])


class GracePeriod(NamedTuple):
    """A worker that may come back until a deadline, on the loop's clock."""

    name: str
    deadline: float


def record_reports(
    db: Database, worker: int, frame: int, messages: list[protocol.FromWorker], now: float, rules: Rules
) -> list[protocol.FromServer]:
    """Write what a worker's frame says; give the answers. A stale message changes nothing and is answered Settled.

    frame: its number in its connection. Raises StoreError where one before it could not be stored: the end of a log
    without what was written before it would be taken for one whose middle is cut.
    """
    if not state.is_next_frame(db, worker, frame):
        raise StoreError("what the worker said before could not be stored")
    replies: list[protocol.FromServer] = []
    for message in messages:
        match message:
            case JobRunning(job, attempt):
                replies.append((Go if state.start(db, worker, job, attempt, now) else Settled)(job, attempt))
            case Log(job, attempt, offset, data):
                kept = logs.append_log(db, worker, job, attempt, offset, data)
                replies.append(Settled(job, attempt) if kept is None else Logged(job, attempt, kept))
            case ReadAgain(job, attempt, number):
                if begun := logs.begin_reading(db, worker, job, attempt, number):
                    replies += [Reading(job, attempt, begun[0]), Logged(job, attempt, begun[1])]
                else:
                    replies.append(Settled(job, attempt))
            case Pulling(job, attempt, image):
                state.note_pull(db, worker, job, attempt, image)
            case JobSuccess(job, attempt):
                state.succeed(db, worker, job, attempt, now, rules)
                replies.append(Settled(job, attempt))
            case JobFailure(job, attempt, exit_code, reason):
                state.fail(db, worker, job, attempt, exit_code, reason, now, rules)
                replies.append(Settled(job, attempt))
    return replies


class Dispatcher:
    """Knows which connections there are, and sends each what commits leave to tell it.

    clock: gives seconds since the epoch. Deadlines are on the loop's own clock, which no one sets.
    """

    def __init__(
        self,
        store: Store,
        configs: Configs,
        grace: float,
        clock: Callable[[], float],
        chance: random.Random | None = None,
        write: Write = write_without_waiting,
    ) -> None:
        self.store, self.grace = store, grace
        self._clock, self._chance, self._write = clock, chance or random.Random(), write
        self._loop = asyncio.get_running_loop()
        self.configs, self._config_frames = configs, config_frames(configs)
        self.workers: dict[int, ConnectedWorker] = {}
        self.away: dict[int, GracePeriod] = {}
        self._to_detach: dict[int, float] = {}  # since when each was connected
        self._detaching: set[tuple[int, float]] = set()  # what the store was asked, and has not answered
        self._silent: dict[ServerConnection, None] = {}  # those that have said nothing yet
        self._unstored_bytes = 0  # of frames whose answers are awaited
        self._stored = asyncio.Event()
        self._turn, self._looked = asyncio.Lock(), self._loop.time()  # to wait for the disk; for who is overdue
        self._closing: set[asyncio.Future[None]] = set()

    def resume(self, workers: list[tuple[int, str, int]]) -> None:
        """After a server start: give the workers of before a fresh grace. Version 1 workers never come back."""
        for worker, name, version in workers:
            self._start_grace(worker, name, self.grace if version > 1 else 0)

    def _start_grace(self, worker: int, name: str, grace: float) -> None:
        self.away[worker] = GracePeriod(name, self._loop.time() + grace)

    async def serve(self, socket: ServerConnection) -> None:
        """Serve one connection of a worker, from its handshake to its end."""
        try:
            self._bound_silent(socket)
            worker = ConnectedWorker(socket, self._write, await self._hello(socket), self._clock())
            try:
                await self._attach(worker)
                async for data in socket:
                    self._silent.pop(socket, None)
                    messages = protocol.decode_from_worker(data, worker.protocol_version)
                    if len(messages) > MAX_FRAME_MESSAGES:
                        raise protocol.ProtocolError(f"a batch may have {MAX_FRAME_MESSAGES:,} messages")
                    if messages and isinstance(messages[0], Hello):
                        await self._on_second_hello(worker, messages)
                    else:
                        self._on_reports(worker, messages, len(data) + len(messages) * MESSAGE_BYTES)
                    worker.send_claimed()
                    async with self._turn:  # else one that floods is always the first to wake
                        while self._unstored_bytes > MAX_UNSTORED_BYTES:  # the disk is slower than the workers
                            self._stored.clear()
                            await self._stored.wait()
            finally:
                self._detach(worker)
        except protocol.ProtocolError as error:
            log.warning("worker at %s: %s; closing its connection", socket.remote_address[0], error)
            await socket.close(CloseCode.INVALID_DATA, str(error).encode()[:120].decode(errors="ignore"))
        except TimeoutError:
            await socket.close(CloseCode.POLICY_VIOLATION, f"no Hello within {HELLO_SECONDS} s")
        except (ConnectionClosed, StoreError):
            pass  # reported by _detach, or by the store
        finally:
            self._silent.pop(socket, None)

    def _bound_silent(self, socket: ServerConnection) -> None:
        """Count a new connection among those that have said nothing; end the oldest of too many."""
        self._silent[socket] = None
        if len(self._silent) > MAX_SILENT:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            oldest.transport.abort()

    async def _hello(self, socket: ServerConnection) -> Hello:
        if socket.subprotocol != VERSION_2:
            return Hello(f"version-1-{self._chance.getrandbits(32):08x}", 1, (), "1", ())
        async with asyncio.timeout(HELLO_SECONDS):
            messages = protocol.decode_from_worker(await socket.recv(), 2)
        self._silent.pop(socket, None)
        if len(messages) != 1 or not isinstance(messages[0], Hello):
            raise protocol.ProtocolError("the first frame must be Hello")
        return messages[0]

    async def _on_second_hello(self, worker: ConnectedWorker, messages: list[protocol.FromWorker]) -> None:
        hello = messages[0]
        if not isinstance(hello, Hello) or hello.name != worker.name or len(messages) > 1:
            raise protocol.ProtocolError("a second Hello must have the first one's name, and no company")
        worker.hello = hello
        await self._attach(worker, again=True)

    async def _attach(self, worker: ConnectedWorker, again: bool = False) -> None:
        for id_, away in self.away.items():
            if away.name == worker.name:  # its grace must not end while it is being attached
                self._start_grace(id_, away.name, self.grace)
        taken_over: asyncio.Future[None] = self._loop.create_future()

        def attached(result: tuple[int, list[HeldAttempt]] | Exception | None) -> None:
            if taken_over.cancelled():
                return
            if isinstance(result, Exception):
                taken_over.set_exception(result)
                return
            if result:
                worker.id, wanted = result
                self._take_over(worker, wanted)
            taken_over.set_result(None)

        # A callback, because callbacks run in commit order: what is claimed after this attach goes to this connection.
        self.store.do_then(attached, state.attach, worker.arrival(), self._clock(), self.configs, again)
        await taken_over

    def _take_over(self, worker: ConnectedWorker, wanted: list[HeldAttempt]) -> None:
        worker.forget_claimed()
        worker.jobs = {held.id: held.attempt for held in wanted}
        self._replace(self.workers.get(worker.id), worker)
        self.away.pop(worker.id, None)
        self.workers[worker.id] = worker
        log.info("worker %s %s", worker.name, worker.arrival_in_words())
        self._greet(worker, wanted)

    def _replace(self, old: ConnectedWorker | None, worker: ConnectedWorker) -> None:
        if old and old is not worker:
            log.warning("worker %s: a newer connection of that name takes over", worker.name)
            old.send(*(Settled(*job) for job in old.jobs.items() if job not in worker.jobs.items()))
            self._close(old, protocol.CLOSE_REPLACED, "a newer connection of this name took over")

    def _greet(self, worker: ConnectedWorker, wanted: list[HeldAttempt]) -> None:
        worker.send_configs(self.configs, self._config_frames)
        replies: list[protocol.FromServer] = [
            Settled(job, attempt) for job, attempt, _state in worker.hello.jobs if worker.jobs.get(job) != attempt
        ]
        for held in wanted:
            reading = Reading(held.id, held.attempt, held.reading)
            replies += [reading, Logged(held.id, held.attempt, held.log_bytes)]
            if held.cancelling:
                replies.append(Stop(held.id, held.attempt))
        if replies:
            worker.send(*replies)

    def _on_reports(self, worker: ConnectedWorker, messages: list[protocol.FromWorker], size: int) -> None:
        if worker.protocol_version == 1:
            messages = [
                replace(message, attempt=worker.jobs[message.job])
                for message in messages
                if isinstance(message, JobRunning | JobSuccess | JobFailure) and message.job in worker.jobs
            ]
        if not messages or self.workers.get(worker.id) is not worker:
            return

        def answer(replies: list[protocol.FromServer] | Exception) -> None:
            self._unstored_bytes -= size
            self._stored.set()
            self._answer(worker, replies)

        self._unstored_bytes += size
        worker.frames += 1
        self.store.do_then(answer, record_reports, worker.id, worker.frames, messages, self._clock(), self.configs)

    def _answer(self, worker: ConnectedWorker, replies: list[protocol.FromServer] | Exception) -> None:
        if isinstance(replies, Exception):
            # Its connection closed, the worker keeps what it has to say and says it again later.
            self._report(replies)
            self._close(worker, CloseCode.TRY_AGAIN_LATER, "the result could not be stored")
            return
        if replies:
            worker.send(*replies)
        for reply in replies:
            if isinstance(reply, Settled) and worker.jobs.get(reply.job) == reply.attempt:
                del worker.jobs[reply.job]

    def carry_out(self, order: Order) -> None:
        """Tell a worker to stop a running attempt, or to let go one that it had not started."""
        worker = self.workers.get(order.worker)
        if worker and worker.jobs.get(order.job) == order.attempt:
            worker.send((Stop if order.started else Settled)(order.job, order.attempt))
            if not order.started:
                del worker.jobs[order.job]

    def _detach(self, worker: ConnectedWorker) -> None:
        if self.workers.get(worker.id) is not worker:
            return
        del self.workers[worker.id]
        log.info("worker %s disconnected, %d jobs held", worker.name, len(worker.jobs))
        leaves = worker.protocol_version == 1 or (
            not worker.jobs and worker.socket.close_code == CloseCode.NORMAL_CLOSURE
        )
        self._start_grace(worker.id, worker.name, 0 if leaves else self.grace)
        self._to_detach[worker.id] = worker.since
        self._write_detached(worker.id)

    def _write_detached(self, worker_id: int) -> None:
        since = self._to_detach[worker_id]
        if (worker_id, since) in self._detaching:  # the disk may hang for minutes
            return
        self._detaching.add((worker_id, since))

        def written(result: int | Exception) -> None:
            self._detaching.discard((worker_id, since))
            if isinstance(result, Exception):  # the next tick tries again
                self._report(result)
            elif self._to_detach.get(worker_id) == since:
                del self._to_detach[worker_id]
                self._lose_overdue()

        self.store.do_then(written, state.detach, worker_id, since, self._clock())

    def tick(self) -> None:
        """Send and write what could not be before, and give up the workers whose grace is over."""
        for worker in self.workers.values():
            worker.send_claimed()
            end_unread(worker.socket)  # also of pongs, which the library writes
        for worker_id in self._to_detach:
            self._write_detached(worker_id)
        self._lose_overdue()

    def _lengthen_graces(self) -> None:
        """By as long as the loop stood still: nobody could come back meanwhile."""
        before, self._looked = self._looked, self._loop.time()
        if (stood := self._looked - before - TICK_SECONDS) > STOOD_STILL_SECONDS:
            self.away = {id_: away._replace(deadline=away.deadline + stood) for id_, away in self.away.items()}

    def _lose_overdue(self) -> None:
        self._lengthen_graces()
        now = self._loop.time()
        overdue = [(id_, away) for id_, away in self.away.items() if away.deadline <= now]
        for worker_id, away in overdue:
            if worker_id in self._to_detach:  # the store takes it for connected
                continue
            del self.away[worker_id]

            def lost(result: int | Exception, worker_id: int = worker_id, away: GracePeriod = away) -> None:
                if isinstance(result, Exception):  # the next tick tries again
                    self._report(result)
                    if worker_id not in self.workers:
                        self.away.setdefault(worker_id, away)

            self.store.do_then(lost, state.lose, worker_id, self._clock(), self.configs)

    def send_claimed(self, claimed: Iterable[Claimed]) -> None:
        """Send workers the jobs that were claimed for them."""
        messages: dict[int, list[Enqueue]] = {}
        for worker_id, job, name, attempt, environment in claimed:
            messages.setdefault(worker_id, []).append(Enqueue(job, name, attempt, environment))
        for worker_id, enqueues in messages.items():
            # Where the worker went meanwhile, its detach comes after the claim and queues the jobs again.
            if worker := self.workers.get(worker_id):
                worker.jobs.update((enqueue.job, enqueue.attempt) for enqueue in enqueues)
                worker.send_jobs(enqueues)

    def reload(self, configs: Configs, frames: dict[int, bytes]) -> None:
        """Take a new configuration and its config_frames: for jobs not yet started, and to all workers."""
        self.configs, self._config_frames = configs, frames
        self.store.do_then(self._report, state.adopt, configs)
        for worker in self.workers.values():
            worker.send_configs(configs, self._config_frames)

    def _close(self, worker: ConnectedWorker, code: int, reason: str) -> None:
        task = asyncio.ensure_future(worker.socket.close(code, reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _report(self, result: object) -> None:
        if isinstance(result, Exception) and not isinstance(result, StoreError):
            log.error("internal error", exc_info=result)


def config_frames(configs: Configs) -> dict[int, bytes]:
    """Give the frames of JobConfigs, by the version of the protocol."""
    return {version: protocol.encode(JobConfigs(configs.to_wire(version))) for version in (1, 2)}


def read_configs(path: Path) -> tuple[Configs, dict[int, bytes]]:
    """Read a jobs.yaml, which takes seconds for a large one. Raises ConfigError."""
    configs = Configs(load_jobs(path))
    return configs, config_frames(configs)


@dataclass(frozen=True)
class Outside:
    """What the core needs of the world. clock: seconds since the epoch; steady: seconds that nobody can set."""

    clock: Clock = time.time
    steady: Clock = steady_clock
    chance: random.Random | None = None
    write: Write = write_without_waiting


class Core:
    """Store and dispatcher at work: carries out what commits leave to do and what time brings. No sockets, no signals.

    options: `grace` and `keep`, in seconds.
    """

    def __init__(self, store: Store, configs: Configs, options: argparse.Namespace, outside: Outside) -> None:
        self.store = store
        self.clock = WatchedClock(self._on_jump, outside.clock, outside.steady)
        self.dispatcher = Dispatcher(store, configs, options.grace, self.clock, outside.chance, outside.write)
        self._keep: float = options.keep
        self._prunes = False  # one piece after the other, however long that takes
        self._scheduler = Scheduler(store, self.clock)

    def _on_jump(self, seconds: float, now: float) -> None:
        log.warning("the clock was set %s by %.0f s", "ahead" if seconds > 0 else "back", abs(seconds))
        self.store.insist(state.shift_delays, seconds, now)  # what comes later goes by the clock as it was set

    async def start(self) -> None:
        """Take over what is in the database; to be called once, before anyone connects."""
        self.store.do(state.adopt, self.dispatcher.configs)
        self.dispatcher.resume(await asyncio.wrap_future(self.store.do(state.resume, self.clock())))
        await asyncio.wrap_future(self.store.do(state.tick, self.clock()))
        last = await asyncio.wrap_future(self.store.do(retention.last_moment))
        if last is not None and self.clock() > last + QUIET_SECONDS:
            self.clock.distrust()  # it may have been set while the server was down
        self.adopt_schedules()

    def on_commit(self, commit: Commit) -> None:
        """Call back who waits for a commit, and pass on its orders and what it claimed."""
        for callback, result in commit.calls:
            try:
                callback(result)
            except Exception as error:  # the others' results still count
                log.error("internal error", exc_info=error)
        for order in commit.orders:
            self.dispatcher.carry_out(order)
        self.dispatcher.send_claimed(commit.claimed)
        if commit.ends and log.isEnabledFor(logging.INFO):
            self._tell(commit.ends)

    def _tell(self, ends: Iterable[End]) -> None:
        """Log each end, last of all: no worker waits for it."""
        by_name = self.dispatcher.configs.by_name
        log.info([line_of(end, by_name[end.name].retries if end.name in by_name else 0) for end in ends])

    async def run(self) -> None:
        """Do what time brings, until the database is broken."""
        clean_at = 0.0
        while not self.store.broken:
            try:
                now = asyncio.get_running_loop().time()
                if now >= clean_at:
                    clean_at = now + PRUNE_SECONDS
                    self._prune()
                    self.end_gone()
                self._tick()
            except Exception as error:
                log.error("internal error", exc_info=error)
            await asyncio.sleep(TICK_SECONDS)
        log.critical("the database is not to be trusted until it is opened anew: %s; exiting", self.store.error)

    def _tick(self) -> None:
        if self.store.error:
            self.store.do(state.probe)
        else:
            self.store.do(state.make_due, self.clock(), DUE_JOBS)
        self._scheduler.tick()
        self.dispatcher.tick()
        self.store.do(state.tick, self.clock())

    def adopt_schedules(self) -> None:
        """Go by the schedules of the jobs.yaml in force; those that have not changed go on where they were."""
        configs = self.dispatcher.configs
        self._scheduler.adopt(
            {
                name: Scheduled(schedule, NewJob(*configs.with_defaults(name)), configs.limits.get(name, 1))
                for name, schedule in configs.schedules.items()
            }
        )

    def end_gone(self) -> None:
        """End what is queued under names that jobs.yaml has no more."""

        def ended(count: int | Exception) -> None:
            if count == GONE_JOBS:  # some at a time, with room for others between
                self.end_gone()

        names = frozenset(self.dispatcher.configs.by_name)
        self.store.do_then(ended, state.end_gone, names, self.clock(), GONE_JOBS)

    def _prune(self) -> None:
        def pruned(count: int | Exception) -> None:
            self._prunes = False
            if not isinstance(count, Exception) and count:  # some at a time, with room for others between
                self._prune()

        if self._keep and not self._prunes and not self.clock.was_set_lately():
            self._prunes = True
            names = frozenset(self.dispatcher.configs.by_name)
            self.store.do_then(pruned, retention.prune, self.clock() - self._keep, names, PRUNE_JOBS)


class Server:
    """Puts the parts together, runs them, and takes them down again."""

    def __init__(self, options: argparse.Namespace, jobs: Iterable[JobConfig]) -> None:
        self.options = options
        self.loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[int] = self.loop.create_future()
        self.store = Store(str(options.database), self._deliver).start()
        configs = Configs(jobs)
        self.core = Core(self.store, configs, options, Outside())
        self.api = Api(self.store, configs, options.hold, self.core.clock)
        self.access = Access(options.host, options.tokens)
        self._reading_jobs = asyncio.Lock()

    def _deliver(self, commit: Commit) -> None:
        """Wake the loop for what it waits for. Called by the store's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.core.on_commit, commit)

    async def run(self) -> int:
        """Serve until a signal or a broken database; the exit code."""
        await self.core.start()
        listener = RunnerListener()
        front = HttpServer((self.options.host, self.options.port), self.api.answer, listener, self.access)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop, 0)
        self.loop.add_signal_handler(signal.SIGHUP, self._start_reload)
        async with serve_websockets(
            self.core.dispatcher.serve,
            sock=listener,
            subprotocols=[Subprotocol(VERSION_2)],
            select_subprotocol=select_version,
            origins=[None],
            process_request=self.access.check_runner,
            process_response=self._introduce,
            server_header=None,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            max_queue=2,
            write_limit=2 * MAX_UNREAD_BYTES,  # beyond it the library's pings would wait: nobody would be found silent
            ping_interval=protocol.PING_SECONDS,
            ping_timeout=protocol.PONG_SECONDS,
            close_timeout=2,
            logger=quiet_logger(),
        ):
            threading.Thread(target=front.serve_forever, name="http", daemon=True).start()
            host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
            log.info("%s; page and API: listening on http://%s:%d", self._sources(), host, front.server_address[1])
            ticking = asyncio.ensure_future(self.core.run())
            ticking.add_done_callback(lambda _task: self._stop(1))
            code = await self.stopped
            await asyncio.to_thread(front.shutdown)
            front.server_close()
            ticking.cancel()
        await asyncio.to_thread(self.store.close)
        return code

    def _sources(self) -> str:
        path = self.options.database
        database = (
            "no database: all is forgotten at the end" if path == ":memory:" else f"database {Path(path).absolute()}"
        )
        jobs = len(self.core.dispatcher.configs.by_name)
        return f"jobworker {VERSION}: {jobs} jobs in {self.options.jobs.absolute()}; {database}"

    def _introduce(self, _connection: object, _request: object, response: websockets.http11.Response) -> None:
        response.headers[protocol.SERVER_HEADER] = self.store.server_id
        response.headers[protocol.READINGS_HEADER] = "1"

    def _stop(self, code: int) -> None:
        if not self.stopped.done():
            log.info("stopping")
            self.stopped.set_result(code)

    def _start_reload(self) -> None:
        self.reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        async with self._reading_jobs:  # one after the other: a short file would overtake a long one that is older
            try:
                configs, frames = await asyncio.to_thread(read_configs, self.options.jobs)
            except ConfigError as error:
                log.error("nothing changed; the new jobs.yaml has errors:\n%s", error)
                return
            self.core.dispatcher.reload(configs, frames)
            self.api.configs = configs
            self.core.end_gone()
            self.core.adopt_schedules()
            log.info("read %s again: %d jobs", self.options.jobs, len(configs.by_name))


def select_version(_connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol(VERSION_2) if VERSION_2 in offered else None


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line("The jobworker server.", VERSION, EXAMPLE)
    add = parser.add_argument
    add("jobs", metavar="JOBS_YAML", type=Path, help="the file with the jobs there are")
    add("-p", "--port", type=port_number, default=setting("PORT", "8080"), help="8080; 0 takes a free one")
    add("--host", metavar="ADDRESS", default=setting("HOST", "127.0.0.1"), help="where to listen (127.0.0.1)")
    add(
        "--database",
        metavar="FILE",
        default=setting("DATABASE"),
        help="what holds all jobs (jobs.db beside JOBS_YAML); :memory: forgets them",
    )
    add("--token-file", metavar="FILE", type=Path, default=setting("TOKEN_FILE"), help="tokens for API and workers")
    add("--insecure", action="store_true", help="allow another --host without tokens")
    add("--hold", action="store_true", help="keep jobs until a worker comes")
    add(
        "--grace",
        metavar="TIME",
        type=duration,
        default=setting("GRACE", "60"),
        help="how long a worker may be away before its jobs are lost (60s)",
    )
    add(
        "--keep",
        metavar="TIME",
        type=duration,
        default=setting("KEEP", "30d"),
        help="how long ended jobs stay (30d); 0 keeps them for ever",
    )
    add("--check", action="store_true", help="only check JOBS_YAML")
    options = parser.parse_args(arguments)
    options.hold = options.hold or yes_or_no("HOLD", parser)
    options.database = options.database or str(options.jobs.parent / "jobs.db")
    return options


def duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a configuration to read again
    os.umask(0o077)  # the database holds what jobs wrote
    raise_limit_of_files()
    options = parse_options()
    start_logging(options.verbose)
    try:
        jobs = load_jobs(options.jobs)
        if options.check:
            print(f"{options.jobs}: {len(jobs)} job{'s' * (len(jobs) != 1)}, no errors")
            for name, schedule in Configs(jobs).schedules.items():
                print(f"{name} is due next at {state.moment(schedule.next_due(time.time()))}")
            return 0
        options.tokens = tokens_by_scope(options.token_file)
        check_host(options)
    except (ConfigError, OptionError) as error:
        print(error, file=sys.stderr)
        return 2
    gc.freeze()  # what is imported stays: no collection has to walk it
    try:
        asyncio.run(serve(options, jobs))
    except StoreError as error:
        log.critical("%s", error)
    except OSError as error:
        log.critical("can't listen on %s port %d: %s", options.host, options.port, error.strerror or error)
    return 1


async def serve(options: argparse.Namespace, jobs: Iterable[JobConfig]) -> NoReturn:
    """Serve to the end of the process: a thread may still wait for a jobs.yaml that can't be read."""
    end_at_once(await Server(options, jobs).run())


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16,<18", "pyyaml>=6"]
# ///
