"""container.py: how a job's config becomes the words of `docker run`, and a container."""

import asyncio
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from client import DockerCommand
from jobworker import container
from jobworker.config import JobConfig
from jobworker.container import (
    FLAGS,
    UNREACHED,
    Answer,
    Command,
    Engine,
    Found,
    NotStarted,
    docker_run_command,
    is_absent,
)
from jobworker.life import allows
from tests.stage import (
    Docker,
    Server,
    Stage,
    until,
)
from tests.test_config import job_of


def command_of(config: dict[str, Any], environment: dict[str, str] | None = None, version: int = 2) -> Command:
    entry = {"name": "job", "image": "busybox"} | config
    return docker_run_command(entry, "jobworker-s-7-1", {"jobworker.job": "7"}, environment or {}, version)


class TestDockerRunArguments:
    def test_a_job_without_keys_is_run_with_what_every_job_has(self) -> None:
        command = command_of({"command": None})
        assert " ".join(command.arguments) == (
            "run --pull=never --name=jobworker-s-7-1 --log-driver=json-file --log-opt=max-size=10m --log-opt=max-file=3"
            " --label=jobworker.job=7 -- busybox"
        )
        assert (command.variables, command.stdin) == ({}, "")

    @pytest.mark.parametrize(
        ("keys", "flags"),
        [
            ("volumes: [/a:/b, c:/d:ro]", ["--volume=/a:/b", "--volume=c:/d:ro"]),
            ("working_dir: /srv", ["--workdir=/srv"]),
            ("user: 'nobody:nogroup'", ["--user=nobody:nogroup"]),
            ("network_mode: none", ["--network=none"]),
            ("mem_limit: 512m", ["--memory=512m"]),
            ("cpus: 0.5", ["--cpus=0.5"]),
            ("pids_limit: 64", ["--pids-limit=64"]),
            ("platform: linux/amd64", ["--platform=linux/amd64"]),
            ("init: true", ["--init"]),
            ("init: false", []),
            ("labels: {a: b, c: }", ["--label=a=b", "--label=c="]),
            ("stop_grace_period: 1m30s", ["--stop-timeout=90"]),
            ("stop_grace_period: 0", ["--stop-timeout=0"]),
            ("options: --cap-drop ALL", ["--cap-drop=ALL"]),
            ("entrypoint: /bin/sh", ["--entrypoint=/bin/sh"]),
            ("entrypoint: ''", ["--entrypoint="]),
            ("entrypoint: []", ["--entrypoint="]),
            ("pull_policy: always\npull_timeout: 5\ntimeout: 5", []),
            ("retries: 1\nretry_delay: 5\nconcurrency: 1\ntags: [a]\npriority: 1\nparameters: {A: }", []),
        ],
    )  # fmt: skip
    def test_each_key_has_its_option(self, keys: str, flags: list[str], tmp_path: Path) -> None:
        wire = json.loads(json.dumps(job_of(keys, tmp_path).to_wire()))
        plain = command_of({}).arguments
        assert command_of(wire).arguments == [*plain[:-2], *flags, *plain[-2:]]

    @pytest.mark.parametrize(
        "config",
        [
            {"init": ["--pull=always", "evil/image"]},
            {"init": "evil/image"},
            {"cpus": True},
            {"user": ["a"]},
            {"volumes": "/:/host"},
            {"labels": ["a=b"]},
            {"platform": {"a": "b"}},
            {"options": "--privileged"},
            {"stop_grace_period": "1s"},
            {"image": "--privileged"},
        ],
    )
    def test_a_value_of_another_type_becomes_no_word(self, config: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"can't be|must be"):
            command_of(config)

    def test_every_key_of_the_configuration_has_an_option_or_is_seen_to_elsewhere(self) -> None:
        here = {"name", "image", "command", "entrypoint", "environment", "options"}
        worker = {"pull_policy", "pull_timeout", "timeout"}
        server = {"retries", "retry_delay", "concurrency", "tags", "priority", "parameters"}
        server |= {"schedule", "timezone", "on_failure", "on_success"}
        assert FLAGS.keys() | here | worker | server == JobConfig.__dataclass_fields__.keys()

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"command": None}, []),
            ({"command": "echo 'a b' $HOME"}, ["echo", "a b", "$HOME"]),
            ({"command": ["echo", "", "--x"]}, ["echo", "", "--x"]),
            ({"command": "b c", "entrypoint": "sh -c a"}, ["-c", "a", "b", "c"]),
            ({"command": ["b"], "entrypoint": ["sh", "-c"]}, ["-c", "b"]),
            ({"entrypoint": ["sh"]}, []),
        ],
    )
    def test_the_words_after_the_image_are_the_rest_of_the_entrypoint_and_the_command(
        self, config: dict[str, Any], words: list[str]
    ) -> None:
        arguments = command_of(config).arguments
        assert arguments[arguments.index("--") + 1 :] == ["busybox", *words]

    def test_a_version_1_command_is_one_argument_as_it_always_was(self) -> None:
        assert command_of({"command": "echo 'hi"}, version=1).arguments[-3:] == ["--", "busybox", "echo 'hi"]

    def test_a_command_that_cannot_be_split_is_a_value_error(self) -> None:
        with pytest.raises(ValueError, match="No closing quotation"):
            command_of({"command": "echo 'hi"})

    @pytest.mark.parametrize(
        "config",
        [{"command": "a\0b"}, {"command": ["a", 5]}, {"image": 5}, {"volumes": [None]},
         {"environment": {"A": "\ud800"}}, {"environment": {"A\0": "b"}}, {"environment": {"LC_\0": "b"}},
         {"environment": {"HOME": "\0"}}, {"command": ["x" * 131_072]}],
    )  # fmt: skip
    def test_what_no_process_can_be_given_is_a_value_error(self, config: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="can be no argument and no variable"):
            command_of(config)

    def test_the_operators_options_come_after_ours_and_before_the_image(self) -> None:
        arguments = command_of({"options": ["--memory", "1g"], "mem_limit": "2g", "environment": {"A": "b"}}).arguments
        assert arguments[arguments.index("--") - 2 :] == ["--memory", "1g", "--", "busybox"]

    def test_a_jobs_own_value_replaces_the_configurations(self) -> None:
        command = command_of({"environment": {"A": "config", "B": "config"}}, {"A": "job"})
        assert command.variables == {"A": "job", "B": "config"}
        assert command.arguments[-4:] == ["--env=A", "--env=B", "--", "busybox"]

    def test_a_name_alone_takes_the_workers_value(self) -> None:
        command = command_of({"environment": {"A": None, "PATH": None}})
        assert (command.variables, command.stdin) == ({}, "")
        assert command.arguments[-4:] == ["--env=A", "--env=PATH", "--", "busybox"]

    @pytest.mark.parametrize(
        "name",
        ["PATH", "HOME", "LD_PRELOAD", "DOCKER_HOST", "DOCKER_CONFIG", "http_proxy", "HTTPS_PROXY", "NO_PROXY",
         "GODEBUG", "GOMAXPROCS", "TMPDIR", "XDG_RUNTIME_DIR", "SSL_CERT_FILE", "SSH_AUTH_SOCK",
         "OTEL_EXPORTER_OTLP_ENDPOINT", "BASH_ENV", "CONTAINER_HOST", "LANG", "LC_ALL"],
    )  # fmt: skip
    def test_a_variable_of_dockers_own_goes_by_a_file_so_that_docker_does_not_see_it(self, name: str) -> None:
        command = command_of({"environment": {name: " a=b # c ", "OTHER": "x"}})
        assert (command.variables, command.stdin) == ({"OTHER": "x"}, f"{name}= a=b # c \n")
        assert command.arguments[-4:] == ["--env-file=/dev/stdin", "--env=OTHER", "--", "busybox"]

    @pytest.mark.parametrize(
        "name", ["GOOGLE_KEY", "SSH_PRIVATE_KEY", "SSL_KEY", "MYPATH", "PATH_TO", "HOME2", "STORAGE_KEY"]
    )
    def test_other_variables_may_hold_several_lines(self, name: str) -> None:
        assert command_of({"environment": {name: "a\nb\r\n"}}).variables == {name: "a\nb\r\n"}

    @pytest.mark.parametrize("value", ["a\nPATH=b", "a\r"])
    def test_a_variable_of_dockers_own_with_several_lines_is_a_value_error(self, value: str) -> None:
        with pytest.raises(ValueError, match="HOME must be one line"):
            command_of({}, {"HOME": value})

    @given(
        st.dictionaries(
            st.sampled_from(["A", "SECRET", "DOCKER_HOST", "PATH"]), st.text(st.characters(codec="utf-8"), min_size=1)
        ),
        st.text(st.characters(codec="utf-8"), min_size=1),
    )
    def test_no_value_of_a_variable_is_ever_an_argument(self, environment: dict[str, str], value: str) -> None:
        secret = f"<{value}>"
        try:
            command = command_of({"environment": {**environment, "B": secret}}, {"C": secret, "HOME": secret})
        except ValueError:
            assume(False)
        assert not [word for word in command.arguments if secret in word]
        assert command.variables["B"] == command.variables["C"] == secret
        assert f"HOME={secret}\n" in command.stdin


