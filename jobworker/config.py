"""jobs.yaml: the operator's file becomes JobConfigs, or one ConfigError that names every mistake and its place.

YAML only gives the shape of the file (its nodes, never constructed values), so a value means what its text says: 010
cannot turn into 8 unnoticed. What could make the shape itself costly, depth and aliases, is looked for beforehand.
"""

import json
import math
import random
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from jobworker.hints import explain_yaml, folded, hint_for_key, near_name, shell_word
from jobworker.pattern import Matching, TooLong, compiled
from jobworker.schedule import Schedule

CONFIG_LIMIT_BYTES = 1024 * 1024
TEXT_LIMIT_BYTES = 32 * 1024  # of one value, and of all that a POST sets; docker reads lines of less than 64 KiB
DURATION_LIMIT_SECONDS = 366 * 86400
MAX_RETRY_DELAY_SECONDS = 3_600
NAMES_LIMIT = 1_000
DEPTH_LIMIT = 10
ERROR_LIMIT = 100
REFUSED_LIMIT = 10
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(Exception):
    """The operator's mistakes in a jobs.yaml: line, column (from 1) and message each; as text a line each, in order."""

    def __init__(self, *problems: tuple[int, int, str]) -> None:
        self.path = "jobs.yaml"
        self.problems = problems

    def __str__(self) -> str:
        places = ((f":{line}:{column}" if line else "", text) for line, column, text in sorted(set(self.problems)))
        return "\n".join(f"{self.path}{place}: {text}" for place, text in places)


@dataclass(frozen=True)
class Parameter:
    """A name that a POST may set in the job's environment; the pattern must match the whole value."""

    required: bool = False
    default: str | None = None
    pattern: str | None = None

    def flaw_of(self, value: object, matching: Matching | None = None) -> str:
        """Say why this parameter cannot be that value, nothing where it can. matching: all of one request's."""
        if not isinstance(value, str):
            return f"must be a string in quotes, not {json.dumps(value)[:60]}"
        if flaw := _flaw(value):
            return flaw
        try:
            fits = self.pattern is None or compiled(self.pattern).fullmatch(value, matching)
        except TooLong:
            rest = f"at {len(value):,} characters, with all before it: send shorter values, or fewer jobs at once"
            return f"takes too long to be matched with the pattern {self.pattern} {rest}"
        return "" if fits else f"must match the pattern {self.pattern}, which {_show(value)} does not"


@dataclass(frozen=True)
class JobConfig:
    """An entry of jobs.yaml. Durations are in seconds; None leaves it to the image, to docker or to the worker."""

    name: str
    image: str
    command: str | tuple[str, ...] | None = None
    entrypoint: str | tuple[str, ...] | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()
    working_dir: str | None = None
    user: str | None = None
    network_mode: str | None = None
    mem_limit: str | None = None
    cpus: float | None = None
    pids_limit: int | None = None
    pull_policy: str = "missing"
    platform: str | None = None
    init: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_grace_period: int | None = None
    options: tuple[str, ...] = ()
    timeout: float | None = None
    pull_timeout: float | None = None
    retries: int = 0
    retry_delay: float = 1.0
    concurrency: int | None = None
    tags: tuple[str, ...] = ()
    priority: int = 0
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    schedule: tuple[str, ...] = ()
    timezone: str = "UTC"
    on_failure: str | None = None
    on_success: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """Give the entry of a version 2 JobConfigs: version 1's keys in their order, then the others that are set."""
        first = {"command": self.command, "image": self.image, "name": self.name}
        parameters = {name: asdict(each) for name, each in self.parameters.items()}
        return first | self._set_keys() | ({"parameters": parameters} if parameters else {})

    def to_wire_1(self) -> dict[str, Any]:
        """Give the entry of a version 1 JobConfigs, whose command is one string."""
        command = self.command if isinstance(self.command, str) else next(iter(self.command or ()), None)
        return {"command": command, "image": self.image, "name": self.name}

    @property
    def needs_version_2(self) -> bool:
        """Whether its worker must know more of it than name, image and one command string."""
        many_words = isinstance(self.command, tuple) and len(self.command) > 1
        return many_words or not self._set_keys().keys() <= _VERSION_1_KEYS

    def _set_keys(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value != _UNSET[key] and key not in _SERVER_KEYS}


