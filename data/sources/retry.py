"""Waiting for a source that fails for a while: which errors may pass, and how long to retry."""

import time
from threading import Event

FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524}
NETWORK_MODULES = {"aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "botocore", "urllib3"}


class Closed(Exception):
    """The consumer closed the stream during the wait for a source."""


def reason(error: BaseException) -> BaseException:
    """The first cause of `error`: some libraries wrap an HTTP status in a FileNotFoundError."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def passes(error: BaseException) -> bool:
    """Whether a retry may help: after a reset, a time-out, HTTP 5xx or 429.

    A missing or forbidden file does not come back by itself.
    """
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # aiohttp, httpx and huggingface_hub each keep it somewhere else
        return status in PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if type(error) is OSError and error.errno is None:  # pyarrow raises this for a damaged file: no system call failed
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_MODULES


class Backoff:
    """Delays that double from 0.25 s to 30 s, until `seconds` have passed without progress."""

    def __init__(self, seconds: float, closing: Event) -> None:
        self.seconds = seconds
        self.closing = closing
        self.progress()

    def progress(self) -> None:
        """Start over: something was read."""
        self.delay = FIRST_DELAY
        self.failing_since: float | None = None

    def wait(self) -> bool:
        """Sleep for the next delay; False once the time is up.

        Raises Closed if the stream closes meanwhile.
        """
        now = time.monotonic()
        if self.failing_since is None:
            self.failing_since = now
        left = self.failing_since + self.seconds - now
        if left <= 0:
            return False
        if self.closing.wait(min(self.delay, left)):
            raise Closed
        self.delay = min(2 * self.delay, LONGEST_DELAY)
        return True


class Outage:
    """Makes reads fail on purpose for a while, as if the connection were reset."""

    def __init__(self) -> None:
        self.until = 0.0
        """Reads fail before this value of time.monotonic()."""

    def start(self, seconds: float) -> None:
        """Let every read of the next `seconds` fail."""
        self.until = time.monotonic() + seconds

    def check(self) -> None:
        """Raises ConnectionResetError during the outage."""
        if time.monotonic() < self.until:
            raise ConnectionResetError("a fault on purpose")


OUTAGE = Outage()
"""The outage of this process's lanes; trainer/recovery/faults.py starts it."""
