"""What grows as ever more is there (`--scale`), and over a million jobs (`--long`)."""

import contextlib
import sqlite3
import statistics
import sys
import time
from pathlib import Path

from bench_beside import listen, many_workers, waits
from bench_figure import STEPS, Figure
from bench_stage import MEBI, Bench, Server, memory, start_worker, stop


def scale(bench: Bench) -> list[Figure]:
    """Latency of POST and dispatch, and the server's memory, as ever more is there."""
    server, million = Server(bench), bench.count(1_000_000)
    figures: list[Figure] = []

    def measure(what: str) -> None:
        worker = start_worker(bench, server, 4, bench.empty_docker)
        posts = bench.beside(waits, server.port, bench.count(1_000), "nobody", 0).result()
        finals = bench.beside(waits, server.port, bench.count(1_000)).result()
        stop(worker)
        for name, times in (("POST", posts), ("POST to final", finals)):
            figures.append(Figure(f"{what}: {name} p50", "ms", samples=[statistics.median(times)]))
            figures.append(Figure(f"{what}: {name} p99", "ms", samples=[statistics.quantiles(times, n=100)[98]]))
        figures.append(Figure(f"{what}: server's memory", "MiB", samples=[memory(server.pid) / MEBI]))

    def fill() -> None:
        for _ in range(max(million // 20_000, 1)):
            server.post_list(min(million, 20_000), "nobody")

    measure("nothing")
    fill()
    measure(f"{million} queued")
    server.stop()
    with contextlib.closing(sqlite3.connect(server.folder / "jobs.db")) as database, database:
        database.execute("UPDATE job SET state = 'success', started_at = created_at, finished_at = created_at")
    server = Server(bench, folder=server.folder)
    fill()
    measure(f"and {million} finished")
    workers = bench.count(1_000)
    bench.beside(many_workers, server.port, workers).result()
    measure(f"and {workers} workers")
    (job,) = server.ask("GET", "/api/jobs?state=queued&limit=1")
    paths = ["/api/events"] * bench.count(200) + [f"/api/jobs/{job['id']}/log?follow=1"] * bench.count(100)
    bench.beside(listen, server.port, paths).result()
    measure(f"and {len(paths)} listeners")
    return figures


def long(bench: Bench) -> list[Figure]:
    """A million jobs through a worker, pruned after 20 s: what grows?"""
    server, total = Server(bench, "--keep=20s"), bench.count(1_000_000)
    worker = start_worker(bench, server, 8, bench.empty_docker)
    who = (("server", server.pid), ("worker", worker.pid))
    rss = [Figure(f"{name}: memory", "MiB") for name, _pid in who]
    files = [Figure(f"{name}: descriptors", "open") for name, _pid in who]
    size = Figure("jobs.db", "MiB")
    posted, began = 0, time.perf_counter()
    while posted < total or sum(
        server.ask("GET", "/healthz")["jobs"][state] for state in ("queued", "assigned", "running")
    ):
        if posted < total and server.ask("GET", "/healthz")["jobs"]["queued"] < 20_000:
            posted += 20_000
            server.post_list(20_000)
            print(f"{posted} posted, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for figures, look in ((rss, lambda pid: memory(pid) / MEBI), (files, descriptors)):
            for figure, (_name, pid) in zip(figures, who, strict=True):
                figure.add(look(pid))
        size.add(sum(file.stat().st_size for file in server.folder.glob("jobs.db*")) / MEBI)
        time.sleep(bench.seconds(2))
    rate = Figure(f"{posted} jobs", "jobs/s", STEPS, samples=[posted / (time.perf_counter() - began)])
    return [rate, *(part for figure in (*rss, *files, size) for part in halves(figure))]


def halves(figure: Figure) -> list[Figure]:
    """A figure's samples of the first half of the time, and of the second."""
    middle = max(len(figure.samples) // 2, 1)
    parts = {"first half": figure.samples[:middle], "second half": figure.samples[-middle:]}
    return [Figure(f"{figure.what}, {name}", figure.unit, samples=samples) for name, samples in parts.items()]


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
