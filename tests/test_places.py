"""web.py: connections, their places and their deadlines."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from jobworker import web
from jobworker.message import Request, Response
from jobworker.web import Access, HttpServer, RunnerListener
from tests.peers import HANDSHAKE, head, statuses_of
from tests.stage import AT_ONCE_SECONDS, Server, read_to_end, until

FULL = web.MAX_CONNECTIONS


@contextlib.contextmanager
def serving(answer: Callable[[Request], Response]) -> Iterator[HttpServer]:
    """An HttpServer on a free port that answers everything by `answer`."""
    access = Access("localhost", {"api": set(), "worker": set()})
    with contextlib.closing(RunnerListener()) as runner, HttpServer(("127.0.0.1", 0), answer, runner, access) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def dial(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)


def send(peer: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # evicted
        peer.sendall(data)


class TestRunner:
    """A proxy keeps its connections: a handshake for /runner may be any request on one."""

    def test_the_second_request_of_a_connection_may_be_a_handshake(self, idle: Server) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            peer.sendall(head(b"GET /healthz"))
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
            peer.sendall(HANDSHAKE)
            assert peer.recv(65536).startswith(b"HTTP/1.1 101 ")

    def test_a_handshake_may_follow_a_request_in_the_same_packet(self, idle: Server) -> None:
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            peer.sendall(head(b"GET /healthz") + HANDSHAKE)
            reply = b""
            while b"HTTP/1.1 101 " not in reply and (more := peer.recv(65536)):
                reply += more
        assert statuses_of(reply) == [200, 101]

    def test_an_upgrade_in_a_body_is_no_handshake(self, idle: Server) -> None:
        body = b"\r\nUpgrade: websocket\r\n"
        reply = idle.raw(head(b"GET /runner", b"Content-Length: %d" % len(body), b"Connection: close") + body)
        assert reply.startswith(b"HTTP/1.1 426 ")


class TestCap:
    """At the cap a quick request is answered at once, whatever the others wait for."""

    @pytest.mark.parametrize("data", [HANDSHAKE[:-2], head(b"GET /api/events")], ids=["handshakes", "streams"])
    def test_it_is_not_held_by(self, idle: Server, data: bytes) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(FULL + 100):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port), timeout=10))
                send(peer, data)
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < 5  # each of the 100 would hold the accept loop for a second if it slept

    def test_it_is_not_held_by_callers_that_wait(self) -> None:
        ended = threading.Event()

        def answer(request: Request) -> Response:
            if request.path == "/wait":
                ended.wait()
            return Response(b"{}")

        with serving(answer) as server, contextlib.ExitStack() as stack:
            stack.callback(ended.set)
            for _ in range(FULL):
                send(stack.enter_context(dial(server)), head(b"GET /wait"))
            start = time.monotonic()
            for _ in range(20):
                with dial(server) as peer:
                    peer.sendall(head(b"GET /quick"))
                    assert peer.recv(100).startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - start < AT_ONCE_SECONDS

    def test_a_request_that_waits_for_its_answer_knows_that_its_caller_is_gone(self) -> None:
        noticed = threading.Event()

        def answer(request: Request) -> Response:
            assert not request.caller_is_gone()
            asked.set()
            until(request.caller_is_gone)
            noticed.set()
            return Response(b"{}")

        asked = threading.Event()
        with serving(answer) as server:
            with dial(server) as peer:
                peer.sendall(head(b"GET /"))
                assert asked.wait(5)
            assert noticed.wait(5)

    def test_one_that_loses_its_place_ends_its_wait_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web, "MAX_CONNECTIONS", 1)
        monkeypatch.setattr(web, "FRESH_ANSWER_SECONDS", 0)
        waits, ended = threading.Event(), threading.Event()

        def answer(request: Request) -> Response:
            waits.set()
            request.wait_for(Future(), 60)
            assert request.caller_is_gone()
            ended.set()
            return Response(b"{}")

        with serving(answer) as server, dial(server) as peer:
            peer.sendall(head(b"GET /"))
            assert waits.wait(5)
            with dial(server):
                assert ended.wait(5)


class TestListener:
    """What is handed over and not yet taken by the loop."""

    def test_it_is_bounded_and_the_newest_are_kept(self) -> None:
        with contextlib.closing(RunnerListener()) as runner, contextlib.ExitStack() as stack:
            runner.setblocking(False)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1_000))
            peers = []
            for _ in range(web.MAX_HANDED_OVER + 200):
                peers.append(stack.enter_context(socket.create_connection(listening.getsockname())))
                runner.hand_over(listening.accept()[0])
            for peer in peers[200:]:
                connection, address = runner.accept()
                connection.close()
                assert address == peer.getsockname()
            with pytest.raises(BlockingIOError):
                runner.accept()
            assert [peer.recv(1) for peer in peers[:200]] == [b""] * 200


def test_an_empty_head_is_refused() -> None:
    with serving(lambda _: Response(b"{}")) as server, dial(server) as peer:
        peer.sendall(b"\r\n\r\n")
        assert read_to_end(peer).startswith(b"HTTP/1.1 400 ")


class TestDeadlines:
    @pytest.mark.parametrize("body", [b"x" * 50_000_000, [b"x" * 50_000_000]], ids=["whole", "streamed"])
    def test_an_answer_to_a_reader_that_does_not_read_ends(
        self, monkeypatch: pytest.MonkeyPatch, body: bytes | list[bytes]
    ) -> None:
        monkeypatch.setattr(web, "SEND_SECONDS", 0.2)
        response = Response(body if isinstance(body, bytes) else iter(body))
        with serving(lambda _: response) as server, dial(server) as peer:
            peer.sendall(head(b"GET /"))
            until(lambda: server.places)
            until(lambda: not server.places)

    def test_a_stream_may_be_silent_for_longer_than_a_piece_may_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web, "SEND_SECONDS", 0.1)

        def pieces(server: HttpServer) -> Iterator[bytes]:
            yield b"first"
            before = server.next_check
            until(lambda: server.next_check > before + 3 * web.CHECK_SECONDS)
            yield b"last"

        servers: list[HttpServer] = []
        with serving(lambda _: Response(pieces(servers[0]))) as server, dial(server) as peer:
            servers.append(server)
            peer.sendall(head(b"GET /", b"Connection: close"))
            assert read_to_end(peer).endswith(b"4\r\nlast\r\n0\r\n\r\n")

    @pytest.mark.parametrize(
        ("limit", "data", "reply"),
        [
            ("IDLE_SECONDS", b"", b""),
            ("HEAD_SECONDS", b"\r\n", b""),
            ("HEAD_SECONDS", b"GET / HTTP/1.1\r\n", b"HTTP/1.1 408 "),
            ("BODY_SECONDS", head(b"POST /", b"Content-Length: 2") + b"{", b"HTTP/1.1 408 "),
        ],
    )
    def test_a_request_that_does_not_come_is_ended(
        self, monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes, reply: bytes
    ) -> None:
        monkeypatch.setattr(web, limit, 0.1)
        with serving(lambda _: Response(b"{}")) as server, dial(server) as peer:
            peer.sendall(data)
            assert read_to_end(peer)[: len(reply) or None] == reply

    def test_the_table_may_change_while_it_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The collector, which may start whenever something is made, runs finalizers: they let other threads run."""
        monkeypatch.setattr(web, "CHECK_SECONDS", 0)
        monkeypatch.setattr(web, "MAX_CONNECTIONS", 40)  # each further one evicts
        thresholds = gc.get_threshold()
        with serving(lambda _: Response(b"{}")) as server, contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(dial(server))
            until(lambda: len(server.places) == 40)

            def changes(_phase: str, _about: dict[str, int]) -> None:
                with contextlib.suppress(KeyError, RuntimeError):  # it has just gone
                    other = next(iter(server.places))
                    server.places[other] = server.places.pop(other)

            gc.callbacks.append(changes)
            gc.set_threshold(1, 1, 1)
            try:
                for _ in range(10):
                    gc.collect()  # leaves no tuples to be used again
                    peer = stack.enter_context(dial(server))
                    peer.sendall(head(b"GET /"))
                    assert peer.recv(100).startswith(b"HTTP/1.1 200 ")
            finally:
                gc.set_threshold(*thresholds)
                gc.callbacks.remove(changes)

    def test_a_sender_that_is_refused_in_the_midst_knows_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the kernel had no room for what it sent: such a sender would wait for a minute."""
        monkeypatch.setattr(web, "LINGER_SECONDS", 0)
        monkeypatch.setattr(web, "MAX_BODY_BYTES", 10**12)  # read on until the deadline

        def waits(server: HttpServer) -> bool:
            with dial(server) as peer:
                try:
                    peer.sendall(head(b"POST /", b"Content-Length: x"))
                    while True:
                        peer.sendall(b"x" * 1_000_000)
                except OSError as error:
                    return isinstance(error, TimeoutError)

        with serving(lambda _: Response(b"{}")) as server, ThreadPoolExecutor(32) as senders:
            assert not any(senders.map(waits, [server] * 32))
