"""Where the time of a run goes, across all its attempts: wall-clock time that sums to the whole.

`goodput.json` in the run folder has a row per attempt. An attempt that Ray started begins when the
attempt before was last heard of. So the whole cost of a failure is there: the time until it was
noticed, the restart, and the steps that were replayed.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, field

from trainer.core.training import Training
from trainer.run_files import RunFiles
from trainer.run_rows import GoodputRow, Spent
from trainer.tracking.tracker import Tracker

NAMES: dict[Spent, str] = {
    "step": "stepping",
    "data": "waiting for data",
    "evaluation": "evaluation and samples",
    "checkpoint": "stalled by checkpoints",
    "replayed": "steps done again",
    "restart": "restarts",
    "start-up": "start-up",
    "other": "other",
}
"""The categories of time, in words."""
_WRITE_EVERY_S = 2.0


@dataclass
class Goodput:
    """A hook that keeps this attempt's row. The time of rank 0 stands for that of all ranks."""

    files: RunFiles
    tracker: Tracker
    begin: float
    """Start of this attempt's time, as time.time()."""
    waiting: Spent
    """The category of the time until the first step: start-up or restart."""
    row: GoodputRow
    earlier: list[GoodputRow]
    """The rows of the earlier attempts."""
    written: float = field(default_factory=time.monotonic)

    def __call__(self, training: Training) -> None:
        if time.monotonic() - self.written >= _WRITE_EVERY_S:
            self.write(training)

    def start(self, training: Training) -> None:
        """Begin the first step now."""
        # A killed attempt may have logged more steps than its row says.
        logged = [row.step for row in self.files.metrics()]
        earlier = [row["step"] for row in self.earlier]
        training.progress.replay_until = max([training.step, *logged, *earlier])
        training.seconds[self.waiting] = time.time() - self.begin
        self.write(training)

    def write(self, training: Training, ended: bool = False) -> dict[Spent, float]:
        """Update the row; returns the seconds of the whole run so far, by category."""
        self.written = time.monotonic()
        until = time.time()
        seconds = {what: training.seconds.get(what, 0.0) for what in NAMES}
        seconds["other"] += until - self.begin - sum(seconds.values())
        self.row |= {"until": until, "step": training.step, "ended": ended, "seconds": seconds}
        rows = [*self.earlier, self.row]
        if training.world.is_main:
            with suppress(OSError):  # on a full disk the next row holds all of it
                self.files.write_goodput(rows)
        return {what: sum(row["seconds"][what] for row in rows) for what in NAMES}

    def log(self, training: Training) -> None:
        """Log the share of each category so far."""
        totals = self.write(training)
        total = sum(totals.values())
        self.tracker.log(training.step, {f"goodput/{what}": seconds / total for what, seconds in totals.items()})


def open_goodput(files: RunFiles, tracker: Tracker, attempt: int, started: float) -> Goodput:
    """Open the record of attempt number `attempt`.

    `started` (time.time()) is when the user typed the command, which may have led to earlier
    attempts as well.
    """
    earlier = files.goodput()
    begin: float = started
    waiting: Spent = "start-up"
    if earlier and not earlier[-1]["ended"]:
        begin = max(started, earlier[-1]["until"])
        waiting = "restart"
    row = GoodputRow(attempt=attempt, begin=begin, until=begin, step=0, ended=False, seconds={})
    return Goodput(files, tracker, begin, waiting, row, earlier)
