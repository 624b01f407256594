"""Torments a real server, its workers and their containers, then counts every promise from outside.

A run has three parts. *Storm*: jobs are posted and cancelled while a plan drawn from the seed kills (-9), stops, cuts
off, holds and slows server, workers, links and `docker` clients, several at a time. *Calm*: all is put up again, and
every job has a deadline to end. *Verdict*: what the server says (its API) is compared with what really happened (the
engine's own events, lines the jobs wrote from inside their containers), promise by promise, as a table.

Black box: nothing of ours is imported; only curl's, docker's and kill's means are used. The same seed draws the same
plan, though not the same microseconds. Exit 1 and the folder of logs are what a broken promise leaves.

    python checks/chaos.py                       ten seeds, at least 20 kills each, on the engine that `docker` reaches
    python checks/chaos.py --seed 7 --seeds 1    that one storm again
    python checks/chaos.py --docker stand-in     no engine needed: "containers" are plain processes, many more a second
    python checks/chaos.py --short               half a minute, for `make test`
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 6.0
UNDISTURBED_SECONDS = 4.0  # with server, link and worker up for so long, a worker is expected to be back
CALM_SECONDS = (
    120.0  # half-open links are found within 30 s, then comes the grace, then the longest job with its retries
)
BACKLOG_JOBS = 25
SLOTS = 3

Job = dict[str, Any]
Key = tuple[int, int]  # job, attempt


@dataclass(frozen=True)
class Kind:
    """A sort of job, and what must come out of it."""

    lines: int = 3  # on each of its streams
    pause: str = "0.05"  # seconds after each line
    code: int = 0
    good_attempt: int = 1  # from this attempt on it exits 0 whatever `code` says; 0: never
    streams: int = 1  # 2: stdout and stderr in turns
    config: Job = field(default_factory=dict)

    def exit_code(self, attempt: int) -> int:
        return self.code if not self.good_attempt or attempt < self.good_attempt else 0


KINDS = {
    "quick": Kind(lines=0),
    "prints": Kind(lines=40),
    "fails": Kind(code=3, good_attempt=0),
    "slow": Kind(lines=60, pause="0.1"),
    "burst": Kind(lines=4000, pause=""),
    "mixed": Kind(lines=25, streams=2),
    "flaky": Kind(code=4, good_attempt=3, config={"retries": 2, "retry_delay": "0.3"}),
    "hopeless": Kind(code=5, good_attempt=0, config={"retries": 2, "retry_delay": "0.3"}),
    "steady": Kind(lines=30, pause="0.1", config={"retries": 2, "retry_delay": "0.3"}),
    "late": Kind(lines=200, pause="0.1", config={"timeout": "2s", "stop_grace_period": "1s"}),
    "deaf": Kind(lines=200, pause="0.1", config={"timeout": "2s", "stop_grace_period": "1s"}),
}
JOB_SCRIPT = """\
echo "$JOBWORKER_JOB_ID $JOBWORKER_ATTEMPT" >> {ledger}
kind=$1 lines=$2 pause=$3 streams=$4 code=$5 good=$6 i=0
[ "$kind" = deaf ] && trap '' TERM || trap 'exit 143' TERM
while [ $i -lt $lines ]; do
    echo "out $i"
    [ $streams = 2 ] && echo "err $i" >&2
    [ "$pause" ] && sleep $pause
    i=$((i+1))
