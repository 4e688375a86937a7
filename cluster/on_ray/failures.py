"""Failures that Ray has seen, and notices of nodes that are about to leave.

Ray's interfaces for both change between releases; only this file uses them.
"""

import re
import time

import ray
from ray.train import UserCallback

from trainer.endings import Ending, Stopped
from trainer.parsing import one_line
from trainer.records.attempts import current_attempt, note_end, stopped_by_error
from trainer.run_files import RunFiles
from trainer.storage import Folder

_DETAIL = re.compile(r"(?:exit detail|reason)[^:]*:\s*(.+?)(?:\. |$)")


class WorkerPreempted(RuntimeError):
    """A worker saved and left because its node is about to leave.

    Ray restarts the workers elsewhere, as after any failure.
    """


class NoteFailures(UserCallback):
    """Records in the run folder at `url` why an attempt ended, as Ray saw it.

    Ray Train's controller calls it.
    """

    def __init__(self, url: str):
        self.url = url

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        files = RunFiles(Folder(self.url))
        if (attempt := current_attempt(files)) >= 0 and worker_exceptions:
            rank, error = min(worker_exceptions.items(), key=lambda item: (not _died(item[1]), item[0]))
            note_end(files, attempt, "ray", _stopped(rank, error))


def _stopped(rank: int, error: Exception) -> Stopped:
    if _died(error):
        return Stopped(Ending.LOST, f"rank {rank} died: {_detail(error)}")
    return stopped_by_error(f"rank {rank}: {_last_line(error)}")


def _died(error: Exception) -> bool:
    return "died" in str(error) or "ActorDied" in type(error).__name__


def _detail(error: Exception) -> str:
    text = one_line(error)
    match = _DETAIL.search(text)
    return (match[1] if match else text)[:300]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def preemption() -> Stopped | None:
    """The cluster's drain notice for this worker's node; None if there is none."""
    deadline = ray._private.state.state.get_draining_nodes().get(ray.get_runtime_context().get_node_id())
    if deadline is None:
        return None
    detail = (
        f"the node leaves in {max(0.0, deadline / 1000 - time.time()):.0f} s" if deadline else "the node is drained"
    )
    return Stopped(Ending.PREEMPTED, detail)
