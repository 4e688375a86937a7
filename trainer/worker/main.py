"""One worker, from its config to its summary.

It builds the parts, runs the loop, and leaves a run folder that tells what happened.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.share import Share
from models.init import initialise
from trainer.checkpoint.format import State
from trainer.checkpoint.save import Checkpointer
from trainer.config import RunConfig, check
from trainer.core.anomaly import Guard, RecordAnomaly, no_checkpoint, record_nothing
from trainer.core.ema import Ema
from trainer.core.loop import fit
from trainer.core.protocols import Engine, Objective
from trainer.core.training import Training, fragments
from trainer.endings import Ending, Stopped
from trainer.engines import build_engine
from trainer.engines.optim import learning_rate
from trainer.objectives import build_objective
from trainer.parsing import parse, plain
from trainer.records.attempts import Print, begin_attempt, close_attempt, ending, note_end, recorded
from trainer.records.goodput import Goodput, open_goodput
from trainer.records.ledger import Ledger, frozen_manifest
from trainer.recovery.control import Asked, Control, nobody_asks
from trainer.recovery.resume import record_in, resume, roll_back
from trainer.recovery.watchdog import Watchdog
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import EventKind, Plain, Say, Summary
from trainer.worker.hooks import RunHooks, build_hooks
from trainer.worker.memory import out_of_memory
from trainer.worker.summary import finish, summarise
from trainer.worker.tracker import closing, open_tracker
from trainer.world import World, joined


def run_worker(values: Plain, say: Print = print, started: float | None = None, asked: Asked = nobody_asks) -> Summary:
    """Train as `values` say, the plain values of a RunConfig, and return the summary.

    The environment names the ranks. Training continues from the newest intact checkpoint of the run
    folder, if there is one. `started` is when the user asked for the run, as time.time(); `asked`
    says why the worker's surroundings want it to leave.
    """
    run = parse(RunConfig, values, "run")
    assert run.name is not None, "the driver names the run"
    with joined(run.device, run.threads, run.collective_timeout_s) as world:
        check(run, world.size)
        with out_of_memory(run, world.rank):
            return _train(run, world, say, started or time.time(), asked)


def build_training(
    run: RunConfig,
    world: World,
    objective: Objective | None = None,
    record: RecordAnomaly = record_nothing,
    newest_checkpoint: Callable[[], int] = no_checkpoint,
) -> Training:
    """Build the sharded networks, initialised from the seed, and their engines.

    `objective` is by default the one that `run` names.
    """
    objective = objective or build_objective(run.objective, run.seed)
    engines: dict[str, Engine] = {}
    bf16 = run.is_bf16(world.device.type == "cuda")
    for name, network in objective.networks.items():
        if (ep := run.ep(world.size)) > 1:
            from trainer.engines.expert_parallel import shard_experts

            shard_experts(network, ep, world.rank)
        initialise(network, run.seed)
        network.to(world.device)
        if run.compile:
            network.compile()
        engines[name] = build_engine(run.engine, network, run.optimizer, bf16, world)
    steps = run.steps(objective.tokens_per_sample)
    return Training(
        objective,
        engines,
        world,
        learning_rate=lambda phase, step: learning_rate(run.optimizer, step, steps) * objective.rates[phase],
        ema=Ema(run.ema, engines, objective.averaged),
        guard=Guard(run.anomaly, world, objective.networks, record, newest_checkpoint),
    )


def _train(run: RunConfig, world: World, say: Print, started: float, asked: Asked = nobody_asks) -> Summary:
    files = run_files(run.root, run.name)
    attempt = begin_attempt(files, world)
    tell = recorded(say, files, attempt, world)
    objective = build_objective(run.objective, run.seed)
    manifest = frozen_manifest(files, objective, world)
    tracker = open_tracker(run, files, attempt, manifest, world, tell)
    checkpointer = Checkpointer(files.checkpoints, world, run.checkpoint, attempt)
    training = build_training(
        run, world, objective, record_in(files, tracker, world, tell), lambda: checkpointer.newest
    )
    state = _resume_or_start(run, training, checkpointer, files, tell)
    ledger = Ledger(files, attempt, training.objective.tokens_per_sample, world)
    with (
        ending(training, files, attempt),
        out_of_memory(run, world.rank),
        tempfile.TemporaryDirectory() as scratch,
        closing(tracker, training),
        Control(training, files, run.stop.hours, asked),
        Watchdog(training, files, attempt, run.hang_timeout_s),
    ):
        goodput = open_goodput(files, tracker, attempt, started or time.time())
        hooks = build_hooks(run, training, files, tracker, checkpointer, ledger, goodput, Path(scratch), tell, started)
        begin = time.perf_counter()
        first = training.step
        goodput.start(training)
        _fit_with_rollbacks(run, training, files, ledger, goodput, hooks, state, tell)
        assert training.stopped is not None, "fit() ends with a reason"
        summary = summarise(training, training.stopped, hooks, attempt, first, time.perf_counter() - begin)
        if world.is_main:
            summary["goodput"] = goodput.write(training, ended=True)
            note_end(files, attempt, "rank 0", training.stopped)
            close_attempt(files, attempt)
            finish(training, hooks, summary, files, Path(scratch))
        return summary


def _resume_or_start(
    run: RunConfig, training: Training, checkpointer: Checkpointer, files: RunFiles, say: Say
) -> State | None:
    """Load the newest checkpoint and return its state; None at the start of a run.

    A new run may begin with the weights of another model.
    """
    state = resume(training, checkpointer, files, say)
    if state is None and (start := run.objective.start) is not None:
        start.fill(fragments(training), partial(say, EventKind.NOTE))
        for engine in training.engines.values():
            engine.refresh()
        training.ema.restart()
    return state


def _fit_with_rollbacks(
    run: RunConfig,
    training: Training,
    files: RunFiles,
    ledger: Ledger,
    goodput: Goodput,
    hooks: RunHooks,
    state: State | None,
    say: Say,
) -> None:
    """Train until the run ends, from the newest checkpoint again after each rollback.

    `state` is that of the checkpoint that was resumed from.
    """
    share = Share(
        rank=training.world.rank, world=training.world.size, group=training.objective.group, **plain(run.batch)
    )
    steps = run.steps(training.objective.tokens_per_sample)
    if training.step == steps:  # an earlier attempt ended between its last checkpoint and its summary
        hooks.look(training)
    while True:
        opening = time.perf_counter()
        data = state["data"] if state is not None else None
        stream = training.objective.stream(share, data)
        training.spend(goodput.waiting, opening)
        ledger.begin(data, share)
        fit(training, stream, steps, hooks.all)
        stream.close()
        if not training.progress.must_roll_back:
            break
        state = roll_back(training, files, hooks.save, hooks.report, say)
    waiting = time.perf_counter()
    if problem := hooks.save.wait(training):
        training.stopped = Stopped(Ending.CHECKPOINT_FAILED, f"{problem}; make room and use --resume")
    training.spend("checkpoint", waiting)
