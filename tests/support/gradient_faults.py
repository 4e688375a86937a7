"""Faults between the loss and the optimiser, planted in worker processes.

Each is planted where such a fault would really sit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def none() -> Iterator[None]:
    """Nothing is wrong."""
    yield


@contextmanager
def renormalised_gate() -> Iterator[None]:
    """The gate of the one chosen expert is divided by its own sum, 1 (Megatron-LM#894)."""
    from models.moe import policies as routing
    from models.moe import router

    def renormalised(logits_GNE: Tensor) -> Any:
        found = routing.switch(logits_GNE)
        return found._replace(gate_GA=found.gate_GA / found.gate_GA)

    with patch.object(router, "switch", renormalised):
        yield


@contextmanager
def bf16_router() -> Iterator[None]:
    """The router's scores are computed in bfloat16."""
    from models.moe.router import Router

    def coarse(self: Any, x_GND: Tensor, weight_ED: Tensor) -> Tensor:
        return F.linear(x_GND.bfloat16(), weight_ED.bfloat16()).float()

    with patch.object(Router, "_linear", coarse):
        yield


@contextmanager
def missing_all_reduce() -> Iterator[None]:
    """Under ZeRO 0 the ranks of the first half of the experts do not add up their gradients.

    The ranks of the other half do.
    """
    from trainer.engines.lean_deepspeed import deepspeed

    whole = deepspeed.DeepSpeedEngine._reduce_expert_gradients

    def half(self: Any, *args: Any) -> None:
        if deepspeed.utils.groups._get_expert_parallel_rank("ep_size_2") > 0:
            whole(self, *args)

    with patch.object(deepspeed.DeepSpeedEngine, "_reduce_expert_gradients", half):
        yield


@contextmanager
def wrong_accumulation() -> Iterator[None]:
    """DeepSpeed divides by the accumulation once more, as it does unless told otherwise."""
    from trainer.engines.deepspeed_engine import DeepSpeedEngine

    def divided(self: Any, loss: Tensor) -> None:
        with patch.object(self.engine, "gradient_accumulation_steps", lambda: 2):
            self.engine.backward(loss)

    with patch.object(DeepSpeedEngine, "backward", divided):
        yield


@contextmanager
def detached_branch() -> Iterator[None]:
    """What the attention of the last block gives carries no gradient."""
    from models.transformer.model import Block

    with _replaced(Block, "__init__", _detach_attention):
        yield


def _detach_attention(whole: Callable[..., None], self: Any, config: Any, index: int) -> None:
    whole(self, config, index)
    if index == config.layers - 1:
        self.attention.register_forward_hook(lambda module, args, output: output.detach())


@contextmanager
def stale_shard() -> Iterator[None]:
    """ZeRO 1: after an update the other ranks do not get the last rank's shard."""
    from trainer.engines.lean_deepspeed import deepspeed

    stage = deepspeed.runtime.zero.stage_1_and_2
    with _replaced(stage, "all_gather_dp_groups", _gather_but_the_last):
        yield


def _gather_but_the_last(
    whole: Callable[..., None],
    groups_flat: Any = None,
    partitioned_param_groups: Any = None,
    dp_process_group: Any = None,
    **options: Any,
) -> None:
    rank = torch.distributed.get_rank(dp_process_group[0])
    kept = [partitions[-1].clone() for partitions in partitioned_param_groups]
    whole(
        groups_flat=groups_flat,
        partitioned_param_groups=partitioned_param_groups,
        dp_process_group=dp_process_group,
        **options,
    )
    for partitions, old in zip(partitioned_param_groups, kept, strict=True):
        if rank < len(partitions) - 1:
            partitions[-1].copy_(old)


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    whole = getattr(owner, name)
    with patch.object(owner, name, lambda *args, **options: by(whole, *args, **options)):
        yield
