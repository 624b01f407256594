"""The worker: connects to a server, runs its jobs with `docker run`, and reports how they end.

Everything happens on the event loop, but for `subprocess.run(["docker", "run", …])`, which blocks a thread for each
slot; what the container writes comes through a pipe that the loop reads.

    Worker    the attempts that this worker holds, its slots, its configurations; keeps connected
    Session   one connection with a server: frames in, batches out
    Attempt   one attempt of a job, from Enqueue to Settled, along TRANSITIONS; its container is a Life
    World     how all of these reach the network, the engine, the clock and chance

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
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

import protocol
from jobworker import VERSION
from jobworker.cleaner import Cleaner, Ender
from jobworker.container import Answer, Engine, EngineAway, NotStarted, PastDeadline, name_for, option, read_clocks
from jobworker.dialling import Complaints, Socket, destination, explain, limit_unsent
from jobworker.ends import how_long, why
from jobworker.identity import hold_name
from jobworker.life import End, Life
from jobworker.options import (
    OptionError,
    command_line,
    end_at_once,
    image_globs,
    quiet_logger,
    raise_limit_of_files,
    setting,
    settings,
    slot_count,
    start_logging,
    tag,
    worker_name,
    worker_token,
)
from jobworker.output import LOG_BUFFER_BYTES, LOG_FLUSH_SECONDS, LOG_HEAD_BYTES, LOG_PIECE_BYTES, Output, pipe
from jobworker.processes import end_commands
from protocol import (
    Enqueue,
    Go,
    Hello,
    JobFailure,
    JobRunning,
    JobSuccess,
    Logged,
    Settled,
    Stop,
)

# The states of an attempt, by event; only Attempt._move changes one. `unwanted`: the server let go of it while it ran.
TRANSITIONS = {
    ("assigned", "ask"): "asked",
    ("assigned", "start"): "running",
    ("assigned", "let go"): "settled",
    ("asked", "start"): "running",
    ("asked", "let go"): "settled",
    ("running", "end"): "finished",
    ("running", "let go"): "unwanted",
    ("unwanted", "let go"): "unwanted",
    ("finished", "let go"): "settled",
    ("unwanted", "end"): "settled",
}

MAX_FRAME_BYTES = 16 * 1024 * 1024
BACKOFF_FLOOR_SECONDS = 0.25
BACKOFF_CEILING_SECONDS = 3.0
STEADY_SECONDS = 5
SWEEP_SECONDS = 30
KILL_SECONDS = 5
MAX_THREADS = 20_000

Result = JobSuccess | JobFailure
OnEnd = Callable[["Attempt"], None]

EXAMPLE = """\
  %(command)s localhost:8080
  %(command)s --slots 4 --tag gpu --token-file token wss://jobs.example.org/runner
"""

log = logging.getLogger("worker")


class FatalError(Exception):
    """The worker can't go on, and trying again would not help. The message says why and what to do."""


@dataclass(frozen=True)
class World:
    """What the worker needs from outside. All else is decided here, and timed by the event loop alone.

    end_commands: kills those of the engine's commands that have all words of one of these.
    """

    dial: Callable[[], contextlib.AbstractAsyncContextManager[Socket]]
    engine: Engine
    end_commands: Callable[[list[set[str]]], Awaitable[None]]
    chance: random.Random


