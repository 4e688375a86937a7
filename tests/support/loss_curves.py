"""A short training in the processes of a test, with what each step did."""

from typing import Any


def trained(world: Any, job: dict[str, Any], steps: int) -> tuple[Any, list[tuple[float, float]]]:
    """The training of `job` after `steps` steps, and loss and gradient norm of each."""
    from data.share import Share
    from trainer.config import RunConfig
    from trainer.core.loop import fit
    from trainer.core.training import Hook, over_ranks
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    run = parse(RunConfig, job, "run")
    training = build_training(run, world)
    curve = list[tuple[float, float]]()

    def note(training: Any) -> None:
        sums = over_ranks(training.sums, training.world)
        training.sums = {}
        curve.append((training.objective.report(sums)["loss"], float(training.norms["model"])))

    share = Share(
        rank=world.rank, world=world.size, global_batch=run.batch.global_batch, micro_batch=run.batch.micro_batch
    )
    stream = training.objective.stream(share, None)
    fit(training, stream, steps, [Hook(1, note)])
    stream.close()
    return training, curve
