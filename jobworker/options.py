"""What both command lines do alike: the log, and the limit of open files."""

import logging
import re
import resource


def quiet_logger() -> logging.Logger:
    """What websockets logs: failed handshakes are told by us where they matter, and its debug log would show tokens."""
    logger = logging.getLogger("websockets")
    logger.setLevel(logging.CRITICAL)
    return logger


class LineFormatter(logging.Formatter):
    """A line an event: control characters, which a terminal might obey, are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: repr(m[0])[1:-1], text)


def start_logging(verbose: bool) -> None:
    """Write the log to stderr."""
    stream = logging.StreamHandler()
    stream.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[stream])


def raise_limit_of_files() -> None:
    """Take as many descriptors as the system gives: each worker, each request and each container has some."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
