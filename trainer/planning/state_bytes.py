"""Bytes of training state on one rank, by part, from the sizes of the parameters alone.

The parts are weights, gradients, fp32 copies and moments. The formulas are those of Rajbhandari et
al. 2020 (ZeRO, section 3.1 and figure 1) for fp32 weights, plus the buffers that DeepSpeed 0.19
really holds: flat partitions padded to 2 elements per rank, the bucket in which gradients are
reduced, and copies made around a collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from torch import nn

from models.moe.experts import Experts
from trainer.engines.config import LARGEST_BUCKET, AccelerateConfig, DeepSpeedConfig, EngineConfig
from trainer.engines.optim import OptimizerConfig, parameter_groups

_FP32 = 4
_ALL_REDUCE_BUFFER = 500_000_000  # elements that DeepSpeed copies together at ZeRO 0
_LARGEST_GATHERED = 1_000_000_000  # stage3_max_live_parameters: what ZeRO 3 keeps gathered


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed keeps in one flat row."""

    sizes: tuple[int, ...]
    """Elements of each parameter on this rank, in order."""
    ranks: int
    """Ranks that hold the same parameters: all ranks, or world / EP for experts."""

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    @property
    def partition(self) -> int:
        """Elements that each rank owns: the row is padded to two for each rank."""
        return ceil(self.numel / (2 * self.ranks)) * 2


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes on one rank; the largest number across ranks where they differ."""

    parameters: int
    gradients: int
    """Largest bytes of the gradients, in the backward pass or the update, buckets included."""
    master: int
    """fp32 copies of the weights that ZeRO >= 1 keeps of its partition."""
    moments: int
    host: int
    """Bytes of the offloaded optimiser in CPU memory."""
    owned: int
    """Elements (not bytes) that this rank updates, of which it would keep moving averages."""

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.master + self.moments


def optimizer_groups(network: nn.Module, optimizer: OptimizerConfig, world: int, ep: int) -> list[Group]:
    """The rows of `network` once `ep` ranks share its experts.

    The network holds all its experts and may be on the `meta` device.
    """
    experts = (
        {
            id(parameter)
            for module in network.modules()
            if isinstance(module, Experts)
            for parameter in module.parameters()
        }
        if ep > 1
        else set()
    )
    groups = []
    for group in parameter_groups(network, optimizer):
        dense = tuple(parameter.numel() for parameter in group["params"] if id(parameter) not in experts)
        sharded = tuple(parameter.numel() // ep for parameter in group["params"] if id(parameter) in experts)
        groups += [Group(sizes, ranks) for sizes, ranks in ((dense, world), (sharded, world // ep)) if sizes]
    return groups


def training_state(engine: EngineConfig, groups: Sequence[Group], accumulation: int) -> State:
    """State of one network with `groups`, for steps of `accumulation` micro-batches."""
    numel = sum(group.numel for group in groups)
    match engine:
        case AccelerateConfig():
            copies = 1 + (max(group.ranks for group in groups) > 1)  # DDP's buckets are a second copy
            return State(
                parameters=_FP32 * numel,
                gradients=copies * _FP32 * numel,
                master=0,
                moments=2 * _FP32 * numel,
                host=0,
                owned=numel,
            )
        case DeepSpeedConfig(zero=0):
            gradients = numel + min(_ALL_REDUCE_BUFFER, _largest_reduced(groups))
            return State(
                parameters=_FP32 * numel,
                gradients=_FP32 * gradients,
                master=0,
                moments=2 * _FP32 * numel,
                host=0,
                owned=numel,
            )
        case DeepSpeedConfig(zero=3):
            return _zero3(engine, groups)
        case _:
            return _zero12(engine, groups, accumulation)


def _largest_reduced(groups: Sequence[Group]) -> int:
    """Elements of the largest set that is reduced across the same ranks.

    DeepSpeed copies it into one row, even for a group of one rank.
    """
    sums: dict[int, int] = {}
    for group in groups:
        sums[group.ranks] = sums.get(group.ranks, 0) + group.numel
    return max(sums.values()) if max(sums) > 1 else 0


def _zero12(engine: DeepSpeedConfig, groups: Sequence[Group], accumulation: int) -> State:
    numel, largest = sum(group.numel for group in groups), max(max(group.sizes) for group in groups)
    partition, touched = sum(group.partition for group in groups), sum(_largest_touched(group) for group in groups)
    bucket = min(numel, LARGEST_BUCKET)
    if engine.zero == 1:
        # All gradients stay until the last micro-batch, whose own come one by one. The partition's
        # gradients are then copied out of the bucket.
        gradients = numel + max(bucket + largest * (accumulation > 1), touched)
    else:
        # Parameters of which this rank owns a part keep whole gradients: of this micro-batch, and
        # of the micro-batches before it.
        copy = max(min(bucket, _largest_reduced(groups)), largest)
        gradients = bucket + max(touched * (2 if accumulation > 1 else 1), copy + touched * (accumulation > 1))
    row = _FP32 * sum(group.partition * group.ranks for group in groups)
    master, moments = _FP32 * partition, 2 * _FP32 * partition
    if engine.offload_optimizer:
        return State(
            parameters=row,
            gradients=_FP32 * gradients,
            master=0,
            moments=0,
            host=master + moments + _FP32 * partition,
            owned=partition,
        )
    return State(parameters=row, gradients=_FP32 * gradients, master=master, moments=moments, host=0, owned=partition)


def _zero3(engine: DeepSpeedConfig, groups: Sequence[Group]) -> State:
    numel, largest = sum(group.numel for group in groups), max(max(group.sizes) for group in groups)
    partition = sum(ceil(size / group.ranks) for group in groups for size in group.sizes)
    bucket = min(numel, LARGEST_BUCKET)
    # The bucket, its copy in the order of ranks, and the partition's gradients. The update holds a
    # second row of the partition's gradients.
    gradients = bucket + partition + max(min(bucket, numel), largest, partition)
    parameters, master = _FP32 * (partition + min(numel, _LARGEST_GATHERED)), _FP32 * partition
    if engine.offload_optimizer:
        return State(
            parameters=parameters,
            gradients=_FP32 * (gradients - partition),
            master=0,
            moments=0,
            host=4 * master,
            owned=partition,
        )
    return State(
        parameters=parameters, gradients=_FP32 * gradients, master=master, moments=2 * master, host=0, owned=partition
    )


def _largest_touched(group: Group) -> int:
    """Elements of all parameters of which a rank owns a part; the largest number across ranks."""
    ends, position = [], 0
    for size in group.sizes:
        ends.append((position, position + size))
        position += size
    width = group.partition
    most = first = 0
    for rank in range(group.ranks):
        start, stop = rank * width, (rank + 1) * width
        while first < len(ends) and ends[first][1] <= start:
            first += 1
        touched, index = 0, first
        while index < len(ends) and ends[index][0] < stop:
            touched += ends[index][1] - ends[index][0]
            index += 1
        most = max(most, touched)
    return most
