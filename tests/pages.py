"""The stage of the dashboard's tests: a real Chromium, someone who looks at the page, and a server with two workers.

Needs Chromium at CHROMIUM (Debian: `apt-get install chromium`); playwright drives it, axe-playwright-python brings axe.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    APIResponse,
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

from tests.stage import Server, Stage

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "chromium"
CHROMIUM_SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
in_every_look = pytest.mark.parametrize(
    "look",
    [pytest.param((width, scheme), id=f"{width}-{scheme}") for width in (375, 1280) for scheme in ("light", "dark")],
)
LONGEST_TASK_MS = """() => {
  window.longest = 0;
  const longer = (task) => { window.longest = Math.max(window.longest, task.duration); };
  const note = (list) => list.getEntries().forEach(longer);
  new PerformanceObserver(note).observe({ entryTypes: ["longtask"] });
}"""
TOO_WIDE = """() => [...document.querySelectorAll("html, main :not(thead *), body > header *, footer *")]
  .filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > innerWidth + 1)
  .map((node) => node.outerHTML.slice(0, 80))"""
MARKUP = "<img src=x onerror=alert(1)>"

SITE_JOBS = f"""
- name: hello-world
  image: hello-world
- name: sh
  image: busybox
  command: [sh, -c, 'eval "$SCRIPT"']
  parameters: {{SCRIPT: {{required: true}}}}
  stop_grace_period: 1s
- name: quick
  image: busybox
  command: "true"
- name: backup
  image: busybox
  command: [sh, -c, 'echo "$DATABASE $KEEP"']
  parameters: {{DATABASE: {{required: true, pattern: "[a-z_-]+"}}, KEEP: {{default: "14"}}}}
- name: twice
  image: busybox
  command: [sh, -c, 'echo "this is attempt $JOBWORKER_ATTEMPT"; [ "$JOBWORKER_ATTEMPT" = 2 ]']
  retries: 1
  retry_delay: 10ms
- name: gpu
  image: busybox
  command: "true"
  tags: [gpu]
- name: greet
  image: busybox
  command: "true"
  parameters: {{WHO: {{pattern: '[\\w .-]{{1,40}}'}}, SIZE: {{pattern: '[0-9]{{,4}}'}}}}
- name: '{MARKUP}'
  image: busybox
  command: [sh, -c, 'echo "$WHO"; echo "<script>alert(2)</script>"']
  parameters: {{WHO: {{default: "<b>nobody</b>"}}}}
"""

needs_chromium = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here")


class Reader:
    """Someone who looks at the page. At the end: no error on the console, no request to elsewhere, nothing too wide."""

    def __init__(self, browser: Browser, server: Server, width: int, scheme: Any, **context: Any) -> None:
        self.origin = f"http://127.0.0.1:{server.port}"
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **context)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[Request] = []
        self.tolerates = "(?!)"
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108 playwright marks it

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, hash_: str = "") -> Page:
        self.page.goto(f"{self.origin}/{hash_}")
        return self.page

    def open_live(self, hash_: str = "") -> Page:
        expect(self.open(hash_).get_by_text("Live", exact=True)).to_be_visible()
        return self.page

    def close(self) -> None:
        too_wide = self.page.evaluate(TOO_WIDE)
        self.context.close()
        assert [error for error in self.errors if not re.search(self.tolerates, error)] == []
        assert [request.url for request in self.requests if not request.url.startswith((self.origin, "data:"))] == []
        assert too_wide == []


ReaderOf = Callable[..., Reader]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def reader_of(browser: Browser) -> Iterator[ReaderOf]:
    readers: list[Reader] = []

    def come(server: Server, width: int = 1280, scheme: str = "light", **context: Any) -> Reader:
        readers.append(Reader(browser, server, width, scheme, **context))
        return readers[-1]

    yield come
    for reader in readers:
        reader.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two workers."""
    stage = Stage(tmp_path_factory.mktemp("site"))
    server = stage.server("--hold", jobs=SITE_JOBS)
    stage.worker(server, "--slots", "4", "--tag", "storage", name="atlas-1")
    stage.worker(server, "--slots", "2", name="borealis-1")
    server.ended(server.post("hello-world"))
    server.ended(server.sh("exit 3"))
    yield server
    stage.close()


@pytest.fixture
def look() -> tuple[int, str]:
    """A width in pixels and a colour scheme; `in_every_look` gives a test all."""
    return 1280, "light"


@pytest.fixture
def page(site: Server, reader_of: ReaderOf, look: tuple[int, str]) -> Page:
    """The site's page, live."""
    return reader_of(site, *look).open_live()


def row_of(page: Page, job: int) -> Locator:
    return page.get_by_role("row").filter(has=page.locator(f'a[href="#/jobs/{job}"]'))


def unfold(page: Page, panel: str) -> Locator:
    """A panel's content, which a narrow page shows at a tap."""
    found = page.locator(f"#{panel}")
    if found.get_attribute("open") is None:
        found.locator("summary").click()
    return found


def open_job(page: Page, job: int) -> Locator:
    page.goto(f"{page.url.split('#')[0]}#/jobs/{job}")
    dialog = page.get_by_role("dialog", name=re.compile(rf"#{job}$"))
    expect(dialog.locator("#history")).to_be_visible()
    return dialog


def is_at_end(log: Locator) -> bool:
    return int(log.evaluate("view => view.scrollHeight - view.scrollTop - view.clientHeight")) < 40


def hold_answer(page: Page, url: str | re.Pattern[str]) -> list[tuple[Route, APIResponse]]:
    """Have the next request for a URL wait, its answer fetched already; it comes into the list that this gives."""
    held: list[tuple[Route, APIResponse]] = []
    page.route(url, lambda route: held.append((route, route.fetch())), times=1)
    return held


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()
