"""The hooks of a run: which ones it has, in which order, and how often they are called."""

import time
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
    """Build all hooks of `run`, in the order of their calls.

    `scratch` is removed with the attempt; `started` is when the user asked for the run.
    """
    world, objective = training.world, training.objective
    share = run.evaluation_share(world)
    report = Report(tracker, peak_flops(world.device, run.precision), last_samples=training.samples)
    evaluation = Evaluate(lambda: list(objective.held_out(share)), tracker)
    quality = Quality(share, tracker, say)
    sample = Sample(run.evaluate.samples, run.seed, files, tracker, scratch / "samples")
    save = Save(checkpointer, tracker, merge_states, ledger, say)
    hooks = [
        *collapse_hooks(training, tracker, say),  # first, so that the checkpoint of a step holds their changes
        *_first_step_hooks(training, files, started),
        Hook(1, lambda training: training.ema.update(training.step)),
        Hook(run.log_every, report),
        Hook(run.evaluate.every, evaluation, books_as="evaluation"),
        Hook(run.evaluate.quality_every, quality, books_as="evaluation"),
        Hook(run.evaluate.sample_every, sample, books_as="evaluation"),
        *_conflict_hooks(run, world, files, sample, tracker, say),
        Hook(run.checkpoint.every, save, books_as="checkpoint"),
        *_profiler_hooks(run, world, files, tracker, scratch),
        *inject(run.faults, training, files),
        Hook(1, goodput),
        Hook(run.log_every, goodput.log),
    ]
    return RunHooks(str(run.name), tracker, report, evaluation, quality, sample, save, hooks)


def _conflict_hooks(
    run: RunConfig, world: World, files: RunFiles, sample: Sample, tracker: Tracker, say: Say
) -> list[Hook]:
    if run.evaluate.rules is None or not world.is_main:
        return []
    from trainer.rules.gate import Gate
    from trainer.rules.hook import ConflictRate
    from trainer.rules.log import DecisionLog

    conflict_rate = ConflictRate(Gate(run.evaluate.rules), sample, DecisionLog(files.folder), tracker, say)
    return [Hook(run.evaluate.sample_every, conflict_rate, books_as="evaluation")]


def _profiler_hooks(run: RunConfig, world: World, files: RunFiles, tracker: Tracker, scratch: Path) -> list[Hook]:
    if run.profile is None or not world.is_main:
        return []

    def keep(file: Path) -> None:
        files.profile.put(file, file.name)
        tracker.keep(file)

    return [Hook(1, ProfilerHook(run.profile, scratch / "profile", keep))]


def _first_step_hooks(training: Training, files: RunFiles, started: float) -> list[Hook]:
    """Return a hook that notes the seconds from the command to the first step of the run."""
    if training.step > 0:
        return []

    def note(training: Training) -> None:
        if training.step == 1 and training.world.is_main:
            files.write_first_step_seconds(time.time() - started)

    return [Hook(1, note)]
