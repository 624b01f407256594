"""Measures jobworker against its budget, each figure beside a limit or a peer measured in the same run.

A row of the budget is a function that takes turns (ours, peer, ours, peer ...), so that what else goes on hits both
alike. Its figures are printed as medians with the least and the most of all turns; `ratio` is ours divided by that
line's. Nothing runs with weaker durability than the default; each line says how what it counts is kept.

Load generators and scripted workers are processes of their own (`beside`), lean enough not to be what is measured.
Black box: of ours only server.py and client.py are run, as a user would.

    python checks/bench.py                  every row
    python checks/bench.py post-16 idle     these rows
    python checks/bench.py --list           what rows there are
    python checks/bench.py --quick          each for a moment, only to see that it runs
    python checks/bench.py --peers          rq, celery, dramatiq and huey with the same work (installed if need be)
    python checks/bench.py --scale          with a million queued, a million finished, 1,000 workers, 300 listeners
    python checks/bench.py --long           a million jobs through a worker: what grows meanwhile
"""

import argparse
import asyncio
import contextlib
import functools
import http.client
import json
import logging
import multiprocessing
import os
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, broadcast, serve

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 60
MEBI = 1024 * 1024
FSYNC = "fsync before the answer"
STEPS = "fsync at each of 3 steps"
NOTHING = "nothing is kept"
JOBS = """\
- {name: empty, image: busybox, command: ["true"]}
- {name: nobody, image: busybox, tags: [nobody]}
"""


@dataclass
class Figure:
    """One line of the table: what was measured, in turns, and what the budget says of it."""

    what: str
    unit: str
    kept: str = ""  # what a power cut leaves
    at_least: float | None = None
    at_most: float | None = None
    is_limit: bool = False
    samples: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.samples.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def budget(self) -> str:
        if self.at_least is not None:
            return f">= {number(self.at_least)} {'ok' if self.median >= self.at_least else 'MISSED'}"
        if self.at_most is not None:
            return f"<= {number(self.at_most)} {'ok' if self.median <= self.at_most else 'MISSED'}"
        return ""


Limit = functools.partial(Figure, is_limit=True)  # or a peer: what the line of ours before it is compared with


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


# The programs measured


class SkippedError(Exception):
    """A row can't be measured here; the message says what is missing."""


class Server:
    """A server of ours, as a process, with a database in a folder of its own."""

    def __init__(self, bench: "Bench", *options: str, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(dir=bench.folder))
        self.jobs = self.folder / "jobs.yaml"
        self.jobs.write_text(JOBS)
        command = ["server.py", "--port=0", "--hold", *options, str(self.jobs)]
        began = time.monotonic()
        self.process, line = started(bench, command, self.folder / "server.log", "listening on ")
        self.seconds_to_start = time.monotonic() - began
        self.pid = self.process.pid
        self.port = int(line.rsplit(":", 1)[1])
        self._http = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        self._used = 0.0

    def ask(self, method: str, path: str, body: object = None) -> Any:
        response = self._answer(method, path, None if body is None else json.dumps(body))
        text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {text}")
        return json.loads(text)

    def post_list(self, count: int, name: str = "empty") -> float:
        """Queue `count` jobs by one request; how many seconds that took."""
        body = json.dumps([{"name": name}] * count)
        began = time.perf_counter()
        self._answer("POST", "/api/jobs", body).read()
        return time.perf_counter() - began

    def _answer(self, method: str, path: str, body: str | None) -> http.client.HTTPResponse:
        if time.monotonic() > self._used + 20:  # the server ends a connection that is idle for 30 s
            self._http.close()
        self._http.request(method, path, body)
        response = self._http.getresponse()
        self._used = time.monotonic()
        return response

    def stop(self) -> None:
        self._http.close()
        stop(self.process)

    def run_jobs(self, count: int, turn: int) -> float:
        """Have `count` jobs run to their end, as in each turn before; how many seconds that took."""
        began = time.perf_counter()
        self.post_list(count)
        until(lambda: self.ask("GET", "/healthz")["jobs"]["success"] >= count * (turn + 1), 600)
        return time.perf_counter() - began


