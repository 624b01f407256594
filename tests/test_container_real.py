"""What each key of jobs.yaml does to a real container, by `docker run` and by `podman run`."""

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.config import load_jobs
from jobworker.container import docker_run_command
from tests.engines import Engine


class Container:
    """A container of a job whose further keys are given as lines; `output` and `code` are what came of it."""

    def __init__(
        self, engine: Engine, keys: str, tmp_path: Path, environment: dict[str, str], version: int = 2
    ) -> None:
        self.engine = engine
        self.name = f"config-test-{uuid.uuid4().hex[:12]}"
        file = tmp_path / "jobs.yaml"
        image = "" if "image:" in keys else "  image: busybox\n"
        file.write_text("- name: job\n" + image + "".join(f"  {line}\n" for line in keys.split("\n")))
        (job,) = load_jobs(file)
        wire = json.loads(json.dumps(job.to_wire()))
        command = docker_run_command(wire, self.name, {"config-test": "yes"}, environment, version)
        done = subprocess.run(
            [engine.name, *command.arguments],
            input=command.stdin.encode(),
            env={**os.environ, "FROM_WORKER": "hers", **command.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        self.output, self.code = done.stdout.decode(), done.returncode

    def inspect(self, path: str) -> str:
        """Give what `docker inspect` says at a path such as .HostConfig.Memory."""
        return self.engine("inspect", "-f", f"{{{{json {path}}}}}", self.name).strip()


class Runner:
    def __init__(self, engine: Engine, names: list[str], tmp_path: Path) -> None:
        self.engine, self.names, self.tmp_path = engine, names, tmp_path

    def __call__(self, keys: str, environment: dict[str, str] | None = None, version: int = 2) -> Container:
        container = Container(self.engine, keys, self.tmp_path, environment or {}, version)
        self.names.append(container.name)
        return container


@pytest.fixture(scope="module")
def names(engine: Engine) -> Iterator[list[str]]:
    """The containers of all tests, removed by one command at the end: it takes as long as a test."""
    names: list[str] = []
    yield names
    engine("rm", "-f", "-v", *names)


@pytest.fixture
def run(engine: Engine, names: list[str], tmp_path: Path) -> Runner:
    return Runner(engine, names, tmp_path)


VALUES = [
    "plain",
    "",
    " a  b ",
    "a=b=c",
    "#x",
    "'\"$`\\",
    "two\nlines\n",
    "tab\tcr\r",
    "é 日本 🎉 \u202e \u00a0",
    "x" * 30_000,
]
# fmt: off
READ_BY_DOCKER = {
    "HOME": "/weird #1 'x'", "LD_PRELOAD": "/none.so", "DOCKER_HOST": "tcp://127.0.0.1:1",
    "GODEBUG": "http2debug=2", "HTTP_PROXY": "http://127.0.0.1:1", "DOCKER_CONFIG": "/none",
    "DOCKER_CONTEXT": "none", "TMPDIR": "/none",
    "XDG_RUNTIME_DIR": "/none", "SSL_CERT_FILE": "/none", "DOCKER_TLS_VERIFY": "1", "LANG": "日本 = 'x'",
}
# fmt: on


@pytest.fixture(scope="module")
def with_values(engine: Engine, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Container:
    """A container that has each value under each name, with the value's number behind the name."""
    given = {f"{name}{number}": value for name in ("VALUE", "A.B-c") for number, value in enumerate(VALUES)}
    keys = "command: env\nparameters:" + "".join(f"\n  {name}:" for name in given)
    return Runner(engine, names, tmp_path_factory.mktemp("values"))(keys, given)


@pytest.fixture(scope="module")
def with_what_docker_reads(engine: Engine, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Container:
    keys = f"command: [/bin/busybox, env]\nenvironment: {json.dumps(READ_BY_DOCKER)}"
    return Runner(engine, names, tmp_path_factory.mktemp("read"))(keys)


class TestRealContainers:
    def test_an_image_alone_runs_its_own_command(self, run: Runner) -> None:
        container = run("image: hello-world")
        assert container.code == 0
        assert "Hello" in container.output

    def test_a_command_string_is_split_like_a_shells_and_run_without_one(self, run: Runner) -> None:
        assert run("command: echo 'a  b' $HOME \"c d\"").output == "a  b $HOME c d\n"

    def test_a_command_list_is_kept_word_for_word(self, run: Runner) -> None:
        assert run("command: [printf, '[%s]', '', 'a  b', --rm, '*']").output == "[][a  b][--rm][*]"

    def test_a_version_1_command_is_one_argument(self, run: Runner) -> None:
        assert run("command: echo hi", version=1).code == 127

    def test_the_exit_code_is_the_containers(self, run: Runner) -> None:
        assert run("command: sh -c 'exit 7'").code == 7

    def test_entrypoint_comes_before_the_command(self, run: Runner) -> None:
        container = run("entrypoint: [echo, one]\ncommand: [two, three]")
        assert container.output == "one two three\n"
        assert container.inspect(".Config.Entrypoint") in ('["echo"]', '"echo"')

    def test_an_empty_entrypoint_leaves_the_command_alone(self, run: Runner) -> None:
        assert run("entrypoint: ''\ncommand: echo hi").output == "hi\n"

    @pytest.mark.parametrize("value", VALUES)
    @pytest.mark.parametrize("name", ["VALUE", "A.B-c"])
    def test_a_value_arrives_byte_for_byte(self, name: str, value: str, with_values: Container) -> None:
        assert f"{name}{VALUES.index(value)}={value}\n" in with_values.output

    @pytest.mark.parametrize(("name", "value"), READ_BY_DOCKER.items())
    def test_a_variable_that_docker_reads_reaches_the_job_and_not_docker(
        self, name: str, value: str, with_what_docker_reads: Container
    ) -> None:
        assert with_what_docker_reads.code == 0
        assert f"{name}={value}\n" in with_what_docker_reads.output

    def test_path_is_the_jobs_own(self, run: Runner) -> None:
        container = run("command: [/bin/busybox, env]\nenvironment: [PATH=/nowhere]")
        assert "PATH=/nowhere\n" in container.output

    def test_a_name_alone_takes_the_workers_value_or_stays_unset(self, run: Runner) -> None:
        output = run("command: env\nenvironment: [FROM_WORKER, NOT_THERE, FIXED=1]").output
        assert "FROM_WORKER=hers\n" in output
        assert "FIXED=1\n" in output
        assert "NOT_THERE" not in output

    def test_the_jobs_value_goes_over_the_configurations(self, run: Runner) -> None:
        output = run("command: env\nenvironment: {A: config}\nparameters: {A: }", {"A": "job"}).output
        assert "A=job\n" in output

    def test_volumes_are_mounted_and_ro_is_read_only(self, run: Runner, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("from the host")
        container = run(f"command: sh -c 'cat /v/file; touch /v/x'\nvolumes: ['{tmp_path}:/v:ro', /anonymous]")
        assert container.code == 1
        assert "from the host" in container.output  # stdout and stderr are two streams, in no order
        assert "Read-only" in container.output

    def test_working_dir_is_where_the_command_starts(self, run: Runner) -> None:
        folder = "/srv/a b" if run.engine.name == "docker" else "/tmp"  # podman makes none
        assert run(f"command: pwd\nworking_dir: '{folder}'").output == f"{folder}\n"

    def test_user_is_who_runs_it(self, run: Runner) -> None:
        assert run("command: id\nuser: '1234:5678'").output.startswith("uid=1234 gid=5678")

    def test_network_mode_none_has_no_network(self, run: Runner) -> None:
        assert run("command: ls /sys/class/net\nnetwork_mode: none").output == "lo\n"

    def test_mem_limit_is_the_cgroups_limit(self, run: Runner) -> None:
        files = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes"
        container = run(f"command: sh -c 'cat {files} 2>/dev/null'\nmem_limit: 64m")
        assert container.output == f"{64 * 1024 * 1024}\n"

    def test_cpus_is_the_cgroups_quota(self, run: Runner) -> None:
        files = "/sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us"
        assert run(f"command: sh -c 'cat {files} 2>/dev/null'\ncpus: 0.5").output.startswith("50000")

    def test_pids_limit_is_the_cgroups_limit(self, run: Runner) -> None:
        files = "/sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max"
        assert run(f"command: sh -c 'cat {files} 2>/dev/null'\npids_limit: 23").output == "23\n"

    def test_platform_is_asked_for(self, run: Runner) -> None:
        assert run("command: 'true'\nplatform: linux/amd64").code == 0
        assert run("command: 'true'\nplatform: linux/s390x").code == 125

    def test_init_is_process_1(self, run: Runner) -> None:
        assert "init" in run("command: cat /proc/1/comm\ninit: true").output
        assert run("command: cat /proc/1/comm").output == "cat\n"

    def test_labels_are_the_containers(self, run: Runner) -> None:
        labels = json.loads(run("command: 'true'\nlabels: {a: 'b=c', empty: }").inspect(".Config.Labels"))
        assert labels == {"a": "b=c", "empty": "", "config-test": "yes"}

    def test_stop_grace_period_is_docker_stops_own_time(self, run: Runner) -> None:
        assert run("command: 'true'\nstop_grace_period: 1m30s").inspect(".Config.StopTimeout") == "90"

    def test_options_reach_docker_run(self, run: Runner) -> None:
        container = run("command: sh -c 'hostname; touch /x'\noptions: --hostname forge --read-only --tmpfs /tmp")
        assert "forge\n" in container.output
        assert "Read-only" in container.output

    def test_every_container_has_a_bounded_log(self, run: Runner) -> None:
        config = json.loads(run("command: 'true'").inspect(".HostConfig.LogConfig"))
        assert config["Type"] == "json-file"
        if run.engine.name == "docker":
            assert config["Config"] == {"max-file": "3", "max-size": "10m"}
        else:
            assert config["Size"] == "10MB"  # podman keeps one file

    def test_a_missing_image_is_not_pulled(self, run: Runner) -> None:
        container = run("image: none.example/none")
        assert container.code == 125
        assert re.search("No such image|image not known", container.output)
