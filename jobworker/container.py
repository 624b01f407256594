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
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jobworker.clock import Clock, steady_clock

ANSWER_SECONDS = 30  # for every command but `run`, `pull`, `wait` and `logs`
INSPECT_SECONDS = 5  # of all containers together, of each alone: a worker that looks must be back before its grace ends
INSPECTIONS = 8  # at the same time
WAIT_SECONDS = 300  # for one `wait`, which is then said again
ENGINE_RETRY_SECONDS = 1
ENGINE_RETRY_CEILING_SECONDS = 8
ENGINE_PATIENCE_SECONDS = 30
CREATED_SECONDS = 0.5
COULD_NOT_START = (125, 126, 127)  # exit codes of the command itself
KILLED = 137
NEVER_STARTED = ("created", "initialized")  # the latter is podman's
UNKNOWN = "in a state that can't be inspected"
HALF_REMOVED = ("dead", "removing")  # has ended, and its log can't be read any more
# The only words that mean that there is none; whatever else an engine says, it may be there.
ABSENT = re.compile("no such (container|object|image)|image not known|no container with name or id", re.IGNORECASE)
# `docker run` did not even reach the engine: nothing has started. All that was written, for a job may write such words.
UNREACHED = re.compile(
    "(docker: )?(cannot connect to the docker daemon|failed to connect to the docker api"  # since 29
    r"|permission denied while trying to connect)[^\n]*\s*((see|run) 'docker run --help'[^\n]*\s*)?",
    re.IGNORECASE,
)
CONTAINER = re.compile(r"jobworker-[a-zA-Z0-9]*-(\d+)-(\d+)")
BEGAN = "jobworker.began"  # a label: the boot and the second in which it was started
COMPLAINT_SECONDS = 1  # a failing command ends sooner after its complaint
COMPLAINT_BYTES = 1000
UNREADABLE = re.compile(
    rb"[^\n]*(configured logging driver does not support reading|'none' log driver, cannot read logs)[^\n]*\s*"
)

log = logging.getLogger("worker")


class EngineAway(Exception):
    """The engine has not answered for ENGINE_PATIENCE_SECONDS, and nothing has started."""


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
    """A container of this worker. Where it can't be inspected, its state is UNKNOWN, and the name of its job ""."""

    job: int
    attempt: int
    state: str
    container: str
    name: str


class Clocks(NamedTuple):
    """A machine's clocks: one that somebody may set, and one that goes on since `boot`, by which boots differ."""

    wall: Clock = time.time
    steady: Clock = steady_clock
    boot: str = ""


