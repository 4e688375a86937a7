"""Ends a rank that makes no progress, after writing its threads' stack traces to the run folder.

Its starter, such as Ray, can then begin another attempt. A collective that one rank does not join
stalls all other ranks, so every rank that still runs ends in this way.
"""

import faulthandler
import os
import tempfile
import threading
import time

from trainer.core.training import Training
from trainer.endings import Ending, Stopped
from trainer.records.attempts import note_end
from trainer.run_files import RunFiles

HUNG = 75
"""Exit code of a worker that its watchdog ended: a temporary failure (sysexits.h)."""
_WRITING_S = 10.0


class Watchdog:
    """Watches `training` from a thread during a `with` block; idle if `timeout_s` is None."""

    def __init__(self, training: Training, files: RunFiles, attempt: int, timeout_s: float | None):
        self.training = training
        self.files = files
        self.attempt = attempt
        self.timeout_s = timeout_s
        self.ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.timeout_s is not None:
            self.training.note_progress()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()

    def _watch(self) -> None:
        assert self.timeout_s is not None
        while not self.ended.wait(min(1.0, self.timeout_s / 4)):
            if time.perf_counter() - self.training.progress.last_progress > self.timeout_s:
                writing = threading.Thread(target=self._write_stacks, name="last words", daemon=True)
                writing.start()
                writing.join(_WRITING_S)  # the storage may be what hangs
                os._exit(HUNG)

    def _write_stacks(self) -> None:
        rank, step = self.training.world.rank, self.training.step
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = self.files.write_stacks(rank, self.attempt, file.read())
        sentence = f"no progress for {self.timeout_s:g} s on rank {rank} after step {step}: see {stacks}"
        note_end(self.files, self.attempt, f"rank {rank}", Stopped(Ending.HUNG, sentence))