class Configs:
    """The jobs of a jobs.yaml, in the forms that the server needs them in. Never changes."""

    def __init__(self, jobs: Iterable[JobConfig], chance: random.Random | None = None) -> None:
        self.by_name = {job.name: job for job in jobs}
        self.limits = {job.name: job.concurrency for job in self.by_name.values() if job.concurrency}
        self.schedules = {
            job.name: Schedule.parse(job.schedule, job.timezone) for job in self.by_name.values() if job.schedule
        }
        self._follow_ups = {name for job in self.by_name.values() for name in (job.on_failure, job.on_success) if name}
        self._chance = chance or random.Random()
        self._names: dict[tuple[tuple[str, ...], int], frozenset[str]] = {}

    def to_wire(self, version: int) -> tuple[dict[str, Any], ...]:
        """Give what a worker that speaks this version of the protocol is told."""
        if version > 1:
            return tuple(job.to_wire() for job in self.by_name.values())
        return tuple(job.to_wire_1() for job in self.by_name.values() if self._suits_version_1(job))

    def _suits_version_1(self, job: JobConfig) -> bool:
        return not job.needs_version_2 and job.name not in self._follow_ups  # these are told of their cause

    def names_for(self, tags: tuple[str, ...], version: int) -> frozenset[str]:
        """Give the names of the jobs that a worker with these tags may take that speaks this version."""
        names = self._names.get((tags, version))
        if names is None:
            if len(self._names) >= NAMES_LIMIT:
                self._names.clear()  # tags are what workers say
            jobs = [job for job in self.by_name.values() if version > 1 or self._suits_version_1(job)]
            names = frozenset(job.name for job in jobs if set(job.tags) <= set(tags))
            self._names[tags, version] = names
        return names  # it may be gone from there again: another thread asks, too

    def retry_delay(self, name: str, failures: int) -> float | None:
        """Seconds to wait before retrying a job that has failed `failures` times; None when no retries are left."""
        job = self.by_name.get(name)
        if job is None or failures > job.retries:
            return None
        most = max(MAX_RETRY_DELAY_SECONDS, job.retry_delay)
        delay = min(job.retry_delay * 2.0 ** min(failures - 1, 40), most)
        return delay * self._chance.uniform(0.75, 1.25)

    def follow_up(self, name: str, final_state: str) -> tuple[str, dict[str, str], int] | None:
        """Give what is queued where a job of this name has ended so: a name, its variables and its priority."""
        job = self.by_name.get(name)
        follower = job and {"failure": job.on_failure, "success": job.on_success}.get(final_state)
        return self.with_defaults(follower) if follower else None

    def with_defaults(self, name: str) -> tuple[str, dict[str, str], int]:
        """Give name, variables and priority of a job that nobody has sent parameters for."""
        config = self.by_name[name]
        return name, check_parameters(config, {}), config.priority


_UNSET = vars(JobConfig(name="", image=""))
_SERVER_KEYS = {"schedule", "timezone", "on_failure", "on_success"}  # no worker is told
_VERSION_1_KEYS = {"command", "image", "name", "retries", "retry_delay", "concurrency", "priority"}


def load_jobs(path: str | Path) -> tuple[JobConfig, ...]:
    """Read a jobs.yaml. Raises ConfigError, and nothing else, with all that is wrong in it."""
    try:
        root, refused = _parse(_file_text(Path(path)))
        if not (isinstance(root, yaml.SequenceNode) or refused):
            raise _unexpected(root, 'a list of jobs, each with "- name: ..." and "image: ..."')
        nodes = root.value if isinstance(root, yaml.SequenceNode) else []
        jobs = tuple(_each(nodes, _job, [*refused, *_repeated_names(nodes)]))
        _each(zip(nodes, jobs, strict=True), partial(_check_follow_ups, {job.name: job for job in jobs}))
        return jobs
    except ConfigError as error:
        error.path = str(path)
        raise