def read_clocks() -> Clocks:
    try:
        return Clocks(boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    except OSError:
        return Clocks()


class Engine:
    """What a worker asks the engine, and what the engine's answers mean."""

    def __init__(self, command: RunCommand, clocks: Clocks | None = None) -> None:
        self._command, self._clocks = command, clocks or Clocks()
        self.images: set[str] = set()  # known to be here
        self._tells_states = False  # its `inspect` has given one
        self._pulling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def retry_until_answered(
        self,
        *words: str,
        about: str = "",
        patience: float = math.inf,
        is_answer: Callable[[str], object] = lambda _out: True,
    ) -> Answer:
        """Run a command again and again until it succeeds, or says that there is nothing of the name `about`.

        is_answer: whether what it wrote can be read. Raises EngineAway when that has taken `patience` seconds.
        """
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + patience
        said = ""
        for delay in backoff():
            try:
                answer = await self._command([*words], deadline=ANSWER_SECONDS)
            except (NotStarted, PastDeadline) as error:
                problem = str(error)
            else:
                if answer.code == 0 and is_answer(answer.out):
                    return answer
                if answer.code > 0 and about and is_absent(about, answer.err):
                    return answer
                problem = answer.err.strip() or f"exit code {answer.code}, {answer.out[:100]!r}"
            if clock() > give_up_at:
                raise EngineAway(problem)
            said = complain(words[0], problem, said)
            await asyncio.sleep(delay)
        raise AssertionError

    async def run(self, command: "Command", output: Callable[[bytes], None]) -> Answer:
        """Start a container and wait for its end; the exit code of `docker run`, and the beginning of what it wrote.

        Raises NotStarted.
        """
        beginning = b""

        def watch(data: bytes) -> None:
            nonlocal beginning
            beginning = (beginning + data)[:COMPLAINT_BYTES] if len(beginning) < COMPLAINT_BYTES else beginning
            output(data)

        verb, *words = command.arguments
        label = f"--label={BEGAN}={self._clocks.boot} {self._clocks.steady():.1f}"
        answer = await self._command([verb, label, *words], command.stdin, command.variables, watch)
        return Answer(answer.code, beginning.decode(errors="replace"))

    def seconds_since_start(self, inspected: dict[str, Any]) -> float:
        """How long ago a container was started: by the clock that nobody sets, if this machine has started it."""
        boot, _, began = str(labels_of(inspected).get(BEGAN)).rpartition(" ")
        if boot and boot == self._clocks.boot:
            return max(self._clocks.steady() - float(began), 0)
        return seconds_since(str(part_of(inspected, "State").get("StartedAt")), self._clocks.wall())

    async def follow(self, container: str, output: Callable[[bytes], None], is_last: bool = False) -> bool | None:
        """Read what a container wrote, from its start, and writes until it ends; True if that was all.

        None: its log driver's log can't be read. is_last: what the command says is passed on though it fails.
        """
        beginning = Beginning(output)
        try:
            answer = await self._command(["logs", "--follow", container], output=beginning.add)
        except NotStarted as error:
            log.warning("docker logs could not be started; trying again: %s", error)
            return False
        finally:
            beginning.hold()
        unreadable = answer.code != 0 and UNREADABLE.fullmatch(beginning.held or b"") is not None
        if answer.code == 0 or (is_last and not unreadable):
            beginning.pass_on()
        return None if unreadable else answer.code == 0

    async def wait(self, container: str) -> None:
        """Wait until a container has ended, or is gone."""
        state = await self.state(container)
        while state and is_running(state):
            try:
                code = (await self._command(["wait", container], deadline=WAIT_SECONDS)).code
            except NotStarted:
                code = -1
            except PastDeadline:
                code = 0  # the command may have missed the end; the state has not
            if code:
                await asyncio.sleep(ENGINE_RETRY_SECONDS)
            state = await self.state(container)

    async def stop(self, container: str, grace: float) -> None:
        """Ask a container to stop: TERM, the grace period in seconds, KILL. What comes of it, its state tells."""
        try:
            await self._command(["stop", f"-t={math.ceil(grace)}", container], deadline=grace + ANSWER_SECONDS)
        except (NotStarted, PastDeadline) as error:
            log.warning("docker stop did not work; trying again: %s", error)

    async def state(self, container: str, patience: float = math.inf) -> dict[str, Any] | None:
        """Give the State of a container, or None where there is no such container or the command says nothing.

        Raises EngineAway when that has taken `patience` seconds.
        """

        def is_answer(out: str) -> bool:
            return read_state_of(out) is not None or not (self._tells_states or out.strip())

        words = ["inspect", "--type=container", container]
        answer = await self.retry_until_answered(*words, about=container, patience=patience, is_answer=is_answer)
        state = read_state_of(answer.out) if answer.code == 0 else None
        self._tells_states = self._tells_states or state is not None
        return state

    async def has_image(self, image: str) -> bool:
        """Whether an image is here. Raises EngineAway."""
        words = ["image", "inspect", "--", image]
        answer = await self.retry_until_answered(*words, about=image, patience=ENGINE_PATIENCE_SECONDS)
        if answer.code:
            self.images.discard(image)
        return answer.code == 0

    async def may_have_image(self, image: str) -> bool:
        """Whether an image is here; True, too, where the engine gives no clear answer in time."""
        try:
            return await self.has_image(image)
        except EngineAway:
            return True

    async def provide_image(self, image: str, policy: str, platform: str | None) -> str:
        """Have an image here, pulled once for all jobs that wait for it; the engine's error where it can't, or "".

        Raises EngineAway.
        """
        async with self._pulling[image]:
            if policy == "missing" and (image in self.images or await self.has_image(image)):
                self.images.add(image)
                return ""
            words = ["pull", "--quiet", *option("--platform", platform), "--", image]
            code, out, err = await self._start(words)
            if code == 0:
                self.images.add(image)
                return ""
            return err.strip() or out.strip() or f"docker pull ended with exit code {code}"

    async def _start(self, words: list[str]) -> Answer:
        for delay in backoff():
            try:
                return await self._command(words)
            except NotStarted as error:
                log.warning("docker %s could not be started; trying again: %s", words[0], error)
            await asyncio.sleep(delay)
        raise AssertionError

    async def containers(self, labels: dict[str, str]) -> list[Found]:
        """Give the containers with these labels. Of one that can't be inspected, its name tells whose it is."""
        filters = [f"--filter=label={key}={value}" for key, value in labels.items()]
        said = ""
        for delay in backoff():
            rows = (await self.retry_until_answered("ps", "--all", "--format={{.Names}} {{.ID}}", *filters)).out
            # One that is half removed may have no name: its id stands first then.
            names = [row.split()[0] for row in rows.splitlines() if row.strip()]
            found, problem = await self._inspect(names) if names else ([], "")
            if found is None:  # one may hold up all others
                found = await self._inspect_each(names)
            if found is not None:
                return found
            said = complain("inspect", problem, said)
            await asyncio.sleep(delay)
        raise AssertionError

    async def _inspect(self, names: list[str]) -> tuple[list[Found] | None, str]:
        """Give which of these containers are there, and ours; None, and why, where the engine does not tell of each."""
        try:
            words = ["inspect", "--type=container", *names]
            code, out, err = await self._command(words, deadline=INSPECT_SECONDS)
        except (NotStarted, PastDeadline) as error:
            return None, str(error)
        listed = read_list(out)
        absent = sum(bool(ABSENT.search(line)) for line in err.splitlines()) if code > 0 else 0
        if len(listed) + absent < len(names):
            return None, err.strip() or f"it says {out[:100]!r}"
        return [found for each in listed if (found := read_found(each))], ""

    async def _inspect_each(self, names: list[str]) -> list[Found] | None:
        places = asyncio.Semaphore(INSPECTIONS)

        async def inspect(name: str) -> list[Found] | None:
            found = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * INSPECT_SECONDS), places:
                    found, _problem = await self._inspect([name])
            return read_name(name) if found is None else found

        told = await asyncio.gather(*map(inspect, names))
        return None if None in told else [found for each in told for found in each or ()]

    async def inspect(self, container: str) -> dict[str, Any] | None:
        """Give all that the engine tells of a container, once it tells its state; None where there is none."""
        words = ["inspect", "--type=container", container]
        answer = await self.retry_until_answered(*words, about=container, is_answer=read_state_of)
        if answer.code:
            return None
        self._tells_states = True
        return read_list(answer.out)[0]

    async def remove(self, containers: list[str], force: bool = True) -> dict[str, str]:
        """Remove containers with their anonymous volumes, running ones only by force; those that failed, and why."""
        try:
            words = ["rm", *["--force"] * force, "--volumes", *containers]
            code, out, err = await self._command(words, deadline=ANSWER_SECONDS)
        except (NotStarted, PastDeadline) as error:
            return dict.fromkeys(containers, str(error))
        gone = set(out.split())
        left = [each for each in containers if each not in gone and not is_absent(each, err)]
        if code != 0:
            return dict.fromkeys(left, err.strip() or f"exit code {code}")
        if len(containers) == 1:
            return {}
        failed: dict[str, str] = {}
        for each in left:  # podman removes none, and says nothing, where one of several does not exist
            failed |= await self.remove([each], force)
        return failed

    async def remove_if_never_started(self, container: str) -> bool:
        """Remove a container that was only created; False where it may have started: its start may be under way."""
        await asyncio.sleep(CREATED_SECONDS)
        try:
            state = await self.state(container, ENGINE_PATIENCE_SECONDS)
        except EngineAway:
            return False
        if state and state.get("Status") not in NEVER_STARTED:
            return False
        return not await self.remove([container], force=False)


