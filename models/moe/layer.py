"""The mixture-of-experts layer on one device. A forward pass takes eight steps:

    1 group    samples into routing groups   layer.py                            x_BTD -> x_GND
    2 score    every token for every expert  router.py                           logits_GNE
    3 choose   experts and gates per token   policies.py                         expert_GA, gate_GA
    4 keep     assignments within capacity   policies.py                         keep_GA
    5 sort     tokens' rows by expert        dispatch.py                         x_AD, counts_E
    6 send     rows to their experts' ranks  trainer/engines/expert_parallel.py  x_AD
    7 apply    each expert to its own rows   experts.py                          y_AD
    8 combine  rows of each token by gate    dispatch.py                         y_AD -> y_BTD

Step 4 is needed only with a capacity. Step 6 is needed only with experts on several ranks: it sends
the rows there and returns the results. Then a shared expert, if configured, is added, and the
router's losses and statistics are computed.

The layer knows its experts only as `self.experts(x_AD, counts_E) -> y_AD`:
trainer/engines/expert_parallel.py replaces that module by one that exchanges rows with other ranks.
Every computation across tokens (capacity, drops, balance loss) stays within a routing group of
`group` consecutive samples, so the result does not depend on how a batch is split into
micro-batches.

Legend: B samples, T positions, D model width, G routing groups, N tokens per group, A assignments,
E experts, K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.layers import SwiGLU
from models.moe.dispatch import combine, dispatch, sort_by_expert
from models.moe.experts import Experts
from models.moe.policies import (
    Assignments,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    count,
    experts_per_token,
    load_balance,
    router_z,
    within_capacity,
)
from models.moe.router import Router
from models.random import derive, uniform


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes, routing and losses of a mixture-of-experts layer."""

    experts: int
    """Number of experts."""
    ffn: int
    """Inner width of each expert."""
    router: RoutingConfig = field(default_factory=SwitchRouting)
    """Routing that assigns tokens to experts."""
    capacity_factor: float | None = None
    """Capacity of an expert per routing group, in multiples of the mean load; assignments beyond it
    are dropped. null: dropless."""
    eval_capacity_factor: float | None = None
    """Capacity factor in evaluation; null: dropless."""
    drop_policy: Literal["position", "probability"] = "position"
    """Order in which assignments fill the capacity. `position`: first choices before second
    choices, early tokens before late ones; `probability`: larger gates first (batch priority of
    V-MoE)."""
    jitter: float = 0.0
    """Half-width of the uniform noise from [1 - jitter, 1 + jitter] that multiplies the router's
    input in training."""
    balance_loss: float = 0.01
    """Weight of the balance loss."""
    z_loss: float = 0.001
    """Weight of the router z-loss."""
    balance: Literal["group", "global"] = "group"
    """Load that the balance loss evens out: each routing group's own, or the whole batch's, taken
    from the previous step."""
    shared_expert: int = 0
    """Inner width of an expert that serves every token in addition to the routed experts
    (DeepSeekMoE); 0 for none."""
    group: int = 1
    """Number of consecutive samples that form a routing group; a micro-batch holds whole groups."""
    control: Literal["none", "frozen", "permuted"] = "none"
    """Control of a proof, with which routing is compared. `frozen`: the router keeps its initial
    weights; `permuted`: the tokens of a group exchange their choices, gates included, at random."""

    def __post_init__(self) -> None:
        if self.experts < 1 or self.ffn < 1 or self.group < 1:
            raise ValueError(
                f"moe: experts {self.experts}, ffn {self.ffn} and group {self.group} must all be at least 1"
            )
        if not 0 <= self.jitter < 1 or min(self.balance_loss, self.z_loss, self.shared_expert) < 0:
            raise ValueError(
                f"moe: jitter {self.jitter}, balance_loss {self.balance_loss}, z_loss {self.z_loss} "
                f"and shared_expert {self.shared_expert} must not be below 0, and jitter must be below 1"
            )
        max_experts_per_token = self.experts - isinstance(self.router, NoisyTopKRouting)
        mean = experts_per_token(self.router)
        if mean > max_experts_per_token:
            raise ValueError(
                f"moe.router: {mean:g} experts per token are too many for {self.router.name} "
                f"with {self.experts} experts; use at most {max_experts_per_token}"
            )
        for name, factor in (
            ("capacity_factor", self.capacity_factor),
            ("eval_capacity_factor", self.eval_capacity_factor),
        ):
            if factor is not None and factor <= 0:
                raise ValueError(f"moe.{name}: {factor} must be above 0, or null for dropless")
            if factor is not None and isinstance(self.router, ExpertChoiceRouting):
                raise ValueError(
                    f"moe.{name}: {factor} does not go with expert_choice, whose capacity is set by experts_per_token; "
                    "use null"
                )
        if self.balance == "global" and isinstance(self.router, NoisyTopKRouting | ExpertChoiceRouting):
            raise ValueError(
                f"moe.balance: global does not go with {self.router.name}, which has no such balance loss; use group"
            )


