"""The whole plan of a job before it starts, as `switchwork plan` prints it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm

from models.transformer.cost import parameters
from models.transformer.model import Transformer
from trainer.config import RunConfig, check
from trainer.core.protocols import Objective
from trainer.engines.config import DeepSpeedConfig
from trainer.planning.footprint import on_meta, parameter_count, transformer_config
from trainer.planning.layout import USABLE, Layout, Machine, MemoryPlan, checkpoint_bytes, layout_of
from trainer.planning.step_time import StepTime


@dataclass(frozen=True, kw_only=True)
class Division:
    """A number that another must divide."""

    what: str
    number: int
    by: str
    divisor: int

    @property
    def good(self) -> bool:
        return self.number % self.divisor == 0


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """The cost of one token of a transformer."""

    total: int
    """All parameters."""
    active: float
    """Parameters that one token uses."""
    flops_per_token: float
    """Training FLOPs per token."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters of the networks."""

    networks: Mapping[str, int]
    """Parameters by network."""
    transformer: TokenCost | None
    """Cost of a token; None if the network is no transformer."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Throughput of the run."""

    samples_per_s: float
    tokens_per_s: float | None
    """None for an objective without tokens."""
    tokens_per_day: float | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """The run's end, as its first stopping condition sets it."""

    steps: float
    samples: float
    tokens: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """One checkpoint, and whether it can be completed between a preemption's notice and its end."""

    size: int
    """Bytes of the checkpoint."""
    copy_s: float
    write_s: float
    notice_s: float

    @property
    def in_time(self) -> bool:
        return self.copy_s + self.write_s <= self.notice_s


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A ZeRO stage and a number of expert-parallel ranks that the job could run with."""

    zero: int
    ep: int
    memory: MemoryPlan
    step: StepTime | None

    @property
    def seconds(self) -> float | None:
        """Seconds per step."""
        return None if self.step is None else self.step.total


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast for a job that can be built."""

    layout: Layout
    """The layout that the job asks for."""
    rates: Rates | None
    """None where the objective states no FLOPs."""
    target: Target | None
    """None where the objective states no FLOPs."""
    checkpoint: CheckpointPlan
    candidates: tuple[Candidate, ...]
    """The layouts that the job could have instead."""

    @property
    def choice(self) -> Candidate | None:
        """The fastest candidate that fits at the worst load, or else at the balanced load.

        Among equals, the lowest stage and then the smallest EP.
        """
        fitting = [candidate for candidate in self.candidates if candidate.memory.fits_worst]
        fitting = fitting or [candidate for candidate in self.candidates if candidate.memory.fits_balanced]
        return min(
            fitting,
            key=lambda candidate: (round(candidate.seconds or 0.0, 6), candidate.zero, candidate.ep),
            default=None,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan of a job on a machine."""

    machine: Machine
    divisions: tuple[Division, ...]
    parameters: ParameterCounts
    forecast: Forecast | None
    """None for a job that would be refused."""
    reasons: tuple[str, ...]
    """Reasons for the verdict, in words."""
    unknown: tuple[str, ...]
    """Quantities that the plan cannot know, in words."""

    @property
    def verdict(self) -> bool:
        return self.forecast is not None and self.forecast.layout.memory.fits_balanced


def estimate(run: RunConfig, machine: Machine) -> Plan:
    """Plan `run` on `machine`. Raises ValueError for a job that cannot be built at all."""
    objective = on_meta(run)
    refusal = _refusal(run, machine.gpus)
    forecast = None if refusal is not None else _forecast(run, objective, machine)
    return Plan(
        machine=machine,
        divisions=tuple(_divisions(run, objective, machine)),
        parameters=_parameters(objective),
        forecast=forecast,
        reasons=(refusal,) if refusal is not None else () if forecast is None else tuple(_reasons(forecast, machine)),
        unknown=tuple(_unknown(run, objective, machine)),
    )


def _refusal(run: RunConfig, workers: int) -> str | None:
    """The error with which the job would be refused on `workers` workers; None if accepted."""
    try:
        check(run, workers)
    except ValueError as error:
        return str(error)
    return None


def _forecast(run: RunConfig, objective: Objective, machine: Machine) -> Forecast:
    layout = layout_of(run, objective, machine)
    return Forecast(
        layout=layout,
        rates=None if layout.step is None else _rates(run, objective, layout.step),
        target=None if layout.step is None else _target(run, objective, machine, layout.step),
        checkpoint=_checkpoint(run, objective, machine),
        candidates=tuple(_candidates(run, objective, machine)),
    )


def _divisions(run: RunConfig, objective: Objective, machine: Machine) -> Iterator[Division]:
    """All pairs of numbers of which one must divide the other."""
    config, batch, workers = transformer_config(objective), run.batch, machine.gpus
    together = f"{workers} workers x micro-batch {batch.micro_batch}"
    yield Division(what="global batch", number=batch.global_batch, by=together, divisor=workers * batch.micro_batch)
    yield Division(what="micro-batch", number=batch.micro_batch, by="routing group", divisor=objective.group)
    yield Division(what="lanes", number=run.objective.lanes or lcm(8, workers), by="workers", divisor=workers)
    if config is not None and config.moe is not None:
        yield Division(what="experts", number=config.moe.experts, by="EP", divisor=run.ep(workers))
        yield Division(what="workers", number=workers, by="EP", divisor=run.ep(workers))


def _parameters(objective: Objective) -> ParameterCounts:
    networks = {name: parameter_count(network) for name, network in objective.networks.items()}
    model, cost = objective.networks.get("model"), None
    if isinstance(model, Transformer):
        counted = parameters(model.config, model.vocab_size)
        flops = objective.flops_per_sample / objective.tokens_per_sample
        cost = TokenCost(total=counted.total, active=counted.active, flops_per_token=flops)
    return ParameterCounts(networks=networks, transformer=cost)


def _rates(run: RunConfig, objective: Objective, step: StepTime) -> Rates:
    samples, tokens = run.batch.global_batch / step.total, objective.tokens_per_sample
    return Rates(
        samples_per_s=samples,
        tokens_per_s=samples * tokens if tokens else None,
        tokens_per_day=86400 * samples * tokens if tokens else None,
    )


def _target(run: RunConfig, objective: Objective, machine: Machine, step: StepTime) -> Target:
    """The run's totals when the first of its limits stops it."""
    bounds = [] if run.stop.hours is None else [run.stop.hours * 3600 / step.total]
    steps = run.steps(objective.tokens_per_sample)
    total = min([*bounds, *([] if steps is None else [steps])])
    hours = total * step.total / 3600
    samples = total * run.batch.global_batch
    return Target(
        steps=total,
        samples=samples,
        tokens=samples * objective.tokens_per_sample,
        hours=hours,
        gpu_hours=hours * machine.gpus,
    )


def _checkpoint(run: RunConfig, objective: Objective, machine: Machine) -> CheckpointPlan:
    size = checkpoint_bytes(run, objective)
    copy_s = size / machine.gpus / machine.gpu.host
    return CheckpointPlan(size=size, copy_s=copy_s, write_s=size / machine.storage, notice_s=machine.notice_s)


def _candidates(run: RunConfig, objective: Objective, machine: Machine) -> Iterator[Candidate]:
    """Every ZeRO stage and EP size that the job could run with on this machine."""
    if not isinstance(run.engine, DeepSpeedConfig):
        return
    config = transformer_config(objective)
    experts = config.moe.experts if config is not None and config.moe is not None else 1
    common = gcd(experts, machine.gpus)
    for ep in [ep for ep in range(1, common + 1) if common % ep == 0]:
        for zero in (0, 1, 2, 3):
            engine = replace(run.engine, zero=zero, ep=ep, offload_optimizer=run.engine.offload_optimizer and zero > 0)
            changed = replace(run, engine=engine)
            if _refusal(changed, machine.gpus) is None:
                layout = layout_of(changed, objective, machine)
                yield Candidate(zero=zero, ep=ep, memory=layout.memory, step=layout.step)


def _reasons(forecast: Forecast, machine: Machine) -> Iterator[str]:
    """Reasons for the verdict, in words."""
    memory, checkpoint, choice = forecast.layout.memory, forecast.checkpoint, forecast.choice
    for load, needed, fits in (
        ("balanced", memory.balanced, memory.fits_balanced),
        ("worst", memory.worst, memory.fits_worst),
    ):
        verb = "fits into" if fits else "does not fit into"
        need = f"{needed / 1e9:.2f} GB at {load} load"
        yield f"{need} {verb} {memory.usable / 1e9:.2f} GB, {USABLE:.0%} of a {machine.key}"
    if not memory.fits_balanced and choice is not None:
        yield f"zero {choice.zero} and ep {choice.ep} would fit"
    elif not memory.fits_balanced:
        yield "no ZeRO stage and EP size fits: use more GPUs, a smaller micro-batch or activation_checkpointing"
    if not checkpoint.in_time:
        seconds = checkpoint.copy_s + checkpoint.write_s
        yield (
            f"a checkpoint takes {seconds:.0f} s, the notice of a preemption {machine.notice_s:.0f} s: "
            "what was done since the last one is lost"
        )


def _unknown(run: RunConfig, objective: Objective, machine: Machine) -> Iterator[str]:
    """Quantities that the plan cannot know, in words."""
    config, name = transformer_config(objective), run.objective.name
    yield (
        f"the share of the peak that kernels reach: {machine.efficiency:.0%} is assumed (--efficiency); "
        "a short run on one node tells"
    )
    yield "gaps of the memory allocator, NCCL's buffers and CUDA graphs: the 8 % left free stand for them"
    yield "whether the data keep up, and what else uses the network and the storage"
    if config is None:
        yield (
            f"what the forward and backward passes of {name} keep in memory: "
            "only weights, gradients, optimiser and checkpoint are counted"
        )
    if config is not None and config.moe is not None:
        yield "how unevenly tokens choose experts: the step time is that of the balanced load"
    if objective.frozen_bytes:
        yield (
            "what the teacher's forward pass and the softened distributions hold for a moment: "
            "of the teacher only the weights are counted"
        )
    if run.compile:
        yield "what torch.compile saves: the activations are those of eager mode"
    if not objective.flops_per_sample:
        yield f"the FLOPs of {name}: its objective states no formula, so there is no step time"
