"""The table of objectives, from which job files are read and objectives are built.

A new objective is a file here with a config (`ObjectiveConfig` of config.py) and a class
(`BaseObjective` of base.py), a line in `OBJECTIVES`, a job file in launch/configs/ and a test.
trainer/README.md shows a complete one.
"""

from collections.abc import Callable
from typing import Annotated, Any

from trainer.core.protocols import Objective
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.contrastive import SimCLRConfig, SimCLRObjective
from trainer.objectives.diffusion import DDPMConfig, DDPMObjective
from trainer.objectives.gan import GanConfig, GanObjective
from trainer.objectives.language.config import DistillConfig, LanguageConfig, MaskedLanguageConfig
from trainer.objectives.language.distill import DistillObjective
from trainer.objectives.language.objective import LanguageObjective, MaskedLanguageObjective
from trainer.objectives.two_towers import TwoTowersConfig, TwoTowersObjective
from trainer.objectives.vae import VAEConfig, VAEObjective
from trainer.parsing import OneOf, forget_adapters

Build = Callable[[Any, int], Objective]
"""Builds an objective from its config and the run's seed.

Its networks are on the CPU and not yet initialised.
"""

OBJECTIVES: dict[type[ObjectiveConfig], Build] = {
    LanguageConfig: LanguageObjective,
    DistillConfig: DistillObjective,
    MaskedLanguageConfig: MaskedLanguageObjective,
    VAEConfig: VAEObjective,
    DDPMConfig: DDPMObjective,
    GanConfig: GanObjective,
    SimCLRConfig: SimCLRObjective,
    TwoTowersConfig: TwoTowersObjective,
}

AnyObjective = Annotated[ObjectiveConfig, OneOf(OBJECTIVES)]
"""The `objective` of a job file; `name` selects its line of the table."""


def register(config: type[ObjectiveConfig], build: Build) -> None:
    """Add an objective that is defined outside this package, in this process.

    Every worker must call it as well.
    """
    OBJECTIVES[config] = build
    forget_adapters()


def build_objective(config: ObjectiveConfig, seed: int) -> Objective:
    """The objective with its networks on the CPU, not yet initialised."""
    return OBJECTIVES[type(config)](config, seed)
