"""`switchwork prove moe`: is the mixture of experts ahead of a dense model, and is it the routing that makes it so?

At equal steps, equal data and no fewer FLOPs a token for the dense model, over paired seeds: dense, several numbers of experts, and two
controls, a router frozen at its start and one whose choices are permuted over the tokens of a group. A seed gives every variant the same
data in the same order and the same initial weights outside the experts; differences are taken seed by seed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data.prepare import prepare as prepare_data
from data.tokenizers import load_tokenizer
from launch.config import JobConfig
from launch.paired import Difference, lead
from launch.prove_moe_report import show
from launch.side_by_side import curve, default_processes, named, summaries
from models.flops import flops_per_token, parameters
from models.moe import MoEConfig
from models.transformer import TransformerConfig
from trainer.config import RunConfig, StopConfig, check
from trainer.objectives.language_config import CausalConfig, LanguageConfig
from trainer.parsing import parse, plain, read_job
from trainer.storage import Folder, absolute, check_writable

RECIPE = str(Path(__file__).parent / "configs" / "prove_moe.yaml")
EXPERTS = "4,8,16"
"""What is compared, unless the command line says otherwise; the widest router decides how wide the dense model is."""
CURVE = 8
"""Evaluations of a run: the points of its loss curve."""
_SPEED_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command's flags say."""

    experts: str
    """Numbers of experts beside the job's own, which the controls have: `4,8,16`."""
    seeds: int
    """How many, from the job's own on."""
    processes: int | None
    """Runs at a time; None: as many as there are cores."""
    minutes: float | None
    """Time for all of it; None: the job's steps."""
    folder: str
    """Runs, results and picture."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"--seeds: {self.seeds} has no spread to judge a difference by; use 2 or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes: {self.processes}; use at least 1")
        if not re.fullmatch(r"\d+(,\d+)*", self.experts) or min(self.numbers) < 2:
            raise ValueError(f"--experts: {self.experts!r}; give numbers from 2 on, such as 4,8,16 (the dense model is there in any case)")

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.experts.split(",")))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One variant, over all seeds."""

    name: str
    experts: int
    parameters: int
    flops_per_token: float
    losses: list[float]
    """Held-out cross-entropy in nats a token at the last step, by seed."""
    curve: list[tuple[int, float]]
    """Held-out cross-entropy, the mean over the seeds, by step."""


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Run what is missing, then print table, differences and verdict, and write `results.json` and `proof.png`."""
    run = parse(JobConfig, read_job(path, overrides)).run
    moe = checked(run, path)
    check_writable(absolute(options.folder), "--folder")
    prepare_data(_language(run).data)
    root = f"{absolute(options.folder)}/runs"
    processes = options.processes or default_processes(run)
    runs = variants(run, moe, options.numbers)
    if options.minutes is not None:
        run = replace(run, stop=StopConfig(steps=_steps_in(console, options.minutes, runs, options.seeds, processes, root)))
        runs = variants(run, moe, options.numbers)
    seeds = range(run.seed, run.seed + options.seeds)
    console.print(f"{len(runs)} variants x {len(seeds)} seeds, {run.stop.steps} steps each, {processes} at a time, in {options.folder}", highlight=False)
    grid = [(name, named(replace(each, seed=seed), f"{slug(name)}-seed{seed}", root)) for seed in seeds for name, each in runs.items()]
    found = summaries(console, [each for _, each in grid], processes, "proof")
    outcomes = [outcome_of(name, each, [planned for label, planned in grid if label == name]) for name, each in runs.items()]
    leads = _leads(outcomes, switch_name(moe.experts))
    results = {
        "job": plain(run),
        "seeds": list(seeds),
        "processes": processes,
        "minutes_of_runs": sum(summary["train_seconds"] for summary in found) / 60,
        "variants": [asdict(outcome) for outcome in outcomes],
        "leads": [{"of": ours, "over": theirs, **asdict(each), "verdict": each.verdict} for (ours, theirs), each in leads.items()],
    }
    Folder(absolute(options.folder)).write("results.json", json.dumps(results, indent=1).encode())
    show(console, outcomes, leads, switch_name(moe.experts), options.folder, results["minutes_of_runs"] / processes)


def checked(run: RunConfig, path: str) -> MoEConfig:
    """The job's experts, if it can serve a proof."""
    if not isinstance(run.objective, LanguageConfig):
        raise ValueError(f"run.objective.name: {run.objective.name} in {path}; the proof is about language models, use moe_lm")
    check(run, 1)
    moe = run.objective.model.moe
    if moe is None or moe.control != "none":
        control = f"the control {moe.control}" if moe else "none"
        raise ValueError(f"run.objective.model.moe: {control} in {path}; the proof needs experts with a router, and makes dense model and controls itself")
    if run.stop.steps is None:
        raise ValueError(f"run.stop.steps: not set in {path}; every run of the proof takes equally many steps, set them")
    if run.objective.data.held_out == 0 and run.objective.data.eval_source is None:
        raise ValueError("run.objective.data.held_out: 0, but the proof compares held-out losses; set a share such as 0.05")
    return moe