def check_parameters(config: JobConfig, environment: object, matching: Matching | None = None) -> dict[str, str]:
    """Give what a POST sets in a job's environment, defaults filled in.

    environment: the body's value, of any type. matching: one for all jobs of a request. Raises ValueError with a
    sentence for the caller.
    """
    given, matching = {} if environment is None else environment, matching or Matching()
    if not isinstance(given, dict):
        raise ValueError('"environment" must be an object such as {"NAME": "value"}')
    for name, value in given.items():
        if name not in config.parameters:
            allowed = ", ".join(config.parameters) or 'none: add it under "parameters" in jobs.yaml'
            raise ValueError(f"{_show(name)} is no parameter of {config.name}, which takes {allowed}")
        if flaw := config.parameters[name].flaw_of(value, matching):
            raise ValueError(f"{name} {flaw}")
    for name, parameter in config.parameters.items():
        if parameter.required and name not in given:
            raise ValueError(f'{name} is missing: send {{"environment": {{"{name}": "..."}}}}')
    if sum(len(name) + len(value.encode()) for name, value in given.items()) > TEXT_LIMIT_BYTES:
        raise ValueError(f'"environment" is longer than {TEXT_LIMIT_BYTES:,} bytes: hand large input over in a volume')
    return {name: spec.default for name, spec in config.parameters.items() if spec.default is not None} | given


def parse_duration(text: str) -> float:
    """Give the seconds of `90`, `1.5`, `1m30s`, `2h`, `1d` or `500ms`. Raises ValueError for anything else."""
    seconds = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    if not re.fullmatch(r"(0|[1-9]\d*)(\.\d+)?|(\d+(\.\d+)?(ms|[smhd]))+", text, re.ASCII):
        raise ValueError(f"{_show(text)} is not a duration such as 90, 1m30s, 2h or 500ms")
    return sum(float(number) * seconds[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhd]|)", text))


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError((0, 0, f"cannot be read: {error.strerror}")) from None
    if len(content) > CONFIG_LIMIT_BYTES:
        raise ConfigError((0, 0, f"is larger than {CONFIG_LIMIT_BYTES:,} bytes"))
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if odd := yaml.reader.Reader.NON_PRINTABLE.search(text):
        before = text[: odd.start()]
        what = f"byte 0x{ord(odd[0]) - 0xDC00:02x} is not UTF-8" if odd[0] > "\ud7ff" else f"{odd[0]!r} is not allowed"
        raise ConfigError((before.count("\n") + 1, len(before) - before.rfind("\n"), what))
    return text


