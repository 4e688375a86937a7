"""What is left of a run when it has ended: final figures for programs, and pictures."""

import json
from pathlib import Path
from typing import Any

from trainer.loop import Training
from trainer.run_hooks import RunHooks
from trainer.storage import Folder


def summarise(training: Training, hooks: RunHooks, attempt: int, first: int, seconds: float) -> dict[str, Any]:
    """The figures of an attempt that went from step `first` on for `seconds`."""
    return {
        "name": hooks.name,
        "step": training.step,
        "tokens_seen": training.tokens,
        "samples_seen": training.samples,
        "stopped": training.stopped,
        "failed": training.failed,
        "anomalies": training.guard.found,
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


def finish(training: Training, hooks: RunHooks, summary: dict[str, Any], folder: Folder, scratch: Path) -> dict[str, Any]:
    """Baselines, pictures and summary.json."""
    from trainer.charts import draw

    summary["baselines"] = training.objective.baselines()
    if folder.exists("first_step.json"):
        summary |= json.loads(folder.read("first_step.json"))
    for file in draw(folder.read("metrics.jsonl"), scratch / "charts", hooks.name, summary["baselines"]):
        folder.put(file, file.name)
        hooks.tracker.keep(file)
    folder.write("summary.json", json.dumps(summary, indent=1).encode())
    return summary
