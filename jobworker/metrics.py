"""What the server tells Prometheus, in its text format."""

import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobworker import VERSION
from jobworker.past import HISTOGRAM_SECONDS, Totals

Sample = tuple[dict[str, str], float]


def metrics_text(
    overview: dict[str, Any],
    workers: Sequence[tuple[sqlite3.Row, list[int]]],
    totals: Totals,
    successes: Mapping[str, sqlite3.Row],
    schedules: Iterable[sqlite3.Row],
) -> str:
    """Give all metrics in Prometheus' text format. successes: by name the newest job that succeeded."""
    by_name = [({"name": row["name"]}, row["missed"], row["skipped"]) for row in schedules]
    last: list[Sample] = [({"name": name}, row["finished_at"]) for name, row in successes.items()]
    up = [({"worker": row["name"]}, float(row["connected"])) for row, _jobs in workers]
    connected = [(row, jobs) for row, jobs in workers if row["connected"]]
    held: list[Sample] = [({"worker": row["name"]}, len(jobs)) for row, jobs in connected]
    slots: list[Sample] = [({"worker": row["name"]}, row["slots"]) for row, _jobs in connected]
    by_state: list[Sample] = [({"state": name}, count) for name, count in overview["jobs"].items()]
    finished: list[Sample] = [({"name": name, "state": end}, n) for (name, end), n in totals.finished.items()]
    lines = [
        *family("build_info", "gauge", "What runs here.", [({"version": VERSION}, 1)]),
        *family("jobs", "gauge", "Jobs by state.", by_state),
        *family(
            "queue_latency_seconds",
            "gauge",
            "How long the oldest ready job has waited.",
            [({}, overview["queue_latency"])],
        ),
        *family("worker_up", "gauge", "1: connected; 0: within its grace.", up),
        *family("worker_jobs", "gauge", "Jobs held.", held),
        *family("worker_slots", "gauge", "Slots.", slots),
        *family("jobs_finished_total", "counter", "Jobs that ended, since the server's start.", finished),
        *family("job_last_success_timestamp_seconds", "gauge", "When a job of this name last succeeded.", last),
        *family("schedule_missed_total", "counter", "Due times without a job.", [(name, n) for name, n, _ in by_name]),
        *family("schedule_skipped_total", "counter", "Skipped: one was there.", [(name, n) for name, _, n in by_name]),
        *histogram("job_duration_seconds", "From start to end.", totals.durations),
        *histogram("job_queue_duration_seconds", "From POST to the start of the last attempt.", totals.waits),
    ]
    return "\n".join(lines) + "\n"


def histogram(name: str, text: str, histograms: dict[str, list[float]]) -> Iterator[str]:
    yield from family(name, "histogram", text, [])
    for job, (*counts, total) in histograms.items():
        label = {"name": job}
        for bound, count in zip((*HISTOGRAM_SECONDS, "+Inf"), itertools.accumulate(counts), strict=True):
            yield sample(f"{name}_bucket", {**label, "le": str(bound)}, count)
        yield sample(f"{name}_sum", label, total)
        yield sample(f"{name}_count", label, sum(counts))


def family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"# HELP jobworker_{name} {text}", f"# TYPE jobworker_{name} {kind}"]
    return lines + [sample(name, labels, value) for labels, value in samples]


def sample(name: str, labels: dict[str, str], value: float) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    shown = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in labels.items())
    return f"jobworker_{name}{{{shown}}} {value}" if shown else f"jobworker_{name} {value}"
