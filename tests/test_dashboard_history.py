"""The dashboard's past: how the runs of each kind of job went, what failed lately, and what is due next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

import pytest
from playwright.sync_api import expect

from tests.pages import (
    SITE_JOBS,
    ReaderOf,
    assert_accessible,
    hold_answer,
    in_every_look,
    needs_chromium,
    open_job,
    row_of,
    unfold,
)
from tests.stage import Server, Stage, until

pytestmark = needs_chromium
pytest_plugins = ["tests.pages"]

NIGHT_JOBS = f"""{SITE_JOBS}
- name: on-call
  image: busybox
  command: [sh, -c, 'echo "$JOBWORKER_CAUSE_NAME failed"']
- name: nightly
  image: busybox
  command: [sh, -c, 'exit 7']
  schedule: 30 3 * * *
  on_failure: on-call
"""

TOLD_JOBS = """
- {name: third-time, image: busybox, command: [sh, -c, '[ "$JOBWORKER_ATTEMPT" = 3 ]'], retries: 2, retry_delay: 10ms}
- {name: again, image: busybox, command: [sh, -c, exit 4], retries: 3, retry_delay: 40s}
- {name: quick, image: busybox, command: "true"}
- {name: pulls, image: "slow:1", command: "true"}
- name: odd-words
  image: busybox
  command: [sh, -c, "echo \\"it's\\"", x, y=1]
  timeout: 1h
"""


@pytest.fixture(scope="class")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the morning after: some runs of `sh` went well and some failed, and so did each of `nightly`."""
    stage = Stage(tmp_path_factory.mktemp("night"))
    server = stage.server("--hold", jobs=NIGHT_JOBS)
    stage.worker(server, "--slots", "4", name="atlas-1")
    for script in ("exit 3", "exit 3", "true", "sleep 0.3"):
        server.ended(server.sh(script))
    for name in ("nightly", "nightly", "quick"):
        server.ended(server.post(name))
    yield server
    stage.close()


class TestDashboardHistory:
    """How a job's kind has fared, without a click and in the job's drawer."""

    @in_every_look
    def test_each_kind_of_job_tells_how_its_last_runs_went_and_when_it_is_due(
        self, night: Server, reader_of: ReaderOf, look: tuple[int, str]
    ) -> None:
        page = reader_of(night, *look).open_live()
        kinds = unfold(page, "configs").get_by_role("listitem")
        expect(kinds.nth(0)).to_contain_text("nightly")
        expect(kinds.nth(0)).to_contain_text(re.compile(r"Failed (now|\d+ s ago) · 2 of 2 failed\s*Next in \d+ [hm] "))
        expect(kinds.nth(1)).to_contain_text(re.compile(r"^sh\s*Succeeded .* · 2 of 4 failed"))
        expect(kinds.filter(has_text="gpu")).to_contain_text("Never ran")
        expect(kinds.nth(1).locator("i[data-state=failure]")).to_have_count(2)
        assert_accessible(page)

    @in_every_look
    def test_a_job_shows_the_last_runs_of_its_name(
        self, night: Server, reader_of: ReaderOf, look: tuple[int, str]
    ) -> None:
        page = reader_of(night, *look).open_live()
        drawer = open_job(page, 4)
        expect(drawer).to_contain_text(re.compile(r"2 of the last 4 runs succeeded, mostly in \d+"))
        bars = drawer.get_by_role("list", name="Runs").get_by_role("link")
        expect(bars).to_have_count(4)
        heights = bars.locator("i").evaluate_all("bars => bars.map((bar) => bar.clientHeight)")
        runs = sorted(night.get("/api/jobs?name=sh&full=1"), key=lambda run: run["id"])
        took = [datetime.fromisoformat(run["finished_at"]) - datetime.fromisoformat(run["started_at"]) for run in runs]
        assert [height for _took, height in sorted(zip(took, heights, strict=True))] == sorted(heights)
        assert min(heights) < max(heights)
        bars.nth(0).click()
        expect(page.get_by_role("dialog", name="sh #1")).to_contain_text("It exited with code 3")

    def test_a_job_leads_to_its_worker_its_cause_and_what_followed(self, night: Server, reader_of: ReaderOf) -> None:
        page = reader_of(night).open_live()
        open_job(page, night.get("/api/jobs?name=nightly")[0]["id"])
        drawer = page.get_by_role("dialog")
        drawer.get_by_role("link", name=re.compile(r"^on-call #\d+$")).click()
        expect(page.get_by_role("dialog", name=re.compile("^on-call"))).to_contain_text("nightly failed")
        drawer.get_by_role("link", name=re.compile(r"^#\d+$")).click()
        expect(page.get_by_role("dialog", name=re.compile("^nightly"))).to_be_visible()
        drawer.get_by_role("link", name="atlas-1").click()
        expect(page.get_by_role("heading", name="Jobs on atlas-1")).to_be_visible()
        expect(row_of(page, 1)).to_be_visible()
        page.goto(page.url.split("#")[0])
        page.locator("#workers").get_by_role("link", name="atlas-1").click()
        expect(page).to_have_url(re.compile("worker=atlas-1"))


class TestDashboardCalls:
    """A failure calls, and a page that is not live does not look so."""

    @in_every_look
    def test_what_failed_within_a_day_stands_in_the_tile_and_is_a_list(
        self, night: Server, reader_of: ReaderOf, look: tuple[int, str]
    ) -> None:
        page = reader_of(night, *look).open_live()
        failed = len(night.get("/api/jobs?state=failure"))
        page.get_by_role("link", name=f"{failed} in 24 h").click()
        expect(page.get_by_role("heading", name="Failed jobs that ended after")).to_be_visible()
        expect(page.locator("#list tbody tr")).to_have_count(failed)
        assert_accessible(page)

    def test_failures_since_the_last_look_are_told_in_title_and_icon(self, night: Server, reader_of: ReaderOf) -> None:
        page = reader_of(night).open_live()
        failed = len(night.get("/api/jobs?state=failure"))
        expect(page).to_have_title(f"({failed}) jobworker")
        page.evaluate("dispatchEvent(new Event('blur'))")
        expect(page).to_have_title("jobworker")
        icon = page.locator("link[rel=icon]")
        assert "e5352f" not in str(icon.get_attribute("href"))
        night.ended(night.sh("exit 1"))
        expect(page).to_have_title("(1) jobworker")
        assert "e5352f" in str(icon.get_attribute("href"))
        address = page.url
        page.goto("about:blank")
        night.ended(night.sh("exit 1"))
        page.goto(address)
        expect(page).to_have_title("(1) jobworker")

    def test_a_server_without_failures_does_not_call(self, stage: Stage, reader_of: ReaderOf) -> None:
        page = reader_of(stage.server("--hold", jobs=SITE_JOBS)).open_live()
        expect(page.get_by_role("link", name="0 Failure")).to_be_visible()
        expect(page).to_have_title("jobworker")
        expect(page.locator(".calls")).to_have_count(0)

    def test_clocks_stand_while_it_is_not_live(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        stage.worker(server)
        job = server.sh("sleep 60")
        reader = reader_of(server)
        reader.tolerates = "ERR_"
        page = reader.open_live()
        took = row_of(page, job).locator(".c-took")
        expect(took).to_have_text(re.compile(r"^[1-9]\d* s$"))
        server.kill()
        expect(page.locator("body")).to_have_class("old")
        stands = took.inner_text()
        page.evaluate("() => new Promise((done) => setTimeout(done, 2100))")
        assert took.inner_text() == stands


class TestDashboardBulk:
    """Many jobs at once, and one after the other."""

    def test_three_clicks_have_all_of_the_nights_failures_queued_again(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=NIGHT_JOBS)
        worker = stage.worker(server)
        for script in ("true", "exit 1", "exit 2", "exit 3"):
            server.ended(server.sh(script))
        worker.stop()
        page = reader_of(server).open_live()
        page.get_by_role("link", name="3 in 24 h").click()
        page.get_by_role("button", name="Retry all 3").click()
        page.get_by_role("dialog", name="Retry 3 jobs?").get_by_role("button", name="Retry 3").click()
        expect(page.get_by_text("3 jobs queued.")).to_be_visible()
        again = server.get("/api/jobs?state=queued&full=1")
        assert [job["environment"]["SCRIPT"] for job in again] == ["exit 1", "exit 2", "exit 3"]

    def test_all_that_wait_on_many_pages_are_cancelled_by_their_number(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=NIGHT_JOBS)
        server.http("POST", "/api/jobs", [{"name": "quick"}] * 60 + [{"name": "gpu"}] * 70)
        page = reader_of(server).open_live("#/?state=queued&name=gpu")
        page.get_by_role("button", name="Cancel all").click()
        page.get_by_role("dialog", name="Cancel 70 jobs?").get_by_role("button", name="Cancel 70").click()
        expect(page.get_by_text("70 jobs cancelled.")).to_be_visible()
        assert len(server.get("/api/jobs?state=queued")) == 60

    def test_j_and_k_go_through_the_jobs_of_the_list(self, night: Server, reader_of: ReaderOf) -> None:
        page = reader_of(night).open_live("#/?name=sh&before=5")
        expect(row_of(page, 4)).to_be_visible()
        page.keyboard.press("j")
        expect(row_of(page, 4).get_by_role("link")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="sh #4")).to_be_visible()
        page.keyboard.press("j")
        expect(page.get_by_role("dialog", name="sh #3")).to_contain_text("Success")
        page.keyboard.press("k")
        expect(page.get_by_role("dialog", name="sh #4")).to_be_visible()
        expect(page.get_by_role("button", name="Previous")).to_be_disabled()
        page.get_by_role("button", name="Next").click()
        expect(page.get_by_role("dialog", name="sh #3")).to_be_visible()


class TestDashboardTells:
    """What happens to a job, in a column and in its drawer."""

    def test_a_row_tells_what_is_happening(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=TOLD_JOBS)
        stage.worker(server)
        first, again, delayed, odd = (server.post(name) for name in ("third-time", "again", "quick", "odd-words"))
        later = server.post("quick", delay=7_100)
        for job in (first, delayed):
            server.ended(job)
        page = reader_of(server).open_live()
        expect(row_of(page, first).locator(".c-result")).to_have_text("at attempt 3")
        expect(row_of(page, again).locator(".c-result")).to_have_text(re.compile(r"^retry 1 of 3 in \d+ s$"))
        expect(row_of(page, delayed).locator(".c-result")).to_have_text("")
        expect(row_of(page, later).locator(".c-result")).to_have_text(re.compile(r"^in 1 h 5[78] m$"))
        drawer = open_job(page, odd)
        expect(drawer).to_contain_text("busybox")
        expect(drawer).to_contain_text("""sh -c 'echo "it'\\''s"' x y=1""")
        expect(drawer).to_contain_text("1 h 00 m")
        expect(drawer.get_by_role("table", name="Attempts")).to_be_hidden()
        expect(drawer.get_by_role("region", name="Log")).to_contain_text("it's")

    def test_a_pull_is_told_while_it_lasts(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=TOLD_JOBS)
        stage.docker.offer("slow:1", 60)
        stage.worker(server)
        job = server.post("pulls")
        page = reader_of(server).open_live()
        expect(row_of(page, job).locator(".c-result")).to_have_text("pulling slow:1")
        expect(open_job(page, job)).to_contain_text(re.compile(r"Pulling slow:1, \d+ s\."))

    def test_the_charts_have_a_past_and_name_what_waits_for_no_worker(self, night: Server, reader_of: ReaderOf) -> None:
        job = night.post("gpu")
        page = reader_of(night).open_live()
        expect(page.locator("#latency")).to_contain_text("gpu: no worker has the tag gpu")
        red = re.compile(r"M[\d.]+,(?!40)")  # not on the ground
        expect(page.locator("#throughput .bad")).to_have_attribute("d", red)
        night.http("DELETE", f"/api/jobs/{job}")
        expect(page.locator("#latency")).to_contain_text("Queue latency")

    def test_a_worker_that_went_is_shown_as_gone_with_what_it_held(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        worker = stage.worker(server, name="atlas-9")
        job = server.sh("sleep 60")
        page = reader_of(server).open_live()
        expect(row_of(page, job)).to_contain_text("Running")
        worker.kill()
        card = page.locator("#workers li.gone")
        expect(card).to_contain_text("gone, it held 1 job, ")
        expect(card.get_by_role("link", name=f"#{job}")).to_be_visible()
        expect(page.get_by_text("No worker is connected.")).to_be_visible()
        assert_accessible(page)

    def test_jobs_are_found_by_part_of_a_name_and_by_worker(self, night: Server, reader_of: ReaderOf) -> None:
        page = reader_of(night).open_live()
        titles = {"igh": "Jobs with “igh” in their name", "sh": "Jobs named sh", "atlas-1": "Jobs on atlas-1"}
        for text, title in titles.items():
            page.goto(page.url.split("#")[0])
            page.get_by_label("Go to a job").fill(text)
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", name=title)).to_be_visible()
            expect(page.locator("#list tbody tr").first).to_be_visible()
        held = hold_answer(page, "**/api/configs")
        page.goto(page.url.split("#")[0])
        page.get_by_label("Go to a job").fill("sh")
        page.keyboard.press("Enter")
        until(lambda: page.evaluate("true") and held)
        held[0][0].fulfill(response=held[0][1])
        expect(page.get_by_role("heading", name="Jobs named sh")).to_be_visible()
        page.goto(f"{page.url.split('#')[0]}#/?q=no-such-thing")
        page.get_by_role("link", name="Show all jobs").click()
        expect(page.locator("#list tbody tr").first).to_be_visible()

    def test_a_job_is_run_again_with_other_values(self, stage: Stage, reader_of: ReaderOf) -> None:
        jobs = """
- name: deploy
  image: busybox
  command: [sh, -c, 'echo "$STAGE $VERSION"']
  parameters: {STAGE: {pattern: staging|production, default: staging}, VERSION: {pattern: "v[0-9]+", required: true}}
"""
        server = stage.server("--hold", jobs=jobs)
        stage.worker(server)
        job = server.post("deploy", environment={"VERSION": "v7", "STAGE": "production"})
        server.ended(job)
        page = reader_of(server).open_live()
        open_job(page, job).get_by_role("button", name="Run with").click()
        dialog = page.get_by_role("dialog", name="Run deploy")
        expect(dialog.get_by_label("VERSION")).to_have_value("v7")
        expect(dialog.get_by_label("STAGE")).to_have_value("production")
        assert_accessible(page)
        dialog.get_by_label("STAGE").select_option("staging")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("dialog", name=f"deploy #{job + 1}")).to_contain_text("staging v7")