done
[ $good -gt 0 ] && [ $JOBWORKER_ATTEMPT -ge $good ] && exit 0
exit $code
"""
DOCKER_SCRIPT = """\
#!/bin/sh
read -r pause < {folder}/engine-pause && [ "$pause" ] && sleep $pause
exec {docker} "$@"
"""


# --- the world that is tormented


class Link:
    """A worker's road to the server, a TCP proxy: can be cut, refused, held (neither passed on nor closed), slowed."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.pairs: set[asyncio.StreamWriter] = set()
        self.heal()

    def heal(self) -> None:
        self.chunk, self.pause, self.refusing = 1 << 16, 0.0, False
        for gate in self.open.values():
            gate.set()

    def cut(self) -> None:
        for writer in list(self.pairs):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def listen(self) -> None:
        listener = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = [writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if not self.refusing:
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                pair.append(back)
                self.pairs.update(pair)
                await asyncio.gather(self.pump(reader, back, "up"), self.pump(there, writer, "down"))
        self.pairs.difference_update(pair)
        for end in pair:
            end.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while data := await reader.read(self.chunk):
            await asyncio.sleep(self.pause)
            await self.open[way].wait()
            writer.write(data)
            await writer.drain()
        await self.open[way].wait()
        writer.close()


class Role:
    """A process of ours, started again after each death; its stderr is kept."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.name, self.arguments, self.log = name, arguments, folder / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("JOBWORKER_")}
        self.environment = kept | {"TMPDIR": str(folder)}  # where the locks of the workers' names are
        self.lock = asyncio.Lock()
        self.started: list[float] = []
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            log.write(f"=== started at {time.time():.3f}\n".encode())
            words = [sys.executable, *self.arguments]
            self.process = subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stderr=log)
        self.started.append(time.time())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def leave(self, *signals: int, seconds: float = 20.0) -> int | None:
        """Send signals, one second apart, until it has exited; gives its exit code, None if it has to be killed."""
        end = time.time() + seconds
        queue = list(signals)
        while time.time() < end:
            if queue:
                self.process.send_signal(queue.pop(0))
            for _ in range(20):
                await asyncio.sleep(0.05)
                if (code := self.process.poll()) is not None:
                    return code
        self.kill()
        return None


@dataclass
class Evidence:
    """All that was seen from outside."""

    accepted: dict[int, str] = field(default_factory=dict)  # job id -> kind
    posts: int = 0
    cancels: dict[int, float] = field(default_factory=dict)  # job id -> when DELETE was answered with 200
    seen: dict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )  # worker -> when the server listed it
    disturbed: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    kills: Counter[str] = field(default_factory=Counter)
    finals: dict[int, Job] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)
    attempts: dict[Key, Job] = field(default_factory=dict)
    logs: dict[Key, str] = field(default_factory=dict)
    starts: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    deaths: dict[Key, tuple[float, int]] = field(default_factory=dict)
    notes: Counter[Key] = field(default_factory=Counter)  # what the jobs wrote themselves
    left: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    server_starts: list[float] = field(default_factory=list)


class World:
    """A server, its workers with their links, an engine, and everything one can do to them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.evidence = folder, options, Evidence()
        self.label = f"chaos={os.getpid()}-{folder.name}"
        self.stormy = True
        self.roles: list[Role] = []
        self.workers: list[Role] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    async def put_up(self) -> None:
        self.write_files()
        self.recorder = self.record()
        server = [f"{ROOT}/server.py", "-v", "-p", str(self.port), "--database", f"{self.folder}/jobs.db", "--hold"]
        self.server = self.role("server", *server, "--grace", str(GRACE_SECONDS), f"{self.folder}/jobs.yaml")
        self.links = [Link(self.port) for _ in range(self.options.workers)]
        for number, link in enumerate(self.links, 1):
            await link.listen()
            worker = [f"{ROOT}/client.py", "-v", "--name", f"chaos-{number}", "--slots", str(SLOTS)]
            docker = ["--docker", f"{self.folder}/docker"]
            self.workers.append(self.role(f"chaos-{number}", *worker, *docker, f"127.0.0.1:{link.port}/runner"))
        await self.ask("GET", "/healthz")

    def role(self, name: str, *arguments: str) -> Role:
        self.roles.append(Role(name, self.folder, list(arguments)))
        return self.roles[-1]

    def record(self) -> "LedgerReader | subprocess.Popen[bytes]":
        """Have each start and end of a container written to a file, by the engine itself."""
        if self.options.docker == "stand-in":
            return LedgerReader(self.folder / "engine" / "ledger", self.folder / "events")
        form = "{{.TimeNano}} {{.Action}} {{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}"
        words = [self.options.docker, "events", "--format", form, "--filter", f"label={self.label}"]
        with (self.folder / "events").open("wb") as events:
            return subprocess.Popen([*words, "--filter", "event=start", "--filter", "event=die"], stdout=events)

    def write_files(self) -> None:
        (self.folder / "job.sh").write_text(JOB_SCRIPT.format(ledger=self.folder / "ledger"))
        (self.folder / "engine-pause").write_text("\n")
        docker = shutil.which(self.options.docker)
        if self.options.docker == "stand-in":
            subprocess.run([sys.executable, ROOT / "tests" / "docker_stand_in.py", self.folder / "engine"], check=True)
            docker = f"{self.folder}/engine/docker"
        (self.folder / "docker").write_text(DOCKER_SCRIPT.format(folder=self.folder, docker=docker))
        (self.folder / "docker").chmod(0o755)
        volume, label = f"{self.folder}:{self.folder}", dict([self.label.split("=")])
        configs = []
        for name, kind in KINDS.items():
            words = [name, kind.lines, kind.pause, kind.streams, kind.code, kind.good_attempt]
            command = ["sh", f"{self.folder}/job.sh", *map(str, words)]
            base = {"name": name, "image": "busybox", "command": command, "volumes": [volume], "labels": label}
            configs.append({**base, "network_mode": "none", "pull_policy": "never", **kind.config})
        (self.folder / "jobs.yaml").write_text(json.dumps(configs, indent=1))

    # what is asked of the server

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Ask until there is an answer, through any number of restarts."""
        end = time.time() + 60
        while True:
            try:
                return await asyncio.to_thread(self.request, method, path, body, headers)
            except (OSError, http.client.HTTPException):
                if time.time() > end:
                    raise
                await asyncio.sleep(0.1)

    async def get(self, path: str) -> Any:
        status, body = await self.ask("GET", path)
        if status != 200:
            raise RuntimeError(f"GET {path}: {status} {body[:300]!r}")
        return json.loads(body)

    async def post_jobs(self, rng: random.Random) -> None:
        """Post jobs of all kinds as long as the storm lasts; some are cancelled a little later."""
        cancels: set[asyncio.Task[None]] = set()
        while self.stormy:
            kind, key = rng.choice(list(KINDS)), f"{rng.getrandbits(64):x}"
            cancelled, after, pause = rng.random() < 0.12, rng.uniform(0, 3), rng.expovariate(self.options.rate)
            await asyncio.sleep(pause)
            if len(self.evidence.accepted) - len(self.evidence.finals) >= BACKLOG_JOBS:
                continue
            self.evidence.posts += 1
            status, body = await self.ask("POST", f"/api/jobs/{kind}", {}, {"Idempotency-Key": key})
            if status != 200:
                raise RuntimeError(f"POST: {status} {body[:300]!r}")
            job = json.loads(body)["id"]
            self.evidence.accepted[job] = kind
            if cancelled:
                cancels.add(asyncio.create_task(self.cancel(job, after)))
        await asyncio.gather(*cancels)

    async def cancel(self, job: int, after: float) -> None:
        await asyncio.sleep(after)
        asked = time.time()
        if (await self.ask("DELETE", f"/api/jobs/{job}"))[0] == 200:
            self.evidence.cancels[job] = asked

    async def watch(self) -> None:
        """Note who the server says is connected, and whether what was final is still what it was."""
        evidence, looked = self.evidence, 0.0
        while True:
            await asyncio.sleep(0.2)
            now = time.time()
            for worker in await self.get("/api/workers?full=1"):
                evidence.seen[worker["name"]].append(now)
            if now - looked > 1:
                looked = now
                for job in await self.get("/api/jobs?full=1&state=success,failure,cancelled"):
                    if evidence.finals.setdefault(job["id"], job) != job:
                        evidence.changes.append(f"{evidence.finals[job['id']]} became {job}")

    # what is done to them: each takes who it hits and how hard, both from 0 to 1

    async def kill_server(self, _which: float, force: float) -> None:
        async with self.disturbing(self.server):
            self.evidence.kills["server"] += 1
            self.server.kill()
            await asyncio.sleep(2 * force * force)
            self.server.start()

    async def kill_worker(self, which: float, force: float) -> None:
        worker = self.workers[int(which * len(self.workers))]
        async with self.disturbing(worker):
            self.evidence.kills["worker"] += 1
            worker.kill()
            await asyncio.sleep(2 * force * force if force < 0.9 else GRACE_SECONDS + 2)
            worker.start()

    async def kill_docker(self, which: float, _force: float) -> None:
        parents = {worker.process.pid for worker in self.workers}
        clients = sorted(pid for pid, parent in processes() if parent in parents)
        if clients:
            self.evidence.kills["docker"] += 1
            self.note(f"kill of {words_of(clients[int(which * len(clients))])}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(clients[int(which * len(clients))], signal.SIGKILL)

    async def kill_everything(self, _which: float, force: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for role in self.roles:
                await stack.enter_async_context(self.disturbing(role))
            self.evidence.kills.update(["server", *("worker" for _ in self.workers)])
            for role in self.roles:
                role.kill()
            await asyncio.sleep(2 * force * force)
            for role in reversed(self.roles) if force < 0.5 else self.roles:
                role.start()

    async def end_server(self, _which: float, _force: float) -> None:
        async with self.disturbing(self.server):
            await self.ask("GET", "/healthz")  # by then it handles signals
            if (code := await self.server.leave(signal.SIGTERM)) != 0:
                self.evidence.exits.append(f"server after SIGTERM: {code}")
            self.server.start()

    async def end_worker(self, which: float, _force: float) -> None:
        worker = self.workers[int(which * len(self.workers))]
        async with self.disturbing(worker):
            if await worker.leave(signal.SIGTERM, signal.SIGTERM) is None:
                self.evidence.exits.append(f"{worker.name} does not exit after two SIGTERM")
            worker.start()

    async def stop_a_process(self, which: float, force: float) -> None:
        role = self.roles[int(which * len(self.roles))]
        async with self.disturbing(role):
            role.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(3 * force)
            role.process.send_signal(signal.SIGCONT)

    async def cut_off_a_stopped_worker(self, which: float, force: float) -> None:
        worker, link = self.pick(which)
        async with self.disturbing(worker):
            worker.process.send_signal(signal.SIGSTOP)
            link.cut()
            await asyncio.sleep(GRACE_SECONDS + 3 * force)
            worker.process.send_signal(signal.SIGCONT)

    async def cut_link(self, which: float, force: float) -> None:
        worker, link = self.pick(which)
        async with self.disturbing(worker):
            link.cut()
            link.refusing = force > 0.5
            await asyncio.sleep(2 * force if force < 0.93 else GRACE_SECONDS + 2)
            link.heal()

    async def hold_link(self, which: float, force: float) -> None:
        worker, link = self.pick(which)
        async with self.disturbing(worker):
            for way in [("up",), ("down",), ("up", "down")][int(which * 1000) % 3]:
                link.open[way].clear()
            long = force > 0.95 and not self.options.short
            await asyncio.sleep(35 if long else 5 * force)
            if int(which * 1000) % 2:
                link.cut()
            link.heal()

    async def slow_link(self, which: float, force: float) -> None:
        worker, link = self.pick(which)
        async with self.disturbing(worker):
            link.chunk, link.pause = 200, 0.05 * force
            await asyncio.sleep(3)
            link.heal()

    async def slow_engine(self, which: float, force: float) -> None:
        (self.folder / "engine-pause").write_text(f"{force:.2f}\n")
        await asyncio.sleep(3 * which)
        (self.folder / "engine-pause").write_text("\n")

    def pick(self, which: float) -> tuple[Role, Link]:
        return list(zip(self.workers, self.links, strict=True))[int(which * len(self.workers))]

    @contextlib.asynccontextmanager
    async def disturbing(self, role: Role) -> Any:
        """Hold a process for one torment at a time, and note how long it could not be reached."""
        async with role.lock:
            begin = time.time()
            yield
            self.evidence.disturbed[role.name].append((begin, time.time() + 0.7))

    def note(self, text: str) -> None:
        with (self.folder / "storm.log").open("a") as log:
            print(dt.datetime.now(dt.UTC).isoformat(" ", "milliseconds"), text, file=log)

    # a run

    async def storm(self, rng: random.Random) -> None:
        torments: dict[Callable[[float, float], Coroutine[Any, Any, None]], int] = {
            self.kill_server: 14,
            self.kill_worker: 14,
            self.kill_docker: 20,
            self.kill_everything: 2,
            self.end_server: 3,
            self.end_worker: 3,
            self.stop_a_process: 6,
            self.cut_off_a_stopped_worker: 2,
            self.cut_link: 10,
            self.hold_link: 6,
            self.slow_link: 4,
            self.slow_engine: 8,
        }
        begin, tasks = time.time(), set()
        while time.time() - begin < self.options.seconds or self.evidence.kills.total() < self.options.kills:
            torment = rng.choices(list(torments), list(torments.values()))[0]
            which, force, pause = rng.random(), rng.random(), rng.uniform(0.1, 1.2)
            await asyncio.sleep(pause)
            self.note(f"{torment.__name__}({which:.3f}, {force:.3f})")
            tasks.add(asyncio.create_task(torment(which, force)))
        self.stormy = False
        await asyncio.gather(*tasks)

    async def calm(self) -> None:
        """Wait until every job is final and every container is gone; at most CALM_SECONDS."""
        end = time.time() + CALM_SECONDS
        while time.time() < end:
            await asyncio.sleep(0.5)
            if not await self.get("/api/jobs?state=queued,assigned,running") and not self.containers():
                break
        self.evidence.left = self.containers()

    def containers(self) -> list[str]:
        words = [f"{self.folder}/docker", "ps", "-a", "--filter", f"label={self.label}", "--format", "{{.Names}}"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()

    async def collect(self) -> None:
        evidence = self.evidence
        evidence.server_starts = self.server.started
        evidence.jobs = {job["id"]: job for job in await self.get("/api/jobs?full=1")}
        for job in evidence.jobs:
            for attempt in await self.get(f"/api/jobs/{job}/attempts"):
                key = (job, attempt["attempt"])
                evidence.attempts[key] = attempt
                evidence.logs[key] = (await self.ask("GET", f"/api/jobs/{job}/log?attempt={key[1]}"))[1].decode()
        for role in reversed(self.roles):
            if (code := await role.leave(signal.SIGTERM)) != 0:
                evidence.exits.append(f"{role.name} after SIGTERM when all is done: {code}")
            text = role.log.read_text(errors="replace")
            evidence.tracebacks += [
                f"{role.name}.log: {text[at : at + 1500]}" for at in places(text, "Traceback (most")
            ]
        self.read_files()

    def read_files(self) -> None:
        evidence = self.evidence
        for line in (self.folder / "ledger").read_text().splitlines():
            evidence.notes[(int(line.split()[0]), int(line.split()[1]))] += 1
        for line in (self.folder / "events").read_text().splitlines():
            moment, action, name, *end = line.split()
            key = (int(name.split("-")[-2]), int(name.split("-")[-1]))
            if action == "start":
                evidence.starts[key].append(int(moment) / 1e9)
            else:
                evidence.deaths[key] = (int(moment) / 1e9, int(end[0]))

    def take_down(self) -> None:
        for role in self.roles:
            role.kill()
        for name in self.containers():
            subprocess.run([f"{self.folder}/docker", "rm", "-f", "-v", name], capture_output=True, check=False)
        self.recorder.kill()


class LedgerReader:
    """Writes what the tests' stand-in for docker notes as `docker events` would, with the time; 10 ms late."""

    def __init__(self, ledger: Path, events: Path) -> None:
        ledger.touch()
        self.source, self.sink = ledger.open(), events.open("w", buffering=1)
        self.task = asyncio.create_task(self.follow())

    async def follow(self) -> None:
        while True:
            for line in self.source:
                event, name, *rest = line.rstrip("\n").split("\t")
                if event in ("start", "end"):
                    print(time.time_ns(), "start" if event == "start" else "die", name, *rest, file=self.sink)
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        self.task.cancel()


def processes() -> Iterator[tuple[int, int]]:
    """Give the id of every process and of its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def words_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return " ".join(Path(f"/proc/{process}/cmdline").read_text().split("\0")[:6])
    return "one that is gone"


def places(text: str, what: str) -> Iterator[int]:
    at = text.find(what)
    while at >= 0:
        yield at
        at = text.find(what, at + 1)


# --- the verdict: promise by promise, each from the evidence alone

FINAL = ("success", "failure", "cancelled")
Finding = tuple[bool, str]


def seconds(moment: str) -> float:
    return dt.datetime.fromisoformat(moment).timestamp()


def story(it: Evidence, key: Key) -> str:
    """All that is known of an attempt, on one line."""
    death = it.deaths.get(key)
    engine = f"started {it.starts[key]}, died {death}" if key in it.starts else "never started"
    cancel = f", cancelled at {it.cancels[key[0]]}" if key[0] in it.cancels else ""
    return f"{it.jobs[key[0]]['name']} {key}: {engine}{cancel}\n      {it.attempts.get(key)}\n      {it.jobs[key[0]]}"


def own_end(it: Evidence, key: Key) -> bool:
    """Whether nothing of ours could have ended that container early."""
    timed = "timeout" in KINDS[it.jobs[key[0]]["name"]].config
    return key[0] not in it.cancels and not timed and it.attempts[key]["reason"] != "lost"


def accepted_jobs_are_there(it: Evidence) -> Iterator[Finding]:
    for job, kind in it.accepted.items():
        yield job in it.jobs and it.jobs[job]["name"] == kind, f"job {job} ({kind}) was accepted and is not there"
    yield len(it.jobs) == it.posts, f"{it.posts} different keys were posted, {len(it.jobs)} jobs are there"


def jobs_are_final(it: Evidence) -> Iterator[Finding]:
    for job in it.jobs.values():
        yield job["state"] in FINAL, f"not final: {story(it, (job['id'], job['attempt']))}"


def final_jobs_stay(it: Evidence) -> Iterator[Finding]:
    for job, final in it.finals.items():
        yield final == it.jobs.get(job), f"{final} became {it.jobs.get(job)}"
    for change in it.changes:
        yield False, change


def started_once(it: Evidence) -> Iterator[Finding]:
    for key, starts in it.starts.items():
        yield len(starts) == 1 and it.notes[key] <= 1, f"attempt started twice: {story(it, key)}"
    per_job = Counter(job for job, _attempt in it.starts)
    for job, count in per_job.items():
        allowed = 1 + KINDS[it.jobs[job]["name"]].config.get("retries", 0)
        yield count <= allowed, f"{count} starts, {allowed} allowed: {[story(it, k) for k in it.starts if k[0] == job]}"


def attempts_are_apart(it: Evidence) -> Iterator[Finding]:
    for (job, attempt), starts in it.starts.items():
        before = [key for key in it.starts if key[0] == job and key[1] < attempt]
        for key in before:
            lost = it.attempts[key]["reason"] == "lost"  # its host was cut off: nothing can be promised
            apart = key in it.deaths and it.deaths[key][0] <= starts[0]
            yield lost or apart, f"overlap: {story(it, key)}\n   and {story(it, (job, attempt))}"


def outcomes_are_true(it: Evidence) -> Iterator[Finding]:
    for key, attempt in it.attempts.items():
        kind, job = KINDS[it.jobs[key[0]]["name"]], it.jobs[key[0]]
        code = it.deaths[key][1] if key in it.deaths else None
        last = key[1] == job["attempt"]
        reason = "success" if last and job["state"] == "success" else attempt["reason"]
        if last and job["state"] == "cancelled":
            true = key[0] in it.cancels
        elif reason == "success":
            true = code == 0 and attempt["exit_code"] == 0
        elif reason == "exit":
            true = code == attempt["exit_code"] != 0
        elif reason == "timeout":
            true = "timeout" in kind.config
        elif reason == "docker":
            true = key not in it.starts or code == 137
        else:
            true = reason == "lost"
        yield true, f"{reason!r} is not what happened: {story(it, key)}"
        if own_end(it, key) and code is not None:
            yield code == kind.exit_code(key[1]), f"its container was ended by another: {story(it, key)}"


def logs_are_whole(it: Evidence) -> Iterator[Finding]:
    for key, text in it.logs.items():
        kind, lines = KINDS[it.jobs[key[0]]["name"]], text.splitlines()
        for stream in ("out", "err")[: kind.streams]:
            got = [line for line in lines if line.startswith(stream)]
            want = [f"{stream} {number}" for number in range(kind.lines)]
            good = got == want if own_end(it, key) and key in it.deaths else got == want[: len(got)]
            wrong = next(
                (n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
            )
            yield good, f"log wrong from line {wrong}, {got[wrong : wrong + 3]} of {len(got)} lines: {story(it, key)}"
        other = [line for line in lines if line[:4] not in ("out ", "err ")]
        yield not other, f"not the job's own lines in the log: {other[:5]}: {story(it, key)}"


def lost_after_the_grace(it: Evidence) -> Iterator[Finding]:
    for key, attempt in it.attempts.items():
        if attempt["reason"] != "lost" or key not in it.starts or fenced(it, key):
            continue
        end, name = seconds(attempt["finished_at"]), attempt["worker"]
        seen = max((moment for moment in it.seen[name] if moment < end - 0.1), default=0)
        since = max(seen, *(start for start in it.server_starts if start < end))
        yield end - since > GRACE_SECONDS - 0.4, f"lost {end - since:.2f} s after it was there: {story(it, key)}"
        calm = longest_gap(it.disturbed[name] + it.disturbed["server"], end - GRACE_SECONDS, end)
        yield (
            calm < UNDISTURBED_SECONDS,
            f"lost, though nothing disturbed its worker for {calm:.1f} s: {story(it, key)}",
        )


def fenced(it: Evidence, key: Key) -> bool:
    """Whether a container was removed while it was only just starting: its worker had died meanwhile."""
    return key in it.deaths and it.deaths[key][1] == 137 and it.deaths[key][0] - it.starts[key][0] < 2


def longest_gap(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Give the longest time between `begin` and `end` that no span covers."""
    longest, at = 0.0, begin
    for start, stop in sorted(spans):
        longest, at = max(longest, min(start, end) - at), max(at, stop)
    return max(longest, end - at)


def nothing_starts_after_its_end(it: Evidence) -> Iterator[Finding]:
    for key, starts in it.starts.items():
        finished = it.attempts[key]["finished_at"] if key in it.attempts else None
        late = finished is not None and starts[0] > seconds(finished) + 0.1
        late = late or (key[0] in it.cancels and starts[0] > it.cancels[key[0]] + 5)
        yield key in it.attempts and not late, f"a container started after its attempt was over: {story(it, key)}"


PROMISES: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "1  every accepted job is there, once": accepted_jobs_are_there,
    "2  every job became final": jobs_are_final,
    "2  a final job never changed": final_jobs_stay,
    "2  lost only after a whole grace": lost_after_the_grace,
    "3  started at most once an attempt, attempts within retries": started_once,
    "3  attempts of a job never overlap": attempts_are_apart,
    "3  nothing starts after its end": nothing_starts_after_its_end,
    "4  the outcome is the container's own": outcomes_are_true,
    "5  logs are whole and in order": logs_are_whole,
    "7  no container is left behind": lambda it: ((False, name) for name in it.left),
    "8  no traceback": lambda it: ((False, text) for text in it.tracebacks),
    "10 exits are clean": lambda it: ((False, text) for text in it.exits),
}


