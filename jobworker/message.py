"""What an HTTP request and its answer are, and the bytes of both; no I/O.

Requests are read strictly: whatever two readers could understand differently is refused.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

MAX_HEADERS = 100
CALLER_CHECK_SECONDS = 3  # how often one that waits looks whether its caller is still there
MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_JOB_BYTES = 256 * 1024  # of JSON: its environment has at most 32 KiB, each of which may be written as \u0041
ITEM_CHARACTERS = 4 * 1024  # most items of a list are shorter


class ApiError(Exception):
    """The caller's mistake, or our inability: answered with application/problem+json (RFC 9457)."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class BadFraming(ApiError):
    """What came is not clearly one HTTP request: answered, then the connection is closed, since its end is unknown."""


@dataclass(slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    http_1_1: bool
    keep_alive: bool
    content_length: int
    unread: bool  # its body is still to come
    body: bytes | bytearray = b""
    share: contextlib.ExitStack | None = None  # a large body's
    caller_is_gone: Callable[[], bool] = bool  # a long answer may ask it now and then, and end early
    evicted: Future[None] = field(default_factory=Future)  # done when the caller has lost its place

    def wait_for(self, change: Future[Any], seconds: float) -> None:
        """Wait until a future is done, for so many seconds at most, or until the caller has lost its place."""
        concurrent.futures.wait((change, self.evicted), seconds, concurrent.futures.FIRST_COMPLETED)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def drop_body(self) -> None:
        """Free the body's memory, and its share where it is large. To be called before a long wait."""
        self.body = b""
        if self.share:
            self.share.close()

    def query(self, *known: str) -> dict[str, str]:
        """Give the query's parameters by name. Raises ApiError for one that is not `known`, or given twice."""
        pairs = parse_qsl(self.target.partition("?")[2], keep_blank_values=True)
        query = dict(pairs)
        if len(query) < len(pairs):
            raise ApiError(HTTPStatus.BAD_REQUEST, "a query parameter is given twice")
        for name in query.keys() - set(known):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"no query parameter {name!r} here; there are: {', '.join(known)}")
        return query


REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
SINGLE_HEADERS = {
    "authorization",
    "content-length",
    "content-type",
    "expect",
    "host",
    "idempotency-key",
    "last-event-id",
    "origin",
    "sec-fetch-site",
    "transfer-encoding",
    "upgrade",
}


