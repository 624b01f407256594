"""The engine's command: from a job's configuration to the words of `docker run`, and from its words to results.

It knows nothing of the wire, of sessions or of the life of an attempt.
"""

import asyncio
import contextlib
import json
import logging
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple, Protocol

ENGINE_RETRY_SECONDS = 1
ENGINE_PATIENCE_SECONDS = 30
CREATED_SECONDS = 0.5
KILLED = 137
UNREACHABLE = re.compile("cannot connect to the docker daemon|error during connect|connection refused", re.IGNORECASE)

log = logging.getLogger("worker")


class EngineAway(Exception):
    """The engine has not answered for ENGINE_PATIENCE_SECONDS."""


class NotStarted(OSError):
    """The engine's command could not be started: it did nothing."""


class PastDeadline(Exception):
    """The engine's command took longer than its deadline, and was killed. What it did is unknown."""


class Answer(NamedTuple):
    """The end of an engine's command. code is negative where a signal killed it."""

    code: int
    out: str = ""
    err: str = ""


class RunCommand(Protocol):
    """Runs the engine's command with these words: all that this file needs of the world.

    environment: added to the worker's own. output: called with what the command writes, as it comes; without it, the
    answer holds stdout and stderr. deadline: seconds from now. Kills the command when cancelled, but never `run`.
    Raises NotStarted and PastDeadline.
    """

    async def __call__(
        self,
        words: list[str],
        stdin: str = "",
        environment: dict[str, str] | None = None,
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,
    ) -> Answer: ...


class Found(NamedTuple):
    """A container of this worker, from `docker ps`."""

    job: int
    attempt: int
    state: str
    container: str
    name: str


class Engine:
    """What a worker asks the engine, and what the engine's answers mean."""

    def __init__(self, command: RunCommand) -> None:
        self._command = command
        self.images: set[str] = set()  # known to be here
        self._pulling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def retry_until_answered(self, *words: str, patience: float = math.inf) -> Answer:
        """Run a command again and again while the engine does not answer, or the command is killed.

        Raises EngineAway when that has taken `patience` seconds.
        """
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + patience
        while True:
            code, _out, err = answer = await self._command([*words])
            if code == 0 or (code > 0 and not UNREACHABLE.search(err)):
                return answer
            if clock() > give_up_at:
                raise EngineAway(err.strip())
            log.warning("docker %s did not get an answer; trying again: %s", words[0], err.strip() or code)
            await asyncio.sleep(ENGINE_RETRY_SECONDS)

    async def run(self, command: "Command", output: Callable[[bytes], None]) -> int:
        """Start a container and wait for its end; the exit code of `docker run`."""
        return (await self._command(command.arguments, command.stdin, command.variables, output)).code

    async def follow(self, container: str, output: Callable[[bytes], None]) -> bool:
        """Read what a container wrote, from its start, and writes until it ends; True if that was all."""
        return (await self._command(["logs", "--follow", container], output=output)).code == 0

    async def wait(self, container: str) -> None:
        """Wait until a container has ended, or is gone."""
        await self.retry_until_answered("wait", container)

    async def stop(self, container: str, grace: float) -> None:
        """Ask a container to stop: TERM, the grace period in seconds, KILL."""
        await self._command(["stop", "--time", str(math.ceil(grace)), container])

    async def state(self, container: str) -> dict[str, Any] | None:
        """Give `docker inspect`'s State of a container, or None where it says nothing. Waits for an engine."""
        words = ["inspect", "--type", "container", "--format", "{{json .State}}", container]
        answer = await self.retry_until_answered(*words, patience=ENGINE_PATIENCE_SECONDS)
        with contextlib.suppress(ValueError):
            state = json.loads(answer.out)
            return state if isinstance(state, dict) else None
        return None

    async def has_image(self, image: str) -> bool:
        words = ["image", "inspect", "--format", "{{.Id}}", image]
        code, _out, err = await self.retry_until_answered(*words, patience=ENGINE_PATIENCE_SECONDS)
        is_here = not (code and "no such image" in err.lower())
        if not is_here:
            self.images.discard(image)
        return is_here

    async def provide_image(self, image: str, policy: str, platform: str | None) -> str:
        """Have an image here, pulled once for all jobs that wait for it; the engine's error where it can't, or ""."""
        async with self._pulling[image]:
            if policy == "missing" and (image in self.images or await self.has_image(image)):
                self.images.add(image)
                return ""
            code, out, err = await self._command(["pull", "--quiet", *option("--platform", platform), "--", image])
            if code == 0:
                self.images.add(image)
                return ""
            return err.strip() or out.strip() or f"docker pull ended with exit code {code}"

    async def containers(self, labels: dict[str, str]) -> list[Found]:
        """Give the containers with these labels."""
        filters = [word for key, value in labels.items() for word in ("--filter", f"label={key}={value}")]
        fields = ['{{.Label "jobworker.job"}}', '{{.Label "jobworker.attempt"}}', "{{.State}}", "{{.Names}}"]
        columns = "\t".join([*fields, '{{.Label "jobworker.name"}}'])
        answer = await self.retry_until_answered("ps", "--all", "--no-trunc", *filters, "--format", columns)
        lines = [line.split("\t") for line in answer.out.splitlines()]
        return [
            Found(int(job), int(attempt), state, container, name)
            for job, attempt, state, container, name in (line for line in lines if len(line) == 5)
            if job.isdecimal() and attempt.isdecimal()
        ]

    async def remove(self, containers: list[str], force: bool = True) -> bool:
        """Remove containers with their anonymous volumes, running ones only by force; True if all are gone."""
        code, _out, err = await self._command(["rm", *["--force"] * force, "--volumes", *containers])
        return code == 0 or (code > 0 and all("no such container" in line.lower() for line in err.splitlines()))

    async def remove_if_never_started(self, container: str) -> bool:
        """Remove a container that was only created; False where it has started, as one whose start was under way."""
        await asyncio.sleep(CREATED_SECONDS)
        state = await self.state(container)
        if state and state.get("Status") != "created":
            return False
        return await self.remove([container], force=False)


