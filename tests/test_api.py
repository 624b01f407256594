"""api.py: what each route answers, and how it refuses what is wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobworker import lists, retention, state
from jobworker.api import PAGE_CONFIGS, PAGE_JOBS, Api, get_metrics, list_configs, mark, read_list
from jobworker.config import Configs, JobConfig
from jobworker.message import parse_head, read_items
from jobworker.state import NewJob
from jobworker.store import Store
from tests.peers import (
    head,
)
from tests.stage import (
    JOBS,
    Server,
    Stage,
    problem,
)

PARAMETERS = """
- name: 日本 語
  image: busybox
- name: strict
  image: busybox
  parameters: {COLOUR: {required: true, pattern: "red|green"}, SIZE: {default: "7"}}
- name: tagged
  image: busybox
  command: [sh, -c, "exit 3"]
  tags: [gpu]
  retries: 2
  concurrency: 4
  priority: 5
  timeout: 1m30s
"""

# A value of a thousand characters takes a third of the steps that a request may take.
COSTLY = "- name: costly\n  image: busybox\n  parameters:\n" + "".join(
    f"    P{number}: {{pattern: '(a|b)*a(a|b){{12}}'}}\n" for number in range(40)
)
COSTLY += "- {name: mail, image: busybox, parameters: {TO: {pattern: '.+@.+[.].+'}}}\n"

LONG = {"environment": {"SCRIPT": "x" * 3_000}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without workers, which keeps what it is given."""
    with contextlib.closing(Stage(tmp_path_factory.mktemp("api"))) as stage:
        yield stage.server("--hold", jobs=JOBS + PARAMETERS + COSTLY)


