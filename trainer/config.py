"""The part of a job that a worker needs: what to train, on what, for how long, and what to write down."""

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
    """Samples of one optimiser step, over all ranks: the same for any number of them."""
    micro_batch: int
    """Samples of one forward pass on one rank; the rest of the global batch is accumulated."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ValueError(
                f"global_batch is {self.global_batch} and micro_batch {self.micro_batch}; both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When to stop: at whatever comes first."""

    steps: int | None = None
    """Optimiser steps."""
    tokens: int | None = None
    """Tokens trained on, rounded up to whole steps."""
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
    """Measures on the held-out samples, and samples to look at."""

    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    quality_every: int = 0
    """Steps between measures of the quality of samples (images, toy data); 0: only at the end."""
    sample_every: int = 0
    """Steps between samples; 0: only at the end."""
    samples: int = 2
    """How many samples."""
    micro_batch: int | None = None
    """Samples of one forward pass; null: as in training."""
    rules: RulesConfig | None = None
    """Rules over the sampled texts: the share that they refuse is logged after each sampling."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    name: str | None = None
    """Folder of the run below `root`; null: the job file's name and the next free number."""
    root: str = "runs"
    """Folder of all runs, or a URL (s3://, gs://, any that fsspec knows); several nodes need shared storage or a URL."""
    seed: int = 0
    """Decides initial weights, the order of the data, and all that is random in a step."""
    objective: AnyObjective
    """What is trained, with its network and data."""
    batch: BatchConfig
    """Batch sizes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    engine: EngineConfig = DeepSpeedConfig()
    """Who updates the network."""
    ema: EmaConfig | None = None
    """Moving average of the weights, with which samples and measures are made; null: none."""
    precision: Precision = "auto"
    """fp32, or bf16: autocast over fp32 weights; auto: bf16 on CUDA, fp32 elsewhere."""
    device: Device = "auto"
    """CUDA where there are GPUs, else the CPU; overridable."""
    threads: int | None = None
    """CPU threads of a worker; null: torch decides, or Ray's share."""
    compile: bool = False
    """Run the networks through torch.compile."""
    stop: StopConfig
    """When to stop."""
    log_every: int = 10
    """Steps between logged metrics."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation and samples."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    anomaly: AnomalyConfig = AnomalyConfig()
    """Losses and gradients that are not finite, and loss spikes."""
    faults: tuple[FaultConfig, ...] = ()
    """What is to go wrong, on purpose: see `switchwork chaos`."""
    profile: ProfileConfig | None = None
    """A window of steps to profile."""
    collective_timeout_s: float = 600.0
    """How long a rank waits for the others."""
    hang_timeout_s: float | None = 1800.0
    """No step, batch of an evaluation, or save for so long on a rank, and it leaves its stacks in the run and ends; null: it waits for good."""
    source: str = field(default="", repr=False)
    """The job file's name; filled in by the command."""

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
        """Ranks, of `workers`, that share one set of experts."""
        engine, moe = self.engine, self.objective.moe
        if not isinstance(engine, DeepSpeedConfig):
            return 1
        if engine.ep != "auto":
            return engine.ep
        return math.gcd(workers, moe.experts) if moe is not None and engine.zero < 3 else 1

    def evaluation_share(self, world: World) -> Share:
        """How the ranks of `world` divide the held-out samples."""
        micro_batch = self.evaluate.micro_batch or self.batch.micro_batch
        return Share(rank=world.rank, world=world.size, global_batch=micro_batch * world.size, micro_batch=micro_batch)

    def steps(self, tokens_per_sample: int) -> int | None:
        """Optimiser steps until the end, if it can be known: the smaller of stop.steps and what stop.tokens makes."""
        bounds = [] if self.stop.steps is None else [self.stop.steps]
        if self.stop.tokens is not None:
            if not tokens_per_sample:
                raise ValueError(
                    f"stop.tokens is {self.stop.tokens}, but {self.objective.name} has no tokens; use stop.steps"
                )
            bounds.append(-(-self.stop.tokens // (self.batch.global_batch * tokens_per_sample)))
        return min(bounds, default=None)


def check(run: RunConfig, workers: int) -> None:
    """Raises ValueError, with both numbers and the fix, for whatever does not divide or go together on `workers` workers."""
    batch, engine, moe, ep = run.batch, run.engine, run.objective.moe, run.ep(workers)
    each = workers * batch.micro_batch
    if batch.global_batch % each:
        down = max(each, batch.global_batch // each * each)
        raise ValueError(
            f"run.batch.global_batch: {batch.global_batch} is no multiple of {workers} workers x micro_batch {batch.micro_batch} = {each}; use {down}, say"
        )
    group = run.objective.group
    if batch.micro_batch % group:
        raise ValueError(
            f"run.batch.micro_batch: {batch.micro_batch} is no multiple of the {group} samples that stay together (routing, batch norm, packs); "
            f"use a multiple of {group}"
        )
    lanes = run.objective.lanes
    if lanes is not None and lanes % workers:
        raise ValueError(
            f"run.objective.data.lanes: {lanes} is no multiple of {workers} workers; use {-(-lanes // workers) * workers}"
        )
    if ep > 1:
        if moe is None:
            raise ValueError(f"run.engine.ep: {ep}, but the model has no experts; use 1")
        if moe.experts % ep:
            raise ValueError(
                f"run.engine.ep: {ep} does not divide the {moe.experts} experts; use a divisor of both {moe.experts} and {workers} workers"
            )
        if workers % ep:
            raise ValueError(
                f"run.engine.ep: {ep} does not divide the {workers} workers; use a divisor of both {moe.experts} experts and {workers}"
            )
    if isinstance(engine, DeepSpeedConfig) and engine.zero == 3 and ep > 1:
        raise ValueError(
            f"run.engine.zero: 3 with ep {ep}: DeepSpeed has no ZeRO 3 for experts over ranks; use zero 2, or ep 1"
        )
    if isinstance(engine, DeepSpeedConfig) and engine.zero == 3 and run.objective.needs_second_derivatives:
        raise ValueError(
            "run.engine.zero: 3 with a gradient penalty: DeepSpeed takes no second derivatives of sharded weights; use zero 2, or penalty 0"
        )
    schedule = run.optimizer.schedule
    if run.steps(run.objective.tokens_per_sample) is None and not isinstance(schedule, Constant):
        fix = "set stop.steps or stop.tokens, or use the schedule constant"
        raise ValueError(
            f"run.optimizer.schedule: {schedule.name} needs a last step, but stop has only hours {run.stop.hours}; {fix}"
        )
