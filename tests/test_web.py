"""web.py: connections, framing attacks, slow peers, and thousands of damaged requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import select
import socket
import time
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from tests.peers import (
    POST,
    SMUGGLED,
    WEBSOCKET,
    head,
    statuses_of,
)
from tests.stage import (
    AT_ONCE_SECONDS,
    JOBS,
    Server,
    Stage,
    read_to_end,
)


class TestConnections:
    """How long a connection lasts, and how requests follow each other on it."""

    def test_a_connection_is_kept_alive(self, idle: Server) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", idle.port, timeout=5)
        with contextlib.closing(connection):
            ports = set()
            for method, path in [
                ("GET", "/api/workers"),
                ("POST", "/api/jobs/nothing"),
                ("GET", "/nothing"),
                ("PUT", "/"),
            ]:
                connection.request(method, path)
                connection.getresponse().read()
                ports.add(connection.sock and connection.sock.getsockname())
            assert len(ports) == 1

    def test_two_requests_at_once_are_answered_in_order(self, idle: Server) -> None:
        reply = idle.raw(head(b"GET /api/workers") + head(b"GET /nothing", b"Connection: close"))
        assert re.findall(rb"HTTP/1.1 (\d+) ", reply) == [b"200", b"404"]

    def test_version_1_0_sees_the_end_of_a_streamed_answer(self, idle: Server) -> None:
        head_ = b"GET /api/jobs HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
        with socket.create_connection(("127.0.0.1", idle.port), timeout=AT_ONCE_SECONDS) as peer:
            peer.sendall(head_)
            answer = peer.makefile("rb").read()
        head_, _, body = answer.partition(b"\r\n\r\n")
        assert b"\r\nConnection: close" in head_
        assert body.endswith(b"]\n")

    @pytest.mark.parametrize("head_", [b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n", b""])
    def test_a_peer_that_wants_no_keep_alive_is_left(self, idle: Server, head_: bytes) -> None:
        assert b" 200 " in idle.raw(head_ or head(b"GET /healthz", b"Connection: close"))

    def test_an_http_1_0_client_gets_no_chunks(self, idle: Server) -> None:
        idle.post("quick")
        for path in (b"/api/jobs", b"/api/jobs/1/log"):
            reply = idle.raw(b"GET " + path + b" HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in reply[:20]
            assert b"Transfer-Encoding" not in reply

    def test_a_head_request_has_no_body(self, idle: Server) -> None:
        reply = idle.raw(head(b"HEAD /api/workers", b"Connection: close"))
        assert reply.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 405 "))
        assert reply.endswith(b"\r\n\r\n")

    def test_expect_100_continue_is_answered(self, idle: Server) -> None:
        request = head(b"POST /api/jobs/quick", b"Expect: 100-continue", b"Content-Length: 2", b"Connection: close")
        assert re.findall(rb"HTTP/1.1 (\d+) ", idle.raw(request + b"{}")) in ([b"100", b"200"], [b"200"])
        with socket.create_connection(("127.0.0.1", idle.port), timeout=5) as peer:
            peer.sendall(request)
            assert peer.recv(65536).startswith(b"HTTP/1.1 100 ")
            peer.sendall(b"{}")
            assert read_to_end(peer).startswith(b"HTTP/1.1 200 ")

    def test_the_absolute_form_of_a_target_is_understood_or_refused(self, idle: Server) -> None:
        reply = idle.raw(head(b"GET http://127.0.0.1:%d/api/workers" % idle.port, b"Connection: close"))
        assert reply.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
        assert b" 200 " not in idle.raw(head(b"GET http://evil.example/api/workers", b"Connection: close"))[:20]


ATTACKS = {
    "two Content-Lengths": head(POST, b"Content-Length: 2", b"Content-Length: 0") + b"{}",
    "two Content-Lengths alike": head(POST, b"Content-Length: 2", b"Content-Length: 2") + b"{}",
    "a list of Content-Lengths": head(POST, b"Content-Length: 2, 2") + b"{}",
    "Content-Length -1": head(POST, b"Content-Length: -1"),
    "Content-Length +2": head(POST, b"Content-Length: +2") + b"{}",
    "Content-Length 1_0": head(POST, b"Content-Length: 1_0") + b"{        }",
    "Content-Length 0x2": head(POST, b"Content-Length: 0x2") + b"{}",
    "Content-Length 2.0": head(POST, b"Content-Length: 2.0") + b"{}",
    "Content-Length in other digits": head(POST, "Content-Length: \uff12".encode()) + b"{}",
    "Content-Length empty": head(POST, b"Content-Length:"),
    "Content-Length of 5,000 digits": head(POST, b"Content-Length: " + b"9" * 5000),
    "HTTP/0.9": b"GET /api/workers\r\n\r\n",
    "HTTP/2.0": b"GET /api/workers HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/1.10": b"GET /api/workers HTTP/1.10\r\nHost: localhost\r\n\r\n",
    "HTTP/+1.1": b"GET /api/workers HTTP/+1.1\r\nHost: localhost\r\n\r\n",
    "http/1.1": b"GET /api/workers http/1.1\r\nHost: localhost\r\n\r\n",
    "bare LF": head(b"GET /api/workers").replace(b"\r\n", b"\n"),
    "one bare LF": b"GET /api/workers HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
    "bare CR": head(b"GET /api/workers", b"X: a\rContent-Length: 5"),
    "no Host": b"GET /api/workers HTTP/1.1\r\n\r\n",
    "two Hosts": head(b"GET /api/workers", b"Host: localhost"),
    "empty Host": b"GET /api/workers HTTP/1.1\r\nHost:\r\n\r\n",
    "space before colon": head(POST, b"Content-Length : 2") + b"{}",
    "tab before colon": head(POST, b"Content-Length\t: 2") + b"{}",
    "space before name": head(POST, b" Content-Length: 2") + b"{}",
    "line without colon": head(POST, b"nonsense"),
    "empty name": head(POST, b": value"),
    "name not a token": head(POST, b"Content(Length): 2"),
    "name not ASCII": head(POST, "Contént: 2".encode()),
    "space on the first line of the head": b"GET /api/workers HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "obs-fold": head(b"GET /api/workers", b"X: a", b" b"),
    "NUL in a value": head(b"GET /api/workers", b"X: a\0b"),
    "control character in a value": head(b"GET /api/workers", b"X: a\x01b"),
    "NUL in the target": head(b"GET /api/\0workers"),
    "bytes beyond ASCII in the target": head("GET /api/jobs/日本".encode()),
    "chunked": head(POST, b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    "chunked and Content-Length": head(POST, b"Transfer-Encoding: chunked", b"Content-Length: 2") + b"0\r\n\r\n",
    "Content-Length and chunked": head(POST, b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "Transfer-Encoding identity": head(POST, b"Transfer-Encoding: identity", b"Content-Length: 2") + b"{}",
    "Transfer-Encoding xchunked": head(POST, b"Transfer-Encoding: xchunked") + b"{}",
    "Transfer-Encoding hidden": head(POST, b"Transfer-Encoding : chunked", b"Content-Length: 0"),
    "huge request line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "endless request line": b"GET /" + b"a" * 2_000_000,
    "huge field": head(b"GET /api/workers", b"X: " + b"a" * 200_000),
    "10,000 fields": head(b"GET /api/workers", *[b"X: y"] * 10_000),
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
    "two spaces": b"GET  /api/workers HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in the target": b"GET /api/workers x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no slash": b"GET api/workers HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another's absolute form": head(b"GET http://evil.example/api/workers"),
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 160,
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
}
NO_HANDSHAKES = {
    "a websocket without a key": head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: websocket"),
    "a websocket with a body": head(
        b"GET /runner",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        b"Content-Length: %d" % len(SMUGGLED),
    ),
}
REFUSED = {
    "another's Host": b"GET /api/workers HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "method not there": head(b"BREW /api/jobs"),
    "method in small letters": head(b"get /api/jobs"),
    "bad escape": head(b"POST /api/jobs/%zz"),
    "escape cut short": head(b"POST /api/jobs/%4"),
    "escaped bytes that are not UTF-8": head(b"POST /api/jobs/%ff"),
    "unknown Expect": head(POST, b"Expect: miracles", b"Content-Length: 2") + b"{}",
    "an upgrade to something else": head(b"GET /runner", b"Connection: Upgrade", b"Upgrade: h2c"),
}


class TestFramingAttacks:
    """A request with any doubt about where it ends is refused once, its connection closed, and nothing done for it."""

    @pytest.fixture(autouse=True)
    def nothing_is_done(self, idle: Server) -> Iterator[None]:
        before = idle.get("/api/jobs")
        yield
        assert idle.get("/api/jobs") == before
        assert "Traceback" not in idle.stderr

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda name: name.replace(" ", "-"))
    def test_a_doubtful_request_is_refused_and_what_follows_it_is_not_read(self, idle: Server, attack: str) -> None:
        statuses = statuses_of(idle.raw(ATTACKS[attack] + SMUGGLED, half_close=True))
        assert len(statuses) == 1
        assert 400 <= statuses[0] < 500 or statuses[0] in (501, 505)

    @pytest.mark.parametrize("attack", REFUSED, ids=lambda name: name.replace(" ", "-"))
    def test_a_request_that_is_clear_but_wrong_is_refused(self, idle: Server, attack: str) -> None:
        assert 400 <= statuses_of(idle.raw(REFUSED[attack], half_close=True))[0] < 500

    @pytest.mark.parametrize("attack", NO_HANDSHAKES, ids=lambda name: name.replace(" ", "-"))
    def test_a_handshake_that_is_none_ends_the_connection(self, idle: Server, attack: str) -> None:
        assert statuses_of(idle.raw(NO_HANDSHAKES[attack] + SMUGGLED)) in ([], [400], [426])

    def test_a_body_cut_short_is_refused(self, idle: Server) -> None:
        reply = idle.raw(head(POST, b"Content-Length: 10") + b"{}", half_close=True)
        assert statuses_of(reply) in ([400], [408])

    def test_a_body_is_not_the_next_request(self, idle: Server) -> None:
        wrong_method = b"PUT /api/workers"
        reply = idle.raw(head(wrong_method, b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, half_close=True)
        assert statuses_of(reply) == [405]

    def test_nothing_is_written_back_that_could_be_a_header(self, idle: Server) -> None:
        reply = idle.raw(head(b"GET /%0d%0aSet-Cookie:%20a=b", b"Connection: close"))
        assert reply.startswith(b"HTTP/1.1 4")
        assert b"\nSet-Cookie" not in reply

    def test_400_slow_heads_leave_room_for_a_quick_one(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(socket.create_connection(("127.0.0.1", idle.port))) for _ in range(400)]
            for peer in peers:
                with contextlib.suppress(ConnectionError):
                    peer.sendall(b"GET /api/workers HTTP/1.1\r\nX: ")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < AT_ONCE_SECONDS

    def test_idle_keep_alive_connections_leave_room_for_a_new_one(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port), timeout=5))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(b"GET /healthz"))
                    assert peer.recv(12) == b"HTTP/1.1 200"
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < AT_ONCE_SECONDS

    def test_slow_bodies_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(POST, b"Content-Length: 10") + b"{")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < AT_ONCE_SECONDS

    def test_silent_connections_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < AT_ONCE_SECONDS

    def test_a_reset_connection_leaves_no_trace(self, idle: Server) -> None:
        for data in (b"", b"GET", head(b"GET /api/jobs"), head(POST, b"Content-Length: 9")):
            with socket.create_connection(("127.0.0.1", idle.port)) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.sendall(data)
        assert idle.get("/api/workers") == []

    def test_more_slow_bodies_than_there_are_places_leave_room_for_a_quick_request(self, idle: Server) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
                with contextlib.suppress(ConnectionError):
                    peer.sendall(head(POST, b"Content-Length: 10") + b"{")
            start = time.monotonic()
            assert idle.get("/api/workers") == []
            assert time.monotonic() - start < AT_ONCE_SECONDS


BODY = b'{"environment": {"COLOUR": "red"}, "priority": 5, "delay": 0.5}'
REQUESTS = [
    head(b"GET /api/jobs?limit=3&after=5"),
    head(b"GET /api/jobs?state=queued,running&name=quick&limit=2&full=1", b"Accept: */*", b"User-Agent: curl/8"),
    head(b"GET /api/jobs?before=9&limit=2"),
    head(b"GET /api/jobs/1", b"Connection: keep-alive"),
    head(b"GET /api/jobs/1/log?tail=3&offset=0&attempt=1"),
    head(b"GET /api/jobs/1/attempts", b"X: y", b"X: z"),
    head(b"GET /api/workers?full=1"),
    head(b"GET /api/workers/1"),
    head(b"GET /api/configs", b"Sec-Fetch-Site: same-origin"),
    head(b"GET /healthz"),
    head(b"GET /metrics"),
    head(b"GET /"),
    head(b"POST /api/jobs/strict", b"Content-Length: %d" % len(BODY)) + BODY,
    head(b"POST /api/jobs/quick", b"Idempotency-Key: abc", b"Content-Length: 2", b"Expect: 100-continue") + b"{}",
    head(b"POST /api/jobs", b"Content-Length: 18", b"Origin: http://localhost") + b'[{"name":"quick"}]',
    head(b"POST /api/jobs/quick", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
    head(b"PUT /api/jobs", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
    head(b"POST /api/jobs/1/retry", b"Authorization: Bearer abc"),
    head(b"DELETE /api/jobs/2"),
    head(b"GET /runner", *WEBSOCKET),
    head(b"GET /runner", *WEBSOCKET, b"Sec-WebSocket-Protocol: jobworker.2", b"Authorization: Bearer abc"),
    head(b"GET /runner"),
]
SPICES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"\xc3\x28"),
    *(b"%00", b"%ff", b"%2f", b"%", b"?", b"&", b"#", b"//", b"/.."),
    *(b"-1", b"0", b"1e9", b"99999999999999999999", b"null", b"[" * 3000, b'"', b"{", b"}", b"\\ud800"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length:\t7\r\n", b"content-length: 61\r\n"),
    *(b"Content-Length: +2\r\n", b"Content-Length: -1\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: 2, 2\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Host: localhost\r\n"),
    *(b"Authorization: Bearer x\r\n", b"Origin: null\r\n", b"Upgrade: websocket\r\n", b"Last-Event-ID: 1\r\n"),
    *(b"Sec-WebSocket-Key: x\r\n", b"Sec-WebSocket-Protocol: ,\r\n", b"Sec-WebSocket-Extensions: =;\r\n"),
    *(b"HTTP/1.0", b"HTTP/1.1\r\n", b"0\r\n\r\n", b"5\r\nabcde\r\n"),
    *(b"X: " + b"y" * 20_000 + b"\r\n", b"X: y\r\n" * 200),
]
CLEAR_HEAD = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*)\r\n"
)
RESPONSE = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n((?:[A-Za-z-]+: [^\r\n]*\r\n)*)\r\n")
FIRST_MUTATION = int(os.environ.get("RAW_SEED", "0"))
MUTATIONS = int(os.environ.get("RAW_REQUESTS", "2000"))


def mutated(dice: random.Random) -> bytes:
    """A request that was damaged in one to four places, and perhaps another behind it."""
    data = bytearray(dice.choice(REQUESTS))
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(min(len(data), dice.choice((50, len(data)))) + 1)
        end = min(len(data), start + dice.choice((0, 1, 1, 2, 5, 20, 80)))
        piece = bytes(data[start:end])
        match dice.randrange(7):
            case 0:
                data[start:start] = dice.choice(SPICES)
            case 1:
                data[start:end] = dice.choice(SPICES)
            case 2:
                data[start:end] = dice.randbytes(len(piece))
            case 3:
                data[start:end] = piece * dice.choice((0, 2, 3, 50))
            case 4:
                data[start:end] = piece.swapcase()
            case 5:
                lines = data.split(b"\r\n")
                dice.shuffle(lines)
                data = bytearray(b"\r\n".join(lines))
            case 6:
                line_end = data.find(b"\r\n", start) + 2
                data[line_end:line_end] = dice.choice([spice for spice in SPICES if spice.endswith(b"\r\n")])
    return bytes(data) + dice.choice((b"", SMUGGLED, dice.choice(REQUESTS)))


def clear_requests(data: bytes) -> tuple[list[str], bool]:
    """The requests at the start of a stream whose ends are beyond doubt (RFC 9112), and whether anything follows."""
    found = []
    while match := CLEAR_HEAD.match(data):
        method, target, minor, lines = match.groups()
        fields = [line.partition(b":")[::2] for line in lines.split(b"\r\n")[:-1]]
        values: dict[bytes, list[bytes]] = {}
        for name, value in fields:
            values.setdefault(name.lower(), []).append(value.strip(b" \t"))
        lengths = values.get(b"content-length", [b"0"])
        clear = len(lengths) == len(values.get(b"host", ())) == 1 and re.fullmatch(rb"\d+", lengths[0])
        end = match.end() + int(lengths[0]) if clear else 0
        if not clear or b"transfer-encoding" in values or end > len(data):
            break
        found.append(f"{method.decode()} {unquote(target.decode())}")
        data = data[end:]
        if minor == b"0" or b"close" in b",".join(values.get(b"connection", ())).lower():
            return found, False
    return found, bool(data)


def responses(data: bytes) -> list[int]:
    """The statuses of the responses in a stream, which must be whole and well-formed to its end."""
    statuses: list[int] = []
    while data:
        match = RESPONSE.match(data)
        assert match, data[:300]
        status, fields = int(match[1]), match[2].lower()
        data = data[match.end() :]
        if status == 101:
            return [*statuses, status]
        if status < 200:
            continue
        statuses.append(status)
        if length := re.search(rb"^content-length: (\d+)\r$", fields, re.MULTILINE):
            assert len(data) >= int(length[1])
            data = data[int(length[1]) :]
        elif b"transfer-encoding: chunked" in fields:
            while (size := int((line := data.partition(b"\r\n")[0]), 16)) > 0:
                data = data[len(line) + size + 4 :]
            assert data.startswith(b"0\r\n\r\n")
            data = data[5:]
        else:
            return statuses
    return statuses


def answer_to(server: Server, data: bytes, patience: float = 0.01) -> bytes:
    """All that is answered to a request and the end of the stream behind it; TimeoutError where that takes long.

    patience: how many seconds a handshake is given before its stream ends, which ends it.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as peer:
        with contextlib.suppress(OSError):  # it may have been left already
            peer.sendall(data)
            if b"/runner" in data:
                select.select([peer], [], [], patience)
            peer.shutdown(socket.SHUT_WR)
        return read_to_end(peer)


