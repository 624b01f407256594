"""Installs Debian packages where we may: `packages.py PACKAGE...`, as root on Debian or Ubuntu.

For what the demo and the tests need from the machine: the venv module, a Docker engine, a browser. Elsewhere one
sentence says what to install, and nothing is touched. Standard library only: it runs before there is a venv.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Not where TMPDIR says: all runs on a machine have to find the same one, and the path of a socket must be short.
SCRATCH = Path("/tmp/jobworker-engine")
LOCK_SECONDS = 600  # another apt-get may be at work, ours in a second checkout for one


class SetupError(Exception):
    """The machine lacks something that we can't provide; the message says what to do about it."""


def scratch_folder() -> Path:
    """Give our folder in /tmp, made if need be, readable by nobody else. Raises SetupError when it is not ours."""
    SCRATCH.mkdir(mode=0o700, exist_ok=True)
    status = SCRATCH.lstat()
    if SCRATCH.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SetupError(f"{SCRATCH} belongs to someone else or is open to others: remove it.")
    return SCRATCH


def install(*packages: str) -> None:
    """Install Debian packages without those they only recommend. Raises SetupError where that can't be done."""
    names = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SetupError(f"Please install what Debian calls {names}, or run this as root on Debian or Ubuntu.")
    print(f"Installing {names} with apt-get, which may take some minutes ...", flush=True)
    log = scratch_folder() / "apt.log"
    apt = ["apt-get", "--yes", "--option", f"DPkg::Lock::Timeout={LOCK_SECONDS}"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with log.open("w") as output:
        for command in (["update"], ["install", "--no-install-recommends", *packages]):
            result = subprocess.run(
                [*apt, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
            )
    if result.returncode != 0:  # the installation's: an update may fail for a source that is not needed
        raise SetupError(f"{log.read_text()}\napt-get could not install {names}: see above.")


def main() -> int:
    try:
        install(*sys.argv[1:])
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