class TestAllowedImages:
    """--allow-image."""

    @pytest.mark.parametrize(
        ("image", "glob", "allowed"),
        [
            ("busybox:1", "busybox*", True),
            ("busybox.evil.example/x", "busybox*", False),
            ("busybox/x", "busybox*", False),
            ("registry.example/a/b:1", "registry.example/*", True),
            ("registry.example.evil/a", "registry.example/*", False),
            ("evil.example/registry.example/a", "*registry.example/a", False),
            ("any.example/x", "*", True),
        ],
    )
    def test_a_star_does_not_leave_the_registrys_name(self, image: str, glob: str, allowed: bool) -> None:
        assert allows([glob], {"image": image}) == allowed


class TestEnginesWords:
    """What an engine's complaint means."""

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("x-1", "Error: No such object: x-1"),
            ("x-1", 'Error: no container with name or ID "x-1" found: no such container'),
            ("docker.io/library/busybox:1", "Error response from daemon: No such image: busybox:1"),
            ("busybox", "Error: inspecting object: busybox: image not known"),
        ],
    )
    def test_there_is_none(self, name: str, complaint: str) -> None:
        assert is_absent(name, f"WARNING: something\n{complaint}\n")

    @pytest.mark.parametrize(
        "complaint",
        ["", "permission denied while trying to connect", "Error: No such object: x-10", 'context "x-1" not found'],
    )
    def test_whatever_else_it_says_there_may_be_one(self, complaint: str) -> None:
        assert not is_absent("x-1", complaint)

    @pytest.mark.parametrize(
        "complaint",
        [
            "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
            "docker: failed to connect to the docker API at unix:///x; check if the path is correct",
            "docker: permission denied while trying to connect to the docker API at unix:///x",
        ],
    )
    def test_the_engine_was_not_reached(self, complaint: str) -> None:
        assert UNREACHED.fullmatch(complaint)
        assert UNREACHED.fullmatch(f"{complaint}\nSee 'docker run --help'.\n")
        assert not UNREACHED.fullmatch(f"a job's own words: {complaint}")
        assert not UNREACHED.fullmatch(f"{complaint}\na job goes on\n")


