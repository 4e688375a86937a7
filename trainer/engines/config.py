"""The part of a job file that says how networks are updated."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


LARGEST_BUCKET = 200_000_000
"""Elements that DeepSpeed reduces or gathers together, at most."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed: optimiser state, gradients and weights sharded by ZeRO (Rajbhandari et al. 2020), experts over ranks."""

    name: Literal["deepspeed"] = "deepspeed"
    zero: Literal[0, 1, 2, 3] = 1
    """Stage: 1 shards the optimiser's state, 2 the gradients as well, 3 the weights as well."""
    ep: int | Literal["auto"] = 1
    """Ranks that share one set of experts; divides the number of workers and of experts. auto: as many as do, whatever the number of workers."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory (ZeRO >= 1)."""

    def __post_init__(self) -> None:
        if self.ep != "auto" and self.ep < 1:
            raise ValueError(f"ep is {self.ep}; it must be at least 1")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer is true with zero 0; offloading needs zero 1, 2 or 3")


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig:
    """Hugging Face Accelerate: one device or DDP, with a whole copy of the network on each rank."""

    name: Literal["accelerate"] = "accelerate"


EngineConfig = DeepSpeedConfig | AccelerateConfig
