"""Running out of memory, in one line: what was asked for, and what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import RunConfig
from trainer.engines.config import DeepSpeedConfig
from trainer.foreign_errors import is_out_of_memory
from trainer.parsing import one_line


class OutOfMemory(RuntimeError):
    """A rank has not the memory for the job."""


@contextmanager
def out_of_memory(run: RunConfig, rank: int) -> Iterator[None]:
    """Raises OutOfMemory, which says what to change in the job, for whatever runs out of memory in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or is_out_of_memory(str(error))
        if isinstance(error, OutOfMemory) or not known:
            raise
        cause = one_line(error, 200) or type(error).__name__
        raise OutOfMemory(f"out of memory on rank {rank} ({cause}); use {', '.join(suggestions(run))}") from error


def suggestions(run: RunConfig) -> list[str]:
    """Fields of the job that would need less memory, the cheapest first."""
    fixes, batch, engine = [], run.batch, run.engine
    if batch.micro_batch > run.objective.group:
        fixes.append(
            f"run.batch.micro_batch below {batch.micro_batch} (a multiple of {run.objective.group}; the global batch stays, and so does the result)"
        )
    if isinstance(engine, DeepSpeedConfig):
        if engine.zero < 2:
            fixes.append(f"run.engine.zero=2 instead of {engine.zero}")
        elif engine.zero == 2 and engine.ep == 1:
            fixes.append("run.engine.zero=3 instead of 2")
        if not engine.offload_optimizer:
            fixes.append("run.engine.offload_optimizer=true")
    return [*fixes, "more workers, or a smaller network"]
