"""server.py's Dispatcher, in one thread: what happens between a commit and the next, in every order."""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import pytest

import protocol
from jobworker import lists, logs, state
from jobworker.config import Configs, JobConfig
from jobworker.options import UNSENT_BYTES
from jobworker.state import NewJob
from jobworker.store import Store
from server import MAX_FRAME_BYTES, MAX_UNSTORED_BYTES, MESSAGE_BYTES, PRUNE_JOBS, Core, Dispatcher, Outside
from tests.test_due import deliver

Held = tuple[tuple[int, int, str], ...]

JOBS = Configs([JobConfig("plain", "busybox", "true")])


class Link:
    """A worker's connection, in memory. What it is sent is unread until `read` is called."""

    subprotocol, remote_address, close_code = protocol.VERSION_2, ("127.0.0.1", 5), 1006

    def __init__(self) -> None:
        self.said: asyncio.Queue[protocol.FromWorker | None] = asyncio.Queue()
        self.unread: list[bytes] = []
        self.transport = self

    def take(self, frame: bytes) -> None:
        self.unread.append(frame)

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.unread))

    def read(self) -> list[protocol.FromServer]:
        frames, self.unread = self.unread, []
        return [message for frame in frames for message in protocol.decode_from_server(frame, 2)]

    async def recv(self) -> bytes:
        return await anext(aiter(self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while message := await self.said.get():
            yield protocol.encode(message)

    async def close(self, *_: object) -> None:
        self.said.put_nowait(None)


class Table:
    """A store that commits when it is told to, and a dispatcher with its workers. Each look at the clock is later."""

    def __init__(self, grace: float = 60) -> None:
        self.store = Store(":memory:", self.on_commit)
        self.clock = itertools.count(1_790_000_000.0).__next__
        self.dispatcher = Dispatcher(self.store, JOBS, grace, self.clock, write=Link.take)  # type: ignore[arg-type]
        self.serving: list[asyncio.Future[None]] = []

    def on_commit(self, commit: Any) -> None:
        deliver(commit)
        self.dispatcher.send_claimed(commit.claimed)

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return commit(self.store, self.store.do(function, *args))

    def commit(self) -> None:
        commit(self.store)

    async def run(self) -> None:
        """Let all happen that needs no commit."""
        for _ in range(100):
            await asyncio.sleep(0)

    async def step(self) -> None:
        """One commit, and what comes of it."""
        if self.store._requests.qsize():
            self.store.commit_waiting()
        await self.run()

    async def connect(self, slots: int = 1, held: Held = ()) -> Link:
        """Have the worker connect, up to its attach, which is not committed yet."""
        link = Link()
        self.serving.append(asyncio.ensure_future(self.dispatcher.serve(link)))  # type: ignore[arg-type]
        await self.say(link, slots, held)
        return link

    async def say(self, link: Link, slots: int, held: Held) -> None:
        link.said.put_nowait(protocol.Hello("host", slots, (), "1", held))
        await self.run()

    async def running(self) -> tuple[Link, Held]:
        """Have a job run; give the connection and what its worker holds."""
        link = await self.connect()
        self.commit()
        await self.run()
        self.do(state.add, [NewJob("plain")], self.clock())
        (enqueue,) = [message for message in link.read() if isinstance(message, protocol.Enqueue)]
        link.said.put_nowait(protocol.JobRunning(enqueue.job, enqueue.attempt))
        await self.run()
        self.commit()
        return link, ((enqueue.job, enqueue.attempt, "running"),)

    def connected(self) -> list[Any]:
        return [worker.socket for worker in self.dispatcher.workers.values()]

    def states(self) -> list[str]:
        return [row["state"] for row in self.do(lists.page, lists.Wanted(), 10)]


class TestConnections:
    """A name belongs to its newest connection, and what a connected worker runs is never lost."""

    def test_a_late_second_hello_does_not_take_the_name_back(self) -> None:
        async def play() -> None:
            table = Table()
            old, held = await table.running()
            new = await table.connect(held=held)
            await table.say(old, 1, ())  # says it holds nothing, before it is told that it was replaced
            table.commit()
            await table.run()
            assert table.connected() == [new]
            assert table.states() == ["running"]

        asyncio.run(play())

    def test_a_worker_that_is_back_keeps_its_job_though_its_grace_was_none(self) -> None:
        async def play() -> None:
            table = Table(grace=0)
            old, held = await table.running()
            await old.close()
            await table.run()
            table.dispatcher.tick()
            new = await table.connect(held=held)
            table.commit()
            await table.run()
            assert table.connected() == [new]
            assert table.states() == ["running"]

        asyncio.run(play())

    def test_a_worker_that_does_not_come_back_loses_it(self) -> None:
        async def play() -> None:
            table = Table(grace=0)
            old, _held = await table.running()
            await old.close()
            await table.run()
            table.commit()
            assert table.states() == ["failure"]

        asyncio.run(play())


class TestSlowLink:
    """Jobs go out as they are read: a link that is slow is not taken for a worker that does not read."""

    def test_a_thousand_large_jobs_go_out_at_its_pace(self) -> None:
        async def play() -> None:
            table = Table()
            link = await table.connect(slots=1_000)
            table.do(state.add, [NewJob("plain", {"TEXT": "x" * 8_000})] * 1_000, table.clock())
            await table.run()
            sent: list[int] = []
            while len(sent) < 1_000:
                assert link.get_write_buffer_size() < UNSENT_BYTES + protocol.BATCH_BYTES + 10_000
                some = [message.job for message in link.read() if isinstance(message, protocol.Enqueue)]
                assert some
                sent += some
                table.dispatcher.tick()
            assert sent == sorted(set(sent))
            assert not link.read()

        asyncio.run(play())

    def test_what_waits_is_forgotten_with_what_the_store_queued_again(self) -> None:
        async def play() -> None:
            table = Table()
            link = await table.connect(slots=4)
            table.do(state.add, [NewJob("plain", {"TEXT": "x" * 60_000})] * 4, table.clock())
            for _ in range(50):
                await table.say(link, 4, ())
                table.commit()
                await table.run()
            assert sum(len(worker._claimed) for worker in table.dispatcher.workers.values()) <= 4

        asyncio.run(play())


class TestSmallDisk:
    """Promises 5 and 11 on a disk that has room for what comes next, but not for what came before."""

    def test_a_log_that_does_not_fit_is_said_again_whole_before_its_end(self) -> None:
        async def play() -> None:
            table = Table()
            link, held = await table.running()
            ((job, attempt, _state),) = held
            pieces = protocol.Log(job, attempt, 0, b"x" * 200_000), protocol.Log(job, attempt, 200_000, b"end")
            room = self.pages(table, "page_count") + 10
            self.pages(table, f"max_page_count = {room}")
            for message in (*pieces, protocol.JobSuccess(job, attempt)):
                link.said.put_nowait(message)
            for _ in range(3):
                await table.step()
            assert table.states() == ["running"]
            assert not [each for each in link.read() if isinstance(each, protocol.Settled)]
            assert table.connected() == []
            self.pages(table, f"max_page_count = {2 * room + 1_000}")
            back = await table.connect(held=held)
            await table.step()
            back.said.put_nowait(pieces[0])
            back.said.put_nowait(pieces[1])
            back.said.put_nowait(protocol.JobSuccess(job, attempt))
            for _ in range(3):
                await table.step()
            assert table.states() == ["success"]
            log = b""
            while pieces_of_log := table.do(logs.read_log, job, attempt, len(log)):
                log += b"".join(data for _offset, data in pieces_of_log)
            assert log == b"x" * 200_000 + b"end"
            assert protocol.Settled(job, attempt) in back.read()

        asyncio.run(play())

    @staticmethod
    def pages(table: Table, pragma: str) -> int:
        (pages,) = table.store._database.connection.execute(f"PRAGMA {pragma}").fetchone()
        return int(pages)


class Flood(Link):
    """A worker that never stops writing, and takes no job."""

    LOG = protocol.encode(protocol.Log(1, 1, 0, b"x" * (MAX_FRAME_BYTES - 1_000)))
    MANY = protocol.encode_batch([protocol.JobRunning(1, 1)] * (MAX_UNSTORED_BYTES // MESSAGE_BYTES + 1))
    sent = 0

    def __init__(self, name: str, frame: bytes, ready: int) -> None:
        """ready: so many frames are there at once, as `websockets` has some."""
        super().__init__()
        self.name, self.frame, self.ready = name, frame, ready

    async def recv(self) -> bytes:
        return protocol.encode(protocol.Hello(self.name, 0, (), "1", ()))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent += 1
            yield self.frame
            if self.sent % self.ready == 0:
                await asyncio.sleep(0)


def run_jobs(link: Link) -> int:
    """Start and end what the worker is told to; how many of its results are settled."""
    messages = link.read()
    for message in messages:
        match message:
            case protocol.Enqueue(job, _, attempt):
                link.said.put_nowait(protocol.JobRunning(job, attempt))
            case protocol.Go(job, attempt):
                link.said.put_nowait(protocol.JobSuccess(job, attempt))
    return sum(isinstance(message, protocol.Settled) for message in messages)


class TestFlood:
    """Workers that write faster than the disk leave the others their share of each commit."""

    @pytest.mark.parametrize(
        ("frame", "most"),
        [(Flood.LOG, MAX_UNSTORED_BYTES // len(Flood.LOG)), (Flood.MANY, 1)],
        ids=["logs", "messages"],
    )
    @pytest.mark.parametrize("ready", [2, 1_000_000])
    def test_another_worker_gets_its_jobs_as_if_it_were_alone(self, frame: bytes, most: int, ready: int) -> None:
        async def commits_of_ten_jobs(floods: list[Flood]) -> int:
            table = Table()
            for flood in floods:
                table.serving.append(asyncio.ensure_future(table.dispatcher.serve(flood)))  # type: ignore[arg-type]
            link = await table.connect()
            await table.step()
            table.store.do(state.add, [NewJob("plain")] * 10, table.clock())
            commits = settled = 0
            while settled < 10 and commits < 100:
                commits += 1
                before = sum(flood.sent for flood in floods)
                await table.step()
                written = sum(flood.sent for flood in floods) - before
                assert written <= most + len(floods)
                settled += run_jobs(link)
            return commits

        async def play() -> None:
            floods = [Flood(f"flood-{number}", frame, ready) for number in range(3)]
            assert await commits_of_ten_jobs(floods) <= 1.5 * await commits_of_ten_jobs([])
            assert all(flood.sent > 5 for flood in floods)

        asyncio.run(play())


class Clocks:
    """A server's core without threads, on clocks that are set; it commits when it is told to."""

    def __init__(self, keep: float = 0) -> None:
        self.store = Store(":memory:", deliver)
        self.wall, self.steady = 1_790_000_000.0, 0.0
        outside = Outside(lambda: self.wall, lambda: self.steady)
        self.core = Core(self.store, JOBS, argparse.Namespace(grace=60, keep=keep), outside)

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return commit(self.store, self.store.do(function, *args))

    def tick(self) -> None:
        self.core._tick()
        commit(self.store)

    def prune(self) -> None:
        self.core._prune()
        commit(self.store)


class TestHungDisk:
    """What is asked of a store that does not answer is asked once."""

    def test_a_worker_that_went_is_detached_once(self) -> None:
        async def play() -> None:
            table = Table()
            link, _held = await table.running()
            await link.close()
            await table.run()
            asked = table.store._requests.qsize()
            for _ in range(40):
                table.dispatcher.tick()
            assert table.store._requests.qsize() == asked
            table.commit()
            assert table.dispatcher._to_detach == {}

        asyncio.run(play())

    def test_a_piece_is_pruned_after_the_other(self) -> None:
        async def play() -> None:
            clocks = Clocks(keep=1)
            jobs = clocks.do(state.add, [NewJob("plain")] * (4 * PRUNE_JOBS), clocks.core.clock() - 100)
            clocks.do(lists.cancel_all, lists.Wanted(), len(jobs), clocks.core.clock() - 100)
            for _ in range(6):
                clocks.core._prune()
            clocks.store.commit_waiting()
            (left,) = clocks.store._database.connection.execute("SELECT count(*) FROM job").fetchone()
            assert left == 3 * PRUNE_JOBS

        asyncio.run(play())


class TestDelays:
    """Delays follow a clock that is set, also where that can't be written at once."""

    def test_a_shift_that_fails_is_tried_again(self) -> None:
        async def play() -> None:
            clocks = Clocks()
            (job,) = clocks.do(state.add, [NewJob("plain", delay=60)], clocks.core.clock())
            clocks.store._database.connection.execute("PRAGMA query_only = 1")  # as on a full disk
            clocks.wall -= 365 * 86_400
            clocks.tick()
            clocks.store._database.connection.execute("PRAGMA query_only = 0")
            (later,) = clocks.do(state.add, [NewJob("plain", delay=70)], clocks.core.clock())
            for _ in range(3):
                clocks.tick()
            assert clocks.do(state.get, job)["not_before"] == clocks.wall + 60
            assert clocks.do(state.get, later)["not_before"] == clocks.wall + 70  # it came after the clock was set

        asyncio.run(play())


class TestPruning:
    """What is pruned is not to be had back: a clock that was set is not trusted for an hour."""

    def prune_within_an_hour_and_after(self, clocks: Clocks, job: int) -> None:
        """See that this job stays within the hour, and goes after it."""
        clocks.prune()
        assert clocks.do(state.get, job)["state"] == "cancelled"
        clocks.wall += 3_600
        clocks.steady += 3_600
        clocks.prune()
        assert clocks.do(state.get, job).kind == "unknown"

    def test_nothing_is_pruned_by_a_clock_that_was_set(self) -> None:
        async def play() -> None:
            clocks = Clocks(keep=30 * 86_400)
            (job,) = clocks.do(state.add, [NewJob("plain"), NewJob("plain")], clocks.core.clock())[:1]
            clocks.do(state.cancel, job, clocks.core.clock())
            clocks.wall += 40 * 86_400
            clocks.tick()
            self.prune_within_an_hour_and_after(clocks, job)

        asyncio.run(play())

    def test_nor_by_one_that_may_have_been_set_while_the_server_was_down(self) -> None:
        async def play() -> None:
            clocks = Clocks(keep=30 * 86_400)
            (job,) = clocks.do(state.add, [NewJob("plain"), NewJob("plain")], clocks.wall - 365 * 86_400)[:1]
            clocks.do(state.cancel, job, clocks.wall - 365 * 86_400)
            starting = asyncio.ensure_future(clocks.core.start())
            while not starting.done():
                await asyncio.sleep(0)
                commit(clocks.store)
            self.prune_within_an_hour_and_after(clocks, job)

        asyncio.run(play())


def commit(store: Store, future: Future[Any] | None = None) -> Any:
    while store._requests.qsize():
        store.commit_waiting()
    return future and future.result(0)
