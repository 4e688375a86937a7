"""Turns an out-of-memory error into one line that names the fields of the job to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import RunConfig
from trainer.engines.config import DeepSpeedConfig
from trainer.foreign_errors import is_out_of_memory
from trainer.parsing import one_line


class OutOfMemory(RuntimeError):
    """The job does not fit in this rank's memory."""


@contextmanager
def out_of_memory(run: RunConfig, rank: int) -> Iterator[None]:
    """Turn an out-of-memory error of the block into OutOfMemory, with advice on the job."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or is_out_of_memory(str(error))
        if isinstance(error, OutOfMemory) or not known:
            raise
        cause = one_line(error, 200) or type(error).__name__
        raise OutOfMemory(f"out of memory on rank {rank} ({cause}); use {', '.join(suggestions(run))}") from error


def suggestions(run: RunConfig) -> list[str]:
    """Return changes of the job that save memory, the cheapest first."""
    fixes: list[str] = []
    micro_batch, group, engine = run.batch.micro_batch, run.objective.group, run.engine
    if micro_batch > group:
        reason = f"a multiple of {group}; the global batch stays, and so does the result"
        fixes.append(f"run.batch.micro_batch below {micro_batch} ({reason})")
    if isinstance(engine, DeepSpeedConfig):
        if engine.zero < 2:
            fixes.append(f"run.engine.zero=2 instead of {engine.zero}")
        elif engine.zero == 2 and engine.ep == 1:
            fixes.append("run.engine.zero=3 instead of 2")
        if not engine.offload_optimizer:
            fixes.append("run.engine.offload_optimizer=true")
    return [*fixes, "more workers, or a smaller network"]
