"""The training state of one network as fragments, for each way in which an engine keeps it.

Only this module and deepspeed_engine.py read DeepSpeed's private state. The rest of the trainer
calls `engine.fragments()`.
"""

from collections.abc import Iterator
from math import prod
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.fragments import MOMENTS, Extent, Fragment, buffers, extents


class _Address(Protocol):
    """A range of a flat tensor."""

    start: int
    numel: int


class _Mapping(Protocol):
    """The place of this rank's piece of a parameter.

    `lp` addresses the flattened parameter, `hp` this rank's fp32 partition.
    """

    lp_fragment_address: _Address
    hp_fragment_address: _Address


class _Mapped(Protocol):
    """A parameter under ZeRO 1 or 2."""

    _hp_mapping: _Mapping | None
    """The place of this rank's piece of the parameter; None if this rank owns no part of it."""


class Zero12Optimizer(Protocol):
    """The attributes of DeepSpeed's optimiser that are read at ZeRO 1 and 2."""

    optimizer: torch.optim.Optimizer
    bit16_groups: list[list[nn.Parameter]]
    single_partition_of_fp32_groups: list[Tensor]


class _Persistent(Protocol):
    """A parameter under ZeRO 3."""

    def partition(self, parameters: "list[_Persistent]") -> None: ...
    def all_gather(self, parameters: "list[_Persistent]") -> None: ...


class Zero3Optimizer(Protocol):
    """The attributes of DeepSpeed's optimiser that are used at ZeRO 3."""

    optimizer: torch.optim.Optimizer
    grad_position: dict[int, tuple[int, int, int]]
    """Group, offset in the group's partition and number of elements of each parameter's piece.

    The number includes padding; the key is the parameter's id.
    """
    fp32_partitioned_groups_flat: list[Tensor]
    persistent_parameters: list[_Persistent]

    def get_param_id(self, parameter: nn.Parameter) -> int: ...
    def _reassign_or_swap_out_partitioned_parameters(self, group: int) -> None: ...


def _adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of `tensor`.

    A resumed run has not stepped yet, so the state is created as Adam's first step would create it.
    """
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


def _pieces(
    extent: Extent, start: int, weight: Tensor, state: dict[str, Tensor], narrow: slice, owned: slice
) -> Iterator[Fragment]:
    """The fragments of one parameter: `weight`, the moments at `narrow`, and the step.

    The rank that owns element 0 of the parameter owns the step.
    """
    start += extent.offset
    yield Fragment(extent.name, "weight", extent.shape, start, weight, owned)
    for moment in MOMENTS:
        yield Fragment(extent.name, moment, extent.shape, start, state[moment].view(-1)[narrow], owned)
    first = start == 0 and owned.start == 0 and owned.stop > 0
    yield Fragment(extent.name, "step", (1,), 0, state["step"].view(1), slice(0, 1 if first else 0))


def replicated(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """The state of a network that every rank holds whole, but for experts: ZeRO 0, Accelerate."""
    fragments = list(buffers(network))
    for parameter, extent in extents(network):
        state = _adam_state(optimizer, parameter)
        numel = parameter.numel()
        fragments += _pieces(extent, 0, parameter.data.view(-1), state, slice(0, numel), extent.share(numel))
    return fragments


def zero12(network: nn.Module, optimizer: Zero12Optimizer) -> list[Fragment]:
    """The state of a network at ZeRO 1 and 2.

    The optimiser holds a partition, in fp32, of the concatenated parameters of a group;
    `_hp_mapping` gives this rank's piece of each parameter.
    """
    fragments = list(buffers(network))
    extents_of = dict(extents(network))
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = _adam_state(optimizer.optimizer, flat)
        for parameter in group:
            mapping = cast(_Mapped, parameter)._hp_mapping
            if mapping is None:
                continue
            piece = mapping.hp_fragment_address
            narrow = slice(piece.start, piece.start + piece.numel)
            fragments += _pieces(
                extents_of[parameter],
                mapping.lp_fragment_address.start,
                flat.data[narrow],
                state,
                narrow,
                slice(0, piece.numel),
            )
    return fragments


def zero3(network: nn.Module, optimizer: Zero3Optimizer) -> list[Fragment]:
    """The state of a network at ZeRO 3.

    Each parameter is cut into equal pieces, one per rank; the last piece is padded.
    """
    fragments = list(buffers(network))
    rank = dist.get_rank()
    for parameter, extent in extents(network):
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * padded
        numel = max(0, min(padded, prod(extent.shape) - start))
        flat = optimizer.fp32_partitioned_groups_flat[group]
        narrow = slice(offset, offset + numel)
        state = _adam_state(optimizer.optimizer, flat)
        fragments += _pieces(extent, start, flat.data[narrow], state, narrow, slice(0, numel))
    return fragments


def refresh_zero3(optimizer: Zero3Optimizer) -> None:
    """Copy the fp32 partitions into the partitions of the weights.

    ZeRO 3 gathers a layer from those partitions when it needs the layer.
    """
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    small = optimizer.persistent_parameters  # kept whole on every rank between steps
    if small:
        small[0].partition(small)
        small[0].all_gather(small)
