"""Measures jobworker against the budget, each figure beside a limit or a peer measured in the same run.

A row of the budget is a function that takes turns (ours, peer, ours, peer ...), so that what else goes on in the machine
hits both alike. Its figures are printed as medians with the least and the most of all turns; `ratio` is ours divided by
that line's. Nothing runs with weaker durability than the default, and each line says what survives a power cut.

Load generators and scripted workers are processes of their own (`beside`), lean enough not to be what is measured.
Black box: of ours only server.py and client.py are run, as a user would.

    python checks/bench.py                  every row
    python checks/bench.py post-16 idle     these rows
    python checks/bench.py --list           what rows there are
    python checks/bench.py --quick          each for a moment, only to see that it runs
"""

import argparse
import asyncio
import contextlib
import functools
import http.client
import json
import multiprocessing
import os
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
FSYNC = "fsync before the answer"
NOTHING = "nothing"
JOBS = """\
- {name: empty, image: busybox, command: ["true"]}
- {name: nobody, image: busybox, tags: [nobody]}
"""


@dataclass
class Figure:
    """One line of the table: what was measured, in turns, and what the budget says of it."""

    what: str
    unit: str
    survives: str = ""  # a power cut
    at_least: float | None = None
    at_most: float | None = None
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


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


# The programs measured


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

    def ask(self, method: str, path: str, body: object = None) -> Any:
        self._http.request(method, path, None if body is None else json.dumps(body))
        response = self._http.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {text}")
        return json.loads(text)

    def post_list(self, count: int, name: str = "empty") -> float:
        """Queue `count` jobs by one request; how many seconds that took."""
        body = json.dumps([{"name": name}] * count)
        began = time.perf_counter()
        self._http.request("POST", "/api/jobs", body)
        self._http.getresponse().read()
        return time.perf_counter() - began

    def finished(self) -> int:
        return int(self.ask("GET", "/healthz")["jobs"]["success"])

    def wait_until_finished(self, total: int) -> None:
        deadline = time.monotonic() + 600
        while self.finished() < total:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{total - self.finished()} jobs are not final")
            time.sleep(0.005)


