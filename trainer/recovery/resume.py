"""Continues from a checkpoint: at the start of an attempt, or after a rollback within one."""

from functools import partial

from trainer.checkpoint.format import State
from trainer.checkpoint.load import load, newest
from trainer.checkpoint.save import Checkpointer
from trainer.core.anomaly import RecordAnomaly
from trainer.core.training import Training, fragments
from trainer.hooks.report import Report
from trainer.hooks.save import Save
from trainer.run_files import RunFiles
from trainer.run_rows import Anomaly, EventKind, Say
from trainer.tracking.tracker import Tracker
from trainer.world import World


def resume(training: Training, checkpointer: Checkpointer, files: RunFiles, say: Say) -> State | None:
    """Load the newest intact checkpoint into `training`; returns its state, or None without one."""
    world, guard, progress = training.world, training.guard, training.progress
    tell = partial(say, EventKind.CHECKPOINT)
    checkpoint, anomalies = world.broadcast(lambda: (newest(checkpointer.root, tell), files.anomalies()))
    if checkpoint is None:
        guard.load(None, anomalies)
        return None
    folder, manifest = checkpoint
    load(folder, manifest, fragments(training), world)
    for engine in training.engines.values():
        engine.refresh()
    state = manifest["state"]
    progress.step = state["step"]
    progress.samples = state["samples"]
    training.data_state = state["data"]
    checkpointer.published = progress.step
    guard.load(state.get("guard"), anomalies)
    say(EventKind.RESUMED, f"resumed from {folder}, step {progress.step}", progress.step)
    return state


def roll_back(training: Training, files: RunFiles, save: Save, report: Report, say: Say) -> State:
    """Roll back to the newest intact checkpoint, in the same attempt; returns its state."""
    save.wait(training)
    progress = training.progress
    progress.must_roll_back = False
    training.sums = {}
    progress.replay_until = max(progress.replay_until, progress.step)
    state = resume(training, save.checkpointer, files, say)
    if state is None:
        advice = "use anomaly.action=skip, or start a new run"
        raise ValueError(f"run {files}: there is no intact checkpoint to roll back to; {advice}")
    report.last_samples = progress.samples
    return state


def record_in(files: RunFiles, tracker: Tracker, world: World, say: Say) -> RecordAnomaly:
    """Return a recorder that writes every anomaly into the run folder before the run continues."""

    def record(anomaly: Anomaly, nth: int) -> None:
        if world.is_main:
            files.add_anomaly(anomaly)
            step, first, last = anomaly["step"], anomaly["first"], anomaly["last"]
            skipped = f"step {last}" if first == last else f"steps {first} to {last}"
            say(EventKind.ANOMALY, f"step {step}: {anomaly['reason']}; skipping {skipped}", step)
            tracker.log(step, {"anomalies": nth})

    return record
