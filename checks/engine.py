"""An engine for the demo and the tests: `engine.py run [--or-podman | --and-podman] -- COMMAND...`.

COMMAND runs with DOCKER_HOST naming an engine that has the images `hello-world` and `busybox`. One that answers already
is used as it is. Where none does and we are root on Debian, a private one is started from the distribution's packages,
and stopped again at the end.

--or-podman: where no Docker engine answers, a podman that runs containers will do; JOBWORKER_DOCKER then names it.
--and-podman: podman, where it is there, has the images, too, in a storage of our own that its variables name.

A machine has at most one private engine, as two would take the bridge docker0 from each other. Runs at the same time
share it: each holds a shared lock on `users` as long as it lasts, and the one that is left alone there at its end stops
the engine. The kernel drops the lock of a run that is killed, so the next run takes over what that one left behind.

    start: lock ─▶ share `users` ─▶ it answers, or: stop the remains and start ─▶ images ─▶ unlock
    end:   lock ─▶ alone in `users`: stop ─▶ unlock
"""

import argparse
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
PODMANS_FILES = {
    "CONTAINERS_CONF": """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
""",
    "CONTAINERS_STORAGE_CONF": """[storage]
driver = "vfs"
graphroot = "{folder}/data"
runroot = "{folder}/run"
""",
}
HELLO = """#!/bin/sh
echo
echo 'Hello from Docker!'
echo 'This message shows that your installation appears to be working correctly.'
echo
"""


@contextmanager
def running_engine(or_podman: bool, and_podman: bool) -> Iterator[None]:
    """Have an engine with the test images, named by os.environ's DOCKER_HOST, for as long as the block runs.

    Raises SetupError, with a sentence for the user, where no engine is to be had.
    """
    if or_podman and not succeeds("version") and podman_runs():
        os.environ["JOBWORKER_DOCKER"] = "podman"
        yield
        return
    if and_podman and shutil.which("podman"):
        name_podmans_files()
        provide_images("podman")
    if not succeeds("version"):
        provide_packages()
    if not succeeds("version"):  # where there is systemd, the package has started one
        with private_engine():
            yield
    else:
        os.environ["DOCKER_HOST"] = ask_engine("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
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


def podman_runs() -> bool:
    """Whether there is a podman that runs a container; it then has the images."""
    if not shutil.which("podman"):
        return False
    try:
        provide_images("podman")
    except SetupError:
        return False
    return succeeds("run", "--rm", "busybox", "true", command="podman")


def name_podmans_files() -> None:
    """Have podman keep its images and containers in our folder, and run where neither network nor systemd is set up.

    Its other runtime, crun, starts nothing where both versions of cgroups are mounted.
    """
    folder = scratch_folder() / "podman"
    folder.mkdir(exist_ok=True)
    for variable, text in PODMANS_FILES.items():
        file = folder / variable.lower()
        file.write_text(text.format(folder=folder))
        os.environ[variable] = str(file)


def ask_engine(*arguments: str, seconds: float = ANSWER_SECONDS, stdin: bytes = b"", command: str = "docker") -> str:
    """Run an engine's command, within a time, and give its output. Raises SetupError with its complaint if it fails."""
    try:
        result = subprocess.run([command, *arguments], input=stdin, capture_output=True, timeout=seconds, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SetupError(str(error)) from None
    if result.returncode != 0:
        raise SetupError(result.stderr.decode(errors="replace").strip())
    return result.stdout.decode(errors="replace").strip()


def succeeds(*arguments: str, seconds: float = ANSWER_SECONDS, command: str = "docker") -> bool:
    try:
        ask_engine(*arguments, seconds=seconds, command=command)
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


def provide_images(command: str = "docker") -> None:
    missing = [image for image in COMMANDS if not succeeds("image", "inspect", image, command=command)]
    if not missing:
        return
    print(f"Pulling {' and '.join(missing)} ...", flush=True)
    if all(succeeds("pull", image, seconds=PULL_SECONDS, command=command) for image in missing):
        return
    print("They can't be pulled: making them from busybox ...", flush=True)
    for image in missing:
        start = f"CMD {json.dumps([COMMANDS[image]])}"
        ask_engine("import", "--change", start, "-", image, stdin=busybox_root(), command=command)


def busybox_root() -> bytes:
    """Give a root file system as a tar: busybox under all its names, and hello-world's program."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    if not busybox.exists() or b"/ld-" in busybox.read_bytes():  # one that is linked with libc can't run alone
        install("busybox-static")
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=archive, mode="w") as tar:
        root = Path(folder)
        root.chmod(0o755)  # for whoever runs there, not for root alone
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", choices=["run"])
    podman = parser.add_mutually_exclusive_group()
    podman.add_argument("--or-podman", action="store_true", help="podman will do where no Docker engine answers")
    podman.add_argument("--and-podman", action="store_true", help="podman, where it is there, has the images, too")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args()
    for signum in SIGNALS:
        signal.signal(signum, interrupt)
    try:
        with running_engine(options.or_podman, options.and_podman):
            return run(options.command)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
