"""Lanes in processes of their own, which read and decode ahead: the same samples and states as lanes in this process.

Each process runs data/process.py. What is sent travels with the state after it, so a process that is killed is started
again from the last step that arrived. One that loses its parent sees its standard input end, and leaves.
"""

import fcntl
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Event, Lock
from typing import Any

import data
from data.lane_set import Config
from data.lanes import Samples, State
from data.retry import Closed
from data.steps import Share

PIPE_BYTES = 1 << 20
SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of Linux
_IMPORT_ROOT = str(Path(data.__file__).parents[1])
"""The folder that the child imports `data` from, wherever this module lies inside it."""

log = logging.getLogger(__name__)


class ProcessLanes:
    """The lanes of a rank, divided over `config.processes` processes, or as many as there are lanes."""

    def __init__(self, config: Config, *, seed: int, share: Share, total: int, step: int, states: Mapping[str, State | None], closing: Event) -> None:
        names = list(states)
        count = min(config.processes, len(names))
        self._closing = closing
        self._processes = [
            _Process(
                f"data process {n} (lanes {', '.join(names[n::count])})", config, seed, share, total, step, {k: states[k] for k in names[n::count]}, closing
            )
            for n in range(count)
        ]

    def next(self) -> dict[int, tuple[Samples, State]]:
        return {lane: part for process in self._processes for lane, part in process.next().items()}

    def close(self) -> None:
        for process in self._processes:
            process.kill()


class _Process:
    def __init__(self, name: str, config: Config, seed: int, share: Share, total: int, step: int, states: dict[str, State | None], closing: Event) -> None:
        self._name = name
        self._job = (config, seed, share, total)
        self._step = step
        self._states = states
        self._closing = closing
        self._starting = Lock()
        self._deaths = 0  # since something came
        self._start()

    def next(self) -> dict[int, tuple[Samples, State]]:
        """What its lanes give to the next step. Raises what they raised; OSError for a process that is killed over and over."""
        while True:
            try:
                sent: Any = self._pipe.recv()
            except (EOFError, OSError):
                self._restart()
                continue
            if isinstance(sent, Exception):
                raise sent
            self._deaths = 0
            self._step += 1
            self._states |= {str(lane): state for lane, (_, state) in sent.items()}
            return dict(sent)

    def kill(self) -> None:
        with self._starting:
            self._child.kill()
            self._child.wait()
            assert self._child.stdin is not None
            with suppress(BrokenPipeError):
                self._child.stdin.close()

    def _restart(self) -> None:
        if self._closing.is_set():
            raise Closed
        status = self._child.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        self._deaths += 1
        if self._deaths > 1:
            raise OSError(
                f"data.processes: {self._name} {how}, twice in the same place; is there enough memory? Lower data.processes or data.window, or set it to 0"
            )
        log.warning("%s %s; it is started again from step %d", self._name, how, self._step)
        self.kill()
        self._pipe.close()
        self._start()

    def _start(self) -> None:
        with self._starting:
            if self._closing.is_set():
                raise Closed
            self._pipe, theirs = Pipe(duplex=False)
            _enlarge(theirs)
            # `datasets` would import torch, which takes longer than all the rest, only to be able to make tensors.
            frugal = {"USE_TORCH": "0", "USE_TF": "0", "USE_JAX": "0", "OMP_NUM_THREADS": "1"}
            paths = [_IMPORT_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._child = subprocess.Popen(
                [sys.executable, "-m", "data.process", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=os.environ | frugal | {"PYTHONPATH": os.pathsep.join(paths)},
            )
            theirs.close()
            assert self._child.stdin is not None
            job = pickle.dumps((*self._job, self._step, self._states))
            with suppress(BrokenPipeError):  # it is gone already: receiving will tell
                self._child.stdin.write(len(job).to_bytes(8, "little") + job)
                self._child.stdin.flush()


def _enlarge(pipe: Connection) -> None:
    """Room for a step or so, where the system knows how: else the process wakes up for every 64 kB."""
    if sys.platform == "linux":
        fcntl.fcntl(pipe.fileno(), SET_PIPE_SIZE, PIPE_BYTES)
