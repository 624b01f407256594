"""The parts of a played world: links, engines, a disk, a server's life and a worker's, in virtual time.

Used by simulate.py, which says what happens to them and counts the promises.
"""

import argparse
import asyncio
import contextlib
import contextvars
import hashlib
import json
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from virtual import Broken, Life, VirtualLoop
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close

import client
import protocol
import server
from jobworker import state
from jobworker.config import Configs, JobConfig, Parameter
from jobworker.container import Answer, Clocks, NotStarted, PastDeadline, option
from jobworker.container import Engine as EngineOfWorker
from jobworker.output import LOG_PIECE_BYTES
from jobworker.store import Store, StoreError

EPOCH = 1_790_000_000.0
GRACE_SECONDS = 8.0
PING_SECONDS = 29.0  # until a silent link is noticed
AGAIN_SECONDS = 4.0  # until a worker that says all twice has said it again
RAM = "/dev/shm" if Path("/dev/shm").is_dir() else None
IN_FILE = 25  # a history in so many has its database in a file, as servers have it; the others have it in memory
KEEP_SECONDS = 20.0  # how long ended jobs stay, in a history in so many; there nobody sets the clock, which ends that
PRUNED = 5
COMMIT_SECONDS, SLOW_COMMIT_SECONDS = 0.05, 1.0  # at most, from the first request to the commit
SLACK_SECONDS = 0.01
BACKOFF_SECONDS = 0.25  # between the connections of a worker
LOUD = 60  # a container in so many writes more than is kept
FINAL = {"success", "failure", "cancelled"}
HELLO = protocol.encode(protocol.Hello("", 0, (), "", ()))[0]
LABEL_OF_JOB, LABEL_OF_ATTEMPT = "jobworker.job", "jobworker.attempt"

PLAN = {"PLAN": Parameter(required=True)}
JOBS = {
    "plain": JobConfig("plain", "busybox", "true", parameters=PLAN, on_success="told"),
    "again": JobConfig("again", "busybox", "true", retries=2, retry_delay=0.5, parameters=PLAN, on_failure="told"),
    "told": JobConfig("told", "busybox", "true"),
    "each-minute": JobConfig("each-minute", "busybox", "true", schedule=("* * * * *",)),
    "alone": JobConfig("alone", "busybox", "true", concurrency=1, retries=1, retry_delay=0.5, parameters=PLAN),
    "short": JobConfig("short", "busybox", "true", timeout=3.0, parameters=PLAN, stop_grace_period=1),
    "leaves": JobConfig("leaves", "busybox", "true", parameters=PLAN),
    "tagged": JobConfig("tagged", "busybox", "true", tags=("big",), parameters=PLAN),
    "foreign": JobConfig("foreign", "alpine", "true", parameters=PLAN),
    "endless": JobConfig("endless", "busybox", "true", parameters=PLAN),  # which only a DELETE ends
    "old": JobConfig("old", "busybox", "true"),  # which a worker of version 1 can take
}


# Links