class Beginning:
    """Passes output on, its beginning only once that is surely not the complaint of a command that fails."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output
        self.held: bytes | None = b""  # None: all is passed on as it comes
        self._timer: asyncio.TimerHandle | None = None

    def add(self, data: bytes) -> None:
        if self.held is None:
            self._output(data)
            return
        self.held += data
        if len(self.held) > COMPLAINT_BYTES:
            self.pass_on()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMPLAINT_SECONDS, self.pass_on)

    def hold(self) -> None:
        """What is still held stays so until it is passed on explicitly."""
        if self._timer:
            self._timer.cancel()

    def pass_on(self) -> None:
        self.hold()
        held, self.held = self.held, None
        if held:
            self._output(held)


def backoff() -> Iterator[float]:
    """Give how long to wait before each further try, in seconds, without end."""
    delay: float = ENGINE_RETRY_SECONDS
    while True:
        yield delay
        delay = min(delay * 2, ENGINE_RETRY_CEILING_SECONDS)


def complain(verb: str, problem: str, said: str) -> str:
    """Tell why a command is tried again, unless that was `said` the last time; give the problem."""
    if problem != said:
        log.warning("docker %s did not get an answer; trying again: %s", verb, problem)
    return problem


def is_absent(name: str, complaint: str) -> bool:
    """Whether a command says clearly that there is no container, or no image, of this name."""
    short = re.split("[:@]", name.rpartition("/")[2])[0]  # docker.io/library/busybox:1 is busybox to docker
    return any(ABSENT.search(line) and short in re.split(r"[^\w.-]+", line) for line in complaint.splitlines())


def read_list(text: str) -> list[dict[str, Any]]:
    """Give what `inspect` printed: a JSON list of objects with docker, podman and nerdctl; else nothing."""
    try:
        listed = json.loads(text)
    except ValueError:
        return []
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def read_state_of(text: str) -> dict[str, Any] | None:
    """Give the State of the one container that `inspect` was asked for; None where it can't be read."""
    states = [each.get("State") for each in read_list(text)]
    return states[0] if states and isinstance(states[0], dict) else None


