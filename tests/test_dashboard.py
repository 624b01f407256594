"""The dashboard, in a real browser, against a real server with real workers: a class per thing it is for."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.pages import (
    LONGEST_TASK_MS,
    MARKUP,
    SITE_JOBS,
    ReaderOf,
    assert_accessible,
    hold_answer,
    in_every_look,
    is_at_end,
    needs_chromium,
    open_job,
    row_of,
    unfold,
)
from tests.stage import ROOT, Server, Stage, until

pytestmark = needs_chromium
pytest_plugins = ["tests.pages"]

LONG_LOG_LINES = 100_000
# Read by the page's own reader of events; `waits` has how long each key waited for the next frame, in ms.
THOUSAND_EVENTS_A_SECOND = """() => {
  window.waits = [];
  addEventListener("keydown", ({ timeStamp }) => {
    requestAnimationFrame(() => setTimeout(() => waits.push(performance.now() - timeStamp)));
  });
  const job = JSON.stringify({ ...list.jobs[0], id: 1e6 });
  setInterval(() => {
    for (let n = 0; n < 12; n += 1) takeEvent(`event: job\\ndata: ${job}`);
    for (let n = 0; n < 13; n += 1) takeEvent(`event: worker\\ndata: {"id": ${n}}`);
  }, 25);
}"""


def busier(worker: dict[str, Any]) -> dict[str, Any]:
    """A worker with other jobs."""
    worker["jobs"] = [job + 4 for job in worker["jobs"]]
    return worker


class TestDashboardAtAGlance:
    """What waits, runs and has ended, and who works, without a click."""

    @in_every_look
    def test_each_count_is_a_filter_with_an_address_of_its_own(self, page: Page, site: Server) -> None:
        failed = site.sh("exit 7")
        site.ended(failed)
        expect(row_of(page, failed)).to_contain_text("exit 7")
        failures = len(site.get("/api/jobs?state=failure"))
        page.get_by_role("link", name=f"{failures} Failure").click()
        expect(page.get_by_role("heading", name="Failed jobs")).to_be_visible()
        expect(page).to_have_url(re.compile(r"#/\?state=failure$"))
        expect(page.locator("#list tbody [data-state]:not([data-state=failure])")).to_have_count(0)
        page.reload()
        expect(page.get_by_role("heading", name="Failed jobs")).to_be_visible()
        expect(row_of(page, failed)).to_be_visible()

    def test_a_job_shows_up_and_changes_by_itself(self, page: Page, site: Server, tmp_path: Path) -> None:
        job = site.sh(f"until [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 3")
        expect(row_of(page, job)).to_contain_text("Running")
        (tmp_path / "go").touch()
        expect(row_of(page, job)).to_contain_text("Failure")
        expect(row_of(page, job)).to_contain_text("exit 3")
        expect(page.get_by_role("row").nth(1)).to_contain_text(f"#{job}")

    def test_charts_show_throughput_queue_latency_and_busy_slots(self, page: Page, site: Server) -> None:
        busy = site.sh("sleep 3")
        for _ in range(5):
            site.post("quick")
        expect(page.locator("#slots b")).to_have_text(re.compile(r"^[1-6] of 6$"))
        expect(page.locator("#throughput b")).not_to_have_text("0/s")
        expect(page.locator("#throughput .bars")).to_have_attribute("d", re.compile("h.76V"))
        expect(page.locator("#latency b")).to_have_text(re.compile("s$"))
        expect(page.locator("#slots .area")).to_have_attribute("d", re.compile("h1V40"))
        site.http("DELETE", f"/api/jobs/{busy}")

    @in_every_look
    def test_a_worker_is_a_card(self, page: Page, site: Server) -> None:
        job = site.sh("sleep 30")
        until(lambda: site.state(job) == "running")
        name = site.job(job)["worker"]
        card = unfold(page, "workers").get_by_role("listitem").filter(has_text=name)
        expect(card).to_contain_text(f"1 of {4 if name == 'atlas-1' else 2} busy")
        expect(card).to_contain_text(re.compile(r"connected (now|\d)"))
        expect(card.get_by_role("link", name=f"#{job}")).to_be_visible()
        expect(page.locator("#workers")).to_contain_text("storage")
        site.http("DELETE", f"/api/jobs/{job}")
        expect(card.get_by_role("link", name=f"#{job}")).to_have_count(0)

    def test_jobs_come_in_pages_newest_first(self, site: Server, reader_of: ReaderOf) -> None:
        body = [{"name": "quick"}] * 120
        jobs = [job["id"] for job in site.http("POST", "/api/jobs", body).json]
        for job in jobs:
            site.ended(job)
        page = reader_of(site).open_live("#/?name=quick")
        shown = page.locator("#list tbody tr .id")
        expect(shown.first).to_have_text(f"#{jobs[-1]}")
        assert [int(text[1:]) for text in shown.all_inner_texts()] == jobs[:-51:-1]
        page.get_by_role("button", name="Older").click()
        expect(shown.first).to_have_text(f"#{jobs[-51]}")
        page.reload()
        expect(shown.first).to_have_text(f"#{jobs[-51]}")
        page.get_by_role("link", name="Newest").click()
        expect(shown.first).to_have_text(f"#{jobs[-1]}")
        expect(page.get_by_role("link", name="Newest")).to_be_hidden()

    def test_a_waiting_job_says_what_for(self, page: Page, site: Server) -> None:
        job = site.post("gpu")
        expect(row_of(page, job)).to_contain_text("no worker has the tag gpu")
        site.http("DELETE", f"/api/jobs/{job}")
        expect(row_of(page, job)).to_contain_text("Cancelled")

    def test_a_page_of_200_workers_has_them_in_a_panel_that_scrolls(self, site: Server, reader_of: ReaderOf) -> None:
        worker = site.get("/api/workers?full=1&gone=1")[0]
        many = [{**worker, "id": 1000 + n, "name": f"node-{n:03d}"} for n in range(200)]
        reader = reader_of(site)
        reader.page.route("**/api/workers?full=1&gone=1", lambda route: route.fulfill(json=many))
        page = reader.open_live()
        expect(page.locator("#workers li")).to_have_count(200)
        assert page.locator("#workers ul").evaluate("list => list.clientHeight") < 600


class TestDashboardActs:
    """Run, watch, cancel, retry."""

    def run_dialog(self, page: Page, name: str) -> Locator:
        unfold(page, "configs").get_by_role("button", name=f"Run {name}").click()
        return page.get_by_role("dialog", name=f"Run {name}")

    @in_every_look
    def test_a_job_is_run_with_its_parameters(self, page: Page, site: Server) -> None:
        dialog = self.run_dialog(page, "backup")
        expect(dialog.get_by_label("KEEP")).to_have_value("14")
        dialog.get_by_label("DATABASE").fill("shop")
        dialog.get_by_role("button", name="Run", exact=True).click()
        drawer = page.get_by_role("dialog", name=re.compile(r"^backup #\d+$"))
        expect(drawer).to_contain_text("Success")
        expect(drawer.get_by_role("region", name="Log")).to_contain_text("shop 14")
        job = int(page.url.rpartition("/")[2])
        assert site.job(job)["environment"]["DATABASE"] == "shop"

    def test_a_parameter_that_is_missing_or_does_not_fit_is_not_sent(self, page: Page, site: Server) -> None:
        jobs = len(site.get("/api/jobs"))
        dialog = self.run_dialog(page, "backup")
        dialog.get_by_role("button", name="Run", exact=True).click()
        assert dialog.get_by_label("DATABASE").evaluate("input => input.validity.valueMissing")
        dialog.get_by_label("DATABASE").fill("Shop 1")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(dialog.get_by_label("DATABASE")).to_have_attribute("aria-invalid", "true")
        expect(dialog).to_contain_text("must match [a-z_-]+")
        assert len(site.get("/api/jobs")) == jobs

    def test_a_value_that_only_the_server_can_judge_is_sent(self, page: Page) -> None:
        """JavaScript's \\w is ASCII, and its {,9} no repeat."""
        dialog = self.run_dialog(page, "greet")
        dialog.get_by_label("WHO").fill("Zoë")
        dialog.get_by_label("SIZE").fill("7")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("dialog", name=re.compile(r"^greet #\d+$"))).to_contain_text("Success")

    def test_a_refusal_is_said_in_the_servers_words(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server(jobs=SITE_JOBS)
        reader = reader_of(server)
        reader.tolerates = "status of 500"
        dialog = self.run_dialog(reader.open_live(), "hello-world")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(dialog.get_by_role("alert")).to_contain_text("worker is not exist.")
        expect(dialog).to_be_visible()

    def test_an_answer_that_is_cut_is_not_told_in_the_browsers_words(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        page.route("**/api/configs", lambda route: route.fulfill(body="[{"), times=1)
        for _ in range(2):  # the second is read whole, while a toast of the first would still be there
            with page.expect_response("**/api/configs"):
                site.post("hello-world")
        assert page.locator("#toast p").count() == 0

    def test_a_lost_answer_does_not_run_a_job_twice(self, site: Server, reader_of: ReaderOf) -> None:
        reader = reader_of(site)
        reader.tolerates = "ERR_FAILED"
        page = reader.open_live()

        def lose_answer(route: Route) -> None:
            route.fetch()
            route.abort()

        page.route("**/api/jobs/hello-world", lose_answer, times=1)
        jobs = len(site.get("/api/jobs"))
        dialog = self.run_dialog(page, "hello-world")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(dialog.get_by_role("alert")).to_have_text("The server cannot be reached.")
        dialog.get_by_role("button", name="Run", exact=True).click()
        expect(dialog).to_be_hidden()
        assert len(site.get("/api/jobs")) == jobs + 1

    @in_every_look
    def test_a_running_jobs_log_is_followed(self, page: Page, site: Server, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        job = site.sh(f"cat {tmp_path}/fifo")
        drawer = open_job(page, job)
        log = drawer.get_by_role("region", name="Log")
        with (tmp_path / "fifo").open("r+b", buffering=0) as fifo:
            for text in ("line 1\n", "line 2\nline 3\n", "unended", "\nthe end\n"):
                fifo.write(text.encode())
                expect(log).to_contain_text(text.strip())
        expect(drawer).to_contain_text("Success")
        expect(drawer).to_contain_text("5 lines")

    def test_a_log_is_shown_as_a_terminal_would_leave_it(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh(r"printf '\033[31mred\033[0m\n10%%\r50%%\r100%%\nbell\007\n'")
        site.ended(job)
        log = open_job(reader_of(site).open(), job).get_by_role("region", name="Log")
        expect(log).to_have_text(re.compile(r"^\s*red\s+100%\s+bell\s*$"))

    def test_a_log_keeps_a_terminals_colours(self, site: Server, reader_of: ReaderOf) -> None:
        colours = r"\033[31mred\n<b>still\033[39m not\n\033[1;92mbold\033[0m \033[38;5;200;34mblue\033[m \033[2Jplain\n"
        job = site.sh(rf"printf '{colours}txt.\342\200\256exe\n'")
        site.ended(job)
        log = open_job(reader_of(site).open(), job).get_by_role("region", name="Log")
        expect(log).to_have_text(re.compile(r"^\s*red\s+<b>still not\s+bold blue plain\s+txt.<U\+202E>exe\s*$"))
        looks = "spans => spans.map((span) => [span.textContent, span.style.color.split('--')[1], span.className])"
        assert log.locator("span").evaluate_all(looks) == [
            ["red", "failure)", ""],
            ["<b>still", "failure)", ""],
            ["bold", "success) 75%, var(", "bold"],
            ["blue", "accent)", ""],
        ]

    def test_a_log_that_was_cut_says_so_at_its_top(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh("seq 300000")
        site.ended(job)
        drawer = open_job(reader_of(site).open(), job)
        expect(drawer).to_contain_text(re.compile(r"the last 5,000 lines; \d{3} KiB cut out of its middle"))

    @pytest.mark.alone
    def test_a_long_log_stays_quick_and_can_be_searched(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh(f"seq {LONG_LOG_LINES}")
        site.ended(job)
        page = reader_of(site).open()
        drawer = open_job(page, job)
        log = drawer.get_by_role("region", name="Log")
        expect(log).to_contain_text(f"\n{LONG_LOG_LINES}")
        expect(drawer).to_contain_text("the last 5,000 lines")
        drawer.get_by_label("Show only the log's lines").fill("77777")
        expect(drawer).to_contain_text("0 of the last 5,000 lines")
        drawer.get_by_label("Show only the log's lines").fill("")
        page.evaluate(LONGEST_TASK_MS)
        drawer.get_by_role("button", name="Show all").click()
        expect(drawer).to_contain_text(f"{LONG_LOG_LINES:,} lines")
        assert log.evaluate("view => view.querySelectorAll('*').length") < 1000
        drawer.get_by_label("Show only the log's lines").fill("77777")
        expect(drawer).to_contain_text(f"1 of {LONG_LOG_LINES:,} lines")
        expect(log).to_have_text("77777")
        assert page.evaluate("window.longest") < 1000

    def test_following_ends_by_scrolling_up_and_begins_at_the_end(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh("seq 300; while sleep 0.2; do echo more; done")
        page = reader_of(site).open()
        drawer = open_job(page, job)
        log, follow = drawer.get_by_role("region", name="Log"), drawer.get_by_label("Follow")
        expect(log).to_contain_text("more")
        until(lambda: is_at_end(log))
        log.hover()
        page.mouse.wheel(0, -500)
        expect(follow).not_to_be_checked()
        follow.check()
        until(lambda: is_at_end(log))
        site.http("DELETE", f"/api/jobs/{job}")
        expect(drawer).to_contain_text("Cancelled")

    def test_following_stays_at_the_end_when_the_log_has_less_room(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh("seq 300; sleep 60")
        page = reader_of(site).open()
        log = open_job(page, job).get_by_role("region", name="Log")
        expect(log).to_contain_text("300")
        until(lambda: is_at_end(log))
        before = log.evaluate("view => view.clientHeight")
        page.set_viewport_size({"width": 1280, "height": 650})
        until(lambda: log.evaluate("view => view.clientHeight") < before - 40)
        until(lambda: is_at_end(log))
        site.http("DELETE", f"/api/jobs/{job}")

    def test_a_log_followed_for_long_lets_its_oldest_lines_go(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh("seq 70000; echo the end; sleep 60")
        drawer = open_job(reader_of(site).open(), job)
        log = drawer.get_by_role("region", name="Log")
        drawer.get_by_role("button", name="Show all").click()
        expect(log).to_contain_text("the end")
        expect(drawer).to_contain_text(re.compile(r"the last 50,\d{3} lines; (19|20),\d{3} older ones were let go"))
        text = log.evaluate("view => view.textContent.trim().split('\\n')")
        assert 50_000 <= len(text) <= 50_501
        assert text[-2] == "70000"
        site.http("DELETE", f"/api/jobs/{job}")

    def test_each_attempt_has_its_log(self, page: Page, site: Server) -> None:
        job = site.post("twice")
        site.ended(job)
        drawer = open_job(page, job)
        log = drawer.get_by_role("region", name="Log")
        expect(log).to_contain_text("this is attempt 2")
        expect(drawer.get_by_role("table", name="Attempts").get_by_role("row")).to_have_count(2)
        drawer.get_by_role("button", name="Show log").click()
        expect(log).to_contain_text("this is attempt 1")

    @in_every_look
    def test_a_cancel_is_confirmed_first(self, page: Page, site: Server) -> None:
        job = site.sh("sleep 60")
        drawer = open_job(page, job)
        expect(drawer).to_contain_text("Running")
        drawer.get_by_role("button", name="Cancel").click()
        question = page.get_by_role("dialog", name=f"Cancel sh #{job}?")
        question.get_by_role("button", name="Leave it").click()
        assert site.state(job) == "running"
        drawer.get_by_role("button", name="Cancel").click()
        question.get_by_role("button", name="Cancel the job").click()
        expect(drawer).to_contain_text("Cancelled")
        assert site.ended(job)["state"] == "cancelled"

    def test_a_retry_is_confirmed_and_leads_to_the_new_job(self, page: Page, site: Server) -> None:
        job = site.sh("exit 3")
        site.ended(job)
        open_job(page, job).get_by_role("button", name="Retry").click()
        page.get_by_role("dialog", name="Run sh again?").get_by_role("button", name="Retry").click()
        expect(page).not_to_have_url(re.compile(rf"#/jobs/{job}$"))
        new = int(page.url.rpartition("/")[2])
        expect(page.get_by_role("dialog", name=f"sh #{new}")).to_contain_text("It exited with code 3")
        assert site.job(new)["environment"] == site.job(job)["environment"]

    def test_a_log_can_be_had_as_a_file(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.sh("echo kept")
        site.ended(job)
        page = reader_of(site).open()
        drawer = open_job(page, job)
        with page.expect_download() as download:
            drawer.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == f"sh-{job}.log"
        assert download.value.path().read_text() == "kept\n"


class TestDashboardManners:
    """What people expect of any page."""

    @in_every_look
    def test_axe_finds_nothing_in_the_list(self, page: Page) -> None:
        unfold(page, "configs")
        unfold(page, "workers")
        expect(page.get_by_role("row").nth(1)).to_be_visible()
        assert_accessible(page)

    def test_no_states_name_is_cut_off_on_a_page_of_320_pixels(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site, 320).open_live()
        wider = "nodes => nodes.filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.textContent)"
        assert page.locator("#states [data-key]").count() == 7
        assert page.locator("#states a, #charts figcaption").evaluate_all(wider) == []

    @in_every_look
    def test_axe_finds_nothing_in_a_job(self, page: Page, site: Server) -> None:
        job = site.post("twice")
        site.ended(job)
        drawer = open_job(page, job)
        expect(drawer.get_by_role("region", name="Log")).to_contain_text("attempt 2")
        until(lambda: page.evaluate("document.getAnimations().length") == 0)
        assert_accessible(page)

    @in_every_look
    def test_axe_finds_nothing_in_the_dialogs(self, page: Page) -> None:
        unfold(page, "configs").get_by_role("button", name="Run backup").click()
        page.get_by_label("DATABASE").fill("Shop 1")
        assert_accessible(page)

    def test_all_can_be_done_by_keyboard(self, site: Server, reader_of: ReaderOf) -> None:
        first, second = site.post("quick"), site.post("quick")
        site.ended(second)
        page = reader_of(site).open_live()
        expect(row_of(page, second)).to_be_visible()
        page.keyboard.press("ArrowDown")
        expect(page.locator("tbody tr").first.get_by_role("link")).to_be_focused()
        page.keyboard.press("/")
        expect(page.get_by_label("Go to a job")).to_be_focused()
        page.keyboard.type(str(first))
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name=f"quick #{first}")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        row_of(page, second).get_by_role("link").focus()
        page.keyboard.press("ArrowDown")
        expect(row_of(page, first).get_by_role("link")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name=f"quick #{first}")).to_be_visible()
        page.keyboard.press("Escape")
        expect(row_of(page, first).get_by_role("link")).to_be_focused()
        expect(page).to_have_url(re.compile(r"#/$|/$"))

    def test_focus_is_always_seen(self, page: Page) -> None:
        for _ in range(12):
            page.keyboard.press("Tab")
            seen = "node => ['', '::after'].some((part) => getComputedStyle(node, part).outlineStyle !== 'none')"
            assert page.locator(":focus").evaluate(seen)

    @in_every_look
    def test_the_jobs_stay_a_table_for_screen_readers(self, page: Page) -> None:
        table = page.get_by_role("table", name="Jobs")
        expect(table.get_by_role("row").nth(1)).to_be_visible()
        assert table.get_by_role("row").last.get_by_role("cell").count() == 6
        for landmark in ("banner", "main", "contentinfo"):
            expect(page.get_by_role(landmark)).to_have_count(1)

    def test_times_are_in_the_readers_zone_and_exact_on_hover(self, site: Server, reader_of: ReaderOf) -> None:
        job = site.post("quick")
        created = site.ended(job)["created_at"]
        page = reader_of(site, timezone_id="Asia/Tokyo", locale="en-GB").open()
        time = row_of(page, job).locator("time")
        expect(time).to_have_attribute("datetime", created)
        hour = (int(created[11:13]) + 9) % 24
        expect(time).to_have_attribute("title", re.compile(rf"{hour:02d}:{created[14:19]} (GMT\+9|JST)$"))

    def test_who_wants_no_motion_gets_none(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site, reduced_motion="reduce").open_live()
        row = page.get_by_role("row").nth(1)
        row.hover()
        row.click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.evaluate("document.getAnimations().length") == 0

    def test_a_new_reader_is_told_the_next_command(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        for width in (375, 1280):
            page = reader_of(server, width).open_live()
            expect(page.get_by_text(f"python client.py 127.0.0.1:{server.port}/runner")).to_be_visible()
            expect(page.get_by_text(f"curl -XPOST 127.0.0.1:{server.port}/api/jobs/hello-world")).to_be_visible()
            assert_accessible(page)
        job = server.post("hello-world")
        expect(row_of(page, job)).to_contain_text("no worker is connected")
        stage.worker(server)
        expect(row_of(page, job)).to_contain_text("Success")
        expect(page.get_by_text("No worker is connected.")).to_be_hidden()

    def test_a_token_is_asked_for_and_kept_for_the_tab(self, stage: Stage, reader_of: ReaderOf) -> None:
        tokens = stage.folder / "tokens"
        tokens.write_text("api s3cret-0123456789\nworker 0ther-0123456789\n")
        tokens.chmod(0o600)
        server = stage.server("--hold", "--token-file", str(tokens), jobs=SITE_JOBS)
        for width, scheme in ((375, "dark"), (1280, "light")):
            reader = reader_of(server, width, scheme)
            reader.tolerates = "status of 401"
            page = reader.open()
            dialog = page.get_by_role("dialog", name="This server asks for a token")
            dialog.get_by_label("Token").fill("wrong")
            assert_accessible(page)
            page.keyboard.press("Enter")
            expect(dialog.get_by_role("alert")).to_have_text("The server does not know that token.")
            dialog.get_by_label("Token").fill("api s3cret-0123456789")  # the line as it is in the file
            page.keyboard.press("Enter")
            expect(page.get_by_text("Live", exact=True)).to_be_visible()
            expect(page.get_by_text("python client.py --token-file FILE 127.0.0.1")).to_have_count(1)
            page.reload()
            expect(page.get_by_text("Live", exact=True)).to_be_visible()
            assert page.evaluate("sessionStorage.length") == 1
            assert all("s3cret-0123456789" not in request.url for request in reader.requests)

    def test_who_has_no_token_may_leave_the_prompt_and_come_back(self, stage: Stage, reader_of: ReaderOf) -> None:
        tokens = stage.folder / "tokens"
        tokens.write_text("api s3cret-0123456789\nworker 0ther-0123456789\n")
        tokens.chmod(0o600)
        reader = reader_of(stage.server("--token-file", str(tokens)))
        reader.tolerates = "status of 401"
        page = reader.open()
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("A token is needed")).to_be_visible()
        page.get_by_role("button", name="Enter it").click()
        expect(page.get_by_role("dialog")).to_be_visible()

    def test_a_message_lies_above_a_dialog(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        page.get_by_role("button", name="Run backup").click()
        page.evaluate("say('a message')")
        above = "node => Boolean(node.closest(':popover-open')) && node.checkVisibility()"
        assert page.get_by_text("a message").evaluate(above)

    def test_a_count_of_workers_does_not_wrap(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        page.evaluate("takeStats({ ...stats, workers: 1300, slots: 130000, busy: 128000 })")
        expect(page.get_by_role("heading", name="1,300 workers")).to_be_visible()
        assert page.locator("#workers h2").evaluate("node => node.clientHeight") < 24

    def test_a_job_that_is_not_there_is_said_to_be_so(self, site: Server, reader_of: ReaderOf) -> None:
        reader = reader_of(site)
        reader.tolerates = "status of 404"
        page = reader.open("#/jobs/999999")
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("999999")
        page.get_by_role("button", name="Close").click()
        expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.fixture(scope="class")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    stage = Stage(tmp_path_factory.mktemp("marked"))
    server = stage.server(jobs=SITE_JOBS)
    stage.worker(server, "--tag", "<u>tag</u>", name="<i>worker</i>")
    job = server.post("%3Cimg%20src=x%20onerror=alert(1)%3E", environment={"WHO": "<b>bold</b>"})
    server.ended(job)
    yield server, job
    stage.close()


class TestDashboardText:
    """What a job or a person wrote is text."""

    @in_every_look
    def test_markup_is_shown_as_it_was_written(
        self, marked: tuple[Server, int], reader_of: ReaderOf, look: tuple[int, str]
    ) -> None:
        server, job = marked
        page = reader_of(server, *look).open_live()
        expect(row_of(page, job)).to_contain_text(MARKUP)
        expect(unfold(page, "workers")).to_contain_text("<i>worker</i>")
        expect(unfold(page, "workers")).to_contain_text("<u>tag</u>")
        unfold(page, "configs").get_by_role("button", name=f"Run {MARKUP}").click()
        expect(page.get_by_role("dialog").get_by_label("WHO")).to_have_value("<b>nobody</b>")
        page.keyboard.press("Escape")
        drawer = open_job(page, job)
        expect(drawer.get_by_role("heading", name=MARKUP)).to_be_visible()
        expect(drawer.get_by_role("region", name="Log")).to_contain_text("<script>alert(2)</script>")
        expect(drawer).to_contain_text("<b>bold</b>")
        assert page.locator("img, script:not(body > script), u, [onerror]").count() == 0

    def test_the_page_has_one_style_one_script_and_no_way_to_make_markup(self) -> None:
        source = (ROOT / "jobworker" / "dashboard.html").read_text()
        assert source.count("<style") == source.count("<script") == 1
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
        assert not re.search(r"<[^>]*\s(style|on\w+)=", source.partition("<script>")[0])
        assert not re.search(r"(src|href|url\()=?[\"']?(https?:)?//", source)

    def test_the_policy_forbids_what_the_page_does_not_need(self, site: Server) -> None:
        policy = site.http("GET", "/").headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy


class TestDashboardLive:
    """It is live, says when it is not, catches up, and stays quick."""

    @in_every_look
    def test_it_says_since_when_it_is_not_live_and_catches_up(
        self, stage: Stage, reader_of: ReaderOf, look: tuple[int, str]
    ) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        reader = reader_of(server, *look)
        reader.tolerates = "ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION_RESET"
        page = reader.open_live()
        first = server.post("hello-world")
        expect(row_of(page, first)).to_contain_text("Queued")
        server.kill()
        expect(page.get_by_text(re.compile(r"^Not live since \d+:\d\d"))).to_be_visible()
        server.start()
        second = server.post("hello-world")
        stage.worker(server)
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        expect(row_of(page, second)).to_contain_text("Success")

    @pytest.mark.parametrize(
        ("hash_", "asked", "place"),
        [
            ("#/jobs/1", "/api/jobs/1$", "#job .state"),
            ("#/?name=sh", r"/api/jobs\?.*name=sh", "#list .state"),
            ("#/?before=2", r"/api/jobs\?.*before=2(&|$)", "#list .state"),
        ],
    )
    def test_an_event_that_overtakes_an_answer_is_not_lost(
        self, hash_: str, asked: str, place: str, stage: Stage, reader_of: ReaderOf
    ) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        job = server.sh("true")
        server.post("gpu")
        page = reader_of(server).open_live("#/?name=gpu")
        held = hold_answer(page, re.compile(asked))
        page.evaluate("hash => { location.hash = hash; }", hash_)
        until(lambda: page.evaluate("true") and held)  # lets playwright hand the request over
        server.http("DELETE", f"/api/jobs/{job}")
        expect(page.get_by_role("link", name="1 Cancelled")).to_be_visible()
        [(route, answer)] = held
        assert answer.text().count('"queued"') == 1
        route.fulfill(response=answer)
        expect(page.locator(place)).to_have_text("Cancelled")

    def test_a_row_under_the_pointer_goes_on_telling_how_its_job_stands(
        self, site: Server, reader_of: ReaderOf
    ) -> None:
        job = site.sh("sleep 60")
        page = reader_of(site).open_live("#/?state=running")
        row_of(page, job).hover()
        site.http("DELETE", f"/api/jobs/{job}")
        expect(row_of(page, job)).to_contain_text("Cancelled")
        page.get_by_role("heading", name="Running jobs").hover()
        expect(row_of(page, job)).to_have_count(0)

    def test_rows_of_another_filter_do_not_stand_under_its_heading(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live("#/?name=hello-world")
        expect(row_of(page, 1)).to_be_visible()
        held = hold_answer(page, re.compile(r"/api/jobs\?.*state=failure"))
        page.evaluate("location.hash = '#/?state=failure'")
        expect(page.get_by_role("heading", name="Failed jobs")).to_be_visible()
        expect(row_of(page, 1)).to_be_hidden()
        until(lambda: page.evaluate("true") and held)
        held[0][0].fulfill(response=held[0][1])
        expect(page.locator("#list tbody tr").first).to_be_visible()

    def test_an_old_requests_error_does_not_cover_a_newer_answer(self, site: Server, reader_of: ReaderOf) -> None:
        reader = reader_of(site)
        reader.tolerates = "status of 503"
        page = reader.open_live()
        held = hold_answer(page, re.compile(r"/api/jobs\?.*name=sh"))
        page.evaluate("location.hash = '#/?name=sh'")
        until(lambda: page.evaluate("true") and held)
        page.evaluate("location.hash = '#/?name=hello-world'")
        expect(row_of(page, 1)).to_be_visible()
        held[0][0].fulfill(status=503, json={"detail": "of long ago"})
        page.evaluate("() => new Promise((done) => setTimeout(done, 100))")
        expect(page.get_by_text("of long ago")).to_have_count(0)

    def test_an_idle_page_asks_nothing_and_a_busy_one_twice_a_second(self, site: Server, reader_of: ReaderOf) -> None:
        reader = reader_of(site)
        page = reader.open_live()
        began = page.evaluate("performance.now()")
        before = len(reader.requests)
        for _ in range(40):
            site.ended(site.post("quick"))
        seconds = (page.evaluate("performance.now()") - began) / 1000
        asked = [request for request in reader.requests[before:] if "limit=50" in request.url]
        assert 1 < len(asked) <= 2 * seconds + 3

    def test_a_worker_that_goes_while_the_page_is_read_is_gone(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server("--hold", jobs=SITE_JOBS)
        worker = stage.worker(server, name="atlas-1")
        reader = reader_of(server)
        held = hold_answer(reader.page, "**/api/workers?full=1&gone=1")
        page = reader.open_live()
        expect(page.locator("#workers h2")).to_have_text("1 worker")
        until(lambda: page.evaluate("true") and held)
        worker.stop()
        expect(page.locator("#workers h2")).to_have_text("Workers")
        [(route, answer)] = held
        assert "atlas-1" in answer.text()
        route.fulfill(response=answer)
        expect(page.locator("#workers .empty")).to_be_visible()
        expect(page.locator("#workers li:not(.gone)")).to_have_count(0)

    def test_it_comes_back_by_itself(self, stage: Stage, reader_of: ReaderOf) -> None:
        server = stage.server(jobs=SITE_JOBS)
        reader = reader_of(server)
        reader.tolerates = "ERR_"
        page = reader.open_live()
        server.kill()
        expect(page.get_by_text("Not live since")).to_be_visible()
        server.start()
        expect(page.get_by_text("Live", exact=True)).to_be_visible()

    def test_a_page_that_is_not_looked_at_holds_no_connection(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        hide = (
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }"
        )
        with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/events")):
            page.evaluate(hide, True)
        job = site.post("quick")
        site.ended(job)
        with page.expect_request("**/api/events"):
            page.evaluate(hide, False)
        expect(row_of(page, job)).to_contain_text("Success")

    @pytest.mark.alone
    def test_a_burst_of_jobs_leaves_a_page_of_rows_and_a_quick_page(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        page.evaluate(LONGEST_TASK_MS)
        jobs = [job["id"] for job in site.http("POST", "/api/jobs", [{"name": "gpu"}] * 5000).json]
        expect(row_of(page, jobs[-1])).to_be_visible()
        assert page.locator("#list tbody tr").count() == 50
        assert page.evaluate("window.longest") < 500

    @pytest.mark.alone
    def test_a_key_is_answered_at_once_while_much_happens(self, site: Server, reader_of: ReaderOf) -> None:
        worker = site.get("/api/workers?full=1&gone=1")[0]
        jobs = range(1000)
        many = [{**worker, "id": 1000 + n, "name": f"node-{n:03d}", "jobs": [*jobs[n : n + 4]]} for n in range(300)]
        reader = reader_of(site)
        reader.page.route("**/api/workers?full=1&gone=1", lambda route: route.fulfill(json=[*map(busier, many)]))
        page = reader.open_live()
        expect(page.locator("#workers li")).to_have_count(300)
        page.evaluate(THOUSAND_EVENTS_A_SECOND)
        page.keyboard.press("ArrowDown")
        for _ in range(30):
            page.keyboard.press("ArrowDown", delay=30)
        waits = page.evaluate("window.waits")
        assert len(waits) > 20
        assert statistics.median(waits) < 100

    def test_a_line_separator_in_an_event_is_read(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        again: list[str] = []
        page.on("request", lambda request: again.append(request.url) if request.url.endswith("/api/events") else None)
        job = site.post(quote(MARKUP), environment={"WHO": "a\u2028b"})
        expect(row_of(page, job)).to_contain_text("Success")
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        assert again == []

    def test_no_row_moves_under_the_pointer(self, site: Server, reader_of: ReaderOf) -> None:
        page = reader_of(site).open_live()
        page.get_by_role("row").nth(3).hover()
        under = page.get_by_role("row").nth(3).inner_text().split("\n")[0]
        job = site.post("quick")
        page.get_by_role("button", name="Show new jobs").wait_for()
        expect(page.get_by_role("row").nth(3)).to_contain_text(under)
        page.get_by_role("button", name="Show new jobs").click()
        expect(row_of(page, job)).to_be_visible()