def started(bench: "Bench", command: list[str], log: Path, text: str) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a Python program of ours; give its process once a line of its log holds `text`, and that line."""
    unwanted = ("JOBWORKER_", "PYTHON")  # as PYTHONDONTWRITEBYTECODE, which has it compile everything at each start
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=output)
    bench.stack.callback(stop, process)
    lines: list[str] = []
    while not lines and process.poll() is None and time.monotonic() < began + READY_SECONDS:
        time.sleep(0.002)
        lines = [line for line in log.read_text().splitlines() if text in line]
    if not lines:
        raise RuntimeError(f"{command} did not start: {log.read_text()[-2000:]}")
    return process, lines[0]


def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition holds, asking softly. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.01)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def start_worker(bench: "Bench", server: Server, slots: int, docker: str) -> "subprocess.Popen[bytes]":
    """Start a worker of ours and wait until it is connected."""
    name = f"bench-{server.pid}"
    url = f"127.0.0.1:{server.port}/runner"
    command = ["client.py", f"--name={name}", f"--slots={slots}", f"--docker={docker}", url]
    return started(bench, command, server.folder / "worker.log", "connected to ")[0]


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """What the threads of a process that still run have used: to the nanosecond, where `stat` counts hundredths."""
    used = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            used += int((task / "schedstat").read_text().split()[0])
    return used / 1e9


class Bench:
    """What all rows share: how long to measure, a folder, and what has to be ended at a row's end."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.turns = range(1 if quick else 5)
        self.stack = contextlib.ExitStack()
        self.folder = Path()

    def count(self, number_: int) -> int:
        return max(number_ // 100, 2) if self.quick else number_

    def seconds(self, seconds: float) -> float:
        return 0.1 if self.quick else seconds

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="jobworker-bench-") as folder, self.stack:
            self.folder = Path(folder)
            yield

    def beside(self, function: Callable[..., None], *arguments: Any) -> "Beside":
        """Run a function in a process of its own."""
        process = Beside(function, *arguments)
        self.stack.callback(process.end)
        return process

    @functools.cached_property
    def empty_docker(self) -> str:
        """A `docker` that does nothing: a static program where there is a C compiler."""
        source, program = self.folder / "docker.c", self.folder / "docker"
        source.write_text("int main(void) { return 0; }\n")
        command = ["cc", "-O2", "-static", "-o", str(program), str(source)]
        if shutil.which("cc") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            print("No C compiler makes a static program here: `true` is the empty docker.", file=sys.stderr)
            shutil.copy(shutil.which("true") or "/bin/true", program)
        return str(program)


class Beside:
    """A function in a process of its own, called with a pipe and its arguments; `result` waits for what it sends."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0

    def result(self) -> Any:
        return self._pipe.recv()

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


# Load generators and scripted peers: each runs in a process of its own


def post_for(pipe: Any, port: int, connections: int, seconds: float) -> None:
    """POST over keep-alive connections, each again as soon as it is answered; send how many a second were answered."""
    request = b"POST /api/jobs/empty HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    poll = select.epoll()
    sockets = {}
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        sockets[connection.fileno()] = connection
        connection.sendall(request)
        connection.recv(4096)
        poll.register(connection, select.EPOLLIN)
    for connection in sockets.values():
        connection.sendall(request)
    answered, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        for descriptor, _event in poll.poll():
            answer = sockets[descriptor].recv(4096)
            if answer[9:12] != b"200":
                raise RuntimeError(f"not an answer: {answer!r}")
            answered += 1
            sockets[descriptor].send(request)
    pipe.send(answered / (time.perf_counter() - began))


class Bare(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        body = b'{"id":1,"name":"empty","queuing":true,"running":false,"success":false}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def bare_http(pipe: Any) -> None:
    """http.server that answers every POST at once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    server.handle_error = lambda *_arguments: None  # type: ignore[method-assign]
    pipe.send(server.server_address[1])
    server.serve_forever()