def part_of(inspected: dict[str, Any], key: str) -> dict[str, Any]:
    """Give a part of what `inspect` says; nothing where that is no object."""
    part = inspected.get(key)
    return part if isinstance(part, dict) else {}


def labels_of(inspected: dict[str, Any]) -> dict[str, Any]:
    return part_of(part_of(inspected, "Config"), "Labels")


def read_found(inspected: dict[str, Any]) -> Found | None:
    """Give a container of ours from what `inspect` says of it; None where its labels are not ours."""
    labels = labels_of(inspected)
    job, attempt = (str(labels.get(f"jobworker.{key}")) for key in ("job", "attempt"))
    if not (job.isdecimal() and attempt.isdecimal()):
        return None
    status = str(part_of(inspected, "State").get("Status"))
    name = str(inspected.get("Name")).removeprefix("/")
    return Found(int(job), int(attempt), status, name, str(labels.get("jobworker.name", "")))


def name_for(server_id: str, job: int, attempt: int) -> str:
    """Give the name of an attempt's container, from which read_name knows it again."""
    return f"jobworker-{re.sub('[^a-zA-Z0-9]', '', server_id)[-8:]}-{job}-{attempt}"


def read_name(container: str) -> list[Found] | None:
    """Give what a container's name alone tells, as _inspect gives it; None where the name is not ours."""
    own = CONTAINER.fullmatch(container)
    return [Found(int(own[1]), int(own[2]), UNKNOWN, container, "")] if own else None


