"""The hooks of a run: which ones it has, in which order, and how often they are called."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.batches import merge_states
from trainer.checkpoint.save import Checkpointer
from trainer.config import RunConfig
from trainer.core.training import Hook, Training
from trainer.hooks.collapse import collapse_hooks
from trainer.hooks.evaluate import Evaluate, Quality
from trainer.hooks.profiling import ProfilerHook
from trainer.hooks.report import Report
from trainer.hooks.sample import Sample
from trainer.hooks.save import Save
from trainer.planning.gpus import peak_flops
from trainer.records.goodput import Goodput
from trainer.records.ledger import Ledger
from trainer.recovery.faults import inject
from trainer.rules import RulesConfig
from trainer.run_files import RunFiles
from trainer.run_rows import Say
from trainer.tracking.tracker import Tracker
from trainer.world import World


@dataclass
class RunHooks:
    """The hooks whose results are read later, and `all` hooks in the order of their calls."""

    name: str
    tracker: Tracker
    report: Report
    evaluation: Evaluate
    quality: Quality
    sample: Sample
    save: Save
    all: list[Hook]

    def look(self, training: Training) -> None:
        """Evaluate and sample without a step, for an attempt that begins with all steps done."""
        for hook in (self.evaluation, self.quality, self.sample):
            hook(training)


def build_hooks(
    run: RunConfig,
    training: Training,
    files: RunFiles,
    tracker: Tracker,
    checkpointer: Checkpointer,
    ledger: Ledger,
    goodput: Goodput,
    scratch: Path,
    say: Say,
    started: float,
) -> RunHooks:
    """Build all hooks of `run`.

    `scratch` is a folder that is removed with the attempt; `started` is when the user asked for the
    run, as time.time().
    """
    world, objective = training.world, training.objective
    share = run.evaluation_share(world)
    report = Report(tracker, peak_flops(world.device, run.precision), last_samples=training.samples)
    evaluation = Evaluate(lambda: list(objective.held_out(share)), tracker)
    quality = Quality(share, tracker, say)
    sample = Sample(run.evaluate.samples, run.seed, files, tracker, scratch / "samples")
    save = Save(checkpointer, tracker, merge_states, ledger, say)
    # The collapse hooks come first, so that a checkpoint of the same step holds their changes.
    hooks = collapse_hooks(training, tracker, say)
    if training.step == 0:
        hooks.append(Hook(1, _first_step(files, world, started)))
    hooks += [
        Hook(1, lambda training: training.ema.update(training.step)),
        Hook(run.log_every, report),
        Hook(run.evaluate.every, evaluation, books_as="evaluation"),
        Hook(run.evaluate.quality_every, quality, books_as="evaluation"),
        Hook(run.evaluate.sample_every, sample, books_as="evaluation"),
    ]
    if run.evaluate.rules is not None and world.is_main:
        conflict_rate = _conflict_rate(run.evaluate.rules, files, sample, tracker, say)
        hooks.append(Hook(run.evaluate.sample_every, conflict_rate, books_as="evaluation"))
    hooks.append(Hook(run.checkpoint.every, save, books_as="checkpoint"))
    if run.profile is not None and world.is_main:
        hooks.append(Hook(1, ProfilerHook(run.profile, scratch / "profile", _keep_profile(files, tracker))))
    hooks += inject(run.faults, training, files)
    hooks += [Hook(1, goodput), Hook(run.log_every, goodput.log)]
    return RunHooks(str(run.name), tracker, report, evaluation, quality, sample, save, hooks)


def _conflict_rate(
    rules: RulesConfig, files: RunFiles, sample: Sample, tracker: Tracker, say: Say
) -> Callable[[Training], None]:
    from trainer.rules.gate import Gate
    from trainer.rules.hook import ConflictRate
    from trainer.rules.log import AuditLog

    return ConflictRate(Gate(rules), sample, AuditLog(files.folder), tracker, say)


def _keep_profile(files: RunFiles, tracker: Tracker) -> Callable[[Path], None]:
    def keep(file: Path) -> None:
        files.profile.put(file, file.name)
        tracker.keep(file)

    return keep


def _first_step(files: RunFiles, world: World, started: float) -> Callable[[Training], None]:
    """Note, once, the seconds from the command to the first optimiser step."""

    def note(training: Training) -> None:
        if training.step == 1 and world.is_main:
            files.write_first_step_seconds(time.time() - started)

    return note
