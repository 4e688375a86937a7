"""The attempts of a run: where each begins, why each ended, and what the run folder says of both.

`attempts.jsonl` has a line when an attempt begins, and one when it ends: {"attempt", "time", "ended": why, "by": who says so}.
In between, whoever knows why it ends leaves a file in `ends/`, and the first to speak counts, but for a rank that only lost its
peers. A worker that is killed says nothing: then Ray does, or nobody. `events.jsonl` has what was said, `anomalies.jsonl` the
batches that were passed over.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from trainer.code_version import code_version
from trainer.parsing import one_line
from trainer.storage import Folder

if TYPE_CHECKING:  # the driver and Ray's controller need no torch for what is here
    from trainer.loop import Training
    from trainer.world import World

Say = Callable[[str], None]
UNKNOWN = "killed, or its machine was lost: no worker said why"
_LOST_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    """What stands in the file `name` of a run, a line each; a last line that was cut off is left out."""
    if not folder.exists(name):
        return []
    whole, _, _ = folder.read(name).rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def append(folder: Folder, name: str, line: dict[str, Any]) -> None:
    folder.append(name, json.dumps(line).encode() + b"\n")


def begin_attempt(folder: Folder, world: "World") -> int:
    """The number of this attempt at the run, from 0; what an earlier one left half-written goes."""
    attempt = 0
    if world.is_main:
        earlier = lines(folder.make(), "attempts.jsonl")
        attempt = sum("ended" not in line for line in earlier)
        if attempt:
            before = [line["world"] for line in earlier if "world" in line][-1]
            close_attempt(folder, attempt - 1, UNKNOWN if before == world.size else f"{before} workers became {world.size}")
        begun = {"attempt": attempt, "time": time.time(), "world": world.size, "host": platform.node(), "pid": os.getpid()}
        append(folder, "attempts.jsonl", begun | code_version())
        saved = folder / "checkpoints"
        for name in saved.names():
            if name.startswith(".step-"):
                (saved / name).remove()
    return int(world.gather(attempt)[0])


def current_attempt(folder: Folder) -> int:
    """The number of the newest attempt; -1: none has begun."""
    return sum("ended" not in line for line in lines(folder, "attempts.jsonl")) - 1


def note_end(folder: Folder, attempt: int, by: str, cause: str) -> None:
    """Say why an attempt ends, in a file of one's own: all ranks may do so at the same time, and object stores cannot append."""
    line = {"attempt": attempt, "time": time.time(), "ended": cause, "by": by}
    (folder / "ends").make().write(f"attempt-{attempt}-{by.replace(' ', '-')}.json", json.dumps(line).encode())


def close_attempt(folder: Folder, attempt: int, otherwise: str = UNKNOWN) -> str:
    """Have the end of an attempt that is over in `attempts.jsonl`; returns why it ended, which is `otherwise` where nobody has said."""
    for line in lines(folder, "attempts.jsonl"):
        if line["attempt"] == attempt and "ended" in line:
            return str(line["ended"])
    ends = folder / "ends"
    told = [json.loads(ends.read(name)) for name in ends.names() if name.startswith(f"attempt-{attempt}-")]
    told.sort(key=lambda line: (any(word in line["ended"] for word in _LOST_PEERS), line["time"]))
    line = told[0] if told else {"attempt": attempt, "time": time.time(), "ended": otherwise, "by": "nobody"}
    append(folder, "attempts.jsonl", line)
    return str(line["ended"])


@contextmanager
def ending(training: "Training", folder: Folder, attempt: int) -> Iterator[None]:
    """Note why the attempt ends, if the block ends with an error; an error that more than one rank meets is noted by each."""
    try:
        yield
    except BaseException as error:
        cause = one_line(error, 500)
        note_end(folder, attempt, f"rank {training.world.rank}", f"{type(error).__name__} on rank {training.world.rank} after step {training.step}: {cause}")
        raise


def recorded(say: Say, folder: Folder, attempt: int, world: "World") -> Say:
    """`say` that writes each line down in the run's `events.jsonl` as well, from rank 0; the other ranks say nothing."""

    def record(line: str) -> None:
        with suppress(OSError):  # a full disk must not keep anybody from hearing of it
            append(folder, "events.jsonl", {"time": round(time.time(), 3), "attempt": attempt, "event": line})
        say(line)

    return record if world.is_main else lambda line: None