class End:
    """One end of a link: as much of a WebSocket connection as server.py and client.py use."""

    remote_address = ("192.0.2.1", 5)

    def __init__(self, link: "Link") -> None:
        self.link = link
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: link.unread)
        self.subprotocol = protocol.VERSION_2 if link.version == 2 else None
        self.peer: End
        self.inbox: deque[bytes] = deque()
        self.reader: asyncio.Future[None] | None = None
        self.end: ConnectionClosed | None = None
        self.arrives = 0.0
        self.says_twice = False
        self.response = SimpleNamespace(headers={protocol.SERVER_HEADER: link.server_id, protocol.READINGS_HEADER: "1"})

    @property
    def close_code(self) -> int:
        return self.end.rcvd.code if self.end and self.end.rcvd else 1006

    async def send(self, data: bytes, /) -> None:
        if self.end:
            raise self.end
        self.put(data)

    def put(self, data: bytes) -> None:
        """Send, as `broadcast` does: without waiting, nor an error for a connection that is gone."""
        if self.end is None and not self.link.silent:
            self.peer.at_arrival(self.peer.receive, data)
            if self.says_twice and data[0] != HELLO:  # which tells what is held now
                self.peer.at_arrival(self.peer.receive, data, latency=AGAIN_SECONDS)

    def at_arrival(self, action: Callable[..., None], *args: Any, latency: float | None = None) -> None:
        world = self.link.world
        self.arrives = max(self.arrives, world.now() + world.delay(latency or self.link.latency))
        world.loop.call_at(self.arrives, action, *args)

    def receive(self, data: bytes) -> None:
        if self.end is None and not self.link.silent:
            self.inbox.append(data)
            self.wake()

    def shut(self, end: ConnectionClosed) -> None:
        if self.end is None:
            self.end = end
            self.wake()

    def wake(self) -> None:
        if self.reader and not self.reader.done():
            self.reader.set_result(None)

    async def recv(self) -> bytes:
        while not self.inbox:
            if self.end:
                raise self.end
            self.reader = self.link.world.loop.create_future()
            await self.reader
        return self.inbox.popleft()

    def __aiter__(self) -> "End":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.recv()
        except ConnectionClosedOK:
            raise StopAsyncIteration from None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        frame = Close(int(code), reason)
        kind = ConnectionClosedOK if frame.code == 1000 else ConnectionClosedError
        if self.end is None and not self.link.silent:
            self.peer.at_arrival(self.peer.shut, kind(frame, frame, True))
        self.shut(kind(frame, frame, False))


class Link:
    """A connection between a worker and the server."""

    def __init__(self, world: "World", server_id: str, version: int) -> None:
        self.world, self.server_id, self.version, self.silent = world, server_id, version, False
        self.latency, self.unread = 0.02, 0
        self.near, self.far = End(self), End(self)
        self.near.peer, self.far.peer = self.far, self.near

    def cut(self) -> None:
        for end in (self.near, self.far):
            if self.world.chance.random() < 0.5:
                end.inbox.clear()
            end.shut(ConnectionClosedError(None, None))

    def go_silent(self) -> None:
        self.silent = True
        self.world.loop.call_later(PING_SECONDS, self.cut)


# The engine


@dataclass
class Container:
    """A container, and what it is going to do: plan has its seconds, exit code and lines."""

    name: str
    labels: dict[str, str]
    plan: dict[str, Any]
    state: str = "created"
    code: int = 0
    oom: bool = False
    output: bytearray = field(default_factory=bytearray)
    began: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass
class Start:
    """A line of an engine's ledger: a container that was started."""

    job: int
    attempt: int
    host: str
    began: float
    container: Container
    ended: float | None = None


def pass_on(container: Container, told: int, output: Callable[[bytes], None]) -> int:
    """Give what a container has written since; as much at once as is read from a pipe."""
    for at in range(told, len(container.output), LOG_PIECE_BYTES):
        output(bytes(container.output[at : at + LOG_PIECE_BYTES]))
    return len(container.output)


REFUSALS = (
    "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "permission denied while trying to connect to the Docker daemon socket",
    'Failed to initialize: unable to resolve docker endpoint: context "x": context not found',
    "Error response from daemon: unexpected EOF",
    "Error: timeout",
)


