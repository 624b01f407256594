"""The fixtures of all tests: a stage of one's own, stages that tests share, and the real engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import engines
from tests.engines import Engine
from tests.stage import JOBS, Docker, Server, Stage, Worker, play, until


@pytest.fixture(scope="session", autouse=True)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[None]]]:
    """What the scenarios of those `meanwhile` tests come to that were chosen."""
    scenarios = [getattr(getattr(item, "function", None), "scenario", None) for item in request.session.items]
    with ThreadPoolExecutor(16) as pool:
        folder = tmp_path_factory.mktemp
        yield {each: pool.submit(play, each, folder("meanwhile")) for each in scenarios if each}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path)) as stage:
        yield stage


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("shared"))) as stage:
        yield stage


@pytest.fixture(scope="module")
def idle(shared: Stage) -> Server:
    """A server without workers, which keeps what it is given: for tests that only talk HTTP."""
    return shared.server("--hold")


@pytest.fixture(scope="module")
def busy_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Docker]]:
    """A server with one worker of four slots, for tests that need nothing of their own."""
    with contextlib.closing(Stage(tmp_path_factory.mktemp("busy"))) as stage:
        server = stage.server()
        stage.worker(server, "--slots", "4")
        yield server, stage.docker


@pytest.fixture(scope="session", params=engines.NAMES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Docker and podman, one after the other."""
    return engines.engine(request.param)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with engines.registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="class")
def real(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[tuple[Server, Worker]]:
    """A server and a worker on a real engine."""
    with contextlib.closing(Stage(tmp_path_factory.mktemp("real"))) as stage:
        jobs = (
            JOBS
            + """
- {name: missing, image: "jobworker-test/no-such-image:1", pull_policy: never}
- {name: greedy, image: busybox, mem_limit: 16m, command: [sh, -c, "x=a; while :; do x=$x$x; done"]}
- {name: nothing, image: busybox, command: [/no/such/program]}
- {name: own, image: busybox, command: [sh, -c, "echo $DOCKER_HOST $PATH"], parameters: {DOCKER_HOST: {}, PATH: {}}}
"""
        )
        server = stage.server(jobs=jobs)
        options = "--slots=2", f"--docker={engine.name}"
        worker = stage.worker(server, *options, name=f"test-{os.getpid()}", PATH=os.environ["PATH"])
        yield server, worker
        until(lambda: not engine.containers(server))
