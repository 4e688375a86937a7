"""Detection of collapsed routing: the config, and the counters.

The counters are part of the training state, and so of its checkpoints.

Legend: L mixture-of-experts layers, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.moe.layer import MoEConfig
from models.moe.policies import ExpertChoiceRouting, experts_per_token


@dataclass(frozen=True, kw_only=True)
class Warn:
    """Report the collapse and continue training."""

    name: Literal["warn"] = "warn"
    """Selects this action."""


@dataclass(frozen=True, kw_only=True)
class RaiseBalanceLoss:
    """Multiply the balance loss of the collapsed layer."""

    name: Literal["raise_balance_loss"] = "raise_balance_loss"
    """Selects this action."""
    factor: float = 2.0
    """Factor by which one collapse multiplies the balance loss."""
    most: float = 16.0
    """Upper limit of the product of all factors."""

    def __post_init__(self) -> None:
        if not 1 < self.factor <= self.most:
            raise ValueError(
                f"factor is {self.factor} and most {self.most}; factor must be above 1, and most at least factor"
            )


@dataclass(frozen=True, kw_only=True)
class ReinitDeadExperts:
    """Reinitialise the layer's experts that received no token for `steps` steps.

    Their rows in the router are set close to the busiest expert's.
    """

    name: Literal["reinit_dead_experts"] = "reinit_dead_experts"
    """Selects this action."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End the run, with a checkpoint."""

    name: Literal["stop"] = "stop"
    """Selects this action."""


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """A layer has collapsed when one expert gets more than `share` of its tokens in `steps`
    consecutive steps."""

    share: float = 0.9
    """Share of the tokens of the global batch, before drops, above which an expert has too many.
    1 switches the watch off. An equal share (k of E experts) is never a collapse."""
    steps: int = 100
    """Consecutive steps above `share` that make a collapse; the count restarts after the action."""
    action: Warn | RaiseBalanceLoss | ReinitDeadExperts | Stop = Warn()
    """Response to a collapse. Every action also writes an event, a line and the metric
    `collapse/layerN`."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.steps < 1:
            raise ValueError(f"share is {self.share} and steps {self.steps}; share must be in (0, 1], steps at least 1")


class RoutingWatch(nn.Module):
    """Counts for how many steps every expert has had too many tokens, or none.

    The counters stay on the device, without a synchronisation with the host. They are float32,
    which is exact up to 2^24 steps.
    """

    over_LE: Tensor
    """Consecutive steps in which the expert had more than the share."""
    idle_LE: Tensor
    """Consecutive steps in which the expert had no token."""
    raised_L: Tensor
    """Factor on the layer's balance loss."""
    share_LE: Tensor
    """Every expert's share of the tokens in the last step."""

    def __init__(self, config: CollapseConfig, per_token: float, layers: int, experts: int):
        super().__init__()
        self.config, self.per_token = config, per_token
        self.limit = max(config.share, per_token / experts)
        self.register_buffer("over_LE", torch.zeros(layers, experts))
        self.register_buffer("idle_LE", torch.zeros(layers, experts))
        self.register_buffer("raised_L", torch.ones(layers))
        self.register_buffer("share_LE", torch.zeros(layers, experts), persistent=False)

    @torch.no_grad()
    def count(self, load_LE: Tensor) -> None:
        """Update the counters with one step's load of the whole global batch."""
        self.share_LE.copy_(self.per_token * load_LE / load_LE.sum(1, keepdim=True))
        self.over_LE.add_(1).mul_(self.share_LE > self.limit)
        self.idle_LE.add_(1).mul_(load_LE == 0)


def build_watch(config: CollapseConfig, moe: MoEConfig | None, layers: int) -> RoutingWatch | None:
    """The watch over `layers` routers; None if routing cannot collapse.

    It cannot without experts, or where the experts choose their tokens themselves.
    """
    if moe is None or layers == 0 or isinstance(moe.router, ExpertChoiceRouting):
        return None
    if isinstance(config.action, RaiseBalanceLoss) and moe.balance_loss == 0:
        raise ValueError(
            "collapse.action: raise_balance_loss, but model.moe.balance_loss is 0, which no factor raises; "
            "set it above 0, or use another action"
        )
    return RoutingWatch(config, experts_per_token(moe.router), layers, moe.experts)