class Engine:
    """An engine with its command, as far as jobworker/container.py speaks with it."""

    def __init__(self, world: "World", host: str, tags: list[str], allowed: list[str]) -> None:
        self.world, self.host, self.tags, self.allowed = world, host, tags, allowed
        self.containers: dict[str, Container] = {}
        self.images = {"busybox"}
        self.trouble: str | None = None
        self.mended = asyncio.Event()
        self.busy: set[str] = set()
        self.mute: set[str] = set()  # which can't be inspected
        self.hanging: set[str] = set()  # whose `docker run` does nothing more until it is killed
        self.clients: dict[asyncio.Task[Answer], Container] = {}

    async def command(
        self,
        words: list[str],
        stdin: str = "",  # noqa: ARG002
        environment: dict[str, str] | None = None,
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """Run the engine's command; see jobworker.container.RunCommand."""
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        verb = "image" if words[0] == "image" else words[0]
        await asyncio.sleep(self.world.delay(0.05))
        if self.trouble and self.world.chance.random() < 0.8:
            await self._fail(verb, deadline)
            if self.trouble == "killed":
                return Answer(-9)
            if self.trouble == "refuses":
                text = self.world.chance.choice(REFUSALS)
                if verb == "run" and output:
                    output(text.encode() + b"\n")
                return Answer(125 if verb == "run" else 1, "", text)
        if verb == "run":
            return await self._attached(words, environment or {}, output or (lambda _data: None))
        try:
            async with asyncio.timeout(deadline):
                answer: Answer = await getattr(self, f"_{verb}")(words[1:], output)
                return answer
        except TimeoutError as error:
            raise PastDeadline(verb) from error

    def mend(self) -> None:
        self.trouble = None
        self.mended.set()
        self.mended = asyncio.Event()

    async def _fail(self, verb: str, deadline: float | None) -> None:
        self.world.count(f"engine {self.trouble}")
        if self.trouble == "does not start":
            raise NotStarted("EAGAIN")
        if self.trouble == "hangs" and verb != "run":
            try:
                await asyncio.wait_for(self.mended.wait(), deadline)
            except TimeoutError as error:
                raise PastDeadline(verb) from error

    async def _attached(self, words: list[str], variables: dict[str, str], output: Callable[[bytes], None]) -> Answer:
        """`docker run`: its process outlives who started it, so it is a task of the world's."""
        labels = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--label")
        name = words[words.index("--name") + 1]
        plan = json.loads(variables.get("PLAN", "{}"))
        container = Container(name, labels, plan)
        attached = self.world.spawn(self._run_client(container, words[words.index("--") + 1], output))
        self.clients[attached] = container
        attached.add_done_callback(lambda task: self.clients.pop(task, None))
        await asyncio.wait([attached])
        return Answer(-9) if attached.cancelled() else attached.result()

    async def _run_client(self, container: Container, image: str, output: Callable[[bytes], None]) -> Answer:
        name = container.labels["jobworker.name"]
        if not set(JOBS[name].tags) <= set(self.tags) or image not in (self.allowed or [image]):
            raise Broken(f"{self.host} runs {name} in {image}")
        if container.name in self.containers:
            output(b"Conflict. The container name is already in use.\n")
            return Answer(125)
        if image not in self.images:
            output(b"Unable to find image locally\n")
            return Answer(125)
        self.containers[container.name] = container
        await asyncio.sleep(self.world.delay(0.3))
        if self.containers.get(container.name) is not container:
            return Answer(125)
        self._start(container)
        told = 0
        while container.state == "running" or told < len(container.output):
            changed = container.changed
            told = pass_on(container, told, output)
            if container.state == "running":
                await changed.wait()
            if container.name in self.hanging:
                await asyncio.Event().wait()
        return Answer(container.code)

    def _start(self, container: Container) -> None:
        container.state, container.began = "running", self.world.now()
        job, attempt = int(container.labels[LABEL_OF_JOB]), int(container.labels[LABEL_OF_ATTEMPT])
        self.world.starts.append(Start(job, attempt, self.host, container.began, container))
        self.world.tell(f"{self.host}: {container.name} starts")
        self.world.spawn(self._live(container))

    async def _live(self, container: Container) -> None:
        plan = container.plan
        lines = plan.get("lines", 0)
        for number in range(lines):
            await asyncio.sleep(plan.get("seconds", 0) / lines)
            if container.state != "running":
                break
            container.output += f"{container.name} line {number}".encode().ljust(plan.get("width", 0), b".") + b"\n"
            container.change()
        else:
            await asyncio.sleep(0 if lines else plan.get("seconds", 0))
        if container.state == "running":
            self.end(container, plan.get("code", 0))

    def end(self, container: Container, code: int) -> None:
        if container.state == "running":
            container.state, container.code = "exited", code
            self.world.tell(f"{self.host}: {container.name} exits {code}")
            for line in self.world.starts:
                if line.container is container and line.ended is None:
                    line.ended = self.world.now()
            container.change()

    def end_commands(self, commands: list[set[str]]) -> None:
        for task, container in list(self.clients.items()):
            own = {"run", f"--name={container.name}", *option("--label", container.labels)}
            if any(words <= own for words in commands):
                task.cancel()

    def restart(self, kills: bool) -> None:
        for task in list(self.clients):
            task.cancel()
        for container in list(self.containers.values()):
            if kills:
                self.end(container, 137)

    async def _ps(self, words: list[str], _output: object) -> Answer:
        wanted = [words[at + 1].removeprefix("label=") for at, word in enumerate(words) if word == "--filter"]
        wanted += [word.split("=", 1)[1] for word in words if word.startswith("label=")]
        labels = dict(label.split("=", 1) for label in wanted)
        found = [each for each in self.containers.values() if labels.items() <= each.labels.items()]
        return Answer(0, "".join(f"{each.name} {each.name}\n" for each in found))

    def _state(self, container: Container) -> dict[str, Any]:
        began = self.world.moment(container.began) if container.state != "created" else "0001-01-01T00:00:00Z"
        return {
            "Status": container.state,
            "Running": container.state == "running",
            "ExitCode": container.code,
            "OOMKilled": container.oom,
            "StartedAt": began,
        }

    async def _inspect(self, words: list[str], _output: object) -> Answer:
        names = [word for at, word in enumerate(words) if word[0] != "-" and words[at - 1] != "--type"]
        while not self.mute.isdisjoint(names):
            self.world.count("engine hangs on one container")
            await asyncio.sleep(1)
        found = [self.containers[name] for name in names if name in self.containers]
        error = "".join(f"Error: No such container: {name}\n" for name in names if name not in self.containers)
        shown = [
            {"Id": each.name, "Name": f"/{each.name}", "State": self._state(each), "Config": {"Labels": each.labels}}
            for each in found
        ]
        return Answer(1 if error else 0, json.dumps(shown), error)

    async def _image(self, words: list[str], _output: object) -> Answer:
        here = words[-1] in self.images
        return Answer(0, "[{}]") if here else Answer(1, "[]", f"Error: No such image: {words[-1]}")

    async def _pull(self, words: list[str], _output: object) -> Answer:
        await asyncio.sleep(self.world.delay(2))
        self.images.add(words[-1])
        return Answer(0)

    async def _rm(self, words: list[str], _output: object) -> Answer:
        force, errors, gone = "--force" in words, [], []
        for name in [word for word in words if word[0] != "-"]:
            container = self.containers.get(name)
            if container is None:
                errors.append(f"Error: No such container: {name}")
            elif name in self.busy:
                errors.append(f"Error response from daemon: container {name}: driver failed: device or resource busy")
            elif container.state == "running" and not force:
                errors.append(f"Error response from daemon: cannot remove container {name}: container is running")
            else:
                self.end(container, 137)
                del self.containers[name]
                gone.append(name)
        return Answer(1 if errors else 0, "\n".join(gone), "\n".join(errors))

    async def _stop(self, words: list[str], _output: object) -> Answer:
        container = self.containers.get(words[-1])
        if container is None:
            return Answer(1, "", f"Error response from daemon: No such container: {words[-1]}")
        await asyncio.sleep(self.world.delay(1.0))
        self.end(container, 143)
        return Answer(0)

    async def _wait(self, words: list[str], _output: object) -> Answer:
        container = self.containers.get(words[-1])
        if container is None:
            return Answer(1, "", f"Error response from daemon: No such container: {words[-1]}")
        while container.state == "running":
            await container.changed.wait()
        return Answer(0, f"{container.code}\n")

    async def _logs(self, words: list[str], output: Callable[[bytes], None]) -> Answer:
        container = self.containers.get(words[-1])
        if container is None:
            return Answer(1, "", f"Error response from daemon: No such container: {words[-1]}")
        told, trouble = 0, self.trouble
        while True:
            changed = container.changed
            told = pass_on(container, told, output)
            if container.state != "running" and told == len(container.output):
                return Answer(0)
            if self.trouble and self.trouble != trouble:
                return Answer(1, "", "unexpected EOF")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 5)


