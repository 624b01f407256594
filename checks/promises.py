"""Counts the promises in a played world: after each commit what is said of states, at the end all else.

It reads the database and the ledgers of engines and people; it makes nothing happen.
"""

import itertools
import math
import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from played import CONFIGS, FINAL, GRACE_SECONDS, JOBS, Start
from virtual import Broken

import server
from jobworker import logs, state
from jobworker.due import COUNT_OPEN, SCHEDULES, TOO_FAR_SECONDS
from jobworker.output import LOG_PIECE_BYTES

if TYPE_CHECKING:
    from played import World

LOG_BYTES = logs.LOG_HEAD_BYTES + logs.LOG_TAIL_BYTES
# What each worker of version 2 can take at any time.
FOR_ALL = {job.name for job in JOBS.values() if not (job.tags or job.concurrency or job.name == "leaves")}
SLACK_BYTES = 4 * LOG_PIECE_BYTES
STOP_SECONDS = 120.0  # in calm, from when a container has to end; a silent link alone takes a quarter of it

LOOK = "SELECT state, name, cause, due_at, reason, priority, failures, attempt, worker FROM job WHERE id = ?"
LATEST_ATTEMPT = "SELECT reason, worker FROM attempt WHERE job = ? ORDER BY attempt DESC LIMIT 1"
READY = """SELECT id, name, priority FROM job
    WHERE state = 'queued' AND not_before IS NULL AND failures = 0 AND priority > ?"""
UNSTARTED = "SELECT id FROM job WHERE worker = ? AND state = 'assigned'"
WORKER = "SELECT name, protocol, tags, connected, connected_at FROM worker WHERE id = ?"


