"""/metrics, as Prometheus reads it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobworker.metrics import metrics_text
from jobworker.past import Totals
from tests.peers import (
    ScriptedWorker,
)
from tests.stage import (
    Server,
    Stage,
    until,
)


class Metrics:
    """What Prometheus reads: the value of a sample by its name and labels."""

    def __init__(self, server: Server) -> None:
        reply = server.http("GET", "/metrics")
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        self.families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, /, **labels: str) -> float | None:
        return self.samples.get((f"jobworker_{name}", frozenset(labels.items())))

    def buckets(self, name: str, job: str) -> list[tuple[float, float]]:
        """The buckets of a histogram, each with its bound, in the order in which they stand."""
        samples = self.families[f"jobworker_{name}"].samples
        found = [sample for sample in samples if sample.name.endswith("_bucket") and sample.labels["name"] == job]
        return [(float(sample.labels["le"]), sample.value) for sample in found]


ODD_NAME = 'o"d\\d n{a}m,e=日本'
FAMILIES = {
    "build_info": ("gauge", {"version"}),
    "jobs": ("gauge", {"state"}),
    "jobs_finished": ("counter", {"name", "state"}),
    "job_duration_seconds": ("histogram", {"name", "le"}),
    "job_queue_duration_seconds": ("histogram", {"name", "le"}),
    "queue_latency_seconds": ("gauge", set()),
    "worker_up": ("gauge", {"worker"}),
    "worker_jobs": ("gauge", {"worker"}),
}


class TestMetrics:
    """/metrics, read by Prometheus' own parser."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        jobs = json.dumps(
            [
                {"name": "good", "image": "busybox", "command": "true"},
                {"name": ODD_NAME, "image": "busybox", "command": ["sh", "-c", "sleep 0.15; exit 3"]},
                {"name": "waits", "image": "busybox", "tags": ["never"]},
            ]
        )
        with contextlib.closing(Stage(tmp_path_factory.mktemp("metrics"))) as stage:
            server = stage.server(jobs=jobs)
            stage.worker(server, "--slots", "2", name=ODD_NAME)
            for job in server.http("POST", "/api/jobs", [{"name": "good"}] * 3 + [{"name": ODD_NAME}] * 2).json:
                server.ended(job["id"])
            until(lambda: Metrics(server)("jobs_finished_total", name=ODD_NAME, state="failure") == 2)
            yield server

    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_family_has_its_kind_its_labels_and_a_text(self, server: Server, name: str) -> None:
        family = Metrics(server).families[f"jobworker_{name}"]
        kind, labels = FAMILIES[name]
        assert family.type == kind
        assert family.documentation
        assert family.samples
        assert set().union(*(sample.labels for sample in family.samples)) == labels

    def test_every_family_is_ours_and_every_sample_is_there_once(self, server: Server) -> None:
        metrics = Metrics(server)
        assert all(name.startswith("jobworker_") for name in metrics.families)
        assert len(metrics.samples) == sum(len(family.samples) for family in metrics.families.values())

    def test_jobs_are_counted_by_state(self, server: Server) -> None:
        metrics = Metrics(server)
        states = [job["state"] for job in server.get("/api/jobs?full=1")]
        for state in ("queued", "assigned", "running", "success", "failure", "cancelled"):
            assert metrics("jobs", state=state) == states.count(state)

    def test_ended_jobs_are_counted_by_name_and_state(self, server: Server) -> None:
        metrics = Metrics(server)
        assert metrics("jobs_finished_total", name="good", state="success") == 3
        assert metrics("jobs_finished_total", name=ODD_NAME, state="failure") == 2
        assert metrics("jobs_finished_total", name="good", state="failure") in (None, 0)

    def test_a_job_cancelled_before_its_start_has_ended_too(self, server: Server) -> None:
        job = server.post("waits")
        server.http("DELETE", f"/api/jobs/{job}")
        until(lambda: Metrics(server)("jobs_finished_total", name="waits", state="cancelled"), 2)

    @pytest.mark.parametrize("name", ["job_duration_seconds", "job_queue_duration_seconds"])
    def test_buckets_are_cumulative_and_end_with_all(self, server: Server, name: str) -> None:
        metrics = Metrics(server)
        for job, count in (("good", 3), (ODD_NAME, 2)):
            bounds, values = zip(*metrics.buckets(name, job), strict=True)
            assert list(bounds) == sorted(set(bounds))
            assert list(values) == sorted(values)
            assert bounds[-1] == float("inf")
            assert values[-1] == metrics(f"{name}_count", name=job) == count

    def test_a_duration_is_in_the_bucket_of_its_length(self, server: Server) -> None:
        metrics = Metrics(server)
        total = metrics("job_duration_seconds_sum", name=ODD_NAME) or 0
        assert 0.3 <= total < 10
        assert [value for bound, value in metrics.buckets("job_duration_seconds", ODD_NAME) if bound <= 0.1] == [0, 0]
        assert metrics("job_queue_duration_seconds_sum", name="waits") is None

    def test_a_worker_is_known_by_its_name_while_it_is_there(self, server: Server) -> None:
        with ScriptedWorker(server, "gone-soon", tags=("other",)):
            metrics = Metrics(server)
            for worker in (ODD_NAME, "gone-soon"):
                assert metrics("worker_up", worker=worker) == 1
                assert metrics("worker_jobs", worker=worker) == 0
        until(lambda: Metrics(server)("worker_up", worker="gone-soon") in (None, 0))

    def test_the_wait_of_the_oldest_ready_job_is_told(self, server: Server) -> None:
        assert Metrics(server)("queue_latency_seconds") == 0
        delayed = server.post("waits", delay=100)
        assert Metrics(server)("queue_latency_seconds") == 0
        job = server.post("waits")
        time.sleep(0.2)
        assert 0.2 <= (Metrics(server)("queue_latency_seconds") or 0) < 5
        for waiting in (job, delayed):
            server.http("DELETE", f"/api/jobs/{waiting}")
        assert Metrics(server)("queue_latency_seconds") == 0

    def test_the_build_is_told(self, server: Server) -> None:
        assert Metrics(server)("build_info", version=server.get("/healthz")["version"]) == 1

    def test_a_name_cannot_add_a_line(self) -> None:
        totals = Totals()
        name = 'a"} 1\njobworker_jobs{state="forged\\'
        totals.finished[name, "success"] = 1
        text = metrics_text({"jobs": {}, "queue_latency": 0}, [], totals, {}, [])
        [family] = [one for one in text_string_to_metric_families(text) if one.name == "jobworker_jobs_finished"]
        assert [sample.labels["name"] for sample in family.samples] == [name]


