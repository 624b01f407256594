"""What grows as ever more is there (`--scale`), and over a million jobs (`--long`)."""

import contextlib
import functools
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench_beside import listen, many_workers, waits
from bench_ratio import Ratio
from bench_stage import MEBI, Bench, Server, memory, start_worker

MILLION = 1_000_000


def queued(bench: Bench, server: Server) -> Server:
    server.queue(bench.count(MILLION), "nobody")
    return server


def finished(bench: Bench, server: Server) -> Server:
    queued(bench, server)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "jobs.db")) as database, database:
        database.execute("UPDATE job SET state = 'success', started_at = created_at, finished_at = created_at")
    return Server(bench, folder=server.folder)


def workers(bench: Bench, server: Server) -> Server:
    bench.beside(many_workers, server.port, bench.count(1_000)).result()
    return server


def listeners(bench: Bench, server: Server) -> Server:
    job = server.ask("POST", "/api/jobs/nobody")["id"]
    paths = ["/api/events"] * bench.count(200) + [f"/api/jobs/{job}/log?follow=1"] * bench.count(100)
    bench.beside(listen, server.port, paths).result()
    return server


def scale(bench: Bench, what: str, crowds: list[Callable[[Bench, Server], Server]], at_most: float) -> list[Ratio]:
    """POST to final beside a server that has nothing else; its jobs have a tag that one real worker has."""
    alone, crowded = Server(bench), Server(bench)
    for crowd in crowds:
        crowded = crowd(bench, crowded)
    took = Ratio(f"POST to final with {what}", "with nothing else", "ms", at_most=at_most)
    rss = Ratio("memory of its server", "with nothing else", "MiB")
    servers, count = (crowded, alone), bench.count(1_000)
    for server in servers:
        start_worker(bench, server, 4, bench.empty_docker, "--tag=here")
    for _ in bench.turns:
        took.add(*(statistics.median(bench.beside(waits, server.port, count, "here").result()) for server in servers))
        rss.add(*(memory(server.pid) / MEBI for server in servers))
    return [took, rss]


SCALE: dict[str, Callable[[Bench], list[Ratio]]] = {
    "queued": functools.partial(scale, what="1,000,000 queued", crowds=[queued], at_most=1.2),
    "finished": functools.partial(scale, what="1,000,000 finished", crowds=[finished], at_most=1.2),
    "workers": functools.partial(scale, what="1,000 workers", crowds=[workers], at_most=1.2),
    "listeners": functools.partial(scale, what="300 listeners", crowds=[listeners], at_most=1.2),
    "together": functools.partial(
        scale, what="all of them", crowds=[finished, queued, workers, listeners], at_most=1.5
    ),
}


def long(bench: Bench) -> list[Ratio]:
    """A million jobs through a worker, pruned after 20 s: the second half of the time beside the first."""
    server, total = Server(bench, "--keep=20s"), bench.count(MILLION)
    worker = start_worker(bench, server, 8, bench.empty_docker)
    looks: list[tuple[Ratio, Callable[[], float]]] = [
        (Ratio("server: memory, second half", "first half", "MiB"), lambda: memory(server.pid) / MEBI),
        (Ratio("worker: memory, second half", "first half", "MiB"), lambda: memory(worker.pid) / MEBI),
        (Ratio("server: descriptors, second half", "first half", "open"), lambda: descriptors(server.pid)),
        (Ratio("worker: descriptors, second half", "first half", "open"), lambda: descriptors(worker.pid)),
        (Ratio("jobs.db, second half", "first half", "MiB"), lambda: size(server.folder) / MEBI),
    ]
    samples: list[list[float]] = [[] for _ in looks]
    posted, done, ended = 0, 0, [(time.perf_counter(), 0)]
    while done < total:
        jobs = server.ask("GET", "/healthz")["jobs"]
        done = posted - sum(jobs[state] for state in ("queued", "assigned", "running"))
        ended.append((time.perf_counter(), done))
        if posted < total and jobs["queued"] < 20_000:
            posted += min(20_000, total)
            server.queue(min(20_000, total), "empty")
            print(f"{posted:,} posted, {done:,} done", file=sys.stderr, flush=True)
        for taken, (_ratio, look) in zip(samples, looks, strict=True):
            taken.append(look())
        time.sleep(bench.seconds(2))
    for taken, (ratio, _look) in zip(samples, looks, strict=True):
        half = len(taken) // 2
        ratio.ours, ratio.theirs = taken[-half:], taken[:half]
    return [rate_of_halves(ended), *(ratio for ratio, _look in looks)]


def rate_of_halves(ended: list[tuple[float, int]]) -> Ratio:
    """Jobs a second of the second half of the time beside the first's. `ended`: when, and how many by then."""
    rate = Ratio(f"{ended[-1][1]:,} jobs: rate, second half", "first half", "jobs/s")
    first, middle, last = ended[0], ended[len(ended) // 2], ended[-1]
    rate.add((last[1] - middle[1]) / (last[0] - middle[0]), (middle[1] - first[1]) / (middle[0] - first[0]))
    return rate


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("jobs.db*"))