class TestRawRequests:
    """Thousands of damaged requests: each is answered or refused once, soon, and what may be smuggled in is not.

    RAW_REQUESTS=50000 sends more of them, RAW_SEED=7 begins elsewhere.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with contextlib.closing(Stage(tmp_path_factory.mktemp("raw"))) as stage:
            colours = '- {name: strict, image: busybox, parameters: {COLOUR: {required: true, pattern: "red|green"}}}\n'
            server = stage.server("--hold", "--database", ":memory:", jobs=JOBS + colours)
            server.http("POST", "/api/jobs", [{"name": "quick"}] * 10)
            server.http("DELETE", "/api/jobs/1")
            yield server

    def test_each_is_answered_or_refused_and_nothing_is_smuggled_in(self, server: Server) -> None:
        asked = SMUGGLED.partition(b" HTTP")[0].decode()
        may_be_queued = 0
        for seed in range(FIRST_MUTATION, FIRST_MUTATION + MUTATIONS):
            data = mutated(random.Random(seed))
            clear, more = clear_requests(data)
            may_be_queued += sum(request.partition("?")[0] == asked for request in clear)
            received = answer_to(server, data)
            statuses = responses(received)
            told = f"RAW_SEED={seed}: {data[:2000]!r} was answered {received[:2000]!r}"
            assert all(status < 500 for status in statuses), told
            assert len(statuses) <= len(clear) + more, told
            assert all(status >= 400 or status == 101 for status in statuses[len(clear) :]), told
            assert statuses or b"/runner" in data or not data.strip(), told
        queued = len(server.get("/api/jobs?name=hello-world"))
        assert queued <= may_be_queued
        assert "Traceback" not in server.stderr
        assert "internal error" not in server.stderr

    def test_those_that_are_not_damaged_are_answered(self, server: Server) -> None:
        for request in REQUESTS:
            clear, more = clear_requests(request)
            assert (len(clear), more) == (1, False)
            assert len(responses(answer_to(server, request, patience=10))) == 1, request

    def test_the_reader_of_this_test_sees_what_would_be_smuggled(self) -> None:
        clear, more = clear_requests(head(b"POST /api/jobs/quick", b"Content-Length: 0") + SMUGGLED)
        assert (len(clear), more) == (2, False)
        for field in (b"Content-Length: 9" * 2, b"Transfer-Encoding: chunked", b"Content-Length : 5"):
            assert clear_requests(head(b"POST /api/jobs/quick", field) + SMUGGLED) == ([], True)
