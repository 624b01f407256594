"""The life of a container, over an engine that says what the test wants."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobworker import container
from jobworker import life as life_module
from jobworker.container import Answer, Engine, EngineAway
from jobworker.life import End, Life


class LateStart:
    """An engine whose `docker run` is killed between creation and start; the container starts and ends after that."""

    def __init__(self) -> None:
        self.states: Iterator[dict[str, Any]] = iter([{"Status": "created"}])

    async def __call__(
        self,
        words: list[str],
        stdin: str = "",  # noqa: ARG002
        environment: dict[str, str] | None = None,  # noqa: ARG002
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,  # noqa: ARG002
    ) -> Answer:
        match words[0]:
            case "run":
                return Answer(-9)
            case "inspect":
                ended = {"Status": "exited", "ExitCode": 0, "StartedAt": "2026-01-31"}
                return Answer(0, json.dumps([{"State": next(self.states, ended)}]))
            case "logs":
                assert output
                output(b"hello\n")
        return Answer(0)


class HalfRemoved(LateStart):
    """An engine with a container that it could not remove: it tells its state, and nothing of its output any more."""

    def __init__(self, **state: Any) -> None:
        self.states = itertools.repeat({"Status": "dead"} | state)

    async def __call__(
        self,
        words: list[str],
        stdin: str = "",
        environment: dict[str, str] | None = None,
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        if words[0] == "logs":
            assert output
            output(b"can not get logs from container which is dead or marked for removal\n")
            return Answer(1)
        return await super().__call__(words, stdin, environment, output, deadline)


class CutOff(LateStart):
    """An engine whose first `docker run` fails with a complaint, whatever became of its container."""

    def __init__(self, log: bytes, tells_of_images: bool = True, **state: Any) -> None:
        self.states, self.log, self.tells_of_images = itertools.repeat(state), log, tells_of_images
        self.calls: Counter[str] = Counter()

    async def __call__(
        self,
        words: list[str],
        stdin: str = "",
        environment: dict[str, str] | None = None,
        output: Callable[[bytes], None] | None = None,
        deadline: float | None = None,
    ) -> Answer:
        self.calls[words[0]] += 1
        if output:
            fails = words[0] == "run" and self.calls["run"] == 1
            output(b"docker: unexpected EOF\n" if fails else self.log)
            return Answer(125 if fails else 0)
        if words[0] == "image" and self.calls["run"] and not self.tells_of_images:
            return Answer(1, err="Cannot connect to the Docker daemon")
        return await super().__call__(words, stdin, environment, output, deadline)


def live_on(engine: CutOff) -> tuple[End, bytes]:
    """Live through a job on this engine; how it ended, and its log."""

    async def live() -> tuple[End, bytes]:
        life = Life(Engine(engine), {"job": {"image": "busybox"}}, "job", "container")
        end = await asyncio.wait_for(life.run({}, {}, [], 2), 20)
        return end, b"".join(data for _offset, data in life.output.unsent(100))

    return asyncio.run(live())


class TestLife:
    @pytest.mark.parametrize(
        ("state", "end"),
        [
            ({"ExitCode": 0, "StartedAt": "0001-01-01T00:00:00Z"}, End(None, "docker")),
            ({"StartedAt": "2026-01-31T12:00:00Z"}, End(None, "docker")),
            ({"ExitCode": None, "StartedAt": "2026-01-31T12:00:00Z"}, End(None, "docker")),
            ({"ExitCode": "0", "StartedAt": "2026-01-31T12:00:00Z"}, End(None, "docker")),
            ({"ExitCode": 3, "StartedAt": "2026-01-31T12:00:00Z"}, End(3, "exit")),
        ],
    )
    def test_one_that_could_not_be_removed_ends_though_its_log_can_not_be_read(
        self, state: dict[str, Any], end: End
    ) -> None:
        async def live() -> End:
            life = Life(Engine(HalfRemoved(**state)), {"job": {"image": "busybox"}}, "job", "container")
            return await asyncio.wait_for(life.adopt(), 10)

        assert asyncio.run(live()) == end

    def test_a_container_that_starts_after_its_command_was_killed_has_its_log(self) -> None:
        async def live() -> tuple[End, list[tuple[int, bytes]]]:
            life = Life(Engine(LateStart()), {"job": {"image": "busybox"}}, "job", "container")
            end = await life.run({}, {}, [], 2)
            return end, list(life.output.unsent(100))

        assert asyncio.run(live()) == (End(0, None), [(0, b"hello\n")])

    def test_one_that_was_only_created_when_it_was_found_has_its_time_from_its_start_on(self) -> None:
        async def live() -> tuple[End, bool]:
            engine = LateStart()
            engine.states = iter([{"Status": "created"}, {"Status": "running", "Running": True}])
            life = Life(Engine(engine), {"job": {"image": "busybox", "timeout": 1}}, "job", "container")
            return await life.adopt(), life.seconds is not None

        assert asyncio.run(live()) == (End(0, None), True)

    def test_a_container_that_ended_with_its_engine_has_its_whole_log(self) -> None:
        engine = CutOff(b"early\nlate\n", Status="exited", ExitCode=3, StartedAt="2026-01-31")
        assert live_on(engine) == (End(3, "exit"), b"early\nlate\n")

    def test_one_that_could_not_be_started_has_the_complaint_of_its_command(self) -> None:
        engine = CutOff(b"", Status="created", ExitCode=0, StartedAt="0001-01-01")
        assert live_on(engine) == (End(None, "docker"), b"docker: unexpected EOF\n")

    @pytest.mark.parametrize(
        "complaint", ["Cannot connect to the Docker daemon", "failed to connect to the docker API"]
    )
    def test_one_whose_engine_is_not_there_is_given_up(self, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async def command(
            words: list[str],
            stdin: str = "",  # noqa: ARG001
            environment: dict[str, str] | None = None,  # noqa: ARG001
            output: Callable[[bytes], None] | None = None,
            deadline: float | None = None,  # noqa: ARG001
        ) -> Answer:
            if output:
                output(f"docker: {complaint}\n".encode())
            return Answer(125 if words[0] == "run" else 1, err=complaint)

        async def live() -> End:
            engine = Engine(command)
            engine.images.add("busybox")
            life = Life(engine, {"job": {"image": "busybox"}}, "job", "container")
            return await asyncio.wait_for(life.run({}, {}, [], 2), 10)

        for module in (container, life_module):
            monkeypatch.setattr(module, "ENGINE_PATIENCE_SECONDS", 0)
        with pytest.raises(EngineAway):
            asyncio.run(live())

    def test_one_is_not_started_again_where_the_engine_does_not_tell_of_its_image(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(container, "ENGINE_PATIENCE_SECONDS", 0)
        engine = CutOff(b"hello\n", tells_of_images=False, Status="exited", ExitCode=0, StartedAt="2026-01-31")
        assert live_on(engine) == (End(0, None), b"hello\n")
        assert engine.calls["run"] == 1
