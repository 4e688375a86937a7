"""The hooks of a run: which of them it has, and how often each is called."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.steps import Share, merge_states
from trainer.attempts import Say
from trainer.checkpoint import Checkpointer
from trainer.collapse import collapse_hooks
from trainer.config import RunConfig
from trainer.faults import inject
from trainer.goodput import Goodput
from trainer.gpus import peak_flops
from trainer.hooks import Evaluate, Quality, Report, Sample, Save
from trainer.ledger import Ledger
from trainer.loop import Hook, Training
from trainer.profiling import ProfilerHook
from trainer.rules import RulesConfig
from trainer.storage import Folder
from trainer.tracking import Tracker
from trainer.world import World


@dataclass
class RunHooks:
    """Those that are asked for something later, and `all` of them with their intervals, in the order of their calls."""

    name: str
    tracker: Tracker
    report: Report
    evaluation: Evaluate
    quality: Quality
    sample: Sample
    save: Save
    all: list[tuple[int, Hook]]

    def look(self, training: Training) -> None:
        """Evaluate and sample where training stands: for an attempt that finds all steps done."""
        for hook in (self.evaluation, self.quality, self.sample):
            hook(training)


def build_hooks(
    run: RunConfig, training: Training, folder: Folder, tracker: Tracker, ledger: Ledger, goodput: Goodput, scratch: Path, say: Say, started: float
) -> RunHooks:
    """All hooks of `run`; `scratch` is a folder that is removed with the attempt, `started` when the user asked for the run."""
    world, objective = training.world, training.objective
    micro_batch = run.evaluate.micro_batch or run.batch.micro_batch
    share = Share(rank=world.rank, world=world.size, global_batch=micro_batch * world.size, micro_batch=micro_batch)
    report = Report(tracker, peak_flops(world.device, run.precision), last_samples=training.samples)
    evaluation = Evaluate(lambda: list(objective.held_out(share)), tracker)
    quality = Quality(share, tracker, say)
    sample = Sample(run.evaluate.samples, run.seed, folder, tracker, scratch / "samples")
    save = Save(Checkpointer(folder / "checkpoints", world, run.checkpoint, ledger.attempt), tracker, merge_states, ledger, say)
    hooks: list[tuple[int, Hook]] = collapse_hooks(training, tracker, say)  # first, so that a checkpoint of this step holds what they did
    if training.step == 0:
        hooks.append((1, _first_step(folder, world, started)))
    hooks += [
        (1, training.ema),
        (run.log_every, report),
        (run.evaluate.every, report.pausing(evaluation, "evaluation")),
        (run.evaluate.quality_every, report.pausing(quality, "evaluation")),
        (run.evaluate.sample_every, report.pausing(sample, "evaluation")),
    ]
    if run.evaluate.rules is not None and world.is_main:
        hooks.append((run.evaluate.sample_every, report.pausing(_conflict_rate(run.evaluate.rules, folder, sample, tracker, say), "evaluation")))
    hooks.append((run.checkpoint.every, report.pausing(save, "checkpoint")))
    if run.profile is not None and world.is_main:
        hooks.append((1, ProfilerHook(run.profile, scratch / "profile", _keep_in(folder, "profile", tracker))))
    hooks += inject(run.faults, training, folder)
    hooks += [(1, goodput), (run.log_every, goodput.log)]
    return RunHooks(str(run.name), tracker, report, evaluation, quality, sample, save, hooks)


def _conflict_rate(rules: RulesConfig, folder: Folder, sample: Sample, tracker: Tracker, say: Say) -> Hook:
    from trainer.rules.audit import AuditLog
    from trainer.rules.gate import Gate
    from trainer.rules.hook import ConflictRate

    return ConflictRate(Gate(rules), sample, AuditLog(folder), tracker, say)


def _keep_in(folder: Folder, name: str, tracker: Tracker) -> Callable[[Path], None]:
    def keep(file: Path) -> None:
        (folder / name).put(file, file.name)
        tracker.keep(file)

    return keep


def _first_step(folder: Folder, world: World, started: float) -> Hook:
    """Notes, once, how long it took from the command to the first optimiser step."""

    def note(training: Training) -> None:
        if training.step == 1 and world.is_main:
            folder.write("first_step.json", json.dumps({"seconds_to_first_step": time.time() - started}).encode())

    return note
