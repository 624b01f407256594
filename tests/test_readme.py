"""The README and docs/reference.md say what the programs do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobworker import api as api_module
from jobworker import config
from jobworker.metrics import metrics_text
from jobworker.past import Totals
from tests.stage import ROOT, Stage, meanwhile

README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "deploy/README.md", *sorted((ROOT / "docs").glob("*.md"))]


class TestReadme:
    """The README is a page long and names what is there."""

    def test_it_is_on_a_page(self) -> None:
        assert len(README.splitlines()) <= 150

    def test_it_names_every_file_of_the_code(self) -> None:
        files = {path.name for path in (ROOT / "jobworker").iterdir() if path.is_file()} - {"__init__.py"}
        files |= {path.name for path in ROOT.glob("*.py")}
        table = README.partition("## The files")[2].partition("\n## ")[0]
        assert [name for name in sorted(files) if f"{name}`" not in table] == []

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_a_link_leads_to_what_exists(self, page: Path) -> None:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


class TestReference:
    """What the README and the reference show is what happens; the reference leaves nothing out."""

    @meanwhile
    def test_its_transcript_is_what_happens(self, stage: Stage) -> None:
        server = stage.server(jobs=(ROOT / "jobs.yaml").read_text())
        stage.worker(server, name="box-1", PATH=os.environ["PATH"])
        for command, shown in transcript():
            curl = command.replace("localhost:8080", f"localhost:{server.port}").replace(
                "curl", "curl -s --noproxy '*'", 1
            )
            answer = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
            assert anonymous(answer) == anonymous(shown), command

    def test_it_names_every_key_of_jobs_yaml(self) -> None:
        assert [key for key in config.JOB_KEYS if f"`{key}`" not in REFERENCE] == []

    def test_it_names_every_route(self) -> None:
        paths = {re.sub(r"\{\w+\}", "ID", route.path) for route in api_module.ROUTES}
        assert [path for path in paths if f"{path}`" not in REFERENCE] == []

    def test_it_names_every_metric(self) -> None:
        text = metrics_text({"jobs": {}, "queue_latency": 0}, [], Totals(), {}, [])
        names = re.findall(r"^# TYPE jobworker_(\w+)", text, re.MULTILINE)
        assert [name for name in names if not re.search(rf"`{name}[{{`]", REFERENCE)] == []

    @pytest.mark.parametrize("program", ["server.py", "client.py"])
    def test_the_help_ends_with_an_example(self, program: str) -> None:
        command = [sys.executable, str(ROOT / program), "-h"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "JOBWORKER_TOKEN_FILE" in shown
        assert f"  python {program} " in shown.partition("\nexample:\n")[2]
        assert ": ever" not in shown

    @pytest.mark.parametrize("program", ["server.py", "client.py"])
    def test_it_names_every_option(self, program: str) -> None:
        command = [sys.executable, str(ROOT / program), "-h"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        options = set(re.findall(r"--[a-z-]+", shown)) - {"--help", "--version", "--verbose"}
        assert [option for option in options if option not in REFERENCE] == []


def transcript() -> list[tuple[str, str]]:
    """The commands of the README, then of the reference, each with what is shown of its output."""
    blocks = [block for page in (README, REFERENCE) for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL)]
    steps = [step.partition("\n") for block in blocks for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(blocks) == 2
    assert len(steps) > 10
    return [(command, shown) for command, _, shown in steps]


def anonymous(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text.strip())


def headings(page: Path) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
