"""Build what DeepSpeed compiles at its first use, so that the first run does not wait for it: `python -m trainer.engines.prebuild`."""

from torch import nn

from trainer.engines import DeepSpeedConfig, build_engine
from trainer.optim import OptimizerConfig
from trainer.world import joined


def main() -> None:
    """Bring up DeepSpeed once, in a world of one: whatever it compiles is then in torch's extension cache."""
    with joined() as world:
        build_engine(DeepSpeedConfig(), nn.Linear(4, 4).to(world.device), OptimizerConfig(), bf16=False, world=world)


if __name__ == "__main__":
    main()
