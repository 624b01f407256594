"""The worker: connects to a server, runs its jobs with `docker run`, and reports how they end.

Everything happens on the event loop, but for `subprocess.run(["docker", "run", …])`, which blocks a thread of its own
for each slot; what the container writes comes through a pipe that the loop reads.

The container is the durable outbox: it has a name of its own for each job and attempt, labels that say whose it is, and
no --rm. It is removed only after the server said Settled: the result is on disk. So a worker that was killed finds by
label, when it starts again, what it ran, and goes on:

    (Enqueue) ─▶ assigned ─JobRunning─▶ asked ──Go──▶ running ──▶ finished ──JobSuccess / JobFailure──▶ (Settled)
                                                         ▲            ▲
                        found by label, still running ───┘            └─── found by label, exited
"""

import argparse
import asyncio
import contextlib
import fcntl
import fnmatch
import itertools
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

import protocol
from jobworker import VERSION
from jobworker.container import (
    ENGINE_RETRY_SECONDS,
    KILLED,
    Command,
    Docker,
    EngineAway,
    docker_run_command,
    end_orphans,
    exit_of_command,
    has_other_code,
    is_running,
    option,
    read_state,
    seconds_since,
)
from jobworker.options import OptionError, command_line, quiet_logger, read_tokens, setting, settings, start_logging
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

MAX_FRAME_BYTES = 16 * 1024 * 1024
BATCH_BYTES = 512 * 1024
LOG_HEAD_BYTES = 512 * 1024
LOG_BUFFER_BYTES = 1024 * 1024
LOG_PIECE_BYTES = 64 * 1024
LOG_FLUSH_SECONDS = 0.2
BACKOFF_FLOOR_SECONDS = 0.25
BACKOFF_CEILING_SECONDS = 3.0
STEADY_SECONDS = 5
# The peer's silence is noticed after at most the sum of both: within 30 s.
PING_SECONDS = 15
PONG_SECONDS = 14
PULL_TIMEOUT_SECONDS = 900
STOP_GRACE_SECONDS = 10
OOM_SECONDS = 0.5
CREATED_SECONDS = 0.5
NOT_STARTED = 125
SWEEP_SECONDS = 30
REMOVE_AT_ONCE = 100

log = logging.getLogger("worker")


class FatalError(Exception):
    """The worker can't go on, and trying again would not help. The message says why and what to do."""


class Output:
    """What a container wrote and the server has not yet on disk: pieces with their byte offset.

    At most LOG_BUFFER_BYTES: past the head, the oldest pieces are dropped; the server shows how much is missing.
    """

    def __init__(self) -> None:
        self.end = 0
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._size = 0
        self._sent = 0
        self._kept = 0

    def add(self, data: bytes) -> None:
        start, self.end = self.end, self.end + len(data)
        if self.end > self._kept:
            data = data[max(self._kept - start, 0) :]
            self._size += len(data)
            start = self.end - len(data)
            if self._pieces and self._is_open(self._pieces[-1], start):
                start, before = self._pieces.pop()
                data = before + data
            self._pieces.append((start, data))
            while self._size > LOG_BUFFER_BYTES:
                self._drop_one()

    def _is_open(self, piece: tuple[int, bytes], end: int) -> bool:
        start, data = piece
        return start >= self._sent and start + len(data) == end and len(data) < LOG_PIECE_BYTES // 2

    def _drop_one(self) -> None:
        victim = next((i for i, (start, _) in enumerate(self._pieces) if start >= LOG_HEAD_BYTES), 0)
        self._size -= len(self._pieces[victim][1])
        del self._pieces[victim]

    def kept(self, offset: int) -> None:
        """Forget what the server has on disk, up to an offset."""
        self._kept = max(self._kept, offset)
        self._sent = max(self._sent, self._kept)
        while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) <= self._kept:
            self._size -= len(self._pieces.popleft()[1])

    def resend(self) -> None:
        """On a new connection: everything that is not on disk has to be sent again."""
        self._sent = self._kept

    def read_again(self) -> None:
        """The output will be added again from its start."""
        self.end = self._size = 0
        self._pieces.clear()

    def unsent(self, limit: int) -> Iterator[tuple[int, bytes]]:
        """Give up to about `limit` bytes that were not sent on this connection, as (offset, bytes)."""
        for start, data in self._pieces:
            if limit <= 0:
                return
            if start + len(data) > self._sent:
                skip = max(self._sent - start, 0)
                self._sent = start + len(data)
                limit -= len(data) - skip
                yield start + skip, data[skip:]