def _language(run: RunConfig) -> LanguageConfig:
    assert isinstance(run.objective, LanguageConfig), "refused before"
    return run.objective


def switch_name(experts: int) -> str:
    return f"{experts} experts"


def variants(run: RunConfig, moe: MoEConfig, experts: Sequence[int]) -> dict[str, RunConfig]:
    """Name -> run: dense, each number of experts in ascending order, and the two controls with the job's own number."""
    objective = _language(run)
    model = objective.model
    routed = {switch_name(n): replace(moe, experts=n) for n in sorted({moe.experts, *experts})}
    routed |= {"frozen router": replace(moe, control="frozen"), "permuted router": replace(moe, control="permuted")}
    models = {name: replace(model, moe=each) for name, each in routed.items()}
    vocab_size = load_tokenizer(objective.data.tokenizer).vocab_size
    models = {"dense": dense_of(list(models.values()), vocab_size)} | models
    every = max(1, -(-(run.stop.steps or 1) // CURVE))
    base = replace(run, evaluate=replace(run.evaluate, every=every, samples=0))
    return {name: replace(base, objective=replace(objective, model=each)) for name, each in models.items()}


def dense_of(models: Sequence[TransformerConfig], vocab_size: int) -> TransformerConfig:
    """The dense model whose feed-forward layers are just so wide that a token costs it no less than any of `models`, routers included."""
    most = max(parameters(model, vocab_size).matmul for model in models)
    dense = replace(models[0], moe=None, moe_layers="all", ffn=1)
    width = 1 + math.ceil((most - parameters(dense, vocab_size).matmul) / (3 * dense.layers * dense.d_model))
    return replace(dense, ffn=width)


def slug(name: str) -> str:
    return name.replace(" ", "-")


def outcome_of(name: str, run: RunConfig, runs: Sequence[RunConfig]) -> Outcome:
    """What the `runs` of one variant, by seed, have left in their folders."""
    assert isinstance(run.objective, CausalConfig), "refused before"
    model, data = run.objective.model, run.objective.data
    vocab_size = load_tokenizer(data.tokenizer).vocab_size
    curves = [curve(each) for each in runs]
    means = [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)]
    return Outcome(
        name=name,
        experts=model.moe.experts if model.moe else 1,
        parameters=parameters(model, vocab_size).total,
        flops_per_token=flops_per_token(model, vocab_size, data.seq_len),
        losses=[curve[-1][1] for curve in curves],
        curve=means,
    )


def _leads(outcomes: Sequence[Outcome], ours: str) -> dict[tuple[str, str], Difference]:
    """(ours, theirs) -> the lead: of each variant over the dense model, then of the job's own over the two controls."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    pairs = [(name, "dense") for name in losses if name != "dense"] + [(ours, "permuted router"), (ours, "frozen router")]
    return {(mine, theirs): lead(losses[theirs], losses[mine]) for mine, theirs in pairs}


def _steps_in(console: Console, minutes: float, runs: dict[str, RunConfig], seeds: int, processes: int, root: str) -> int:
    """The steps that fit into `minutes`, from a short run of every variant, whose own time is taken off as well."""
    short = {name: replace(run, stop=StopConfig(steps=_SPEED_STEPS), evaluate=replace(run.evaluate, every=0), log_every=10) for name, run in runs.items()}
    return steps_that_fit(
        minutes, summaries(console, [named(run, f"speed-{slug(name)}", root) for name, run in short.items()], processes, "speed"), seeds, processes
    )


def steps_that_fit(minutes: float, short: Sequence[Mapping[str, Any]], seeds: int, processes: int) -> int:
    """Steps for each variant and seed, from the summaries of one `short` run of each variant.

    A run takes its start, CURVE evaluations and its steps; 5 % of the time stay in hand. ValueError if not even a short run's steps fit.
    """
    step_s = sum((each["seconds"]["data"] + each["seconds"]["step"]) / each["step"] for each in short)
    around_s = sum(each["seconds_to_first_step"] + CURVE * each["seconds"]["hooks"] for each in short)
    spent_s = sum(each["seconds_to_first_step"] + each["train_seconds"] for each in short) / processes
    steps = math.floor(((0.95 * 60 * minutes - spent_s) * processes / seeds - around_s) / step_s)
    if steps < _SPEED_STEPS:
        least = math.ceil(((around_s + _SPEED_STEPS * step_s) * seeds / processes + spent_s) / 0.95 / 60)
        raise ValueError(f"--minutes: {minutes:g} is too short for {len(short)} variants and {seeds} seeds on {processes} processes; use {least} or more")
    return steps
