"""Who this process is among the ranks, and where it computes. The one file that reads RANK and WORLD_SIZE."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class World:
    """This process among `size` ranks. Control messages go over gloo on the CPU, so that they never wait for a GPU."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: _T, /) -> list[_T]:
        """`thing` of each rank, on every rank, in the order of the ranks. Picklable and small."""
        if self.size == 1:
            return [thing]
        things = [thing] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast(self, make: Callable[[], _T]) -> _T:
        """The thing that `make` returns on rank 0, where alone it is called, on every rank. Picklable and small."""
        of_ranks = self.gather([make()] if self.is_main else [])
        return of_ranks[0][0]

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of `tensor` (n, ...), of one shape on all ranks, of each rank behind those of the rank before: (size * n, ...)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


def choose_device(wanted: Device, local_rank: int) -> torch.device:
    """CUDA where there are GPUs, else the CPU. Raises ValueError if what is `wanted` is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda, but torch sees no GPU on this machine; use auto or cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("run.device: mps, but torch sees no Apple GPU on this machine; use auto or cpu")
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if wanted == "mps" else "cpu")


def place_in_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun or Ray Train names them; (0, 1) where nobody does."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def stand_alone() -> None:
    """Forget what the environment says of other ranks: this process is to be a world of its own, beside others of the kind."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@contextmanager
def joined(device: Device = "auto", threads: int | None = None, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that the environment names (torchrun, Ray Train, or nobody: a world of one), and leave them at the end."""
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else Accelerate sets torch's threads to the number of cores
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
