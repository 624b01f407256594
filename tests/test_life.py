"""The life of a container, over an engine that says what the test wants."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobworker.container import Answer, Engine
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
