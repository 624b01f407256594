"""Ends commands of the engine that nobody else ends: those of an earlier life of this worker, and those that hang."""

import contextlib
import os
import signal
import time
from pathlib import Path


def end_commands(commands: list[set[str]]) -> None:
    """End the processes that have all words of one of these among their arguments. What they have started runs on.

    Looks in /proc; elsewhere than on Linux there is nothing to see.
    """
    wanted = [{word.encode() for word in words} for words in commands]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = set((entry / "cmdline").read_bytes().split(b"\0"))
            if any(words <= arguments for words in wanted) and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
                wait_for_end(entry)


def wait_for_end(process: Path) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (process / "cmdline").exists() and (process / "cmdline").read_bytes():
        time.sleep(0.01)
