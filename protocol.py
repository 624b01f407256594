"""Frames of the wire, to bytes and back: no I/O, no clock, no knowledge of what the messages are for.

This is the specification; with it a worker can be written in any language.

Conventions. A worker opens a WebSocket to /runner. One WebSocket message is one frame; binary and text messages are
read alike, binary is sent. The first byte of a frame is its tag. Integers are big-endian and signed unless said
otherwise. A frame with an unknown tag, an empty frame, bytes after a version 1 frame and unknown keys are ignored.
Anything else that can't be read is a ProtocolError: the reader closes that connection with code 1007 and goes on with
the others. JSON is UTF-8 without insignificant white space; NaN, lone surrogates and a BOM are errors.

Version 1 (no subprotocol)
    server to worker
      1 JobConfigs   a JSON list of {"command", "image", "name"}, keys in that order; "command" null or a string
      2 Enqueue      int32 job, int64 length of the name in code points (not bytes), the name in UTF-8
    worker to server
      1 JobRunning   int32 job                the container is about to start
      2 JobSuccess   int32 job                it exited 0
      3 JobFailure   int32 job                it did not, or could not start
  A version 1 worker gets one job at a time, starts it without asking, and is lost when its connection ends.

Version 2 (subprotocol "jobworker.2") adds to version 1; a job is named by its id and its attempt, counted from 1
    server to worker
      1 JobConfigs   the objects may hold any key of jobs.yaml; "command" may be a list of strings
      2 Enqueue      then a JSON object {"attempt": int, "environment": {NAME: value}}
     16 Go           int32 job, int32 attempt                 JobRunning is on disk: start the container now
     17 Stop         int32 job, int32 attempt                 stop the container, then report
     18 Settled      int32 job, int32 attempt                 the result is on disk, or the server does not want this
                                                              attempt: stop it if it runs, remove it, forget it
     19 Logged       int32 job, int32 attempt, int64 offset   the log is on disk up to here: go on from here
     20 Reading      int32 job, int32 attempt, int32 number   the log is of this reading: see ReadAgain
    worker to server
      1 JobRunning   then {"attempt": int}                    may I start? Answered by Go or Settled
      2 JobSuccess   then {"attempt": int, "exit_code": 0}    answered by Settled
      3 JobFailure   then {"attempt": int, "exit_code": int or null, "reason": string}    answered by Settled
     16 Hello        a JSON object {"name": string, "slots": int, "tags": [string], "version": string,
                     "jobs": [[job, attempt, "assigned" or "running" or "finished"], ...]}
                     the first frame: who the worker is and every attempt it still holds; said again to change it
                     (0 slots: the worker drains and takes no new job)
     17 Log          int32 job, int32 attempt, int64 offset, bytes    what the container wrote, from that offset of its
                                                                      output on; gaps are allowed
     18 ReadAgain    int32 job, int32 attempt, int32 number   the log begins anew; answered by Reading and Logged, or
                                                              by Settled
     19 Pulling      int32 job, int32 attempt, the image in UTF-8    it is being pulled; empty: it is no more
    both ways
     31 Batch        repeated: uint32 length, a frame of that length; no Batch within a Batch; 512 KiB, or one message;
                     from a worker at most 20,000 messages

  Life of a connection: the server's answer to the opening handshake has its identity in the header Jobworker-Server.
  The worker says Hello; the server sends JobConfigs, Logged for each attempt it wants and Settled for each it does not.
  The worker sends again what was not answered: JobRunning of what waits to start, the log from the
  offset in Logged and the result of what has finished. Every message may be sent twice without harm. A Hello has a
  frame of its own. A server that knows ReadAgain says `Jobworker-Readings: 1` in its answer to the handshake.

  Readings. A worker that has lost the `docker run` of a container reads the whole output from the engine, from its
  start. What it sent before may hold the docker command's own words, so offsets no longer mean the same. Such a
  reading has a number: 0 is an attempt's first, of which nobody speaks; each further one has a higher number. The
  server sends Reading before each Logged that answers a Hello. Where its number is not that of the worker's reading,
  the worker sends ReadAgain, as soon as that reading has its first bytes or is whole; from then until Reading with that
  number comes it sends no Log and no result, and heeds no Logged of that attempt. On ReadAgain with a number above the
  stored one the server stores it and drops the attempt's log; any other changes nothing. Both are answered alike. A
  worker sends no ReadAgain to a server that does not know it: it sends the log from its start, and the server keeps
  what it has.

  The newest connection of a name wins: the older is closed with code 4001, and its worker ends.

      Enqueue ──▶ JobRunning ──▶ Go ──▶ (container runs; Log …) ──▶ JobSuccess or JobFailure ──▶ Settled
"""

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

