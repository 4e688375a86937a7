"""The objectives that a job can name, and the one place that builds them."""

from trainer.core.protocols import Objective
from trainer.objectives.contrastive import ContrastiveObjective, SimCLRConfig
from trainer.objectives.diffusion import DDPMConfig, DDPMObjective
from trainer.objectives.distill import DistillObjective
from trainer.objectives.gan import GanConfig, GanObjective
from trainer.objectives.language import LanguageObjective
from trainer.objectives.language_config import DistillConfig, LanguageConfig, MaskedLanguageConfig
from trainer.objectives.two_towers import TwoTowersConfig, TwoTowersObjective
from trainer.objectives.vae import VAEConfig, VAEObjective

ObjectiveConfig = LanguageConfig | DistillConfig | MaskedLanguageConfig | VAEConfig | DDPMConfig | GanConfig | SimCLRConfig | TwoTowersConfig


def build_objective(config: ObjectiveConfig, seed: int) -> Objective:
    """The objective with its networks on the CPU, not yet initialised."""
    match config:
        case LanguageConfig() | MaskedLanguageConfig():
            return LanguageObjective(config, seed)
        case DistillConfig():
            return DistillObjective(config, seed)
        case VAEConfig():
            return VAEObjective(config, seed)
        case DDPMConfig():
            return DDPMObjective(config, seed)
        case GanConfig():
            return GanObjective(config, seed)
        case SimCLRConfig():
            return ContrastiveObjective(config, seed)
        case TwoTowersConfig():
            return TwoTowersObjective(config, seed)