def judge(evidence: Evidence) -> int:
    """Print the table and what is wrong; gives the number of violations."""
    details, total = [], 0
    print(f"   {'promise':62}{'checked':>8}{'broken':>8}")
    for promise, check in PROMISES.items():
        findings = list(check(evidence))
        broken = [text for good, text in findings if not good]
        print(f"   {promise:62}{len(findings) or '':>8}{len(broken):>8}")
        details += [f"   {promise.split(maxsplit=1)[1]}: {text}" for text in broken[:8]]
        total += len(broken)
    print(*details, sep="\n")
    return total


async def run(folder: Path, seed: int, options: argparse.Namespace) -> int:
    world, begin = World(folder, options), time.time()
    try:
        await world.put_up()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(world.watch())
            posting = group.create_task(world.post_jobs(random.Random(f"jobs {seed}")))
            await world.storm(random.Random(seed))
            await posting
            await world.calm()
            watching.cancel()
        await world.collect()
    finally:
        world.take_down()
    evidence = world.evidence
    ends = Counter(job["state"] if job["reason"] is None else job["reason"] for job in evidence.jobs.values())
    counts = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    kills = ", ".join(f"{count} {role}" for role, count in sorted(evidence.kills.items()))
    print(f"seed {seed}: {time.time() - begin:.0f} s, killed {kills}; {len(evidence.jobs)} jobs: {counts}")
    return judge(evidence)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="the first seed (default: any)")
    parser.add_argument("--seeds", type=int, default=10, help="how many storms, each with the next seed (default: 10)")
    parser.add_argument("--kills", type=int, default=20, help="at least so many a storm (default: 20)")
    parser.add_argument("--seconds", type=float, default=25, help="at least so long a storm (default: 25)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0, help="jobs posted a second")
    parser.add_argument("--docker", default="docker", help="the engine's command, or 'stand-in' (default: docker)")
    parser.add_argument("--short", action="store_true", help="one storm of a few seconds, on any engine there is")
    options = parser.parse_args()
    if options.short:
        options.seeds, options.kills, options.seconds = 1, 8, 6
    engine = [options.docker, "image", "inspect", "busybox"]
    if options.docker != "stand-in" and subprocess.run(engine, capture_output=True, check=False).returncode:
        if not options.short:
            parser.error(f"{options.docker!r} reaches no engine with an image 'busybox'; see --docker stand-in")
        options.docker = "stand-in"
    options.rate = options.rate or (10 if options.docker == "stand-in" else 5)
    bad = 0
    for seed in range(options.seed, options.seed + options.seeds):
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        broken = asyncio.run(run(folder, seed, options))
        bad += bool(broken)
        print(f"   kept: {folder}\n" if broken else "", flush=True)
        if not broken:
            shutil.rmtree(folder)
    print(f"{options.seeds - bad} of {options.seeds} storms kept every promise ({options.docker})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