class Session:
    """One connection with a server: what is sent goes out in order, a batch at a time."""

    def __init__(self, socket_: Socket) -> None:
        self._socket = socket_
        self.version = 2 if socket_.subprotocol == protocol.VERSION_2 else 1
        headers = socket_.response.headers if socket_.response else {}
        self.server_id: str | None = headers.get(protocol.SERVER_HEADER)
        self.knows_readings = protocol.READINGS_HEADER in headers
        self.greeted = False
        self._outbox: deque[protocol.FromWorker] = deque()
        self._filled = asyncio.Event()

    @property
    def busy(self) -> bool:
        return len(self._outbox) > 0

    def send(self, message: protocol.FromWorker) -> None:
        self._outbox.append(message)
        self._filled.set()

    async def run(self, receive: Callable[[protocol.FromServer], None]) -> None:
        """Write what is sent, and hand over each message that comes, until the connection ends."""
        writing = asyncio.ensure_future(self._write())
        try:
            async for data in self._socket:
                for message in protocol.decode_from_server(data, self.version):
                    receive(message)
        except protocol.ProtocolError as error:
            log.error("the server sent what can't be read: %s", error)
            await self._socket.close(1007, str(error)[:100])
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._outbox:
                await self._socket.send(self._next_frame())

    def _next_frame(self) -> bytes:
        if self.version == 1:
            return protocol.encode(self._outbox.popleft())
        batch: list[protocol.FromWorker] = []
        size = 0
        while self._outbox and size < protocol.BATCH_BYTES:
            if isinstance(self._outbox[0], Hello) and batch:  # a Hello has a frame of its own
                break
            message = self._outbox.popleft()
            if isinstance(message, Hello):
                return protocol.encode(message)
            size += 100 + (len(message.data) if isinstance(message, protocol.Log) else 0)
            batch.append(message)
        return protocol.encode_batch(batch)


class Attempt:
    """One attempt of a job, from Enqueue to Settled: its states, and what the server is told of it."""

    def __init__(self, life: Life, key: tuple[int, int], environment: dict[str, str]) -> None:
        self.key, self.environment = key, environment
        self.job, self.attempt = key
        self.state = "assigned"
        self.life = life
        self.result: Result | None = None
        self._reported_on: Session | None = None
        self._told: tuple[Session | None, str] = (None, "")  # of which pull, on which connection
        self._task: asyncio.Task[None] | None = None

    @property
    def title(self) -> str:
        return f"job {self.job} ({self.life.name})" if self.life.name else f"job {self.job}"

    def _move(self, event: str) -> None:
        self.state = TRANSITIONS[self.state, event]

    def ask(self) -> None:
        self._move("ask")

    def run(self, labels: dict[str, str], globs: list[str], version: int, on_end: OnEnd) -> None:
        """Start its container. globs: the images that this worker runs; none: all. on_end: called with the result."""
        job, attempt = map(str, self.key)
        name = self.life.name
        labels = {**labels, "jobworker.job": job, "jobworker.attempt": attempt, "jobworker.name": name}
        own = {"JOBWORKER_JOB_ID": job, "JOBWORKER_JOB_NAME": name, "JOBWORKER_ATTEMPT": attempt}
        self._start(self.life.run(labels, self.environment | own, globs, version), on_end)

    def adopt(self, on_end: OnEnd) -> None:
        """Go on with a container that a former life of this worker has left."""
        self._start(self.life.adopt(), on_end)

    def _start(self, life: Coroutine[Any, Any, End], on_end: OnEnd) -> None:
        self._move("start")
        self._task = asyncio.ensure_future(self._live(life, on_end))

    async def _live(self, life: Coroutine[Any, Any, End], on_end: OnEnd) -> None:
        try:
            end = await life
        except (EngineAway, OSError) as error:  # also: more arguments than the system takes
            end = self.life.failure("docker", str(error))
        except Exception as error:
            log.error("%s: internal error", self.title, exc_info=error)
            end = End(None, "worker")
        self.end(JobFailure(*self.key, end.code, end.reason) if end.reason else JobSuccess(*self.key))
        on_end(self)

    def end(self, result: Result) -> None:
        self._move("end")
        self.result = result
        self.life.leave()

    def result_in_words(self) -> str:
        after = f" after {how_long(self.life.seconds)}" if self.life.seconds else ""
        match self.result:
            case JobFailure(_, _, exit_code, reason):
                return f"was cancelled{after}" if reason == "cancelled" else f"failed{after}: {why(exit_code, reason)}"
        return f"succeeded{after}"

    def stop(self, reason: str) -> None:
        self.life.stop(reason, at_once=self.state == "running")

    def let_go(self) -> None:
        """The server has the result, or does not want it."""
        self._move("let go")
        self.life.leave()

    def disown(self) -> None:
        """Let it run to its end, of which nobody is told."""
        self._move("let go")

    def on_tick(self, session: Session | None, room: int) -> int:
        """End it where its time is over; tell the server what is new of it. Returns what is left of `room` for logs."""
        self.life.stop_if_too_old()
        if session is None or session.version == 1 or room <= 0:
            return room
        self.tell_pull(session)
        # A flood is thinned out here: the rest of its middle never leaves this machine.
        limit = LOG_PIECE_BYTES if self.life.output.end > LOG_HEAD_BYTES else LOG_HEAD_BYTES
        return room - self.send_log(session, min(limit, room))

    def agrees(self, session: Session) -> bool:
        """Whether the server means this reading of the log, when it speaks of an offset."""
        return not session.knows_readings or self.life.output.in_force

    def tell_pull(self, session: Session) -> None:
        """Say what is being pulled, or that nothing is any more: it may take minutes before there is any log."""
        told_on, image = self._told
        if self.life.pulling != image or (image and told_on is not session):
            self._told = session, self.life.pulling
            session.send(protocol.Pulling(*self.key, self.life.pulling))

    def send_log(self, session: Session, limit: int) -> int:
        if not self.agrees(session):
            if number := self.life.output.to_announce():
                session.send(protocol.ReadAgain(*self.key, number))
            return 0
        pieces = list(self.life.output.unsent(limit))
        for offset, data in pieces:
            session.send(protocol.Log(*self.key, offset, data))
        return sum(len(data) for _offset, data in pieces)

    def report(self, session: Session) -> None:
        """Send the rest of the log, then the result, once a connection."""
        if self.result is None or self._reported_on is session:
            return
        self._reported_on = session
        if session.version == 1:
            session.send(replace(self.result, attempt=0))
            return
        self.send_log(session, LOG_BUFFER_BYTES)
        if not self.agrees(session):
            self._reported_on = None  # once the server has begun this reading
            return
        session.send(self.result)


