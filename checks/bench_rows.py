"""The rows of the budget: each is a function that takes turns with a limit or a peer and gives its figures."""

import functools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bench_beside import answer_at_once, bare_http, bare_websockets, many_workers, post_for, waits
from bench_figure import FSYNC, NOTHING, STEPS, Figure, Limit
from bench_limits import insert, open_table, run_alone, sqlite_alone, sqlite_updates
from bench_stage import MEBI, Bench, Server, SkippedError, cpu_seconds, memory, start_worker, stop, until


def containers(bench: Bench, slots: int) -> list[Figure]:
    """Real ones: ours against what anyone could type."""
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        raise SkippedError("no Docker engine answers")
    count, server = max(bench.count(5 * slots + 15), slots), Server(bench)
    start_worker(bench, server, slots, "docker")
    ours = Figure(f"{count} containers, {slots} slots, to the last result", "s", STEPS)
    peer = Limit(f"xargs -P{slots} docker run --rm", "s", NOTHING)
    ratio = Figure("ours / xargs", "times", at_most=1.03)
    command = ["xargs", f"-P{slots}", "-I{}", "docker", "run", "--rm", "--pull", "never", "busybox", "true"]
    left = ["docker", "ps", "--all", "--quiet", f"--filter=label=jobworker.worker=bench-{server.pid}"]
    numbers = "\n".join(map(str, range(count)))
    for turn in bench.turns:
        ours.add(server.run_jobs(count, turn))
        until(lambda: not subprocess.run(left, stdout=subprocess.PIPE, check=True).stdout, 60)
        began = time.perf_counter()
        subprocess.run(command, input=numbers, text=True, check=True)
        peer.add(time.perf_counter() - began)
        ratio.add(ours.samples[-1] / peer.samples[-1])
    return [ours, peer, ratio]


def empty_docker(bench: Bench) -> list[Figure]:
    """What we add to starting a process."""
    server, count = Server(bench), bench.count(5_000)
    start_worker(bench, server, 8, bench.empty_docker)
    ours = Figure("an empty docker, 8 slots", "jobs/s", STEPS, at_least=4_500)
    alone = [Limit(f"subprocess.run of it alone, {threads} threads", "runs/s", NOTHING) for threads in (1, 4)]
    command = [bench.empty_docker, "run", "--pull", "never", "--name", "jobworker-00000000-1-1", "busybox", "true"]
    for turn in bench.turns:
        ours.add(count / server.run_jobs(count, turn))
        for figure, threads in zip(alone, (1, 4), strict=True):
            figure.add(run_alone(command, threads, bench.seconds(1)))
    return [ours, *alone]


def protocol_alone(bench: Bench) -> list[Figure]:
    """A worker whose jobs take no time."""
    server, slots, count = Server(bench), 64, bench.count(20_000)
    bare_port = bench.beside(bare_websockets).result()
    ours = Figure(f"a worker that answers at once, {slots} slots", "jobs/s", STEPS, at_least=11_000)
    bare = Limit("the same frames, jobs only counted", "jobs/s", NOTHING)
    disk = Limit(f"SQLite FULL alone, 3 updates a job, {slots} a group", "jobs/s", "fsync each group")
    for _ in bench.turns:
        server.post_list(count)
        ours.add(bench.beside(answer_at_once, server.port, slots, count).result())
        bare.add(bench.beside(answer_at_once, bare_port, slots, count).result())
        disk.add(sqlite_updates(bench, count, slots))
    return [ours, bare, disk]


def post(bench: Bench, connections: int, at_least: float) -> list[Figure]:
    """POST of one job, again and again, over keep-alive connections."""
    server = Server(bench)
    http_port = bench.beside(bare_http).result()
    ours = Figure(f"POST of one job, {connections} connections", "jobs/s", FSYNC, at_least=at_least)
    front = Limit("ThreadingHTTPServer alone", "answers/s", NOTHING)
    disk = Limit("SQLite FULL alone, one by one", "commits/s", "fsync each")
    for _ in bench.turns:
        for figure, port in ((ours, server.port), (front, http_port)):
            figure.add(bench.beside(post_for, port, connections, bench.seconds(2)).result())
        disk.add(sqlite_alone(bench, bench.seconds(1)))
    return [ours, front, disk]


def post_list(bench: Bench) -> list[Figure]:
    """Many jobs by one request."""
    server, count = Server(bench), bench.count(20_000)
    ours = Figure(f"POST of a list of {count}", "jobs/s", FSYNC, at_least=150_000)
    disk = Limit("SQLite FULL alone, one transaction", "rows/s", "fsync at the end")
    for _ in bench.turns:
        ours.add(count / server.post_list(count))
        database = open_table(bench)
        began = time.perf_counter()
        insert(database, count)
        disk.add(count / (time.perf_counter() - began))
    return [ours, disk]


def latency(bench: Bench) -> list[Figure]:
    """From POST to the answer of its ?wait, one job at a time."""
    server, count = Server(bench), bench.count(1_000)
    start_worker(bench, server, 4, bench.empty_docker)
    p50 = Figure("POST to final, idle, empty docker: p50", "ms", STEPS, at_most=3)
    p99 = Figure("p99", "ms", STEPS, at_most=10)
    start = Limit("subprocess.run of it alone: p50", "ms", NOTHING)
    disk = Limit("4 SQLite FULL commits alone: p50", "ms", "fsync each")
    for _ in bench.turns:
        times = bench.beside(waits, server.port, count).result()
        p50.add(statistics.median(times))
        p99.add(statistics.quantiles(times, n=100)[98])
        start.add(1_000 / run_alone([bench.empty_docker], 1, bench.seconds(0.5)))
        disk.add(4_000 / sqlite_alone(bench, bench.seconds(0.5)))
    return [p50, start, disk, p99]


