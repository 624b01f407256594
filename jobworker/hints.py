"""What people write in a jobs.yaml that means nothing, or another thing: the likely meaning, for config.py's errors."""

import difflib
import json
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

import yaml

OTHER_NAMES = {
    "env": "environment", "envs": "environment", "variables": "environment", "vars": "environment",
    "memory": "mem_limit", "mem": "mem_limit", "ram": "mem_limit", "cpu": "cpus", "pids": "pids_limit",
    "mount": "volumes", "mounts": "volumes", "binds": "volumes", "volume": "volumes",
    "cmd": "command", "args": "command", "run": "command", "script": "command",
    "network": "network_mode", "networks": "network_mode", "net": "network_mode",
    "workdir": "working_dir", "cwd": "working_dir", "pull": "pull_policy",
    "retry": "retries", "attempts": "retries", "max_retries": "retries", "backoff": "retry_delay",
    "parallelism": "concurrency", "max_parallel": "concurrency", "deadline": "timeout",
    "params": "parameters", "inputs": "parameters", "runs_on": "tags", "needs_tags": "tags",
    "cron": "schedule", "every": "schedule", "tz": "timezone", "regex": "pattern", "value": "default",
}  # fmt: skip
DOCKER_OPTIONS = {
    "privileged": "--privileged", "read_only": "--read-only", "cap_add": "--cap-add", "cap_drop": "--cap-drop",
    "devices": "--device", "gpus": "--gpus", "hostname": "--hostname", "dns": "--dns", "extra_hosts": "--add-host",
    "ports": "--publish", "shm_size": "--shm-size", "tmpfs": "--tmpfs", "ulimits": "--ulimit", "env_file": "--env-file",
    "security_opt": "--security-opt", "sysctls": "--sysctl", "group_add": "--group-add", "ipc": "--ipc",
    "cpuset": "--cpuset-cpus", "cpu_shares": "--cpu-shares", "memswap_limit": "--memory-swap", "pid": "--pid",
    "mem_reservation": "--memory-reservation", "stop_signal": "--stop-signal", "userns_mode": "--userns",
    "dns_search": "--dns-search", "domainname": "--domainname", "mac_address": "--mac-address", "runtime": "--runtime",
    "storage_opt": "--storage-opt", "device_cgroup_rules": "--device-cgroup-rule", "annotations": "--annotation",
}  # fmt: skip
SENTENCES = {
    "restart": "a job that has failed is tried again as often as its retries say",
    "depends_on": "jobs do not wait for each other: ask for the next one when this one has ended",
    "container_name": "each container has a name of its own",
    "build": "build the image beforehand, and name it by image",
    "logging": "the server keeps what a job writes: curl localhost:8080/api/jobs/ID/log",
    "healthcheck": "a job has ended well when it exits with 0",
    "tty": "a job has neither a terminal nor a standard input",
    "stdin_open": "a job has neither a terminal nor a standard input",
    "deploy": "write its limits as mem_limit, cpus and pids_limit",
    "secrets": "mount the worker's file by volumes, read-only",
    "scale": "POST a job as often as it shall run; a worker's --slots say how many at once",
    "<<": "merge keys are not supported: write the keys out",
} | {key: f"write {option} under options, as docker run takes it" for key, option in DOCKER_OPTIONS.items()}

LINE_LIMIT = 200  # of a line's characters, as many as are looked at
SHELLS = {"sh", "ash", "bash", "dash", "ksh", "zsh"}
QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
OPERATOR_IN_TEXT = re.compile(r"&&?|\|\|?|<|[12&]?>>?(?:&[12]|[\w./-]*)|.+;|.*\$\(.*|.*`.*")
OPERATOR_IN_LIST = re.compile(r"&&|\|\|?|>>?")
# What YAML's two readers say, of which one is in C.
ALIGNED_BADLY = re.compile(r"(did not find )?expected ('-' indicator|key|<block end>|'?<document start>)")
UNCLOSED = re.compile(r"(?:did not find )?expected ',' or '([]}])'|found unexpected (?:end of stream|document )")

MOST_COMPARED = 1_000  # names alike take 20 ms, in which nobody else gets far


def hint_for_key(name: str, names: Collection[str]) -> str:
    """Say what somebody may have meant by a key that is none of the names."""
    if OTHER_NAMES.get(name) in names:
        return f"did you mean {OTHER_NAMES[name]}?"
    if name in SENTENCES:
        return SENTENCES[name]
    return near_name(name, names) or f"known are {', '.join(names)}"


def near_name(name: str, names: Collection[str]) -> str:
    """Ask whether the nearest of the names was meant, of so many at most; "" where none is near."""
    near = difflib.get_close_matches(name, islice(names, MOST_COMPARED), 1)
    return f"did you mean {near[0]}?" if near else ""


