"""Upgrades servers and workers while their jobs run: `python checks/upgrade.py REVISION`, by hand.

The older files come from the repository's history (1.0.0 is 05975836a5c0), the newer ones are those of this folder.
Each scenario begins with jobs that have ended, that run and that wait, then replaces its server (in place: same file,
same port), its worker (kill -9, same name) or nothing, and goes on until all has ended. Exit 1, and a sentence for each
promise, where one was broken.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos import ROOT, Caller, Role, write_jobs
from verdict import KINDS

END_SECONDS = 90  # for all jobs of a scenario
RUN_SECONDS = 30  # for one to write its first line
ENDED = ["quick", "fails"]
RUNNING = ["slow", "steady"]  # as many as the worker has slots
WAITING = ["prints", "burst", "mixed", "flaky", "hopeless", "late"]
FINAL = ("success", "failure", "cancelled")

Job = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """Which version each begins with, and what is replaced by the new one while jobs run."""

    server: str
    worker: str
    upgrades: tuple[str, ...] = ()

    def __str__(self) -> str:
        then = f", then a new {', then a new '.join(self.upgrades)}" if self.upgrades else ""
        return f"{self.server} server, {self.worker} worker{then}"


SCENARIOS = [
    Scenario("new", "old"),
    Scenario("old", "new"),
    Scenario("old", "old", ("server",)),
    Scenario("old", "new", ("server",)),
    Scenario("old", "old", ("worker",)),
    Scenario("new", "old", ("worker",)),
    Scenario("old", "old", ("server", "worker")),
    Scenario("old", "old", ("worker", "server")),
]


class Play:
    """One scenario: its processes and its jobs."""

    def __init__(self, scenario: Scenario, folder: Path, programs: dict[str, Path], docker: str) -> None:
        self.scenario, self.folder, self.programs, self.docker = scenario, folder, programs, docker
        self.label = f"upgrade={os.getpid()}-{folder.name}"
        self.jobs: dict[int, str] = {}
        self.cancelled: int | None = None
        self.before: list[Job] = []
        self.broken: list[str] = []
        write_jobs(folder, self.label)
        jobs = json.loads((folder / "jobs.yaml").read_text())
        newer = {"schedule", "on_failure", "on_success"}
        kept = [{key: value for key, value in job.items() if key not in newer} for job in jobs]
        (folder / "jobs.yaml").write_text(json.dumps(kept))
        (folder / "ledger").touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.caller = Caller(self.port)
        self.roles = {"server": self.start_server(), "worker": self.start_worker()}

    def start_server(self) -> Role:
        words = ["-v", "-p", str(self.port), "--hold", "--grace", "20", "--database", f"{self.folder}/jobs.db"]
        program = str(self.programs[self.scenario.server] / "server.py")
        return Role("server", self.folder, [program, *words, f"{self.folder}/jobs.yaml"])

    def start_worker(self) -> Role:
        words = ["-v", "--name", "upgraded", "--slots", str(len(RUNNING)), "--docker", self.docker]
        program = str(self.programs[self.scenario.worker] / "client.py")
        return Role("worker", self.folder, [program, *words, f"127.0.0.1:{self.port}/runner"])

    async def run(self) -> list[str]:
        """Play it; gives a sentence for each promise that was broken."""
        await self.post(ENDED)
        await self.until("the first jobs have ended", self.all_have_ended)
        self.before = await self.caller.get("/api/jobs?full=1")
        await self.post(RUNNING)
        await self.post(WAITING)
        await self.until("two jobs have started and one of them still runs", self.writes(RUNNING))
        for role in self.scenario.upgrades:
            await self.upgrade(role)
        await self.post(ENDED)  # with the keys of before: these are the same jobs
        await self.cancel_one_that_runs()
        await self.until("all jobs have ended", self.all_have_ended, END_SECONDS)
        await self.until("all containers are gone", self.all_are_removed)
        await self.look()
        await self.leave()
        return self.broken

    async def post(self, kinds: list[str]) -> None:
        for kind in kinds:
            status, body = await self.caller.ask("POST", f"/api/jobs/{kind}", {}, {"Idempotency-Key": kind})
            if status != 200:
                self.broken.append(f"POST of {kind}: {status} {body[:200]!r}")
            elif self.jobs.setdefault(json.loads(body)["id"], kind) != kind:
                self.broken.append(f"POST of {kind} gave {self.jobs[json.loads(body)['id']]}")

    async def upgrade(self, name: str) -> None:
        role = self.roles[name]
        if name == "worker":
            role.kill()
        elif (code := await role.leave(signal.SIGTERM)) != 0:
            self.broken.append(f"the old server exits with {code} after SIGTERM")
        role.arguments[0] = str(self.programs["new"] / Path(role.arguments[0]).name)
        role.start()
        await self.caller.ask("GET", "/healthz")

    async def cancel_one_that_runs(self) -> None:
        await self.post(["deaf"])
        await self.until("the last job runs", self.writes(["deaf"]), END_SECONDS)
        self.cancelled = max(self.jobs)
        await self.caller.ask("DELETE", f"/api/jobs/{self.cancelled}")

    # what is waited for

    async def until(self, what: str, holds: Callable[[], Awaitable[bool]], limit: float = RUN_SECONDS) -> None:
        deadline = time.monotonic() + limit
        while not await holds():
            if time.monotonic() > deadline:
                self.broken.append(f"within {limit} s it did not come to it that {what}")
                return
            await asyncio.sleep(0.1)

    async def all_have_ended(self) -> bool:
        return all(job["state"] in FINAL for job in await self.caller.get("/api/jobs?full=1"))

    def writes(self, kinds: list[str]) -> Callable[[], Awaitable[bool]]:
        async def holds() -> bool:
            jobs = [job for job in await self.caller.get("/api/jobs?full=1") if job["name"] in kinds]
            started = all(job["state"] not in ("queued", "assigned") for job in jobs)
            return started and any(job["state"] == "running" and job["log_bytes"] for job in jobs)

        return holds

    async def all_are_removed(self) -> bool:
        return not self.containers()

    def containers(self) -> list[str]:
        words = [self.docker, "ps", "-a", "--filter", f"label={self.label}", "--format", "{{.Names}}"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()

    # the verdict

    async def look(self) -> None:
        jobs = {job["id"]: job for job in await self.caller.get("/api/jobs?full=1")}
        if {key: job["name"] for key, job in jobs.items()} != self.jobs:
            self.broken.append(f"accepted were {self.jobs}, there are {jobs}")
        for before in self.before:
            now = jobs.get(before["id"], {})
            if changed := {key: now.get(key) for key in before if now.get(key) != before[key]}:
                self.broken.append(f"job {before['id']} had ended, and changed: {changed}")
        starts = Counter(tuple(line.split()) for line in (self.folder / "ledger").read_text().splitlines())
        for job in jobs.values():
            log = (await self.caller.ask("GET", f"/api/jobs/{job['id']}/log"))[1].decode()
            counts = [starts[str(job["id"]), str(attempt + 1)] for attempt in range(job["attempt"])]
            self.broken += [f"job {job['id']} ({job['name']}): {text}" for text in self.findings(job, log, counts)]

    def findings(self, job: Job, log: str, starts: list[int]) -> Iterator[str]:
        """Say what is wrong with a job. starts: how often each of its attempts has started."""
        kind, is_cut = KINDS[job["name"]], job["id"] == self.cancelled or job["name"] == "late"
        retries = kind.config.get("retries", 0)
        attempt = min(kind.good_attempt or 1 + retries, 1 + retries) if kind.code else 1
        code = kind.exit_code(attempt)
        reason = "timeout" if job["name"] == "late" else "exit" if code else None
        wanted = ("cancelled" if job["id"] == self.cancelled else "failure" if reason else "success", attempt)
        if (job["state"], job["attempt"]) != wanted or (
            not is_cut and (job["exit_code"], job["reason"]) != (code, reason)
        ):
            yield f"should be {wanted}, {reason}, exit {code}, and is {job}"
        if starts != [1] * attempt:
            yield f"its attempts have started {starts} times"
        for stream in ("out", "err")[: kind.streams]:
            got = [line for line in log.splitlines() if line.startswith(stream)]
            whole = [f"{stream} {number}" for number in range(kind.lines)]
            if got != (whole[: len(got)] if is_cut else whole):
                yield f"its log has {len(got)} of {len(whole)} lines of {stream}: {got[:3]} ... {got[-3:]}"

    async def leave(self) -> None:
        for name, role in reversed(self.roles.items()):
            if (code := await role.leave(signal.SIGTERM)) != 0:
                self.broken.append(f"the {name} exits with {code} after SIGTERM")
            if "Traceback (most" in role.log.read_text(errors="replace"):
                self.broken.append(f"the {name} logged a traceback")

    def take_down(self) -> None:
        for role in self.roles.values():
            role.kill()
        if left := self.containers():
            subprocess.run([self.docker, "rm", "-f", "-v", *left], capture_output=True, check=False)


@asynccontextmanager
async def playing(scenario: Scenario, folder: Path, programs: dict[str, Path], docker: str) -> AsyncIterator[Play]:
    play = Play(scenario, folder, programs, docker)
    try:
        yield play
    finally:
        play.take_down()


def provide_docker(folder: Path) -> str:
    """Give the command of the engine that is there, else of the tests' stand-in."""
    found = shutil.which("docker")
    if (
        found
        and subprocess.run([found, "image", "inspect", "busybox"], capture_output=True, check=False).returncode == 0
    ):
        return found
    print("No engine with an image 'busybox' answers: containers are plain processes.")
    subprocess.run([sys.executable, ROOT / "tests" / "docker_stand_in.py", folder / "engine"], check=True)
    return f"{folder}/engine/docker"


def archive_of(revision: str) -> bytes:
    """Give the files of a revision, as a tar. Raises SystemExit with git's complaint."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision], capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"{revision} can't be taken from the history: {archive.stderr.decode().strip()}")
    return archive.stdout


async def play_all(folder: Path) -> int:
    programs, docker = {"old": folder / "old", "new": ROOT}, provide_docker(folder)
    bad = 0
    for number, scenario in enumerate(SCENARIOS):
        place = folder / str(number)
        place.mkdir()
        async with playing(scenario, place, programs, docker) as play:
            broken = await play.run()
        print(f"{'BROKEN' if broken else 'kept  '}  {scenario}", *broken, sep="\n        ", flush=True)
        bad += bool(broken)
    print(f"{len(SCENARIOS) - bad} of {len(SCENARIOS)} scenarios kept every promise")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("revision", metavar="REVISION", help="of the old files, for example 05975836a5c0 (1.0.0)")
    options = parser.parse_args()
    archive = archive_of(options.revision)
    folder = Path(tempfile.mkdtemp(prefix="upgrade-"))
    (folder / "old").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "old"], input=archive, check=True)
    if asyncio.run(play_all(folder)):
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