VERSION_2 = "jobworker.2"
SERVER_HEADER = "Jobworker-Server"
READINGS_HEADER = "Jobworker-Readings"
CLOSE_REPLACED = 4001
MAX_JOB_ID = 2**31 - 1
MAX_LOG_OFFSET = 2**62
MAX_SECONDS = 2**31 - 1
MAX_TAGS = 100
MAX_HELD_JOBS = 20_000
MAX_IMAGE_CHARACTERS = 300
BATCH_BYTES = 512 * 1024
# The peer's silence is noticed after at most the sum of both: within 30 s.
PING_SECONDS = 15
PONG_SECONDS = 14

_INT32 = struct.Struct(">i")
_JOB_ATTEMPT = struct.Struct(">ii")
_NUMBER = struct.Struct(">iii")
_OFFSET = struct.Struct(">iiq")
_ENQUEUE = struct.Struct(">iq")
_LENGTH = struct.Struct(">I")
_BATCH = 31
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\.")
_ESCAPES_OF_THE_ORIGINAL = {"\\b": "\\u0008", "\\f": "\\u000c"}


class ProtocolError(Exception):
    """The peer sent bytes that are not a frame. The message says what was wrong and where."""


@dataclass(frozen=True, slots=True)
class JobConfigs:
    configs: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Enqueue:
    job: int
    name: str
    attempt: int = 0
    environment: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Go:
    job: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Stop:
    job: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Settled:
    job: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Logged:
    job: int
    attempt: int
    offset: int


@dataclass(frozen=True, slots=True)
class Reading:
    job: int
    attempt: int
    number: int


@dataclass(frozen=True, slots=True)
class JobRunning:
    job: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class JobSuccess:
    job: int
    attempt: int = 0
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class JobFailure:
    job: int
    attempt: int = 0
    exit_code: int | None = None
    reason: str = "exit"


@dataclass(frozen=True, slots=True)
class Hello:
    name: str
    slots: int
    tags: tuple[str, ...]
    version: str
    jobs: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, slots=True)
class Log:
    job: int
    attempt: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ReadAgain:
    job: int
    attempt: int
    number: int


FromServer = JobConfigs | Enqueue | Go | Stop | Settled | Logged | Reading


@dataclass(frozen=True, slots=True)
class Pulling:
    job: int
    attempt: int
    image: str = ""


FromWorker = JobRunning | JobSuccess | JobFailure | Hello | Log | ReadAgain | Pulling
Message = FromServer | FromWorker


def encode(message: Message) -> bytes:
    """Give the frame of a message; one with attempt 0 gets the version 1 form, without JSON after its fields."""
    return _ENCODERS[type(message)](message)


def encode_batch(messages: Iterable[Message]) -> bytes:
    """Give one version 2 frame that holds all the messages, in order."""
    return _join([encode(message) for message in messages])


def _join(frames: list[bytes]) -> bytes:
    if len(frames) == 1:
        return frames[0]
    return bytes([_BATCH]) + b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))


def encode_batches(messages: Iterable[Message]) -> Iterator[bytes]:
    """Give version 2 frames that hold the messages, in order; none is longer than BATCH_BYTES unless one message is."""
    batch: list[bytes] = []
    size = 0
    for frame in map(encode, messages):
        if batch and size + len(frame) > BATCH_BYTES:
            yield _join(batch)
            batch, size = [], 0
        batch.append(frame)
        size += len(frame)
    if batch:
        yield _join(batch)


def decode_from_server(data: bytes | str, version: int = 1) -> list[FromServer]:
    """Give the messages of a frame that a server sent: none for an unknown tag, several for a Batch.

    version: what was negotiated; version 1 knows its own tags only and ignores what follows its fields.
    Raises ProtocolError for anything that is not a frame.
    """
    return _decode(_FROM_SERVER, data, version)


