"""`switchwork export`: a run's weights in the format that the rest of the world reads. One process, no Ray, no cluster."""

from rich.console import Console

from launch.inspect import read_run
from trainer.config import RunConfig
from trainer.export import check_exportable, write_transformers
from trainer.export_diffusers import check_diffusers, write_diffusers
from trainer.inference import load_objective
from trainer.objectives.contrastive import SimCLRConfig
from trainer.objectives.diffusion import DDPMConfig, DDPMObjective
from trainer.objectives.gan import GanConfig
from trainer.objectives.language import LanguageObjective
from trainer.objectives.language_config import DistillConfig, LanguageConfig, MaskedLanguageConfig
from trainer.objectives.two_towers import TwoTowersConfig
from trainer.objectives.vae import VAEConfig
from trainer.run_folder import find_run
from trainer.storage import Folder, absolute, check_writable


def export(console: Console, run: str, to: str) -> None:
    """Write the last checkpoint of `run` to the new or empty folder `to`. ValueError for what the format cannot hold."""
    folder, target = find_run(run), Folder(absolute(to))
    config = read_run(folder)
    if target.names():
        raise ValueError(f"--to: {to} is not empty; name a new folder")
    step, loads, notes = _write(config, folder, target, console)
    console.print(f"{config.name}, step {step}, to {target}: {loads}", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)


def _write(config: RunConfig, folder: Folder, target: Folder, console: Console) -> tuple[int, str, list[str]]:
    """Step of the checkpoint, what loads the folder, and what it cannot say."""
    match config.objective:
        case LanguageConfig() | DistillConfig() | MaskedLanguageConfig():
            check_exportable(config.objective)
            objective, step = load_objective(config, folder, console.print)
            assert isinstance(objective, LanguageObjective)
            check_writable(target.url, "--to")
            return step, "transformers.AutoModelForCausalLM.from_pretrained loads it", write_transformers(objective, target)
        case DDPMConfig():
            check_diffusers(config.objective)
            objective, step = load_objective(config, folder, console.print)
            assert isinstance(objective, DDPMObjective)
            check_writable(target.url, "--to")
            return step, "diffusers.DDPMPipeline.from_pretrained loads it", write_diffusers(objective, target)
        case VAEConfig() | GanConfig() | SimCLRConfig() | TwoTowersConfig():
            raise ValueError(f"run {folder}: no format elsewhere holds a {config.objective.name}; read its checkpoints (safetensors and JSON)")
