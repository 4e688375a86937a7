"""One view of training state: each tensor that this rank holds, as flat pieces with global names.

EMA, checkpoints, receipts and per-layer norms are written on this view, so none of them depends on
a ZeRO stage. Where several ranks hold the same elements, each owns an equal part of them. The owned
parts of all ranks are the whole state, each element once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.moe.experts import Experts
from models.random import mix

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of one tensor of training state."""

    name: str
    """The parameter's or buffer's name, with the network's name in front, such as
    `model/blocks.0.attention.q.weight`."""
    kind: str
    """`weight` (fp32), `exp_avg`, `exp_avg_sq`, `step`, `buffer` or `ema`."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor, including all experts."""
    start: int
    """Offset of `values[0]` in the whole tensor, flattened."""
    values: Tensor
    """Flat 1-D view of the live state; writing to it changes the state."""
    owned: slice
    """The part of `values` that this rank saves."""

    @property
    def key(self) -> str:
        """The tensor's key in a checkpoint, `KIND/NETWORK/NAME`."""
        return f"{self.kind}/{self.name}"

    def named(self, network: str) -> "Fragment":
        """This fragment with the name of its network in front of its own."""
        return replace(self, name=f"{network}/{self.name}")


@dataclass(frozen=True)
class Extent:
    """The range of a whole parameter that a local parameter holds, and the ranks that share it."""

    name: str
    """Name of the parameter in its network."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, including all experts."""
    offset: int
    """Offset of the local parameter in the whole one, flattened."""
    replica: int
    """Index of this rank among the ranks that hold the same range."""
    replicas: int
    """Number of ranks that hold the same range."""

    def share(self, numel: int) -> slice:
        """This replica's equal part of `numel` elements."""
        return slice(numel * self.replica // self.replicas, numel * (self.replica + 1) // self.replicas)


def extents(network: nn.Module) -> Iterator[tuple[nn.Parameter, Extent]]:
    """The parameters that this rank holds, each with its extent in the whole parameter."""
    rank, world = _rank_and_world()
    for path, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".lstrip(".")
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if isinstance(module, Experts) and module.num_experts < module.total:
                ep = module.total // module.num_experts
                offset = module.first_expert * prod(shape[1:])
                yield parameter, Extent(name, (module.total, *shape[1:]), offset, rank // ep, world // ep)
            else:
                yield parameter, Extent(name, shape, 0, rank, world)


def _rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def persistent_buffers(network: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the state of `network`, with their names."""
    persistent = network.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in network.named_buffers() if name in persistent]


def buffers(network: nn.Module) -> Iterator[Fragment]:
    """The persistent buffers of `network`, which every rank holds whole."""
    rank, world = _rank_and_world()
    for name, buffer in persistent_buffers(network):
        extent = Extent(name, tuple(buffer.shape), 0, rank, world)
        yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.data.view(-1), extent.share(buffer.numel()))


def weights(network: nn.Module) -> list[Fragment]:
    """The weights and buffers of a network that this process holds whole, without an optimiser."""
    fragments = list(buffers(network))
    for parameter, extent in extents(network):
        values = parameter.data.view(-1)
        fragments.append(Fragment(extent.name, "weight", extent.shape, 0, values, slice(0, parameter.numel())))
    return fragments


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The intermediate values of so few elements stay in a CPU's cache: three times as fast as more.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 22


def receipt(values: Tensor, start: int) -> int:
    """A 64-bit sum of mix(index, bits) over `values`, whose offset in the whole tensor is `start`.

    It does not depend on how a tensor is cut: the receipts of its parts add up, modulo 2^64, to the
    receipt of the whole.
    """
    total = 0
    chunk = _CHUNK_GPU if values.is_cuda else _CHUNK_CPU
    for begin in range(0, values.numel(), chunk):
        part = values[begin : begin + chunk]
        bits = part.contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        index = torch.arange(start + begin, start + begin + len(part), device=part.device)
        total += int(mix(mix(index + 1) ^ bits).sum())
    return total % (1 << 64)
