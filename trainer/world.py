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

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
RANK_VARIABLES = (*_ALONE, "TORCHELASTIC_USE_AGENT_STORE")
"""The environment variables by which torchrun and Ray Train tell a process which rank it is."""


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
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@contextmanager
def joined(device: Device = "auto", threads: int | None = None, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that the environment names, and leave them and no trace of them at the end.

    Without torchrun or Ray Train the world has one rank, which needs no port of the machine.
    """
    rank, size = rank_and_size()
    outside = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        for name, value in _ALONE.items():
            os.environ.setdefault(name, value)  # DeepSpeed looks for an MPI launcher if one of them is missing
        local_rank = int(os.environ["LOCAL_RANK"])
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
            store = dist.HashStore() if size == 1 else None
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, before in outside.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def open_rendezvous(ip: str) -> tuple[dist.TCPStore, dict[str, str]]:
    """The store at which ranks meet, on this machine, and the variables by which they find it.

    The store listens before any rank knows its port, so that no other process can take the port
    in between. It must be kept for as long as the ranks need it.
    """
    store = dist.TCPStore(ip, 0, is_master=True, wait_for_workers=False)
    return store, {"MASTER_ADDR": ip, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def free_port() -> int:
    """A port of this machine on which nothing listens.

    Another process may take it before the caller does. Where that may happen, let the listener
    choose its port.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
