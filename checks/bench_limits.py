"""The limits of the machine: what SQLite, `subprocess.run` and Python's imports take with nothing around them."""

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench_stage import Bench, memory

IMPORTS = "import asyncio,http.server,sqlite3,sys,websockets.asyncio.server,yaml;print(flush=True);sys.stdin.read()"


def sqlite_alone(bench: Bench, seconds: float) -> float:
    """Single durable commits a second of one row."""
    database = open_table(bench)
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        database.execute("INSERT INTO job (name, state) VALUES ('empty', 'queued')")
        done += 1
    return done / (time.perf_counter() - began)


def open_table(bench: Bench) -> sqlite3.Connection:
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    database = sqlite3.connect(folder / "limit.db", isolation_level=None)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT, state TEXT)")
    database.execute("CREATE INDEX job_state ON job (state, id)")
    return database


def insert(database: sqlite3.Connection, count: int) -> None:
    database.execute("BEGIN")
    database.executemany("INSERT INTO job (name, state) VALUES (?, ?)", [("empty", "queued")] * count)
    database.execute("COMMIT")


def sqlite_updates(bench: Bench, count: int, group: int) -> float:
    """Jobs a second through three updates each, in durable groups, with nothing else around them."""
    database = open_table(bench)
    insert(database, count)
    began = time.perf_counter()
    for first in range(1, count + 1, group):
        for state in ("assigned", "running", "success"):
            database.execute("BEGIN")
            for job in range(first, min(first + group, count + 1)):
                database.execute("UPDATE job SET state = ? WHERE id = ?", (state, job))
            database.execute("COMMIT")
    return count / (time.perf_counter() - began)


def run_alone(command: list[str], threads: int, seconds: float) -> float:
    """Runs a second of a command by subprocess.run, in so many threads."""
    end = time.perf_counter() + seconds

    def run() -> int:
        done = 0
        while time.perf_counter() < end:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(run.result() for run in [pool.submit(run) for _ in range(threads)])
    return done / (time.perf_counter() - began)


@dataclass
class Imports:
    """What Python takes to import what a server imports, before it does anything."""

    seconds: float
    memory: int


def imports_alone() -> Imports:
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bare:
        assert bare.stdin
        assert bare.stdout
        bare.stdout.readline()
        alone = Imports(time.monotonic() - began, memory(bare.pid))
        bare.stdin.close()
    return alone


def busy_seconds() -> float:
    """Processor time that everything on this machine has used since it was started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
