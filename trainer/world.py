"""The rank of this process and its device. Only this file reads RANK and WORLD_SIZE."""

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
    """This process as one of `size` ranks.

    Control messages travel over gloo on the CPU, so that they never wait for a GPU.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` across the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: _T, /) -> list[_T]:
        """The `thing` of each rank in rank order, on every rank; it must be picklable and small."""
        if self.size == 1:
            return [thing]
        things = [thing] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast(self, make: Callable[[], _T]) -> _T:
        """Call `make` on rank 0 alone, and return its result on every rank.

        The result must be picklable and small.
        """
        of_ranks = self.gather([make()] if self.is_main else [])
        return of_ranks[0][0]

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks' `tensor` (n, ...) in rank order: (size * n, ...).

        The shape must be the same on all ranks.
        """
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


def choose_device(wanted: Device, local_rank: int) -> torch.device:
    """The wanted device; "auto" is CUDA where there are GPUs, else the CPU.

    Raises ValueError if torch does not see the wanted device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda, but torch sees no GPU on this machine; use auto or cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("run.device: mps, but torch sees no Apple GPU on this machine; use auto or cpu")
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if wanted == "mps" else "cpu")


def rank_and_size() -> tuple[int, int]:
    """(rank, world size) from the environment of torchrun or Ray Train; (0, 1) without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def stand_alone() -> None:
    """Remove other ranks from the environment, so that this process is a world of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@contextmanager
def joined(device: Device = "auto", threads: int | None = None, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that the environment names, and leave them at the end.

    Without torchrun or Ray Train the world has one rank.
    """
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
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else Accelerate uses a thread per core
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
