"""How one network is updated: DeepSpeed (ZeRO 0-3, experts across ranks, offload) or Accelerate (one device, DDP, MPS). Never stacked."""

from torch import nn

from trainer.core.protocols import Engine
from trainer.engines.config import AccelerateConfig, DeepSpeedConfig, EngineConfig
from trainer.engines.optim import OptimizerConfig
from trainer.world import World


def build_engine(
    config: EngineConfig, network: nn.Module, optimizer: OptimizerConfig, bf16: bool, world: World
) -> Engine:
    """The engine for `network`, whose experts are already sharded. Imported here: each framework takes seconds to load."""
    match config:
        case DeepSpeedConfig():
            from trainer.engines.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(config, network, optimizer, bf16)
        case AccelerateConfig():
            from trainer.engines.accelerate_engine import AccelerateEngine

            return AccelerateEngine(network, optimizer, bf16, world)