# From a configuration's key to its option of `docker run` and what its value must be: once for each entry of a list or
# map; true is the option alone. pull_policy, timeout and pull_timeout have none: the worker itself sees to them.
FLAGS: dict[str, tuple[str, Any]] = {
    "volumes": ("--volume", list),
    "working_dir": ("--workdir", str),
    "user": ("--user", str),
    "network_mode": ("--network", str),
    "mem_limit": ("--memory", str | int),
    "cpus": ("--cpus", str | int | float),
    "pids_limit": ("--pids-limit", str | int),
    "platform": ("--platform", str),
    "init": ("--init", bool),
    "labels": ("--label", dict),
    "stop_grace_period": ("--stop-timeout", int | float),
}
# The engine's own default has no bound.
LOG_FLAGS = ["--log-driver=json-file", "--log-opt=max-size=10m", "--log-opt=max-file=3"]

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
    arguments = ["run", "--pull=never", f"--name={container}", *LOG_FLAGS, *option("--label", labels)]
    for key, (flag, kind) in FLAGS.items():
        if not is_of_kind(config.get(key), kind):
            raise ValueError(f"{key} can't be {config[key]!r:.60}")
        arguments += option(flag, config.get(key))
    if config.get("entrypoint") is not None:
        first, *rest = words(config["entrypoint"]) or [""]  # "" takes the image's own away
        arguments += [f"--entrypoint={first}"]
        tail = rest + tail
    arguments += ["--env-file=/dev/stdin"] * bool(filed)
    arguments += option("--env", [name for name in everything if name not in filed])
    if not isinstance(options := config.get("options", []), list) or str(config["image"]).startswith("-"):
        raise ValueError(f"options must be a list, and {config['image']!r:.60} an image")
    arguments += [*options, "--", config["image"], *tail]
    for text in (*arguments, *everything, *values.values()):
        if not isinstance(text, str) or NO_WORD.search(text) or len(text.encode()) >= WORD_LIMIT_BYTES:
            raise ValueError(f"{text!r:.60} can be no argument and no variable: no text, too long, or with a NUL in it")
    stdin = "".join(file_line(name, values.pop(name)) for name in filed)
    return Command(arguments, values, stdin)


def is_of_kind(value: Any, kind: Any) -> bool:
    if value is None or kind is bool:
        return value is None or isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def option(flag: str, value: Any) -> list[str]:
    """Give an option, always as one word: a second one could become the image."""
    if isinstance(value, dict):
        value = [f"{key}={text}" for key, text in value.items()]
    if isinstance(value, list):
        return [f"{flag}={text}" if isinstance(text, str) else text for text in value]
    if value is None or isinstance(value, bool):
        return [flag] * bool(value)
    return [f"{flag}={value}"]


def words(value: str | list[str] | None) -> list[str]:
    """Give the words of a command: a list as it is, a string split as Compose splits it."""
    return shlex.split(value) if isinstance(value, str) else value or []


def file_line(name: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise ValueError(f"{name} must be one line: docker has a variable of that name itself, so it goes by a file")
    return f"{name}={value}\n"


def is_running(state: dict[str, Any]) -> bool:
    return state.get("Status") in ("running", "paused", "restarting", "stopping")


def may_run(status: str) -> bool:
    return status in (*NEVER_STARTED, UNKNOWN) or is_running({"Status": status})


def has_other_code(state: dict[str, Any], code: int) -> bool:
    return state.get("Status") not in NEVER_STARTED and state.get("ExitCode") != code


def was_there(code: int | None) -> bool:
    """Whether there was a container, by the exit code of its `docker run`; None: it was found without that."""
    return code is None or (code > 0 and code not in COULD_NOT_START)


def exit_of_command(code: int | None) -> tuple[int | None, str]:
    """Give the exit code and the failure's reason where `docker inspect` says nothing and `docker run`'s own counts."""
    if code is None or code < 0:
        return None, "docker"
    return code, "docker" if code in COULD_NOT_START else "exit"


def read_state(state: dict[str, Any]) -> tuple[int | None, str]:
    """Give the exit code and the failure's reason from `docker inspect`'s State of a container that does not run."""
    if state.get("Status") in NEVER_STARTED or str(state.get("StartedAt")).startswith("0001-"):
        return None, "docker"  # it never started
    code = state.get("ExitCode")
    if type(code) is not int or abs(code) >= 2**31:  # nothing but a 0 is a success, and the wire has room for 32 bits
        return None, "docker"
    return code, "oom" if code and state.get("OOMKilled") else "exit"


def seconds_since(moment: str, now: float) -> float:
    """How long ago a moment was that docker gives, such as 2026-01-31T12:00:00.123456789Z; 0 where it gives none.

    now: seconds since the epoch.
    """
    try:
        began = datetime.fromisoformat(re.sub(r"\.\d+", "", moment))
    except ValueError:
        return 0
    return max(now - began.timestamp(), 0)