class TestErrors:
    """Every refusal is a problem document whose detail helps."""

    def test_an_unknown_job_name_is_answered_with_those_there_are(self, api: Server) -> None:
        detail = problem(api.http("POST", "/api/jobs/hello-wrld"), 404)
        assert all(name in detail for name in ("hello-wrld", "hello-world", "quick", "日本 語"))

    @pytest.mark.parametrize(
        "path", ["/nothing", "/api", "/api/", "/api/jobs/1/2/3", "/api/workers/1/log", "/runner/x"]
    )
    def test_an_unknown_path_is_not_found(self, api: Server, path: str) -> None:
        problem(api.http("GET", path), 404)

    @pytest.mark.parametrize(
        "job", ["999999", "-1", "0", "99999999999999999999999", "0x1", "%EF%BC%91", "1.0", "+1", "1_0"]
    )
    def test_a_job_that_is_not_there_is_not_found(self, api: Server, job: str) -> None:
        for suffix in ("", "/log", "/attempts"):
            problem(api.http("GET", f"/api/jobs/{job}{suffix}"), 404)

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("PUT", "/api/jobs", {"GET", "POST"}),
            ("DELETE", "/api/workers", {"GET"}),
            ("POST", "/healthz", {"GET"}),
            ("PATCH", "/api/jobs/1", {"GET", "DELETE", "POST"}),
            ("POST", "/", {"GET"}),
        ],
    )
    def test_a_wrong_method_is_told_the_right_ones(
        self, api: Server, method: str, path: str, allowed: set[str]
    ) -> None:
        reply = api.http(method, path)
        problem(reply, 405)
        assert allowed <= set(reply.headers["Allow"].split(", "))

    def test_the_runner_without_an_upgrade_is_upgrade_required(self, api: Server) -> None:
        reply = api.http("GET", "/runner")
        problem(reply, 426)
        assert reply.headers["Upgrade"] == "websocket"

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"\xff",
            b"[]",
            b'"x"',
            b"null",
            b"1",
            b"\xef\xbb\xbf{}",
            b'{"environment": []}',
            b'{"environment": {"SCRIPT": 1}}',
            b'{"environment": {"SCRIPT": null}}',
            b'{"environment": {"SCRIPT": "\\ud800"}}',
            b'{"environment": {"SCRIPT": "a\\u0000b"}}',
            b'{"environment": {"OTHER": "1", "SCRIPT": ""}}',
            b'{"environment": {}}',
            b'{"environment": {"SCRIPT": ""}, "priority": "high"}',
            b'{"environment": {"SCRIPT": ""}, "priority": true}',
            b'{"environment": {"SCRIPT": ""}, "priority": 1.5}',
            b'{"environment": {"SCRIPT": ""}, "priority": 99999999999999999999}',
            b'{"environment": {"SCRIPT": ""}, "delay": -1}',
            b'{"environment": {"SCRIPT": ""}, "delay": NaN}',
            b'{"environment": {"SCRIPT": ""}, "delay": 1e999}',
            b'{"environment": {"SCRIPT": ""}, "delay": "1"}',
            b'{"environment": {"SCRIPT": ""}, "unknown": 1}',
            b"[" * 100_000,
            b'{"environment": ' * 100_000,
        ],
        ids=lambda body: body[:60].decode(errors="replace"),
    )
    def test_a_bad_body_is_refused_and_nothing_is_queued(self, api: Server, body: bytes) -> None:
        before = api.http("GET", "/api/jobs").body
        assert problem(api.http("POST", "/api/jobs/sh", body), 400)
        assert api.http("GET", "/api/jobs").body == before

    def test_json_that_can_be_read_but_not_written_is_refused(self, api: Server) -> None:
        """How deep that is hangs on what called the reader."""
        for depth in range(850, 1_000):
            nested = b"[" * depth + b"]" * depth
            for name, body in (("sh", b'{"environment":{"SCRIPT":' + nested + b"}}"), ("quick", nested)):
                problem(api.http("POST", f"/api/jobs/{name}", body, headers={"Idempotency-Key": str(depth)}), 400)

    def test_a_form_is_no_longer_than_json_may_be(self, api: Server) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        reply = api.http("POST", "/api/jobs/sh", b"SCRIPT=" + b"%41" * 90_000, headers=form)
        assert "may have 262144 bytes" in problem(reply, 400)

    @pytest.mark.parametrize("body", [b"[]", b"null", b"0", b'""', b"false"])
    def test_a_body_that_is_no_object_is_refused_for_any_job(self, api: Server, body: bytes) -> None:
        problem(api.http("POST", "/api/jobs/quick", body), 400)

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"nope", b"{}", b"[", b"[,]", b"[1]", b"[[]]", b"[NaN]", b"[\xff]"),
            *(b"[J,]", b"[J J]", b"[J", b"[J}", b"[J]]", b"[J] x", b"[J,1]"),
            *(b"[" * 100_000, b"[{" + b'"":{' * 100_000, b'[{"":' + b"9" * 5_000 + b"}]"),
            b'[{"": "' + b"x" * 300_000 + b'", "name": "quick"}]',
            b'[{"name": "sh", "environment": {"SCRIPT": "\\udabc"}}]',
        ],
        ids=lambda body: body[:20].decode(errors="replace"),
    )
    def test_a_bad_list_is_refused_and_nothing_is_queued(self, api: Server, body: bytes) -> None:
        before = api.http("GET", "/api/jobs").body
        assert problem(api.http("POST", "/api/jobs", body.replace(b"J", b'{"name": "quick"}')), 400)
        assert api.http("GET", "/api/jobs").body == before

    @pytest.mark.parametrize("size", [10, 4_000, 4_096, 30_000])
    def test_a_list_is_read_as_any_json_is(self, api: Server, size: int) -> None:
        script = 'ä\\"' * (size // 4) + "\u2028😀"
        items = [{"name": "sh", "environment": {"SCRIPT": script}, "delay": 1.5}, {"name": "quick"}] * 3
        for indent in (None, 3):
            for escaped in (False, True):
                body = json.dumps(items, indent=indent, ensure_ascii=escaped).encode()
                ids = [job["id"] for job in api.http("POST", "/api/jobs", b" \r\n\t" + body + b"\n").json]
                assert [api.job(id_)["environment"] for id_ in ids] == [{"SCRIPT": script}, {}] * 3

    def test_a_lists_key_is_marked_as_by_any_release(self) -> None:
        """It is made item by item, and kept: a request that is repeated after an upgrade is the same."""
        items = [{"name": "quick", "delay": 1.0}, {"priority": 2, "name": "quick"}, {"name": "missing"}]
        configs = Configs([JobConfig("quick", "busybox")])
        for length in range(4):
            _, marked = read_list(configs, json.dumps(items[:length]).encode(), "k")
            assert marked == mark("k", "POST", items[:length])

    def test_an_empty_idempotency_key_is_no_key(self, api: Server) -> None:
        first, second = (api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": ""}) for _ in range(2))
        assert first.status == second.status == 400 or first.json["id"] != second.json["id"]

    @pytest.mark.parametrize(("key", "value"), [("unknwn", 1), ("priority", "high"), ("delay", [])])
    def test_a_bad_key_is_named(self, api: Server, key: str, value: object) -> None:
        assert key in problem(api.http("POST", "/api/jobs/quick", {key: value}), 400)

    def test_a_bad_parameter_is_named(self, api: Server) -> None:
        assert "SHAPE" in problem(
            api.http("POST", "/api/jobs/strict", {"environment": {"SHAPE": "1", "COLOUR": "red"}}), 400
        )
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict"), 400)
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict", {"environment": {"COLOUR": "red!"}}), 400)
        assert "COLOUR" in problem(api.http("POST", "/api/jobs/strict", {"environment": {"COLOUR": "a red"}}), 400)

    def test_a_job_without_parameters_takes_none(self, api: Server) -> None:
        assert "PATH" in problem(api.http("POST", "/api/jobs/quick", {"environment": {"PATH": "/"}}), 400)

    def test_a_body_too_large_is_refused(self, api: Server) -> None:
        assert b" 413 " in api.raw(head(b"POST /api/jobs/quick", b"Content-Length: 9999999999"))

    @pytest.mark.parametrize(
        "query",
        ["limit=x", "limit=-1", "after=x", "before=1_0", "state=sleeping", "limit=9999999999999999999999", "unknown=x"],
    )
    def test_a_bad_query_is_refused(self, api: Server, query: str) -> None:
        assert query.partition("=")[0] in problem(api.http("GET", f"/api/jobs?{query}"), 400)

    @pytest.mark.parametrize("query", ["wait=x", "wait=-1", "wait=nan", "wait=1e999"])
    def test_a_bad_wait_is_refused_and_nothing_is_queued(self, api: Server, query: str) -> None:
        before = api.http("GET", "/api/jobs").body
        assert "wait" in problem(api.http("POST", f"/api/jobs/quick?{query}"), 400)
        assert api.http("GET", "/api/jobs").body == before

    def test_a_wait_as_programs_compute_it_is_understood(self, api: Server) -> None:
        assert api.http("POST", f"/api/jobs/quick?wait={0.1 + 0.2}").status == 200

    def test_a_body_cannot_name_another_job(self, api: Server) -> None:
        problem(api.http("POST", "/api/jobs/quick", {"name": "hello-world"}), 400)

    @pytest.mark.parametrize("query", ["offset=x", "offset=-1", "tail=x", "tail=-1", "attempt=0", "attempt=x"])
    def test_a_bad_query_of_a_log_is_refused(self, api: Server, query: str) -> None:
        job = api.post("quick")
        assert 400 <= api.http("GET", f"/api/jobs/{job}/log?{query}").status <= 404

    def test_a_list_with_one_bad_entry_queues_nothing(self, api: Server) -> None:
        before = len(api.get("/api/jobs"))
        for bad in ({"name": "nothing"}, {"name": "sh"}, {}, 1, {"name": "quick", "priority": []}):
            reply = api.http("POST", "/api/jobs", [{"name": "quick"}, bad])
            assert 400 <= reply.status <= 404
            assert problem(reply, reply.status)
        assert len(api.get("/api/jobs")) == before

    @pytest.mark.parametrize("is_list", [False, True])
    def test_patterns_that_add_up_are_refused_and_nothing_is_queued(self, api: Server, is_list: bool) -> None:
        letters = random.Random(1)
        values = {f"P{number}": "".join(letters.choices("ab", k=1_000)) + "a" * 13 for number in range(40)}
        api.post("costly", environment={"P0": values["P0"]})
        before = len(api.get("/api/jobs"))
        if is_list:
            jobs = [{"name": "costly", "environment": {name: value}} for name, value in values.items()]
            detail = problem(api.http("POST", "/api/jobs", jobs), 400)
        else:
            detail = problem(api.http("POST", "/api/jobs/costly", {"environment": values}), 400)
        assert re.match("(item [1-9]: )?P[1-9] takes too long to be matched with the pattern", detail)
        assert "send shorter values, or fewer jobs at once" in detail
        assert len(api.get("/api/jobs")) == before

    def test_a_long_list_of_plain_values_is_taken(self, api: Server) -> None:
        letters = random.Random(1)
        names = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=12)) for _ in range(1_000)]
        jobs = [{"name": "mail", "environment": {"TO": f"{name}@{name[:5]}.example"}} for name in names]
        assert api.http("POST", "/api/jobs", jobs, 60).status == 200

    def test_a_missing_worker_is_not_found(self, api: Server) -> None:
        problem(api.http("GET", "/api/workers/1"), 404)

    def test_a_finished_job_is_not_cancelled_and_an_unfinished_one_not_retried(self, api: Server) -> None:
        job = api.post("quick")
        problem(api.http("POST", f"/api/jobs/{job}/retry"), 409)
        assert api.http("DELETE", f"/api/jobs/{job}").status == 200
        problem(api.http("DELETE", f"/api/jobs/{job}"), 409)


