"""One worker, from its config to its summary: builds the parts, runs the loop, and leaves a folder that tells what happened."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.steps import Share
from models.init import initialise
from trainer import init_from
from trainer.anomaly import Guard
from trainer.attempts import Say, begin_attempt, close_attempt, ending, note_end, recorded
from trainer.config import RunConfig, check
from trainer.control import Asked, Control
from trainer.ema import Ema
from trainer.engines import build_engine
from trainer.goodput import Goodput, open_goodput
from trainer.hooks import fragments
from trainer.ledger import Ledger, frozen_manifest
from trainer.loop import Training, fit
from trainer.memory import out_of_memory
from trainer.objectives import build_objective
from trainer.optim import learning_rate
from trainer.parsing import parse, plain
from trainer.recovery import go_back, note_anomalies, resume
from trainer.run_hooks import RunHooks, build_hooks
from trainer.run_tracker import closing, open_tracker
from trainer.storage import Folder
from trainer.summary import finish, summarise
from trainer.watchdog import Watchdog
from trainer.world import World, joined


def run_worker(values: Mapping[str, Any], say: Say = print, started: float | None = None, asked: Asked = lambda: "") -> dict[str, Any]:
    """Train as the plain `values` of a RunConfig say, with the ranks that the environment names; returns the summary.

    Starts from the run folder's newest whole checkpoint, if there is one. `started` is when the user asked for it (time.time()),
    `asked` says why the worker's surroundings want it to leave.
    """
    run = parse(RunConfig, values, "run")
    assert run.name is not None, "the driver names the run"
    with joined(run.device, run.threads, run.collective_timeout_s) as world:
        check(run, world.size)
        with out_of_memory(run, world.rank):
            return _train(run, world, say, started or time.time(), asked)


def build_training(run: RunConfig, world: World) -> Training:
    """Objective, sharded networks and engines, initialised from the seed."""
    objective = build_objective(run.objective, run.seed)
    engines = {}
    bf16 = run.is_bf16(world.device.type == "cuda")
    for name, network in objective.networks.items():
        if (ep := run.ep(world.size)) > 1:
            from trainer.expert_parallel import shard_experts

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
        guard=Guard(run.anomaly, world, objective.networks),
    )


def _train(run: RunConfig, world: World, say: Say, started: float, asked: Asked = lambda: "") -> dict[str, Any]:
    folder = Folder(f"{run.root}/{run.name}")
    attempt = begin_attempt(folder, world)
    say = recorded(say, folder, attempt, world)
    training = build_training(run, world)
    manifest = frozen_manifest(folder, training.objective, world)
    state = resume(training, folder, say)
    if not state and init_from.start(run.objective, fragments(training), say):
        for engine in training.engines.values():
            engine.refresh()
        training.ema.restart()
    tracker = open_tracker(run, folder, attempt, manifest, world, say)
    ledger = Ledger(folder, attempt, training.objective.tokens_per_sample, world)
    with (
        ending(training, folder, attempt),
        out_of_memory(run, world.rank),
        tempfile.TemporaryDirectory() as scratch,
        closing(tracker, training),
        Control(training, folder, run.stop.hours, asked),
        Watchdog(training, folder, attempt, run.hang_timeout_s),
    ):
        goodput = open_goodput(folder, tracker, attempt, started or time.time())
        hooks = build_hooks(run, training, folder, tracker, ledger, goodput, Path(scratch), say, started)
        note_anomalies(training, folder, tracker, say)
        begin, first = time.perf_counter(), training.step
        goodput.start(training)
        _fit_and_go_back(run, training, folder, ledger, goodput, hooks, state, say)
        summary = summarise(training, hooks, attempt, first, time.perf_counter() - begin)
        if world.is_main:
            summary["goodput"] = goodput.write(training, ended=True)
            note_end(folder, attempt, "rank 0", training.stopped)
            close_attempt(folder, attempt)
            summary = finish(training, hooks, summary, folder, Path(scratch))
        return summary


def _fit_and_go_back(
    run: RunConfig, training: Training, folder: Folder, ledger: Ledger, goodput: Goodput, hooks: RunHooks, state: dict[str, Any], say: Say
) -> None:
    """Train until the run ends, from its newest checkpoint again as often as the guard sends it back; `state` is that of a resumed checkpoint."""
    share = Share(rank=training.world.rank, world=training.world.size, group=training.objective.group, **plain(run.batch))
    steps = run.steps(training.objective.tokens_per_sample)
    if training.step == steps:  # an attempt that ended between its last checkpoint and its summary
        hooks.look(training)
    while True:
        opening = time.perf_counter()
        stream = training.objective.stream(share, state.get("data"))
        training.spend(goodput.waiting, opening)
        ledger.begin(state.get("data", {}), share)
        fit(training, stream, steps, hooks.all)
        stream.close()
        if not training.going_back:
            break
        state = go_back(training, folder, hooks.save, hooks.report, say)
    settling = time.perf_counter()
    if problem := hooks.save.settle(training):
        training.stopped, training.failed = f"{problem}; make room and use --resume", True
    training.spend("checkpoint", settling)