def waits(pipe: Any, port: int, count: int, name: str = "empty", seconds: int = 60) -> None:
    """POST jobs one by one, each with ?wait; send the milliseconds each answer took."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", f"/api/jobs/{name}?wait={seconds}")
        answer = json.loads(connection.getresponse().read())
        times.append((time.perf_counter() - began) * 1_000)
        if seconds and not answer.get("success"):
            raise RuntimeError(f"not a success: {answer}")
    pipe.send(times)


def listen(pipe: Any, port: int, paths: list[str]) -> None:
    """GET paths whose answers never end, and read all that comes, for ever; send a word once each has begun."""
    poll, sockets = select.epoll(), {}
    for path in paths:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if not connection.recv(65536).startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"no 200 for {path}")
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    pipe.send("listening")
    while True:
        for descriptor, _event in poll.poll():
            sockets[descriptor].recv(65536)


CONFIGS, BATCH, ENQUEUE, GO, SETTLED, RUNNING = 1, 31, 2, 16, 18, 1
LENGTH = struct.Struct(">I")


def parts(frame: bytes | str) -> list[bytes]:
    """Give the frames of a frame: several where it is a Batch."""
    assert isinstance(frame, bytes)
    if frame[0] != BATCH:
        return [frame]
    at, frames = 1, []
    while at < len(frame):
        (length,) = LENGTH.unpack_from(frame, at)
        frames.append(frame[at + 4 : at + 4 + length])
        at += 4 + length
    return frames


def batch(frames: list[bytes]) -> bytes:
    return bytes([BATCH]) + b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)


def runner(port: int) -> connect:
    url = f"ws://127.0.0.1:{port}/runner"
    options: dict[str, Any] = {"proxy": None, "compression": None, "ping_interval": None, "max_size": None}
    return connect(url, subprotocols=["jobworker.2"], **options)  # type: ignore[list-item]


def hello(name: str, slots: int) -> bytes:
    return b"\x10" + json.dumps({"name": name, "slots": slots, "tags": [], "version": "0", "jobs": []}).encode()


async def answer(server: ClientConnection, frames: list[bytes]) -> None:
    """Say of each job that it starts, and of each that may start that it has ended."""
    replies = []
    for frame in frames:
        if frame[0] == ENQUEUE:
            replies.append(b"\x01" + frame[1:5] + b'{"attempt":1}')
        elif frame[0] == GO:
            replies.append(b"\x02" + frame[1:5] + b'{"attempt":1,"exit_code":0}')
    if replies:
        await server.send(batch(replies))


def answer_at_once(pipe: Any, port: int, slots: int, count: int) -> None:
    """A worker whose jobs take no time; send how many a second were settled, from its Hello on."""

    async def work() -> None:
        async with runner(port) as server:
            began, settled = time.perf_counter(), 0
            await server.send(hello("scripted", slots))
            while settled < count:
                frames = parts(await server.recv())
                settled += sum(frame[0] == SETTLED for frame in frames)
                await answer(server, frames)
            pipe.send(count / (time.perf_counter() - began))

    asyncio.run(work())


def many_workers(pipe: Any, port: int, count: int) -> None:
    """Connect workers whose jobs take no time; send the time when all have JobConfigs, each time that they have."""

    async def work() -> None:
        got, all_have, places = 0, asyncio.Event(), asyncio.Semaphore(50)

        async def listen_to(number_: int) -> None:
            nonlocal got
            async with places:
                server = await runner(port)
                await server.send(hello(f"idle-{number_}", 1))
                frames = parts(await server.recv())
            while True:
                got += frames[0][0] == CONFIGS
                if got % count == 0:
                    all_have.set()
                await answer(server, frames)
                frames = parts(await server.recv())

        workers = [asyncio.ensure_future(listen_to(number_)) for number_ in range(count)]
        while not any(worker.done() for worker in workers):
            await all_have.wait()
            all_have.clear()
            pipe.send(time.perf_counter())

    asyncio.run(work())


def bare_websockets(pipe: Any) -> None:
    """A server of the same frames that only counts: jobs from memory, no store. SIGHUP: JobConfigs to all."""
    configs = b"\x01" + json.dumps([{"command": None, "image": "busybox", "name": "empty"}] * 2).encode()
    workers: set[ServerConnection] = set()

    def enqueue(job: int) -> bytes:
        return struct.pack(">Biq", ENQUEUE, job, 5) + b'empty{"attempt":1,"environment":{}}'

    async def work(worker: ServerConnection) -> None:
        slots = json.loads((await worker.recv())[1:])["slots"]
        workers.add(worker)
        await worker.send(configs)
        if slots > 1:
            await worker.send(batch([enqueue(job) for job in range(slots)]))
        job = slots
        async for frames in worker:
            replies = []
            for frame in parts(frames):
                if frame[0] == RUNNING:
                    replies.append(bytes([GO]) + frame[1:5] + b"\0\0\0\1")
                else:
                    replies += [bytes([SETTLED]) + frame[1:5] + b"\0\0\0\1", enqueue(job)]
                    job += 1
            await worker.send(batch(replies))

    async def run() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: broadcast(workers, configs))
        options: dict[str, Any] = {"compression": None, "subprotocols": ["jobworker.2"], "ping_interval": 15}
        logging.getLogger("websockets").setLevel(logging.CRITICAL)
        async with serve(work, "127.0.0.1", 0, **options) as server:
            pipe.send(server.sockets[0].getsockname()[1])
            await server.wait_closed()

    asyncio.run(run())


# Limits of the machine


def sqlite_alone(bench: Bench, seconds: float) -> float:
    """Single durable commits a second of one row."""
    database = open_table(bench)
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        database.execute("INSERT INTO job (name, state) VALUES ('empty', 'queued')")
        done += 1
    return done / (time.perf_counter() - began)


def open_table(bench: Bench) -> sqlite3.Connection:
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    database = sqlite3.connect(folder / "limit.db", isolation_level=None)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT, state TEXT)")
    database.execute("CREATE INDEX job_state ON job (state, id)")
    return database


def insert(database: sqlite3.Connection, count: int) -> None:
    database.execute("BEGIN")
    database.executemany("INSERT INTO job (name, state) VALUES (?, ?)", [("empty", "queued")] * count)
    database.execute("COMMIT")


def sqlite_updates(bench: Bench, count: int, group: int) -> float:
    """Jobs a second through three updates each, in durable groups, with nothing else around them."""
    database = open_table(bench)
    insert(database, count)
    began = time.perf_counter()
    for first in range(1, count + 1, group):
        for state in ("assigned", "running", "success"):
            database.execute("BEGIN")
            for job in range(first, min(first + group, count + 1)):
                database.execute("UPDATE job SET state = ? WHERE id = ?", (state, job))
            database.execute("COMMIT")
    return count / (time.perf_counter() - began)


def run_alone(command: list[str], threads: int, seconds: float) -> float:
    """Runs a second of a command by subprocess.run, in so many threads."""
    end = time.perf_counter() + seconds

    def run() -> int:
        done = 0
        while time.perf_counter() < end:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(run.result() for run in [pool.submit(run) for _ in range(threads)])
    return done / (time.perf_counter() - began)


# The rows


def containers(bench: Bench, slots: int) -> list[Figure]:
    """Real ones: ours against what anyone could type."""
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        raise SkippedError("no Docker engine answers")
    count, server = max(bench.count(5 * slots + 15), slots), Server(bench)
    start_worker(bench, server, slots, "docker")
    ours = Figure(f"{count} containers, {slots} slots, to the last result", "s", STEPS)
    peer = Limit(f"xargs -P{slots} docker run --rm", "s", NOTHING)
    ratio = Figure("ours / xargs", "times", at_most=1.03)
    command = ["xargs", f"-P{slots}", "-I{}", "docker", "run", "--rm", "--pull", "never", "busybox", "true"]
    left = ["docker", "ps", "--all", "--quiet", f"--filter=label=jobworker.worker=bench-{server.pid}"]
    numbers = "\n".join(map(str, range(count)))
    for turn in bench.turns:
        ours.add(server.run_jobs(count, turn))
        until(lambda: not subprocess.run(left, stdout=subprocess.PIPE, check=True).stdout, 60)
        began = time.perf_counter()
        subprocess.run(command, input=numbers, text=True, check=True)
        peer.add(time.perf_counter() - began)
        ratio.add(ours.samples[-1] / peer.samples[-1])
    return [ours, peer, ratio]


def empty_docker(bench: Bench) -> list[Figure]:
    """What we add to starting a process."""
    server, count = Server(bench), bench.count(5_000)
    start_worker(bench, server, 8, bench.empty_docker)
    ours = Figure("an empty docker, 8 slots", "jobs/s", STEPS, at_least=4_500)
    alone = [Limit(f"subprocess.run of it alone, {threads} threads", "runs/s", NOTHING) for threads in (1, 4)]
    command = [bench.empty_docker, "run", "--pull", "never", "--name", "jobworker-00000000-1-1", "busybox", "true"]
    for turn in bench.turns:
        ours.add(count / server.run_jobs(count, turn))
        for figure, threads in zip(alone, (1, 4), strict=True):
            figure.add(run_alone(command, threads, bench.seconds(1)))
    return [ours, *alone]


def protocol_alone(bench: Bench) -> list[Figure]:
    """A worker whose jobs take no time."""
    server, slots, count = Server(bench), 64, bench.count(20_000)
    bare_port = bench.beside(bare_websockets).result()
    ours = Figure(f"a worker that answers at once, {slots} slots", "jobs/s", STEPS, at_least=11_000)
    bare = Limit("the same frames, jobs only counted", "jobs/s", NOTHING)
    disk = Limit(f"SQLite FULL alone, 3 updates a job, {slots} a group", "jobs/s", "fsync each group")
    for _ in bench.turns:
        server.post_list(count)
        ours.add(bench.beside(answer_at_once, server.port, slots, count).result())
        bare.add(bench.beside(answer_at_once, bare_port, slots, count).result())
        disk.add(sqlite_updates(bench, count, slots))
    return [ours, bare, disk]


def post(bench: Bench, connections: int, at_least: float) -> list[Figure]:
    """POST of one job, again and again, over keep-alive connections."""
    server = Server(bench)
    http_port = bench.beside(bare_http).result()
    ours = Figure(f"POST of one job, {connections} connections", "jobs/s", FSYNC, at_least=at_least)
    front = Limit("ThreadingHTTPServer alone", "answers/s", NOTHING)
    disk = Limit("SQLite FULL alone, one by one", "commits/s", "fsync each")
    for _ in bench.turns:
        for figure, port in ((ours, server.port), (front, http_port)):
            figure.add(bench.beside(post_for, port, connections, bench.seconds(2)).result())
        disk.add(sqlite_alone(bench, bench.seconds(1)))
    return [ours, front, disk]


def post_list(bench: Bench) -> list[Figure]:
    """Many jobs by one request."""
    server, count = Server(bench), bench.count(20_000)
    ours = Figure(f"POST of a list of {count}", "jobs/s", FSYNC, at_least=150_000)
    disk = Limit("SQLite FULL alone, one transaction", "rows/s", "fsync at the end")
    for _ in bench.turns:
        ours.add(count / server.post_list(count))
        database = open_table(bench)
        began = time.perf_counter()
        insert(database, count)
        disk.add(count / (time.perf_counter() - began))
    return [ours, disk]


def latency(bench: Bench) -> list[Figure]:
    """From POST to the answer of its ?wait, one job at a time."""
    server, count = Server(bench), bench.count(1_000)
    start_worker(bench, server, 4, bench.empty_docker)
    p50 = Figure("POST to final, idle, empty docker: p50", "ms", STEPS, at_most=3)
    p99 = Figure("p99", "ms", STEPS, at_most=10)
    start = Limit("subprocess.run of it alone: p50", "ms", NOTHING)
    disk = Limit("4 SQLite FULL commits alone: p50", "ms", "fsync each")
    for _ in bench.turns:
        times = bench.beside(waits, server.port, count).result()
        p50.add(statistics.median(times))
        p99.add(statistics.quantiles(times, n=100)[98])
        start.add(1_000 / run_alone([bench.empty_docker], 1, bench.seconds(0.5)))
        disk.add(4_000 / sqlite_alone(bench, bench.seconds(0.5)))
    return [p50, start, disk, p99]


def latency_million(bench: Bench) -> list[Figure]:
    """The same beside a million jobs that no worker may take, and what these cost."""
    servers, count, queued = (Server(bench), Server(bench)), bench.count(1_000), bench.count(1_000_000)
    full = servers[1]
    for _ in range(max(queued // 20_000, 1)):
        full.post_list(min(queued, 20_000), "nobody")
    workers = [start_worker(bench, server, 4, bench.empty_docker) for server in servers]
    figures = [
        Limit("POST to final, 0 queued: p50", "ms", STEPS),
        Figure(f"POST to final, {queued} queued: p50", "ms", STEPS),
    ]
    ratio = Figure("the latter / the former", "times", at_most=1.2)
    rss = Figure("memory of its server", "MiB", at_most=100)
    start = Figure("time until it listens", "s", at_most=1)
    for _ in bench.turns:
        for figure, server in zip(figures, servers, strict=True):
            figure.add(statistics.median(bench.beside(waits, server.port, count).result()))
        ratio.add(figures[1].samples[-1] / figures[0].samples[-1])
        rss.add(memory(full.pid) / MEBI)
    for worker in workers:
        stop(worker)
    for _ in bench.turns:
        full.stop()
        full = Server(bench, folder=full.folder)
        start.add(full.seconds_to_start)
    return [figures[1], figures[0], ratio, rss, start]


def workers_1000(bench: Bench) -> list[Figure]:
    """Many workers with nothing to do."""
    count = bench.count(1_000)
    per_worker = [
        Figure(f"{count} idle workers", "KiB each", at_most=25),
        Limit("websockets alone", "KiB each"),
    ]
    cpu = [Figure("their cpu", "% of a core", at_most=2), Limit("websockets alone", "% of a core")]
    told = [Figure("JobConfigs to all by SIGHUP", "s", at_most=1), Limit("websockets alone", "s")]
    for _ in bench.turns:
        server, bare = Server(bench), bench.beside(bare_websockets)
        sides = [(server.pid, server.port), (bare.pid, bare.result())]
        crowds = []
        for (pid, port), figure in zip(sides, per_worker, strict=True):
            before = memory(pid)
            crowds.append(bench.beside(many_workers, port, count))
            crowds[-1].result()
            figure.add((memory(pid) - before) / 1024 / count)
        used = [cpu_seconds(pid) for pid, _port in sides]
        seconds = bench.seconds(15)  # with a ping to each in it
        time.sleep(seconds)
        for figure, before_, (pid, _port) in zip(cpu, used, sides, strict=True):
            figure.add((cpu_seconds(pid) - before_) / seconds * 100)
        for figure, crowd, (pid, _port) in zip(told, crowds, sides, strict=True):
            began = time.perf_counter()
            os.kill(pid, signal.SIGHUP)
            figure.add(crowd.result() - began)
            crowd.end()
        server.stop()
        bare.end()
    return [*per_worker, *cpu, *told]


IMPORTS = "import asyncio,http.server,sqlite3,sys,websockets.asyncio.server,yaml;print(flush=True);sys.stdin.read()"


def idle(bench: Bench) -> list[Figure]:
    """What server and worker cost when there is nothing to do."""
    start = [
        Figure("server: time until it listens", "s", at_most=0.3),
        Limit("the imports alone: time", "s"),
    ]
    rss = [
        Figure("worker: memory", "MiB", at_most=28),
        Figure("server: memory", "MiB", at_most=33),
        Limit("the imports alone: memory", "MiB"),
    ]
    cpu = [Figure(f"{who}: cpu", "% of a core", at_most=0.3) for who in ("worker", "server")]
    for _ in bench.turns:
        server = Server(bench)
        start[0].add(server.seconds_to_start)
        worker = start_worker(bench, server, 1, bench.empty_docker)
        began = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
            assert bare.stdin
            assert bare.stdout
            bare.stdout.readline()
            start[1].add(time.monotonic() - began)
            time.sleep(bench.seconds(2))
            pids = (worker.pid, server.pid)
            used = [cpu_seconds(pid) for pid in pids]
            seconds = bench.seconds(10)
            time.sleep(seconds)
            for figure, before, pid in zip(cpu, used, pids, strict=True):
                figure.add((cpu_seconds(pid) - before) / seconds * 100)
            for figure, pid in zip(rss, (*pids, bare.pid), strict=True):
                figure.add(memory(pid) / MEBI)
            bare.stdin.close()
        stop(worker)
        server.stop()
    return [*rss, *cpu, *start]


# Not in the budget's table: --scale, --long, --peers


def scale(bench: Bench) -> list[Figure]:
    """Latency of POST and dispatch, and the server's memory, as ever more is there."""
    server, million = Server(bench), bench.count(1_000_000)
    figures: list[Figure] = []

    def measure(what: str) -> None:
        worker = start_worker(bench, server, 4, bench.empty_docker)
        posts = bench.beside(waits, server.port, bench.count(1_000), "nobody", 0).result()
        finals = bench.beside(waits, server.port, bench.count(1_000)).result()
        stop(worker)
        for name, times in (("POST", posts), ("POST to final", finals)):
            figures.append(Figure(f"{what}: {name} p50", "ms", samples=[statistics.median(times)]))
            figures.append(Figure(f"{what}: {name} p99", "ms", samples=[statistics.quantiles(times, n=100)[98]]))
        figures.append(Figure(f"{what}: server's memory", "MiB", samples=[memory(server.pid) / MEBI]))

    def fill() -> None:
        for _ in range(max(million // 20_000, 1)):
            server.post_list(min(million, 20_000), "nobody")

    measure("nothing")
    fill()
    measure(f"{million} queued")
    server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "jobs.db")) as database, database:
        database.execute("UPDATE job SET state = 'success', started_at = created_at, finished_at = created_at")
    server = Server(bench, folder=server.folder)
    fill()
    measure(f"and {million} finished")
    workers = bench.count(1_000)
    bench.beside(many_workers, server.port, workers).result()
    measure(f"and {workers} workers")
    (job,) = server.ask("GET", "/api/jobs?state=queued&limit=1")
    paths = ["/api/events"] * bench.count(200) + [f"/api/jobs/{job['id']}/log?follow=1"] * bench.count(100)
    bench.beside(listen, server.port, paths).result()
    measure(f"and {len(paths)} listeners")
    return figures


