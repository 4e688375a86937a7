"""Going on from a checkpoint: at the start of an attempt, and in the midst of one that went wrong."""

from functools import partial
from typing import Any

from trainer import restore
from trainer.hooks import Report, Save, fragments
from trainer.loop import Training
from trainer.run_files import RunFiles
from trainer.run_rows import Anomaly, EventKind, Say
from trainer.tracking import Tracker


def resume(training: Training, files: RunFiles, say: Say) -> dict[str, Any]:
    """Load the newest whole checkpoint of the run into `training`; returns its state, empty where there is none."""
    tell = partial(say, EventKind.CHECKPOINT)
    mine = (restore.newest(files.checkpoints, tell), files.anomalies()) if training.world.is_main else None
    found, anomalies = training.world.gather(mine)[0]
    if found is None:
        training.guard.load({}, anomalies)
        return {}
    where, manifest = found
    restore.load(where, manifest, fragments(training), training.world)
    for engine in training.engines.values():
        engine.refresh()
    state = dict(manifest["state"])
    training.step, training.samples, training.data_state = state["step"], state["samples"], state["data"]
    training.saved = training.step
    training.guard.load(state.get("guard", {}), anomalies)
    say(EventKind.RESUMED, f"resumed from {where}, step {training.step}", training.step)
    return state


def go_back(training: Training, files: RunFiles, save: Save, report: Report, say: Say) -> dict[str, Any]:
    """To the newest whole checkpoint, in the same attempt; returns its state."""
    save.settle(training)
    training.going_back, training.sums = False, {}
    training.furthest = max(training.furthest, training.step)
    state = resume(training, files, say)
    if not state:
        raise ValueError(f"run {files}: there is no whole checkpoint to go back to; use anomaly.action=skip, or start a new run")
    save.checkpointer.last_step, report.last_samples = training.step, training.samples
    return state


def note_anomalies(training: Training, files: RunFiles, tracker: Tracker, say: Say) -> None:
    """Have every anomaly written down before the run goes on."""

    def note(anomaly: Anomaly) -> None:
        if training.world.is_main:
            files.add_anomaly(anomaly)
            step, first, last = anomaly["step"], anomaly["first"], anomaly["last"]
            skipped = f"step {last}" if first == last else f"steps {first} to {last}"
            say(EventKind.ANOMALY, f"step {step}: {anomaly['reason']}; passing over {skipped}", step)
            tracker.log(step, {"anomalies": len(training.guard.found)})

    training.guard.note = note
