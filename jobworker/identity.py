"""Who a worker is: a name that no other worker on this host has, held by the lock of a file."""

import contextlib
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from urllib.parse import quote

from jobworker.options import OptionError


def hold_name(name: str | None) -> tuple[str, int]:
    """Give a name that no other worker on this host has, and the file descriptor whose lock holds it.

    By default the host's name with the lowest free number, so that a worker that starts again is itself again.
    Raises OptionError where the given name is in use.
    """
    folder = open_own_folder(Path(tempfile.gettempdir()) / f"jobworker-{os.getuid()}")
    with contextlib.suppress(OSError):  # where systemd deletes what is old, it leaves out a folder that is locked
        fcntl.flock(folder, fcntl.LOCK_SH)
    host = socket.gethostname()
    for candidate in [name] if name else (f"{host}-{number}" for number in range(1, 10_000)):
        lock = lock_of(candidate)
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        except OSError as error:
            raise OptionError(f"the lock of {candidate} can't be had: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return candidate, file
    raise OptionError(f"a worker named {name} runs on this host already; give each a --name of its own")


def lock_of(name: str) -> str:
    """Give the name of its lock's file: the worker's own, or a hash of it where no file can have one so long."""
    quoted = quote(name, safe="")
    return f"{quoted if len(quoted) < 200 else hashlib.sha256(quoted.encode()).hexdigest()}.lock"


def open_own_folder(path: Path) -> int:
    """Give a file descriptor of a folder that nobody else can write to. Raises OptionError where it is another's."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise OptionError(f"{path} must be a folder: {error}; remove it, or set TMPDIR") from error
    status = os.fstat(folder)
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise OptionError(f"{path} must be yours alone, mode 700: it is another's, or open to others; or set TMPDIR")
    return folder