def decode_from_worker(data: bytes | str, version: int = 1) -> list[FromWorker]:
    """Give the messages of a frame that a worker sent; see decode_from_server."""
    return _decode(_FROM_WORKER, data, version)


def _decode(decoders: dict[int, Callable[[bytes, int], Any]], data: bytes | str, version: int) -> list[Any]:
    frame = data.encode() if isinstance(data, str) else data
    frames = _frames_of_batch(frame) if version > 1 and frame[:1] == bytes([_BATCH]) else [frame]
    messages = []
    for part in frames:
        decoder = decoders.get(part[0]) if part and (version > 1 or part[0] < 16) else None
        if decoder is None:
            continue
        try:
            messages.append(decoder(part, version))
        except ProtocolError as error:
            raise ProtocolError(f"frame with tag {part[0]}, {len(part)} bytes: {error}") from error
        except struct.error as error:
            raise ProtocolError(f"frame with tag {part[0]}, {len(part)} bytes: it ends too early") from error
    return messages


def _frames_of_batch(frame: bytes) -> list[bytes]:
    frames, at = [], 1
    while at < len(frame):
        start = at + _LENGTH.size
        if start > len(frame):
            raise ProtocolError(f"batch: the length at byte {at} ends too early")
        at = start + _LENGTH.unpack_from(frame, start - _LENGTH.size)[0]
        if at > len(frame):
            raise ProtocolError(f"batch: the frame at byte {start} ends too early")
        frames.append(frame[start:at])
        if frames[-1][:1] == bytes([_BATCH]):
            raise ProtocolError(f"batch: another batch at byte {start}")
    return frames


# JSON, as strict as the original's decoder and spelled as its encoder spells it


def _to_json(value: object) -> bytes:
    text = _JSON_ENCODER.encode(value)
    text = _ESCAPE.sub(lambda escape: _ESCAPES_OF_THE_ORIGINAL.get(escape[0], escape[0]), text)
    return _SURROGATE.sub("\ufffd", text).encode()


def _from_json(data: bytes) -> Any:
    try:
        text = data.decode()
        value = _JSON_DECODER.decode(text)
        if "\\ud" in text.lower():
            _JSON_ENCODER.encode(value).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {str(error)[:200]}") from error
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _object(data: bytes) -> dict[str, Any]:
    value = _from_json(data)
    if not isinstance(value, dict):
        raise ProtocolError("a JSON object is missing")
    return value