def long(bench: Bench) -> list[Figure]:
    """A million jobs through a worker, pruned after 20 s: what grows?"""
    server, total = Server(bench, "--keep=20s"), bench.count(1_000_000)
    worker = start_worker(bench, server, 8, bench.empty_docker)
    who = (("server", server.pid), ("worker", worker.pid))
    rss = [Figure(f"{name}: memory", "MiB") for name, _pid in who]
    files = [Figure(f"{name}: descriptors", "open") for name, _pid in who]
    size = Figure("jobs.db", "MiB")
    posted, began = 0, time.perf_counter()
    while posted < total or sum(
        server.ask("GET", "/healthz")["jobs"][state] for state in ("queued", "assigned", "running")
    ):
        if posted < total and server.ask("GET", "/healthz")["jobs"]["queued"] < 20_000:
            posted += 20_000
            server.post_list(20_000)
            print(f"{posted} posted, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for figures, look in ((rss, lambda pid: memory(pid) / MEBI), (files, descriptors)):
            for figure, (_name, pid) in zip(figures, who, strict=True):
                figure.add(look(pid))
        size.add(sum(file.stat().st_size for file in server.folder.glob("jobs.db*")) / MEBI)
        time.sleep(bench.seconds(2))
    rate = Figure(f"{posted} jobs", "jobs/s", STEPS, samples=[posted / (time.perf_counter() - began)])
    return [rate, *(part for figure in (*rss, *files, size) for part in halves(figure))]


def halves(figure: Figure) -> list[Figure]:
    """A figure's samples of the first half of the time, and of the second."""
    middle = max(len(figure.samples) // 2, 1)
    parts = {"first half": figure.samples[:middle], "second half": figure.samples[-middle:]}
    return [Figure(f"{figure.what}, {name}", figure.unit, samples=samples) for name, samples in parts.items()]


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


PEER = """
import os, subprocess, sys
library, port, fsync = os.environ["LIBRARY"], os.environ["PORT"], os.environ["FSYNC"] == "yes"
done = os.open("done", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
url = "redis://127.0.0.1:" + port

def run(work):
    if work == "empty":
        subprocess.run([os.environ["PROGRAM"]], stdin=subprocess.DEVNULL, check=True)
    os.write(done, b".")

if library == "rq":
    import redis, rq
    queue = rq.Queue(connection=redis.Redis.from_url(url))
    send = lambda work: queue.enqueue("peer.run", work)
elif library == "celery":
    import celery
    app = celery.Celery("peer", broker=url, backend=url)
    send = app.task(run, name="run").delay
elif library == "dramatiq":
    import dramatiq, dramatiq.brokers.redis
    dramatiq.set_broker(dramatiq.brokers.redis.RedisBroker(url=url))
    send = dramatiq.actor(run).send
else:
    import huey
    huey = huey.SqliteHuey(filename="huey.db", fsync=fsync)
    send = huey.task()(run)
if __name__ == "__main__":
    import peer
    for _ in range(int(sys.argv[2])):
        peer.send(sys.argv[1])
"""
PEERS = {
    "rq": ["rq", "worker-pool", "--quiet", "--num-workers=4", "--url=redis://127.0.0.1:{port}"],
    "celery": ["celery", "--app=peer", "worker", "--concurrency=4", "--loglevel=error"],
    "dramatiq": ["dramatiq", "peer", "--processes=2", "--threads=4"],
    "huey": ["huey_consumer", "peer.huey", "--workers=8", "--quiet"],
}


def peers(bench: Bench) -> list[Figure]:
    """rq, celery, dramatiq and huey with the same work, as usual and with fsync at every write."""
    if shutil.which("redis-server") is None:
        raise SkippedError("there is no redis-server: make bench-peers installs one")
    venv = bench.folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "rq", "celery[redis]", "dramatiq[redis]", "huey"], check=True)
    servers, counts = (Server(bench), Server(bench)), (bench.count(2_000), bench.count(20_000))
    start_worker(bench, servers[0], 8, bench.empty_docker)
    figures = [Figure(f"ours: {work}", "jobs/s", STEPS) for work in ("the empty program", "no-op jobs")]
    others = {
        (library, work, fsync): Limit(f"{library}: {work}", "jobs/s", "fsync each write" if fsync else "as usual")
        for library in PEERS for work in ("empty", "no-op") for fsync in (False, True)
    }  # fmt: skip
    for turn in bench.turns:
        figures[0].add(counts[0] / servers[0].run_jobs(counts[0], turn))
        servers[1].post_list(counts[1])
        figures[1].add(bench.beside(answer_at_once, servers[1].port, 64, counts[1]).result())
        for (library, work, fsync), figure in others.items():
            figure.add(peer_rate(bench, library, work, fsync, bench.count(1_000 if library == "rq" else 4_000)))
    empty = [figure for (_library, work, _fsync), figure in others.items() if work == "empty"]
    no_op = [figure for (_library, work, _fsync), figure in others.items() if work == "no-op"]
    return [figures[0], *empty, figures[1], *no_op]


