"""Routings: five published ways to assign tokens to experts, from the scores of the router.

They are Switch (Fedus et al. 2021), top-k (GShard, Lepikhin et al. 2021), noisy top-k (Shazeer et
al. 2017), expert choice (Zhou et al. 2022) and bias balancing (DeepSeek-V3 2024). All handle G
routing groups at once, but no choice depends on more than its own group. All values are float32
(float64 in tests).

Legend: G groups, N tokens per group, E experts, K experts per token, C tokens per expert, A
assignments per group (N K token-major, or E C expert-major for `expert_choice`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SwitchRouting:
    """Top-1 routing of the Switch Transformer (Fedus, Zoph and Shazeer 2021)."""

    name: Literal["switch"] = "switch"
    """Selects this routing."""


@dataclass(frozen=True, kw_only=True)
class TopKRouting:
    """Top-k routing (GShard, GLaM, Mixtral, Qwen3-MoE)."""

    name: Literal["top_k"] = "top_k"
    """Selects this routing."""
    k: int = 2
    """Number of experts per token."""
    normalise: bool = True
    """Whether the gates are divided by their sum, which makes them a softmax over the chosen
    experts (Mixtral, GShard); needs k > 1."""

    def __post_init__(self) -> None:
        _check_k(self.k, self.normalise)


@dataclass(frozen=True, kw_only=True)
class NoisyTopKRouting:
    """Noisy top-k gating (Shazeer et al. 2017). The noise is off in evaluation."""

    name: Literal["noisy_top_k"] = "noisy_top_k"
    """Selects this routing."""
    k: int = 2
    """Number of experts per token: at least 2, and fewer than there are experts."""
    importance_loss: float = 1.0
    """Weight of the importance loss within the balance loss."""
    load_loss: float = 1.0
    """Weight of the load loss within the balance loss."""

    def __post_init__(self) -> None:
        _check_k(self.k, normalise=True)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouting:
    """Expert choice: experts choose their tokens (Zhou et al. 2022).

    The load is balanced by construction. For bidirectional models only.
    """

    name: Literal["expert_choice"] = "expert_choice"
    """Selects this routing."""
    experts_per_token: float = 2.0
    """Mean number of experts per token: the c of equation 1."""

    def __post_init__(self) -> None:
        if self.experts_per_token <= 0:
            raise ValueError(f"experts_per_token: {self.experts_per_token} must be above 0; Zhou et al. use 2")


@dataclass(frozen=True, kw_only=True)
class BiasBalancedRouting:
    """Sigmoid scores, balanced without a loss by a bias on the choice (DeepSeek-V3 2024)."""

    name: Literal["bias_balanced"] = "bias_balanced"
    """Selects this routing."""
    k: int = 2
    """Number of experts per token."""
    normalise: bool = True
    """Whether the gates are divided by their sum (equation 13); needs k > 1."""
    scale: float = 1.0
    """Factor on the gates (2.5 in DeepSeek-V3)."""
    bias_rate: float = 0.001
    """Change of the bias per step: gamma in section 2.1.2."""

    def __post_init__(self) -> None:
        _check_k(self.k, self.normalise)


RoutingConfig = SwitchRouting | TopKRouting | NoisyTopKRouting | ExpertChoiceRouting | BiasBalancedRouting


def _check_k(k: int, normalise: bool) -> None:
    if k < 1:
        raise ValueError(f"k: {k} must be at least 1")
    if k == 1 and normalise:
        raise ValueError(
            "k: 1 with normalised gates makes every gate 1 and leaves the router without a gradient; "
            "use name: switch, or normalise: false"
        )


def experts_per_token(router: RoutingConfig) -> float:
    """Return the mean number of assignments per token."""
    match router:
        case SwitchRouting():
            return 1
        case ExpertChoiceRouting(experts_per_token=mean):
            return mean
        case _:
            return router.k


class Assignments(NamedTuple):
    """Assignments of tokens to experts in G groups, before any drop."""

    probs_GNE: Tensor
    """The router's weight of each expert, normalised to one: P of the balance loss, and the
    distribution of the entropy."""
    log_z_GN: Tensor
    """Log-sum-exp of the logits, for the z-loss."""
    expert_GA: Tensor
    """Expert of each assignment, int64."""
    gate_GA: Tensor
    """Weight of the expert's output."""
    token_GA: Tensor | None = None
    """Token of each assignment, int64; None if every token has K assignments in order (assignment a
    belongs to token a // K)."""
    balance_G: Tensor | None = None
    """The routing's own balance loss, if it replaces Switch's."""