class TestSchedules:
    """What an alert for "nothing ran" needs."""

    def test_the_last_success_outlives_pruning_and_restarts(self, stage: Stage) -> None:
        server = stage.server("--hold", "--keep", "0.5s")
        stage.worker(server)
        assert Metrics(server)("job_last_success_timestamp_seconds", name="quick") is None
        begin = time.time()
        server.ended(server.post("quick"))
        server.ended(server.post("sh", environment={"SCRIPT": "exit 1"}))
        success = Metrics(server)("job_last_success_timestamp_seconds", name="quick")
        assert success is not None
        assert begin - 0.001 <= success <= time.time()
        server.kill()
        server.start()
        assert Metrics(server)("job_last_success_timestamp_seconds", name="quick") == success
        assert Metrics(server)("job_last_success_timestamp_seconds", name="sh") is None

    def test_missed_and_skipped_due_times_are_counted(self, stage: Stage) -> None:
        server = stage.server(jobs="- {name: each, image: busybox, schedule: '* * * * *'}")
        until(lambda: Metrics(server)("schedule_missed_total", name="each") is not None)
        for _ in range(2):  # nobody runs the first one, so the second time is skipped
            server.kill()
            with contextlib.closing(sqlite3.connect(stage.folder / "jobs.db")) as connection, connection:
                connection.execute("UPDATE schedule SET upto = upto - 180")
            server.start()
            until(lambda: (Metrics(server)("schedule_missed_total", name="each") or 0) >= 2)
        until(lambda: (Metrics(server)("schedule_skipped_total", name="each") or 0) >= 1)
        assert (Metrics(server)("schedule_missed_total", name="each") or 0) >= 4
        assert len(server.get("/api/jobs")) == 1
