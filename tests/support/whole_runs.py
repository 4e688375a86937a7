"""Whole runs in the processes of a test, and the losses that they logged."""

import json
from pathlib import Path
from typing import Any


def train(world: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train `job` to its end in a new run folder; this process has joined its world already."""
    from trainer.config import RunConfig
    from trainer.parsing import parse
    from trainer.settle import prepare, resolve_run
    from trainer.worker.main import _train

    run = resolve_run(parse(RunConfig, job, "run"), "job", world.size, resume=False)
    if world.is_main:
        prepare(run, resume=False)
    world.gather(None)
    return _train(run, world, say=lambda line: None, started=0.0)


def resume(world: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Resume the run of `job` and train it to its end."""
    from trainer.config import RunConfig
    from trainer.parsing import parse
    from trainer.settle import resolve_run
    from trainer.worker.main import _train

    return _train(
        resolve_run(parse(RunConfig, job, "run"), "job", world.size, resume=True),
        world,
        say=lambda line: None,
        started=0.0,
    )


def train_or_resume(world: Any, job: dict[str, Any], by_hand: list[int] | None = None) -> dict[str, Any]:
    """Train `job` to its end, from the checkpoint of its run folder where one exists.

    `by_hand` are the first and the last step to pass over.
    """
    from trainer.config import RunConfig
    from trainer.parsing import parse
    from trainer.settle import prepare, resolve_run
    from trainer.worker.main import _train

    resume = (Path(job["root"]) / job["name"]).exists()
    run = resolve_run(parse(RunConfig, job, "run"), "job", world.size, resume=resume)
    if world.is_main:
        files = prepare(run, resume=resume)
        if by_hand:
            files.add_anomaly({"step": by_hand[1], "reason": "by hand", "first": by_hand[0], "last": by_hand[1]})
    world.gather(None)
    return _train(run, world, say=lambda line: None, started=0.0)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of the run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Return the logged loss per step; of a step that was trained twice, the last one."""
    return {int(row["step"]): row["loss"] for row in metrics(folder) if "loss" in row}


def loss_curve(folder: Path) -> list[float]:
    """Return the logged losses in their order."""
    return [row["loss"] for row in metrics(folder) if "loss" in row]