def peer_rate(bench: Bench, library: str, work: str, fsync: bool, count: int) -> float:
    """Jobs a second of a peer's worker, from its first to its last, with all of them queued before it starts."""
    folder, port = Path(tempfile.mkdtemp(dir=bench.folder)), free_port()
    (folder / "peer.py").write_text(PEER)
    bin_ = bench.folder / "venv" / "bin"
    environment = os.environ | {
        "LIBRARY": library, "PORT": str(port), "PROGRAM": bench.empty_docker, "FSYNC": "yes" if fsync else "no",
        "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(folder),
    }  # fmt: skip
    settings = "--appendonly yes --appendfsync always" if fsync else ""
    redis = f"redis-server --bind 127.0.0.1 --port {port} {settings}".split()
    options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
    broker = subprocess.Popen(redis, **options)
    worker = None
    try:
        until(lambda: library == "huey" or answers(port), 10)
        subprocess.run([bin_ / "python", "peer.py", work, str(count)], **options, check=True)
        command = [word.format(port=port) for word in PEERS[library]]
        worker = subprocess.Popen(command, **options, stderr=subprocess.DEVNULL)
        return rate_of_growth(folder / "done", count)
    finally:
        for process in (worker, broker):
            if process:
                stop(process)


def rate_of_growth(file: Path, total: int) -> float:
    """Bytes a second that a file grew by, from when it first had any to when it has them all."""
    until(lambda: file.stat().st_size, 60)
    first, began = file.stat().st_size, time.perf_counter()
    until(lambda: file.stat().st_size >= total, 300)
    return (total - first) / (time.perf_counter() - began)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


