"""Experts across ranks (`run.engine.ep`): each rank keeps a slice of the experts.

Tokens travel to their experts and back in two all-to-alls. `shard_experts` replaces every `Experts`
of a model before its engine is built. The model does not notice, because the replacement has the
same call and the same parameter names.

Legend: N rows (token copies sorted by expert), D model width, E experts, L experts of this rank,
R ranks of the group.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.moe.experts import Experts
from trainer.engines.lean_deepspeed import deepspeed

groups = deepspeed.utils.groups


class _Recognised(deepspeed.moe.layer.MoE):
    """A base that DeepSpeed recognises as its own MoE, so that it sets up the groups of experts.

    The constructor of DeepSpeed's class is skipped.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)


class ShardedExperts(Experts, _Recognised):
    """This rank's slice of `experts`, with the same call and the same parameter names.

    Tokens are exchanged with the other `ep_size` - 1 ranks of the group.
    """

    def __init__(self, experts: Experts, ep_size: int, ep_rank: int):
        local = experts.total // ep_size
        super().__init__(
            local,
            experts.d_model,
            experts.ffn,
            first_expert=ep_rank * local,
            total=experts.total,
            std=experts.std,
            out_std=experts.out_std,
        )
        if not experts.gate_up.is_meta:
            part = experts.part(self.first_expert, local)
            self.gate_up = part.gate_up
            self.down = part.down
        self.ep_size = ep_size
        self.num_local_experts = local
        self.expert_group_name = f"ep_size_{ep_size}"
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the groups, which all layers share.

        DeepSpeed's engine calls this method, on all ranks at once.
        """
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Do the same as `Experts.forward`; `counts_E` counts the rows of all experts."""
        group = groups._get_expert_parallel_group(self.expert_group_name)
        received_RL = torch.empty_like(counts_E).view(self.ep_size, -1)
        dist.all_to_all_single(received_RL, counts_E.view(self.ep_size, -1), group=group)
        # The host must know uneven split sizes: one transfer brings all sizes of this layer.
        sent, received = torch.stack((counts_E.view(self.ep_size, -1).sum(1), received_RL.sum(1))).tolist()
        arrived_ND = _AllToAll.apply(x_ND[: sum(sent)], sent, received, group)
        order_N, back_N = _by_expert(received_RL, sum(received))
        y_ND = super().forward(arrived_ND[order_N], received_RL.sum(0))
        returned_ND = _AllToAll.apply(y_ND[back_N], received, sent, group)
        return nn.functional.pad(returned_ND, (0, 0, 0, len(x_ND) - sum(sent)))


class _Exchange(Protocol):
    """The context of `_AllToAll`: the sizes of both ways, and the ranks that exchange rows."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup


class _AllToAll(torch.autograd.Function):
    """Sends rows to the ranks of the group, `sent[r]` of them to rank r; gradients travel back."""

    @staticmethod
    def forward(ctx: _Exchange, x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent = sent
        ctx.received = received
        ctx.group = group
        y_ND = x_ND.new_empty(sum(received), *x_ND.shape[1:])
        dist.all_to_all_single(y_ND, x_ND.contiguous(), received, sent, group=group)
        return y_ND

    @staticmethod
    def backward(ctx: _Exchange, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        x_ND = grad_ND.new_empty(sum(ctx.sent), *grad_ND.shape[1:])
        dist.all_to_all_single(x_ND, grad_ND.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return x_ND, None, None, None


def _by_expert(received_RL: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The permutation that orders `rows` received rows by expert, and its inverse.

    The rows arrive ordered by (rank, expert). Each expert's rows keep the order of their ranks.
    """
    ranks, local = received_RL.shape
    expert_per_count = torch.arange(local, device=received_RL.device).repeat(ranks)
    expert_N = expert_per_count.repeat_interleave(received_RL.flatten(), output_size=rows)
    order_N = expert_N.argsort(stable=True)
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, back_N


def shard_experts(network: nn.Module, ep_size: int, rank: int) -> nn.Module:
    """Replace each `Experts` in `network` by this rank's slice.

    With an `ep_size` of 1, the network keeps its plain modules, which hold all experts. Raises
    ValueError if `ep_size` does not divide the number of experts.
    """
    if ep_size == 1:
        return network
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Experts):
                if child.total % ep_size:
                    raise ValueError(
                        f"run.engine.ep: {ep_size} does not divide the {child.total} experts; choose a divisor of both"
                    )
                setattr(parent, name, ShardedExperts(child, ep_size, rank % ep_size))
    return network