def _field(value: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    field = value.get(key, default)
    if type(field) is not kind:
        raise ProtocolError(f"{key!r} must be {kind.__name__}")
    return field


def _attempt(value: dict[str, Any]) -> int:
    attempt: int = _field(value, "attempt", int)
    if not 0 < attempt <= MAX_JOB_ID:
        raise ProtocolError("'attempt' is out of range")
    return attempt


# each message: its encoder, then its decoder


def _encode_job_configs(message: JobConfigs) -> bytes:
    first = ("command", "image", "name")
    return b"\x01" + _to_json([{**{key: config.get(key) for key in first}, **config} for config in message.configs])


def _decode_job_configs(frame: bytes, version: int) -> JobConfigs:
    configs = _from_json(frame[1:])
    if not isinstance(configs, list):
        raise ProtocolError("not a list")
    for config in configs:
        _check_config(config, version)
    if version == 1:
        configs = [{key: config.get(key) for key in ("command", "image", "name")} for config in configs]
    return JobConfigs(tuple(configs))


def _check_config(config: object, version: int) -> None:
    if not isinstance(config, dict):
        raise ProtocolError("a config is not an object")
    _field(config, "name", str)
    _field(config, "image", str)
    for key in ("timeout", "pull_timeout", "stop_grace_period"):
        seconds = config.get(key, 0)
        if version > 1 and not (isinstance(seconds, int | float) and 0 <= seconds <= MAX_SECONDS):
            raise ProtocolError(f"{key!r} must be a number of seconds, {MAX_SECONDS:,} at most")
    command = config.get("command")
    if version > 1 and isinstance(command, list):
        if not all(isinstance(word, str) for word in command):
            raise ProtocolError("'command' must be a list of strings")
    elif command is not None and not isinstance(command, str):
        raise ProtocolError("'command' must be a string or null")


def _encode_enqueue(message: Enqueue) -> bytes:
    name = _SURROGATE.sub("\ufffd", message.name)
    frame = b"\x02" + _ENQUEUE.pack(message.job, len(name)) + name.encode()
    if not message.attempt:
        return frame
    return frame + _to_json({"attempt": message.attempt, "environment": message.environment or {}})


def _decode_enqueue(frame: bytes, version: int) -> Enqueue:
    job, length = _ENQUEUE.unpack_from(frame, 1)
    name, end = _text(frame, 1 + _ENQUEUE.size, length)
    if version == 1:
        return Enqueue(job, name)
    value = _object(frame[end:])
    environment = _field(value, "environment", dict, {})
    if not all(isinstance(text, str) for text in environment.values()):
        raise ProtocolError("'environment' must map names to strings")
    return Enqueue(job, name, _attempt(value), environment)


def _text(frame: bytes, start: int, length: int) -> tuple[str, int]:
    """Read `length` code points of UTF-8 from `start`; return them and where they end."""
    if not 0 <= length <= len(frame) - start:
        raise ProtocolError(f"a name of {length} code points does not fit")
    end = start
    for _ in range(length):
        lead = frame[end : end + 1] or b"\xff"
        end += 1 if lead < b"\x80" else 2 if lead < b"\xe0" else 3 if lead < b"\xf0" else 4
    try:
        name = frame[start:end].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"the name is not UTF-8 at byte {start + error.start}") from error
    if len(name) != length:
        raise ProtocolError(f"the name has {len(name)} code points, not {length}")
    return name, end


def _encode_job_running(message: JobRunning) -> bytes:
    json_part = b'{"attempt":%d}' % message.attempt if message.attempt else b""
    return b"\x01" + _INT32.pack(message.job) + json_part


def _decode_job_running(frame: bytes, version: int) -> JobRunning:
    (job,) = _INT32.unpack_from(frame, 1)
    return JobRunning(job) if version == 1 else JobRunning(job, _attempt(_object(frame[5:])))


def _encode_job_success(message: JobSuccess) -> bytes:
    json_part = b'{"attempt":%d,"exit_code":%d}' % (message.attempt, message.exit_code) if message.attempt else b""
    return b"\x02" + _INT32.pack(message.job) + json_part


def _decode_job_success(frame: bytes, version: int) -> JobSuccess:
    (job,) = _INT32.unpack_from(frame, 1)
    return JobSuccess(job) if version == 1 else JobSuccess(job, _attempt(_object(frame[5:])))


def _encode_job_failure(message: JobFailure) -> bytes:
    frame = b"\x03" + _INT32.pack(message.job)
    if not message.attempt:
        return frame
    value = {"attempt": message.attempt, "exit_code": message.exit_code, "reason": message.reason}
    return frame + _to_json(value)


def _decode_job_failure(frame: bytes, version: int) -> JobFailure:
    (job,) = _INT32.unpack_from(frame, 1)
    if version == 1:
        return JobFailure(job)
    value = _object(frame[5:])
    exit_code = value.get("exit_code")
    if exit_code is not None and not (type(exit_code) is int and abs(exit_code) <= MAX_JOB_ID):
        raise ProtocolError("'exit_code' must be an int32 or null")
    return JobFailure(job, _attempt(value), exit_code, _field(value, "reason", str, "exit")[:1000])


def _encode_job_attempt(tag: int) -> Callable[[Any], bytes]:
    return lambda message: bytes([tag]) + _JOB_ATTEMPT.pack(message.job, message.attempt)


def _decode_job_attempt(kind: Callable[[int, int], Any]) -> Callable[[bytes, int], Any]:
    return lambda frame, _version: kind(*_JOB_ATTEMPT.unpack_from(frame, 1))


def _encode_number(tag: int) -> Callable[[Any], bytes]:
    return lambda message: bytes([tag]) + _NUMBER.pack(message.job, message.attempt, message.number)


