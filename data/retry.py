"""Waiting for a source that fails for a while: which errors pass, and for how long to hope."""

import time
from threading import Event

FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524}
NETWORK_MODULES = {"aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "botocore", "urllib3"}


class Closed(Exception):
    """The consumer went away while a source was being waited for."""


def reason(error: BaseException) -> BaseException:
    """What is behind `error`: libraries wrap an HTTP status in a FileNotFoundError, or a reset in a ConnectionError."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def passes(error: BaseException) -> bool:
    """Whether `error` may go away by itself: a reset, a time-out, HTTP 5xx or 429; not a missing or forbidden file."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # aiohttp, httpx and huggingface_hub each have their own place for it
        return status in PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if type(error) is OSError and error.errno is None:  # what pyarrow raises for a damaged file: no call of the system failed
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_MODULES


class Backoff:
    """Delays that double from a quarter of a second to half a minute, until `seconds` have passed without progress."""

    def __init__(self, seconds: float, closing: Event) -> None:
        self._seconds = seconds
        self._closing = closing
        self.progress()

    def progress(self) -> None:
        """Something was read: hope begins anew."""
        self._delay = FIRST_DELAY
        self._failing_since: float | None = None

    def wait(self) -> bool:
        """Sleep for the next delay; False once the time is up. Raises Closed when the consumer left meanwhile."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        left = self._failing_since + self._seconds - now
        if left <= 0:
            return False
        if self._closing.wait(min(self._delay, left)):
            raise Closed
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        return True