def parse_head(head: bytes) -> Request:
    """Read a request's head, without the empty line that ends it; strict where leniency lets requests be smuggled.

    Raises BadFraming for anything that two readers could understand differently (RFC 9112, sections 2.2 to 6.3).
    """
    line, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadFraming(HTTPStatus.BAD_REQUEST, "the request line must be METHOD /PATH HTTP/1.1")
    if len(lines) > MAX_HEADERS:
        raise BadFraming(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEADERS} header lines")
    headers: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        header = HEADER_LINE.fullmatch(line)
        if not header:
            raise BadFraming(HTTPStatus.BAD_REQUEST, f"line {number} of the head is not a header")
        name, value = header[1].decode().lower(), header[2].decode("latin-1")
        if name in headers and name in SINGLE_HEADERS:
            raise BadFraming(HTTPStatus.BAD_REQUEST, f"the header {name} is there twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return _check_framing(match[1].decode(), match[2].decode(), match[3] == b"1", headers)


def _check_framing(method: str, target: str, http_1_1: bool, headers: dict[str, str]) -> Request:
    if not headers.get("host"):
        raise BadFraming(HTTPStatus.BAD_REQUEST, "the Host header is missing")
    if "transfer-encoding" in headers:
        raise BadFraming(HTTPStatus.LENGTH_REQUIRED, "Transfer-Encoding is not read here; send Content-Length")
    length = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadFraming(HTTPStatus.BAD_REQUEST, "Content-Length must be digits")
    if int(length) > MAX_BODY_BYTES:
        raise BadFraming(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {MAX_BODY_BYTES} bytes")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise BadFraming(HTTPStatus.EXPECTATION_FAILED, "the only expectation known is 100-continue")
    connection = headers.get("connection", "keep-alive" if http_1_1 else "close").lower()
    keep_alive = "close" not in connection and (http_1_1 or "keep-alive" in connection)
    return Request(method, target, headers, http_1_1, keep_alive, int(length), unread=int(length) > 0)


@dataclass(slots=True)
class Response:
    body: bytes | Iterator[bytes]
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    def head(self, close: bool, length: str) -> bytes:
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nContent-Type: {self.content_type}\r\n{length}"
            f"Date: {http_date(int(time.time()))}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
            f"{extra}{'Connection: close' + chr(13) + chr(10) if close else ''}\r\n"
        ).encode("latin-1", "replace")


@functools.lru_cache(maxsize=2)
def http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def as_json(value: object) -> bytes:
    return JSON_ENCODER.encode(value).encode()


# Bodies


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
JSON_SPACE = re.compile(r"[ \t\n\r]*")
NO_LIST = 'the body must be a JSON list such as [{"name": "hello-world"}]'


def read_json(body: bytes | bytearray) -> Any:
    """Give the value of a body that is about one job. Raises ApiError."""
    _refuse_long(body)
    with _refusing_bad_json():
        text = body.decode()
        return _checked(json.loads(text, parse_constant=_refuse_constant), text)


def _refuse_long(body: bytes | bytearray) -> None:
    if len(body) > MAX_JOB_BYTES:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body that is about one job may have {MAX_JOB_BYTES} bytes")


def read_form(body: bytes | bytearray) -> dict[str, str]:
    """Give the fields of a form, as `curl -d NAME=Ada` sends it. Raises ApiError."""
    _refuse_long(body)
    try:
        text = body.decode()
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=1_000)
    except ValueError as error:
        flaw = str(error)[:200].replace("query field", "field")
        detail = f"the body is neither a JSON object nor a form such as NAME=Ada: {flaw}"
        raise ApiError(HTTPStatus.BAD_REQUEST, detail) from error
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ApiError(HTTPStatus.BAD_REQUEST, "a field of the form is there twice")
    return fields


def read_items(body: bytes | bytearray, most: int) -> Iterator[dict[str, Any]]:
    """Give the objects of a JSON list one by one. Raises ApiError, also for more than `most`.

    Eight MiB of small values at once would be 360 MiB of Python's, and hold all other threads up for two seconds.
    """
    with _refusing_bad_json():
        text = body.decode()
        at = _skip_space(text, 0)
        if text[at : at + 1] != "[":
            raise ApiError(HTTPStatus.BAD_REQUEST, NO_LIST)
        at = _skip_space(text, at + 1)
        if text[at : at + 1] != "]":
            for _ in range(most):
                item, at = _read_item(text, at)
                yield item
                at = _skip_space(text, at)
                if text[at : at + 1] != ",":
                    break
                at = _skip_space(text, at + 1)
            else:
                detail = f"a list may have {most:,} jobs; nothing was queued: send several lists"
                raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if _skip_space(text, at + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, at + 1)


def _read_item(text: str, at: int) -> tuple[dict[str, Any], int]:
    """Read the object at a place; give it and the place of its end."""
    for size in (ITEM_CHARACTERS, MAX_JOB_BYTES):
        piece = text[at : at + size]
        try:
            item, length = JSON_DECODER.raw_decode(piece)
        except json.JSONDecodeError as error:
            flaw = f"{error.msg} (or more than {MAX_JOB_BYTES} bytes)" if at + size < len(text) else error.msg
            place = at + error.pos
            continue
        if not isinstance(item, dict):
            raise ApiError(HTTPStatus.BAD_REQUEST, NO_LIST)
        return _checked(item, piece[:length]), at + length
    raise json.JSONDecodeError(flaw, text, place)  # which counts the lines from the beginning


def _skip_space(text: str, at: int) -> int:
    space = JSON_SPACE.match(text, at)
    return space.end() if space else at


def _checked(value: Any, text: str) -> Any:
    if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is no character
        as_json(value)
    return value


@contextlib.contextmanager
def _refusing_bad_json() -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {str(error)[:200]}") from error


def answer_json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Give a value's JSON as an answer; its line ends, for who reads it in a terminal."""
    return Response(as_json(value) + b"\n", status)


def problem(error: ApiError) -> Response:
    status = error.status
    body = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": error.detail}
    return Response(as_json(body) + b"\n", status, "application/problem+json", error.headers)
