"""The torments and the benchmarks themselves, in their shortest form: that they run, and find nothing broken."""

import subprocess
import sys

import pytest

from tests.stage import ROOT


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


class TestTorments:
    """What `make chaos` and `make bench` do at length."""

    def test_a_short_storm_breaks_no_promise(self) -> None:
        assert "1 of 1 storms kept every promise" in run("checks/chaos.py", "--short", "--seed", "7")

    def test_histories_break_no_promise(self) -> None:
        assert "600 of 600 histories kept every promise" in run("checks/simulate.py", "--histories", "600")

    def test_a_history_is_replayed_exactly(self) -> None:
        first, second = (run("checks/simulate.py", "--histories", "3", "--seed", "11") for _ in range(2))
        assert [line for line in first.splitlines() if "digest" not in line] == [
            line for line in second.splitlines() if "digest" not in line
        ]
        assert first.rpartition("digest is ")[2] == second.rpartition("digest is ")[2]

    @pytest.mark.parametrize("group", [[], ["together"], ["--long"], ["huey"]], ids=" ".join)
    def test_every_row_of_the_benchmarks_can_be_measured(self, group: list[str]) -> None:
        _when, _head, *lines = run("checks/bench.py", "--quick", *group).splitlines()
        rows = run("checks/bench.py", "--list", *group).split()
        assert [line.split()[0] for line in lines if line[0] != " "] == rows
        assert not [line for line in lines if "skipped" in line]
