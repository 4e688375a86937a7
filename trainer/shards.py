"""One view of training state: every tensor of it that this rank holds, as flat pieces of tensors with global names.

EMA, checkpoints, receipts and per-layer norms are written on this view, so none of them knows a ZeRO stage.
Where several ranks hold the same elements, each owns an equal part of them: the owned parts of all ranks are the
whole state, each element once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.experts import Experts
from models.random import mix

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of one tensor of training state."""

    name: str
    """The parameter's or buffer's name, with the network's in front: `model/blocks.0.attention.q.weight`."""
    kind: str
    """`weight` (fp32), `exp_avg`, `exp_avg_sq`, `step`, `buffer` or `ema`."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor, all experts included."""
    start: int
    """Offset of `values[0]` in the whole tensor, flattened."""
    values: Tensor
    """Flat 1-D view of the live state: writing to it changes the state."""
    owned: slice
    """The part of `values` that this rank saves."""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    def named(self, network: str) -> "Fragment":
        return replace(self, name=f"{network}/{self.name}")


@dataclass(frozen=True)
class _Place:
    """Where a local parameter lies in the whole one, and who holds the same."""

    name: str
    shape: tuple[int, ...]
    offset: int
    replica: int
    replicas: int

    def share(self, numel: int) -> slice:
        """An equal part of `numel` elements for each replica."""
        return slice(numel * self.replica // self.replicas, numel * (self.replica + 1) // self.replicas)


def _places(network: nn.Module) -> Iterator[tuple[nn.Parameter, _Place]]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for path, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{leaf}".lstrip("."), tuple(getattr(parameter, "ds_shape", parameter.shape))
            if isinstance(module, Experts) and module.num_experts < module.total:
                ep = module.total // module.num_experts
                each = prod(shape[1:])
                yield parameter, _Place(name, (module.total, *shape[1:]), module.first_expert * each, rank // ep, world // ep)
            else:
                yield parameter, _Place(name, shape, 0, rank, world)


def _adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of `tensor`, made as Adam's first step would make it: a run that resumes has not stepped yet."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


def _buffers(network: nn.Module) -> Iterator[Fragment]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    persistent = network.state_dict(keep_vars=True)
    for name, buffer in network.named_buffers():
        if name in persistent:
            place = _Place(name, tuple(buffer.shape), 0, rank, world)
            yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.data.view(-1), place.share(buffer.numel()))


def _pieces(place: _Place, start: int, weight: Tensor, state: dict[str, Tensor], narrow: slice, owned: slice) -> Iterator[Fragment]:
    """The fragments of one parameter: `weight`, the moments narrowed alike, and the step, owned by whoever owns element 0."""
    start += place.offset
    yield Fragment(place.name, "weight", place.shape, start, weight, owned)
    for moment in MOMENTS:
        yield Fragment(place.name, moment, place.shape, start, state[moment].view(-1)[narrow], owned)
    first = start == 0 and owned.start == 0 and owned.stop > 0
    yield Fragment(place.name, "step", (1,), 0, state["step"].view(1), slice(0, 1 if first else 0))


def weights(network: nn.Module) -> list[Fragment]:
    """Weights and buffers of a whole network in this process alone, without an optimiser."""
    fragments = list(_buffers(network))
    for parameter, place in _places(network):
        fragments.append(Fragment(place.name, "weight", place.shape, 0, parameter.data.view(-1), slice(0, parameter.numel())))
    return fragments


def replicated(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """The state of a network that every rank holds whole, its experts aside: ZeRO 0 and Accelerate."""
    fragments = list(_buffers(network))
    for parameter, place in _places(network):
        state, numel = _adam_state(optimizer, parameter), parameter.numel()
        fragments += _pieces(place, 0, parameter.data.view(-1), state, slice(0, numel), place.share(numel))
    return fragments


def zero12(network: nn.Module, optimizer: Any) -> list[Fragment]:
    """ZeRO 1 and 2: the optimiser holds an fp32 partition of all parameters in a row; `_hp_mapping` says what of each is here."""
    fragments = list(_buffers(network))
    places = dict(_places(network))
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = _adam_state(optimizer.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            here = mapping.hp_fragment_address
            narrow = slice(here.start, here.start + here.numel)
            fragments += _pieces(places[parameter], mapping.lp_fragment_address.start, flat.data[narrow], state, narrow, slice(0, here.numel))
    return fragments


def zero3(network: nn.Module, optimizer: Any) -> list[Fragment]:
    """ZeRO 3: each parameter is cut into equal pieces over the ranks, the last one padded."""
    fragments = list(_buffers(network))
    rank = dist.get_rank()
    for parameter, place in _places(network):
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * padded
        numel = max(0, min(padded, prod(place.shape) - start))
        flat = optimizer.fp32_partitioned_groups_flat[group]
        narrow = slice(offset, offset + numel)
        state = _adam_state(optimizer.optimizer, flat)
        fragments += _pieces(place, start, flat.data[narrow], state, narrow, slice(0, numel))
    return fragments


def refresh_zero3(optimizer: Any) -> None:
    """Copy the fp32 partitions into the weights' partitions, from which ZeRO 3 gathers a layer when it needs one."""
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    small = optimizer.persistent_parameters  # kept whole on every rank between steps
    if small:
        small[0].partition(small)
        small[0].all_gather(small)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 16  # elements whose intermediate values stay in a CPU's cache: a third of the time of larger ones
_CHUNK_GPU = 1 << 22


def receipt(values: Tensor, start: int) -> int:
    """A 64-bit sum of mix(index, bits) over the elements of `values`, which lie at `start` of the whole tensor.

    It does not depend on how a tensor is cut: the receipts of its parts add up, modulo 2^64, to that of the whole.
    """
    total, chunk = 0, _CHUNK_GPU if values.is_cuda else _CHUNK
    for begin in range(0, values.numel(), chunk):
        part = values[begin : begin + chunk]
        bits = part.contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        index = torch.arange(start + begin, start + begin + len(part), device=part.device)
        total += int(mix(mix(index + 1) ^ bits).sum())
    return total % (1 << 64)
