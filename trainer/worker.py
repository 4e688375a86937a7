"""One worker, from its config to its summary: builds the parts, runs the loop, and leaves a folder that tells what happened."""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.steps import Share, merge_states
from models.init import initialise
from trainer import init_from
from trainer.anomaly import Guard
from trainer.attempts import Say, begin_attempt, close_attempt, ending, note_end, recorded
from trainer.checkpoint import Checkpointer
from trainer.code_version import code_name
from trainer.collapse import collapse_hooks
from trainer.config import RunConfig, check
from trainer.control import Asked, Control
from trainer.ema import Ema
from trainer.engines import build_engine
from trainer.faults import inject
from trainer.goodput import open_goodput
from trainer.hooks import Evaluate, Quality, Report, Sample, Save, fragments
from trainer.ledger import Ledger, frozen_manifest
from trainer.loop import Hook, Training, fit
from trainer.memory import out_of_memory
from trainer.objectives import Objective, build_objective
from trainer.optim import learning_rate
from trainer.parsing import parse, plain
from trainer.peak import peak_flops
from trainer.profiling import ProfilerHook
from trainer.recovery import go_back, note_anomalies, resume
from trainer.rules import RulesConfig
from trainer.storage import Folder
from trainer.tracking import JsonlTracker, MlflowTracker, NullTracker, RunFacts, Tracker
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
    bf16 = run.precision == "bf16" or (run.precision == "auto" and world.device.type == "cuda")
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
    tracker = _tracker(run, folder, attempt, manifest, world, say)
    ledger = Ledger(folder, attempt, training.objective.tokens_per_sample, world)
    share = Share(rank=world.rank, world=world.size, global_batch=run.batch.global_batch, micro_batch=run.batch.micro_batch, group=training.objective.group)
    with (
        ending(training, folder, attempt),
        out_of_memory(run, world.rank),
        tempfile.TemporaryDirectory() as scratch,
        _closing(tracker, training),
        Control(training, folder, run.stop.hours, asked),
        Watchdog(training, folder, attempt, run.hang_timeout_s),
    ):
        report, evaluation, quality, sample, save, hooks = _hooks(run, training, folder, tracker, ledger, Path(scratch), say)
        begin, first = time.perf_counter(), training.step
        hooks[:0] = collapse_hooks(training, tracker, say)  # first, so that a checkpoint of this step holds what they did
        if training.step == 0:
            hooks.insert(0, (1, _first_step(folder, world, say, started)))
        hooks += inject(run.faults, training, folder)
        goodput = open_goodput(folder, tracker, attempt, started or time.time())
        hooks += [(1, goodput), (run.log_every, goodput.log)]
        note_anomalies(training, folder, tracker, say)
        goodput.start(training)
        while True:
            opening = time.perf_counter()
            stream = training.objective.stream(share, state.get("data"))
            training.spend(goodput.waiting, opening)
            ledger.begin(state.get("data", {}), share)
            fit(training, stream, run.steps(training.objective.tokens_per_sample), hooks)
            stream.close()
            if not training.going_back:
                break
            state = go_back(training, folder, save, report, say)
        settling = time.perf_counter()
        if problem := save.settle(training):
            training.stopped, training.failed = f"{problem}; make room and use --resume", True
        training.spend("checkpoint", settling)
        seconds = time.perf_counter() - begin
        summary = {
            "name": run.name,
            "step": training.step,
            "tokens_seen": training.tokens,
            "samples_seen": training.samples,
            "stopped": training.stopped,
            "failed": training.failed,
            "anomalies": training.guard.found,
            "world": world.size,
            "attempt": attempt,
            "train_seconds": seconds,
            "steps_this_attempt": training.step - first,
            "seconds": training.seconds,
            "training": report.figures,
            "eval": evaluation.figures,
            "quality": quality.figures,
            "samples": sample.samples.text,
        }
        if world.is_main:
            summary["goodput"] = goodput.write(training, ended=True)
            note_end(folder, attempt, "rank 0", training.stopped)
            close_attempt(folder, attempt)
            summary = _finish(folder, training.objective, summary, tracker, Path(scratch), str(run.name))
        return summary