# The server, and workers


class PlayedStore(Store):
    """The real store, without its thread: what waits is committed a moment later, if the disk lets it."""

    def __init__(self, world: "World", deliver: Callable[[Any], object]) -> None:
        self.world, self.dead, self.scheduled = world, False, False
        self.committed: list[state.Notes] = []  # and not looked at
        self.changes = 0
        with world.disk_in_place():
            super().__init__(world.path, deliver, world.chance)
        self.commit, self._database.commit = self._database.commit, self.commit_or_fail  # type: ignore[method-assign]

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        future = super().do(function, *args)
        self.schedule()
        return future

    def do_then(self, callback: Callable[[Any], None], function: Callable[..., Any], *args: Any) -> None:
        super().do_then(callback, function, *args)
        self.schedule()

    def schedule(self) -> None:
        if not self.scheduled and not self.dead:
            self.scheduled = True
            most = SLOW_COMMIT_SECONDS if self.world.disk == "tight" else COMMIT_SECONDS
            self.world.loop.call_later(self.world.delay(most), self.commit_what_waits)

    def commit_what_waits(self) -> None:
        self.scheduled = False
        if not self.dead:
            self.commit_waiting()
            committed, self.committed = self.committed, []
            if committed:
                self.world.look(self._database, committed)

    def commit_or_fail(self) -> state.Notes:
        changes, self.changes = self.changes, self._database.connection.total_changes
        if self.world.disk == "tight" and self.changes > changes and self.world.chance.random() < 0.5:
            raise self.failure("database or disk is full", sqlite3.SQLITE_FULL)  # for this one; the next may fit
        if self.world.disk not in (None, "tight") and self._database.notes.moved:
            disk, self.world.disk = self.world.disk, "full" if self.world.disk == "full" else None
            if disk == "full":
                raise self.failure("database or disk is full", sqlite3.SQLITE_FULL)
            if disk == "kept":
                self._database.execute("COMMIT")
                self.committed.append(self._database.notes)
            raise self.failure("disk I/O error", sqlite3.SQLITE_IOERR_FSYNC)
        notes = self.commit()
        self.committed.append(notes)
        return notes

    def failure(self, text: str, code: int) -> sqlite3.OperationalError:
        self.world.disk_failed_at = self.world.now()
        self.world.count(f"disk: {text}")
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        return error

    def kill(self) -> None:
        """What was committed stays, and nothing else."""
        self.dead = True
        self._database.rollback()
        if self.world.memory is None:
            self._database.connection.close()


