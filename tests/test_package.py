"""pyproject.toml: the wheel that is built from this folder, and its two commands in an environment of their own."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import pytest

from jobworker import VERSION
from tests.stage import JOBS, ROOT, Program, Server, Stage, Worker, until

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = {"server.py": "jobworker-server", "client.py": "jobworker-worker"}
FOLDERS = (".", "jobworker", "tests", "checks", "docs", "deploy")
TEXT = {"", ".py", ".toml", ".txt", ".json", ".html", ".yaml", ".md", ".service"}

AnyProgram = TypeVar("AnyProgram", bound=Program)


def test_coverage_looks_at_all_that_runs() -> None:
    measured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["run"]
    programs = {path.stem for path in ROOT.glob("*.py")} - {"test_jobworker"}
    assert set(measured["source_pkgs"]) == programs | {"jobworker"}
    assert not {"include", "omit"} & measured.keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in a new environment, which holds the wheel, what it asks for, and nothing else."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    [packages] = home.glob("lib/python*/site-packages")
    for requirement in PROJECT["dependencies"]:
        link_distribution(re.split("[<>=]", requirement)[0], packages)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python")]
    run(*pip, "install", "--quiet", "--no-index", "--disable-pip-version-check", str(wheel), cwd=home)
    return home / "bin"


def run(*command: str, cwd: Path) -> None:
    ended = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def link_distribution(name: str, packages: Path) -> None:
    """Have an installed distribution in another environment, too; there pip finds it as if it had been installed."""
    distribution = importlib.metadata.distribution(name)
    tops = {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        (packages / top).symlink_to(Path(str(distribution.locate_file(top))))


def start(stage: Stage, program: AnyProgram, commands: Path) -> AnyProgram:
    """Start a program of the stage by its installed command."""
    program.command[:2] = [str(commands / PROGRAMS[Path(program.command[1]).name])]
    stage.programs.append(program)
    program.start()
    return program


def start_server(stage: Stage, commands: Path) -> Server:
    stage.jobs.write_text(JOBS)
    return start(stage, Server(stage.folder, "server.py", "-p", "0", str(stage.jobs)), commands)


def start_worker(stage: Stage, server: Server, commands: Path) -> Worker:
    docker = str(stage.docker.folder / "docker")
    arguments = ("--name", "worker", "--docker", docker, f"127.0.0.1:{server.port}")
    return start(stage, Worker(stage.folder, "client.py", *arguments), commands)


class TestWheel:
    """It holds what runs, and the facts about it stand once or agree."""

    def test_it_holds_what_runs_and_nothing_else(self, wheel: Path) -> None:
        about = f"jobworker-{VERSION}.dist-info"
        package = {f"jobworker/{path.name}" for path in (ROOT / "jobworker").iterdir() if path.is_file()}
        assert package >= {"jobworker/dashboard.html", "jobworker/openapi.json"}
        names = zipfile.ZipFile(wheel).namelist()
        assert sorted(names) == sorted(
            package
            | {"client.py", "protocol.py", "server.py"}
            | {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
        )

    def test_its_dependencies_are_those_of_all_other_ways_to_start_it(self) -> None:
        dependencies = PROJECT["dependencies"]
        assert (ROOT / "requirements.txt").read_text().splitlines() == dependencies
        server, client = script_head("server.py"), script_head("client.py")
        assert server["dependencies"] == dependencies
        assert client["dependencies"] == [each for each in dependencies if not each.startswith("pyyaml")]
        assert server["requires-python"] == client["requires-python"] == PROJECT["requires-python"]

    def test_the_version_stands_once(self) -> None:
        files = [path for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.suffix in TEXT]
        texts = {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in files if path.is_file()}
        assert [name for name, text in texts.items() if f'"{VERSION}"' in text] == ["jobworker/__init__.py"]

    def test_it_is_the_version_that_was_released_last(self) -> None:
        released = re.findall(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert released[0] == VERSION


def script_head(program: str) -> dict[str, Any]:
    """The metadata that `uv run` reads from a program (PEP 723)."""
    [head] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / program).read_text(), re.MULTILINE)
    return tomllib.loads(re.sub("^# ?", "", head, flags=re.MULTILINE))


class TestCommands:
    """The installed commands do what `python server.py` and `python client.py` do."""

    def test_they_run_a_job_and_serve_the_page(self, commands: Path, stage: Stage) -> None:
        server = start_server(stage, commands)
        worker = start_worker(stage, server, commands)
        job = server.sh("echo from a wheel")
        assert server.get(f"/api/jobs/{job}?wait=10")["state"] == "success"
        assert server.http("GET", f"/api/jobs/{job}/log").body == b"from a wheel\n"
        assert server.http("GET", "/").body == (ROOT / "jobworker/dashboard.html").read_bytes()
        assert server.get("/openapi.json")["info"]["version"] == VERSION
        assert (worker.stop(), server.stop()) == (0, 0)

    def test_a_worker_that_is_refused_ends_at_once_while_its_job_runs_on(self, commands: Path, stage: Stage) -> None:
        server = start_server(stage, commands)
        worker = start_worker(stage, server, commands)
        job = server.sh(f"until [ -e {stage.folder}/go ]; do sleep 0.02; done")
        until(lambda: stage.docker.starts(job))
        server.stop()
        tokens = stage.folder / "tokens"
        tokens.write_text("0123456789abcdef\n")
        server.environment["JOBWORKER_TOKEN_FILE"] = str(tokens)
        server.start()
        assert worker.exit_code() == 1
        os.kill(stage.docker.pid(job), 0)

    @pytest.mark.parametrize("command", PROGRAMS.values())
    def test_it_says_its_version_and_how_it_is_called(self, commands: Path, command: str) -> None:
        said = [subprocess.check_output([commands / command, option], text=True) for option in ("-V", "-h")]
        assert said[0] == f"jobworker {VERSION}\n"
        assert f"\nexample:\n  {command} " in said[1]

    @pytest.mark.parametrize("command", PROGRAMS.values())
    def test_a_call_that_is_wrong_exits_2(self, commands: Path, command: str, tmp_path: Path) -> None:
        arguments = ["--token-file", str(tmp_path / "none"), "localhost:1"]
        ended = subprocess.run([commands / command, *arguments], check=False, capture_output=True, timeout=10)
        assert ended.returncode == 2
        assert b"Traceback" not in ended.stderr

    def test_a_server_that_has_no_port_exits_1(self, commands: Path, stage: Stage) -> None:
        server = start_server(stage, commands)
        second = [str(commands / "jobworker-server"), "--database", ":memory:", "-p", str(server.port), str(stage.jobs)]
        ended = subprocess.run(second, check=False, capture_output=True, timeout=10)
        assert ended.returncode == 1
        assert b"can't listen" in ended.stderr