def shell_word(command: str | Iterable[str]) -> str:
    """Say where a command's text, or its words, hold what only a shell would understand; "" where they don't."""
    if isinstance(command, str):
        words, operator = QUOTED.sub("Q", command).split(), OPERATOR_IN_TEXT
        otherwise = ", or put it in quotes if the program shall have it"
    else:
        words, operator, otherwise = list(command), OPERATOR_IN_LIST, ""
        if "-c" in words and SHELLS & {word.rpartition("/")[2] for word in words}:
            return ""
    found = next(filter(operator.fullmatch, words), None)
    return f"no shell reads this, so {found} is only a word: write [sh, -c, '...']{otherwise}" if found else ""


def explain_yaml(text: str, error: yaml.MarkedYAMLError) -> tuple[int, int, str]:
    """Give line and column, from 1, and the likely mistake in a text that is no YAML, or else YAML's own words."""
    lines = [line[:LINE_LIMIT] for line in text.splitlines()]
    problem = str(error.problem)
    mark = error.problem_mark or error.context_mark
    row, column = (mark.line, mark.column) if mark else (0, 0)
    lines += [""] * (row + 1 - len(lines))
    line = lines[row]
    if problem == "could not find expected ':'" and error.context_mark:
        return _no_colon(lines, error.context_mark.line)
    if problem.startswith("mapping values are not allowed"):
        return _unexpected_colon(lines, row, column)
    is_start = not line[:column].strip() and line[column : column + 1] not in ("", "]", "}", ",")
    if is_start and ALIGNED_BADLY.match(problem):
        return _misaligned(lines, row)
    if opened := error.context_mark and UNCLOSED.match(problem):
        begin, sign = error.context_mark, {"]": "[", "}": "{"}.get(opened[1], "quote")
        if begin.line < row:
            comma = "" if sign == "quote" else f", or a comma is missing before line {row + 1}"
            return begin.line + 1, begin.column + 1, f"this {sign} is not closed{comma}"
    if line[:column].rstrip().endswith(("'", '"')):
        return (
            row + 1,
            column + 1,
            "what is in quotes ends before this: is a quote above it not closed, or one within it?",
        )
    reason = ": ".join(filter(None, (error.context, error.problem)))
    if line.lstrip(" ").startswith("\t"):
        reason += "; indent with spaces, not tabs"
    elif re.search(r"cannot start any token|scanning an (alias|anchor)|scanning a block scalar", reason):
        reason += "; put the value in quotes"
    return row + 1, column + 1, reason


def _no_colon(lines: list[str], row: int) -> tuple[int, int, str]:
    found = re.fullmatch(r"(\s*(?:- +)*)([^\s:]+)(:?)\s*(.*?)\s*", lines[row])
    start, key, colon, rest = found.groups() if found else (lines[row], "KEY", "", "VALUE")
    if re.match(r"[./~]", key) and "-" not in start:
        return row + 1, len(start) + 1, f"is a dash missing: did you mean {_show(f'- {lines[row].strip()}')}?"
    wrong = "there is no space after a colon" if colon else "there is no colon"
    return row + 1, len(start) + 1, f"{wrong}: did you mean {_show(f'{key}: {rest}'.strip())}?"


def _unexpected_colon(lines: list[str], row: int, column: int) -> tuple[int, int, str]:
    before = re.sub(r"^\s*(- +)*", "", lines[row][:column])
    if re.search(r":\s", before):
        return row + 1, column + 1, 'a second ": " in one line: put the value in quotes'
    above = _line_above(lines, row)
    if above is None:
        return row + 1, column + 1, "a colon is not allowed here: put the value in quotes"
    if re.match(r"\s*-[^\s-]", lines[above]):
        return above + 1, len(lines[above]) - len(lines[above].lstrip()) + 1, 'there is no space after "-"'
    if not re.search(r":(\s|$)", lines[above]):
        return _no_colon(lines, above)
    return _misaligned(lines, row)


def _misaligned(lines: list[str], row: int) -> tuple[int, int, str]:
    is_item = lines[row].lstrip().startswith("-")
    column = _column(lines[row], is_item)
    words = f"{_show(lines[row].strip().partition(':')[0])} begins in column {column}"
    alike = re.compile(r"\s*-\s" if is_item else r"\s*(- +)*[^\s#][^#]*:(\s|$)")
    beside = next((_column(line, is_item) for line in reversed(lines[:row]) if alike.match(line)), column)
    place = f"the one above in column {beside}" if beside != column else "where nothing can begin"
    return row + 1, column, f"{words}, {place}: align what belongs together"


def _column(line: str, with_dash: bool) -> int:
    """Give where a line's text begins, from 1: its key, or the dash before it."""
    return len(line) - len(line.lstrip() if with_dash else re.sub(r"^\s*(- +)*", "", line)) + 1


def _line_above(lines: list[str], row: int) -> int | None:
    return next(
        (each for each in range(row - 1, -1, -1) if lines[each].strip() and lines[each].lstrip()[0] != "#"), None
    )


def folded(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Say where a line without a colon may have become part of the value above it, as YAML folds lines."""
    for _key, value in pairs:
        if isinstance(value, yaml.ScalarNode) and not value.style and value.end_mark.line > value.start_mark.line:
            return f"; is a colon missing in line {value.start_mark.line + 2}?"
    return ""


def _show(text: str) -> str:
    return json.dumps(text[:60], ensure_ascii=not text.isprintable())
