"""dialling.py: what people write for a server's place, and what they read when it can't be reached."""

from __future__ import annotations

import argparse
import http.server
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.http11 import Response

from jobworker.dialling import REMIND_SECONDS, Complaints, destination, explain
from tests.peers import ScriptedServer
from tests.stage import HasPort, Server, Stage, until

PLACE = "ws://box:8080/runner"


class TestDestination:
    """What people write is understood or refused; it is never dialled as something else."""

    @pytest.mark.parametrize(
        ("text", "url"),
        [
            ("localhost:8080/runner", "ws://localhost:8080/runner"),
            ("localhost:8080", "ws://localhost:8080/runner"),
            ("[::1]:8080", "ws://[::1]:8080/runner"),
            ("box/runner", "ws://box/runner"),
            ("ws://box:8080/a/b?c=d", "ws://box:8080/a/b?c=d"),
            ("wss://box", "wss://box/runner"),
            ("ws://box/", "ws://box/"),
            ("http://localhost:8080/runner", "ws://localhost:8080/runner"),
            ("http://localhost:8080/", "ws://localhost:8080/runner"),
            ("https://jobs.example.org", "wss://jobs.example.org/runner"),
            ("HTTPS://jobs.example.org/runner", "wss://jobs.example.org/runner"),
        ],
    )
    def test_it_is_a_url_of_a_websocket(self, text: str, url: str) -> None:
        assert destination(text) == url

    @pytest.mark.parametrize(
        "text",
        ["", "box", "/runner", ":8080", "box:", "box:/runner", "box:0", "box:99999", "box:http", "::1", "[::1",
         "ftp://box/runner", "http://ws://box/runner", "http//box:8080/runner", "http:/box/runner", "http://",
         "box:8080/a b", "http://box:8080/#jobs", "jobs..example.org:8080", ".box:8080",
         "ada@box:8080", f"{'b' * 64}:8080"],
    )  # fmt: skip
    def test_it_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{text!r} is not HOST:PORT")) as error:
            destination(text)
        assert "localhost:8080" in str(error.value)


def refused_by(status: int, body: bytes = b"") -> InvalidStatus:
    return InvalidStatus(Response(status, HTTPStatus(status).phrase, Headers(), body))


class TestExplain:
    """Why a server can't be reached, in plain words."""

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 8080)"),
             "no server at box:8080: connection refused"),
            (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 8080, 0, 0), [Errno 111] Connect "
                     "call failed ('127.0.0.1', 8080)"), "no server at box:8080: connection refused"),
            (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 101] Connect call failed"),
             "can't connect to box:8080: network is unreachable, connection refused"),
            (OSError(113, "Connect call failed ('10.0.0.9', 8080)"), "can't connect to box:8080: no route to host"),
            (socket.gaierror(-2, "Name or service not known"), "can't connect to box:8080: Name or service not known"),
            (TimeoutError("timed out during opening handshake"),
             "no answer from box:8080: timed out during opening handshake"),
            (InvalidMessage("did not receive a valid HTTP response"),
             f"{PLACE} does not answer like a jobworker server: did not receive a valid HTTP response"),
            (refused_by(404),
             f"no jobworker server answers at {PLACE}, but HTTP 404: is the path right? It is /runner by default"),
            (refused_by(401, b"no\n token"), f"{PLACE} refuses this worker: HTTP 401 no token"),
            (refused_by(503, b'{"detail": "later"}'), f"{PLACE} answers HTTP 503 later"),
            (refused_by(502), f"{PLACE} answers HTTP 502"),
        ],
    )  # fmt: skip
    def test_it_says_what_is_wrong(self, error: Exception, words: str) -> None:
        assert explain(error, PLACE) == words

    def test_a_server_without_tls_is_told(self) -> None:
        error = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:992)")
        error.reason = "WRONG_VERSION_NUMBER"
        words = "no TLS with box:8080: WRONG_VERSION_NUMBER; does it speak TLS? Without, it is ws:// or http://"
        assert explain(error, "wss://box:8080/runner") == words

    def test_a_password_is_not_told(self) -> None:
        assert "secret" not in explain(OSError(113, ""), "ws://me:secret@box:8080/runner")