class TestFollowingALog:
    def follow(self, tmp_path: Path, script: str, on_output: Callable[[bytes], None]) -> bool | None:
        docker = tmp_path / "docker"
        docker.write_text(f"#!/bin/sh\n{script}\n")
        docker.chmod(0o755)

        async def play() -> bool | None:
            return await asyncio.wait_for(Engine(DockerCommand(str(docker))).follow("c", on_output), 30)

        return asyncio.run(play())

    def test_the_complaint_of_a_command_that_fails_is_no_output(self, tmp_path: Path) -> None:
        got: list[bytes] = []
        assert not self.follow(tmp_path, "echo Cannot connect to the Docker daemon >&2; exit 1", got.append)
        assert got == []

    def test_what_a_container_wrote_is_passed_on_when_it_is_all(self, tmp_path: Path) -> None:
        got: list[bytes] = []
        assert self.follow(tmp_path, "echo connection refused", got.append)
        assert got == [b"connection refused\n"]

    def test_what_a_container_writes_is_passed_on_before_it_ends(self, tmp_path: Path) -> None:
        got: list[bytes] = []

        def on_output(data: bytes) -> None:
            got.append(data)
            (tmp_path / "seen").touch()

        assert not self.follow(tmp_path, f"echo one; while [ ! -e {tmp_path}/seen ]; do :; done; exit 1", on_output)
        assert got == [b"one\n"]


