"""What both command lines do alike: options, the token file, the log, the limits of open files and unsent bytes."""

import argparse
import contextlib
import ipaddress
import logging
import os
import queue
import re
import resource
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

MIN_TOKEN_CHARACTERS = 16
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
MAX_LOG_RECORDS = 10_000
FLUSH_SECONDS = 1
UNSENT_BYTES = 64 * 1024  # between server and worker: a ping has to wait for what is not sent yet


class OptionError(Exception):
    """An option, or the file that it names, is wrong. The message says which one, and why."""


def command_line(description: str, version: str, example: str) -> argparse.ArgumentParser:
    """Give a parser with the options that both programs have.

    example: lines that end the help; their `%(command)s` becomes what the program was started with.
    """
    program = Path(sys.argv[0]).name
    example %= {"command": f"python {program}" if program.endswith(".py") else program}
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"An option may be set by a variable, too, --token-file as JOBWORKER_TOKEN_FILE.\n\nexample:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"jobworker {version}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    return parser


def setting(name: str, otherwise: str | None = None) -> str | None:
    """Give the environment variable of an option; an empty one counts as not set."""
    return os.environ.get(f"JOBWORKER_{name}") or otherwise


def settings(name: str) -> list[str]:
    """Give the same for an option that may be repeated: its values, separated by commas."""
    return [word for word in (setting(name) or "").split(",") if word]


def yes_or_no(name: str, parser: argparse.ArgumentParser) -> bool:
    """Give the environment variable of an option that has no value."""
    text = (setting(name) or "no").lower()
    if text not in (*YES, *NO):
        parser.error(f"JOBWORKER_{name} must be yes or no, not {text!r}")
    return text in YES


def image_globs(parser: argparse.ArgumentParser) -> list[str]:
    """Give those of JOBWORKER_ALLOW_IMAGE; an empty one would allow all to whoever meant to allow little."""
    globs = settings("ALLOW_IMAGE")
    if not globs and "JOBWORKER_ALLOW_IMAGE" in os.environ:
        parser.error("JOBWORKER_ALLOW_IMAGE names no image: unset it to run all, or name some, such as busybox")
    return globs


def tag(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def check_host(options: argparse.Namespace) -> None:
    """Refuse to be open to a network without tokens."""
    try:
        loopback = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not options.tokens["api"] and not options.insecure:
        raise OptionError(f"--host: {options.host} is open to the network: give --token-file, or --insecure")


def read_tokens(path: Path) -> list[list[str]]:
    """Give each line's words in a token file: `api TOKEN`, `worker TOKEN`, or `TOKEN` for both; `#` is a comment.

    Raises OptionError where it can't be read, or a token is too short to be one, as a recipe that failed leaves it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: can't be read as a token file: {error}") from error
    words = {number: line.split() for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"}
    for number, each in words.items():
        if len(each[-1]) < MIN_TOKEN_CHARACTERS or not each[-1].isascii():
            raise OptionError(f"{path}:{number}: a token has at least {MIN_TOKEN_CHARACTERS} characters, all of ASCII")
    return list(words.values())


def tokens_by_scope(path: Path | None) -> dict[str, set[str]]:
    """Read the token file, if there is one. Raises OptionError where a line is wrong or a scope has no token."""
    tokens: dict[str, set[str]] = {"api": set(), "worker": set()}
    if path is None:
        return tokens
    for *scope, token in read_tokens(path):
        if scope not in ([], ["api"], ["worker"]):
            raise OptionError(f"{path}: each line must be 'api TOKEN', 'worker TOKEN' or 'TOKEN'")
        for name in scope or tokens:
            tokens[name].add(token)
    if not all(tokens.values()):
        raise OptionError(f"{path}: it must hold a token for the API and one for workers")
    return tokens


def worker_token(path: Path | None) -> str | None:
    """Give the first token for workers in the token file, if there is one. Raises OptionError where it has none."""
    if path is None:
        return None
    for *scope, token in read_tokens(path):
        if scope in ([], ["worker"]):
            return token
    raise OptionError(f"{path}: no line is 'worker TOKEN' or 'TOKEN'")


def slot_count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots from 1 to 9999")
    return int(text)


def worker_name(text: str) -> str:
    if not (1 <= len(text) <= 128 and text.isprintable()):
        raise argparse.ArgumentTypeError("a name has 1 to 128 printable characters")
    return text


def quiet_logger() -> logging.Logger:
    """What websockets logs: failed handshakes are told by us where they matter, and its debug log would show tokens."""
    logger = logging.getLogger("websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


class LineFormatter(logging.Formatter):
    """A line an event: control characters, which a terminal might obey, are escaped.

    A list of texts, `log.info([…])`, is a line each: a record for each would cost ten times as much.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, list):
            start = f"{self.formatTime(record)} {record.levelname} "
            text = "\n".join(start + each for each in record.msg)
        else:
            text = super().format(record)
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: repr(m[0])[1:-1], text)


def start_logging(verbose: bool) -> None:
    """Write the log to stderr."""
    handler = LogThread()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])


class LogThread(logging.Handler):
    """Writes the log in a thread of its own: where nobody reads it, lines are dropped, and nothing waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_LOG_RECORDS)
        self._dropped = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def _run(self) -> None:
        while True:
            record = self._records.get()
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                sys.stderr.write(f"{self.format(record)}\n")
                dropped, self._dropped = self._dropped, 0
                if dropped:
                    sys.stderr.write(f"{dropped} lines could not be written in time, and are lost\n")
            self._records.task_done()

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._records.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)


def end_at_once(code: int) -> NoReturn:
    """End the process with this exit code; no thread is waited for."""
    logging.shutdown()
    os._exit(code)


def raise_limit_of_files() -> None:
    """Take as many descriptors as the system gives: each worker, each request and each container has some."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
