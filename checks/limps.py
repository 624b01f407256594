"""What limps in a storm of `chaos.py`: it is not killed, it misbehaves for some seconds and then goes on.

    docker     refused, hung, not to be started: the command that the workers call
    engine     restarted while its containers run on (live-restore), stalled, unable to remove one container
    callers    some hang up while they wait for an answer, some never read theirs

The workers call a script. It reads FOLDER/limp first, and its way to the engine is a link that can be taken away:

    worker ─▶ FOLDER/docker ─▶ the real docker ─▶ FOLDER/engine.sock ─▶ the engine's own socket

Only an engine of our own is restarted, stalled or kept from removing. Where none can be started, these are left out.
A mount that is busy does not keep today's engines from removing a container, they take it away; a file that can't be
deleted (`chattr +i`) does.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any

SCRIPT = """\
#!/bin/sh
{way}
. {folder}/limp
exec {docker} "$@"
"""
WITHOUT_ROOTS_RIGHTS = "setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search"
ENGINE_SECONDS = 60  # for an engine to start, or to stop
MANY_READERS = 1_100  # more than the server has places

Torment = Callable[[float, float], Coroutine[Any, Any, None]]  # who is hit and how hard, both from 0 to 1


class OwnEngine:
    """A Docker engine that nobody else uses, whose containers outlive it: it can be stopped, stalled and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "real.sock"
        self.environment = os.environ | {"DOCKER_HOST": f"unix://{self.socket}"}

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError with its log."""
        (self.folder / "daemon.json").write_text(
            json.dumps({
                "hosts": [f"unix://{self.socket}"], "data-root": f"{self.folder}/data",
                "exec-root": f"{self.folder}/exec", "pidfile": f"{self.folder}/pid", "live-restore": True,
                "bridge": "none", "iptables": False, "ip-forward": False,
            })
        )  # fmt: skip
        with (self.folder / "dockerd.log").open("ab") as log:
            # A network of its own: without a bridge an engine takes away docker0, which may be another's.
            words = ["unshare", "--net", "dockerd", "--config-file", f"{self.folder}/daemon.json"]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        deadline = time.monotonic() + ENGINE_SECONDS
        while subprocess.run(["docker", "version"], env=self.environment, capture_output=True, check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError((self.folder / "dockerd.log").read_text()[-3000:])
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it; what runs in its containers runs on."""
        self.process.terminate()
        try:
            self.process.wait(ENGINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def folder_of(self, container: str) -> Path:
        return self.folder / "data" / "containers" / container

    def take_down(self) -> None:
        """Remove it with all of its containers."""
        subprocess.run(
            "docker ps --all --quiet | xargs --no-run-if-empty docker rm --force --volumes",
            shell=True, env=self.environment, capture_output=True, check=False,
        )  # fmt: skip
        self.stop()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # a shim may be left of a container that ended without an engine
                if f"{self.folder}/" in (entry / "cmdline").read_text():
                    os.kill(int(entry.name), signal.SIGKILL)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([each for each in mounts if each.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=False)
        subprocess.run(["chattr", "-R", "-i", self.folder / "data" / "containers"], capture_output=True, check=False)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def own_engine(wanted: bool) -> Iterator[OwnEngine | None]:
    """Have DOCKER_HOST name an engine of our own, with the image `busybox`; where that can't be, say so: None."""
    if not wanted or os.geteuid() or not shutil.which("dockerd"):
        print("No engine of our own, for want of time, root or dockerd: none is restarted or kept from removing.\n")
        yield None
        return
    image = subprocess.run(["docker", "save", "busybox"], capture_output=True, check=True).stdout
    engine = OwnEngine(Path(tempfile.mkdtemp(prefix="chaos-engine-", dir="/tmp")))  # a socket's path must be short
    engine.start()
    try:
        os.environ["DOCKER_HOST"] = engine.environment["DOCKER_HOST"]
        subprocess.run(["docker", "load"], input=image, capture_output=True, check=True)
        yield engine
    finally:
        engine.take_down()


class Docker:
    """The `docker` that the workers call, and all that can be wrong with it."""

    def __init__(self, folder: Path, real: str, engines_socket: Path | None) -> None:
        self.folder, self.real, self.engines_socket = folder, real, engines_socket
        self.path, self.limp, self.link = folder / "docker", folder / "limp", folder / "engine.sock"
        self.behave("")
        self.open_way()
        way = f"export DOCKER_HOST=unix://{self.link}" if engines_socket else ""
        self.path.write_text(SCRIPT.format(way=way, folder=folder, docker=real))
        self.path.chmod(0o755)

    def behave(self, lines: str) -> None:
        """Have each call do something first, in the shell's language."""
        replace(self.limp, lines + "\n")

    def open_way(self) -> None:
        if self.engines_socket:
            self.link.symlink_to(self.engines_socket)

    def close_way(self) -> None:
        self.link.unlink()

    @contextlib.contextmanager
    def behaving(self, lines: str) -> Iterator[None]:
        self.behave(lines)
        try:
            yield
        finally:
            self.behave("")

    @contextlib.contextmanager
    def not_executable(self) -> Iterator[None]:
        self.path.chmod(0o644)
        yield
        self.path.chmod(0o755)

    @contextlib.contextmanager
    def missing(self) -> Iterator[None]:
        away = self.path.rename(f"{self.path}.away")
        yield
        away.rename(self.path)

    @contextlib.contextmanager
    def empty(self) -> Iterator[None]:
        """As in the middle of an upgrade: exec format error."""
        with self.missing():
            # No program to the kernel; but a shell that was started for the script of before reads what is there now.
            replace(self.path, "exit 125\n", 0o755)
            yield

    @contextlib.contextmanager
    def being_written(self) -> Iterator[None]:
        """Text file busy."""
        with open_to_write(self.path):
            yield

    @contextlib.contextmanager
    def without_permission(self) -> Iterator[None]:
        """The engine's socket is not ours."""
        with listener(self.folder / "closed.sock", 0), self.behaving(self.at("closed", f"{WITHOUT_ROOTS_RIGHTS} ")):
            yield

    @contextlib.contextmanager
    def without_engine(self) -> Iterator[None]:
        with self.behaving(self.at("nothing")):
            yield

    @contextlib.contextmanager
    def with_a_silent_engine(self) -> Iterator[None]:
        """One that takes connections and says nothing, until it hangs up."""
        with listener(self.folder / "silent.sock"), self.behaving(self.at("silent")):
            yield

    @contextlib.contextmanager
    def with_a_forbidding_engine(self) -> Iterator[None]:
        """One that says 403 to everything."""
        with listener(self.folder / "forbidding.sock", answer=FORBIDDEN), self.behaving(self.at("forbidding")):
            yield

    def at(self, name: str, before: str = "") -> str:
        return f'export DOCKER_HOST=unix://{self.folder}/{name}.sock\nexec {before}{self.real} "$@"'


FORBIDDEN = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: 22\r\n\r\n"
    b'{"message": "not you"}'
)


@contextlib.contextmanager
def listener(path: Path, mode: int = 0o600, answer: bytes = b"") -> Iterator[None]:
    """Have something listen at a path. Without an answer it says nothing, and hangs up at the end."""
    with socket.socket(socket.AF_UNIX) as taking:
        taking.bind(str(path))
        path.chmod(mode)
        taking.listen(100)
        if answer:
            threading.Thread(target=answer_all, args=(taking, answer), daemon=True).start()
        yield
        path.unlink()
        with contextlib.suppress(OSError):
            taking.shutdown(socket.SHUT_RDWR)


def answer_all(taking: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # it is shut down
        while True:
            with taking.accept()[0] as caller, contextlib.suppress(OSError):
                caller.recv(65536)
                caller.sendall(answer)


def open_to_write(path: Path) -> IO[str]:
    while True:
        with contextlib.suppress(OSError):  # it is just being started, and so busy itself
            return path.open("a")


def replace(path: Path, text: str, mode: int = 0o644) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.chmod(mode)
    new.rename(path)


@dataclass
class Ground:
    """The part of a world that its limps have to know.

    docker: the workers'. commands: the processes of those under way. on_engine_start: called with the time of each,
    before the workers reach the engine again. jobs: the ids of all. post: posts a job of that kind with that key until
    it is answered.
    """

    folder: Path
    port: int
    label: str
    docker: Docker
    engine: OwnEngine | None
    commands: Callable[[], list[int]]
    on_engine_start: Callable[[float], None]
    jobs: Callable[[], list[int]]
    post: Callable[[str, str], Awaitable[int]]


class Limps:
    """All the limps there are, each for some seconds, and how many there were."""

    def __init__(self, ground: Ground) -> None:
        self.ground, self.docker = ground, ground.docker
        self.count: Counter[str] = Counter()
        self.of_docker: list[tuple[float, float]] = []  # when docker or the engine limped
        self.without_engine: list[tuple[float, float]] = []
        self.command = asyncio.Lock()  # what one does to the command another would undo
        self.engine = asyncio.Lock()

    def torments(self) -> dict[Torment, int]:
        """Give each with its weight."""
        everywhere: dict[Torment, int] = {
            self.slow_docker: 6,
            self.refuse_docker: 9,
            self.hang_docker: 6,
            self.stop_a_docker: 8,
            self.make_docker_unstartable: 9,
            self.hang_up: 8,
            self.do_not_read: 6,
        }
        own: dict[Torment, int] = {self.restart_engine: 6, self.stall_engine: 4, self.keep_a_container: 14}
        return everywhere | (own if self.ground.engine else {})

    @contextlib.asynccontextmanager
    async def limping(self, kind: str, lock: asyncio.Lock) -> AsyncIterator[None]:
        """Have docker or the engine limp alone."""
        async with lock:
            self.count[kind] += 1
            begin = time.time()
            yield
            self.of_docker.append((begin, time.time()))

    # the command

    async def slow_docker(self, which: float, force: float) -> None:
        async with self.command:
            with self.docker.behaving(f"sleep {force:.2f}"):
                await asyncio.sleep(3 * which)

    async def refuse_docker(self, which: float, force: float) -> None:
        ways = [self.docker.not_executable]
        if self.docker.engines_socket:
            ways += [self.docker.without_engine, self.docker.with_a_forbidding_engine]
        if self.docker.engines_socket and os.geteuid() == 0 and shutil.which("setpriv"):
            ways.append(self.docker.without_permission)
        async with self.limping("docker refused", self.command):
            with ways[int(which * len(ways))]():
                await asyncio.sleep(0.3 + 3 * force)

    async def hang_docker(self, which: float, force: float) -> None:
        wait = self.docker.behaving(f"sleep {1 + 3 * force:.2f}")
        async with self.limping("docker hung", self.command):
            with wait if which < 0.6 or not self.docker.engines_socket else self.docker.with_a_silent_engine():
                await asyncio.sleep(1 + 3 * force)

    async def stop_a_docker(self, which: float, force: float) -> None:
        if running := self.ground.commands():
            process = running[int(which * len(running))]
            self.count["docker hung"] += 1
            self.of_docker.append((time.time(), time.time() + 1 + 3 * force))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                await asyncio.sleep(1 + 3 * force)
                os.kill(process, signal.SIGCONT)

    async def make_docker_unstartable(self, which: float, force: float) -> None:
        ways = [self.docker.being_written, self.docker.missing, self.docker.empty]
        async with self.limping("docker unstartable", self.command):
            with ways[int(which * len(ways))]():
                await asyncio.sleep(0.3 + 3 * force)

    # the engine

    async def restart_engine(self, which: float, force: float) -> None:
        engine = self.ground.engine
        assert engine
        if self.engine.locked():
            return
        async with self.limping("engine restarted", self.engine):
            self.docker.close_way()  # nobody asks until it was seen what has ended meanwhile
            await asyncio.sleep(which)
            stopping = time.time()
            await asyncio.to_thread(engine.stop)
            stopped = time.time()
            await asyncio.sleep(3 * force)
            await asyncio.to_thread(engine.start)
            self.without_engine.append((stopping, time.time()))
            await asyncio.to_thread(self.ground.on_engine_start, stopped)
            self.docker.open_way()

    async def stall_engine(self, _which: float, force: float) -> None:
        assert self.ground.engine
        if self.engine.locked():
            return
        async with self.limping("engine stalled", self.engine):
            self.ground.engine.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1 + 3 * force)
            self.ground.engine.process.send_signal(signal.SIGCONT)

    async def keep_a_container(self, which: float, force: float) -> None:
        """Keep the engine from removing a container, by a file in its folder; counts once it has tried."""
        assert self.ground.engine
        containers = await self.ask_engine(
            "ps", "--all", "--quiet", "--no-trunc", f"--filter=label={self.ground.label}"
        )
        if not containers:
            return
        container = sorted(containers)[int(which * len(containers))]
        stays = self.ground.engine.folder_of(container) / f"stays-{force}"
        with contextlib.suppress(FileNotFoundError):  # it is gone already
            stays.touch()
            await run("chattr", "+i", str(stays))
            try:
                for _ in range(40):
                    await asyncio.sleep(0.2)
                    if await self.removal_was_tried(container):
                        self.count["container not removable"] += 1
                        await asyncio.sleep(1 + 3 * force)
                        break
            finally:
                await run("chattr", "-i", str(stays))
                stays.unlink(missing_ok=True)

    async def removal_was_tried(self, container: str) -> bool:
        return await self.ask_engine("inspect", "--format={{.State.Status}}", container) in (["removing"], ["dead"])

    async def ask_engine(self, *words: str) -> list[str]:
        assert self.ground.engine
        async with self.engine:  # it is there
            return (await run("docker", *words, environment=self.ground.engine.environment)).split()

    # the callers

    async def hang_up(self, which: float, force: float) -> None:
        """Many wait and follow, two of them for jobs that they post, and all hang up, half of them with a reset."""
        keys = [f"hangs up {which} {force} {number}" for number in range(2)]
        jobs = self.ground.jobs()[-5:] or [1]
        paths = ["/api/jobs/{}?wait=60", "/api/jobs/{}/log?follow=1", "/api/events"]
        requests = [posting("slow" if force < 0.5 else "quick", key) for key in keys]
        requests += [getting(paths[n % 3].format(jobs[n % len(jobs)])) for n in range(20 + int(200 * force))]
        callers = await asyncio.gather(*(self.call(request) for request in requests))
        self.count["callers hung up"] += 1
        await asyncio.sleep(0.2 + 2 * which)
        for number, caller in enumerate(caller for caller in callers if caller):
            if number % 2:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.close()
        for key in keys:  # again, as a caller would who has no answer
            await self.ground.post("slow" if force < 0.5 else "quick", key)

    async def do_not_read(self, which: float, force: float) -> None:
        jobs = self.ground.jobs() or [1]
        paths = ["/", "/api/jobs?full=1", f"/api/jobs/{jobs[int(which * len(jobs))]}/log", "/api/events"]
        count = MANY_READERS if force > 0.7 else 20 + int(200 * force)
        requests = [getting(paths[n % 4]) * 8 for n in range(count)]
        callers = await asyncio.gather(*(self.call(request, 2048) for request in requests))
        self.count["readers did not read"] += 1
        await asyncio.sleep(1 + 4 * which)
        for caller in callers:
            if caller:
                caller.close()

    async def call(self, request: bytes, buffer: int = 0) -> socket.socket | None:
        """Send a request and leave its answer unread; None where the server was not there."""
        caller, loop = socket.socket(), asyncio.get_running_loop()
        caller.setblocking(False)
        if buffer:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            async with asyncio.timeout(3):
                await loop.sock_connect(caller, ("127.0.0.1", self.ground.port))
                await loop.sock_sendall(caller, request)
        except (OSError, TimeoutError):
            caller.close()
            return None
        return caller


def getting(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def posting(kind: str, key: str) -> bytes:
    head = f"POST /api/jobs/{kind}?wait=60 HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: {key}\r\nContent-Length: 2"
    return f"{head}\r\n\r\n{{}}".encode()


async def run(*words: str, environment: dict[str, str] | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return (await process.communicate())[0].decode()


class Probe:
    """Asks a server again and again how it is, as a load balancer would; from a thread, so that only it is measured."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[tuple[float, float, int]] = []  # when asked, seconds to the answer, its status; 0: none
        self._over = threading.Event()
        threading.Thread(target=self._ask, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(0.2):
            asked, status = time.time(), 0
            connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
            with contextlib.suppress(OSError, HTTPException):
                connection.request("GET", "/healthz")
                status = connection.getresponse().status
            connection.close()
            self.answers.append((asked, time.time() - asked, status))