def _hooks(
    run: RunConfig, training: Training, folder: Folder, tracker: Tracker, ledger: Ledger, scratch: Path, say: Say
) -> tuple[Report, Evaluate, Quality, Sample, Save, list[tuple[int, Hook]]]:
    world, objective = training.world, training.objective
    micro_batch = run.evaluate.micro_batch or run.batch.micro_batch
    share = Share(rank=world.rank, world=world.size, global_batch=micro_batch * world.size, micro_batch=micro_batch)
    report = Report(tracker, peak_flops(world.device, run.precision), last_samples=training.samples)
    evaluation = Evaluate(lambda: list(objective.held_out(share)), tracker)
    quality = Quality(share, tracker, say)
    sample = Sample(run.evaluate.samples, run.seed, folder, tracker, scratch / "samples")
    save = Save(Checkpointer(folder / "checkpoints", world, run.checkpoint, ledger.attempt), tracker, merge_states, ledger, say)
    hooks: list[tuple[int, Hook]] = [
        (1, training.ema),
        (run.log_every, report),
        (run.evaluate.every, report.pausing(evaluation, "evaluation")),
        (run.evaluate.quality_every, report.pausing(quality, "evaluation")),
        (run.evaluate.sample_every, sampling := report.pausing(sample, "evaluation")),
        (run.checkpoint.every, report.pausing(save, "checkpoint")),
    ]
    if run.evaluate.rules is not None and world.is_main:
        after = next(index for index, (_, hook) in enumerate(hooks) if hook is sampling) + 1
        hooks.insert(after, (run.evaluate.sample_every, report.pausing(_conflict_rate(run.evaluate.rules, folder, sample, tracker, say), "evaluation")))
    if run.profile is not None and world.is_main:
        hooks.append((1, ProfilerHook(run.profile, scratch / "profile", _keep_in(folder, "profile", tracker))))
    return report, evaluation, quality, sample, save, hooks


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


def _tracker(run: RunConfig, folder: Folder, attempt: int, manifest: Mapping[str, Any], world: World, say: Say) -> Tracker:
    if not world.is_main:
        return NullTracker()
    if not run.tracking.enabled:
        return JsonlTracker(folder, attempt)
    params = dict(_flat("", plain(run))) | {"world": world.size, "device": str(world.device)}
    tags = {"run_folder": folder.url, "objective": run.objective.name, "torch": torch.__version__, "python": platform.python_version()}
    tags |= {"mlflow.source.git.commit": code_name()} if code_name() else {}
    facts = RunFacts(str(run.name), run.objective.dataset, params, tags, manifest)
    return MlflowTracker(folder, attempt, run.tracking, facts, say)


def _flat(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, value)
    elif values is not None:
        yield prefix, values


@contextmanager
def _closing(tracker: Tracker, training: Training) -> Iterator[None]:
    """Close the run in MLflow, whatever happens in the block."""
    status = "FAILED"
    try:
        yield
        status = "FAILED" if training.failed else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _first_step(folder: Folder, world: World, say: Say, started: float) -> Hook:
    """Notes, once, how long it took from the command to the first optimiser step."""

    def note(training: Training) -> None:
        if training.step == 1 and world.is_main:
            folder.write("first_step.json", json.dumps({"seconds_to_first_step": time.time() - started}).encode())

    return note


def _finish(folder: Folder, objective: Objective, summary: dict[str, Any], tracker: Tracker, scratch: Path, title: str) -> dict[str, Any]:
    """Baselines, pictures and summary.json."""
    from trainer.charts import draw

    summary["baselines"] = objective.baselines()
    if folder.exists("first_step.json"):
        summary |= json.loads(folder.read("first_step.json"))
    for file in draw(folder.read("metrics.jsonl"), scratch / "charts", title, summary["baselines"]):
        folder.put(file, file.name)
        tracker.keep(file)
    folder.write("summary.json", json.dumps(summary, indent=1).encode())
    return summary
