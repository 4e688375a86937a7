"""Going on from a checkpoint: at the start of an attempt, and in the midst of one that went wrong."""

from functools import partial

from trainer.checkpoint import load as restore
from trainer.checkpoint.format import State
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
    """Load the newest whole checkpoint of the run into `training`; returns its state, None where there is none."""
    world, guard, progress = training.world, training.guard, training.progress
    tell = partial(say, EventKind.CHECKPOINT)
    newest, anomalies = world.broadcast(lambda: (restore.newest(checkpointer.root, tell), files.anomalies()))
    if newest is None:
        guard.load(None, anomalies)
        return None
    where, manifest = newest
    restore.load(where, manifest, fragments(training), world)
    for engine in training.engines.values():
        engine.refresh()
    state = manifest["state"]
    progress.step, progress.samples, training.data_state = state["step"], state["samples"], state["data"]
    checkpointer.published = progress.step
    guard.load(state.get("guard"), anomalies)
    say(EventKind.RESUMED, f"resumed from {where}, step {progress.step}", progress.step)
    return state


def roll_back(training: Training, files: RunFiles, save: Save, report: Report, say: Say) -> State:
    """To the newest whole checkpoint, in the same attempt; returns its state."""
    save.wait(training)
    progress = training.progress
    progress.must_roll_back, training.sums = False, {}
    progress.replay_until = max(progress.replay_until, progress.step)
    state = resume(training, save.checkpointer, files, say)
    if state is None:
        raise ValueError(
            f"run {files}: there is no whole checkpoint to go back to; use anomaly.action=skip, or start a new run"
        )
    report.last_samples = progress.samples
    return state


def record_in(files: RunFiles, tracker: Tracker, world: World, say: Say) -> RecordAnomaly:
    """Has every anomaly written into the run's folder before the run goes on."""

    def note(anomaly: Anomaly, nth: int) -> None:
        if world.is_main:
            files.add_anomaly(anomaly)
            step, first, last = anomaly["step"], anomaly["first"], anomaly["last"]
            skipped = f"step {last}" if first == last else f"steps {first} to {last}"
            say(EventKind.ANOMALY, f"step {step}: {anomaly['reason']}; passing over {skipped}", step)
            tracker.log(step, {"anomalies": nth})

    return note
