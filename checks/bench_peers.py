"""rq, celery, dramatiq and huey with the same work as ours (`--peers`)."""

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_beside import answer_at_once
from bench_ratio import Ratio, SkippedError
from bench_stage import Bench, Server, start_worker, stop, until

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
PEERS = {  # the command of each one's worker
    "rq": ["rq", "worker-pool", "--quiet", "--num-workers=4", "--url=redis://127.0.0.1:{port}"],
    "celery": ["celery", "--app=peer", "worker", "--concurrency=4", "--loglevel=error"],
    "dramatiq": ["dramatiq", "peer", "--processes=2", "--threads=4"],
    "huey": ["huey_consumer", "peer.huey", "--workers=8", "--quiet"],
}


def peer(bench: Bench, library: str, count: int) -> list[Ratio]:
    """Jobs a second, durable as ours always are, and as the library comes, where a power cut loses what it accepted."""
    if library != "huey" and shutil.which("redis-server") is None:
        raise SkippedError("there is no redis-server: make bench-peers installs one")
    python, servers = python_with(bench, library), {"empty": Server(bench), "no-op": Server(bench)}
    start_worker(bench, servers["empty"], 8, bench.empty_docker)
    ratios = {
        (work, fsync): Ratio(
            "no work, 64 slots" if work == "no-op" else "an empty program, 8 slots",
            f"{library}{', fsync at each write' if fsync else ' as it comes'}",
            "jobs/s",
            at_least=1 if work == "no-op" else None,
        )
        for work in servers for fsync in (True, False)
    }  # fmt: skip
    counts = {"empty": bench.count(2_000), "no-op": bench.count(20_000)}
    for turn in bench.turns:
        servers["no-op"].post_list(counts["no-op"])
        ours = {
            "empty": counts["empty"] / servers["empty"].run_jobs(counts["empty"], turn),
            "no-op": bench.beside(answer_at_once, servers["no-op"].port, 64, counts["no-op"]).result(),
        }
        for (work, fsync), ratio in ratios.items():
            ratio.add(ours[work], peer_rate(bench, python, library, work, fsync, bench.count(count)))
    return list(ratios.values())


def python_with(bench: Bench, library: str) -> Path:
    """This Python where it has the library, or one in a folder of its own, into which it is installed."""
    if importlib.util.find_spec(library):
        return Path(sys.executable)
    venv = bench.folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, library if library == "rq" else f"{library}[redis]"], check=True)
    return venv / "bin" / "python"


def peer_rate(bench: Bench, python: Path, library: str, work: str, fsync: bool, count: int) -> float:
    """Jobs a second of a peer's worker, from its first to its last, with all of them queued before it starts."""
    folder, port = Path(tempfile.mkdtemp(dir=bench.folder)), free_port()
    (folder / "peer.py").write_text(PEER)
    environment = os.environ | {
        "LIBRARY": library, "PORT": str(port), "PROGRAM": bench.empty_docker, "FSYNC": "yes" if fsync else "no",
        "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder),
    }  # fmt: skip
    options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
    with contextlib.ExitStack() as stack:
        if library != "huey":
            settings = "--appendonly yes --appendfsync always" if fsync else ""
            redis = f"redis-server --bind 127.0.0.1 --port {port} {settings}".split()
            stack.callback(stop, subprocess.Popen(redis, **options))
            until(lambda: answers(port), 10)
        subprocess.run([python, "peer.py", work, str(count)], **options, check=True)
        command = [word.format(port=port) for word in PEERS[library]]
        stack.callback(stop, subprocess.Popen(command, **options, stderr=subprocess.DEVNULL))
        return rate_of_growth(folder / "done", count)


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


ROWS: dict[str, Callable[[Bench], list[Ratio]]] = {
    library: functools.partial(peer, library=library, count=300 if library == "rq" else 3_000) for library in PEERS
}
