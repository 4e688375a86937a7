"""Many runs side by side on one machine, each in a process of its own, through the usual worker.

The name of a run's folder contains a digest of its settings. The same command therefore finds the
run again, keeps it if it is finished, and continues it if it is not.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing.context import BaseContext

import psutil
from rich.console import Console

from launch.console.many_runs import progress
from launch.console.progress import clock
from launch.start import stopping
from trainer.config import RunConfig
from trainer.parsing import Json, parse, plain
from trainer.run_files import run_files
from trainer.run_rows import Summary
from trainer.settle import prepare, resolve_run
from trainer.tracking.tracker import history
from trainer.worker.main import run_worker
from trainer.world import stand_alone


def named(run: RunConfig, label: str, root: str) -> RunConfig:
    """Resolve `run` for one process, in a folder below `root`.

    The folder's name is `label` and a digest of all settings of the run.
    """
    settings = plain(resolve_run(replace(run, name="unnamed", root=""), "", workers=1, resume=False)) | {"root": ""}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return resolve_run(replace(run, name=f"{label}-{digest}", root=root), label, workers=1, resume=False)


def default_processes(run: RunConfig) -> int:
    """Return how many runs with `run.threads` threads each the cores of this machine can serve."""
    return max(1, (os.cpu_count() or 1) // (run.threads or 1))


def summaries(console: Console, runs: Sequence[RunConfig], processes: int, what: str) -> list[Summary]:
    """Train the missing runs, and return the summaries of all runs in their order.

    At most `processes` runs train at a time; they start in the order of `runs`. Raises ValueError
    if a run stopped before its last step; the same command continues it.
    """
    missing = [run for run in runs if _summary(run) is None]
    context = _fork_server(missing)
    waiting = list(reversed(missing))
    under_way = dict[Future[None], RunConfig]()
    with (
        stopping(lambda: [run_files(run.root, run.name) for run in under_way.values()], console),
        progress(console, runs, what, _ended) as show,
        ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool,
    ):
        while waiting or under_way:
            while waiting and len(under_way) < processes:
                run = waiting.pop()
                under_way[pool.submit(_train, plain(run))] = run
            for done in wait(under_way, timeout=1, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(done)
                done.result()
                if _summary(run) is None:  # the others stop too, by themselves or by the same signal
                    raise _stopped_early(run)
            show()
    return [summary for summary in map(_summary, runs) if summary is not None]


def _fork_server(runs: Sequence[RunConfig]) -> BaseContext:
    """Return a context whose server imports the slow modules once, for the processes of `runs`."""
    context = multiprocessing.get_context("forkserver")
    engines = [f"trainer.engines.{run.engine.name}_engine" for run in runs[:1]]
    context.set_forkserver_preload(["trainer.worker.main", "data.text.collate", *engines])
    return context


def _stopped_early(run: RunConfig) -> ValueError:
    files = run_files(run.root, run.name)
    return ValueError(f"run {files}: stopped before its last step; give the same command again to continue it")


def _train(values: Json) -> None:
    """Train one run in this process, from its start or from its last checkpoint."""
    stand_alone()
    run = parse(RunConfig, values, "run")
    prepare(run, run_files(run.root, run.name).has_begun)
    run_worker(values, say=lambda line: None, started=psutil.Process().create_time())


def _summary(run: RunConfig) -> Summary | None:
    """Return the summary of a run that has done all its steps, else None."""
    summary = run_files(run.root, run.name).summary()
    if summary is None or summary["step"] != run.stop.steps:
        return None
    return summary


def _ended(run: RunConfig) -> str:
    """Return the final loss and the time of a run in words, or "" while it has not ended."""
    summary = _summary(run)
    if summary is None:
        return ""
    _, loss = curve(run)[-1]
    return f"{loss:.4f} in {clock(summary['train_seconds'])}"


def curve(run: RunConfig) -> list[tuple[int, float]]:
    """Return the held-out cross-entropy of a run, by step."""
    return history(run_files(run.root, run.name), "eval/cross_entropy")
