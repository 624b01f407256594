"""Ends the `docker run` commands that an earlier life of this worker has left."""

import contextlib
import os
import signal
import time
from pathlib import Path


def end_orphans(labels: dict[str, str]) -> None:
    """End `docker run` commands that outlived the worker that started them, before they start one more container.

    The containers that they have started run on. Looks in /proc; elsewhere than on Linux there is nothing to see.
    """
    wanted = {f"{key}={value}".encode() for key, value in labels.items()}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            labels_of = {word.removeprefix(b"--label=") for word in arguments}
            if b"run" in arguments and wanted <= labels_of and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
                wait_for_end(entry)


def wait_for_end(process: Path) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (process / "cmdline").exists() and (process / "cmdline").read_bytes():
        time.sleep(0.01)