def _decode_number(kind: Callable[[int, int, int], Any]) -> Callable[[bytes, int], Any]:
    return lambda frame, _version: kind(*_NUMBER.unpack_from(frame, 1))


def _encode_logged(message: Logged) -> bytes:
    return b"\x13" + _OFFSET.pack(message.job, message.attempt, message.offset)


def _decode_logged(frame: bytes, _version: int) -> Logged:
    return Logged(*_OFFSET.unpack_from(frame, 1))


def _encode_log(message: Log) -> bytes:
    return b"\x11" + _OFFSET.pack(message.job, message.attempt, message.offset) + message.data


def _decode_log(frame: bytes, _version: int) -> Log:
    job, attempt, offset = _OFFSET.unpack_from(frame, 1)
    if not 0 <= offset < MAX_LOG_OFFSET:
        raise ProtocolError("the offset is out of range")
    return Log(job, attempt, offset, frame[1 + _OFFSET.size :])


def _encode_pulling(message: Pulling) -> bytes:
    return b"\x13" + _JOB_ATTEMPT.pack(message.job, message.attempt) + message.image.encode()


def _decode_pulling(frame: bytes, _version: int) -> Pulling:
    try:
        image = frame[_JOB_ATTEMPT.size + 1 :].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"the image is not UTF-8 at byte {error.start}") from error
    job, attempt = _JOB_ATTEMPT.unpack_from(frame, 1)
    return Pulling(job, attempt, image[:MAX_IMAGE_CHARACTERS])


def _encode_hello(message: Hello) -> bytes:
    keys = ("name", "slots", "tags", "version", "jobs")
    return b"\x10" + _to_json({key: getattr(message, key) for key in keys})


def _decode_hello(frame: bytes, _version: int) -> Hello:
    value = _object(frame[1:])
    name, slots, tags = _field(value, "name", str), _field(value, "slots", int), _field(value, "tags", list, [])
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise ProtocolError("'name' must be 1 to 128 printable characters")
    if not 0 <= slots <= 10_000:
        raise ProtocolError("'slots' must be 0 to 10000")
    if not all(isinstance(tag, str) and len(tag) <= 128 for tag in tags) or len(tags) > MAX_TAGS:
        raise ProtocolError(f"'tags' must be at most {MAX_TAGS} strings of at most 128 characters")
    jobs = tuple(_held_job(held) for held in _field(value, "jobs", list, []))
    if len(jobs) > MAX_HELD_JOBS:
        raise ProtocolError(f"'jobs' must be at most {MAX_HELD_JOBS}")
    return Hello(name, slots, tuple(tags), str(value.get("version"))[:100], jobs)


def _held_job(held: object) -> tuple[int, int, str]:
    match held:
        case [int(job), int(attempt), ("assigned" | "running" | "finished") as state]:
            if max(abs(job), abs(attempt)) <= MAX_JOB_ID:
                return job, attempt, str(state)
    raise ProtocolError("'jobs' must hold [job, attempt, state]")


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    JobConfigs: _encode_job_configs,
    Enqueue: _encode_enqueue,
    Go: _encode_job_attempt(16),
    Stop: _encode_job_attempt(17),
    Settled: _encode_job_attempt(18),
    Logged: _encode_logged,
    Reading: _encode_number(20),
    JobRunning: _encode_job_running,
    JobSuccess: _encode_job_success,
    JobFailure: _encode_job_failure,
    Hello: _encode_hello,
    Log: _encode_log,
    ReadAgain: _encode_number(18),
    Pulling: _encode_pulling,
}
_FROM_SERVER: dict[int, Callable[[bytes, int], FromServer]] = {
    1: _decode_job_configs,
    2: _decode_enqueue,
    16: _decode_job_attempt(Go),
    17: _decode_job_attempt(Stop),
    18: _decode_job_attempt(Settled),
    19: _decode_logged,
    20: _decode_number(Reading),
}
_FROM_WORKER: dict[int, Callable[[bytes, int], FromWorker]] = {
    1: _decode_job_running,
    2: _decode_job_success,
    3: _decode_job_failure,
    16: _decode_hello,
    17: _decode_log,
    18: _decode_number(ReadAgain),
    19: _decode_pulling,
}
