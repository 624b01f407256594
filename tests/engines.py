"""The real engines that tests run containers on, and a registry on loopback from which both pull."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stage import Server, until

NAMES = ("docker", "podman")
REGISTRY = """version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {folder}/images}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
INSECURE = """[[registry]]
location = "127.0.0.1:{port}"
insecure = true
"""


class Engine:
    """An engine by its command, which has the images hello-world and busybox."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *words: str) -> str:
        """Run a command of the engine, which must succeed, and give its output."""
        return subprocess.run([self.name, *words], check=True, capture_output=True, text=True).stdout

    def containers(self, server: Server, job: int | None = None) -> list[str]:
        """The names of the containers that this server's jobs, or one of them, have here."""
        worker = server.get("/api/workers?full=1")[0]["name"]
        labels = [f"jobworker.worker={worker}"] + ([f"jobworker.job={job}"] if job else [])
        return self("ps", "-a", *(f"--filter=label={label}" for label in labels), "--format={{.Names}}").split()

    def client(self, container: str) -> int:
        """The process id of the `docker run` of a container."""
        [client] = [
            int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if self._runs(path, container)
        ]
        return client

    def _runs(self, command_line: Path, container: str) -> bool:
        with contextlib.suppress(OSError):
            words = command_line.read_bytes().split(b"\0")
            return b"run" in words[:3] and f"--name={container}".encode() in words and self.name.encode() in words[0]
        return False


def engine(name: str) -> Engine:
    """Give a real engine; skips the test where `make test` could not provide it."""
    if name == "docker" and "DOCKER_HOST" not in os.environ:
        pytest.skip("DOCKER_HOST names no engine")
    if name == "podman" and "CONTAINERS_STORAGE_CONF" not in os.environ:
        pytest.skip("there is no podman: apt-get install podman, then make test")
    return Engine(name)


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run a registry; give its address. Both engines take one on loopback without TLS, podman once it is told so."""
    if not shutil.which("docker-registry"):
        pytest.skip("there is no docker-registry: apt-get install docker-registry")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "registry.yml").write_text(REGISTRY.format(folder=folder, port=port))
    insecure = folder / "registries.conf"
    insecure.write_text(INSECURE.format(port=port))
    os.environ["CONTAINERS_REGISTRIES_CONF"] = str(insecure)
    with (folder / "registry.log").open("w") as log:
        process = subprocess.Popen(["docker-registry", "serve", folder / "registry.yml"], stdout=log, stderr=log)
    try:
        until(lambda: answers(port))
        yield f"127.0.0.1:{port}"
    finally:
        del os.environ["CONTAINERS_REGISTRIES_CONF"]
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
