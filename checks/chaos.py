"""Torments a real server, its workers and their containers, then counts every promise from outside.

A run has three parts. *Storm*: jobs are posted and cancelled while a plan drawn from the seed kills (-9), stops, cuts
off, holds and slows server, workers, links and `docker` clients, and has docker, engine and callers limp (limps.py),
several at a time. *Calm*: all is put up again, and every job has a deadline to end. *Verdict* (verdict.py): what the
server says (its API) is compared with what really happened (the engine's own events, lines the jobs wrote from inside
their containers), promise by promise, as a table.

Black box: nothing of ours is imported; only curl's, docker's and kill's means are used. The same seed draws the same
plan, though not the same microseconds. Exit 1 and the folder of logs are what a broken promise leaves.

    python checks/chaos.py                       ten seeds, at least 20 kills and 10 limps each, with real containers
    python checks/chaos.py --seed 7 --seeds 1    that one storm again
    python checks/chaos.py --docker stand-in     no engine needed: "containers" are plain processes, many more a second
    python checks/chaos.py --docker podman       with podman's containers
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limps import Docker, Ground, Limps, OwnEngine, Probe, Torment, own_engine
from verdict import FINAL, GRACE_SECONDS, KINDS, UNASKED, UNKNOWN_CODE, Evidence, judge, prompt_share, within

ROOT = Path(__file__).resolve().parent.parent
CALM_SECONDS = (
    120.0  # half-open links are found within 30 s, then comes the grace, then the longest job with its retries
)
BACKLOG_JOBS = 25
SLOTS = 3

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
NO_COMMAND = 2  # the exit code of a worker that finds no docker


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


def write_jobs(folder: Path, label: str) -> None:
    """Write jobs.yaml with a job of each kind, and the script that all of them run."""
    (folder / "job.sh").write_text(JOB_SCRIPT.format(ledger=folder / "ledger"))
    volume, labels = f"{folder}:{folder}", dict([label.split("=")])
    configs = []
    for name, kind in KINDS.items():
        words = [name, kind.lines, kind.pause, kind.streams, kind.code, kind.good_attempt]
        command = ["sh", f"{folder}/job.sh", *map(str, words)]
        base = {"name": name, "image": "busybox", "command": command, "volumes": [volume], "labels": labels}
        configs.append({**base, "network_mode": "none", "pull_policy": "never", **kind.config})
    (folder / "jobs.yaml").write_text(json.dumps(configs, indent=1))


class Caller:
    """Asks the server."""

    def __init__(self, port: int) -> None:
        self.port = port

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


class World:
    """A server, its workers with their links, an engine, and everything one can do to them."""

    def __init__(self, folder: Path, options: argparse.Namespace, engine: OwnEngine | None) -> None:
        self.folder, self.options, self.engine, self.evidence = folder, options, engine, Evidence()
        self.label = f"chaos={os.getpid()}-{folder.name}"
        self.stormy = True
        self.roles: list[Role] = []
        self.workers: list[Role] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.caller = Caller(self.port)

    async def put_up(self) -> None:
        write_jobs(self.folder, self.label)
        self.docker = self.provide_docker()
        self.recorder = self.record()
        self.limps = Limps(self.ground())
        server = [f"{ROOT}/server.py", "-v", "-p", str(self.port), "--database", f"{self.folder}/jobs.db", "--hold"]
        self.server = self.role("server", *server, "--grace", str(GRACE_SECONDS), f"{self.folder}/jobs.yaml")
        self.links = [Link(self.port) for _ in range(self.options.workers)]
        for number, link in enumerate(self.links, 1):
            await link.listen()
            worker = [f"{ROOT}/client.py", "-v", "--name", f"chaos-{number}", "--slots", str(SLOTS)]
            docker = ["--docker", f"{self.folder}/docker"]
            self.workers.append(self.role(f"chaos-{number}", *worker, *docker, f"127.0.0.1:{link.port}/runner"))
        await self.caller.ask("GET", "/healthz")

    def role(self, name: str, *arguments: str) -> Role:
        self.roles.append(Role(name, self.folder, list(arguments)))
        return self.roles[-1]

    def provide_docker(self) -> Docker:
        if self.options.docker == "stand-in":
            subprocess.run([sys.executable, ROOT / "tests" / "docker_stand_in.py", self.folder / "engine"], check=True)
            return Docker(self.folder, f"{self.folder}/engine/docker", None)
        words = [self.options.docker, "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
        host = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        way = Path(host.removeprefix("unix://")) if host.startswith("unix://") else None
        return Docker(self.folder, shutil.which(self.options.docker) or self.options.docker, way)

    def record(self) -> "LedgerReader | EventReader":
        """Have each start and end of a container written to a file, by the engine itself."""
        if self.options.docker == "stand-in":
            return LedgerReader(self.folder / "engine" / "ledger", self.folder / "events")
        return EventReader(self.docker.real, self.label, self.folder / "events")

    def ground(self) -> Ground:
        return Ground(
            folder=self.folder,
            port=self.port,
            label=self.label,
            docker=self.docker,
            engine=self.engine,
            commands=self.commands,
            on_engine_start=self.recorder.go_on,
            jobs=lambda: list(self.evidence.accepted),
            post=self.post,
        )

    # what is asked of the server

    async def post_jobs(self, rng: random.Random) -> None:
        """Post jobs of all kinds as long as the storm lasts; some are cancelled a little later."""
        cancels: set[asyncio.Task[None]] = set()
        while self.stormy:
            kind, key = rng.choice([kind for kind in KINDS if kind not in UNASKED]), f"{rng.getrandbits(64):x}"
            cancelled, after, pause = rng.random() < 0.12, rng.uniform(0, 3), rng.expovariate(self.options.rate)
            await asyncio.sleep(pause)
            if len(self.evidence.accepted) - len(self.evidence.finals) >= BACKLOG_JOBS:
                continue
            job = await self.post(kind, key)
            if cancelled:
                cancels.add(asyncio.create_task(self.cancel(job, after)))
        await asyncio.gather(*cancels)

    async def post(self, kind: str, key: str) -> int:
        self.evidence.posts += 1
        status, body = await self.caller.ask("POST", f"/api/jobs/{kind}", {}, {"Idempotency-Key": key})
        if status != 200:
            raise RuntimeError(f"POST: {status} {body[:300]!r}")
        job: int = json.loads(body)["id"]
        self.evidence.accepted[job] = kind
        return job

    async def cancel(self, job: int, after: float) -> None:
        await asyncio.sleep(after)
        asked = time.time()
        status, _ = await self.caller.ask("DELETE", f"/api/jobs/{job}")  # 409: ended, or one of its answers was lost
        if status == 200 or (await self.caller.get(f"/api/jobs/{job}"))["state"] == "cancelled":
            self.evidence.cancels[job] = asked

    async def watch(self) -> None:
        """Note who the server says is connected, and whether what was final is still what it was."""
        evidence, looked = self.evidence, 0.0
        while True:
            await asyncio.sleep(0.2)
            now = time.time()
            for worker in await self.caller.get("/api/workers?full=1"):
                evidence.seen[worker["name"]].append((now, time.time()))
            if now - looked > 1:
                looked = now
                for job in await self.caller.get("/api/jobs?full=1&state=success,failure,cancelled"):
                    if evidence.finals.setdefault(job["id"], job) != job:
                        evidence.changes.append(f"{evidence.finals[job['id']]} became {job}")

    def commands(self) -> list[int]:
        """Give the workers' docker commands that are under way."""
        parents = {worker.process.pid for worker in self.workers}
        return sorted(pid for pid, parent in processes() if parent in parents)

    async def start_those_without_docker(self) -> None:
        """Start a worker again that has found no docker at its start, as systemd does."""
        while True:
            await asyncio.sleep(0.2)
            for worker in self.workers:
                if not worker.lock.locked() and worker.process.poll() == NO_COMMAND:
                    self.evidence.disturbed[worker.name].append((worker.started[-1], time.time() + 0.7))
                    worker.start()

    def note(self, text: str) -> None:
        with (self.folder / "storm.log").open("a") as log:
            print(dt.datetime.now(dt.UTC).isoformat(" ", "milliseconds"), text, file=log)

    # a run

    async def storm(self, rng: random.Random) -> None:
        torments = Kills(self).torments() | self.limps.torments()
        begin, tasks, kills, limps = time.time(), set(), self.evidence.kills, self.limps.count
        while (
            time.time() - begin < self.options.seconds
            or kills.total() < self.options.kills
            or limps.total() < self.options.limps
        ):
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
            jobs = await self.caller.get("/api/jobs?full=1")  # one that comes due after this is no evidence
            self.evidence.jobs = {job["id"]: job for job in jobs}
            if all(job["state"] in FINAL for job in jobs) and not self.containers():
                return
        self.evidence.left = self.containers()

    def containers(self) -> list[str]:
        words = [self.docker.real, "ps", "-a", "--filter", f"label={self.label}", "--format", "{{.Names}}"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()

    async def collect(self) -> None:
        evidence = self.evidence
        evidence.process_starts = {role.name: role.started for role in self.roles}
        evidence.limps, evidence.without_engine = self.limps.of_docker, self.limps.without_engine
        for job in evidence.jobs:
            for attempt in await self.caller.get(f"/api/jobs/{job}/attempts"):
                key = (job, attempt["attempt"])
                evidence.attempts[key] = attempt
                evidence.logs[key] = (await self.caller.ask("GET", f"/api/jobs/{job}/log?attempt={key[1]}"))[1].decode()
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
            if int(line.split()[0]) in evidence.jobs:
                evidence.notes[(int(line.split()[0]), int(line.split()[1]))] += 1
        told = dict.fromkeys((self.folder / "events").read_text().splitlines())  # podman tells some events twice
        lines = [line.split() for line in told]
        for moment, action, name, *code in sorted(lines, key=lambda line: line[1].startswith("found")):
            key = (int(name.split("-")[-2]), int(name.split("-")[-1]))
            at = int(moment) / 1e9
            if key[0] not in evidence.jobs:
                continue
            if action == "start" or (action == "found-started" and key not in evidence.starts):
                evidence.starts[key].append(at)
            elif action == "die":
                evidence.deaths[key] = (at, int(code[0]))
            elif action == "found-ended":
                if key not in evidence.deaths or evidence.deaths[key][1] == UNKNOWN_CODE:
                    evidence.deaths[key] = (at, int(code[0]))
                if within(at, evidence.without_engine):
                    evidence.unheard.add(key)

    def take_down(self) -> None:
        for role in self.roles:
            role.kill()
        for name in self.containers():
            subprocess.run([self.docker.real, "rm", "-f", "-v", name], capture_output=True, check=False)
        self.recorder.kill()


class Kills:
    """Kills, stops, cuts off and slows what there is. Each torment takes who it hits and how hard, both from 0 to 1."""

    def __init__(self, world: World) -> None:
        self.world = world

    def torments(self) -> dict[Torment, int]:
        """Give each with its weight."""
        return {
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
        }

    async def kill_server(self, _which: float, force: float) -> None:
        async with self.disturbing(self.world.server):
            self.world.evidence.kills["server"] += 1
            self.world.server.kill()
            await asyncio.sleep(2 * force * force)
            self.world.server.start()

    async def kill_worker(self, which: float, force: float) -> None:
        worker = self.world.workers[int(which * len(self.world.workers))]
        async with self.disturbing(worker):
            self.world.evidence.kills["worker"] += 1
            worker.kill()
            await asyncio.sleep(2 * force * force if force < 0.9 else GRACE_SECONDS + 2)
            worker.start()

    async def kill_docker(self, which: float, _force: float) -> None:
        if clients := self.world.commands():
            self.world.evidence.kills["docker"] += 1
            self.world.limps.of_docker.append((time.time(), time.time()))  # it may have been a worker's first question
            self.world.note(f"kill of {words_of(clients[int(which * len(clients))])}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(clients[int(which * len(clients))], signal.SIGKILL)

    async def kill_everything(self, _which: float, force: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for role in self.world.roles:
                await stack.enter_async_context(self.disturbing(role))
            self.world.evidence.kills.update(["server", *("worker" for _ in self.world.workers)])
            for role in self.world.roles:
                role.kill()
            await asyncio.sleep(2 * force * force)
            for role in reversed(self.world.roles) if force < 0.5 else self.world.roles:
                role.start()

    async def end_server(self, _which: float, _force: float) -> None:
        async with self.disturbing(self.world.server):
            await self.world.caller.ask("GET", "/healthz")  # by then it handles signals
            if (code := await self.world.server.leave(signal.SIGTERM)) != 0:
                self.world.evidence.exits.append(f"server after SIGTERM: {code}")
            self.world.server.start()

    async def end_worker(self, which: float, _force: float) -> None:
        worker = self.world.workers[int(which * len(self.world.workers))]
        async with self.disturbing(worker):
            if await worker.leave(signal.SIGTERM, signal.SIGTERM) is None:
                self.world.evidence.exits.append(f"{worker.name} does not exit after two SIGTERM")
            worker.start()

    async def stop_a_process(self, which: float, force: float) -> None:
        role = self.world.roles[int(which * len(self.world.roles))]
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
            long = force > 0.95 and not self.world.options.short
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

    def pick(self, which: float) -> tuple[Role, Link]:
        return list(zip(self.world.workers, self.world.links, strict=True))[int(which * len(self.world.workers))]

    @contextlib.asynccontextmanager
    async def disturbing(self, role: Role) -> Any:
        """Hold a process for one torment at a time, and note how long it could not be reached."""
        async with role.lock:
            begin = time.time()
            yield
            self.world.evidence.disturbed[role.name].append((begin, time.time() + 0.7))


DOCKERS_EVENT = "{{.TimeNano}} {{.Action}} {{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}", "die"
PODMANS_EVENT = (
    '{{.Time.UnixNano}} {{if eq (print .Status) "died"}}die{{else}}start{{end}} {{.Name}} {{.ContainerExitCode}}',
    "died",
)


class EventReader:
    """Writes what the engine tells of our containers, and what it missed to tell when it was stopped."""

    def __init__(self, docker: str, label: str, events: Path) -> None:
        self.docker, self.filter, self.events = docker, f"label={label}", events
        self.listen()

    def listen(self, *since: str) -> None:
        form, end = DOCKERS_EVENT if Path(self.docker).name != "podman" else PODMANS_EVENT
        words = [self.docker, "events", "--format", form, "--filter", self.filter, *since]
        words += ["--filter", "event=start", "--filter", f"event={end}"]
        with self.events.open("ab") as events:
            self.process = subprocess.Popen(words, stdout=events, stderr=subprocess.DEVNULL)

    def go_on(self, since: float) -> None:
        self.kill()
        self.listen("--since", f"{since:.9f}")
        found = subprocess.run(
            f"{self.docker} ps -aq --filter {self.filter} | xargs -r {self.docker} inspect --format "
            "'{{.Name}} {{.State.Status}} {{.State.StartedAt}} {{.State.FinishedAt}} {{.State.ExitCode}}'",
            shell=True, capture_output=True, text=True, check=True,
        )  # fmt: skip
        with self.events.open("a") as events:
            for line in found.stdout.splitlines():
                name, status, started, finished, code = line.split()
                if status != "created":
                    print(nanoseconds(started), "found-started", name, file=events)
                if status in ("exited", "dead", "removing"):
                    print(nanoseconds(finished), "found-ended", name, code, file=events)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def nanoseconds(moment: str) -> int:
    whole, _, fraction = moment.removesuffix("Z").partition(".")
    return int(dt.datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 10**9 + int(f"{fraction:0<9}")


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

    def go_on(self, _since: float) -> None:
        """Nothing stops it."""

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


async def run(folder: Path, seed: int, options: argparse.Namespace, engine: OwnEngine | None) -> int:
    world, begin = World(folder, options, engine), time.time()
    probe = Probe(world.port)
    try:
        await world.put_up()
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(world.watch()), group.create_task(world.start_those_without_docker())]
            posting = group.create_task(world.post_jobs(random.Random(f"jobs {seed}")))
            await world.storm(random.Random(seed))
            await posting
            await world.calm()
            probe.stop()
            for task in watching:
                task.cancel()
        await world.collect()
    finally:
        probe.stop()
        world.take_down()
    evidence = world.evidence
    evidence.probes = probe.answers
    ends = Counter(job["state"] if job["reason"] is None else job["reason"] for job in evidence.jobs.values())
    jobs = f"{len(evidence.jobs)} jobs: {told(ends)}"
    print(f"seed {seed}: {time.time() - begin:.0f} s, killed {told(evidence.kills)}; {jobs}")
    print(f"   limped: {told(world.limps.count)}; {prompt_share(evidence):.1%} of /healthz answered within a second")
    options.total.update(kills=evidence.kills.total(), limps=world.limps.count.total())
    return judge(evidence)


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="the first seed (default: any)")
    parser.add_argument("--seeds", type=int, default=10, help="how many storms, each with the next seed (default: 10)")
    parser.add_argument("--kills", type=int, default=20, help="at least so many a storm (default: 20)")
    parser.add_argument("--limps", type=int, default=10, help="at least so many a storm (default: 10)")
    parser.add_argument("--seconds", type=float, default=25, help="at least so long a storm (default: 25)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0, help="jobs posted a second")
    parser.add_argument("--docker", default="docker", help="the engine's command, or 'stand-in' (default: docker)")
    parser.add_argument("--short", action="store_true", help="one storm of a few seconds, on any engine there is")
    options = parser.parse_args()
    if options.short:
        options.seeds, options.kills, options.limps, options.seconds = 1, 8, 4, 6
    image = [options.docker, "image", "inspect", "busybox"]
    if options.docker != "stand-in" and subprocess.run(image, capture_output=True, check=False).returncode:
        if not options.short:
            parser.error(f"{options.docker!r} reaches no engine with an image 'busybox'; see --docker stand-in")
        options.docker = "stand-in"
    options.rate = options.rate or (10 if options.docker == "stand-in" else 5)
    with own_engine(wanted=options.docker == "docker" and not options.short) as engine:
        return storms(options, engine)


def storms(options: argparse.Namespace, engine: OwnEngine | None) -> int:
    bad, options.total = 0, Counter()
    for seed in range(options.seed, options.seed + options.seeds):
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        broken = asyncio.run(run(folder, seed, options, engine))
        bad += bool(broken)
        print(f"   kept: {folder}\n" if broken else "", flush=True)
        if not broken:
            shutil.rmtree(folder)
    print(f"{options.total['kills']} kills and {options.total['limps']} limps in {options.seeds} storms")
    print(f"{options.seeds - bad} of {options.seeds} storms kept every promise ({options.docker})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