def put(socket: Any, frame: bytes) -> None:
    socket.put(frame)


class PlayedServer:
    """A life of the server: from its start to its kill."""

    def __init__(self, world: "World") -> None:
        self.world, self.began = world, world.now()
        self.store = PlayedStore(world, self.deliver)
        outside = server.Outside(world.wall, world.loop.time, world.chance, put)
        options = argparse.Namespace(grace=GRACE_SECONDS, keep=world.keep)
        self.core = server.Core(self.store, world.configs(), options, outside)
        self.links: list[Link] = []
        self.ready = False
        self.life = Life()
        self.life.start(self.run())

    def deliver(self, commit: Any) -> None:
        self.world.loop.call_soon(self.on_commit, commit)

    def on_commit(self, commit: Any) -> None:
        if not self.store.dead:
            self.core.on_commit(commit)

    async def run(self) -> None:
        with contextlib.suppress(StoreError):  # it ends where its disk fails, also as it starts
            await self.core.start()
            self.ready = True
            await self.core.run()
        self.world.loop.call_soon(self.world.restart_server)

    def accept(self, version: int) -> Link:
        link = Link(self.world, self.store.server_id, version)
        self.links = [each for each in self.links if each.far.end is None] + [link]
        self.life.start(self.serve(link))
        return link

    async def serve(self, link: Link) -> None:
        """Serve a connection as `websockets` has it served: it is closed where that is over."""
        try:
            await self.core.dispatcher.serve(link.far)  # type: ignore[arg-type]
        finally:
            await link.far.close()

    def kill(self) -> None:
        self.store.kill()
        for link in self.links:
            link.cut()
        self.life.kill()


