"""The attempts of a run: the start of each, and why it ended.

A process that knows why an attempt ends leaves a cause in the run folder. The earliest one counts,
unless it comes from a rank that only lost its peers. A worker that is killed leaves none; then Ray
does, or nobody.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trainer.endings import UNKNOWN, Ending, Stopped
from trainer.foreign_errors import is_lost_peer
from trainer.parsing import one_line
from trainer.records.code_version import code_version
from trainer.run_files import RunFiles
from trainer.run_rows import AttemptBegan, AttemptEnded, Event, EventKind, Say

if TYPE_CHECKING:  # the driver and Ray's controller use this module without torch
    from trainer.core.training import Training
    from trainer.world import World

Print = Callable[[str], None]
"""Shows a line to people."""


def begin_attempt(files: RunFiles, world: "World") -> int:
    """Record a new attempt; returns its number, from 0.

    Half-written checkpoints of earlier attempts are removed.
    """
    from trainer.checkpoint.format import remove_unfinished  # numpy, which the driver does not need

    attempt = 0
    if world.is_main:
        files.folder.make()
        earlier = files.attempts_begun()
        attempt = len(earlier)
        if attempt:
            before = [row.world for row in earlier if row.world is not None][-1]
            resized = Stopped(Ending.RESIZED, f"{before} workers became {world.size}")
            close_attempt(files, attempt - 1, UNKNOWN if before == world.size else resized)
        files.add_attempt(_begun(attempt, world))
        remove_unfinished(files.checkpoints)
    return int(world.gather(attempt)[0])


def _begun(attempt: int, world: "World") -> AttemptBegan:
    version = code_version()
    return AttemptBegan(
        attempt=attempt,
        time=time.time(),
        world=world.size,
        host=platform.node(),
        pid=os.getpid(),
        commit=None if version["commit"] is None else str(version["commit"]),
        dirty=bool(version["dirty"]),
    )


def current_attempt(files: RunFiles) -> int:
    """The number of the newest attempt; -1 if none has begun."""
    return len(files.attempts_begun()) - 1


def note_end(files: RunFiles, attempt: int, by: str, stopped: Stopped) -> None:
    """Leave the cause of an attempt's end in the run folder."""
    files.add_cause(AttemptEnded(attempt=attempt, time=time.time(), by=by, stopped=stopped))


def close_attempt(files: RunFiles, attempt: int, otherwise: Stopped = UNKNOWN) -> Stopped:
    """Record that an attempt ended.

    Returns the reason, or `otherwise` if no process gave one.
    """
    for end in files.attempts_ended():
        if end.attempt == attempt:
            return end.stopped
    causes = sorted(files.causes(attempt), key=lambda cause: (cause.stopped.ending is Ending.PEER_LOST, cause.time))
    end = causes[0] if causes else AttemptEnded(attempt=attempt, time=time.time(), by="nobody", stopped=otherwise)
    files.add_attempt(end)
    return end.stopped


def stopped_by_error(text: str) -> Stopped:
    """The end of an attempt in which a rank raised an error with the message `text`."""
    return Stopped(Ending.PEER_LOST if is_lost_peer(text) else Ending.ERROR, text)


@contextmanager
def ending(training: "Training", files: RunFiles, attempt: int) -> Iterator[None]:
    """Note the error with which the block ends, if any, on every rank that meets one."""
    try:
        yield
    except BaseException as error:
        rank = training.world.rank
        sentence = f"{type(error).__name__} on rank {rank} after step {training.step}: {one_line(error, 500)}"
        note_end(files, attempt, f"rank {rank}", stopped_by_error(sentence))
        raise


def recorded(show: Print, files: RunFiles, attempt: int, world: "World") -> Say:
    """A function that shows texts with `show` and records them as events, on rank 0 alone."""

    def record(kind: EventKind, text: str, step: int | None = None) -> None:
        event = Event(kind=kind, text=text, time=round(time.time(), 3), attempt=attempt, step=step)
        with suppress(OSError):  # on a full disk the text must still be shown
            files.add_event(event)
        show(text)

    def silent(kind: EventKind, text: str, step: int | None = None) -> None:
        pass

    return record if world.is_main else silent
