"""Where the time of a run goes, over all its attempts: a ledger of wall-clock time that sums to the whole.

`goodput.json` in the run folder has a row for each attempt. An attempt that nobody typed a command for begins where the one before
was last heard of, so what a failure costs is all there: until it was noticed, starting again, and the steps that were done twice.
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
"""What time is spent on, for people."""
_WRITE_EVERY_S = 2.0


@dataclass
class Goodput:
    """A hook: keeps this attempt's row. On rank 0, whose time stands for that of all."""

    files: RunFiles
    tracker: Tracker
    begin: float
    """When this attempt's time begins, as time.time()."""
    waiting: Spent
    """What the time until its first step counts as: start-up or restart."""
    row: GoodputRow
    earlier: list[GoodputRow]
    """The rows of the attempts before."""
    written: float = field(default_factory=time.monotonic)

    def __call__(self, training: Training) -> None:
        if time.monotonic() - self.written >= _WRITE_EVERY_S:
            self.write(training)

    def start(self, training: Training) -> None:
        """Training begins now."""
        logged = [row.step for row in self.files.metrics()]  # a killed attempt may have logged more than its row says
        training.progress.replay_until = max([training.step, *logged] + [row["step"] for row in self.earlier])
        training.seconds[self.waiting] = time.time() - self.begin
        self.write(training)

    def write(self, training: Training, ended: bool = False) -> dict[Spent, float]:
        """Bring the row up to date; returns the seconds of the whole run so far, by what they were spent on."""
        self.written = time.monotonic()
        until = time.time()
        seconds = {what: training.seconds.get(what, 0.0) for what in NAMES}
        seconds["other"] += until - self.begin - sum(seconds.values())
        self.row |= {"until": until, "step": training.step, "ended": ended, "seconds": seconds}
        rows = [*self.earlier, self.row]
        if training.world.is_main:
            with suppress(OSError):  # a full disk: the next one says it all
                self.files.write_goodput(rows)
        return {what: sum(row["seconds"][what] for row in rows) for what in NAMES}

    def log(self, training: Training) -> None:
        """A hook: the shares so far, to the tracker."""
        totals = self.write(training)
        whole = sum(totals.values())
        self.tracker.log(training.step, {f"goodput/{what}": seconds / whole for what, seconds in totals.items()})


def open_goodput(files: RunFiles, tracker: Tracker, attempt: int, started: float) -> Goodput:
    """The ledger of attempt number `attempt`, which a command typed at `started` (time.time()) led to, perhaps by way of earlier ones."""
    earlier = files.goodput()
    begin: float = started
    waiting: Spent = "start-up"
    if earlier and not earlier[-1]["ended"]:
        begin = max(started, earlier[-1]["until"])
        waiting = "restart"
    row = GoodputRow(attempt=attempt, begin=begin, until=begin, step=0, ended=False, seconds={})
    return Goodput(files, tracker, begin, waiting, row, earlier)
