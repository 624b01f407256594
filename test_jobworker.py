"""The tests of jobworker, from outside: real processes, real sockets, kill -9.

First the instruments: `until` instead of sleeps, `Stage` (a folder in which servers and workers run as real processes
beside a `docker` stand-in that keeps a ledger), peers that speak either version of the wire by script, raw sockets.
Then a class per role and per promise of the design; each test is a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import py_compile
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server as WebSocketServer
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Origin, Subprotocol

import protocol

ROOT = Path(__file__).resolve().parent
FINAL = {"success", "failure", "cancelled"}
VERSION_2 = Subprotocol("jobworker.2")

JOBS = """
- name: hello-world
  image: hello-world
- name: sh
  image: busybox
  command: [sh, -c, 'eval "$SCRIPT"']
  parameters: {SCRIPT: {required: true}}
  stop_grace_period: 1s
- name: quick
  image: busybox
  command: "true"
"""

Value = TypeVar("Value")


def until(condition: Callable[[], Value | None], seconds: float = 10) -> Value:
    """Wait until `condition` is true and return what it gave; fail when that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s this is still {value!r}"
        time.sleep(0.01)
    return value


# -- programs ----------------------------------------------------------------------------------------------------------


class Program:
    """One of our two programs as a real process; what it writes to stderr is in a file that outlives restarts."""

    def __init__(self, folder: Path, path: str, *arguments: str, **environment: str) -> None:
        self.command = [sys.executable, str(ROOT / path), *arguments]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_") and "proxy" not in k.lower()}
        self.environment = kept | {"TMPDIR": str(folder)} | environment
        self.file = folder / f"{path}-{len(list(folder.glob('*.stderr')))}.stderr"
        self.file.touch()

    def start(self) -> None:
        self.before = self.file.stat().st_size
        with self.file.open("ab") as stderr:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        """What it wrote since its last start."""
        return self.file.read_bytes()[self.before :].decode()

    def said(self, pattern: str) -> re.Match[str] | None:
        assert self.process.poll() is None or re.search(pattern, self.stderr), self.stderr
        return re.search(pattern, self.stderr)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds: float = 10) -> int:
        self.signal(signal.SIGTERM)
        return self.exit_code(seconds)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server(Program):
    """`python server.py` on a free port, which it keeps when it is started again."""

    port = 0

    def start(self) -> None:
        if self.port:
            self.command[self.command.index("-p") + 1] = str(self.port)
        super().start()
        found = until(lambda: self.said(r"listening on http://127\.0\.0\.1:(\d+)"))
        self.port = int(found[1])

    def http(
        self, method: str, path: str, body: Any = None, seconds: float = 10, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def get(self, path: str) -> Any:
        reply = self.http("GET", path)
        assert reply.status == 200, reply
        return reply.json

    def post(self, name: str, **options: Any) -> int:
        """Ask for a job and return its id."""
        reply = self.http("POST", f"/api/jobs/{name}", options or None)
        assert reply.status == 200, reply
        return int(reply.json["id"])

    def sh(self, script: str, name: str = "sh", **options: Any) -> int:
        return self.post(name, environment={"SCRIPT": script}, **options)

    def memory_kib(self) -> int:
        [size] = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(size)

    def knows(self, worker: str) -> bool:
        """Whether a worker of this name is connected; yes where that is not for us to know."""
        reply = self.http("GET", "/api/workers?full=1")
        return reply.status == 401 or worker in [one["name"] for one in reply.json]

    def job(self, job: int) -> Any:
        return self.get(f"/api/jobs/{job}")

    def state(self, job: int) -> str:
        return str(self.job(job)["state"])

    def ended(self, job: int, seconds: float = 20) -> Any:
        """Wait for a job's final state and return the job."""
        return until(lambda: found if (found := self.job(job))["state"] in FINAL else None, seconds)

    def log(self, job: int, query: str = "") -> bytes:
        reply = self.http("GET", f"/api/jobs/{job}/log{query}")
        assert reply.status == 200, reply
        return reply.body

    def raw(self, data: bytes, half_close: bool = False, seconds: float = 8) -> bytes:
        """Send bytes as they are; return all that comes back before the server closes, which it must."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as peer:
            with contextlib.suppress(ConnectionError):
                peer.sendall(data)
                if half_close:
                    peer.shutdown(socket.SHUT_WR)
            return read_to_end(peer)


def read_to_end(peer: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := peer.recv(65536):
            received += data
    return received


class Worker(Program):
    """`python client.py`, connected."""

    def start(self) -> None:
        super().start()
        until(lambda: self.said("connected to "))


# -- docker ------------------------------------------------------------------------------------------------------------

STAND_IN = '''
"""As much of docker as client.py needs. A container is a local process; its state is a folder beside this file."""
import fcntl, os, signal, sys, time

HERE = os.path.dirname(os.path.abspath(__file__)) + "/"
BOXES = HERE + "containers/"
RUN_FLAGS = "--init --rm -i -t --interactive --tty --privileged --read-only --oom-kill-disable"


def main(verb, *words):
    if os.path.exists(HERE + "down"):
        fail("Cannot connect to the Docker daemon. Is the docker daemon running?", 125 if verb == "run" else 1)
    if verb in ("container", "image") and words:
        verb, words = words[0] if verb == "container" else verb + " " + words[0], words[1:]
    ledger("call", verb, os.getpid())
    time.sleep(float(read(HERE + verb + "-delay", "0")))
    {"run": run, "rm": rm, "pull": pull, "inspect": inspect, "image inspect": image_inspect, "ps": ps, "ls": ps,
     "kill": kill, "stop": stop, "start": start, "--shim": shim, "wait": wait,
     "logs": logs}.get(verb, lambda *words: None)(*words)


def fail(text, code=1):
    sys.stderr.write("docker: " + text + "\\n")
    sys.stderr.flush()
    os._exit(code)


def read(path, default=None):
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return default


def write(path, text):
    with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.rename(path + ".new", path)


def ledger(event, name, *details):
    line = "\\t".join([event, name, *map(str, details)]).replace("\\n", " ") + "\\n"
    file = os.open(HERE + "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, line.encode(errors="surrogateescape"))
    os.close(file)


def split(words, flags=""):
    """Options, each with its values, and what stands behind them; the flags take no value."""
    options, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        word, equals, value = rest.pop(0).partition("=")
        if word == "--":
            break
        if not equals and word not in flags.split():
            value = rest.pop(0)
        options.setdefault(word, []).append(value)
    return options, rest


def run(*words):
    options, (image, *command) = split(words, RUN_FLAGS)
    name = options["--name"][0]
    own = [os.environ.get(key, "") for key in ("DOCKER_HOST", "DOCKER_CONFIG", "PATH", "HOME", "LD_PRELOAD")]
    ledger("run", name, os.getpid(), "|".join(own), *words)
    if image not in read(HERE + "images").split():
        fail("Error response from daemon: No such image: " + image, 125)
    new = "%s.%s%d" % (BOXES, name, os.getpid())
    os.mkdir(new)
    write(new + "/argv", "\\0".join(words))
    write(new + "/log", "")
    try:
        os.rename(new, BOXES + name)
    except OSError:
        fail('Error response from daemon: Conflict. The container name "/%s" is already in use.' % name, 125)
    time.sleep(float(read(HERE + "start-delay", "0")))
    box = BOXES + name + "/"
    attached = start(name)
    if attached is None:
        os.write(1, open(box + "log", "rb").read())
        os._exit(137 if image == "oom" else 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signal_group(int(read(box + "pid", "0")), number))
    follow(open(box + "log", "rb"), attached)


def start(name):
    """Start what is created; the pipe on which its end will be told, None where it has ended already."""
    box = box_of(name)
    if os.path.exists(box + "pid") or os.path.exists(box + "exit"):
        return None
    _, (image, *command) = split(read(box + "argv").split("\\0"), RUN_FLAGS)
    log = os.open(box + "log", os.O_WRONLY | os.O_APPEND)
    if image != "busybox" or command == ["true"]:
        if image == "hello-world":
            os.write(log, b"Hello from Docker!\\n")
        ledger("start", name, os.getpid())
        finish(box, name, 137 if image == "oom" else 0, image == "oom")
        return None
    attached, ended = os.pipe()
    if os.fork() == 0:
        os.close(attached)
        for file in (log, ended):
            os.set_inheritable(file, True)
        # By its own command line: this is not `docker run` any more.
        os.execv(HERE + "docker", [HERE + "docker", "--shim", name, str(log), str(ended)])
    os.close(ended)
    return attached


def shim(name, log, attached):
    """The container's parent: outlives the attached docker, keeps the exit code."""
    os.setsid()
    box, log, attached = BOXES + name + "/", int(log), int(attached)
    options, (image, *command) = split(read(box + "argv", "busybox").split("\\0"), RUN_FLAGS)
    from_files = [line for path in options.get("--env-file", []) for line in read(path).splitlines()]
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(attached)
        os.close(go)
        if not os.read(ready, 1):
            os._exit(0)
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOSTNAME": name}
        for word in from_files + options.get("--env", []) + options.get("-e", []):
            key, equals, value = word.partition("=")
            if equals or key in os.environ:
                environment[key] = value if equals else os.environ[key]
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_DFL)
        os.chdir("/")
        try:
            os.execvpe(command[0], command, environment)
        except OSError as error:
            os.write(2, b"exec: no such file\\n")
            os._exit(127)
    try:
        with Locked(box):
            if os.path.exists(box + "pid"):
                os._exit(0)
            write(box + "pid", str(pid))
            ledger("start", name, pid)
            os.write(go, b"1")
    except OSError:
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    signal_group(pid, signal.SIGKILL)
    finish(box, name, code, False)
    try:
        os.write(attached, str(code).encode())
    except OSError:
        pass
    os._exit(0)


def finish(box, name, code, oom):
    ledger("end", name, code)
    try:
        write(box + "exit", "%d %d" % (code, oom))
    except OSError:
        pass