ROWS: dict[str, Callable[[Bench], list[Figure]]] = {
    "containers-1": functools.partial(containers, slots=1),
    "containers-4": functools.partial(containers, slots=4),
    "empty-docker": empty_docker,
    "protocol": protocol_alone,
    "post-1": functools.partial(post, connections=1, at_least=4_000),
    "post-16": functools.partial(post, connections=16, at_least=9_000),
    "post-64": functools.partial(post, connections=64, at_least=11_000),
    "post-list": post_list,
    "latency": latency,
    "latency-million": latency_million,
    "workers-1000": workers_1000,
    "idle": idle,
}
MORE: dict[str, Callable[[Bench], list[Figure]]] = {"peers": peers, "scale": scale, "long": long}


def table(name: str, figures: list[Figure]) -> Iterator[str]:
    ours = figures[0]
    for figure in figures:
        ours = ours if figure.is_limit else figure
        ratio = f"{ours.median / figure.median:.2f}" if figure.is_limit and figure.median else ""
        spread = f"{number(min(figure.samples))} .. {number(max(figure.samples))}"
        yield (
            f"{name if figure is figures[0] else '':<16}{figure.what:<48}{number(figure.median):>8} {figure.unit:<12}"
            f"{spread:<20}{ratio:>6}  {figure.budget:<18} {figure.kept}"
        ).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast jobworker is here, beside what else does the same.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="these rows alone; --list names them")
    parser.add_argument("--list", action="store_true", help="which rows there are")
    parser.add_argument("--quick", action="store_true", help="for a moment each, only to see that they run")
    for name, function in MORE.items():
        parser.add_argument(f"--{name}", action="append_const", dest="more", const=name, help=function.__doc__)
    options = parser.parse_args()
    rows = ROWS | MORE
    if unknown := [name for name in options.rows if name not in rows]:
        parser.error(f"no row {unknown[0]}; there are: {', '.join(rows)}")
    if options.list:
        print("\n".join(rows))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    head = f"{'row':<16}{'what':<48}{'median':>8} {'':<12}{'min .. max':<20}{'ratio':>6}  {'budget':<18} how it is kept"
    print(head, flush=True)
    for name in options.rows or options.more or ROWS:
        bench = Bench(options.quick)
        with bench.row():
            try:
                print("\n".join(table(name, rows[name](bench))), flush=True)
            except SkippedError as error:
                print(f"{name:<16}skipped: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