class Host:
    """A machine with an engine and a worker on it."""

    version = 2

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.name, self.slots = world, f"host-{number}", 1 + number
        self.tags, allowed = [["big"] if number == 1 else [], ["busybox"] if number == 0 else []]
        self.engine = Engine(world, self.name, self.tags, allowed)
        self.off_line = False
        self.left: tuple[Life | None, float] = None, 0.0  # its latest connection
        self.life: Life | None = None
        self.worker: client.Worker | None = None
        self.began = 0.0  # its latest life
        self.link: Link | None = None

    def start(self) -> None:
        if self.life is None or self.life.dead:
            self.life, self.began = Life(), self.world.now()
            self.life.start(self.run(self.life))

    async def run(self, life: Life) -> None:
        async def command(*args: Any, **keys: Any) -> Answer:
            if life.dead:
                await asyncio.Event().wait()
            return await self.engine.command(*args, **keys)

        async def end_commands(commands: list[set[str]]) -> None:
            self.engine.end_commands(commands)

        options = SimpleNamespace(uri="ws://server/runner", token=None, slots=self.slots, tags=self.tags)
        options.allow_image = self.engine.allowed
        engine = EngineOfWorker(command, Clocks(self.world.wall, self.world.now, "boot"))
        outside = client.World(self.dial, engine, end_commands, self.world.chance)
        self.worker = client.Worker(options, self.name, outside)  # type: ignore[arg-type]
        with contextlib.suppress(client.FatalError):
            await self.worker.run()
            self.world.count("drained")
            self.world.loop.call_later(1 + self.world.delay(14), self.start)
        life.dead = True  # it ended by itself

    @contextlib.asynccontextmanager
    async def dial(self) -> AsyncIterator[Any]:
        life, left = self.left
        if life is self.life and self.world.now() - left < BACKOFF_SECONDS:
            raise Broken(f"{self.name} dials again after {self.world.now() - left:.3f} s")
        try:
            await asyncio.sleep(self.world.delay(0.05))
            serving = self.world.server
            if self.off_line or serving is None or not serving.ready:
                raise OSError("refused")
            self.link = link = serving.accept(self.version)
            try:
                yield link.near
            finally:
                if not link.silent:
                    await link.near.close()
        finally:
            self.left = self.life, self.world.now()

    def kill(self) -> None:
        if self.link:
            self.link.cut()
        if self.life:
            self.life.kill()


class OriginalHost(Host):
    """A machine with a worker of version 1: a job after the other, and it ends where its connection does."""

    version = 1

    async def run(self, life: Life) -> None:
        with contextlib.suppress(OSError, ConnectionClosed):
            async with self.dial() as socket:
                async for data in socket:
                    for message in protocol.decode_from_server(data, 1):
                        if isinstance(message, protocol.Enqueue):
                            await self.run_job(message.job, socket)
        life.dead = True
        self.world.loop.call_later(1 + self.world.delay(14), self.start)

    async def run_job(self, job: int, socket: End) -> None:
        await socket.send(protocol.encode(protocol.JobRunning(job)))
        container = Container(f"original-{job}", {}, self.world.plan(), "running")
        self.world.starts.append(Start(job, 0, self.name, self.world.now(), container))
        await asyncio.sleep(container.plan["seconds"])
        container.state, container.code = "exited", container.plan["code"]
        self.world.count(f"version 1 exits {container.code}")
        await socket.send(protocol.encode(protocol.JobFailure(job) if container.code else protocol.JobSuccess(job)))


# The world


CHANCE = random.Random()
# Made once, as they are much work beside a history: what jobs.yaml holds, and the database of this process.
CONFIGS = Configs(JOBS.values(), CHANCE)
CONFIGS_WITHOUT = Configs([job for job in JOBS.values() if job.name != "leaves"], CHANCE)
MEMORY = Store(":memory:")._database.connection
TABLES = [row[0] for row in MEMORY.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]