def softmax(logits_GNE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over experts, and its log-normaliser (G, N). On a CPU torch.softmax is
    three times slower for so few experts."""
    log_z_GN1 = logits_GNE.logsumexp(-1, keepdim=True)
    return (logits_GNE - log_z_GN1).exp(), log_z_GN1.squeeze(-1)


def switch(logits_GNE: Tensor) -> Assignments:
    """Top-1 (Fedus et al. 2021, equations 1 and 2). The gate is the probability itself: normalised
    it would be 1, and the router would get no gradient."""
    probs_GNE, log_z_GN = softmax(logits_GNE)
    gate_GN, expert_GN = probs_GNE.max(-1)
    return Assignments(probs_GNE, log_z_GN, expert_GN, gate_GN)


def top_k(logits_GNE: Tensor, k: int, normalise: bool) -> Assignments:
    """Top-k: GLaM (Du et al. 2021, section 4); with `normalise` GShard (Lepikhin et al. 2020,
    algorithm 1) and Mixtral (Jiang et al. 2024, section 2.1, whose softmax over the top-k logits is
    the same)."""
    probs_GNE, log_z_GN = softmax(logits_GNE)
    gate_GNK, expert_GNK = probs_GNE.topk(k)
    if normalise:
        gate_GNK = gate_GNK / gate_GNK.sum(-1, keepdim=True)
    return Assignments(probs_GNE, log_z_GN, expert_GNK.flatten(1), gate_GNK.flatten(1))


def noisy_top_k(logits_GNE: Tensor, noise_GNE: Tensor | None, std_GNE: Tensor, config: NoisyTopKRouting) -> Assignments:
    """Noisy top-k (Shazeer et al. 2017, equations 3 to 5): softmax over the k largest of logits +
    noise * std, where std is softplus(...).

    The balance loss is w_importance CV(Importance)^2 (equations 6 and 7) + w_load CV(Load)^2
    (equations 8 to 11). Without noise (in evaluation) Load is not defined, and its term is left
    out.
    """
    noisy_GNE = logits_GNE if noise_GNE is None else logits_GNE + noise_GNE * std_GNE
    top, top_expert = noisy_GNE.topk(config.k + 1)
    gate_GNK = top[..., : config.k].softmax(-1)
    expert_GNK = top_expert[..., : config.k]
    gates_GNE = torch.zeros_like(logits_GNE).scatter(-1, expert_GNK, gate_GNK)
    balance_G = config.importance_loss * squared_cv(gates_GNE.sum(1))
    if noise_GNE is not None:
        # The k-th largest of the others: for a chosen expert that is the (k+1)-th of all, for any
        # other the k-th.
        chosen_GNE = torch.zeros_like(logits_GNE, dtype=torch.bool).scatter(-1, expert_GNK, True)
        threshold_GNE = torch.where(chosen_GNE, top[..., config.k :], top[..., config.k - 1 : config.k])
        load_GE = torch.special.ndtr((logits_GNE - threshold_GNE) / std_GNE).sum(1)
        balance_G = balance_G + config.load_loss * squared_cv(load_GE)
    return Assignments(*softmax(logits_GNE), expert_GNK.flatten(1), gate_GNK.flatten(1), balance_G=balance_G)


def expert_choice(logits_GNE: Tensor, per_token: float) -> Assignments:
    """Expert choice (Zhou et al. 2022, equations 1 and 2): each expert takes the C = N c / E tokens
    of the group that score highest with it."""
    _, tokens, experts = logits_GNE.shape
    capacity = min(tokens, max(1, round(tokens * per_token / experts)))
    probs_GNE, log_z_GN = softmax(logits_GNE)
    gate_GEC, token_GEC = probs_GNE.transpose(1, 2).topk(capacity)
    expert_GEC = torch.arange(experts, device=logits_GNE.device)[:, None].expand_as(token_GEC)
    return Assignments(
        probs_GNE,
        log_z_GN,
        expert_GEC.flatten(1),
        gate_GEC.flatten(1),
        token_GEC.flatten(1),
        logits_GNE.new_zeros(len(logits_GNE)),
    )


def bias_balanced(logits_GNE: Tensor, bias_E: Tensor, config: BiasBalancedRouting) -> Assignments:
    """Bias-balanced (DeepSeek-V3 2024, equations 12 to 16): the k largest of sigmoid(logits) +
    bias; the gates ignore the bias.

    Normalised over all experts, the scores are those of its sequence-wise balance loss (equations
    17 to 20).
    """
    scores_GNE = logits_GNE.sigmoid()
    expert_GNK = (scores_GNE + bias_E).topk(config.k).indices
    gate_GNK = scores_GNE.gather(-1, expert_GNK)
    if config.normalise:
        gate_GNK = gate_GNK / gate_GNK.sum(-1, keepdim=True)
    probs_GNE = scores_GNE / scores_GNE.sum(-1, keepdim=True)
    return Assignments(probs_GNE, logits_GNE.logsumexp(-1), expert_GNK.flatten(1), config.scale * gate_GNK.flatten(1))


def squared_cv(values_GE: Tensor) -> Tensor:
    """Return the squared coefficient of variation over experts, (G,): population variance divided
    by the squared mean."""
    return values_GE.var(-1, correction=0) / (values_GE.mean(-1) ** 2 + 1e-10)


def count(expert_GA: Tensor, experts: int) -> Tensor:
    """Count the assignments (G, E) of each expert, int64, without the host knowing them
    (torch.bincount would wait for the GPU)."""
    zeros_GE = torch.zeros(len(expert_GA), experts, dtype=torch.int64, device=expert_GA.device)
    return zeros_GE.scatter_add_(1, expert_GA, torch.ones_like(expert_GA))


def load_balance(share_GE: Tensor, probs_GNE: Tensor) -> Tensor:
    """Return Switch's balance loss (G,) without its factor alpha (Fedus et al. 2021, equations 4 to
    6): E sum_i f_i P_i.

    `share_GE` is f, the share of each expert in all assignments. It sums to one for every k, so
    that 1 always means balance.
    """
    return probs_GNE.shape[-1] * (share_GE * probs_GNE.mean(1)).sum(-1)


def router_z(log_z_GN: Tensor) -> Tensor:
    """Return the router z-loss (G,) (Zoph et al. 2022, ST-MoE, equation 5): the mean squared
    log-sum-exp of the logits."""
    return log_z_GN.square().mean(-1)


def within_capacity(expert_GA: Tensor, order_GA: Tensor, capacity: int, experts: int) -> Tensor:
    """Return a mask (G, A) of the assignments within capacity, when each expert accepts `capacity`
    per group in ascending `order_GA`."""
    by_order_GA = order_GA.argsort(dim=1, stable=True)
    by_expert_GA = by_order_GA.gather(1, expert_GA.gather(1, by_order_GA).argsort(dim=1, stable=True))
    expert_sorted_GA = expert_GA.gather(1, by_expert_GA)
    counts_GE = count(expert_GA, experts)
    starts_GE = counts_GE.cumsum(1) - counts_GE
    rank_GA = torch.arange(expert_GA.shape[1], device=expert_GA.device) - starts_GE.gather(1, expert_sorted_GA)
    return torch.empty_like(expert_GA, dtype=torch.bool).scatter_(1, by_expert_GA, rank_GA < capacity)
