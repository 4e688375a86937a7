"""What Ray knows of failures and of nodes that are about to go. Ray's interfaces for both move: this is their one place."""

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
    """A worker has saved and left because its node goes: to be started again elsewhere, as after any failure."""


class NoteFailures(UserCallback):
    """Notes in the run folder at `url` what Ray saw of the end of an attempt; called in Ray Train's controller."""

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
    found = _DETAIL.search(text)
    return (found[1] if found else text)[:300]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def preemption() -> Stopped | None:
    """Why the worker's node is about to go, from the drain notices of the cluster; None if it stays."""
    deadline = ray._private.state.state.get_draining_nodes().get(ray.get_runtime_context().get_node_id())
    if deadline is None:
        return None
    detail = f"the node goes in {max(0.0, deadline / 1000 - time.time()):.0f} s" if deadline else "the node is drained"
    return Stopped(Ending.PREEMPTED, detail)
