"""The reasons why a run or an attempt ends: an `Ending` for programs, with a detail for people.

Programs compare endings and never the words of a detail. Run folders that were written before there
were endings have the words alone; no function but `ending_of_words` interprets them.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum

from trainer.foreign_errors import is_lost_peer


class Ending(StrEnum):
    """The kinds of reasons why a run or an attempt ends."""

    STEPS_DONE = "steps_done"
    """The run did all steps or tokens of its job."""
    HOURS_OVER = "hours_over"
    """The attempt used up `stop.hours`."""
    STOP_REQUESTED = "stop_requested"
    """A person left a file `stop` in the run folder."""
    SIGNAL = "signal"
    """A signal reached the command or a worker."""
    PREEMPTED = "preempted"
    """A worker's node is about to be taken away."""
    PRUNED = "pruned"
    """A sweep ended a trial that was behind the others."""
    COLLAPSED = "collapsed"
    """The routing collapsed, and the job's action is to stop."""
    ANOMALY = "anomaly"
    """A batch had to be skipped, and the job's action or budget is to stop."""
    CHECKPOINT_FAILED = "checkpoint_failed"
    """The last checkpoint could not be written."""
    ERROR = "error"
    """A rank raised an error of its own."""
    PEER_LOST = "peer_lost"
    """A rank noticed that another rank had ended: a consequence, never the cause."""
    HUNG = "hung"
    """A rank made no progress, and its watchdog ended it."""
    LOST = "lost"
    """A worker was killed, or its machine was lost."""
    RESIZED = "resized"
    """The next attempt began with another number of workers."""

    @property
    def is_failure(self) -> bool:
        """Whether a run that stops for this reason has failed."""
        return self in (Ending.ANOMALY, Ending.CHECKPOINT_FAILED)

    @property
    def is_done(self) -> bool:
        """Whether a run that stops for this reason has completed its job."""
        return self in (Ending.STEPS_DONE, Ending.HOURS_OVER)


_PREFIXES = {Ending.PREEMPTED: "preemption: ", Ending.PRUNED: "pruned: "}


@dataclass(frozen=True)
class Stopped:
    """An ending with its detail; as a string, a sentence for people."""

    ending: Ending
    detail: str

    def __str__(self) -> str:
        return _PREFIXES.get(self.ending, "") + self.detail

    @staticmethod
    def read(text: str, ending: str | None, failed: bool = False) -> "Stopped":
        """Read the sentence `text` and the key `ending` of a file; old files lack the key.

        `failed` says whether the run failed.
        """
        kind = Ending(ending) if ending else ending_of_words(text, failed)
        return Stopped(kind, text.removeprefix(_PREFIXES.get(kind, "")))

    def to_request(self) -> bytes:
        """Return the content of a `stop` file."""
        return json.dumps({"ending": self.ending, "detail": self.detail}).encode()

    @staticmethod
    def from_request(content: bytes) -> "Stopped":
        """Read a `stop` file; any content but `to_request`'s is a person's reason."""
        text = content.decode(errors="replace").strip()
        try:
            request = json.loads(text)
            return Stopped(Ending(request["ending"]), str(request["detail"]))
        except (ValueError, KeyError, TypeError):
            return Stopped(Ending.STOP_REQUESTED, text or "stop requested")


ALL_STEPS_DONE = Stopped(Ending.STEPS_DONE, "all steps done")
UNKNOWN = Stopped(Ending.LOST, "killed, or its machine was lost: no worker said why")

_OLD_WORDS = (
    (r"all steps done", Ending.STEPS_DONE),
    (r"stop\.hours: ", Ending.HOURS_OVER),
    (r"SIG[A-Z0-9]+( to the command)?$", Ending.SIGNAL),
    (r"preemption: ", Ending.PREEMPTED),
    (r"pruned: ", Ending.PRUNED),
    (r"routing collapse in layer ", Ending.COLLAPSED),
    (r"step \d+: .*; look at the data and the learning rate", Ending.ANOMALY),
    (r".*; make room and use --resume$", Ending.CHECKPOINT_FAILED),
    (r"\w+ on rank \d+ after step \d+: ", Ending.ERROR),
    (r"no progress for ", Ending.HUNG),
    (r"killed, or its machine was lost|rank \d+ died: ", Ending.LOST),
    (r"rank \d+: ", Ending.ERROR),
    (r"\d+ workers became \d+$", Ending.RESIZED),
)
"""The beginnings of the sentences in run folders that have no endings."""


def ending_of_words(text: str, failed: bool = False) -> Ending:
    """Return the ending that a sentence of an old run folder means.

    A sentence that no program wrote is the reason of a person who asked the run to stop.
    """
    known = next((ending for words, ending in _OLD_WORDS if re.match(words, text, re.DOTALL)), None)
    if known is Ending.ERROR and is_lost_peer(text):
        return Ending.PEER_LOST
    if failed and not (known and known.is_failure):
        return Ending.ANOMALY
    return known or Ending.STOP_REQUESTED
