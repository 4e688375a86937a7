"""One layout of a job on a machine: a GPU's memory by part, a step's exchanges and its time."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from trainer.config import RunConfig
from trainer.core.protocols import Objective
from trainer.planning.footprint import Activations, Footprint, footprint, groups_of, parameter_count, transformer_config
from trainer.planning.gpus import Gpu
from trainer.planning.step_time import Exchange, StepTime, exchanges, expert_exchange, step_time

USABLE = 0.92
"""Share of the memory that tensors may take.

The rest is for the driver, NCCL and the allocator's gaps."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a job is planned for."""

    key: str
    """The GPU's name in gpus.yaml, or cpu."""
    gpu: Gpu
    gpus: int
    per_node: int
    efficiency: float
    """Share of the peak that matrix products reach."""
    notice_s: float
    """Seconds from the notice of a preemption to its end."""
    storage: float
    """Bytes/s that all ranks together write to `run.root`."""


class Part(StrEnum):
    """A part of a GPU's memory, in the order in which tables and pictures show them."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    MASTER = "master"
    MOMENTS = "moments"
    AVERAGES = "averages"
    TEACHER = "teacher"
    ACTIVATIONS = "activations"
    RECOMPUTED = "recomputed"
    BF16_COPIES = "bf16_copies"
    LOSS = "loss"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that one GPU needs, compared with the bytes that it has."""

    parts: Mapping[Part, float]
    """Bytes by part at balanced load; without the parts that no formula gives."""
    parts_worst: Mapping[Part, float]
    """Bytes by part at the worst load."""
    balanced: float
    """All parts at balanced load."""
    worst: float
    """All parts at the worst load."""
    usable: float
    host: float
    """CPU memory per GPU: the offloaded optimiser state and the staged checkpoint."""

    @property
    def fits_balanced(self) -> bool:
        return self.balanced <= self.usable

    @property
    def fits_worst(self) -> bool:
        return self.worst <= self.usable


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The forecast for one ZeRO stage and one number of expert-parallel ranks."""

    memory: MemoryPlan
    exchanges: tuple[Exchange, ...]
    """The collectives of one optimiser step."""
    step: StepTime | None
    """None where the objective states no FLOPs."""


def layout_of(run: RunConfig, objective: Objective, machine: Machine) -> Layout:
    """Memory, exchanges and step time of `run` as written; `objective` is from `on_meta(run)`."""
    gpu = machine.gpu
    needs = footprint(run, objective, machine.gpus, run.is_bf16(gpu.is_cuda), gpu.is_cuda)
    memory = MemoryPlan(
        parts=_parts(needs, needs.balanced),
        parts_worst=_parts(needs, needs.worst),
        balanced=needs.total(False),
        worst=needs.total(True),
        usable=USABLE * gpu.memory,
        host=sum(state.host for state in needs.states.values()) + checkpoint_bytes(run, objective) / machine.gpus,
    )
    if not objective.flops_per_sample:
        return Layout(memory=memory, exchanges=(), step=None)
    moving = _exchanges(run, objective, machine)
    return Layout(memory=memory, exchanges=moving, step=_step(run, objective, machine, needs, moving))


def checkpoint_bytes(run: RunConfig, objective: Objective) -> int:
    """Bytes of a checkpoint: weights and two moments in fp32, moving averages and buffers."""
    counts = {name: parameter_count(network) for name, network in objective.networks.items()}
    averaged = sum(counts[name] for name in objective.averaged) if run.ema else 0
    buffers = sum(buffer.nbytes for network in objective.networks.values() for buffer in network.buffers())
    return 12 * sum(counts.values()) + 4 * averaged + buffers


def _parts(needs: Footprint, activations: Activations | None) -> dict[Part, float]:
    """Bytes by part, summed over networks."""
    states = needs.states.values()
    parts: dict[Part, float] = {
        Part.PARAMETERS: sum(state.parameters for state in states),
        Part.GRADIENTS: sum(state.gradients for state in states),
        Part.MASTER: sum(state.master for state in states),
        Part.MOMENTS: sum(state.moments for state in states),
        Part.AVERAGES: needs.averages,
        Part.TEACHER: needs.teacher,
    }
    if activations is not None:
        kept = activations.kept
        parts[Part.ACTIVATIONS] = kept.activations
        parts[Part.RECOMPUTED] = kept.recomputed
        parts[Part.BF16_COPIES] = kept.weight_copies
        parts[Part.LOSS] = activations.loss
        parts[Part.ALL_TO_ALL] = activations.all_to_all
    return parts


def _exchanges(run: RunConfig, objective: Objective, machine: Machine) -> tuple[Exchange, ...]:
    """The collectives of a step: gradients and weights of every network, then rows of experts."""
    accumulation = run.batch.global_batch // (machine.gpus * run.batch.micro_batch)
    moving: list[Exchange] = []
    for groups in groups_of(run, objective, machine.gpus).values():
        moving += exchanges(run.engine, groups, accumulation, machine.gpus, machine.per_node)
    config = transformer_config(objective)
    if config is not None:
        tokens = run.batch.global_batch // machine.gpus * objective.tokens_per_sample
        number_size = 2 if run.is_bf16(machine.gpu.is_cuda) else 4
        moving += expert_exchange(config, tokens, run.ep(machine.gpus), number_size, machine.per_node)
    return tuple(moving)


def _step(
    run: RunConfig, objective: Objective, machine: Machine, needs: Footprint, moving: tuple[Exchange, ...]
) -> StepTime:
    config, samples = transformer_config(objective), run.batch.global_batch // machine.gpus
    passes, copied = 1.0, 0.0
    if config is not None:
        accumulation = run.batch.global_batch // (machine.gpus * run.batch.micro_batch)
        passes = 4 / 3 if config.activation_checkpointing else 1.0
        passes += objective.frozen_flops_per_sample / objective.flops_per_sample
        copied = accumulation * (needs.balanced.kept.weight_copies / 2 if needs.balanced else 0.0)
    owned = sum(state.owned for state in needs.states.values())
    flops, bf16 = objective.flops_per_sample * samples, run.is_bf16(machine.gpu.is_cuda)
    return step_time(flops, passes, moving, owned, copied, machine.gpu, bf16, machine.efficiency)