def empty_database() -> sqlite3.Connection:
    """Give the database of this process, as if it were new; its id comes from chance, as that of one in a file."""
    for table in TABLES:
        MEMORY.execute(f"DELETE FROM {table}")
    MEMORY.execute("INSERT INTO server (id) VALUES (?)", (f"{CHANCE.getrandbits(32):08x}",))
    return MEMORY


class World:
    """What all parts of a history share: its clock, its chance, its ledgers."""

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.seed, self.verbose = seed, verbose
        self.chance = CHANCE
        self.chance.seed(seed)
        self.loop = VirtualLoop()
        self.memory = None if seed % IN_FILE == 0 else empty_database()
        self.path = ":memory:" if self.memory else str(Path(tempfile.mkdtemp(prefix="simulate-", dir=RAM)) / "jobs.db")
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256()
        self.offset = 0.0
        self.disk: str | None = None
        self.jobs = dict(JOBS)
        self.mended_at = 0.0  # when the last of what mends by itself will have done so
        self.server: PlayedServer | None = None
        self.hosts: list[Host] = []
        self.starts: list[Start] = []
        self.accepted: dict[int, str] = {}
        self.cancelled: dict[int, float] = {}  # when the DELETE of a job was first answered
        self.calm_at = 0.0  # when all was mended
        self.keep = KEEP_SECONDS if seed % PRUNED == 1 else 0.0
        self.was_far = False  # its clock
        self.disk_failed_at = -100.0
        self.commit_seconds = COMMIT_SECONDS + SLACK_SECONDS  # at most, in this history so far

    @contextlib.contextmanager
    def disk_in_place(self) -> Iterator[None]:
        """Have a server open its database: in memory, that is what the server before it has committed there."""
        connect = sqlite3.connect
        if self.memory:
            sqlite3.connect = lambda *_args, **_options: self.memory  # type: ignore[assignment]
        try:
            yield
        finally:
            sqlite3.connect = connect

    def close_disk(self) -> None:
        if not self.memory:
            shutil.rmtree(Path(self.path).parent)

    def configs(self) -> Configs:
        """Give what jobs.yaml holds now."""
        return CONFIGS if "leaves" in self.jobs else CONFIGS_WITHOUT

    def now(self) -> float:
        return self.loop.now

    def wall(self) -> float:
        return EPOCH + self.loop.now + self.offset

    def moment(self, when: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH + when + self.offset))

    def delay(self, most: float) -> float:
        return most * self.chance.random() ** 2

    def mend_within(self, most: float, mend: Callable[..., object], *args: Any) -> None:
        """Have a trouble mended by itself, some time from now."""
        when = self.now() + self.delay(most)
        self.mended_at = max(self.mended_at, when)
        self.loop.call_at(when, mend, *args)

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def tell(self, text: str) -> None:
        line = f"{self.now():8.3f} {text}"
        self.digest.update(line.encode())
        if self.verbose:
            print(line)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have something happen that belongs to no process."""
        return self.loop.create_task(work, context=contextvars.Context())

    def database(self) -> state.Database:
        assert self.server
        return self.server.store._database

    def rows(self) -> dict[int, sqlite3.Row]:
        return {row["id"]: row for row in self.database().execute(f"SELECT {state.JOB_WITH_WORKER}").fetchall()}

    def look(self, database: state.Database, committed: list[state.Notes]) -> None:
        """Called after each commit, with what it has changed."""
        raise NotImplementedError

    def plan(self) -> dict[str, Any]:
        seconds = self.chance.choice((0, 0.2, 1, 3, 8))
        plan = {"seconds": seconds, "code": self.chance.choice((0, 0, 0, 3)), "lines": self.chance.choice((0, 1, 6))}
        return plan | ({"lines": 6, "width": 250_000} if self.chance.random() < 1 / LOUD else {})

    def restart_server(self) -> None:
        if self.server:
            self.server.kill()
        self.disk = None
        self.server = PlayedServer(self)
