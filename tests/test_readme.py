"""The README says what the programs do."""

import os
import re
import subprocess
import sys

import pytest

from jobworker import api as api_module
from jobworker import config
from tests.stage import ROOT, Stage

README = (ROOT / "README.md").read_text()


class TestReadme:
    """What the README shows is what happens."""

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
        assert [key for key in config.JOB_KEYS if f"`{key}`" not in README] == []

    def test_it_names_every_route(self) -> None:
        paths = {re.sub(r"\{\w+\}", "ID", route.path) for route in api_module.ROUTES}
        assert [path for path in paths if f"{path}`" not in README and f"{path}`," not in README] == []

    @pytest.mark.parametrize("program", ["server.py", "client.py"])
    def test_it_names_every_option(self, program: str) -> None:
        command = [sys.executable, str(ROOT / program), "-h"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        options = set(re.findall(r"--[a-z-]+", shown)) - {"--help", "--version", "--verbose"}
        assert [option for option in options if option not in README] == []


def transcript() -> list[tuple[str, str]]:
    """The README's commands, and what it says that they print."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = [step.partition("\n") for block in blocks for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(steps) > 10
    return [(command, shown) for command, _, shown in steps]


def anonymous(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text.strip())
