"""The stage of the benchmarks: servers and workers of ours as processes, what they cost, and what has to be ended."""

import contextlib
import functools
import http.client
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 60
MEBI = 1024 * 1024
JOBS = """\
- {name: empty, image: busybox, command: ["true"]}
- {name: nobody, image: busybox, tags: [nobody]}
- {name: here, image: busybox, tags: [here]}
"""


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
        response = self._answer("POST", "/api/jobs", body)
        answer = response.read()
        took = time.perf_counter() - began
        if response.status != 200:
            raise RuntimeError(f"POST of a list: {response.status} {answer[:200]!r}")
        return took

    def queue(self, count: int, name: str) -> None:
        """Queue any number of jobs, by as many requests as that takes."""
        for first in range(0, count, 20_000):
            self.post_list(min(20_000, count - first), name)

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
        last = self.ask("POST", "/api/jobs", [{"name": "empty"}] * count)[-1]["id"]
        while self.ask("GET", f"/api/jobs/{last}?wait=15")["state"] in ("queued", "assigned", "running"):
            pass  # instead of asking often, which would be counted as what a job costs
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


def ending_at_once(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function so that SIGTERM ends it: by the bench's handler a bare server would wait for its connections."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    function(*arguments)


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


def start_worker(bench: "Bench", server: Server, slots: int, docker: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start a worker of ours and wait until it is connected."""
    name = f"bench-{server.pid}"
    url = f"127.0.0.1:{server.port}/runner"
    command = ["client.py", f"--name={name}", f"--slots={slots}", f"--docker={docker}", *options, url]
    return started(bench, command, server.folder / "worker.log", "connected to ")[0]


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """What a process has used, with its threads that have ended: to the nanosecond, where `stat` counts hundredths."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it of a process


EMPTY_DOCKER = """\
#include <stdio.h>
#include <string.h>
int main(int count, char **words) {
    if (count > 1 && strcmp(words[1], "rm") == 0)
        while (--count > 1)
            if (*words[count] != '-')
                puts(words[count]);
    return 0;
}
"""


class Bench:
    """What all rows share: how long to measure, a folder, and what has to be ended at a row's end."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.turns = range(1 if quick else 5)
        self.stack = contextlib.ExitStack()
        self.folder = Path()

    def count(self, number_: int) -> int:
        return max(number_ // 1_000, 2) if self.quick else number_

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
        """A `docker` that does nothing but name what it removes: a static program where there is a C compiler."""
        source, program = self.folder / "docker.c", self.folder / "docker"
        source.write_text(EMPTY_DOCKER)
        command = ["cc", "-O2", "-static", "-o", str(program), str(source)]
        if shutil.which("cc") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            print("No C compiler makes a static program here: `true` is the empty docker.", file=sys.stderr)
            shutil.copy(shutil.which("true") or "/bin/true", program)
        return str(program)


class Beside:
    """A function in a process of its own, called with a pipe and its arguments; `result` waits for what it sends."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork has memory that earlier rows have left free
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=ending_at_once, args=(function, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0

    def result(self) -> Any:
        return self._pipe.recv()

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
