"""`switchwork train`: check the job, prepare its data, start workers, and show their progress."""

import os
from collections.abc import Sequence

import typer
import yaml
from rich.console import Console

from cluster.config.cluster import ClusterConfig
from launch.config import expert_ranks, load
from launch.console.progress import Watch
from launch.console.summary import summary
from launch.start import Background, import_ray, prepare_data, stopping
from trainer.parsing import plain
from trainer.settle import prepare
from trainer.world import choose_device


def dry_run(console: Console, path: str, overrides: Sequence[str], resume: bool) -> None:
    """Print the resolved job, which is enough to repeat the run."""
    job = load(path, overrides, resume)
    console.print(yaml.safe_dump(plain(job), sort_keys=False), markup=False, end="")


def train(console: Console, path: str, overrides: Sequence[str], resume: bool, started: float) -> None:
    """Train to the end, on this machine or on the cluster that Ray finds.

    `started` is the time at which the command was called. If the run fails, the command exits with
    code 1.
    """
    connecting = Background(import_ray)  # Ray and torch take seconds to import: at the same time
    job = load(path, overrides, resume)
    if not (job.cluster.address or os.environ.get("RAY_ADDRESS")):
        choose_device(job.run.device, 0)  # the workers will be on this machine
    prepare_data(job)
    files = prepare(job.run, resume, plain(job.cluster))
    connecting.join()
    from cluster.on_ray import train as ray_train

    ray_train.connect(job.cluster)
    ray_train.check_room(job.cluster)
    steps = job.run.steps(job.run.objective.tokens_per_sample)
    console.print(f"{job.run.name}: {_workers(job.cluster)}, run folder {files}")
    if waiting := ray_train.waits_for(job.cluster):
        console.print(f"waiting for {waiting}: other jobs hold the rest")
    with Watch(files, steps, console), stopping(lambda: [files], console):
        try:
            ray_train.train(plain(job.run), job.cluster, started, expert_ranks(job))
        except ray_train.WorkersFailed as error:
            console.print(str(error), markup=False)
            raise typer.Exit(1) from None
    facts = files.summary()
    assert facts is not None, "rank 0 writes it before it ends"
    summary(console, files.folder, facts, job.run.tracking)
    if facts["failed"]:
        console.print(f"the run failed: {facts['stopped']}", markup=False)
        raise typer.Exit(1)


def _workers(cluster: ClusterConfig) -> str:
    """The number of workers in words, such as `2 to 4 workers`."""
    low = cluster.min_workers
    high = cluster.max_workers
    count = str(high) if low == high else f"{low} to {high}"
    return f"{count} worker{'s' * (high > 1)}"
