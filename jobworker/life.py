"""The life of one container, from its image to how it ended. It knows nothing of the wire or of sessions."""

import asyncio
import contextlib
import errno
import fnmatch
import math
from typing import Any, NamedTuple

from jobworker.container import (
    COMPLAINT_BYTES,
    ENGINE_PATIENCE_SECONDS,
    ENGINE_RETRY_SECONDS,
    HALF_REMOVED,
    KILLED,
    NEVER_STARTED,
    UNREACHED,
    Answer,
    Command,
    Engine,
    EngineAway,
    NotStarted,
    backoff,
    docker_run_command,
    exit_of_command,
    has_other_code,
    is_absent,
    is_running,
    labels_of,
    may_run,
    part_of,
    read_state,
    was_there,
)
from jobworker.output import Output

PULL_TIMEOUT_SECONDS = 900
STOP_GRACE_SECONDS = 10
STOP_AGAIN_SECONDS = 0.5
OOM_LOOKS, OOM_AGAIN_SECONDS = 6, 0.5
NOT_STARTED = 125
FENCE_TRIES = 10
LOG_TRIES = 30  # of a container that has ended: each is made when the engine has told its state, and they are 1 s apart

Config = dict[str, Any]


class End(NamedTuple):
    """How it ended. code: None where there is none. reason: None for a success."""

    code: int | None
    reason: str | None


