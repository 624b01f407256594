"""The rows of the budget: each is a function that takes turns with a limit or a peer and gives its ratios."""

import functools
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable

from bench_beside import answer_at_once, bare_http, bare_websockets, many_workers, post_for, waits
from bench_limits import busy_seconds, imports_alone, insert, open_table, run_alone, sqlite_alone, sqlite_updates
from bench_ratio import Ratio, SkippedError
from bench_stage import MEBI, Bench, Beside, Server, cpu_seconds, memory, start_worker, stop, until

MILLION = 1_000_000


def containers(bench: Bench, slots: int) -> list[Ratio]:
    """Real ones, beside what anyone could type."""
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        raise SkippedError("no Docker engine answers")
    count, server = max(bench.count(5 * slots + 15), slots), Server(bench)
    pids = (server.pid, start_worker(bench, server, slots, "docker").pid)
    xargs = f"xargs -P{slots} docker run --rm"
    took = Ratio(f"{count} real containers, {slots} at once", xargs, "s", at_most=1.03)
    used = Ratio("processor time of server and worker, each", "the whole machine's, by xargs", "ms", at_most=0.012)
    left = ["docker", "ps", "--all", "--quiet", f"--filter=label=jobworker.worker=bench-{server.pid}"]
    for turn in bench.turns:
        before = sum(map(cpu_seconds, pids))
        ours = server.run_jobs(count, turn)
        until(lambda: not subprocess.run(left, stdout=subprocess.PIPE, check=True).stdout, 60)
        cost, busy = sum(map(cpu_seconds, pids)) - before, busy_seconds()
        took.add(ours, by_xargs(count, slots))
        used.add(cost / count * 1_000, (busy_seconds() - busy) / count * 1_000)
    return [took, used]


def by_xargs(count: int, slots: int) -> float:
    """Seconds that as many containers take without us."""
    command = ["xargs", f"-P{slots}", "-I{}", "docker", "run", "--rm", "--pull", "never", "busybox", "true"]
    began = time.perf_counter()
    subprocess.run(command, input="\n".join(map(str, range(count))), text=True, check=True)
    return time.perf_counter() - began


def empty_docker(bench: Bench) -> list[Ratio]:
    """What we add to starting a process; without a budget, as no container starts as fast as such a program."""
    server, count = Server(bench), bench.count(5_000)
    start_worker(bench, server, 8, bench.empty_docker)
    rates = {
        threads: Ratio("an empty docker, 8 slots", f"subprocess.run of it, {threads} threads", "a second")
        for threads in (1, 4)
    }
    command = [bench.empty_docker, "run", "--pull", "never", "--name", "jobworker-00000000-1-1", "busybox", "true"]
    for turn in bench.turns:
        ours = count / server.run_jobs(count, turn)
        for threads, rate in rates.items():
            rate.add(ours, run_alone(command, threads, bench.seconds(1)))
    return list(rates.values())


def protocol_alone(bench: Bench) -> list[Ratio]:
    """A worker whose jobs take no time."""
    server, slots, count = Server(bench), 64, bench.count(20_000)
    bare_port = bench.beside(bare_websockets).result()
    what = f"a worker that answers at once, {slots} slots"
    disk = Ratio(what, f"SQLite FULL, 3 updates a job, {slots} a commit", "jobs/s", at_least=0.30)
    bare = Ratio(what, "the same frames, jobs only counted", "jobs/s")
    for _ in bench.turns:
        server.post_list(count)
        ours = bench.beside(answer_at_once, server.port, slots, count).result()
        disk.add(ours, sqlite_updates(bench, count, slots))
        bare.add(ours, bench.beside(answer_at_once, bare_port, slots, count).result())
    return [disk, bare]


def post(bench: Bench, connections: int, of_http: float, of_disk: float | None = None) -> list[Ratio]:
    """POST of one job, again and again, over keep-alive connections."""
    server = Server(bench)
    http_port = bench.beside(bare_http).result()
    what = f"POST of one job, {connections} connections"
    front = Ratio(what, "ThreadingHTTPServer that does nothing", "a second", at_least=of_http)
    disk = Ratio(what, "SQLite FULL, one commit after another", "a second", at_least=of_disk)
    for _ in bench.turns:
        ours, bare = (
            bench.beside(post_for, port, connections, bench.seconds(2)).result() for port in (server.port, http_port)
        )
        front.add(ours, bare)
        disk.add(ours, sqlite_alone(bench, bench.seconds(1)))
    return [front, disk]


