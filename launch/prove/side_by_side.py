"""Many runs side by side on one machine, each in a process of its own through the same worker; what is done already is kept.

A run's folder is named after a digest of its settings: the same command finds it again, finished or half-way, and goes on.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace

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
    """`run`, settled for one process, in a folder below `root` that is called after `label` and a digest of all its settings."""
    settings = plain(resolve_run(replace(run, name="unnamed", root=""), "", workers=1, resume=False)) | {"root": ""}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return resolve_run(replace(run, name=f"{label}-{digest}", root=root), label, workers=1, resume=False)


def default_processes(run: RunConfig) -> int:
    """As many as the cores of this machine can give `run.threads` threads each."""
    return max(1, (os.cpu_count() or 1) // (run.threads or 1))


def summaries(console: Console, runs: Sequence[RunConfig], processes: int, what: str) -> list[Summary]:
    """The summary of each run, in order, once all are done; `processes` of them at a time, started in this order.

    Raises ValueError if a run was stopped half-way: the same command goes on with it.
    """
    missing = [run for run in runs if _summary(run) is None]
    context = multiprocessing.get_context("forkserver")  # which imports once what takes seconds to import
    context.set_forkserver_preload(
        [
            "trainer.worker.main",
            "data.text.collate",
            *(f"trainer.engines.{run.engine.name}_engine" for run in missing[:1]),
        ]
    )
    waiting, under_way = list(reversed(missing)), dict[Future[None], RunConfig]()
    asked = stopping(lambda: [run_files(run.root, run.name) for run in under_way.values()], console)
    with (
        asked,
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
                if _summary(run) is None:  # and so will be the others: of themselves, or as they were asked to
                    raise ValueError(
                        f"run {run_files(run.root, run.name)}: stopped before its last step; give the same command again to go on with it"
                    )
            show()
    found = [_summary(run) for run in runs]
    return [summary for summary in found if summary is not None]


def _train(values: Json) -> None:
    """In a process of its own: the run, from the start or from its last checkpoint."""
    stand_alone()
    run = parse(RunConfig, values, "run")
    prepare(run, run_files(run.root, run.name).has_begun)
    run_worker(values, say=lambda line: None, started=psutil.Process().create_time())


def _summary(run: RunConfig) -> Summary | None:
    """The summary of a run that has done all its steps."""
    summary = run_files(run.root, run.name).summary()
    return summary if summary is not None and summary["step"] == run.stop.steps else None


def _ended(run: RunConfig) -> str:
    """What is said of a run at its end; "": it has not ended."""
    summary = _summary(run)
    return f"{curve(run)[-1][1]:.4f} in {clock(summary['train_seconds'])}" if summary else ""


def curve(run: RunConfig) -> list[tuple[int, float]]:
    """Held-out cross-entropy by step."""
    return history(run_files(run.root, run.name), "eval/cross_entropy")