class RouteStats(NamedTuple):
    """Losses and statistics of one layer.

    The two losses are means over each group's tokens. The other values are float32 sums without
    gradient, which add up over micro-batches and ranks.
    """

    balance_G: Tensor
    """Balance loss of each group, without its weight."""
    z_G: Tensor
    """Router z-loss of each group, without its weight."""
    load_E: Tensor
    """Number of assignments of each expert, before drops."""
    dropped: Tensor
    """Number of assignments dropped for lack of capacity; for expert_choice, of tokens that no
    expert chose."""
    entropy: Tensor
    """Entropy of the router's distribution in nats, summed over tokens."""
    gate: Tensor
    """Sum of the gates of all assignments, before drops."""
    tokens: Tensor
    """Number of tokens."""
    max_rows: Tensor
    """Number of rows (assignments within capacity) of the expert that has most, in this forward
    pass."""
    rows: Tensor
    """Number of rows of all experts."""


def permuted(routing: Assignments, keys_G: Tensor) -> Assignments:
    """Exchange the choices and gates of a group's tokens among them, by a permutation drawn from
    `keys_G` (G,)."""
    groups, tokens, _ = routing.probs_GNE.shape
    order_GN = uniform(keys_G, (tokens,)).argsort(dim=1, stable=True)
    if routing.token_GA is not None:
        return routing._replace(token_GA=order_GN.gather(1, routing.token_GA))

    def moved(values_GA: Tensor) -> Tensor:
        return values_GA.view(groups, tokens, -1).take_along_dim(order_GN[:, :, None], 1).flatten(1)

    return routing._replace(expert_GA=moved(routing.expert_GA), gate_GA=moved(routing.gate_GA))


def router_loss(config: MoEConfig, stats: Sequence[RouteStats], balance_factor_L: Tensor | None = None) -> Tensor:
    """Return balance_loss * balance + z_loss * z, summed over layers: (G,). `balance_factor_L`
    multiplies each layer's balance loss; default 1."""
    balance_LG = torch.stack([layer.balance_G for layer in stats])
    z_LG = torch.stack([layer.z_G for layer in stats])
    if balance_factor_L is not None:
        balance_LG = balance_LG * balance_factor_L[:, None]
    return (config.balance_loss * balance_LG + config.z_loss * z_LG).sum(0)


