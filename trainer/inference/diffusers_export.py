"""Export of a diffusion run to a folder that `diffusers.DDPMPipeline.from_pretrained` loads."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from models.diffusion.diffusers_format import scheduler_arguments, unet_arguments
from models.diffusion.unet import UNet
from trainer.core.protocols import Objective
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.diffusion import DDPMConfig, DDPMObjective
from trainer.storage import Folder

VERSION = "0.42.0"
"""The version of diffusers whose layout is written."""


def check_diffusers(config: ObjectiveConfig) -> None:
    """Raises ValueError for a network or a schedule that diffusers does not have."""
    assert isinstance(config, DDPMConfig), "others have another format"
    if config.network.name != "unet":
        raise ValueError(
            f"run.objective.network.name: {config.network.name}; diffusers has the unet alone, "
            "so only runs with it can be exported"
        )
    scheduler_arguments(config.diffusion)


def write_diffusers(objective: Objective, target: Folder) -> list[str]:
    """Write the folder. Returns a line for every property of the run that it cannot express."""
    assert isinstance(objective, DDPMObjective), "others have another format"
    assert isinstance(objective.model, UNet), "check_diffusers refuses other networks"
    _, height, width = objective.data.shape
    unet = unet_arguments(objective.model, sample_size=height) | {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
    }
    scheduler = scheduler_arguments(objective.config.diffusion) | {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
    }
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": VERSION,
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    _write(target / "unet", "config.json", unet)
    _write(target / "scheduler", "scheduler_config.json", scheduler)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "diffusion_pytorch_model.safetensors"
        save_file(
            {name: value.contiguous() for name, value in objective.model.state_dict().items()},
            file,
            metadata={"format": "pt"},
        )
        (target / "unet").put(file, file.name)
    _write(target, "model_index.json", index)
    notes = []
    if height != width:
        notes.append(
            f"images are {height} x {width}, and DDPMPipeline makes square ones: give the shape of the noise yourself"
        )
    if objective.classes is not None:
        notes.append("DDPMPipeline knows no classes: call its unet with class_labels and step with its scheduler")
    return notes


def _write(folder: Folder, name: str, values: Mapping[str, object]) -> None:
    folder.make().write(name, json.dumps(values, indent=2).encode())
