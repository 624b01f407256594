"""Plays histories: the real store, dispatcher, sessions and attempts in one process, in a world that fails by a seed.

The event loop's clock is virtual: it jumps to the next timer. What touches the world is played here: links that delay,
cut, go slow and silent; engines that refuse, hang, tell nothing of one container, lose their command, restart, won't
remove a container; a disk that is full, or whose fsync fails; clocks that are set; people who post, cancel and reload;
`kill -9` of the server and of workers between any two steps. One seed is one history, which is replayed exactly. After
the storm all is mended, and the promises are counted from the ledgers of the engines and of the people.

    python checks/simulate.py                              1,000 histories on all cores
    python checks/simulate.py --histories 200000 --seed 7  more of them, from another seed on
    python checks/simulate.py --seed 4711 --histories 1 -v that one again, told step by step

Exit 1 where a promise was broken: the seed is printed.
"""

import argparse
import asyncio
import contextlib
import functools
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from played import FINAL, JOBS, SLACK_SECONDS, SLOW_COMMIT_SECONDS, Host, OriginalHost, World
from promises import Promises
from virtual import Broken, raised, unseen

import client
import protocol
import server
from jobworker import state
from jobworker.options import UNSENT_BYTES
from jobworker.store import StoreError

STORM_SECONDS = 40.0
CALM_SECONDS = 400.0
FAULTS = 60
SLOW_SECONDS = 6.0
FAR_SECONDS = 40 * 86400  # ahead: what a clock is set to by mistake, and set right again
PROGRESS = 1_000  # histories


