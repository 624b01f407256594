"""The fixtures of all tests: a stage of one's own, stages that tests share, and the real engine."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import engines
from tests.engines import Engine
from tests.stage import JOBS, ROOT, Docker, Server, Stage, Worker, play, until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have those that are `alone` come first, while no long one runs that all would wait for."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test beside those of the other processes; one that is `alone` runs when theirs have ended.

    Who waits to be alone holds the gate, so that nobody overtakes it.
    """
    alone = item.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as room:
        with locked(ROOT / "tests", fcntl.LOCK_EX):
            room.enter_context(locked(ROOT, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@contextlib.contextmanager
def locked(folder: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[None]]]:
    """What the scenarios of a file's `meanwhile` tests come to, of those that were chosen."""
    scenarios = [getattr(getattr(item, "function", None), "scenario", None) for item in request.session.items]
    of_file = [each for each in scenarios if each and each.__module__ == request.module.__name__]
    with ThreadPoolExecutor(16) as pool:
        yield {each: pool.submit(play, each, tmp_path_factory.mktemp("meanwhile")) for each in of_file}


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
# It outlives what ran out of memory by a second: of a container that ends at once a busy engine may never learn why.
- {name: greedy, image: busybox, mem_limit: 8m, command: [sh, -c, "(x=a; while :; do x=$x$x; done); sleep 1; exit 137"]}
- {name: nothing, image: busybox, command: [/no/such/program]}
- {name: own, image: busybox, command: [sh, -c, "echo $DOCKER_HOST $PATH"], parameters: {DOCKER_HOST: {}, PATH: {}}}
"""
        )
        server = stage.server(jobs=jobs)
        options = "--slots=2", f"--docker={engine.name}"
        worker = stage.worker(server, *options, name=f"test-{os.getpid()}", PATH=os.environ["PATH"])
        yield server, worker
        until(lambda: not engine.containers(server))
