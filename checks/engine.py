"""A Docker engine for the demo and the tests: `engine.py run -- COMMAND...`.

COMMAND runs with DOCKER_HOST naming an engine that has the images `hello-world` and `busybox`. One that answers already
is used as it is. Where none does and we are root on Debian, a private one is started from the distribution's packages,
and stopped again at the end.

A machine has at most one private engine, as two would take the bridge docker0 from each other. Runs at the same time
share it: each holds a shared lock on `users` as long as it lasts, and the one that is left alone there at its end stops
the engine. The kernel drops the lock of a run that is killed, so the next run takes over what that one left behind.

    start: lock ─▶ share `users` ─▶ it answers, or: stop the remains and start ─▶ images ─▶ unlock
    end:   lock ─▶ alone in `users`: stop ─▶ unlock
"""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from packages import SCRATCH, SetupError, install, scratch_folder

SOCKET = SCRATCH / "docker.sock"
PIDFILE = SCRATCH / "dockerd.pid"
CONTAINERD_PIDFILE = SCRATCH / "exec" / "containerd" / "containerd.pid"
START_SECONDS = 60
STOP_SECONDS = 30  # dockerd gives the containers that still run 15 of these
ANSWER_SECONDS = 30
PULL_SECONDS = 60
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PROGRAMS = {"docker.io": "dockerd", "iptables": "iptables", "busybox-static": "busybox"}
COMMANDS = {"hello-world": "/hello", "busybox": "/bin/sh"}
HELLO = """#!/bin/sh
echo
echo 'Hello from Docker!'
echo 'This message shows that your installation appears to be working correctly.'
echo
"""


@contextmanager
def running_engine() -> Iterator[None]:
    """Have an engine with the test images, named by os.environ's DOCKER_HOST, for as long as the block runs.

    Raises SetupError, with a sentence for the user, where no engine is to be had.
    """
    if not succeeds("version"):
        provide_packages()
    if not succeeds("version"):  # where there is systemd, the package has started one
        with private_engine():
            yield
    else:
        os.environ["DOCKER_HOST"] = docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
        provide_images()
        yield


@contextmanager
def private_engine() -> Iterator[None]:
    os.environ["DOCKER_HOST"] = f"unix://{SOCKET}"
    with (scratch_folder() / "users").open("w") as users:
        try:
            with start_stop_lock():
                fcntl.flock(users, fcntl.LOCK_SH)
                if not succeeds("version"):
                    stop_engine()
                    start_engine()
                provide_images()
            yield
        finally:
            with start_stop_lock():
                if is_alone(users):
                    print("Stopping the private Docker engine ...", flush=True)
                    stop_engine()


@contextmanager
def start_stop_lock() -> Iterator[None]:
    with (SCRATCH / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_alone(users: io.TextIOBase) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def docker(*arguments: str, seconds: float = ANSWER_SECONDS, stdin: bytes = b"") -> str:
    """Run a docker command, within a time, and give its output. Raises SetupError with its complaint when it fails."""
    command = ["docker", *arguments]
    try:
        result = subprocess.run(command, input=stdin, capture_output=True, timeout=seconds, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SetupError(str(error)) from None
    if result.returncode != 0:
        raise SetupError(result.stderr.decode(errors="replace").strip())
    return result.stdout.decode(errors="replace").strip()


def succeeds(*arguments: str, seconds: float = ANSWER_SECONDS) -> bool:
    try:
        docker(*arguments, seconds=seconds)
    except SetupError:
        return False
    return True


def provide_packages() -> None:
    if os.geteuid() != 0:
        raise SetupError("No Docker engine answers to `docker version`: install and start Docker, or run this as root.")
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # `su` without a dash leaves them out
    if missing := [package for package, program in PROGRAMS.items() if not shutil.which(program)]:
        install(*missing)
    if not shutil.which("docker"):  # a package of its own since Debian 13
        install("docker-cli")


def start_engine() -> None:
    print("Starting a private Docker engine ...", flush=True)
    config, log = SCRATCH / "daemon.json", SCRATCH / "dockerd.log"
    folders = {"data-root": str(SCRATCH / "data"), "exec-root": str(SCRATCH / "exec"), "pidfile": str(PIDFILE)}
    config.write_text(json.dumps({"hosts": [f"unix://{SOCKET}"], **folders}))
    with log.open("w") as output:
        dockerd = subprocess.Popen(
            ["dockerd", "--config-file", config], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # it may serve others when a Ctrl-C ends our run
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    try:
        while not succeeds("version"):
            if dockerd.poll() is not None or time.monotonic() > deadline:
                raise SetupError(f"{log.read_text()}\nNo private Docker engine starts here, see above: install Docker.")
            time.sleep(0.1)
    except BaseException:  # an interrupt too: nobody finds an engine that has not written its pidfile yet
        dockerd.terminate()
        dockerd.wait(STOP_SECONDS)
        raise


def stop_engine() -> None:
    """End the private engine, whoever started it, and wait until it is gone; does nothing when there is none."""
    for pidfile in (PIDFILE, CONTAINERD_PIDFILE):
        pid = int(pidfile.read_text() or 0) if pidfile.exists() else 0
        for signum in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_SECONDS
            if is_ours(pid):
                os.kill(pid, signum)
            while is_ours(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        pidfile.unlink(missing_ok=True)  # the next dockerd would wait for whoever has this number by then


def is_ours(pid: int) -> bool:
    """Tell whether a pid is our engine's: not another process's by now, nor a zombie, whose command line is empty."""
    try:
        return str(SCRATCH) in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def provide_images() -> None:
    missing = [image for image in COMMANDS if not succeeds("image", "inspect", image)]
    if not missing:
        return
    print(f"Pulling {' and '.join(missing)} ...", flush=True)
    if all(succeeds("pull", image, seconds=PULL_SECONDS) for image in missing):
        return
    print("They can't be pulled: making them from busybox ...", flush=True)
    for image in missing:
        docker("import", "--change", f"CMD {json.dumps([COMMANDS[image]])}", "-", image, stdin=busybox_root())


def busybox_root() -> bytes:
    """Give a root file system as a tar: busybox under all its names, and hello-world's program."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    if not busybox.exists() or b"/ld-" in busybox.read_bytes():  # one that is linked with libc can't run alone
        install("busybox-static")
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=archive, mode="w") as tar:
        root = Path(folder)
        (root / "bin").mkdir()
        shutil.copy(busybox, root / "bin" / "busybox")
        for name in {*names} - {"busybox"}:
            (root / "bin" / name).symlink_to("busybox")
        (root / "hello").write_text(HELLO)
        (root / "hello").chmod(0o755)
        (root / "tmp").mkdir(mode=0o777)
        tar.add(root, arcname="/")
    return archive.getvalue()


def run(command: list[str]) -> int:
    """Run a command to its end and give its exit code; signals to us are passed on to it meanwhile."""
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise SetupError(str(error)) from None

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        if signum != signal.SIGINT or not sys.stdin.isatty():  # a terminal's Ctrl-C went to the command as well
            process.send_signal(signum)

    for signum in SIGNALS:
        signal.signal(signum, pass_on)
    code = process.wait()
    return code if code >= 0 else 128 - code


def interrupt(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    if sys.argv[1:3] != ["run", "--"] or len(sys.argv) < 4:
        print("usage: engine.py run -- COMMAND...", file=sys.stderr)
        return 2
    for signum in SIGNALS:
        signal.signal(signum, interrupt)
    try:
        with running_engine():
            return run(sys.argv[3:])
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