class TestContainer:
    """How a job's config becomes a container."""

    def test_it_is_told_who_it_is(self, busy_stage: tuple[Server, Docker]) -> None:
        server, _ = busy_stage
        job = server.sh("echo $JOBWORKER_JOB_ID $JOBWORKER_JOB_NAME $JOBWORKER_ATTEMPT")
        server.ended(job)
        assert server.log(job) == b"%d sh 1\n" % job

    def test_it_is_named_and_labelled_for_its_job(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.post("quick")
        server.ended(job)
        [(name, _, _, *words)] = docker.ledger("run", job)
        assert re.fullmatch(rf"jobworker-[0-9a-f]{{8}}-{job}-1", name)
        for label in ("jobworker.worker=worker", f"jobworker.job={job}", "jobworker.attempt=1"):
            assert f"--label={label}" in words
        assert words[-3:] == ["--", "busybox", "true"]
        assert "--rm" not in words

    def test_a_value_is_no_argument_of_docker(self, busy_stage: tuple[Server, Docker]) -> None:
        server, docker = busy_stage
        job = server.sh("echo $SCRIPT-as-a-secret")
        server.ended(job)
        assert not any("secret" in word for word in docker.ledger("run", job)[0])

    @pytest.mark.parametrize(
        "value", ["", " a  b ", "--rm", "$HOME `id` \"'\\", "two\nlines", "日本", "=a=b", "x" * 30_000]
    )
    def test_a_value_arrives_as_it_is(self, stage: Stage, value: str) -> None:
        command = json.dumps(["sh", "-c", 'printf "%s" "$VALUE"'])
        server = stage.server(jobs=f"- {{name: a, image: busybox, command: {command}, parameters: {{VALUE: {{}}}}}}")
        stage.worker(server)
        job = server.post("a", environment={"VALUE": value})
        assert server.ended(job)["success"]
        assert server.log(job).decode() == value

    @pytest.mark.parametrize("name", ["DOCKER_HOST", "DOCKER_CONFIG", "PATH", "HOME", "LD_PRELOAD"])
    def test_a_jobs_variable_does_not_steer_docker_itself(self, stage: Stage, name: str) -> None:
        command = json.dumps(["/bin/sh", "-c", f"echo ${name}"])
        stage.jobs.write_text(f"- {{name: a, image: busybox, command: {command}, parameters: {{{name}: {{}}}}}}")
        if stage.run("server.py", "--check", str(stage.jobs)).returncode == 2:
            return  # refusing such a name is as good
        server = stage.server(jobs=stage.jobs.read_text())
        stage.worker(server)
        job = server.post("a", environment={name: "/nowhere"})
        assert server.ended(job)["success"]
        assert server.log(job).endswith(b"/nowhere\n")
        assert "/nowhere" not in stage.docker.ledger("run", job)[0][2]


class TestCommandsThatCanNotBeStarted:
    """They did nothing, and are tried again."""

    NAME = "jobworker-s-7-1"

    @pytest.mark.parametrize("verb", ["ps", "inspect", "image", "pull", "logs", "wait"])
    def test_each_is(self, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(container, "ENGINE_RETRY_SECONDS", 0)
        said: list[str] = []

        async def command(words: list[str], *_: object, **__: object) -> Answer:
            if words[0] not in said and words[0] == verb:
                said.append(verb)
                raise NotStarted(errno.EAGAIN, "no process to be had")
            state = {"Status": "exited" if "waited" in said else "running"}
            labels = {"jobworker.job": "7", "jobworker.attempt": "1"}
            told = json.dumps([{"Name": self.NAME, "State": state, "Config": {"Labels": labels}}])
            said.append("waited" if words[0] == "wait" else words[0])
            answers = {
                "ps": Answer(0, self.NAME),
                "inspect": Answer(0, told),
                "image": Answer(1, err="No such image: b"),
            }
            return answers.get(words[0], Answer(0))

        async def play() -> None:
            engine = Engine(command)
            assert [found.container for found in await engine.containers({})] == [self.NAME]
            assert await engine.provide_image("b", "missing", None) == ""
            while not await engine.follow(self.NAME, said.append):  # type: ignore[arg-type]
                pass
            await engine.wait(self.NAME)

        asyncio.run(asyncio.wait_for(play(), 10))
        assert "waited" in said

    def test_nor_can_one_without_a_thread(self) -> None:
        command = DockerCommand("true")
        command._threads.shutdown()
        with pytest.raises(NotStarted):
            asyncio.run(command(["run"], output=print))


class TestContainersOfAWorker:
    @pytest.mark.parametrize("problem", ["echo WARNING: some banner", "echo Error: layer not known >&2; exit 1"])
    def test_what_keeps_the_engine_from_telling_of_each_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, problem: str
    ) -> None:
        docker, mended = tmp_path / "docker", tmp_path / "mended"
        answer = '[{"Name": "/c", "State": {"Status": "exited"}, "Config": {"Labels": %s}}]'
        labels = '{"jobworker.job": "7", "jobworker.attempt": "1", "jobworker.name": "a"}'
        inspect = f"if [ -e {mended} ]; then echo '{answer % labels}'; else {problem}; fi"
        docker.write_text(f"#!/bin/sh\n[ $1 = ps ] && echo c && exit\n{inspect}\n")
        docker.chmod(0o755)

        async def play() -> list[Found]:
            asking = asyncio.ensure_future(Engine(DockerCommand(str(docker))).containers({}))
            await asyncio.to_thread(until, lambda: caplog.messages)
            mended.touch()
            return await asyncio.wait_for(asking, 20)

        assert asyncio.run(play()) == [Found(7, 1, "exited", "c", "a")]
        [said] = caplog.messages
        assert re.match("docker inspect did not get an answer; trying again: .*(some banner|layer not known)", said)
