"""One view of training state: every tensor of it that this rank holds, as flat pieces of tensors with global names.

EMA, checkpoints, receipts and per-layer norms are written on this view, so none of them knows a ZeRO stage.
Where several ranks hold the same elements, each owns an equal part of them: the owned parts of all ranks are the
whole state, each element once.
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
class Extent:
    """Where a local parameter lies in the whole one, and who holds the same."""

    name: str
    shape: tuple[int, ...]
    offset: int
    replica: int
    replicas: int

    def share(self, numel: int) -> slice:
        """An equal part of `numel` elements for each replica."""
        return slice(numel * self.replica // self.replicas, numel * (self.replica + 1) // self.replicas)


def extents(network: nn.Module) -> Iterator[tuple[nn.Parameter, Extent]]:
    """The parameters that this rank holds, each with its extent in the whole one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for path, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{leaf}".lstrip("."), tuple(getattr(parameter, "ds_shape", parameter.shape))
            if isinstance(module, Experts) and module.num_experts < module.total:
                ep = module.total // module.num_experts
                numel = prod(shape[1:])
                yield (
                    parameter,
                    Extent(name, (module.total, *shape[1:]), module.first_expert * numel, rank // ep, world // ep),
                )
            else:
                yield parameter, Extent(name, shape, 0, rank, world)


def persistent_buffers(network: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the network's state, by name."""
    persistent = network.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in network.named_buffers() if name in persistent]


def buffers(network: nn.Module) -> Iterator[Fragment]:
    """The buffers of a network that every rank holds whole."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, buffer in persistent_buffers(network):
        extent = Extent(name, tuple(buffer.shape), 0, rank, world)
        yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.data.view(-1), extent.share(buffer.numel()))


def weights(network: nn.Module) -> list[Fragment]:
    """Weights and buffers of a whole network in this process alone, without an optimiser."""
    fragments = list(buffers(network))
    for parameter, extent in extents(network):
        fragments.append(
            Fragment(extent.name, "weight", extent.shape, 0, parameter.data.view(-1), slice(0, parameter.numel()))
        )
    return fragments


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