def latency_million(bench: Bench) -> list[Figure]:
    """The same beside a million jobs that no worker may take, and what these cost."""
    servers, count, queued = (Server(bench), Server(bench)), bench.count(1_000), bench.count(1_000_000)
    full = servers[1]
    for _ in range(max(queued // 20_000, 1)):
        full.post_list(min(queued, 20_000), "nobody")
    workers = [start_worker(bench, server, 4, bench.empty_docker) for server in servers]
    figures = [
        Limit("POST to final, 0 queued: p50", "ms", STEPS),
        Figure(f"POST to final, {queued} queued: p50", "ms", STEPS),
    ]
    ratio = Figure("the latter / the former", "times", at_most=1.2)
    rss = Figure("memory of its server", "MiB", at_most=100)
    start = Figure("time until it listens", "s", at_most=1)
    for _ in bench.turns:
        for figure, server in zip(figures, servers, strict=True):
            figure.add(statistics.median(bench.beside(waits, server.port, count).result()))
        ratio.add(figures[1].samples[-1] / figures[0].samples[-1])
        rss.add(memory(full.pid) / MEBI)
    for worker in workers:
        stop(worker)
    for _ in bench.turns:
        full.stop()
        full = Server(bench, folder=full.folder)
        start.add(full.seconds_to_start)
    return [figures[1], figures[0], ratio, rss, start]


def workers_1000(bench: Bench) -> list[Figure]:
    """Many workers with nothing to do."""
    count = bench.count(1_000)
    per_worker = [
        Figure(f"{count} idle workers", "KiB each", at_most=25),
        Limit("websockets alone", "KiB each"),
    ]
    cpu = [Figure("their cpu", "% of a core", at_most=2), Limit("websockets alone", "% of a core")]
    told = [Figure("JobConfigs to all by SIGHUP", "s", at_most=1), Limit("websockets alone", "s")]
    for _ in bench.turns:
        server, bare = Server(bench), bench.beside(bare_websockets)
        sides = [(server.pid, server.port), (bare.pid, bare.result())]
        crowds = []
        for (pid, port), figure in zip(sides, per_worker, strict=True):
            before = memory(pid)
            crowds.append(bench.beside(many_workers, port, count))
            crowds[-1].result()
            figure.add((memory(pid) - before) / 1024 / count)
        used = [cpu_seconds(pid) for pid, _port in sides]
        seconds = bench.seconds(15)  # with a ping to each in it
        time.sleep(seconds)
        for figure, before_, (pid, _port) in zip(cpu, used, sides, strict=True):
            figure.add((cpu_seconds(pid) - before_) / seconds * 100)
        for figure, crowd, (pid, _port) in zip(told, crowds, sides, strict=True):
            began = time.perf_counter()
            os.kill(pid, signal.SIGHUP)
            figure.add(crowd.result() - began)
            crowd.end()
        server.stop()
        bare.end()
    return [*per_worker, *cpu, *told]


IMPORTS = "import asyncio,http.server,sqlite3,sys,websockets.asyncio.server,yaml;print(flush=True);sys.stdin.read()"


def idle(bench: Bench) -> list[Figure]:
    """What server and worker cost when there is nothing to do."""
    start = [
        Figure("server: time until it listens", "s", at_most=0.3),
        Limit("the imports alone: time", "s"),
    ]
    rss = [
        Figure("worker: memory", "MiB", at_most=28),
        Figure("server: memory", "MiB", at_most=33),
        Limit("the imports alone: memory", "MiB"),
    ]
    cpu = [Figure(f"{who}: cpu", "% of a core", at_most=0.3) for who in ("worker", "server")]
    for _ in bench.turns:
        server = Server(bench)
        start[0].add(server.seconds_to_start)
        worker = start_worker(bench, server, 1, bench.empty_docker)
        began = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
            assert bare.stdin
            assert bare.stdout
            bare.stdout.readline()
            start[1].add(time.monotonic() - began)
            time.sleep(bench.seconds(2))
            pids = (worker.pid, server.pid)
            used = [cpu_seconds(pid) for pid in pids]
            seconds = bench.seconds(10)
            time.sleep(seconds)
            for figure, before, pid in zip(cpu, used, pids, strict=True):
                figure.add((cpu_seconds(pid) - before) / seconds * 100)
            for figure, pid in zip(rss, (*pids, bare.pid), strict=True):
                figure.add(memory(pid) / MEBI)
            bare.stdin.close()
        stop(worker)
        server.stop()
    return [*rss, *cpu, *start]


ROWS: dict[str, Callable[[Bench], list[Figure]]] = {
    "containers-1": functools.partial(containers, slots=1),
    "containers-4": functools.partial(containers, slots=4),
    "empty-docker": empty_docker,
    "protocol": protocol_alone,
    "post-1": functools.partial(post, connections=1, at_least=4_000),
    "post-16": functools.partial(post, connections=16, at_least=9_000),
    "post-64": functools.partial(post, connections=64, at_least=11_000),
    "post-list": post_list,
    "latency": latency,
    "latency-million": latency_million,
    "workers-1000": workers_1000,
    "idle": idle,
}
