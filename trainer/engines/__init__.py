"""Engines, which update one network: DeepSpeed or Accelerate, never one on top of the other.

DeepSpeed offers ZeRO 0 to 3, experts across ranks and offloading. Accelerate offers one device, DDP
and Apple's MPS.
"""

from torch import nn

from trainer.core.protocols import Engine
from trainer.engines.config import AccelerateConfig, DeepSpeedConfig, EngineConfig
from trainer.engines.optim import OptimizerConfig
from trainer.world import World


def build_engine(
    config: EngineConfig, network: nn.Module, optimizer: OptimizerConfig, bf16: bool, world: World
) -> Engine:
    """Build the engine of `network`, whose experts are already sharded."""
    # The imports are in the branches because each framework takes seconds to load.
    match config:
        case DeepSpeedConfig():
            from trainer.engines.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(config, network, optimizer, bf16)
        case AccelerateConfig():
            from trainer.engines.accelerate_engine import AccelerateEngine

            return AccelerateEngine(network, optimizer, bf16, world)
