"""Going on from a checkpoint: at the start of an attempt, and in the midst of one that went wrong."""

from trainer import restore
from trainer.anomaly import Note
from trainer.attempts import Say, append, lines
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_format import Anomaly, State
from trainer.hooks import Report, Save, fragments
from trainer.loop import Training
from trainer.storage import Folder
from trainer.tracking import Tracker
from trainer.world import World


def resume(training: Training, checkpointer: Checkpointer, folder: Folder, say: Say) -> State | None:
    """Load the newest whole checkpoint of the run into `training`; returns its state, None where there is none."""
    world, guard, progress = training.world, training.guard, training.progress
    newest, anomalies = world.broadcast(lambda: (restore.newest(checkpointer.root, say), lines(folder, "anomalies.jsonl")))
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
    say(f"resumed from {where}, step {progress.step}")
    return state


def go_back(training: Training, folder: Folder, save: Save, report: Report, say: Say) -> State:
    """To the newest whole checkpoint, in the same attempt; returns its state."""
    save.settle()
    progress = training.progress
    progress.must_roll_back, training.sums = False, {}
    progress.replay_until = max(progress.replay_until, progress.step)
    state = resume(training, save.checkpointer, folder, say)
    if state is None:
        raise ValueError(f"run {folder}: there is no whole checkpoint to go back to; use anomaly.action=skip, or start a new run")
    report.last_samples = progress.samples
    return state


def note_in(folder: Folder, tracker: Tracker, world: World, say: Say) -> Note:
    """Has every anomaly written into the run's folder before the run goes on."""

    def note(anomaly: Anomaly, nth: int) -> None:
        if world.is_main:
            append(folder, "anomalies.jsonl", dict(anomaly))
            first, last = anomaly["first"], anomaly["last"]
            say(f"step {anomaly['step']}: {anomaly['reason']}; passing over {f'step {last}' if first == last else f'steps {first} to {last}'}")
            tracker.log(anomaly["step"], {"anomalies": nth})

    return note
