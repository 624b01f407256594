"""The parameters that requests may have: how each is read, and what the description says of it."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from urllib.parse import quote

from jobworker.due import KEY_PREFIX
from jobworker.message import ApiError
from jobworker.routes import Parameter, flag, integer
from jobworker.state import FINAL_STATES, MAX_JOB_ID, STATES

MAX_WAIT_SECONDS = 3_600
MAX_LOG_OFFSET = 2**62


def read_wait(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,30})?(e-[0-9]{1,3})?", text) or float(text) > MAX_WAIT_SECONDS:
        raise ValueError(f"wait must be a number of seconds from 0 to {MAX_WAIT_SECONDS}")
    return float(text)


def read_states(text: str, known: Sequence[str] = STATES, otherwise: str = "no state {!r}; there are: {}") -> list[str]:
    """Read a list of some of the known states. otherwise: the sentence on one that is not, and on all that are."""
    states = list(dict.fromkeys(text.split(",")))
    for each in states:
        if each not in known:
            raise ValueError(otherwise.format(each, ", ".join(known)))
    return states


def read_id(text: str, of_that_name: str) -> int:
    """Read an id. of_that_name: what to say of a text that may be a name, in which {0} stands for it."""
    if not re.fullmatch("[0-9]{1,10}", text):
        detail = f"there is no id {text!r}: ids are numbers"
        if not text.isdecimal() and len(text) <= 128:
            detail += of_that_name.format(quote(text, safe=""))
        raise ApiError(HTTPStatus.NOT_FOUND, detail)
    return int(text)


def read_key(text: str) -> str:
    if not 1 <= len(text) <= 255:
        raise ValueError("Idempotency-Key must have 1 to 255 characters")
    if text.startswith(KEY_PREFIX):
        raise ValueError(f"Idempotency-Key must not begin with {KEY_PREFIX}: these are the keys of due jobs")
    return text


def read_time(text: str) -> float:
    try:
        return datetime.fromisoformat(text.replace(" ", "+")).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("ended_after must be a time such as 2026-11-25T22:00:00Z") from None


def read_require(text: str) -> bool:
    if text != "success":
        raise ValueError("require must be success")
    return True


def one_of_states(name: str, sentence: str, known: tuple[str, ...]) -> Parameter:
    """Give a parameter that is a list of some of these states."""
    read = partial(read_states, known=known, otherwise=name + " must be of {1}, with commas between: {0!r} is not")
    schema = {"type": "array", "minItems": 1, "items": {"type": "string", "enum": list(known)}}
    return Parameter(name, sentence, read, schema, (), argument="states", example=list(known[:1]))


def read_event_id(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


ID = {"$ref": "#/components/schemas/Id"}
JOB_OF_THAT_NAME = ". To run a job of that name: POST /api/jobs/{0}; its runs: GET /api/jobs?name={0}"
WORKER_OF_THAT_NAME = ". Who has which name: GET /api/workers?full=1; its jobs: GET /api/jobs?worker={0}"
read_job_id = partial(read_id, of_that_name=JOB_OF_THAT_NAME)
read_worker_id = partial(read_id, of_that_name=WORKER_OF_THAT_NAME)
JOB_ID = Parameter("job", "The job's id.", read_job_id, ID, place="path", argument="id_", example=1)
WORKER_ID = Parameter("worker", "The worker's id.", read_worker_id, ID, place="path", argument="id_")
JOB_NAME = Parameter(
    "job",
    "The job's name in jobs.yaml, percent-encoded.",
    str,
    {"$ref": "#/components/schemas/Name"},
    place="path",
    argument="name",
    example="hello-world",
)
WAIT_SCHEMA = {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS}
WAIT = Parameter("wait", "How many seconds to wait for the job's end.", read_wait, WAIT_SCHEMA, 0.0)
FULL = flag("full", "1: every job or worker with all that is known of it.")
KEY = Parameter(
    "Idempotency-Key",
    "A request repeated with the same key queues nothing: it is answered with the job that the first one queued.",
    read_key,
    {"type": "string", "minLength": 1, "maxLength": 255},
    place="header",
    argument="key",
    example="backup-2026-11-24",
)
STATE = Parameter(
    "state",
    "Only jobs in one of these states.",
    read_states,
    {"type": "array", "items": {"$ref": "#/components/schemas/State"}},
    (),
    argument="states",
    example=["queued", "running"],
)
NAME = Parameter("name", "Only jobs of this name.", str, {"type": "string"})
Q = Parameter("q", "Only jobs with this in their name, in capitals or not.", str, {"type": "string"})
WORKER = Parameter("worker", "Only jobs that the worker of this name has, or had last.", str, {"type": "string"})
CAUSE = integer("cause", "Only jobs that follow the job with this id.", 1, MAX_JOB_ID)
ENDED_AFTER = Parameter(
    "ended_after",
    "Only jobs that ended after this time.",
    read_time,
    {"type": "string", "format": "date-time"},
    example="2026-11-25T22:00:00Z",
)
REQUIRE = Parameter(
    "require",
    "`success`: answer 424 where the job failed or was cancelled, and 504 where it has not ended by then.",
    read_require,
    {"type": "string", "enum": ["success"]},
    False,
)
RETRY_STATES = one_of_states("retry", "Run all jobs in one of these states again.", FINAL_STATES)
CANCEL_STATES = one_of_states("state", "Cancel all jobs in one of these states.", ("queued", "assigned", "running"))
GONE = flag("gone", "1: also workers that went within the last hour, with the jobs that they held.")
LIMIT = integer("limit", "At most so many; with `before` never more than 10,000.", 1, MAX_JOB_ID)
AFTER = integer("after", "Only ids greater than this: the next page.", 0, MAX_JOB_ID, 0)
BEFORE = integer(
    "before",
    "The newest `limit` jobs of those with a smaller id, still oldest first: the page before. "
    f"{MAX_JOB_ID} gives the newest of all. Needs `limit`.",
    0,
    MAX_JOB_ID,
)
FOLLOW = flag(
    "follow", "1: go on until the job ends, also with attempts that come; of one that is named, until it ends."
)
TAIL = integer("tail", "Only so many last lines.", 0, MAX_JOB_ID)
OFFSET = integer("offset", "Only from this byte of the output on.", 0, MAX_LOG_OFFSET, 0)
ATTEMPT = integer(
    "attempt", "Of this attempt; otherwise of the latest. Empty for one that there was not.", 1, MAX_JOB_ID
)
LAST_EVENT_ID = Parameter(
    "Last-Event-ID",
    "The last `id` received: the stream goes on after it, or says `reset` where that was too long ago.",
    read_event_id,
    {"type": "string"},
    place="header",
    argument="last_id",
)
