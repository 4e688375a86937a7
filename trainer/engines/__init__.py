"""How one network is updated: DeepSpeed (ZeRO 0-3, experts across ranks, offload) or Accelerate (one device, DDP, MPS). Never stacked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

from trainer.optim import OptimizerConfig
from trainer.world import World

if TYPE_CHECKING:
    from trainer.shards import Fragment

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


class Engine(Protocol):
    """How one network is updated."""

    module: nn.Module
    """What the objective's loss calls."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar of this rank, whose mean over the ranks is minimised)."""

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        """Clip, update at the learning rate `lr`, set the gradients to zero; returns the global gradient norm before clipping.

        Nothing but the gradients changes, on any rank, unless `update` (the same on all ranks), or where that norm is not finite.
        """

    def fragments(self) -> "list[Fragment]":
        """Every piece of weights, moments and buffers that this rank holds, as views: writing to them changes the state."""

    def refresh(self) -> None:
        """Bring the network up to date after the fragments were written to."""


def build_engine(config: EngineConfig, network: nn.Module, optimizer: OptimizerConfig, bf16: bool, world: World) -> Engine:
    """The engine for `network`, whose experts are already sharded. Imported here: each framework takes seconds to load."""
    match config:
        case DeepSpeedConfig():
            from trainer.engines.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(config, network, optimizer, bf16)
        case AccelerateConfig():
            from trainer.engines.accelerate_engine import AccelerateEngine

            return AccelerateEngine(network, optimizer, bf16, world)
