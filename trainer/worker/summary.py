"""The results of a run that has ended: its final metrics for programs, and its pictures."""

from pathlib import Path

from trainer.core.training import Training
from trainer.endings import Stopped
from trainer.run_files import RunFiles
from trainer.run_rows import Summary
from trainer.worker.hooks import RunHooks


def summarise(
    training: Training, stopped: Stopped, hooks: RunHooks, attempt: int, first: int, seconds: float
) -> Summary:
    """Summarise an attempt that trained from step `first` on for `seconds`."""
    return {
        "name": hooks.name,
        "step": training.step,
        "tokens_seen": training.tokens,
        "samples_seen": training.samples,
        "stopped": str(stopped),
        "ending": stopped.ending,
        "failed": training.failed,
        "anomalies": training.guard.anomalies,
        "world": training.world.size,
        "attempt": attempt,
        "train_seconds": seconds,
        "steps_this_attempt": training.step - first,
        "seconds": training.seconds,
        "training": hooks.report.figures,
        "eval": hooks.evaluation.figures,
        "quality": hooks.quality.figures,
        "samples": hooks.sample.samples.text,
    }


def finish(training: Training, hooks: RunHooks, summary: Summary, files: RunFiles, scratch: Path) -> None:
    """Add the baselines to `summary`, draw the pictures, and write both into the run folder."""
    from trainer.records.charts import draw_run

    summary["baselines"] = training.objective.baselines()
    if (seconds := files.first_step_seconds()) is not None:
        summary["seconds_to_first_step"] = seconds
    for file in draw_run(files.metrics(), scratch / "charts", hooks.name, summary["baselines"]):
        files.put_picture(file)
        hooks.tracker.keep(file)
    files.write_summary(summary)