KEYS_OF_A_FULL_JOB = [
    "id",
    "name",
    "queuing",
    "running",
    "success",
    "state",
    "attempt",
    "worker",
    "exit_code",
    "reason",
]
KEYS_OF_A_FULL_JOB += [
    "environment",
    "priority",
    "created_at",
    "started_at",
    "finished_at",
    "log_bytes",
    "cause",
    "due_at",
]


class TestLists:
    def test_why_jobs_wait_is_one_question_however_many_they_are(self) -> None:
        store = Store(":memory:").start()
        names = [f"job-{number % 10}" for number in range(100)]
        api = Api(store, Configs(JobConfig(name, "busybox") for name in set(names)), True, time.time)
        store.do(state.add, [NewJob(name) for name in names], 1.0).result(10)
        asked: list[str] = []
        store._database.connection.set_trace_callback(asked.append)
        rows = store.do(lists.page, lists.Wanted(), 100).result(10)
        assert {shown["reason"] for shown in api.show(rows)} == {"no worker is connected"}
        store.close()
        assert len([sql for sql in asked if sql.startswith("BEGIN")]) == 2

    def test_a_name_more_costs_what_each_costs(self) -> None:
        """In processor time and a ratio: so many queries at once held the store for seconds."""

        def seconds_a_name(count: int) -> float:
            with contextlib.closing(Store(":memory:").start()) as store:
                ids = store.do(state.add, [NewJob(f"job-{number}") for number in range(count)], 1.0, True).result()
                begin = time.process_time()
                rows = store.do(lists.page, lists.Wanted(q="job"), 250).result()
                spent = time.process_time() - begin
            assert [row["id"] for row in rows] == ids[:250]
            return spent / count

        assert min(seconds_a_name(4_000) for _ in range(2)) < 3 * min(seconds_a_name(400) for _ in range(3))

    def test_a_state_costs_a_name_less_than_twice_as_much(self) -> None:
        """In processor time: a state that is bound to a query has SQLite plan it anew for each name."""
        with contextlib.closing(Store(":memory:").start()) as store:
            store.do(state.add, [NewJob(f"job-{number}") for number in range(1_000)], 1.0, True).result()

            def seconds(*states: str) -> float:
                begin = time.process_time()
                store.do(lists.page, lists.Wanted(states, q="job"), 250).result()
                return time.process_time() - begin

            any_state = min(seconds() for _ in range(3))
            assert min(seconds("queued") for _ in range(3)) < 2 * any_state
            assert min(seconds("success", "failure", "cancelled") for _ in range(3)) < 3 * any_state

    def test_a_list_of_long_items_costs_little_more_than_its_json(self) -> None:
        """In processor time; also where a character takes four bytes."""
        item = {"name": "x", "environment": {"A": "b" * 4_200}}
        body = json.dumps(
            [item] * 1_900 + [{"name": "x", "environment": {"A": "\N{GRINNING FACE}"}}], ensure_ascii=False
        )
        begin = time.process_time()
        json.loads(body)
        bare = time.process_time() - begin
        assert len(list(read_items(body.encode(), 20_000))) == 1_901
        assert time.process_time() - begin - bare < 20 * bare

    def test_a_repeated_list_shows_none_but_its_own_jobs(self) -> None:
        """Also where some of them were pruned, and others came after."""
        with contextlib.closing(Store(":memory:").start()) as store:
            api = Api(store, Configs([JobConfig("own", "busybox"), JobConfig("other", "busybox")]), True, time.time)
            request = parse_head(b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k")
            shown = []
            for _ in range(2):
                request.body = json.dumps([{"name": "own"}] * 3).encode()
                body = api.answer(request).body
                shown.append(json.loads(body if isinstance(body, bytes) else b"".join(body)))
                store.do(state.cancel, 2, 1.0).result()
                store.do(retention.prune, 2.0, [], 10).result()
                store.do(state.add, [NewJob("other")] * 3, 3.0, True).result()
        assert [[job["id"] for job in jobs] for jobs in shown] == [[1, 2, 3], [1, 3]]

    def test_a_list_is_answered_with_what_was_accepted(self) -> None:
        """However fast a worker, or somebody who cancels, is meanwhile."""
        store = Store(":memory:").start()
        api = Api(store, Configs([JobConfig("quick", "busybox")]), True, time.time)
        request = parse_head(b"POST /api/jobs HTTP/1.1\r\nHost: localhost")
        request.body = json.dumps([{"name": "quick"}] * (PAGE_JOBS + 1)).encode()
        body = api.answer(request).body
        for job in (1, PAGE_JOBS + 1):
            store.do(state.cancel, job, 2.0).result(10)
        shown = json.loads(b"".join(body))  # type: ignore[arg-type]
        store.close()
        queued = {"name": "quick", "queuing": True, "running": False, "success": False}
        assert shown == [{"id": number, **queued} for number in range(1, PAGE_JOBS + 2)]

    def test_what_many_configs_show_is_asked_for_some_at_a_time(self) -> None:
        """All of a long jobs.yaml at once would hold up for seconds who commits."""
        store = Store(":memory:").start()
        configs = Configs(JobConfig(f"job-{number}", "busybox") for number in range(1_050))
        api, asked = Api(store, configs, True, time.time), parse_head(b"GET / HTTP/1.1\r\nHost: localhost")
        said: list[str] = []
        store._database.connection.set_trace_callback(said.append)
        shown = json.loads(b"".join(list_configs(api, asked).body))  # type: ignore[arg-type]
        get_metrics(api, asked)
        store.close()
        assert [config["name"] for config in shown] == list(configs.by_name)
        assert max(len(group.split(";")) for group in ";".join(said).split("BEGIN")) < 3 * PAGE_CONFIGS


class TestHttp:
    """The API as the design's table has it."""

    def test_names_are_percent_encoded_utf_8(self, api: Server) -> None:
        reply = api.http("POST", "/api/jobs/%E6%97%A5%E6%9C%AC%20%E8%AA%9E")
        assert reply.json["name"] == "日本 語"
        assert api.http("POST", "/api/jobs/hello%2Dworld").json["name"] == "hello-world"

    def test_a_full_job_has_all_keys_in_order(self, api: Server) -> None:
        job = api.job(api.post("strict", environment={"COLOUR": "green"}, priority=-3))
        assert list(job) == KEYS_OF_A_FULL_JOB
        assert job["environment"] == {"COLOUR": "green", "SIZE": "7"}
        assert (job["state"], job["attempt"], job["worker"], job["priority"]) == ("queued", 0, None, -3)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", job["created_at"])

    def test_the_list_is_filtered_and_paged_oldest_first(self, api: Server) -> None:
        ids = [job["id"] for job in api.http("POST", "/api/jobs", [{"name": "quick"}] * 5).json]
        assert ids == list(range(ids[0], ids[0] + 5))
        assert [job["id"] for job in api.get(f"/api/jobs?after={ids[1]}&limit=2")] == ids[2:4]
        assert [job["id"] for job in api.get(f"/api/jobs?before={ids[4]}&limit=2")] == ids[2:4]
        assert [job["id"] for job in api.get("/api/jobs?before=2147483647&limit=2")] == ids[3:]
        assert [job["id"] for job in api.get(f"/api/jobs?after={ids[0]}&name=quick&state=queued,running")] == ids[1:]
        assert len(api.get(f"/api/jobs?after={ids[0]}&state=queued,queued")) == 4
        assert api.get(f"/api/jobs?after={ids[0]}&name=hello-world") == []
        assert api.get(f"/api/jobs?after={ids[0]}&state=success") == []
        assert api.get(f"/api/jobs?after={ids[3]}&full=1") == [api.job(ids[4])]

    def test_a_long_list_is_whole(self, api: Server) -> None:
        ids = [job["id"] for job in api.http("POST", "/api/jobs", [{"name": "quick"}] * 20_000).json]
        listed = [job["id"] for job in api.get(f"/api/jobs?after={ids[0] - 1}")]
        assert listed == ids

    def test_a_page_before_is_whole_and_in_order_however_long_it_is(self, api: Server) -> None:
        ids = [
            job["id"] for job in api.http("POST", "/api/jobs", [{"name": "quick"}, {"name": "sh", **LONG}] * 400).json
        ]
        for id_ in ids[5:700:7]:
            api.http("DELETE", f"/api/jobs/{id_}")
        for query in (
            "",
            "&state=queued",
            "&name=sh",
            "&state=cancelled,queued",
            "&state=success",
            "&state=cancelled&name=sh",
        ):
            listed = [job["id"] for job in api.get(f"/api/jobs?after={ids[0] - 1}{query}")]
            assert listed == sorted(listed)
            for limit in (1, 249, 600, 10_001):
                page = api.get(f"/api/jobs?after={ids[0] - 1}&before={ids[-1]}&limit={limit}&full=1{query}")
                assert [job["id"] for job in page] == [id_ for id_ in listed if id_ < ids[-1]][-limit:]

    def test_an_empty_list_queues_nothing(self, api: Server) -> None:
        assert api.http("POST", "/api/jobs", []).body == b"[]\n"

    def test_the_same_idempotency_key_is_the_same_job(self, api: Server) -> None:
        first, again = (api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "a key"}) for _ in range(2))
        other = api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "another key"})
        assert first.json["id"] == again.json["id"] != other.json["id"]

    def test_the_same_idempotency_key_at_the_same_time_is_one_job(self, api: Server) -> None:
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda _: api.http("POST", "/api/jobs/quick", headers={"Idempotency-Key": "race"}), range(16))
            )
        assert len({reply.json["id"] for reply in replies}) == 1

    def test_asking_again_and_again_costs_the_server_nothing(self, api: Server) -> None:
        job = api.post("quick")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)) as connection:

            def ask(times: int) -> int:
                for _ in range(times):
                    connection.request("GET", f"/api/jobs/{job}")
                    connection.getresponse().read()
                return api.memory_kib()

            before = ask(1000)
            assert ask(6000) - before < 2000

    def test_a_wait_that_ends_too_early_gives_the_job_as_it_is(self, api: Server) -> None:
        start = time.monotonic()
        assert api.http("POST", "/api/jobs/quick?wait=0.3").json["queuing"]
        assert 0.3 <= time.monotonic() - start < 3

    def test_the_configs_are_listed(self, api: Server) -> None:
        config = {one["name"]: one for one in api.get("/api/configs")}
        assert config["tagged"]["command"] == ["sh", "-c", "exit 3"]
        wanted = {"image": "busybox", "tags": ["gpu"], "retries": 2, "concurrency": 4, "priority": 5, "timeout": 90}
        assert {key: config["tagged"][key] for key in wanted} == wanted
        assert config["strict"]["parameters"]["COLOUR"] == {"required": True, "default": None, "pattern": "red|green"}

    def test_health_metrics_page_and_description_are_there(self, api: Server) -> None:
        api.post("tagged")
        health = api.get("/healthz")
        assert (health["status"], health["workers"]) == ("ok", 0)
        assert health["jobs"]["queued"] > 0
        assert b"# TYPE jobworker_" in api.http("GET", "/metrics").body
        assert api.get("/openapi.json")["openapi"].startswith("3.")
        page = api.http("GET", "/")
        assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