class Worker:
    """Holds attempts, from Enqueue to Settled, over any number of sessions."""

    def __init__(self, options: argparse.Namespace, name: str, world: World) -> None:
        self.options, self.name, self.world = options, name, world
        self.engine = world.engine
        self.cleaner, self.ender = Cleaner(self.engine), Ender(world.end_commands, self._leave_if_drained)
        self.complaints = Complaints(options.uri)
        self.held: dict[tuple[int, int], Attempt] = {}
        self.living: dict[Attempt, None] = {}  # whose life goes on, held or let go, in the order of their starts
        self.configs: dict[str, dict[str, Any]] = {}  # the attempts' lives have this very dict
        self.server_id: str | None = None
        self.session: Session | None = None
        self.draining = False
        self._done = asyncio.Event()
        # Of attempts that version 1 does not number; not from 1 on, as a worker beside this one does the same.
        self._numbers = itertools.count(world.chance.randrange(1, 2**30))

    async def run(self) -> None:
        """Serve until drained. Raises FatalError."""
        parts = (self._done.wait(), self._keep_connected(), self._tick(), self._sweep())
        work = [asyncio.ensure_future(part) for part in parts]
        finished, going_on = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        for task in going_on:
            task.cancel()
        await asyncio.gather(*going_on, return_exceptions=True)
        try:
            for task in finished:
                task.result()
        finally:
            await self.cleaner.remove_all()

    # The connection

    async def _keep_connected(self) -> None:
        clock = asyncio.get_running_loop().time
        delay = BACKOFF_FLOOR_SECONDS
        while True:
            began = clock()
            error: Exception | None = None
            try:
                greeted = await self._connect_once()
            except (OSError, WebSocketException) as caught:
                greeted, error = False, caught
            if isinstance(error, InvalidStatus) and error.response.status_code == HTTPStatus.UNAUTHORIZED:
                raise FatalError(explain(error, self.options.uri)) from error
            if greeted:
                log.info("disconnected")
            elif complaint := self.complaints.about(error, clock()):
                log.warning("%s", complaint)
            if clock() - began > STEADY_SECONDS:
                delay = BACKOFF_FLOOR_SECONDS
            # Never at once: a server that accepts and then closes would be dialled thousands of times a second.
            await asyncio.sleep(delay * self.world.chance.uniform(1, 1.5))
            delay = min(delay * 2, BACKOFF_CEILING_SECONDS)

    async def _connect_once(self) -> bool:
        """Serve one connection to its end; whether the server said something."""
        async with self.world.dial() as socket_:
            session = Session(socket_)
            await self._meet_server(session)
            try:
                await session.run(self._receive)
            except ConnectionClosed as error:
                self._explain_close(error)
            finally:
                self.session = None
                if session.version == 1:
                    self._leave_behind()
        return session.greeted

    def _explain_close(self, error: ConnectionClosed) -> None:
        if error.rcvd and error.rcvd.code == protocol.CLOSE_REPLACED:
            raise FatalError(f"another worker named {self.name} connected; give each a --name of its own")
        if error.rcvd and error.rcvd.reason:
            log.warning("the server closed the connection: %s", error.rcvd.reason)

    async def _meet_server(self, session: Session) -> None:
        server_id = session.server_id or f"version-1-{self.options.uri}"
        is_another = server_id != self.server_id
        if is_another:
            for attempt in list(self.held.values()):
                log.warning("%s: another server is there now; letting it go", attempt.title)
                self._let_go(attempt)
            self.server_id = None  # until all its containers are held: what nobody knows is swept away
            await self._recover(session.version, server_id)
            self.server_id = server_id
        self.session = session
        if session.version == 2:
            self._say_hello(session)
        for attempt in list(self.held.values()):
            attempt.life.output.resend()
            if session.version == 1:  # it says no Logged
                self._go_on(attempt, 0)

    def _leave_behind(self) -> None:
        """What runs goes on to its end, of which nobody is told: a version 1 server may give its id to another job."""
        for attempt in list(self.held.values()):
            if attempt.state in ("running", "unwanted"):
                attempt.disown()
            else:
                self._let_go(attempt)

    def _say_hello(self, session: Session) -> None:
        held = [(*key, {"asked": "assigned"}.get(attempt.state, attempt.state)) for key, attempt in self.held.items()]
        slots = 0 if self.draining else self.options.slots
        session.send(Hello(self.name, slots, tuple(self.options.tags), VERSION, tuple(held)))

    def _receive(self, message: protocol.FromServer) -> None:
        match message:
            case protocol.JobConfigs(configs):
                self._on_configs(configs)
            case Enqueue():
                self._on_enqueue(message)
            case _:
                if attempt := self.held.get((message.job, message.attempt)):
                    self._on_order(attempt, message)

    def _on_configs(self, configs: Any) -> None:
        if self.session and not self.session.greeted:
            self.session.greeted = True
            self.complaints.reached()
            slots = "draining" if self.draining else f"{self.options.slots} slots"
            log.info("connected to %s as %s, %s", self.options.uri, self.name, slots)
        self.configs.clear()
        # Of two with one name, which a version 1 server may have, the first counts.
        self.configs.update({config["name"]: config for config in reversed(configs)})

    def _on_enqueue(self, message: Enqueue) -> None:
        number = message.attempt or next(self._numbers)  # version 1 has none, and its ids may come again
        if self.draining or (message.job, number) in self.held:
            return
        if self.session and self.session.version == 1 and message.name not in self.configs:
            log.info("job %s failed: the server sent no configuration for %s", message.job, message.name)
            self.session.send(JobFailure(message.job))
            return
        container = name_for(self.server_id or "", message.job, number)
        self._hold((message.job, number), message.name, container, message.environment or {})
        self._ask()

    def _on_order(self, attempt: Attempt, message: Go | Stop | Settled | Logged | protocol.Reading) -> None:
        match message:
            case Go():
                if attempt.state in ("assigned", "asked"):
                    self._start(attempt)
            case Stop():
                attempt.stop("cancelled")
            case Settled():
                self._let_go(attempt)
            case protocol.Reading():
                attempt.life.output.server_has(message.number)
            case Logged():
                self._go_on(attempt, message.offset)

    # The attempts

    def _hold(
        self, key: tuple[int, int], name: str, container: str, environment: dict[str, str], reading: int | None = 0
    ) -> Attempt:
        life = Life(self.engine, self.configs, name, container, Output(reading))
        self.held[key] = attempt = Attempt(life, key, environment)
        return attempt

    def _ask(self) -> None:
        """Ask whether the next jobs may start, while there are slots; a version 1 server is only told."""
        busy = sum(attempt.state in ("asked", "running", "unwanted") for attempt in self.held.values())
        for attempt in list(self.held.values()):
            if busy >= self.options.slots:
                return
            if attempt.state == "assigned":
                busy += 1
                attempt.ask()
                self._announce(attempt)

    def _announce(self, attempt: Attempt) -> None:
        if self.session and self.session.version == 2:
            self.session.send(JobRunning(*attempt.key))
        elif self.session:
            self.session.send(JobRunning(attempt.job))
            self._start(attempt)

    def _start(self, attempt: Attempt) -> None:
        version = self.session.version if self.session else 2
        log.info("%s starts, as %s", attempt.title, attempt.life.container)
        self.living[attempt] = None
        attempt.run(self._labels(self.server_id), self.options.allow_image, version, self._on_end)

    def _go_on(self, attempt: Attempt, offset: int) -> None:
        """The server has an attempt's log up to an offset; after a new connection, it also waits for the rest of it."""
        if self.session and attempt.agrees(self.session):
            attempt.life.output.kept(offset)
        if attempt.state == "asked":
            self._announce(attempt)
        else:
            self._report(attempt)

    def _report(self, attempt: Attempt) -> None:
        if attempt.result and self.session:
            attempt.report(self.session)
            if self.session.version == 1:  # it says no Settled
                self._let_go(attempt)

    def _on_end(self, attempt: Attempt) -> None:
        self.living.pop(attempt, None)
        if attempt.state == "settled":  # let go while it ran
            self.cleaner.add(attempt.life.container)
            if self.held.get(attempt.key) is attempt:
                del self.held[attempt.key]
                self._ask()
                self._leave_if_drained()
            return
        log.info("%s %s", attempt.title, attempt.result_in_words())
        self._report(attempt)
        self._ask()

    def _let_go(self, attempt: Attempt) -> None:
        """The server has the result, or does not want it: whatever is left of the attempt goes."""
        if attempt.state == "running":
            log.info("%s is not wanted any more: stopping it", attempt.title)
        del self.held[attempt.key]
        attempt.let_go()
        self.cleaner.add(attempt.life.container)
        if attempt in self.living:  # its container may be about to start, where nobody would look for it any more
            self.ender.keep_ending(attempt.life.container, lambda: attempt in self.living)
        self._ask()
        self._leave_if_drained()

    def _labels(self, server_id: str | None) -> dict[str, str]:
        return {"jobworker.server": str(server_id), "jobworker.worker": self.name}

    async def _recover(self, version: int, server_id: str) -> None:
        """Find this worker's containers of this server: adopt what runs, report what ended, remove the rest."""
        labels = self._labels(server_id)
        # Before a `docker run` of an earlier life starts one more container.
        await self.world.end_commands([{"run", *option("--label", labels)}])
        found = await self.engine.containers(labels)
        created = [each.container for each in found if each.state == "created"]
        never_start = await asyncio.gather(*map(self.engine.remove_if_never_started, created))
        gone = {container for container, never in zip(created, never_start, strict=True) if never}
        for job, number, state, container, name in found:
            if version == 1:
                for each in await self.engine.remove([container]):
                    self.cleaner.add(each)
                continue
            if container in gone or (job, number) in self.held:
                continue
            attempt = self._hold((job, number), name, container, {}, reading=None)
            log.info("%s: found its container, %s", attempt.title, state)
            self.living[attempt] = None
            attempt.adopt(self._on_end)

    # Clock and signals

    async def _tick(self) -> None:
        """Send what jobs wrote, end those whose time is over, and remove what is settled."""
        while True:
            await asyncio.sleep(LOG_FLUSH_SECONDS)
            self.cleaner.start(idle=not self.held)
            room = 0 if self.session and self.session.busy else LOG_HEAD_BYTES
            running = [attempt for attempt in self.held.values() if attempt.state == "running"]
            for attempt in sorted(running, key=lambda each: each.life.output.end):  # who wrote least waits for nobody
                room = attempt.on_tick(self.session, room)

    async def _sweep(self) -> None:
        """Now and then, remove containers that nobody knows, and end commands that hang though theirs has ended."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            server_id = self.server_id
            found = await self.engine.containers(self._labels(server_id)) if server_id else []
            if server_id is None or server_id != self.server_id:
                continue
            for each in found:
                if (each.job, each.attempt) not in self.held:
                    self.cleaner.add(each.container)
            states = {each.container: each.state for each in found}
            if hanging := [each for each in self.living if each.life.hangs(states.get(each.life.container))]:
                titles = ", ".join(each.title for each in hanging)
                log.warning("%s: the container has ended, but its docker command has not: ending it", titles)
                await self.ender.end(each.life.container for each in hanging)

    def running_containers(self) -> list[str]:
        return [attempt.life.container for attempt in self.held.values() if attempt.state in ("running", "unwanted")]

    def drain(self) -> None:
        """Take no new job, finish what runs, then leave."""
        self.draining = True
        for attempt in [attempt for attempt in self.held.values() if attempt.state == "assigned"]:
            del self.held[attempt.key]
        if self.held:
            running = f"finishing {len(self.held)}; a second signal leaves what runs running, and ends at once"
            log.info("draining: taking no new job, %s", running)
        else:
            log.info("stopping")
        if self.session and self.session.version == 2:
            self._say_hello(self.session)
        self._leave_if_drained()

    def _leave_if_drained(self) -> None:
        if self.draining and not (self.held or self.ender.busy):
            self._done.set()


# The real world


class DockerCommand:
    """Runs the docker command: `docker run` in a thread, which it blocks until the container has ended, others not."""

    def __init__(self, command: str) -> None:
        self._docker = command
        self._environment = dict(os.environb)
        self._threads = ThreadPoolExecutor(MAX_THREADS, "run")  # one that hangs takes no other's place

    async def __call__(
        self,
        words: list[str],
        stdin: str = "",
        environment: dict[str, str] | None = None,
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        try:
            async with asyncio.timeout(deadline):
                if output is None:
                    return await self._talk(words, subprocess.PIPE)
                writing, drain = pipe(output)
                try:
                    if words[0] != "run":
                        return await self._talk(words, writing)
                    return await self._run_in_thread(words, stdin, environment or {}, writing)
                finally:
                    drain()
        except TimeoutError as error:
            raise PastDeadline(f"docker {words[0]} took more than {deadline:.0f} s") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
            raise NotStarted(*error.args) from error

    async def _run_in_thread(self, words: list[str], stdin: str, environment: dict[str, str], writing: int) -> Answer:
        abandoned = threading.Event()
        try:
            waiting = self._threads.submit(self._run, words, stdin, environment, writing, abandoned)
        except RuntimeError:  # no new thread, but one that is busy may come to it later
            abandoned.set()
            raise
        return Answer(await asyncio.wrap_future(waiting))

    def _run(
        self, words: list[str], stdin: str, environment: dict[str, str], writing: int, abandoned: threading.Event
    ) -> int:
        try:
            if abandoned.is_set():
                return -1
            # A group of its own: Ctrl-C is for the worker, which decides what becomes of the container.
            return subprocess.run(
                [self._docker, *words],
                **({"input": stdin.encode()} if stdin else {"stdin": subprocess.DEVNULL}),
                stdout=writing,
                stderr=writing,
                env=self._environment | {os.fsencode(key): os.fsencode(text) for key, text in environment.items()},
                process_group=0,
                check=False,
            ).returncode
        finally:
            os.close(writing)

    async def _talk(self, words: list[str], writing: int) -> Answer:
        """Run a command on the loop, its output to a file descriptor; where the wait is cancelled, it is killed."""
        try:
            process = await asyncio.create_subprocess_exec(
                self._docker, *words, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, process_group=0
            )
        finally:
            if writing != subprocess.PIPE:
                os.close(writing)
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError, TimeoutError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started, which may hold its output open
                    async with asyncio.timeout(KILL_SECONDS):
                        await process.communicate()
        return Answer(
            process.returncode or 0, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
        )


def real_world(options: argparse.Namespace) -> World:
    @contextlib.asynccontextmanager
    async def dial() -> AsyncIterator[ClientConnection]:
        connecting = connect(
            options.uri,
            subprotocols=[Subprotocol(protocol.VERSION_2)],
            additional_headers={"Authorization": f"Bearer {options.token}"} if options.token else None,
            user_agent_header=f"jobworker/{VERSION}",
            proxy=None,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            ping_interval=protocol.PING_SECONDS,
            ping_timeout=protocol.PONG_SECONDS,
            close_timeout=2,
            logger=quiet_logger(),
        )
        try:
            connection = await connecting
        except (OSError, WebSocketException):
            raise
        except Exception as error:  # it leads elsewhere, to what is no address
            raise WebSocketException(f"its answer can't be followed: {error}") from error
        async with connection:
            limit_unsent(connection.transport.get_extra_info("socket"))
            yield connection

    async def end(commands: list[set[str]]) -> None:
        try:
            await asyncio.to_thread(end_commands, commands)
        except (OSError, RuntimeError) as error:  # no more files, no more threads
            raise NotStarted(*error.args) from error

    return World(dial, Engine(DockerCommand(options.docker), read_clocks()), end, random.Random())


async def work(options: argparse.Namespace, name: str) -> int:
    """Serve until drained; the exit code."""
    worker = Worker(options, name, real_world(options))

    def on_signal() -> None:
        """First signal: take no new job, finish what runs. Second: leave at once; the containers run on."""
        if not worker.draining:
            worker.drain()
            return
        if running := worker.running_containers():
            log.warning("leaving; these containers run on and are found again: %s", ", ".join(running))
        end_at_once(bool(running))

    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup; else it is of a terminal that closes
    for number in (signal.SIGTERM, signal.SIGINT, *(() if is_ignored else (signal.SIGHUP,))):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    await worker.run()
    return 0


# Starting up


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line("A jobworker worker.", VERSION, EXAMPLE)
    add = parser.add_argument
    add("uri", metavar="DESTINATION", type=destination, help="the server: HOST:PORT or a URL")
    add("--name", type=worker_name, default=setting("NAME"), help="who it is (HOST-1, HOST-2, ...)")
    add("--slots", metavar="N", type=slot_count, default=setting("SLOTS", "1"), help="how many jobs at once (1)")
    add("--tag", metavar="TAG", dest="tags", type=tag, action="append", help="take jobs with this tag, too; repeatable")
    add("--token-file", metavar="FILE", type=Path, default=setting("TOKEN_FILE"), help="the token the server asks for")
    add("--docker", metavar="COMMAND", default=setting("DOCKER", "docker"), help="what runs containers (docker)")
    add("--allow-image", metavar="GLOB", action="append", help="run only images like this; repeatable")
    options = parser.parse_args(arguments)
    options.tags = options.tags or settings("TAGS")
    options.allow_image = options.allow_image or image_globs(parser)
    return options


def main() -> NoReturn:
    options = parse_options()
    start_logging(options.verbose)
    try:
        options.token = worker_token(options.token_file)
        if shutil.which(options.docker) is None:
            raise FatalError(f"there is no command {options.docker!r}: install Docker, or name another with --docker")
        name, _lock = hold_name(options.name)
        raise_limit_of_files()
    except (FatalError, OptionError) as error:
        log.critical("%s", error)
        end_at_once(2)
    exit_code = 1  # what runs in a container runs on and is found again
    try:
        exit_code = asyncio.run(work(options, name))
    except FatalError as error:
        log.critical("%s", error)
    except Exception as error:
        log.critical("internal error", exc_info=error)
    end_at_once(exit_code)  # a thread may still wait for its `docker run`


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=16,<18"]
# ///
