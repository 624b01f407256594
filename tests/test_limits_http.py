"""Promise 13 on the HTTP side: who hangs up, waits, does not read or sends much takes nothing from anyone else."""

from __future__ import annotations

import contextlib
import re
import resource
import select
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import protocol
from jobworker import api, message, web
from jobworker.message import Response
from jobworker.options import UNSENT_BYTES
from jobworker.web import HttpServer
from server import MAX_SILENT
from tests.peers import HANDSHAKE, VERSION_2, ScriptedWorker, head
from tests.stage import Program, Reply, Server, Stage, bearer, problem, read_to_end, until
from tests.test_places import dial, send, serving

CROWD = web.MAX_CONNECTIONS + 36
MEMORY_KIB = 200 * 1024
API, WORKER = "a" * 20, "w" * 20


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    """Take as many descriptors as a crowd needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def guarded(stage: Stage) -> Server:
    """A server with tokens."""
    tokens = stage.folder / "tokens"
    tokens.write_text(f"api {API}\nworker {WORKER}\n")
    tokens.chmod(0o600)
    return stage.server("--hold", "--token-file", str(tokens))


@contextlib.contextmanager
def crowd(server: Server, data: bytes, count: int = CROWD) -> Iterator[list[socket.socket]]:
    """Connections that each have sent `data` and read nothing."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for peer in peers:
            peer.settimeout(10)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", server.port))
            send(peer, data)
        yield peers


def threads(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"Threads:\s+(\d+)", status)[0])


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def peak_kib(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def serves(server: Server, token: str = "") -> None:
    """See the server answer at once: its health, a request, a worker's handshake. A slow moment may be by chance."""
    headers = bearer(token) if token else {}
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        assert server.http("GET", "/healthz").status == 200
        assert server.http("GET", "/api/workers", headers=headers).status == 200
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
            peer.sendall(HANDSHAKE)
            assert peer.recv(100).startswith(b"HTTP/1.1 401 " if token else b"HTTP/1.1 101 ")
        seconds.append((time.monotonic() - start) / 3)
    assert statistics.median(seconds) < 1
    assert server.memory_kib() < MEMORY_KIB


class TestCallers:
    """Of what takes long: a job's end, its log, events."""

    WAITS = ("/api/jobs/1?wait=3600", "/api/jobs/1/log?follow=1", "/api/events")
    MORE = (b"", b"GET")

    @staticmethod
    def hang_up(folder: Path, path: str, more: bytes) -> None:
        with contextlib.closing(Stage(folder)) as stage:
            server = stage.server("--hold")
            before = threads(server)
            server.sh("true")
            with crowd(server, head(b"GET " + path.encode()) + more, 200):
                until(lambda: threads(server) >= before + 200)
            until(lambda: threads(server) <= before + 1)

    @pytest.fixture(scope="class")
    @classmethod
    def hang_ups(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, bytes], Future[None]]]:
        """Of each kind one, all at once, as it takes seconds until the server looks."""
        kinds = [(path, more) for path in cls.WAITS for more in cls.MORE]
        with ThreadPoolExecutor() as pool:
            yield {kind: pool.submit(cls.hang_up, tmp_path_factory.mktemp("hang-up"), *kind) for kind in kinds}

    @pytest.mark.parametrize("more", MORE, ids=["", "having sent more"])
    @pytest.mark.parametrize("path", WAITS)
    def test_who_hangs_up_is_noticed_within_seconds(
        self, hang_ups: dict[tuple[str, bytes], Future[None]], path: str, more: bytes
    ) -> None:
        hang_ups[path, more].result()

    @pytest.mark.parametrize("path", WAITS)
    def test_a_crowd_that_stays_holds_up_nobody(self, stage: Stage, path: str) -> None:
        server = stage.server("--hold")
        server.sh("true")
        with crowd(server, head(b"GET " + path.encode())):
            serves(server)

    def test_a_crowd_without_descriptors_holds_up_nobody(self, stage: Stage) -> None:
        """Where the system gives fewer than the cap of connections needs."""
        server = stage.server("--hold")
        most = descriptors(server) + 50
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (most, most))
        with crowd(server, b"", 100):
            serves(server)

    def test_a_crowd_that_hung_up_leaves_nothing(self, stage: Stage) -> None:
        server = stage.server("--hold")
        before = threads(server)
        server.sh("true")
        with crowd(server, head(b"POST /api/jobs/quick?wait=3600")):
            pass
        serves(server)
        until(lambda: threads(server) <= before + 5)

    @pytest.mark.parametrize("wait", ["1e-9", "0.0000001", "1e-300"])
    def test_a_wait_of_less_than_a_microsecond_ends(self, idle: Server, wait: str) -> None:
        job = idle.sh("true")
        assert idle.get(f"/api/jobs/{job}?wait={wait}")["state"] == "queued"