class Commits:
    """What every commit keeps: each job goes one way, and each step that it takes is right when it takes it."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.states: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.ended: dict[int, float] = {}
        self.followers: defaultdict[int, list[str]] = defaultdict(list)
        self.unstarted: set[tuple[int, int]] = set()  # attempts that were taken back before they had their Go
        self.gone: dict[int, float] = {}  # since when a worker is away
        self.came_to: dict[int, object] = {}  # the server that has noted its connection
        self.connected: dict[int, Any] = {}
        self.retried: dict[int, tuple[float, object, float]] = {}  # when, on which server, and the least delay
        self.schedule_begins: float | None = None

    def look(self, db: state.Database, notes: list[state.Notes]) -> None:
        self._note_schedule(db)
        arrived = self._look_at_workers(db, set().union(*(each.workers for each in notes)))
        touched = set().union(*(each.jobs for each in notes))
        moved = [
            (job, row, before)
            for job in sorted(touched)
            if (row := db.one(LOOK, job)) is not None
            if (before := self.states.get(job, "new")) != row["state"]
        ]
        lost = [loss for job, row, before in moved for loss in self._note_step(db, job, row, before)]
        for job, row, _before in moved:
            if row["state"] == "assigned":
                self._check_claim(db, job, row, touched)
        for job, attempt, worker in lost:
            self._check_loss(db, (job, attempt), worker, arrived)

    def _note_step(self, db: state.Database, job: int, row: sqlite3.Row, before: str) -> list[tuple[int, int, int]]:
        """Note where a job has come; give the attempt that was lost there, if any."""
        now = self.states[job] = row["state"]
        self.world.count(f"{before} to {now}")
        self.world.tell(f"job {job}: {now}")
        if before in FINAL:
            raise Broken(f"job {job} was {before} and is {now}")
        if now in FINAL:
            self.ended[job] = self.world.now()
        if before == "new":
            self._note_new(db, job, row)
        if before == "assigned" and now in ("queued", "cancelled"):
            self.unstarted.add((job, row["attempt"]))
        if before == "running" and (now == "queued" or row["reason"] == "lost"):
            return self._note_end_of_attempt(db, job, row)
        return []

    def _note_schedule(self, db: state.Database) -> None:
        if self.schedule_begins is None and (schedule := db.one(SCHEDULES)):
            self.schedule_begins = schedule["upto"]

    def _look_at_workers(self, db: state.Database, workers: set[int]) -> dict[int, float]:
        """Note since when workers are away; give those that have come in this commit, and since when they had been."""
        arrived, serving = {}, self.world.server
        assert serving
        for worker in sorted(workers):
            row = db.one(WORKER, worker)
            if row is None:
                continue
            if row["connected_at"] != self.connected.get(worker):
                self.connected[worker] = row["connected_at"]
                arrived[worker] = self.gone.get(worker, self.world.now())
            if row["connected"]:
                self.gone.pop(worker, None)
                self.came_to[worker] = serving
                continue
            if self.came_to.get(worker) is serving and (unstarted := db.one(UNSTARTED, worker)):
                raise Broken(f"job {unstarted[0]} has not started, and waits for {row['name']}, which is gone")
            if worker not in self.gone:  # at the start of a server all are, which nobody notes
                self.gone[worker] = self.world.now() if self.came_to.get(worker) is serving else serving.began
        return arrived

    def _note_new(self, db: state.Database, job: int, row: sqlite3.Row) -> None:
        self.names[job] = row["name"]
        if row["cause"]:
            self.followers[row["cause"]].append(row["name"])
        if row["due_at"] and db.one(COUNT_OPEN, row["name"])[0] > (JOBS[row["name"]].concurrency or 1):
            raise Broken(f"promise 12: job {job} is due beside one that has not ended")

    def _note_end_of_attempt(self, db: state.Database, job: int, row: sqlite3.Row) -> list[tuple[int, int, int]]:
        """Note an attempt that failed or was lost; give it where it was lost."""
        reason, worker = row["reason"], row["worker"]
        if row["state"] == "queued":
            reason, worker = db.one(LATEST_ATTEMPT, job)
            delay = 0.75 * JOBS[row["name"]].retry_delay * 2.0 ** (row["failures"] - 1)
            self.retried[job] = self.world.now(), self.world.server, delay - self.world.commit_seconds
        return [(job, row["attempt"], worker)] if reason == "lost" else []

    def _check_claim(self, db: state.Database, job: int, row: sqlite3.Row, touched: set[int]) -> None:
        """Not before its delay is over, not beside more than its concurrency, not before one of a higher priority."""
        when, server_, delay = self.retried.pop(job, (0.0, None, 0.0))
        if server_ is self.world.server and self.world.now() - when < delay:
            raise Broken(f"job {job} was tried again after {self.world.now() - when:.2f} s, not {delay:.2f}")
        limit = JOBS[row["name"]].concurrency
        if limit and state.count_active(db)[row["name"]] > limit:
            raise Broken(f"more than {limit} jobs {row['name']} are assigned or running, job {job} among them")
        if db.one(WORKER, row["worker"])["protocol"] == 1:
            return
        for other, name, priority in db.execute(READY, (row["priority"],)).fetchall():
            if self.states.get(other) == "queued" and other not in touched and name in FOR_ALL:
                raise Broken(f"job {job} was given before job {other}, whose priority is {priority}")

    def _check_loss(self, db: state.Database, lost: tuple[int, int], worker: int, arrived: dict[int, float]) -> None:
        """Promise 2: what a worker runs is not lost while it may come back, but where it comes and has it no more."""
        job, row = lost[0], db.one(WORKER, worker)
        # What the disk refused is written later: then nobody knows from outside since when a worker is away.
        refused_lately = self.world.now() - self.world.disk_failed_at < 3 * GRACE_SECONDS
        if row["protocol"] == 1 or refused_lately:
            return
        serving = self.world.server
        since = max(self.gone.get(worker, 0.0), arrived.get(worker, 0.0), serving.began if serving else 0.0)
        if self.world.now() - since >= GRACE_SECONDS - self.world.commit_seconds:
            self.world.count("checked: promise 2, lost after its grace")
            return
        if worker in arrived:
            self._check_forgotten(*lost, row["name"])
        elif not row["connected"]:
            raise Broken(f"promise 2: job {job} is lost {self.world.now() - since:.1f} s after {row['name']} went")

    def _check_forgotten(self, job: int, attempt: int, worker: str) -> None:
        """A worker that comes back has each container that was running when it began."""
        (host,) = (host for host in self.world.hosts if host.name == worker)
        for line in self.world.starts:
            if (line.job, line.attempt) == (job, attempt) and line.began < host.began and line.ended is None:
                raise Broken(f"promise 2: job {job} is lost though {worker} is back, and its container runs")
        self.world.count("checked: promise 2, lost with its container")


class Promises(Commits):
    """What is promised of a history as a whole, once all is mended and all has ended."""

    def check(self) -> None:
        db, rows = self.world.database(), self.world.rows()
        for job in self.world.accepted:
            if job not in rows and not self._may_be_pruned(job, rows):
                raise Broken(f"promise 1: job {job} was accepted and is not there")
        starts: defaultdict[int, list[Start]] = defaultdict(list)
        for line in self.world.starts:
            starts[line.job].append(line)
        for job, row in rows.items():
            self._check_starts(db, row, [line for line in starts[job] if line.attempt])
            self._check_end(row, [line for line in starts[job] if line.attempt])
            self._check_follow_up(row)
            for each in (*(state.attempts(db, job) if row["attempt"] > 1 else ()), row):
                self._check_failure(job, each, starts[job])
            if is_of_original(row):
                self._check_original(row, starts[job])
            else:
                self._check_result(db, row, starts[job])
        self._check_schedule(db, rows)
        self.world.counts["jobs"] += len(rows)
        self.world.counts["containers"] += len(self.world.starts)

    def _may_be_pruned(self, job: int, rows: dict[int, sqlite3.Row]) -> bool:
        """Whether a job ended long enough ago, and a newer one of its name is there, as is one that succeeded."""
        age = self.world.now() - self.ended.get(job, self.world.now())  # since the commit of its end
        if not self.world.keep or age < self.world.keep - self.world.commit_seconds:
            return False
        self.world.count("pruned")
        if self.names[job] == "leaves":  # of what jobs.yaml has no more nothing stays
            return True
        newer = [row for row in rows.values() if row["id"] > job and row["name"] == self.names[job]]
        if self.states[job] == "success":
            newer = [row for row in newer if row["state"] == "success"]
        return bool(newer)

    def _check_starts(self, db: state.Database, row: sqlite3.Row, starts: list[Start]) -> None:
        """Promise 3: no attempt starts twice, nor unasked; they overlap only where the first was given up as lost."""
        # What a worker of version 1 has started before it said so may run a second time: it has no attempt.
        job, numbers = row["id"], [line.attempt for line in starts]
        if len(numbers) > len(set(numbers)):
            raise Broken(f"promise 3: job {job} started attempts {numbers}")
        if taken_back := self.unstarted & {(job, number) for number in numbers}:
            raise Broken(f"promise 3: {taken_back} had been taken back, and started")
        if len(numbers) > JOBS[row["name"]].retries + 1:
            raise Broken(f"promise 3: job {job} started {len(numbers)} times")
        if len(numbers) > 1:
            ended = {each["attempt"]: each["reason"] for each in state.attempts(db, job)}
            for first, second in itertools.pairwise(starts):
                lower = min(first.attempt, second.attempt)  # one that was lost may also start late
                if (first.ended is None or first.ended > second.began) and ended.get(lower) != "lost":
                    raise Broken(f"promise 3: attempts {first.attempt} and {second.attempt} of job {job} overlap")
            self.world.count("checked: promise 3 of a second attempt")

    def _check_end(self, row: sqlite3.Row, starts: list[Start]) -> None:
        """Promise 6: after DELETE, or past its timeout, a container ends; what was to be cancelled is no failure."""
        if row["cancelling"] and row["state"] == "failure":
            raise Broken(f"promise 6: job {row['id']} was to be cancelled, and is a failure")
        cancelled, timeout = self.world.cancelled.get(row["id"], math.inf), JOBS[row["name"]].timeout or math.inf
        for line in starts:
            due = max(min(cancelled, line.began + timeout), line.began, self.world.calm_at)
            if due == math.inf:
                continue
            ended = self.world.now() if line.ended is None else line.ended
            if ended - due > STOP_SECONDS:
                raise Broken(f"promise 6: a container of job {row['id']} went on for {ended - due:.0f} s")
            self.world.count(f"checked: promise 6, {'DELETE' if cancelled < line.began + timeout else 'timeout'}")

    def _check_schedule(self, db: state.Database, rows: dict[int, sqlite3.Row]) -> None:
        """Promise 12: a due time gets at most one job, and none is left undealt with."""
        dues = [row["due_at"] for row in rows.values() if row["due_at"]]
        if len(dues) > len(set(dues)):
            raise Broken(f"promise 12: of {dues} one was queued twice")
        (schedule,) = db.execute(SCHEDULES).fetchall()
        upto, missed, skipped = schedule["upto"], schedule["missed"], schedule["skipped"]
        late = self.world.wall() - upto
        if late > 60 + 2 * server.TICK_SECONDS or late < -TOO_FAR_SECONDS - 2 * server.TICK_SECONDS:
            raise Broken(f"promise 12: dealt with up to {upto}, and it is {self.world.wall()}")
        if not (self.world.was_far or self.world.keep):
            assert self.schedule_begins is not None
            there_were = CONFIGS.schedules[schedule["name"]].count_due(self.schedule_begins, upto)
            if len(dues) + missed + skipped != there_were:
                raise Broken(f"promise 12: of {there_were} {dues} were queued, {missed} missed and {skipped} skipped")
            self.world.count("checked: promise 12 of missed and skipped")
        self.world.counts["due jobs"] += len(dues)
        self.world.counts["due times missed"] += missed
        self.world.counts["due times skipped"] += skipped

    def _check_follow_up(self, row: sqlite3.Row) -> None:
        """Promise 12: what a job's end asks for is there once."""
        config, followers = JOBS[row["name"]], self.followers[row["id"]]
        wanted = {"failure": config.on_failure, "success": config.on_success}.get(row["state"])
        if row["reason"] == "gone":
            wanted = None
        if followers != ([wanted] if wanted else []):
            raise Broken(f"promise 12: job {row['id']} is a {row['state']}, followed by {followers}")
        self.world.counts["follow-ups"] += len(followers)

    def _check_result(self, db: state.Database, row: sqlite3.Row, starts: list[Start]) -> None:
        """Promises 4 and 5: success if and only if the container exited 0; its log is what it wrote."""
        if str(row["reason"]).startswith("pulling"):
            raise Broken(f"job {row['id']} is a {row['state']}, and still {row['reason']}")
        last = [line for line in starts if line.attempt == row["attempt"]]
        container = last[0].container if last else None
        if row["state"] == "success":
            if container is None or container.code != 0 or container.state == "running":
                raise Broken(f"promise 4: job {row['id']} is a success, its container {container}")
            self._check_log(db, row, bytes(container.output))
            self.world.count("checked: promises 4 and 5 of a success")

    def _check_failure(self, job: int, attempt: sqlite3.Row, starts: list[Start]) -> None:
        """Promise 4: an attempt failed where its container did, with that exit code."""
        reason, code = attempt["reason"], attempt["exit_code"]
        if reason in (None, "cancelled", "lost", "timeout", "gone") or is_of_original(attempt):
            return
        codes = [line.container.code for line in starts if line.attempt == attempt["attempt"]]
        if 0 in codes or (codes and code not in (*codes, None)) or (reason == "exit" and not codes):
            raise Broken(f"promise 4: job {job} failed ({reason}, {code}), its container exited {codes}")
        self.world.count(f"checked: promise 4 of a failure, {reason}")

    def _check_log(self, db: state.Database, row: sqlite3.Row, output: bytes) -> None:
        pieces: list[tuple[int, bytes]] = []
        while more := logs.read_log(db, row["id"], row["attempt"], end_of(pieces)):
            pieces += more
        log = b"".join(data for _start, data in pieces)
        if len(output) <= LOG_BYTES:
            if log != output:
                raise Broken(f"promise 5: the log of job {row['id']} is {pieces!r:.200}, not {output!r:.200}")
            return
        self.world.count("checked: promise 5 of what is cut")
        if end_of(pieces) < len(output) or log[: logs.LOG_HEAD_BYTES] != output[: logs.LOG_HEAD_BYTES]:
            raise Broken(f"promise 5: the log of job {row['id']} has not the beginning or the end of what it wrote")
        if len(log) > LOG_BYTES + SLACK_BYTES or any(output[at : at + len(data)] != data for at, data in pieces):
            raise Broken(f"promise 5: the log of job {row['id']} has {len(log)} bytes of {len(output)}")

    def _check_original(self, row: sqlite3.Row, starts: list[Start]) -> None:
        """Promise 4 of what a worker of version 1 said, which knows of no attempts."""
        codes = [line.container.code for line in starts if line.container.state == "exited"]
        expected = {"success": lambda code: code == 0, "exit": bool}.get(row["reason"] or row["state"])
        if expected and not any(map(expected, codes)):
            raise Broken(f"promise 4: job {row['id']} is a {row['state']}, its containers exited {codes}")
        self.world.count(f"checked: promise 4 of version 1, {row['reason'] or row['state']}")


def is_of_original(attempt: sqlite3.Row) -> bool:
    return (attempt["worker_name"] or "").startswith("version-1-")


def end_of(pieces: list[tuple[int, bytes]]) -> int:
    return pieces[-1][0] + len(pieces[-1][1]) if pieces else 0
