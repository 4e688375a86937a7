"""The `run` of a job file: everything that a worker needs, and nothing about where it runs."""

import math
import re
from dataclasses import dataclass, field

from data.share import Share
from trainer.checkpoint.save import CheckpointConfig
from trainer.core.anomaly import AnomalyConfig
from trainer.core.ema import EmaConfig
from trainer.engines.config import DeepSpeedConfig, EngineConfig, Precision
from trainer.engines.optim import Constant, OptimizerConfig
from trainer.hooks.profiling import ProfileConfig
from trainer.objectives import AnyObjective
from trainer.recovery.faults import FaultConfig
from trainer.rules import RulesConfig
from trainer.tracking.config import TrackingConfig
from trainer.world import Device, World


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many samples make one optimiser step."""

    global_batch: int
    """Samples per optimiser step, over all ranks: the same for any number of ranks."""
    micro_batch: int
    """Samples per forward pass on one rank; gradients are accumulated up to the global batch."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ValueError(
                f"global_batch is {self.global_batch} and micro_batch {self.micro_batch}; both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When to stop: at the first limit that is reached."""

    steps: int | None = None
    """Number of optimiser steps."""
    tokens: int | None = None
    """Number of tokens to train on, rounded up to whole steps."""
    hours: float | None = None
    """Wall-clock hours of this attempt, from the first step."""

    def __post_init__(self) -> None:
        if self.steps is None and self.tokens is None and self.hours is None:
            raise ValueError("stop: none of steps, tokens and hours is set; set at least one")
        for name, value in (("steps", self.steps), ("tokens", self.tokens), ("hours", self.hours)):
            if value is not None and value <= 0:
                raise ValueError(f"stop.{name} is {value}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on the held-out samples, and samples to look at."""

    every: int = 0
    """Number of steps between evaluations; 0: only at the end."""
    quality_every: int = 0
    """Number of steps between measurements of the quality of generated samples (images, toy data);
    0: only at the end."""
    sample_every: int = 0
    """Number of steps between samplings; 0: only at the end."""
    samples: int = 2
    """Number of samples per sampling."""
    micro_batch: int | None = None
    """Samples per forward pass of an evaluation; null: as in training."""
    rules: RulesConfig | None = None
    """Rules over the sampled texts; the share of texts that they refuse is logged after each
    sampling."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: the objective, the batch, the optimiser and engine, and how it is watched and kept."""

    name: str | None = None
    """Name of the run, and of its folder in `root`; null: the job file's name and the next free
    number."""
    root: str = "runs"
    """Folder of all runs, or a URL (s3://, gs://, or any other that fsspec knows); several nodes
    need shared storage or a URL."""
    seed: int = 0
    """The seed of the initial weights, the order of the data, and everything random in a step."""
    objective: AnyObjective
    """What is trained: the loss, the network and the data."""
    batch: BatchConfig
    """The batch sizes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning-rate schedule."""
    engine: EngineConfig = DeepSpeedConfig()
    """The library that updates the networks: DeepSpeed or Accelerate."""
    ema: EmaConfig | None = None
    """Moving average of the weights, used for samples and evaluation; null: none."""
    precision: Precision = "auto"
    """fp32, or bf16 (autocast over fp32 weights); auto: bf16 on CUDA, fp32 elsewhere."""
    device: Device = "auto"
    """The device of each worker; auto: CUDA if there are GPUs, else the CPU."""
    threads: int | None = None
    """Number of CPU threads per worker; null: torch's default, or the worker's share under Ray."""
    compile: bool = False
    """Whether to compile the networks with torch.compile."""
    stop: StopConfig
    """The limits of the run."""
    log_every: int = 10
    """Number of steps between logged metrics."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out samples, and samples to look at."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often checkpoints are saved, and which are kept."""
    tracking: TrackingConfig = TrackingConfig()
    """How metrics reach MLflow."""
    anomaly: AnomalyConfig = AnomalyConfig()
    """The reaction to losses and gradients that are not finite, and to loss spikes."""
    faults: tuple[FaultConfig, ...] = ()
    """Faults to inject, as `switchwork chaos` does."""
    profile: ProfileConfig | None = None
    """A window of steps to profile; null: none."""
    collective_timeout_s: float = 600.0
    """Seconds that a rank waits for the others in a collective operation."""
    hang_timeout_s: float | None = 1800.0
    """Seconds without progress (a step, an evaluation batch, a save) after which a rank writes its
    stack traces to the run folder and exits; null: never."""
    source: str = field(default="", repr=False)
    """Name of the job file; the command fills it in."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name is {self.name!r}; use letters, digits, '.', '_' and '-', with a letter or digit first"
            )
        if self.hang_timeout_s is not None and self.hang_timeout_s <= 0:
            raise ValueError(f"hang_timeout_s is {self.hang_timeout_s}; it must be above 0, or null for no limit")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; it must be at least 1")

    def is_bf16(self, cuda: bool) -> bool:
        """Whether matrix products run in bfloat16 on this kind of device."""
        return self.precision == "bf16" or (self.precision == "auto" and cuda)

    def ep(self, workers: int) -> int:
        """Number of ranks, out of `workers`, that share one set of experts."""
        engine, moe = self.engine, self.objective.moe
        if not isinstance(engine, DeepSpeedConfig):
            return 1
        if engine.ep != "auto":
            return engine.ep
        return math.gcd(workers, moe.experts) if moe is not None and engine.zero < 3 else 1

    def evaluation_share(self, world: World) -> Share:
        """Return this rank's share of the held-out samples."""
        micro_batch = self.evaluate.micro_batch or self.batch.micro_batch
        return Share(rank=world.rank, world=world.size, global_batch=micro_batch * world.size, micro_batch=micro_batch)

    def steps(self, tokens_per_sample: int) -> int | None:
        """Number of optimiser steps of the run; None if only the clock ends it.

        It is the smaller one of stop.steps and the steps that stop.tokens takes.
        """
        bounds = [] if self.stop.steps is None else [self.stop.steps]
        if self.stop.tokens is not None:
            if not tokens_per_sample:
                raise ValueError(
                    f"stop.tokens is {self.stop.tokens}, but {self.objective.name} has no tokens; use stop.steps"
                )
            bounds.append(-(-self.stop.tokens // (self.batch.global_batch * tokens_per_sample)))
        return min(bounds, default=None)


def check(run: RunConfig, workers: int) -> None:
    """Check that the sizes and options of `run` go together on `workers` workers.

    Raises ValueError, with both numbers and the fix, otherwise.
    """
    _check_batch(run, workers)
    _check_experts(run, workers)
    engine, objective, schedule = run.engine, run.objective, run.optimizer.schedule
    if isinstance(engine, DeepSpeedConfig) and engine.zero == 3 and objective.needs_second_derivatives:
        reason = "DeepSpeed accepts no second derivatives of sharded weights"
        raise ValueError(f"run.engine.zero: 3 with a gradient penalty: {reason}; use zero 2, or penalty 0")
    if run.steps(objective.tokens_per_sample) is None and not isinstance(schedule, Constant):
        reason = f"needs a last step, but stop has only hours {run.stop.hours}"
        advice = "set stop.steps or stop.tokens, or use the schedule constant"
        raise ValueError(f"run.optimizer.schedule: {schedule.name} {reason}; {advice}")


def _check_batch(run: RunConfig, workers: int) -> None:
    batch, group, lanes = run.batch, run.objective.group, run.objective.lanes
    forward_pass = workers * batch.micro_batch
    if batch.global_batch % forward_pass:
        fitting = max(forward_pass, batch.global_batch // forward_pass * forward_pass)
        product = f"{workers} workers x micro_batch {batch.micro_batch} = {forward_pass}"
        raise ValueError(
            f"run.batch.global_batch: {batch.global_batch} is no multiple of {product}; use {fitting}, for example"
        )
    if batch.micro_batch % group:
        samples = f"the {group} samples that stay together (routing, batch norm, packs)"
        raise ValueError(
            f"run.batch.micro_batch: {batch.micro_batch} is no multiple of {samples}; use a multiple of {group}"
        )
    if lanes is not None and lanes % workers:
        fitting = -(-lanes // workers) * workers
        raise ValueError(f"run.objective.data.lanes: {lanes} is no multiple of {workers} workers; use {fitting}")


def _check_experts(run: RunConfig, workers: int) -> None:
    engine, moe, ep = run.engine, run.objective.moe, run.ep(workers)
    if ep == 1:
        return
    if moe is None:
        raise ValueError(f"run.engine.ep: {ep}, but the model has no experts; use 1")
    if moe.experts % ep:
        advice = f"use a divisor of both {moe.experts} and {workers} workers"
        raise ValueError(f"run.engine.ep: {ep} does not divide the {moe.experts} experts; {advice}")
    if workers % ep:
        advice = f"use a divisor of both {moe.experts} experts and {workers}"
        raise ValueError(f"run.engine.ep: {ep} does not divide the {workers} workers; {advice}")
    if isinstance(engine, DeepSpeedConfig) and engine.zero == 3:
        reason = "DeepSpeed has no ZeRO 3 for experts across ranks"
        raise ValueError(f"run.engine.zero: 3 with ep {ep}: {reason}; use zero 2, or ep 1")