class TestReaders:
    """Who does not read what they asked for."""

    def test_strangers_who_do_not_read_shut_nobody_out(self, guarded: Server) -> None:
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as listener:
            listener.sendall(head(b"GET /api/events", b"Authorization: Bearer " + API.encode()))
            assert listener.recv(100).startswith(b"HTTP/1.1 200 ")
            with crowd(guarded, head(b"GET /") * 20):
                serves(guarded, API)
                assert not web.HANG_UP & hung_up(listener)

    def test_those_who_may_ask_and_do_not_read_shut_nobody_out(self, stage: Stage) -> None:
        server = stage.server("--hold")
        assert server.http("POST", "/api/jobs", [{"name": "quick"}] * 10_000).status == 200
        with crowd(server, head(b"GET /api/jobs?full=1")):
            serves(server)

    @pytest.mark.parametrize(("count", "script"), [(10_000, "x"), (600, "x" * 30_000)], ids=["many", "long"])
    @pytest.mark.parametrize("query", ["?full=1", "?full=1&before=2147483647&limit=10000"])
    def test_those_who_ask_for_much_and_do_not_read_cost_no_memory(
        self, stage: Stage, query: str, count: int, script: str
    ) -> None:
        server = stage.server("--hold")
        jobs = [{"name": "sh", "environment": {"SCRIPT": script}}] * 200
        for _ in range(count // len(jobs)):
            assert server.http("POST", "/api/jobs", jobs).status == 200
        with crowd(server, head(b"GET /api/jobs" + query.encode()), 300):
            serves(server)
        assert peak_kib(server) < MEMORY_KIB

    def test_those_who_listen_and_do_not_read_cost_no_memory(self, stage: Stage) -> None:
        server = stage.server("--hold")
        jobs = [{"name": "sh", "environment": {"SCRIPT": "x" * 30_000}}] * 200
        with crowd(server, head(b"GET /api/events"), 300):
            assert server.http("POST", "/api/jobs", jobs, 60).status == 200
            serves(server)
        assert peak_kib(server) < MEMORY_KIB

    def test_those_who_ask_for_a_log_and_do_not_read_cost_no_memory(self, stage: Stage) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        with ScriptedWorker(server, "chatty") as worker:
            worker.runs()
            for number in range(16):
                worker.send(protocol.Log(job, 1, number * 65_536, bytes(65_536)))
            until(lambda: server.job(job)["log_bytes"] == 16 * 65_536)
            with crowd(server, head(b"GET /api/jobs/%d/log" % job), 300):
                serves(server)
        assert peak_kib(server) < MEMORY_KIB

    def test_a_reader_that_takes_little_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each piece is taken within the time that one may take; all together are not."""
        monkeypatch.setattr(web, "SEND_SECONDS", 2)
        monkeypatch.setattr(web, "SLOWEST_BYTES", 10**7)
        with serving(lambda _: Response(iter(lambda: b"x" * 50_000, b""))) as server, dial(server) as peer:
            peer.sendall(head(b"GET /"))
            until(lambda: server.places)
            for _ in range(40):  # a tenth of what the sender has ready: it never waits for longer than two looks
                look = server.next_check
                with contextlib.suppress(ConnectionError):
                    peer.recv(400_000)
                until(lambda look=look: server.next_check > look)  # type: ignore[misc]
                if not server.places:
                    return
        pytest.fail("it is still read to")


def hung_up(peer: socket.socket) -> int:
    poll = select.poll()
    poll.register(peer, web.HANG_UP)
    return sum(event for _, event in poll.poll(0))


class TestBodies:
    """Large ones have a share of their own."""

    def statuses(self, server: Server, times: int, body: object, path: str = "/api/jobs", **headers: str) -> set[int]:
        """Send a body so many times, six at once, which holds up nobody and takes little memory."""

        def post(_: int) -> Reply:
            return server.http("POST", path, body, 60, headers)

        with ThreadPoolExecutor(6) as pool:
            replies = pool.map(post, range(times))
            serves(server)
            statuses = {reply.status for reply in replies}
        assert peak_kib(server) < MEMORY_KIB
        return statuses

    def test_six_long_lists_at_once(self, stage: Stage) -> None:
        server = stage.server("--hold")
        item = b'{"name":"nobody"},'
        body = b"[" + item * (message.MAX_BODY_BYTES // len(item) - 1) + b"{}]"
        assert self.statuses(server, 6, body) <= {404, 503}

    def test_lists_as_long_as_they_may_be_hold_up_nobody(self, stage: Stage) -> None:
        server = stage.server("--hold")
        assert self.statuses(server, 12, [{"name": "quick"}] * api.MAX_LIST_JOBS) <= {200, 503}

    def test_a_crowd_with_lists_that_are_not_large_holds_up_nobody(self, stage: Stage) -> None:
        server = stage.server("--hold")
        body = b"[" + b'{"name":"quick"},' * 3_500 + b'{"name":"quick"}]'
        assert len(body) < web.LARGE_BODY_BYTES
        with crowd(server, head(b"POST /api/jobs", b"Content-Length: %d" % len(body)) + body, 200):
            serves(server)
        assert peak_kib(server) < MEMORY_KIB

    def test_a_list_may_have_so_many_jobs(self, idle: Server) -> None:
        last = idle.post("quick")
        reply = idle.http("POST", "/api/jobs", [{"name": "quick"}] * (api.MAX_LIST_JOBS + 1))
        assert problem(reply, 413) == "a list may have 20,000 jobs; nothing was queued: send several lists"
        assert idle.get(f"/api/jobs?after={last}") == []

    @pytest.mark.parametrize("path", ["/api/jobs/quick", "/api/jobs"])
    def test_many_small_values_hold_up_nobody(self, stage: Stage, path: str) -> None:
        server = stage.server("--hold")
        values = b'{"":{"":{"":{"":{}}}}},'
        item = b'{"name":"quick","x":[' + values * (200_000 // len(values)) + b"0]},"
        body = b"[" + item * (message.MAX_BODY_BYTES // len(item) - 1) + b"{}]"
        assert self.statuses(server, 6, body, path, **{"Idempotency-Key": "k"}) <= {400, 413, 503}

    def test_one_that_comes_slowly_gives_its_place_to_one_that_does_not(self, stage: Stage) -> None:
        server = stage.server("--hold")
        slow = head(b"POST /api/jobs", b"Content-Length: 8000000") + b" " * 100_000
        jobs = [{"name": "quick"}] * 10_000
        with crowd(server, slow, web.LARGE_BODIES) as peers:

            def ended() -> list[socket.socket]:
                start = time.monotonic()
                assert server.http("POST", "/api/jobs", jobs).status in (200, 503)
                assert time.monotonic() - start < 2 * web.TURN_SECONDS
                return select.select(peers, [], [], 0.1)[0]

            # Again, as on a busy machine the first may be taken before all of the slow ones have come.
            one = until(ended, 20)[0]
            until(lambda: server.http("POST", "/api/jobs", jobs).status == 200)
            # 503: on a busy machine one of the slow ones may have come too late for a place of its own.
            assert one.recv(100).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 "))

    def test_one_that_nobody_asked_for_holds_up_no_other(self, stage: Stage) -> None:
        server = stage.server("--hold")
        before = threads(server)
        job = server.post("quick")
        until(lambda: threads(server) == before)
        body = b" " * 100_000
        with crowd(server, head(b"GET /api/jobs/%d?wait=60" % job, b"Content-Length: %d" % len(body)) + body, 1):
            until(lambda: threads(server) > before)
            assert server.http("POST", "/api/jobs/quick", b"{}" + body).status == 200

    def test_those_that_come_slowly_hold_up_no_small_one(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with crowd(server, head(b"POST /api/jobs", b"Content-Length: 8000000") + b" " * 100_000, 200):
            serves(server)
            assert server.http("POST", "/api/jobs", [{"name": "quick"}]).status == 200

    def test_one_too_many_is_told_when_to_come_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web, "TURN_SECONDS", 0)
        large = head(b"POST /", b"Content-Length: 100000") + b" "
        with serving(lambda _: Response(b"{}")) as server, contextlib.ExitStack() as stack:
            for _ in range(web.LARGE_BODIES):
                stack.enter_context(dial(server)).sendall(large)
            until(lambda: not server.large_bodies._value)
            with dial(server) as peer:
                peer.sendall(large)
                peer.shutdown(socket.SHUT_WR)
                reply = read_to_end(peer)
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 0\r\n" in reply

    def test_a_job_that_is_waited_for_gives_its_share_back(self, stage: Stage) -> None:
        server = stage.server("--hold")
        body = b"{}" + b" " * 100_000
        asked = head(b"POST /api/jobs/quick?wait=60", b"Content-Length: %d" % len(body)) + body
        with crowd(server, asked, 3):
            until(lambda: len(server.get("/api/jobs")) == 3)


def accepted(server: HttpServer) -> tuple[socket.socket, object] | None:
    server.runner.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return server.runner.accept()
    return None


class TestHandshakes:
    def test_a_workers_connection_has_the_send_buffer_of_a_new_one_and_little_that_is_not_sent(self) -> None:
        """With a small buffer a worker with many jobs would seem not to read; a ping waits for what is not sent."""
        buffer, unsent = (socket.SOL_SOCKET, socket.SO_SNDBUF), (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        with serving(lambda _: Response(b"{}")) as server, dial(server) as peer:
            peer.sendall(head(b"GET /") + HANDSHAKE)
            worker, _ = until(lambda: accepted(server))
            with worker, socket.create_server(("127.0.0.1", 0)) as other, socket.create_connection(other.getsockname()):
                new, _ = other.accept()
                with new:
                    assert worker.getsockopt(*buffer) == new.getsockopt(*buffer)
                    assert worker.getsockopt(*unsent) == UNSENT_BYTES

    @pytest.mark.parametrize("protocol", [b"Sec-WebSocket-Protocol: " + VERSION_2.encode(), b"X: version 1"])
    def test_a_crowd_that_never_says_anything_shuts_no_worker_out(self, stage: Stage, protocol: bytes) -> None:
        server = stage.server("--hold")
        before = descriptors(server)
        with crowd(server, HANDSHAKE[:-2] + protocol + b"\r\n\r\n", 1_500) as peers:
            assert b"no Hello within" not in read_to_end(peers[0])  # it made room before that
            until(lambda: descriptors(server) < before + MAX_SILENT + 50, 30)
            serves(server)
            with ScriptedWorker(server, "says-hello"):
                assert server.knows("says-hello")

    @pytest.mark.parametrize("name", [None, "says-hello"])
    def test_nor_one_that_has_said_something(self, stage: Stage, name: str | None) -> None:
        server = stage.server("--hold")
        job = server.post("quick")
        before = descriptors(server)
        with ScriptedWorker(server, name) as worker:
            if name is None:
                worker.runs()
            with crowd(server, HANDSHAKE, MAX_SILENT + 50):
                until(lambda: descriptors(server) > before + MAX_SILENT)
                serves(server)
                if name:
                    worker.runs()
                worker.send(protocol.JobSuccess(job, 1 if name else 0))
                assert server.ended(job)["success"]

    def test_those_that_have_gone_are_not_counted(self, stage: Stage) -> None:
        server = stage.server("--hold")
        with ScriptedWorker(server) as worker:
            for _ in range(MAX_SILENT + 50):
                with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
                    peer.sendall(HANDSHAKE)
                    assert peer.recv(100).startswith(b"HTTP/1.1 101 ")
            until(lambda: len(server.get("/api/workers")) == 1)
            server.post("quick")
            worker.runs()

    def test_refused_ones_that_do_not_read_leave_nothing(self, guarded: Server) -> None:
        with crowd(guarded, HANDSHAKE):
            serves(guarded, API)
            until(lambda: descriptors(guarded) < 100)


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr; worker_processes 1;
events {{ worker_connections 100; }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    map $http_upgrade $to_upstream {{ default upgrade; "" ""; }}
    upstream jobworker {{ server 127.0.0.1:{server}; {keepalive} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://jobworker; proxy_http_version 1.1; proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $to_upstream;
        }}
    }}
}}
"""


class Nginx(Server):
    """Debian's nginx before a server: a server itself, to who asks."""

    def __init__(self, folder: Path, server: Server, keepalive: str) -> None:
        Program.__init__(self, folder, "nginx")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        file = folder / "nginx.conf"
        file.write_text(NGINX.format(folder=folder, server=server.port, port=self.port, keepalive=keepalive))
        self.command = [NGINX_PROGRAM or "", "-e", "stderr", "-c", str(file)]

    def start(self) -> None:
        Program.start(self)
        until(self._listens)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.stderr
        with contextlib.suppress(OSError):
            return self.http("GET", "/healthz").status == 200
        return False


NGINX_PROGRAM = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.skipif(NGINX_PROGRAM is None, reason="nginx is not installed")
@pytest.mark.parametrize("keepalive", ["", "keepalive 1;"], ids=["without", "with"])
def test_a_worker_behind_nginx_connects_with_and_without_kept_connections(stage: Stage, keepalive: str) -> None:
    server = stage.server("--hold")
    proxy = Nginx(stage.folder, server, keepalive)
    stage.programs.append(proxy)
    proxy.start()
    assert proxy.get("/api/workers") == []  # over the connection that the handshake will come on, where it is kept
    stage.worker(proxy)
    assert server.ended(proxy.post("quick"))["state"] == "success"
