"""Jobs, attempts, workers and configs as the API shows them."""

import json
import math
import sqlite3
from datetime import UTC, datetime
from typing import Any

from jobworker.config import Configs, JobConfig


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339, UTC, with milliseconds."""
    if seconds is None or seconds == math.inf:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_json(id_: int, name: str, job_state: str) -> dict[str, Any]:
    """A job as the original's API shows it, key for key."""
    queuing, running = job_state in ("queued", "assigned"), job_state == "running"
    return {"id": id_, "name": name, "queuing": queuing, "running": running, "success": job_state == "success"}


def full_job_json(row: sqlite3.Row, reason: str | None) -> dict[str, Any]:
    return {
        **job_json(row["id"], row["name"], row["state"]),
        "state": row["state"],
        "attempt": row["attempt"],
        "worker": row["worker_name"],
        "exit_code": row["exit_code"],
        "reason": reason,
        "environment": json.loads(row["environment"] or "{}"),
        "priority": row["priority"],
        "created_at": timestamp(row["created_at"]),
        "started_at": timestamp(row["started_at"]),
        "finished_at": timestamp(row["finished_at"]),
        "log_bytes": row["log_bytes"],
        "cause": row["cause"],
        "due_at": timestamp(row["due_at"]),
    }


def attempt_json(row: sqlite3.Row) -> dict[str, Any]:
    """An attempt; row: of the attempts that were followed by another, or of the job, for its latest."""
    times = {key: timestamp(row[key]) for key in ("started_at", "finished_at")}
    rest = {key: row[key] for key in ("exit_code", "reason", "log_bytes")}
    return {"attempt": row["attempt"], "worker": row["worker_name"], **times, **rest}


def worker_json(row: sqlite3.Row, jobs: list[int]) -> dict[str, Any]:
    """A worker as the original's API shows it."""
    return {"id": row["id"], "working": bool(jobs)}


def full_worker_json(row: sqlite3.Row, jobs: list[int]) -> dict[str, Any]:
    """A worker with all that is known of it; of one that went, the jobs that it held then."""
    jobs = jobs if row["connected"] else json.loads(row["held"] or "null") or jobs
    return {
        **worker_json(row, jobs),
        "name": row["name"],
        "slots": row["slots"],
        "tags": json.loads(row["tags"]),
        "jobs": jobs,
        "address": row["address"],
        "connected_at": timestamp(row["connected_at"]),
        "protocol": row["protocol"],
        "version": row["version"],
        "connected": bool(row["connected"]),
        "gone_at": timestamp(row["gone_at"]),
    }


def config_json(
    config: JobConfig, next_due_at: float | None, last: sqlite3.Row | None, recent: list[str]
) -> dict[str, Any]:
    """A job of jobs.yaml: what one needs to run it, and no environment, which may hold secrets.

    next_due_at: seconds since the epoch, None where it has no schedule. last: its newest job, if there is one.
    recent: the states of its newest jobs, oldest first.
    """
    parameters = {
        name: {"required": parameter.required, "default": parameter.default, "pattern": parameter.pattern}
        for name, parameter in config.parameters.items()
    }
    keys = ("name", "image", "command", "tags", "concurrency", "priority", "timeout", "retries")
    more = ("schedule", "timezone", "on_failure", "on_success")
    return {
        **{key: getattr(config, key) for key in keys},
        "parameters": parameters,
        **{key: getattr(config, key) for key in more},
        "next_due_at": timestamp(next_due_at),
        "last": last and last_json(last),
        "recent": recent,
    }


def last_json(row: sqlite3.Row) -> dict[str, Any]:
    """How the newest run of a job stands."""
    times = {key: timestamp(row[key]) for key in ("created_at", "started_at", "finished_at")}
    return {key: row[key] for key in ("id", "state", "exit_code", "reason")} | times


def reason_of(
    row: sqlite3.Row, configs: Configs, connected: set[tuple[int, tuple[str, ...]]], active: dict[str, int]
) -> str | None:
    """Say why a job failed, or why it waits. connected: protocol and tags of who is; active: how many of a name run."""
    name, config = row["name"], configs.by_name.get(row["name"])
    if row["state"] == "running" and row["cancelling"]:
        return "cancelling"
    if row["state"] != "queued":
        reason: str | None = row["reason"]
        return reason
    if config is None:
        return f"jobs.yaml has no job named {name} any more"
    if row["not_before"] is not None:
        return f"waits until {timestamp(row['not_before'])}"
    if not connected:
        return "no worker is connected"
    if not any(set(config.tags) <= set(tags) for _protocol, tags in connected):
        return f"no worker has the tag{'s' * (len(config.tags) > 1)} {', '.join(config.tags)}"
    if not any(name in configs.names_for(tags, protocol) for protocol, tags in connected):
        return "no connected worker speaks version 2 of the protocol, which this job needs"
    if config.concurrency and active[name] >= config.concurrency:
        return f"{active[name]} of {config.concurrency} running"
    return "all slots are busy"
