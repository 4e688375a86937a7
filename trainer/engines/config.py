"""The part of a job file that chooses and configures the engine, which updates the networks."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]

LARGEST_BUCKET = 200_000_000
"""The most elements that DeepSpeed reduces or gathers in one bucket."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed: ZeRO shards optimiser state, gradients and weights (Rajbhandari et al. 2020).

    Experts can be spread across ranks.
    """

    name: Literal["deepspeed"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. 0 shards nothing; 1 shards optimiser state, 2 also gradients, 3 also weights."""
    ep: int | Literal["auto"] = 1
    """Ranks that share one set of experts; must divide the numbers of workers and of experts.

    auto: the largest number that divides both, whatever number of workers the run
    gets; 1 with ZeRO 3.
    """
    offload_optimizer: bool = False
    """Whether to keep the optimiser state in CPU memory; needs ZeRO 1, 2 or 3."""

    def __post_init__(self) -> None:
        if self.ep != "auto" and self.ep < 1:
            raise ValueError(f"ep is {self.ep}; it must be at least 1")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer is true with zero 0; offloading needs zero 1, 2 or 3")


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig:
    """Hugging Face Accelerate: one device or DDP; every rank holds a whole copy of the network."""

    name: Literal["accelerate"] = "accelerate"


EngineConfig = DeepSpeedConfig | AccelerateConfig
