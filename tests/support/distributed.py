"""Any function becomes a test on real ranks: `run_distributed(fn, world_size, *args)`.

It starts processes that talk over gloo.
"""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

from trainer.world import joined, open_rendezvous

# The server that the ranks are forked from has imported once what takes seconds to import.
torch.multiprocessing.set_forkserver_preload(
    [
        "trainer.worker.main",
        "trainer.engines.deepspeed_engine",
        "trainer.engines.expert_parallel",
        "data.text.collate",
    ]
)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return the result of `fn(world, *args)` on each rank.

    `fn` is a function of a module that the processes can import, `world` a trainer.world.World.
    """
    store, address = open_rendezvous("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (world_size, address, folder, fn, args), nprocs=world_size, start_method="forkserver"
        )
        del store
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, address: dict[str, str], folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with joined(threads=1, timeout_s=120) as world:
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(fn(world, *args)))