class MoELayer(nn.Module):
    """Routed SwiGLU experts, and a shared expert if configured. The output of a dropped token is
    zero: only the residual path carries the token."""

    def __init__(self, config: MoEConfig, d_model: int, std: float = 0.02, out_std: float = 0.02):
        super().__init__()
        self.config = config
        self.router = Router(
            config.router,
            config.experts,
            d_model,
            config.jitter,
            config.balance == "global",
            std,
            config.control == "frozen",
        )
        self.experts: nn.Module = Experts(config.experts, d_model, config.ffn, std=std, out_std=out_std)
        self.shared = SwiGLU(d_model, config.shared_expert, std, out_std) if config.shared_expert else None

    def forward(self, x_BTD: Tensor, keys_B: Tensor) -> tuple[Tensor, RouteStats]:
        """Return the layer's output (B, T, D), and its losses and statistics.

        `keys_B` (int64) are the samples' random keys, from `models.random.sample_keys`, for jitter
        and noise. Raises ValueError if B is not a multiple of the group's size.
        """
        samples = len(x_BTD)
        group = self._group()
        if samples % group:
            raise ValueError(
                f"moe.group: {group} consecutive samples form a routing group, but the micro-batch has {samples}; "
                f"use a multiple of {group}"
            )
        routing = self.router(x_BTD.reshape(samples // group, -1, x_BTD.shape[-1]), keys_B)
        if self.config.control == "permuted":
            routing = permuted(routing, derive(keys_B[::group], "permuted choices"))
        keep_GA = self._keep(routing)
        y_ND, counts_E = self._experts(x_BTD.flatten(0, 1), routing, keep_GA)
        y_BTD = y_ND.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, self._stats(routing, keep_GA, counts_E)

    def after_step(self, load_E: Tensor) -> None:
        """Update the router from the load (E,) of the whole global batch. Call it after each
        optimiser step, with the same load on all ranks."""
        self.router.update_bias(load_E)
        self.router.remember_load(load_E)

    def _group(self) -> int:
        """Return the number of samples per routing group: one in an evaluation where tokens are
        independent, so that any number of samples is accepted."""
        alone = self.config.eval_capacity_factor is None and not isinstance(self.config.router, ExpertChoiceRouting)
        return 1 if alone and not self.training else self.config.group

    def _keep(self, routing: Assignments) -> Tensor | None:
        """Return a mask (G, A) of the assignments within capacity; None if all are."""
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is None:
            return None
        tokens = routing.probs_GNE.shape[1]
        assignments = routing.expert_GA.shape[1]
        # Fedus et al. 2021, equation 3; 1e-6 undoes rounding such as 1.1 * 80 = 88.00000000000001.
        capacity = math.ceil(factor * assignments / self.config.experts - 1e-6)
        if self.config.drop_policy == "probability":
            order_GA = -routing.gate_GA.detach()
        else:
            k = assignments // tokens
            index_A = torch.arange(assignments, device=routing.expert_GA.device)
            order_GA = (index_A % k * tokens + index_A // k).expand_as(routing.expert_GA)
        return within_capacity(routing.expert_GA, order_GA, capacity, self.config.experts)

    def _experts(self, x_ND: Tensor, routing: Assignments, keep_GA: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output (all tokens, D) of the routed experts, and the number of rows (E,) of
        each."""
        if torch.is_autocast_enabled(x_ND.device.type):
            # Cast here rather than in the experts, so that rows are sent in this type.
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        groups, tokens, _ = routing.probs_GNE.shape
        expert_GA = routing.expert_GA
        gate_GA = routing.gate_GA.to(x_ND.dtype)
        if keep_GA is not None:
            expert_GA = expert_GA.where(keep_GA, self.config.experts)
            gate_GA = gate_GA.where(keep_GA, 0)
        if routing.token_GA is None:
            token_A = torch.arange(expert_GA.numel(), device=x_ND.device) // (expert_GA.shape[1] // tokens)
        else:
            token_A = (routing.token_GA + tokens * torch.arange(groups, device=x_ND.device)[:, None]).flatten()
        rows = sort_by_expert(expert_GA.flatten(), token_A, self.config.experts, even=routing.token_GA is None)
        y_AD = self.experts(dispatch(x_ND, rows), rows.counts_E)
        return combine(y_AD, gate_GA.flatten(), len(x_ND), rows), rows.counts_E

    def _stats(self, routing: Assignments, keep_GA: Tensor | None, counts_E: Tensor) -> RouteStats:
        """Compute the losses and statistics of one forward pass."""
        load_GE = count(routing.expert_GA, self.config.experts).to(routing.gate_GA.dtype)
        balance_G = routing.balance_G
        if balance_G is None:
            share_GE = load_GE
            if self.config.balance == "global":
                share_GE = self.router.last_load_E.to(load_GE).expand_as(load_GE)
            balance_G = load_balance(share_GE / share_GE.sum(-1, keepdim=True), routing.probs_GNE)
        z_G = router_z(routing.log_z_GN)
        with torch.no_grad():
            groups, tokens, _ = routing.probs_GNE.shape
            if routing.token_GA is not None:
                dropped = (count(routing.token_GA, tokens) == 0).sum()
            else:
                dropped = load_GE.new_zeros(()) if keep_GA is None else (~keep_GA).sum()
            entropy = torch.special.entr(routing.probs_GNE).sum()
            gate = routing.gate_GA.sum()
            sums = (
                load_GE.sum(0),
                dropped,
                entropy,
                gate,
                load_GE.new_full((), groups * tokens),
                counts_E.max(),
                counts_E.sum(),
            )
        return RouteStats(balance_G, z_G, *(value.detach().float() for value in sums))
