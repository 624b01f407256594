"""rq, celery, dramatiq and huey with the same work as ours (`--peers`)."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_beside import answer_at_once
from bench_figure import STEPS, Figure, Limit
from bench_stage import Bench, Server, SkippedError, start_worker, stop, until

PEER = """
import os, subprocess, sys
library, port, fsync = os.environ["LIBRARY"], os.environ["PORT"], os.environ["FSYNC"] == "yes"
done = os.open("done", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
url = "redis://127.0.0.1:" + port

def run(work):
    if work == "empty":
        subprocess.run([os.environ["PROGRAM"]], stdin=subprocess.DEVNULL, check=True)
    os.write(done, b".")

if library == "rq":
    import redis, rq
    queue = rq.Queue(connection=redis.Redis.from_url(url))
    send = lambda work: queue.enqueue("peer.run", work)
elif library == "celery":
    import celery
    app = celery.Celery("peer", broker=url, backend=url)
    send = app.task(run, name="run").delay
elif library == "dramatiq":
    import dramatiq, dramatiq.brokers.redis
    dramatiq.set_broker(dramatiq.brokers.redis.RedisBroker(url=url))
    send = dramatiq.actor(run).send
else:
    import huey
    huey = huey.SqliteHuey(filename="huey.db", fsync=fsync)
    send = huey.task()(run)
if __name__ == "__main__":
    import peer
    for _ in range(int(sys.argv[2])):
        peer.send(sys.argv[1])
"""
PEERS = {
    "rq": ["rq", "worker-pool", "--quiet", "--num-workers=4", "--url=redis://127.0.0.1:{port}"],
    "celery": ["celery", "--app=peer", "worker", "--concurrency=4", "--loglevel=error"],
    "dramatiq": ["dramatiq", "peer", "--processes=2", "--threads=4"],
    "huey": ["huey_consumer", "peer.huey", "--workers=8", "--quiet"],
}


def peers(bench: Bench) -> list[Figure]:
    """rq, celery, dramatiq and huey with the same work, as usual and with fsync at every write."""
    if shutil.which("redis-server") is None:
        raise SkippedError("there is no redis-server: make bench-peers installs one")
    venv = bench.folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "rq", "celery[redis]", "dramatiq[redis]", "huey"], check=True)
    servers, counts = (Server(bench), Server(bench)), (bench.count(2_000), bench.count(20_000))
    start_worker(bench, servers[0], 8, bench.empty_docker)
    figures = [Figure(f"ours: {work}", "jobs/s", STEPS) for work in ("the empty program", "no-op jobs")]
    others = {
        (library, work, fsync): Limit(f"{library}: {work}", "jobs/s", "fsync each write" if fsync else "as usual")
        for library in PEERS for work in ("empty", "no-op") for fsync in (False, True)
    }  # fmt: skip
    for turn in bench.turns:
        figures[0].add(counts[0] / servers[0].run_jobs(counts[0], turn))
        servers[1].post_list(counts[1])
        figures[1].add(bench.beside(answer_at_once, servers[1].port, 64, counts[1]).result())
        for (library, work, fsync), figure in others.items():
            figure.add(peer_rate(bench, library, work, fsync, bench.count(1_000 if library == "rq" else 4_000)))
    empty = [figure for (_library, work, _fsync), figure in others.items() if work == "empty"]
    no_op = [figure for (_library, work, _fsync), figure in others.items() if work == "no-op"]
    return [figures[0], *empty, figures[1], *no_op]


def peer_rate(bench: Bench, library: str, work: str, fsync: bool, count: int) -> float:
    """Jobs a second of a peer's worker, from its first to its last, with all of them queued before it starts."""
    folder, port = Path(tempfile.mkdtemp(dir=bench.folder)), free_port()
    (folder / "peer.py").write_text(PEER)
    bin_ = bench.folder / "venv" / "bin"
    environment = os.environ | {
        "LIBRARY": library, "PORT": str(port), "PROGRAM": bench.empty_docker, "FSYNC": "yes" if fsync else "no",
        "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(folder),
    }  # fmt: skip
    settings = "--appendonly yes --appendfsync always" if fsync else ""
    redis = f"redis-server --bind 127.0.0.1 --port {port} {settings}".split()
    options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
    broker = subprocess.Popen(redis, **options)
    worker = None
    try:
        until(lambda: library == "huey" or answers(port), 10)
        subprocess.run([bin_ / "python", "peer.py", work, str(count)], **options, check=True)
        command = [word.format(port=port) for word in PEERS[library]]
        worker = subprocess.Popen(command, **options, stderr=subprocess.DEVNULL)
        return rate_of_growth(folder / "done", count)
    finally:
        for process in (worker, broker):
            if process:
                stop(process)


def rate_of_growth(file: Path, total: int) -> float:
    """Bytes a second that a file grew by, from when it first had any to when it has them all."""
    until(lambda: file.stat().st_size, 60)
    first, began = file.stat().st_size, time.perf_counter()
    until(lambda: file.stat().st_size >= total, 300)
    return (total - first) / (time.perf_counter() - began)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
