"""How a job ended, and what the logs of server and worker say of it: a line an end, in plain words.

job 12 (nightly-backup) failed on build-2 after 4m 12s: exit 1, attempt 2 of 4, again in 60s
"""

from typing import NamedTuple

REASONS = {
    "oom": "it ran out of memory",
    "timeout": "it ran longer than its timeout",
    "image": "the image is not there and could not be pulled; see its log",
    "docker": "Docker could not start it; see its log",
    "refused": "the worker's --allow-image does not let it run",
    "config": "its configuration can't be told to Docker; see its log",
    "worker": "an error of ours in the worker; see the worker's log",
    "gone": "its entry left jobs.yaml",
    "lost": "its worker went and did not come back",
}


class End(NamedTuple):
    """What a job's end says, or that of an attempt which is followed by another in `retry_in` seconds.

    failures: how many there were before. worker: its name. Times are seconds since the epoch.
    """

    id: int
    name: str
    state: str
    attempt: int
    failures: int
    worker: str | None
    exit_code: int | None
    reason: str | None
    created_at: float
    started_at: float | None
    finished_at: float
    retry_in: float | None = None


def line_of(end: End, retries: int) -> str:
    """Give the line of the server's log. retries: how many the job may have in all."""
    ran = "" if end.started_at is None else f" on {end.worker} after {how_long(end.finished_at - end.started_at)}"
    job = f"job {end.id} ({end.name})"
    number = f", attempt {end.attempt}" if end.attempt > 1 else ""
    if end.state == "success":
        return f"{job} succeeded{ran}{number}"
    if end.state == "cancelled":
        return f"{job} was cancelled{ran}{number}" if ran else f"{job} was cancelled while it waited"
    failed = f"{job} failed{ran}: {why(end.exit_code, end.reason)}"
    if end.retry_in is None:
        return failed + (f"{number} of {end.attempt}" if number and ran else "")
    # Attempts that never started count as attempts, but not as failures.
    most = end.attempt + max(retries - end.failures, 1)
    return f"{failed}, attempt {end.attempt} of {most}, again in {how_long(end.retry_in)}"


def why(exit_code: int | None, reason: str | None) -> str:
    """Say why a job failed. reason: a worker's word, of any characters."""
    if reason in (None, "exit"):
        return "no exit code" if exit_code is None else f"exit {exit_code}"
    word = reason if reason.isprintable() else ascii(reason)
    return f"{word} ({REASONS[reason]})" if reason in REASONS else word[:200]


def how_long(seconds: float) -> str:
    """Give `0.4s`, `60s`, `4m 12s`, `3h 5m` or `2d 4h`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= 2 * size:
            return f"{whole // size}{unit} {whole % size // part}{part_unit}"
    return f"{whole}s"