# From a configuration's key to its option of `docker run`: once for each entry of a list or map; true is the option
# alone. pull_policy, timeout and pull_timeout have none: the worker itself sees to them.
FLAGS = {
    "volumes": "--volume",
    "working_dir": "--workdir",
    "user": "--user",
    "network_mode": "--network",
    "mem_limit": "--memory",
    "cpus": "--cpus",
    "pids_limit": "--pids-limit",
    "platform": "--platform",
    "init": "--init",
    "labels": "--label",
    "stop_grace_period": "--stop-timeout",
}
# The engine's own default has no bound.
LOG_FLAGS = ["--log-driver", "json-file", "--log-opt", "max-size=10m", "--log-opt", "max-file=3"]

WORD_LIMIT_BYTES = 128 * 1024  # Linux's MAX_ARG_STRLEN
NO_WORD = re.compile("[\0\ud800-\udfff]")

# Variables that would change the docker command or what it is made of and starts: Go, the loader, ssh, credentials.
DOCKERS_OWN_VARIABLE = re.compile(
    r"PATH|HOME|USER|LOGNAME|PWD|SHELL|TERM|TZ|TMPDIR|LANG|LC_.*|COLUMNS|NO_COLOR|ENV|BASH_.*|IFS|LD_.*|DYLD_.*"
    r"|GLIBC_.*|MALLOC_.*|GCONV_PATH|LOCPATH|HOSTALIASES|LOCALDOMAIN|RES_OPTIONS|GO[A-Z0-9]+|ZONEINFO|GRPC_.*|PYTHON.*"
    r"|(HTTPS?|ALL|NO)_PROXY|REQUEST_METHOD|SSL_CERT_(FILE|DIR)|SSH_(AUTH_SOCK|ASKPASS.*)|XDG_.*|DBUS_.*|GNUPGHOME"
    r"|PASSWORD_STORE_.*|DOCKER_.*|BUILDKIT_.*|BUILDX_.*|OTEL_.*|LISTEN_.*|NOTIFY_SOCKET|REGISTRY_AUTH_FILE"
    r"|_?CONTAINERS?_.*|CONTAINERD_.*|NERDCTL_.*|PODMAN_.*|STORAGE_(DRIVER|OPTS)",
    re.IGNORECASE,
)


