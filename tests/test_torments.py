"""The torments and the benchmarks themselves, in their shortest form: that they run, and find nothing broken."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.stage import ROOT

GROUPS: list[tuple[str, ...]] = [(), ("together",), ("--long",), ("huey",)]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


class TestTorments:
    """What `make chaos` and `make bench` do at length."""

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls) -> Iterator[dict[tuple[str, ...], Future[str]]]:
        """The benchmarks, all at once: nobody looks here at what they measure."""
        with ThreadPoolExecutor() as pool:
            yield {group: pool.submit(run, "checks/bench.py", "--quick", *group) for group in GROUPS}

    def test_a_short_storm_breaks_no_promise(self) -> None:
        assert "1 of 1 storms kept every promise" in run("checks/chaos.py", "--short", "--seed", "7")

    @pytest.mark.parametrize("group", GROUPS, ids=" ".join)
    def test_every_row_of_the_benchmarks_can_be_measured(
        self, runs: dict[tuple[str, ...], Future[str]], group: tuple[str, ...]
    ) -> None:
        _when, _head, *lines = runs[group].result().splitlines()
        rows = run("checks/bench.py", "--list", *group).split()
        assert [line.split()[0] for line in lines if line[0] != " "] == rows
        assert not [line for line in lines if "skipped" in line]

    def test_histories_break_no_promise(self) -> None:
        assert "1000 of 1000 histories kept every promise" in run("checks/simulate.py", "--histories", "1000")

    def test_a_history_is_replayed_exactly(self) -> None:
        first, second = (run("checks/simulate.py", "--histories", "3", "--seed", "11") for _ in range(2))
        assert [line for line in first.splitlines() if "digest" not in line] == [
            line for line in second.splitlines() if "digest" not in line
        ]
        assert first.rpartition("digest is ")[2] == second.rpartition("digest is ")[2]
