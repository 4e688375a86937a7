"""Lanes in processes of their own, which read and decode ahead.

Samples and states are the same as those of lanes in this process. Each process runs process.py.
Samples arrive with the state after them, so a process that is killed is restarted from the last
step that arrived. A process that loses its parent sees its standard input close, and exits.
"""

import fcntl
import logging
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Event, Lock

import data
from data.batches import Given
from data.open_lanes import LaneJob
from data.prefetch import child as process
from data.sources.retry import Closed

PIPE_BYTES = 1 << 20
# F_SETPIPE_SZ of Linux, which the module fcntl does not name.
SET_PIPE_SIZE = 1031
# Otherwise `datasets` imports torch, only to be able to make tensors: slower than all the rest.
FRUGAL = {"USE_TORCH": "0", "USE_TF": "0", "USE_JAX": "0", "OMP_NUM_THREADS": "1"}

log = logging.getLogger(__name__)


class ProcessLanes:
    """A rank's lanes, divided among at most `config.processes` processes."""

    def __init__(self, job: LaneJob, closing: Event) -> None:
        names = list(job.states)
        count = min(job.config.processes, len(names))
        self.processes: list[_Process] = []
        for number in range(count):
            states = {name: job.states[name] for name in names[number::count]}
            label = f"data process {number} (lanes {', '.join(states)})"
            self.processes.append(_Process(label, replace(job, states=states), closing))

    def next(self) -> Given:
        given: Given = {}
        for child in self.processes:
            given |= child.next()
        return given

    def close(self) -> None:
        for child in self.processes:
            child.kill()


class _Process:
    """One child process, restarted once if it dies."""

    def __init__(self, name: str, job: LaneJob, closing: Event) -> None:
        self.name = name
        self.job = job
        """What the child must do from the last step that arrived."""
        self.closing = closing
        self.deaths = 0
        """How often the child has died since something arrived."""
        self._starting = Lock()
        self._start()

    def next(self) -> Given:
        """What its lanes give to the next step.

        Raises their error; OSError if the process dies twice in a row.
        """
        while True:
            try:
                sent: Given | Exception = self._pipe.recv()
            except (EOFError, OSError):
                self._restart()
                continue
            if isinstance(sent, Exception):
                raise sent
            self.deaths = 0
            states = {str(number): state for number, (_, state) in sent.items()}
            self.job = replace(self.job, step=self.job.step + 1, states={**self.job.states, **states})
            return sent

    def kill(self) -> None:
        with self._starting:
            self._child.kill()
            self._child.wait()
            assert self._child.stdin is not None
            with suppress(BrokenPipeError):
                self._child.stdin.close()

    def _restart(self) -> None:
        if self.closing.is_set():
            raise Closed
        status = self._child.wait()
        death = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        self.deaths += 1
        if self.deaths > 1:
            problem = f"{self.name} {death}, twice at the same step; is there enough memory?"
            fix = "use fewer processes, a smaller run.objective.data.window, or 0 processes"
            raise OSError(f"run.objective.data.processes: {problem}; {fix}")
        log.warning("%s %s; restarting it from step %d", self.name, death, self.job.step)
        self.kill()
        self._pipe.close()
        self._start()

    def _start(self) -> None:
        with self._starting:
            if self.closing.is_set():
                raise Closed
            self._pipe, far_end = Pipe(duplex=False)
            _enlarge(far_end)
            self._child = subprocess.Popen(
                [sys.executable, "-m", process.__name__, str(far_end.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[far_end.fileno()],
                env=_environment(),
            )
            far_end.close()
            assert self._child.stdin is not None
            job = pickle.dumps(self.job)
            with suppress(BrokenPipeError):  # if the child is gone already, receiving will tell
                self._child.stdin.write(len(job).to_bytes(8, "little") + job)
                self._child.stdin.flush()


def _environment() -> dict[str, str]:
    """The environment of a child, which must import the same package `data`."""
    assert data.__file__ is not None
    paths = [str(Path(data.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | FRUGAL | {"PYTHONPATH": os.pathsep.join(paths)}


def _enlarge(pipe: Connection) -> None:
    """Make room for about a step; otherwise the process wakes up for every 64 kB.

    Only Linux can.
    """
    if sys.platform == "linux":
        fcntl.fcntl(pipe.fileno(), SET_PIPE_SIZE, PIPE_BYTES)
