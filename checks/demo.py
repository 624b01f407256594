"""Shows what jobworker does: `make demo`, or `make run` for a server and a worker that stay (`demo.py --stay`).

The demo types for its reader: a server and two workers start, curl asks for a job and for what came of it. It prints
what they answer, word for word, and fails when they do. `docker`, or what JOBWORKER_DOCKER names, has to reach an
engine with the image hello-world.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
PORT = 8080  # where it is free
READY_SECONDS = 30
JOB_SECONDS = 60
STOP_SECONDS = 20
LOG_CHARACTERS = 4_000  # of the programs' log, where the demo fails


class DemoError(Exception):
    """Something did not come out as it should; the message says what."""


@contextmanager
def started(port: int, database: Path, workers: int, log: IO[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Have a server and its workers, connected, for as long as the block runs; each line in `log` says whose it is."""
    own = {name for name in os.environ if name.startswith("JOBWORKER_") and name != "JOBWORKER_DOCKER"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    commands = {"server": ["server.py", f"--port={port}", f"--database={database}", "jobs.yaml"]}
    commands |= {f"worker-{count}": ["client.py", f"localhost:{port}/runner"] for count in range(1, workers + 1)}
    processes: list[subprocess.Popen[str]] = []
    copies: list[threading.Thread] = []
    try:
        for count, (name, command) in enumerate(commands.items()):
            words = [sys.executable, *command]
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
            processes.append(process)
            copies.append(threading.Thread(target=copy_log, args=(name, process, log), daemon=True))
            copies[-1].start()
            wait_for_workers(port, count, processes)
        yield processes
    finally:
        for process in reversed(processes):
            stop(process)
        for copy in copies:
            copy.join(STOP_SECONDS)


def copy_log(name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
    """Write each line of a program's log with its name, until the program ends."""
    for line in process.stderr or ():
        log.write(f"{name:8} | {line}")
        log.flush()


def wait_for_workers(port: int, count: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1) as answer:
            if json.load(answer)["workers"] == count:
                return
        time.sleep(0.05)
    raise DemoError("The server and its workers did not come up: see above.")


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def demo() -> None:
    port = free_port()
    print(f"Starting a server on port {port} and two workers ...", flush=True)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        try:
            with started(port, Path(folder, "jobs.db"), 2, log):
                show(f"localhost:{port}/api")
        except Exception:
            print(Path(log.name).read_text()[-LOG_CHARACTERS:], file=sys.stderr)
            raise
    print(f"\nNext: `make run`, then http://localhost:{PORT} for the dashboard. Your own jobs go into jobs.yaml.")


def show(api: str) -> None:
    job = json.loads(curl("-XPOST", f"{api}/jobs/hello-world")).get("id")
    if not json.loads(curl(f"{api}/jobs/{job}?wait={JOB_SECONDS}")).get("success"):
        raise DemoError("The job did not succeed.")
    if "Hello from Docker!" not in curl(f"{api}/jobs/{job}/log"):
        raise DemoError("The job's log is not what its container wrote.")
    curl(f"{api}/jobs")
    curl(f"{api}/workers")


def curl(*arguments: str) -> str:
    """Print a request as a user would type it, then its answer; without curl, what curl would have done."""
    print(f"\n$ curl {shlex.join(arguments)}", flush=True)
    if shutil.which("curl"):
        command = ["curl", "--silent", "--show-error", *arguments]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    else:
        request = urllib.request.Request(f"http://{arguments[-1]}", method="POST" if "-XPOST" in arguments else "GET")
        with urllib.request.urlopen(request) as response:
            answer = response.read().decode()
    print(answer.rstrip("\n"), flush=True)
    return answer


def stay() -> None:
    """Run a server with its jobs.db and a worker, until a signal comes or one of them ends."""
    port = free_port()
    with started(port, ROOT / "jobs.db", 1, sys.stderr) as processes:
        print(f"\nThe dashboard: http://localhost:{port}\nA job: curl -XPOST localhost:{port}/api/jobs/hello-world")
        print("Ctrl-C ends both.\n", flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)


def free_port() -> int:
    for port in (PORT, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise DemoError("No port is free on 127.0.0.1.")


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    staying = sys.argv[1:] == ["--stay"]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    os.environ["no_proxy"] = "*"  # all of this stays on this machine
    try:
        stay() if staying else demo()
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if staying else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
