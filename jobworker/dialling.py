"""Where a worker's server is, as people write it, what a connection with it must be, and why it can't be reached."""

import argparse
import contextlib
import errno
import json
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

from websockets.exceptions import InvalidStatus

from jobworker.options import UNSENT_BYTES
from protocol import PING_SECONDS, PONG_SECONDS

RUNNER = "/runner"
REMIND_SECONDS = 600
STALLED_MS = 1_000 * (PING_SECONDS + PONG_SECONDS)
NO_TLS = "; does it speak TLS? Without, it is ws:// or http://"
SCHEMES = {"": "ws", "ws": "ws", "http": "ws", "wss": "wss", "https": "wss"}
OTHER_PLACE = (200, 204, 400, 404, 405, 410, 426)  # answers of a path that is no jobworker server's /runner


class Socket(Protocol):
    """As much of a WebSocket connection as a session needs. Raises ConnectionClosed."""

    @property
    def subprotocol(self) -> str | None: ...
    @property
    def response(self) -> Any: ...
    async def send(self, data: bytes, /) -> None: ...
    async def close(self, code: int, reason: str) -> None: ...
    def __aiter__(self) -> AsyncIterator[str | bytes]: ...


def limit_unsent(connection: socket.socket) -> None:
    """On a slow link a pong waits for what the kernel holds, which could be megabytes of a log.

    A link on which nothing goes on is left after as long as a ping that has no answer.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a ping, too, waits behind what a server takes no more of
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)


def destination(text: str) -> str:
    """Give the URL of `host:port/path`, as the original takes it, or of a ws://, wss://, http:// or https:// URL.

    Without a path it is /runner; so it is for the page's address as a browser shows it, http://host:8080/.
    """
    before, _, after = text.rpartition("://")
    scheme = before.lower()
    try:
        parts = urlsplit(f"{SCHEMES[scheme]}://{after}")
        host = (parts.hostname or "").encode("idna")  # as the look-up of its address does: it raises UnicodeError
        has_place = host and parts.port != 0 and (scheme or parts.port or parts.path)
        half_login = (parts.username is None) != (parts.password is None)
        is_odd = half_login or re.search(r"[\s#]", text) or parts.netloc[-1:] == ":" or parts.path.startswith("//")
    except (KeyError, ValueError):
        has_place, is_odd = None, None
    if not has_place or is_odd:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HOST:PORT, HOST:PORT/PATH or a URL, such as localhost:8080 or wss://jobs.example.org/runner"
        )
    is_page = scheme.startswith("http") and parts.path == "/"
    return parts._replace(path=RUNNER if is_page else parts.path or RUNNER).geturl()


class Complaints:
    """What a worker says of a server that it can't reach: each trouble once, then rarely, until it has reached it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._was_there = False
        self._said: dict[object, float] = {}  # when, by trouble

    def reached(self) -> None:
        self._was_there = True
        self._said.clear()

    def about(self, error: Exception | None, now: float) -> str | None:
        """Give what is to be said of a failed attempt to connect, if anything is.

        error: None where the server took the connection and then ended it. now: in seconds, on any clock.
        """
        status = error.response.status_code if isinstance(error, InvalidStatus) else None
        trouble = status or getattr(error, "errno", None) or type(error)
        if trouble in self._said and now < self._said[trouble] + REMIND_SECONDS:
            return None
        self._said[trouble] = now
        if error is None:
            return f"{self._uri} ended the connection at once; trying again"
        return f"{explain(error, self._uri, self._was_there)}; trying again"


def explain(error: Exception, uri: str, was_there: bool = True) -> str:
    """Say in plain words why a server can't be reached."""
    if isinstance(error, InvalidStatus):
        return _explain_answer(error.response.status_code, bytes(error.response.body or b""), uri)
    parts = urlsplit(uri)
    place = parts.netloc.rpartition("@")[2]
    if isinstance(error, ssl.SSLError):
        hint = NO_TLS if error.reason == "WRONG_VERSION_NUMBER" else ""
        return f"no TLS with {place}: {getattr(error, 'verify_message', '') or error.reason or error}{hint}"
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no answer from {place}: {error or 'timed out'}{NO_TLS if parts.scheme == 'wss' else ''}"
    if isinstance(error, OSError):
        # Where a name has several addresses, asyncio puts all of their errors into one text.
        numbers = {error.errno} if error.errno else {int(n) for n in re.findall(r"\[Errno (\d+)\]", str(error))}
        if numbers == {errno.ECONNREFUSED}:
            return f"no server at {place}{'' if was_there else ' yet'}: connection refused"
        words = ", ".join(os.strerror(number).lower() for number in sorted(numbers) if number > 0)
        return f"can't connect to {place}: {words or error.strerror or error}"
    return f"{uri} does not answer like a jobworker server: {error or type(error).__name__}"


def _explain_answer(status: int, body: bytes, uri: str) -> str:
    if status in OTHER_PLACE:
        return f"no jobworker server answers at {uri}, but HTTP {status}: is the path right? It is {RUNNER} by default"
    verb = "refuses this worker:" if status == HTTPStatus.UNAUTHORIZED else "answers"
    return f"{uri} {verb} HTTP {status} {_detail(body.decode(errors='replace'))}".rstrip()


def _detail(text: str) -> str:
    """Give the sentence of a problem document, or the beginning of any other text on one line."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = str(json.loads(text)["detail"])
    return " ".join(text.split())[:300]