def started(bench: "Bench", command: list[str], log: Path, until: str) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a Python program of ours; give its process once a line of its log holds `until`, and that line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JOBWORKER_")}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=output)
    bench.stack.callback(stop, process)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if until in line:
                return process, line
        time.sleep(0.002)
    raise RuntimeError(f"{command} did not start: {log.read_text()[-2000:]}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def start_worker(bench: "Bench", server: Server, slots: int, docker: str) -> int:
    """Start a worker of ours and wait until it is connected; its process id."""
    command = ["client.py", "--name=bench", f"--slots={slots}", f"--docker={docker}", f"127.0.0.1:{server.port}/runner"]
    return started(bench, command, server.folder / "worker.log", "connected to ")[0].pid


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
        folder = Path(tempfile.mkdtemp(prefix="jobworker-bench-"))
        program = folder / "docker"
        (folder / "docker.c").write_text("int main(void) { return 0; }\n")
        command = ["cc", "-O2", "-static", "-o", str(program), str(folder / "docker.c")]
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
    """POST over keep-alive connections, each as soon as its last answer is there; send how many a second were answered."""
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
        """Not a word."""


def bare_http(pipe: Any) -> None:
    """http.server that answers every POST at once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    pipe.send(server.server_address[1])
    server.serve_forever()


BATCH, ENQUEUE, GO, SETTLED, RUNNING, SUCCESS = 31, 2, 16, 18, 1, 2
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


def answer_at_once(pipe: Any, port: int, slots: int, count: int) -> None:
    """A worker whose jobs take no time; send how many a second were settled, from its Hello on."""

    async def work() -> None:
        async with runner(port) as server:
            began, settled = time.perf_counter(), 0
            await server.send(hello("scripted", slots))
            while settled < count:
                replies = []
                for frame in parts(await server.recv()):
                    if frame[0] == ENQUEUE:
                        replies.append(b"\x01" + frame[1:5] + b'{"attempt":1}')
                    elif frame[0] == GO:
                        replies.append(b"\x02" + frame[1:5] + b'{"attempt":1,"exit_code":0}')
                    elif frame[0] == SETTLED:
                        settled += 1
                if replies:
                    await server.send(batch(replies))
            pipe.send(count / (time.perf_counter() - began))

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


def sqlite_updates(bench: Bench, count: int, group: int) -> float:
    """Jobs a second through three updates each, in durable groups, with nothing else around them."""
    database = open_table(bench)
    rows = [("empty", "queued")] * count
    database.execute("BEGIN")
    database.executemany("INSERT INTO job (name, state) VALUES (?, ?)", rows)
    database.execute("COMMIT")
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


def post(bench: Bench, connections: int, at_least: float) -> list[Figure]:
    server = Server(bench)
    http_port = bench.beside(bare_http).result()
    ours = Figure(f"POST of one job, {connections} connections", "jobs/s", FSYNC, at_least=at_least)
    front = Figure("ThreadingHTTPServer alone", "requests/s", NOTHING)
    disk = Figure("SQLite FULL alone, one by one", "commits/s", "fsync each")
    for _ in bench.turns:
        for figure, port in ((ours, server.port), (front, http_port)):
            figure.add(bench.beside(post_for, port, connections, bench.seconds(2)).result())
        disk.add(sqlite_alone(bench, bench.seconds(1)))
    return [ours, front, disk]


def post_list(bench: Bench) -> list[Figure]:
    server = Server(bench)
    count = bench.count(20_000)
    ours = Figure(f"POST of a list of {count}", "jobs/s", FSYNC, at_least=150_000)
    disk = Figure("SQLite FULL alone, one transaction", "rows/s", "fsync at the end")
    for _ in bench.turns:
        ours.add(count / server.post_list(count))
        database, began = open_table(bench), time.perf_counter()
        database.execute("BEGIN")
        database.executemany("INSERT INTO job (name, state) VALUES (?, ?)", [("empty", "queued")] * count)
        database.execute("COMMIT")
        disk.add(count / (time.perf_counter() - began))
    return [ours, disk]


def protocol_alone(bench: Bench) -> list[Figure]:
    server = Server(bench)
    slots, count = 64, bench.count(20_000)
    bare_port = bench.beside(bare_websockets).result()
    ours = Figure(f"a worker that answers at once, {slots} slots", "jobs/s", "fsync of each of 3 steps", at_least=11_000)
    bare = Figure("the same frames, jobs only counted", "jobs/s", NOTHING)
    disk = Figure(f"SQLite FULL alone, 3 updates a job in groups of {slots}", "jobs/s", "fsync each group")
    for _ in bench.turns:
        server.post_list(count)
        ours.add(bench.beside(answer_at_once, server.port, slots, count).result())
        bare.add(bench.beside(answer_at_once, bare_port, slots, count).result())
        disk.add(sqlite_updates(bench, count, slots))
    return [ours, bare, disk]


def empty_docker(bench: Bench) -> list[Figure]:
    server, count = Server(bench), bench.count(5_000)
    start_worker(bench, server, 8, bench.empty_docker)
    ours = Figure("an empty docker, 8 slots", "jobs/s", "fsync of each of 3 steps", at_least=4_500)
    alone = [Figure(f"subprocess.run of it alone, {threads} threads", "runs/s", NOTHING) for threads in (1, 4)]
    command = [bench.empty_docker, "run", "--pull", "never", "--name", "jobworker-00000000-1-1", "busybox", "true"]
    for turn in bench.turns:
        began = time.perf_counter()
        server.post_list(count)
        server.wait_until_finished(count * (turn + 1))
        ours.add(count / (time.perf_counter() - began))
        for figure, threads in zip(alone, (1, 4), strict=True):
            figure.add(run_alone(command, threads, bench.seconds(1)))
    return [ours, *alone]


ROWS: dict[str, Callable[[Bench], list[Figure]]] = {
    "empty-docker": empty_docker,
    "protocol": protocol_alone,
    "post-1": functools.partial(post, connections=1, at_least=4_000),
    "post-16": functools.partial(post, connections=16, at_least=9_000),
    "post-64": functools.partial(post, connections=64, at_least=11_000),
    "post-list": post_list,
}


def table(name: str, figures: list[Figure]) -> list[str]:
    ours = figures[0].median
    lines = []
    for figure in figures:
        ratio = f"{ours / figure.median:.2f}" if figure.unit.endswith("/s") and figure is not figures[0] else ""
        spread = f"{number(min(figure.samples))} .. {number(max(figure.samples))}"
        lines.append(
            f"{name if figure is figures[0] else '':<14}{figure.what:<52}{number(figure.median):>9} {figure.unit:<11}"
            f"{spread:<20}{ratio:>6}  {figure.budget:<18}{figure.survives}".rstrip()
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name in options.rows or ROWS:
        bench = Bench(options.quick)
        with bench.row():
            print("\n".join(table(name, ROWS[name](bench))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
