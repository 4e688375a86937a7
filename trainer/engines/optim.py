"""AdamW with weight decay by tag, and learning rates as a plain function of the step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from models.init import decays


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final` of the peak at the last step.

    Loshchilov & Hutter 2017, eq. 5.
    """

    name: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, constant, then linear decay to `final` of the peak in the last `decay_steps`.

    Hu et al. 2024, MiniCPM.
    """

    name: Literal["wsd"] = "wsd"
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Steps of linear decay at the end of the run."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then constant. The only schedule that works without a last step."""

    name: Literal["constant"] = "constant"
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""


Schedule = Cosine | WarmupStableDecay | Constant


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with fp32 moments."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the parameters tagged for it: matrices and stacks of matrices."""
    clip: float | None = 1.0
    """Largest global norm of the gradients; larger ones are scaled down. null: no clipping."""
    schedule: Schedule = Cosine()
    """Schedule of the learning rate."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0, or null for no clipping")


def learning_rate(config: OptimizerConfig, step: int, steps: int | None) -> float:
    """The learning rate of update number `step` (from 0) of `steps`.

    The schedules `cosine` and `wsd` need `steps`.
    """
    schedule = config.schedule
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if isinstance(schedule, Constant):
        return config.lr * warmup
    assert steps is not None, "RunConfig.check refuses a schedule that decays without a last step"
    match schedule:
        case Cosine():
            progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
            cosine = math.cos(math.pi * min(1.0, max(0.0, progress)))
            factor = schedule.final + (1 - schedule.final) * 0.5 * (1 + cosine)
        case WarmupStableDecay():
            left = (steps - step) / schedule.decay_steps if schedule.decay_steps else 1.0
            factor = schedule.final + (1 - schedule.final) * min(1.0, max(0.0, left))
    return config.lr * warmup * factor


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of parameters with equal decay, for an optimiser.

    Experts that live on this rank alone are in groups of their own, as DeepSpeed requires.
    """
    groups: dict[tuple[bool, str], dict[str, Any]] = {}
    for parameter in network.parameters():
        expert_group = getattr(parameter, "group_name", "")
        decay = decays(parameter)
        group = {"params": [], "weight_decay": config.weight_decay if decay else 0.0}
        if expert_group:
            group |= {"moe": True, "name": expert_group}
        groups.setdefault((decay, expert_group), group)["params"].append(parameter)
    return list(groups.values())


def adamw(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build torch's fused AdamW; the loop sets the learning rate before each update."""
    return torch.optim.AdamW(
        parameter_groups(network, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
