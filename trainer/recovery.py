"""Going on from a checkpoint: at the start of an attempt, and in the midst of one that went wrong."""

from typing import Any

from trainer import restore
from trainer.attempts import Say, append, lines
from trainer.hooks import Report, Save, fragments
from trainer.loop import Training
from trainer.storage import Folder
from trainer.tracking import Tracker


def resume(training: Training, folder: Folder, say: Say) -> dict[str, Any]:
    """Load the newest whole checkpoint of the run into `training`; returns its state, empty where there is none."""
    mine = (restore.newest(folder / "checkpoints", say), lines(folder, "anomalies.jsonl")) if training.world.is_main else None
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
    say(f"resumed from {where}, step {training.step}")
    return state


def go_back(training: Training, folder: Folder, save: Save, report: Report, say: Say) -> dict[str, Any]:
    """To the newest whole checkpoint, in the same attempt; returns its state."""
    save.settle(training)
    training.going_back, training.sums = False, {}
    training.furthest = max(training.furthest, training.step)
    state = resume(training, folder, say)
    if not state:
        raise ValueError(f"run {folder}: there is no whole checkpoint to go back to; use anomaly.action=skip, or start a new run")
    save.checkpointer.last_step, report.last_samples = training.step, training.samples
    return state


def note_anomalies(training: Training, folder: Folder, tracker: Tracker, say: Say) -> None:
    """Have every anomaly written down before the run goes on."""

    def note(anomaly: dict[str, Any]) -> None:
        if training.world.is_main:
            append(folder, "anomalies.jsonl", anomaly)
            first, last = anomaly["first"], anomaly["last"]
            say(f"step {anomaly['step']}: {anomaly['reason']}; passing over {f'step {last}' if first == last else f'steps {first} to {last}'}")
            tracker.log(anomaly["step"], {"anomalies": len(training.guard.found)})

    training.guard.note = note
