"""Expected time of a step, from the sizes of a job and the datasheet of a GPU.

A step consists of arithmetic, exchanges between ranks, and the update. An exchange costs the bytes
that a ring moves through the slowest link (NCCL's "bus bandwidth"): 2 (n - 1) / n of the bytes for
an all-reduce, and (n - 1) / n for a gather, a scatter and an all-to-all. Exchanges are not hidden
behind arithmetic, because our DeepSpeed configuration does not overlap them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from models.moe.policies import experts_per_token
from models.transformer.model import TransformerConfig
from trainer.engines.config import AccelerateConfig, DeepSpeedConfig, EngineConfig
from trainer.planning.gpus import Gpu
from trainer.planning.state_bytes import Group

_FP32 = 4
_LARGEST_KEPT = 1_000_000_000
"""stage3_max_reuse_distance: below it, ZeRO 3 gathers weights once for forward and backward."""


class Collective(StrEnum):
    """An operation in which all ranks of a group take part."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of collective in one optimiser step."""

    what: str
    kind: Collective
    size: float
    """Bytes that a rank hands to it in a step."""
    ranks: int
    inside: bool
    """Whether its ranks share a node."""

    @property
    def moved(self) -> float:
        """Bytes that leave a rank."""
        return self.size * (self.ranks - 1) / self.ranks * (2 if self.kind is Collective.ALL_REDUCE else 1)

    def seconds(self, gpu: Gpu) -> float:
        """Time over the links of `gpu`."""
        return self.moved / (gpu.link if self.inside else gpu.network)


def exchanges(
    engine: EngineConfig, groups: Sequence[Group], accumulation: int, world: int, per_node: int
) -> list[Exchange]:
    """The collectives for one network's gradients and weights."""
    found = []
    for ranks in sorted({group.ranks for group in groups}, reverse=True):
        size = _FP32 * sum(group.numel for group in groups if group.ranks == ranks)
        inside, of = world <= per_node, "experts" if ranks < world else "dense"
        if ranks > 1:
            found += [
                Exchange(what=f"{what}, {of}", kind=kind, size=size * times, ranks=ranks, inside=inside)
                for what, kind, times in _kinds(engine, size, accumulation)
            ]
    return found


def _kinds(engine: EngineConfig, size: float, accumulation: int) -> list[tuple[str, Collective, float]]:
    """(what, collective, times per step), as DeepSpeed 0.19 and DDP do them."""
    match engine:
        case AccelerateConfig():
            return [("gradients", Collective.ALL_REDUCE, accumulation)]
        case DeepSpeedConfig(zero=0):
            return [("gradients", Collective.ALL_REDUCE, 1)]
        case DeepSpeedConfig(zero=1):
            return [("gradients", Collective.ALL_REDUCE, 1), ("weights", Collective.ALL_GATHER, 1)]
        case DeepSpeedConfig(zero=2):
            return [("gradients", Collective.ALL_REDUCE, accumulation), ("weights", Collective.ALL_GATHER, 1)]
        case _:
            gathers = 1 if size <= _FP32 * _LARGEST_KEPT else 2
            return [
                ("gradients", Collective.REDUCE_SCATTER, accumulation),
                ("weights", Collective.ALL_GATHER, gathers * accumulation),
            ]


def expert_exchange(config: TransformerConfig, tokens: int, ep: int, number_size: int, per_node: int) -> list[Exchange]:
    """The all-to-all of token rows to their experts and back, in both passes.

    `tokens` are those that a rank sees per step (Lepikhin et al. 2020, section 3.2).
    """
    if config.moe is None or ep == 1:
        return []
    times = 4 + 2 * config.activation_checkpointing
    size = (
        times * len(config.moe_indices) * tokens * experts_per_token(config.moe.router) * config.d_model * number_size
    )
    return [Exchange(what="token rows", kind=Collective.ALL_TO_ALL, size=size, ranks=ep, inside=ep <= per_node)]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step."""

    arithmetic: float
    """Seconds for the model FLOPs, and for the FLOPs that activation checkpointing repeats, at the
    stated share of the peak."""
    exchange: float
    update: float
    """AdamW and autocast's copies: bytes through the GPU's memory."""
    mfu: float
    """Model FLOPs divided by time and peak (Chowdhery et al. 2022, PaLM, appendix B)."""

    @property
    def total(self) -> float:
        return self.arithmetic + self.exchange + self.update


def step_time(
    flops: float,
    again: float,
    moving: Sequence[Exchange],
    owned: float,
    copied: float,
    gpu: Gpu,
    bf16: bool,
    efficiency: float,
) -> StepTime:
    """A step of `flops` model FLOPs on this rank, `again` times them in all.

    `owned` parameters are updated here: AdamW reads weight, gradient and two moments, writes three
    of them, and the new weight is copied (9 numbers). `copied` weights are read in fp32 and written
    in bf16 for every micro-batch, summed over the step.
    """
    peak = gpu.bf16 if bf16 else gpu.fp32
    arithmetic = flops * again / (peak * efficiency)
    exchange = sum(collective.seconds(gpu) for collective in moving)
    update = (9 * _FP32 * owned + 6 * copied) / gpu.hbm
    return StepTime(
        arithmetic=arithmetic, exchange=exchange, update=update, mfu=flops / peak / (arithmetic + exchange + update)
    )
