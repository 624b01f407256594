"""What deploy/ names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent.parent
DEPLOY = HERE / "deploy"
RUN_TIME_FILES = {"protocol.py", "server.py", "client.py", "jobworker"}
UNITS = {"jobworker-server.service": "server.py", "jobworker-worker@.service": "client.py"}


class TestDeployment:
    """What the files in deploy/ name is there, as no test starts them."""

    def compose(self, name: str = "compose.yaml") -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
        return loaded

    def dockerfile(self) -> list[list[str]]:
        """Give the instructions' words, continuation lines joined."""
        text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
        return [line.split() for line in text.splitlines() if line.strip()]

    def unit(self, name: str) -> list[tuple[str, str]]:
        text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE).replace("\\\n", "")
        return [(key, value) for key, sign, value in (line.partition("=") for line in text.splitlines()) if sign]

    def options(self, program: str) -> set[str]:
        text = subprocess.run(
            [sys.executable, HERE / program, "--help"], capture_output=True, check=True
        ).stdout.decode()
        return set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", text))

    def settings(self, program: str) -> set[str]:
        source = (HERE / program).read_text() + (HERE / "jobworker/options.py").read_text()
        return {f"JOBWORKER_{name}" for name in re.findall(r'(?:settings?|yes_or_no)\("([A-Z_]+)"', source)}

    def test_the_image_has_every_file_that_runs(self) -> None:
        copied = [word for line in self.dockerfile() if line[0] == "COPY" for word in line[1:-1] if word[0] not in "-/"]
        assert set(copied) == RUN_TIME_FILES | {"requirements.txt"}
        assert all((HERE / name).exists() for name in copied)

    def test_the_server_in_its_image_is_not_root(self) -> None:
        lines = self.dockerfile()
        server = lines[lines.index(["FROM", "jobworker", "AS", "server"]) + 1 :]
        user = next(line for line in server if line[0] in ("USER", "FROM"))
        assert user == ["USER", "10001:10001"]

    def test_the_images_settings_exist(self) -> None:
        named = {word.split("=")[0] for line in self.dockerfile() if line[0] == "ENV" for word in line[1:]}
        assert named
        assert named <= self.settings("server.py")

    def test_the_image_asks_the_server_for_its_health_as_docker_would(self) -> None:
        text = " ".join(next(line for line in self.dockerfile() if line[0] == "HEALTHCHECK"))
        program = yaml.safe_load(text.partition(" CMD ")[2])
        assert program[:2] == ["python", "-Ic"]
        compile(program[2], "HEALTHCHECK", "exec")
        assert "'/healthz'" in program[2]

    def test_compose_starts_one_server_and_three_workers(self) -> None:
        services = self.compose()["services"]
        assert {name: service.get("deploy", {}).get("replicas", 1) for name, service in services.items()} == {
            "server": 1,
            "worker": 3,
        }

    def test_compose_names_files_and_targets_that_exist(self) -> None:
        services = self.compose()["services"].values()
        targets = {line[3] for line in self.dockerfile() if line[0] == "FROM"}
        for build in [service["build"] for service in services]:
            context = DEPLOY / build["context"]
            assert (context / build["dockerfile"]).is_file()
            assert build["target"] in targets
        sources = [volume.split(":")[0] for service in services for volume in service["volumes"]]
        assert "../jobs.yaml" in sources
        assert all((DEPLOY / source).is_file() for source in sources if source.startswith("."))
        assert {s for s in sources if s.isalpha()} == set(self.compose()["volumes"])

    def test_compose_opens_the_port_to_this_machine_alone(self) -> None:
        ports = [port for service in self.compose()["services"].values() for port in service.get("ports", [])]
        assert len(ports) == 1
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_compose_with_tokens_gives_them_to_all_and_is_not_insecure(self) -> None:
        base, tokens = self.compose()["services"], self.compose("compose.tokens.yaml")
        assert tokens["services"].keys() == base.keys()
        for name, service in tokens["services"].items():
            assert service["environment"] == {"JOBWORKER_TOKEN_FILE": f"/run/secrets/{service['secrets'][0]}"}
            assert "JOBWORKER_TOKEN_FILE" in self.settings({"server": "server.py", "worker": "client.py"}[name])
            assert service["secrets"] == list(tokens["secrets"])
        assert "--insecure" in base["server"]["command"]
        assert "--insecure" not in tokens["services"]["server"]["command"]

    def test_compose_gives_options_that_exist(self) -> None:
        command = self.compose()["services"]["server"]["command"]
        assert {word for word in command if word.startswith("-")} <= self.options("server.py")

    @pytest.mark.parametrize(("name", "program"), UNITS.items())
    def test_a_unit_gives_options_and_settings_that_exist(self, name: str, program: str) -> None:
        command = shlex.split(dict(self.unit(name))["ExecStart"])
        assert command[1] == f"/opt/jobworker/{program}"
        given = {word for word in command if word.startswith("-")}
        assert "--token-file" in given
        assert given <= self.options(program)
        text = (DEPLOY / name).read_text()
        assert set(re.findall(r"JOBWORKER_[A-Z_]+", text)) - {"JOBWORKER_SERVER"} <= self.settings(program)

    def test_a_worker_that_is_stopped_lets_its_jobs_end(self) -> None:
        unit = dict(self.unit("jobworker-worker@.service"))
        assert (unit["KillMode"], unit["TimeoutStopSec"]) == ("mixed", "2min")
        assert "stop_grace_period" in self.compose()["services"]["worker"]

    def test_with_podman_a_unit_takes_nothing_away_and_leaves_containers_their_watchers(self) -> None:
        unit = [key for key, _ in self.unit("jobworker-worker@.service")]
        hardening = {*unit[unit.index("DynamicUser") : unit.index("WantedBy")]}
        given = dict(self.unit("podman.conf"))
        assert hardening <= given.keys()
        assert {given[key] for key in hardening} <= {"no", "", "~", "0022"}
        assert given["UnsetEnvironment"] == "INVOCATION_ID"
        assert given["Environment"] == "JOBWORKER_DOCKER=podman"
        assert "JOBWORKER_DOCKER" in self.settings("client.py")