class Command(NamedTuple):
    """What to run: arguments after `docker`, variables for its environment, and what it reads on its standard input."""

    arguments: list[str]
    variables: dict[str, str]
    stdin: str


def docker_run_command(
    config: dict[str, Any], container: str, labels: dict[str, str], environment: dict[str, str], version: int = 2
) -> Command:
    """Give the `docker run` of a job's configuration, as in JobConfigs.

    environment: the job's own, over the configuration's; no value becomes an argument, which `ps` would show to all.
    A version 1 server's command is one argument, whatever it holds. Raises ValueError for what docker can't be told.
    """
    everything: dict[str, str | None] = config.get("environment", {}) | environment
    values = {name: value for name, value in everything.items() if value is not None}
    filed = [name for name in values if DOCKERS_OWN_VARIABLE.fullmatch(name)]
    command = config.get("command")
    tail = [command] if version == 1 and command is not None else words(command)
    arguments = ["run", "--pull", "never", "--name", container, *LOG_FLAGS, *option("--label", labels)]
    for key, flag in FLAGS.items():
        arguments += option(flag, config.get(key))
    if config.get("entrypoint") is not None:
        first, *rest = words(config["entrypoint"]) or [""]  # "" takes the image's own away
        arguments += ["--entrypoint", first]
        tail = rest + tail
    arguments += ["--env-file", "/dev/stdin"] * bool(filed)
    arguments += option("--env", [name for name in everything if name not in filed])
    arguments += [*config.get("options", []), "--", config["image"], *tail]
    for text in (*arguments, *everything, *values.values()):
        if not isinstance(text, str) or NO_WORD.search(text) or len(text.encode()) >= WORD_LIMIT_BYTES:
            raise ValueError(f"{text!r:.60} can be no argument and no variable: no text, too long, or with a NUL in it")
    stdin = "".join(file_line(name, values.pop(name)) for name in filed)
    return Command(arguments, values, stdin)


def option(flag: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        value = [f"{key}={text}" for key, text in value.items()]
    if isinstance(value, list):
        return [word for text in value for word in (flag, text)]
    if value is None or isinstance(value, bool):
        return [flag] * bool(value)
    return [flag, str(value)]


def words(value: str | list[str] | None) -> list[str]:
    """Give the words of a command: a list as it is, a string split as Compose splits it."""
    return shlex.split(value) if isinstance(value, str) else value or []


def file_line(name: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise ValueError(f"{name} must be one line: docker has a variable of that name itself, so it goes by a file")
    return f"{name}={value}\n"


def is_running(state: dict[str, Any]) -> bool:
    return state.get("Status") in ("running", "paused", "restarting")


def has_other_code(state: dict[str, Any], code: int) -> bool:
    return state.get("Status") != "created" and state.get("ExitCode") != code


def exit_of_command(code: int | None) -> tuple[int | None, str]:
    """Give the exit code and the failure's reason where `docker inspect` says nothing and `docker run`'s own counts."""
    if code is None or code < 0:
        return None, "docker"
    return code, "docker" if code >= 125 else "exit"


def read_state(state: dict[str, Any]) -> tuple[int | None, str]:
    """Give the exit code and the failure's reason from `docker inspect`'s State of a container that does not run."""
    if state.get("Status") == "created" or str(state.get("StartedAt")).startswith("0001-"):
        return None, "docker"  # it never started
    code = int(state.get("ExitCode") or 0)
    return (code or KILLED, "oom") if state.get("OOMKilled") else (code, "exit")


def seconds_since(moment: str, now: float) -> float:
    """How long ago a moment was that docker gives, such as 2026-01-31T12:00:00.123456789Z; 0 where it gives none.

    now: seconds since the epoch.
    """
    try:
        began = datetime.fromisoformat(re.sub(r"\.\d+", "", moment))
    except ValueError:
        return 0
    return max(now - began.timestamp(), 0)