class History(World):
    """One history: what happens in a world, and what is promised of it."""

    # What may happen

    def __init__(self, seed: int, verbose: bool = False) -> None:
        super().__init__(seed, verbose)
        self.promises = Promises(self)
        self.asked: defaultdict[str, set[str]] = defaultdict(set)  # by idempotency key: what it was asked with
        self.answered: dict[str, tuple[str, list[int]]] = {}
        self.faults: list[Callable[[], None]] = [
            self.post, self.post, self.post, self.post, self.post_list, self.cancel, self.cancel,
            self.cancel_endless, self.cancel_endless, self.cancel_endless, self.retry,
            self.reload, self.kill_server, self.kill_worker, self.kill_worker, self.drain,
            self.cut, self.cut, self.go_silent, self.say_twice, self.say_twice, self.lie,
            self.go_off_line, self.go_slow, self.go_slow, self.fill, self.fill,
            self.engine_trouble, self.engine_trouble, self.engine_trouble, self.engine_restart, self.kill_clients,
            self.kill_clients, self.hang_clients, self.stick, self.mute, self.prune_images, self.disk_trouble,
            *[self.post_with_key if self.keep else self.set_clock] * 2, self.post_with_key,
        ]  # fmt: skip

    def post(self, count: int = 1) -> None:
        names = [self.chance.choice(sorted(self.jobs)) for _ in range(count)]
        jobs = [
            state.NewJob(name, self.variables(name), self.chance.choice((0, 0, 3)), self.chance.choice((0, 0, 3)))
            for name in names
        ]
        self.ask(self.note_accepted, state.add, jobs)

    def variables(self, name: str) -> dict[str, str] | None:
        is_endless = name == "endless" or (JOBS[name].timeout and self.chance.random() < 0.3)
        endless = {"seconds": 1e6} if is_endless else {}
        return {"PLAN": json.dumps(self.plan() | endless)} if JOBS[name].parameters else None

    def post_list(self) -> None:
        self.post(self.chance.randint(2, 6))

    def look(self, database: state.Database, committed: list[state.Notes]) -> None:
        self.promises.look(database, committed)

    def ask(
        self,
        then: Callable[[Any], None],
        function: Callable[..., Any],
        *args: Any,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask the server as an HTTP thread does; an answer that comes after its death was never given."""
        serving = self.server
        if serving is None or not serving.ready:
            return

        def answered(future: Future[Any]) -> None:
            self.loop.call_later(self.delay(0.02), give, future)

        def give(future: Future[Any]) -> None:
            with contextlib.suppress(StoreError):
                answer = future.result()
                if serving is self.server:
                    refused() if isinstance(answer, state.Refusal) else then(answer)

        if function is not state.get:
            args = (*args, serving.core.clock())
        serving.store.do(function, *args).add_done_callback(answered)

    def note_accepted(self, ids: list[int]) -> None:
        for job in ids:
            self.accepted[job] = "accepted"
            self.tell(f"job {job} is accepted")

    def post_with_key(self) -> None:
        """POST under a key that another POST may have: it is the same request, or a conflict."""
        key, count = self.chance.choice("abc"), self.chance.choice((1, 1, 2))
        content = f"{count} of told"

        def add(db: state.Database, now: float) -> list[int] | state.Refusal:
            return state.add(db, [state.NewJob("told")] * count, now, key=state.Key(key, content))

        def accepted(ids: list[int]) -> None:
            if self.answered.setdefault(key, (content, ids)) != (content, ids) and not self.keep:
                raise Broken(f"promise 1: key {key} with {content} gave {ids}, and before {self.answered[key]}")
            self.note_accepted(ids)
            self.count("checked: a key has one answer")

        def refused() -> None:
            if self.asked[key] == {content}:
                raise Broken(f"promise 1: key {key} was asked with {content} alone, and that is a conflict")
            self.count("checked: a key belongs to a body")

        self.asked[key].add(content)
        self.ask(accepted, add, refused=refused)

    def some_job(self) -> int:
        return self.chance.choice(sorted(self.accepted) or [1])

    def cancel(self) -> None:
        self.delete(self.some_job())

    def cancel_endless(self) -> None:
        """DELETE each that nothing else ends, but once: one that was told to end has to."""
        for job, row in self.rows().items() if self.server else ():
            if row["name"] == "endless" and row["state"] not in FINAL and not row["cancelling"]:
                self.delete(job)

    def delete(self, job: int) -> None:
        def answered(_row: sqlite3.Row) -> None:
            self.cancelled.setdefault(job, self.now())
            self.tell(f"job {job} is to be cancelled")

        self.ask(answered, state.cancel, job)

    def retry(self) -> None:
        def again(row: sqlite3.Row) -> None:
            if row["state"] in FINAL and row["name"] in self.jobs:
                job = state.NewJob(row["name"], json.loads(row["environment"] or "null"))
                self.ask(self.note_accepted, state.add, [job])

        self.ask(again, state.get, self.some_job())

    def reload(self) -> None:
        if self.jobs.pop("leaves", None) is None:
            self.jobs["leaves"] = JOBS["leaves"]
        if self.server:
            configs = self.configs()
            self.server.core.dispatcher.reload(configs, server.config_frames(configs))
            self.server.core.end_gone()

    def kill_server(self) -> None:
        if self.server:
            self.server.kill()
            self.server = None
            self.mend_within(12, self.restart_server)

    def kill_worker(self) -> None:
        host = self.chance.choice(self.hosts)
        host.kill()
        self.mend_within(14, host.start)

    def drain(self) -> None:
        """Have a worker finish what it runs, and leave."""
        host = self.chance.choice(self.hosts)
        if host.worker and host.life and not host.life.dead:
            host.worker.drain()

    def cut(self) -> None:
        self.cut_off(self.chance.choice(self.hosts))

    def go_silent(self) -> None:
        host = self.chance.choice(self.hosts)
        if host.link:
            host.link.go_silent()

    def go_slow(self) -> None:
        host = self.chance.choice(self.hosts)
        if host.link:
            host.link.latency = SLOW_SECONDS

    def fill(self) -> None:
        """Have a link take no more jobs for a while: those that are given wait at the server."""
        link = self.chance.choice(self.hosts).link
        if link:
            link.unread = UNSENT_BYTES
            self.mend_within(16, setattr, link, "unread", 0)

    def say_twice(self) -> None:
        """Have a worker say each thing once more, before the next: of version 2 that does no harm."""
        host = self.chance.choice(self.hosts)
        if host.link and host.version == 2:
            host.link.near.says_twice = True

    def lie(self) -> None:
        """Have a worker say that what another one runs has succeeded."""
        host = self.chance.choice(self.hosts)
        rows = self.rows().values() if self.server else ()
        others = [row for row in rows if row["state"] == "running" and row["worker_name"] != host.name]
        if host.link and host.version == 2 and others:
            row = self.chance.choice(others)
            host.link.near.put(protocol.encode(protocol.JobSuccess(row["id"], row["attempt"])))
            self.count("a lie was told")

    def go_off_line(self) -> None:
        host = self.chance.choice(self.hosts)
        host.off_line = True
        self.cut_off(host)
        self.mend_within(16, setattr, host, "off_line", False)

    def cut_off(self, host: Host) -> None:
        if host.link:
            host.link.cut()

    def engine_trouble(self) -> None:
        engine = self.chance.choice(self.hosts).engine
        engine.trouble = self.chance.choice(("refuses", "hangs", "does not start", "killed"))
        self.mend_within(20, engine.mend)

    def engine_restart(self) -> None:
        engine = self.chance.choice(self.hosts).engine
        engine.trouble = "refuses"
        engine.restart(kills=self.chance.random() < 0.5)
        self.mend_within(40, engine.mend)

    def kill_clients(self) -> None:
        for task in list(self.chance.choice(self.hosts).engine.clients):
            task.cancel()

    def hang_clients(self) -> None:
        engine = self.chance.choice(self.hosts[:2]).engine  # the original's worker would wait for ever
        engine.hanging |= {container.name for container in engine.clients.values()}

    def stick(self) -> None:
        engine = self.chance.choice(self.hosts).engine
        stuck = set(list(engine.containers)[:1])
        engine.busy |= stuck
        self.mend_within(30, engine.busy.difference_update, stuck)

    def mute(self) -> None:
        engine = self.chance.choice(self.hosts).engine
        muted = set(list(engine.containers)[:1])
        engine.mute |= muted
        self.mend_within(30, engine.mute.difference_update, muted)

    def prune_images(self) -> None:
        self.chance.choice(self.hosts).engine.images.clear()

    def disk_trouble(self) -> None:
        self.disk = self.chance.choice(("full", "tight", "lost", "kept"))
        if self.disk == "tight":
            self.commit_seconds = SLOW_COMMIT_SECONDS + SLACK_SECONDS
        if self.disk in ("full", "tight"):
            self.mend_within(10, setattr, self, "disk", None)

    def set_clock(self) -> None:
        far = -self.offset if abs(self.offset) > FAR_SECONDS / 2 else FAR_SECONDS
        self.offset += self.chance.choice((-3600, -5, 5, 3600, far))
        self.was_far = self.was_far or abs(self.offset) > FAR_SECONDS / 2

    # A history

    async def play(self) -> None:
        self.restart_server()
        self.hosts = [Host(self, 0), Host(self, 1), OriginalHost(self, 2)]
        for host in self.hosts:
            host.start()
        for _ in range(FAULTS):
            self.loop.call_at(self.chance.uniform(0, STORM_SECONDS), self.go_wrong)
        await asyncio.sleep(STORM_SECONDS)
        await self.calm()

    def go_wrong(self) -> None:
        fault = self.chance.choice(self.faults)
        self.count(fault.__name__)
        self.tell(fault.__name__)
        fault()

    async def calm(self) -> None:
        """Mend all, and wait until all that was accepted has ended and nothing is left behind."""
        await asyncio.sleep(max(self.mended_at - self.now(), 0) + 3 * server.TICK_SECONDS)
        self.disk = None
        if self.server is None:
            self.restart_server()
        for host in self.hosts:
            host.engine.mend()
            host.off_line = False
            host.engine.busy.clear()
            host.engine.mute.clear()
            host.start()
        self.tell("calm")
        self.calm_at = self.now()
        deadline = self.calm_at + CALM_SECONDS
        while left := self.what_is_left():
            if self.now() > deadline:
                raise Broken(f"after {CALM_SECONDS} s of calm: {left}")
            self.cancel_endless()
            await asyncio.sleep(2)
        self.promises.check()

    def what_is_left(self) -> str:
        if self.server is None or not self.server.ready:
            return "the server does not run"
        if self.now() - self.server.began < 3 * server.TICK_SECONDS:
            return "the server has only just started"
        open_jobs = [row["id"] for row in self.rows().values() if row["state"] not in FINAL]
        left = [name for host in self.hosts for name in host.engine.containers]
        return f"jobs {open_jobs} and containers {left}" if open_jobs or left else ""

    def close(self) -> None:
        if self.server:
            self.server.kill()
        for host in self.hosts:
            host.kill()
        for task in self.loop.tasks:
            task.cancel()
        self.loop.call_later(0, self.loop.stop)
        self.loop.run_forever()
        self.loop.close()
        self.close_disk()


@dataclass
class Outcome:
    seed: int
    broken: str
    digest: str
    counts: Counter[str]


def play(seed: int, verbose: bool = False) -> Outcome:
    """Play one history; what was broken, if anything."""
    world = History(seed, verbose)
    asyncio.set_event_loop(world.loop)
    broken = ""
    raised.clear()
    try:
        world.loop.run_until_complete(world.play())
        for error in (*raised, *unseen(world.loop.tasks)):
            raise error
    except Broken as error:
        broken = str(error)
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
        if verbose:
            raise
    finally:
        world.close()
    return Outcome(seed, broken, world.digest.hexdigest()[:16], world.counts)


class Alarm(logging.Handler):
    """Keeps the exceptions that the product logs: they are its own errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            raised.append(record.exc_info[1])


def set_up(verbose: bool = False) -> None:
    """In each process: fewer beats a virtual second, and no log but with -v."""
    server.TICK_SECONDS = 2.5
    server.config_frames = functools.cache(server.config_frames)
    client.LOG_FLUSH_SECONDS = 2.0  # type: ignore[attr-defined]
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="         %(message)s")
    else:
        logging.disable(logging.WARNING)
    logging.getLogger().addHandler(Alarm())
    gc.set_threshold(100_000)
    gc.freeze()  # what is there from the start is not looked through again


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    seeds = range(options.seed, options.seed + options.histories)
    if options.histories == 1:
        yield play(options.seed, options.verbose)
        return
    with multiprocessing.get_context("fork").Pool(options.processes or os.cpu_count()) as pool:
        yield from pool.imap(play, seeds, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--histories", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=0, help="all cores")
    parser.add_argument("--first", action="store_true", help="end with the first that breaks a promise")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell one history step by step")
    options = parser.parse_args()
    set_up(options.verbose)
    counts: Counter[str] = Counter()
    broken, begin, digest = [], time.monotonic(), hashlib.sha256()
    for played, outcome in enumerate(outcomes(options), 1):
        counts.update(outcome.counts)
        digest.update(outcome.digest.encode())
        if outcome.broken:
            broken.append(outcome)
            print(f"seed {outcome.seed}: {outcome.broken[:400]}", flush=True)
            if options.first:
                return 1
        if played % PROGRESS == 0 and played < options.histories:
            pace = played / (time.monotonic() - begin)
            kept = f"{played - len(broken):,} of {played:,} histories up to seed {outcome.seed} kept every promise"
            print(f"{kept}; {pace:.1f} a second", file=sys.stderr, flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:9,}  {what}")
    seconds = time.monotonic() - begin
    print(f"{options.histories / seconds:.1f} histories a second; their digest is {digest.hexdigest()[:16]}")
    print(f"{options.histories - len(broken)} of {options.histories} histories kept every promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