class TestComplaints:
    """Each trouble is told once, then rarely, and again after the server was there."""

    REFUSED = ConnectionRefusedError(111, "")

    def test_the_same_is_told_rarely(self) -> None:
        complaints = Complaints(PLACE)
        said = [complaints.about(self.REFUSED, now) is not None for now in (0, 3, REMIND_SECONDS - 1, REMIND_SECONDS)]
        assert said == [True, False, False, True]

    def test_another_one_is_told_at_once(self) -> None:
        complaints = Complaints(PLACE)
        said = [complaints.about(error, 1) for error in (self.REFUSED, refused_by(502), refused_by(503), None)]
        assert None not in said
        assert complaints.about(refused_by(502), 2) is None

    def test_a_server_that_was_not_there_yet_is_told_from_one_that_went(self) -> None:
        complaints = Complaints(PLACE)
        assert complaints.about(self.REFUSED, 1) == "no server at box:8080 yet: connection refused; trying again"
        complaints.reached()
        assert complaints.about(self.REFUSED, 2) == "no server at box:8080: connection refused; trying again"


class Site(http.server.BaseHTTPRequestHandler):
    """A web site that is no jobworker server: it has one page, and nothing else."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[HasPort]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.port = server.server_port  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server  # type: ignore[misc]
        server.shutdown()


class TestWorker:
    """A worker says once what keeps it from its server, and goes on trying."""

    @pytest.mark.parametrize("form", ["http://127.0.0.1:{}/", "127.0.0.1:{}", "ws://127.0.0.1:{}/runner"])
    def test_it_takes_what_people_write(self, stage: Stage, idle: Server, form: str) -> None:
        stage.worker(idle, target=form.format(idle.port))

    def test_a_wrong_path_is_told_clearly_and_once(self, stage: Stage, site: HasPort) -> None:
        self.is_told(
            stage, site, "/nope", r"WARNING no jobworker server answers at \S+/nope, but HTTP 404: is the path"
        )

    def test_a_page_is_no_server(self, stage: Stage, site: HasPort) -> None:
        self.is_told(stage, site, "/", r"WARNING no jobworker server answers at \S+/, but HTTP 200: is the path right")

    def is_told(self, stage: Stage, site: HasPort, path: str, words: str) -> None:
        worker = stage.worker(site, target=f"127.0.0.1:{site.port}{path}", connects=False)
        until(lambda: worker.said(words))
        before = Site.asked
        until(lambda: Site.asked >= before + 2)
        assert worker.stderr.count("\n") == 1

    def test_a_wrong_path_of_a_server_of_ours_is_told(self, stage: Stage, idle: Server) -> None:
        worker = stage.worker(idle, target=f"127.0.0.1:{idle.port}/runner/", connects=False)
        until(lambda: worker.said(r"no jobworker server answers at \S+/runner/, but HTTP 404"))

    def test_nobody_there_is_told_once_and_in_plain_words(self, stage: Stage) -> None:
        server = stage.server()
        server.kill()
        worker = stage.worker(server, connects=False)
        until(lambda: worker.said(rf"no server at 127\.0\.0\.1:{server.port} yet: connection refused; trying again"))
        server.start()
        until(lambda: worker.said("connected to "))
        assert worker.stderr.count("\n") == 2
        server.kill()
        until(lambda: worker.said(rf"no server at 127\.0\.0\.1:{server.port}: connection refused; trying again"))
        assert "Errno" not in worker.stderr

    def test_a_server_that_hangs_up_at_once_is_told_once(self, stage: Stage) -> None:
        with ScriptedServer(hangs_up=True) as server:
            worker = stage.worker(server, connects=False)
            until(lambda: len(server.dials) >= 3)
            assert worker.said(r"WARNING \S+ ended the connection at once; trying again")
            assert worker.stderr.count("\n") == 1