def _parse(text: str) -> tuple[yaml.Node, list[ConfigError]]:
    """Give the root of the file as it is written, and errors for what YAML has that jobs.yaml has not."""
    try:
        refused = _refused(yaml.parse(text, Loader=YAML_LOADER))
        root = yaml.compose(text, Loader=YAML_LOADER)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(explain_yaml(text, error)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # without libyaml "\UFFFFFFFF" reaches chr()
        raise ConfigError((0, 0, f"is not YAML: {error}")) from None
    if root is None:
        raise ConfigError((1, 1, 'no jobs here: expected a list, each with "- name: ..." and "image: ..."'))
    return root, refused


def _refused(events: Iterable[Any]) -> list[ConfigError]:
    """Look through the events before anything recursive or repeated does: of a bomb, only its first error is told."""
    depth = documents = 0
    found: list[ConfigError] = []
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > DEPTH_LIMIT:
            raise _error(event, f"nested more than {DEPTH_LIMIT} deep")
        if documents > 1:
            raise _error(event, "a second document begins here: write all jobs as one list")
        if getattr(event, "anchor", None):
            found.append(_error(event, "anchors and aliases (&name, *name) are not supported: write the value out"))
        if getattr(event, "tag", None):
            found.append(_error(event, "tags (!name) are not supported: write the value alone"))
        if len(found) > REFUSED_LIMIT:
            raise found[0]
    return found


def _error(place: Any, message: str) -> ConfigError:
    return ConfigError((place.start_mark.line + 1, place.start_mark.column + 1, message))


def _unexpected(node: yaml.Node, expected: str, quotable: bool = False) -> ConfigError:
    """Say what is there instead and, where text was expected, what YAML makes of it."""
    if not isinstance(node, yaml.ScalarNode):
        return _error(node, f"expected {expected}, not a {'list' if isinstance(node, yaml.SequenceNode) else 'map'}")
    kind, found = _kind(node), _show(node.value)
    if kind == "str" or not node.value:
        return _error(node, f"expected {expected}, not {found if kind == 'str' else 'nothing'}")
    reading = {"bool": "true or false", "null": "nothing", "timestamp": "a date"}.get(kind, "a number")
    hint = f", which YAML reads as {reading}; quote it: {found}" if quotable else ""
    return _error(node, f"expected {expected}, not {node.value[:60]}{hint}")


def _kind(node: yaml.Node) -> str:
    """Give what YAML takes a value for: str, null, bool, int, float, timestamp; seq or map."""
    if isinstance(node, yaml.ScalarNode) and not node.style and _NUMBER_IN_YAML_1_2.fullmatch(node.value):
        return "float"
    kind = node.tag.rpartition(":")[2]
    return kind if kind in ("null", "bool", "int", "float", "timestamp", "seq", "map") else "str"


# Gives what a JobConfig holds for one value of the file, or raises ConfigError with all that is wrong in it.
Reader = Callable[[yaml.Node], Any]


def _each(items: Iterable[Any], read: Callable[[Any], Any], errors: Iterable[ConfigError] = ()) -> list[Any]:
    """Read every item, and raise what is wrong in any of them together, with the other errors."""
    values, found = [], list(errors)
    for item in items:
        try:
            values.append(read(item))
        except ConfigError as error:
            found.append(error)
        if len(found) >= ERROR_LIMIT:
            break
    if found:
        raise ConfigError(*(problem for error in found for problem in error.problems))
    return values


def _scalar(expected: str, pattern: str = "", convert: Callable[[str], Any] = str, kinds: str = "str") -> Reader:
    """Read one of the kinds whose whole text matches the pattern; convert says by ValueError what else is wrong."""

    def read(node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode) or _kind(node) not in kinds.split():
            raise _unexpected(node, expected, quotable=kinds == "str")
        if flaw := _flaw(node.value):
            raise _error(node, flaw)
        if pattern and not re.fullmatch(pattern, node.value, re.ASCII | re.DOTALL):
            raise _unexpected(node, expected)
        try:
            return convert(node.value)
        except (ValueError, re.error, OverflowError, RecursionError) as error:
            raise _error(node, f"expected {expected}: {error}") from None

    return read


def _flaw(text: str) -> str:
    """Say why a text can be no argument and no variable, nothing where it can."""
    if "\0" in text:
        return "holds a NUL character, which no argument and no variable can"
    if re.search("[\ud800-\udfff]", text):
        return "holds half of a surrogate pair, which is no character"
    return f"is longer than {TEXT_LIMIT_BYTES:,} bytes" if len(text.encode()) > TEXT_LIMIT_BYTES else ""


def _show(text: str) -> str:
    return json.dumps(text[:60] + "..." * (len(text) > 60), ensure_ascii=not text.isprintable())


def _list(expected: str, item: Reader) -> Reader:
    def read(node: yaml.Node) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise _unexpected(node, f"a list of {expected}")
        return tuple(_each(node.value, item))

    return read


def _map(key_reader: Reader, value_reader: Callable[[str], Reader], needed: tuple[str, ...] = ()) -> Reader:
    """Read a map: its keys with key_reader, the value of each with what value_reader gives for the key."""

    def read(node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _unexpected(node, "a map")
        first: dict[str, yaml.Node] = {}

        def read_pair(pair: tuple[yaml.Node, yaml.Node]) -> tuple[str, Any]:
            key, value = pair
            name: str = key_reader(key)
            if first.setdefault(name, key) is not key:
                raise _error(key, f"{_show(name)} is here a second time, after line {first[name].start_mark.line + 1}")
            try:
                return name, value_reader(name)(value)
            except ConfigError as error:
                raise ConfigError(
                    *((line, column, f"{name}: {text}") for line, column, text in error.problems)
                ) from None

        written = [key.value for key, _ in node.value]
        missing = [_error(node, f'"{key}" is missing{folded(node.value)}') for key in needed if key not in written]
        return dict(_each(node.value, read_pair, missing))

    return read


def _one_of(names: Collection[str]) -> Reader:
    def read(node: yaml.Node) -> str:
        name: str = _TEXT(node)
        if name not in names:
            raise _error(node, f"{_show(name)} is no key here; {hint_for_key(name, names)}")
        return name

    return read


def _pairs(node: yaml.Node) -> yaml.Node:
    """Give the map `{NAME: value, NAME: null}` that a list `[NAME=value, NAME]` stands for, and a map as it is."""

    def quoted(text: str, mark: yaml.Mark) -> yaml.Node:  # text it is, whatever it looks like
        return yaml.ScalarNode("str", text, mark, style='"')

    def split(item: yaml.Node) -> tuple[yaml.Node, yaml.Node]:
        name, equals, value = _ANY_TEXT(item).partition("=")
        mark = item.start_mark
        return quoted(name, mark), quoted(value, mark) if equals else yaml.ScalarNode("null", "", mark)

    return (
        yaml.MappingNode("map", _each(node.value, split), node.start_mark)
        if isinstance(node, yaml.SequenceNode)
        else node
    )


def _value(node: yaml.Node) -> str | None:
    """Give the text of a variable or label, or None for null; of the numbers, those that all YAML reads alike."""
    if _kind(node) in ("int", "float") and re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", node.value):
        return str(node.value)
    return None if _kind(node) == "null" else str(_ANY_TEXT(node))


def _words(node: yaml.Node) -> str | tuple[str, ...] | None:
    if _kind(node) == "null":
        return None
    is_list = isinstance(node, yaml.SequenceNode)
    words: str | tuple[str, ...] = tuple(_each(node.value, _ANY_TEXT)) if is_list else str(_COMMAND_LINE(node))
    if mistake := shell_word(words):
        raise _error(node, mistake)
    return words


def _options(node: yaml.Node) -> tuple[str, ...]:
    """Read further `docker run` options: none that undoes ours, and no stray word that would be taken for the image."""
    if isinstance(node, yaml.SequenceNode):
        placed = _each(node.value, lambda item: (item, _ANY_TEXT(item)))
    else:
        placed = [(node, word) for word in shlex.split(_COMMAND_LINE(node))]
    rest = iter(placed)

    def read(option: tuple[yaml.Node, str]) -> str:
        place, word = option
        if not re.match("--[a-z]|-[A-Za-z]", word):
            raise _error(place, f"{_show(word)} is no option: docker would take it for the image")
        if not _SWITCH.fullmatch(word) and "=" not in word and (word.startswith("--") or len(word) == 2):
            value = next(rest, (place, None))[1]
            if value is None:
                raise _error(place, f"{word} needs a value")
            word = f"{word}={value}"  # one word, so that none of them can be the image
        if _REFUSED_OPTION.match(word):
            raise _error(place, f"{_show(word)} is not allowed: jobworker relies on its own setting")

        return word

    return tuple(_each(rest, read))


def _parameter(node: yaml.Node) -> Parameter:
    parameter = Parameter(**_PARAMETER(node)) if _kind(node) != "null" else Parameter()
    if parameter.default is not None and parameter.required:
        raise _error(node, "is required, so its default would never be used: leave out one of the two")
    if parameter.default is not None and (flaw := parameter.flaw_of(parameter.default)):
        raise _error(node, f"default: {flaw}")
    return parameter


def _job(node: yaml.Node) -> JobConfig:
    job = JobConfig(**_JOB(node))
    if job.schedule:
        if required := _required_parameters(job):
            detail = f"schedule: nobody sets {required[0]}, which is required: give it a default"
            raise _error(_key(node, "schedule"), detail)
    elif job.timezone != "UTC":
        raise _error(_key(node, "timezone"), "timezone: says when a schedule is due, and there is none")
    return job


def _required_parameters(job: JobConfig) -> list[str]:
    return [name for name, parameter in job.parameters.items() if parameter.required]


def _key(job: yaml.Node, name: str) -> Any:
    return next(key for key, _value in job.value if key.value == name)


def _check_follow_ups(jobs: Mapping[str, JobConfig], pair: tuple[yaml.Node, JobConfig]) -> None:
    """See that what follows a job is there, can run without parameters, and never leads back to it."""
    node, job = pair
    for key in ("on_failure", "on_success"):
        name = getattr(job, key)
        if name is None:
            continue
        place = _key(node, key)
        if name not in jobs:
            meant = near_name(name, jobs)
            raise _error(place, f"{key}: there is no job named {_show(name)} in this file{meant and f'; {meant}'}")
        if required := _required_parameters(jobs[name]):
            raise _error(place, f"{key}: {name} requires {required[0]}, which nobody sets: give it a default")
        if chain := _chain_back(jobs, job.name, name):
            raise _error(place, f"{key}: leads back to this job, for ever: {' -> '.join(chain)}")


def _chain_back(jobs: Mapping[str, JobConfig], goal: str, first: str) -> list[str]:
    """Give the names of follow-ups from one back to the goal; none where they end elsewhere."""
    before, waiting = {first: goal}, [first]  # what each is led to by
    for at in waiting:
        job = jobs.get(at)
        for name in (job.on_failure, job.on_success) if job else ():
            if name == goal:
                chain = [goal, at]
                while chain[-1] != goal:
                    chain.append(before[chain[-1]])
                return chain[::-1]
            if name and name not in before:
                before[name] = at
                waiting.append(name)
    return []


def _schedule(node: yaml.Node) -> tuple[str, ...]:
    texts = _SCHEDULES(node) if isinstance(node, yaml.SequenceNode) else (_DUE(node),)
    if not texts:
        raise _error(node, "an empty list is never due: leave it out")
    return tuple(texts)


def _checked_schedule(text: str) -> str:
    Schedule.parse((text,))
    return text


def _checked_timezone(name: str) -> str:
    Schedule.parse(("@daily",), name)
    return name


def _repeated_names(jobs: list[yaml.Node]) -> list[ConfigError]:
    pairs = [pair for job in jobs if isinstance(job, yaml.MappingNode) for pair in job.value]
    names = [value for key, value in pairs if key.value == "name" and isinstance(value, yaml.ScalarNode)]
    first: dict[str, yaml.Node] = {}
    repeated = [name for name in names if first.setdefault(name.value, name) is not name]
    return [
        _error(name, f"name: taken by the job on line {first[name.value].start_mark.line + 1}") for name in repeated
    ]


def _within(least: float, most: float, convert: Callable[[str], float]) -> Callable[[str], float]:
    def convert_within(text: str) -> float:
        value = convert(text)
        if not least <= value <= most:
            raise ValueError(f"{_show(text)} is out of range")
        return value

    return convert_within


def _whole(least: int, most: int) -> Reader:
    expected = f"a whole number from {least} to {most}"
    return _scalar(expected, r"-?(0|[1-9]\d{0,9})", _within(least, most, int), "int")


def _duration(least: float) -> Reader:
    expected = f"a duration such as 1m30s, from {least:g}s to 366d"
    return _scalar(expected, "", _within(least, DURATION_LIMIT_SECONDS, parse_duration), "str int float")


_NUMBER_IN_YAML_1_2 = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+|0o[0-7]+")  # and so in Compose; text in YAML 1.1
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_LABEL_OF_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"(?:{_LABEL_OF_HOST}(?:\.{_LABEL_OF_HOST})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,128}"
# HOST:PORT/PATH:TAG@DIGEST as in github.com/distribution/reference
_IMAGE = rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@{_DIGEST})?"
_VOLUME = r"(?:/[^:]*|[a-zA-Z0-9][\w.-]*):/[^:]*(?::[a-zA-Z,-]+)?|/[^:]*"
_PULL_POLICIES = {"always": "always", "missing": "missing", "never": "never", "if_not_present": "missing"}
_SWITCH = re.compile(  # an option of `docker run` that takes no further word
    r"--(detach|disable-content-trust|help|init|interactive|no-healthcheck|oom-kill-disable|privileged|publish-all|quiet"
    r"|read-only|rm|sig-proxy|tty|use-api-socket)|-[Pqdit]+"
)
_REFUSED_OPTION = re.compile(
    r"--(attach|cidfile|detach|help|interactive|log-driver|name|pull|restart|rm|tty)(?![\w-])|-[Pq]*[adit]"
    r"|(--label[ =]|-[Pq]*l[ =]?)jobworker\.|(--env[ =]|-[Pq]*e[ =]?)JOBWORKER_"
)

_ANY_TEXT = _scalar("text")
_TEXT = _scalar("text", ".+")
_COMMAND_LINE = _scalar("text, or a list of text", convert=lambda text: text if shlex.split(text) else "")
_DURATION = _duration(0)
_BOOLEAN = _scalar("true or false", "true|false", "true".__eq__, "bool")
_VARIABLE = _scalar("a variable's name (those of JOBWORKER_ are taken)", r"(?!JOBWORKER_)[A-Za-z_][\w.-]*")
_VARIABLES = _map(_VARIABLE, lambda _: _value)
_LABEL = _scalar("a label's name, not jobworker...", r"(?!jobworker\.)[!-<>-~]+")
_LABELS = _map(_LABEL, lambda _: lambda node: _value(node) or "")
_PATTERN = _scalar("a regular expression", ".+", lambda text: compiled(text).expression)
_DUE = _scalar("when it is due, such as 30 2 * * * or @daily", ".+", _checked_schedule)
_SCHEDULES = _list("times such as 30 2 * * *", _DUE)
_NAME = _scalar("1 to 128 characters, no / or control character", r"(?!\.\.?$)[^/\x00-\x1f\x7f-\x9f]{1,128}")
_PARAMETER_KEYS: dict[str, Reader] = {"required": _BOOLEAN, "default": _value, "pattern": _PATTERN}
_PARAMETER = _map(_one_of(_PARAMETER_KEYS), _PARAMETER_KEYS.__getitem__)
JOB_KEYS: dict[str, Reader] = {
    "name": _NAME,
    "image": _scalar("an image such as busybox:1.36 or host.example:5000/team/app", _IMAGE),
    "command": lambda node: None if (words := _words(node)) == () else words,
    "entrypoint": _words,
    "environment": lambda node: _VARIABLES(_pairs(node)),
    "volumes": _list("volumes", _scalar("SOURCE:/TARGET[:MODE], SOURCE a volume or an absolute path", _VOLUME)),
    "working_dir": _scalar("an absolute path", "/.*"),
    "user": _scalar("USER or USER:GROUP", r"[^\s:]+(:[^\s:]+)?"),
    "network_mode": _scalar("a network such as none, host or bridge", r"(?!service:)\S+"),
    "mem_limit": _scalar("a size such as 512m or 1g", r"(?i)\d+(\.\d+)? ?[kmgtp]i?b?|\d{7,}b?", kinds="str int"),
    "cpus": _scalar("a number from 0.01", r"(0|[1-9]\d*)?(\.\d{1,9})?", _within(0.01, 1e6, float), "str int float"),
    "pids_limit": _whole(-1, 2**22),
    "pull_policy": _scalar("always, missing or never", "|".join(_PULL_POLICIES), _PULL_POLICIES.__getitem__),
    "platform": _scalar("a platform such as linux/arm64", r"[a-z0-9_]+(/[a-z0-9_.]+){0,2}"),
    "init": _BOOLEAN,
    "labels": lambda node: _LABELS(_pairs(node)),
    "stop_grace_period": lambda node: math.ceil(_DURATION(node)),  # docker takes whole seconds
    "options": _options,
    "timeout": _duration(0.001),
    "pull_timeout": _duration(0.001),
    "retries": _whole(0, 1000),
    "retry_delay": _DURATION,
    "concurrency": _whole(1, 2**31 - 1),
    "tags": _list("tags", _scalar("a tag without spaces and commas", r"[^\s,\x00-\x1f\x7f]{1,128}")),
    "priority": _whole(-(2**31), 2**31 - 1),
    "parameters": _map(_VARIABLE, lambda _: _parameter),
    "schedule": _schedule,
    "timezone": _scalar("a time zone such as Europe/Berlin", ".+", _checked_timezone),
    "on_failure": _NAME,
    "on_success": _NAME,
}
_JOB = _map(_one_of(JOB_KEYS), JOB_KEYS.__getitem__, needed=("name", "image"))
