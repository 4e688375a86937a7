"""A rank that makes no progress leaves the stacks of its threads in the run, and ends: whoever started it can start it again.

A collective that one rank does not join stalls all the others, so every rank that still runs ends in this way.
"""

import faulthandler
import os
import tempfile
import threading
import time
from typing import Any

from trainer.core.training import Training
from trainer.endings import Ending, Stopped
from trainer.records.attempts import note_end
from trainer.run_files import RunFiles

HUNG = 75
"""Exit code of a worker that ended itself: a temporary failure (sysexits.h)."""
_WRITING_S = 10.0


class Watchdog:
    """Watches over `training` while the `with` block runs, in a thread; with `timeout_s` None it does nothing."""

    def __init__(self, training: Training, files: RunFiles, attempt: int, timeout_s: float | None):
        self.training, self.files, self.attempt, self.timeout_s = training, files, attempt, timeout_s
        self.ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.timeout_s is not None:
            self.training.note_progress()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.ended.set()

    def _watch(self) -> None:
        assert self.timeout_s is not None
        while not self.ended.wait(min(1.0, self.timeout_s / 4)):
            if time.perf_counter() - self.training.progress.last_progress > self.timeout_s:
                writing = threading.Thread(target=self._leave_word, name="last words", daemon=True)
                writing.start()
                writing.join(_WRITING_S)  # the storage may be what hangs
                os._exit(HUNG)

    def _leave_word(self) -> None:
        rank, step = self.training.world.rank, self.training.step
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = self.files.write_stacks(rank, self.attempt, file.read())
        sentence = f"no progress for {self.timeout_s:g} s on rank {rank} after step {step}: see {stacks}"
        note_end(self.files, self.attempt, f"rank {rank}", Stopped(Ending.HUNG, sentence))