@dataclass
class Job:
    """An attempt that this worker holds. state: assigned, asked, running or finished."""

    id: int
    attempt: int
    name: str
    container: str
    environment: dict[str, str] = field(default_factory=dict)
    state: str = "assigned"
    stop_reason: str | None = None
    started: float | None = None  # on the monotonic clock
    config: dict[str, Any] | None = None  # as it was at the start; None for a container found running
    output: Output = field(default_factory=Output)
    result: JobSuccess | JobFailure | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)  # told to stop
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reported_on: "Connection | None" = None

    @property
    def key(self) -> tuple[int, int]:
        return self.id, self.attempt


class Connection:
    """A session with a server: what is sent goes out in order, a batch at a time."""

    def __init__(self, socket_: ClientConnection) -> None:
        self.socket = socket_
        self.version = 2 if socket_.subprotocol == VERSION_2 else 1
        self.greeted = False
        self._outbox: deque[protocol.FromWorker] = deque()
        self._filled = asyncio.Event()

    @property
    def busy(self) -> bool:
        return len(self._outbox) > 0

    def send(self, message: protocol.FromWorker) -> None:
        self._outbox.append(message)
        self._filled.set()

    async def write(self) -> None:
        """Write what is sent until the connection ends."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._outbox:
                await self.socket.send(self._next_frame())

    def _next_frame(self) -> bytes:
        if self.version == 1:
            return protocol.encode(self._outbox.popleft())
        batch: list[protocol.FromWorker] = []
        size = 0
        while self._outbox and size < BATCH_BYTES:
            if isinstance(self._outbox[0], Hello) and batch:  # a Hello has a frame of its own
                break
            message = self._outbox.popleft()
            if isinstance(message, Hello):
                return protocol.encode(message)
            size += len(message.data) if isinstance(message, Log) else 100
            batch.append(message)
        return protocol.encode_batch(batch)


class Worker:
    """Holds jobs, from Enqueue to Settled, over any number of connections."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options, self.name = options, name
        self.docker = Docker(options.docker, options.slots)
        self.jobs: dict[tuple[int, int], Job] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.images: set[str] = set()
        self._pulling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.server_id: str | None = None
        self.connection: Connection | None = None
        self.draining = False
        self.done = asyncio.Event()
        self._numbers = itertools.count(1)
        self._to_remove: dict[str, None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # The connection

    async def run(self) -> int:
        """Serve until told to stop; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._drain)
        work: list[asyncio.Future[Any]] = [asyncio.ensure_future(self.done.wait())]
        work += map(asyncio.ensure_future, (self._keep_connected(), self._tick(), self._keep_clean()))
        finished, going_on = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        for task in going_on:
            task.cancel()
        await asyncio.gather(*going_on, return_exceptions=True)
        try:
            for task in finished:
                task.result()
        finally:
            await self._remove_settled()
        return 0

    async def _keep_connected(self) -> None:
        delay = BACKOFF_FLOOR_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._connect_once()
                log.info("disconnected")
            except InvalidStatus as error:
                if error.response.status_code == HTTPStatus.UNAUTHORIZED:
                    raise FatalError(f"{self.options.uri} refuses this worker: {explain(error)}") from error
                log.warning("can't connect to %s: %s", self.options.uri, explain(error))
            except (OSError, WebSocketException) as error:
                log.warning("can't connect to %s: %s", self.options.uri, explain(error))
            if time.monotonic() - began > STEADY_SECONDS:
                delay = BACKOFF_FLOOR_SECONDS
            # Never at once: a server that accepts and then closes would be dialled thousands of times a second.
            await asyncio.sleep(delay * random.uniform(1, 1.5))
            delay = min(delay * 2, BACKOFF_CEILING_SECONDS)

    async def _connect_once(self) -> None:
        headers = {"Authorization": f"Bearer {self.options.token}"} if self.options.token else None
        async with connect(
            self.options.uri,
            subprotocols=[Subprotocol(VERSION_2)],
            additional_headers=headers,
            user_agent_header=f"jobworker/{VERSION}",
            proxy=None,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            ping_interval=PING_SECONDS,
            ping_timeout=PONG_SECONDS,
            close_timeout=2,
            logger=quiet_logger(),
        ) as socket_:
            connection = Connection(socket_)
            await self._meet_server(connection)
            writing = asyncio.ensure_future(connection.write())
            try:
                await self._serve(connection)
            except ConnectionClosed as error:
                self._explain_close(error)
            finally:
                self.connection = None
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    def _explain_close(self, error: ConnectionClosed) -> None:
        if error.rcvd and error.rcvd.code == protocol.CLOSE_REPLACED:
            raise FatalError(f"another worker named {self.name} connected; give each a --name of its own")
        if error.rcvd and error.rcvd.reason:
            log.warning("the server closed the connection: %s", error.rcvd.reason)

    async def _meet_server(self, connection: Connection) -> None:
        response = connection.socket.response
        server_id = response.headers.get(protocol.SERVER_HEADER) if response else None
        server_id = server_id or f"version-1-{self.options.uri}"
        if server_id != self.server_id:
            for job in list(self.jobs.values()) if self.server_id else ():
                log.warning("job %d: another server is there now; letting it go", job.id)
                self._let_go(job)
            self.server_id = server_id
            try:
                await self._recover(connection.version)
            except BaseException:
                self.server_id = None  # the next connection has to look again
                raise
        self.connection = connection
        if connection.version == 2:
            self._say_hello()
        for job in list(self.jobs.values()):
            job.output.resend()
            if connection.version == 1:  # it says no Logged
                self._go_on(job, 0)

    def _say_hello(self) -> None:
        held = [(*job.key, {"asked": "assigned"}.get(job.state, job.state)) for job in self.jobs.values()]
        slots = 0 if self.draining else self.options.slots
        self._send(Hello(self.name, slots, tuple(self.options.tags), VERSION, tuple(held)))

    def _send(self, message: protocol.FromWorker) -> None:
        if self.connection:
            self.connection.send(message)

    async def _serve(self, connection: Connection) -> None:
        async for data in connection.socket:
            try:
                messages = protocol.decode_from_server(data, connection.version)
            except protocol.ProtocolError as error:
                log.error("the server sent what can't be read: %s", error)
                await connection.socket.close(1007, str(error)[:100])
                return
            for message in messages:
                self._receive(message)

    def _receive(self, message: protocol.FromServer) -> None:
        match message:
            case JobConfigs(configs):
                if self.connection and not self.connection.greeted:
                    self.connection.greeted = True
                    log.info("connected to %s as %s, %d slots", self.options.uri, self.name, self.options.slots)
                self.configs = {config["name"]: config for config in configs}
            case Enqueue():
                self._take(message)
            case _:
                if held := self.jobs.get((message.job, message.attempt)):
                    self._obey(held, message)

    def _obey(self, job: Job, message: Go | Stop | Settled | Logged) -> None:
        match message:
            case Go():
                if job.state in ("assigned", "asked"):
                    self._start(job, self._run(job))
            case Stop():
                self._stop(job, "cancelled")
            case Settled():
                self._let_go(job)
            case Logged():
                self._go_on(job, message.offset)

    def _take(self, message: Enqueue) -> None:
        if self.draining:
            return
        attempt = message.attempt or next(self._numbers)  # version 1 has none, and its ids may come again
        if (message.job, attempt) in self.jobs:
            return
        container = f"jobworker-{re.sub('[^a-zA-Z0-9]', '', self.server_id or '')[-8:]}-{message.job}-{attempt}"
        job = Job(message.job, attempt, message.name, container, message.environment or {})
        self.jobs[job.key] = job
        self._ask()

    def _ask(self) -> None:
        """Ask whether the next jobs may start, while there are slots; a version 1 server is only told."""
        busy = sum(job.state in ("asked", "running") for job in self.jobs.values())
        for job in list(self.jobs.values()):
            if busy >= self.options.slots:
                return
            if job.state == "assigned":
                busy += 1
                job.state = "asked"
                self._announce(job)

    def _announce(self, job: Job) -> None:
        if self.connection is None:
            return
        if self.connection.version == 2:
            self._send(JobRunning(*job.key))
        elif job.name in self.configs:
            self._send(JobRunning(job.id))
            self._start(job, self._run(job))
        else:
            self._end(job, JobFailure(job.id))

    def _go_on(self, job: Job, offset: int) -> None:
        """The server has an attempt's log up to an offset; after a new connection, it also waits for the rest of it."""
        job.output.kept(offset)
        if job.state == "asked":
            self._announce(job)
        elif job.result:
            self._report(job)

    def _report(self, job: Job) -> None:
        """Send the rest of the log, then the result, once a connection."""
        connection = self.connection
        if job.result is None or connection is None or job.reported_on is connection:
            return
        job.reported_on = connection
        if connection.version == 1:
            connection.send(replace(job.result, attempt=0))
            self._let_go(job)
            return
        self._send_log(job, LOG_BUFFER_BYTES)
        connection.send(job.result)

    def _send_log(self, job: Job, limit: int) -> None:
        for offset, data in job.output.unsent(limit):
            self._send(Log(*job.key, offset, data))

    # A job's life

    def _start(self, job: Job, life: Coroutine[Any, Any, None]) -> None:
        job.state = "running"
        self._spawn(life).add_done_callback(lambda task: self._note_crash(job, task))

    def _note_crash(self, job: Job, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("job %d: internal error", job.id, exc_info=error)
            self._end(job, JobFailure(*job.key, None, "worker"))

    def _end(self, job: Job, result: JobSuccess | JobFailure) -> None:
        job.state, job.result = "finished", result
        job.ended.set()
        if self.jobs.get(job.key) is not job:  # let go meanwhile
            self._to_remove[job.container] = None
            return
        log.debug("job %d (%s), attempt %d: %s", job.id, job.name, job.attempt, result)
        self._report(job)
        self._ask()

    def _let_go(self, job: Job) -> None:
        """The server has the result, or does not want it: whatever is left of the attempt goes."""
        del self.jobs[job.key]
        job.stopped.set()
        job.ended.set()
        self._to_remove[job.container] = None
        self._ask()
        self._leave_if_drained()

    async def _run(self, job: Job) -> None:
        """Live an attempt from Go to its result."""
        config = self.configs.get(job.name)
        try:
            if config is None:
                raise ValueError(f"the server sent no configuration for {job.name}")
            command = self._command(config, job)
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # another server's may be of any form
            self._fail(job, "config", str(error))
            return
        if not self._allows(config):
            self._fail(job, "refused", f"this worker does not run {config['image']}: see its --allow-image")
            return
        try:
            await self._run_container(job, config, command)
        except (EngineAway, OSError) as error:  # also: more arguments than the system takes
            self._fail(job, "docker", str(error))

    async def _run_container(self, job: Job, config: dict[str, Any], command: "Command") -> None:
        if not await self._has_image(job, config):
            return
        if job.stopped.is_set():
            self._fail(job, job.stop_reason or "cancelled", "stopped before it started")
            return
        job.config, job.started = config, time.monotonic()
        output, drain = self._pipe(job)
        try:
            code = await self.docker.run(command, output)
        finally:
            drain()
        if code == NOT_STARTED and config["image"] in self.images and not await self.docker.has_image(config["image"]):
            self.images.discard(config["image"])  # somebody removed it since the last job
            job.output.read_again()
            await self._run_container(job, config, command)
            return
        if self.jobs.get(job.key) is job:
            await self._conclude(job, config["image"], code)
        else:  # let go meanwhile, perhaps before there was a container to remove
            self._to_remove[job.container] = None

    def _allows(self, config: dict[str, Any]) -> bool:
        globs = self.options.allow_image
        words_alone = all(word.startswith("-") and word != "--" for word in config.get("options", []))
        return not globs or (words_alone and any(fnmatch.fnmatchcase(config["image"], glob) for glob in globs))

    def _command(self, config: dict[str, Any], job: Job) -> "Command":
        labels = {"jobworker.job": str(job.id), "jobworker.attempt": str(job.attempt), "jobworker.name": job.name}
        environment = {
            **job.environment,
            "JOBWORKER_JOB_ID": str(job.id),
            "JOBWORKER_JOB_NAME": job.name,
            "JOBWORKER_ATTEMPT": str(job.attempt),
        }
        version = self.connection.version if self.connection else 2
        return docker_run_command(config, job.container, self._labels | labels, environment, version)

    def _config(self, job: Job) -> dict[str, Any]:
        return job.config or self.configs.get(job.name, {})

    @property
    def _labels(self) -> dict[str, str]:
        return {"jobworker.server": str(self.server_id), "jobworker.worker": self.name}

    async def _has_image(self, job: Job, config: dict[str, Any]) -> bool:
        """Have the image here, as the policy says; False where the attempt ended over it."""
        image, policy = config["image"], config.get("pull_policy", "missing")
        if policy == "never" or (policy == "missing" and image in self.images):
            return True
        pull = asyncio.ensure_future(self._pull(image, policy, config.get("platform")))
        stopped = asyncio.ensure_future(job.stopped.wait())
        limit = config.get("pull_timeout", PULL_TIMEOUT_SECONDS)
        await asyncio.wait([pull, stopped], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if pull.done():
            error = pull.result()
        else:
            pull.cancel()
            error = f"pulling {image} " + ("was stopped" if job.stop_reason else f"took more than {limit} s")
        if error:
            self._fail(job, job.stop_reason or "image", error)
        return not error

    async def _pull(self, image: str, policy: str, platform: str | None) -> str:
        """Pull an image, once for all jobs that wait for it; what docker says where it can't."""
        async with self._pulling[image]:
            if policy == "missing" and (image in self.images or await self.docker.has_image(image)):
                self.images.add(image)
                return ""
            code, out, err = await self.docker("pull", "--quiet", *option("--platform", platform), "--", image)
            if code == 0:
                self.images.add(image)
                return ""
            return err.strip() or out.strip() or f"docker pull ended with exit code {code}"

    def _pipe(self, job: Job) -> tuple[int, Callable[[], None]]:
        """Give a pipe's end for a command to write a job's output to, and what reads the last of it.

        Most of what ends at once costs the loop no more than that last read: it listens from the first flush on.
        """
        loop = asyncio.get_running_loop()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)

        def read() -> bool:
            try:
                data = os.read(reading, LOG_PIECE_BYTES)
            except BlockingIOError:
                return False
            if data:
                job.output.add(data)
            else:
                loop.remove_reader(reading)
            return bool(data)

        def drain() -> None:
            listening.cancel()
            while read():
                pass
            loop.remove_reader(reading)
            os.close(reading)

        listening = loop.call_later(LOG_FLUSH_SECONDS / 2, loop.add_reader, reading, read)
        return writing, drain

    async def _conclude(self, job: Job, image: str, code: int | None) -> None:
        """Find out how an attempt ended; code: what `docker run` exited with, None where it was not ours."""
        state = await self.docker.state(job.container) if code != 0 else None
        while state and (is_running(state) or (code is not None and has_other_code(state, code))):
            await self._follow(job)  # the command was killed: the container, or its output, went on
            state, code = await self.docker.state(job.container), None
        if state and state.get("ExitCode") == KILLED and not state.get("OOMKilled"):
            await asyncio.sleep(OOM_SECONDS)  # the engine learns of this a moment after the end
            state = await self.docker.state(job.container)
        if state and state.get("Status") == "created" and not await self._never_starts(job.container):
            await self._conclude(job, image, None)
            return
        code, reason = read_state(state) if state else exit_of_command(code)
        if reason == "docker" and not await self.docker.has_image(image):
            self.images.discard(image)
            code, reason = None, "image"
        if job.stop_reason:
            self._end(job, JobFailure(*job.key, code, job.stop_reason))
        elif code == 0:
            self._end(job, JobSuccess(*job.key))
        else:
            self._end(job, JobFailure(*job.key, code, reason))

    async def _follow(self, job: Job) -> None:
        """Read a container's output again from its start, until it has ended."""
        whole = False
        while not whole:
            job.output.read_again()
            output, drain = self._pipe(job)
            try:
                whole = await self.docker.follow(job.container, output)
            finally:
                os.close(output)
                drain()
            if not whole:  # the command was killed, or the engine is away: a container that is gone has no state
                whole = await self.docker.state(job.container) is None
                await asyncio.sleep(ENGINE_RETRY_SECONDS)
        await self.docker.insist("wait", job.container)

    def _fail(self, job: Job, reason: str, detail: str) -> None:
        """End an attempt that has no exit code, saying in its log why."""
        job.output.add(f"jobworker: {detail}\n".encode())
        self._end(job, JobFailure(*job.key, None, reason))

    def _stop(self, job: Job, reason: str) -> None:
        """Have an attempt end: TERM, the grace period, KILL."""
        if job.result or job.stop_reason:
            return
        job.stop_reason = reason
        job.stopped.set()
        if job.state == "running":
            self._spawn(self._stop_container(job))

    async def _stop_container(self, job: Job) -> None:
        grace = self._config(job).get("stop_grace_period", STOP_GRACE_SECONDS)
        while not job.ended.is_set():
            # Again until it has ended: a container that is only being created can't be stopped yet.
            await self.docker("stop", "--time", str(math.ceil(grace)), job.container)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.ended.wait(), 0.5)

    # What a former life left

    async def _recover(self, version: int) -> None:
        """Find this worker's containers of this server: adopt what runs, report what ended, remove the rest."""
        await asyncio.to_thread(end_orphans, self._labels)
        found = await self.docker.containers(self._labels)
        created = [container for _id, _attempt, state, container, _name in found if state == "created"]
        never_start = await asyncio.gather(*map(self._never_starts, created))
        gone = {container for container, never in zip(created, never_start, strict=True) if never}
        for id_, attempt, state, container, name in found:
            if version == 1:
                await self.docker.remove([container])
                continue
            if container in gone or (id_, attempt) in self.jobs:
                continue
            job = Job(id_, attempt, name, container)
            self.jobs[job.key] = job
            log.info("job %d: found its container, %s", id_, state)
            self._start(job, self._adopt(job))

    async def _never_starts(self, container: str) -> bool:
        """Remove a container that was only created; False where it has started, as one whose start was under way."""
        await asyncio.sleep(CREATED_SECONDS)
        state = await self.docker.state(container)
        if state and state.get("Status") != "created":
            return False
        return await self.docker.remove([container], force=False)

    async def _adopt(self, job: Job) -> None:
        try:
            state = await self.docker.state(job.container) or {}
            job.started = time.monotonic() - seconds_since(str(state.get("StartedAt")))
            await self._follow(job)
            await self._conclude(job, self._config(job).get("image", ""), None)
        except EngineAway as error:
            self._fail(job, "docker", str(error))

    async def _keep_clean(self) -> None:
        """Remove containers whose results are settled, some in one call, and now and then those nobody knows."""
        sweep_at = time.monotonic() + SWEEP_SECONDS
        while True:
            await asyncio.sleep(LOG_FLUSH_SECONDS)
            await self._remove_settled()
            if time.monotonic() > sweep_at and self.server_id:
                sweep_at = time.monotonic() + SWEEP_SECONDS
                for *key, _state, container, _name in await self.docker.containers(self._labels):
                    if tuple(key) not in self.jobs:
                        self._to_remove[container] = None

    async def _remove_settled(self) -> None:
        while self._to_remove:
            containers = list(self._to_remove)[:REMOVE_AT_ONCE]
            if not await self.docker.remove(containers):
                return  # the next round tries again
            for container in containers:
                del self._to_remove[container]

    # Clock and signals

    async def _tick(self) -> None:
        """Send what jobs wrote, and end those whose time is over."""
        while True:
            await asyncio.sleep(LOG_FLUSH_SECONDS)
            for job in list(self.jobs.values()):
                if job.state == "running":
                    timeout = self._config(job).get("timeout")
                    if timeout and job.started and time.monotonic() > job.started + timeout:
                        self._stop(job, "timeout")
                    # A flood is thinned out here: the rest of its middle never leaves this machine.
                    if self.connection and self.connection.version == 2 and not self.connection.busy:
                        limit = LOG_PIECE_BYTES if job.output.end > LOG_HEAD_BYTES else LOG_HEAD_BYTES
                        self._send_log(job, limit)

    def _drain(self) -> None:
        """First signal: take no new job, finish what runs. Second: leave at once; the containers run on."""
        if self.draining:
            running = [job.container for job in self.jobs.values() if job.state == "running"]
            if running:
                log.warning("leaving; these containers run on and are found again: %s", ", ".join(running))
            logging.shutdown()
            os._exit(bool(running))
        self.draining = True
        for job in [job for job in self.jobs.values() if job.state == "assigned"]:
            del self.jobs[job.key]
        if self.jobs:
            log.info("finishing %d jobs; a second signal leaves them running and ends at once", len(self.jobs))
        if self.connection and self.connection.version == 2:
            self._say_hello()
        self._leave_if_drained()

    def _leave_if_drained(self) -> None:
        if self.draining and not self.jobs:
            self.done.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


# Starting up


def explain(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        body = (error.response.body or b"").decode(errors="replace").strip()
        return f"HTTP {error.response.status_code} {body[:300]}"
    return str(error) or type(error).__name__


def hold_name(name: str | None) -> tuple[str, int]:
    """Give a name that no other worker on this host has, and the file descriptor whose lock holds it.

    By default the host's name with the lowest free number, so that a worker that starts again is itself again.
    Raises FatalError where the given name is in use.
    """
    folder = Path(tempfile.gettempdir()) / f"jobworker-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    host = socket.gethostname()
    for candidate in [name] if name else (f"{host}-{number}" for number in range(1, 10_000)):
        file = os.open(folder / f"{quote(candidate, safe='')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return candidate, file
    raise FatalError(f"a worker named {name} runs on this host already; give each a --name of its own")


def destination(text: str) -> str:
    """Give the URL of `host:port/path`, as the original takes it, or of a ws:// or wss:// URL."""
    url = text if re.match("wss?://", text) else f"ws://{text}"
    try:
        parts = urlsplit(url)
        valid = parts.hostname and parts.path.startswith("/") and (parts.port or 1) > 0 and not re.search(r"\s", url)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT/PATH, as localhost:8080/runner, or a ws:// URL")
    return url


def slots(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots from 1 to 9999")
    return int(text)


def worker_name(text: str) -> str:
    if not (1 <= len(text) <= 128 and text.isprintable()):
        raise argparse.ArgumentTypeError("a name has 1 to 128 printable characters")
    return text


def worker_token(path: Path | None) -> str | None:
    """Give the first token for workers in the token file, if there is one. Raises OptionError where it has none."""
    if path is None:
        return None
    for *scope, token in read_tokens(path):
        if scope in ([], ["worker"]):
            return token
    raise OptionError(f"{path}: no line is 'worker TOKEN' or 'TOKEN'")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line("A jobworker worker.", VERSION)
    parser.add_argument("uri", metavar="DESTINATION", type=destination, help="localhost:8080/runner, or a wss:// URL")
    parser.add_argument("--name", type=worker_name, default=setting("NAME"), help="the host's name and a number")
    parser.add_argument("--slots", type=slots, default=setting("SLOTS", "1"), help="how many jobs at once (1)")
    parser.add_argument("--tag", dest="tags", action="append", default=None, help="take jobs with this tag, too")
    parser.add_argument("--token-file", type=Path, default=setting("TOKEN_FILE"), help="the token the server asks for")
    parser.add_argument("--docker", default=setting("DOCKER", "docker"), help="the command (docker)")
    parser.add_argument("--allow-image", action="append", metavar="GLOB", help="run only images like this")
    options = parser.parse_args(arguments)
    options.tags = options.tags or settings("TAGS")
    options.allow_image = options.allow_image or settings("ALLOW_IMAGE")
    return options


def main() -> int:
    options = parse_options()
    start_logging(options.verbose)
    try:
        options.token = worker_token(options.token_file)
        if shutil.which(options.docker) is None:
            raise FatalError(f"there is no command {options.docker!r}: install Docker, or name another with --docker")
        name, _lock = hold_name(options.name)
    except (FatalError, OptionError) as error:
        log.critical("%s", error)
        return 2
    try:
        return asyncio.run(Worker(options, name).run())
    except FatalError as error:
        log.critical("%s", error)
    except Exception as error:
        log.critical("internal error", exc_info=error)
    return 1  # what runs in a container runs on and is found again


if __name__ == "__main__":
    sys.exit(main())

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16,<18"]
# ///