def post_list(bench: Bench) -> list[Ratio]:
    """Many jobs by one request."""
    server, count = Server(bench), bench.count(20_000)
    rate = Ratio(f"POST of a list of {count}", "SQLite FULL, one transaction", "jobs/s", at_least=0.20)
    for _ in bench.turns:
        ours = count / server.post_list(count)
        database = open_table(bench)
        began = time.perf_counter()
        insert(database, count)
        rate.add(ours, count / (time.perf_counter() - began))
    return [rate]


def latency(bench: Bench) -> list[Ratio]:
    """From POST to the answer of its ?wait, one job at a time."""
    server, count = Server(bench), bench.count(1_000)
    start_worker(bench, server, 4, bench.empty_docker)
    middle = Ratio("POST to final, idle, empty docker", "that docker alone and 4 commits", "ms", at_most=2.5)
    slowest = Ratio("its p99", "its p50", "ms")
    for _ in bench.turns:
        times = bench.beside(waits, server.port, count).result()
        p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
        start = 1_000 / run_alone([bench.empty_docker], 1, bench.seconds(0.5))
        middle.add(p50, start + 4_000 / sqlite_alone(bench, bench.seconds(0.5)))
        slowest.add(p99, p50)
    return [middle, slowest]


def workers_1000(bench: Bench) -> list[Ratio]:
    """Many workers with nothing to do."""
    count, beside = bench.count(1_000), "websockets alone"
    each = Ratio(f"{count} idle workers: memory", beside, "KiB each", at_most=1.15)
    cpu = Ratio("their cpu", beside, "% of one", at_most=2.5)
    told = Ratio("a new jobs.yaml to all of them", beside, "s")
    for _ in bench.turns:
        server, bare = Server(bench), bench.beside(bare_websockets)
        pids, ports = (server.pid, bare.pid), (server.port, bare.result())
        before = [memory(pid) for pid in pids]
        crowds = [bench.beside(many_workers, port, count) for port in ports]
        for crowd in crowds:
            crowd.result()
        each.add(*((memory(pid) - was) / 1024 / count for pid, was in zip(pids, before, strict=True)))
        cpu.add(*shares(pids, bench.seconds(15)))  # with a ping to each in it
        told.add(*(seconds_until_told(pid, crowd) for pid, crowd in zip(pids, crowds, strict=True)))
        for process in (*crowds, bare):
            process.end()
        server.stop()
    return [each, cpu, told]


def shares(pids: tuple[int, ...], seconds: float) -> list[float]:
    """Percent of a processor that each process uses meanwhile."""
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(seconds)
    return [(cpu_seconds(pid) - was) / seconds * 100 for pid, was in zip(pids, before, strict=True)]


def seconds_until_told(pid: int, crowd: Beside) -> float:
    """Seconds from SIGHUP until all workers of a crowd have JobConfigs."""
    began = time.perf_counter()
    os.kill(pid, signal.SIGHUP)
    return float(crowd.result() - began)


def idle(bench: Bench) -> list[Ratio]:
    """What server and worker cost when there is nothing to do."""
    sides = [
        Ratio(f"memory of an idle {who}", "the imports alone", "MiB", at_most=at_most)
        for who, at_most in (("server", 1.20), ("worker", 1.10))
    ]
    for _ in bench.turns:
        server = Server(bench)
        worker = start_worker(bench, server, 1, bench.empty_docker)
        time.sleep(bench.seconds(2))
        bare = imports_alone().memory / MEBI
        for side, process in zip(sides, (server.process, worker), strict=True):
            side.add(memory(process.pid) / MEBI, bare)
            stop(process)
    return sides


def start(bench: Bench) -> list[Ratio]:
    """How soon a server listens."""
    servers, queued = [Server(bench), Server(bench)], bench.count(MILLION)
    servers[1].queue(queued, "nobody")
    ratios = [
        Ratio("listening after the start, empty", "the imports alone", "s", at_most=1.5),
        Ratio(f"the same with {queued:,} queued", "the imports alone", "s", at_most=2),
    ]
    for server in servers:
        server.stop()
    for _ in bench.turns:
        for ratio, server in zip(ratios, servers, strict=True):
            again = Server(bench, folder=server.folder)
            ratio.add(again.seconds_to_start, imports_alone().seconds)
            again.stop()
    return ratios


ROWS: dict[str, Callable[[Bench], list[Ratio]]] = {
    "containers-1": functools.partial(containers, slots=1),
    "containers-4": functools.partial(containers, slots=4),
    "empty-docker": empty_docker,
    "protocol": protocol_alone,
    "post-1": functools.partial(post, connections=1, of_http=0.40),
    "post-16": functools.partial(post, connections=16, of_http=0.55),
    "post-64": functools.partial(post, connections=64, of_http=0.70, of_disk=1.0),
    "post-list": post_list,
    "latency": latency,
    "workers-1000": workers_1000,
    "idle": idle,
    "start": start,
}