def follow(log, ended):
    """Copy the log to stdout until the pipe says how the container ended."""
    import select
    while True:
        done = select.select([ended], [], [], 0.01)[0]
        while data := log.read(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        if done:
            code = os.read(ended, 9)
            os._exit(int(code) if code else 125)


class Locked:
    """Starting and removing a container exclude each other."""
    def __init__(self, box):
        self.file = os.open(box, os.O_RDONLY)
    def __enter__(self):
        fcntl.flock(self.file, fcntl.LOCK_EX)
    def __exit__(self, *_):
        os.close(self.file)


def box_of(name):
    if not os.path.isdir(BOXES + name):
        fail("Error response from daemon: No such container: " + name)
    return BOXES + name + "/"


def signal_group(pid, number):
    try:
        pid and os.killpg(pid, number)
    except ProcessLookupError:
        pass


def is_running(box):
    return os.path.exists(box + "pid") and not os.path.exists(box + "exit")


def wait_for_end(box, seconds):
    deadline = time.monotonic() + seconds
    while is_running(box) and time.monotonic() < deadline:
        time.sleep(0.01)


def rm(*words):
    options, names = split(words, "-f --force -v --volumes -fv -vf")
    code = 0
    for name in names:
        box = BOXES + name + "/"
        if not os.path.isdir(box):
            sys.stderr.write("Error: No such container: %s\\n" % name)
            code = 1
            continue
        gone = "%s.gone%d" % (BOXES, os.getpid())
        try:
            with Locked(box):
                if is_running(box):
                    if not {"-f", "--force", "-fv", "-vf"} & set(options):
                        fail("You cannot remove a running container")
                    signal_group(int(read(box + "pid")), signal.SIGKILL)
                    wait_for_end(box, 5)
                os.rename(box, gone)
        except OSError:
            continue
        ledger("remove", name)
        for file in os.listdir(gone):
            os.unlink(gone + "/" + file)
        os.rmdir(gone)
        print(name)
    sys.exit(code)


def pull(*words):
    image = split(words, "-q --quiet")[1][0]
    ledger("pull", image)
    if image not in read(HERE + "registry", "").split():
        fail("Error response from daemon: manifest for %s not found: manifest unknown" % image)
    with open(HERE + "images", "a") as file:
        file.write(image + "\\n")


def state(box):
    code, oom = (read(box + "exit") or "0 0").split()
    status = "exited" if os.path.exists(box + "exit") else "running" if os.path.exists(box + "pid") else "created"
    return {"Status": status, "Running": status == "running", "Pid": int(read(box + "pid", "0")), "Error": "",
            "ExitCode": int(code), "OOMKilled": oom == "1",
            "StartedAt": time_of(box + "pid"), "FinishedAt": time_of(box + "exit")}


def time_of(path):
    seconds = os.stat(path).st_mtime if os.path.exists(path) else -62135596800
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + (".%09dZ" % (seconds % 1 * 1e9))


def description(name):
    box = BOXES + name + "/"
    options, (image, *command) = split(read(box + "argv").split("\\0"), RUN_FLAGS)
    labels = dict(label.partition("=")[::2] for label in options.get("--label", []) + options.get("-l", []))
    return {"Id": name, "Name": "/" + name, "State": state(box), "Config": {"Labels": labels, "Image": image},
            "Created": "2026-11-24T08:00:00.123456789Z", "RestartCount": 0}


def render(template, value):
    import json, re
    def look(path, value):
        for key in filter(None, path.split(".")):
            value = value[key]
        return value
    def fill(match):
        words = match[1].replace('"', "").split()
        if words[0] == "json":
            return json.dumps(look(words[1], value))
        if words[0] == ".Label":
            return value["labels"].get(words[1], "")
        if words[0] == "index":
            return str(look(words[1], value).get(words[2], ""))
        found = look(words[0], value)
        return str(found).lower() if isinstance(found, bool) else str(found)
    return re.sub("{{ *(.*?) *}}", fill, template.replace("\\\\t", "\\t"))


def inspect(*words):
    import json
    options, names = split(words)
    template = (options.get("--format") or options.get("-f") or [None])[0]
    found = [description(name) for name in names if os.path.isdir(BOXES + name)]
    print(json.dumps(found) if template is None else "\\n".join(render(template, one) for one in found))
    for name in names:
        if not os.path.isdir(BOXES + name):
            sys.stdout.flush()
            fail("Error: No such object: " + name)


def image_inspect(*words):
    for image in split(words)[1]:
        if image not in read(HERE + "images").split():
            print("[]", flush=True)
            fail("Error: No such image: " + image)
    print('[{"Id": "sha256:1"}]')


def ps(*words):
    options, _ = split(words, "-a --all -q --quiet --no-trunc -aq")
    wanted = options.get("--filter", []) + options.get("-f", [])
    for name in sorted(os.listdir(BOXES)):
        if name.startswith("."):
            continue
        try:
            one = description(name)
        except (OSError, AttributeError):
            continue
        labels, status = one["Config"]["Labels"], one["State"]["Status"]
        if not {"-a", "--all", "-aq"} & set(options) and status != "running":
            continue
        if all(matches(filter.partition("=")[2], labels) for filter in wanted if filter.startswith("label=")):
            flat = {"Names": name, "ID": name, "State": status, "Status": status, "Image": one["Config"]["Image"],
                    "labels": labels, "Labels": ",".join(map("=".join, labels.items()))}
            flat[""] = flat
            template = options.get("--format", ["{{.ID}}"])[0]
            import json
            print(json.dumps(flat) if template == "json" else render(template, flat))


def matches(wanted, labels):
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def kill(*words):
    options, names = split(words)
    for name in names:
        box = box_of(name)
        if not is_running(box):
            fail("Error response from daemon: Container %s is not running" % name)
        number = (options.get("--signal") or options.get("-s") or ["KILL"])[0]
        ledger("kill", name, number)
        os.kill(int(read(box + "pid")), getattr(signal, "SIG" + number.removeprefix("SIG")))


def stop(*words):
    options, names = split(words)
    seconds = float((options.get("--time") or options.get("-t") or options.get("--timeout") or ["10"])[0])
    for name in names:
        box = box_of(name)
        ledger("stop", name, seconds)
        if not is_running(box):
            continue
        os.kill(int(read(box + "pid")), signal.SIGTERM)
        wait_for_end(box, seconds)
        if is_running(box):
            signal_group(int(read(box + "pid")), signal.SIGKILL)
            wait_for_end(box, 5)


def wait(*words):
    for name in split(words)[1]:
        box = box_of(name)
        while not os.path.exists(box + "exit"):
            if not os.path.isdir(box):
                fail("Error response from daemon: No such container: " + name)
            time.sleep(0.01)
        print(read(box + "exit").split()[0])


def logs(*words):
    options, (name, *_) = split(words, "-f --follow -t --timestamps")
    box = box_of(name)
    log = open(box + "log", "rb")
    while True:
        last = not is_running(box)
        sys.stdout.buffer.write(log.read())
        sys.stdout.buffer.flush()
        if last or not ("--follow" in options or "-f" in options):
            return
        time.sleep(0.01)
'''


class Docker:
    """The `docker` stand-in: a script to be put first on PATH, its containers, and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers").mkdir(parents=True)
        self.allow("hello-world busybox oom")
        (folder / "stand_in.py").write_text(STAND_IN)
        py_compile.compile(str(folder / "stand_in.py"))  # with this, a call takes 10 ms, without 16
        script = folder / "docker"
        start = f"import sys; sys.path.insert(0, {str(folder)!r}); import stand_in; stand_in.main(*sys.argv[1:])"
        script.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{start}\n")
        script.chmod(0o755)

    def allow(self, images: str) -> None:
        (self.folder / "images").write_text(images + "\n")

    def ledger(self, event: str, job: int | None = None) -> list[list[str]]:
        """The lines about an event, each [name, detail, ...]; those of one job, or of all."""
        path = self.folder / "ledger"
        lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
        return [rest for what, *rest in lines if what == event and (job is None or rest[0].split("-")[-2] == str(job))]

    def starts(self, job: int | None = None) -> int:
        return len(self.ledger("start", job))

    def pid(self, job: int) -> int:
        """The process id of the container of this job that started last."""
        return int(self.ledger("start", job)[-1][1])

    def clients(self, job: int) -> list[int]:
        """The process ids of all `docker run` of this job."""
        return [int(line[1]) for line in self.ledger("run", job)]

    def delay(self, verb: str, seconds: float) -> None:
        """Let every `docker VERB` take longer; for "start", every container between its creation and its start."""
        (self.folder / f"{verb}-delay").write_text(str(seconds))

    def calls(self, verb: str) -> list[int]:
        """The process ids of all calls of `docker VERB`."""
        return [int(pid) for called, pid in self.ledger("call") if called == verb]

    def containers(self) -> list[str]:
        """What `docker ps -a` shows."""
        return sorted(path.name for path in (self.folder / "containers").iterdir() if path.name[0] != ".")

    def close(self) -> None:
        for pid_file in self.folder.glob("containers/*/pid"):
            with contextlib.suppress(OSError, ValueError):
                if not (pid_file.parent / "exit").exists():
                    os.killpg(int(pid_file.read_text()), signal.SIGKILL)


class Stage:
    """A folder in which programs run, and one host's docker. At the end all is killed, and no traceback was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.docker = Docker(folder / "docker")
        self.programs: list[Program] = []
        self.jobs = folder / "jobs.yaml"

    def server(self, *arguments: str, jobs: str = JOBS, **environment: str) -> Server:
        self.jobs.write_text(jobs)
        server = Server(self.folder, "server.py", "-p", "0", *arguments, str(self.jobs), **environment)
        self.programs.append(server)
        server.start()
        return server

    def worker(
        self,
        server: Server | ScriptedServer | Relay,
        *arguments: str,
        name: str = "worker",
        connects: bool = True,
        **environment: str,
    ) -> Worker:
        target = f"127.0.0.1:{server.port}/runner"
        environment = {"PATH": f"{self.docker.folder}:{os.environ['PATH']}"} | environment
        worker = Worker(self.folder, "client.py", "--name", name, *arguments, target, **environment)
        self.programs.append(worker)
        worker.start() if connects else Program.start(worker)
        if connects and isinstance(server, Server):
            until(lambda: server.knows(name))
        return worker

    def run(self, path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of our programs to its end, which must come soon."""
        command = [sys.executable, str(ROOT / path), *arguments]
        environment = {**os.environ, **environment}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=10)

    def close(self) -> None:
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()
        self.docker.close()
        for program in self.programs:
            assert "Traceback" not in program.file.read_text()


def meanwhile(scenario: Callable[[Any, Stage], None]) -> Callable[..., None]:
    """Let a test that only waits run beside all others, from their start on; in its place its result is waited for."""

    def test(self: object, results: dict[Any, Future[None]]) -> None:  # noqa: ARG001
        results[scenario].result()

    test.__name__, test.scenario = scenario.__name__, scenario  # type: ignore[attr-defined]
    return test


def play(scenario: Callable[[Any, Stage], None], folder: Path) -> None:
    with contextlib.closing(Stage(folder)) as stage:
        scenario(None, stage)


@pytest.fixture(scope="module", autouse=True)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[None]]]:
    """What the scenarios of those `meanwhile` tests come to that were chosen."""
    scenarios = [getattr(getattr(item, "function", None), "scenario", None) for item in request.session.items]
    with ThreadPoolExecutor(16) as pool:
        folder = tmp_path_factory.mktemp
        yield {each: pool.submit(play, each, folder("meanwhile")) for each in scenarios if each}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path)) as stage:
        yield stage


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("shared"))) as stage:
        yield stage


@pytest.fixture(scope="module")
def idle(shared: Stage) -> Server:
    """A server without workers, which keeps what it is given: for tests that only talk HTTP."""
    return shared.server("--hold")


@pytest.fixture(scope="module")
def busy_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Docker]]:
    """A server with one worker of four slots, for tests that need nothing of their own."""
    with contextlib.closing(Stage(tmp_path_factory.mktemp("busy"))) as stage:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        yield server, stage.docker


# -- peers by script ---------------------------------------------------------------------------------------------------


class ScriptedWorker:
    """A worker that does what the test says; version 1 like the original program, or, with a name, version 2."""

    def __init__(self, server: Server, name: str | None = None, **hello: Any) -> None:
        protocols = [VERSION_2] if name else None
        url = f"ws://127.0.0.1:{server.port}/runner"
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(connect(url, proxy=None, subprotocols=protocols, compression=None))
        self.inbox: list[Any] = []
        if name:
            plain: dict[str, Any] = {"name": name, "slots": 1, "tags": (), "version": "0", "jobs": ()}
            self.send(protocol.Hello(**(plain | hello)))
        self.configs = self.next(protocol.JobConfigs).configs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, bytes | str) else protocol.encode(message))

    def next(self, kind: type[Value], seconds: float = 5) -> Value:
        """The next message of this kind; others stay in the inbox."""
        deadline = time.monotonic() + seconds
        while True:
            for message in self.inbox:
                if isinstance(message, kind):
                    self.inbox.remove(message)
                    return message
            data = self.socket.recv(max(0.01, deadline - time.monotonic()))
            self.inbox += protocol.decode_from_server(data, 2 if self.socket.subprotocol else 1)

    def gets_nothing(self, kind: type[Any], seconds: float = 0.3) -> bool:
        with contextlib.suppress(TimeoutError):
            return self.next(kind, seconds) is None
        return True

    def runs(self) -> protocol.Enqueue:
        """Take the next job as far as its container's start."""
        job = self.next(protocol.Enqueue)
        self.send(protocol.JobRunning(job=job.job, attempt=job.attempt))
        if job.attempt:
            self.next(protocol.Go)
        return job

    def is_closed(self) -> bool:
        return is_closed(self.socket)


def is_closed(peer: ClientConnection, seconds: float = 5) -> bool:
    """Whether the server ends this connection; what it still sends is read away."""
    try:
        while peer.recv(seconds) is not None:
            pass
    except (TimeoutError, ConnectionClosed) as end:
        return isinstance(end, ConnectionClosed)
    return False


class ScriptedServer:
    """A server that does what the test says; version 1 like the original program, or version 2."""

    def __init__(self, *configs: dict[str, Any], version: int = 1, hangs_up: bool = False) -> None:
        self.configs, self.version, self.hangs_up = configs, version, hangs_up
        self.dials: list[float] = []
        self.received: list[Any] = []
        self.peer: ServerConnection | None = None
        self.server: WebSocketServer = serve(
            self.accept,
            "127.0.0.1",
            0,
            subprotocols=[VERSION_2] if version > 1 else None,
            process_response=self.identify,
            compression=None,
        )
        self.port = self.server.socket.getsockname()[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def identify(self, _peer: ServerConnection, _request: object, response: Response) -> None:
        if self.version > 1:
            response.headers["Jobworker-Server"] = "0123abcd"

    def accept(self, peer: ServerConnection) -> None:
        self.dials.append(time.monotonic())
        if self.hangs_up:
            return
        peer.send(protocol.encode(protocol.JobConfigs(configs=self.configs)))
        self.peer = peer
        with contextlib.suppress(ConnectionClosed):
            for data in peer:
                self.received += protocol.decode_from_worker(data, self.version)

    def send(self, message: Any) -> None:
        assert self.peer
        self.peer.send(message if isinstance(message, bytes | str) else protocol.encode(message))

    def wait_for(self, message: Any, seconds: float = 10) -> None:
        until(lambda: message in self.received, seconds)

    def hang_up(self) -> None:
        assert self.peer
        self.peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        if self.peer:
            self.peer.close()


class Relay:
    """A TCP relay in front of a server, so that a test can cut the line or let it go dead."""

    def __init__(self, server: Server) -> None:
        self.target, self.dead, self.dials = server.port, False, 0
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads: list[threading.Thread] = []
        self.start(self.accept)

    def start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        self.threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self.threads[-1].start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                self.dials += 1
                with contextlib.suppress(ConnectionError):
                    far = socket.create_connection(("127.0.0.1", self.target))
                    self.pairs.append((near, far))
                    self.start(self.copy, near, far)
                    self.start(self.copy, far, near)
                    continue
                near.close()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.dead:
                    sink.sendall(data)
        self.cut([(source, sink)])

    def cut(self, pairs: list[tuple[socket.socket, socket.socket]] | None = None) -> None:
        """End all connections; a frozen process will see it when it wakes."""
        for pair in self.pairs if pairs is None else pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self.threads:
            thread.join(5)
        for each in (self.listener, *(end for pair in self.pairs for end in pair)):
            each.close()


# -- the wire ----------------------------------------------------------------------------------------------------------

FRAMES = ROOT / "checks" / "frames"
ENCODED = [case for case in json.loads((FRAMES / "encode.json").read_text()) if case["hex"]]
DECODED = json.loads((FRAMES / "decode.json").read_text())
KNOWN_TAGS = {"server->runner": b"\1\2", "runner->server": b"\1\2\3"}


def recorded_message(kind: str, job: int = 0, name: str = "", configs: Any = ()) -> Any:
    if kind == "JobConfigs":
        return protocol.JobConfigs(configs=tuple(configs))
    if kind == "Enqueue":
        return protocol.Enqueue(job=job, name=name)
    return getattr(protocol, kind)(job=job)


def expected_of(case: dict[str, Any]) -> Any:
    """What decoding a recorded frame must give: messages, or ProtocolError where the original throws or invents."""
    frame, result = bytes.fromhex(case["hex"]), case["result"]
    if frame[:1] not in KNOWN_TAGS[case["direction"]] or not frame:
        return []
    has_broken_name = case["case"].startswith("name ")
    if has_broken_name or result["message"].endswith("Undefined") or '"throws"' in json.dumps(result):
        return protocol.ProtocolError
    return [recorded_message(result["message"], result.get("id"), result.get("name"), result.get("configs"))]


def decode(case: dict[str, Any], data: bytes | str) -> Any:
    decoders = {"server->runner": protocol.decode_from_server, "runner->server": protocol.decode_from_worker}
    try:
        return decoders[case["direction"]](data)
    except protocol.ProtocolError:
        return protocol.ProtocolError


int32 = st.integers(-(2**31), 2**31 - 1)
attempts = st.integers(1, 2**31 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=128)
configs = st.fixed_dictionaries(
    {"command": st.none() | words, "image": words, "name": words}, optional={"timeout": int32, "tags": st.lists(words)}
)
held = st.tuples(
    int32.filter(lambda job: job > -(2**31)), attempts, st.sampled_from(["assigned", "running", "finished"])
)
FROM_SERVER: list[Any] = [
    st.builds(protocol.JobConfigs, st.lists(configs, max_size=3).map(tuple)),
    st.builds(protocol.Enqueue, int32, words, attempts, st.dictionaries(words, words, max_size=3)),
    *(st.builds(kind, int32, attempts) for kind in (protocol.Go, protocol.Stop, protocol.Settled)),
    st.builds(protocol.Logged, int32, attempts, st.integers(0, 2**63 - 1)),
]
FROM_WORKER: list[Any] = [
    st.builds(protocol.JobRunning, int32, attempts),
    st.builds(protocol.JobSuccess, int32, attempts, st.just(0)),
    st.builds(protocol.JobFailure, int32, attempts, st.none() | int32.filter(lambda code: code > -(2**31)), words),
    st.builds(
        protocol.Hello, names, st.integers(1, 10_000), st.lists(words).map(tuple), words, st.lists(held).map(tuple)
    ),
    st.builds(protocol.Log, int32, attempts, st.integers(0, protocol.MAX_LOG_OFFSET - 1), st.binary(max_size=100)),
]
MESSAGES = [kind for kind in vars(protocol).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


class TestFrames:
    """A frame is the original's, byte for byte; what is no frame is a ProtocolError and nothing else."""

    @pytest.mark.parametrize("case", ENCODED, ids=lambda case: f"{case['message']}-{case['hex'][:40]}")
    def test_encoded_as_recorded(self, case: dict[str, Any]) -> None:
        args = case["args"]
        message = recorded_message(case["message"], args.get("id"), args.get("name"), args.get("configs"))
        assert protocol.encode(message).hex() == case["hex"]

    @pytest.mark.parametrize("case", DECODED, ids=lambda case: f"{case['frame']}-{case['case']}-{case['hex'][:12]}")
    def test_decoded_as_recorded(self, case: dict[str, Any]) -> None:
        data = bytes.fromhex(case["hex"])
        assert decode(case, data) == expected_of(case)
        with contextlib.suppress(UnicodeDecodeError):  # such text is refused before it is a frame
            assert decode(case, data.decode()) == expected_of(case)

    @given(st.lists(st.one_of(FROM_SERVER), max_size=5))
    def test_what_a_server_says_survives_the_wire(self, messages: list[Any]) -> None:
        assert [found for one in messages for found in protocol.decode_from_server(protocol.encode(one), 2)] == messages
        assert protocol.decode_from_server(protocol.encode_batch(messages), 2) == messages

    @given(st.lists(st.one_of(FROM_WORKER), max_size=5))
    def test_what_a_worker_says_survives_the_wire(self, messages: list[Any]) -> None:
        assert [found for one in messages for found in protocol.decode_from_worker(protocol.encode(one), 2)] == messages
        assert protocol.decode_from_worker(protocol.encode_batch(messages), 2) == messages

    @given(st.one_of(FROM_SERVER[:2]))
    def test_version_1_reads_the_version_1_part_of_version_2(self, message: Any) -> None:
        plain = (
            {"configs": tuple({k: c[k] for k in ("command", "image", "name")} for c in message.configs)}
            if isinstance(message, protocol.JobConfigs)
            else {"attempt": 0, "environment": None}
        )
        assert protocol.decode_from_server(protocol.encode(message)) == [dataclasses.replace(message, **plain)]

    @given(
        st.sampled_from([0, 1, 2, 3, 4, 16, 17, 18, 19, 31, 32, 255]), st.binary(max_size=64), st.sampled_from([1, 2])
    )
    def test_any_bytes_are_messages_or_a_protocol_error(self, tag: int, rest: bytes, version: int) -> None:
        self.decodes_or_refuses(bytes([tag]) + rest, version)

    @given(st.one_of(FROM_SERVER + FROM_WORKER), st.data())
    def test_a_damaged_frame_is_messages_or_a_protocol_error(self, message: Any, data: st.DataObject) -> None:
        frame = bytearray(protocol.encode(message))
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        self.decodes_or_refuses(bytes(frame[: data.draw(st.integers(0, len(frame)))]), 2)

    @staticmethod
    def decodes_or_refuses(frame: bytes, version: int) -> None:
        for decoder in (protocol.decode_from_server, protocol.decode_from_worker):
            with contextlib.suppress(protocol.ProtocolError):
                assert all(type(message) in MESSAGES for message in decoder(frame, version))

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '[{"name":"\\ud800","image":""}]']
    )
    def test_json_that_hurts_is_a_protocol_error(self, text: str) -> None:
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_from_server(b"\1" + text.encode(), 2)
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_from_worker(b"\1\0\0\0\1" + text.encode(), 2)

    @pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
    def test_the_specification_describes_every_message(self, kind: Any) -> None:
        frame = protocol.encode(SAMPLES[kind])
        assert re.search(rf"^ +{frame[0]} {kind.__name__}\b", protocol.__doc__ or "", re.MULTILINE)

    @pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
    def test_a_message_never_changes(self, kind: Any) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(SAMPLES[kind], dataclasses.fields(kind)[0].name, 2)

    def test_a_batch_within_a_batch_is_a_protocol_error(self) -> None:
        inner = b"\x1f" + struct.pack(">I", 5) + b"\x01\x00\x00\x00\x01"
        with pytest.raises(protocol.ProtocolError, match="another batch"):
            protocol.decode_from_worker(b"\x1f" + struct.pack(">I", len(inner)) + inner, 2)


SAMPLES: dict[Any, Any] = {
    protocol.JobConfigs: protocol.JobConfigs(()),
    protocol.Enqueue: protocol.Enqueue(1, "a", 1),
    protocol.Go: protocol.Go(1, 1),
    protocol.Stop: protocol.Stop(1, 1),
    protocol.Settled: protocol.Settled(1, 1),
    protocol.Logged: protocol.Logged(1, 1, 0),
    protocol.JobRunning: protocol.JobRunning(1, 1),
    protocol.JobSuccess: protocol.JobSuccess(1, 1),
    protocol.JobFailure: protocol.JobFailure(1, 1),
    protocol.Hello: protocol.Hello("a", 1, (), "", ()),
    protocol.Log: protocol.Log(1, 1, 0, b""),
}


# -- the original's session --------------------------------------------------------------------------------------------


class TestTranscript:
    """The original's README, played: the same requests give the same bytes."""

    def test_the_session_of_the_original(self, stage: Stage) -> None:
        server = stage.server(jobs=JOBS + f"- {{name: until, image: busybox, command: {until_file(stage)}}}\n")
        assert server.http("GET", "/api/workers").body == b"[]"
        refused = server.http("POST", "/api/jobs/hello-world")
        assert (refused.status, b"worker is not exist." in refused.body) == (500, True)
        assert server.http("GET", "/api/jobs").body == b"[]"

        stage.worker(server)
        assert server.http("GET", "/api/workers").body == b'[{"id":1,"working":false}]'
        accepted = server.http("POST", "/api/jobs/hello-world")
        assert accepted.headers["Content-Type"] == "application/json"
        assert accepted.body == b'{"id":1,"name":"hello-world","queuing":true,"running":false,"success":false}'
        server.ended(1)
        done = b'{"id":1,"name":"hello-world","queuing":false,"running":false,"success":true}'
        assert server.http("GET", "/api/jobs").body == b"[" + done + b"]"

        server.post("until")
        server.post("quick")
        until(lambda: server.state(2) == "running")
        assert server.http("GET", "/api/workers").body == b'[{"id":1,"working":true}]'
        running = b'{"id":2,"name":"until","queuing":false,"running":true,"success":false}'
        queued = b'{"id":3,"name":"quick","queuing":true,"running":false,"success":false}'
        assert server.http("GET", "/api/jobs").body == b"[" + b",".join((done, running, queued)) + b"]"
        (stage.folder / "go").touch()
        assert server.ended(2)["success"]
        assert server.ended(3)["success"]
        assert server.log(1) == b"Hello from Docker!\n"


def until_file(stage: Stage) -> str:
    """A command, as YAML, that runs until the file `go` is there."""
    return json.dumps(["sh", "-c", f"until [ -e {stage.folder}/go ]; do sleep 0.02; done"])


# -- the HTTP API ------------------------------------------------------------------------------------------------------


def problem(reply: Reply, status: int) -> str:
    """The detail of an error, which must be a well-formed problem document of this status."""
    assert reply.status == status, reply
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert list(reply.json) == ["type", "title", "status", "detail"]
    assert reply.json["status"] == status
    return str(reply.json["detail"])


PARAMETERS = """
- name: 日本 語
  image: busybox
- name: strict
  image: busybox
  parameters: {COLOUR: {required: true, pattern: "red|green"}, SIZE: {default: "7"}}
- name: tagged
  image: busybox
  command: [sh, -c, "exit 3"]
  tags: [gpu]
  retries: 2
  concurrency: 4
  priority: 5
  timeout: 1m30s
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without workers, which keeps what it is given."""
    with contextlib.closing(Stage(tmp_path_factory.mktemp("api"))) as stage:
        yield stage.server("--hold", jobs=JOBS + PARAMETERS)


class TestErrors:
    """Every refusal is a problem document whose detail helps."""

    def test_an_unknown_job_name_is_answered_with_those_there_are(self, api: Server) -> None:
        detail = problem(api.http("POST", "/api/jobs/hello-wrld"), 404)
        assert all(name in detail for name in ("hello-wrld", "hello-world", "quick", "日本 語"))

    @pytest.mark.parametrize(
        "path", ["/nothing", "/api", "/api/", "/api/jobs/1/2/3", "/api/workers/1/log", "/runner/x"]
    )
    def test_an_unknown_path_is_not_found(self, api: Server, path: str) -> None:
        problem(api.http("GET", path), 404)

    @pytest.mark.parametrize(
        "job", ["999999", "-1", "0", "99999999999999999999999", "0x1", "%EF%BC%91", "1.0", "+1", "1_0"]
    )
    def test_a_job_that_is_not_there_is_not_found(self, api: Server, job: str) -> None:
        for suffix in ("", "/log", "/attempts"):
            problem(api.http("GET", f"/api/jobs/{job}{suffix}"), 404)

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("PUT", "/api/jobs", {"GET", "POST"}),
            ("DELETE", "/api/workers", {"GET"}),
            ("POST", "/healthz", {"GET"}),
            ("PATCH", "/api/jobs/1", {"GET", "DELETE", "POST"}),
            ("POST", "/", {"GET"}),
        ],
    )
    def test_a_wrong_method_is_told_the_right_ones(
        self, api: Server, method: str, path: str, allowed: set[str]
    ) -> None:
        reply = api.http(method, path)
        problem(reply, 405)
        assert allowed <= set(reply.headers["Allow"].split(", "))

    def test_the_runner_without_an_upgrade_is_upgrade_required(self, api: Server) -> None:
        reply = api.http("GET", "/runner")
        problem(reply, 426)
        assert reply.headers["Upgrade"] == "websocket"

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"\xff",
            b"[]",
            b'"x"',
            b"null",
            b"1",
            b"\xef\xbb\xbf{}",
            b'{"environment": []}',
            b'{"environment": {"SCRIPT": 1}}',
            b'{"environment": {"SCRIPT": null}}',
            b'{"environment": {"SCRIPT": "\\ud800"}}',
            b'{"environment": {"SCRIPT": "a\\u0000b"}}',
            b'{"environment": {"OTHER": "1", "SCRIPT": ""}}',
            b'{"environment": {}}',
            b'{"environment": {"SCRIPT": ""}, "priority": "high"}',
            b'{"environment": {"SCRIPT": ""}, "priority": true}',
            b'{"environment": {"SCRIPT": ""}, "priority": 1.5}',
            b'{"environment": {"SCRIPT": ""}, "priority": 99999999999999999999}',
            b'{"environment": {"SCRIPT": ""}, "delay": -1}',
            b'{"environment": {"SCRIPT": ""}, "delay": NaN}',
            b'{"environment": {"SCRIPT": ""}, "delay": 1e999}',
            b'{"environment": {"SCRIPT": ""}, "delay": "1"}',
            b'{"environment": {"SCRIPT": ""}, "unknown": 1}',
            b"[" * 100_000,
            b'{"environment": ' * 100_000,
        ],
        ids=lambda body: body[:60].decode(errors="replace"),
    )
    def test_a_bad_body_is_refused_and_nothing_is_queued(self, api: Server, body: bytes) -> None:
        before = api.http("GET", "/api/jobs").body
        assert problem(api.http("POST", "/api/jobs/sh", body), 400)
        assert api.http("GET", "/api/jobs").body == before

    @pytest.mark.parametrize("body", [b"[]", b"null", b"0", b'""', b"false"])
    def test_a_body_that_is_no_object_is_refused_for_any_job(self, api: Server, body: bytes) -> None:
        problem(api.http("POST", "/api/jobs/quick", body), 400)

    def test_an_empty_idempotency_key_is_no_key(self, api: Server) -> None:
        first, second = (api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": ""}) for _ in range(2))
        assert first.status == second.status == 400 or first.json["id"] != second.json["id"]

    @pytest.mark.parametrize(("key", "value"), [("unknwn", 1), ("priority", "high"), ("delay", [])])
    def test_a_bad_key_is_named(self, api: Server, key: str, value: object) -> None:
        assert key in problem(api.http("POST", "/api/jobs/quick", {key: value}), 400)

    def test_a_bad_parameter_is_named(self, api: Server) -> None:
        assert "SHAPE" in problem(
            api.http("POST", "/api/jobs/strict", {"environment": {"SHAPE": "1", "COLOUR": "red"}}), 400
        )
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict"), 400)
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict", {"environment": {"COLOUR": "red!"}}), 400)
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict", {"environment": {"COLOUR": "a red"}}), 400)

    def test_a_job_without_parameters_takes_none(self, api: Server) -> None:
        assert "PATH" in problem(api.http("POST", "/api/jobs/quick", {"environment": {"PATH": "/"}}), 400)

    def test_a_body_too_large_is_refused(self, api: Server) -> None:
        assert b" 413 " in api.raw(head(b"POST /api/jobs/quick", b"Content-Length: 9999999999"))

    @pytest.mark.parametrize(
        "query",
        ["limit=x", "limit=-1", "after=x", "before=1_0", "state=sleeping", "limit=9999999999999999999999", "unknown=x"],
    )
    def test_a_bad_query_is_refused(self, api: Server, query: str) -> None:
        assert query.partition("=")[0] in problem(api.http("GET", f"/api/jobs?{query}"), 400)

    @pytest.mark.parametrize("query", ["wait=x", "wait=-1", "wait=nan", "wait=1e999"])
    def test_a_bad_wait_is_refused_and_nothing_is_queued(self, api: Server, query: str) -> None:
        before = api.http("GET", "/api/jobs").body
        assert "wait" in problem(api.http("POST", f"/api/jobs/quick?{query}"), 400)
        assert api.http("GET", "/api/jobs").body == before

    def test_a_wait_as_programs_compute_it_is_understood(self, api: Server) -> None:
        assert api.http("POST", f"/api/jobs/quick?wait={0.1 + 0.2}").status == 200

    def test_a_body_cannot_name_another_job(self, api: Server) -> None:
        problem(api.http("POST", "/api/jobs/quick", {"name": "hello-world"}), 400)

    @pytest.mark.parametrize("query", ["offset=x", "offset=-1", "tail=x", "tail=-1", "attempt=0", "attempt=x"])
    def test_a_bad_query_of_a_log_is_refused(self, api: Server, query: str) -> None:
        job = api.post("quick")
        assert 400 <= api.http("GET", f"/api/jobs/{job}/log?{query}").status <= 404

    def test_a_list_with_one_bad_entry_queues_nothing(self, api: Server) -> None:
        before = len(api.get("/api/jobs"))
        for bad in ({"name": "nothing"}, {"name": "sh"}, {}, 1, {"name": "quick", "priority": []}):
            reply = api.http("POST", "/api/jobs", [{"name": "quick"}, bad])
            assert 400 <= reply.status <= 404
            assert problem(reply, reply.status)
        assert len(api.get("/api/jobs")) == before

    def test_a_missing_worker_is_not_found(self, api: Server) -> None:
        problem(api.http("GET", "/api/workers/1"), 404)

    def test_a_finished_job_is_not_cancelled_and_an_unfinished_one_not_retried(self, api: Server) -> None:
        job = api.post("quick")
        problem(api.http("POST", f"/api/jobs/{job}/retry"), 409)
        assert api.http("DELETE", f"/api/jobs/{job}").status == 200
        problem(api.http("DELETE", f"/api/jobs/{job}"), 409)


KEYS_OF_A_FULL_JOB = [
    "id",
    "name",
    "queuing",
    "running",
    "success",
    "state",
    "attempt",
    "worker",
    "exit_code",
    "reason",
]
KEYS_OF_A_FULL_JOB += ["environment", "priority", "created_at", "started_at", "finished_at", "log_bytes"]


class TestHttp:
    """The API as the design's table has it."""

    def test_names_are_percent_encoded_utf_8(self, api: Server) -> None:
        reply = api.http("POST", "/api/jobs/%E6%97%A5%E6%9C%AC%20%E8%AA%9E")
        assert reply.json["name"] == "日本 語"
        assert api.http("POST", "/api/jobs/hello%2Dworld").json["name"] == "hello-world"

    def test_a_full_job_has_all_keys_in_order(self, api: Server) -> None:
        job = api.job(api.post("strict", environment={"COLOUR": "green"}, priority=-3))
        assert list(job) == KEYS_OF_A_FULL_JOB
        assert job["environment"] == {"COLOUR": "green", "SIZE": "7"}
        assert (job["state"], job["attempt"], job["worker"], job["priority"]) == ("queued", 0, None, -3)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", job["created_at"])

    def test_the_list_is_filtered_and_paged_oldest_first(self, api: Server) -> None:
        ids = [job["id"] for job in api.http("POST", "/api/jobs", [{"name": "quick"}] * 5).json]
        assert ids == list(range(ids[0], ids[0] + 5))
        assert [job["id"] for job in api.get(f"/api/jobs?after={ids[1]}&limit=2")] == ids[2:4]
        assert [job["id"] for job in api.get(f"/api/jobs?before={ids[4]}&limit=2")] == ids[2:4]
        assert [job["id"] for job in api.get("/api/jobs?before=2147483647&limit=2")] == ids[3:]
        assert [job["id"] for job in api.get(f"/api/jobs?after={ids[0]}&name=quick&state=queued,running")] == ids[1:]
        assert len(api.get(f"/api/jobs?after={ids[0]}&state=queued,queued")) == 4
        assert api.get(f"/api/jobs?after={ids[0]}&name=hello-world") == []
        assert api.get(f"/api/jobs?after={ids[0]}&state=success") == []
        assert api.get(f"/api/jobs?after={ids[3]}&full=1") == [api.job(ids[4])]

    def test_a_long_list_is_whole(self, api: Server) -> None:
        ids = [job["id"] for job in api.http("POST", "/api/jobs", [{"name": "quick"}] * 20_000).json]
        listed = [job["id"] for job in api.get(f"/api/jobs?after={ids[0] - 1}")]
        assert listed == ids

    def test_an_empty_list_queues_nothing(self, api: Server) -> None:
        assert api.http("POST", "/api/jobs", []).body == b"[]"

    def test_the_same_idempotency_key_is_the_same_job(self, api: Server) -> None:
        first, again = (api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "a key"}) for _ in range(2))
        other = api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "another key"})
        assert first.json["id"] == again.json["id"] != other.json["id"]

    def test_the_same_idempotency_key_at_the_same_time_is_one_job(self, api: Server) -> None:
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda _: api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "race"}), range(16))
            )
        assert len({reply.json["id"] for reply in replies}) == 1

    def test_asking_again_and_again_costs_the_server_nothing(self, api: Server) -> None:
        job = api.post("quick")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)) as connection:

            def ask(times: int) -> int:
                for _ in range(times):
                    connection.request("GET", f"/api/jobs/{job}")
                    connection.getresponse().read()
                return api.memory_kib()

            before = ask(1000)
            assert ask(6000) - before < 2000

    def test_a_wait_that_ends_too_early_gives_the_job_as_it_is(self, api: Server) -> None:
        start = time.monotonic()
        assert api.http("POST", "/api/jobs/quick?wait=0.3").json["queuing"]
        assert 0.3 <= time.monotonic() - start < 3

    def test_the_configs_are_listed(self, api: Server) -> None:
        config = {one["name"]: one for one in api.get("/api/configs")}
        assert config["tagged"]["command"] == ["sh", "-c", "exit 3"]
        wanted = {"image": "busybox", "tags": ["gpu"], "retries": 2, "concurrency": 4, "priority": 5, "timeout": 90}
        assert {key: config["tagged"][key] for key in wanted} == wanted
        assert config["strict"]["parameters"]["COLOUR"] == {"required": True, "default": None, "pattern": "red|green"}

    def test_a_connection_is_kept_alive(self, api: Server) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)
        with contextlib.closing(connection):
            ports = set()
            for method, path in [
                ("GET", "/api/workers"),
                ("POST", "/api/jobs/nothing"),
                ("GET", "/nothing"),
                ("PUT", "/"),
            ]:
                connection.request(method, path)
                connection.getresponse().read()
                ports.add(connection.sock and connection.sock.getsockname())
            assert len(ports) == 1

    def test_two_requests_at_once_are_answered_in_order(self, api: Server) -> None:
        reply = api.raw(head(b"GET /api/workers") + head(b"GET /nothing", b"Connection: close"))
        assert re.findall(rb"HTTP/1.1 (\d+) ", reply) == [b"200", b"404"]

    @pytest.mark.parametrize("head_", [b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n", b""])
    def test_a_peer_that_wants_no_keep_alive_is_left(self, api: Server, head_: bytes) -> None:
        assert b" 200 " in api.raw(head_ or head(b"GET /healthz", b"Connection: close"))

    def test_an_http_1_0_client_gets_no_chunks(self, api: Server) -> None:
        api.post("quick")
        for path in (b"/api/jobs", b"/api/jobs/1/log"):
            reply = api.raw(b"GET " + path + b" HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in reply[:20]
            assert b"Transfer-Encoding" not in reply

    def test_a_head_request_has_no_body(self, api: Server) -> None:
        reply = api.raw(head(b"HEAD /api/workers", b"Connection: close"))
        assert reply.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 405 "))
        assert reply.endswith(b"\r\n\r\n")

    def test_expect_100_continue_is_answered(self, api: Server) -> None:
        request = head(b"POST /api/jobs/quick", b"Expect: 100-continue", b"Content-Length: 2", b"Connection: close")
        assert re.findall(rb"HTTP/1.1 (\d+) ", api.raw(request + b"{}")) in ([b"100", b"200"], [b"200"])
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as peer:
            peer.sendall(request)
            assert peer.recv(65536).startswith(b"HTTP/1.1 100 ")
            peer.sendall(b"{}")
            assert read_to_end(peer).startswith(b"HTTP/1.1 200 ")

    def test_the_absolute_form_of_a_target_is_understood_or_refused(self, api: Server) -> None:
        reply = api.raw(head(b"GET http://127.0.0.1:%d/api/workers" % api.port, b"Connection: close"))
        assert reply.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
        assert b" 200 " not in api.raw(head(b"GET http://evil.example/api/workers", b"Connection: close"))[:20]

    def test_health_metrics_page_and_description_are_there(self, api: Server) -> None:
        health = api.get("/healthz")
        assert (health["status"], health["workers"]) == ("ok", 0)
        assert health["jobs"]["queued"] > 0
        assert b"# TYPE jobworker_" in api.http("GET", "/metrics").body
        assert api.get("/openapi.json")["openapi"].startswith("3.")
        page = api.http("GET", "/")
        assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")

    def test_events_tell_what_changes(self, api: Server) -> None:
        with Events(api) as events:
            stats = events.next("stats")
            assert stats["workers"] == 0
            job = api.post("quick")
            assert events.next("job", id=job)["state"] == "queued"
            with ScriptedWorker(api, "seen", tags=("never",)):
                assert events.next("worker", name="seen")["connected"] is True
            assert events.next("worker", name="seen", connected=False)
            api.http("DELETE", f"/api/jobs/{job}")
            assert events.next("job", id=job, state="cancelled")

    @pytest.mark.parametrize("last_id", ["", "-1", "x", "\xb2", "9" * 20, "9" * 5000])
    def test_events_with_an_id_that_never_was_begin_now(self, api: Server, last_id: str) -> None:
        with Events(api, last_id) as events:
            assert events.next("stats")

    def test_events_resume_where_they_were_left(self, api: Server) -> None:
        with Events(api) as events:
            job = api.post("quick")
            events.next("job", id=job)
            missed = api.post("quick")
            last_id = events.last_id
            events.next("job", id=missed)
        with Events(api, last_id) as events:
            assert events.next("job", id=missed)["state"] == "queued"


class Events:
    """A listener of /api/events."""

    def __init__(self, server: Server, last_id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        self.connection.request("GET", "/api/events", headers={"Last-Event-ID": last_id} if last_id else {})
        self.stream = self.connection.getresponse()
        assert self.stream.headers["Content-Type"].startswith("text/event-stream")
        self.last_id = last_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.connection.close()

    def next(self, kind: str, **wanted: Any) -> Any:
        """The data of the next event of a kind in which these keys have these values."""
        event: dict[str, str] = {}
        deadline = time.monotonic() + 10
        while (line := self.stream.readline().decode()) and time.monotonic() < deadline:
            if line != "\n":
                key, _, value = line.rstrip("\n").partition(": ")
                event[key] = value
                continue
            self.last_id = event.get("id", self.last_id)
            if event.get("event") == kind:
                found = json.loads(event["data"])
                if all(found[key] == value for key, value in wanted.items()):
                    return found
            event = {}
        raise AssertionError(f"there was no {kind} {wanted}")


def head(request: bytes, *fields: bytes) -> bytes:
    """The head of a request that is well-formed as far as the given parts are."""
    return b"\r\n".join([request + b" HTTP/1.1", b"Host: localhost", *fields, b"", b""])


POST = b"POST /api/jobs/quick"
SMUGGLED = b"POST /api/jobs/hello-world HTTP/1.1\r\nHost: localhost\r\n\r\n"
ATTACKS = {
    "two Content-Lengths": head(POST, b"Content-Length: 2", b"Content-Length: 0") + b"{}",
    "two Content-Lengths alike": head(POST, b"Content-Length: 2", b"Content-Length: 2") + b"{}",
    "a list of Content-Lengths": head(POST, b"Content-Length: 2, 2") + b"{}",
    "Content-Length -1": head(POST, b"Content-Length: -1"),
    "Content-Length +2": head(POST, b"Content-Length: +2") + b"{}",
    "Content-Length 1_0": head(POST, b"Content-Length: 1_0") + b"{        }",
    "Content-Length 0x2": head(POST, b"Content-Length: 0x2") + b"{}",
    "Content-Length 2.0": head(POST, b"Content-Length: 2.0") + b"{}",
    "Content-Length in other digits": head(POST, "Content-Length: \uff12".encode()) + b"{}",
    "Content-Length empty": head(POST, b"Content-Length:"),
    "Content-Length of 5,000 digits": head(POST, b"Content-Length: " + b"9" * 5000),
    "HTTP/0.9": b"GET /api/workers\r\n\r\n",
    "HTTP/2.0": b"GET /api/workers HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/1.10": b"GET /api/workers HTTP/1.10\r\nHost: localhost\r\n\r\n",
    "HTTP/+1.1": b"GET /api/workers HTTP/+1.1\r\nHost: localhost\r\n\r\n",
    "http/1.1": b"GET /api/workers http/1.1\r\nHost: localhost\r\n\r\n",
    "bare LF": head(b"GET /api/workers").replace(b"\r\n", b"\n"),
    "one bare LF": b"GET /api/workers HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
    "bare CR": head(b"GET /api/workers", b"X: a\rContent-Length: 5"),
    "no Host": b"GET /api/workers HTTP/1.1\r\n\r\n",
    "two Hosts": head(b"GET /api/workers", b"Host: localhost"),
    "empty Host": b"GET /api/workers HTTP/1.1\r\nHost:\r\n\r\n",
    "space before colon": head(POST, b"Content-Length : 2") + b"{}",
    "tab before colon": head(POST, b"Content-Length\t: 2") + b"{}",
    "space before name": head(POST, b" Content-Length: 2") + b"{}",
    "line without colon": head(POST, b"nonsense"),
    "empty name": head(POST, b": value"),
    "name not a token": head(POST, b"Content(Length): 2"),
    "name not ASCII": head(POST, "Contént: 2".encode()),
    "space on the first line of the head": b"GET /api/workers HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "obs-fold": head(b"GET /api/workers", b"X: a", b" b"),
    "NUL in a value": head(b"GET /api/workers", b"X: a\0b"),
    "control character in a value": head(b"GET /api/workers", b"X: a\x01b"),
    "NUL in the target": head(b"GET /api/\0workers"),
    "bytes beyond ASCII in the target": head("GET /api/jobs/日本".encode()),
    "chunked": head(POST, b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    "chunked and Content-Length": head(POST, b"Transfer-Encoding: chunked", b"Content-Length: 2") + b"0\r\n\r\n",
    "Content-Length and chunked": head(POST, b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "Transfer-Encoding identity": head(POST, b"Transfer-Encoding: identity", b"Content-Length: 2") + b"{}",
    "Transfer-Encoding xchunked": head(POST, b"Transfer-Encoding: xchunked") + b"{}",
    "Transfer-Encoding hidden": head(POST, b"Transfer-Encoding : chunked", b"Content-Length: 0"),
    "huge request line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "endless request line": b"GET /" + b"a" * 2_000_000,
    "huge field": head(b"GET /api/workers", b"X: " + b"a" * 200_000),
    "10,000 fields": head(b"GET /api/workers", *[b"X: y"] * 10_000),
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
    "two spaces": b"GET  /api/workers HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in the target": b"GET /api/workers x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no slash": b"GET api/workers HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another's absolute form": head(b"GET http://evil.example/api/workers"),
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 160,
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}
NO_HANDSHAKES = {
    "a websocket without a key": head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: websocket"),
    "a websocket with a body": head(
        b"GET /runner",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        b"Content-Length: %d" % len(SMUGGLED),
    ),
}
REFUSED = {
    "another's Host": b"GET /api/workers HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "method not there": head(b"BREW /api/jobs"),
    "method in small letters": head(b"get /api/jobs"),
    "bad escape": head(b"POST /api/jobs/%zz"),
    "escape cut short": head(b"POST /api/jobs/%4"),
    "escaped bytes that are not UTF-8": head(b"POST /api/jobs/%ff"),
    "unknown Expect": head(POST, b"Expect: miracles", b"Content-Length: 2") + b"{}",
    "an upgrade to something else": head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: h2c"),
}


def statuses_of(reply: bytes) -> list[int]:
    """The statuses of the responses in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", reply)]


class TestFramingAttacks:
    """A request with any doubt about where it ends is refused once, its connection closed, and nothing done for it."""

    @pytest.fixture(autouse=True)
    def nothing_is_done(self, idle: Server) -> Iterator[None]:
        before = idle.get("/api/jobs")
        yield
        assert idle.get("/api/jobs") == before
        assert "Traceback" not in idle.stderr

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda name: name.replace(" ", "-"))
    def test_a_doubtful_request_is_refused_and_what_follows_it_is_not_read(self, idle: Server, attack: str) -> None:
        statuses = statuses_of(idle.raw(ATTACKS[attack] + SMUGGLED, half_close=True))
        assert len(statuses) == 1
        assert 400 <= statuses[0] < 500 or statuses[0] in (501, 505)

    @pytest.mark.parametrize("attack", REFUSED, ids=lambda name: name.replace(" ", "-"))
    def test_a_request_that_is_clear_but_wrong_is_refused(self, idle: Server, attack: str) -> None:
        assert 400 <= statuses_of(idle.raw(REFUSED[attack], half_close=True))[0] < 500

    @pytest.mark.parametrize("attack", NO_HANDSHAKES, ids=lambda name: name.replace(" ", "-"))
    def test_a_handshake_that_is_none_ends_the_connection(self, idle: Server, attack: str) -> None:
        assert statuses_of(idle.raw(NO_HANDSHAKES[attack] + SMUGGLED)) in ([], [400], [426])

    def test_a_body_cut_short_is_refused(self, idle: Server) -> None:
        reply = idle.raw(head(POST, b"Content-Length: 10") + b"{}", half_close=True)
        assert statuses_of(reply) in ([400], [408])

    def test_a_body_is_not_the_next_request(self, idle: Server) -> None:
        wrong_method = b"PUT /api/workers"
        reply = idle.raw(head(wrong_method, b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, half_close=True)
        assert statuses_of(reply) == [405]

    def test_nothing_is_written_back_that_could_be_a_header(self, idle: Server) -> None:
        reply = idle.raw(head(b"GET /%0d%0aSet-Cookie:%20a=b", b"Connection: close"))
        assert reply.startswith(b"HTTP/1.1 4")
        assert b"\nSet-Cookie" not in reply

    def test_400_slow_heads_leave_room_for_a_quick_one(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(socket.create_connection(("127.0.0.1", idle.port))) for _ in range(400)]
            for peer in peers:
                with contextlib.suppress(ConnectionError):
                    peer.sendall(b"GET /api/workers HTTP/1.1\r\nX: ")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 1

    def test_idle_keep_alive_connections_leave_room_for_a_new_one(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port), timeout=5))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(b"GET /healthz"))
                    assert peer.recv(12) == b"HTTP/1.1 200"
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 1

    def test_slow_bodies_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(POST, b"Content-Length: 10") + b"{")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 1

    def test_silent_connections_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 1

    def test_a_reset_connection_leaves_no_trace(self, idle: Server) -> None:
        for data in (b"", b"GET", head(b"GET /api/jobs"), head(POST, b"Content-Length: 9")):
            with socket.create_connection(("127.0.0.1", idle.port)) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.sendall(data)
        assert idle.get("/api/workers") == []

    def test_more_slow_bodies_than_there_are_places_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(POST, b"Content-Length: 10") + b"{")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 2


# -- version 1 ---------------------------------------------------------------------------------------------------------


class TestVersion1Worker:
    """The original's worker against our server."""

    @pytest.fixture
    def server(self, stage: Stage) -> Server:
        return stage.server(
            jobs=JOBS + "- {name: words, image: busybox, command: echo 'a b'}\n- {name: other, image: x}\n"
        )

    def test_it_is_told_the_configs_as_the_original_tells_them(self, server: Server) -> None:
        with connect(f"ws://127.0.0.1:{server.port}/runner", proxy=None) as worker:
            frame = worker.recv(5)
            assert isinstance(frame, bytes)
            assert worker.subprotocol is None
            assert frame[:1] == b"\1"
            configs = json.loads(frame[1:])
            assert {"command": "echo 'a b'", "image": "busybox", "name": "words"} in configs
            assert {"command": None, "image": "x", "name": "other"} in configs
            assert all(list(config) == ["command", "image", "name"] for config in configs)

    @pytest.mark.parametrize("as_text", [False, True], ids=["binary", "text"])
    def test_its_job_runs_to_success(self, server: Server, as_text: bool) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            assert worker.next(protocol.Enqueue) == protocol.Enqueue(job, "quick")
            for message, state in ((protocol.JobRunning(job), "running"), (protocol.JobSuccess(job), "success")):
                frame = protocol.encode(message)
                worker.send(frame.decode() if as_text else frame)
                until(lambda state=state: server.state(job) == state)  # type: ignore[misc]

    def test_its_failure_is_a_failure(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobFailure(job))
            assert (server.ended(job)["state"], server.job(job)["exit_code"]) == ("failure", None)

    def test_it_gets_the_name_in_code_points(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: 日本語, image: busybox}")
        with ScriptedWorker(server) as worker:
            server.http("POST", "/api/jobs/%E6%97%A5%E6%9C%AC%E8%AA%9E")
            assert worker.next(protocol.Enqueue).name == "日本語"

    def test_it_gets_one_job_at_a_time(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            first, second = server.post("quick"), server.post("hello-world")
            assert worker.runs().job == first
            assert worker.gets_nothing(protocol.Enqueue)
            worker.send(protocol.JobSuccess(first))
            assert worker.runs().job == second

    def test_it_gets_no_job_with_parameters(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            waiting, taken = server.sh("true"), server.post("quick")
            assert worker.runs().job == taken
            worker.send(protocol.JobSuccess(taken))
            server.ended(taken)
            assert worker.gets_nothing(protocol.Enqueue)
            assert server.state(waiting) == "queued"

    def test_its_end_is_its_loss(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            running = server.post("quick")
            worker.runs()
        job = server.ended(running, seconds=3)
        assert (job["state"], job["reason"], job["exit_code"]) == ("failure", "lost", None)

    def test_a_job_that_it_did_not_say_to_have_started_is_queued_again(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server) as worker:
            assert worker.next(protocol.Enqueue).job == job

    def test_unknown_tags_and_empty_frames_are_ignored(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            for frame in (b"", "", b"\0", b"\4\0\0\0\1", b"\x10{}", b"\x1f\xff", b"\xff"):
                worker.send(frame)
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.encode(protocol.JobSuccess(job)) + b"trailing bytes")
            assert server.ended(job)["success"]

    @pytest.mark.parametrize("frame", [b"\1", b"\1\0\0\0", b"\0021"])
    def test_a_malformed_frame_closes_only_its_connection(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            bad.send(frame)
            assert bad.is_closed()
            job = server.post("quick")
            assert good.runs().job == job

    def test_a_text_frame_that_is_not_utf_8_closes_only_its_connection(self, server: Server) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            bad.socket.send(b"\1\xff\xff\xff\xff", text=True)
            assert bad.is_closed()
            server.post("quick")
            assert good.runs()

    def test_a_frame_too_large_closes_only_its_connection(self, server: Server) -> None:
        with ScriptedWorker(server) as good, ScriptedWorker(server) as bad:
            with contextlib.suppress(ConnectionClosed):
                bad.send(b"\1" * 50_000_000)
            assert bad.is_closed()
            server.post("quick")
            assert good.runs()

    @pytest.mark.parametrize("frame", [b"\1\xff\xff\xff\xff", b"\2\0\0\x27\x0f", b"\3\0\0\0\0", b"\3\x7f\xff\xff\xff"])
    def test_a_word_about_no_job_changes_nothing(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server) as worker:
            worker.send(frame)
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobSuccess(job))
            assert server.ended(job)["success"]

    def test_a_word_about_another_workers_job_changes_nothing(self, server: Server) -> None:
        with ScriptedWorker(server) as owner:
            job = server.post("quick")
            owner.runs()
            with ScriptedWorker(server) as other:
                other.send(protocol.JobSuccess(job))
                other.send(protocol.JobFailure(job))
                other.socket.ping().wait(5)
                assert server.state(job) == "running"
                owner.send(protocol.JobFailure(job))
                assert server.ended(job)["state"] == "failure"

    def test_a_finished_job_never_changes(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.runs()
            worker.send(protocol.JobFailure(job))
            before = server.ended(job)
            worker.send(protocol.JobSuccess(job))
            worker.send(protocol.JobRunning(job))
            worker.socket.ping().wait(5)
            time.sleep(0.1)
            assert server.job(job) == before

    def test_a_result_without_a_start_is_a_result(self, server: Server) -> None:
        with ScriptedWorker(server) as worker:
            job = server.post("quick")
            worker.next(protocol.Enqueue)
            worker.send(protocol.JobFailure(job))
            assert server.ended(job)["state"] == "failure"


class TestVersion1Server:
    """Our worker against the original's server."""

    def test_it_runs_what_it_is_told_and_says_so(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            server.send(protocol.Enqueue(7, "a"))
            server.wait_for(protocol.JobSuccess(7))
            assert server.received == [protocol.JobRunning(7), protocol.JobSuccess(7)]
            [run] = stage.docker.ledger("run")
            assert run[-2:] == ["--", "hello-world"]
            until(lambda: stage.docker.containers() == [])

    def test_a_command_is_one_argument_whatever_it_holds(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "busybox", "command": "echo 'a b' c"}) as server:
            stage.worker(server)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobFailure(1))
            assert stage.docker.ledger("run")[0][-3:] == ["--", "busybox", "echo 'a b' c"]

    @pytest.mark.parametrize("image", ["missing", "oom"])
    def test_a_job_that_fails_is_a_failure(self, stage: Stage, image: str) -> None:
        with ScriptedServer({"name": "a", "image": image, "command": None}) as server:
            stage.worker(server)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobFailure(1))
            until(lambda: stage.docker.containers() == [])

    def test_an_unknown_name_is_a_failure(self, stage: Stage) -> None:
        with ScriptedServer() as server:
            stage.worker(server)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobFailure(1))
            assert stage.docker.starts() == 0

    def test_jobs_run_one_after_the_other(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            for job in (1, 2, 3):
                server.send(protocol.Enqueue(job, "a"))
            server.wait_for(protocol.JobSuccess(3))
            assert server.received == [
                kind(job) for job in (1, 2, 3) for kind in (protocol.JobRunning, protocol.JobSuccess)
            ]

    def test_text_frames_are_read_like_binary_ones(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            server.send(protocol.encode(protocol.Enqueue(1, "a")).decode())
            server.wait_for(protocol.JobSuccess(1))

    def test_the_same_id_from_a_restarted_server_runs_again(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            for runs in (1, 2):
                server.send(protocol.Enqueue(1, "a"))
                until(lambda runs=runs: server.received.count(protocol.JobSuccess(1)) == runs)  # type: ignore[misc]
                server.hang_up()
                until(lambda runs=runs: len(server.dials) > runs)  # type: ignore[misc]
            assert stage.docker.starts() == 2

    @pytest.mark.parametrize(
        "frame", [b"\1", b"\1[{]", b"\2\0", b"\2\0\0\0\1\x40\0\0\0\0\0\0\0hello", b"\1" + b"[" * 100_000]
    )
    def test_a_malformed_frame_ends_the_connection_but_not_the_worker(self, stage: Stage, frame: bytes) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            worker = stage.worker(server)
            server.send(frame)
            until(lambda: len(server.dials) == 2)
            until(lambda: server.peer and server.peer.state == State.OPEN)
            server.send(protocol.Enqueue(1, "a"))
            server.wait_for(protocol.JobSuccess(1))
            assert "Traceback" not in worker.stderr

    def test_unknown_tags_and_empty_frames_are_ignored(self, stage: Stage) -> None:
        with ScriptedServer({"name": "a", "image": "hello-world", "command": None}) as server:
            stage.worker(server)
            for frame in (
                b"",
                b"\0",
                b"\3\0\0\0\1",
                b"\x10\0",
                b"\xff",
                protocol.encode(protocol.Enqueue(1, "a")) + b"zz",
            ):
                server.send(frame)
            server.wait_for(protocol.JobSuccess(1))
            assert len(server.dials) == 1

    def test_a_server_that_hangs_up_at_once_is_not_dialled_in_a_frenzy(self, stage: Stage) -> None:
        with ScriptedServer(hangs_up=True) as server:
            stage.worker(server, connects=False)
            until(lambda: len(server.dials) >= 2)
            time.sleep(3)
            assert 2 <= len(server.dials) <= 10

    def test_a_server_that_is_not_there_yet_is_waited_for(self, stage: Stage) -> None:
        server = stage.server()
        server.kill()
        worker = stage.worker(server, connects=False)
        until(lambda: worker.stderr)
        server.start()
        until(lambda: server.get("/api/workers"), 20)
        assert server.ended(server.post("quick"))["success"]


# -- version 2 ---------------------------------------------------------------------------------------------------------


QUEUES = """
- {name: a, image: busybox}
- {name: b, image: busybox}
- {name: urgent, image: busybox, priority: 5}
- {name: two, image: busybox, concurrency: 2}
- {name: gpu, image: busybox, tags: [gpu, big]}
- {name: again, image: busybox, retries: 2, retry_delay: 400ms}
- {name: strict, image: busybox, parameters: {COLOUR: {default: red}}}
"""


class TestDispatch:
    """Which worker gets which job, and when; a version 2 worker by script against our server."""

    @pytest.fixture
    def server(self, stage: Stage) -> Server:
        return stage.server("--hold", "--grace", "1", jobs=QUEUES)

    def test_the_first_in_is_the_first_out(self, server: Server) -> None:
        jobs = [server.post(name) for name in "abab"]
        with ScriptedWorker(server, "w", slots=4) as worker:
            assert [worker.next(protocol.Enqueue).job for _ in jobs] == jobs

    def test_the_higher_priority_comes_first(self, server: Server) -> None:
        low, plain, raised = server.post("a", priority=-1), server.post("a"), server.post("b", priority=3)
        urgent = server.post("urgent")
        with ScriptedWorker(server, "w", slots=4) as worker:
            assert [worker.next(protocol.Enqueue).job for _ in range(4)] == [urgent, raised, plain, low]

    def test_a_worker_gets_as_many_as_it_has_slots(self, server: Server) -> None:
        jobs = [server.post("a") for _ in range(4)]
        with ScriptedWorker(server, "w", slots=3) as worker:
            assert [worker.runs().job for _ in range(3)] == jobs[:3]
            assert worker.gets_nothing(protocol.Enqueue)
            worker.send(protocol.JobSuccess(jobs[1], 1))
            assert worker.next(protocol.Enqueue).job == jobs[3]

    def test_a_worker_gets_only_what_its_tags_allow(self, server: Server) -> None:
        tagged, plain = server.post("gpu"), server.post("a")
        with ScriptedWorker(server, "small", slots=9, tags=("gpu",)) as worker:
            assert worker.next(protocol.Enqueue).job == plain
            assert worker.gets_nothing(protocol.Enqueue)
            assert "tag" in server.job(tagged)["reason"]
            with ScriptedWorker(server, "big", tags=("big", "gpu", "more")) as other:
                assert other.next(protocol.Enqueue).job == tagged

    def test_no_more_of_a_job_run_than_its_concurrency(self, server: Server) -> None:
        jobs = [server.post("two") for _ in range(3)]
        other = server.post("a")
        with ScriptedWorker(server, "one", slots=9) as one, ScriptedWorker(server, "two", slots=9) as two:
            assert one.runs().job == jobs[0]
            assert one.runs().job == jobs[1]
            assert one.runs().job == other
            assert one.gets_nothing(protocol.Enqueue)
            assert two.gets_nothing(protocol.Enqueue, 0.1)
            one.send(protocol.JobFailure(jobs[0], 1, 1))
            until(lambda: server.state(jobs[2]) == "assigned")

    def test_a_delayed_job_waits(self, server: Server) -> None:
        start = time.monotonic()
        late, soon = server.post("a", delay=0.5), server.post("b")
        with ScriptedWorker(server, "w", slots=2) as worker:
            assert worker.next(protocol.Enqueue).job == soon
            assert worker.next(protocol.Enqueue).job == late
            assert time.monotonic() - start >= 0.5

    def test_the_environment_is_sent_along(self, server: Server) -> None:
        job = server.post("strict")
        with ScriptedWorker(server, "w") as worker:
            assert worker.next(protocol.Enqueue) == protocol.Enqueue(job, "strict", 1, {"COLOUR": "red"})

    def test_a_failure_is_tried_again_as_often_as_asked_later_each_time(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            times = []
            for attempt in (1, 2, 3):
                assert worker.runs().attempt == attempt
                times.append(time.monotonic())
                worker.send(protocol.JobFailure(job, attempt, attempt))
            assert worker.gets_nothing(protocol.Enqueue)
            ended = server.ended(job)
            assert (ended["state"], ended["attempt"], ended["exit_code"], ended["reason"]) == ("failure", 3, 3, "exit")
            assert [one["exit_code"] for one in server.get(f"/api/jobs/{job}/attempts")] == [1, 2, 3]
            assert times[1] - times[0] > 0.29
            assert times[2] - times[1] > 0.59

    def test_a_retried_success_is_a_success(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 1))
            worker.runs()
            worker.send(protocol.JobSuccess(job, 2))
            ended = server.ended(job)
            assert (ended["success"], ended["attempt"], ended["exit_code"], ended["reason"]) == (True, 2, 0, None)

    def test_a_finished_job_is_run_again_as_a_new_job(self, server: Server) -> None:
        job = server.post("strict", environment={"COLOUR": "blue"}, priority=2)
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 1))
            server.ended(job)
            again = server.http("POST", f"/api/jobs/{job}/retry").json["id"]
            assert again > job
            assert worker.runs().job == again
            assert (server.job(again)["environment"], server.job(again)["priority"]) == ({"COLOUR": "blue"}, 2)
            assert server.state(job) == "failure"

    def test_a_wait_ends_with_the_job(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as worker, ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.http, "POST", "/api/jobs/a?wait=10")
            job = worker.runs().job
            assert not reply.done()
            worker.send(protocol.JobSuccess(job, 1))
            assert reply.result(2).json == {"id": job, "name": "a", "queuing": False, "running": False, "success": True}

    def test_a_worker_is_described(self, server: Server) -> None:
        with ScriptedWorker(server, "w", slots=2, tags=("x", "y")) as worker:
            job = server.post("a")
            worker.runs()
            [short] = server.get("/api/workers")
            assert short == {"id": short["id"], "working": True}
            full = server.get(f"/api/workers/{short['id']}")
            assert (full["name"], full["slots"], full["tags"], full["jobs"]) == ("w", 2, ["x", "y"], [job])
            assert (full["protocol"], full["version"]) == (2, "0")
            assert full["address"].startswith("127.0.0.1")


class TestVersion2Worker:
    """The two-phase start and its settlement, seen from a worker's end of the wire."""

    @pytest.fixture
    def server(self, stage: Stage) -> Server:
        return stage.server("--hold", "--grace", "1", jobs=QUEUES)

    def test_go_comes_after_running_is_on_disk(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.kill()
        server.start()
        assert server.state(job) == "running"
        assert (server.ended(job)["state"], server.job(job)["reason"]) == ("failure", "lost")

    def test_settled_comes_after_the_result_is_on_disk(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobFailure(job, 1, 7, "exit"))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            server.kill()
        server.start()
        assert (server.job(job)["state"], server.job(job)["exit_code"]) == ("failure", 7)

    def test_every_message_may_be_sent_twice(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.JobRunning(job, 1))
            assert worker.next(protocol.Go) == protocol.Go(job, 1)
            for _ in range(2):
                worker.send(protocol.JobSuccess(job, 1))
                assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert server.job(job)["success"]

    @pytest.mark.parametrize("kind", [protocol.JobRunning, protocol.JobSuccess, protocol.JobFailure])
    def test_what_is_stale_is_settled(self, server: Server, kind: Any) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for stale in ((job, 2), (job + 1, 1), (-1, 1)):
                worker.send(kind(*stale))
                assert worker.next(protocol.Settled) == protocol.Settled(*stale)
            assert (server.state(job), server.job(job)["attempt"]) == ("running", 1)

    def test_a_worker_that_comes_back_within_its_grace_goes_on(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.Log(job, 1, 0, b"first "))
            until(lambda: server.log(job) == b"first ")
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            assert worker.next(protocol.Logged) == protocol.Logged(job, 1, 6)
            time.sleep(1.5)
            assert server.state(job) == "running"
            worker.send(protocol.Log(job, 1, 6, b"second"))
            worker.send(protocol.JobSuccess(job, 1))
            assert worker.next(protocol.Settled)
            assert (server.log(job), server.job(job)["success"]) == (b"first second", True)

    def test_a_log_sent_twice_is_kept_once(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for offset, data in ((0, b"0123"), (0, b"0123"), (2, b"2345"), (6, b"67"), (1, b"1")):
                worker.send(protocol.Log(job, 1, offset, data))
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            assert server.log(job) == b"01234567"

    def test_the_middle_of_a_flood_of_log_is_not_kept(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            for n in range(64):
                worker.send(protocol.Log(job, 1, n * 65536, b"%05d " % n + b"x" * 65530))
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            log = server.log(job)
            assert (log[:5], log[-65536:-65531]) == (b"00000", b"00063")
            assert 900_000 < len(log) < 1_200_000

    def test_a_word_about_an_attempt_that_is_over_lets_its_worker_go(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
        server.ended(job)
        with ScriptedWorker(
            server, "w", jobs=((job, 1, "running"), (999, 1, "finished"), (job, 9, "assigned"))
        ) as worker:
            settled = {worker.next(protocol.Settled) for _ in range(3)}
            assert settled == {protocol.Settled(job, 1), protocol.Settled(999, 1), protocol.Settled(job, 9)}
            worker.send(protocol.JobSuccess(job, 1))
            worker.next(protocol.Settled)
            assert (server.state(job), server.job(job)["reason"]) == ("failure", "lost")

    def test_a_failure_before_the_start_is_a_failure(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            worker.send(protocol.JobFailure(job, 1, None, "refused"))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert (server.ended(job, 3)["state"], server.job(job)["reason"]) == ("failure", "refused")

    def test_a_log_from_beyond_all_offsets_ends_only_its_connection(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            worker.send(protocol.Log(job, 1, 2**63 - 1, b"far"))
            assert worker.is_closed()
        assert server.ended(job, 5)["reason"] == "lost"

    def test_a_worker_cannot_take_another_name_on_the_way(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as worker:
            worker.send(protocol.Hello("other", 1, (), "0", ()))
            until(lambda: [one["name"] for one in server.get("/api/workers?full=1")] != ["w"])
        until(lambda: server.get("/api/workers") == [])

    def test_no_job_falls_between_two_connections_of_one_name(self, server: Server) -> None:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
            posts = pool.submit(lambda: [server.post("a") for _ in range(150)])
            worker = stack.enter_context(ScriptedWorker(server, "w"))
            while not posts.done():
                worker = stack.enter_context(ScriptedWorker(server, "w", slots=1000))
            held = {worker.next(protocol.Enqueue).job for _ in posts.result()}
            assert held == {job["id"] for job in server.get("/api/jobs?state=assigned")} == set(posts.result())

    def test_an_unstarted_job_of_a_lost_worker_is_queued_again(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            assert worker.next(protocol.Enqueue).attempt == 1
        with ScriptedWorker(server, "other") as worker:
            again = worker.runs()
            worker.send(protocol.JobSuccess(job, again.attempt))
            assert server.ended(job)["success"]

    def test_a_running_job_has_its_whole_grace_after_a_restart_of_the_server(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.kill()
        server.start()
        assert server.get(f"/api/jobs/{job}?wait=1")["state"] == "running"
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            worker.send(protocol.JobSuccess(job, 1))
            assert server.ended(job)["success"]

    def test_an_unstarted_job_does_not_wait_for_the_grace(self, stage: Stage) -> None:
        server = stage.server("--hold", "--grace", "60")
        job = server.post("quick")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server, "other") as worker:
            assert worker.next(protocol.Enqueue).job == job

    def test_an_unstarted_job_of_a_lost_worker_is_queued_again_after_the_servers_death(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            server.kill()
        server.start()
        assert server.state(job) == "assigned"
        with ScriptedWorker(server, "other") as worker:
            assert worker.runs().job == job

    def test_an_unstarted_job_that_its_worker_no_longer_knows_is_queued_again(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
        with ScriptedWorker(server, "w") as worker:
            assert worker.runs().job == job

    def test_a_started_job_that_its_worker_no_longer_knows_is_lost(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
        with ScriptedWorker(server, "w"):
            assert server.ended(job, 5)["reason"] == "lost"

    def test_the_newest_connection_of_a_name_wins(self, server: Server) -> None:
        with ScriptedWorker(server, "w") as old, ScriptedWorker(server, "w") as new:
            assert old.is_closed()
            job = server.post("a")
            assert new.runs().job == job
            assert len(server.get("/api/workers")) == 1

    def test_who_is_replaced_is_told_to_let_go(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as old:
            old.runs()
            with ScriptedWorker(server, "w"):
                assert old.next(protocol.Settled) == protocol.Settled(job, 1)

    def test_another_worker_cannot_end_a_job(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as owner:
            owner.runs()
            with ScriptedWorker(server, "other") as other:
                other.send(protocol.JobSuccess(job, 1))
                assert other.next(protocol.Settled) == protocol.Settled(job, 1)
                other.send(protocol.Log(job, 1, 0, b"forged"))
            owner.send(protocol.JobFailure(job, 1, 1))
            owner.next(protocol.Settled)
            assert (server.state(job), server.log(job)) == ("failure", b"")

    @pytest.mark.parametrize(
        "frame",
        [b"\x01", b"\x10{}", b"\x10[]", b"\x11\0\0\0\1", b"\x1f\0\0\0\x09\1", b"\x1f\0\0\0\1\x1f", b"\2\0\0\0\1{}"],
    )
    def test_a_malformed_frame_closes_only_its_connection(self, server: Server, frame: bytes) -> None:
        with ScriptedWorker(server, "good") as good, ScriptedWorker(server, "bad", tags=("bad",)) as bad:
            bad.send(frame)
            assert bad.is_closed()
            server.post("a")
            assert good.runs()

    def test_a_worker_must_say_hello_first(self, server: Server) -> None:
        url = f"ws://127.0.0.1:{server.port}/runner"
        with connect(url, proxy=None, subprotocols=[VERSION_2]) as peer:
            peer.send(protocol.encode(protocol.JobRunning(1, 1)))
            assert is_closed(peer)

    def test_cancelling_a_running_job_asks_its_worker(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            reply = server.http("DELETE", f"/api/jobs/{job}").json
            assert (reply["state"], reply["reason"]) == ("running", "cancelling")
            assert worker.next(protocol.Stop) == protocol.Stop(job, 1)
            worker.send(protocol.JobFailure(job, 1, 143, "exit"))
            worker.next(protocol.Settled)
            assert server.state(job) == "cancelled"
            assert worker.gets_nothing(protocol.Enqueue)

    def test_cancelling_an_unstarted_job_never_starts_it(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.next(protocol.Enqueue)
            assert server.http("DELETE", f"/api/jobs/{job}").json["state"] == "cancelled"
            worker.send(protocol.JobRunning(job, 1))
            assert worker.next(protocol.Settled) == protocol.Settled(job, 1)
            assert worker.gets_nothing(protocol.Go)
            assert server.state(job) == "cancelled"

    def test_a_cancelled_job_whose_worker_is_lost_is_cancelled(self, server: Server) -> None:
        job = server.post("again")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job, 5)["state"] == "cancelled"

    def test_the_order_to_stop_is_repeated_to_a_worker_that_comes_back(self, server: Server) -> None:
        job = server.post("a")
        with ScriptedWorker(server, "w") as worker:
            worker.runs()
            server.http("DELETE", f"/api/jobs/{job}")
            server.kill()
        server.start()
        with ScriptedWorker(server, "w", jobs=((job, 1, "running"),)) as worker:
            assert worker.next(protocol.Stop) == protocol.Stop(job, 1)


class TestVersion2Server:
    """Our worker does nothing before it is told, and forgets nothing before it may."""

    CONFIG: ClassVar = {"name": "a", "image": "busybox", "command": ["sh", "-c", "echo out; exit 3"]}

    @pytest.fixture
    def server(self) -> Iterator[ScriptedServer]:
        with ScriptedServer(
            self.CONFIG, {"name": "long", "image": "busybox", "command": "sleep 60"}, version=2
        ) as server:
            yield server

    def test_it_says_hello_first(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server, "--slots", "3", "--tag", "x", "--tag", "y")
        until(lambda: server.received)
        hello = server.received[0]
        assert (hello.name, hello.slots, hello.tags, hello.jobs) == ("worker", 3, ("x", "y"), ())

    def test_it_starts_nothing_before_go(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        time.sleep(0.3)
        assert stage.docker.ledger("run") == []
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        assert protocol.Log(5, 1, 0, b"out\n") in server.received

    def test_it_drops_what_is_settled_instead(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Settled(5, 1))
        server.send(protocol.Go(5, 1))
        server.send(protocol.Enqueue(6, "a", 1))
        server.wait_for(protocol.JobRunning(6, 1))
        assert stage.docker.ledger("run") == []

    def test_it_starts_once_when_told_twice(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server, "--slots", "2")
        for _ in range(3):
            for message in (protocol.Enqueue(5, "a", 1), protocol.Go(5, 1)):
                server.send(message)
                server.send(message)
            server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        server.send(protocol.Enqueue(5, "a", 1))
        server.send(protocol.Go(5, 1))
        time.sleep(0.2)
        assert len(stage.docker.ledger("run", 5)) == stage.docker.starts(5) == 1

    def test_it_takes_nothing_more_when_it_drains(self, server: ScriptedServer, stage: Stage) -> None:
        worker = stage.worker(server, "--slots", "2")
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        worker.signal(signal.SIGTERM)
        until(lambda: "finishing" in worker.stderr)
        server.send(protocol.Enqueue(6, "a", 1))
        time.sleep(0.3)
        assert protocol.JobRunning(6, 1) not in server.received

    def test_it_keeps_the_container_until_it_is_settled(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        time.sleep(0.2)
        assert stage.docker.containers() == ["jobworker-0123abcd-5-1"]
        server.send(protocol.Settled(5, 1))
        until(lambda: stage.docker.containers() == [])

    def test_it_sends_a_result_again_on_the_next_connection(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "a", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        server.received.clear()
        server.hang_up()
        until(lambda: len(server.dials) == 2)
        until(lambda: server.received)
        assert server.received[0].jobs == ((5, 1, "finished"),)
        server.send(protocol.Logged(5, 1, 2))
        server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
        logs = [message for message in server.received if isinstance(message, protocol.Log)]
        assert logs == [protocol.Log(5, 1, 2, b"t\n")]

    def test_it_stops_what_it_is_told_to_stop(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        server.send(protocol.Stop(5, 1))
        until(lambda: stage.docker.ledger("end", 5))
        until(lambda: any(isinstance(message, protocol.JobFailure) for message in server.received))

    def test_it_stops_and_removes_what_is_settled_while_it_runs(self, server: ScriptedServer, stage: Stage) -> None:
        stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        server.send(protocol.Settled(5, 1))
        until(lambda: stage.docker.containers() == [], 15)

    def test_it_tells_a_restarted_server_what_it_holds(self, server: ScriptedServer, stage: Stage) -> None:
        worker = stage.worker(server)
        server.send(protocol.Enqueue(5, "long", 1))
        server.wait_for(protocol.JobRunning(5, 1))
        server.send(protocol.Go(5, 1))
        until(lambda: stage.docker.starts(5))
        worker.kill()
        server.received.clear()
        worker.start()
        until(lambda: server.received)
        assert server.received[0].jobs == ((5, 1, "running"),)

    def test_it_takes_another_servers_containers_for_none_of_its_business(self, stage: Stage) -> None:
        with ScriptedServer(self.CONFIG, version=2) as server:
            worker = stage.worker(server)
            server.send(protocol.Enqueue(5, "a", 1))
            server.wait_for(protocol.JobRunning(5, 1))
            server.send(protocol.Go(5, 1))
            server.wait_for(protocol.JobFailure(5, 1, 3, "exit"))
            worker.kill()
        other = stage.server()
        stage.worker(other)
        assert other.ended(other.post("quick"))["success"]
        until(lambda: stage.docker.containers() == ["jobworker-0123abcd-5-1"])


# -- the promises ------------------------------------------------------------------------------------------------------


def all_ended(server: Server, seconds: float = 60) -> list[Any]:
    """Wait until no job is open and return them all."""
    until(lambda: server.get("/api/jobs?state=queued,assigned,running&limit=1") == [], seconds)
    return list(server.get("/api/jobs?full=1"))


class TestPromise01Accepted:
    """A 2xx to POST means that the job is on disk and will reach a final state."""

    def test_it_survives_the_servers_death_at_once(self, stage: Stage) -> None:
        server = stage.server("--hold")
        accepted = []
        for _ in range(5):
            accepted.append(server.post("quick"))
            server.kill()
            server.start()
        assert [job["id"] for job in server.get("/api/jobs")] == accepted

    def test_what_was_accepted_from_many_at_once_survives(self, stage: Stage) -> None:
        server = stage.server("--hold")
        accepted: list[int] = []

        def post_until_it_dies(_: int) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    accepted.append(server.post("quick"))

        with ThreadPoolExecutor(8) as pool:
            posts = pool.map(post_until_it_dies, range(8))
            until(lambda: len(accepted) > 300)
            server.kill()
            list(posts)
        server.start()
        assert set(accepted) <= {job["id"] for job in server.get("/api/jobs")}

    def test_ids_are_never_used_again(self, stage: Stage) -> None:
        server = stage.server("--hold")
        first = server.post("quick")
        stage.worker(server)
        server.ended(first)
        server.kill()
        server.start()
        assert server.post("quick") > first
        until(lambda: server.get("/api/workers"))
        stage.worker(server, name="other")
        assert [worker["id"] for worker in server.get("/api/workers")] == [1, 2]

    @meanwhile
    def test_ids_are_never_used_again_after_pruning(self, stage: Stage) -> None:
        server = stage.server("--keep", "1")
        stage.worker(server)
        last = [server.post("hello-world") for _ in range(3)][-1]
        server.ended(last)
        until(lambda: server.get("/api/jobs") == [], 30)
        server.stop()
        server.start()
        until(lambda: server.get("/api/workers"))
        assert server.post("quick") == last + 1

    def test_a_database_has_one_server(self, stage: Stage) -> None:
        server = stage.server()
        second = stage.run("server.py", "-p", "0", str(stage.jobs))
        assert second.returncode == 1
        assert "jobs.db" in second.stderr
        assert "Traceback" not in second.stderr
        assert server.get("/healthz")["status"] == "ok"


class TestPromise02Kills:
    """Kill -9 of anything, at any moment: every job is final once all is up again, and none ran twice."""

    def test_a_thousand_jobs_survive_the_servers_death(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        server.http("POST", "/api/jobs", [{"name": "quick"}] * 1000, 30)
        until(lambda: stage.docker.starts() >= 300, 60)
        server.kill()
        server.start()
        jobs = all_ended(server)
        assert [job["state"] for job in jobs] == ["success"] * 1000
        assert sorted(line[0].split("-")[-2] for line in stage.docker.ledger("start")) == sorted(
            map(str, range(1, 1001))
        )
        until(lambda: stage.docker.containers() == [])

    def test_all_kinds_of_deaths_at_once(self, stage: Stage) -> None:
        server = stage.server("--grace", "3")
        worker = stage.worker(server, "--slots", "4")
        jobs = [server.sh(f"echo {n}; sleep 0.1; echo {n}; exit {n % 3}") for n in range(60)]
        for at in (5, 15, 25, 35, 45):
            until(lambda at=at: stage.docker.starts() >= at, 30)  # type: ignore[misc]
            for job in jobs[at - 3 : at]:
                for pid in stage.docker.clients(job):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for program in (worker, server) if at % 10 else (server, worker):
                program.kill()
                time.sleep(0.1)
            server.start()
            worker.start()
        all_ended(server)
        never_started = [job for job in jobs if not stage.docker.starts(job)]
        assert len(never_started) < 10  # those whose worker died between Go and the container's start
        assert {server.job(job)["reason"] for job in never_started} <= {"lost"}
        for n, job in enumerate(jobs):
            if job not in never_started:
                found = server.job(job)
                assert (found["exit_code"], found["reason"]) == (n % 3, "exit" if n % 3 else None)
                assert (server.log(job), stage.docker.starts(job)) == (b"%d\n%d\n" % (n, n), 1)
        until(lambda: stage.docker.containers() == [])

    @pytest.mark.parametrize("delay", [0.5, 0])
    def test_a_worker_that_dies_between_the_creation_and_the_start(self, stage: Stage, delay: float) -> None:
        stage.docker.delay("start", delay)
        server = stage.server("--grace", "1")
        worker = stage.worker(server)
        job = server.sh("exit 4")
        until(lambda: stage.docker.ledger("run", job))
        worker.kill()
        worker.start()
        ended = server.ended(job)
        assert (ended["exit_code"], ended["reason"]) in ((4, "exit"), (None, "lost"))
        assert stage.docker.starts(job) <= 1
        until(lambda: stage.docker.containers() == [])


class TestPromise03AtMostOnce:
    """With retries 0 a container is started at most once; attempts never overlap."""

    def test_a_killed_worker_adopts_what_runs(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 7")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["state"], ended["exit_code"], ended["reason"], ended["attempt"]) == ("failure", 7, "exit", 1)
        assert server.log(job) == b"before\nafter\n"
        assert stage.docker.starts(job) == 1
        until(lambda: stage.docker.containers() == [])

    def test_a_killed_worker_reports_what_ended_meanwhile(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 0.3; echo done; exit 5")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        until(lambda: stage.docker.ledger("end", job))
        worker.start()
        assert (server.ended(job)["exit_code"], server.log(job)) == (5, b"done\n")
        assert stage.docker.starts(job) == 1

    def test_a_killed_docker_client_costs_nothing(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: server.log(job) == b"before\n")
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        time.sleep(0.2)
        assert server.state(job) == "running"
        (stage.folder / "go").touch()
        assert (server.ended(job)["exit_code"], server.log(job)) == (6, b"before\nafter\n")
        assert stage.docker.starts(job) == 1

    def test_a_docker_run_that_outlives_its_worker_starts_nothing(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        stage.docker.delay("run", 0.7)
        job = server.sh("true")
        until(lambda: stage.docker.calls("run"))
        worker.kill()
        worker.start()
        assert server.ended(job)["reason"] == "lost"
        time.sleep(1)
        assert (stage.docker.starts(job), stage.docker.containers()) == (0, [])

    def test_a_killed_inspection_is_no_result(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"echo before; until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: server.log(job) == b"before\n")
        stage.docker.delay("inspect", 0.3)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        for seen in (0, 1):
            until(lambda seen=seen: len(stage.docker.calls("inspect")) > seen)  # type: ignore[misc]
            os.kill(stage.docker.calls("inspect")[-1], signal.SIGKILL)
        time.sleep(0.2)
        (stage.folder / "go").touch()
        assert (server.ended(job)["exit_code"], server.log(job)) == (6, b"before\nafter\n")

    def test_a_killed_list_of_containers_forgets_none(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 6")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        stage.docker.delay("ps", 0.3)
        before = len(stage.docker.calls("ps"))
        Program.start(worker)
        until(lambda: len(stage.docker.calls("ps")) > before)
        os.kill(stage.docker.calls("ps")[-1], signal.SIGKILL)
        (stage.folder / "go").touch()
        assert server.ended(job)["exit_code"] == 6

    def test_a_worker_that_never_comes_back_loses_its_job(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: server.state(job) == "running")
        worker.kill()
        assert (server.ended(job, 5)["state"], server.job(job)["reason"]) == ("failure", "lost")

    def test_a_cut_off_worker_that_wakes_after_its_grace_lets_go(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        with Relay(server) as relay:
            worker = stage.worker(relay)
            job = server.sh("sleep 60")
            until(lambda: stage.docker.starts(job))
            worker.freeze()
            relay.cut()
            assert server.ended(job, 5)["reason"] == "lost"
            worker.thaw()
            until(lambda: stage.docker.containers() == [], 15)
            assert (server.job(job)["reason"], stage.docker.starts(job)) == ("lost", 1)
            assert server.ended(server.post("quick"))["success"]

    def test_a_lost_job_with_retries_runs_elsewhere(self, stage: Stage) -> None:
        jobs = f"- {{name: until, image: busybox, command: {until_file(stage)}, retries: 1, retry_delay: 100ms}}"
        server = stage.server("--grace", "1", jobs=jobs)
        worker = stage.worker(server)
        job = server.post("until")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        stage.worker(server, name="other")
        until(lambda: stage.docker.starts(job) == 2)
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["success"], ended["attempt"], ended["worker"]) == (True, 2, "other")
        assert [one["reason"] for one in server.get(f"/api/jobs/{job}/attempts")] == ["lost", None]
        worker.start()
        until(lambda: stage.docker.containers() == [])

    def test_a_second_worker_of_one_name_on_a_host_is_refused(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        path = f"{stage.docker.folder}:{os.environ['PATH']}"
        target = f"127.0.0.1:{server.port}/runner"
        second = stage.run("client.py", "--name", "worker", target, PATH=path, TMPDIR=str(stage.folder))
        assert second.returncode in (1, 2)
        assert "worker" in second.stderr

    def test_two_hosts_of_one_name_do_not_run_a_job_twice(self, stage: Stage, tmp_path: Path) -> None:
        server = stage.server()
        first = stage.worker(server)
        jobs = [server.sh("sleep 0.1") for _ in range(10)]
        until(stage.docker.starts)
        (tmp_path / "elsewhere").mkdir()
        stage.worker(server, TMPDIR=str(tmp_path / "elsewhere"))
        assert first.exit_code() == 1
        for job in jobs:
            assert server.ended(job, 30)["state"] in FINAL
            assert stage.docker.starts(job) <= 1

    def test_two_workers_without_a_name_are_two(self, stage: Stage) -> None:
        server = stage.server()
        for _ in range(2):
            worker = Worker(
                stage.folder,
                "client.py",
                f"127.0.0.1:{server.port}/runner",
                PATH=f"{stage.docker.folder}:{os.environ['PATH']}",
            )
            stage.programs.append(worker)
            worker.start()
        host = socket.gethostname()
        assert [worker["name"] for worker in server.get("/api/workers?full=1")] == [f"{host}-1", f"{host}-2"]
        worker.kill()
        worker.start()
        until(lambda: len(server.get("/api/workers")) == 2)
        assert {worker["name"] for worker in server.get("/api/workers?full=1")} == {f"{host}-1", f"{host}-2"}

    @meanwhile
    def test_a_dead_line_is_found_by_both_sides(self, stage: Stage) -> None:
        server = stage.server("--grace", "1")
        with Relay(server) as relay:
            stage.worker(relay)
            relay.dead = True
            until(lambda: server.get("/api/workers") == [], 35)
            relay.dead = False
            until(lambda: server.get("/api/workers"), 35)
            assert relay.dials >= 2

    def test_a_killed_docker_inspect_costs_nothing(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo after; exit 6")
        until(lambda: stage.docker.starts(job) == 1)
        stage.docker.delay("inspect", 0.5)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        until(lambda: stage.docker.calls("inspect"))
        os.kill(stage.docker.calls("inspect")[0], signal.SIGKILL)
        (stage.folder / "go").touch()
        ended = server.ended(job)
        assert (ended["exit_code"], ended["reason"], server.log(job)) == (6, "exit", b"after\n")


class TestPromise04Results:
    """Success if and only if the container exited 0; a failure carries its exit code or the reason."""

    @pytest.mark.parametrize("code", [0, 1, 2, 3, 125, 126, 127, 128, 137, 143, 255])
    def test_an_exit_code_is_reported(self, busy_stage: tuple[Server, Docker], code: int) -> None:
        server, docker = busy_stage
        job = server.ended(server.sh(f"exit {code}"))
        assert (job["success"], job["exit_code"], job["reason"]) == (code == 0, code, "exit" if code else None)
        assert docker.starts(job["id"]) == 1

    def test_a_signal_is_a_failure(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.ended(server.sh("kill -9 $$"))
        assert (job["state"], job["exit_code"]) == ("failure", 137)

    def test_a_missing_image_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: missing}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")
        assert b"manifest unknown" in server.log(job["id"])

    def test_an_image_that_may_not_be_pulled_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: missing, pull_policy: never}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")
        assert stage.docker.calls("pull") == []

    def test_an_image_is_pulled_once_for_all_that_wait_for_it(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: far}")
        (stage.docker.folder / "registry").write_text("far")
        stage.docker.delay("pull", 0.3)
        stage.worker(server, "--slots", "4")
        assert all(server.ended(job)["success"] for job in [server.post("a") for _ in range(4)])
        assert len(stage.docker.ledger("pull")) == 1

    def test_running_out_of_memory_is_the_reason(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: oom}")
        stage.worker(server)
        job = server.ended(server.post("a"))
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", 137, "oom")

    @meanwhile
    def test_an_engine_that_is_not_there_is_the_reason(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        (stage.docker.folder / "down").touch()
        job = server.ended(server.post("quick"), 40)
        assert (job["state"], job["reason"]) == ("failure", "docker")
        (stage.docker.folder / "down").unlink()
        assert server.ended(server.post("quick"))["success"]

    def test_a_docker_that_is_not_there_is_said_at_once(self, stage: Stage) -> None:
        worker = stage.worker(stage.server(), "--docker", "/nowhere/docker", connects=False)
        assert worker.process.wait(10) == 2
        assert worker.said("there is no command '/nowhere/docker'")

    def test_an_image_that_the_workers_owner_does_not_allow_is_refused(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--allow-image", "busy*")
        refused = server.ended(server.post("hello-world"))
        assert (refused["state"], refused["reason"]) == ("failure", "refused")
        assert server.ended(server.post("quick"))["success"]
        assert stage.docker.starts(refused["id"]) == 0

    def test_a_docker_that_only_exits_counts_by_its_exit_code(self, stage: Stage) -> None:
        server = stage.server()
        for code in (0, 9):
            (stage.folder / f"docker{code}").write_text(f"#!/bin/sh\n[ $1 = run ] && exit {code}\nexit 0\n")
            (stage.folder / f"docker{code}").chmod(0o755)
            worker = stage.worker(server, "--docker", str(stage.folder / f"docker{code}"), name=f"w{code}")
            job = server.ended(server.post("quick"))
            assert (job["success"], job["exit_code"]) == (code == 0, code)
            worker.stop()


class TestContainer:
    """How a job's config becomes a container."""

    def test_it_is_told_who_it_is(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("echo $JOBWORKER_JOB_ID $JOBWORKER_JOB_NAME $JOBWORKER_ATTEMPT")
        server.ended(job)
        assert server.log(job) == b"%d sh 1\n" % job

    def test_it_is_named_and_labelled_for_its_job(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.post("quick")
        server.ended(job)
        [(name, _, _, *words)] = docker.ledger("run", job)
        assert re.fullmatch(rf"jobworker-[0-9a-f]{{8}}-{job}-1", name)
        for label in ("jobworker.worker=worker", f"jobworker.job={job}", "jobworker.attempt=1"):
            assert label in words
        assert words[-3:] == ["--", "busybox", "true"]
        assert "--rm" not in words

    def test_a_value_is_no_argument_of_docker(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("echo $SCRIPT-as-a-secret")
        server.ended(job)
        assert not any("secret" in word for word in docker.ledger("run", job)[0])

    @pytest.mark.parametrize(
        "value", ["", " a  b ", "--rm", "$HOME `id` \"'\\", "two\nlines", "日本", "=a=b", "x" * 30_000]
    )
    def test_a_value_arrives_as_it_is(self, stage: Stage, value: str) -> None:
        command = json.dumps(["sh", "-c", 'printf "%s" "$VALUE"'])
        server = stage.server(jobs=f"- {{name: a, image: busybox, command: {command}, parameters: {{VALUE: {{}}}}}}")
        stage.worker(server)
        job = server.post("a", environment={"VALUE": value})
        assert server.ended(job)["success"]
        assert server.log(job).decode() == value

    @pytest.mark.parametrize("name", ["DOCKER_HOST", "DOCKER_CONFIG", "PATH", "HOME", "LD_PRELOAD"])
    def test_a_jobs_variable_does_not_steer_docker_itself(self, stage: Stage, name: str) -> None:
        command = json.dumps(["/bin/sh", "-c", f"echo ${name}"])
        stage.jobs.write_text(f"- {{name: a, image: busybox, command: {command}, parameters: {{{name}: {{}}}}}}")
        if stage.run("server.py", "--check", str(stage.jobs)).returncode == 2:
            return  # refusing such a name is as good
        server = stage.server(jobs=stage.jobs.read_text())
        stage.worker(server)
        job = server.post("a", environment={name: "/nowhere"})
        assert server.ended(job)["success"]
        assert server.log(job).endswith(b"/nowhere\n")
        assert "/nowhere" not in stage.docker.ledger("run", job)[0][2]


class TestPromise05Logs:
    """What a job wrote is in its log, in order, up to the limit; a lost connection loses none of it."""

    LINES = b"".join(b"line %d\n" % n for n in range(1, 301))
    SLOWLY = "for i in $(seq 1 300); do echo line $i; sleep 0.005; done"

    def test_it_is_whole_and_in_order(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 50000")
        assert server.ended(job)["log_bytes"] == 288_894
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 50_001))

    @pytest.mark.parametrize(
        "script", ["printf abc", "printf '\\000\\377\\r\\n\\033[1m'", "true", "printf '\\n\\n'", "echo e >&2"]
    )
    def test_every_byte_counts(self, busy_stage: tuple[Server, Docker], script: str) -> None:
        server, _ = busy_stage
        job = server.sh(script)
        server.ended(job)
        wanted = subprocess.run(["sh", "-c", f"{{ {script}; }} 2>&1"], check=True, capture_output=True)
        assert server.log(job) == wanted.stdout
        reply = server.http("GET", f"/api/jobs/{job}/log")
        assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"

    def test_head_and_tail_of_a_long_one_are_kept(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 600000")
        assert server.ended(job, 30)["success"]
        log = server.log(job)
        assert 900_000 < len(log) <= 1_049_000
        assert log.startswith(b"1\n2\n3\n")
        assert log.endswith(b"\n599999\n600000\n")
        notes = [line for line in log.split(b"\n") if re.search(rb"[a-z]", line)]
        assert len(notes) == 1

    def test_one_endless_line_is_cut_as_well(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("head -c 5000000 /dev/zero | tr '\\0' x")
        assert server.ended(job, 30)["success"]
        assert 900_000 < len(server.log(job)) <= 1_049_000

    @pytest.mark.parametrize("victim", ["server", "worker", "docker", "line"])
    def test_a_death_in_the_middle_loses_none_of_it(self, stage: Stage, victim: str) -> None:
        server = stage.server()
        with Relay(server) as relay:
            worker = stage.worker(relay)
            job = server.sh(self.SLOWLY)
            until(lambda: b"line 50\n" in server.log(job))
            if victim == "docker":
                os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
            elif victim == "line":
                relay.cut()
            else:
                program: Program = server if victim == "server" else worker
                program.kill()
                time.sleep(0.3)
                program.start()
            assert server.ended(job)["success"]
            assert server.log(job) == self.LINES

    def test_a_killed_docker_logs_loses_none_of_it(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(self.SLOWLY)
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        until(lambda: stage.docker.calls("logs"))
        until(lambda: b"line 50\n" in server.log(job))
        os.kill(stage.docker.calls("logs")[-1], signal.SIGKILL)
        assert server.ended(job)["success"]
        assert server.log(job) == self.LINES

    def test_a_docker_killed_just_before_the_end_loses_none_of_it(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh("echo early; sleep 0.3; echo late")
        until(lambda: server.log(job) == b"early\n")
        stage.docker.delay("inspect", 0.6)
        os.kill(stage.docker.clients(job)[0], signal.SIGKILL)
        assert server.ended(job)["success"]
        assert server.log(job) == b"early\nlate\n"

    def test_it_is_followed_to_its_end(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh(self.SLOWLY)
        assert server.log(job, "?follow=1") == self.LINES
        assert server.job(job)["success"]

    def test_it_is_followed_as_it_is_written(self, stage: Stage) -> None:
        server = stage.server(
            jobs=f"- {{name: a, image: busybox, command: [sh, -c, 'echo early; cat {stage.folder}/fifo']}}"
        )
        os.mkfifo(stage.folder / "fifo")
        stage.worker(server)
        job = server.post("a")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.request("GET", f"/api/jobs/{job}/log?follow=1")
            stream = connection.getresponse()
            assert stream.readline() == b"early\n"
            with (stage.folder / "fifo").open("w") as fifo:
                fifo.write("late\n")
            assert stream.read() == b"late\n"

    def test_parts_of_it_can_be_had(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("seq 1 100")
        server.ended(job)
        assert server.log(job, "?tail=2") == b"99\n100\n"
        assert server.log(job, "?tail=0") == b""
        assert server.log(job, "?tail=1000") == server.log(job)
        assert server.log(job, "?offset=288") == b"100\n"
        assert server.log(job, "?offset=292") == b""
        assert server.log(job, "?attempt=1") == server.log(job)

    def test_each_attempt_has_its_own(self, stage: Stage) -> None:
        command = json.dumps(["sh", "-c", "echo try $JOBWORKER_ATTEMPT; [ $JOBWORKER_ATTEMPT = 2 ]"])
        server = stage.server(jobs=f"- {{name: a, image: busybox, command: {command}, retries: 3, retry_delay: 100ms}}")
        stage.worker(server)
        job = server.post("a")
        assert (server.ended(job)["success"], server.job(job)["attempt"]) == (True, 2)
        assert [server.log(job, f"?attempt={n}") for n in (1, 2)] == [b"try 1\n", b"try 2\n"]
        assert server.log(job) == b"try 2\n"


class TestPromise06Stop:
    """After DELETE, or past its timeout, the container is gone: TERM, a grace period, KILL."""

    def test_a_queued_job_is_cancelled_at_once(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        assert server.http("DELETE", f"/api/jobs/{job}").json["state"] == "cancelled"
        stage.worker(server)
        assert server.ended(server.post("quick"))["success"]
        assert stage.docker.starts(job) == 0

    def test_a_running_job_is_asked_before_it_is_killed(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.02; done")
        until(lambda: server.log(job) == b"ready\n")
        assert server.http("DELETE", f"/api/jobs/{job}").status == 200
        assert server.ended(job)["state"] == "cancelled"
        assert server.log(job) == b"ready\nasked\n"
        until(lambda: not any(f"-{job}-" in name for name in docker.containers()))

    def test_a_deaf_job_is_killed_after_its_grace_period(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("trap '' TERM; echo ready; while :; do sleep 0.02; done")
        until(lambda: server.log(job) == b"ready\n")
        start = time.monotonic()
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job)["state"] == "cancelled"
        assert 0.9 < time.monotonic() - start < 6
        until(lambda: not any(f"-{job}-" in name for name in docker.containers()))

    @pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; while :; do sleep 0.02; done"])
    def test_a_job_past_its_timeout_is_stopped(self, stage: Stage, script: str) -> None:
        jobs = [
            {
                "name": "a",
                "image": "busybox",
                "command": ["sh", "-c", script],
                "timeout": "1s",
                "stop_grace_period": "1s",
            }
        ]
        server = stage.server(jobs=json.dumps(jobs))
        stage.worker(server)
        start = time.monotonic()
        job = server.ended(server.post("a"))
        assert (job["state"], job["reason"]) == ("failure", "timeout")
        assert 1 <= time.monotonic() - start < 6
        until(lambda: stage.docker.containers() == [])

    def test_a_timeout_counts_from_the_start_over_a_workers_death(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: busybox, command: sleep 60, timeout: 2s, stop_grace_period: 1s}")
        worker = stage.worker(server)
        job = server.post("a")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        worker.start()
        assert server.ended(job, 8)["reason"] == "timeout"

    def test_a_job_cancelled_while_its_worker_is_away_is_stopped_when_it_is_back(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: stage.docker.starts(job))
        worker.kill()
        assert server.http("DELETE", f"/api/jobs/{job}").status == 200
        worker.start()
        assert server.ended(job)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])

    def test_a_job_cancelled_while_its_image_is_pulled_never_starts(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: a, image: far}")
        (stage.docker.folder / "registry").write_text("far")
        stage.docker.delay("pull", 1)
        stage.worker(server)
        job = server.post("a")
        until(lambda: stage.docker.calls("pull"))
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job)["state"] == "cancelled"
        until(lambda: stage.docker.containers() == [])
        assert stage.docker.starts(job) == 0


class TestPromise07NothingLeft:
    """When all is quiet, no container with our label is left behind."""

    def test_not_after_successes_failures_and_cancels(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        jobs = [
            server.sh(script) for script in ("true", "exit 1", "exit 125", "kill -9 $$", "sleep 60", "seq 1 100000")
        ]
        until(lambda: server.state(jobs[4]) == "running")
        server.http("DELETE", f"/api/jobs/{jobs[4]}")
        all_ended(server)
        until(lambda: stage.docker.containers() == [])

    def test_not_after_the_servers_database_is_gone(self, stage: Stage) -> None:
        server = stage.server("--database", ":memory:")
        worker = stage.worker(server)
        job = server.sh("sleep 60")
        until(lambda: stage.docker.starts(job))
        server.kill()
        worker.kill()
        server.start()
        worker.start()
        assert server.ended(server.post("quick"))["success"]

    def test_not_when_the_engine_fails_to_remove_at_first(self, stage: Stage) -> None:
        server = stage.server()
        stage.worker(server)
        job = server.sh("sleep 0.3")
        until(lambda: stage.docker.starts(job))
        (stage.docker.folder / "down").touch()
        until(lambda: stage.docker.ledger("end", job))
        time.sleep(0.5)
        (stage.docker.folder / "down").unlink()
        assert server.ended(job)["success"]
        until(lambda: stage.docker.containers() == [], 30)


HANDSHAKE = head(
    b"GET /runner",
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


class TestPromise08NoInputEnds:
    """No input ends the server or a worker: what strangers send to /runner."""

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0" * 1000,
            b"\x81\x05hello",
            b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x88\x82aaaa\0\0",
            b"\xff" * 99,
        ],
    )
    def test_bytes_after_the_handshake_that_are_no_websocket_end_only_themselves(
        self, idle: Server, data: bytes
    ) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            peer.sendall(HANDSHAKE)
            assert peer.recv(1000).startswith(b"HTTP/1.1 101 ")
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            read_to_end(peer)
        until(lambda: idle.get("/api/workers") == [])
        assert "Traceback" not in idle.stderr

    def test_a_handshake_in_pieces_is_a_handshake(self, idle: Server) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            for at in range(0, len(HANDSHAKE), 20):
                peer.sendall(HANDSHAKE[at : at + 20])
                time.sleep(0.01)
            assert peer.recv(100).startswith(b"HTTP/1.1 101 ")

    @meanwhile
    def test_a_request_that_never_ends_is_ended(self, stage: Stage) -> None:
        server = stage.server("--hold")
        runner = head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: websocket")[:-2]
        slow_body = head(POST, b"Content-Length: 5") + b"{"
        with contextlib.ExitStack() as stack:
            peers = []
            for data in (b"GET /api", head(b"GET /healthz")[:-2], runner, slow_body):
                peers.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=35)))
                peers[-1].sendall(data)
            for peer in peers:
                assert statuses_of(read_to_end(peer)) in ([], [400], [408])
        assert server.get("/api/jobs") == []

    @meanwhile
    def test_a_head_that_drips_is_ended(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as peer:

            def is_ended() -> bool:
                try:
                    peer.sendall(b"X")
                    return peer.recv(1000) == b"" or is_ended()
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True

            peer.sendall(b"GET /api/workers HTTP/1.1\r\n")
            assert until(is_ended, 20)

    def test_a_hundred_workers_come_and_go(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for n in range(100):
                stack.enter_context(ScriptedWorker(idle, f"worker-{n}", tags=("never",)))
            until(lambda: len(idle.get("/api/workers")) == 100)
        until(lambda: idle.get("/api/workers") == [])

    def test_sighup_with_a_bad_file_changes_nothing(self, stage: Stage) -> None:
        server = stage.server("--hold")
        stage.jobs.write_text("- {name: new, image: busybox, colour: red}")
        server.signal(signal.SIGHUP)
        until(lambda: "colour" in server.stderr)
        assert server.http("POST", "/api/jobs/quick").status == 200
        stage.jobs.write_text("- {name: new, image: busybox}")
        server.signal(signal.SIGHUP)
        until(lambda: server.http("POST", "/api/jobs/new").status == 200)
        assert server.http("POST", "/api/jobs/quick").status == 404

    def test_a_queued_job_whose_config_is_gone_does_not_wait_for_ever(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        stage.jobs.write_text("- {name: new, image: busybox}")
        server.signal(signal.SIGHUP)
        until(lambda: server.http("POST", "/api/jobs/new").status == 200)
        stage.worker(server)
        ended = server.ended(job)
        assert (ended["state"], ended["reason"], ended["exit_code"]) == ("failure", "gone", None)


class TestPromise09Strangers:
    """Nothing is done without the token where one is set, nor for a web page of another site."""

    @pytest.fixture
    def guarded(self, stage: Stage) -> Server:
        (stage.folder / "tokens").write_text("api letmein\nworker iamone\n")
        return stage.server("--hold", "--token-file", str(stage.folder / "tokens"))

    @pytest.mark.parametrize(
        "path", ["/api/jobs", "/api/workers", "/api/configs", "/api/events", "/metrics", "/api/jobs/1/log"]
    )
    def test_a_request_without_the_token_is_unauthorised(self, guarded: Server, path: str) -> None:
        for headers in ({}, bearer("iamone"), bearer(""), bearer("letmei"), {"Authorization": "letmein"}):
            reply = guarded.http("GET", path, headers=headers)
            problem(reply, 401)
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")

    def test_nothing_is_queued_without_the_token(self, guarded: Server) -> None:
        problem(guarded.http("POST", "/api/jobs/quick"), 401)
        problem(guarded.http("POST", "/api/jobs", [{"name": "quick"}]), 401)
        assert guarded.http("GET", "/api/jobs", headers=bearer("letmein")).body == b"[]"
        assert guarded.http("POST", "/api/jobs/quick", headers=bearer("letmein")).status == 200

    def test_health_and_page_need_no_token(self, guarded: Server) -> None:
        assert guarded.http("GET", "/healthz").status == 200
        assert guarded.http("GET", "/").status == 200

    @pytest.mark.parametrize("token", [None, "letmein", "wrong"])
    def test_a_worker_with_a_wrong_token_is_told_so_and_ends(
        self, guarded: Server, stage: Stage, token: str | None
    ) -> None:
        arguments = []
        if token:
            (stage.folder / "token").write_text(token)
            arguments = ["--token-file", str(stage.folder / "token")]
        path = f"{stage.docker.folder}:{os.environ['PATH']}"
        ended = stage.run("client.py", "--name", "w", *arguments, f"127.0.0.1:{guarded.port}/runner", PATH=path)
        assert ended.returncode == 1
        assert "401" in ended.stderr or "token" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_worker_with_its_token_works(self, guarded: Server, stage: Stage) -> None:
        (stage.folder / "token").write_text("iamone\n")
        stage.worker(guarded, "--token-file", str(stage.folder / "token"))
        reply = guarded.http("POST", "/api/jobs/quick?wait=10", headers=bearer("letmein"))
        assert reply.json["success"]
        everything = guarded.stderr + "".join(program.stderr for program in stage.programs)
        assert "letmein" not in everything
        assert "iamone" not in everything

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost.evil.example"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Host": "evil.example"},
            {"Host": "localhost.evil.example"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": "evil@localhost"},
        ],
        ids=str,
    )
    def test_a_page_of_another_site_gets_nothing_done(self, idle: Server, headers: dict[str, str]) -> None:
        reply = idle.http("POST", "/api/jobs/quick", headers=headers)
        assert reply.status in (400, 403, 421)
        assert problem(reply, reply.status)
        assert idle.get("/api/jobs") == []

    @pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
    def test_our_own_page_may_ask(self, idle: Server, name: str) -> None:
        host = f"{name}:{idle.port}"
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert idle.http("POST", "/api/jobs/nothing", headers=headers).status == 404

    def test_a_page_cannot_be_a_worker(self, idle: Server) -> None:
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{idle.port}/runner", proxy=None, origin=Origin(f"http://localhost:{idle.port}"))
        assert refused.value.response.status_code == 403

    def test_the_page_cannot_be_framed(self, idle: Server) -> None:
        policy = idle.http("GET", "/").headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        assert "Access-Control-Allow-Origin" not in idle.http("GET", "/api/jobs").headers

    def test_the_world_needs_a_token(self, stage: Stage) -> None:
        stage.jobs.write_text(JOBS)
        refused = stage.run("server.py", "-p", "0", "--host", "0.0.0.0", str(stage.jobs))
        assert refused.returncode == 2
        assert "--token-file" in refused.stderr


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class TestPromise10Drain:
    """SIGTERM lets a worker finish what runs; a second one ends it at once; the server closes cleanly."""

    def test_the_first_sigterm_finishes_what_runs_and_takes_no_more(self, stage: Stage) -> None:
        server = stage.server("--hold")
        worker = stage.worker(server, "--slots", "2")
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; echo whole")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        until(lambda: worker.stderr.count("\n") > 1)
        time.sleep(0.2)
        later = server.post("quick")
        time.sleep(0.3)
        assert (server.state(later), server.state(job)) == ("queued", "running")
        (stage.folder / "go").touch()
        assert worker.exit_code() == 0
        assert (server.job(job)["state"], server.log(job)) == ("success", b"whole\n")
        assert stage.docker.containers() == []
        worker.start()
        assert server.ended(later)["success"]

    def test_an_idle_worker_ends_at_once(self, stage: Stage) -> None:
        worker = stage.worker(stage.server())
        assert worker.stop(3) == 0

    @pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
    def test_the_second_signal_leaves_the_container_running_and_says_so(self, stage: Stage, second: int) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 9")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        time.sleep(0.3)
        worker.signal(second)
        worker.exit_code(3)
        [name] = stage.docker.containers()
        assert name in worker.stderr
        worker.start()
        (stage.folder / "go").touch()
        assert server.ended(job)["exit_code"] == 9
        assert stage.docker.starts(job) == 1

    def test_ctrl_c_in_the_terminal_does_not_reach_the_container(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("trap 'echo interrupted; exit 3' INT TERM; echo ready; sleep 0.7; exit 0")
        until(lambda: server.log(job) == b"ready\n")
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGINT)
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.exit_code(0.3)
        if worker.process.poll() is not None:
            worker.start()
        assert server.ended(job)["success"]
        assert server.log(job) == b"ready\n"

    def test_a_draining_worker_survives_its_servers_restart(self, stage: Stage) -> None:
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done")
        until(lambda: stage.docker.starts(job))
        worker.signal(signal.SIGTERM)
        server.kill()
        (stage.folder / "go").touch()
        until(lambda: stage.docker.ledger("end", job))
        server.start()
        assert worker.exit_code(20) == 0
        assert server.job(job)["success"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_server_closes_cleanly(self, stage: Stage, number: int) -> None:
        server = stage.server("--hold")
        stage.worker(server)
        job = server.sh("sleep 0.5; exit 2")
        until(lambda: server.state(job) == "running")
        with (
            socket.create_connection(("127.0.0.1", server.port)) as idle_peer,
            Events(server),
            ThreadPoolExecutor(1) as pool,
        ):
            waiting = pool.submit(server.http, "GET", f"/api/jobs/{job}?wait=9")
            idle_peer.sendall(b"GET /")
            time.sleep(0.1)
            server.signal(number)
            assert server.exit_code(5) == 0
            assert waiting.exception(5) is None or isinstance(waiting.exception(), OSError | http.client.HTTPException)
        server.start()
        assert server.ended(job)["exit_code"] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root only")
class TestPromise11DiskFull:
    """Disk full: POST is refused with 507, what was accepted stays, results are kept until they can be stored."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)

    @staticmethod
    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"\0" * 4096)

    def test_posts_are_refused_until_there_is_room(self, stage: Stage, disk: Path) -> None:
        server = stage.server("--hold", "--database", str(disk / "jobs.db"))
        accepted = [server.post("quick") for _ in range(3)]
        self.fill(disk)
        until(lambda: self.is_refused(server, accepted), 20)
        assert "disk" in problem(server.http("POST", "/api/jobs/quick"), 507)
        assert server.http("GET", "/healthz").status == 503
        assert "disk" in server.stderr
        assert [job["id"] for job in server.get("/api/jobs")] == accepted
        (disk / "filler").unlink()
        until(lambda: not self.is_refused(server, accepted), 15)
        until(lambda: server.http("GET", "/healthz").status == 200)
        server.kill()
        server.start()
        assert [job["id"] for job in server.get("/api/jobs")] == accepted

    def test_a_result_is_kept_until_there_is_room(self, stage: Stage, disk: Path) -> None:
        server = stage.server("--database", str(disk / "jobs.db"))
        stage.worker(server)
        job = server.sh(f"echo out; until [ -e {stage.folder}/go ]; do sleep 0.02; done; exit 3")
        until(lambda: stage.docker.starts(job))
        self.fill(disk)
        until(lambda: self.is_refused(server, []), 20)
        (stage.folder / "go").touch()
        until(lambda: stage.docker.ledger("end", job))
        time.sleep(0.5)
        assert stage.docker.containers()
        (disk / "filler").unlink()
        assert (server.ended(job, 30)["exit_code"], server.log(job)) == (3, b"out\n")
        assert stage.docker.starts(job) == 1
        until(lambda: stage.docker.containers() == [])

    @staticmethod
    def is_refused(server: Server, accepted: list[int]) -> bool:
        """Whether a POST is refused; the ids of what is accepted instead are added to the list."""
        reply = server.http("POST", "/api/jobs", [{"name": "quick"}] * 200)
        accepted += [job["id"] for job in reply.json] if reply.status == 200 else []
        return reply.status != 200


# -- a real engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Worker]]:
    """A server and a worker on the engine that DOCKER_HOST names, with images hello-world and busybox."""
    if "DOCKER_HOST" not in os.environ:
        pytest.skip("DOCKER_HOST names no engine")
    with contextlib.closing(Stage(tmp_path_factory.mktemp("real"))) as stage:
        jobs = (
            JOBS
            + """
- {name: missing, image: "jobworker-test/no-such-image:1", pull_policy: never}
- {name: greedy, image: busybox, mem_limit: 16m, command: [sh, -c, "x=a; while :; do x=$x$x; done"]}
- {name: nothing, image: busybox, command: [/no/such/program]}
- {name: own, image: busybox, command: [sh, -c, "echo $DOCKER_HOST $PATH"], parameters: {DOCKER_HOST: {}, PATH: {}}}
"""
        )
        server = stage.server(jobs=jobs)
        worker = stage.worker(server, "--slots", "2", name=f"test-{os.getpid()}", PATH=os.environ["PATH"])
        yield server, worker
        until(lambda: not docker_ps(server))


def docker_ps(server: Server, job: int | None = None) -> list[str]:
    """The names of the containers that this server's jobs, or one of them, have on the real engine."""
    worker = server.get("/api/workers?full=1")[0]["name"]
    label = [f"label=jobworker.worker={worker}"] + ([f"label=jobworker.job={job}"] if job else [])
    filters = [word for one in label for word in ("--filter", one)]
    listed = subprocess.run(
        ["docker", "ps", "-a", *filters, "--format", "{{.Names}}"], check=True, capture_output=True, text=True
    )
    return listed.stdout.split()


class TestRealEngine:
    """The same, with Docker itself."""

    def test_hello_world_says_hello(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.post("hello-world")
        assert server.ended(job, 30)["success"]
        assert b"Hello from Docker!" in server.log(job)

    @pytest.mark.parametrize("code", [1, 125, 127, 255])
    def test_an_exit_code_is_reported(self, real: tuple[Server, Worker], code: int) -> None:
        server, _ = real
        job = server.ended(server.sh(f"echo out; echo err >&2; exit {code}"), 30)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", code, "exit")
        assert sorted(server.log(job["id"]).split()) == [b"err", b"out"]

    def test_running_out_of_memory_is_the_reason(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.ended(server.post("greedy"), 60)
        assert (job["exit_code"], job["reason"]) == (137, "oom")

    def test_a_missing_image_is_the_reason(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.ended(server.post("missing"), 60)
        assert (job["state"], job["exit_code"], job["reason"]) == ("failure", None, "image")

    def test_a_program_that_is_not_there_is_a_failure(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.ended(server.post("nothing"), 30)
        assert (job["state"], job["reason"]) == ("failure", "docker")
        assert b"no such file" in server.log(job["id"])

    def test_a_variable_that_docker_has_itself_is_the_containers(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.post("own", environment={"DOCKER_HOST": "tcp://nowhere:1", "PATH": "/bin:/nowhere"})
        assert server.ended(job, 30)["success"]
        assert server.log(job) == b"tcp://nowhere:1 /bin:/nowhere\n"

    def test_a_killed_worker_adopts_what_runs(self, real: tuple[Server, Worker]) -> None:
        server, worker = real
        job = server.sh("for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.2; done; exit 3")
        until(lambda: b"2\n" in server.log(job))
        worker.kill()
        worker.start()
        assert server.ended(job, 30)["exit_code"] == 3
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 11))

    def test_a_killed_docker_client_costs_nothing(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.sh("for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.2; done; exit 4")
        until(lambda: b"2\n" in server.log(job))
        [name] = docker_ps(server, job)
        [client] = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_docker_run(path, name)]
        os.kill(client, signal.SIGKILL)
        assert server.ended(job, 30)["exit_code"] == 4
        assert server.log(job) == b"".join(b"%d\n" % n for n in range(1, 9))

    def test_a_running_job_is_asked_before_it_is_killed(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        job = server.sh("trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done")
        until(lambda: server.log(job) == b"ready\n")
        server.http("DELETE", f"/api/jobs/{job}")
        assert server.ended(job, 30)["state"] == "cancelled"
        assert server.log(job) == b"ready\nasked\n"

    def test_nothing_is_left_behind(self, real: tuple[Server, Worker]) -> None:
        server, _ = real
        all_ended(server)
        until(lambda: docker_ps(server) == [], 20)


def is_docker_run(command_line: Path, name: str) -> bool:
    with contextlib.suppress(OSError):
        words = command_line.read_bytes().split(b"\0")
        return b"run" in words[:3] and name.encode() in words and b"docker" in words[0]
    return False