class Life:
    """One container. Its end comes from `run` or `adopt`.

    name: the job's; "" where only the container's labels tell it. configs: the worker's, by job name. A job keeps the
    one from its start; a container found running has the one in force.
    """

    def __init__(
        self, engine: Engine, configs: dict[str, Config], name: str, container: str, output: Output | None = None
    ) -> None:
        self.container = container
        self.output = output or Output()
        self._engine, self._configs, self.name = engine, configs, name
        self._config: Config | None = None
        self._started: float | None = None  # on the loop's clock
        self._stop_reason: str | None = None
        self._stopped = asyncio.Event()  # told to stop, or let go
        self._over = asyncio.Event()  # ended, or let go
        self.pulling = ""  # the image that is being pulled
        self._stopping: asyncio.Task[None] | None = None
        self._looked_at: tuple[str | None, int] = ("", 0)

    @property
    def config(self) -> Config:
        return self._config or self._configs.get(self.name, {})

    def stop(self, reason: str, at_once: bool) -> None:
        """Have it end: TERM, the grace period, KILL. at_once: it may have a container; else it will not start."""
        if self._over.is_set() or self._stop_reason:
            return
        self._stop_reason = reason
        self._stopped.set()
        if at_once:
            self._stopping = asyncio.ensure_future(self._stop_container())

    @property
    def seconds(self) -> float | None:
        """How long ago its container was started; None where it was not."""
        return None if self._started is None else asyncio.get_running_loop().time() - self._started

    def stop_if_too_old(self) -> None:
        timeout, now = self.config.get("timeout"), asyncio.get_running_loop().time()
        if timeout and self._started and now > self._started + timeout and self._stopping is None:
            self._stopping = asyncio.ensure_future(self._time_out())

    async def _time_out(self) -> None:
        """Stop it, unless it has ended in time and its command has yet to tell."""
        try:
            state = await self._engine.state(self.container, ENGINE_PATIENCE_SECONDS)
        except EngineAway:  # a container that can't be looked at may be stopped all the same
            state = None
        if state is None or may_run(str(state.get("Status"))):
            self.stop("timeout", at_once=True)

    def hangs(self, status: str | None) -> bool:
        """Whether its container had ended at the last look, too, and nothing has come of that since.

        status: the container's, at this look; None where there is none, which may have to be created yet, unless it
        was told to stop.
        """
        before, self._looked_at = self._looked_at, (status, self.output.end)
        has_ended = self._stopped.is_set() if status is None else not may_run(status)
        return has_ended and before == self._looked_at and not self.pulling

    def leave(self) -> None:
        """It has ended, or nobody wants its end any more: whoever stops it or pulls its image gives up."""
        self._stopped.set()
        self._over.set()

    def failure(self, reason: str, detail: str) -> End:
        """An end without an exit code, whose log says why."""
        self.output.say(f"jobworker: {detail}\n")
        return End(None, reason)

    async def run(self, labels: dict[str, str], environment: dict[str, str], globs: list[str], version: int) -> End:
        """Live from Go to the end. globs: the images that this worker runs; none: all."""
        config = self._configs.get(self.name)
        try:
            if config is None:
                raise ValueError(f"the server sent no configuration for {self.name}")
            command = docker_run_command(config, self.container, labels, environment, version)
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # another server's may be of any form
            return self.failure("config", str(error))
        if not allows(globs, config):
            return self.failure("refused", f"this worker does not run {config['image']}: see its --allow-image")
        return await self._run_container(config, command)

    async def _run_container(self, config: Config, command: Command) -> End:
        image, is_first = config["image"], True
        while True:
            if error := await self._provide_image(config):
                return self.failure(self._stop_reason or "image", error)
            if self._stopped.is_set():
                return self.failure(self._stop_reason or "cancelled", "stopped before it started")
            self._config, self._started = config, asyncio.get_running_loop().time()
            try:
                code, beginning, _err = await self._start(command)
            except NotStarted as error:
                return self.failure(self._stop_reason or "docker", str(error))
            self.output.is_whole()
            complains = code == NOT_STARTED and self.output.end <= COMPLAINT_BYTES
            lacks = complains and is_first and image in self._engine.images and is_absent(image, beginning)
            if not lacks or await self._engine.may_have_image(image):
                return await self._conclude(code, complains and UNREACHED.fullmatch(beginning) is not None)
            is_first, self._started = False, None  # a pull has a limit of its own
            self.output.read_again()  # somebody removed the image since the last job

    async def _start(self, command: Command) -> Answer:
        """Run the container to its end; a command that can't be started is tried again for a while.

        Raises NotStarted.
        """
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + ENGINE_PATIENCE_SECONDS
        for delay in backoff():
            try:
                return await self._engine.run(command, self.output.add)
            except NotStarted as error:
                if error.errno == errno.E2BIG or clock() > give_up_at:
                    raise
                if await happens(self._stopped, delay):
                    raise
        raise AssertionError

    async def _provide_image(self, config: Config) -> str:
        """Have the image here, as the policy says; an error where it can't be had, or "". Raises EngineAway."""
        image, policy = config["image"], config.get("pull_policy", "missing")
        if policy == "never" or (policy == "missing" and image in self._engine.images):
            return ""
        pull = asyncio.ensure_future(self._engine.provide_image(image, policy, config.get("platform")))
        stopped = asyncio.ensure_future(self._stopped.wait())
        limit = config.get("pull_timeout", PULL_TIMEOUT_SECONDS)
        self.pulling = image
        await asyncio.wait([pull, stopped], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        self.pulling = ""
        stopped.cancel()
        if pull.done():
            return pull.result()
        pull.cancel()
        return f"pulling {image} " + ("was stopped" if self._stop_reason else f"took more than {limit} s")

    async def adopt(self) -> End:
        """Live from a container that a former life has left, running or ended, to the end."""
        inspected = await self._engine.inspect(self.container) or {}
        self.name = str(labels_of(inspected).get("jobworker.name", self.name))
        if is_running(part_of(inspected, "State")):  # of one that has ended it is not known when
            self._started = asyncio.get_running_loop().time() - self._engine.seconds_since_start(inspected)
        await self._follow()
        return await self._conclude(None)

    async def _conclude(self, code: int | None, unreached: bool = False) -> End:
        """Find out how it ended. code: the exit code of `docker run`, None where that was not ours.

        unreached: the command never reached the engine. Else the engine is waited for as long as it takes.
        Raises EngineAway.
        """
        if self._over.is_set():  # let go meanwhile, perhaps before there was a container
            return End(code, "cancelled")
        patience = ENGINE_PATIENCE_SECONDS if unreached else math.inf
        state = await self._engine.state(self.container, patience) if code != 0 else None
        while state and (is_running(state) or (code is not None and has_other_code(state, code))):
            await self._follow()  # the command was killed: the container, or its output, went on
            state, code = await self._engine.state(self.container), None
        state = await self._with_oom(state)
        if state and state.get("Status") in NEVER_STARTED and not await self._fence():
            await self._follow()  # it did start, after its command was killed
            return await self._conclude(None)
        if state is None and was_there(code) and not self._stop_reason:
            self.output.say("jobworker: its container is gone: somebody removed it\n")
        code, reason = read_state(state) if state else exit_of_command(code)
        if reason == "docker" and not await self._engine.may_have_image(self.config.get("image", "")):
            code, reason = None, "image"
        if self._stop_reason:
            return End(code, self._stop_reason)
        return End(code, None if code == 0 else reason)

    async def _with_oom(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Look again at a container that was killed: a busy engine learns seconds later that its memory ran out."""
        for _ in range(OOM_LOOKS):
            if not state or state.get("ExitCode") != KILLED or state.get("OOMKilled") or self._stop_reason:
                break
            await asyncio.sleep(OOM_AGAIN_SECONDS)
            state = await self._engine.state(self.container)
        return state

    async def _fence(self) -> bool:
        """Keep a container that was only created from being started; False where it has started."""
        for _ in range(FENCE_TRIES):
            if await self._engine.remove_if_never_started(self.container):
                return True
            state = await self._engine.state(self.container)
            if state and state.get("Status") not in NEVER_STARTED:
                return False
        return True  # it can't be removed, and nobody has started it in all this time

    async def _follow(self) -> None:
        """Read the container's output again from its start, until it has ended."""
        failed = 0
        goes_on: bool | None = False
        # A container that is gone has no state, and what was read of it stays.
        while state := await self._engine.state(self.container):
            if state.get("Status") in HALF_REMOVED:
                break  # nor is more to be had of one whose removal has failed
            has_ended, gives_up = not is_running(state), failed >= LOG_TRIES
            if not has_ended and self._started is None:  # it was only created when it was found
                self._started = asyncio.get_running_loop().time()
            if not goes_on:
                self.output.read_again()
            add = self.output.add_rest() if goes_on else self.output.add
            goes_on = await self._engine.follow(self.container, add, gives_up)
            if goes_on is None:
                break  # what was read of it before stays
            if goes_on:
                self.output.is_whole()
                if has_ended:
                    break
                await self._engine.wait(self.container)  # the command may have ended before it
            elif gives_up:
                self.output.say("jobworker: docker can't read more of this log\n")
                break
            else:  # the command was killed, or the engine is away
                failed = failed + 1 if has_ended else 0
                await asyncio.sleep(ENGINE_RETRY_SECONDS)
        await self._engine.wait(self.container)

    async def _stop_container(self) -> None:
        while not self._over.is_set():
            # Again until it has ended: a container that is only being created can't be stopped yet.
            await self._engine.stop(self.container, self.config.get("stop_grace_period", STOP_GRACE_SECONDS))
            await happens(self._over, STOP_AGAIN_SECONDS)


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for some time; whether it has come."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


def allows(globs: list[str], config: Config) -> bool:
    """Whether a worker with these --allow-image runs this configuration.

    A glob's part before its first slash, where a registry's name would be, matches the image's part before its own.
    """
    words_alone = all(word.startswith("-") and word != "--" for word in config.get("options", []))
    return not globs or (words_alone and any(matches(config["image"], glob) for glob in globs))


def matches(image: str, glob: str) -> bool:
    parts, patterns = image.partition("/")[::2], glob.partition("/")[::2]
    return glob == "*" or all(fnmatch.fnmatchcase(part, pattern) for part, pattern in zip(parts, patterns, strict=True))
