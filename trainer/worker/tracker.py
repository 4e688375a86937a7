"""Opens the tracker of an attempt with the facts of the run, and closes it with its status."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from trainer.config import RunConfig
from trainer.core.training import Training
from trainer.parsing import plain
from trainer.records.code_version import code_name
from trainer.run_files import RunFiles
from trainer.run_rows import Say
from trainer.tracking.config import RunFacts
from trainer.tracking.tracker import JsonlTracker, MlflowTracker, NullTracker, Tracker
from trainer.world import World


def open_tracker(
    run: RunConfig, files: RunFiles, attempt: int, manifest: Mapping[str, object], world: World, say: Say
) -> Tracker:
    """What the hooks of this rank write to: lines and MLflow on rank 0, nothing on the others."""
    if not world.is_main:
        return NullTracker()
    if not run.tracking.enabled:
        return JsonlTracker(files, attempt)
    params = dict(_flat("", plain(run))) | {"world": world.size, "device": str(world.device)}
    tags = {
        "run_folder": files.folder.url,
        "objective": run.objective.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    tags |= {"mlflow.source.git.commit": code_name()} if code_name() else {}
    tags |= {"mlflow.parentRunId": run.tracking.parent} if run.tracking.parent else {}
    facts = RunFacts(str(run.name), run.objective.dataset, params, tags, manifest)
    return MlflowTracker(files, attempt, run.tracking, facts, say)


def _flat(prefix: str, values: object) -> Iterator[tuple[str, object]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, value)
    elif values is not None:
        yield prefix, values


@contextmanager
def closing(tracker: Tracker, training: Training) -> Iterator[None]:
    """Close the run in MLflow when the block ends, with a status that says how."""
    status = "FAILED"
    try:
        yield
        status = "FAILED" if training.failed else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
