"""The life of a container, over an engine that says what the test wants."""

import asyncio
import json
from collections.abc import Callable

from jobworker.container import Answer, Engine
from jobworker.life import End, Life


class LateStart:
    """An engine whose `docker run` is killed between creation and start; the container starts and ends after that."""

    def __init__(self) -> None:
        self.states = iter([{"Status": "created"}])

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


class TestLife:
    def test_a_container_that_starts_after_its_command_was_killed_has_its_log(self) -> None:
        async def live() -> tuple[End, list[tuple[int, bytes]]]:
            life = Life(Engine(LateStart()), {"job": {"image": "busybox"}}, "job", "container")
            end = await life.run({}, {}, [], 2)
            return end, list(life.output.unsent(100))

        assert asyncio.run(live()) == (End(0, None), [(0, b"hello\n")])
